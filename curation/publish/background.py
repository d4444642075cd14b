"""Uploading while a stage runs: ``curation publish`` as a process of its own, now and then and at the end.

In a process of its own, nothing that the hub, its client or a broken network does can stop, slow or kill the stage.
While a run goes on, the process with rank 0 uploads; at the end each command that was started does, because it may be
the last one.  They need not agree: a push adds what is missing, whoever made it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, ClassVar

import curation
from curation import PROGRAM
from curation.cluster import WORKER_VARIABLE, Allocation
from curation.errors import EXIT_OK, EXIT_WORK_LEFT, UsageError
from curation.jsonio import clean_text
from curation.options import URLS, at_least
from curation.publish.repository import check_access, check_name
from curation.storage.urls import redact

logger = logging.getLogger("curation")

PAUSE_S = 30.0  # between two pushes: the hub takes about two commits a minute
_TRIES, _LAST_TRIES = 2, 5
_GRACE_S = 5.0
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Whether and where a stage uploads what it makes."""

    help_group: ClassVar[str] = "hub"

    push_every: Annotated[int, at_least(1)] = 500
    """Images between two uploads to the hub, half a minute at least."""
    hf_repo: Annotated[str | None, URLS] = None
    """Dataset repository to upload to: user/name, or name.  Made, private, if it is not there.  Default: none."""
    hf_username: str | None = None
    """Owner of --hf_repo.  Default: who is logged in."""
    push: bool = True
    """--no_push: upload nothing, whatever --hf_repo says."""

    def check_hub(self) -> None:
        """Raise UsageError where nothing could ever be uploaded.  Sends no request."""
        repo = self.repository
        if repo is not None:
            check_name(repo)
            check_access()

    @property
    def repository(self) -> str | None:
        """The repository to upload to, None where nothing is uploaded."""
        if self.hf_repo is None or not self.push:
            return None
        if self.hf_username is None:
            return self.hf_repo
        owner, slash, _ = self.hf_repo.rpartition("/")
        if slash and owner != self.hf_username:
            raise UsageError(f"--hf_repo {clean_text(self.hf_repo)} is not of --hf_username {self.hf_username}")
        return self.hf_repo if slash else f"{self.hf_username}/{self.hf_repo}"


class Pushing:
    """The uploads of one process of a stage.  No method raises, whatever the hub does.

    Args:
        options: The stage's flags.
        folder: The stage's output folder.
        stage: The stage's name.
        only: Patterns of the outputs to upload, like ``publish --only``.
    """

    def __init__(self, options: HubOptions, folder: Path, stage: str, only: Sequence[str] = ()) -> None:
        self._repo = options.repository
        self._every = options.push_every
        self._command = [sys.executable, "-m", "curation", "publish", str(folder.absolute()), "--stage", stage]
        self._command += [f"--repo={self._repo}", "--quiet", *(["--only", *only] if only else [])]
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._seen = 0
        self._world = 1
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    def begin(self, allocation: Allocation) -> None:
        """Begin to upload now and then, if this process has rank 0."""
        if self._repo is not None and allocation.rank == 0 and self._thread is None:
            self._world = allocation.world
            self._thread = threading.Thread(target=self._push_periodically, name="hub", daemon=True)
            self._thread.start()

    def saw(self, images: int) -> None:
        """Count images that are done.  Other processes are assumed to be as quick as this one."""
        if self._thread is not None:
            self._seen += images * self._world
            if self._seen >= self._every:
                self._wake.set()

    def end(self) -> None:
        """Stop the upload that is running; the last push, or the next start, continues it."""
        self._ended.set()
        self._wake.set()
        self._stop_process()
        if self._thread is not None:
            self._thread.join(2 * _GRACE_S)
            self._thread = None

    def finish(self, code: int) -> None:
        """Upload the rest at the end of the command, whose exit code is ``code``.

        A worker leaves this to its parent.  After a signal there is no time, and the next start goes on.
        """
        if self._repo is None or WORKER_VARIABLE in os.environ:
            return
        if code == EXIT_WORK_LEFT:
            logger.info(f"{self._repo}: the next start, or `{PROGRAM} publish`, uploads the rest")
            return
        self._ended.clear()
        with self._stopped_by_signals():
            self._push(_LAST_TRIES)

    # ---- in the thread, or at the end

    def _push_periodically(self) -> None:
        while not self._ended.is_set():
            self._wake.wait()
            self._wake.clear()
            if self._ended.is_set():
                return
            self._seen = 0
            self._push(_TRIES)
            self._ended.wait(PAUSE_S)
            if self._seen >= self._every:
                self._wake.set()

    def _push(self, tries: int) -> None:
        """Run ``publish`` once and log the last line that it prints."""
        root = str(Path(curation.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        try:
            with self._lock:
                if self._ended.is_set():
                    return
                self._process = subprocess.Popen(
                    [*self._command, f"--tries={tries}"],
                    env={**os.environ, "PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            output, _ = self._process.communicate()
            code = self._process.returncode
        except OSError as error:
            output, code = str(error), -1
        line = next((line for line in reversed(output.splitlines()) if line.strip()), f"exit code {code}")
        line = clean_text(redact(line.strip().removeprefix("error: ")))[:500]
        if code == EXIT_OK:
            logger.info(f"hub: {line}")
        elif not self._ended.is_set():
            logger.warning(f"not all is uploaded, captions are not concerned: {line}")

    def _stop_process(self) -> None:
        with self._lock:
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let a signal end the last push, and with it the command, whose other work is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self._ended.set()
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
            logger.warning(f"{signal.Signals(number).name}: not all is uploaded; `{PROGRAM} publish` goes on")

        before = {name: signal.signal(name, stop) for name in _SIGNALS}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
