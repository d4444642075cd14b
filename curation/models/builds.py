"""Which builds of torch and onnxruntime are installed, whether they see a device, and the command that mends it.

torch and onnxruntime each come in builds for the CPU and for CUDA.  The CUDA builds of a pair must be of one CUDA, and
CUDA needs a driver that is new enough.  ``python -m curation.models.builds`` says what is so on this machine.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

from curation.errors import install, install_in_place

ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # they share their files: one environment can have one of them
# onnxruntime's own index of wheels with CUDA 13, for aarch64 too (github.com/microsoft/onnxruntime/issues/27944)
AARCH64_INDEX = "https://aiinfra.pkgs.visualstudio.com/PublicPackages/_packaging/onnxruntime-cuda-13/pypi/simple/"
# CUDA's major version → the oldest driver (docs.nvidia.com/deploy/cuda-compatibility, minor version compatibility)
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def installed_version(package: str) -> str:
    """The version of an installed package; "" where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def onnxruntime_with_cuda() -> str:
    """What gives this environment an onnxruntime with CUDA, for one line of a message: mostly a command."""
    if "rocm" in installed_version("torch"):
        return "this is a torch for AMD, and this project uses onnxruntime with CUDA only"
    there = [name for name in ONNXRUNTIMES if installed_version(name)]
    if not there:
        return install("onnxruntime-gpu")
    index = AARCH64_INDEX if platform.machine() == "aarch64" else ""
    return install_in_place("onnxruntime-gpu", of=there, index=index)


def driver_version() -> tuple[int, str] | None:
    """NVIDIA's driver on this machine: its major version and the whole of it; None where it cannot be seen."""
    try:
        found = re.search(r"\s((\d+)\.\d[\d.]*)\s", _DRIVER_FILE.read_text("ascii", "replace"))
    except OSError:
        return None
    return (int(found[2]), found[1]) if found else None


def why_torch_sees_no_gpu() -> str:
    """Why the torch that is installed sees no GPU, as far as can be known, and what to do."""
    import torch

    version = str(torch.__version__)
    if torch.version.cuda is None:
        for kind, of in (("hip", "AMD's ROCm"), ("xpu", "Intel's XPU")):
            if getattr(torch.version, kind, None):
                return f"torch {version} is a build for {of}, and no such device can be seen on this machine"
        return f"torch {version} is a build for the CPU: ./install.sh gpu, in a clone, installs one for CUDA"
    cuda, driver = str(torch.version.cuda), driver_version()
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if driver is None:
        return f"torch {version} has CUDA {cuda}, and no NVIDIA driver can be seen on this machine"
    if driver[0] < oldest:
        return (
            f"torch {version} has CUDA {cuda}, which needs driver {oldest} or newer, and this machine has {driver[1]}: "
            f"ask for a newer driver, or install a torch and an onnxruntime-gpu for an older CUDA"
        )
    return f"torch {version} has CUDA {cuda}, and this machine's driver {driver[1]} is new enough: look at the device"


def torch_line() -> tuple[bool, str]:
    """Whether torch sees a device, and one line that says it."""
    version = installed_version("torch")
    if not version:
        return False, "torch is not installed"
    import torch

    if torch.cuda.is_available():
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}))
        return True, f"torch {version} ({kind}) sees {torch.cuda.device_count()} × {names}"
    return False, f"torch sees no device: {why_torch_sees_no_gpu()}"


def onnxruntime_line() -> tuple[bool, str]:
    """Whether onnxruntime computes on a device, which a tiny model shows, and one line that says it."""
    there = {name: version for name in ONNXRUNTIMES if (version := installed_version(name))}
    if not there:
        return False, "onnxruntime is not installed"
    named = " and ".join(f"{name} {version}" for name, version in there.items())
    if len(there) > 1:
        return False, f"{named} are both installed and share their files: {onnxruntime_with_cuda()}"
    import onnxruntime

    cuda = "CUDAExecutionProvider"
    if cuda not in onnxruntime.get_available_providers():
        return False, f"{named} has no CUDA: {onnxruntime_with_cuda()}"
    model = Path(onnxruntime.__file__).parent / "datasets" / "sigmoid.onnx"  # it comes with the package
    onnxruntime.preload_dlls()
    try:
        starts = cuda in onnxruntime.InferenceSession(str(model), providers=[cuda]).get_providers()
    except Exception as error:  # noqa: BLE001 - onnxruntime raises kinds of its own, which it does not document
        return False, f"{named} has CUDA and cannot start it: {str(error)[:300]}"
    return starts, f"{named} has CUDA and {'computes on the first GPU' if starts else 'cannot start it here'}"


def main() -> int:
    """Print what torch and onnxruntime see; 0 where both see a device, else 2."""
    seen = True
    for ok, line in (torch_line(), onnxruntime_line()):
        print(line)
        seen = seen and ok
    return 0 if seen else 2


if __name__ == "__main__":
    sys.exit(main())
