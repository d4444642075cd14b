"""Qwen2-VL, 2.5-VL, 3-VL and 3.5: an image keeps its proportions, and its tokens grow with its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curation.backends.caption.attention import attend_by_length
from curation.backends.caption.base import ChatCaptioner
from curation.backends.caption.processing import at_most_a_megapixel
from curation.caption.captioner import Family
from curation.models.known import Model


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
        model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        hub_names=r"qwen-?(2|2\.5|3)-?vl|qwen-?3\.5",
        models=(
            _model("2", "2B", 2.209, "small cards; text in images"),
            _model("2", "7B", 8.291, "text in images, many languages", "qwen"),
            _model("2.5", "3B", 3.755, "small cards; text in images", licence="Qwen Research, non-commercial"),
            _model("2.5", "7B", 8.292, "documents and text in images"),
            _model("3", "2B", 2.128, "small cards"),
            _model("3", "4B", 4.438, "good captions for their cost"),
            _model("3", "8B", 8.767, "long, exact captions"),
            _model("3", "30B-A3B", 31.071, "large, as fast as a small one"),
            Model("qwen3.5-9b", "Qwen/Qwen3.5-9B", 9.41, "Apache-2.0", "long, exact captions, many languages"),
            Model("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", 35.107, "Apache-2.0", "the same, large and fast"),
        ),
    )

    def _load_processor(self, folder: Path) -> Any:
        processor = super()._load_processor(folder)
        at_most_a_megapixel(processor.image_processor)
        return processor

    def _load_model(self, folder: Path) -> Any:
        model = super()._load_model(folder)
        if self.settings.attention == "auto":
            attend_by_length(model)
        return model

    def _more_shape(self, tensors: dict[str, Any]) -> tuple[int, ...]:
        return ()
