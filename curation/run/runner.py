"""The only loop over shards: find a pending shard, claim it, let the stage process it, commit, and continue.

Any number of processes on any number of nodes run this loop over the same folders, and more may join at any time.
"""

from __future__ import annotations

import contextlib
import functools
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any

import xxhash

from curation.cluster import (
    Allocation,
    StopSignal,
    gpu_name,
    note_broken_device,
    parse_deadline,
    run_id,
    stopped_at_once,
)
from curation.errors import (
    EXIT_DEVICE_FAILED,
    EXIT_OK,
    EXIT_SHARDS_FAILED,
    EXIT_WORK_LEFT,
    DeviceError,
    StoppedAtOnce,
    UsageError,
    device_failure,
)
from curation.options import Main, RunOptions, exit_code, logger, say_error, set_up_logging
from curation.run.attempt import Attempts
from curation.run.claims import CheckedBuckets, Claim, Claims
from curation.run.follow import Follower, Follows
from curation.run.planned import record_plan
from curation.run.progress import Progress, Tally
from curation.run.work import Stage
from curation.run.workers import is_worker, pipe_to_parent, run_workers
from curation.shards import Shard, bucket_of, select
from curation.storage.files import clear_leftovers, names_in

_WATCHED = 16  # claims of other workers that an idle worker checks
_FOLDERS_OF_SHARDS = ("_claims", "_partial", "_rejects", "_provenance")  # attempts clear them, shard by shard
_MISSES_BEFORE_RELISTING = 6
_LOSSES = 3  # after it has lost a shard so often, this process leaves it to others


def stage_main(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Decorate the ``main(argv)`` of a stage: ``exit_code``, and a signal that comes before the first shard, while
    folders are listed, another stage is waited for or a store is tried, ends it with exit code 75 and a line."""

    @exit_code
    @functools.wraps(main)
    def listening(argv: Sequence[str] | None = None) -> int:
        with stopped_at_once():
            return main(argv)

    return listening


def run_stage(stage: Stage[Any], options: RunOptions, shards: Sequence[Shard], follows: Follows | None = None) -> int:
    """Run a stage over the selected shards, in this process or in ``--workers`` processes.

    Args:
        stage: The stage.
        options: Its options.
        shards: All shards that were found; ``--shards`` selects among them.
        follows: What ``--follow`` waits for; None for a stage that has no stage before it.

    Returns:
        The exit code.

    Raises:
        InfrastructureError: The run cannot go on; ``exit_code`` turns this into one line and code 2.
    """
    options.check()
    if not options.follow:
        follows = None
    elif follows is None:
        raise UsageError(f"--follow: there is no stage before {stage.name} that it could follow")
    selected = list(shards) if follows else select(list(shards), options.shards)
    if options.dry_run:
        set_up_logging(options.quiet)
        if options.deadline is not None:
            parse_deadline(options.deadline)
        return _dry_run(stage, options, selected, _follower(follows, selected, options))
    if options.workers > 1 and not is_worker():
        set_up_logging(options.quiet)
        shared = run_id().partition("-")[2] or secrets.token_hex(8)
        # Here, so that an error in the options is reported once and not by each worker.
        _Entry(stage, selected, options, f"run-{shared}").check()

        def states() -> Counter[str]:
            return _states(stage, options, selected, _follower(follows, selected, options), f"run-{shared}")

        return run_workers(stage, options, shared, selected, states)
    allocation = Allocation.detect(options.workers)
    set_up_logging(options.quiet, f"[{allocation.rank}]" if allocation.world > 1 else "")
    stop = StopSignal(parse_deadline(options.deadline))
    if threading.current_thread() is threading.main_thread():
        stop.install()
    return run_shards(stage, selected, options, replace(allocation, deadline=stop.deadline), stop, follows)


def run_shards(
    stage: Stage[Any],
    shards: Sequence[Shard],
    options: RunOptions,
    allocation: Allocation,
    stop: StopSignal,
    follows: Follows | None = None,
) -> int:
    """Process pending shards until none is left that this process can claim; returns the exit code.

    Where the device of this process fails, it gives its shards back, and the code is EXIT_DEVICE_FAILED: whoever
    started it with others knows whether they did its work.  A process that is alone and whose device never worked ends
    like any other that lacks something.

    Raises:
        InfrastructureError: The run cannot go on.
    """
    allocation = replace(allocation, run_id=allocation.run_id or f"run-{secrets.token_hex(8)}")
    follower = _follower(follows, shards, options)
    with stop.at_once():  # to find out which model it is may take long
        entry = _Entry(stage, shards, options, allocation.run_id, follower)
    entry.check()
    claims = Claims(stage.output / "_claims" / stage.name, options.lease_s, options.stall_s)
    claims.heartbeat.start()
    if allocation.rank == 0:
        _clear_leftovers(stage, claims)
    run = _Run(stage, shards, options, allocation, stop, entry, claims, follower)
    broken: DeviceError | None = None
    try:
        run.go()
    except Exception as error:
        broken = device_failure(error) if stage.uses_device else None
        if broken is None:
            raise
    finally:
        try:
            # What frees memory on a broken device fails too, and says less.
            with contextlib.suppress(Exception) if broken else contextlib.nullcontext():
                stage.close()
        finally:
            claims.heartbeat.stop()
            run.checked.clear()
    # Last, so that the run's last line says what came of it.
    return run.conclude() if broken is None else run.leave(broken)


def _clear_leftovers(stage: Stage[Any], claims: Claims) -> None:
    """Remove what a killed process left of files that belong to no shard: records, lists, tables, merged files."""
    now = claims.heartbeat.written_at()
    for root in (stage.output, *stage.other_outputs):
        folders = [root / name for name in names_in(root) if name[0] == "_" and name not in _FOLDERS_OF_SHARDS]
        for folder in (root, *folders, *(folder / stage.name for folder in folders)):
            if folder.is_dir():
                clear_leftovers(folder, now)


def _follower(follows: Follows | None, shards: Sequence[Shard], options: RunOptions) -> Follower | None:
    if follows is None:
        return None
    return Follower(follows, shards, options.shards, options.follow_idle_s, options.lease_s)


class _Entry:
    """The begin of a run: its options are checked at once, and recorded when the stage has proved that it can work.

    A run that ends before its first shard, because a model, a server or a folder is missing, so leaves no options
    behind, and the corrected command works.
    """

    def __init__(
        self,
        stage: Stage[Any],
        shards: Sequence[Shard],
        options: RunOptions,
        run: str,
        follower: Follower | None = None,
    ) -> None:
        self.ledger = stage.ledger()
        self.recorded = False
        self._stage = stage
        self._options = options
        self._run = run
        self._follower = follower
        self._all_shards = shards

    def check(self) -> None:
        """Create the folder of the receipts, and raise UsageError if this run's options do not fit what is recorded."""
        self.ledger.prepare((), look=False)
        self.ledger.prepare(self._stage.other_outputs, look=True)
        self._enter(None, look=True)
        if self._follower is not None:  # those that follow this stage learn already that it works
            _record_plan(self._stage, self._shards, self._follower)

    def record(self, claims: Claims) -> None:
        """Record the options and the list of shards, once."""
        if self.recorded:
            return
        self.ledger.prepare(self._stage.other_outputs)
        self._enter(claims)
        claims.heartbeat.works_under(self.ledger.entered)
        _record_plan(self._stage, self._shards, self._follower)
        self.recorded = True

    @property
    def _shards(self) -> Sequence[Shard]:
        return self._all_shards if self._follower is None else list(self._follower.shards.values())

    def _enter(self, claims: Claims | None, *, look: bool = False) -> bool:
        ids = [shard.id for shard in self._shards]
        subset = ids if self._options.shards else None
        return self.ledger.enter(self._run, self._options.rerun, subset, ids, claims, look=look)


def _record_plan(stage: Stage[Any], shards: Sequence[Shard], follower: Follower | None) -> None:
    """Record the shards of this run for stages that follow it.  With --follow, only those that upstream planned."""
    if follower is not None:
        shards = [follower.shards[shard_id] for shard_id in follower.planned()]
    if shards:
        sources = [wanted.origin(stage.output, shards[0].id) for wanted in stage.inputs(shards[0])]
        record_plan(stage.output, stage.name, (shard.id for shard in shards), sources)


class _Run:
    """The main thread finds and claims shards; ``shards_in_flight`` threads process them."""

    def __init__(
        self,
        stage: Stage[Any],
        shards: Sequence[Shard],
        options: RunOptions,
        allocation: Allocation,
        stop: StopSignal,
        entry: _Entry,
        claims: Claims,
        follower: Follower | None,
    ) -> None:
        self._stage = stage
        self._entry = entry
        self._follower = follower
        self._shards = shards if follower is None else list(follower.shards.values())
        self._options = options
        self._allocation = allocation
        self._stop = stop
        stage.stopping = lambda: stop.draining
        self._ledger = ledger = entry.ledger
        self._claims = claims
        self._began = time.monotonic()
        parent = pipe_to_parent()
        self._progress = Progress(
            stage.name,
            [shard.id for shard in self._shards],
            options.quiet,
            receipts=ledger.receipts,
            again=options.rerun,
            world=allocation.world,
            doing=stage.doing,
            lines=parent is None or follower is not None,
        )
        self._tally = Tally(parent)
        self.checked = CheckedBuckets(stage.output / "_claims" / stage.name, claims.heartbeat.name)
        self._attempts = Attempts(
            stage, options, allocation, stop, ledger, claims, self._progress, self._tally, self._found_done
        )
        self._capacity = 1 if stage.overlaps_at_ends else stage.shards_in_flight
        self._ending: Callable[[], None] | None = None  # gives up the slot of a shard that ends soon, when it may
        self._slots = threading.Semaphore(self._capacity)
        self._opened = False
        self._misses = 0
        self._untidy: list[Shard] = []
        # The threads share these:
        self._lock = threading.Lock()
        self._waiting: list[Shard] = []  # other processes hold them, or took them over
        self._losses: Counter[str] = Counter()
        self._in_flight = 0
        self._landed = threading.Event()  # a shard in flight has ended
        self._fatal: BaseException | None = None

    def go(self) -> None:
        """Work on the shards until none is left that this process can claim."""
        self._progress.now(f"checking which of {len(self._shards):,} shards are to be done")
        with self._progress, ThreadPoolExecutor(self._stage.shards_in_flight, "shard") as pool:
            try:
                for shard, claim in self._claimed():
                    alone = self._attempts.needs_to_be_alone(claim)
                    if alone:
                        self._wait_for_all_slots()
                    with self._lock:
                        self._in_flight += 1
                    self._progress.begin(shard.id)
                    pool.submit(self._attempt, shard, claim, alone)
            except BaseException:
                self._stop.ask("error")  # stops the shards in flight
                raise
        if self._fatal is not None:
            raise self._fatal
        self._tidy_up()

    # ---- which shard next

    def _claimed(self) -> Iterator[tuple[Shard, Claim]]:
        """Claim pending shards one after the other.  Each takes a slot, which the attempt frees at its end."""
        if self._follower is None:
            yield from self._pass()
            self._record()
        yield from self._watch()
        self._record()
        with self._lock:
            self._tally.shards("left", len(self._waiting))
            self._waiting.clear()

    def _record(self) -> None:
        """Record the options and the shards also where nothing was to do, because stages that follow wait for them."""
        if not (self._entry.recorded or self._ended()):
            with contextlib.suppress(StoppedAtOnce), self._stop.at_once():
                self._entry.record(self._claims)

    def _pass(self) -> Iterator[tuple[Shard, Claim]]:
        """Go once through all shards, bucket by bucket, so that a process keeps the listing of few buckets and renews
        no other one, and so that it can skip a bucket that another worker of this run has found done."""
        rest = Counter(bucket_of(shard.id) for shard in self._shards)
        for bucket, shards in self._by_bucket():
            rest[bucket] -= len(shards)
            if self._allocation.world > 1 and not self._ended() and self._others_found_done(bucket, shards):
                continue
            yield from self._try(shards)
            if not rest[bucket]:
                self.checked.passed(bucket)
                self._ledger.forget_listing(bucket)

    def _others_found_done(self, bucket: str, shards: Sequence[Shard]) -> bool:
        ids = sorted(shard.id for shard in shards)
        needed = [f"{shard_id} {self._ledger.governing(shard_id).number}" for shard_id in ids]
        subject = xxhash.xxh3_128_hexdigest("\n".join([self._allocation.run_id, *needed]).encode())
        if not self.checked.are_done(bucket, subject, ids):
            return False
        self._tally.shards("done", len(ids))
        for shard_id in ids:
            self._progress.shard_passed(shard_id)
        return True

    def _found_done(self, shard_id: str) -> None:
        self.checked.found_done(bucket_of(shard_id), shard_id)

    def _try(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Claim]]:
        for shard in shards:
            while not self._slots.acquire(timeout=0.5):
                pass  # signal handlers run in between
            self._wait_for_room()
            if self._ended():
                self._tally.shards("left")
                self._slots.release()
            elif (claim := self._look_at(shard)) is not None:
                yield shard, claim
            else:
                self._slots.release()

    def _wait_for_room(self) -> None:
        """Wait, without a claim, while the stage says that no other shard may begin."""
        waited = False
        while (why := self._stage.full()) and not self._ended():
            waited = True
            self._progress.now(why)
            self._claims.heartbeat.progress()
            self._stop.wait(0.5)
        if waited:
            self._progress.now("")

    def _arrived(self) -> Sequence[Shard]:
        """With ``--follow``: the shards that upstream has just published.  Shards newly planned there are recorded."""
        follower = self._follower
        if follower is None:
            return ()
        arrived = follower.poll()
        if follower.has_grown:
            follower.has_grown = False
            self._shards = list(follower.shards.values())
            self._progress.expect([shard.id for shard in self._shards])
            _record_plan(self._stage, self._shards, follower)
        return arrived

    def _look_at(self, shard: Shard, *, fresh: bool = False) -> Claim | None:
        """Claim the shard if it should be done; if another process holds it, add it to the waiting ones."""
        if self._follower is not None and not self._follower.settled(shard):
            return None
        if self._entry.recorded:
            self._ledger.check_options_version(shard.id, look=False)
        state = self._ledger.state(shard.id, self._stage.inputs(shard), fresh=fresh, cursory=self._opened)
        if not self._attempts.wanted(state):
            self._attempts.count(state, shard)
            if self._attempts.untidy(state) or self._claims.left_behind(bucket_of(shard.id), shard.id):
                self._untidy.append(shard)
            return None
        if not self._opened and not self._open():  # models are loaded only when there is something to do
            self._tally.shards("left")
            return None
        claim = self._claims.acquire(bucket_of(shard.id), shard.id)
        if claim is None:
            with self._lock:
                self._waiting.append(shard)
            self._missed(shard)
        return claim

    def _open(self) -> bool:
        """Load the models and record the options.  Returns False where a stop was requested meanwhile."""
        began = time.monotonic()
        self._progress.now(self._stage.opening)
        with contextlib.suppress(StoppedAtOnce), self._stop.at_once():
            if self._ended():  # it came just now
                return False
            self._stage.require(self._options)
            self._stage.open(self._allocation)
            self._opened = True
            self._attempts.open_s = time.monotonic() - began
            if not self._ended():
                self._entry.record(self._claims)
                return True
        return False

    def _missed(self, shard: Shard) -> None:
        """Another process had already done a shard that the listing shows as pending; after several, list again."""
        with self._lock:
            self._misses += 1
        if self._misses % (_MISSES_BEFORE_RELISTING + random.randrange(3)) == 0:
            self._ledger.forget_listing(bucket_of(shard.id))

    def _watch(self) -> Iterator[tuple[Shard, Claim]]:
        """Wait for shards that others hold: claim those that they release or die on, until two leases brought none.
        With ``--follow``, also claim the shards that upstream publishes meanwhile, until it is complete."""
        idle_since = time.monotonic()
        pause_s = min(1.0, self._options.lease_s / 8)
        while not self._ended():
            yield from self._try(self._order(self._arrived()))
            expecting = self._follower is not None and self._follower.expecting
            with self._lock:
                watched = random.sample(self._waiting, min(_WATCHED, len(self._waiting)))
                busy = self._in_flight > 0
                self._say_what_it_waits_for(expecting=expecting)
            if not watched:
                if not busy and not expecting:
                    return
                self._landed.wait(0.5)
                self._landed.clear()
                continue
            for shard in watched:
                if not self._slots.acquire(blocking=False):
                    break
                with self._lock:
                    self._waiting.remove(shard)
                if (claim := self._look_at(shard, fresh=True)) is not None:
                    busy = True
                    yield shard, claim
                else:
                    self._slots.release()
            if busy or expecting:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > 2 * self._options.lease_s:
                self._leave_to_others()
                return
            self._stop.wait(pause_s * random.uniform(0.7, 1.3))

    def _say_what_it_waits_for(self, *, expecting: bool) -> None:
        if self._in_flight:
            self._progress.now("")
        elif expecting and self._follower is not None:
            self._progress.now(f"waiting for {self._follower.whom}")
        elif self._waiting:
            count = len(self._waiting)
            last = (
                "another worker has the last shard" if count == 1 else f"other workers have the last {count:,} shards"
            )
            self._progress.now("waiting", f"waiting in case a worker dies: {last}")

    def _leave_to_others(self) -> None:
        with self._lock:
            count = len(self._waiting)
            self._waiting.clear()
        if count:
            self._tally.shards("others", count)
            logger.info(f"other workers hold {count} shards; this one ends")

    def _order(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """A single worker takes the shards in order.  Each of several has a hashed order, so that they do not race."""
        if self._allocation.world == 1:
            return shards
        return sorted(shards, key=lambda shard: self._hash(shard.id))

    def _by_bucket(self) -> Iterator[tuple[str, Sequence[Shard]]]:
        """All shards in this worker's order.  A single worker may come back to a bucket whose ids are of two widths."""
        if self._allocation.world == 1:
            for bucket, group in groupby(self._shards, lambda shard: bucket_of(shard.id)):
                yield bucket, list(group)
            return
        buckets: dict[str, list[Shard]] = {}
        for shard in self._shards:
            buckets.setdefault(bucket_of(shard.id), []).append(shard)
        for bucket in sorted(buckets, key=self._hash):
            yield bucket, self._order(buckets[bucket])

    def _hash(self, name: str) -> int:
        return xxhash.xxh3_64_intdigest(f"{self._claims.heartbeat.name}:{name}".encode())

    def _ended(self) -> bool:
        return self._fatal is not None or self._stop.draining

    # ---- one shard

    def _wait_for_all_slots(self) -> None:
        """Take all other slots, so that no other shard is in flight, nor one that gave up its slot early."""
        for _ in range(1, self._capacity):
            while not self._slots.acquire(timeout=0.5):
                pass  # signal handlers run in between
        while self._in_flight:
            self._landed.wait(0.5)
            self._landed.clear()

    def _attempt(self, shard: Shard, claim: Claim, alone: bool) -> None:
        has_slot = True

        def give_up_slot() -> None:
            nonlocal has_slot
            with self._lock:
                if alone or not has_slot or not self._stage.overlaps_at_ends:
                    return
                if self._in_flight >= self._stage.shards_in_flight:  # until the shard before this one is written
                    self._ending = give_up_slot
                    return
                has_slot = False
            self._slots.release()

        try:
            result = self._attempts.attempt(shard, claim, alone=alone, on_ends_soon=give_up_slot)
            if result == "lost":
                self._lost(shard)
            elif result == "late":
                self._missed(shard)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            with self._lock:
                self._fatal = self._fatal or error
            self._stop.ask("error")
        finally:
            self._claims.release(claim)
            self._progress.end(shard.id)
            with self._lock:
                self._in_flight -= 1
                ending, self._ending = self._ending, None
                if has_slot:
                    has_slot = False  # its own wish to give it up, if that is what waits, is fulfilled
                    self._slots.release(self._capacity if alone else 1)
            if ending is not None:
                ending()
            self._landed.set()

    def _lost(self, shard: Shard) -> None:
        """Another worker has won the shard or will; if it does not, this worker tries the shard again."""
        with self._lock:
            self._losses[shard.id] += 1
            if self._losses[shard.id] < _LOSSES:
                self._waiting.append(shard)
                return
        logger.warning(
            f"{shard.id}: other workers took it over {_LOSSES} times; run the command again to continue with it"
        )
        self._tally.shards("left")

    def _tidy_up(self) -> None:
        """Clean up shards that were done before this run and still have the claim of a dead process."""
        for shard in self._untidy:
            if self._stop.draining:
                return
            claim = self._claims.acquire(bucket_of(shard.id), shard.id)
            if claim is not None:
                try:
                    self._attempts.tidy(shard, claim)
                finally:
                    self._claims.release(claim)

    def conclude(self) -> int:
        """Say what came of the run, and how to continue with shards that are not done; returns the exit code."""
        follower = self._follower
        if follower is not None:
            self._tally.shards("missing" if follower.gave_up else "left", follower.missing or follower.waiting)
        code = EXIT_SHARDS_FAILED if follower is not None and follower.gave_up else EXIT_OK
        if self._tally["left"] or (follower is not None and follower.expecting):
            cause = self._stop.cause or "lost shards"
            logger.warning(f"stopped ({cause}) with work left: run the same command again")
            code = EXIT_WORK_LEFT
        elif self._tally["failed"] or self._tally["blocked"]:
            self._say_what_to_do()
            code = EXIT_SHARDS_FAILED
        told = self._tally.text(time.monotonic() - self._began, self._stage.result)
        logger.info(f"{self._stage.name}: of {len(self._shards)} shards {told}")
        return code

    def leave(self, broken: DeviceError) -> int:
        """Say which device of which node has failed; returns the exit code.

        Raises:
            DeviceError: This process is the whole run, and its device has never worked.
        """
        computed = self._attempts.saved or self._tally["worked"] + self._tally["failed"] > 0
        self._tally.tell_of_failed_device(computed=computed)
        gpu = gpu_name(self._allocation.gpu)
        where = f"node {note_broken_device()}{f', GPU {gpu}' if gpu is not None else ''}"
        if self._allocation.world == 1 and not computed:
            raise DeviceError(f"{where}: {broken}")
        say_error(
            f"{where}: {broken}; this process gives its shards back and ends.  The device may be broken: "
            "run the same command again on another one"
        )
        told = self._tally.text(time.monotonic() - self._began, self._stage.result)
        logger.info(f"{self._stage.name}: the device failed; of {len(self._shards)} shards {told}")
        return EXIT_DEVICE_FAILED

    def _say_what_to_do(self) -> None:
        if failed := self._tally["failed"]:
            kept, example = self._attempts.quarantined, f"as with --shards {self._attempts.a_quarantined}"
            again = "--retry_failed tries them again"
            if kept == failed:
                again = f"they failed three times or killed three workers: name them to try them again, {example}"
            elif kept:
                again += f", but for {kept:,} that failed three times or killed three workers: name these, {example}"
            logger.warning(f"receipts of failed shards are in {self._ledger.receipts}; {again}")
        if blocked := self._tally["blocked"]:
            first = ", ".join(sorted(self._attempts.to_run_first))
            what = f"run {first} first" if first else "follow the instructions above"
            logger.warning(f"{blocked} shards are blocked: {what}, and then the same command again")


def _dry_run(stage: Stage[Any], options: RunOptions, shards: Sequence[Shard], follower: Follower | None) -> int:
    """Print what would be done, and write nothing.

    Raises InfrastructureError where the real run would: a package, a model, a server or a folder is missing.
    """
    counts = _states(stage, options, shards, follower, run_id())
    print(f"{stage.name} into {stage.output}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    if counts["pending"]:
        if stage.trouble is not None:
            raise stage.trouble
        stage.require(options)
        if stage.opens_quickly:
            try:
                stage.open(Allocation.detect(options.workers))
            finally:
                stage.close()
    return EXIT_OK


def _states(
    stage: Stage[Any], options: RunOptions, shards: Sequence[Shard], follower: Follower | None, run: str
) -> Counter[str]:
    """How many shards are done, pending, failed, blocked and waiting for the stage before.

    run: the id of the run, whose ``--rerun`` counts as begun where it has begun.  Nothing is written.
    """
    ledger = stage.ledger(read_only=True)
    ids = [shard.id for shard in shards]
    ledger.enter(run, options.rerun, ids if options.shards else None, ids, look=True)
    counts: Counter[str] = Counter()
    for shard in shards if follower is None else follower.shards.values():
        if follower is not None and not follower.settled(shard):
            counts["waiting"] += 1
            continue
        state = ledger.state(shard.id, stage.inputs(shard))
        counts[state.what] += 1
        if state.what in ("failed", "blocked"):
            logger.warning(f"{shard.id} {state.what}: {state.why}")
    return counts
