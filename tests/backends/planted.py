"""Pictures of groups, and a CLIP that knows the group and the prompt of each by heart: what a check says of them is
right, and it fails them where something else is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curation.backends.check.zero_shot import question
from curation.check import Asked, CheckSettings
from curation.images import Pixels, decode_rgb, encode_jpeg
from curation.rewrite.groups import attributes_of, read_groups
from tests.backends import tiny_extractors as tiny

GROUPS = read_groups("default")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Planted:
    """made: the picture of each group before it is a JPEG.  jpegs: what readers see.  folder: of the CLIP, whose
    feature of each JPEG is the sum of those of the group's questions and of its prompt."""

    made: dict[str, Pixels]
    jpegs: dict[str, bytes]
    folder: Path

    @property
    def pictures(self) -> dict[str, Pixels]:
        return {group: decode_rgb(jpeg) for group, jpeg in self.jpegs.items()}

    @property
    def settings(self) -> CheckSettings:
        model = f"clip:{self.folder}"
        return CheckSettings(prompt_model=model, group_model=model, groups=GROUPS, min_prompt_score=0.5)

    def asked(self) -> list[Asked]:
        return [Asked(f"key{i}", prompt_of(group), group) for i, group in enumerate(self.jpegs)]


def prompt_of(group: str) -> str:
    return f"The person of picture number {NUMBERS[GROUPS.index(group)]}"


def make_planted(folder: Path, side: int = 224) -> Planted:
    """side: of the pictures, which are square."""
    rng = np.random.default_rng(5)
    block = side // 7
    made = {
        group: np.ascontiguousarray(
            rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(block, 0).repeat(block, 1)[:side, :side]
        )
        for group in GROUPS
    }
    jpegs = {group: encode_jpeg(pixels, 90) for group, pixels in made.items()}
    shown = [
        (decode_rgb(jpeg), [*(question(value) for _, value in attributes_of(group)), prompt_of(group)])
        for group, jpeg in jpegs.items()
    ]
    return Planted(made, jpegs, tiny.save_planted_clip(folder, shown, width=768))
