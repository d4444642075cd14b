"""``torch.compile`` in the stages: where compiled code is kept, how it is made alike everywhere, whether it works."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import InfrastructureError, device_failure, memory_shortage
from curation.options import logger
from curation.storage.files import make_folder, storage_errors

FOLDER = "_compile_cache"  # beside a stage's output
RECOMPILE_LIMIT = 64  # graphs per function: a few sizes times a few batch sizes; torch's own limit is 8

_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
# What goes wrong in a compiler, in libraries that it calls and in programs that it starts.
BROKEN = (
    RuntimeError,
    AssertionError,
    ImportError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    subprocess.SubprocessError,
)


def set_up(beside: Path | None, device_kind: str, *, by_timing: bool = False) -> bool:
    """Prepare for ``torch.compile``: to be called before anything is compiled, in the thread that will do it.

    torch's inductor tries kernels on the device and takes the fastest one, so that two processes may compute with
    different last bits.  Its deterministic mode leaves out the trials on which numbers depend.

    Args:
        beside: The output folder beside whose files compiled code is kept for all workers; None: in torch's own folder.
        device_kind: What ``use_device`` says.
        by_timing: The fastest kernels are wanted, whatever they do to the last bits.

    Returns:
        Whether the kernels are chosen without trials: this torch has the mode, and it is on.

    Raises:
        InfrastructureError: The folder for compiled code cannot be made.
    """
    from torch import _dynamo
    from torch._inductor import config

    warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor)")  # advice to torch's own developers
    _dynamo.config.recompile_limit = RECOMPILE_LIMIT
    settings: Any = config
    deterministic = hasattr(settings, "deterministic") and not by_timing
    if hasattr(settings, "deterministic"):
        settings.deterministic = deterministic
    if beside is not None:
        _keep_code(beside / FOLDER, device_kind)
    return deterministic


def note_of(how: str, deterministic: bool) -> dict[str, object]:
    """What a receipt says of compiled code.  how: ``--compile``; deterministic: what ``set_up`` returned."""
    return {"how": how, "kernels": "chosen without trials" if deterministic else "chosen by trials on the device"}


def try_out(device: str, name: str, *, graphs: bool = False) -> None:
    """Compile a few operations and compare what they give.  It takes seconds, and the model's own compilation minutes.

    Args:
        device: On which to compute: ``cpu`` or ``cuda:<n>``.  It must be called in the thread that will compile.
        name: The model's, for the message.
        graphs: On a GPU, capture CUDA graphs too.

    Raises:
        InfrastructureError: It does not work.  The message says why, and that ``--compile none`` does without it.
    """
    import torch

    def operations(rows: Any) -> Any:
        return torch.nn.functional.gelu(rows @ rows.T).softmax(-1).sum(0)

    rows = torch.arange(64, dtype=torch.float32, device=device).view(8, 8) / 64
    mode = "reduce-overhead" if graphs and device.startswith("cuda") else None
    try:
        with torch.no_grad():
            expected = operations(rows)
            compiled = torch.compile(operations, dynamic=False, mode=mode)
            for _ in range(3):  # graphs are compiled, then captured, then replayed
                right = torch.allclose(compiled(rows), expected, atol=1e-3)
    except BROKEN as error:
        if (refusal := compiler_error(error, name, always=True)) is None:
            raise
        raise refusal from error
    if not right:
        raise _refusal(name, "compiled code computed wrong numbers")


def compiler_error(error: BaseException, name: str, *, always: bool = False) -> InfrastructureError | None:
    """What to raise in place of an error of the compiler, or of the code that keeps captured graphs.

    Args:
        error: What a call of compiled code raised.
        name: The model's, for the message.
        always: Whatever was raised is the compiler's fault, unless the device failed.

    Returns:
        An error of one line with the cause; None where the compiler has nothing to do with it.
    """
    cause: BaseException = error
    while (inner := getattr(cause, "inner_exception", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    if device_failure(error) or memory_shortage(str(cause)):
        return None
    if not (always or type(error).__module__.startswith(_COMPILERS) or _in_compiler(cause)):
        return None
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    told = next((line for line in lines if "error:" in line), lines[0] if lines else "")
    kind = type(cause).__name__
    return _refusal(name, told[:300] if told.startswith(kind) else f"{kind}: {told[:300]}".rstrip(": "))


def _refusal(name: str, why: str) -> InfrastructureError:
    return InfrastructureError(f"{name} cannot be compiled here ({why}); use --compile none")


def _in_compiler(error: BaseException) -> bool:
    """Whether an error comes out of the compiler's own code: an assertion there has no type of its own."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = tuple(f"/{name.replace('.', '/')}/" for name in _COMPILERS)
    return bool(frames) and any(part in frames[-1].filename for part in parts)


# ---- the folder


def _keep_code(folder: Path, device_kind: str) -> None:
    """Have torch and triton keep compiled code below ``folder``, for all workers and nodes of one kind.

    What lies there is executed: it is used only where nobody else can have put it there.  A folder that the user's
    environment names is left to the user.
    """
    if _named_by_user():
        return
    make_folder(folder.parent)
    with storage_errors(folder):
        with contextlib.suppress(FileExistsError):  # it may be anything; see below
            folder.mkdir(mode=0o700)
        if trouble := _trouble(folder):
            folder = Path(tempfile.mkdtemp(prefix="curation-compile-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            logger.warning(f"{trouble}: compiled code is kept in {folder} until this process ends")
        own = folder / _kind(device_kind)
        own.mkdir(mode=0o700, exist_ok=True)
    os.environ[_INDUCTOR] = str(own.absolute())
    os.environ[_TRITON] = str((own / "triton").absolute())  # torch would have a folder for each device's number


def _named_by_user() -> bool:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get(_INDUCTOR)
    ours = given is not None and (Path(given).parent.name == FOLDER or "curation-compile-" in given)
    return given is not None and not ours and given != default_cache_dir()


def _trouble(folder: Path) -> str:
    """Why code in a folder may not be executed, or not be shared; "" where it may."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        return f"{folder} is not a folder that only you can write to"
    try:
        with open(folder / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another worker looks too
        return ""
    except OSError as error:
        return f"{folder}: its filesystem locks no files ({error.strerror})"
    return ""


def _kind(device_kind: str) -> str:
    """What compiled code depends on and torch's own keys leave out: C++ is compiled for the very processor."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    parts = (device_kind, torch.__version__, sys.version, platform.machine(), *platform.libc_ver(), *processor)
    return xxhash.xxh3_64_hexdigest("\0".join(map(str, parts)).encode())
