"""Tries come in rounds: what failed in one is made again, with another seed, in the next.

Round 0 is the plan of a shard without checks, so that a picture that passes has the bytes that it has there.  Each
further round has the samples that failed the one before, in the shard's order.  It is planned only when the verdict of
every picture of that one is in the checkpoint, so that the plan is the same whenever a worker is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from curation.check import Asked, still_holds
from curation.check.counts import REASON
from curation.edits import KeptEdit, PreviousEdits, read_provenance
from curation.errors import ShardError
from curation.generate.batches import Batch, Job, plan_batches, seed_of
from curation.generate.encode import AnyTexts, Pictures, TryLog, make_missing
from curation.generate.tries import BOXES, Outcome, Try, best_of
from curation.run import ShardContext

_JUDGED_AT_ONCE = 32  # pictures of an earlier run: enough for a device, and few enough for memory


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """How pictures are made in rounds.

    Attributes:
        tries: Rounds at most.
        batch_size: Pictures that are made together.
        text_batches: Batches whose prompts are encoded together; 0: within each batch.
    """

    tries: int
    batch_size: int
    text_batches: int

    def groups(self, jobs: Iterable[Job], round_number: int) -> list[list[Batch]]:
        """The batches of one round, in groups whose prompts are encoded together."""
        batches = plan_batches(jobs, self.batch_size, round_number)
        step = max(1, self.text_batches)
        return [batches[start : start + step] for start in range(0, len(batches), step)]


def make_in_rounds(
    work: ShardContext,
    jobs: Sequence[Job],
    log: TryLog,
    plan: RoundPlan,
    turn: AbstractContextManager[object],
    make: Callable[[int, Batch, AnyTexts | None], Pictures],
    encode_texts: Callable[[Sequence[str]], AnyTexts | None],
) -> list[Batch]:
    """Make pictures until each sample has one that passed, or has been tried as often as allowed.

    Args:
        work: The shard's context.
        jobs: The samples that need a new picture, in the shard's order.
        log: Receives the pictures and what the checks say; it has what an interrupted attempt has made.
        plan: How they are made.
        turn: Is held while the device works for this shard.  Between two rounds another shard may have it.
        make: Generates the images of a batch, from encoded prompts if there are any; it is told the round.
        encode_texts: Encodes all prompts of a group at once; None: they are encoded batch by batch.

    Returns:
        The batches of all rounds.

    Raises:
        Stopped: A stop was requested; all images that were made are in the log.
    """
    batches: list[Batch] = []
    for number in range(plan.tries):
        if not jobs:
            break
        groups = plan.groups((job for job in jobs if not log.is_known(job.key, number)), number)
        log.begin_round(groups)

        def make_batch(batch: Batch, texts: AnyTexts | None, number: int = number) -> Pictures:
            return make(number, batch, texts)

        if groups:
            make_missing(work, groups, log, turn, make_batch, encode_texts)
        batches += [batch for group in groups for batch in group]
        jobs = [job for job in jobs if not log.passed(job.key)]
    work.ends_soon()
    return batches


# ---- what an earlier run has left


def sort_earlier(
    log: TryLog,
    earlier: PreviousEdits,
    found: Mapping[str, KeptEdit],
    provenance: Path,
    record: Mapping[str, Any],
    asked: Mapping[str, Asked],
    tries: int,
) -> dict[str, Outcome]:
    """Judge the pictures that are there already, and say for which samples nothing is to be made.

    A picture that was judged by the same checks, and for the same group, is not judged again.  One that fails is known
    to the log from now on: it is the try of its round, and only the other rounds are made.

    Args:
        log: The shard's tries.
        earlier: The edits that are there.
        found: Those of them whose pictures may be kept.
        provenance: What the earlier run recorded of this shard.
        record: What each check records of itself, by name.
        asked: What each picture is to show now.
        tries: Rounds at most.

    Returns:
        key → what comes of the sample.  The picture of what is kept is the one that is there.
    """
    told = {key: _as_recorded(edit, record, asked[key]) for key, edit in found.items()}
    known = {key: one for key, one in told.items() if one is not None}
    settled_before = set(known)
    rest = earlier.pictures([key for key in found if key not in known])
    while chunk := {key: (_round_of(found[key]), jpg) for key, jpg in islice(rest, _JUDGED_AT_ONCE)}:
        known |= log.judge_earlier(chunk)
    before = _failed_before(provenance, found)
    outcomes: dict[str, Outcome] = {}
    for key, attempt in known.items():
        others = [one for one in before.get(key, ()) if one.round != attempt.round]
        if attempt.passed:
            outcomes[key] = Outcome(attempt, others)
        elif key in settled_before and _tries_of(found[key]) >= tries:
            outcomes[key] = log.settled(attempt, others)
        else:
            log.knows(attempt, key)
    return outcomes


def _as_recorded(edit: KeptEdit, record: Mapping[str, Any], asked: Asked) -> Try | None:
    """The verdict that an edit's json has, if it is of the same checks; None: the picture is to be judged.

    The text was the same, or the picture would not be kept.
    """
    said = edit.checked.get("checks")
    if not still_holds(edit.record, record, said) or not _are_checks(said):
        return None
    if "group" in said and (edit.group or None) != asked.group:
        return None
    checks: dict[str, Mapping[str, Any]] = dict(said)
    if "face" in checks:
        if not isinstance(edit.boxes, list):
            return None
        checks["face"] = {**checks["face"], BOXES: edit.boxes}
    return Try(_round_of(edit), checks, sha256=edit.sha256)


def _are_checks(said: Any) -> TypeGuard[Mapping[str, Mapping[str, Any]]]:
    return isinstance(said, dict) and all(
        isinstance(one, dict) and "passed" in one and one["passed"] in (True, False, None) for one in said.values()
    )


def _round_of(edit: KeptEdit) -> int:
    """The round in which it was made; an edit of a version without rounds has none."""
    return _whole(edit.checked.get("round"))


def _tries_of(edit: KeptEdit) -> int:
    return _whole(edit.checked.get("tries"))


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def _failed_before(provenance: Path, found: Mapping[str, KeptEdit]) -> dict[str, list[Try]]:
    """The failed tries of samples that needed several, as an earlier run recorded them."""
    if not any(_tries_of(edit) > 1 for edit in found.values()):
        return {}
    try:
        lines = read_provenance(provenance)
    except ShardError:  # what failed before is lost; the pictures that are there are not
        return {}
    recorded = {key: lines[key].get("failed_tries") for key in found if key in lines}
    return {key: list(_tries_in(value)) for key, value in recorded.items() if isinstance(value, list)}


def _tries_in(recorded: Sequence[Any]) -> Iterator[Try]:
    for line in recorded:
        if isinstance(line, dict) and type(line.get("round")) is int and _are_checks(line.get("checks")):
            reason = line.get("reason")
            yield Try(line["round"], line["checks"], (reason, "") if isinstance(reason, str) else None)


# ---- what is told of it


def as_curation(outcome: Outcome) -> dict[str, Any]:
    """The fields of ``curation`` that say what the checks said of a sample's picture."""
    kept = outcome.kept
    assert kept is not None
    said = "passed" if kept.passed else "failed"
    return {"check": said, "tries": outcome.tries, "round": kept.round, "checks": kept.scores}


def failed_tries(outcome: Outcome, seed: int, key: str) -> list[dict[str, Any]]:
    """One line for each picture of a sample that is not kept, for the provenance.

    seed: That of the run; each line has the seed of its own noise.
    """
    return [
        {
            "round": one.round,
            "seed": seed_of(seed, key, one.round),
            "checks": one.scores,
            **({} if one.refused is None else {"reason": one.refused[0]}),
        }
        for one in outcome.failed
    ]


def rejection(outcome: Outcome, order: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Why a sample is left out whose pictures all failed, by the best of them; and what is told of it.

    order: The names of the checks; the first that failed is the reason.
    """
    best = best_of(one for one in outcome.failed if one.failures)
    first = next((name for name in order if name in best.failures), best.failures[0])
    return REASON + first, {"tries": outcome.tries, "round": best.round, "checks": best.scores}


def group_of(curation: Mapping[str, Any]) -> str | None:
    """The group of people that a sample portrays; None if stage 02 recorded none, or an empty text."""
    group = curation.get("group")
    return group if isinstance(group, str) and group else None
