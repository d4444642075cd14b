"""Qwen2-VL, 2.5-VL and 3-VL: an image keeps its proportions, and its tokens grow with its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curation.backends.caption.base import ChatCaptioner
from curation.caption.captioner import Family
from curation.models.known import Model

MOST_PIXELS = 1 << 20  # the models would take 16 times as many, and as many tokens


def _model(
    version: str, size: str, parameters: float, suits: str, *other_names: str, licence: str = "Apache-2.0"
) -> Model:
    source = f"Qwen/Qwen{version}-VL-{size}-Instruct"
    return Model(f"qwen{version}-vl-{size.lower()}", source, parameters, licence, suits, other_names)


class Backend(ChatCaptioner):
    """A batch holds images with nearly the same number of tokens, whatever their proportions are, because their patches
    form one long row."""

    family = Family(
        name="qwen",
        batch_size=48,
        max_tokens=120,
        model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        hub_names=r"qwen-?(2|2\.5|3)-?vl",
        models=(
            _model("2", "2B", 2.209, "small cards; text in images"),
            _model("2", "7B", 8.291, "text in images, many languages", "qwen"),
            _model("2.5", "3B", 3.755, "small cards; text in images", licence="Qwen Research, non-commercial"),
            _model("2.5", "7B", 8.292, "documents and text in images"),
            _model("3", "2B", 2.128, "small cards"),
            _model("3", "4B", 4.438, "good captions for their cost"),
            _model("3", "8B", 8.767, "long, exact captions"),
        ),
    )

    def _load_processor(self, folder: Path) -> Any:
        processor = super()._load_processor(folder)
        size = dict(processor.image_processor.size)
        size["longest_edge"] = min(size["longest_edge"], MOST_PIXELS)  # pixels in all, whatever the name says
        size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
        processor.image_processor.size = size
        return processor

    def _more_shape(self, tensors: dict[str, Any]) -> tuple[int, ...]:
        return ()
