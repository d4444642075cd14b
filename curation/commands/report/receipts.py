"""What the report needs from receipts beyond what ``status`` sums up: time, hosts, languages, and each shard's state.

Everything is a sum of limited size, so that a million receipts need no more memory than a thousand.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

import xxhash

from curation.commands.status.scan import StageCounts, attempt_seconds, whole
from curation.jsonio import clean_text

SLOWEST = 10  # shards that are named
MAX_NAMES = 2_000  # hosts, languages, phases, notes; the others are counted together
MAX_NAME = 80
MAX_SECONDS = 1e9  # a longer attempt is a wrong clock
OTHERS = "(others)"
STATES = ("done", "stale", "failed", "running", "pending")


@dataclass(slots=True)
class HostStats:
    """What one machine did.

    seconds: of its attempts, which may have run at the same time.
    """

    shards: int = 0
    failed: int = 0
    samples: int = 0
    seconds: float = 0.0

    def add(self, other: Self) -> None:
        self.shards += other.shards
        self.failed += other.failed
        self.samples += other.samples
        self.seconds += other.seconds


@dataclass(slots=True)
class GridCell:
    """Neighbouring shards, shown as one cell.

    first, last: of their ids.  seconds: of those that are done.
    """

    first: str
    last: str
    states: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest_s: float = 0.0

    def add(self, other: Self) -> None:
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.states.update(other.states)
        self.seconds += other.seconds
        self.slowest_s = max(self.slowest_s, other.slowest_s)


@dataclass(frozen=True, slots=True)
class ReceiptBounds:
    """shards_a_cell: how many neighbours are one cell.  chosen: how many shards have their samples read."""

    shards_a_cell: int
    chosen: int


def cell_of(shard_id: str, shards_a_cell: int) -> str:
    """Returns the name of the cell that a shard belongs to; names sort as the shards do."""
    if shards_a_cell == 1:
        return shard_id
    if shard_id.isdecimal() and shard_id.isascii():
        return f"{int(shard_id) // shards_a_cell:0{len(shard_id)}}"
    return "x" + xxhash.xxh3_64_hexdigest(shard_id.encode())[:2]


def choice_of(shard_id: str) -> int:
    """Returns the number by which shards are chosen, the lowest first: the same ones in every stage and every time."""
    return xxhash.xxh3_64_intdigest(shard_id.encode(), seed=7)


@dataclass(slots=True)
class ReceiptStats(StageCounts):
    """What the receipts of one stage add up to.

    phases: phase → seconds.  notes: whole numbers that the stage noted.  output_bytes: of the files that receipts name.
    slowest: a heap of (seconds, shard, host, samples).  chosen: a heap of (-choice, shard).
    epochs: version of the options → shards done under it.  codes: version of this software → shards.
    """

    bounds: ReceiptBounds = ReceiptBounds(1, 200)
    phases: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    epochs: Counter[int] = field(default_factory=Counter)
    warned: int = 0
    warnings: list[str] = field(default_factory=list)
    output_bytes: int = 0
    hosts: dict[str, HostStats] = field(default_factory=dict)
    cells: dict[str, GridCell] = field(default_factory=dict)
    slowest: list[tuple[float, str, str, int]] = field(default_factory=list)
    chosen: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Self) -> None:
        StageCounts.add(self, other)
        self.output_bytes += other.output_bytes
        self.warned += other.warned
        self.warnings = (self.warnings + other.warnings)[:5]
        self.epochs.update(other.epochs)
        for name in ("phases", "notes", "languages", "codes"):
            for key, number in getattr(other, name).items():
                _add_to(getattr(self, name), key, number)
        for name, host in other.hosts.items():
            self._host(name).add(host)
        for name, cell in other.cells.items():
            add_cell(self.cells, name, cell)
        self.slowest = heapq.nlargest(SLOWEST, self.slowest + other.slowest)
        self.chosen = heapq.nlargest(self.bounds.chosen, self.chosen + other.chosen)

    def add_done(self, shard_id: str, receipt: dict[str, Any], why_stale: str) -> None:
        StageCounts.add_done(self, shard_id, receipt, why_stale)
        counts, notes = receipt.get("counts"), receipt.get("notes")
        samples = whole(counts.get("in")) if isinstance(counts, dict) else 0
        seconds = seconds_of(receipt)
        self._see(shard_id, "stale" if why_stale else "done", seconds)
        host_name = name_of(receipt.get("host"))
        self._host(host_name).add(HostStats(1, 0, samples, seconds))
        keep_greatest(self.slowest, (seconds, shard_id, host_name, samples), SLOWEST)
        keep_greatest(self.chosen, (-choice_of(shard_id), shard_id), self.bounds.chosen)
        for phase, spent in _items(receipt.get("seconds")):
            if isinstance(spent, int | float) and not isinstance(spent, bool) and 0 <= spent < MAX_SECONDS:
                _add_to(self.phases, phase, spent)
        for note, value in _items(notes):
            _add_to(self.notes, note, whole(value))
        for language, number in _items(notes.get("languages") if isinstance(notes, dict) else None):
            _add_to(self.languages, language, whole(number))
        for output in receipt.get("outputs", ()):
            self.output_bytes += whole(output.get("size"))
        self.epochs[whole(receipt.get("epoch"))] += 1
        _add_to(self.codes, name_of(receipt.get("code")), 1)
        if warnings := receipt.get("warnings"):
            self.warned += 1
            if len(self.warnings) < 5:
                self.warnings.append(clean_text(str(warnings[0]))[:300])

    def add_failed(self, shard_id: str, receipt: dict[str, Any], max_attempts: int) -> None:
        StageCounts.add_failed(self, shard_id, receipt, max_attempts)
        self._see(shard_id, "failed", 0.0)
        self._host(name_of(receipt.get("host"))).add(HostStats(0, 1, 0, seconds_of(receipt)))

    def see(self, cell: GridCell) -> None:
        """Adds shards of one cell that are running or pending: they have no receipt that counts."""
        name = cell_of(cell.first, self.bounds.shards_a_cell)
        if name in self.cells and self.bounds.shards_a_cell == 1:  # one shard has one state: it is being done again
            self.cells[name].states = cell.states
        else:
            add_cell(self.cells, name, cell)

    def _host(self, name: str) -> HostStats:
        return self.hosts.setdefault(name if name in self.hosts or len(self.hosts) < MAX_NAMES else OTHERS, HostStats())

    def _see(self, shard_id: str, state: str, seconds: float) -> None:
        name = cell_of(shard_id, self.bounds.shards_a_cell)
        add_cell(self.cells, name, GridCell(shard_id, shard_id, Counter({state: 1}), seconds, seconds))


def add_cell(cells: dict[str, GridCell], name: str, cell: GridCell) -> None:
    if name in cells:
        cells[name].add(cell)
    else:
        cells[name] = cell


def merged(cells: dict[str, GridCell], at_most: int) -> list[GridCell]:
    """Returns the cells in the order of their shards; neighbours are merged where there are more than ``at_most``."""
    ordered = [cells[name] for name in sorted(cells)]
    width = -(-len(ordered) // at_most)
    if width < 2:
        return ordered
    together = []
    for start in range(0, len(ordered), width):
        cell = GridCell(ordered[start].first, ordered[start].last)
        for one in ordered[start : start + width]:
            cell.add(one)
        together.append(cell)
    return together


def seconds_of(receipt: dict[str, Any]) -> float:
    """Returns what an attempt took by its node's clock; 0 where the receipt does not say, or the clock was set back."""
    seconds = attempt_seconds(receipt)
    return seconds if seconds is not None and 0 <= seconds < MAX_SECONDS else 0.0


def name_of(value: Any) -> str:
    return clean_text(str(value))[:MAX_NAME] if value else "(unknown)"


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(name_of(name), number) for name, number in value.items()] if isinstance(value, dict) else []


def _add_to(tally: Counter[str], name: str, number: float) -> None:
    if number:
        tally[name if name in tally or len(tally) < MAX_NAMES else OTHERS] += number  # type: ignore[assignment]


def keep_greatest(heap: list[Any], item: Any, at_most: int) -> None:
    """Adds the item to a heap that holds the greatest ones only."""
    if len(heap) < at_most:
        heapq.heappush(heap, item)
    elif at_most and item > heap[0]:
        heapq.heapreplace(heap, item)
