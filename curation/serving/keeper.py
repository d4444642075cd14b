"""Runs one model server as long as whoever started this process lives, and keeps what the server says.

It is a program of its own, ``python keeper.py LOG MOST_BYTES COMMAND …``.  Standard input is a pipe that ends when the
other process is gone, however that ended; then the server and all that it started are ended too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

GRACE_S = 8.0  # for a server to end by itself
LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1


class Log:
    """What a server says: the newest bytes in ``path``, and those before in ``path``.1, each at most ``most_bytes``."""

    def __init__(self, path: str, most_bytes: int) -> None:
        self._path, self._most = path, most_bytes
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the server

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk does not end the server
            if self._file.tell() + len(data) > self._most:
                os.replace(self._path, f"{self._path}.1")
                self._file.close()
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - as above
            self._file.write(data)


def keep(log: Log, command: list[str]) -> int:
    """Run the command until it ends or standard input does; returns its exit code."""
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts can be ended together
            preexec_fn=_end_with_parent,
        )
    except OSError as error:
        log.write(f"error: {command[0]} cannot be started: {error.strerror}\n".encode())
        return 127
    assert server.stdout is not None
    said = server.stdout.fileno()
    watched = [0, said]
    try:
        while server.poll() is None:
            ready, _, _ = select.select(watched, [], [], LOOK_S)
            if 0 in ready and not os.read(0, 1024):
                break
            if said in ready:
                if data := os.read(said, 1 << 16):
                    log.write(data)
                else:
                    watched.remove(said)
    finally:
        _end_group(server)
    os.set_blocking(said, False)
    with contextlib.suppress(OSError):
        while data := os.read(said, 1 << 16):
            log.write(data)
    return server.returncode


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            ends = time.monotonic() + GRACE_S
            while server.poll() is None and time.monotonic() < ends:
                time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)  # what is left of its processes
    server.wait()


def _asked_to_end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> int:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # also for the server: it answers until the stage has ended
    signal.signal(signal.SIGTERM, _asked_to_end)
    return keep(Log(arguments[0], int(arguments[1])), arguments[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
