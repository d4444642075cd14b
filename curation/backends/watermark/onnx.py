"""How much an image looks watermarked, by an ONNX classifier of two classes on the CPU.

It takes 256×256 pixels, normalised by ImageNet's mean and deviation, and class 1 means "watermarked".  The weights of
boomb0om/watermark-detectors (ConvNeXt-tiny), exported to ONNX, fit; this is how that project runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.errors import InfrastructureError
from curation.images import Pixels
from curation.models.onnx import open_session, read_weights

SIDE = 256  # pixels
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


class Backend:
    """The classifier of one ONNX file."""

    def __init__(self, path: Path) -> None:
        """Raises InfrastructureError where the file is no such classifier."""
        data, self.revision = read_weights(path)
        self._session, _ = open_session(data, path, threads=1, gpu=None)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise InfrastructureError(f"{path}: no classifier of images (it has {len(inputs)} inputs)")
        self._input = inputs[0].name

    def score(self, pixels: Pixels) -> float:
        """Score an image; several threads may call this at once.

        Args:
            pixels: height × width × 3, uint8.

        Returns:
            The probability of a watermark, 0 to 1, rounded to the digits that a float32 has.
        """
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        normal = (np.asarray(image, np.float32) / 255 - _MEAN) / _DEVIATION
        logits: Any = self._session.run(None, {self._input: normal.transpose(2, 0, 1)[None].astype(np.float32)})[0]
        logits = np.asarray(logits, np.float64).reshape(-1)
        if logits.size < 2:
            raise InfrastructureError("the watermark classifier gives one number an image, two are needed")
        weights = np.exp(logits - logits.max())
        return round(float(weights[1] / weights.sum()), 6)
