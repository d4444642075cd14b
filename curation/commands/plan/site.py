"""What the place allows: bytes and files that may still be written, and jobs that SLURM takes.

The sbatch lines for a number of workers are made here, from what a stage's ``.sh`` asks for.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 10.0
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Quota:
    """What may still be written.

    None means that there is no limit, or none that can be read.
    """

    what: str
    bytes_left: int | None
    files_left: int | None


def quotas(folder: Path) -> list[Quota]:
    """Returns what the folder's filesystem has left, then the quotas that ``lfs`` and ``quota`` report.

    The folder itself need not be there yet, and neither program need be installed.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    found = []
    try:
        system = os.statvfs(there)
    except OSError:
        return []
    files_left = (
        system.f_favail if system.f_files else None
    )  # a filesystem that makes inodes when they are needed says 0
    found.append(Quota("the filesystem", system.f_bavail * system.f_frsize, files_left))
    if (text := _answer("lfs", "quota", "-q", "-u", str(os.getuid()), str(there))) is not None:
        found += read_lustre(text, "your quota on Lustre")
    if (text := _answer("lfs", "quota", "-q", "-g", str(os.getgid()), str(there))) is not None:
        found += read_lustre(text, "your group's quota on Lustre")
    if (text := _answer("quota", "-w", "-p", "-f", str(_mount_of(there)))) is not None:
        found += read_quota(text)
    return found


def read_lustre(text: str, what: str) -> Iterator[Quota]:
    """Reads ``lfs quota -q``: path, kilobytes, soft and hard limit, grace, files, their limits and grace.

    A number that is over its limit has a star, and a limit of 0 means that there is none.
    """
    words = text.split()
    if len(words) < 8:
        return
    numbers = [int(word.rstrip("*")) if re.fullmatch(r"\d+\*?", word) else None for word in words]
    used, limit, files, files_limit = numbers[1], numbers[3], numbers[5], numbers[7]
    yield Quota(what, _left(used, limit, _KIB), _left(files, files_limit, 1))


def read_quota(text: str) -> Iterator[Quota]:
    """Reads ``quota -w -p``: two heading lines, then filesystem, KiB, its limits and grace, and the same for files."""
    for line in text.splitlines():
        words = line.split()
        if len(words) < 9 or not re.fullmatch(r"\d+\*?", words[1]):
            continue
        numbers = [int(word.rstrip("*")) if re.fullmatch(r"\d+\*?", word) else None for word in words]
        yield Quota("your quota", _left(numbers[1], numbers[3], _KIB), _left(numbers[5], numbers[7], 1))


def _left(used: int | None, limit: int | None, unit: int) -> int | None:
    return None if used is None or not limit else max(0, limit - used) * unit


def _answer(*command: str) -> str | None:
    """Returns what a program prints; None where it is not installed, prints nothing, or does not end in time."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout or None


def _mount_of(folder: Path) -> Path:
    real = folder.resolve()
    return next((parent for parent in (real, *real.parents) if parent.is_mount()), real)


DEFAULT_MAX_ARRAY_SIZE = 1001  # SLURM's own
_OPTION = re.compile(r"^#SBATCH\s+--([a-z-]+)(?:[= ](\S+))?", flags=re.M)


@dataclass(frozen=True, slots=True)
class JobShape:
    """One job, or one element of an array: its tasks, the CPUs of each task, and whether they have GPUs."""

    script: str
    tasks: int
    cpus: int
    gpus: bool


def job_shape(script: Path) -> JobShape | None:
    """Reads the #SBATCH lines of a stage's script; None where there is no script."""
    try:
        options = dict(_OPTION.findall(script.read_text("utf-8")))
    except (OSError, UnicodeDecodeError):
        return None
    nodes = _whole(options.get("nodes"), 1)
    tasks = _whole(options.get("ntasks"), nodes * _whole(options.get("ntasks-per-node"), 1))
    return JobShape(
        script.name, tasks, _whole(options.get("cpus-per-task"), 0), any(o.startswith("gpus") for o in options)
    )


def max_array_size() -> int:
    """Returns how many elements an array may have here: what scontrol says, else SLURM's default."""
    text = _answer("scontrol", "show", "config") or ""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, flags=re.M)
    return max(1, int(found.group(1))) if found else DEFAULT_MAX_ARRAY_SIZE


def array_commands(
    shape: JobShape, variables: Mapping[str, str], elements: int, limit: int, flags: Sequence[str]
) -> list[str]:
    """Returns as many sbatch lines as the elements need; several arrays may work on the same folder at once.

    Args:
        shape: What the stage's script asks for.
        variables: Environment variables of the job.
        elements: How many elements the arrays have together.
        limit: How many elements one array has at most.
        flags: Further flags of the stage.
    """
    before = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    after = " ".join(map(shlex.quote, [shape.script, *flags]))
    commands: list[str] = []
    while elements > 0:
        size = min(elements, limit)
        array = f"--array=0-{size - 1} " if size > 1 or commands else ""
        commands.append(f"{before} sbatch {array}{after}")
        elements -= size
    return commands


def _whole(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() else otherwise
