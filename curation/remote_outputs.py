"""Outputs in buckets: where they go, how they are written without a copy on a disk, and whether they are there."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from curation.errors import InfrastructureError, UsageError
from curation.outputs import Output, Published
from curation.remote import RemoteFile, Source, without_secrets
from curation.shards import Shard
from curation.uploads import PART_BYTES, list_objects, object_at

WRITABLE: Final = ("s3", "gs")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A place in a bucket that shards are written to; ``folder / name`` is a file there."""

    url: str

    def __truediv__(self, name: str) -> RemoteFile:
        return RemoteFile(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        """Of the objects right below it."""
        return list(list_objects(self.url))

    def holds(self, shards: Sequence[Shard]) -> bool:
        """Whether one of the shards is read from here."""
        return any(shard.path == self / shard.path.name for shard in shards)


Folder = Path | RemoteFolder
"""Where outputs go."""


def remote_folder(url: str) -> RemoteFolder:
    """What ``--publish_to`` names.  UsageError for what shards cannot be written to."""
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    shown = without_secrets(url)
    if mark and scheme == "hf":
        raise UsageError(
            f"--publish_to {shown}: the hub takes whole commits, not single shards; write to --output and push from "
            "there with python -m curation publish"
        )
    if not mark or scheme not in WRITABLE:
        raise UsageError(f"--publish_to {shown}: shards are written to {' and '.join(f'{s}://' for s in WRITABLE)}")
    bucket, _, folder = rest.partition("/")
    folder = folder.strip("/")
    words = folder.split("/") if folder else []
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"--publish_to {shown}: give a bucket and a folder, such as {scheme}://bucket/folder")
    if any(word in ("", ".", "..") or not word.isprintable() or re.search(r"[?*\[\]{}#]", word) for word in words):
        raise UsageError(f"--publish_to {shown}: a folder's name has no ? * [ ] {{ }} #, no empty part and no ..")
    return RemoteFolder("/".join((f"{scheme}://{bucket}", *words)))


def place_of(root: Path, path: str) -> Source:
    """Where an output lies that a receipt names; root: the stage's output folder."""
    return RemoteFile(path) if "://" in path else root / path  # a normalised path has no two slashes in a row


class RemoteOutput(Output):
    """An object that is uploaded in parts while it is written; it appears when the commit completes the upload.

    Memory: a part that is being filled, and those that are under way.
    """

    def __init__(self, final: RemoteFile, token: str) -> None:
        super().__init__()
        self.final = final
        self._token = token
        self._object = object_at(final)
        self._upload = self._object.begin(token)
        self._part = bytearray()
        self._parts: list[Mapping[str, str]] = []
        self._under_way: deque[Future[dict[str, str]]] = deque()
        self._begun = 0
        self._senders = ThreadPoolExecutor(self._object.parallel, "upload")
        self._closed = False

    def close(self) -> None:
        if self._closed:
            return
        self._drain()
        if self._part or not self._begun:
            self._send()
        while self._under_way:
            self._parts.append(self._under_way.popleft().result())
        self._object.end(self._upload)
        self._senders.shutdown()
        self._closed = True

    def discard(self) -> None:
        self._senders.shutdown(cancel_futures=True)  # a part that came after the end of the upload might stay
        self._part = bytearray()
        with contextlib.suppress(InfrastructureError):  # whoever does the shard next finds it
            self._object.abort(self._upload)

    def published(self, root: Path, *, checked: bool) -> Published:
        upload = {"id": self._upload, "token": self._token, "parts": self._parts}
        return Published(self.final.target, "", self.size, self.digest, checked, upload)

    def _put(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        for piece in pieces:
            rest = memoryview(piece)
            self.size += len(rest)
            while len(self._part) + len(rest) >= PART_BYTES:
                room = PART_BYTES - len(self._part)
                self._part += rest[:room]
                rest = rest[room:]
                self._send()
            self._part += rest

    def _send(self) -> None:
        if len(self._under_way) >= self._object.parallel:
            self._parts.append(self._under_way.popleft().result())
        part, self._part = self._part, bytearray()
        self._begun += 1
        self._under_way.append(self._senders.submit(self._object.put, self._upload, self._begun, part))


class Presence:
    """Whether the objects that receipts name are there: by one listing of their folder, and by asking for each that it
    does not show as it should be."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, int]] = {}  # folder → name → bytes

    def holds(self, output: Mapping[str, Any], *, fresh: bool) -> bool:
        """Whether what a receipt names is there.  fresh: as it is now."""
        file = RemoteFile(output["path"])
        if not fresh and self._listed(file) == output["size"]:
            return True
        found = object_at(file).look()
        return found is not None and found.is_of(output)

    def shows(self, file: RemoteFile) -> bool:
        """Whether anything was there when its folder was listed."""
        return self._listed(file) is not None

    def _listed(self, file: RemoteFile) -> int | None:
        folder, _, name = file.target.rpartition("/")
        if folder not in self._sizes:
            self._sizes[folder] = list_objects(folder)
        return self._sizes[folder].get(name)
