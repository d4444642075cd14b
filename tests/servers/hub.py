"""A small server of the hub's routes: what ``huggingface_hub`` asks to list, to resolve and to download; and of
datasets (``hub_datasets``) what it asks to create and to commit.

Models are folders.  Content goes out whole or, where a Range is asked for, from there; it can be made to break off, to
arrive damaged, and to be refused without a token.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.hub_datasets import DatasetRoutes, Datasets

TOKEN = "hf_test"
_LARGE = ".safetensors"  # kept by the hub as LFS files, of which it tells the SHA-256


@dataclass
class Model:
    folder: Path
    gated: bool = False
    refuses: tuple[int, str] | None = None  # status and X-Error-Code of every request for a file, whoever asks
    commit: str = "c" * 40
    breaks_off: dict[str, int] = field(default_factory=dict)  # path → bytes after which the connection ends, once
    damaged: set[str] = field(default_factory=set)  # paths whose content arrives with other bytes, once

    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}


@dataclass
class Hub:
    url: str
    models: dict[str, Model]
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    datasets: Datasets = field(default_factory=lambda: Datasets(TOKEN))


@contextmanager
def serve(models: dict[str, Model] | None = None) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", models or {})
    server.hub, server.datasets = hub, hub.datasets  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(DatasetRoutes):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self.take():
            self._answer(body=True)

    def do_POST(self) -> None:
        if not self.take():
            self._answer(body=True)

    do_PUT = do_POST

    def do_HEAD(self) -> None:
        if not self.take():
            self._answer(body=False)

    def log_message(self, *arguments: Any) -> None: ...

    def _answer(self, *, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        parts = path.removeprefix("api/models/").split("/")
        model = hub.models.get("/".join(parts[:2]))
        if model is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif path.startswith("api/models/"):
            self._describe("/".join(parts[:2]), model, parts[2:])
        elif parts[2:3] == ["resolve"] and parts[3] in ("main", model.commit):
            self._file(model, "/".join(parts[4:]), body=body)
        else:
            self._refuse(404, "RevisionNotFound", "Revision not found")

    def _describe(self, name: str, model: Model, rest: list[str]) -> None:
        if len(rest) > 1 and rest[1] not in ("main", model.commit):
            return self._refuse(404, "RevisionNotFound", "Revision not found")
        entries = []
        for path, file in model.files().items():
            data = file.read_bytes()
            entry: dict[str, Any] = {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(_LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": digest, "oid": digest, "pointerSize": 130}
            entries.append((path, entry))
        listed = [{"type": "file", "path": path, **entry} for path, entry in entries]
        if rest[:1] == ["tree"]:
            return self._json(listed)
        if rest[:1] == ["paths-info"]:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            return self._json([entry for entry in listed if entry["path"] in asked])
        siblings = [{"rfilename": path, "blobId": entry["oid"], **entry} for path, entry in entries]
        gated = "auto" if model.gated else False
        return self._json(
            {"id": name, "sha": model.commit, "gated": gated, "private": False, "siblings": siblings, "tags": []}
        )

    def _file(self, model: Model, path: str, *, body: bool) -> None:
        if model.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "GatedRepo", "Access to model is restricted")
        if model.refuses is not None:
            status, code = model.refuses
            return self._refuse(status, code, "Invalid credentials in Authorization header")
        file = model.files().get(path)
        if file is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        large = path.endswith(_LARGE)
        etag = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        start, end = 0, len(data)
        if (asked := self.headers.get("Range", "")).startswith("bytes=") and body:
            first, _, last = asked[6:].partition("-")
            start, end = int(first or 0), min(int(last) + 1 if last else end, end)
        part = (start, end) != (0, len(data))
        self.send_response(206 if part else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", model.commit)
        if large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if not body:
            return None
        data = data[start:end]
        if path in model.damaged and body:
            model.damaged.discard(path)
            data = data[:-1] + bytes([data[-1] ^ 0xFF])
        if (stop := model.breaks_off.pop(path, None)) is not None:
            self.wfile.write(data[:stop])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(data)
        return None

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
