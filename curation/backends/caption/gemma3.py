"""Gemma 3 of Google: every image is a square of one size, and 256 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from curation.backends.caption.base import ChatCaptioner, Inputs, Wording
from curation.backends.caption.processing import with_one_image
from curation.caption.captioner import Family, Question
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

    def _configure(self, question: Question) -> Wording:
        """The text around an image is made once, where it is the same for all images."""
        from PIL import Image

        blank = Image.new("RGB", (64, 64))
        self._beside_blank = with_one_image(self.processor, blank)
        wording = super()._configure(question)
        if question.varies:
            return wording
        return replace(wording, tensors=super()._inputs(blank, wording, None).tensors)

    def _process(self, image: Any, text: str) -> Any:
        return self._beside_blank(images=[image], text=[text], return_tensors="pt", add_special_tokens=self._adds_first)

    def _inputs(self, image: Any, wording: Wording, said: str | None) -> Inputs:
        tensors = wording.tensors if said is None else super()._inputs(image, wording, said).tensors
        shape = (tensors["input_ids"].shape[1], *tensors["pixel_values"].shape[1:])
        return Inputs({**tensors, "pixel_values": self._pixels(image)}, shape)
