"""ONNX Runtime sessions with explicit thread counts, for the backends that run ONNX files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

from curation.cluster import CPU_ON_PURPOSE, do_without_gpus
from curation.errors import DeviceError, InfrastructureError, install, require
from curation.models.builds import onnxruntime_with_cuda

ARENA_BESIDE_TORCH = 4 << 30  # bytes for one session: its models are small, and compute a picture or few at a time


def read_weights(path: Path) -> tuple[bytes, str]:
    """A file's bytes and its revision, ``sha256:`` and 16 hex digits.  Raises InfrastructureError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InfrastructureError(f"the model {path} cannot be read: {error.strerror}") from None
    return data, f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"


def packaged_file(package: str, name: str) -> Path | None:
    """The file of that name in the folder of an installed package, found without running any of the package's code."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / name).is_file()), None)


def open_session(
    model: bytes, path: Path, threads: int, gpu: int | None, *, keep_memory: bool = True
) -> tuple[Any, str]:
    """Open an ONNX model.

    Args:
        model: The bytes of the ONNX file.
        path: For messages.
        threads: CPU threads of one run.
        gpu: Index of a visible CUDA device, which is used if this onnxruntime has CUDA; None for the CPU.
        keep_memory: Whether what one run on the CPU has taken is kept for the next; better not where sizes differ much.

    Returns:
        An ``onnxruntime.InferenceSession``, which several threads may run at once, and its device, such as ``cuda:0``.

    Raises:
        InfrastructureError: It is not a model; or CUDA is there and does not start, or GPUs were given to this job and
            this onnxruntime has no CUDA, because a job on a GPU node must not run on the CPU unnoticed.
        DeviceError: This onnxruntime has CUDA, and cannot start it on this device.
    """
    if gpu is None:
        require("onnxruntime")
    try:
        import onnxruntime
    except ImportError as error:
        raise InfrastructureError(f"onnxruntime cannot be imported ({error}): {install('onnxruntime-gpu')}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = keep_memory
    options.log_severity_level = 3  # errors: the warnings are about the exporter's habits
    providers: list[Any] = ["CPUExecutionProvider"]
    wants_cuda = gpu is not None and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if gpu is not None and not wants_cuda:
        do_without_gpus(
            f"this onnxruntime has no CUDA for GPU {gpu} ({onnxruntime_with_cuda()})",
            f"{path.name} runs on the CPU",
        )
    if wants_cuda:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", _cuda_options(gpu or 0)))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # noqa: BLE001 - onnxruntime raises kinds of its own, which it does not document
        raise InfrastructureError(f"the model {path} cannot be loaded: {str(error)[:300]}") from None
    if wants_cuda and "CUDAExecutionProvider" not in session.get_providers():
        raise DeviceError(
            f"onnxruntime could not start CUDA on GPU {gpu} for {path} (does its version fit the CUDA and the cuDNN "
            f"that torch brought, and this node's driver?  `python -m curation.models.builds` says what is there); "
            f"{CPU_ON_PURPOSE}"
        )
    return session, f"cuda:{gpu}" if wants_cuda else "cpu"


def _cuda_options(gpu: int) -> dict[str, str]:
    """How onnxruntime uses a GPU.

    Its arena doubles whenever it grows, and never gives anything back.  Beside torch, which takes what it needs of the
    same memory, it grows by what is asked for and has a limit.
    """
    # The default measures which kernel is fastest, and so may choose another one, and other last digits, each time.
    options = {"device_id": str(gpu), "cudnn_conv_algo_search": "HEURISTIC"}
    if "torch" in sys.modules:
        options |= {"gpu_mem_limit": str(ARENA_BESIDE_TORCH), "arena_extend_strategy": "kSameAsRequested"}
    return options
