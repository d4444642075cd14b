"""What a caption is checked for before it is kept: whether it fits its picture, and whether it repeats itself.

A caption that fails is asked for again, from another seed.  One that fails every time is rejected: a judgement on the
caption and no failure of the run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from curation.check.api import Asked, Check
from curation.errors import SampleError
from curation.images import Pixels

NAMES: Final = ("caption", "repeats")
NGRAM: Final = 4  # words
SEEN_BYTES: Final = 1 << 20  # about what a check keeps of a picture until its caption is judged

# A word; in scripts that are written without spaces, a character.
_WORD: Final = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]|\\w+")


class Looked(NamedTuple):
    """What checks say of one caption.

    Attributes:
        failed: The names of those that it fails.
        scores: By name, what each has measured: ``{"caption": {"score": 0.21}, "repeats": {"share": 0.0}}``.
    """

    failed: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Any]]


class FailedCaption(NamedTuple):
    """A caption that is there and fails the checks.

    Attributes:
        text: It.
        round: See ``Answer``.
        looked: What the checks say.
    """

    text: str
    round: int
    looked: Looked


class Rejected(SampleError):
    """An image whose captions all failed a check.

    Attributes:
        text: The last caption.
        scores: Of it.
        failed_captions: How many there were.
        failed_checks: How many of them failed each check.
    """

    def __init__(self, looked: Looked, text: str, failed_captions: int, failed_checks: Mapping[str, int]) -> None:
        super().__init__(f"check_{looked.failed[0]}", "its captions fail the check")
        self.text, self.scores = text, looked.scores
        self.failed_captions, self.failed_checks = failed_captions, failed_checks


class CaptionChecks:
    """The checks of one process.  All of it may be called in many threads at once."""

    def __init__(self, *, fits: Check | None, max_repeats: float | None, tries: int) -> None:
        """
        Args:
            fits: Compares a caption with its picture; None: nothing does.
            max_repeats: The largest share of n-grams that may have been there before; None: any.
            tries: Captions of an image at most.
        """
        self._fits, self._max_repeats, self.tries = fits, max_repeats, tries
        self._one_at_a_time = threading.Lock()

    @property
    def looks_at_pictures(self) -> bool:
        """Whether a caption cannot be judged without its picture."""
        return self._fits is not None

    def prepare(self, picture: Pixels) -> Any:
        """Make of a picture what ``judge`` takes.  picture: uint8 RGB, height × width × 3."""
        return None if self._fits is None else self._fits.prepare(picture)

    def judge(self, seen: Sequence[Any], captions: Sequence[str]) -> list[Looked]:
        """Judge captions.  seen: of their pictures, from ``prepare``."""
        failed: list[list[str]] = [[] for _ in captions]
        scores: list[dict[str, Mapping[str, Any]]] = [{} for _ in captions]
        if self._fits is not None:
            asked = [Asked(key="", text=caption) for caption in captions]
            with self._one_at_a_time:
                verdicts = self._fits.judge(seen, asked)
            for place, verdict in enumerate(verdicts):
                scores[place]["caption"] = verdict.scores
                failed[place] += [] if verdict.passed else ["caption"]
        for place, caption in enumerate(captions if self._max_repeats is not None else ()):
            assert self._max_repeats is not None
            share = repeated_share(caption)
            scores[place]["repeats"] = {"share": share}
            failed[place] += ["repeats"] if share > self._max_repeats else []
        return [Looked(tuple(names), told) for names, told in zip(failed, scores, strict=True)]

    def close(self) -> None:
        if self._fits is not None:
            self._fits.close()


def repeated_share(text: str) -> float:
    """The share of the n-grams of a text's words that were in it before: seq-rep-4 of Welleck et al., 2020
    (https://arxiv.org/abs/1908.04319, section 6).

    Returns:
        From 0 to 1, in four digits; 0 for a text of fewer words.
    """
    words = _WORD.findall(text.lower())
    grams = [*zip(*(words[start:] for start in range(NGRAM)), strict=False)]
    return round(1 - len({*grams}) / len(grams), 4) if grams else 0.0
