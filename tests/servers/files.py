"""A web server of single files: whole or from where a Range says, cut short, damaged, endless, without Ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Files:
    url: str
    contents: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)  # the next answers end after so many bytes, one after another
    ranges: bool = True
    states_length: bool = True
    requests: list[tuple[str, str]] = field(default_factory=list)  # path, Range


@contextmanager
def serve_files(contents: dict[str, bytes]) -> Iterator[Files]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    files = Files(f"http://127.0.0.1:{server.server_port}", contents)
    server.files = files  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        files: Files = self.server.files  # type: ignore[attr-defined]
        asked = self.headers.get("Range", "")
        files.requests.append((self.path, asked))
        data = files.contents.get(self.path.partition("?")[0])
        if data is None:
            return self._head(404, 0)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and files.ranges else 0
        if start and start >= len(data):
            return self._head(416, 0)
        body = data[start:]
        self._head(206 if start else 200, len(body))
        if files.cuts:
            body = body[: files.cuts.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
        return None

    def _head(self, status: int, length: int) -> None:
        files: Files = self.server.files  # type: ignore[attr-defined]
        self.send_response(status)
        if files.states_length or not length:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
