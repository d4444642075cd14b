"""A plugin of stage 06 for its tests: numbers that tell the picture, the caption and the batch; quick, without torch.

A picture of one colour does what hostile pictures do, by the colour.  CURATION_STUB_S is how long one batch takes.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from curation.errors import SampleError
from curation.extract.api import Batch, Column, Feature, SampleFacts
from curation.extract.settings import ModelSettings

CRASHES, HANGS, RAISES, REFUSED, OVERFLOWS, DIES_ONCE = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (7, 7, 7), (5, 5, 5)
)  # fmt: skip


def log(what: str) -> None:
    """Into the file that the test reads; every process of a run appends to it."""
    if path := os.environ.get("CURATION_STUB_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{what}\n")


@dataclass(frozen=True)
class Crop:
    """8 × 8 × 3 bytes that follow from every pixel."""

    takes: ClassVar[str] = "image"

    def __call__(self, pixels: Any) -> Any:
        log("crop")
        colour = tuple(int(c) for c in pixels[0, 0]) if (pixels == pixels[0, 0]).all() else None
        if colour == CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)
        if colour == HANGS:
            time.sleep(3600)
        if colour == RAISES:
            raise ZeroDivisionError("a bug that this picture finds")
        if colour == REFUSED:
            raise SampleError("refused", "nine of each")
        if colour == DIES_ONCE and not (mark := Path(os.environ["CURATION_STUB_LOG"] + ".died")).exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if colour is not None:
            return np.full((8, 8, 3), colour, np.uint8)
        digest = hashlib.sha256(pixels.tobytes()).digest() * 6
        return np.frombuffer(digest, np.uint8).reshape(8, 8, 3).copy()


@dataclass(frozen=True)
class Words:
    takes: ClassVar[str] = "text"

    def __call__(self, caption: str) -> Any:
        return np.frombuffer(hashlib.sha256(caption.encode("utf-8", "replace")).digest(), np.int32).copy()


@dataclass(frozen=True)
class Facts:
    takes: ClassVar[str] = "sample"

    def __call__(self, facts: SampleFacts) -> dict[str, Any]:
        return {"stub-url": facts.metadata.get("url"), "stub-size": None if facts.size is None else facts.size[0]}


def boxes_of(numbers: Any, readable: Any) -> list[Any]:
    """In a worker process, while the next batch is computed."""
    return [[[0.0, 0.25, 0.5, float(x)]] if r else [] for x, r in zip(numbers, readable, strict=True)]


class Stub:
    name, revision = "stub", "1"
    needs: tuple[str, ...] = ()
    columns = (
        Column("stub-score", "float32"),
        Column("stub-words", "int64", needs_image=False),
        Column("stub-boxes", "boxes", needs_text=False),
        Column("stub-url", "string", needs_image=False, needs_text=False),
        Column("stub-size", "int64", needs_image=True, needs_text=False),
    )
    features = (
        Feature("stub-image", 192, needs_text=False),
        Feature("stub-text", 8, needs_image=False),
    )
    preparations = (Crop(), Words(), Facts())
    fits = 1 << 30
    failure: ClassVar[Callable[[str], Exception]] = MemoryError
    works = 1 << 30  # calls before the device fails

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        self.settings = settings

    def compute(self, batch: Batch) -> dict[str, Any]:
        time.sleep(float(os.environ.get("CURATION_STUB_S", "0")))
        crops, words, facts = (batch.prepared(preparation) for preparation in self.preparations)
        if len(batch) > self.fits or (crops[:, 0, 0] == OVERFLOWS).all(1).any():
            log(f"overflow {len(batch)}")
            raise type(self).failure("the stub's memory is full: Failed to allocate memory for requested buffer")
        if (calls := type(self).works - 1) < 0:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        type(self).works = calls
        log(f"batch {len(batch)}")
        image = crops.reshape(len(batch), -1).astype(np.float32) / 255
        text = words.astype(np.float32) / 2**31
        return {
            "stub-score": (image[:, :8] * text).sum(1),
            "stub-words": words[:, 0],
            "stub-boxes": batch.beside(boxes_of, image[:, 0].copy(), batch.readable),
            "stub-url": [row.get("stub-url") for row in facts],
            "stub-size": [row.get("stub-size") for row in facts],
            "stub-image": image,
            "stub-text": text,
        }

    def close(self) -> None:
        log("closed")


class Head:
    """On another's features."""

    name, revision = "head", "1"
    needs: tuple[str, ...] = ("stub-image",)
    columns = (Column("head-score", "float32"),)
    features: tuple[Feature, ...] = ()
    preparations = (Crop(),)  # the same as the other's: computed once

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        pass

    def compute(self, batch: Batch) -> dict[str, Any]:
        return {"head-score": np.asarray(batch.features["stub-image"]).mean(1)}

    def close(self) -> None:
        pass


class Circle(Head):
    name = "circle"
    needs = ("square-feature",)
    columns = ()
    features = (Feature("circle-feature", 1),)


class Square(Head):
    name = "square"
    needs = ("circle-feature",)
    columns = ()
    features = (Feature("square-feature", 1),)


class Copy(Stub):
    name = "copy"


class Lonely(Head):
    name = "lonely"
    needs = ("nobody-gives-this",)
    columns = ()


class Forgetful(Head):
    name = "forgetful"
    needs = ()
    columns = (Column("forgotten", "float32"),)

    def compute(self, batch: Batch) -> dict[str, Any]:
        return {}


EXTRACTORS = {
    "stub": Stub, "head": Head, "circle": Circle, "square": Square, "copy": Copy, "lonely": Lonely,
    "forgetful": Forgetful,
}  # fmt: skip
