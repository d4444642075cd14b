"""A web server that sends exactly the bytes that a test gives it for a path, whatever is wrong with them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

Answer = bytes | Callable[[bytes], bytes]  # or what makes it of the request's head


class RawAnswers:
    """``asked`` has the paths of all requests in their order."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self._answers = dict(answers)
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._socket.getsockname()[1])
        self.base = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._socket.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := connection.recv(65536)):
                    return
                head += piece
            path = head.split(b" ")[1].decode("latin-1")
            self.asked.append(path)
            answer = self._answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.sendall(answer if isinstance(answer, bytes) else answer(head))


def reply(body: bytes, *headers: bytes, status: bytes = b"HTTP/1.1 200 OK", length: bool = True) -> bytes:
    """An answer that ends with the connection."""
    sized = [b"Content-Length: %d" % len(body)] if length else []
    return b"\r\n".join((status, *sized, b"Connection: close", *headers, b"", body))


def moved(location: bytes, *headers: bytes) -> bytes:
    return reply(b"", b"Location: " + location, *headers, status=b"HTTP/1.1 302 Found")


@contextlib.contextmanager
def raw_answers(answers: Mapping[str, Answer]) -> Iterator[RawAnswers]:
    server = RawAnswers(answers)
    try:
        yield server
    finally:
        server.close()
