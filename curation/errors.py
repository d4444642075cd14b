"""The three levels of errors: a sample's, a shard's, and the infrastructure's.

A sample's error is recorded with its reason and the shard goes on; a shard's error makes a failed receipt and the
run goes on; an infrastructure error stops the run with one clear line and exit code 2.  A failure of a device (a GPU
that is broken or lost) is its process's alone: this one gives its shards back and leaves, and the others go on.
``device_failure`` and ``memory_shortage`` are the one place that knows with which words the libraries say that.

``redact`` is the one place that takes secrets out of what is said of an error.  The log, the terminal, receipts and
rejects put every text through it, whichever library it comes from.

``install`` is the one place that knows with which command the user gets a package that is missing, and ``require`` the
one that looks for packages before the work begins.
"""

from __future__ import annotations

import errno
import importlib
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Final, Literal

from curation import CORE, PROJECT

EXIT_OK = 0
EXIT_SHARDS_FAILED = 1
EXIT_USAGE = 2  # usage or infrastructure
EXIT_DEVICE_FAILED = 69  # EX_UNAVAILABLE: the device of this process has failed, with work left
EXIT_WORK_LEFT = 75  # EX_TEMPFAIL: stopped by a signal or the deadline with work left

# A "…" is what stands here for a query already.
_SECRETS: Final = (
    (re.compile(r"(:/?/)[^/\s'\"]*@"), r"\1"),  # user and password
    (re.compile(r"(://[^\s'\"?#]*)[?#](?!…)[^\s'\"]*"), r"\1?…"),  # a query may be a signature
    (re.compile(r"(with url: [^\s'\"?]*)\?(?!…)\S*"), r"\1?…"),  # as urllib3 says it, without the host
    (re.compile(r"(/[^\s'\"?]*)\?(?!…)[^\s'\"=?]*=[^\s'\"]*"), r"\1?…"),  # as http.client says it
    (
        re.compile(
            r"(?i)((?:x-(?:amz|goog|oss|ms)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid"
            r"|googleaccessid|access_token|auth_token|api_?key|password|passwd|secret)=)(?!\*\*\*)[^&\s'\"]+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(bearer|authorization: basic)\s+[\w.~+/=*-]+"), r"\1 ***"),
    (re.compile(r"(?i)\b((?:proxy-)?authorization|x-api-key|api-key)(['\"]?\s*[:=]\s*b?['\"])[^'\"]+"), r"\1\2***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_***"),  # the hub's tokens
)


def redact(text: str, *secrets: str) -> str:
    """The text without users, passwords and queries of URLs, without credentials, and without these ``secrets``."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class SampleError(Exception):
    """One sample cannot be used.  ``reason`` is a short snake_case word that is counted; ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class ShardError(Exception):
    """One shard cannot be processed (truncated tar, too many bad samples): a failed receipt, and the run goes on.

    The message names the file, and the sample where there is one.  ``reason`` is a short snake_case word by which
    ``status`` counts failures and ``retry`` finds them.
    """

    def __init__(self, message: str = "", reason: str = "shard_error") -> None:
        super().__init__(message)
        self.reason = reason


class InfrastructureError(Exception):
    """The run cannot go on (no model, no endpoint, disk full, wrong options): one clear line and exit code 2."""


class UsageError(InfrastructureError):
    """An option's value makes no sense: exit code 2, before any work is done."""


class DeviceError(InfrastructureError):
    """The device of this process has failed.  Its worker leaves with exit code 69, and the other workers go on."""


# What torch, cuBLAS, cuDNN, their counterparts of AMD and Intel, and onnxruntime say when memory runs out …
_MEMORY_RAN_OUT: Final = re.compile(
    r"out[ _]?of[ _]?(?:device[ _]|host[ _])?(?:memory|resources)|not enough memory|can't allocate memory"
    r"|failed to allocate memory|bad[ _]alloc|_STATUS_ALLOC_FAILED|miopenStatusAllocFailed|rocblas_status_memory_error",
    re.IGNORECASE,
)
# … what they say when a library found too little memory for itself, but also where the device is broken …
_MEMORY_MAY_HAVE_RUN_OUT: Final = re.compile(
    r"(?:CUBLAS|CUBLASLT|CUDNN|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS|HIPBLASLT|HIPSOLVER)_STATUS_"
    r"(?:NOT_INITIALIZED|EXECUTION_FAILED\w*|INTERNAL_ERROR\w*)|CUFFT_INTERNAL_ERROR|CUFFT_EXEC_FAILED"
    r"|miopenStatus(?:InternalError|UnknownError|NotInitialized)|rocblas_status_internal_error"
    r"|unable to find an engine|unable to find a valid cuDNN algorithm|cudnnFinalize failed",
    re.IGNORECASE,
)
# … and when it is broken, has lost its driver, or when an earlier fault has spoilt what this process has on it.
_DEVICE_FAILED: Final = re.compile(
    r"\bCUDA error\b|\bCUDA_ERROR_\w+|\bcudaError[A-Z]\w+|\bCUDA failure \d"
    r"|\bCUDA driver (?:error|initialization failed)"
    r"|\bCUDA (?:unknown error|call failed lazily|initialization error)|No CUDA GPUs are available"
    r"|\bHIP error\b|\bhipError[A-Z]\w+|\bHIP failure \d|\bROCM failure \d|No HIP GPUs are available"
    r"|\bXPU error\b|No XPU devices are available|\b(?:UR|ZE)_RESULT_ERROR_\w+|\bPI_ERROR_\w+|Level[- ]Zero error"
    r"|\bNVML_ERROR_\w+|\bNVML: |\bXid\b\W*\d|uncorrectable ECC|\bECC error|device not ready|device[ _]lost"
    r"|fallen off the bus|GPU is lost|lost (?:the )?driver|driver shutting down|Found no NVIDIA driver"
    r"|illegal memory access|illegal instruction was encountered|misaligned address|unspecified launch failure"
    r"|Memory access fault by GPU|hardware (?:exception|stack error)|GPU hang",
    re.IGNORECASE,
)


def memory_shortage(text: str) -> Literal["certain", "doubtful", ""]:
    """Whether a library's message says that the memory of a device, or of this machine, ran out.

    Returns:
        certain: It says so.  doubtful: It says something that is mostly said where memory ran out, but also where the
        device is broken; a smaller batch shows which of them it is.  Empty: it says something else.
    """
    if _MEMORY_RAN_OUT.search(text):
        return "certain"
    return "doubtful" if _MEMORY_MAY_HAVE_RUN_OUT.search(text) else ""


def device_failure(error: BaseException) -> DeviceError | None:
    """Whether ``error`` was raised because the device of this process has failed.

    Only for work that uses a device: what a model server says of its own device is none of this process's.

    Returns:
        The error to raise instead: one line, without the node's name.  None if the cause is another, such as too little
        memory or a wrong path.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DeviceError):
            return cause
        origin = type(cause).__module__.partition(".")[0]
        of_a_library = isinstance(cause, RuntimeError) or origin in ("torch", "onnxruntime")
        if of_a_library or (isinstance(cause, InfrastructureError) and not isinstance(cause, UsageError)):
            text, kind = str(cause), type(cause).__name__
            known = _DEVICE_FAILED.search(text) or kind in ("AcceleratorError", "DeviceReset")
            shortage = memory_shortage(text)
            if (known and shortage != "certain") or shortage == "doubtful":
                return DeviceError((text.strip().splitlines() or [kind])[0][:300])
        cause = cause.__cause__
    return None


# Modules whose package has another name.
_PACKAGES: Final = CORE | {
    "cv2": "opencv-python-headless",
    "faiss": "faiss-cpu",
    "fasttext": "fasttext-community",
    "gcld3": "cld3-py",
    "google": "protobuf",
    "skimage": "scikit-image",
}
_REQUIRES: Final = re.compile(r"requires the (\w+) library")  # as transformers says it
# A package may be in several extras: which one is meant tells the program, by a part of its name or by its command.
_EXTRA_OF: Final = {
    program: extra
    for extra, programs in {
        "download": "00 download",
        "faces": "01 faces 04 reshard",
        "llm": "02 rewrite",
        "generate": "03 generate",
        "recaption": "05 caption",
        "metadata": "06 extract",
        "tables": "select neardup centroids",
        "hub": "publish",
        "report": "report",
    }.items()
    for program in programs.split()
}


def install(module: str) -> str:
    """The command that installs what a program lacks.

    Args:
        module: The name of the module that cannot be imported.

    Returns:
        Such as ``pip install 'curation[faces]'``, with the extra that is meant for the program that runs.  A package
        that is in no extra is named itself.
    """
    package = _package_of(module)
    extras = _extras().get(package, [])
    if not extras:
        return f"{_pip()} install {package}"
    program = [Path(sys.argv[0]).name[:2], *Path(sys.argv[0]).name.split()[-1:], *sys.argv[1:2]]
    meant = [extra for word in program if (extra := _EXTRA_OF.get(word)) in extras]
    from importlib import metadata

    installed = any(one.read_text("INSTALLER") for one in metadata.distributions(name="curation"))
    project = "curation" if installed else str(PROJECT)
    return f"{_pip()} install {quote(f'{project}[{next(iter(meant), extras[0])}]')}"


def install_alone(*packages: str, beside: str) -> str:
    """The command that installs packages without what they require: model-packages.txt says why.

    Args:
        packages: What to install.
        beside: The module that is needed too; if it is missing, the command installs it as well.
    """
    extra = f"{install(beside)} && " if find_spec(beside) is None else ""
    return f"{extra}{_pip()} install --no-deps {' '.join(packages)}"


# Packages whose import takes seconds: ``require`` only looks whether they are there.
_SLOW: Final = ("accelerate", "bitsandbytes", "diffusers", "insightface", "peft", "torch", "torchao", "transformers")
# Packages that are installed without what they require, and what is needed beside them; model-packages.txt says why.
_ALONE: Final = {"insightface": "scipy"}


def require(*modules: str) -> None:
    """Look whether packages are on this machine, before the work that needs them begins.

    A dry run calls it in place of the work, and so says the same line.

    Args:
        modules: The names of modules, each without a dot.

    Raises:
        InfrastructureError: One is missing, or cannot be imported; the message has the command that installs it.
    """
    for module in modules:
        how = install_alone(module, beside=_ALONE[module]) if module in _ALONE else install(module)
        try:
            if module in _SLOW and find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
            if module not in _SLOW:
                importlib.import_module(module)
        except ImportError as error:
            raise InfrastructureError(f"{module} cannot be imported ({error}): {how}") from None


def install_in_place(package: str, *, of: Sequence[str], index: str = "") -> str:
    """The command that installs a package after others that share its files are gone.

    Args:
        package: What to install; what it requires is there, for it is what the others require.
        of: The packages to remove first.
        index: The address of the index that has it; empty for the usual one.
    """
    where = f"--index-url {index} " if index else ""
    return f"{_pip()} uninstall -y {' '.join(of)} && {_pip()} install --no-deps {where}{package}"


def _pip() -> str:
    """The pip of the Python that runs."""
    found = shutil.which("pip")
    own = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if own else f"{quote(sys.executable)} -m pip"


def _package_of(module: str) -> str:
    top = module.partition(".")[0]
    return _PACKAGES.get(top, top.lower().replace("_", "-"))


@lru_cache(maxsize=1)
def _extras() -> dict[str, list[str]]:
    """Each package that is in an extra → these extras, in the order of pyproject.toml.

    Without ``dev``, which is for those who change this package.
    """
    project = PROJECT / "pyproject.toml"
    if project.is_file():
        wanted = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"].items()
        pairs = [(extra, line) for extra, lines in wanted for line in lines]
    else:
        from importlib import metadata

        lines = metadata.requires("curation") or []
        pairs = [(found[1], line) for line in lines if (found := re.search(r"extra == ['\"]([\w-]+)", line))]
    extras: dict[str, list[str]] = {}
    for extra, line in pairs:
        if extra == "dev":
            continue
        package = re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-")
        extras.setdefault(package, []).append(extra)
    return extras


_MORE = "use fewer --workers, smaller batches or fewer threads, or give the job more"
_ROOM = "make room, or use another folder"
_LACKS = {
    errno.ENOMEM: ("memory", _MORE),
    errno.EAGAIN: ("room for processes (ulimit -u, or the memory of this job)", _MORE),  # of fork
    errno.EMFILE: ("room for open files (ulimit -n)", _MORE),
    errno.ENFILE: ("room for open files of all processes", _MORE),
    errno.ENOSPC: ("room on the disk", _ROOM),
    errno.EDQUOT: ("room in the quota", _ROOM),
}


def lack_of(error: BaseException) -> InfrastructureError | None:
    """What to tell the user if ``error`` was raised because this machine lacks a package, or memory, threads or room.

    The next shard would meet it as well, so it is no shard's fault.

    Returns:
        The error to raise instead: one line that says what is missing and what to do.  None if the cause is another.
    """
    if module := _missing_module(error):
        return InfrastructureError(f"the package {_package_of(module)} is missing: {install(module)}")
    if isinstance(error, MemoryError):
        what, advice = "memory", _MORE
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        what, advice = "room for threads (ulimit -u, or the memory of this job)", _MORE
    elif isinstance(error, OSError) and error.errno in _LACKS:
        what, advice = _LACKS[error.errno]
    else:
        return None
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    return InfrastructureError(
        f"this machine has too little {what} ({said}); {advice}, and run the same command again: "
        "nothing published is lost"
    )


def _missing_module(error: BaseException) -> str | None:
    """The module of an extra or of the core whose absence is why ``error``, or what caused it, was raised."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__
    if cause is None:
        return None
    named = _REQUIRES.search(str(cause))
    module = cause.name if isinstance(cause, ModuleNotFoundError) else named[1].lower() if named else None
    known = _package_of(module) if module else None
    return module if known in _extras() or known in CORE.values() else None


class LostClaim(Exception):
    """Another worker has taken or committed this shard: drop the attempt quietly and go on."""


class StoppedAtOnce(BaseException):
    """A signal or the deadline asked to stop while nothing was to be saved: exit code 75.

    It is raised at any line of the main thread, by a signal's handler, and so it is none of the errors that a library
    or the boundary of a sample catches.
    """


class Stopped(Exception):
    """A signal or the deadline asked to stop and everything durable has been saved: exit code 75."""
