"""``nudenet``: whether a picture shows exposed parts of a body, by the small detector inside the package NudeNet.

The package is under the AGPL and no requirement of this project: none of its code runs, only its model file is read.
Square with black to the right and below, 320 × 320, bilinear, the channels in the order that the package ends up with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curation.errors import InfrastructureError, install_alone
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation
from curation.extract.settings import ModelSettings, WeightSource
from curation.faces import non_maximum_suppression
from curation.images import Pixels
from curation.libraries import np
from curation.models.onnx import open_session, packaged_file, read_weights
from curation.models.weights import fetch_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 320


LEAST_SCORE, LARGEST_OVERLAP = 0.25, 0.45  # the package's


CLASSES = (
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED",
    "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED", "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)  # fmt: skip


COUNTED = (
    "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "ANUS_EXPOSED", "MALE_GENITALIA_EXPOSED",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CornerSquare:
    """side × side × 3 bytes, RGB: the picture in the upper left of a black square, every pixel between its four
    neighbours (OpenCV's bilinear, which does not smooth)."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int = SIDE

    def __call__(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        longest = max(height, width)
        at = ((np.arange(self.side) + 0.5) * (longest / self.side) - 0.5).clip(0, longest - 1)
        first = np.floor(at).astype(np.intp)
        second = np.minimum(first + 1, longest - 1)
        share = (at - first).astype(np.float32)
        down, across = share[:, None, None], share[None, :, None]
        upper = _taken(pixels, first, first) * (1 - across) + _taken(pixels, first, second) * across
        lower = _taken(pixels, second, first) * (1 - across) + _taken(pixels, second, second) * across
        square: Pixels = np.rint(upper * (1 - down) + lower * down).astype(np.uint8)
        return square


def _taken(pixels: Pixels, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float32]:
    """The pixels at each row and column, black beyond the picture."""
    height, width = pixels.shape[:2]
    found: NDArray[np.float32] = pixels[
        np.minimum(rows, height - 1)[:, None], np.minimum(columns, width - 1)[None]
    ].astype(np.float32)
    found[rows >= height] = 0
    found[:, columns >= width] = 0
    return found


class Backend(Extractor):
    """One session, a picture at a time."""

    directives = (
        Directive(
            "nudenet", ("{}-score", "{}-label"), (), "package nudenet", "AGPL-3.0", 0.0030, packages=("onnxruntime",)
        ),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        [source] = self.sources(directive, settings)
        path = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        weights, self.revision = read_weights(path)
        self._session: Any = open_session(weights, path, settings.threads, settings.gpu)[0]
        self._input = self._session.get_inputs()[0].name
        self.name = directive
        self._square = CornerSquare()
        self.preparations: tuple[Preparation, ...] = (self._square,)
        self.columns = (Column(f"{directive}-score", "float32"), Column(f"{directive}-label", "string"))

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        """The package's file, or the user's."""
        own = packaged_file("nudenet", "320n.onnx")
        found = settings.source(None if own is None else WeightSource(str(own)))
        if found is None:
            how = f"{install_alone('nudenet', beside='onnxruntime')} (AGPL), or name its 320n.onnx in `weights`"
            raise InfrastructureError(f"{directive}: NudeNet's model is not here: {how}")
        return [found]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """The best score of an exposed part, and which; 0 and null where there is none."""
        scores: list[float] = []
        labels: list[str | None] = []
        for crop in batch.prepared(self._square):
            # The package exchanges red and blue twice on the way in, once too often: its model sees BGR.
            pixels = crop[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255
            found = [(s, c) for c, s in detections(self._session.run(None, {self._input: pixels})[0]) if c in COUNTED]
            score, label = max(found, default=(0.0, None))
            scores.append(score)
            labels.append(label)
        return {self.columns[0].name: scores, self.columns[1].name: labels}

    def close(self) -> None:
        self._session = None


def detections(output: NDArray[np.float32]) -> list[tuple[str, float]]:
    """What is seen, best first, from 1 × 22 × places: centre, size and eighteen scores of each."""
    rows = output[0].T
    best = rows[:, 4:].argmax(1)
    scores = rows[:, 4:].max(1)
    good = scores > LEAST_SCORE
    x, y, width, height = rows[good, :4].T
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2, scores[good]], 1)
    return [(CLASSES[best[good][i]], float(scores[good][i])) for i in non_maximum_suppression(boxes, LARGEST_OVERLAP)]
