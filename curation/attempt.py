"""What happens to one claimed shard: the attempt, its commit or failure, and clearing up after those that died."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from curation.claims import Claim, Claims
from curation.cluster import Allocation, StopSignal
from curation.errors import InfrastructureError, LostClaim, ShardError, Stopped
from curation.holders import Death
from curation.ledger import MAX_ATTEMPTS, Input, Ledger, State, insist_on_same_remote, verify_inputs
from curation.leftovers import Leftovers
from curation.options import RunOptions, logger
from curation.partial import Partials, tokens_with_checkpoints
from curation.progress import Progress, Tally
from curation.receipts import build_receipt
from curation.shards import Shard
from curation.storage.files import is_storage_trouble, storage_error
from curation.storage.urls import Source
from curation.superseded import lie_about, remove_superseded
from curation.suspects import REASON, Room, fruitless, insist_on_innocence, is_suspect
from curation.work import ShardWork


class _Stage(Protocol):
    name: str
    version: int

    def inputs(self, shard: Shard) -> list[Input]: ...

    def process(self, work: ShardWork) -> None: ...


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt.  epoch: the one it works for; began: Unix time."""

    work: ShardWork
    claim: Claim
    inputs: Sequence[Input]
    epoch: int
    began: float


class Attempts:
    """Attempts at shards of one stage by one process, one after the other or in several threads."""

    def __init__(
        self,
        stage: _Stage,
        options: RunOptions,
        allocation: Allocation,
        stop: StopSignal,
        ledger: Ledger,
        claims: Claims,
        progress: Progress,
        tally: Tally,
    ) -> None:
        self._stage = stage
        self._options = options
        self._allocation = allocation
        self._stop = stop
        self._ledger = ledger
        self._claims = claims
        self._progress = progress
        self._tally = tally
        self._leftovers = Leftovers()
        self._partials = Partials(ledger.root / "_partial" / stage.name)
        self._room = Room()
        self.open_s = 0.0  # that this process took to get ready

    def wanted(self, state: State) -> bool:
        """Whether this run is to work on a shard in that state."""
        if state.what != "failed":
            return state.what == "pending"
        receipt = state.receipt or {}
        if receipt.get("run") == self._allocation.run_id:
            return False  # this very run has tried
        if self._options.shards is not None:
            return True  # asked for by name
        return self._options.retry_failed and int(receipt.get("attempts", 1)) < MAX_ATTEMPTS

    def count(self, state: State, shard: Shard) -> None:
        """The shard is not wanted: tell what it is."""
        self._tally.shards(state.what)
        if state.what in ("blocked", "failed"):
            logger.warning(f"{shard.id} {state.what}: {state.why}")
        self._progress.shard_passed()

    def attempt(self, shard: Shard, claim: Claim) -> Literal["settled", "late", "lost"]:
        """Work on a shard.  late: another worker had done it; lost: another took it, it is to be looked at again.

        Raises InfrastructureError where the run cannot go on.
        """
        self._ledger.insist_on_epoch(shard.id)
        inputs = self._stage.inputs(shard)
        state = self._ledger.state(shard.id, inputs, fresh=True)  # after claiming
        if not self.wanted(state):
            self.count(state, shard)
            if claim.predecessors or (state.receipt or {}).get("superseded"):  # others may have left something
                self._tidy(shard, claim, state)
            return "settled" if state.what == "blocked" else "late"
        try:
            verify_inputs(inputs, state.inputs)
        except ShardError as error:  # upstream is just replacing it, or somebody else did: not this stage's failure
            self.count(State("blocked", str(error)), shard)
            return "settled"
        work = self._work(shard, claim, state)
        epoch = self._ledger.governing(shard.id).number
        try:
            self._run(_Attempt(work, claim, inputs, epoch, time.time()))
        except Stopped:
            self._tally.shards("left")
        except LostClaim as error:
            logger.info(f"{shard.id}: {error}")
            if work.checkpointed and (self._ledger.commit(shard.id).read_receipt() or {}).get("status") == "done":
                work.finish(alone=False)  # the winner did not know of this one's checkpoints
            return "lost"
        finally:
            work.discard()
            work.close()
        return "settled"

    def untidy(self, state: State) -> bool:
        """Whether a file lies about that the receipt of a shard superseded, which only its winner knew of."""
        return state.what in ("done", "failed") and lie_about(self._ledger.root, state.receipt, self._ledger.presence)

    def tidy(self, shard: Shard, claim: Claim) -> None:
        """Finish what an attempt that was killed after its commit had still to clear away."""
        state = self._ledger.state(shard.id, self._stage.inputs(shard), fresh=True)
        if not self.wanted(state):
            self._tidy(shard, claim, state)

    def _tidy(self, shard: Shard, claim: Claim, state: State) -> None:
        if state.receipt is None:
            return
        # Of those presumed dead one may live and be about to commit the next generation: its files stay.
        dead = [claim.buried] if claim.buried else []
        work = self._work(shard, claim, state)
        self._clear_away(work, claim, state.receipt, Leftovers(), self._places(work), dead)

    def _work(self, shard: Shard, claim: Claim, state: State) -> ShardWork:
        return ShardWork(
            shard,
            ledger=self._ledger,
            claim=claim,
            partials=self._partials,
            allocation=self._allocation,
            stop=self._stop,
            inputs=state.inputs,
            previous=state.receipt,
            on_progress=partial(self._on_progress, shard.id),
            on_warning=logger.warning,
        )

    def _run(self, this: _Attempt) -> None:
        work, claim = this.work, this.claim
        try:
            deaths: Sequence[Death] = claim.deaths
            if deaths:
                tokens = tokens_with_checkpoints(self._partials.folder(work.shard.id), work.shard.id)
                deaths = fruitless(deaths, tokens)
                insist_on_innocence(work.shard.id, deaths)
            alone = is_suspect(deaths)
            with self._room.enter(alone=alone, check=self._stop.check):
                if alone:
                    self._claims.mark_alone(claim)
                self._stage.process(work)
            work.assert_conservation()
            insist_on_same_remote(this.inputs, work.inputs)
            self._check_error_rate(work)
            self._commit(this, None)
        except (Stopped, LostClaim, InfrastructureError):
            raise
        except Exception as error:  # the shard's boundary: a failed receipt, and the run goes on
            if isinstance(error, OSError) and is_storage_trouble(error):  # in a file of the stage's own
                raise storage_error(Path(error.filename or self._ledger.root), error) from error
            self._fail(this, error)

    def _on_progress(self, shard_id: str, count: int) -> None:
        self._claims.heartbeat.progress(shard_id, count)
        self._progress.samples_done(count)

    def _check_error_rate(self, work: ShardWork) -> None:
        failed = work.failed.total()
        if work.samples_in and failed / work.samples_in > self._options.max_error_rate:
            reasons = ", ".join(f"{n} {reason}" for reason, n in work.failed.most_common(5))
            raise ShardError(
                f"{failed} of {work.samples_in} samples failed ({reasons}), more than --max_error_rate "
                f"{self._options.max_error_rate:g}; {work.shard.path}",
                "too_many_errors",
            )
        if work.samples_in == 0:
            work.warn(f"{work.shard.path}: no samples")

    def _fail(self, this: _Attempt, error: Exception) -> None:
        work = this.work
        expected = isinstance(error, ShardError)
        reason = error.reason if isinstance(error, ShardError) else type(error).__name__
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        trace = "" if expected else "".join(traceback.format_exception(error))
        logger.error(f"{work.shard.id} failed: {message}{chr(10) + trace if trace else ''}")
        work.discard()
        told: dict[str, Any] = {"reason": reason, "message": message, "traceback": trace}
        if reason == REASON:
            told["deaths"] = [asdict(death) for death in this.claim.deaths]
        self._commit(this, told)

    def _commit(self, this: _Attempt, error: dict[str, Any] | None) -> None:
        work, claim = this.work, this.claim
        with work.phase("commit"):
            outputs = work.close_outputs()
        receipt = build_receipt(
            work,
            self._stage,
            self._allocation,
            claim.token,
            epoch=this.epoch,
            outputs=outputs,
            began=this.began,
            error=error,
            quarantine=error is not None and error["reason"] == REASON,
            sources=this.inputs,
            open_s=self.open_s,
        )
        places = self._places(work)
        self._leftovers.look(places)
        commit = self._ledger.commit(work.shard.id)
        self._ledger.insist_on_epoch(work.shard.id)
        if not self._claims.holds(claim):
            raise LostClaim("its claim was taken over, or its heartbeat stood still")
        try:
            commit.write(receipt)
        finally:
            if commit.named:
                work.hand_over()
        self._clear_away(work, claim, receipt, self._leftovers, places, claim.predecessors)
        self._tell(work, receipt)

    def _places(self, work: ShardWork) -> list[Source]:
        receipt = self._ledger.commit(work.shard.id).receipt_path
        return [*work.places(), receipt.with_name(work.shard.id)]  # a prepared receipt is named for the shard alone

    def _clear_away(
        self,
        work: ShardWork,
        claim: Claim,
        receipt: dict[str, Any],
        leftovers: Leftovers,
        places: list[Source],
        dead: list[str],
    ) -> None:
        """After a commit: checkpoints, files of dead attempts, and what the last receipt named and this one does not,
        which nobody may take for this one's.  The shard is done whether or not this succeeds."""
        try:
            uploads = [output["upload"]["id"] for output in receipt.get("outputs", ()) if "upload" in output]
            leftovers.clear(places, receipt["token"], dead, uploads)
            if receipt["status"] == "done":
                work.finish()
            commit = self._ledger.commit(work.shard.id)
            remove_superseded(work.root, commit, receipt, claim.token, claim.predecessors)
        except (OSError, InfrastructureError) as error:
            logger.warning(f"{work.shard.id}: something was left behind: {error}")

    def _tell(self, work: ShardWork, receipt: dict[str, Any]) -> None:
        done = receipt["status"] == "done"
        self._tally.shards("worked" if done else "failed")
        self._progress.shard_passed()
        if not done:
            return
        gone = [f"{count} {reason}" for reason, count in (work.dropped + work.failed).most_common()]
        seconds = receipt["finished"] - receipt["started"]
        logger.info(
            f"{work.shard.id} done: {work.samples_in} in, {work.kept} kept"
            f"{', ' if gone else ''}{', '.join(gone)} ({seconds:.1f} s, {work.samples_in / max(seconds, 1e-3):,.1f}/s)"
        )
        dropped, failed = work.dropped.total(), work.failed.total()
        self._tally.samples({"in": work.samples_in, "kept": work.kept, "dropped": dropped, "failed": failed})
