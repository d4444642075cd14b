"""The parts of an output folder for the hub: the files that ``done`` receipts name."""

from __future__ import annotations

import contextlib
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
from curation.publish.repository import Addition
from curation.run.ledger import done_receipts
from curation.storage.files import make_folder, storage_errors

DATA_FOLDER = "data"  # where the hub looks for tables
_PARQUET_FOLDER = "parquet"
_FORBIDDEN = {".git", ".cache", ".huggingface"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_MAX_REGULAR_BYTES = 64 << 20  # the hub keeps everything larger as a large file


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a shard.

    Attributes:
        path: In the repository.
        source: In the folder.
        file: On this machine.
        size: In bytes.
        digest: xxh3-128, hex; None where readers may not rely on it.
        shard_id: The shard that it is of.
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

    Attributes:
        parts: By their paths in the repository.
        shards: How many are done.
        counts: Samples in, kept, dropped and failed.
        epochs, versions: That the receipts name.
        elsewhere: Outputs outside of the stage's own folder.
        unnamed: Outputs whose names no repository can have.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    shards: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    epochs: set[int] = field(default_factory=set)
    versions: set[int] = field(default_factory=set)
    elsewhere: int = 0
    unnamed: int = 0

    def matching(self, only: Sequence[str]) -> list[str]:
        """The repository paths of the parts whose paths in the folder match a pattern; without patterns, of all."""
        return sorted(
            path
            for path, part in self.parts.items()
            if not only or any(fnmatch.fnmatchcase(part.source, pattern) for pattern in only)
        )

    def within(self, paths: Container[str]) -> Collection:
        """The same collection with only those parts."""
        return replace(self, parts={path: part for path, part in self.parts.items() if path in paths})


def collect(home: Path, stage: str) -> Collection:
    """Read all receipts of a stage.  Files in folders whose names begin with ``_`` are not parts."""
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
    """Where an output goes: parquet tables and files right in the folder to ``data/``, others to the same path."""
    pure = PurePosixPath(path)
    if len(pure.parts) == 1 or (pure.parts[0] == _PARQUET_FOLDER and pure.suffix == ".parquet"):
        return f"{DATA_FOLDER}/{pure.name}"
    return path


def _can_be_named(path: str) -> bool:
    words = path.split("/")
    good = all(word and word.isprintable() and "\\" not in word and word not in _FORBIDDEN for word in words)
    return good and len(path.encode("utf-8", "replace")) <= 255 * len(words) and path.isprintable()


class ContentLog:
    """SHA-256 and git's name of contents that were read once, so that a push reads only new files.

    It is an append-only file beside the receipts with one line per content, found by the receipt's size and digest.
    Any number of processes append to it.  It only saves work: where a line is lost, one file is read again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[int, str], tuple[str, str]] = {}
        self._new: list[bytes] = []
        self._read()

    def addition(self, part: Part) -> Addition | None:
        """The part to be added, None where the file is not what its receipt says (any more)."""
        known = self._known.get((part.size, part.digest or ""))
        if known is None:
            with storage_errors(part.file), contextlib.suppress(FileNotFoundError):
                known = _read_contents(part)
            if known is None:
                return None
            if part.digest is not None:
                self._known[part.size, part.digest] = known
                self._new.append(orjson.dumps([part.size, part.digest, *known]) + b"\n")
        elif not is_file_of_size(part.file, part.size):
            return None
        return Addition(part.path, part.file, part.size, git_oid=known[1], sha256=known[0])

    def known(self, size: int, digest: str) -> str:
        """The SHA-256 of a content that was read, by the size and the digest of its receipt; "" if it was not."""
        return self._known.get((size, digest), ("", ""))[0]

    def save(self) -> None:
        """Append what was read since the last call.  It need not be durable."""
        if not self._new:
            return
        make_folder(self._path.parent)
        with storage_errors(self._path), open(self._path, "ab", buffering=0) as file:
            file.write(b"\n" + b"".join(self._new))  # begins a new line, even behind a writer that died
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
    """Whether the path is a regular file of that size, and not a link."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _read_contents(part: Part) -> tuple[str, str] | None:
    """SHA-256 and git's name of a file that is what its receipt says, else None.

    git's name is left empty for a large file, because nobody asks for it.
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
    """The addition of these bytes under that path."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Addition(path, data, len(data), git_oid=git, sha256=hashlib.sha256(data).hexdigest())
