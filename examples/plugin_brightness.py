"""A plugin of stage 06 (``custom_pypath``): how bright pictures are, and how much a model of your own likes them.

    python3 06_metadata.py --custom_pypath examples/plugin_brightness.py --models brightness …

A preparation is what is made of one sample, in processes that run ahead of the model; a class of the table EXTRACTORS
is a model with the columns and features that it gives for a batch.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.extract import Batch, Column, Feature, ModelSettings


@dataclass(frozen=True)
class Thumbnail:
    """The preprocessing: 16 × 16 × 3 bytes.  Models that ask for equal preparations share one."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int = 16

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.asarray(Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.BOX))


class Brightness:
    """The model: one call for a batch."""

    name, revision = "brightness", "1"  # raised when it gives other numbers
    needs = ()  # features of other models that it computes on, such as oai-clip-vit-l14-image
    columns = (Column("brightness", "float32"), Column("is-dark", "bool"))
    features = (Feature("brightness-rows", 16),)
    preparations = (Thumbnail(),)

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        """Load weights here; ``settings`` tells the device, the precision, and what ``weights`` names."""

    def compute(self, batch: Batch) -> dict[str, Any]:
        # batch.device_tensor(…) gives the same as a torch tensor on the device
        pixels = batch.prepared(self.preparations[0]).astype(np.float32) / 255
        brightness = pixels.mean((1, 2, 3))
        return {"brightness": brightness, "is-dark": brightness < 0.25, "brightness-rows": pixels.mean((2, 3))}

    def close(self) -> None:
        """Let go of what was loaded."""


EXTRACTORS = {"brightness": Brightness}
