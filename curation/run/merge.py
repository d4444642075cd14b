"""Merges the parts of many shards into one file: a JSONL that grows during the run, or a parquet file at its end.

Any number of processes merge a JSONL together.  A log of entries decides which shards come next, and at which byte.
An entry is a file that only one process can create.  Its bytes in the JSONL follow from the entry alone (it names each
part with its digest), so any process that finds an entry may write its bytes at their offset, any number of times, and
a killed or suspended process does no harm.  An entry is created only when the bytes of the last one are durable.

A failed shard has no rows.  If a shard was done again after it was merged, the log is out of date: once nothing is
pending, a second log is begun, and its file replaces the first one when it is complete.

A parquet file is made from the parts of all shards, in the order of the shards, once none is pending.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import re
import secrets
import shlex
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import InfrastructureError, ShardError
from curation.jsonio import dump_json
from curation.run.ledger import Ledger
from curation.run.planned import Plan, planned
from curation.storage.files import (
    link_exclusively,
    make_folder,
    make_link,
    read_record,
    storage_error,
    storage_errors,
    whole_file,
)

MERGE_EVERY_S = 2.0
SECOND_LOOK_S = 1.0  # a worker that does a shard again publishes its part and then its receipt
MAX_ENTRY_BYTES = 64 << 20  # of one entry, which the process that writes it holds in memory
_FOLDER, _DATA = "_merged", "data"

Transform = Callable[[bytes, Path], bytes]


@dataclass(slots=True)
class _Log:
    """The entries of one log that this process has read.  end: the byte at which the next one begins."""

    folder: Path
    shards: list[tuple[str, str, int]] = field(default_factory=list)  # id, digest of its part (or ""), bytes
    last: dict[str, Any] | None = None
    count: int = 0
    end: int = 0
    written: int = 0  # number of entries whose bytes are known to be durable

    @property
    def data(self) -> Path:
        return self.folder / _DATA

    def read(self) -> None:
        """Read the entries that were created since the last call."""
        while (entry := read_record(path := self.folder / f"{self.count}.json")) is not None:
            try:
                shards = [(str(i), str(d), int(n)) for i, d, n in entry["shards"]]
                sound = entry["start"] == self.end and entry["end"] == self.end + sum(n for _, _, n in shards)
            except (KeyError, TypeError, ValueError):
                sound = False
            if not sound or any(size < 0 for _, _, size in shards):
                raise InfrastructureError(
                    f"{path}: not an entry of the merged file; remove {self.folder.parent}, and it is merged again"
                )
            self.shards += shards
            self.last, self.count, self.end = entry, self.count + 1, int(entry["end"])


class JsonlMerge:
    """Merges the parts ``part(shard id)`` of a stage's done shards into ``target``, in the order of their ids.

    part: shard id → path of its part relative to the ledger's root, as its receipt names it.
    transform: (bytes of a part, its path) → its lines in the merged file; it must be deterministic.
    """

    def __init__(self, ledger: Ledger, target: Path, part: Callable[[str], str], transform: Transform) -> None:
        self._ledger, self._target = ledger, target
        self._part, self._transform = part, transform
        self._folder = ledger.root / _FOLDER / target.name
        self._log: _Log | None = None
        self._plan = Plan(ledger.root, ledger.stage)
        self._order: list[str] = []
        self._last_look = -float("inf")
        self._unreadable = ""  # why a part could not be merged in the last pass

    def grow(self) -> None:
        """Merge the shards that are done by now; calls within a few seconds of the last one do nothing."""
        if time.monotonic() - self._last_look >= MERGE_EVERY_S:
            with storage_errors(self._target):
                self._merge(is_last=False)
            self._last_look = time.monotonic()

    def finish(self) -> bool:
        """Merge what is done, from the start if merged shards were done again; returns whether all is merged.

        Raises InfrastructureError where a part is not what its receipt says, so that the file would lack its rows.
        """
        with storage_errors(self._target):
            whole = self._merge(is_last=True)
            if not whole and self._unreadable:
                time.sleep(SECOND_LOOK_S)
                whole = self._merge(is_last=True)
        if not whole and self._unreadable:
            raise _not_whole(self._target, self._unreadable)
        return whole

    def _merge(self, *, is_last: bool) -> bool:
        """is_last: compare the log with the receipts, and write the last entry's bytes even if another process did."""
        self._unreadable = ""
        self._ledger.load_options_versions()
        if self._plan.look():
            self._order = sorted(self._plan.ids)
        if not (order := self._order):
            return True
        log = self._current()
        log.read()
        if [shard_id for shard_id, _, _ in log.shards] != order[: len(log.shards)] or (is_last and self._is_stale(log)):
            if any(self._fate(shard_id) is None for shard_id in order):
                return False  # a new log would soon be out of date again
            log = self._begin(int(log.folder.name) + 1)
            log.read()
        if is_last:
            log.written = 0
        if not self._complete_last(log):
            return False
        while (entry := self._next_entry(log, order)) is not None:
            link_exclusively(log.folder / f"{log.count}.json", dump_json(entry))
            log.read()
            if not self._complete_last(log):
                return False
            if log.folder.name == "1":
                self._show(log)
        whole = len(log.shards) == len(order)
        if whole or log.folder.name == "1":
            self._show(log)
        return whole

    # ---- logs

    def _current(self) -> _Log:
        numbers = [0]
        with contextlib.suppress(FileNotFoundError):
            numbers += [int(name) for name in os.listdir(self._folder) if name.isdecimal()]
        newest = max(numbers)
        if newest == 0:
            return self._begin(1)
        if self._log is None or self._log.folder.name != str(newest):
            self._log = _Log(self._folder / str(newest))
        return self._log

    def _begin(self, number: int) -> _Log:
        self._log = _Log(self._folder / str(number))
        make_folder(self._log.folder)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._log.data, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        return self._log

    def _is_stale(self, log: _Log) -> bool:
        return any(self._fate(shard_id) not in (None, digest) for shard_id, digest, _ in log.shards)

    def _show(self, log: _Log) -> None:
        """Make ``target`` the log's file, and remove the older logs."""
        if self._current().folder != log.folder:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(self._target, log.data):
                return
        temporary = self._target.with_name(f".{self._target.name}.{secrets.token_hex(8)}.tmp")
        try:
            make_link(log.data, temporary)
            os.rename(temporary, self._target)
        finally:
            temporary.unlink(missing_ok=True)
        for number in range(1, int(log.folder.name)):
            shutil.rmtree(self._folder / str(number), ignore_errors=True)

    # ---- entries

    def _fate(self, shard_id: str) -> str | None:
        """The digest of a shard's part; "" if the shard failed; None while it is pending."""
        receipt = self._ledger.receipt(shard_id)
        if receipt is None or receipt.get("epoch") != self._ledger.governing(shard_id).number:
            return None
        if receipt.get("status") == "failed":
            return ""
        if receipt.get("status") != "done":
            return None
        outputs = {output["path"]: output["digest"] for output in receipt.get("outputs", [])}
        return str(outputs.get(self._part(shard_id), ""))

    def _next_entry(self, log: _Log, order: list[str]) -> dict[str, Any] | None:
        """The shards that can be merged next; None if the first of them is pending."""
        shards: list[tuple[str, str, int]] = []
        size = 0
        for shard_id in order[len(log.shards) :]:
            digest = self._fate(shard_id)
            if digest is None or size >= MAX_ENTRY_BYTES:
                break
            lines = self._lines(shard_id, digest)
            if lines is None:
                break
            shards.append((shard_id, digest, len(lines)))
            size += len(lines)
        return {"start": log.end, "end": log.end + size, "shards": shards} if shards else None

    def _lines(self, shard_id: str, digest: str) -> bytes | None:
        """A shard's lines; None if its part has been replaced."""
        if not digest:
            return b""
        path = self._ledger.root / self._part(shard_id)
        try:
            data = path.read_bytes()
            if xxhash.xxh3_128_hexdigest(data) == digest:
                return self._transform(data, path)
            error = "it was changed"
        except OSError as reason:
            error = str(reason.strerror)
        except ShardError as reason:
            error = str(reason)
        self._unreadable = _unreadable(path, shard_id, error)
        return None

    def _complete_last(self, log: _Log) -> bool:
        """Write the bytes of the last entry, even if another process created it; False if a part of it is gone."""
        entry = log.last
        if entry is None or log.written == log.count:
            return True
        try:
            descriptor = os.open(log.data, os.O_WRONLY)
        except FileNotFoundError:  # a newer log has replaced this one
            return False
        try:
            for offset, data in self._pieces(entry):
                if data is None:
                    return self._is_written(log, entry)
                view = memoryview(data)
                while view:
                    count = os.pwrite(descriptor, view, offset)
                    view, offset = view[count:], offset + count
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        log.written = log.count
        return True

    def _pieces(self, entry: dict[str, Any]) -> Iterator[tuple[int, bytes | None]]:
        offset = int(entry["start"])
        for shard_id, digest, size in entry["shards"]:
            data = self._lines(shard_id, digest)
            yield offset, data
            offset += size

    @staticmethod
    def _is_written(log: _Log, entry: dict[str, Any]) -> bool:
        """Whether the file contains an entry's bytes, so that its parts were replaced only after the merge."""
        return log.data.stat().st_size >= int(entry["end"])


_MARK = b"parts"
_PARQUET_END = struct.Struct("<I4s")  # the length of the footer, and the magic
_NOT_IN_PYTHON = (ValueError, OverflowError, ArithmeticError, TypeError)  # a date, a time zone or a text that is none
# What a spreadsheet reads as a formula (OWASP, CSV injection): it skips white space, controls and marks without a width
# (Unicode's Cc, Cf and Z), and some take the full-width forms for the plain ones.
_FORMULA = re.compile(
    r"[\x00-\x20\x7f-\xa0\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f"
    r"\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]*"
    r"[=+\-@\uff1d\uff0b\uff0d\uff20\ufe62\ufe63\ufe66\ufe6b\u2212]|[\t\r\n]"
)


def _unreadable(path: Path, shard_id: str, why: str) -> str:
    return f"{path}: {why}; make this shard again with --rerun --shards {shlex.quote(shard_id)}"


def _not_whole(target: Path, why: str) -> InfrastructureError:
    return InfrastructureError(f"{target} is not whole: {why}")


def merge_parquet(
    ledger: Ledger, part_of: Callable[[str], str], name: str, also: Callable[[Path], None] | None = None
) -> bool:
    """Write ``name`` in the stage's output folder from the ``part_of(shard id)`` of each shard; whether it exists.

    The process that finishes last writes it, and it appears complete; a file made from the same parts is kept.
    A column whose type differs between the parts becomes text.
    also: called with the file before it appears, to make further files from it.

    Raises InfrastructureError where a part is not what its receipt says.
    """
    parts = _parquet_parts(ledger, part_of)
    if not parts:
        return False
    mark = xxhash.xxh3_128_hexdigest(dump_json([(part, digest) for _, part, digest in parts])).encode()
    target = ledger.root / name
    if _is_marked(target, mark):
        return True
    import pyarrow
    from pyarrow import parquet

    paths = [ledger.root / part for _, part, _ in parts]
    try:
        schema = _common_schema([parquet.read_schema(path) for path in paths]).with_metadata({_MARK: mark})
        with whole_file(target) as file:
            with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
                for path in paths:
                    writer.write_table(_aligned(parquet.read_table(path, partitioning=None), schema))
            file.flush()
            if also is not None:
                also(Path(file.name))
    except (OSError, pyarrow.ArrowException) as error:  # a shard is being done again; its worker will merge too
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ESTALE):
            raise storage_error(target, error) from error
        time.sleep(SECOND_LOOK_S)
        if _parquet_parts(ledger, part_of) != parts:
            return False
        changed = (
            _unreadable(ledger.root / part, shard_id, "it was changed")
            for shard_id, part, digest in parts
            if not _has_digest(ledger.root / part, digest)
        )
        raise _not_whole(target, next(changed, str(error))) from error
    return True


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes()) == digest
    except OSError:
        return False


def _parquet_parts(ledger: Ledger, part_of: Callable[[str], str]) -> list[tuple[str, str, str]]:
    """(shard id, part, its digest) of each part; empty where a shard is pending."""
    ledger.load_options_versions()
    parts = []
    for shard_id in sorted(planned(ledger.root, ledger.stage)):
        receipt = ledger.receipt(shard_id)
        current = receipt is not None and receipt.get("epoch") == ledger.governing(shard_id).number
        if receipt is None or not current or receipt.get("status") not in ("done", "failed"):
            return []
        part = part_of(shard_id)
        parts += [(shard_id, part, out["digest"]) for out in receipt.get("outputs", []) if out["path"] == part]
    return parts


def _is_marked(target: Path, mark: bytes) -> bool:
    """Whether a parquet file is made of the parts with this mark, which its footer holds.

    It is read without pyarrow, whose import takes longer than all else of a run that has nothing to do.
    """
    try:
        with open(target, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _PARQUET_END.size))
            length, magic = _PARQUET_END.unpack(file.read())
            file.seek(max(0, size - _PARQUET_END.size - length))
            return bool(magic == b"PAR1" and mark in file.read(min(length, size)))
    except (OSError, struct.error):
        return False


def write_csv(source: Path, target: Path, columns: Sequence[str], where: tuple[str, str]) -> None:
    """Write some columns of a parquet file as CSV, so that no spreadsheet runs a cell as a formula.

    where: a column and the value that it must have in the rows that are written.
    """
    from pyarrow.parquet import ParquetFile

    with whole_file(target) as out, ParquetFile(source) as file:
        text = io.TextIOWrapper(out, encoding="utf-8", newline="")
        writer = csv.writer(text)
        there = [name for name in columns if name in file.schema_arrow.names]
        writer.writerow(there)
        for batch in file.iter_batches(4096, columns=[*there, where[0]]):
            cells = [values_of(batch.column(name)) for name in (where[0], *there)]
            writer.writerows(map(_cell, row[1:]) for row in zip(*cells, strict=True) if row[0] == where[1])
        text.detach()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        value = value.replace("\0", "")
        return f"'{value}" if _FORMULA.match(value) else value
    return "" if value is None else value


def values_of(column: Any) -> list[Any]:
    """The values of an Arrow array as Python's; None for one that Python cannot hold, such as the year 60000."""
    try:
        return list(column.to_pylist())
    except _NOT_IN_PYTHON:
        return [_value_of(value) for value in column]


def _value_of(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except _NOT_IN_PYTHON:
        return None


def _common_schema(schemas: Sequence[Any]) -> Any:
    import pyarrow

    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    fields = []
    for name in names:
        kinds = {schema.field(name).type for schema in schemas if name in schema.names}
        try:
            alone = [pyarrow.schema([(name, kind)]) for kind in sorted(kinds, key=str)]
            kind = pyarrow.unify_schemas(alone, promote_options="permissive").field(name).type
        except pyarrow.ArrowException:
            kind = pyarrow.string()
        fields.append((name, kind))
    return pyarrow.schema(fields)


def _aligned(table: Any, schema: Any) -> Any:
    import pyarrow

    columns = []
    for wanted in schema:
        if wanted.name not in table.column_names:
            columns.append(pyarrow.nulls(table.num_rows, wanted.type))
            continue
        column = table.column(wanted.name)
        if column.type != wanted.type:
            try:
                column = column.cast(wanted.type)
            except pyarrow.ArrowException:
                values = [None if value is None else str(value) for value in values_of(column)]
                column = pyarrow.array(values, pyarrow.string())
        columns.append(column)
    return pyarrow.Table.from_arrays(columns, schema=schema)
