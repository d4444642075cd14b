"""A folder of another filesystem as a store.

A filesystem has no compare-and-replace: it creates a name exclusively, but whoever renames over a file replaces
whatever is there.  So a first write is exclusive, a later one compares and then renames, and ``conditional`` is false.

A file's version is its size and its time, which is set before the file gets its name.  Its stamp is a small file below
``_stamps/``, whose name has the version; so it cannot be taken for the stamp of another content.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from curation.errors import InfrastructureError, UsageError
from curation.jsonio import dump_json
from curation.publish import contents
from curation.publish.contents import Contents
from curation.publish.store import Limits, Moved, Stamp, StoredFile, Upload, ours
from curation.storage.files import fsync_folder, make_folder, make_link, read_record, storage_errors, temporary_name

STAMPS: Final = "_stamps"


class FolderStore:
    """See ``Store``.

    Args:
        root: The folder; the one above it must exist.
    """

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self.conditional = False
        self.guards = True
        self.limits = Limits()
        self._root = root

    def check(self) -> None:
        if not self._root.parent.is_dir():
            raise UsageError(f"{self._root}: the folder above it does not exist; is the filesystem mounted?")
        trial = self._root / f".curation-{secrets.token_hex(8)}.check"
        second = trial.with_name(f"{trial.name}2")
        try:
            self._root.mkdir(exist_ok=True)
            os.listdir(self._root)
            trial.write_bytes(b"curation")
            make_link(trial, second)
        except OSError as error:
            raise UsageError(f"{self._root}: cannot be written: {error.strerror or error}") from None
        finally:
            for path in (trial, second):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def look(self, name: str) -> StoredFile | None:
        """The file, which is read for its checksum."""
        found = self._stat(name)
        if found is None:
            return None
        try:
            checksum = f"xxh3:{contents.checksum_of(self._path(name), 'xxh3')}"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InfrastructureError(f"{self._path(name)}: cannot be read ({error.strerror})") from error
        return StoredFile(name, found.size, found.version, checksum, found.stamp)

    def list(self, below: str = "") -> Iterator[StoredFile]:
        start = self._path(below) if below else self._root
        yield from self._listed(start, f"{below}/" if below else "")

    def _listed(self, folder: Path, prefix: str) -> Iterator[StoredFile]:
        try:
            with os.scandir(folder) as entries:
                found = sorted(
                    entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name
                    for entry in entries
                    if not entry.name.startswith(".") and (prefix or entry.name != STAMPS)
                )
        except FileNotFoundError:
            return
        except OSError as error:
            raise InfrastructureError(f"{folder}: cannot be read ({error.strerror})") from error
        for name in found:
            if name.endswith("/"):
                yield from self._listed(folder / name, prefix + name)
            elif (file := self._file(folder / name, prefix + name)) is not None:
                yield file

    def read(self, name: str, at_most: int) -> bytes | None:
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                data = file.read(at_most + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InfrastructureError(f"{path}: cannot be read ({error.strerror})") from error
        if len(data) > at_most:
            raise InfrastructureError(f"{path}: it has more than {at_most:,} bytes")
        return data

    def send(self, uploads: Sequence[Upload]) -> Sequence[StoredFile]:
        (upload,) = uploads
        there = self._compared(upload)
        if there is not None and (known := ours(there, upload)) is not None:
            return [self.look(upload.name) or known]
        path = self._path(upload.name)
        temporary = path.with_name(temporary_name(path.name, secrets.token_hex(16)))
        make_folder(path.parent)
        mark: Path | None = None
        try:
            with storage_errors(path):
                version = self._write(upload, temporary)
                mark = self._stamp_of(upload.name, version)
                self._write_stamp(mark, upload.stamp)
                self._put_in_place(upload, temporary, path)
                fsync_folder(path.parent)
            mark = None
        finally:
            for leftover in (temporary, *([mark] if mark else [])):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
        if there is not None and there.version != version:
            with contextlib.suppress(OSError):
                self._stamp_of(upload.name, there.version).unlink(missing_ok=True)
        found = self.look(upload.name)
        if found is None or found.version != version:
            raise Moved(f"{path}: somebody has replaced it", [upload.name])
        if upload.stamp.digest and found.checksum != f"xxh3:{upload.stamp.digest}":
            raise InfrastructureError(f"{path}: other bytes are read from it than were written; check this filesystem")
        return [found]

    def _compared(self, upload: Upload) -> StoredFile | None:
        """What is there now.  Raises Moved unless that is what the upload replaces, or the upload itself."""
        there = self._stat(upload.name)
        version = there.version if there else ""
        if upload.replaces not in (None, version) and ours(there, upload) is None:
            raise Moved(f"{self._path(upload.name)}: another file is there by now", [upload.name])
        return there

    def _write(self, upload: Upload, temporary: Path) -> str:
        """Write the bytes under a temporary name and make them durable; returns their version."""
        read = Contents(upload)
        with open(temporary, "xb", buffering=0) as file:
            for block in read.blocks():
                view = memoryview(block)
                while view:
                    view = view[file.write(view) :]
            read.insist()
            now = time.time_ns() // 1000 * 1000 + secrets.randbelow(1000)  # the clock of a filesystem may be coarse
            os.utime(file.fileno(), ns=(now, now))
            os.fsync(file.fileno())
        return _version(os.stat(temporary))

    def _put_in_place(self, upload: Upload, temporary: Path, path: Path) -> None:
        if upload.replaces == "":
            try:
                make_link(temporary, path)
            except FileExistsError:
                raise Moved(f"{path}: another file is there by now", [upload.name]) from None
            return
        self._compared(upload)
        os.replace(temporary, path)

    def remove(self, file: StoredFile) -> None:
        there = self._stat(file.name)
        if there is None or there.version != file.version:
            return
        path = self._path(file.name)
        with storage_errors(path):
            path.unlink(missing_ok=True)
            self._stamp_of(file.name, file.version).unlink(missing_ok=True)

    def checksum_of(self, file: StoredFile, source: Path | bytes) -> str:
        return f"xxh3:{contents.checksum_of(source, 'xxh3')}"

    def close(self) -> None:
        pass

    # ---- names, versions, stamps

    def _path(self, name: str) -> Path:
        words = PurePosixPath(name).parts
        if not words or name.startswith("/") or ".." in words or "\0" in name:
            raise InfrastructureError(f"{self._root}: {name[:200]!r} cannot be the name of a file below it")
        return self._root.joinpath(*words)

    def _stamp_of(self, name: str, version: str) -> Path:
        return self._root / STAMPS / Path(name).parent / f"{Path(name).name}.{version}.json"

    def _write_stamp(self, path: Path, stamp: Stamp) -> None:
        make_folder(path.parent)
        record = {"digest": stamp.digest, "generation": stamp.generation, "token": stamp.token}
        with open(path, "wb") as file:
            file.write(dump_json(record))
            file.flush()
            os.fsync(file.fileno())

    def _stat(self, name: str) -> StoredFile | None:
        return self._file(self._path(name), name)

    def _file(self, path: Path, name: str) -> StoredFile | None:
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InfrastructureError(f"{path}: cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(found.st_mode):
            return None
        version = _version(found)
        return StoredFile(name, found.st_size, version, "", _parsed(read_record(self._stamp_of(name, version))))


def _version(found: os.stat_result) -> str:
    return f"{found.st_size:x}-{found.st_mtime_ns:x}"


def _parsed(record: dict[str, Any] | None) -> Stamp | None:
    try:
        known = record or {}
        return Stamp(str(known["digest"]), int(known["generation"]), str(known["token"]))
    except (KeyError, ValueError, TypeError):
        return None
