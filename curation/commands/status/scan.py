"""Reads the receipts of all stages below a folder, a bucket at a time, in a few processes, and adds them up.

The receipts that the stages have of one shard are read together, so that stale ones are found by comparing receipts.
Only sums are kept; sums of parts can be added.  Nothing is written, and no file is hashed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self, TypeVar

import orjson

from curation.commands.places import StagePlace
from curation.errors import InfrastructureError
from curation.jsonio import clean_text
from curation.run.inputs import place_below, receipts_of, vouched_for
from curation.run.ledger import MAX_ATTEMPTS, OptionsVersion, done_receipts
from curation.run.planned import Plan
from curation.shards import LAYOUT_NOTE, bucket_of, id_of_record, is_safe_id, record_name
from curation.storage.files import MAX_RECEIPT_BYTES, read_record

_OPT_OUT_KINDS = ("robots", "tdmrep", "x_robots_tag")  # of stage 00
EXAMPLES = 5  # failed shards that are shown for each reason
WINDOW_S = 600.0  # over which the recent speed is measured, at least
_MAX_MESSAGE = 300
_MAX_PHASES = 20
_MAX_NAMES = 100  # of captions
_MADE = ("made", "reused", "adopted")  # how stage 05 came by a caption
_MAX_SECONDS = 1e9


def job_of(slurm: Any) -> str:
    """Returns the job that a receipt or a claim names, as sacct takes it: 41, or 40_7 of an array; empty for none."""
    if not isinstance(slurm, dict):
        return ""
    array_job, element = str(slurm.get("array_job_id", "")), str(slurm.get("array_task_id", ""))
    job = str(slurm.get("job_id", ""))
    if array_job.isdecimal() and element.isdecimal():
        return f"{array_job}_{element}"
    return job if job.isdecimal() else ""


@dataclass(slots=True)
class StageCounts:
    """Sums over the receipts of one stage: shards by their state, samples, and times.

    done: shards that are done and up to date.  stale: why (epoch, inputs, upstream) → shards that are done but not up
    to date.  failed, quarantined: reason → shards.  again: shards to be tried again.  untouched: planned shards without
    a receipt.  The last two leave out shards that a worker has claimed.  jobs: (reason, SLURM job) → failures.
    spent: phase → seconds, summed over threads.  opt_outs: kind of a site's rule → samples that one forbids.
    spans: when each finished attempt started and finished and how many samples it read, one after the other, in Unix
    time by the clocks of the nodes.
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
    spent: Counter[str] = field(default_factory=Counter)
    opt_outs: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spans: array[float] = field(default_factory=lambda: array("d"))

    def add(self, other: Self) -> None:
        self.done += other.done
        self.again += other.again
        self.untouched += other.untouched
        self.samples_in += other.samples_in
        self.kept += other.kept
        self.gpu_seconds += other.gpu_seconds
        for name in (
            "stale",
            "failed",
            "quarantined",
            "dropped",
            "samples_failed",
            "jobs",
            "spent",
            "opt_outs",
            "captions",
        ):
            getattr(self, name).update(getattr(other, name))
        self.unreadable = (self.unreadable + other.unreadable)[:EXAMPLES]
        self.spans.extend(other.spans)
        for reason, examples in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *examples][:EXAMPLES]

    def add_done(self, shard_id: str, receipt: dict[str, Any], why_stale: str) -> None:
        """Adds a shard that is done; ``why_stale`` is empty where it is up to date."""
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
            notes = receipt.get("notes")
            if isinstance(notes, dict):
                self.opt_outs.update({kind: whole(notes.get(f"opt_out_{kind}")) for kind in _OPT_OUT_KINDS})
                self._add_captions(notes.get("captions"))
            self._add_phases(receipt.get("seconds"))
            if self._add_time(receipt):
                self.spans.extend((receipt["started"], receipt["finished"], count))

    def add_failed(self, shard_id: str, receipt: dict[str, Any], max_attempts: int) -> None:
        error = receipt.get("error")
        error = error if isinstance(error, dict) else {}
        reason = clean_text(str(error.get("reason", "unknown"))[:100])
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

    def _add_captions(self, by_name: Any) -> None:
        for name, number in islice(by_name.items(), _MAX_NAMES) if isinstance(by_name, dict) else ():
            told = clean_text(str(name)[:100])
            made = [number.get(how) for how in _MADE] if isinstance(number, dict) else [number]  # stage 05's, or 04's
            if told in self.captions or len(self.captions) < _MAX_NAMES:
                self.captions[told] += sum(map(whole, made))

    def _add_phases(self, seconds: Any) -> None:
        for phase, spent in islice(seconds.items(), _MAX_PHASES) if isinstance(seconds, dict) else ():
            known = phase in self.spent or len(self.spent) < _MAX_PHASES
            if known and type(spent) in (int, float) and 0 <= spent < _MAX_SECONDS:
                self.spent[phase] += spent

    def _add_time(self, receipt: dict[str, Any]) -> bool:
        """Adds the seconds of a GPU; returns whether the receipt says how long the attempt took."""
        seconds = attempt_seconds(receipt)
        if seconds is not None and receipt.get("gpu") is not None:
            self.gpu_seconds += max(0.0, seconds)
        return seconds is not None and seconds >= 0


def attempt_seconds(receipt: dict[str, Any]) -> float | None:
    """Returns what an attempt took by its node's clock, which may be negative; None where the receipt does not say."""
    started, finished = receipt.get("started"), receipt.get("finished")
    if not (isinstance(started, int | float) and isinstance(finished, int | float)):
        return None
    return float(finished - started)


def covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Returns how long at least one of the spans (from, to) was under way.

    Nothing was under way before beginning number ``n`` where all ``n`` earlier ones had ended: beginnings and ends are
    sorted apart, in a third of the memory of the spans as tuples.
    """
    began, ended = array("d"), array("d")
    for start, end in spans:
        if start <= end:
            began.append(start)
            ended.append(end)
    if not began:
        return 0.0
    began, ended = array("d", sorted(began)), array("d", sorted(ended))
    pauses = sum(max(0.0, start - end) for start, end in zip(islice(began, 1, None), ended, strict=False))
    return ended[-1] - began[0] - pauses


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """How fast a stage is; None where the receipts do not say.

    samples_per_s: over the time in which at least one shard was worked on.  recent, shards_per_s: samples and shards a
    second that were finished in the last ``window_s`` before the last receipt.
    """

    samples_per_s: float | None = None
    recent: float | None = None
    shards_per_s: float | None = None
    window_s: float = WINDOW_S


def speed(spans: array[float]) -> StageSpeed:
    """Returns the speed by the times of the attempts, as ``StageCounts.spans`` has them."""
    started, finished, samples = spans[0::3], spans[1::3], spans[2::3]
    if not started:
        return StageSpeed()
    covered = covered_seconds(zip(started, finished, strict=True))
    last = max(finished)
    mean_s = (sum(finished) - sum(started)) / len(started)
    window_s = min(max(WINDOW_S, 2 * mean_s), last - min(started))
    within = [count for end, count in zip(finished, samples, strict=True) if end > last - window_s]
    if covered <= 0 or window_s <= 0:
        return StageSpeed()
    return StageSpeed(sum(samples) / covered, sum(within) / window_s, len(within) / window_s, window_s)


def _jobs_of_failure(receipt: dict[str, Any], error: dict[str, Any]) -> list[str]:
    """Returns the jobs of the workers that died on the shard, or the job of the worker that failed it."""
    deaths = error.get("deaths")
    slurm = [d.get("slurm") for d in deaths if isinstance(d, dict)] if isinstance(deaths, list) else []
    return [job for ids in slurm or [receipt.get("slurm")] if (job := job_of(ids))][:16]


def whole(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


MAX_PROCESSES = 8  # a shared filesystem answers several at once, but others use the login node too
_BUCKETS_A_PROCESS = 4  # a process is not worth starting for fewer
_READ_BYTES = 256 << 10
_MOST_ELSEWHERE = 20  # stages that are not below the folder


@dataclass(slots=True)
class ScannedStage:
    """A stage whose receipts are read.

    planned: bucket → shard ids; None where no run has left its plan.  sources: the stage and the folder, relative to
    the output, of what the planned shards are made from.  claimed: shards on which a worker has a claim.
    """

    place: StagePlace
    epochs: list[OptionsVersion]
    planned: dict[str, set[str]] | None
    sources: set[tuple[str, str]] = field(default_factory=set)
    claimed: set[str] = field(default_factory=set)

    def governing(self, shard_id: str) -> int:
        return next((e.number for e in reversed(self.epochs) if e.covers(shard_id)), 1)


@dataclass(slots=True)
class _ScannedReceipt:
    """A shard's receipt in one stage, and why it is stale: None while that is not known."""

    receipt: dict[str, Any]
    why: str | None = None


AnyStageCounts = TypeVar("AnyStageCounts", bound=StageCounts)

# What is known of a shard: of each stage with a receipt its number, why it is stale, the receipt (None: unreadable).
_Looked = list[tuple[int, str, dict[str, Any] | None]]
_COUNTED = ("status", "counts", "started", "finished", "gpu", "seconds", "attempts", "slurm", "host")


@dataclass(slots=True)
class Memory:
    """What ``status --watch`` keeps of the receipts that it has read, so that it reads each of them once.

    shards: bucket → shard → (the inodes of its receipts, what is known of it, as JSON).  A commit renames a new file
    into place, so that a new receipt has another inode.  basis: the stages and options versions under which that holds.
    """

    shards: dict[str, dict[str, tuple[tuple[int, ...], bytes]]] = field(default_factory=dict)
    basis: object = None


def _packed(looked: _Looked) -> bytes:
    """The little of each receipt that is counted."""
    kept = []
    for number, why, receipt in looked:
        if receipt is not None:
            error = receipt.get("error")
            receipt = {name: receipt[name] for name in _COUNTED if name in receipt}
            if isinstance(error, dict):
                short = {**error, "message": str(error.get("message", ""))[:_MAX_MESSAGE], "traceback": ""}
                receipt["error"] = short
        kept.append((number, why, receipt))
    return orjson.dumps(kept)


class ReceiptScan:
    """The stages below a folder, and what their receipts add up to."""

    def __init__(self, places: Sequence[StagePlace], memory: Memory | None = None) -> None:
        """memory: what an earlier scan has read; it is brought up to date by ``read``."""
        self._memory = memory
        self.warnings: list[str] = []
        self.stages = [ScannedStage(place, self._epochs(place), *self._planned(place)) for place in places]
        self._index = {str(place.receipts): number for number, place in enumerate(places)}
        self._all = [*self.stages]  # and those that are elsewhere and made what these read
        self._files: dict[str, dict[str, Any]] = {}  # what many shards read, as it is now
        self._find_those_elsewhere()
        self._origins: dict[tuple[int, str, str], tuple[int | None, str]] = {}
        self._upstream = [self._upstream_of(number) for number in range(len(self.stages))]

    def read(self, new_counts: Callable[[], AnyStageCounts]) -> list[AnyStageCounts]:
        """Returns the sums of each stage, in the order of ``stages``.

        Args:
            new_counts: Makes an empty sum.  A command that needs more than ``StageCounts`` holds has a subclass of it.

        Raises:
            InfrastructureError: A process that reads receipts was killed.
        """
        names = {name for stage in self.stages for name in _buckets(stage.place.receipts)}
        names |= {name for stage in self.stages for name in stage.planned or ()}
        buckets = sorted(names)
        wanted = min(MAX_PROCESSES, max(2, os.cpu_count() or 1), len(buckets) // _BUCKETS_A_PROCESS)
        if self._remembers() or wanted < 2:
            return self._read(buckets, new_counts)
        context = multiprocessing.get_context("fork")  # the processes inherit what was read so far
        readers = []
        for number in range(wanted):
            mine, theirs = context.Pipe(duplex=False)
            mission = (buckets[number::wanted], new_counts, theirs)
            process = context.Process(target=self._tell, args=mission, daemon=True)
            process.start()
            theirs.close()
            readers.append((process, mine))
        total = [new_counts() for _ in self.stages]
        for process, pipe in readers:
            try:
                part = pipe.recv()
            except EOFError:
                raise InfrastructureError("a process that reads receipts was killed") from None
            process.join()
            if isinstance(part, str):
                raise InfrastructureError(part)
            sums, remembered = part
            if self._memory is not None:
                self._memory.shards.update(remembered)
            for sum_, counts in zip(total, sums, strict=True):
                sum_.add(counts)
        return total

    def _remembers(self) -> bool:
        """Whether most receipts were read before.  What was read under other options says nothing any more."""
        if self._memory is None:
            return False
        basis = [(stage.place, [(e.number, e.shards) for e in stage.epochs]) for stage in self._all]
        if self._memory.basis != basis:
            self._memory.basis, self._memory.shards = basis, {}
        return bool(self._memory.shards)

    def waits_for(self, number: int) -> list[int]:
        """Returns the stages that make what a stage reads, as far as they are below the folder."""
        return self._upstream[number]

    def _tell(self, buckets: list[str], new_counts: Callable[[], AnyStageCounts], pipe: Connection) -> None:
        try:
            counts = self._read(buckets, new_counts)
            pipe.send((counts, {} if self._memory is None else self._memory.shards))
        except InfrastructureError as error:
            pipe.send(str(error))

    def _read(self, buckets: Sequence[str], new_counts: Callable[[], AnyStageCounts]) -> list[AnyStageCounts]:
        total = [new_counts() for _ in self.stages]
        for bucket in buckets:
            self._read_bucket(bucket, total)
        return total

    def _read_bucket(self, bucket: str, total: Sequence[StageCounts]) -> None:
        with contextlib.ExitStack() as stack:
            folders: list[int | None] = []
            inodes: list[dict[str, int]] = []
            for stage in self._all:
                folder = _open_folder(stage.place.receipts / bucket)
                if folder is not None:
                    stack.callback(os.close, folder)
                folders.append(folder)
                inodes.append({} if folder is None else _receipt_inodes(folder))
            done: list[set[str]] = [set() for _ in self.stages]
            before = {} if self._memory is None else self._memory.shards.get(bucket, {})
            after: dict[str, tuple[tuple[int, ...], bytes]] = {}
            for shard_id in set[str]().union(*inodes[: len(self.stages)]):
                signature = tuple(known.get(shard_id, 0) for known in inodes)
                kept = before.get(shard_id)
                if kept is not None and kept[0] == signature:
                    looked: _Looked = orjson.loads(kept[1])
                else:
                    looked = self._look_at(shard_id, folders, signature)
                    kept = None
                if self._memory is not None:
                    after[shard_id] = kept or (signature, _packed(looked))
                self._count(bucket, shard_id, looked, total, done)
            if self._memory is not None:
                self._memory.shards[bucket] = after
            for number, stage in enumerate(self.stages):
                expected = (stage.planned or {}).get(bucket, set())
                if upstream := self._upstream[number]:  # also those that a run with --shards left out
                    expected = expected | set.intersection(*(done[before_it] for before_it in upstream))
                total[number].untouched += len(expected - inodes[number].keys() - stage.claimed)

    def _look_at(self, shard_id: str, folders: Sequence[int | None], inodes: Sequence[int]) -> _Looked:
        """Reads the receipts that the stages have of one shard."""
        seen: dict[int, _ScannedReceipt] = {}
        looked: _Looked = []
        for number, folder in enumerate(folders):
            if folder is not None and inodes[number]:
                receipt = _read_receipt(folder, f"{record_name(shard_id)}.json")
                if receipt is None:
                    looked.append((number, "", None))
                else:
                    seen[number] = _ScannedReceipt(receipt)
        for number, this in seen.items():
            if number >= len(self.stages):
                continue
            try:
                why = self._why_stale(number, shard_id, seen) if this.receipt.get("status") == "done" else ""
            except (TypeError, ValueError, KeyError, AttributeError):  # not a receipt that a stage has written
                looked.append((number, "", None))
            else:
                looked.append((number, why, this.receipt))
        return looked

    def _count(
        self, bucket: str, shard_id: str, looked: _Looked, total: Sequence[StageCounts], done: Sequence[set[str]]
    ) -> None:
        for number, why, receipt in looked:
            counts = total[number]
            try:
                if receipt is None:
                    raise ValueError("not a receipt")
                status = receipt.get("status")
                if status == "done":
                    done[number].add(shard_id)
                    counts.add_done(shard_id, receipt, why)
                elif status == "failed":
                    counts.add_failed(shard_id, receipt, MAX_ATTEMPTS)
                elif shard_id not in self.stages[number].claimed:
                    counts.again += 1
            except (TypeError, ValueError, KeyError, AttributeError):  # not a receipt that a stage has written
                counts.unreadable.append(str(self.stages[number].place.receipts / bucket / record_name(shard_id)))

    def _why_stale(self, number: int, shard_id: str, seen: dict[int, _ScannedReceipt]) -> str:
        """Returns why a shard that is done is stale: ``epoch`` | ``inputs`` | ``upstream``; empty where it is not."""
        this = seen[number]
        if this.why is None:
            this.why = ""  # in case stages read each other's outputs in a circle
            this.why = self._find_why(number, shard_id, this.receipt, seen)
        return this.why

    def _find_why(self, number: int, shard_id: str, receipt: dict[str, Any], seen: dict[int, _ScannedReceipt]) -> str:
        if receipt.get("epoch") != self._all[number].governing(shard_id):
            return "epoch"
        if LAYOUT_NOTE in receipt.get("notes", {}):  # made from several shards, whose receipts are not read together
            return ""
        why = ""
        for record, source in zip(receipt.get("inputs", ()), receipt.get("sources", ()), strict=False):
            if "stage" not in source:
                if self._has_changed(number, shard_id, record, source):
                    return "inputs"
                continue
            upstream, folder = self._origin(number, source["stage"], source["folder"])
            if upstream is None:  # that stage has left no receipts: its files were made elsewhere
                if self._has_changed(number, shard_id, record, source):
                    return "inputs"
                continue
            if upstream == number:
                continue
            theirs = seen.get(upstream)
            if theirs is None or theirs.receipt.get("status") != "done":
                return "inputs"
            home = str(self._all[upstream].place.home)
            name, absent = f"{place_below(source, shard_id)}{record['path']}", record.get("absent") is True
            now = vouched_for(
                f"{folder}/{name.rstrip('/')}",
                home,
                theirs.receipt["outputs"],
                loose=absent or name.endswith("/"),
            )
            if now != (None if absent else record):
                return "inputs"
            if self._why_stale(upstream, shard_id, seen):
                why = "upstream"
        return why

    def _has_changed(self, number: int, shard_id: str, record: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
        """Whether a file that no receipt records is another one now, as the stage's next run would find it.

        Source shards, what was made elsewhere, tables of captions, subsets and lists of rejects count by size and time.
        """
        folder, name = source.get("folder"), record.get("path")
        if not (isinstance(folder, str) and isinstance(name, str)) or "\0" in folder + name:
            return False
        below = place_below(source, shard_id) if "stage" in source else ""
        path = os.path.join(self._all[number].place.home, folder, f"{below}{name.rstrip('/')}")
        now = self._files.get(path) or _as_it_is(path, name)
        if name.partition(".")[0] != os.path.basename(shard_id).partition(".")[0]:  # many shards read it
            self._files[path] = now
        is_optional = "_rejects" in folder.split("/")
        if "absent" in now and not is_optional:  # perhaps it cannot be seen from here; a run would be blocked
            return False
        return now != record

    def _find_those_elsewhere(self) -> None:
        """Add the stages that are not below the folder, and whose outputs stages there have read."""
        number = 0
        while number < len(self._all) < len(self.stages) + _MOST_ELSEWHERE:
            stage = self._all[number]
            named = set(stage.sources)
            for receipt in islice(done_receipts(stage.place.home, stage.place.stage), 1):
                with contextlib.suppress(TypeError, KeyError, AttributeError):  # no receipt that a stage has written
                    named |= {(s["stage"], s["folder"]) for s in receipt["sources"] if "stage" in s}
            for name, folder in sorted(named):
                receipts = receipts_of(Path(os.path.realpath(stage.place.home / folder)), name)
                real = None if receipts is None else os.path.realpath(receipts)
                if real is not None and real not in self._index:
                    self._index[real] = len(self._all)
                    place = StagePlace(name, Path(real).parent.parent)
                    self._all.append(ScannedStage(place, self._epochs(place), None, self._planned(place)[1]))
            number += 1

    def _origin(self, number: int, stage: str, folder: str) -> tuple[int | None, str]:
        """Returns the number of the stage that wrote the inputs in ``folder``, and the folder's real path."""
        key = (number, stage, folder)
        if key not in self._origins:
            real = os.path.realpath(self._all[number].place.home / folder)
            receipts = receipts_of(Path(real), stage)
            place = None if receipts is None else self._index.get(os.path.realpath(receipts))
            self._origins[key] = (place, real)
        return self._origins[key]

    def _upstream_of(self, number: int) -> list[int]:
        """Returns the stages that make what a stage reads, as far as they are below the folder that is read.

        None for shards of another size, which have other ids than those that they are made from.
        """
        sources = self.stages[number].sources
        if any(folder.startswith("_") for _, folder in sources):  # the index of such shards
            return []
        if not sources:
            return self._maker_of_files(number)
        found = {self._origin(number, stage, folder)[0] for stage, folder in sources}
        return sorted(place for place in found if place is not None and place != number and place < len(self.stages))

    def _maker_of_files(self, number: int) -> list[int]:
        """Returns the stage that published the very file from which a stage made one of its shards, if there is one.

        Source shards count by size and time, and no receipt says who made them.
        """
        for receipt in islice(done_receipts(self.stages[number].place.home, self.stages[number].place.stage), 1):
            shard_id, inputs = str(receipt.get("shard")), receipt.get("inputs")
            for other, stage in enumerate(self.stages):
                theirs = stage.place.done_receipt(shard_id) if other != number and is_safe_id(shard_id) else None
                for output in theirs.get("outputs", ()) if theirs is not None else ():
                    with contextlib.suppress(OSError, TypeError, KeyError):
                        path = stage.place.home / output["path"]
                        found = {"path": path.name, "size": (is_ := path.stat()).st_size, "mtime_ns": is_.st_mtime_ns}
                        if isinstance(inputs, list) and found in inputs:
                            return [other]
        return []

    def _epochs(self, place: StagePlace) -> list[OptionsVersion]:
        epochs: list[OptionsVersion] = []
        while (path := place.receipts / f"_epoch.{len(epochs) + 1}.json").exists():
            record = read_record(path)
            if record is None:
                self.warnings.append(f"{path}: not a record of options")
                break
            epochs.append(OptionsVersion.from_record(len(epochs) + 1, record))
        return epochs

    def _planned(self, place: StagePlace) -> tuple[dict[str, set[str]] | None, set[tuple[str, str]]]:
        """Returns the shards that the runs of a stage planned to do, by bucket, and what they are made from."""
        found: dict[str, set[str]] = {}
        plan = Plan(place.home, place.stage, self.warnings.append)
        plan.look()
        for shard_id in plan.ids:
            found.setdefault(bucket_of(shard_id), set()).add(shard_id)
        return found or None, plan.sources


def _as_it_is(path: str, name: str) -> dict[str, Any]:
    """What a receipt would record of a file that no receipt records; nothing where it cannot be seen from here."""
    try:
        found = os.stat(path)
    except OSError:
        return {"path": name, "absent": True}
    return {"path": name, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _buckets(receipts: Path) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(receipts) as entries:
        for entry in entries:
            if not entry.name.startswith(("_", ".")) and entry.is_dir():
                yield entry.name


def _open_folder(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None


def _receipt_inodes(folder: int) -> dict[str, int]:
    """Returns shard → the inode of its receipt."""
    with os.scandir(folder) as entries:
        return {id_of_record(e.name[:-5]): e.inode() for e in entries if e.name.endswith(".json") and e.name[0] != "."}


def _read_receipt(folder: int, name: str) -> dict[str, Any] | None:
    try:
        descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
        try:
            data = block = os.read(descriptor, _READ_BYTES)
            while len(block) == _READ_BYTES and len(data) < MAX_RECEIPT_BYTES:
                data += (block := os.read(descriptor, _READ_BYTES))
        finally:
            os.close(descriptor)
        value = orjson.loads(data)
    except (OSError, orjson.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
