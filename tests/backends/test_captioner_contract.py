"""What every captioner promises, whatever its family: a file in ``backends/caption/`` is tested here without an edit.

The families and their model types come from the registry, the tiny models from ``tiny_captioners.save``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from curation import backends
from curation.backends.caption import base
from curation.caption.batching import ShardCaptioner, caption_batch
from curation.caption.captioner import Family, OutOfMemory, known_models, resolve
from curation.caption.feed import CaptionLoader
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.models.batch_size import FittingBatchSize
from curation.models.known import spelling
from curation.models.listing import table as lines_of
from curation.replies import FIRST
from tests import EXAMPLES, ROOT
from tests.backends.conftest import FIELDS, LONG, accepted, asks, no_value_breaks_out, open_captioner, with_fields
from tests.servers.hub import Model as HubModel
from tests.servers.hub import serve
from tests.test_architecture import HEAVY

FAMILIES: dict[str, Family] = backends.families("caption")
# Another kind of layer in a family that is tested here: tests/backends/test_chat.py opens them, and all types of the
# family that opens many.
VARIANTS = ("qwen3_vl_moe", "qwen3_5_moe")
TYPES = [
    kind for family in FAMILIES.values() if not family.general for kind in family.model_types if kind not in VARIANTS
]
SERVED = [name for name, family in FAMILIES.items() if family.served]
TOKENS = 12


def of_one_shape(prepared: Sequence[Any]) -> list[Any]:
    """The most images that may share a batch."""
    shapes = [p.shape for p in prepared]
    return [p for p in prepared if p.shape == max(shapes, key=shapes.count)]


# ---- what a file declares


def check_declaration(name: str, family: Family) -> None:
    assert family.name == name, "the family has the name of its file"
    assert family.batch_size >= 1 and family.max_tokens >= 1
    assert family.served or family.model_types, "nothing could be loaded from a folder"
    for model in family.models:
        assert model.short and model.licence and model.suits and model.parameters > 0
        assert all(other == other.lower() for other in (model.short, *model.other_names))
        if family.hub_names is not None:
            assert re.search(family.hub_names, model.source.lower().partition("/")[2]), f"{model.source} is not of it"
    if family.models:
        assert family.hub_names is not None, "a tuned copy of these models on the hub would not be known"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_declares_what_is_needed(name: str) -> None:
    check_declaration(name, FAMILIES[name])


def test_no_two_families_claim_the_same_model() -> None:
    names: list[str] = []
    for family in FAMILIES.values():
        for model in family.models:
            names += [model.short, model.source.lower(), *model.other_names]
            hub_name = model.source.lower().partition("/")[2]
            claim = [f.name for f in FAMILIES.values() if f.hub_names is not None and re.search(f.hub_names, hub_name)]
            assert claim == [family.name]
    assert len(set(map(spelling, names))) == len(names)
    assert len(set(TYPES)) == len(TYPES)


def test_every_model_is_listed_and_found_by_each_of_its_names() -> None:
    table = "\n".join(lines_of(known_models(FAMILIES)))
    for family in FAMILIES.values():
        for model in family.models:
            assert model.short in table and model.licence in table
            for name in (*model.names, model.short.upper(), model.short.replace("-", "_")):
                assert resolve(name, FAMILIES) == (family, model.source)


def test_the_models_are_listed_in_a_second_without_a_heavy_library() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", str(ROOT / "05_recaption.py"), "--list_models"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in listed.stderr.splitlines() if "|" in line}
    assert "curation" in loaded and not loaded & set(HEAVY)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "seconds of a core"
    for family in FAMILIES.values():
        assert all(model.short in listed.stdout for model in family.models)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_says_itself_what_it_is(model_type: str, folder: Callable[[str], Path]) -> None:
    family, source = resolve(str(folder(model_type)), FAMILIES)
    assert model_type in family.model_types and source == str(folder(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_fetched_by_its_short_name(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    family = FAMILIES[name]
    if not family.models:
        pytest.skip(f"{name}: declares no model with a short name")
    model = family.models[-1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with serve({model.source: HubModel(folder(family.model_types[-1]))}) as hub:
        environment = {**kept, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-m", "curation", "models", "fetch", "05", "--model", model.short]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "whole" in done.stdout, done.stderr
    cache = tmp_path / "hub" / f"models--{model.source.replace('/', '--')}"
    assert list(cache.glob("snapshots/*/model.safetensors"))


# ---- captions


@pytest.mark.parametrize("name", SERVED)
def test_models_of_servers(name: str) -> None:
    pytest.skip(f"{name}: servers load its models; tests/backends/test_caption.py asks some")


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_batch_says_what_one_by_one_says(
    model_type: str, temperature: float, tiny: Callable[..., Any], photos: list[Any]
) -> None:
    """In float32, and with images that come in another order; different images get different captions."""
    # some captions end before others
    backend = tiny(model_type, temperature=temperature, max_tokens=40 if temperature else TOKENS)
    assert backend.name and backend.revision and backend.device_kind == "cpu"
    batch = of_one_shape([backend.prepare(photo) for photo in photos])
    assert len(batch) >= 2
    assert all(isinstance(one.shape, tuple) and one.nbytes > 0 for one in batch)
    seeds = list(range(100, 100 + len(batch)))
    together = backend.caption(batch, seeds)
    assert together == [backend.caption([one], [seed])[0] for one, seed in zip(batch, seeds, strict=True)]
    assert together == backend.caption(batch[::-1], seeds[::-1])[::-1]
    assert together == backend.caption(batch, seeds)
    assert len(set(together)) > 1
    assert all(reply.text for reply in together)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_calls_of_the_device(
    model_type: str, tiny: Callable[..., Any], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ``generate`` a batch, with as many rows as images, nothing padded differently than alone, no beams."""
    backend = tiny(model_type)
    batch = of_one_shape([backend.prepare(photo) for photo in photos])
    calls: list[dict[str, Any]] = []
    generate = backend.model.generate
    monkeypatch.setattr(backend.model, "generate", lambda **given: (calls.append(given), generate(**given))[1])
    backend.caption(batch, [0] * len(batch))
    (call,) = calls
    length = batch[0].tensors["input_ids"].shape[1]
    assert tuple(call["input_ids"].shape) == (len(batch), length)
    assert tuple(call["attention_mask"].shape) == (len(batch), length)
    assert call["pixel_values"].shape[0] == sum(one.tensors["pixel_values"].shape[0] for one in batch)
    settings = call["generation_config"]
    assert (settings.num_beams, settings.do_sample, settings.max_new_tokens) == (1, False, TOKENS)
    processors = [type(processor).__name__ for processor in call["logits_processor"]]
    assert processors == (["NoRepeatedNgrams"] if model_type == "florence2" else [])
    assert not settings.no_repeat_ngram_size


@pytest.mark.parametrize("model_type", TYPES)
def test_what_does_not_fit_is_told_from_a_bug(
    model_type: str, tiny: Callable[..., Any], photos: list[Any], monkeypatch: pytest.MonkeyPatch, any_text: None
) -> None:
    """What torch says when it is asked for more memory than any machine has; and an error of the model's code."""
    import torch

    backend = tiny(model_type)
    batch = of_one_shape([backend.prepare(photo) for photo in photos])[:3]
    expected = backend.caption(batch, [0] * len(batch))
    generate = backend.model.generate

    def limited(**given: Any) -> Any:
        return torch.empty(1 << 50) if len(given["input_ids"]) > 1 else generate(**given)

    with monkeypatch.context() as patch:
        patch.setattr(backend.model, "generate", limited)
        with pytest.raises(OutOfMemory):
            backend.caption(batch, [0] * len(batch))
        captions = caption_batch(backend, FittingBatchSize(len(batch), "x"), batch, [0] * len(batch))
        assert captions == accepted(expected)
        patch.setattr(backend.model, "generate", lambda **_: torch.empty(1 << 50))
        (failed,) = caption_batch(backend, FittingBatchSize(4, "x"), batch[:1], [0])
        assert isinstance(failed, SampleError) and failed.reason == "out_of_memory"
        patch.setattr(backend.model, "generate", lambda **_: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match="size"):
            backend.caption(batch[:1], [0])
    assert backend.caption(batch, [0] * len(batch)) == expected, "it goes on afterwards"


@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_is_quantised(model_type: str, folder: Callable[[str], Path], photos: list[Any]) -> None:
    pytest.importorskip("bitsandbytes")
    backend = open_captioner(folder(model_type), quantize="8bit", max_tokens=4)
    small = [name for name, module in backend.model.named_modules() if type(module).__name__ == "Linear8bitLt"]
    assert small, "nothing is quantised"
    assert all(re.search(r"language_model|text_model", name) for name in small), "the images' encoder stays as it is"
    assert backend.caption([backend.prepare(photos[0])], [0])[0].text


@pytest.mark.parametrize("model_type", TYPES)
def test_weights_that_do_not_fit_are_moved_when_they_are_needed(
    model_type: str, folder: Callable[[str], Path], photos: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's real hooks, with the disk in the place of the machine's memory."""
    from curation.backends.caption.base import VisionLanguageModel

    whole = open_captioner(folder(model_type), max_tokens=6)
    half = whole.model.get_memory_footprint() // 2
    placement = {"device_map": "auto", "max_memory": {"cpu": half}, "offload_folder": str(tmp_path)}
    monkeypatch.setattr(VisionLanguageModel, "_placement", lambda _: placement)
    parts = open_captioner(folder(model_type), max_tokens=6, offload=True)
    assert "disk" in parts.model.hf_device_map.values()
    batch = [whole.prepare(photos[0])]
    assert parts.caption(batch, [0]) == whole.caption(batch, [0])


# ---- a file that is dropped in

DROPPED = '''
"""Idefics3 of Hugging Face."""

from curation.backends.caption.base import ChatCaptioner
from curation.caption.captioner import Family
from curation.models.known import Model


class Backend(ChatCaptioner):
    family = Family(
        name="idefics3",
        batch_size=4,
        max_tokens=100,
        model_types=("idefics3",),
        hub_names=r"idefics-?3",
        models=(Model("idefics3-8b", "HuggingFaceM4/Idefics3-8B-Llama3", 8.462, "Apache-2.0", "documents"),),
    )
'''


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A captioner's file in the folder of captioners, as far as this process can see."""
    from curation.backends import caption

    (tmp_path / "idefics3.py").write_text(DROPPED)
    monkeypatch.setattr(caption, "__path__", [*caption.__path__, str(tmp_path)])
    for cached in (backends.names, backends.families):
        cached.cache_clear()
    yield
    sys.modules.pop("curation.backends.caption.idefics3", None)
    for cached in (backends.names, backends.families):
        cached.cache_clear()


def test_a_file_that_is_dropped_in_is_found_listed_and_captions(
    dropped: None, folder: Callable[[str], Path], photos: list[Any]
) -> None:
    families = backends.families("caption")
    assert families.keys() - FAMILIES.keys() == {"idefics3"}
    check_declaration("idefics3", families["idefics3"])
    assert "idefics3-8b" in "\n".join(lines_of(known_models(families)))
    assert resolve("somebody/My-Idefics3", families) == (families["idefics3"], "somebody/My-Idefics3")
    backend = open_captioner(folder("idefics3"), max_tokens=6)
    batch = of_one_shape([backend.prepare(photo) for photo in photos])
    assert backend.caption(batch, [0] * len(batch)) == [backend.caption([one], [0])[0] for one in batch]


def test_a_file_that_cannot_be_imported_is_one_line(dropped: None, tmp_path: Path) -> None:
    (tmp_path / "idefics3.py").write_text("import a_package_that_nobody_has\n" + DROPPED)
    with pytest.raises(InfrastructureError, match=r"backends\.caption\.idefics3 cannot be imported: No module named"):
        backends.families("caption")


# ---- SmolVLM2, the first that was added as one file


def test_smolvlm_asks_in_the_words_of_its_own_processor(
    tiny: Callable[..., Any], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolVLM's own processor cannot be made without num2words and a video processor, neither of which images need."""
    from transformers.models.smolvlm import processing_smolvlm

    backend = tiny("smolvlm")
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    own = object.__new__(processing_smolvlm.SmolVLMProcessor)
    monkeypatch.setattr(processing_smolvlm.ProcessorMixin, "__init__", lambda self, *_, **__: None)
    own.__init__(backend.processor.image_processor, backend.processor.tokenizer, None, image_seq_len=4)
    for photo in photos:
        made = backend.processor.image_processor([photo], return_row_col_info=True)
        expected = backend.wordings[0].text.replace("<image>", own.replace_image_token(made, 0))
        ids = backend.prepare(photo).tensors["input_ids"][0]
        pad = backend.generation.pad_token_id
        text = backend.processor.tokenizer.decode([int(i) for i in ids if i != pad])
        assert text == expected


@pytest.mark.parametrize(("largest", "tile"), [(1536, 384), (2048, 512)], ids=["2.2B", "500M and 256M"])
def test_smolvlm_splits_an_image_as_published(
    largest: int, tile: int, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long side always becomes four tiles, whatever the image's size, and a thumbnail comes last."""
    from PIL import Image

    images = tiny("smolvlm").processor.image_processor
    monkeypatch.setattr(images, "size", {"longest_edge": largest})
    monkeypatch.setattr(images, "max_image_size", {"longest_edge": tile})
    for (width, height), (rows, columns) in {(640, 480): (3, 4), (50, 50): (4, 4), (300, 3000): (4, 1)}.items():
        made = images([Image.new("RGB", (width, height))], return_row_col_info=True, return_tensors="pt")
        assert (made["rows"], made["cols"]) == ([[rows]], [[columns]])
        assert tuple(made["pixel_values"].shape) == (1, rows * columns + 1, 3, tile, tile)
        assert bool(made["pixel_attention_mask"].all()), "no tile is padded: the mask can be left out"


def test_smolvlm_says_the_same_without_its_mask(
    tiny: Callable[..., Any], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tiny("smolvlm")
    batch = of_one_shape([backend.prepare(photo) for photo in photos])
    without = backend.caption(batch, [0] * len(batch))
    generate = backend.model.generate
    mask = backend._torch.ones_like(batch[0].tensors["pixel_values"][:, :, 0], dtype=backend._torch.int64)
    masks = mask.repeat(len(batch), 1, 1, 1)
    monkeypatch.setattr(backend.model, "generate", lambda **given: generate(**given, pixel_attention_mask=masks))
    assert backend.caption(batch, [0] * len(batch)) == without


# ---- prompts with fields


@pytest.mark.parametrize("model_type", TYPES)
def test_each_image_is_asked_with_its_own_words(
    model_type: str, tiny: Callable[..., Any], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch says what one by one says, padding changes nothing, and a value adds no special token to the prompt."""
    backend = tiny(model_type, **FIELDS)
    photo = photos[0]
    captions = ["", "a cat", "two dogs on a sofa", LONG]
    prepared = [backend.prepare(photo, asks(caption)) for caption in captions]
    batch = of_one_shape(prepared)
    assert len(batch) >= 2, "prompts of different lengths share a batch"
    together = backend.caption(batch, [0] * len(batch))
    assert together == [backend.caption([one], [0])[0] for one in batch]
    assert len({tuple(one.tensors["input_ids"][0].tolist()) for one in prepared}) == len(captions)
    monkeypatch.setattr(base, "padded_length", lambda length, _: length)
    plain = backend.prepare(photo, asks("a cat"))
    assert backend.caption([plain], [0]) == backend.caption([prepared[1]], [0]), "padding changes nothing"

    no_value_breaks_out(backend, photo)
    assert backend.asked_of(0) in ("", "Alt text: «\n». Describe it.", "». Describe it.\nAlt text: «")


@pytest.mark.parametrize("model_type", ["florence2", "gemma3", "qwen2_vl", "paligemma"])
def test_several_questions_about_one_image(
    model_type: str, tiny: Callable[..., Any], folder: Callable[[str], Path], photos: list[Any]
) -> None:
    """Each is answered as if it were the only one, with its own length."""
    first, second = "Describe the picture.", "Alt text: «{caption}». Describe it."
    both = with_fields(first, second)["questions"]
    both = (both[0], dataclasses.replace(both[1], max_tokens=5))
    backend = open_captioner(folder(model_type), questions=both)
    one = backend.prepare(photos[0])
    other = backend.prepare(photos[0], asks("a cat", 1))
    alone = tiny(model_type, **FIELDS)
    assert backend.caption([one], [0]) == tiny(model_type, prompt=first).caption([one], [0])
    (short,), (whole,) = backend.caption([other], [0], FIRST, 1), alone.caption([other], [0])
    assert whole.text.startswith(short.text) and len(short.text) < len(whole.text)


def test_prompts_that_a_model_cannot_take(
    tiny: Callable[..., Any], folder: Callable[[str], Path], photos: list[Any]
) -> None:
    for model_type in ("florence2", "qwen2_vl"):
        backend = tiny(model_type, **FIELDS)
        most = backend._most_positions()
        if most > 4000:
            continue
        with pytest.raises(SampleError) as raised:
            backend.prepare(photos[0], asks("word " * most))
        assert raised.value.reason == "prompt_too_long" and f"{most:,}" in raised.value.detail
    with pytest.raises(UsageError, match="takes no field"):
        open_captioner(folder("florence2"), **with_fields("<CAPTION> {caption}"))
    with pytest.raises(UsageError, match="gives no caption"):
        open_captioner(folder("paligemma"), **with_fields("answer en {caption}"))


def test_prompts_of_several_lengths_with_keys_at_fixed_addresses(tiny: Callable[..., Any], photos: list[Any]) -> None:
    """As ``--compile decode`` keeps them."""
    plain, static = (tiny("florence2", compile=how, **FIELDS) for how in ("none", "decode"))
    for caption in ("a cat", LONG * 2, "a dog"):
        batch = [plain.prepare(photo, asks(caption)) for photo in photos[:2]]
        assert static.caption(batch, [0, 0]) == plain.caption(batch, [0, 0])


def test_the_batch_size_is_tried_with_the_longest_captions(
    tiny: Callable[..., Any], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = with_fields("What is it?", "Alt «{caption}».")["questions"]
    asked = (asked[0], dataclasses.replace(asked[1], max_tokens=20))
    backend = open_captioner(folder("qwen2_vl"), questions=asked)
    loader = CaptionLoader(backend, 1, questions=asked)
    captioner = ShardCaptioner(backend, loader, batch_size=None, seed_of=len, sizes=tmp_path, what="x", questions=asked)
    found = captioner._heaviest(EXAMPLES / "00000003.tar")
    assert found is not None and found[1] == 1
    loader.close()


def test_a_value_that_stays_a_special_token_is_refused(tiny: Callable[..., Any], photos: list[Any]) -> None:
    """As of a tokenizer with a special token of one letter, which no space can break."""
    backend = tiny("qwen2_vl", **FIELDS)
    letter = backend.processor.tokenizer("§", add_special_tokens=False)["input_ids"][-1]
    before = backend._special
    backend._special = before | {letter}
    try:
        with pytest.raises(SampleError) as raised:
            backend.prepare(photos[0], asks("a § b"))
        assert raised.value.reason == "prompt_refused"
        backend.prepare(photos[0], asks("a b"))
    finally:
        backend._special = before
