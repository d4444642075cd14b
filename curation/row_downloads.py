"""The rows of one shard, from the question for each URL to the files that are published."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from curation.download_rows import (
    NOT_DOWNLOADED,
    NOT_RESIZED,
    SUCCESS,
    Outcome,
    json_of,
    key_of,
    metadata_rows,
    pack,
    parquet_of,
    renamed_columns,
    stats_of,
    unpack,
)
from curation.downloader import Ask, Downloader, Examine
from curation.errors import InfrastructureError, SampleError
from curation.fetch import NETWORK_REASONS, FetchError, host_of
from curation.jsonio import clean_text, dump_json
from curation.run.checkpoints import PartialLog
from curation.storage.buckets import Folder
from curation.storage.files import Output
from curation.storage.urls import Source
from curation.stored_images import ImagePolicy, make_stored
from curation.stored_shard import Earlier, Members, OutputFormat, write_samples

_RECORDS_AT_ONCE = 64  # in one write of the checkpoint
_LOOK_EVERY_S = 0.2
_HOSTS_TO_DOUBT_THE_NETWORK = 20
_JSON_ROWS = 256


class Work(Protocol):
    """What is needed of a shard's work."""

    @property
    def shard(self) -> Any: ...
    def sample_in(self, count: int = 1) -> None: ...
    def keep(self, count: int = 1) -> None: ...
    def fail(self, key: str, reason: str, detail: str = "") -> None: ...
    def phase(self, name: str) -> AbstractContextManager[None]: ...
    def note(self, name: str, value: Any) -> None: ...
    def check_stop(self, *, urgent_only: bool = False) -> None: ...
    def output(self, path: Source, *, checked: bool = True) -> AbstractContextManager[Output]: ...


def examine_by(policy: ImagePolicy) -> Examine:
    """What becomes of bytes that came, as a record."""

    def examine(ask: Ask, data: bytes) -> bytes:
        if ask.expected is not None:
            name, wanted = ask.expected
            if (found := hashlib.new(name, data, usedforsecurity=False).hexdigest()) != wanted:
                return pack(Outcome(NOT_DOWNLOADED, f"hash_mismatch: {name} {found}"))
        try:
            image = make_stored(data, policy)
        except SampleError as error:
            return pack(Outcome(NOT_RESIZED, f"{error.reason}: {clean_text(error.detail)}"))
        exif = dump_json(image.facts.exif).decode()
        facts = (image.suffix, image.width, image.height, image.facts.width, image.facts.height, exif, image.sha256)
        return pack(Outcome(SUCCESS, None, *facts), image.data)

    return examine


def refuse(ask: Ask, error: FetchError) -> bytes:
    """The record of a URL that gave no bytes."""
    return pack(Outcome(NOT_DOWNLOADED, f"{error.reason}: {error.detail}" if error.detail else error.reason))


class RowDownloads:
    """url, caption: columns of ``table``.  verify: the name of a hash and its column.

    Rows of the same URL (and hash) are one question.
    """

    def __init__(
        self, work: Work, table: Any, url: str, caption: str | None, rows_per_shard: int, verify: tuple[str, str] | None
    ) -> None:
        self._work = work
        self._table = table.rename_columns(renamed_columns(table.column_names, url, caption))
        self._has_caption = caption is not None
        self._keys = [key_of(work.shard.id, row, rows_per_shard) for row in range(table.num_rows)]
        self._earlier: Earlier | None = None
        self._outcomes: dict[str, Outcome] = {}  # of rows that need no question, by key
        self._copied: set[str] = set()
        self._ask_of: dict[str, str] = {}  # key → mark of its question
        self._keys_of: dict[str, list[str]] = {}  # the other way
        self._asks: dict[str, Ask] = {}
        self._heads: dict[str, Outcome] = {}  # mark → what became of it
        hashes = table.column(verify[1]).to_pylist() if verify else [None] * table.num_rows
        for key, text, digest in zip(self._keys, self._table.column("url").to_pylist(), hashes, strict=True):
            if not text or not text.strip():
                self._outcomes[key] = Outcome(NOT_DOWNLOADED, "no_url")
                continue
            expected = (verify[0], str(digest).strip().lower()) if verify and digest else None
            ask = Ask(text.strip(), expected)
            mark = hashlib.blake2b(f"{ask.url}\0{expected}".encode("utf-8", "replace"), digest_size=16).hexdigest()
            self._ask_of[key] = mark
            self._keys_of.setdefault(mark, []).append(key)
            self._asks.setdefault(mark, ask)
        work.sample_in(table.num_rows)

    def take_over(self, earlier: Earlier, *, ask_failed: bool) -> None:
        """Rows whose sample is there are not asked for, nor, unless ``ask_failed``, those that failed before."""
        self._earlier = earlier
        for key in self._keys:
            outcome = earlier.outcomes.get(key)
            if outcome is None or key in earlier.lost or (outcome.status != SUCCESS and ask_failed):
                continue
            self._outcomes[key] = outcome
            if outcome.status == SUCCESS:
                self._copied.add(key)

    def download(self, downloader: Downloader, log: PartialLog) -> None:
        """Ask for what is missing; each answer is in the log when it is counted."""
        wanted = {mark: self._asks[mark] for key, mark in self._ask_of.items() if key not in self._outcomes}
        asked: dict[int, str] = {}
        for mark, ask in wanted.items():
            record = log.get(mark, mark)
            outcome = unpack(record)[0] if record is not None else None
            if outcome is not None and outcome.reason not in NETWORK_REASONS:
                self._heads[mark] = outcome
            else:
                asked[id(ask)] = mark
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

    def _download(self, downloader: Downloader, log: PartialLog, asks: list[Ask], marks: dict[int, str]) -> None:
        answers = downloader.ask(asks)
        reached, silent = False, set()
        try:
            while (found := answers.take(_RECORDS_AT_ONCE, _LOOK_EVERY_S)) is not None:
                if found:
                    log.append((marks[id(ask)], marks[id(ask)], record) for ask, record in found)
                for ask, record in found:
                    outcome = self._heads[marks[id(ask)]] = unpack(record)[0]
                    self._count_all(marks[id(ask)], outcome)
                    if outcome.reason not in NETWORK_REASONS:
                        reached = True
                    elif not reached:
                        silent.add(host_of(ask.url))
                if not reached and len(silent) >= _HOSTS_TO_DOUBT_THE_NETWORK:
                    raise InfrastructureError(
                        f"shard {self._work.shard.id}: none of the first {len(silent)} hosts can be reached; does this "
                        "machine have a way to the internet? (A proxy is not used.)"
                    )
                self._work.check_stop()
        finally:
            answers.end()

    def _count_all(self, mark: str, outcome: Outcome) -> None:
        for key in self._keys_of[mark]:
            if key not in self._outcomes:
                self._count(key, outcome)

    def _count(self, key: str, outcome: Outcome) -> None:
        if outcome.status == SUCCESS:
            self._work.keep()
        else:
            self._work.fail(key, outcome.reason, outcome.detail)

    def _outcome(self, key: str) -> Outcome:
        return self._outcomes.get(key) or self._heads[self._ask_of[key]]

    # ---- what is published

    def write(self, output: Path, samples: Folder, layout: OutputFormat, log: PartialLog) -> None:
        """samples: where the images go; output: the table and the counts."""
        shard_id = self._work.shard.id
        outcomes = [self._outcome(key) for key in self._keys]
        rows = metadata_rows(self._table, self._keys, outcomes)
        if any(outcome.status == SUCCESS for outcome in outcomes):
            write_samples(layout, samples, shard_id, self._samples(rows, log), self._work)
        with self._work.output(output / f"{shard_id}.parquet") as file:
            file.write(parquet_of(rows))
        with self._work.output(output / f"{shard_id}_stats.json") as file:
            file.write(stats_of(outcomes))

    def _samples(self, rows: Any, log: PartialLog) -> Iterator[tuple[str, Members]]:
        """The stored samples in the table's order: those that are there as they are, the others from the log."""
        there = self._earlier.members(self._copied) if self._earlier is not None and self._copied else iter(())
        for batch in rows.to_batches(_JSON_ROWS):
            for row in batch.to_pylist():
                key = row["key"]
                if row["status"] != SUCCESS:
                    continue
                if key in self._copied:
                    found, members = next(there)
                    if found != key:
                        raise InfrastructureError(f"{found} found where {key} was a moment ago: who writes there?")
                    yield key, members
                    continue
                mark = self._ask_of[key]
                outcome, image = unpack(log.get(mark, mark) or b"")
                yield key, self._members(row, outcome, image)

    def _members(self, row: dict[str, Any], outcome: Outcome, image: memoryview) -> Members:
        members: dict[str, bytes | memoryview] = {outcome.suffix: image}
        if self._has_caption:
            members["txt"] = str(row["caption"] or "").encode("utf-8", "replace")
        members["json"] = json_of(row)
        return members
