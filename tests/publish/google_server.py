"""A real server of Google Cloud Storage's JSON API on this machine, behind a relay that breaks what it is told to.

gcp-storage-emulator keeps objects, sessions of uploads in parts, CRC32C and metadata.  What it lacks is added here as
the service has it: conditions on generations, generations that grow, pages of listings, parts that arrive twice,
sessions that are answered once more after their end, and the refusal of a wrong checksum at the end of an upload.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.publish.servers import BUCKET
from tests.servers.relay import Relay


class _Answer(Exception):
    """Another answer than the emulator's."""

    def __init__(self, status: int, content: Any = None) -> None:
        super().__init__(status)
        self.status, self.content = status, content


@dataclass
class GoogleServer:
    """Whoever reads STORAGE_EMULATOR_HOST asks through the relay.

    Attributes:
        conditional: Whether it keeps conditions; ``at_the_end`` whether also of uploads in parts.
        page: Objects in one page of a listing.
        refuses: The status of every answer, if it is not 0.
        damages: Whether it flips a bit of each part that arrives; ``compares``: whether it knows by the checksum.
        forgets: Of how many parts it keeps only the first half; ``drops``: of how many nothing.
    """

    storage: Any
    relay: Relay
    conditional: bool = True
    at_the_end: bool = True
    page: int = 1000
    refuses: int = 0
    damages: bool = False
    compares: bool = True
    forgets: int = 0
    drops: int = 0
    ended: dict[str, Any] = field(default_factory=dict)  # uploads in parts, and the objects that they became
    wanted: dict[str, int | None] = field(default_factory=dict)  # uploads in parts, and their conditions
    lock: threading.Lock = field(default_factory=threading.Lock)

    def objects(self) -> dict[str, bytes]:
        with self.lock:
            return {name: self.storage.get_file(BUCKET, name) for name in self.storage.objects.get(BUCKET, {})}

    def described(self, name: str) -> dict[str, Any]:
        return dict(self.storage.objects[BUCKET][name])

    def put(self, name: str, data: bytes) -> None:
        """Somebody else's object, without a stamp."""
        from gcp_storage_emulator.handlers import objects

        with self.lock:
            made = objects._make_object_resource("", BUCKET, name, "text/plain", str(len(data)))
            self.storage.create_file(BUCKET, name, data, objects._checksums(data, made))

    def remove(self, name: str) -> None:
        with self.lock:
            self.storage.delete_file(BUCKET, name)

    def uploads(self) -> list[str]:
        """The names of the uploads in parts that were begun and have not ended."""
        return [str(made["name"]) for made in self.storage.resumable.values()]

    def asked(self, method: str) -> list[str]:
        return [line for line in self.relay.asked if line.startswith(method)]

    def empty(self) -> None:
        self.relay.reset()
        self.conditional = self.at_the_end = self.compares = True
        self.page, self.refuses, self.damages, self.forgets, self.drops = 1000, 0, False, 0, 0
        with self.lock:
            self.storage.wipe(keep_buckets=True)
            self.ended.clear()
            self.wanted.clear()


@contextlib.contextmanager
def serve_google() -> Iterator[GoogleServer]:
    """A server with an empty bucket ``out``; the environment names it during the block."""
    from gcp_storage_emulator.handlers import buckets

    with contextlib.ExitStack() as stack:
        logging.getLogger("gcp_storage_emulator.server").setLevel(logging.CRITICAL)
        storage = _storage()
        bucket = buckets._make_bucket_resource(BUCKET)
        storage.create_bucket(BUCKET, {**bucket, "softDeletePolicy": {"retentionDurationSeconds": "0"}})
        http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_handler(), storage))
        http.daemon_threads = True
        stack.callback(http.server_close)
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        stack.callback(http.shutdown)
        relay = Relay(http.server_address[1])
        stack.callback(relay.close)
        storage.server = server = GoogleServer(storage, relay)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{relay.port}")
        yield server


def _storage() -> Any:
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.storage import Storage

    class Kept(Storage):
        server: GoogleServer
        condition: int | None = None  # of the request that is served now
        checksum = ""

        def __init__(self) -> None:
            super().__init__(use_memory_fs=True)
            self._generations = count(1_700_000_000_000_000)

        def _write_config_to_file(self) -> None:
            """Everything is in memory."""

        def _insist(self, bucket: str, name: str, wanted: int | None) -> None:
            there = self.objects.get(bucket, {}).get(name)
            if self.server.conditional and wanted is not None and int(there["generation"] if there else 0) != wanted:
                raise _Answer(412, "At least one of the pre-conditions you specified did not hold.")

        def create_file(self, bucket: str, name: str, content: bytes, made: Any, file_id: str | None = None) -> None:
            if file_id is None:
                self._insist(bucket, name, self.condition)
            elif self.server.at_the_end:
                self._insist(bucket, name, self.server.wanted.get(file_id))
            if self.checksum and self.server.compares and f"crc32c={made['crc32c']}" not in self.checksum:
                raise _Answer(400, "Provided CRC32C doesn't match calculated CRC32C.")
            made["generation"] = str(next(self._generations))
            super().create_file(bucket, name, content, made, file_id)
            if file_id is not None:
                self.server.ended[file_id] = made

        def create_resumable_upload(self, bucket: str, name: str, made: Any) -> str:
            begun = str(super().create_resumable_upload(bucket, name, made))
            self.server.wanted[begun] = self.condition
            return begun

        def add_to_resumable_upload(
            self, file_id: str, content: bytes, total_size: int | None = None, expected_start: int | None = None
        ) -> bytes | None:
            there = int(self.get_resumable_byte_count(file_id))
            if expected_start is not None and expected_start < there:  # it has arrived before
                content, expected_start = content[there - expected_start :], there
            if self.server.drops > 0:
                self.server.drops -= 1
                raise _Answer(308)
            if self.server.forgets > 0:
                self.server.forgets -= 1
                content, total_size = content[: len(content) // 2], None
            whole = super().add_to_resumable_upload(file_id, content, total_size, expected_start)
            return None if whole is None else bytes(whole)

        def delete_file(self, bucket: str, name: str) -> None:
            if name not in self.objects.get(bucket, {}):
                raise NotFound
            self._insist(bucket, name, self.condition)
            super().delete_file(bucket, name)

    return Kept()


def _handler() -> Any:
    from gcp_storage_emulator.server import RequestHandler, Router

    class Handler(RequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize, disable_nagle_algorithm = -1, True  # else each answer waits 40 ms for an acknowledgement

        def _serve(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server: GoogleServer = self.storage.server
            if server.damages and body and "Content-Range" in self.headers:
                body = body[:-1] + bytes([body[-1] ^ 1])
            connection, self.rfile = self.rfile, io.BytesIO(body)
            try:
                with server.lock:
                    self._answer_otherwise(server, method)
                    Router(self).handle(method)
            except _Answer as answer:
                self._answer(answer)
            finally:
                self.rfile = connection

        def _answer_otherwise(self, server: GoogleServer, method: str) -> None:
            """Raise _Answer where the emulator's would not be the service's."""
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if server.refuses:
                raise _Answer(server.refuses, "secret-in-words does not have storage access")
            condition = query.get("ifGenerationMatch")
            self.storage.condition = None if condition is None else int(condition)
            self.storage.checksum = self.headers.get("X-Goog-Hash", "")
            if (done := server.ended.get(query.get("upload_id", ""))) is not None:
                raise _Answer(200, done)
            words = url.path.split("/")
            if method == "GET" and words[-1] == "o" and words[-2] in self.storage.buckets:
                raise _Answer(200, self._listed(server, words[-2], query))
            if method == "GET" and self.headers.get("Range") and len(words) > 3:
                held = self.storage.objects.get(words[-3], {}).get(unquote(words[-1]))
                if held is not None and int(held["size"]) == 0:
                    raise _Answer(416, "The requested range cannot be satisfied.")

        def _listed(self, server: GoogleServer, bucket: str, query: dict[str, str]) -> dict[str, Any]:
            found, folders = self.storage.get_file_list(bucket, query.get("prefix"), query.get("delimiter"))
            start, size = int(query.get("pageToken", 0)), min(server.page, int(query.get("maxResults", 1000)))
            more: dict[str, Any] = {"nextPageToken": str(start + size)} if start + size < len(found) else {}
            if folders and not start:
                more["prefixes"] = folders
            return {"kind": "storage#objects", "items": found[start : start + size], **more}

        def _answer(self, answer: _Answer) -> None:
            said = answer.content
            wrong = {"error": {"code": answer.status, "message": said, "errors": []}}
            data = json.dumps(said if answer.status == 200 else wrong).encode()
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def do_PUT(self) -> None:
            self._serve("PUT")

        def do_DELETE(self) -> None:
            self._serve("DELETE")

        def log_message(self, *words: object) -> None:
            """Nothing."""

    return Handler
