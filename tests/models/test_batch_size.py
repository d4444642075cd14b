"""Batches that are halved where memory runs out, and tried once more where a library may mean that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.errors import DeviceError
from curation.models import onnx
from curation.models.batch_size import FittingBatchSize, Shortage, is_out_of_memory, shortage_of

DISGUISED = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"


def computed(memory: FittingBatchSize, count: int, fails: Callable[[int], Shortage | None]) -> list[int]:
    """Compute so many samples; returns the sizes that were tried.  What ``fails`` returns is a call's answer."""
    tried: list[int] = []

    def call(start: int, end: int) -> list[int] | Shortage:
        tried.append(end - start)
        return fails(end - start) or list(range(start, end))

    done: list[int] = []
    try:
        for _, _, part in memory.split(count, (64, 64), call):
            assert not isinstance(part, Shortage)
            done += part
    except DeviceError as error:
        assert DISGUISED in str(error)
        return [*tried, -1]
    assert done == list(range(count)), "nothing is lost"
    return tried


def test_a_shortage_in_disguise_is_tried_once_more_with_half_the_batch(tmp_path: Path) -> None:
    doubtful = Shortage(DISGUISED, certain=False)
    memory = FittingBatchSize(8, "cuda", tmp_path)
    assert computed(memory, 12, lambda size: doubtful if size > 4 else None) == [8, 4, 4, 4]
    assert FittingBatchSize(8, "cuda", tmp_path).limit(64, 64) == 4, "it is remembered, since half of it has helped"


def test_a_device_that_fails_twice_is_broken_and_no_size_is_recorded(tmp_path: Path) -> None:
    doubtful = Shortage(DISGUISED, certain=False)
    assert computed(FittingBatchSize(8, "cuda", tmp_path), 8, lambda _: doubtful) == [8, 4, -1]
    assert computed(FittingBatchSize(8, "cuda", tmp_path), 1, lambda _: doubtful) == [1, 1, -1]
    assert not list(tmp_path.iterdir()), "other processes have devices that work"


def test_one_sample_that_fails_once_leaves_the_batch_as_it_is() -> None:
    memory, answers = FittingBatchSize(8, "cuda"), [None, Shortage(DISGUISED, certain=False), None]
    assert computed(memory, 9, lambda _: answers.pop(0)) == [8, 1, 1]
    assert memory.limit(64, 64) == 8


def test_certain_and_doubtful_shortages_after_one_another() -> None:
    answers = [Shortage(DISGUISED, certain=False), Shortage("out of memory"), Shortage(DISGUISED, certain=False), None]
    assert computed(FittingBatchSize(16, "cuda"), 16, lambda _: answers.pop(0) if answers else None)[:5] == [
        16, 8, 4, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "certain"),
    [
        (DISGUISED, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("GET was unable to find an engine to execute this computation", False),
        ("Unable to find a valid cuDNN algorithm to run convolution", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", False),
        ("HIP out of memory. Tried to allocate 2 GiB", True),
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9", True),
    ],
)
def test_what_the_libraries_say(text: str, certain: bool) -> None:
    onnxruntimes = type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})
    for error in (RuntimeError(f"{text}\nand more"), onnxruntimes(text)):
        assert shortage_of(error) == Shortage(text, certain)
        assert is_out_of_memory(error)
    assert shortage_of(ValueError(text)) is None
    assert shortage_of(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


def test_onnxruntimes_arena_has_a_limit_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", onnx)  # its being loaded is all that counts
    options = onnx._cuda_options(3)
    assert options["device_id"] == "3"
    assert int(options["gpu_mem_limit"]) == onnx.ARENA_BESIDE_TORCH
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    monkeypatch.delitem(sys.modules, "torch")
    assert "gpu_mem_limit" not in onnx._cuda_options(3), "alone it may have the device"
