"""Writes every intact sample of a damaged tar to a new tar, with its members unchanged, and its headers unless they are
odd.

``TarScan`` finds the samples and decides which are torn, so the stages read the same samples.  In addition, salvage
sees the whole shard before it decides: it joins the members of a sample that are not adjacent, and of several samples
with one key it uses the first complete one.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from curation.commands.fsck.samples import Kinds, sample_problems
from curation.jsonio import clean_text, dump_json
from curation.storage.files import AtomicFile, storage_error, write_whole
from curation.tar.headers import BLOCK, RECORD, Member, make_header
from curation.tar.random_access import RangeReader
from curation.tar.scan import SampleSpan, TarScan

_COPY_BYTES: Final = 4 << 20


_MAX_LISTED = 10_000  # samples that the report names; the rest are counted


_MAX_PARTS: Final = 32  # of a sample with members of one suffix; real samples have three members


@dataclass(slots=True)
class _LeftOut:
    """The samples that are not saved: their count for each reason, and the names of the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, key: str, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        if len(self.listed) < _MAX_LISTED:
            self.listed.append({"key": key, "reason": reason, "detail": clean_text(detail)[:400]})


def salvage(path: Path, shard_id: str, folder: Path, found: Mapping[str, int], *, images: bool) -> int:
    """Write ``<folder>/<shard>.tar`` with every intact sample of a tar, and then ``<folder>/<shard>.salvage.json``.

    Headers and data stay byte for byte, but odd headers are written again.  The JSON file records what was saved and
    what was left out.

    Args:
        found: What is wrong with the tar, for the report: the kind of a finding and how often there is one.
        images: Whether a sample is left out when its picture cannot be decoded.

    Returns:
        How many samples were saved.

    Raises:
        InfrastructureError: The folder cannot be written.
        ShardError: The tar cannot be read.
    """
    began = time.time()
    left = _LeftOut()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with RangeReader(path) as source, AtomicFile(folder / f"{shard_id}.tar", secrets.token_hex(8)) as output:
            saved = 0
            for span in _whole_samples(path, source, left, images=images):
                for member in span.members:
                    end = member.data + member.size
                    if member.odd:
                        output.write(make_header(member.name, member.size, member.mtime))
                    for begin in range(member.data if member.odd else member.start, end, _COPY_BYTES):
                        output.write(source.read(begin, min(_COPY_BYTES, end - begin)))
                    output.write(bytes(member.end - end))  # the source's padding may hold other bytes
                saved += 1
            output.write(bytes(2 * BLOCK + -(output.tell() + 2 * BLOCK) % RECORD))
        output.move_into_place()
        report: dict[str, Any] = {
            "shard": shard_id,
            "source": str(path),
            "source_size": source.size,
            "outputs": [{"path": output.final.name, "size": output.size, "digest": output.digest}],
            "counts": {"in": saved + left.counts.total(), "kept": saved, "failed": dict(left.counts.most_common())},
            "left_out": left.listed,
            "found": dict(found),
            "finished": round(time.time(), 3),
            "seconds": round(time.time() - began, 3),
        }
        write_whole(folder / f"{shard_id}.salvage.json", dump_json(report, indent=True))
    except OSError as error:
        raise storage_error(folder, error) from error
    return saved


def _whole_samples(path: Path, source: RangeReader, left: _LeftOut, *, images: bool) -> Iterator[SampleSpan]:
    """Yield the samples without a fault, in the shard's order; the others are added to ``left``.

    Of several samples with one key, the first complete one is used; if none is complete, their members are joined.
    """
    runs = [span for window in TarScan(path).windows() for span in window.spans if span.key]
    kinds = Kinds()
    by_key: dict[str, list[SampleSpan]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    for key, parts in by_key.items():  # the members of a sample may stand apart
        if sound := [part.kinds for part in parts if not part.torn]:
            kinds.add(key, frozenset().union(*sound))
    usual = kinds.usual()

    def fault(span: SampleSpan) -> tuple[str, str] | None:
        if lacking := usual - span.kinds:
            return "incomplete_sample", f"it has no {', '.join(sorted(lacking))}"
        problems = sample_problems(span, lambda m: source.read(m.data, m.size), images=images)
        return problems[0] if problems else None

    def whole(span: SampleSpan) -> SampleSpan | None:
        if span.suspect or not span.members:
            return None
        return next((part for part in _parts(span) if fault(part) is None), None)

    taken: set[str] = set()
    for run in runs:
        if run.key in taken:
            continue
        others = by_key[run.key]
        found = whole(run)
        if found is None and others[-1] is not run:
            continue  # a later one may be
        if found is None and len(others) > 1 and fault(joined := _joined(others)) is None:
            found = joined
        taken.add(run.key)
        if found is not None:
            yield found
        elif torn := next((other.torn for other in others if other.torn), ""):
            left.add(run.key, "torn_sample", torn)
        else:
            left.add(run.key, *(fault(run) or ("incomplete_sample", "")))


def _parts(span: SampleSpan) -> Iterator[SampleSpan]:
    """The sample itself where no suffix comes twice in it.  Otherwise, from each of its members on, as many members as
    follow without such a repetition: copies of members may stand right before a sample."""
    suffixes = [member.suffix for member in span.members]
    if len(set(suffixes)) == len(suffixes):
        yield span
        return
    for begin in range(min(len(suffixes), _MAX_PARTS)):
        seen: set[str] = set()
        members: list[Member] = []
        for member in span.members[begin:]:
            if member.suffix in seen:
                break
            seen.add(member.suffix)
            members.append(member)
        yield SampleSpan(span.key, members[0].start, members[-1].end, members)


def _joined(runs: list[SampleSpan]) -> SampleSpan:
    """One sample of the undamaged members of several with one key; of members with one suffix the first."""
    members: dict[str, Member] = {}
    for run in runs:
        for member in run.members:
            members.setdefault(member.suffix, member)
    return SampleSpan(runs[0].key, runs[0].start, runs[-1].end, [*members.values()])
