"""A TCP relay before a web server that breaks connections at chosen requests."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

What = Literal["before", "midway", "after"]
"""How much of a request the server sees before the cut: nothing, half of the body, or all, with its answer lost."""


@dataclass
class Rule:
    """The next ``times`` requests whose first line matches: they are cut, or ``then`` is called before they pass, or
    ``done`` when their answer has come and has not passed yet."""

    pattern: str
    what: What | None = None
    times: int = 1
    then: Callable[[], object] | None = None
    done: Callable[[], object] | None = None


@dataclass
class Relay:
    target: int
    rules: list[Rule] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # first lines of all requests

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def reset(self) -> None:
        self.rules.clear()
        self.asked.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for end in (client, server):  # else small pieces wait 40 ms for an acknowledgement
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            mute = threading.Event()
            calls: list[Callable[[], object]] = []  # when the next answer of this connection has come
            threading.Thread(target=self._requests, args=(client, server, mute, calls), daemon=True).start()
            threading.Thread(target=self._answers, args=(server, client, mute, calls), daemon=True).start()

    def _requests(
        self, client: socket.socket, server: socket.socket, mute: threading.Event, calls: list[Callable[[], object]]
    ) -> None:
        cut: What | None = None
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                head = re.match(rb"([A-Z]+ /\S*) HTTP/1\.1\r\n", data)
                if head:
                    cut = self._meets(head[1].decode(), calls)
                    if cut == "before":
                        break
                    if cut == "after":
                        mute.set()
                body = data.partition(b"\r\n\r\n")[2] if head else data
                if cut == "midway" and body:
                    server.sendall(data[: len(data) - len(body) // 2])
                    break
                server.sendall(data)
        if cut != "after":
            self._end(client, server)

    def _answers(
        self, server: socket.socket, client: socket.socket, mute: threading.Event, calls: list[Callable[[], object]]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                while calls and not data.startswith(b"HTTP/1.1 100"):
                    calls.pop()()
                if mute.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    break
                client.sendall(data)
        self._end(client, server)

    def _meets(self, line: str, calls: list[Callable[[], object]]) -> What | None:
        with self._lock:
            self.asked.append(line)
            rule = next((r for r in self.rules if r.times > 0 and re.search(r.pattern, line)), None)
            if rule is not None:
                rule.times -= 1
        if rule is None:
            return None
        if rule.then is not None:
            rule.then()
        if rule.done is not None:
            calls.append(rule.done)
        return rule.what

    @staticmethod
    def _end(*ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
