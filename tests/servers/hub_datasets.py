"""The hub's routes for datasets that are written to: create, list, preupload, LFS, commit; and what goes wrong on them.

Regular files are named by git's blob name, large ones by their SHA-256, as the real hub does; a commit on top of
another than the newest is answered 412.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".parquet", ".tar", ".npz", ".jpg", ".png")
USER = "somebody"


@dataclass
class Commit:
    oid: str
    summary: str
    files: dict[str, bytes]
    added: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass
class Dataset:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("initial commit", {".gitattributes": b"*.parquet filter=lfs\n"})

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def commit(self, summary: str, added: dict[str, bytes], deleted: tuple[str, ...] = ()) -> Commit:
        files = dict(self.commits[-1].files) if self.commits else {}
        for path in deleted:
            del files[path]
        self.commits.append(Commit(secrets.token_hex(20), summary, files | added, tuple(added), deleted))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        return self.commits[-1] if revision == "main" else next((c for c in self.commits if c.oid == revision), None)


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose ``METHOD path`` the pattern is found in.

    status: the answer in place of the real one.  cut_after: so many bytes of the body are read, then the connection
    ends.  unheard: all is done, and the connection ends without an answer.  delay_s: before anything.  before: called
    first, as if somebody else had been quicker.
    """

    pattern: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    cut_after: int | None = None
    unheard: bool = False
    delay_s: float = 0.0
    before: Callable[[], None] | None = None


@dataclass
class Datasets:
    """What the server holds, and what was asked of it.  stored: each time that a large file arrived whole."""

    token: str
    repos: dict[str, Dataset] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # METHOD path
    page: int = 1000
    read_only: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.asked)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Cut(Exception):
    pass


class DatasetRoutes(BaseHTTPRequestHandler):
    """Beside what ``hub`` answers; the server has ``datasets``."""

    disable_nagle_algorithm = True

    def take(self) -> bool:
        """Answer a request if it is about datasets; whether it was."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        mine = re.match(r"/(api/(repos|datasets|whoami|validate-yaml)|datasets/|lfs)", path) is not None
        if not mine:
            return False
        held: Datasets = self.server.datasets  # type: ignore[attr-defined]
        line = f"{self.command} {path}"
        with held.lock:
            held.asked.append(line)
            fault = next((f for f in held.faults if f.times > 0 and re.search(f.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        try:
            self._suffer(fault, held, path, parse_qs(url.query))
        except _Cut:
            self.close_connection = True
            self.connection.close()
        return True

    def _suffer(self, fault: Fault | None, held: Datasets, path: str, query: dict[str, list[str]]) -> None:
        fault = fault or Fault("")
        time.sleep(fault.delay_s)
        if fault.before is not None:
            fault.before()
        length = int(self.headers.get("Content-Length") or 0)
        if fault.cut_after is not None:
            self.rfile.read(min(length, fault.cut_after))
            raise _Cut
        body = self._body(length)
        if fault.status:
            return self.reply(fault.status, fault.body, fault.headers)
        with held.lock:
            status, value, headers = self._route(held, path, query, body)
        if fault.unheard:
            raise _Cut
        return self.reply(status, value, headers)

    def _body(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            data = self.rfile.read(length)
            if len(data) < length:
                raise _Cut
            return data
        data = b""
        while size := int(self.rfile.readline() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _route(self, held: Datasets, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        if (found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path)) is not None:  # a store with signed URLs
            assert "Authorization" not in self.headers, "the token goes to the hub alone"
            if hashlib.sha256(body).hexdigest() != found[1]:
                return 400, {"error": "the content has another digest"}, {}
            held.large[found[1]] = body
            held.stored.append(found[1])
            return 200, {}, {}
        allowed = self.headers.get("Authorization") == f"Bearer {held.token}"
        if path == "/api/whoami-v2":
            return (200, {"name": USER}, {}) if allowed else (401, {"error": "Invalid token"}, {})
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if path == "/api/repos/create":
            return self._create(held, json.loads(body)) if allowed else (401, {"error": "Invalid token"}, {})
        found = re.fullmatch(r"/(?:api/)?datasets/([\w.-]+/[\w.-]+?)(?:\.git)?/(\w+)(?:/([^/]+)(?:/(.+))?)?", path)
        repo = held.repos.get(found[1]) if found else None
        if repo is None or found is None or (repo.private and not allowed):
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if self.command == "POST" and (held.read_only or not allowed):
            return 403, {"error": f"you have no write access with {self.headers.get('Authorization')}"}, {}
        if found[2] in ("revision", "tree", "resolve"):
            return self._show(held, found[1], repo, found[2], found[3], found[4] or "", query)
        value = body if found[2] == "commit" else json.loads(body)
        routes = {"preupload": self._preupload, "info": self._batch, "commit": self._commit}
        status, answer, headers = routes[found[2]](held, repo, value)
        if "commitOid" in answer:
            answer["commitUrl"] = f"{self.base}/datasets/{found[1]}/commit/{answer['commitOid']}"
        return status, answer, headers

    def _create(self, held: Datasets, asked: dict[str, Any]) -> Any:
        name = f"{asked['organization'] or USER}/{asked['name']}"
        assert asked["type"] == "dataset"
        url = f"{self.base}/datasets/{name}"
        if name in held.repos:
            return 409, {"error": "You already created this dataset repo", "url": url}, {}
        if held.read_only:
            return 403, {"error": f"no rights in this namespace with {self.headers.get('Authorization')}"}, {}
        held.repos[name] = Dataset(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": url}, {}

    def _show(
        self, held: Datasets, name: str, repo: Dataset, what: str, revision: str, path: str, query: dict[str, list[str]]
    ) -> Any:
        commit = repo.at(revision)
        if commit is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        if what == "revision":
            return 200, {"id": name, "sha": commit.oid, "_id": "1"}, {}
        if what == "resolve":
            data = commit.files.get(path)
            if data is None:
                return 404, {}, {"X-Error-Code": "EntryNotFound"}
            return 200, data, {"ETag": f'"{git_oid(data)}"', "X-Repo-Commit": commit.oid}
        start = int(query.get("cursor", ["0"])[0])
        entries = [self._entry(path, data) for path, data in sorted(commit.files.items())]
        entries = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}, *entries]
        more = {}
        if start + held.page < len(entries):
            link = f"{self.base}/api/datasets/{name}/tree/{revision}?recursive=true&cursor={start + held.page}"
            more = {"Link": f'<{link}>; rel="next"'}
        return 200, entries[start : start + held.page], more

    @staticmethod
    def _entry(path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entry["oid"] = git_oid(b"a pointer")
        return entry

    def _preupload(self, held: Datasets, repo: Dataset, asked: dict[str, Any]) -> Any:
        files = []
        for file in asked["files"]:
            large = file["path"].endswith(LARGE)
            there = repo.files.get(file["path"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_oid(there)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def _batch(self, held: Datasets, repo: Dataset, asked: dict[str, Any]) -> Any:
        assert asked["operation"] == "upload"
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in held.large:
                answer["actions"] = {"upload": {"href": f"{self.base}/lfs/{wanted['oid']}?X-Amz-Signature=s3cr3t"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _commit(self, held: Datasets, repo: Dataset, body: bytes) -> Any:
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repo.commits[-1].oid):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        added: dict[str, bytes] = {}
        deleted: list[str] = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in held.large:
                    return 400, {"error": f"LFS object {value['oid']} was never uploaded"}, {}
                added[value["path"]] = held.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                deleted.append(value["path"])
        made = repo.commit(header["value"]["summary"], added, tuple(deleted))
        return 200, {"commitOid": made.oid}, {}

    def _validate(self, asked: dict[str, Any]) -> Any:
        found = re.match(r"---\n(.*?)\n---\n", asked["content"], re.S)
        metadata = yaml.safe_load(found[1]) if found else {}
        sizes = metadata.get("size_categories", [])
        good = re.fullmatch(r"[a-z0-9.-]+", metadata.get("license", "")) and all(
            re.fullmatch(r"n<1K|\d+[KMBT]<n<\d+[KMBT]|n>1T", size) for size in sizes
        )
        return (200, {"warnings": []}, {}) if good else (400, {"errors": [{"message": '"license" must be one of'}]}, {})

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def reply(self, status: int, value: Any, headers: dict[str, str]) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
