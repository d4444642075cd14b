"""How a captioner's tokens are chosen and its memory used: repetitions, caches in place, quantised and offloaded
weights, real failures to allocate."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from curation.backends.caption.decoding import NoRepeatedNgrams, padded_rows
from curation.caption.batching import ShardCaptioner, caption_batch
from curation.caption.feed import CaptionLoader
from curation.errors import InfrastructureError, UsageError
from curation.models.batch_size import FittingBatchSize
from tests import EXAMPLES

pytest.importorskip("transformers")
from tests.backends import tiny_captioners
from tests.backends.conftest import accepted, open_captioner

SHARD = EXAMPLES / "00000003.tar"
load = partial(open_captioner, max_tokens=24)


@pytest.fixture(scope="module")
def photos(photos: list[Any]) -> list[Any]:
    """The eight whole photos."""
    return photos[:8]


# ---- tokens


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_repetitions_that_are_banned_are_those_of_transformers(size: int) -> None:
    import torch
    from transformers import NoRepeatNGramLogitsProcessor

    ours, theirs = NoRepeatedNgrams(size), NoRepeatNGramLogitsProcessor(size)
    generator = torch.Generator().manual_seed(size)
    for length in range(1, 30):
        said = torch.randint(0, 4, (8, length), generator=generator)  # few words: many repetitions
        scores = torch.randn(8, 6, generator=generator)
        assert bool((ours(said, scores.clone()) == theirs(said, scores.clone())).all())


def test_a_captioner_repeats_nothing_as_with_generates_own_rule(
    folder: Callable[[str], Path], photos: list[Any]
) -> None:
    ours, own = load(folder("florence2")), load(folder("florence2"))
    assert ours._ngram == 3
    free = load(folder("florence2"))
    own._ngram, own.generation.no_repeat_ngram_size, free._ngram = 0, 3, 0
    batch, seeds = [ours.prepare(photo) for photo in photos], [0] * len(photos)
    captions = ours.caption(batch, seeds)
    assert captions == own.caption(batch, seeds)
    assert captions != free.caption(batch, seeds), "without the rule it would repeat itself"


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_keys_that_stay_in_place_give_the_same_captions(
    temperature: float, folder: Callable[[str], Path], photos: list[Any]
) -> None:
    """Batch after batch of several sizes: nothing of one is left in the next."""
    usual, static = (load(folder("florence2"), temperature=temperature, compile=how) for how in ("none", "decode"))
    batch, seeds = [usual.prepare(photo) for photo in photos], list(range(len(photos)))
    for rows in (8, 5, 8, 1, 7):
        assert static.caption(batch[-rows:], seeds[-rows:]) == usual.caption(batch[-rows:], seeds[-rows:])
    assert len(static._caches._caches) <= 2


def test_an_assertion_of_captured_graphs_is_told(
    folder: Callable[[str], Path], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile("assert is_key_in_tls()", "/lib/torch/_inductor/cudagraph_trees.py", "exec")
    both = {how: load(folder("florence2"), max_tokens=4, compile=how) for how in ("decode", "none")}
    for backend in both.values():
        monkeypatch.setattr(backend.model, "generate", lambda **_: exec(code, {"is_key_in_tls": lambda: False}))
    batch = [both["decode"].prepare(photos[0])]
    told = r"cannot be compiled here \(AssertionError\); use --compile none$"
    with pytest.raises(InfrastructureError, match=told):
        both["decode"].caption(batch, [0])
    with pytest.raises(AssertionError):
        both["none"].caption(batch, [0])


@pytest.mark.soak
def test_a_step_is_one_graph_for_each_size_and_a_compiler_that_fails_is_told(
    folder: Callable[[str], Path], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as on a GPU, by the switch that transformers has for its own tests."""
    from torch import _dynamo
    from transformers import CompileConfig

    usual, compiled = (load(folder("florence2"), max_tokens=4, compile=how) for how in ("none", "decode"))
    batch, seeds = [usual.prepare(photo) for photo in photos[:4]], [0] * 4
    _dynamo.reset()
    counters = _dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    config = compiled.generation.compile_config = CompileConfig(dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    for rows in (4, 2, 4, 2):
        assert compiled.caption(batch[:rows], seeds[:rows]) == usual.caption(batch[:rows], seeds[:rows])
    assert counters["stats"]["unique_graphs"] - graphs == 2
    assert sum(counters["graph_break"].values()) == breaks

    def without_a_compiler(*_: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", "g++")

    config = compiled.generation.compile_config = CompileConfig(dynamic=False, backend=without_a_compiler, mode=None)
    config._compile_all_devices = True
    _dynamo.reset()
    told = r"cannot be compiled here \(FileNotFoundError: .*'g\+\+'\); use --compile none$"
    with pytest.raises(InfrastructureError, match=told):
        compiled.caption(batch, seeds)


def test_the_sizes_that_are_compiled_are_few() -> None:
    sizes = [padded_rows(rows) for rows in range(1, 513)]
    assert all(rows <= size < 1.5 * rows for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 18 and {16, 48, 512} <= set(sizes)


def test_compiling_is_for_one_family(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="--compile decode: not for the family qwen"):
        load(folder("qwen2_vl"), compile="decode")


# ---- weights


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A captioner as wide as a block of 4 bit weights."""
    patch = pytest.MonkeyPatch()
    for sizes in (tiny_captioners.TEXT, tiny_captioners.VISION):
        patch.setitem(sizes, "hidden_size", 64)
        patch.setitem(sizes, "intermediate_size", 128)
    path = tmp_path_factory.mktemp("wide") / "llava_next"
    tiny_captioners.save("llava_next", path)
    patch.undo()
    yield path


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_weights_are_smaller_and_caption(quantize: str, wide: Path, photos: list[Any]) -> None:
    pytest.importorskip("bitsandbytes")
    whole, small = load(wide), load(wide, quantize=quantize)
    assert small.model.get_memory_footprint() < 0.8 * whole.model.get_memory_footprint()
    kinds = {name: type(module).__name__ for name, module in small.model.named_modules()}
    expected = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantize]
    assert all(kind == expected for name, kind in kinds.items() if "language_model" in name and name.endswith("_proj"))
    assert not any(kind == expected for name, kind in kinds.items() if "vision_tower" in name or "lm_head" in name)
    batch = [small.prepare(photo) for photo in photos[:2]]
    assert all(small.caption([one], [0])[0].text for one in batch)


def test_quantising_without_its_package(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"4bit needs the package bitsandbytes: .*pip install 'curation.quantize"):
        load(folder("florence2"), quantize="4bit")


# ---- memory


def fail_to_allocate() -> None:
    """Really: a petabyte, by torch's allocator on the CPU."""
    import torch

    torch.empty(1 << 50)


def fail_as_cuda_does() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def with_room_for(
    backend: Any, room: int, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None] = fail_to_allocate
) -> list[int]:
    """From now on the device has room for so many images: more end with ``fail``.  Gives what is tried."""
    tried: list[int] = []
    generate = backend.model.generate

    def limited(**given: Any) -> Any:
        rows = len(given["input_ids"])
        tried.append(rows)
        if rows > room:
            fail()
        return generate(**given)

    monkeypatch.setattr(backend.model, "generate", limited)
    return tried


@pytest.mark.parametrize("fail", [fail_to_allocate, fail_as_cuda_does])
@pytest.mark.parametrize("compile_how", ["none", "decode"])
def test_a_batch_that_cannot_be_allocated_is_halved(
    fail: Callable[[], None],
    compile_how: str,
    folder: Callable[[str], Path],
    photos: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    any_text: None,
) -> None:
    backend = load(folder("florence2"), compile=compile_how)
    batch = [backend.prepare(photo) for photo in photos]
    expected = accepted(backend.caption(batch, [0] * 8))
    tried = with_room_for(backend, 3, monkeypatch, fail)
    memory = FittingBatchSize(8, "H100 80 GiB\0florence2", tmp_path)
    assert caption_batch(backend, memory, batch, [0] * 8) == expected
    assert tried == [8, 4, 2, 2, 2, 2]
    assert caption_batch(backend, FittingBatchSize(8, "H100 80 GiB\0florence2", tmp_path), batch, [0] * 8) == expected
    assert tried[6:] == [2, 2, 2, 2], "the next process knows it"
    assert FittingBatchSize(8, "A100 40 GiB\0florence2", tmp_path).limit(*batch[0].shape) == 8, (
        "for that kind of GPU only"
    )


def test_the_batch_size_that_is_found_fits_and_is_found_once_for_a_device_and_model(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load(folder("florence2"))
    tried = with_room_for(backend, 6, monkeypatch)
    loader = CaptionLoader(backend, 1)

    def found(what: str) -> int:
        captioner = ShardCaptioner(backend, loader, batch_size=None, seed_of=len, sizes=tmp_path, what=what)
        return captioner.batch_size(SHARD)

    size = found("H100\0florence2")
    assert size in (1, 2, 4) and tried[:2] == [1, 1]
    count = len(tried)
    assert found("H100\0florence2") == size and len(tried) == count
    assert found("A100\0florence2") in (1, 2, 4) and len(tried) > count
    recorded = [json.loads(path.read_bytes())["batch_size"] for path in tmp_path.iterdir()]
    assert len(recorded) == 2 and size in recorded
    loader.close()


def test_the_stage_goes_on_with_what_fits(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_text: None
) -> None:
    """``--batch_size auto`` as on a GPU, then less memory than it found; another run begins with what fits."""
    stage = importlib.import_module("05_recaption")
    tried: list[int] = []
    room = 5

    class OnSmallGpu(stage.Recaption):  # type: ignore[name-defined, misc]
        def open(self, allocation: Any) -> None:
            super().open(allocation)
            if self.options.batch_size == "auto":
                self.captioner._batch_size = None
            tried.append(0)
            self.seen = with_room_for(self.backend, room, monkeypatch)

        def close(self) -> None:
            tried.extend(self.seen)
            super().close()

    monkeypatch.setattr(stage, "Recaption", OnSmallGpu)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--model", str(folder("florence2")), "--max_tokens", "4", "--quiet", "--device", "cpu"]
    flags += ["--max_error_rate", "1"]

    def run(out: str, *more: str) -> dict[str, Any]:
        assert stage.main([str(SHARD), "-o", str(tmp_path / out), *flags, *more]) == 0
        (receipt,) = (tmp_path / out).glob("_receipts/05_recaption/*/*.json")
        return dict(json.loads(receipt.read_bytes()))

    first = run("auto")
    assert first["notes"]["batch_size"] in (1, 2, 4) and "batch_shrunk_to" not in first["notes"]
    told = run("told", "--batch_size", "8")
    assert told["notes"]["batch_size"] == 8 and told["notes"]["batch_shrunk_to"] == 4
    assert told["counts"] == first["counts"] and told["counts"]["in"] == 8
    del tried[:]
    run("told", "--batch_size", "8", "--rerun", "--max_tokens", "4", "--seed", "1")
    assert max(tried) == 4, "nothing is tried that did not fit"
