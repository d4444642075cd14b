"""Processes that tests start, and conditions that tests wait for.

No test counts on how fast the machine is: it waits for a condition, with a bound that only a fault reaches.  No test
leaves a process behind: ``started`` ends what it started, and ``Leftovers`` finds what escaped from it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests import ROOT

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)  # those that stages handle
PATIENCE_S = 120.0  # far longer than anything takes on a busy machine, and less than the limit of a test
MARK = "TESTS_STARTED_BY"  # this variable of the environment marks whatever a process of pytest has started
NOT_OURS_TO_END = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")  # they live as long as pytest
Found = TypeVar("Found")


def wait_until(
    condition: Callable[[], Found],
    what: str | Callable[[], object] = "a condition",
    *,
    while_runs: subprocess.Popen[Any] | None = None,
    seconds: float = PATIENCE_S,
) -> Found:
    """Wait until a condition holds.

    Args:
        condition: Asked again and again until its value is true.
        what: What the test waits for, or what tells then why it did not come, for the message of a failure.
        while_runs: A process without which the condition can never hold: when it ends, the test fails at once.
        seconds: How long to wait at most.

    Returns:
        The condition's value.
    """
    end = time.monotonic() + seconds
    while True:
        too_late = time.monotonic() > end
        code = None if while_runs is None else while_runs.poll()
        if found := condition():
            return found
        assert code is None, f"the process ended with {code} before there was {_text(what)}"
        assert not too_late, f"waited {seconds:.0f} s for {_text(what)}"
        time.sleep(0.01)


def _text(what: str | Callable[[], object]) -> object:
    return what if isinstance(what, str) else what()


def start(command: Sequence[object], *, more: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, from the project's folder.

    Args:
        command: The program and its arguments.
        more: Variables that its environment has beside those of this process.
        options: Of ``subprocess.Popen``.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(more or {})}
    given = {"cwd": ROOT, "env": environment, "text": True, "errors": "replace", "start_new_session": True}
    return subprocess.Popen([str(word) for word in command], **{**given, **options})


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process with its whole group, and wait for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def started(
    command: Sequence[object], *, more: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run a command while the block runs: when the block ends, also by a failure, its process group is killed."""
    with ended_at_last(start(command, more=more, **options)) as process:
        yield process


@contextlib.contextmanager
def ended_at_last(*processes: subprocess.Popen[Any]) -> Iterator[Any]:
    """End these processes with the block; gives the one, or a tuple of several."""
    try:
        yield processes[0] if len(processes) == 1 else processes
    finally:
        for process in processes:
            end(process)


def cpu_time_of(
    command: Sequence[object], *, more: dict[str, str] | None = None
) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command to its end.

    Returns:
        The seconds of CPU time that it and its children took, and what it said.  The seconds on the clock would depend
        on what else the machine does.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with started(command, more=more, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, log = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, subprocess.CompletedProcess(process.args, process.returncode, out, log)


def help_answers_at_once(*command: object) -> subprocess.CompletedProcess[str]:
    """``--help`` of a Python program takes less than a second of CPU time, in the best of five tries: caches are shared
    with what else the machine does.  Gives what it says, and on the error stream the modules that it imported."""
    for _ in range(5):
        seconds, said = cpu_time_of([sys.executable, "-X", "importtime", *command, "--help"], more={"COLUMNS": "200"})
        assert said.returncode == 0, said.stderr
        if seconds < 1:
            return said
    raise AssertionError(f"{seconds:.1f} s of CPU time for --help")


def imported_modules(importtime: str) -> set[str]:
    """The top-level modules in what ``python -X importtime`` wrote."""
    return {line.rpartition("|")[2].strip().split(".")[0] for line in importtime.splitlines() if "|" in line}


class Leftovers:
    """What the tests of a file started and left running."""

    def __init__(self) -> None:
        self._mark = f"{MARK}={os.getpid()}.{time.time_ns()}".encode()
        os.environ[MARK] = self._mark.partition(b"=")[2].decode()
        self._of_fixtures: set[int] = set()

    @contextlib.contextmanager
    def setup(self) -> Iterator[None]:
        """What is started meanwhile is a fixture's, which may be for later files too."""
        before = _pids()
        try:
            yield
        finally:
            self._of_fixtures |= _pids() - before

    def end(self, *, everything: bool) -> list[str]:
        """Kill what has been started, with or without what fixtures have, and say what it was.

        What ends by itself within some seconds is no leftover: its end was on its way.
        """
        spared = set() if everything else self._of_fixtures
        until = time.monotonic() + 10
        while (left := self._running(_pids() - spared)) and time.monotonic() < until:
            time.sleep(0.02)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [f"{pid}: {command.replace(bytes(1), b' ').decode(errors='replace')}" for pid, command in left.items()]

    def _running(self, pids: set[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for pid in sorted(pids - {os.getpid()}):
            entry = Path("/proc", str(pid))
            try:
                state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if state == b"Z" or any(name in command for name in NOT_OURS_TO_END):
                continue
            if self._mark in environment.split(bytes(1)) or int(parent) in {os.getpid(), *found}:
                found[pid] = command
        return found


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}
