"""One worker process of stage 06 as its parent sees it: started, asked, found dead or hung, replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from curation.errors import InfrastructureError
from curation.extract_worker import Job, Outcome, Slots
from curation.extracting import Preparation

REPLY_S = 120.0  # for what it is given at once: then it has hung
_CHILD = "from curation.extract_worker import main; main({}, {})"


class Lost(Exception):
    """The process died or hung over what it was given.  problem: how, as a reason and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = reason, detail


class WorkerProcess:
    """One worker process, started when it is first needed and again after a death."""

    def __init__(self, preparations: tuple[Preparation, ...], slots: Slots, plugin: str | None) -> None:
        self._preparations = preparations
        self._slots = slots
        self._plugin = plugin
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, jobs: tuple[Job, ...]) -> tuple[list[Outcome], float]:
        """The outcomes of the jobs, and the seconds that they took.  Raises Lost, after which it may be asked again."""
        connection = self._connection or self._start()
        try:
            connection.send(jobs)
            if connection.poll(REPLY_S):
                outcomes, seconds = connection.recv()
                return outcomes, seconds
            self._kill()
            raise Lost("decode_timeout", f"the process that prepared it did not end within {REPLY_S:g} s")
        except (EOFError, OSError):
            code = self._kill()
            raise Lost("worker_died", f"the process that prepared it died ({_cause(code)})") from None

    def end(self) -> None:
        """Have it end, which it does when nobody is at the other side."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._kill()

    def _kill(self) -> int:
        assert self._process is not None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that died of itself tells why
            return self._process.wait(0.5)
        self._process.kill()
        return self._process.wait()

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        descriptors = theirs.fileno(), self._slots.descriptor
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with ours, theirs:
            command = [sys.executable, "-P", "-c", _CHILD.format(*descriptors)]
            self._process = subprocess.Popen(command, pass_fds=descriptors, env=environment, stdin=subprocess.DEVNULL)
            self._connection = connection = Connection(ours.detach())
        try:
            connection.send(self._plugin)
            connection.send((self._preparations, self._slots.layout))
            problem = connection.recv()
        except (EOFError, OSError):
            cause = _cause(self._kill())
            raise InfrastructureError(f"a process that decodes images ended at its start ({cause})") from None
        if problem is not None:
            raise InfrastructureError(f"a process that decodes images cannot start: {problem}")
        return connection


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
