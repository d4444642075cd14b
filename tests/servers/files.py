"""A web server of files, in the test's process, that goes wrong in the ways that web servers do."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """A file and how it is served.

    cut_at: an answer ends, its connection with it, when so many bytes of it were sent; ``cuts`` times, None: always.
    next_cuts: likewise, of the next answers, one after the other.
    refusals: status codes that the first requests get.  etags: of one request after the other, the last one for all
    that follow.  stall_at: from that byte on nothing more comes, and the connection stays.
    """

    data: bytes
    ranges: bool = True
    cut_at: int | None = None
    cuts: int | None = None
    next_cuts: list[int] = field(default_factory=list)
    refusals: list[int] = field(default_factory=list)
    etags: list[str] = field(default_factory=lambda: ['"1"'])
    length: bool = True
    longer_by: int = 0
    pause_s: float = 0.0
    stall_at: int | None = None
    head: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)


class FileServer:
    def __init__(self, port: int) -> None:
        self.files: dict[str, Served] = {}
        self.url = f"http://127.0.0.1:{port}"

    def add(self, name: str, data: bytes, **how: Any) -> str:
        self.files[f"/{name}"] = Served(data, **how)
        return f"{self.url}/{name}"

    def asked(self, name: str) -> list[tuple[str, str | None]]:
        return self.files[f"/{name}"].asked


@contextlib.contextmanager
def file_server() -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            served = files.files.get(self.path.partition("?")[0])
            asked = self.headers.get("Range")
            if served is None:
                self._refuse(404)
                return
            served.asked.append((self.command, asked))
            if served.refusals:
                self._refuse(served.refusals.pop(0))
                return
            if not body and not served.head:
                self._refuse(403)
                return
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "") if served.ranges else None
            begin = int(match[1]) if match else 0
            end = min(int(match[2]) + 1, len(served.data)) if match and match[2] else len(served.data)
            if match and begin >= len(served.data):
                self._refuse(416)
                return
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(served.data)}")
            if served.length:
                self.send_header("Content-Length", str(end - begin + served.longer_by))
            else:
                self.close_connection = True
            if served.etags:
                self.send_header("ETag", served.etags.pop(0) if len(served.etags) > 1 else served.etags[0])
            self.end_headers()
            if body:
                self._send(served, served.data[begin:end])

        def _send(self, served: Served, data: bytes) -> None:
            cut = served.cut_at is not None and (served.cuts is None or served.cuts > 0) and served.cut_at < len(data)
            if served.next_cuts:
                cut, data = True, data[: served.next_cuts.pop(0)]
            elif cut:
                data = data[: served.cut_at]
                if served.cuts is not None:
                    served.cuts -= 1
            with contextlib.suppress(ConnectionError):
                if served.stall_at is not None:
                    self.wfile.write(data[: served.stall_at])
                    over.wait()
                for at in range(0, len(data), 1 << 16):
                    time.sleep(served.pause_s)
                    self.wfile.write(data[at : at + (1 << 16)])
            if cut or served.longer_by:
                self.close_connection = True

        def _refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    over = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    files = FileServer(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        over.set()
        server.shutdown()
        server.server_close()
