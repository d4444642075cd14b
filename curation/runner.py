"""The only loop over shards: find what is pending, claim it, have the stage work on it, commit, go on.

Any number of processes on any number of nodes run this loop over the same folders, and more may join at any time.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import xxhash

from curation.claims import Claim, Claims
from curation.cluster import Allocation, StopSignal, parse_deadline
from curation.errors import (
    EXIT_OK,
    EXIT_SHARDS_FAILED,
    EXIT_WORK_LEFT,
    InfrastructureError,
    LostClaim,
    ShardError,
    Stopped,
)
from curation.ledger import MAX_ATTEMPTS, Input, Ledger, State, bucket_of, verify_inputs
from curation.options import RunOptions, logger, set_up_logging
from curation.progress import Progress
from curation.receipts import build_receipt
from curation.shards import Shard, select
from curation.work import ShardWork
from curation.workers import is_worker, run_workers

__all__ = ["Input", "ShardWork", "Stage", "run_shards", "run_stage"]

_WATCHED = 16  # claims of others that an idle worker looks at
_MISSES_BEFORE_RELISTING = 6


class Stage(Protocol):
    """One stage of the pipeline: what it reads and writes, and the work on one shard."""

    name: str  # names the folders _receipts/<name>/ and so on
    version: int  # raised when the same options give other bytes
    output: Path  # receipts, rejects, provenance and claims live beneath it
    other_outputs: tuple[Path, ...]  # further folders that it publishes into
    shards_in_flight: int  # shards that one process works on at once

    def fingerprint(self) -> dict[str, object]:
        """The options that change the output, as JSON values."""

    def inputs(self, shard: Shard) -> list[Input]:
        """The files that the shard is made from."""

    def open(self, allocation: Allocation) -> None:
        """Once per process, before the first shard: load models, find endpoints.  InfrastructureError ends the run."""

    def process(self, work: ShardWork) -> None:
        """One shard.  ShardError fails the shard, InfrastructureError ends the run, Stopped comes from check_stop."""

    def close(self) -> None:
        """Once per process, after the last shard, whether or not ``open`` was reached."""


def run_stage(stage: Stage, options: RunOptions, shards: Sequence[Shard]) -> int:
    """Run a stage over the selected shards in this process, or in ``--workers`` of them; returns the exit code.

    Raises InfrastructureError where the run cannot go on; ``exit_code`` turns it into a line and code 2.
    """
    options.check()
    selected = select(list(shards), options.shards)
    if options.dry_run:
        set_up_logging(options.quiet)
        return _dry_run(stage, options, selected)
    if options.workers > 1 and not is_worker():
        set_up_logging(options.quiet)
        return run_workers(stage, options)
    allocation = Allocation.detect(options.workers)
    set_up_logging(options.quiet, f"[{allocation.rank}]" if allocation.world > 1 else "")
    stop = StopSignal(parse_deadline(options.deadline))
    if threading.current_thread() is threading.main_thread():
        stop.install()
    return run_shards(stage, selected, options, replace(allocation, deadline=stop.deadline), stop)


def run_shards(
    stage: Stage, shards: Sequence[Shard], options: RunOptions, allocation: Allocation, stop: StopSignal
) -> int:
    """Work on every pending shard until none is left that this process could take; returns the exit code."""
    ledger = Ledger(stage.output, stage.name, stage.version, dict(stage.fingerprint()))
    ledger.prepare(stage.other_outputs)
    allocation = replace(allocation, run_id=allocation.run_id or f"run-{secrets.token_hex(8)}")
    subset = [shard.id for shard in shards] if options.shards else None
    ledger.enter(allocation.run_id, options.rerun, subset, [shard.id for shard in shards])
    claims = Claims(stage.output / "_claims" / stage.name, options.lease_s, options.stall_s)
    claims.heartbeat.start()
    try:
        return _Run(stage, shards, options, allocation, stop, ledger, claims).go()
    finally:
        stage.close()
        claims.heartbeat.stop()


@dataclass
class _Run:
    stage: Stage
    shards: Sequence[Shard]
    options: RunOptions
    allocation: Allocation
    stop: StopSignal
    ledger: Ledger
    claims: Claims
    outcome: Counter[str] = field(default_factory=Counter)  # what became of the shards
    samples: Counter[str] = field(default_factory=Counter)  # what became of the samples, in this process
    fatal: BaseException | None = None

    def go(self) -> int:
        self.progress = Progress(self.stage.name, len(self.shards), self.options.quiet)
        slots = threading.Semaphore(self.stage.shards_in_flight)
        self._lock = threading.Lock()
        self._opened = False
        began = time.monotonic()
        with self.progress, ThreadPoolExecutor(self.stage.shards_in_flight, "shard") as pool:
            for shard, claim in self._claimed(slots):
                pool.submit(self._attempt_and_release, shard, claim, slots)
        if self.fatal is not None:
            raise self.fatal
        return self._conclude(time.monotonic() - began)

    # ---- which shard next

    def _claimed(self, slots: threading.Semaphore) -> Iterator[tuple[Shard, Claim]]:
        """Claim pending shards one after the other; each comes with one slot taken that the attempt gives back."""
        waiting: list[Shard] = []
        misses = 0
        for shard in self._order():
            while not slots.acquire(timeout=0.5):
                pass  # signal handlers run in between
            if self._ended():
                self.outcome["left"] += 1
                slots.release()
                continue
            state = self.ledger.state(shard.id, self.stage.inputs(shard))
            if not self._wanted(state):
                self._count(state, shard)
                slots.release()
                continue
            claim = self._claim(shard)
            if claim is None:
                waiting.append(shard)
                misses += 1
                if misses % (_MISSES_BEFORE_RELISTING + random.randrange(3)) == 0:
                    self.ledger.forget_listing()
                slots.release()
                continue
            yield shard, claim
        yield from self._watch(waiting, slots)

    def _watch(self, waiting: list[Shard], slots: threading.Semaphore) -> Iterator[tuple[Shard, Claim]]:
        """Shards that others hold: take what they give back or die on, until nothing was to be had for two leases."""
        idle_since = time.monotonic()
        pause = min(1.0, self.options.lease_s / 8)
        while waiting and not self._ended():
            self.claims.heartbeat.progress()
            for shard in random.sample(waiting, min(_WATCHED, len(waiting))):
                state = self.ledger.state(shard.id, self.stage.inputs(shard), fresh=True)
                if not self._wanted(state):
                    self._count(state, shard)
                    waiting.remove(shard)
                elif (claim := self._claim(shard)) is not None:
                    waiting.remove(shard)
                    idle_since = time.monotonic()
                    slots.acquire()
                    yield shard, claim
            if waiting and time.monotonic() - idle_since > 2 * self.options.lease_s:
                self.outcome["others"] += len(waiting)
                logger.info(f"{len(waiting)} shards are in other workers' hands; this one ends")
                return
            self.stop.wait(pause * random.uniform(0.7, 1.3))
        self.outcome["left"] += len(waiting)

    def _order(self) -> Sequence[Shard]:
        """The shards' own order for a lone worker; among several, one hashed by worker, so that they do not race."""
        if self.allocation.world == 1:
            return self.shards
        mark = f"{self.claims.heartbeat.name}:".encode()
        return sorted(self.shards, key=lambda shard: xxhash.xxh3_64_intdigest(mark + shard.id.encode()))

    def _wanted(self, state: State) -> bool:
        if state.what != "failed":
            return state.what == "pending"
        receipt = state.receipt or {}
        if receipt.get("run") == self.allocation.run_id:
            return False  # this very run has tried
        if self.options.shards is not None:
            return True  # asked for by name
        return self.options.retry_failed and int(receipt.get("attempts", 1)) < MAX_ATTEMPTS

    def _claim(self, shard: Shard) -> Claim | None:
        self._open_stage()
        return self.claims.take(bucket_of(shard.id), shard.id)

    def _open_stage(self) -> None:
        """Models are loaded only when there is something to do."""
        if not self._opened:
            self.stage.open(self.allocation)
            self._opened = True
            self.claims.heartbeat.progress()

    def _ended(self) -> bool:
        return self.fatal is not None or self.stop.draining

    def _count(self, state: State, shard: Shard) -> None:
        self.outcome[state.what] += 1
        if state.what in ("blocked", "failed"):
            logger.warning(f"{shard.id} {state.what}: {state.why}")
        self.progress.shard_passed()

    # ---- one shard

    def _attempt_and_release(self, shard: Shard, claim: Claim, slots: threading.Semaphore) -> None:
        try:
            self._attempt(shard, claim)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            with self._lock:
                self.fatal = self.fatal or error
            self.stop.ask("error")
        finally:
            self.claims.give_back(claim)
            slots.release()

    def _attempt(self, shard: Shard, claim: Claim) -> None:
        inputs = self.stage.inputs(shard)
        state = self.ledger.state(shard.id, inputs, fresh=True)
        if not self._wanted(state):
            self._count(state, shard)
            return
        work = ShardWork(
            shard,
            ledger=self.ledger,
            claim=claim,
            allocation=self.allocation,
            stop=self.stop,
            inputs=state.inputs,
            previous=state.receipt,
            on_progress=self._on_progress,
            on_warning=logger.warning,
        )
        began = time.time()
        epoch = self.ledger.governing(shard.id).number
        try:
            verify_inputs(inputs, state.inputs)
            self.stage.process(work)
            work.assert_conservation()
            self._check_error_rate(work)
            self._commit(work, claim, epoch, began, None)
        except Stopped:
            self.outcome["left"] += 1
        except LostClaim as error:
            logger.info(f"{shard.id}: {error}")
            self.outcome["others"] += 1
        except InfrastructureError:
            raise
        except Exception as error:  # noqa: BLE001 - the shard's boundary: a failed receipt, and the run goes on
            self._fail(work, claim, epoch, began, error)
        finally:
            work.discard()

    def _on_progress(self, count: int) -> None:
        self.claims.heartbeat.progress()
        self.progress.samples_done(count)

    def _check_error_rate(self, work: ShardWork) -> None:
        failed = work.failed.total()
        if work.samples_in and failed / work.samples_in > self.options.max_error_rate:
            reasons = ", ".join(f"{n} {reason}" for reason, n in work.failed.most_common(5))
            raise ShardError(
                f"{failed} of {work.samples_in} samples failed ({reasons}), more than --max_error_rate "
                f"{self.options.max_error_rate:g}; {work.shard.path}"
            )
        if work.samples_in == 0:
            work.warn(f"{work.shard.path}: no samples")

    def _fail(self, work: ShardWork, claim: Claim, epoch: int, began: float, error: Exception) -> None:
        expected = isinstance(error, ShardError)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        trace = "" if expected else "".join(traceback.format_exception(error))
        logger.error(f"{work.shard.id} failed: {message}{chr(10) + trace if trace else ''}")
        work.discard()
        work.outputs.clear()
        try:
            self._commit(work, claim, epoch, began, {"message": message, "traceback": trace})
        except LostClaim:
            self.outcome["others"] += 1

    def _commit(self, work: ShardWork, claim: Claim, epoch: int, began: float, error: dict[str, str] | None) -> None:
        with work.phase("commit"):
            outputs = work.close_outputs()
        receipt = build_receipt(
            work, self.stage, self.allocation, claim.token, epoch=epoch, outputs=outputs, began=began, error=error
        )
        self.ledger.insist_on_epoch(work.shard.id, epoch)
        if not self.claims.holds(claim):
            raise LostClaim("its claim was taken over")
        commit = self.ledger.commit(work.shard.id)
        commit.write(receipt)
        finals = [self.ledger.root / output.path for output in outputs]
        for token in claim.predecessors:
            commit.clear(token, finals)
        if error is None:
            work.finish()
        self._remove_leftovers(work.previous, receipt)
        self._tell(work, receipt)

    def _remove_leftovers(self, previous: dict[str, Any] | None, receipt: dict[str, Any]) -> None:
        """Files that the last receipt named and this one does not: nobody may mistake them for this one's."""
        kept = {output["path"] for output in receipt["outputs"]}
        for output in (previous or {}).get("outputs", []):
            if output["path"] not in kept and output.get("checked", True):
                (self.ledger.root / output["path"]).unlink(missing_ok=True)

    def _tell(self, work: ShardWork, receipt: dict[str, Any]) -> None:
        status = receipt["status"]
        self.outcome["worked" if status == "done" else "failed"] += 1
        self.progress.shard_passed()
        if status != "done":
            return
        gone = [f"{count} {reason}" for reason, count in (work.dropped + work.failed).most_common()]
        seconds = receipt["finished"] - receipt["started"]
        logger.info(
            f"{work.shard.id} done: {work.samples_in} in, {work.kept} kept"
            f"{', ' if gone else ''}{', '.join(gone)} ({seconds:.1f} s)"
        )
        with self._lock:
            self.samples["in"] += work.samples_in
            self.samples["kept"] += work.kept
            self.samples["dropped"] += work.dropped.total()
            self.samples["failed"] += work.failed.total()

    def _conclude(self, seconds: float) -> int:
        told = {
            "worked": "done",
            "done": "were done before",
            "failed": "failed",
            "blocked": "blocked",
            "left": "left",
            "others": "in other hands",
        }
        parts = [f"{self.outcome[what]} {words}" for what, words in told.items() if self.outcome[what]]
        text = f"{self.stage.name}: of {len(self.shards)} shards {', '.join(parts)}"
        if self.samples["in"]:
            text += "; samples: " + ", ".join(f"{n:,} {what}" for what, n in self.samples.items())
            text += f" ({self.samples['in'] / max(seconds, 1e-9):,.1f}/s)"
        logger.info(text)
        if self.outcome["left"]:
            logger.warning(f"stopped ({self.stop.cause}) with work left: start the same command again")
            return EXIT_WORK_LEFT
        if self.outcome["failed"] or self.outcome["blocked"]:
            logger.warning(f"receipts of failed shards are in {self.ledger.receipts}; --retry_failed tries them again")
            return EXIT_SHARDS_FAILED
        return EXIT_OK


def _dry_run(stage: Stage, options: RunOptions, shards: Sequence[Shard]) -> int:
    """Say what would be done.  Writes nothing."""
    ledger = Ledger(stage.output, stage.name, stage.version, dict(stage.fingerprint()))
    if ledger.receipts.is_dir() and not options.rerun:
        ledger.enter("", False, None, [shard.id for shard in shards])
    counts: Counter[str] = Counter()
    for shard in shards:
        state = ledger.state(shard.id, stage.inputs(shard))
        counts["pending" if options.rerun and state.what in ("done", "failed") else state.what] += 1
        if state.what in ("failed", "blocked"):
            logger.warning(f"{shard.id} {state.what}: {state.why}")
    print(f"{stage.name} into {stage.output}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return EXIT_OK
