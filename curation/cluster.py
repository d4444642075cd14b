"""What the process knows about its job: SLURM task or local worker, CPUs and GPU, end time, and stop signals."""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Protocol

from curation.errors import EXIT_WORK_LEFT, InfrastructureError, Stopped, StoppedAtOnce, UsageError
from curation.options import logger, numbers_in

MAX_GPU = 1023
WORKER_VARIABLE = "CURATION_WORKER"  # "2/4": set by a parent process for its children
RUN_VARIABLE = "CURATION_RUN_ID"
PROGRESS_VARIABLE = "CURATION_PROGRESS"  # a file to create when some work is finished, for the job's script
BROKEN_VARIABLE = "CURATION_BROKEN"  # with a node's name behind it, a file to create when a device there has failed
TIME_LEFT_VARIABLE = "CURATION_TIME_LEFT"  # the time left when the tasks were started, as squeue prints it
ONE_SIGNAL_S = 1.0  # a worker may get SIGTERM twice in this time: from SLURM and from its parent
MARGIN_S = 60.0  # so long before the deadline, no new work is begun
CPU_ON_PURPOSE = "with --device cpu it computes on the CPU"
# Lists of the devices that a process sees, of NVIDIA, AMD and Intel.  SLURM may set all of them.  AMD's runtime counts
# the entries of the first two within the list of ROCR_VISIBLE_DEVICES.
_LISTS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_NAMING_GPUS = (*_LISTS, "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
_COUNTING_GPUS = (
    "SLURM_GPUS",
    "SLURM_GPUS_ON_NODE",
    *(f"SLURM_GPUS_PER_{part}" for part in ("NODE", "TASK", "SOCKET")),
)
_NO_GPU = {"", "-1", "none", "void", "nodevfiles"}  # SLURM writes NoDevFiles for no device
_DEVICE = re.compile(r"\d+(\.\d+)?$|GPU-|MIG-")  # an index, a card and its tile, or a GPU's or a slice's UUID
# Where torch's allocator finds its settings: the first in every version, the second in newer ones, the third for AMD.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?(?:,|$)")  # SLURM's "4(x2),1" for three nodes


@dataclass(frozen=True, slots=True)
class Allocation:
    """The resources of one process.

    rank, world: its number among all tasks that were started together, and their count.
    local_rank: its number on this node.  gpu: the index of its device among the visible ones; None where neither a
    variable nor the driver of NVIDIA tells of one, so that torch must be asked (``device``).
    threads: how many CPU threads it may use.  deadline: the Unix time at which it will be ended; None without one.
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
        """Read the variables of SLURM or of a parent process; without them, use the whole machine.  Needs no torch."""
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

    def device(self, wanted: str | None = None, on_cpu: str = "computing on the CPU, which is far slower") -> str:
        """torch's name of the device that this process computes on, such as ``cuda:1`` or ``xpu:0``.  It imports torch.

        Args:
            wanted: What ``--device`` says: ``cpu``, or anything else for the GPU that this process was given.
            on_cpu: What to say where there is no GPU and none was promised.

        Raises:
            InfrastructureError: GPUs were promised to this process, and it sees none.
        """
        if wanted == "cpu":
            return "cpu"
        kind, count = ("", 0) if _cpu_is_asked_for(os.environ) else torch_devices()
        if self.gpu is not None:
            only_intel = next(filter(os.environ.__contains__, _LISTS), "") == "ZE_AFFINITY_MASK"
            return f"{kind or ('xpu' if only_intel else 'cuda')}:{self.gpu}"
        if count:
            return f"{kind}:{self.local_rank % count}"
        do_without_gpus("no GPU can be seen here", "" if self.local_rank else on_cpu)
        return "cpu"


def run_id(environ: Mapping[str, str] = os.environ, interactive: bool | None = None) -> str:
    """An id that all processes of one submission share and a requeued job keeps: the parent's mark, or the job's id.

    It is empty outside a job, and for commands that a person types one after the other in one interactive job.
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
    except OSError:  # not Linux: a pid then never proves that a process is dead
        return socket.gethostname(), "", ""


def process_start(pid: int) -> str | None:
    """The start time of a live process in clock ticks since boot; None if it has ended (also for a zombie)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def process_is_gone(pid: int, start: str) -> bool:
    """Whether the process with this pid and start time, in this pid namespace, has certainly ended."""
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


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = r"(\d+(?:\.\d+)?)\s*(s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?|d|days?)(?![a-z])"


def parse_deadline(text: str | None, now: float | None = None, environ: Mapping[str, str] = os.environ) -> float | None:
    """``--deadline`` as Unix time: ``none``, ``30m``, ``1.5 h``, ``2h 30min``, ``HH:MM:SS`` or SLURM's ``1-12:00:00``
    from now, or a date and time.

    None asks SLURM when this job ends; if SLURM does not answer, there is no deadline.
    Raises UsageError for anything else.
    """
    now = time.time() if now is None else now
    if text is None:
        return slurm_job_end(environ)
    text = text.strip()
    if text.lower() == "none":
        return None
    if re.fullmatch(rf"(?:{_DURATION}[\s,]*)+", text.lower()):
        return now + sum(float(n) * _UNITS[unit[0]] for n, unit in re.findall(_DURATION, text.lower()))
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        return now + int(match[1] or 0) * 86400 + int(match[2]) * 3600 + int(match[3]) * 60 + int(match[4])
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise UsageError(f"--deadline {text!r}: write none, 30m, 1.5h, 01:30:00 or 2026-01-31T18:00:00") from None


def slurm_job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """When SLURM will end this job, by this node's clock; None outside a job or if SLURM does not answer within ten
    seconds.

    It is computed from the time that is left, because the node's clock may differ from SLURM's by minutes.
    """
    now = time.time()
    if environ.get(TIME_LEFT_VARIABLE):  # the job's script asked SLURM once for all tasks
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
    """Record that something was published or checkpointed, so that the job's script may requeue the job."""
    path = os.environ.get(PROGRESS_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))


def note_broken_device() -> str:
    """Record that a device of this node has failed, so that the job's script may queue the job again without the node.

    Returns:
        The node's name: SLURM's, or this machine's.
    """
    node = os.environ.get("SLURMD_NODENAME") or host_identity()[0]
    path = os.environ.get(BROKEN_VARIABLE)
    if path and re.fullmatch(r"[\w.-]+", node):
        with contextlib.suppress(OSError):
            os.close(os.open(f"{path}.{node}", os.O_WRONLY | os.O_CREAT, 0o666))
    return node


class CheckStop(Protocol):
    """A function that long work calls between two steps (``ShardContext.check_stop``)."""

    def __call__(self, *, urgent_only: bool = False) -> None:
        """Raise Stopped if it is time to end."""


STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
# The signals that asked this process to end since it began to listen; what comes after the shards asks for them too.
signals_received: list[int] = []


class StopSignal:
    """Whether this process was asked to end, and how soon.

    SIGUSR1, SIGUSR2, SIGINT and the deadline drain: the current batch is finished and saved.  SIGTERM is urgent:
    finished work is saved at once, because the scheduler kills the process soon after.  A second SIGINT or SIGTERM
    exits immediately; outputs still have temporary names then, so no incomplete file has a final name.
    """

    def __init__(self, deadline: float | None = None) -> None:
        if deadline is not None:  # leave time to save the work, but not most of a short run
            deadline -= min(MARGIN_S, max(0.0, deadline - time.time()) / 10)
        self.deadline = deadline
        self.cause: str | None = None
        self._draining = threading.Event()
        self._urgent = threading.Event()
        self._fatal_signals = 0
        self._last_term = -math.inf
        self._installed = self._at_once = False

    def install(self) -> None:
        """Set the signal handlers.  Call it in the main thread."""
        self._installed = True
        signals_received.clear()
        for name in STOP_SIGNALS:
            signal.signal(name, self._received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While a model is loaded or a server is waited for, and nothing is to be saved: what asks this process to end
        raises StoppedAtOnce here, in place of being noticed when the waiting is over.

        It is for the main thread, which gets the signals; in another one nothing is different.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        alarm: threading.Timer | None = None
        if self._installed and self.deadline is not None:  # its handler then finds that the deadline is over
            me, left_s = threading.main_thread().ident or 0, max(0.0, self.deadline - time.time()) + 0.05
            alarm = threading.Timer(left_s, signal.pthread_kill, (me, signal.SIGUSR1))
            alarm.daemon = True
            alarm.start()
        try:
            self._at_once = True
            yield
        finally:
            self._at_once = False
            if alarm is not None:
                alarm.cancel()

    def _received(self, number: int, frame: FrameType | None) -> None:
        signals_received.append(number)
        now = time.monotonic()
        echo = number == signal.SIGTERM and now - self._last_term < ONE_SIGNAL_S
        if number == signal.SIGTERM:
            self._last_term = now
        if number in (signal.SIGINT, signal.SIGTERM) and not echo:
            self._fatal_signals += 1
            if self._fatal_signals > 1:
                os._exit(EXIT_WORK_LEFT)
        if not self.draining:  # else the deadline is the cause
            self.ask(signal.Signals(number).name)
        if number == signal.SIGTERM:
            self._urgent.set()
        if self._at_once and _swallows_errors(frame):
            again = threading.Timer(0.05, self._remind)
            again.daemon = True
            again.start()
        elif self._at_once:
            self._at_once = False
            raise StoppedAtOnce(self.cause or "asked to stop")

    def _remind(self) -> None:
        if self._at_once:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def ask(self, cause: str, *, urgent: bool = False) -> None:
        """Request a stop; the first cause is kept."""
        self.cause = self.cause or cause
        if urgent:
            self._urgent.set()
        self._draining.set()

    @property
    def draining(self) -> bool:
        """Whether no new work may be begun."""
        if not self._draining.is_set() and self.deadline is not None and time.time() >= self.deadline:
            self.ask("deadline")
        return self._draining.is_set()

    @property
    def urgent(self) -> bool:
        """Whether not even the current batch may be finished."""
        return self._urgent.is_set()

    def check(self, *, urgent_only: bool = False) -> None:
        """Raise Stopped if a stop was requested; with ``urgent_only``, not while draining (for a short shard)."""
        if self.urgent or (self.draining and not urgent_only):
            raise Stopped(self.cause or "asked to stop")

    def wait(self, seconds: float) -> bool:
        """Sleep until the time is over or a stop is requested; returns whether one was requested."""
        if self.deadline is not None:
            seconds = max(0.0, min(seconds, self.deadline - time.time() + 0.01))
        self._draining.wait(seconds)
        return self.draining


def _swallows_errors(frame: FrameType | None) -> bool:
    """Whether Python ignores what is raised there: in a finalizer, or where an import gives its lock back."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or (code.co_name == "cb" and code.co_filename.startswith("<frozen importlib")):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def stopped_at_once(deadline: float | None = None) -> Iterator[None]:
    """Within it a signal, or the deadline, that asks this process to end raises StoppedAtOnce in the main thread.

    For what is done before the first shard.  Whoever installs handlers of their own within it has the signals from then
    on.

    deadline: A Unix time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = StopSignal(deadline)
    before = {name: signal.getsignal(name) for name in STOP_SIGNALS}
    stop.install()
    try:
        with stop.at_once():
            yield
    finally:
        for name, handler in before.items():
            if signal.getsignal(name) == stop._received:
                signal.signal(name, handler)


def _array_element(environ: Mapping[str, str]) -> tuple[int, int]:
    """(index of this element in its job array, number of elements); (0, 1) outside an array.

    Raises UsageError for a number that the array cannot have, which happens if variables were set by hand.
    """
    text = environ.get("SLURM_ARRAY_TASK_ID", "")
    if not text:
        return 0, 1
    count = max(1, _int(environ, "SLURM_ARRAY_TASK_COUNT", 1))
    first = _int(environ, "SLURM_ARRAY_TASK_MIN", 0)
    last = _int(environ, "SLURM_ARRAY_TASK_MAX", first + count - 1)
    if not text.isdecimal() or ("SLURM_ARRAY_TASK_MAX" in environ and not first <= int(text) <= last):
        raise UsageError(f"SLURM_ARRAY_TASK_ID={text!r} is not an element of this job's array ({first} to {last})")
    step = max(1, _int(environ, "SLURM_ARRAY_TASK_STEP", 1))
    return (int(text) - first) // step % count, count


def _int(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else default


def _cpus(environ: Mapping[str, str]) -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, _int(environ, "SLURM_CPUS_PER_TASK", affinity)) or 1


def _cpu_is_asked_for(environ: Mapping[str, str]) -> bool:
    """Whether somebody has hidden all GPUs from this process, which is the same as ``--device cpu``."""
    values = [environ[name].strip() for name in _LISTS if name in environ]
    return any(value == "" or value.startswith("-") for value in values)  # CUDA stops at a negative number


def cores(threads: int, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """How many threads of this process can work at once, beside the device: at most ``threads``.

    ``Allocation.threads`` counts the processors that the process may use, and results depend on it.  A container may
    have a smaller share of their time, and a job without ``--cpus-per-task`` may own fewer than it sees.

    Args:
        threads: ``Allocation.threads``.
        environ: Variables of SLURM and of a parent process.
        root: The folder in which ``proc`` and ``sys`` are.
    """
    limits = [quota / _workers(environ) for folder in _control_groups("cpu", root) if (quota := _quota(folder))]
    if "SLURM_CPUS_PER_TASK" not in environ and (of_job := _int(environ, "SLURM_CPUS_ON_NODE", 0)):
        limits.append(of_job / (_tasks_of_node(environ) if "SLURM_PROCID" in environ else 1) / _workers(environ))
    return max(1, min([threads, *map(int, limits)]))


def memory_share(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """The bytes of memory that each process of this job may use on this node, if all use the same.

    The bound is the smallest of the machine's memory, that of the control groups, and SLURM's.

    root: the folder below which ``proc`` and ``sys`` are.
    """
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    bounds += [bound for folder in _control_groups("memory", root) if (bound := _memory_bound(folder))]
    per_cpu = _int(environ, "SLURM_MEM_PER_CPU", 0) * _int(environ, "SLURM_CPUS_ON_NODE", 1)
    bounds += [size << 20 for size in (_int(environ, "SLURM_MEM_PER_NODE", 0), per_cpu) if size]
    return min(bounds) // (_tasks_of_node(environ) * _workers(environ))


def _workers(environ: Mapping[str, str]) -> int:
    """The processes that a parent has started for one task."""
    count = environ.get(WORKER_VARIABLE, "").partition("/")[2]
    return max(1, int(count)) if count.isdecimal() else 1


def _tasks_of_node(environ: Mapping[str, str]) -> int:
    """The tasks of this job on the node that has most of them: of ``4(x2),3`` four."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    return max(1, *(int(count) for count in re.findall(r"(?:^|,)(\d+)", tasks)))


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, versions 2 and 1, each with those above it."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            own = top / path.lstrip("/")
            # In a container the path may be the host's, and only the top is there.
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _quota(group: Path) -> float | None:
    """The processors' worth of time that a control group may use; None without a limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((group / name).read_text("ascii") for name in names).split()
            if quota.isdecimal() and int(quota) and int(period):
                return int(quota) / int(period)
    return None


def _memory_bound(group: Path) -> int | None:
    """The bytes that a control group may use; None without a limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": none
            return int((group / name).read_text("ascii"))
    return None


def gpus_promised(environ: Mapping[str, str] = os.environ) -> str:
    """Who says that this process has GPUs, for a message; "" if nobody does, or if the GPUs are hidden on purpose."""
    if _cpu_is_asked_for(environ):
        return ""
    for name in (*_NAMING_GPUS, *_COUNTING_GPUS):
        value = environ.get(name, "").strip()
        none = not re.search(r"(^|[:=])0*[1-9]\d*($|\D)", value) if name in _COUNTING_GPUS else False
        if value.lower() not in _NO_GPU and not none:
            return f"{name}={value[:80]} says that there are GPUs"
    if "CUDA_VISIBLE_DEVICES" not in environ:  # nobody has hidden them
        devices = sorted(name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+|dxg", name))
        if devices:
            return f"this machine has the GPU /dev/{devices[0]} (CUDA_VISIBLE_DEVICES=0 names it, if it works)"
    return ""


def do_without_gpus(why: str, on_cpu: str, environ: Mapping[str, str] = os.environ) -> None:
    """Go on where a GPU would be used and cannot be: a job on a GPU node must not run on its CPUs unnoticed.

    Args:
        why: Why no GPU is used.
        on_cpu: What is done instead, for one line of the log; "" if another process says it.

    Raises:
        InfrastructureError: GPUs were promised to this process.
    """
    if promise := gpus_promised(environ):
        raise InfrastructureError(f"{why}, but {promise}: look at the job and the node's driver; {CPU_ON_PURPOSE}")
    if on_cpu:
        logger.warning(f"{why}: {on_cpu}")


def workers_for_gpus(workers: int, num_gpus: int | None, gpus: str | None = None, *, device: str | None = None) -> int:
    """How many processes to start here, one per GPU: the requested number, otherwise the number of visible GPUs.

    gpus: numbers such as ``0,2`` or ``0-3`` of GPUs among those that this process sees: only these are visible from now
    on.  If srun starts several tasks, each of them is one process; where GPUs are requested and the tasks of this node
    see the same ones, each starts its share.  device: ``cpu`` if none of them uses a GPU; the number of processes can
    be requested anyway.

    Raises UsageError if more GPUs are requested than there are.
    """
    chosen = [] if gpus is None else _chosen(gpus)
    if device == "cpu":
        return len(chosen) or num_gpus or workers
    if gpus is None and num_gpus is None:
        tasks = os.environ.get("SLURM_NTASKS", "1")
        alone = workers == 1 and not (tasks.isdigit() and int(tasks) > 1)
        return max(1, visible_gpus()) if alone else workers
    flag = f"--num_gpus {num_gpus}" if gpus is None else f"--gpus {gpus}"
    wanted, count = num_gpus or len(chosen), visible_gpus() or torch_devices()[1]
    if count < max([wanted, *(number + 1 for number in chosen)]):
        seen = f"only {count} are visible here" if count else "no GPU can be seen here"
        raise UsageError(f"{flag}: {seen}; {CPU_ON_PURPOSE}")
    share = _share_of_task(wanted, count)
    if chosen:
        os.environ.update(showing(chosen))
    return share


def _chosen(gpus: str) -> list[int]:
    chosen = numbers_in("--gpus", gpus, low=0, high=MAX_GPU, what="the number of a GPU", example="0,2,3 or 0-3")
    if not chosen:
        raise UsageError(f"--gpus {gpus!r} names no GPU; write 0,2,3 or 0-3")
    return list(chosen)


def showing(chosen: Sequence[int], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that make only these of the visible GPUs visible, never others than before; none: no GPU."""
    lists = [name for name in _LISTS if name in environ]
    if "CUDA_VISIBLE_DEVICES" in lists or "HIP_VISIBLE_DEVICES" in lists:  # they count within this one
        lists = [name for name in lists if name != "ROCR_VISIBLE_DEVICES"]
    if not lists:
        name = "ZE_AFFINITY_MASK" if chosen and torch_devices()[0] == "xpu" else "CUDA_VISIBLE_DEVICES"
        return {name: ",".join(map(str, chosen))}
    found = {name: _entries(environ[name]) for name in lists}
    return {
        name: ",".join(entries[number] for number in chosen)
        for name, entries in found.items()
        if max(chosen, default=-1) < len(entries)
    }


def own_gpus(local_rank: int, environ: Mapping[str, str] = os.environ) -> list[int]:
    """The visible GPUs that are this process's own; processes that see the same ones divide them."""
    visible = visible_gpus(environ)
    sharers = _tasks_that_share(visible, environ) * _workers(environ)
    share = visible // sharers
    first = local_rank % sharers * share
    return list(range(first, first + share))


def _share_of_task(wanted: int, visible: int) -> int:
    """How many of the processes this task starts, where srun has started several tasks on this node.

    wanted: processes on the machine.  visible: GPUs that this task sees: its own, or those of all tasks.
    """
    return max(1, wanted // _tasks_that_share(visible, os.environ))


def _tasks_that_share(visible: int, environ: Mapping[str, str]) -> int:
    """How many tasks see the GPUs that this task sees."""
    tasks = _tasks_on_node(environ)
    on_node = _int(environ, "SLURM_GPUS_ON_NODE", 0)
    own = _int(environ, "SLURM_GPUS_PER_TASK", 0) == visible or visible * tasks <= on_node
    return 1 if own else tasks


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """How many tasks of this step are on this node."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        counts = [int(n) for n, times in _TASKS.findall(environ.get(name, "")) for _ in range(int(times or 1))]
        if counts:
            return max(1, counts[min(_int(environ, "SLURM_NODEID", 0), len(counts) - 1)])
    nodes = max(1, _int(environ, "SLURM_JOB_NUM_NODES", 1))
    return max(1, -(-_int(environ, "SLURM_NTASKS", 1) // nodes))


def torch_devices() -> tuple[str, int]:
    """Ask torch which devices there are.

    Returns:
        ``cuda`` (NVIDIA's, and AMD's with ROCm) or ``xpu`` (Intel's), and how many of them are visible; ("", 0) where
        there are none, or no torch.
    """
    let_segments_grow()
    try:
        import torch
    except ImportError:
        return "", 0
    for kind in ("cuda", "xpu"):
        with contextlib.suppress(RuntimeError, AssertionError):  # a driver that does not answer
            if count := getattr(torch, kind).device_count():
                return kind, int(count)
    return "", 0


def let_segments_grow() -> None:
    """Let torch's allocator extend its blocks in place of adding others, so that halved batches fit into the memory of
    whole ones.  It counts only before torch has begun to use a device, and not where the user has chosen settings."""
    if not any(name in os.environ for name in _ALLOCATOR):
        for name in _ALLOCATOR[:2]:
            os.environ[name] = "expandable_segments:True"


def visible_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """How many devices this process may use.  torch is asked only where the environment and NVIDIA's driver tell
    nothing of them, but something else says that there are some."""
    named = _named_gpus(environ)
    may_ask = environ is os.environ and (gpus_promised() or os.path.exists("/dev/kfd") or os.path.exists("/dev/dri"))
    return torch_devices()[1] if named is None and may_ask else named or 0


def _named_gpus(environ: Mapping[str, str]) -> int | None:
    """How many devices a variable or NVIDIA's driver tells of; None if they tell nothing."""
    visible = next((environ[name] for name in _LISTS if name in environ), None)
    if visible is not None:
        return len(_entries(visible))
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus")) or None
    except OSError:
        return None


def _entries(visible: str) -> list[str]:
    """The devices of a list.  CUDA ignores everything after the first entry that it does not know; SLURM writes
    NoDevFiles for no device."""
    return list(takewhile(_DEVICE.match, (device.strip() for device in visible.split(","))))


def gpu_name(index: int | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The name that the list of visible devices gives to the one with this index: a number or a UUID."""
    if index is None:
        return None
    visible = _entries(next((environ[name] for name in _LISTS if name in environ), ""))
    return visible[index] if index < len(visible) else str(index)


def _own_gpu(environ: Mapping[str, str], local_rank: int) -> int | None:
    """The index of this task's GPU: SLURM may show a task only its own GPU, or all GPUs of the node."""
    count = _named_gpus(environ)
    return local_rank % count if count else None
