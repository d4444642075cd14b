"""Gemma 3 of Google: every image is a square of one size, and 256 tokens."""

from __future__ import annotations

from typing import Any

from curation.backends.caption.base import ChatCaptioner, Inputs
from curation.caption.captioner import Family
from curation.models.known import Model


def _model(size: str, parameters: float, suits: str) -> Model:
    return Model(f"gemma3-{size}", f"google/gemma-3-{size}-it", parameters, "Gemma terms", suits, gated=True)


class Backend(ChatCaptioner):
    """All batches have one shape."""

    family = Family(
        name="gemma3",
        batch_size=1,
        max_tokens=256,
        model_types=("gemma3",),
        hub_names=r"(?<![a-z])gemma-?3(?!n)",
        models=(
            _model("4b", 4.300, "style, medium, palette, mood"),
            _model("12b", 12.187, "the same, better"),
            _model("27b", 27.432, "the same, best; smaller with --quantize"),
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
