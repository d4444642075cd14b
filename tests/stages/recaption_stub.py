"""Stage 05 with a captioner whose captions are hashes of the pixels: quick, and the same everywhere.

Everything but the model is the real thing.  A caption begins with what was asked.  Images whose pixels are all of one
colour are refused by its processor or overflow its memory, by the colour.  A question with the word SILENT gets no
answer for some images, and one with REFUSED is refused for the same ones.  CURATION_STUB_S is how long one call takes,
and CURATION_STUB_REPEATS how many captions of an image repeat themselves; of several numbers with commas, each image
has one of them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from curation import backends
from curation.caption import captioner
from curation.errors import SampleError
from curation.models import hub_cache

stage = importlib.import_module("05_recaption")

REFUSED, OVERFLOWS, SILENT = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@dataclass(frozen=True)
class Pixels:
    digest: str
    colour: tuple[int, ...] | None
    shape: tuple[int, ...]
    nbytes: int = 0
    said: str = ""


class Backend:
    """Two shapes: upright and broad images.  A caption tells which batch it is of, as the last bits do."""

    family = backends.load("caption", "florence2").family
    name, revision, device_kind = "stub", "1", "cpu"
    asked = ""
    fits = 1 << 30
    works = 1 << 30  # calls before the device fails

    def __init__(self, source: str, settings: captioner.CaptionSettings) -> None:
        self.settings = settings

    def prepare(self, image: Any, inquiry: captioner.Inquiry | None = None) -> Pixels:
        question = self.settings.asked[inquiry.number if inquiry else 0]
        filled = inquiry.filled if inquiry is not None else None
        said = filled.text() if filled else question.template.words if question.template else "A photo of"
        array = np.asarray(image)
        first = tuple(int(value) for value in array[0, 0])
        colour = first if bool((array == array[0, 0]).all()) else None
        if colour == REFUSED:
            raise SampleError("processor_refused", "red")
        broad = int(image.width > image.height)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:24]
        if "REFUSED" in said and digest < "4":
            raise SampleError("prompt_refused", "the stub's processor")
        return Pixels(digest, colour, (3, 1 + broad), array.nbytes, said)

    def asked_of(self, number: int) -> str:
        return ""

    def caption(
        self,
        batch: Sequence[Pixels],
        seeds: Sequence[int],
        attempt: captioner.Attempt = captioner.FIRST,
        number: int = 0,
    ) -> list[str]:
        time.sleep(float(os.environ.get("CURATION_STUB_S", "0")))
        assert len({picture.shape for picture in batch}) == 1
        if len(batch) > self.fits or any(picture.colour == OVERFLOWS for picture in batch):
            raise captioner.OutOfMemory("the stub's memory is full")
        if (calls := Backend.works - 1) < 0:
            raise RuntimeError("HIP error: an illegal memory access was encountered")
        Backend.works = calls
        repeats = [int(number) for number in os.environ.get("CURATION_STUB_REPEATS", "0").split(",")]
        loops = [attempt.warmer < repeats[int(one.digest, 16) % len(repeats)] for one in batch]
        said = ["a red car on a road, " * 3 * loop + one.said for loop, one in zip(loops, batch, strict=True)]
        together = hashlib.sha256("".join(picture.digest for picture in batch).encode()).hexdigest()[:8]
        silent = [one.colour == SILENT or ("SILENT" in one.said and one.digest < "4") for one in batch]
        return [
            "" if no else f"{told} {one.digest} {together}" for told, one, no in zip(said, batch, silent, strict=True)
        ]

    def close(self) -> None:
        pass


class Recaption(stage.Recaption):  # type: ignore[name-defined, misc]
    """In this file, so that the workers of --workers run it too."""


_load = backends.load


def load(kind: str, name: str) -> Any:
    return Backend if (kind, name) == ("caption", "florence2") else _load(kind, name)


def resolve(model: str, revision: str | None = None, **_: Any) -> hub_cache.ModelSource:
    return hub_cache.ModelSource(name=model, location=model, revision="1", variant=None)


def main(argv: Sequence[str] | None = None) -> int:
    before = backends.load, hub_cache.resolve, stage.Recaption
    backends.load, hub_cache.resolve, stage.Recaption = load, resolve, Recaption
    try:
        return int(stage.main(argv))
    finally:
        backends.load, hub_cache.resolve, stage.Recaption = before


if __name__ == "__main__":
    sys.exit(main())
