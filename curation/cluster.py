"""Where this process runs (a task of a SLURM step, or a worker on this machine), until when, and how it is stopped."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from types import FrameType
from typing import Protocol

from curation.errors import EXIT_WORK_LEFT, Stopped, UsageError

WORKER_VARIABLE = "CURATION_WORKER"  # "2/4": set by a parent process for its children
RUN_VARIABLE = "CURATION_RUN_ID"
PROGRESS_VARIABLE = "CURATION_PROGRESS"  # a file that a job's script wants to be made when something was finished
TIME_LEFT_VARIABLE = "CURATION_TIME_LEFT"  # what SLURM said when the tasks were started, as squeue writes it
ONE_SIGNAL_S = 1.0  # SLURM sends SIGTERM to every process of a step, and a parent passes its own on to its workers
MARGIN_S = 60.0  # before the deadline, at which no new work is begun
_DEVICE = re.compile(r"\d+$|GPU-|MIG-")  # an index, or a GPU's or a slice's UUID


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one process was given.

    rank, world: its number among all tasks that were started together, and how many there are.
    local_rank: its number on this node.  gpu: the index of its CUDA device among the visible ones, None without one.
    threads: the CPU threads that are its own.  deadline: Unix time at which it is ended; None without a deadline.
    run_id: the same for every process of one submission.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    gpu: int | None = None
    threads: int = 1
    deadline: float | None = None
    run_id: str = ""

    @staticmethod
    def detect(workers: int = 1, environ: Mapping[str, str] = os.environ) -> Allocation:
        """Read SLURM's variables, or a parent's, or take the whole machine.  Needs no SLURM and no torch."""
        rank, world = _int(environ, "SLURM_PROCID", 0), max(1, _int(environ, "SLURM_NTASKS", 1))
        local_rank = _int(environ, "SLURM_LOCALID", 0)
        element, elements = _array_element(environ)
        rank, world = rank + world * element, world * elements
        index, _, count = environ.get(WORKER_VARIABLE, "").partition("/")
        if index.isdecimal() and count.isdecimal():
            workers = int(count)
            rank, world, local_rank = rank * workers + int(index), world * workers, local_rank * workers + int(index)
        return Allocation(
            rank=rank,
            world=world,
            local_rank=local_rank,
            gpu=_own_gpu(environ, local_rank),
            threads=max(1, _cpus(environ) // max(1, workers)),
            run_id=run_id(environ),
        )


def run_id(environ: Mapping[str, str] = os.environ, interactive: bool | None = None) -> str:
    """What all processes of one submission share, and a requeued one keeps: the parent's mark, or the job's id.

    Empty on a lone start, and for commands that a person types one after the other within one interactive job.
    """
    if environ.get(RUN_VARIABLE):
        return f"run-{environ[RUN_VARIABLE]}"
    if interactive is None:
        interactive = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    job = "" if interactive else environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID", "")
    return f"slurm-{job}" if job else ""


def slurm_ids(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The job, array element, task and restart that a receipt records."""
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "PROCID", "RESTART_COUNT", "JOB_PARTITION")
    return {name.lower(): environ[f"SLURM_{name}"] for name in names if environ.get(f"SLURM_{name}")}


@lru_cache(maxsize=1)
def host_identity() -> tuple[str, str, str]:
    """(host name, boot id, pid namespace): two processes that share all three see each other's pids."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: no process is ever presumed dead by its pid
        return socket.gethostname(), "", ""


def process_start(pid: int) -> str | None:
    """The start time of a live process in clock ticks since boot, None when it is gone (a zombie is gone too)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def process_is_gone(pid: int, start: str) -> bool:
    """Whether the process of this pid and start time has certainly ended; of this pid namespace only."""
    now = process_start(pid)
    if now is not None:
        return now != start
    if os.path.exists(f"/proc/{pid}"):
        return True  # a zombie
    try:
        os.kill(pid, 0)  # /proc may hide the processes of other users
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def parse_deadline(text: str | None, now: float | None = None, environ: Mapping[str, str] = os.environ) -> float | None:
    """``--deadline`` as Unix time: ``none``, ``30m``, ``1.5h``, ``90s``, ``HH:MM:SS`` from now, or a date and time.

    None asks SLURM when this job ends; where SLURM does not answer there is no deadline.
    Raises UsageError for anything else.
    """
    now = time.time() if now is None else now
    if text is None:
        return slurm_job_end(environ)
    text = text.strip()
    if text.lower() == "none":
        return None
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.lower()):
        return now + float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    if match := re.fullmatch(r"(\d+):(\d\d):(\d\d)", text):
        return now + int(match[1]) * 3600 + int(match[2]) * 60 + int(match[3])
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise UsageError(f"--deadline {text!r}: write none, 30m, 1.5h, 01:30:00 or 2026-01-31T18:00:00") from None


def slurm_job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """When SLURM will end this job, by this node's clock; None outside a job or where SLURM does not say within ten
    seconds.

    From the time that is left rather than from the end: a node's clock may be minutes off SLURM's.
    """
    now = time.time()
    if environ.get(TIME_LEFT_VARIABLE):  # the job's script asked once for all its tasks
        left = parse_time_left(environ[TIME_LEFT_VARIABLE])
        return None if left is None else now + left
    job = environ.get("SLURM_JOB_ID", "")
    if job.isdecimal() and shutil.which("squeue"):
        command = ["squeue", "--noheader", "--jobs", job, "--format=%L"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            left = parse_time_left(answer.strip())
            return None if left is None else now + left
    end = environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() else None


def parse_time_left(text: str) -> float | None:
    """``[days-]hours:minutes:seconds`` as squeue writes it, in seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text)
    if match is None:
        return None
    days, first, second, seconds = (int(part or 0) for part in match.groups())
    hours, minutes = (first, second) if match[3] is not None else (0, first)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


@lru_cache(maxsize=1)
def note_progress() -> None:
    """Something was published or checkpointed: the job's script may queue the job again, for it gets on."""
    path = os.environ.get(PROGRESS_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))


class CheckStop(Protocol):
    """What long work calls between two steps (``ShardContext.check_stop``)."""

    def __call__(self, *, urgent_only: bool = False) -> None:
        """Raise Stopped when it is time to end."""


class StopSignal:
    """Whether this process was asked to end, and how soon.

    SIGUSR1, SIGUSR2, SIGINT and the deadline drain: the batch in hand is finished and saved.  SIGTERM is urgent: what
    is done is saved at once, for the scheduler kills soon after.  A second SIGINT or SIGTERM exits on the spot; every
    output is still under a temporary name then, so nothing half-written is left under a final one.
    """

    def __init__(self, deadline: float | None = None) -> None:
        if deadline is not None:  # a margin to save what is done in, without eating up a short run
            deadline -= min(MARGIN_S, max(0.0, deadline - time.time()) / 10)
        self.deadline = deadline
        self.cause: str | None = None
        self._draining = threading.Event()
        self._urgent = threading.Event()
        self._fatal_signals = 0
        self._last_term = -math.inf

    def install(self) -> None:
        """Take over the signals.  Main thread only."""
        for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        echo = number == signal.SIGTERM and now - self._last_term < ONE_SIGNAL_S
        if number == signal.SIGTERM:
            self._last_term = now
        if number in (signal.SIGINT, signal.SIGTERM) and not echo:
            self._fatal_signals += 1
            if self._fatal_signals > 1:
                os._exit(EXIT_WORK_LEFT)
        self.ask(signal.Signals(number).name, urgent=number == signal.SIGTERM)

    def ask(self, cause: str, *, urgent: bool = False) -> None:
        """Ask to stop; the first cause is kept."""
        self.cause = self.cause or cause
        if urgent:
            self._urgent.set()
        self._draining.set()

    @property
    def draining(self) -> bool:
        """No new work may be begun."""
        if not self._draining.is_set() and self.deadline is not None and time.time() >= self.deadline:
            self.ask("deadline")
        return self._draining.is_set()

    @property
    def urgent(self) -> bool:
        """Not even the batch in hand may be finished."""
        return self._urgent.is_set()

    def check(self, *, urgent_only: bool = False) -> None:
        """Raise Stopped when it is time.  ``urgent_only``: go on while merely draining (a shard that takes seconds)."""
        if self.urgent or (self.draining and not urgent_only):
            raise Stopped(self.cause or "asked to stop")

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake when asked to stop; True when so."""
        if self.deadline is not None:
            seconds = max(0.0, min(seconds, self.deadline - time.time() + 0.01))
        self._draining.wait(seconds)
        return self.draining


def _array_element(environ: Mapping[str, str]) -> tuple[int, int]:
    """The number of this element among those of its job array, and how many there are; (0, 1) outside an array.

    Raises UsageError for a number that the array cannot have: such a job was put together by hand.
    """
    text = environ.get("SLURM_ARRAY_TASK_ID", "")
    if not text:
        return 0, 1
    count = max(1, _int(environ, "SLURM_ARRAY_TASK_COUNT", 1))
    first = _int(environ, "SLURM_ARRAY_TASK_MIN", 0)
    last = _int(environ, "SLURM_ARRAY_TASK_MAX", first + count - 1)
    if not text.isdecimal() or ("SLURM_ARRAY_TASK_MAX" in environ and not first <= int(text) <= last):
        raise UsageError(f"SLURM_ARRAY_TASK_ID={text!r} is no element of this job's array ({first} to {last})")
    step = max(1, _int(environ, "SLURM_ARRAY_TASK_STEP", 1))
    return (int(text) - first) // step % count, count


def _int(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else default


def _cpus(environ: Mapping[str, str]) -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, _int(environ, "SLURM_CPUS_PER_TASK", affinity)) or 1


def workers_for_gpus(workers: int, num_gpus: int | None, gpus: str | None = None) -> int:
    """How many processes to start here, one per GPU: as many as were asked for, else as GPUs can be seen.

    gpus: numbers such as ``0,2``: only these are seen from now on.  Where srun starts several tasks each is one
    already.  Raises UsageError where more are asked for than there are.
    """
    if gpus is not None:
        chosen = [part.strip() for part in gpus.split(",")]
        if not all(part.isdecimal() for part in chosen) or len({*chosen}) < len(chosen):
            raise UsageError(f"--gpus {gpus!r}: write different numbers such as 0,2,3")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        return len(chosen)
    if num_gpus is None:
        tasks = os.environ.get("SLURM_NTASKS", "1")
        alone = workers == 1 and not (tasks.isdigit() and int(tasks) > 1)
        return max(1, visible_gpus()) if alone else workers
    if 0 < visible_gpus() < num_gpus:
        raise UsageError(f"--num_gpus {num_gpus}: only {visible_gpus()} can be seen here")
    return num_gpus


def visible_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """How many CUDA devices this process may use.  Needs no torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA ignores all that follows the first it does not know; SLURM writes NoDevFiles for none
        return len(list(takewhile(_DEVICE.match, (device.strip() for device in visible.split(",")))))
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def gpu_name(index: int | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """What CUDA_VISIBLE_DEVICES calls the device of that index among the visible ones: a number or a UUID."""
    if index is None:
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[index].strip() if index < len(visible) and visible[index].strip() else str(index)


def _own_gpu(environ: Mapping[str, str], local_rank: int) -> int | None:
    """SLURM may show a task its own GPU alone, or all of the node's; accelerate's LOCAL_RANK is never there."""
    count = visible_gpus(environ)
    return local_rank % count if count else None
