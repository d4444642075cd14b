"""What a stage's ``.sh`` asks SLURM for, and the sbatch lines for so many workers."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MAX_ARRAY_SIZE = 1001  # SLURM's own
_PATIENCE_S = 10.0
_OPTION = re.compile(r"^#SBATCH\s+--([a-z-]+)(?:[= ](\S+))?", flags=re.M)


@dataclass(frozen=True, slots=True)
class JobShape:
    """One job, or one element of an array: its tasks, the CPUs of each, and whether they have GPUs."""

    script: str
    tasks: int
    cpus: int
    gpus: bool


def job_shape(script: Path) -> JobShape | None:
    """By the #SBATCH lines of a stage's script; None where the stage has none."""
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
    """How many elements an array may have here: scontrol's word, else SLURM's default."""
    if shutil.which("scontrol") is not None:
        try:
            command = ["scontrol", "show", "config"]
            text = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            text = ""
        if found := re.search(r"^MaxArraySize\s*=\s*(\d+)", text, flags=re.M):
            return max(1, int(found.group(1)))
    return DEFAULT_MAX_ARRAY_SIZE


def array_commands(
    shape: JobShape, variables: Mapping[str, str], elements: int, limit: int, flags: Sequence[str]
) -> list[str]:
    """As many sbatch lines as the elements need: any number of arrays may work on the same folder at once.

    limit: elements of one array, at most.
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
