"""The captioners: every family's real architecture with random weights, on real photos; and vision servers."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from curation import backends
from curation.backends.caption.base import PROMPTS, SquareImages
from curation.caption.batching import caption_batch
from curation.caption.captioner import CaptionSettings, OutOfMemory, resolve
from curation.caption.feed import ShapeGroups
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.models.batch_size import FittingBatchSize, agreed_batch_size, find_batch_size
from curation.replies import CUT, FIRST, Attempt, Reply, Verdict
from tests import ROOT
from tests.backends import add_other_formats
from tests.backends.conftest import accepted, open_captioner
from tests.servers import ollama_stub

pytest.importorskip("transformers")


# ---- which model


@pytest.mark.parametrize(
    ("model", "family", "source"),
    [
        ("florence2-base", "florence2", "florence-community/Florence-2-base"),
        ("large", "florence2", "florence-community/Florence-2-large"),
        ("llava", "llava", "llava-hf/llava-v1.6-mistral-7b-hf"),
        ("qwen", "qwen", "Qwen/Qwen2-VL-7B-Instruct"),
        ("microsoft/Florence-2-base-ft", "florence2", "florence-community/Florence-2-base-ft"),
        ("google/gemma-3-27b-it", "gemma3", "google/gemma-3-27b-it"),
        ("somebody/my-gemma3-tuned", "gemma3", "somebody/my-gemma3-tuned"),
        ("llava-hf/llava-v1.6-vicuna-13b-hf", "llava", "llava-hf/llava-v1.6-vicuna-13b-hf"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "qwen", "Qwen/Qwen2.5-VL-72B-Instruct"),
        ("qwen3-vl-4b", "qwen", "Qwen/Qwen3-VL-4B-Instruct"),
        ("endpoint:Qwen/Qwen3-VL-4B-Instruct", "endpoint", "Qwen/Qwen3-VL-4B-Instruct"),
    ],
)
def test_names(model: str, family: str, source: str) -> None:
    found, name = resolve(model, backends.families("caption"))
    assert (found.name, name) == (family, source)


@pytest.mark.parametrize("model", ["florence9", "google/gemma-2-9b", "moondream/moondream3-preview", "/no/such/folder"])
def test_names_that_nothing_can_load(model: str) -> None:
    with pytest.raises(InfrastructureError, match="--model"):
        resolve(model, backends.families("caption"))


@pytest.mark.parametrize(
    ("config", "says"), [(None, "no config.json"), ("{", "no model_type"), ('{"model_type": "bert"}', "'bert'")]
)
def test_folders_of_something_else(tmp_path: Path, config: str | None, says: str) -> None:
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InfrastructureError, match=says):
        resolve(str(tmp_path), backends.families("caption"))


# ---- captions


@pytest.mark.parametrize("name", ["florence2", "qwen2_5_vl"])
def test_the_seed_decides_a_sample(name: str, tiny: Callable[..., Any], photos: list[Any]) -> None:
    """Not the model's own sampling settings, and not torch's global generator."""
    sampled, greedy = tiny(name, temperature=1.0), tiny(name)
    one = sampled.prepare(photos[0])
    texts = {seed: sampled.caption([one], [seed])[0] for seed in range(5)}
    assert len(set(texts.values())) == 5
    assert sampled.caption([one] * 5, [4, 3, 2, 1, 0]) == [texts[seed] for seed in (4, 3, 2, 1, 0)]
    assert len(set(greedy.caption([one] * 3, [1, 2, 3]))) == 1


def test_sampling_draws_from_the_distribution() -> None:
    """Against torch's own softmax: 20,000 draws from three tokens, within four standard deviations."""
    import torch

    from curation.backends.caption.decoding import SeededSampling

    rows = 20_000
    scores = torch.tensor([[2.0, 1.0, -torch.inf, 0.0]]).repeat(rows, 1)
    drawn = SeededSampling(2.0, list(range(rows)), 3)(torch.zeros(rows, 1), scores).argmax(1)
    expected = (scores[0] / 2.0).softmax(0)
    share = drawn.bincount(minlength=4) / rows
    assert share[2] == 0
    assert (share - expected).abs().max() < 4 * (0.25 / rows) ** 0.5


@pytest.mark.parametrize(("name", "most"), [("florence2", 1), ("gemma3", 1), ("llava_next", 4), ("qwen3_vl", 4)])
def test_images_fall_into_few_shapes(name: str, most: int, tiny: Callable[..., Any], photos: list[Any]) -> None:
    backend = tiny(name)
    assert len({backend.prepare(photo).shape for photo in photos}) <= most


def test_florence_takes_its_three_tasks(folder: Callable[[str], Path], photos: list[Any]) -> None:
    from curation.backends.caption.florence2 import Backend

    ids = []
    for detail in ("brief", "detailed", "more_detailed"):
        backend = Backend(str(folder("florence2")), CaptionSettings(detail=detail, max_tokens=4))  # type: ignore[arg-type]
        ids.append(backend.prepare(photos[0]).tensors["input_ids"][0].tolist())
        text = backend.processor.tokenizer.decode(ids[-1], skip_special_tokens=True)
        assert text == backend.processor.task_prompts_without_inputs[backend.task]
        (caption,) = backend.caption([backend.prepare(photos[0])], [0])
        assert not {"<s>", "</s>", "<pad>"} & set(caption.text.split())
    assert len({tuple(row) for row in ids}) == 3
    with pytest.raises(UsageError, match="boxes"):
        Backend(str(folder("florence2")), CaptionSettings(prompt="<OD>"))


def test_the_prompt_and_the_detail_are_what_a_chat_is_asked(tiny: Callable[..., Any], photos: list[Any]) -> None:
    def asked(**settings: Any) -> str:
        backend = tiny("qwen2_vl", **settings)
        text: str = backend.processor.tokenizer.decode(backend.prepare(photos[0]).tensors["input_ids"][0])
        return text

    assert "What is the weather like?<|im_end|>" in asked(prompt="What is the weather like?")
    assert "in one sentence" in asked(detail="brief")
    assert "signature or watermark" in asked()
    assert asked().endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["florence2", "gemma3"])
def test_pixels_are_the_processors_to_the_last_bit(
    name: str, tiny: Callable[..., Any], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sizes and with the numbers of the real models too, although half of the work is done on the device."""
    backend = tiny(name)
    taken: list[Any] = []
    generate = backend.model.generate
    monkeypatch.setattr(backend.model, "generate", lambda **given: (taken.append(given), generate(**given))[1])
    backend.caption([backend.prepare(photo) for photo in photos], [0] * len(photos))
    expected = backend.processor.image_processor(photos, return_tensors="pt")["pixel_values"]
    assert bool((taken[0]["pixel_values"] == expected).all())
    own = copy.deepcopy(backend.processor.image_processor)
    own.size, own.image_mean, own.image_std = (
        {"height": 768, "width": 768},
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
    )
    squares = SquareImages.of(own)
    assert squares is not None
    for photo in photos[:3]:
        got = squares.numbers_of(squares.bytes_of(photo), backend.dtype)
        assert bool((got == own(photo, return_tensors="pt")["pixel_values"]).all())


def test_a_processor_that_does_more_is_left_to_it(tiny: Callable[..., Any]) -> None:
    images = tiny("llava_next").processor.image_processor
    assert SquareImages.of(images) is None
    crops = copy.deepcopy(tiny("florence2").processor.image_processor)
    crops.do_center_crop = True
    assert SquareImages.of(crops) is None


def test_processors_work_in_many_threads_at_once(tiny: Callable[..., Any], photos: list[Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    backend = tiny("qwen3_vl")
    alone = [backend.prepare(photo) for photo in photos]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            for one, other in zip(alone, threads.map(backend.prepare, photos), strict=True):
                assert one.shape == other.shape
                assert all(bool((one.tensors[name] == other.tensors[name]).all()) for name in one.tensors)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_that_are_not_rgb(mode: str, tiny: Callable[..., Any], photos: list[Any]) -> None:
    backend = tiny("florence2")
    assert backend.prepare(photos[0].convert(mode)).shape == backend.prepare(photos[0]).shape


# ---- what goes wrong


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_image_that_the_processor_refuses(name: str, tiny: Callable[..., Any]) -> None:
    """Qwen's takes nothing that is more than 200 times as long as wide."""
    with pytest.raises(SampleError, match=r"processor_refused: 1000×2: .*aspect ratio"):
        tiny(name).prepare(Image.new("RGB", (1000, 2)))


class Forgetful:
    """A backend whose device has room for so many images of a shape."""

    name = revision = "forgetful"
    device_kind = "cpu"
    asked = ""

    def __init__(self, inner: Any, room: int, greedy: Sequence[Any] = ()) -> None:
        self.inner, self.room, self.greedy = inner, room, greedy
        self.family = inner.family
        self.calls: list[int] = []

    def prepare(self, image: Any) -> Any:
        return self.inner.prepare(image)

    def caption(self, batch: Sequence[Any], seeds: Sequence[int], attempt: Attempt = FIRST) -> Sequence[Reply]:
        self.calls.append(len(batch))
        if len(batch) > self.room or any(one is greedy for one in batch for greedy in self.greedy):
            raise OutOfMemory("out of memory")
        captions: Sequence[Reply] = self.inner.caption(batch, seeds, attempt)
        return captions

    def close(self) -> None: ...


def test_the_batch_is_halved_until_it_fits_and_the_size_is_remembered(
    tiny: Callable[..., Any], photos: list[Any], tmp_path: Path, any_text: None
) -> None:
    inner = tiny("florence2", temperature=1.0)
    batch = [inner.prepare(photo) for photo in photos]
    seeds = list(range(len(batch)))
    backend = Forgetful(inner, room=3)
    memory = FittingBatchSize(8, "cpu\0tiny", tmp_path)
    assert caption_batch(backend, memory, batch, seeds) == accepted(inner.caption(batch, seeds))
    assert backend.calls == [8, 4, *[2] * 6]
    again = Forgetful(inner, room=3)
    caption_batch(again, FittingBatchSize(8, "cpu\0tiny", tmp_path), batch, seeds)
    assert again.calls == [2] * 6, "another process knows it already"
    other = Forgetful(inner, room=9)
    caption_batch(other, FittingBatchSize(8, "cpu\0another", tmp_path), batch, seeds)
    assert other.calls == [8, 4], "another model does not"


def test_one_image_that_does_not_fit_costs_its_own_row(
    tiny: Callable[..., Any], photos: list[Any], any_text: None
) -> None:
    inner = tiny("florence2")
    batch = [inner.prepare(photo) for photo in photos]
    backend = Forgetful(inner, room=99, greedy=[batch[5]])
    captions = caption_batch(backend, FittingBatchSize(8, "cpu"), batch, [0] * len(batch))
    expected = accepted(inner.caption(batch, [0] * len(batch)))
    wrong = captions.pop(5)
    del expected[5]
    assert captions == expected
    assert isinstance(wrong, SampleError) and wrong.reason == "out_of_memory" and "64×64" in wrong.detail


def test_an_empty_caption_is_none(tiny: Callable[..., Any], photos: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny("qwen2_vl")
    monkeypatch.setattr(backend, "_texts", lambda rows, *_: [" \n", " two words "][: len(rows)])
    monkeypatch.setattr(backend, "_ended", lambda rows, *_: [True] * len(rows))
    first, second = caption_batch(backend, FittingBatchSize(2, "cpu"), [backend.prepare(photos[0])] * 2, [0, 0])
    assert isinstance(first, SampleError) and first.reason == "empty_caption"
    assert second == Verdict("two words")


class Scripted:
    """A backend that says what its script says, for each image one text after the other."""

    family = backends.families("caption")["endpoint"]
    name = revision = "scripted"
    device_kind = "cpu"
    asked = "Describe this image in one sentence."

    def __init__(self, scripts: Mapping[int, Sequence[Reply | str | SampleError]]) -> None:
        self.scripts = {name: [*texts] for name, texts in scripts.items()}
        self.calls: list[tuple[list[int], list[int], Attempt]] = []

    def caption(self, batch: Sequence[Any], seeds: Sequence[int], attempt: Attempt = FIRST) -> list[Any]:
        self.calls.append(([image.name for image in batch], [*seeds], attempt))
        return [self.scripts[image.name].pop(0) for image in batch]


@dataclass(frozen=True)
class Named:
    name: int
    shape: tuple[int, ...] = (3,)
    nbytes: int = 0


def captions_of(backend: Any, **settings: bool) -> list[Any]:
    batch = [Named(name) for name in backend.scripts]
    return caption_batch(backend, FittingBatchSize(8, "cpu"), batch, [*range(len(batch))], **settings)


def test_what_is_no_caption_is_asked_for_again_and_then_rejected() -> None:
    whole, refusal = "A man in a park.", "I'm sorry, but I can't help with that."
    cut = Reply("He walks. He sits. And then", CUT)
    backend = Scripted(
        {
            0: [whole],
            1: [refusal, whole],
            2: [refusal, "Sure! A man.", refusal],
            3: [cut, whole],
            4: [cut, cut],
            5: [cut, SampleError("llm_timeout")],
            6: [Reply("no end", CUT), Reply("no end at all", CUT)],
            7: ["", " ", "..."],
        }
    )
    found = captions_of(backend)
    kept = Verdict("He walks. He sits.", "reply_cut_short", True)
    assert found[:2] == [Verdict(whole)] * 2 and found[3:6] == [Verdict(whole), kept, kept]
    reasons = {place: one.reason for place, one in enumerate(found) if isinstance(one, SampleError)}
    assert reasons == {2: "reply_refusal", 6: "reply_cut_short", 7: "empty_caption"}
    assert "the last of 3 replies" in found[2].detail and "ended by length" in found[6].detail
    longer, warm, warmer = Attempt(longer=True), Attempt(warmer=1), Attempt(warmer=2)
    assert [(names, attempt) for names, _, attempt in backend.calls] == [
        ([0, 1, 2, 3, 4, 5, 6, 7], FIRST),
        ([1, 2, 7], warm),
        ([3, 4, 5, 6], longer),
        ([2, 7], warmer),
    ]
    assert backend.calls[2][1] == [3, 4, 5, 6], "the same seed, so that the text goes on"
    assert backend.calls[1][1] != [1, 2, 7], "another seed, or the reply would be the same"
    assert [longer.tokens(120), warm.tokens(120)] == [240, 120]
    assert [FIRST.temperature(0.0), warm.temperature(0.0), warmer.temperature(0.9)] == [0.0, 0.4, 1.5]


def test_a_bound_that_the_user_gave_is_kept() -> None:
    backend = Scripted({0: [Reply("He walks. And then", CUT)], 1: [Reply("and then", CUT)]})
    first, second = captions_of(backend, may_be_longer=False)
    assert first.text == "He walks." and first.cut
    assert second.reason == "reply_cut_short" and len(backend.calls) == 1


@pytest.mark.parametrize("name", ["florence2", "gemma3"])
def test_a_caption_that_reached_the_bound_was_cut(name: str, tiny: Callable[..., Any], photos: list[Any]) -> None:
    """And twice the tokens go on with the same text."""
    backend = tiny(name, max_tokens=6)
    batch = [backend.prepare(photos[0])] * 2
    short = backend.caption(batch, [0, 0])
    assert [reply.ended for reply in short] == [CUT, CUT]
    backend.generation.update(exponential_decay_length_penalty=(8, 1e4))
    long = backend.caption(batch, [0, 0], Attempt(longer=True))
    assert [reply.ended for reply in long] == ["stop", "stop"]
    assert long[0].text.startswith(short[0].text.rstrip("\ufffd")) and long[0].text != short[0].text
    end = backend.generation.eos_token_id
    backend.generation.update(exponential_decay_length_penalty=None, forced_eos_token_id=end)
    assert [reply.ended for reply in backend.caption(batch, [0, 0])] == [CUT, CUT], "an end that was forced is none"
    assert backend.caption(batch[:1], [0], Attempt(warmer=1))[0].text != short[0].text, "the next try is sampled"


def test_the_prompt_asks_for_no_more_than_fits(tiny: Callable[..., Any]) -> None:
    assert tiny("qwen2_vl", max_tokens=120).asked.endswith("without an introduction. Use at most 70 words.")
    assert tiny("qwen2_vl", max_tokens=120, max_words=20).asked.endswith("Use at most 20 words.")
    assert tiny("qwen2_vl", max_words=0).asked == PROMPTS["more_detailed"]
    assert tiny("qwen2_vl", prompt="What is this?").asked == "What is this?"


def test_a_device_that_is_not_there(folder: Callable[[str], Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InfrastructureError, match="cuda:0 was given but"):
        open_captioner(folder("gemma3"), device="cuda:0")


def load_florence(path: Path) -> Any:
    return open_captioner(path, max_tokens=4)


def test_pickled_weights_are_not_loaded(folder: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    copy = Path(shutil.copytree(folder("florence2"), tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(InfrastructureError, match=r"cannot be loaded: .*safetensors"):
        load_florence(copy)


def test_a_whole_copy_of_a_repository_loads(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Other formats and a trainer's state beside the safetensors: nobody opens them."""
    copy = Path(shutil.copytree(folder("florence2"), tmp_path / "copy"))
    add_other_formats(copy)
    load_florence(copy).close()


def test_weights_of_another_layout_are_not_made_up(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers, and caption on."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder("florence2"), tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    renamed = {name.replace("multi_modal_projector", "image_projection"): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InfrastructureError, match="its weights are not those of Florence2"):
        load_florence(copy)


def test_damaged_weights_are_one_line(folder: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder("florence2"), tmp_path / "copy"))
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InfrastructureError, match="damaged weights"):
        load_florence(copy)


def test_the_revision_tells_weights_apart(folder: Callable[[str], Path], tmp_path: Path) -> None:
    first = load_florence(folder("florence2"))
    copy = Path(shutil.copytree(folder("florence2"), tmp_path / "florence2"))
    assert (load_florence(copy).name, load_florence(copy).revision) == (first.name, first.revision)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert load_florence(copy).revision != first.revision
    with pytest.raises(InfrastructureError, match="has no other revision"):
        open_captioner(copy, revision="main")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_model_is_taken_from_the_hubs_cache(
    folder: Callable[[str], Path], photos: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word to the hub where it is whole; where a file of it is missing, the line says so."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--somebody--tiny-gemma3"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder("gemma3"), cache / "snapshots" / COMMIT)
    backend = open_captioner("somebody/tiny-gemma3", max_tokens=4)
    assert (backend.name, backend.revision) == ("somebody/tiny-gemma3", COMMIT)
    assert backend.caption([backend.prepare(photos[0])], [0])[0].text
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(InfrastructureError, match=r"somebody/tiny-gemma3: (download failed|cannot be loaded)"):
        open_captioner("somebody/tiny-gemma3")
    with pytest.raises(InfrastructureError, match="not in the hub's cache and HF_HUB_OFFLINE is set"):
        open_captioner("somebody/else-gemma3")


# ---- batches


def test_batches_follow_the_order_of_the_shard_alone() -> None:
    rng = random.Random(3)
    items = [((rng.randrange(3),), number) for number in range(50)]
    groups: ShapeGroups[tuple[tuple[int, ...], int]] = ShapeGroups(4)
    batches = [batch for item in items if (batch := groups.add(item[0], item))]
    assert all(len(batch) == 4 for batch in batches)
    rest = list(groups.rest())
    assert sorted(item for batch in [*batches, *rest] for item in batch) == sorted(items)
    for batch in [*batches, *rest]:
        assert len({shape for shape, _ in batch}) == 1
        assert batch == sorted(batch, key=lambda item: item[1])
    assert [batch[0][1] for batch in rest] == sorted(batch[0][1] for batch in rest)


def test_no_more_wait_than_they_may() -> None:
    groups: ShapeGroups[int] = ShapeGroups(4, most_waiting=6)
    waiting = 0
    for number in range(100):
        batch = groups.add((number % 3 if number % 10 else number,), number)
        waiting += 1 - len(batch)
        assert waiting <= 6
    assert sum(map(len, groups.rest())) == waiting


class Timed:
    """A device on which time passes only during its own calls."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], room: int, *slow_calls: int
    ) -> None:
        """slow_calls: numbers of a size's calls that take a minute more, each of them at every size."""
        self.now, self.seconds, self.room, self.slow_calls = 0.0, seconds, room, slow_calls
        self.calls: Counter[int] = Counter()
        monkeypatch.setattr("curation.models.batch_size.time.perf_counter", lambda: self.now)

    def fits(self, size: int) -> bool:
        if size > self.room:
            return False
        self.calls[size] += 1
        self.now += self.seconds(size) + 60 * (self.calls[size] in self.slow_calls)
        return True


@pytest.mark.parametrize("slow_calls", [(), (1,), (1, 2), (3,)], ids=str)
@pytest.mark.parametrize(
    ("seconds", "room", "best"),
    [
        (lambda n: 1.0, 40, 32),  # memory ends it
        (lambda n: 1.0 + n / 16, 10_000, 256),  # what it gains ends it
        (lambda n: float(n), 10_000, 1),  # nothing to gain
        (lambda n: 1.0, 10_000, 1024),
    ],
)
def test_the_batch_size_is_found_by_trying(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    room: int,
    best: int,
    slow_calls: tuple[int, ...],
) -> None:
    """Calls that also compile, allocate or meet a busy machine decide nothing."""
    assert find_batch_size(Timed(monkeypatch, seconds, room, *slow_calls).fits) == best


def test_one_size_without_gain_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = Timed(monkeypatch, lambda n: 2.5 if n == 2 else 1.0, 10_000)
    with caplog.at_level("INFO"):
        assert find_batch_size(device.fits, 8) == 8
    assert device.calls == {1: 4, 2: 7, 4: 4, 8: 4}, "what brings nothing is measured twice"
    [line] = caplog.messages
    assert line.endswith("8, of these sizes and their images a second: 1: 1, 2: 0.8, 4: 4, 8: 8")


def test_the_search_begins_where_it_may(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = Timed(monkeypatch, lambda n: 1.0, 40)
    assert find_batch_size(device.fits, first=16) == 32 and set(device.calls) == {16, 32}
    device = Timed(monkeypatch, lambda n: 1.0, 5)
    with caplog.at_level("INFO"):
        assert find_batch_size(device.fits, first=16) == 4 and set(device.calls) == {4}
    assert caplog.messages[-1].endswith("4: 4; 8 does not fit into memory")
    assert find_batch_size(Timed(monkeypatch, lambda n: 1.0, 0).fits) == 1


def test_workers_agree_on_the_batch_size(tmp_path: Path) -> None:
    """Sixteen that find different sizes at once: all take the one that was first."""
    folder = tmp_path / "sizes"
    barrier = threading.Barrier(16)
    sizes: list[int] = []

    def work(found: int) -> None:
        def find() -> int:
            barrier.wait()
            return found

        sizes.append(agreed_batch_size(folder, "model", find))

    threads = [threading.Thread(target=work, args=(number + 1,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) == 16 and len(set(sizes)) == 1
    (file,) = folder.iterdir()
    assert file.name == "auto-2-72347b00c5cd9f16.json"
    assert json.loads(file.read_text()) == {"batch_size": sizes[0], "search": 2}
    assert agreed_batch_size(folder, "model", lambda: 999) == sizes[0]


def test_what_the_first_search_found_is_found_anew(tmp_path: Path) -> None:
    """A single slow call decided there.  The record stays: a worker of that version may still read it."""
    old = tmp_path / "auto-72347b00c5cd9f16.json"
    old.write_text('{"batch_size": 1}\n')
    assert agreed_batch_size(tmp_path, "model", lambda: 64) == 64
    assert agreed_batch_size(tmp_path, "model", lambda: 999) == 64
    assert old.read_text() == '{"batch_size": 1}\n'


# ---- vision servers


def endpoint(*ports: int, **settings: Any) -> Any:
    settings = {"ports": ",".join(map(str, ports)), "max_tokens": 16, **settings}
    return open_captioner("endpoint:tulu3:fairclip", **settings)


@pytest.mark.parametrize("api", ["openai", "ollama"])
def test_every_picture_gets_its_own_answer_from_any_server(api: str, photos: list[Any], tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    settings = {"api": api, "latency_s": 0.02, "log": log}
    with ollama_stub(**settings) as first, ollama_stub(**settings) as second:
        backend = endpoint(first, second, temperature=0.5, prompt="What is this?")
        batch = [backend.prepare(photo) for photo in photos] * 4
        captions = [reply.text for reply in backend.caption(batch, [(1 << 62) + i for i in range(len(batch))])]
        assert captions[: len(photos)] * 4 == captions
        assert len(set(captions)) == len(photos)
        assert captions[0] == endpoint(first).caption([batch[0]], [3])[0].text
        backend.close()
    bodies = [json.loads(json.loads(line)["body"]) for line in log.read_text().splitlines()][:-1]
    seeds = sorted(body.get("seed", body.get("options", {}).get("seed")) for body in bodies)
    assert seeds == list(range(len(batch))), "31 bits of the seed"
    if api == "openai":
        picture, text = bodies[0]["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
        assert text == {"type": "text", "text": "What is this?"}
        assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0.5, 16)


def test_a_picture_that_servers_refuse_costs_its_own_row(photos: list[Any]) -> None:
    with ollama_stub(api="openai") as port:
        backend = endpoint(port, prompt="E400")
        refused, *_ = caption_batch(backend, FittingBatchSize(4, "x"), [backend.prepare(photos[0])], [0])
        assert isinstance(refused, SampleError) and refused.reason == "llm_bad_request"


def test_endpoints_that_cannot_be_used(photos: list[Any]) -> None:
    with pytest.raises(UsageError, match="no endpoint is named"):
        endpoint()
    with pytest.raises(UsageError, match="the server's own options"):
        endpoint(1, quantize="8bit")
    with pytest.raises(InfrastructureError, match="no endpoint answers"):
        endpoint(1)


def test_a_large_picture_is_sent_smaller(photos: list[Any]) -> None:
    with ollama_stub() as port:
        backend = endpoint(port)
        sent = Image.open(io.BytesIO(backend.prepare(photos[0].resize((4000, 1000))).jpeg))
        assert sent.size == (1536, 384)
        assert Image.open(io.BytesIO(backend.prepare(photos[0]).jpeg)).size == photos[0].size


@pytest.mark.slow
def test_a_real_vision_server(llama_server: str, photos: list[Any]) -> None:
    """llama.cpp's, whose real language model is shown each picture by an encoder with random weights."""
    backend = open_captioner("endpoint:tiny-vision", endpoints=llama_server, max_tokens=8, max_words=0, timeout_s=60.0)
    batch = [backend.prepare(photo) for photo in photos[:4]]
    replies = backend.caption(batch, [0] * 4)
    assert all(isinstance(reply, Reply) for reply in replies)
    assert len({reply.text for reply in replies}) > 1, "the answer depends on the picture"
    assert backend.caption(batch[:1], [0])[0].text == replies[0].text
    broken = type(batch[0])(batch[0].jpeg[:100])
    first, second = backend.caption([broken, batch[1]], [0, 0])
    assert isinstance(first, SampleError) and first.reason in ("llm_bad_request", "llm_error")
    assert isinstance(second, Reply)
    backend.close()


@pytest.mark.slow
def test_a_real_server_without_the_model(llama_server: str) -> None:
    with pytest.raises(InfrastructureError, match="serves tiny-vision, not 'another'"):
        open_captioner("endpoint:another", endpoints=llama_server)


def test_bitsandbytes_is_imported_without_its_search_on_the_hub(tmp_path: Path) -> None:
    """A package that does as bitsandbytes 0.50 does on a CPU with AVX512-BF16, and one that would fetch code."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('the hub was asked')\n")
    (tmp_path / "bitsandbytes.py").write_text(
        "import logging\nlog = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "try:\n    from kernels import get_kernel\nexcept Exception as error:\n"
        "    log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s', error)\n"
        "log.warning('something else')\n"
    )
    program = (
        "from curation.models.hub_cache import import_bitsandbytes\nimport importlib.util, sys\n"
        "import_bitsandbytes()\nprint('bitsandbytes' in sys.modules, importlib.util.find_spec('kernels') is not None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("True True\n", "something else\n")
