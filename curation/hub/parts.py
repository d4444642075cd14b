"""What an output folder has for the hub: the files that ``done`` receipts name, each under a name of its shard's."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
import xxhash

from curation.errors import InfrastructureError
from curation.hub.repository import Addition
from curation.run.ledger import done_receipts
from curation.storage.files import storage_error

DATA_FOLDER = "data"  # where the hub looks for tables
_PARQUET_FOLDER = "parquet"
_FORBIDDEN = {".git", ".cache", ".huggingface"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_MAX_REGULAR_BYTES = 64 << 20  # what is larger the hub keeps as a large file, for certain


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a shard.  path, source: in the repository, in the folder.

    digest: xxh3-128, None where readers may not insist on it.
    """

    path: str
    source: str
    file: Path
    size: int
    digest: str | None
    shard_id: str


@dataclass(slots=True)
class Collection:
    """The parts of a stage, and what its receipts count.

    elsewhere: outputs in other folders than the stage's own, which are not part of it.  unnamed: outputs whose names no
    repository can have.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    shards: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    epochs: set[int] = field(default_factory=set)
    versions: set[int] = field(default_factory=set)
    elsewhere: int = 0
    unnamed: int = 0

    def matching(self, only: Sequence[str]) -> list[str]:
        """The parts, by their paths in the repository, whose paths in the folder match a pattern; without any, all."""
        return sorted(
            path
            for path, part in self.parts.items()
            if not only or any(fnmatch.fnmatchcase(part.source, pattern) for pattern in only)
        )

    def within(self, paths: Container[str]) -> Collection:
        """The same with those parts only."""
        return replace(self, parts={path: part for path, part in self.parts.items() if path in paths})


def collect(home: Path, stage: str) -> Collection:
    """Read all receipts.  What lies in folders whose names begin with ``_`` is no part of the output."""
    found = Collection()
    for receipt in done_receipts(home, stage):
        if receipt.get("status") != "done":
            continue
        found.shards += 1
        found.epochs.add(int(receipt.get("epoch", 0)))
        found.versions.add(int(receipt.get("version", 0)))
        _count(found.counts, receipt.get("counts") or {})
        for output in receipt.get("outputs", []):
            _add(found, home, str(receipt.get("shard")), output)
    return found


def _count(totals: Counter[str], counts: dict[str, Any]) -> None:
    for name in ("in", "kept"):
        totals[name] += int(counts.get(name, 0))
    for name in ("dropped", "failed"):
        totals[name] += sum(map(int, (counts.get(name) or {}).values()))


def _add(found: Collection, home: Path, shard_id: str, output: dict[str, Any]) -> None:
    path = str(output["path"])
    if path.startswith("/") or ".." in path.split("/") or "://" in path:
        found.elsewhere += 1
    elif path.startswith("_"):
        return
    elif not _can_be_named(path):
        found.unnamed += 1
    else:
        name = path_in_repository(path)
        digest = str(output["digest"]) if output.get("checked", True) else None
        found.parts[name] = Part(name, path, home / path, int(output["size"]), digest, shard_id)


def path_in_repository(path: str) -> str:
    """Tables that are the stage's main output, and files that lie in the folder itself, go to ``data/``; what lies in a
    folder of its own keeps it."""
    pure = PurePosixPath(path)
    if len(pure.parts) == 1 or (pure.parts[0] == _PARQUET_FOLDER and pure.suffix == ".parquet"):
        return f"{DATA_FOLDER}/{pure.name}"
    return path


def _can_be_named(path: str) -> bool:
    words = path.split("/")
    good = all(word and word.isprintable() and "\\" not in word and word not in _FORBIDDEN for word in words)
    return good and len(path.encode("utf-8", "replace")) <= 255 * len(words) and path.isprintable()


class ContentLog:
    """SHA-256 and git's name of contents that were read once, so that a push reads only what is new.

    An append-only file beside the receipts: a line per content, found by the receipt's size and digest.  Any number of
    processes append to it.  Only a saving: a line that is damaged or lost costs reading that file again, and one that
    says something wrong costs comparing in vain.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[int, str], tuple[str, str]] = {}
        self._new: list[bytes] = []
        self._read()

    def addition(self, part: Part) -> Addition | None:
        """The part to be added, None where the file is not (or no longer) what the receipt says."""
        known = self._known.get((part.size, part.digest or ""))
        if known is None:
            try:
                known = _read_contents(part)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise storage_error(part.file, error) from error
            if known is None:
                return None
            if part.digest is not None:
                self._known[part.size, part.digest] = known
                self._new.append(orjson.dumps([part.size, part.digest, *known]) + b"\n")
        elif not is_file_of_size(part.file, part.size):
            return None
        return Addition(part.path, part.file, part.size, git_oid=known[1], sha256=known[0])

    def save(self) -> None:
        """Append what was read since.  Durability is not needed."""
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:
                file.write(b"\n" + b"".join(self._new))  # begins a line, whatever a dying writer left
        except OSError as error:
            raise storage_error(self._path, error) from error
        self._new.clear()

    def _read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                for line in file:
                    self._learn(line)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InfrastructureError(f"{self._path}: cannot be read ({error.strerror})") from error

    def _learn(self, line: bytes) -> None:
        try:
            size, digest, sha256, oid = orjson.loads(line)
        except (orjson.JSONDecodeError, TypeError, ValueError):
            return
        words = (digest, sha256, oid)
        if isinstance(size, int) and all(isinstance(word, str) for word in words) and _SHA256.fullmatch(sha256):
            self._known[size, digest] = (sha256, oid)


def is_file_of_size(path: Path, size: int) -> bool:
    """Whether it is a regular file (no link to somewhere else) of that size."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _read_contents(part: Part) -> tuple[str, str] | None:
    """(SHA-256, git's name) of a file that is what its receipt says, else None.

    git's name of a large content is never asked for, and left empty.
    """
    if not is_file_of_size(part.file, part.size):
        return None
    sha256, digest = hashlib.sha256(), xxhash.xxh3_128()
    git = hashlib.sha1(b"blob %d\0" % part.size, usedforsecurity=False)
    count = 0
    for block in _blocks(part.file):
        count += len(block)
        sha256.update(block)
        digest.update(block)
        if part.size <= _MAX_REGULAR_BYTES:
            git.update(block)
    if count != part.size or (part.digest is not None and digest.hexdigest() != part.digest):
        return None
    return sha256.hexdigest(), git.hexdigest() if part.size <= _MAX_REGULAR_BYTES else ""


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def addition_of(path: str, data: bytes) -> Addition:
    """Bytes to be added under that path."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Addition(path, data, len(data), git_oid=git, sha256=hashlib.sha256(data).hexdigest())
