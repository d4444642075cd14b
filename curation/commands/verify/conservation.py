"""Checks conservation between the stages for one shard: each stage took in exactly what the previous one kept.

It compares the counts in the receipts, and the keys in the source, the dictionaries, the edits and ``_rejects``.  It
also checks the receipts themselves: outputs must have their digests, and inputs must not have changed.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.check.counts import REASON
from curation.commands.findings import Findings
from curation.commands.places import MAX_LIST_BYTES
from curation.errors import SampleError, ShardError
from curation.jsonio import KEY_SUFFIX, clean_text, parse_json, parse_json_object
from curation.run.inputs import place_below, receipts_of, vouched_for
from curation.run.records import is_there
from curation.shards import record_name, record_path
from curation.storage.files import fast_digest, read_record

_MAX_NAMED = 3


@dataclass(slots=True)
class Record:
    """A stage's records of one shard.

    Attributes:
        home: Its output folder.
        gone: Key → how often it was dropped or failed.
        rejected: What ``_rejects`` tells of samples that were dropped because a check failed.
    """

    stage: str
    home: Path
    receipt: dict[str, Any]
    gone: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.receipt.get("status") == "done"

    def count(self, name: str) -> int:
        counts = self.receipt.get("counts")
        found = counts.get(name) if isinstance(counts, dict) else None
        return found if isinstance(found, int) else -1

    def note(self, name: str) -> int | None:
        notes = self.receipt.get("notes")
        found = notes.get(name) if isinstance(notes, dict) else None
        return found if isinstance(found, int) else None


def read_stage(folder: Path, stage: str, shard_id: str, findings: Findings) -> Record | None:
    """A stage's record of a shard; None without one, which is a finding unless the stage never ran there."""
    receipts = receipts_of(folder, stage)
    if receipts is None:
        return None
    receipt = read_record(record_path(receipts, shard_id))
    if receipt is None:
        findings.add("no_receipt", "", f"{stage} has no receipt of it in {receipts}")
        return None
    record = Record(stage, receipts.parent.parent, receipt)
    if not record.done:
        findings.add("not_done", "", f"the receipt of {stage} says {clean_text(str(receipt.get('status')))!r}")
        return record
    try:
        _check_counts(record, shard_id, findings)
        _check_inputs(record, shard_id, findings)
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # made by hand, or damaged
        findings.add("bad_record", "", f"the receipt of {stage} is not valid: {type(error).__name__}: {error}")
    return record


def check_outputs(record: Record, known: dict[Path, tuple[int, str]], findings: Findings) -> None:
    """Check that every file that a receipt names exists with its size and digest.

    known: size and digest (xxh3-128) of files that were already read.
    """
    for output in record.receipt.get("outputs", ()):
        if not output.get("checked", True):
            continue
        path = Path(os.path.normpath(record.home / output["path"]))
        try:
            size, digest = known.get(path) or (path.stat().st_size, "")
            if size == output["size"]:
                digest = digest or fast_digest(path)
        except OSError as error:
            if not is_there(record.home, record.stage, record.receipt, output):
                findings.add("missing_output", "", f"{path}, which {record.stage} published: {error.strerror}")
            continue
        if (size, digest) != (output["size"], output["digest"]):
            said = f"{output['size']:,} bytes, {output['digest']}"
            now = f"{size:,} bytes" + (f", {digest}" if digest else "")
            findings.add("wrong_digest", "", f"{path}: {record.stage} published {said}; it has {now}")


def check_keys(
    what: str, came_in: Iterable[str], kept: Iterable[str], record: Record | None, findings: Findings
) -> None:
    """Check that each key that came in was kept, dropped or failed, and that no other key came out.

    what: the stage in words.  record: the stage's record; None if its files were made elsewhere, so that missing keys
    cannot be checked.
    """
    before, after = Counter(came_in), Counter(kept)
    gone = record.gone if record is not None else Counter()
    for key in before - after - gone if record is not None else Counter():
        findings.add("lost_between_stages", key, f"came into {what}, and was neither kept nor dropped nor rejected")
    for key in after + gone - before:
        where = "kept" if key in after else "in its rejects or drops"
        findings.add("from_nowhere", key, f"{where} by {what}, or more often than it came in, and came from nowhere")


def check_count(what: str, said: int | None, counted: int, findings: Findings) -> None:
    if said is not None and said != counted:
        findings.add("counts_differ", "", f"{what}: {said:,}, counted {counted:,}")


def names_to_keys(names: Iterable[str]) -> Iterator[str]:
    return (name.removesuffix(KEY_SUFFIX) for name in names)


def provenance_lines(record: Record, shard_id: str) -> Iterator[dict[str, Any]]:
    """A shard's lines in ``_provenance``.  Raises ShardError."""
    path = record.home / "_provenance" / record.stage / f"{record_name(shard_id)}.jsonl"
    yield from _lines(path, path.read_bytes() if path.exists() else b"")


def _check_counts(record: Record, shard_id: str, findings: Findings) -> None:
    """Check that a receipt's counts add up, and that they agree with the lists of rejects and drops."""
    counts = record.receipt["counts"]
    dropped, failed = Counter(counts["dropped"]), Counter(counts["failed"])
    total = counts["kept"] + dropped.total() + failed.total()
    if counts["in"] != total:
        findings.add("counts_differ", "", f"{record.stage}: {counts['in']:,} came in, {total:,} came out")
    folder = record.home / "_rejects" / record.stage
    listed: dict[str, list[tuple[str, str]]] = {"failed": [], "dropped": []}
    try:
        by_checks = {reason for reason in dropped if reason.startswith(REASON)}
        if failed or by_checks:
            path = folder / f"{record_name(shard_id)}.jsonl"
            for line in _lines(path, path.read_bytes()):
                if line.get("reason") in by_checks:
                    record.rejected.append(line)
                else:
                    listed["failed"].append((str(line.get("reason")), str(line.get("key"))))
        check_count(
            f"{record.stage} dropped for a check, lines in its rejects",
            sum(dropped[reason] for reason in by_checks),
            len(record.rejected),
            findings,
        )
        if dropped:
            listed["dropped"] = list(_drops(folder / f"{record_name(shard_id)}.drops.tsv.gz"))
    except FileNotFoundError as error:
        findings.add("missing_output", "", f"{error.filename}: the receipt of {record.stage} counts lines of it")
    except (OSError, ShardError) as error:
        findings.add("bad_record", "", str(error))
    for name, expected in (("failed", failed), ("dropped", dropped)):
        by_reason = Counter(reason for reason, _ in listed[name])
        if by_reason != +expected:
            findings.add(
                "counts_differ", "", f"{record.stage} counts {dict(expected)} {name}, its list has {dict(by_reason)}"
            )
        record.gone.update(key for _, key in listed[name])


def _check_inputs(record: Record, shard_id: str, findings: Findings) -> None:
    """Check that the stage read what the previous stage's receipt names now; otherwise its output is stale."""
    for was, source in zip(record.receipt["inputs"], record.receipt["sources"], strict=True):
        if "stage" not in source:
            continue
        folder = Path(os.path.realpath(record.home / source["folder"]))
        receipts = receipts_of(folder, source["stage"])
        if receipts is None:  # it has been made elsewhere, or its receipts were not brought along
            continue
        theirs = read_record(record_path(receipts, shard_id))
        now = None
        absent = was.get("absent") is True
        if theirs is not None and theirs.get("status") == "done":
            home = os.path.realpath(receipts.parent.parent)
            place = f"{folder}/{place_below(source, shard_id)}{was['path'].rstrip('/')}"
            now = vouched_for(place, home, theirs["outputs"], loose=absent or was["path"].endswith("/"))
        if now != (None if absent else was):
            findings.add(
                "stale",
                "",
                f"{record.stage} read {folder / was['path']} as {'absent' if absent else was['digest']}; "
                f"{source['stage']} has published {now['digest'] if now else 'nothing of that name'} since",
            )


def _drops(path: Path) -> Iterator[tuple[str, str]]:
    """(reason, key) of a drop list.  Raises ShardError, OSError."""
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_LIST_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ShardError(f"{path}: not a list of drops ({error})") from None
    for line in data.splitlines():
        reason, _, text = line.partition(b"\t")
        try:
            key = parse_json(text, keep_surrogates=True)
        except SampleError as error:
            raise ShardError(f"{path}: not a list of drops ({error})") from None
        yield reason.decode("utf-8", "replace"), str(key)


def _lines(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    try:
        for line in data.splitlines():
            yield parse_json_object(line, keep_surrogates=True)
    except SampleError as error:
        raise ShardError(f"{path}: not lines of JSON objects ({error})") from None
