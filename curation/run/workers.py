"""Runs several worker processes on one machine: starts, watches, restarts and ends them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import inspect
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from types import FrameType
from typing import Any

from curation.cluster import RUN_VARIABLE, WORKER_VARIABLE, Allocation, parse_deadline, signals_received
from curation.errors import EXIT_DEVICE_FAILED, EXIT_OK, EXIT_SHARDS_FAILED, EXIT_USAGE, EXIT_WORK_LEFT
from curation.options import RunOptions, logger
from curation.run.progress import Progress, TalliesOfWorkers
from curation.run.work import Stage
from curation.shards import Shard

MAX_RESTARTS = 3  # per worker: a machine that kills it again and again will go on doing so
_PR_SET_PDEATHSIG = 1
_PARENT_VARIABLE = "CURATION_PARENT"
_PIPE_VARIABLE = "CURATION_TALLY_PIPE"  # the number of the descriptor into which a worker tells what it counts


def is_worker() -> bool:
    """Whether ``run_workers`` started this process; if so, it ends when its parent ends."""
    if WORKER_VARIABLE not in os.environ:
        return False
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.get(_PARENT_VARIABLE) not in (None, str(os.getppid())):
        sys.exit(EXIT_WORK_LEFT)  # the parent ended before it could be watched
    return True


def pipe_to_parent() -> int | None:
    """The pipe through which a worker tells its parent what it counts; None in any other process."""
    if is_worker():
        with contextlib.suppress(KeyError, ValueError):
            return int(os.environ[_PIPE_VARIABLE])
    return None


def _script_of(stage: object, options: RunOptions) -> str:
    """The script that a worker runs: the file of the stage, or of its options if the stage is in the package."""
    kinds = [kind for kind in (type(stage), type(options)) if not kind.__module__.startswith("curation.")]
    return next(filter(None, map(inspect.getsourcefile, kinds)), sys.argv[0])


def run_workers(
    stage: Stage[Any], options: RunOptions, shared: str, shards: Sequence[Shard], states: Callable[[], Counter[str]]
) -> int:
    """Run the stage's script in ``options.workers`` processes that share the shards by claims.

    A worker that a signal kills is started again, up to three times; meanwhile the others continue its shard.  A worker
    whose device has failed is not: the others do its work.

    Args:
        stage: The stage.
        options: Its options.
        shared: A mark that all processes of this run have in common.
        shards: Those that are selected.
        states: Counts how many of them are done, pending, failed and so on; asked where a device has failed.

    Returns:
        The exit code.
    """
    end = parse_deadline(options.deadline)
    if end is not None or options.deadline is not None:  # it counts from now, also for a restarted worker
        text = "none" if end is None else datetime.fromtimestamp(end).isoformat()
        options = dataclasses.replace(options, deadline=text)
    command = [sys.executable, _script_of(stage, options), *to_argv(options)]
    threads = str(Allocation.detect(options.workers).threads)
    began, tallies = time.monotonic(), TalliesOfWorkers()
    slots: list[_Worker] = []
    stopping: list[int] = []
    signals_received.clear()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopping.append(number)
        signals_received.append(number)
        for slot in slots:
            slot.send(number)

    for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        signal.signal(name, pass_on)
    for index in range(options.workers):
        if not stopping:
            slots.append(_Worker(command, index, options.workers, shared, threads, tallies.pipe))
            if stopping:  # a signal came meanwhile
                slots[-1].send(stopping[-1])
    with _progress_of_all(stage, options, shards) as progress:
        while any(slot.running for slot in slots):
            time.sleep(0.1)
            tallies.read(progress)
            for slot in slots:
                code = slot.poll()
                if code == EXIT_USAGE and not stopping:  # the others would fail in the same way
                    pass_on(signal.SIGTERM, None)
                elif code is not None and code < 0 and not stopping:
                    logger.error(f"worker {slot.index} died: {signal.Signals(-code).name}")
                    slot.restart()
                elif code == EXIT_DEVICE_FAILED and any(slot.running for slot in slots):
                    logger.warning(f"worker {slot.index} has ended because its device failed; the others go on")
        tallies.read(progress)
    tallies.close()
    by_signal = EXIT_WORK_LEFT if stopping else EXIT_SHARDS_FAILED  # stopped before its handler was set, or killed
    codes = {slot.code if slot.code >= 0 else by_signal for slot in slots}
    if len(slots) < options.workers:
        codes.add(EXIT_WORK_LEFT)
    code = _code_of_all(codes, tallies, states)
    if code != EXIT_USAGE:
        total = tallies.tally
        if code == EXIT_OK and not options.follow:  # else it is unknown how many were done before
            total.shards("done", max(0, len(shards) - total["worked"]))
        told = total.text(time.monotonic() - began, stage.result)
        logger.info(f"{stage.name}: {options.workers} workers together: {told}")
    return code


def _code_of_all(codes: set[int], tallies: TalliesOfWorkers, states: Callable[[], Counter[str]]) -> int:
    """The exit code of a run whose workers ended with these codes; see ``run_workers``."""
    if EXIT_DEVICE_FAILED in codes and EXIT_USAGE not in codes:
        return _code_without_devices(codes - {EXIT_DEVICE_FAILED}, tallies, states())
    return next((code for code in (EXIT_USAGE, EXIT_WORK_LEFT, EXIT_SHARDS_FAILED) if code in codes), EXIT_OK)


def _code_without_devices(codes: set[int], tallies: TalliesOfWorkers, counts: Counter[str]) -> int:
    """The same where devices have failed: whether they have left work that the other workers did not do.

    codes: those of the other workers.  counts: the shards by state.
    """
    if counts["pending"] or counts["waiting"] or EXIT_WORK_LEFT in codes:
        left = f"{counts['pending'] + counts['waiting']:,} shards are left"
        if tallies.computed or tallies.tally["worked"] or EXIT_WORK_LEFT in codes:
            logger.warning(f"devices failed, and {left}: run the same command again, on devices that work")
            return EXIT_WORK_LEFT
        logger.error(f"no device has worked, and {left}: the lines above say why")
        # Other tasks of the job may have devices that work.
        return EXIT_USAGE if Allocation.detect().world == 1 else EXIT_DEVICE_FAILED
    return EXIT_SHARDS_FAILED if codes - {EXIT_OK} or counts["failed"] or counts["blocked"] else EXIT_OK


def _progress_of_all(stage: Stage[Any], options: RunOptions, shards: Sequence[Shard]) -> Progress:
    """Shows what all workers of this process have done.  With ``--follow`` each worker tells how far all are, because
    only the workers know which shards will come."""
    return Progress(
        stage.name,
        [shard.id for shard in shards],
        options.quiet or options.follow,
        receipts=stage.ledger(read_only=True).receipts,
        again=options.rerun,
        world=Allocation.detect(options.workers).world,
        workers=options.workers,
    )


class _Worker:
    def __init__(self, command: list[str], index: int, count: int, shared: str, threads: str, pipe: int) -> None:
        self._pipe = pipe
        self.index = index
        self.code = EXIT_OK
        self.running = True
        self._command = command
        self._restarts = 0
        self._environment = {
            **os.environ,
            WORKER_VARIABLE: f"{index}/{count}",
            RUN_VARIABLE: shared,
            _PARENT_VARIABLE: str(os.getpid()),
            _PIPE_VARIABLE: str(pipe),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        }
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Each worker has its own session, so that a terminal's Ctrl-C reaches it only once, through the parent.
        return subprocess.Popen(self._command, env=self._environment, start_new_session=True, pass_fds=(self._pipe,))

    def poll(self) -> int | None:
        """The exit code when the worker has ended; it is returned only once."""
        if not self.running:
            return None
        code = self._process.poll()
        if code is None:
            return None
        self.code, self.running = code, False
        return code

    def restart(self) -> None:
        if self._restarts < MAX_RESTARTS:
            self._restarts += 1
            self._process, self.running = self._start(), True

    def send(self, number: int) -> None:
        if self.running and self._process.poll() is None:
            self._process.send_signal(number)


def to_argv(options: RunOptions) -> list[str]:
    """The command line that gives these options again."""
    argv = []
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if item.default is not dataclasses.MISSING and value == item.default:
            continue
        if isinstance(value, bool):
            argv.append(f"--{item.name}" if value else f"--no_{item.name}")
        elif isinstance(value, list | tuple):
            argv += [f"--{item.name}={one}" for one in value]
        else:
            argv.append(f"--{item.name}={value}")  # as one argument, because the value may begin with a dash
    return argv
