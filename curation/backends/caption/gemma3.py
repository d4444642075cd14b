"""Captions by Gemma 3: every image a square of one size, 256 tokens."""

from __future__ import annotations

from typing import Any

from curation.backends.caption.base import ChatCaptioner, Inputs


class Backend(ChatCaptioner):
    """All batches have one shape."""

    family = "gemma3"
    half_overflows = True
    squeezes = True

    def _configure(self, prompt: str | None) -> None:
        """The text around a picture is the same for all: it is made once."""
        from PIL import Image

        super()._configure(prompt)
        self._blank = super()._inputs(Image.new("RGB", (64, 64)))

    def _inputs(self, image: Any) -> Inputs:
        return Inputs({**self._blank.tensors, "pixel_values": self._pixels(image)}, self._blank.shape)
