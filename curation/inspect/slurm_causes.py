"""What SLURM's accounting says became of jobs, where there is any: OUT_OF_MEMORY, TIMEOUT, NODE_FAIL, PREEMPTED …

Without sacct, without accounting behind it, or when it does not answer in time, nothing is known and nothing breaks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable

TIMEOUT_S = 10.0  # for all together
_BATCH = 500  # ids of one call: a command line has bounds
_MAX_JOBS = 5000
_ID = re.compile(r"\d{1,12}(?:_\d{1,9})?")
_STATE = re.compile(r"[A-Z_]{2,40}")


def slurm_states(jobs: Iterable[str]) -> dict[str, str]:
    """Job (41, or 40_7 of an array) → the state it is in or ended in, the worst of its runs where it was requeued.

    Jobs of which SLURM knows nothing are left out.
    """
    wanted = sorted({job for job in jobs if _ID.fullmatch(job)}, key=_newest_first)[:_MAX_JOBS]
    found: dict[str, str] = {}
    if not wanted or not shutil.which("sacct"):
        return found
    end = time.monotonic() + TIMEOUT_S
    for start in range(0, len(wanted), _BATCH):
        answer = _ask(wanted[start : start + _BATCH], end - time.monotonic())
        if answer is None:
            break
        for job, state in _parse(answer):
            if job not in found or found[job] in _HARMLESS:
                found[job] = state
    return {job: found[job] for job in wanted if job in found}


_HARMLESS = {"COMPLETED", "RUNNING", "PENDING", "REQUEUED", "RESIZING", "SUSPENDED"}


def _ask(jobs: list[str], timeout_s: float) -> str | None:
    command = [
        "sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--format=JobID,JobIDRaw,State",
        f"--jobs={','.join(jobs)}",
    ]  # fmt: skip
    if timeout_s <= 0:
        return None
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout if result.returncode == 0 else None


def _parse(answer: str) -> list[tuple[str, str]]:
    found = []
    for line in answer.splitlines():
        fields = line.split("|")
        state = _STATE.match(fields[-1]) if len(fields) == 3 else None  # "CANCELLED by 1000"
        if state:
            found += [(name, state[0]) for name in dict.fromkeys(fields[:2]) if _ID.fullmatch(name)]
    return found


def _newest_first(job: str) -> tuple[int, int]:
    number, _, element = job.partition("_")
    return -int(number), int(element or 0)
