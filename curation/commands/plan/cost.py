"""What a stage costs by the receipts of finished shards, and what that says about the other shards.

The cost is worker time, devices, bytes, files and tokens; the forecast is a ratio estimate with its error.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from curation.commands.places import StagePlace
from curation.commands.status.scan import covered_seconds
from curation.errors import UsageError
from curation.shards import Shard, bucket_of, files_of, id_of_record

# The 97.5 % quantile of Student's t by degrees of freedom; t_quantile approximates those beyond the table.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Estimate:
    """A sum and half the width of its 95 % interval.

    error: None where only one shard was measured.
    """

    value: float
    error: float | None = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        """Adds a sum whose error is independent of this one's."""
        if self.error is None or other.error is None:
            return Estimate(self.value + other.value, None)
        return Estimate(self.value + other.value, math.hypot(self.error, other.error))

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, None if self.error is None else self.error * abs(factor))


def ratio_estimate(sizes: Sequence[float], values: Sequence[float], rest: float, rest_count: int) -> Estimate:
    """Estimates the sum of a quantity over the shards that were not measured, from those that were.

    This is the classical ratio estimator with its finite population correction: W. G. Cochran, Sampling Techniques
    (1977), chapter 6.

    Args:
        sizes: The size of each measured shard.
        values: The quantity of each measured shard; it is assumed to grow with the size.
        rest: The sum of the sizes of the other shards.
        rest_count: How many other shards there are.

    Raises:
        ValueError: No shard was measured, and there are others.
    """
    n = len(sizes)
    measured = sum(sizes)
    if rest_count == 0:
        return Estimate(0.0)
    if n == 0:
        raise ValueError("nothing was measured")
    ratio = sum(values) / measured if measured else 0.0
    value = ratio * rest
    if n == 1:
        return Estimate(value, None)
    deviation = sum((y - ratio * x) ** 2 for x, y in zip(sizes, values, strict=True)) / (n - 1)
    # the mean over the rest has the error of the sample's mean, and its own scatter around the ratio
    scale = rest / (measured / n) if measured else float(rest_count)
    variance = scale**2 * deviation / n + rest_count * deviation
    return Estimate(value, t_quantile(n - 1) * math.sqrt(variance))


def t_quantile(degrees: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    return 1.96 + 2.4 / degrees


MAX_RECEIPTS = 2_000  # of one stage that are read, evenly spaced; more would not make the error smaller
MAX_SIZES = 20_000  # source shards whose size is looked up, evenly spaced
MIN_STEADY = 2  # that were not a worker's first: the rate is taken from them alone where there are so many
QUANTITIES = ("worker_s", "bytes", "files", "tokens_read", "tokens_written", "samples")


@dataclass(frozen=True, slots=True)
class ShardSizes:
    """Sizes of the source shards in bytes; ``mean`` stands for those that were not looked up."""

    known: Mapping[str, int]
    count: int
    mean: float

    def of(self, shard_id: str) -> float:
        return self.known.get(shard_id, self.mean)

    @property
    def total(self) -> float:
        return sum(self.known.values()) + self.mean * (self.count - len(self.known))


def sizes_of(shards: Sequence[Shard]) -> ShardSizes:
    """Looks up the sizes of the shards.

    Raises:
        UsageError: A shard is not there, or cannot be read.
    """
    known = {}
    for shard_id, path in files_of(evenly(shards, MAX_SIZES)).items():
        try:
            known[shard_id] = os.stat(path).st_size
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    return ShardSizes(known, len(shards), mean(known.values()) if known else 0.0)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Returns at most ``count`` of the items, spread evenly over all of them, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]


@dataclass(slots=True)
class StageCost:
    """What the measured shards of one stage cost, and what all of its shards will cost.

    measured: quantity → a value for each measured shard.  cpus, gpus: of one worker.
    open_s: the seconds that a worker needs to get ready, and those that its first shard takes longer than others.
    steady: indices of the measured shards that were not a worker's first; of all shards where those are too few.
    left: how many shards are to do.  reads_source: whether the stage reads the source shards themselves.
    spent, to_come: quantity → what the finished shards cost, and the estimate for the others.
    """

    stage: str
    place: StagePlace
    done: int
    left: int
    shards: list[str] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=dict)
    steady: list[int] = field(default_factory=list)
    cpus: float = 1.0
    gpus: float = 0.0
    open_s: float = 0.0
    reads_source: bool = False
    spent: dict[str, Estimate] = field(default_factory=dict)
    to_come: dict[str, Estimate] = field(default_factory=dict)

    def whole(self, quantity: str) -> Estimate:
        return self.spent[quantity] + self.to_come[quantity]


def stage_cost(place: StagePlace, shards: Sequence[Shard], sizes: ShardSizes) -> StageCost | None:
    """Returns what the stage's receipts say about ``shards``; None where no shard is done."""
    ids = {shard.id for shard in shards}
    there = sorted(ids & _with_receipts(place, ids))
    receipts = {}
    for shard_id in evenly(there, MAX_RECEIPTS):
        if (receipt := place.done_receipt(shard_id)) is not None:
            receipts[shard_id] = receipt
    if not receipts:
        return None
    done = len(receipts) if len(there) <= MAX_RECEIPTS else round(len(there) * len(receipts) / MAX_RECEIPTS)
    cost = StageCost(place.stage, place, done, len(shards) - done)
    cost.shards = list(receipts)
    worker_s, first = _worker_seconds(receipts)
    values = {shard_id: _values(receipt) for shard_id, receipt in receipts.items()}
    for quantity in QUANTITIES:
        cost.measured[quantity] = [
            worker_s[shard_id] if quantity == "worker_s" else values[shard_id][quantity] for shard_id in receipts
        ]
    cost.cpus = mean(_number(receipt.get("cpus"), 1) for receipt in receipts.values())
    cost.gpus = mean(receipt.get("gpu") is not None for receipt in receipts.values())
    cost.open_s = mean(_number(receipt.get("open_s"), 0) for receipt in receipts.values())
    cost.reads_source = any(
        isinstance(source, dict) and "stage" not in source
        for receipt in receipts.values()
        for source in _listed(receipt, "sources")
    )
    cost.steady = [place for place, shard_id in enumerate(cost.shards) if shard_id not in first]
    if len(cost.steady) < MIN_STEADY:
        cost.steady = list(range(len(cost.shards)))
    _extrapolate(cost, sizes)
    return cost


def _extrapolate(cost: StageCost, sizes: ShardSizes) -> None:
    measured = [sizes.of(shard_id) for shard_id in cost.shards]
    cost.open_s += _warm_up(cost, measured)
    unread = cost.done - len(cost.shards)  # shards that are done but whose receipts were not read
    rest_bytes = max(0.0, sizes.total - sum(measured))
    others = cost.left + unread
    for quantity, values in cost.measured.items():
        places = cost.steady if quantity == "worker_s" else range(len(values))
        per_other = ratio_estimate(
            [measured[place] for place in places], [values[place] for place in places], rest_bytes, others
        )
        share = cost.left / others if others else 0.0
        cost.spent[quantity] = Estimate(sum(values)) + per_other.times(1 - share)
        cost.to_come[quantity] = per_other.times(share)


def _warm_up(cost: StageCost, sizes: Sequence[float]) -> float:
    """Returns the seconds that a first shard took longer than its size explains: first calls choose kernels."""
    seconds = cost.measured["worker_s"]
    first = sorted(set(range(len(seconds))) - set(cost.steady))
    size = sum(sizes[place] for place in cost.steady)
    if not first or not size:
        return 0.0
    rate = sum(seconds[place] for place in cost.steady) / size
    return mean(max(0.0, seconds[place] - rate * sizes[place]) for place in first)


def _worker_seconds(receipts: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], set[str]]:
    """Returns the wall-clock seconds of one worker for each shard, and the shards that were a worker's first.

    A worker that does several shards at once is busy for the union of their times.  Each shard gets a part of that in
    proportion to its own time.
    """
    spans: dict[tuple[str, ...], list[tuple[float, float, str]]] = defaultdict(list)
    for shard_id, receipt in receipts.items():
        worker = tuple(str(receipt.get(name)) for name in ("host", "rank", "run", "slurm"))
        began, ended = _number(receipt.get("started"), 0), _number(receipt.get("finished"), 0)
        spans[worker].append((began, max(began, ended), shard_id))
    seconds, first = {}, set()
    for of_worker in spans.values():
        first.add(min(of_worker)[2])
        busy = covered_seconds((began, ended) for began, ended, _ in of_worker)
        lengths = sum(ended - began for began, ended, _ in of_worker)
        for began, ended, shard_id in of_worker:
            seconds[shard_id] = (ended - began) * (busy / lengths if lengths else 0.0)
    return seconds, first


def _values(receipt: Mapping[str, Any]) -> dict[str, float]:
    named = [output for output in _listed(receipt, "outputs") if isinstance(output, dict)]
    notes, counts = receipt.get("notes"), receipt.get("counts")
    tokens = notes.get("tokens") if isinstance(notes, dict) else None
    tokens = tokens if isinstance(tokens, dict) else {}
    return {
        "bytes": sum(_number(output.get("size"), 0) for output in named),
        "files": len(named) + 1,  # and the receipt
        "tokens_read": _number(tokens.get("read"), 0),
        "tokens_written": _number(tokens.get("written"), 0),
        "samples": _number(counts.get("in") if isinstance(counts, dict) else None, 0),
    }


def _with_receipts(place: StagePlace, ids: set[str]) -> set[str]:
    found: set[str] = set()
    for bucket in sorted({bucket_of(shard_id) for shard_id in ids}):
        try:
            names = os.listdir(place.receipts / bucket)
            found.update(id_of_record(name[:-5]) for name in names if name.endswith(".json"))
        except OSError:  # no shard of it has been done
            continue
    return found


def _listed(receipt: Mapping[str, Any], name: str) -> list[Any]:
    value = receipt.get(name)
    return value if isinstance(value, list) else []


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else otherwise
