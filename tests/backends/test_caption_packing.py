"""Batches that are packed beside the device: the same captions, whichever part of a batch a call takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from curation.backends.caption.packing import Inputs, Packer, together
from tests.backends.conftest import open_captioner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

load = partial(open_captioner, max_tokens=8)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "float32", "bfloat16"])
def test_packed_tensors_are_those_that_were_joined(dtype: str) -> None:
    """With any number of rows an image, and tensors that are views of others, as processors make them."""
    numbers = torch.arange(5 * 3 * 4).view(5, 3, 4).to(getattr(torch, dtype))
    images = [
        Inputs({"pixels": numbers[n].T[: 1 + n % 3], "same": numbers[:1, 0], "all": numbers[n, :1].expand(2, 4)}, (3,))
        for n in range(5)
    ]
    packed = Packer("cpu").pack(images)
    assert [one.shape for one in packed] == [(3,)] * 5 and packed[0].nbytes == images[0].nbytes
    for places in ([0, 1, 2, 3, 4], [1, 2], [4], [0, 3, 3], [2, 1]):
        found = together([packed[place] for place in places])
        assert found is not None
        for name, tensor in found.items():
            expected = torch.cat([images[place].tensors[name] for place in places])
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
            assert torch.equal(torch.cat([packed[place].tensors[name] for place in places]), expected)
    whole = together(packed)
    assert whole is not None and whole["pixels"].data_ptr() == packed[0].tensors["pixels"].data_ptr(), "nothing moved"


def test_images_of_two_batches_are_joined_anew() -> None:
    images = [Inputs({"pixels": torch.full((1, 2), n)}, (2,)) for n in range(4)]
    first, second = Packer("cpu").pack(images[:2]), Packer("cpu").pack(images[2:])
    assert together([first[0], second[0]]) is None
    assert together([first[0], images[1]]) is None
    assert together(images) is None


@pytest.mark.parametrize(
    ("family", "compile_how"), [("florence2", "none"), ("florence2", "decode"), ("qwen2_vl", "none")]
)
def test_captions_of_packed_batches_are_the_same(
    family: str, compile_how: str, folder: Callable[[str], Path], photos: list[Any]
) -> None:
    """Images of Qwen have any number of patches."""
    backend = load(folder(family), compile=compile_how)
    batch = [backend.prepare(photo) for photo in photos[:5]]
    seeds = list(range(len(batch)))
    expected = backend.caption(batch, seeds)
    packed = backend.pack(batch)
    assert backend.caption(packed, seeds) == expected
    assert backend.caption(packed, seeds) == expected, "it may be asked again"
    assert backend.caption(packed[2:], seeds[2:]) == backend.caption(batch[2:], seeds[2:])


def test_one_thread_does_all_that_the_device_does(
    folder: Callable[[str], Path], photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured graph belongs to the thread that captured it, and the stage calls from a new thread for each shard."""
    backend = load(folder("florence2"))
    used: set[int] = set()
    generate = backend.model.generate

    def look(**given: Any) -> Any:
        used.add(threading.get_ident())
        return generate(**given)

    monkeypatch.setattr(backend.model, "generate", look)
    prepared = [backend.prepare(photos[0])]
    for _ in range(3):
        caller = threading.Thread(target=backend.caption, args=(prepared, [0]))
        caller.start()
        caller.join()
    backend.caption(prepared, [0])
    assert len(used) == 1 and threading.get_ident() not in used
    [thread] = [thread for thread in threading.enumerate() if thread.ident in used]
    backend.close()
    assert not thread.is_alive()
