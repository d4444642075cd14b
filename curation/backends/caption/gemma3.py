"""Gemma 3 of Google: every image is a square of one size, and 256 tokens."""

from __future__ import annotations

from typing import Any

from curation.backends.caption.base import ChatCaptioner, Inputs
from curation.caption.captioner import Family, Model

LICENCE = "Gemma terms, to be accepted"


class Backend(ChatCaptioner):
    """All batches have one shape."""

    family = Family(
        name="gemma3",
        batch_size=1,
        max_tokens=256,
        model_types=("gemma3",),
        hub_names=r"gemma-?3(?!n)",
        models=(
            Model("gemma3-4b", "google/gemma-3-4b-it", 10, LICENCE, "style, medium, palette, mood"),
            Model("gemma3-12b", "google/gemma-3-12b-it", 26, LICENCE, "the same, better"),
            Model("gemma3-27b", "google/gemma-3-27b-it", 58, LICENCE, "the same, best; 4bit: 20 GB"),
        ),
    )
    half_overflows = True
    squeezes = True

    def _configure(self, prompt: str | None) -> None:
        """The text around an image is the same for all images, so it is made once."""
        from PIL import Image

        super()._configure(prompt)
        self._blank = super()._inputs(Image.new("RGB", (64, 64)))

    def _inputs(self, image: Any) -> Inputs:
        return Inputs({**self._blank.tensors, "pixel_values": self._pixels(image)}, self._blank.shape)
