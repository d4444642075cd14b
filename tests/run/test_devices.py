"""A device that fails is its worker's alone: the others do its shards, and the exit code says whether work is left."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from curation.errors import InfrastructureError, UsageError, device_failure, lack_of, memory_shortage
from tests.run.toy_runs import Place

ECC = "CUDA error: uncorrectable ECC error encountered"
BROKEN = f"device::{ECC}"  # whoever takes the shard
BROKEN_IN_1 = f"device:1:{ECC}"  # worker 1 alone

FAILURES = [
    ECC,
    "CUDA error: device not ready\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: unspecified launch failure",
    "CUDA driver error: CUDA_ERROR_LAUNCH_FAILED",
    "cudaErrorECCUncorrectable: uncorrectable ECC error encountered",
    "CUDA unknown error - this may be due to an incorrectly set up environment",
    "Found no NVIDIA driver on your system",
    "No CUDA GPUs are available",
    "Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus",
    "HIP error: unspecified launch failure",
    "hipErrorIllegalAddress",
    "Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=gpu17",
    "[ONNXRuntimeError] : 1 : FAIL : HIP failure 700: an illegal memory access was encountered",
]
SHORTAGES = [
    ("CUDA out of memory. Tried to allocate 2.00 GiB", "certain"),
    ("HIP out of memory. Tried to allocate", "certain"),
    ("XPU out of memory. Tried to allocate", "certain"),
    ("CUDA error: out of memory", "certain"),
    ("CUDA_ERROR_OUT_OF_MEMORY", "certain"),
    ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "certain"),
    ("Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", "certain"),
    ("nvrtc: error: out of memory", "certain"),
    ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for buffer", "certain"),
    ("bad allocation", "certain"),
    ("std::bad_alloc", "certain"),
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "doubtful"),
    ("HIPBLAS_STATUS_NOT_INITIALIZED", "doubtful"),
    ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "doubtful"),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION", "doubtful"),
    ("Unable to find a valid cuDNN algorithm to run convolution", "doubtful"),
    ("GET was unable to find an engine to execute this computation", "doubtful"),
    ("CUDNN_BACKEND_TENSOR_DESCRIPTOR cudnnFinalize failed", "doubtful"),
    ("miopenStatusInternalError", "doubtful"),
    ("mat1 and mat2 shapes cannot be multiplied", ""),
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("text", FAILURES)
def test_what_the_libraries_say_of_a_broken_device(text: str) -> None:
    onnx = type("Fail", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})
    for kind in (RuntimeError, onnx, InfrastructureError):  # the last: as a plugin or a loader says it
        assert text.partition("\n")[0] == str(device_failure(kind(text)))
    wrapped = InfrastructureError("the model cannot be loaded")
    wrapped.__cause__ = RuntimeError(text)
    assert device_failure(wrapped)
    for kind in (UsageError, ValueError, KeyError):  # a caption may say anything
        assert device_failure(kind(text)) is None
    assert lack_of(RuntimeError(text)) is None


@pytest.mark.parametrize(("text", "kind"), SHORTAGES)
def test_memory_that_ran_out_is_no_broken_device(text: str, kind: str) -> None:
    assert memory_shortage(text) == kind
    assert bool(device_failure(RuntimeError(text))) == (kind == "doubtful"), "in the end, what is doubtful is one"


def held_by_worker_0(place: Place, *arguments: object, more: tuple[str, ...] = ()) -> tuple[int, str]:
    """Two workers: the device of worker 1 fails at its first shard, while worker 0 waits with its own."""
    ids = place.shards(4, BROKEN_IN_1, "keep", *more)
    process = place.start("--workers", 2, "--hold", ",".join(ids), *arguments)
    place.wait_for("close", process)
    assert process.stderr is not None
    lines: list[str] = []
    while not lines or "has ended because its device failed" not in lines[-1]:  # else both could have ended by then
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    place.let_go()
    _, said = process.communicate(timeout=60)
    return process.returncode, "".join(lines) + said


def test_the_others_do_the_shards_of_a_worker_whose_device_fails(place: Place) -> None:
    code, said = held_by_worker_0(place)
    assert code == 0, said
    assert f"node {socket.gethostname()}: {ECC}; this process gives its shards back" in said
    assert "worker 1 has ended because its device failed; the others go on" in said
    assert "Traceback" not in said
    assert "stopped" not in said, "nobody asked worker 0 to stop"
    assert {receipt["status"] for receipt in place.receipts().values()} == {"done"}
    assert len(place.receipts()) == 4
    assert not place.litter()


def test_a_failed_shard_is_told_also_where_a_device_failed(place: Place) -> None:
    code, said = held_by_worker_0(place, more=("bug",))
    assert code == 1, said
    assert {receipt["status"] for receipt in place.receipts().values()} == {"failed"}


@pytest.mark.parametrize(
    ("workers", "checkpoint", "tasks", "code"),
    [
        (1, False, 1, 2),  # the device never worked
        (1, True, 1, 69),
        (1, False, 2, 69),  # another task's device may work
        (2, False, 1, 2),
        (2, True, 1, 75),
        (2, False, 2, 69),
    ],
)
def test_the_exit_code_where_no_device_is_left(
    workers: int, checkpoint: bool, tasks: int, code: int, place: Place
) -> None:
    ids = place.shards(3, "keep", BROKEN)
    saved = ["--checkpoint"] if checkpoint else []
    marks = place.root / "broken"
    variables = {"SLURM_NTASKS": str(tasks), "SLURMD_NODENAME": "gpu017", "CURATION_BROKEN": str(marks)}
    process = place.start("--workers", workers, *saved, environment={**variables, "CUDA_VISIBLE_DEVICES": "GPU-8e"})
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert f"error: node gpu017, GPU GPU-8e: {ECC}" in said
    assert marks.with_name("broken.gpu017").exists()
    assert not place.receipts(), "no shard is blamed"
    assert not list(place.out.glob("_claims/toy/*/*.claim")), "the shards are given back"
    if workers > 1:
        assert re.search(r"no device has worked|devices failed, and 3 shards are left", said)
    for shard_id in ids:
        place.shard(shard_id, "keep")
    assert place.run(*saved) == 0
