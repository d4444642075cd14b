"""Faults that a command has found in data, bounded in number and length, and the processes that look for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final, TypeVar

from curation.errors import InfrastructureError
from curation.jsonio import clean_text

SHOWN_OF_A_KIND: Final = 5  # findings of one kind that are kept for each shard; the others are only counted
MAX_LINES: Final = 200  # of findings on the screen; --json has all that were kept
_MAX_DETAIL = 400
_MAX_KEY = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    kind: a short snake_case word.  key: the sample; empty where the fault is the whole shard's.
    """

    kind: str
    key: str
    detail: str

    def as_record(self, remedies: Mapping[str, str]) -> dict[str, str]:
        record = {"kind": self.kind, "key": self.key, "detail": self.detail}
        return record | ({"remedy": remedies[self.kind]} if self.kind in remedies else {})


@dataclass(slots=True)
class Findings:
    """The faults of one shard: all of them are counted, and a few of each kind are kept."""

    counts: Counter[str] = field(default_factory=Counter)
    kept: list[Finding] = field(default_factory=list)

    def add(self, kind: str, key: str = "", detail: str = "") -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN_OF_A_KIND:
            self.kept.append(Finding(kind, clean_text(key)[:_MAX_KEY], clean_text(detail)[:_MAX_DETAIL]))

    def __bool__(self) -> bool:
        return bool(self.counts)


def as_lines(shards: Iterable[tuple[str, Findings]], remedies: Mapping[str, str]) -> list[str]:
    """Returns a line for each finding, in the order of the shards, and then the fix for each kind.

    Args:
        shards: Pairs of a shard's id and its findings.
        remedies: Kind → its fix.
    """
    lines: list[str] = []
    seen: Counter[str] = Counter()
    left_out = 0
    for shard_id, findings in shards:
        if not findings:
            continue
        seen.update(findings.counts)
        shown: Counter[str] = Counter()
        for finding in findings.kept:
            shown[finding.kind] += 1
            if len(lines) < MAX_LINES:
                lines.append(": ".join(filter(None, (shard_id, finding.kind, finding.key, finding.detail))))
            else:
                left_out += 1
        for kind, count in (findings.counts - shown).items():
            if len(lines) < MAX_LINES:
                lines.append(f"{shard_id}: {kind}: and {count:,} more")
            else:
                left_out += count
    if left_out:
        lines.append(f"... and {left_out:,} more findings; --json shows more of them")
    lines += [f"fix for {kind} ({seen[kind]:,}): {text}" for kind, text in remedies.items() if seen[kind]]
    return lines


def as_record(findings: Findings, remedies: Mapping[str, str]) -> dict[str, Any]:
    """Returns one shard's findings as a JSON value."""
    return {
        "counts": dict(findings.counts.most_common()),
        "findings": [finding.as_record(remedies) for finding in findings.kept],
    }


Task = TypeVar("Task")
Result = TypeVar("Result")


def results_in_order(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yields what ``work`` makes of each task, in the order of the tasks.

    Args:
        work: Called with one task; it is pickled where there are several workers.
        tasks: What to do.
        workers: How many processes do it; with one, this process does it.

    Raises:
        InfrastructureError: A process was killed.
    """
    if workers < 2:
        yield from map(work, tasks)
        return
    # spawn, so that no copy of this process's threads and locks is made
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool:
            raise InfrastructureError("a process was killed (out of memory?): try fewer --workers") from None
