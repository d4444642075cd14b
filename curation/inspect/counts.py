"""What the receipts of one stage add up to; sums of parts can be added again."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

EXAMPLES = 5  # failed shards that are told of for each reason
WINDOW_S = 600.0  # "in the last while", at least
_MAX_MESSAGE = 300


def job_of(slurm: Any) -> str:
    """The SLURM job that a receipt or a claim names, as sacct takes it: 41, or 40_7 of an array; empty for none."""
    if not isinstance(slurm, dict):
        return ""
    array_job, element = str(slurm.get("array_job_id", "")), str(slurm.get("array_task_id", ""))
    job = str(slurm.get("job_id", ""))
    if array_job.isdecimal() and element.isdecimal():
        return f"{array_job}_{element}"
    return job if job.isdecimal() else ""


@dataclass(slots=True)
class Counts:
    """Shards by what they are, samples and times of one stage.

    done: shards that are done and up to date; stale: done, but not up to date, by why (epoch, inputs, upstream).
    failed, quarantined: by reason.  again: to be tried again; untouched: planned, without a receipt.  Neither counts
    shards that a worker has claimed.  jobs: (reason, SLURM job) of failures.  spans: started, finished and samples in
    of each attempt that was done, one after the other, Unix times by the clocks of their nodes.
    """

    done: int = 0
    stale: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    again: int = 0
    untouched: int = 0
    unreadable: list[str] = field(default_factory=list)
    samples_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    samples_failed: Counter[str] = field(default_factory=Counter)
    gpu_seconds: float = 0.0
    jobs: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spans: array[float] = field(default_factory=lambda: array("d"))

    def add(self, other: Self) -> None:
        self.done += other.done
        self.again += other.again
        self.untouched += other.untouched
        self.samples_in += other.samples_in
        self.kept += other.kept
        self.gpu_seconds += other.gpu_seconds
        for name in ("stale", "failed", "quarantined", "dropped", "samples_failed", "jobs"):
            getattr(self, name).update(getattr(other, name))
        self.unreadable = (self.unreadable + other.unreadable)[:EXAMPLES]
        self.spans.extend(other.spans)
        for reason, examples in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *examples][:EXAMPLES]

    def add_done(self, shard_id: str, receipt: dict[str, Any], why_stale: str) -> None:
        """A shard that is done; ``why_stale`` is empty where it is up to date."""
        if why_stale:
            self.stale[why_stale] += 1
        else:
            self.done += 1
        counts = receipt.get("counts")
        if isinstance(counts, dict):
            self.samples_in += (count := whole(counts.get("in")))
            self.kept += whole(counts.get("kept"))
            for tally, name in ((self.dropped, "dropped"), (self.samples_failed, "failed")):
                reasons = counts.get(name)
                if reasons and isinstance(reasons, dict):
                    for reason, number in reasons.items():
                        tally[reason] += whole(number)
            seconds = self._add_time(receipt)
            if seconds >= 0:
                self.spans.extend((receipt["started"], receipt["finished"], count))

    def add_failed(self, shard_id: str, receipt: dict[str, Any], max_attempts: int) -> None:
        error = receipt.get("error")
        error = error if isinstance(error, dict) else {}
        reason = str(error.get("reason", "unknown"))[:100]
        held = whole(receipt.get("attempts")) >= max_attempts
        (self.quarantined if held else self.failed)[reason] += 1
        self._add_time(receipt)
        jobs = _jobs_of_failure(receipt, error)
        self.jobs.update((reason, job) for job in jobs)
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            message = str(error.get("message", ""))[:_MAX_MESSAGE]
            examples.append(
                {"shard": shard_id, "reason": reason, "message": message, "host": str(receipt.get("host", "")),
                 "jobs": jobs, "quarantined": held}
            )  # fmt: skip

    def _add_time(self, receipt: dict[str, Any]) -> float:
        """The attempt's seconds, negative where the receipt does not say."""
        started, finished = receipt.get("started"), receipt.get("finished")
        if not (isinstance(started, int | float) and isinstance(finished, int | float)):
            return -1.0
        if receipt.get("gpu") is not None:
            self.gpu_seconds += max(0.0, finished - started)
        return float(finished - started)


@dataclass(frozen=True, slots=True)
class Speed:
    """samples_per_s: over the time in which at least one shard was worked on; recent: of what was finished in the last
    ``window_s`` before the last receipt; shards_per_s: likewise.  None where the receipts do not tell."""

    samples_per_s: float | None = None
    recent: float | None = None
    shards_per_s: float | None = None
    window_s: float = WINDOW_S


def speed(spans: array[float]) -> Speed:
    """From the times of the attempts that were done."""
    rows = sorted(zip(spans[0::3], spans[1::3], spans[2::3], strict=True))
    if not rows:
        return Speed()
    covered, until, last = 0.0, rows[0][0], 0.0
    for started, finished, _ in rows:
        if finished > until:
            covered += finished - max(started, until)
            until = finished
    last = until
    mean_s = sum(finished - started for started, finished, _ in rows) / len(rows)
    window_s = min(max(WINDOW_S, 2 * mean_s), last - rows[0][0])
    within = [samples for _, finished, samples in rows if finished > last - window_s]
    total = sum(samples for _, _, samples in rows)
    if covered <= 0 or window_s <= 0:
        return Speed()
    return Speed(total / covered, sum(within) / window_s, len(within) / window_s, window_s)


def _jobs_of_failure(receipt: dict[str, Any], error: dict[str, Any]) -> list[str]:
    """The jobs of the workers that died on the shard, or that of the worker that failed it."""
    deaths = error.get("deaths")
    slurm = [d.get("slurm") for d in deaths if isinstance(d, dict)] if isinstance(deaths, list) else []
    return [job for ids in slurm or [receipt.get("slurm")] if (job := job_of(ids))][:16]


def whole(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0
