"""Publishing while a stage runs: ``curation publish`` as a process of its own, and room on the local disk.

In a process of its own, nothing that a store, its client or a broken network does can stop, slow or kill the stage.
Each process that a user or SLURM starts has one.  They share the shards by claims, and whatever one of them leaves is
uploaded by another, by the next start, or by the command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import curation
from curation import PROGRAM
from curation.cluster import WORKER_VARIABLE, StopSignal, parse_deadline, signals_received
from curation.errors import (
    EXIT_OK,
    EXIT_SHARDS_FAILED,
    EXIT_USAGE,
    EXIT_WORK_LEFT,
    InfrastructureError,
    UsageError,
    redact,
)
from curation.options import PublishOptions, bytes_in
from curation.publish.backlog import Backlog
from curation.publish.open_store import (
    address_of,
    open_store,
    refuse_folders_of,
    refuse_own_folder,
    repository_in,
    store_name,
)
from curation.publish.repository import check_access
from curation.run.work import Stage
from curation.storage.files import names_in

logger = logging.getLogger("curation")

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
_READ = ("input", "edits", "prompts", "captions", "adopt")  # options that name folders of the stage beside its output
KEEPS_ALL = "this store keeps no conditions, so no local file is removed (--keep_local all)"
_GRACE_S = 5.0
_AGAIN_S = 30.0  # between two starts of a publisher that is killed again and again
_POLL_S = 0.05  # between two looks at whether the publisher has ended
_LOOK_S = 1.0  # between two looks at whether there is room again


def published(
    options: PublishOptions,
    stage: Stage[Any] | tuple[str, Path],
    run: Callable[[], int],
    *,
    kept: tuple[str, ...] = (),
    needed_by: str = "",
) -> int:
    """Run a stage and publish what it makes, if the options say so.

    Args:
        options: The stage's options.
        stage: The stage, or its name and output folder.
        run: Runs the stage and makes the files of the whole run; returns its exit code.
        kept: Patterns of the paths of outputs that stay on this filesystem, because files of the whole run are made
            from them.
        needed_by: Why the outputs must stay on this filesystem, for the message; empty if they need not.

    Returns:
        The exit code: 0 only if all that is done here is proved to be in the store.

    Raises:
        InfrastructureError: As for ``run``; or the store refuses at the start.
    """
    options.check_publishing(needed_by=needed_by)
    url = options.publish_to
    if url is not None and repository_in(url) is not None:
        _refuse_for_repositories(options, url)
    name, home = (stage.name, stage.output) if isinstance(stage, Stage) else stage
    if url is not None:
        refuse_own_folder(url, home)
        for option in _READ:
            given = getattr(options, option, None) or ()
            refuse_folders_of(url, option, map(str, given if isinstance(given, tuple) else (given,)))
    if url is None or getattr(options, "dry_run", False):
        if url is not None and address_of(url).scheme == "hf":  # where the other check would create a repository
            check_access()
        elif url is not None:
            with contextlib.closing(open_store(url)) as store:
                store.check()
        return run()
    if isinstance(stage, Stage):
        stage.full = room_for(options, name, home)
    if WORKER_VARIABLE in os.environ:
        return run()
    with contextlib.closing(open_store(url)) as store:
        store.check()
        conditional = store.conditional
    removes = options.keep_local == "receipts" or (
        options.keep_local is None and options.work_dir is not None and not needed_by and repository_in(url) is None
    )
    if removes and not conditional:
        logger.warning(f"{redact(url)}: {KEEPS_ALL}")
        removes = False
    stop = StopSignal(parse_deadline(getattr(options, "deadline", None)))  # a relative one counts from the start
    helper = _Helper(options, name, home, removes=removes, kept=kept)
    helper.start()
    if isinstance(stage, Stage):
        room = stage.full
        stage.full = lambda: helper.check() or room()
    try:
        code = run()
    except BaseException:
        helper.stop()
        raise
    return _both(code, helper.finish(stop, wait=code != EXIT_WORK_LEFT))


def _refuse_for_repositories(options: PublishOptions, url: str) -> None:
    """Raise UsageError for what a push to a whole repository does not do: it reads the local files again each time."""
    for flag, given in (("keep_local receipts", options.keep_local == "receipts"),
                        ("local_budget", options.local_budget is not None)):  # fmt: skip
        if given:
            raise UsageError(
                f"--{flag} is not for a whole repository on the hub; give a folder in it: "
                f"{redact(url).rstrip('/')}/data"
            )


def _both(code: int, publishing: int) -> int:
    """The exit code of a run from that of the stage and that of the publisher."""
    for one in (EXIT_USAGE, EXIT_WORK_LEFT):
        if publishing == one:
            return one
    if publishing not in (EXIT_OK, EXIT_SHARDS_FAILED):  # killed
        return EXIT_WORK_LEFT
    return code or publishing


class _Helper:
    """``curation publish`` as a process that ends some time after its standard input does."""

    def __init__(
        self, options: PublishOptions, stage: str, home: Path, *, removes: bool, kept: tuple[str, ...]
    ) -> None:
        self._url = redact(str(options.publish_to))
        self._command = [
            sys.executable, "-m", "curation", "publish", str(home.absolute()), "--stage", stage,
            f"--to={options.publish_to}", "--until_eof",
        ]  # fmt: skip
        self._command += ["--keep_local", "receipts" if removes else "all"]
        self._command += [f"--keep={','.join(kept)}"] if removes and kept else []
        whole = repository_in(str(options.publish_to)) is not None  # where all versions are kept
        self._command += ["--overwrite"] if options.overwrite and not whole else []
        for name in ("lease_s", "stall_s"):
            if (value := getattr(options, name, None)) is not None:
                self._command.append(f"--{name}={value}")
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self) -> None:
        self._started = time.monotonic()
        root = str(Path(curation.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            self._command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal is for the stage, which tells this process what to do
        )

    def check(self) -> str:
        """Raise InfrastructureError if the store refuses the uploads, so that further work would stay here.

        A publisher that was killed is started again.
        """
        code = None if self._process is None else self._process.poll()
        if code == EXIT_USAGE:
            raise InfrastructureError(f"{self._url}: the publisher has ended, see its line above")
        if code is not None and time.monotonic() - self._started > _AGAIN_S:
            logger.warning(f"{self._url}: the publisher has ended ({code}); it is started again")
            self.start()
        return ""

    def finish(self, stop: StopSignal, *, wait: bool) -> int:
        """Let it upload the rest until a signal or the deadline asks to end; returns its exit code.

        wait: false for a run that was stopped: what is under way is broken off.
        """
        process = self._process
        if process is None or process.stdin is None:
            return EXIT_WORK_LEFT
        if not wait:
            self.stop()
            logger.info(f"{self._url}: the next start, or `{PROGRAM} publish`, uploads the rest")
            return EXIT_WORK_LEFT
        with _listening(stop):
            with contextlib.suppress(OSError):
                process.stdin.close()
            while (code := process.poll()) is None:
                if stop.draining:
                    self.stop()
                time.sleep(_POLL_S)
        if code == EXIT_WORK_LEFT or code < 0:
            logger.warning(f"{self._url}: not all is uploaded: run the same command again, or `{PROGRAM} publish`")
        return code

    def stop(self) -> None:
        """End it soon; shards whose upload is under way are begun again by the next publisher."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _listening(stop: StopSignal) -> Iterator[None]:
    """Let the signals go to ``stop``, also those that came while the stage did its last shard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.getsignal(name) for name in _SIGNALS}
    if signals_received:
        stop.ask(signal.Signals(signals_received[-1]).name)
    stop.install()
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def room_for(options: PublishOptions, stage: str, home: Path) -> Callable[[], str]:
    """A function that says why no other shard may begin; it says nothing where one may.

    With ``--local_budget``, what the receipts name and the store lacks may have that many bytes.  For each shard in
    work, the mean size of these is added.  The function raises InfrastructureError when no upload has finished for
    ``--stall_s``.
    """
    if options.publish_to is None or options.local_budget is None:
        return lambda: ""
    return _Room(options, stage, home)


class _Room:
    def __init__(self, options: PublishOptions, stage: str, home: Path) -> None:
        self._budget = bytes_in("--local_budget", options.local_budget or "")
        self._stall_s = float(getattr(options, "stall_s", 1800.0))
        self._url = redact(str(options.publish_to))
        self._claims = home / "_claims" / stage
        self._backlog = Backlog(home, stage, store_name(str(options.publish_to)))
        self._lock = threading.Lock()
        self._mean = 0.0
        self._looked = -float("inf")
        self._full = ""
        self._waiting: tuple[frozenset[str], float] | None = None  # which shards were missing, and since when

    def __call__(self) -> str:
        with self._lock:
            now = time.monotonic()
            if not self._full or now - self._looked >= _LOOK_S:  # this process may have filled the room since
                self._looked = now
                self._look(now)
            return self._full

    def _look(self, now: float) -> None:
        missing = {f"{due.shard_id}.{due.generation}": due.size for due in self._backlog.shards()}
        size = sum(missing.values())
        if missing:
            self._mean = size / len(missing)
        in_work = sum(name.endswith(".claim") for bucket in names_in(self._claims) for name in self._in(bucket))
        total = size + int(in_work * self._mean)
        if total < self._budget or not missing:
            self._full, self._waiting = "", None
            return
        self._full = (
            f"waiting for uploads: {size / 1e9:,.1f} GB in {len(missing):,} shards are not in {self._url} yet "
            f"(--local_budget {self._budget / 1e9:,.1f} GB)"
        )
        if self._waiting is None or not self._waiting[0] <= missing.keys():  # one of them has arrived
            self._waiting = (frozenset(missing), now)
        elif now - self._waiting[1] > self._stall_s:
            raise InfrastructureError(
                f"{self._url}: no upload has finished for {self._stall_s:g} s, and --local_budget is used up; look at "
                "the lines of the publisher above, and start again"
            )

    def _in(self, bucket: str) -> list[str]:
        return [] if bucket.startswith("_") else names_in(self._claims / bucket)
