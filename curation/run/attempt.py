"""Processes one claimed shard: the attempt, its commit or failure, and the clean-up after attempts that died.

The receipt of an attempt is built here: one JSON object that records everything that was done to the shard.

Some shards kill their workers: a decoder crashes, or the job runs out of memory.  A worker that is asked to end
releases its claims, so a claim whose holder is gone means a crash, a kill or a lost node.  While a process works on
several shards, it is unknown which of them killed it.  So when two attempts in a row died on a shard without finishing
any sample, the next process works on that shard alone, and the shard fails only if that attempt dies too.
"""

from __future__ import annotations

import os
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from curation import __version__
from curation.cluster import Allocation, StopSignal, gpu_name, host_identity, slurm_ids
from curation.errors import InfrastructureError, LostClaim, ShardError, Stopped, device_failure, lack_of, redact
from curation.options import RunOptions, logger
from curation.run.checkpoints import Partials, tokens_with_checkpoints
from curation.run.claims import Claim, Claims, LostAttempt
from curation.run.commit import StaleTempFiles, has_obsolete_outputs, remove_obsolete
from curation.run.inputs import Input, check_same_remote, verify_inputs
from curation.run.ledger import MAX_ATTEMPTS, Ledger, State
from curation.run.progress import Progress, Tally
from curation.run.work import ShardContext, Stage
from curation.shards import Shard
from curation.storage.files import Published, is_storage_trouble, storage_error


def build_receipt(
    work: ShardContext,
    stage: Stage[Any],
    allocation: Allocation,
    token: str,
    *,
    options_version: int,
    outputs: Sequence[Published],
    began: float,
    error: dict[str, Any] | None,
    quarantine: bool = False,
    sources: Sequence[Input] = (),
    open_s: float = 0.0,
) -> dict[str, Any]:
    """Build the receipt of one attempt.  Only receipts contain times and hosts; outputs must be reproducible.

    Args:
        work: The counts, notes and outputs of the stage.
        options_version: The number of the options version that the attempt runs under.
        outputs: The files that it publishes.
        began: Unix time.
        error: Why the shard failed; None if it is done.
        quarantine: Do not try the shard again unless a run names it.
        sources: The origin of each of ``work.inputs``, in the same order.
        open_s: Seconds that this process needed to start, including the loading of models.

    Returns:
        The receipt.  ``seconds`` are wall-clock seconds by phase, summed over threads; ``started`` and ``finished`` are
        Unix times.
    """
    previous = work.previous or {}
    receipt: dict[str, Any] = {
        "shard": work.shard.id,
        "stage": stage.name,
        "version": stage.version,
        "status": "failed" if error else "done",
        "epoch": options_version,
        "generation": int(previous.get("generation", 0)) + 1,
        "token": token,
        "run": allocation.run_id,
        "counts": {
            "in": work.samples_in,
            "kept": work.kept,
            "dropped": dict(sorted(work.dropped.items())),
            "failed": dict(sorted(work.failed.items())),
        },
        "inputs": list(work.inputs),
        "sources": [source.origin(work.root, work.shard.id) for source in sources],
        "outputs": [output.record() for output in outputs],
        "notes": work.notes,
        "warnings": work.warnings,
        "seconds": {phase: round(seconds, 4) for phase, seconds in sorted(work.seconds.items())},
        "host": host_identity()[0],
        "rank": allocation.rank,
        "slurm": slurm_ids(),
        "gpu": gpu_name(allocation.gpu),
        "cpus": allocation.threads,
        "open_s": round(open_s, 3),
        "code": code_version(),
        "started": round(began, 3),
        "finished": round(time.time(), 3),
    }
    superseded = _superseded(work, {o.path for o in outputs})
    if superseded:
        receipt["superseded"] = superseded
    if error:
        receipt["error"] = error
        receipt["attempts"] = _attempts_so_far(previous, options_version, quarantine)
    return receipt


def _attempts_so_far(previous: dict[str, Any], options_version: int, quarantine: bool) -> int:
    """How often in a row the shard has failed under one options version, including this time."""
    failed_before = previous.get("status") in ("failed", "retry") and previous.get("epoch") == options_version
    attempts = int(previous.get("attempts", 0)) + 1 if failed_before else 1
    return max(attempts, MAX_ATTEMPTS) if quarantine else attempts


def _superseded(work: ShardContext, paths: set[str]) -> list[str]:
    """Files that the last receipt named and this one does not.  They must be removed, after a crash by any process.

    Files that the last receipt superseded stay in the list: another process may have renamed one of them aside a
    moment ago, and only that process knows its new name.
    """
    previous = work.previous or {}
    named = [output["path"] for output in previous.get("outputs", []) if output.get("checked", True)]
    return [path for path in dict.fromkeys([*named, *previous.get("superseded", [])]) if path not in paths]


@lru_cache(maxsize=1)
def code_version() -> str:
    """The package's version, and the git commit if it runs from a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return __version__
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"


MAX_DEATHS = 3
OUT_OF_MEMORY = "out_of_memory"  # the reason of a sample for which this machine has too little memory
WORKERS_DIED = "workers_died"  # the reason in the failed receipt of such a shard


def deaths_without_progress(deaths: Sequence[LostAttempt], with_checkpoints: set[str]) -> list[LostAttempt]:
    """The last attempts in ``deaths`` that had begun and died without finishing any sample.

    Args:
        deaths: All attempts that died on the shard, the oldest first.
        with_checkpoints: The tokens of attempts that left checkpoints.
    """
    found: list[LostAttempt] = []
    for death in reversed(deaths):
        if death.token in with_checkpoints:
            break
        if death.token:  # without a token, it died before it could write its claim
            found.insert(0, death)
    return found


def may_be_poison(deaths: Sequence[LostAttempt]) -> bool:
    """Whether the shard may kill its workers, so that a process should work on it alone."""
    return len(deaths) >= MAX_DEATHS - 1


def fail_if_poison(shard_id: str, deaths: Sequence[LostAttempt]) -> None:
    """Fail a shard on which so many workers died that the next one would probably die too.

    Raises:
        ShardError: At least ``MAX_DEATHS`` died in a row, one of them while it worked on this shard alone.
    """
    if len(deaths) >= MAX_DEATHS and any(death.alone for death in deaths):
        who = "; ".join(_describe(death) for death in deaths)
        raise ShardError(
            f"shard {shard_id}: {len(deaths)} workers died on it one after the other ({who})", WORKERS_DIED
        )


def _describe(death: LostAttempt) -> str:
    ids = death.slurm
    job = ids.get("job_id", "")
    if ids.get("array_job_id") and ids.get("array_task_id"):
        job = f"{ids['array_job_id']}_{ids['array_task_id']}"
    where = f"{death.host or 'an unknown host'}, pid {death.pid}"
    return f"{where}, SLURM job {job}" if job else where


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt.

    Attributes:
        options_version: The number of the options version that it runs under.
        began: Unix time.
        alone: Its process works on no other shard at the same time.
    """

    work: ShardContext
    claim: Claim
    inputs: Sequence[Input]
    options_version: int
    began: float
    alone: bool


def _nothing(*_: object) -> None:
    pass


def _removed_input(inputs: Sequence[Input]) -> Path | None:
    """An input that is not there any more: a publisher may have removed it after its upload.  That is no failure."""
    for wanted in inputs:
        if isinstance(wanted.path, Path) and not wanted.optional and not wanted.path.exists():
            return wanted.path
    return None


class Attempts:
    """The attempts of one process at shards of one stage, one after the other or in several threads."""

    def __init__(
        self,
        stage: Stage[Any],
        options: RunOptions,
        allocation: Allocation,
        stop: StopSignal,
        ledger: Ledger,
        claims: Claims,
        progress: Progress,
        tally: Tally,
        on_done: Callable[[str], None] = _nothing,
    ) -> None:
        self._stage = stage
        self._options = options
        self._allocation = allocation
        self._stop = stop
        self._ledger = ledger
        self._claims = claims
        self._progress = progress
        self._tally = tally
        self._on_done = on_done  # is called with each shard that is found done, or has been done here
        self._leftovers = StaleTempFiles()
        self._partials = Partials(ledger.root / "_partial" / stage.name)
        self.open_s = 0.0  # seconds that this process needed to start
        self.saved = False  # whether an attempt has left checkpoints
        self.to_run_first: set[str] = set()  # the stages that blocked shards wait for
        self.quarantined = 0  # failed shards that are tried again only if a run names them
        self.a_quarantined = ""  # one of these

    def wanted(self, state: State) -> bool:
        """Whether this run should work on a shard in that state."""
        if state.what != "failed":
            return state.what == "pending"
        receipt = state.receipt or {}
        if receipt.get("run") == self._allocation.run_id:
            return False  # this very run has tried
        if self._options.shards is not None:
            return True  # asked for by name
        return self._options.retry_failed and int(receipt.get("attempts", 1)) < MAX_ATTEMPTS

    def count(self, state: State, shard: Shard) -> None:
        """Count a shard that this run does not work on, and say in the log why it is blocked or failed."""
        self._tally.shards(state.what)
        if state.what == "blocked" and state.first:
            self.to_run_first.add(state.first)
        if state.what in ("blocked", "failed"):
            logger.warning(f"{shard.id} {state.what}: {state.why}")
        if state.what == "failed":
            self._note_quarantine(shard.id, state.receipt or {})
        self._progress.shard_passed(shard.id)
        if state.what == "done":
            self._on_done(shard.id)

    def _note_quarantine(self, shard_id: str, receipt: Mapping[str, Any]) -> None:
        if int(receipt.get("attempts", 1)) >= MAX_ATTEMPTS:
            self.quarantined += 1
            self.a_quarantined = self.a_quarantined or shard_id

    def needs_to_be_alone(self, claim: Claim) -> bool:
        """Whether this process should work on the shard alone, because the shard may kill it."""
        return may_be_poison(self._deaths_without_progress(claim))

    def attempt(
        self, shard: Shard, claim: Claim, *, alone: bool = False, on_ends_soon: Callable[[], None] = _nothing
    ) -> Literal["settled", "late", "lost"]:
        """Work on a shard.

        Args:
            shard: The shard.
            claim: This process's claim on it.
            alone: This process works on no other shard at the same time.
            on_ends_soon: Is called when the next shard may begin; see ``ShardContext.ends_soon``.

        Returns:
            settled: The shard is done, failed, blocked or left for a later start.  late: Another worker had done it.
            lost: Another worker took it over; this process should check it again later.

        Raises:
            InfrastructureError: The run cannot go on.
        """
        self._ledger.check_options_version(shard.id)
        inputs = self._stage.inputs(shard)
        state = self._ledger.state(shard.id, inputs, fresh=True)  # after claiming
        if not self.wanted(state):
            self.count(state, shard)
            if claim.predecessors or (state.receipt or {}).get("superseded"):  # others may have left files
                self._tidy(shard, claim, state)
            return "settled" if state.what == "blocked" else "late"
        try:
            verify_inputs(inputs, state.inputs)
        except ShardError as error:  # an input was replaced meanwhile, which is not a failure of this stage
            self.count(State("blocked", str(error)), shard)
            return "settled"
        work = self._work(shard, claim, state, on_ends_soon)
        options_version = self._ledger.governing(shard.id).number
        try:
            self._run(_Attempt(work, claim, inputs, options_version, time.time(), alone))
        except Stopped:
            self._tally.shards("left")
        except LostClaim as error:
            logger.info(f"{shard.id}: {error}")
            if work.checkpointed and (self._ledger.commit(shard.id).read_receipt() or {}).get("status") == "done":
                work.finish(alone=False)  # the winner did not know this attempt's checkpoints
            return "lost"
        finally:
            self.saved |= work.checkpointed
            work.discard()
            work.close()
        return "settled"

    def untidy(self, state: State) -> bool:
        """Whether an output still exists that the newest receipt of the shard no longer names."""
        return state.what in ("done", "failed") and has_obsolete_outputs(self._ledger.root, state.receipt)

    def tidy(self, shard: Shard, claim: Claim) -> None:
        """Remove the leftovers of an attempt that was killed after its commit."""
        state = self._ledger.state(shard.id, self._stage.inputs(shard), fresh=True)
        if not self.wanted(state):
            self._tidy(shard, claim, state)

    def _tidy(self, shard: Shard, claim: Claim, state: State) -> None:
        if state.receipt is None:
            return
        # An attempt that is only presumed dead may be about to commit the next generation, so its files stay.
        dead = [claim.confirmed_dead] if claim.confirmed_dead else []
        work = self._work(shard, claim, state, _nothing)
        self._clear_away(work, claim, state.receipt, StaleTempFiles(), self._places(work), dead)

    def _work(self, shard: Shard, claim: Claim, state: State, on_ends_soon: Callable[[], None]) -> ShardContext:
        return ShardContext(
            shard,
            ledger=self._ledger,
            claim=claim,
            partials=self._partials,
            allocation=self._allocation,
            stop=self._stop,
            inputs=state.inputs,
            previous=state.receipt,
            sample_parts=self._stage.sample_parts,
            on_progress=partial(self._on_progress, shard.id),
            on_warning=logger.warning,
            on_ends_soon=on_ends_soon,
        )

    def _run(self, this: _Attempt) -> None:
        work, claim = this.work, this.claim
        try:
            fail_if_poison(work.shard.id, self._deaths_without_progress(claim))
            if this.alone:
                self._stop.check()
                self._claims.mark_alone(claim)
            self._stage.process(work)
            work.assert_conservation()
            check_same_remote(this.inputs, work.inputs)
            self._check_error_rate(work)
            self._commit(this, None)
        except (Stopped, LostClaim, InfrastructureError):
            raise
        except Exception as error:  # the boundary of a shard: it fails, and the run goes on
            if self._stage.uses_device and (broken := device_failure(error)):
                raise broken from error
            if isinstance(error, OSError) and is_storage_trouble(error):  # in a file that the stage itself opened
                raise storage_error(Path(error.filename or self._ledger.root), error) from error
            if lack := lack_of(error):
                raise InfrastructureError(f"{work.shard.id}: {lack}") from error
            if gone := _removed_input(this.inputs):
                self.count(State("blocked", f"{gone}: it was removed while it was read"), work.shard)
                return
            self._fail(this, error)

    def _deaths_without_progress(self, claim: Claim) -> list[LostAttempt]:
        if not claim.deaths:
            return []
        tokens = tokens_with_checkpoints(self._partials.folder(claim.shard_id), claim.shard_id)
        return deaths_without_progress(claim.deaths, tokens)

    def _on_progress(self, shard_id: str, count: int) -> None:
        self._claims.heartbeat.progress(shard_id, count)
        self._progress.samples_done(count)

    def _check_error_rate(self, work: ShardContext) -> None:
        failed = work.failed.total()
        if work.samples_in and failed / work.samples_in > self._options.max_error_rate:
            reasons = ", ".join(f"{n} {reason}" for reason, n in work.failed.most_common(5))
            if (failed - work.failed[OUT_OF_MEMORY]) / work.samples_in <= self._options.max_error_rate:
                raise InfrastructureError(f"{work.shard.id}: {lack_of(MemoryError(reasons))}")
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
        message = redact(str(error) if expected else f"{type(error).__name__}: {error}")
        trace = "" if expected else redact("".join(traceback.format_exception(error)))
        logger.error(f"{work.shard.id} failed: {message}{chr(10) + trace if trace else ''}")
        work.discard()
        record: dict[str, Any] = {"reason": reason, "message": message, "traceback": trace}
        if reason == WORKERS_DIED:
            record["deaths"] = [asdict(death) for death in this.claim.deaths]
        self._commit(this, record)

    def _commit(self, this: _Attempt, error: dict[str, Any] | None) -> None:
        work, claim = this.work, this.claim
        with work.phase("commit"):
            outputs = work.close_outputs()
        receipt = build_receipt(
            work,
            self._stage,
            self._allocation,
            claim.token,
            options_version=this.options_version,
            outputs=outputs,
            began=this.began,
            error=error,
            quarantine=error is not None and error["reason"] == WORKERS_DIED,
            sources=this.inputs,
            open_s=self.open_s,
        )
        places = self._places(work)
        self._leftovers.look(places)
        commit = self._ledger.commit(work.shard.id)
        self._ledger.check_options_version(work.shard.id)
        if not self._claims.holds(claim):
            raise LostClaim("another worker took its claim, or its heartbeat stopped")
        try:
            commit.write(receipt)
        finally:
            if commit.named:
                work.hand_over()
        self._clear_away(work, claim, receipt, self._leftovers, places, claim.predecessors)
        self._log_done(work, receipt)

    def _places(self, work: ShardContext) -> list[Path]:
        receipt = self._ledger.commit(work.shard.id).receipt_path
        return [*work.places(), receipt.with_name(receipt.stem)]  # a prepared receipt has the shard's id as its name

    def _clear_away(
        self,
        work: ShardContext,
        claim: Claim,
        receipt: dict[str, Any],
        leftovers: StaleTempFiles,
        places: list[Path],
        dead: list[str],
    ) -> None:
        """After a commit, remove checkpoints, files of dead attempts, and outputs that only the last receipt named.

        If this fails, the shard is done nevertheless.
        """
        try:
            leftovers.clear(places, receipt["token"], dead)
            if receipt["status"] == "done":
                work.finish()
            commit = self._ledger.commit(work.shard.id)
            if claim.predecessors:  # one may have died after its receipt and before its record was removed
                commit.finish_pending(names=os.listdir(commit.receipt_path.parent))
            remove_obsolete(work.root, commit, receipt, claim.token, claim.predecessors)
        except (OSError, InfrastructureError) as error:
            logger.warning(f"{work.shard.id}: some leftover files could not be removed: {error}")

    def _log_done(self, work: ShardContext, receipt: dict[str, Any]) -> None:
        done = receipt["status"] == "done"
        self._tally.shards("worked" if done else "failed")
        self._progress.shard_passed(work.shard.id, work.kept + work.dropped.total() + work.failed.total())
        if not done:
            self._note_quarantine(work.shard.id, receipt)
            return
        self._on_done(work.shard.id)
        gone = [f"{count} {reason}" for reason, count in (work.dropped + work.failed).most_common()]
        seconds = receipt["finished"] - receipt["started"]
        logger.info(
            f"{work.shard.id} done: {work.samples_in} in, {work.kept} kept"
            f"{', ' if gone else ''}{', '.join(gone)} ({seconds:.1f} s, {work.samples_in / max(seconds, 1e-3):,.1f}/s)"
        )
        dropped, failed = work.dropped.total(), work.failed.total()
        counts = {"in": work.samples_in, "kept": work.kept, "dropped": dropped, "failed": failed}
        self._tally.samples(counts, self._stage.sums(work.notes), work.shard.id)
