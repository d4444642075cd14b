"""``curation verify s3://bucket/folder`` proves what lies in a store, by listing and without downloading.

What must lie there is said by the receipts of uploads.  They are put into a table on the disk (sqlite), because their
order is not that of the listing; so memory stays flat in the number of objects.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import orjson

from curation import PROGRAM
from curation.commands.findings import Findings, as_lines, as_record
from curation.errors import EXIT_OK, EXIT_SHARDS_FAILED, UsageError, redact
from curation.jsonio import clean_text
from curation.options import POSITIONAL, URLS, parse_arguments, set_up_logging
from curation.publish.folder import FolderStore
from curation.publish.open_store import address_of, is_store, open_store
from curation.publish.store import Store, StoredFile, proof_of
from curation.storage.files import MAX_RECEIPT_BYTES, parse_record

RECEIPTS: Final = "_receipts"
UPLOADS: Final = "_published"
# What a publisher puts there beside the files of shards, and what a repository of the hub has of its own.
BESIDE: Final = frozenset(
    ("captions.jsonl", "all_captions.parquet", "full_metadata.parquet", "metadata.csv", "wids.json", "sizes.json",
     "MANIFEST.sha256", "README.md", ".gitattributes")
)  # fmt: skip
REMEDIES: Final = {
    "missing": "publish again: a file that a receipt of an upload names is not in the store",
    "wrong": "the object is not what was uploaded: remove it from the store and publish again",
    "outdated": "the object is of an older generation than the newest receipt: publish again, or remove what is not "
    "needed any more with publish --prune",
    "foreign": "no receipt of an upload names this object: it was put there by something else",
}
AT_ONCE: Final = 16  # requests
_SWITCHES: Final = frozenset(("--json", "--quiet", "--no_provenance"))
_UPLOAD_RECEIPT = re.compile(r"_published/[^/]+/[^/_][^/]*/[^_/][^/]*/[^/]+\.\d+\.json")
_SCHEMA: Final = """
create table files (name text primary key, shard text, generation int, size int, version text, checksum text,
                    obsolete int, seen int) without rowid;
create index of_shard on files (shard);
create table shards (shard text primary key, generation int) without rowid;
"""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prove what lies in a store: list it, compare it with the receipts of the uploads, and download nothing."""

    store: Annotated[str, POSITIONAL, URLS]
    """The store: s3://bucket/folder, gs://bucket/folder, hf://datasets/user/name or file:///folder."""
    records: Path | None = None
    """The stage's output folder or --work_dir, whose receipts of uploads are used.  Default: those in the store."""
    json: bool = False
    """One JSON object on one line instead of text."""
    quiet: bool = False
    """Show only the findings and the last line."""


def is_of_a_store(arguments: Sequence[str]) -> bool:
    """Whether the arguments of ``verify`` name a store.

    A folder alone that was published to counts as well: it has receipts of uploads.
    """
    words = _words(arguments)
    return any(map(is_store, words)) or (len(words) == 1 and Path(words[0], UPLOADS).is_dir())


def _words(arguments: Sequence[str]) -> list[str]:
    """The arguments that are neither flags nor values of flags."""
    before = ["", *arguments]
    return [
        word
        for flag, word in zip(before, arguments, strict=False)
        if not word.startswith("-") and (flag in _SWITCHES or "=" in flag or not flag.startswith("--"))
    ]


@dataclass(slots=True)
class _Verified:
    """What was found.  ``proofs``: how many files are proved by what."""

    findings: dict[str, Findings] = field(default_factory=dict)
    proofs: Counter[str] = field(default_factory=Counter)
    files: int = 0
    bytes: int = 0
    shards: int = 0
    beside: int = 0

    def tell(self, shard: str, kind: str, name: str, detail: str) -> None:
        """Note a fault of an object.  Faults of shards beyond the first 1,000 are counted in one place."""
        key = shard if shard in self.findings or len(self.findings) < 1000 else "(further shards)"
        self.findings.setdefault(key, Findings()).add(kind, name, detail)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code.  Raises UsageError where there is nothing to compare with."""
    words = _words(arguments)
    if len(words) > 1:
        url = redact(next(filter(is_store, words), words[0]))
        raise UsageError(
            f"what lies in a store is proved with its URL alone: type {PROGRAM} verify {url}, and --records FOLDER to "
            "compare with the folder that was published"
        )
    options = parse_arguments(Options, arguments, "verify")
    set_up_logging(options.quiet)
    began = time.monotonic()
    url = address_of(options.store).url
    if options.records is not None and not options.records.is_dir():
        raise UsageError(f"--records: there is no folder {options.records}")
    with contextlib.closing(open_store(url)) as store:
        source: Store = store if options.records is None else FolderStore(options.records.absolute())
        found = verify_store(store, source)
    _show(options, url, found, time.monotonic() - began)
    return EXIT_SHARDS_FAILED if found.findings else EXIT_OK


def verify_store(store: Store, source: Store) -> _Verified:
    """Compare a store with the receipts of uploads that ``source`` has, which may be the store itself.

    Raises:
        UsageError: There are no receipts of uploads to this store.
    """
    found = _Verified()
    with tempfile.TemporaryDirectory(prefix="curation-verify-") as folder:
        table = sqlite3.connect(Path(folder) / "files")
        with contextlib.closing(table):
            table.executescript("pragma journal_mode=off; pragma synchronous=off;" + _SCHEMA)
            _read_receipts(store.url, source, table, found)
            if not found.shards:
                raise UsageError(
                    f"{store.url}: {source.url}/{UPLOADS} has no receipt of an upload to this store; give the folder "
                    "that has them: --records DIR"
                )
            _compare(store, table, found)
            rows = table.execute("select shard, name from files where seen = 0 and obsolete = 0 order by name")
            for shard, name in rows:
                found.tell(shard, "missing", name, f"{store.url}/{name}")
    return found


# ---- what must be there


def _read_receipts(url: str, source: Store, table: sqlite3.Connection, found: _Verified) -> None:
    names = (file.name for file in source.list(UPLOADS) if _UPLOAD_RECEIPT.fullmatch(file.name))
    with table:
        for data in _in_order(lambda name: source.read(name, MAX_RECEIPT_BYTES), names):
            record = parse_record(data) if data is not None else None
            if record is not None and record.get("store") == url:
                _note(record, table)
    found.shards = table.execute("select count(*) from shards").fetchone()[0]


def _note(record: dict[str, Any], table: sqlite3.Connection) -> None:
    """Put the files of an upload into the table.  Only the newest generation of a shard counts: it also names what
    the earlier ones left in the store."""
    try:
        shard, generation = f"{record['stage']}/{record['shard']}", int(record["generation"])
        rows = [
            (str(one["name"]), shard, generation, int(one["size"]), str(one.get("version", "")),
             str(one.get("checksum", "")), obsolete, 0)
            for obsolete, key in enumerate(("files", "obsolete"))
            for one in record.get(key) or ()
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return  # its files are foreign then
    last = table.execute("select generation from shards where shard = ?", (shard,)).fetchone()
    if last is not None and last[0] > generation:
        return
    if last is not None and last[0] < generation:
        table.execute("delete from files where shard = ?", (shard,))
    table.execute("insert or replace into shards values (?, ?)", (shard, generation))
    for row in rows:
        known = table.execute("select generation from files where name = ?", row[:1]).fetchone()
        if known is None or known[0] < generation:
            table.execute("insert or replace into files values (?, ?, ?, ?, ?, ?, ?, ?)", row)


# ---- what is there


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    shard: str
    generation: int
    size: int
    version: str
    checksum: str
    obsolete: int


def _compare(store: Store, table: sqlite3.Connection, found: _Verified) -> None:
    """Go through the listing once; ask for each object by itself where the listing has no checksum."""

    def known() -> Iterator[tuple[StoredFile, _Row]]:
        for file in store.list():
            if file.name.startswith(f"{UPLOADS}/"):
                continue
            row = table.execute(
                "select name, shard, generation, size, version, checksum, obsolete from files where name = ?",
                (file.name,),
            ).fetchone()
            if row is not None:
                yield file, _Row(*row)
            elif file.name in BESIDE or file.name.startswith("_"):
                found.beside += 1
            else:
                found.tell("(no shard)", "foreign", file.name, f"{file.size:,} bytes")

    def look(one: tuple[StoredFile, _Row]) -> tuple[StoredFile | None, _Row]:
        file, row = one
        enough = file.checksum or row.obsolete or file.size != row.size
        return (file if enough else store.look(file.name)), row

    for file, row in _in_order(look, known()):
        if file is None:
            continue  # removed since it was listed: it is missing
        table.execute("update files set seen = 1 where name = ?", (row.name,))
        _judge(store, file, row, found)


def _judge(store: Store, file: StoredFile, row: _Row, found: _Verified) -> None:
    if row.obsolete:
        found.tell(row.shard, "outdated", file.name, f"generation {row.generation} of the shard does not have it")
        return
    newer = _newer_generation(store, file, row)
    if newer is not None:
        found.tell(row.shard, "outdated", file.name, f"generation {newer} is done, {row.generation} was uploaded")
        return
    try:
        if file.size != row.size:
            raise ValueError(f"it has {file.size:,} bytes, not {row.size:,}")
        kind, _, value = row.checksum.partition(":")
        proof = proof_of(file, {kind: value})
        if row.version and file.version and row.version != file.version:
            raise ValueError(f"its version is {file.version}, not {row.version}: it was written again")
    except ValueError as error:
        found.tell(row.shard, "wrong", file.name, str(error))
        return
    found.proofs[proof] += 1
    found.files += 1
    found.bytes += file.size


def _newer_generation(store: Store, file: StoredFile, row: _Row) -> int | None:
    """The generation of a shard's receipt in the store, if the receipt is newer than the upload of its files."""
    if not row.name.startswith(f"{RECEIPTS}/") or (file.version, file.size) == (row.version, row.size):
        return None
    record = parse_record(store.read(file.name, MAX_RECEIPT_BYTES) or b"") or {}
    generation = record.get("generation")
    return generation if isinstance(generation, int) and generation > row.generation else None


def _in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in order, several requests at once, and no more of them in memory."""
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(AT_ONCE, "verify") as pool:
        for item in items:
            if len(under_way) >= 2 * AT_ONCE:
                yield under_way.popleft().result()
            under_way.append(pool.submit(function, item))
        while under_way:
            yield under_way.popleft().result()


# ---- what is said


def _show(options: Options, url: str, found: _Verified, seconds: float) -> None:
    count = sum((findings.counts for findings in found.findings.values()), Counter[str]())
    total: dict[str, Any] = {
        "format": 1, "ok": not found.findings, "store": url, "shards": found.shards, "files": found.files,
        "bytes": found.bytes, "proved_by": dict(found.proofs), "beside": found.beside,
        **{kind: count[kind] for kind in REMEDIES}, "seconds": round(seconds, 3),
    }  # fmt: skip
    if options.json:
        total["findings"] = {clean_text(shard): as_record(one, REMEDIES) for shard, one in found.findings.items()}
        print(orjson.dumps(total).decode(), flush=True)
        return
    for line in as_lines(found.findings.items(), REMEDIES):
        print(line)
    proofs = ", ".join(f"{number:,} by {proof}" for proof, number in sorted(found.proofs.items()))
    about = (
        f"{found.shards:,} shards, {found.files:,} files ({proofs}), {found.bytes / 1e9:,.2f} GB in {seconds:,.1f} s"
    )
    beside = f"; {found.beside:,} records and files of the whole run were not compared" if found.beside else ""
    if found.findings:
        words = ", ".join(f"{count[kind]:,} {kind}" for kind in REMEDIES if count[kind])
        print(f"FAULTY: {words}; {about}{beside}", flush=True)
    else:
        print(f"OK: {about}{beside}", flush=True)
