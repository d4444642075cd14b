"""One try: a picture that was made for a sample, and what the checks said of it; and which of several tries is kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import orjson

from curation.check import Verdict
from curation.jsonio import dump_json

BOXES = "boxes"  # the score of ``face`` that goes to the sample's face_bboxes
Checks: TypeAlias = Mapping[str, Mapping[str, Any]]  # name of a check → "passed" and its scores
Rank: TypeAlias = tuple[bool, int, float]

# The first byte of a record in the checkpoint: a picture, a reason why there is none, or a try that was judged.
_PICTURE, _REFUSED, _JUDGED = b"P", b"R", b"J"
_SHA256_BYTES, _LENGTH_BYTES = 32, 4


@dataclass(frozen=True, slots=True)
class Try:
    """One picture that was made for a sample.

    Attributes:
        round: The number of the round in which it was made, from 0.
        checks: What each check said; empty where nothing was checked, or there is no picture.
        refused: Why there is no picture (a blank one, or one that the model's own safety checker flagged): a reason
            and a detail.
        jpg: The picture; empty where it was not stored.
        sha256: Of the picture, in hex.
    """

    round: int
    checks: Checks = field(default_factory=dict)
    refused: tuple[str, str] | None = None
    jpg: bytes = b""
    sha256: str = ""

    @property
    def passed(self) -> bool:
        """Whether there is a picture, and no check found fault with it."""
        return self.refused is None and not self.failures

    @property
    def failures(self) -> list[str]:
        """The checks that it failed, in their order; or the reason why there is no picture."""
        if self.refused is not None:
            return [self.refused[0]]
        return [name for name, said in self.checks.items() if said["passed"] is False]

    @property
    def rank(self) -> Rank:
        """Of two tries that failed, the one with the higher rank is kept; of equal ones, the earlier."""
        score = self.checks.get("prompt", {}).get("score")
        known = float(score) if isinstance(score, int | float) and math.isfinite(score) else -math.inf
        return self.refused is None, len(self.checks) - len(self.failures), known

    @property
    def boxes(self) -> list[list[float]] | None:
        """The faces that were found in it; None where nobody looked."""
        found: list[list[float]] | None = self.checks.get("face", {}).get(BOXES)
        return found

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """What each check said, without boxes."""
        return {name: {one: value for one, value in said.items() if one != BOXES} for name, said in self.checks.items()}

    def judged(self, verdicts: Mapping[str, Verdict]) -> Try:
        """The same try with what the checks said of it."""
        return replace(self, checks={name: {"passed": v.passed, **v.scores} for name, v in verdicts.items()})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of all tries of a sample.

    Attributes:
        kept: The one that is kept; None if there is none.
        failed: The others, in the order of their rounds.
    """

    kept: Try | None
    failed: Sequence[Try] = ()

    @property
    def tries(self) -> int:
        return len(self.failed) + (self.kept is not None)


def best_of(tries: Iterable[Try]) -> Try:
    """The first that passed; else the one with most checks passed, then the higher prompt score, then the earlier."""
    return max(tries, key=lambda one: (one.passed, (-one.round,) if one.passed else one.rank, -one.round))


def outcome_of(tries: Sequence[Try], *, keeps_failed: bool) -> Outcome:
    """Choose among all tries of a sample.

    tries: In the order of their rounds.
    keeps_failed: Whether a picture is kept where none passed.
    """
    if not tries:
        return Outcome(None)
    best = best_of(tries)
    if best.refused is not None or not (best.passed or keeps_failed):
        return Outcome(None, tries)
    return Outcome(best, [one for one in tries if one is not best])


# ---- records of the checkpoint


def pack(attempt: Try, *, judged: bool, with_picture: bool) -> bytes:
    """A try as a record.

    judged: whether checks looked at it; the record of an unchecked picture is the one that it always was.
    with_picture: False for a picture that can no longer be kept, so that checkpoints do not grow by it.
    """
    picture = bytes.fromhex(attempt.sha256) + attempt.jpg if attempt.jpg else b""
    if not judged:
        return _PICTURE + picture if attempt.refused is None else _REFUSED + dump_json(list(attempt.refused))
    header = dump_json([attempt.refused, attempt.sha256, attempt.checks])
    return _JUDGED + len(header).to_bytes(_LENGTH_BYTES, "big") + header + (attempt.jpg if with_picture else b"")


def unpack(round_number: int, record: bytes) -> Try:
    """The try in a record that ``pack`` made."""
    kind, rest = record[:1], record[1:]
    if kind == _PICTURE:
        return Try(round_number, jpg=rest[_SHA256_BYTES:], sha256=rest[:_SHA256_BYTES].hex())
    if kind == _REFUSED:
        reason, detail = orjson.loads(rest)
        return Try(round_number, refused=(reason, detail))
    end = _LENGTH_BYTES + int.from_bytes(rest[:_LENGTH_BYTES], "big")
    refused, sha256, checks = orjson.loads(rest[_LENGTH_BYTES:end])
    return Try(round_number, checks, None if refused is None else tuple(refused), rest[end:], sha256)


def of_picture(round_number: int, jpg: bytes) -> Try:
    """A try that nobody has judged yet."""
    return Try(round_number, jpg=jpg, sha256=hashlib.sha256(jpg).hexdigest())
