"""Captions by Qwen2-VL, 2.5-VL and 3-VL: an image in its own proportions, as many tokens as it is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curation.backends.caption.base import ChatCaptioner

MOST_PIXELS = 1 << 20  # the models would take 16 times as many, and as many tokens


class Backend(ChatCaptioner):
    """A batch holds images of nearly one number of tokens, whatever their proportions: patches are one long row."""

    family = "qwen"

    def _load_processor(self, folder: Path) -> Any:
        processor = super()._load_processor(folder)
        size = dict(processor.image_processor.size)
        size["longest_edge"] = min(size["longest_edge"], MOST_PIXELS)  # pixels in all, whatever the name says
        size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
        processor.image_processor.size = size
        return processor

    def _more_shape(self, tensors: dict[str, Any]) -> tuple[int, ...]:
        return ()
