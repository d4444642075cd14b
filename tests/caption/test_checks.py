"""What captions are checked for: which of them pass, how often they are asked for, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from curation import backends
from curation.caption.batching import caption_batch
from curation.caption.checks import CaptionChecks, Rejected, repeated_share
from curation.caption.feed import CaptionSample
from curation.check import Asked, Verdict
from curation.errors import SampleError
from curation.models.batch_size import FittingBatchSize
from curation.replies import CUT, FIRST, Answer, Attempt, Reply
from tests.backends.test_caption import Named


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("A red car", 0.0),
        ("A red car on a road beside a red house with a garden", 0.0),
        ("one two three four one two three four", 0.2),
        ("a car on a road a car on a road a car on a road", 0.5833),
        ("Red, red; RED. red-red red", 0.6667),
        ("红色汽车停在路上红色汽车停在路上", 0.3846),
        ("\u0000 \U0001f600 …" * 1000, 0.0),
    ],
)
def test_the_share_of_words_that_were_there_before(text: str, share: float) -> None:
    assert repeated_share(text) == share


def test_a_megabyte_of_words_is_judged_at_once() -> None:
    assert repeated_share("word " * 200_000) > 0.99


class Scripted:
    """A captioner that writes what it was told to; an image is the place of its replies."""

    family = backends.load("caption", "chat").family
    asked = "Describe it."

    def __init__(self, replies: Sequence[Sequence[Any]]) -> None:
        self.replies = [[*of_image] for of_image in replies]
        self.calls: list[tuple[list[int], Attempt, list[int]]] = []

    def caption(self, batch: Sequence[Named], seeds: Sequence[int], attempt: Attempt = FIRST) -> list[Any]:
        self.calls.append(([one.name for one in batch], attempt, [*seeds]))
        return [self.replies[one.name].pop(0) for one in batch]


class Fits:
    """A check of pictures that are texts: a caption fits its own."""

    name, record = "caption", {"model": "texts"}

    def prepare(self, picture: Any) -> Any:
        return picture

    def judge(self, prepared: Sequence[str], asked: Sequence[Asked]) -> list[Verdict]:
        return [Verdict(one in a.text, {"score": float(one in a.text)}) for one, a in zip(prepared, asked, strict=True)]

    def close(self) -> None:
        pass


def captions(backend: Scripted, *, tries: int = 3, seen: Sequence[str] | None = None) -> list[Any]:
    checks = CaptionChecks(fits=Fits(), max_repeats=0.2, tries=tries)
    batch = [Named(place) for place in range(len(backend.replies))]
    seen = ["dog"] * len(batch) if seen is None else seen
    memory = FittingBatchSize(8, "cpu")
    return caption_batch(backend, memory, batch, [*range(len(batch))], checks=checks, seen=seen)  # type: ignore[arg-type]


def test_a_caption_that_fails_is_asked_for_again_with_another_seed() -> None:
    loop = "A dog on a road, a dog on a road, a dog on a road."
    backend = Scripted([["A dog."], ["A cat.", "A dog runs."], ["A cat.", loop, "A cat runs."], [loop, "A dog."]])
    first, second, third, fourth = captions(backend)
    assert first == Answer("A dog.", checks={"caption": {"score": 1.0}, "repeats": {"share": 0.0}}, failed_checks={})
    assert (second.text, second.failed_captions, second.failed_checks) == ("A dog runs.", 1, {"caption": 1})
    assert isinstance(third, Rejected) and third.reason == "check_caption" and third.text == "A cat runs."
    assert (third.failed_captions, third.failed_checks) == (3, {"caption": 2, "repeats": 1})
    assert (fourth.text, fourth.failed_checks) == ("A dog.", {"repeats": 1})
    assert [(names, attempt.warmer) for names, attempt, _ in backend.calls] == [
        ([0, 1, 2, 3], 0),
        ([1, 2, 3], 1),
        ([2], 2),
    ]
    assert len({seeds[names.index(2)] for names, _, seeds in backend.calls}) == 3, "each time another seed"


def test_how_often_is_an_option() -> None:
    backend = Scripted([["A cat."] * 9])
    assert captions(backend, tries=1)[0].reason == "check_caption" and len(backend.calls) == 1
    backend = Scripted([["A cat."] * 4 + ["A dog."]])
    assert captions(backend, tries=5)[0].text == "A dog." and len(backend.calls) == 5
    refusal = "I'm sorry, but I can't help with that."
    backend = Scripted([[refusal] * 4 + ["A dog."]])
    assert captions(backend, tries=5)[0].text == "A dog.", "of replies that are no captions too"


def test_only_whole_captions_are_judged_and_a_failed_reply_after_a_rejected_one_counts_nothing() -> None:
    backend = Scripted([[Reply("A cat. And a", CUT), "A dog. And a cat."], ["A cat.", SampleError("llm_timeout")]])
    first, second = captions(backend)
    assert (first.text, first.failed_captions) == ("A dog. And a cat.", 0)
    assert isinstance(second, Rejected) and second.failed_captions == 1
    backend = Scripted([["A cat.", "I'm sorry, but I can't help with that.", ""]])
    (only,) = captions(backend)
    assert isinstance(only, Rejected) and (only.failed_captions, len(backend.calls)) == (1, 3)


def test_what_a_record_says_of_a_rejected_caption_is_bounded_and_clean() -> None:
    backend = Scripted([["A cat\u202e\u0007 " + " ".join(map(str, range(5000)))] * 3])
    (only,) = captions(backend)
    sample = CaptionSample("a", {}, None, b"", "0")
    record = json.loads(sample.outcome(only, "mark"))
    assert len(record["rejected"]["caption"]) <= 1000 and record["rejected"]["caption"].startswith("A cat 0 1 2")
    assert record["rejected"]["reason"] == "check_caption" and record["rejected"]["tries"] == 3
    assert "failed" not in record and sample.row("0", {}) is None
