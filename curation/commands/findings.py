"""What a command that checks data has found: of bounded number and length, however many faults there are.

One task after the other in this process, or several at once in processes of their own.
"""

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

SHOWN_OF_A_KIND: Final = 5  # findings of a kind that are told of for each shard; the rest are counted
MAX_LINES: Final = 200  # of findings on the screen; --json has what a shard kept
_MAX_DETAIL = 400
_MAX_KEY = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.  kind: a short snake_case word.  key: the sample, empty for the shard as a whole."""

    kind: str
    key: str
    detail: str

    def as_record(self, remedies: Mapping[str, str]) -> dict[str, str]:
        record = {"kind": self.kind, "key": self.key, "detail": self.detail}
        return record | ({"remedy": remedies[self.kind]} if self.kind in remedies else {})


@dataclass(slots=True)
class Findings:
    """The faults of one shard: all are counted, a few of each kind are kept."""

    counts: Counter[str] = field(default_factory=Counter)
    kept: list[Finding] = field(default_factory=list)

    def add(self, kind: str, key: str = "", detail: str = "") -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN_OF_A_KIND:
            self.kept.append(Finding(kind, clean_text(key)[:_MAX_KEY], clean_text(detail)[:_MAX_DETAIL]))

    def __bool__(self) -> bool:
        return bool(self.counts)


def as_lines(shards: Iterable[tuple[str, Findings]], remedies: Mapping[str, str]) -> list[str]:
    """A line for each finding, under its shard; then what to do about each kind."""
    lines: list[str] = []
    seen: Counter[str] = Counter()
    left_out = 0
    for shard_id, findings in shards:
        if not findings:
            continue
        seen.update(findings.counts)
        told: Counter[str] = Counter()
        for finding in findings.kept:
            told[finding.kind] += 1
            if len(lines) < MAX_LINES:
                lines.append(": ".join(filter(None, (shard_id, finding.kind, finding.key, finding.detail))))
            else:
                left_out += 1
        for kind, count in (findings.counts - told).items():
            if len(lines) < MAX_LINES:
                lines.append(f"{shard_id}: {kind}: and {count:,} more")
            else:
                left_out += count
    if left_out:
        lines.append(f"... and {left_out:,} more findings; --json tells more of them")
    lines += [f"what to do about {kind} ({seen[kind]:,}): {text}" for kind, text in remedies.items() if seen[kind]]
    return lines


def as_record(findings: Findings, remedies: Mapping[str, str]) -> dict[str, Any]:
    """One shard's findings as a JSON value."""
    return {
        "counts": dict(findings.counts.most_common()),
        "findings": [finding.as_record(remedies) for finding in findings.kept],
    }


Task = TypeVar("Task")
Result = TypeVar("Result")


def results_in_order(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """What ``work`` makes of each task, in their order.  InfrastructureError where a process is killed."""
    if workers < 2:
        yield from map(work, tasks)
        return
    # spawn: not a copy of this process's threads and locks
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool:
            raise InfrastructureError("a process was killed (out of memory?): try fewer --workers") from None
