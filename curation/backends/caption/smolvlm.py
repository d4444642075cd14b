"""SmolVLM2 of Hugging Face: an image is up to 16 tiles and a thumbnail of it, 64 or 81 tokens each."""

from __future__ import annotations

from typing import Any

from curation.backends.caption.base import UNQUANTIZED, ChatCaptioner
from curation.caption.captioner import Family
from curation.models.known import Model


def _model(short: str, name: str, parameters: float, suits: str) -> Model:
    return Model(short, f"HuggingFaceTB/{name}", parameters, "Apache-2.0", suits)


class Backend(ChatCaptioner):
    """A batch holds images with the same number of tiles and nearly the same number of tokens."""

    family = Family(
        name="smolvlm",
        batch_size=16,
        max_tokens=256,
        model_types=("smolvlm",),
        hub_names=r"smolvlm-?2",
        models=(
            _model("smolvlm2-2.2b", "SmolVLM2-2.2B-Instruct", 2.247, "small cards; text in images"),
            _model("smolvlm2-500m", "SmolVLM2-500M-Video-Instruct", 0.507, "very small cards"),
            _model("smolvlm2-256m", "SmolVLM2-256M-Video-Instruct", 0.256, "very small cards; short, simple captions"),
        ),
    )
    # It writes the same text around an image.  SmolVLM's own also wants the packages that its videos need.
    processor_class = "Idefics3Processor"
    unquantized = (*UNQUANTIZED, "connector")

    def _process(self, image: Any, text: str) -> Any:
        """Without the mask of the padding, which is as large as the pixels: tiles of one image have none."""
        made = super()._process(image, text)
        del made["pixel_attention_mask"]
        return made
