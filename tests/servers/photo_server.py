"""A web server of real photos and of every kind of bad answer, on all of 127.0.0.0/8: many hosts in one.

Prints its port.

The first part of the path says what becomes of a request, the rest which photo it is: ``/photo/17``, ``/404/3``.
``/_seen`` tells, as JSON, how often each path was asked for and how many requests were under way at once.
The hosts of ``RULES`` have rules for downloaders; how often they were asked for is told with the host too.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from curation.tar.samples import read_samples
from curation.tar.scan import IMAGE_SUFFIXES

BOMB = gzip.compress(bytes(200 << 20), 9)  # 200 kB that inflate to 200 MiB
ENDLESS = bytes(1 << 16)
DRIP_S = 0.05

# Host → path → status and body; None: no answer.
RULES: dict[str, dict[str, tuple[int, bytes] | None]] = {
    "127.200.2.1": {"/robots.txt": (200, b"User-agent: *\r\nDisallow: /\r\nAllow: /photo/1\r\n")},
    "127.200.2.2": {"/robots.txt": (503, b"")},
    "127.200.2.3": {
        "/.well-known/tdmrep.json": (200, b'[{"location": "/photo/*", "tdm-reservation": 1}]'),
    },
    "127.200.2.4": {"/robots.txt": None},
}


class Photos:
    def __init__(self, folder: Path, latency_s: float) -> None:
        self.images = [
            data
            for path in sorted(folder.glob("*.tar"))
            for sample in read_samples(path, IMAGE_SUFFIXES)
            for data in sample.members.values()
        ]
        self.latency_s = latency_s
        self.seen: Counter[str] = Counter()
        self.active = self.most = 0

    def image(self, path: str) -> bytes:
        number = path.rpartition("/")[2].partition(".")[0]
        return self.images[(int(number) if number.isdecimal() else 0) % len(self.images)]


class Connection(asyncio.Protocol):
    def __init__(self, photos: Photos) -> None:
        self.photos = photos
        self.loop = asyncio.get_running_loop()
        self.buffer = b""
        self.busy = self.is_head = False
        self.host = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.WriteTransport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            method, path = head.decode("latin-1").split(" ", 2)[:2]
            self.is_head = method == "HEAD"
            self.host = head.decode("latin-1").lower().partition("host: ")[2].partition(":")[0]
            if path != "/_seen":
                self.photos.seen[path] += 1
                if path in ("/robots.txt", "/.well-known/tdmrep.json") or self.is_head:
                    self.photos.seen[f"{'HEAD ' if self.is_head else ''}{self.host}{path}"] += 1
                self.begin()
            if self.photos.latency_s and path != "/_seen":
                self.loop.call_later(self.photos.latency_s, self.answer, path)
            else:
                self.answer(path)

    def begin(self) -> None:
        self.busy = True
        self.photos.active += 1
        self.photos.most = max(self.photos.most, self.photos.active)

    def end(self) -> None:
        if self.busy:
            self.busy = False
            self.photos.active -= 1

    def answer(self, path: str) -> None:
        kind = path.split("/")[1]
        if path in RULES.get(self.host, {}):
            if (found := RULES[self.host][path]) is not None:
                self.send(*found)
            return
        getattr(self, f"do_{kind.lstrip('_').replace('-', '_')}", self.do_missing)(path)

    def send(self, status: int, body: bytes, *headers: str, length: int | None = None) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body) if length is None else length}", *headers]
        self.transport.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (b"" if self.is_head else body))
        self.end()

    def first_time(self, path: str) -> bool:
        return self.photos.seen[path] == 1

    # ---- the kinds

    def do_photo(self, path: str) -> None:
        self.send(200, self.photos.image(path), "Content-Type: image/jpeg")

    def do_missing(self, path: str) -> None:
        self.send(404, b"<html>not found</html>")

    def do_busy(self, path: str) -> None:
        """429 the first time, and the photo for who waits."""
        if self.first_time(path):
            self.send(429, b"", "Retry-After: 1")
        else:
            self.do_photo(path)

    def do_closed(self, path: str) -> None:
        self.send(503, b"", "Retry-After: 86400")

    def do_broken(self, path: str) -> None:
        """500 the first time."""
        if self.first_time(path):
            self.send(500, b"")
        else:
            self.do_photo(path)

    def do_healed(self, path: str) -> None:
        """404 the first time, as a site that comes back."""
        if self.first_time(path):
            self.send(404, b"")
        else:
            self.do_photo(path)

    def do_slow(self, path: str) -> None:
        """Never answers."""

    def do_drip(self, path: str) -> None:
        """A byte now and then, for ever."""
        self.transport.write(b"HTTP/1.1 200 X\r\nContent-Length: 100000\r\n\r\n")
        self.drip(b"\xff")

    def do_endless(self, path: str) -> None:
        self.transport.write(b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n")
        self.drip(ENDLESS, 0.0)

    def drip(self, data: bytes, pause_s: float = DRIP_S) -> None:
        if not self.transport.is_closing():
            if self.transport.get_write_buffer_size() < 1 << 20:
                self.transport.write(data)
            else:
                pause_s = DRIP_S
            self.loop.call_later(pause_s, self.drip, data, pause_s)

    def do_large(self, path: str) -> None:
        """Says how much it is, and it is too much."""
        self.send(200, b"x", length=1 << 40)

    def do_cut(self, path: str) -> None:
        """Breaks off in the middle."""
        image = self.photos.image(path)
        self.send(200, image[: len(image) // 2], length=len(image))
        self.transport.close()

    def do_torn(self, path: str) -> None:
        """Half a photo that the server takes for a whole one."""
        image = self.photos.image(path)
        self.send(200, image[: len(image) // 2])

    def do_html(self, path: str) -> None:
        self.send(200, b"<html><body>Please log in</body></html>", "Content-Type: image/jpeg")

    def do_empty(self, path: str) -> None:
        self.send(200, b"")

    def do_loop(self, path: str) -> None:
        self.send(302, b"", f"Location: /pool/{path.rpartition('/')[2]}")

    def do_pool(self, path: str) -> None:
        self.send(302, b"", f"Location: /loop/{path.rpartition('/')[2]}")

    def do_chain(self, path: str) -> None:
        """Redirects further and further."""
        self.send(301, b"", f"Location: {path}x")

    def do_moved(self, path: str) -> None:
        self.send(301, b"", f"Location: /photo/{path.rpartition('/')[2]}")

    def do_inside(self, path: str) -> None:
        """Redirects to the address at which clouds keep their credentials."""
        self.send(302, b"", "Location: http://169.254.169.254/latest/meta-data/")

    def do_file(self, path: str) -> None:
        self.send(302, b"", "Location: file:///etc/passwd")

    def do_bomb(self, path: str) -> None:
        self.send(200, BOMB, "Content-Encoding: gzip")

    def do_zipped(self, path: str) -> None:
        """Compresses though nobody asked for it."""
        self.send(200, gzip.compress(self.photos.image(path)), "Content-Encoding: gzip")

    def do_noai(self, path: str) -> None:
        self.send(200, self.photos.image(path), "X-Robots-Tag: noarchive, NoAI")

    def do_reserved(self, path: str) -> None:
        self.send(200, self.photos.image(path), "TDM-Reservation: 1")

    def do_otherbot(self, path: str) -> None:
        """Forbids it to another."""
        self.send(200, self.photos.image(path), "X-Robots-Tag: otherbot: noai, noindex")

    def do_table(self, path: str) -> None:
        """A table of three photos."""
        port = self.transport.get_extra_info("sockname")[1]
        urls = "".join(f"http://127.0.0.1:{port}/photo/{number}\n" for number in range(3))
        self.send(200, f"url\n{urls}".encode(), "Content-Type: text/csv", "ETag: one")

    def do_seen(self, path: str) -> None:
        told = {"seen": self.photos.seen, "most": self.photos.most}
        self.send(200, json.dumps(told).encode(), "Content-Type: application/json")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="shards whose photos are served")
    parser.add_argument("--latency_s", type=float, default=0.0)
    flags = parser.parse_args()
    photos = Photos(flags.folder, flags.latency_s)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(photos), "0.0.0.0", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
