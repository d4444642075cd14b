"""One shard of stage 00, from the requests for its rows' URLs to the files that are published.

What an earlier attempt published of the shard is read first, so that only the rest is asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from curation.download.downloader import Downloader, Examine, UrlRequest
from curation.download.fetch import NETWORK_REASONS, FetchError, host_of
from curation.download.images import ImagePolicy, make_stored
from curation.download.opt_out import OPT_OUT_KINDS, LookupCount, kinds_of
from curation.download.rows import (
    NOT_DOWNLOADED,
    NOT_RESIZED,
    OPT_OUT,
    OWN_COLUMNS,
    SUCCESS,
    RowOutcome,
    json_of,
    key_of,
    metadata_rows,
    pack,
    parquet_of,
    read_outcomes,
    renamed_columns,
    stats_of,
    unpack,
)
from curation.download.tables import MENDED, ShardRows
from curation.errors import InfrastructureError, SampleError, ShardError
from curation.images import decode_rgb, image_facts
from curation.jsonio import clean_text, dump_json
from curation.run.checkpoints import PartialLog
from curation.run.merge import values_of
from curation.run.records import place_of
from curation.run.work import ShardContext
from curation.storage.files import fast_digest
from curation.storage.remote_read import read_source
from curation.storage.urls import Source, Url
from curation.tar.samples import Sample, TarWriter, read_samples
from curation.tar.scan import IMAGE_SUFFIXES
from curation.threads import prefetch

OutputFormat = Literal["webdataset", "files"]
Members = Mapping[str, bytes | memoryview]  # suffix → bytes, of one sample

_AHEAD_BYTES = 256 << 20
_RECORDS_AT_ONCE = 64  # in one write of the checkpoint
_CHECK_EVERY_S = 0.2  # whether to stop, while no response comes
_HOSTS_TO_DOUBT_THE_NETWORK = 20
_JSON_ROWS = 256


def write_samples(
    layout: OutputFormat, output: Path, shard_id: str, samples: Iterable[tuple[str, Members]], work: ShardContext
) -> None:
    """Write ``<shard>.tar``, or ``<shard>/<key>.<suffix>``, to ``output``."""
    if layout == "files":
        for key, members in samples:
            for suffix, data in members.items():
                with work.output(output / f"{shard_id}/{key}.{suffix}") as file:
                    file.write(data)
        return
    with work.output(output / f"{shard_id}.tar") as file:
        tar = TarWriter(file)
        for key, members in samples:
            for suffix, data in members.items():
                tar.add(f"{key}.{suffix}", data)
        tar.close()


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """Where the samples of a shard lie.

    Attributes:
        folder: The output folder.
        tar: The tar; None if there is none.
        files: Loose files in place of a tar, each as ``<shard>/<name>``.
    """

    folder: Path
    tar: Source | None = None
    files: Sequence[str] = ()

    def samples(self) -> Iterator[Sample]:
        """Every sample, in the tar's order; that of the keys for loose files.  Damage costs only its own samples."""
        if isinstance(self.tar, Url) or (self.tar is not None and self.tar.exists()):
            yield from read_samples(self.tar)
        by_key: dict[str, list[str]] = {}
        for path in self.files:
            by_key.setdefault(path.partition("/")[2].partition(".")[0], []).append(path)
        for key, paths in sorted(by_key.items()):
            members = {}
            for path in sorted(paths, key=_images_first):
                try:
                    members[path.rpartition(".")[2]] = (self.folder / path).read_bytes()
                except OSError:
                    continue  # its sample lacks it
            yield Sample(key, members, {}, tuple(members))


class PreviousShard:
    """What there is of a shard already.

    Args:
        stored: Its samples.
        outcomes: What happened to its rows, by key.
        decode: Decode every image of it, because it may not be what its rows say.
        in_order: Its samples stand in the order of its rows.

    Attributes:
        outcomes: The outcome of every row, by key; with a suffix where ``check`` found its sample to be whole.
        lost: Why the samples of other successful rows are damaged, by key.
        urls: The URLs of rows, by key, where another table than the one that is read now may have had others.
    """

    def __init__(
        self, stored: StoredFiles, outcomes: dict[str, RowOutcome], *, decode: bool, in_order: bool = True
    ) -> None:
        self._stored, self.outcomes, self._decode, self.in_order = stored, outcomes, decode, in_order
        self.lost: dict[str, str] = {}
        self.urls: dict[str, str] = {}

    @classmethod
    def of_receipt(
        cls,
        output: Path,
        stage: str,
        shard_id: str,
        receipt: Mapping[str, Any],
        own: Sequence[str] = OWN_COLUMNS,
        *,
        in_order: bool = True,
    ) -> PreviousShard:
        """What the last attempt published of a shard.  own: the stage's own columns of its table.

        Raises:
            ShardError: Its table cannot be read.
        """
        named = {entry["path"]: entry for entry in receipt.get("outputs", [])}
        files = sorted(path for path in named if path.startswith(f"{shard_id}/"))
        places = {path: place_of(output, stage, receipt, entry) for path, entry in named.items()}
        tar = next((path for path in named if path.rpartition("/")[2] == f"{shard_id}.tar"), None)
        stored = StoredFiles(output, None if tar is None else places[tar], files)
        table = places.get(f"{shard_id}.parquet") or output / f"{shard_id}.parquet"
        try:
            outcomes = read_outcomes(read_source(table), own)
            is_whole = all(_is_whole(places[path], entry) for path, entry in named.items())
        except InfrastructureError:
            raise
        except Exception as error:
            raise ShardError(
                f"{table}: not what was published: {type(error).__name__}: {error}", "bad_table"
            ) from error
        return cls(stored, outcomes, decode=not is_whole, in_order=in_order)

    def check(self, pool: Executor, threads: int, *, decode: bool, as_it_came: bool) -> None:
        """Find which samples are whole.

        Args:
            pool: Where images are decoded.
            threads: How many threads it has.
            decode: Decode every image; else only those of a shard whose files are not as they were published.
            as_it_came: Images are stored byte for byte, so that a row's sha256 is that of its image.
        """
        decode = decode or self._decode

        def begin(sample: Sample) -> Any:
            outcome = self._outcome_of(sample)
            if not decode or outcome is None:
                return None
            return pool.submit(_flaw, sample, outcome, as_it_came, self.in_order)

        found = set()
        stored = self._stored.samples()
        samples = prefetch(stored, begin, lambda s: sum(map(len, s.members.values())), 4 * threads, _AHEAD_BYTES)
        for sample, flaw in samples:
            why = flaw.result() if flaw is not None else sample.problem and ": ".join(sample.problem)
            outcome = self.outcomes.get(sample.key)
            if outcome is None or outcome.status != SUCCESS:
                continue
            if why:
                self.lost[sample.key] = why
            else:
                found.add(sample.key)
                self.outcomes[sample.key] = replace(outcome, suffix=sample.image_suffix or "")
        for key, outcome in self.outcomes.items():
            if outcome.status == SUCCESS and key not in found:
                self.lost.setdefault(key, "its sample is not there")

    def _outcome_of(self, sample: Sample) -> RowOutcome | None:
        """What its row says of a sample; None if it has no row."""
        return self.outcomes.get(sample.key)

    def members(self, keys: Collection[str]) -> Iterator[tuple[str, Members]]:
        """The samples with these keys, in order and byte for byte."""
        for sample in self._stored.samples():
            if sample.key in keys and sample.problem is None:
                yield sample.key, sample.members


def _images_first(path: str) -> tuple[bool, str]:
    return path.rpartition(".")[2] not in IMAGE_SUFFIXES, path


def _is_whole(path: Source | None, entry: Mapping[str, Any]) -> bool:
    """Whether a file has its receipt's digest.  Of an object in a store this is not known."""
    if not isinstance(path, Path):
        return False
    try:
        return bool(path.stat().st_size == entry["size"] and fast_digest(path) == entry["digest"])
    except OSError:
        return False


def _flaw(sample: Sample, outcome: RowOutcome, as_it_came: bool, strict: bool) -> str | None:
    """Why a stored sample is not what its row says; None for a whole one.

    strict: its row has the size as a viewer shows it; else it may have that of the pixels before they are turned.
    """
    suffix = sample.image_suffix
    try:
        sample.check()
        if suffix is None or "json" not in sample.members:
            return "a member is not there"
        data = sample.members[suffix]
        facts = image_facts(data)
        decode_rgb(data)
    except SampleError as error:
        return clean_text(str(error))
    sizes = (outcome.width, outcome.height)  # none where img2dataset did not look into the image
    if sizes != (None, None) and (facts.width, facts.height) not in (sizes, sizes[::-1] if not strict else sizes):
        return f"{facts.width} × {facts.height} pixels, its row says {outcome.width} × {outcome.height}"
    if as_it_came and hashlib.sha256(data).hexdigest() != outcome.sha256:
        return "its sha256 differs"
    return None


def examine_by(policy: ImagePolicy, digest: str | None = None) -> Examine:
    """What turns the bytes of a response into a record for the checkpoint.  digest: a further hash of the bytes."""

    def examine(request: UrlRequest, data: bytes) -> bytes:
        if request.expected is not None:
            name, wanted = request.expected
            if (found := hashlib.new(name, data, usedforsecurity=False).hexdigest()) != wanted:
                return pack(RowOutcome(NOT_DOWNLOADED, f"hash_mismatch: {name} {found}", opt_out=request.opt_out))
        try:
            image = make_stored(data, policy)
        except SampleError as error:
            message = f"{error.reason}: {clean_text(error.detail)}"
            return pack(RowOutcome(NOT_RESIZED, message, opt_out=request.opt_out))
        exif = dump_json(image.facts.exif).decode()
        facts = (image.suffix, image.width, image.height, image.facts.width, image.facts.height, exif, image.sha256)
        more = hashlib.new(digest, data, usedforsecurity=False).hexdigest() if digest else None
        return pack(RowOutcome(SUCCESS, None, *facts, digest=more, opt_out=request.opt_out), image.data)

    return examine


def refuse(request: UrlRequest, error: FetchError) -> bytes:
    """The record of a URL that gave no bytes."""
    message = f"{error.reason}: {error.detail}" if error.detail else error.reason
    return pack(RowOutcome(NOT_DOWNLOADED, message, opt_out=error.opt_out))


def _hex(value: Any) -> str:
    """A hash of a table, which may hold it as bytes."""
    if isinstance(value, bytes):
        value = value.decode("ascii") if value.isalnum() and value.isascii() else value.hex()
    return "" if value is None else str(value).strip().lower()


class RowDownloads:
    """The rows of one shard, and what becomes of their URLs.  Rows with the same URL and hash share one request.

    Args:
        work: The attempt that counts the rows and takes the outputs.
        rows: The shard's rows.
        rows_per_shard: Rows of a full shard, which decides how many digits a key has.
        verify: The name of a hash and its column.
        columns: The table's columns that are written beside those of the URL and the caption; None for all of them.
        own: The stage's own columns.
    """

    def __init__(
        self,
        work: ShardContext,
        rows: ShardRows,
        rows_per_shard: int,
        verify: tuple[str, str] | None,
        columns: Collection[str] | None = None,
        own: Sequence[str] = OWN_COLUMNS,
    ) -> None:
        self._work, self._own = work, own
        self._lookups = LookupCount()
        table = rows.table
        hashes = [_hex(value) for value in values_of(table.column(verify[1]))] if verify else [None] * table.num_rows
        if columns is not None:
            wanted = {*columns, rows.url, rows.caption}
            table = table.select([name for name in table.column_names if name in wanted])
        self._table = table.rename_columns(renamed_columns(table.column_names, rows.url, rows.caption, own))
        self._has_caption = rows.caption is not None
        if rows.mended:
            work.note("not_utf8", rows.mended)
            work.warn(f"{rows.mended:,} values of its table are no UTF-8; {MENDED}")
        self._keys = rows.keys or [key_of(work.shard.id, row, rows_per_shard) for row in range(table.num_rows)]
        self._earlier: PreviousShard | None = None
        self._outcomes: dict[str, RowOutcome] = {}  # of rows that need no request, by key
        self._copied: set[str] = set()
        self._mark_of: dict[str, str] = {}  # key → mark of its request
        self._keys_of: dict[str, list[str]] = {}  # the other way
        self._requests: dict[str, UrlRequest] = {}
        self._heads: dict[str, RowOutcome] = {}  # mark → what became of it
        for key, text, digest in zip(self._keys, self._table.column("url").to_pylist(), hashes, strict=True):
            if not text or not text.strip():
                self._outcomes[key] = RowOutcome(NOT_DOWNLOADED, "no_url")
                continue
            expected = (verify[0], digest) if verify and digest else None
            request = UrlRequest(text.strip(), expected)
            mark = hashlib.blake2b(f"{request.url}\0{expected}".encode("utf-8", "replace"), digest_size=16).hexdigest()
            self._mark_of[key] = mark
            self._keys_of.setdefault(mark, []).append(key)
            self._requests.setdefault(mark, request)
        work.sample_in(table.num_rows)

    def take_over(self, earlier: PreviousShard, *, ask_failed: bool) -> None:
        """Do not ask for rows whose sample is whole; nor, without ``ask_failed``, for rows that failed before.

        Raises:
            InfrastructureError: Most rows have other URLs than before, so that the table is another one.
        """
        self._earlier = earlier
        urls = dict(zip(self._keys, self._table.column("url").to_pylist(), strict=True))
        others = {key for key, url in earlier.urls.items() if urls.get(key) != url}
        if len(others) > len(earlier.urls) // 2:
            key = min(others)
            raise InfrastructureError(
                f"shard {self._work.shard.id}: the table has other rows than the folder: the URL of {key} is "
                f"{urls.get(key)} in the table and {earlier.urls[key]} in the folder. Give the tables and the "
                "--number_sample_per_shard that the folder was made with"
            )
        for key in self._keys:
            outcome = earlier.outcomes.get(key)
            if key in others or outcome is None or key in earlier.lost or (outcome.status != SUCCESS and ask_failed):
                continue
            self._outcomes[key] = outcome
            if outcome.status == SUCCESS:
                self._copied.add(key)

    def download(self, downloader: Downloader, log: PartialLog) -> None:
        """Ask for what is missing.  Each response is in the log before it is counted."""
        wanted = {mark: self._requests[mark] for key, mark in self._mark_of.items() if key not in self._outcomes}
        asked: dict[int, str] = {}
        for mark, request in wanted.items():
            record = log.get(mark, mark)
            outcome = unpack(record)[0] if record is not None else None
            if outcome is not None and outcome.reason not in NETWORK_REASONS:
                self._heads[mark] = outcome
            else:
                asked[id(request)] = mark
        for key, outcome in self._outcomes.items():
            self._count(key, outcome)
        for mark, outcome in self._heads.items():
            self._count_all(mark, outcome)
        with self._work.phase("download"):
            self._download(downloader, log, [wanted[mark] for mark in asked.values()], asked)
        if len(asked) < len(self._keys):
            self._work.note("asked", len(asked))
        if self._copied:
            self._work.note("copied", len(self._copied))

    def _download(
        self, downloader: Downloader, log: PartialLog, requests: list[UrlRequest], marks: dict[int, str]
    ) -> None:
        responses = downloader.submit(requests)
        reached, silent = False, set()
        try:
            while (found := responses.take(_RECORDS_AT_ONCE, _CHECK_EVERY_S)) is not None:
                if found:
                    log.append((marks[id(request)], marks[id(request)], record) for request, record in found)
                for request, record in found:
                    self._lookups.sites += request.lookups.sites
                    self._lookups.requests += request.lookups.requests
                    outcome = self._heads[marks[id(request)]] = unpack(record)[0]
                    self._count_all(marks[id(request)], outcome)
                    if outcome.reason not in NETWORK_REASONS:
                        reached = True
                    elif not reached:
                        silent.add(host_of(request.url))
                if not reached and len(silent) >= _HOSTS_TO_DOUBT_THE_NETWORK:
                    raise InfrastructureError(
                        f"shard {self._work.shard.id}: none of the first {len(silent)} hosts can be reached; does this "
                        "machine have internet access? (A proxy is not used.)"
                    )
                self._work.check_stop()
        finally:
            responses.end()

    def _count_all(self, mark: str, outcome: RowOutcome) -> None:
        for key in self._keys_of[mark]:
            if key not in self._outcomes:
                self._count(key, outcome)

    def _count(self, key: str, outcome: RowOutcome) -> None:
        if outcome.status == SUCCESS:
            self._work.keep()
        else:
            self._work.fail(key, outcome.reason, outcome.detail)

    def _outcome(self, key: str) -> RowOutcome:
        return self._outcomes.get(key) or self._heads[self._mark_of[key]]

    # ---- what is published

    def write(self, output: Path, layout: OutputFormat, log: PartialLog, *, replaces: bool = False) -> None:
        """Write the samples, the table and the counts to ``output``.

        replaces: write a tar without samples too, because it replaces one that is there.
        """
        shard_id = self._work.shard.id
        outcomes = [self._outcome(key) for key in self._keys]
        rows = metadata_rows(self._table, self._keys, outcomes, self._own)
        if replaces or any(outcome.status == SUCCESS for outcome in outcomes):
            write_samples(layout, output, shard_id, self._samples(rows, log), self._work)
        with self._work.output(output / f"{shard_id}.parquet") as file:
            file.write(parquet_of(rows))
        with self._work.output(output / f"{shard_id}_stats.json") as file:
            file.write(stats_of(outcomes, self._opt_outs(outcomes)))

    def _opt_outs(self, outcomes: Sequence[RowOutcome]) -> dict[str, int] | None:
        """Rows by the kind of the rule that forbids them, which the receipt gets too, beside the look-ups."""
        if OPT_OUT not in self._own:
            return None
        found = Counter(kind for outcome in outcomes if outcome.opt_out for kind in kinds_of(outcome.opt_out))
        for kind in OPT_OUT_KINDS:
            if found[kind]:
                self._work.note(f"opt_out_{kind}", found[kind])
        self._work.note("sites_looked_up", self._lookups.sites)
        self._work.note("requests_for_rules", self._lookups.requests)
        return {kind: found[kind] for kind in OPT_OUT_KINDS}

    def _samples(self, rows: Any, log: PartialLog) -> Iterator[tuple[str, Members]]:
        """The samples: earlier ones as they are, the others from the log.

        They are in the table's order; where the earlier ones are not, these stand first, in their own order.
        """
        there = self._earlier.members(self._copied) if self._earlier is not None and self._copied else iter(())
        first = self._earlier is not None and not self._earlier.in_order
        if first:
            yield from self._all_of(there)
        for batch in rows.to_batches(_JSON_ROWS):
            columns = [values_of(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                row = dict(zip(batch.schema.names, values, strict=True))
                key = row["key"]
                if row["status"] != SUCCESS:
                    continue
                if key in self._copied:
                    if first:
                        continue
                    found, members = next(there)
                    if found != key:
                        raise InfrastructureError(
                            f"{found} found where {key} was a moment ago: does another program write there?"
                        )
                    yield key, members
                    continue
                mark = self._mark_of[key]
                outcome, image = unpack(log.get(mark, mark) or b"")
                yield key, self._members(row, outcome, image)

    def _all_of(self, samples: Iterator[tuple[str, Members]]) -> Iterator[tuple[str, Members]]:
        """The samples to copy, each once."""
        count = 0
        for key, members in samples:
            count += 1
            yield key, members
        if count != len(self._copied):
            why = f"{count:,} samples found where {len(self._copied):,} were a moment ago"
            raise InfrastructureError(f"shard {self._work.shard.id}: {why}: does another program write there?")

    def _members(self, row: dict[str, Any], outcome: RowOutcome, image: memoryview) -> Members:
        members: dict[str, bytes | memoryview] = {outcome.suffix: image}
        if self._has_caption:
            members["txt"] = (row["caption"] or "").encode()
        members["json"] = json_of(row)
        return members
