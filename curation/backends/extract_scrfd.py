"""``faces-scrfd10g``: boxes of faces, as DataComp's metadata has them.

The picture in a white square of 224, SCRFD-10GF, scores above 0.3, overlap below 0.45.  Two kinds of weights load:
DataComp's own file (torch), and any ONNX file of SCRFD such as insightface's ``det_10g.onnx``, which stage 01 uses too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.backends.clip_preparation import Normalise
from curation.backends.scrfd_boxes import PictureSize, WhiteSquare, boxes_in_picture, boxes_in_square
from curation.backends.scrfd_network import ScrfdNetwork
from curation.errors import InfrastructureError
from curation.extract.api import Batch, Column, Feature, Preparation
from curation.extract.settings import ModelSettings, WeightSource, file_revision, load_tensors
from curation.models.onnx import open_session, read_weights
from curation.models.weights import fetch_weights

SIDE = 224
SOURCE = WeightSource(
    "https://github.com/mlfoundations/dataset2metadata/releases/download/v0.1.0-alpha/scrfd_10g.pt",
    "963570df5e0ebf6bb313239d0f9f3f0c096c1ff6937e8e28e45abad4d8b1d5c7",
)

Answer = tuple[list[NDArray[Any]], list[NDArray[Any]]]  # scores and distances of one picture, by stride


def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
    """What has to be on this machine before the detector can be loaded."""
    return [settings.source(SOURCE) or SOURCE]


class Backend:
    """The detector, whichever kind its weights are."""

    needs: tuple[str, ...] = ()
    features: tuple[Feature, ...] = ()
    columns = (Column("face-boxes", "boxes"),)

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        [source] = sources(directive, settings)
        path = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        self.name = directive
        self._detector: _Onnx | _Torch | None
        self._detector = _Onnx(path, settings) if path.suffix == ".onnx" else _Torch(path, settings)
        self.revision = self._detector.revision
        self._side = self._detector.side
        self._square, self._size = WhiteSquare(self._side), PictureSize()
        self.preparations: tuple[Preparation, ...] = (self._square, self._size)

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """A list of boxes for each sample, empty where there is no face."""
        assert self._detector is not None
        found: list[list[list[float]]] = []
        answers = self._detector.answers(batch, self._square)
        for (width, height), (scores, distances) in zip(batch.prepared(self._size), answers, strict=True):
            boxes = boxes_in_square(scores, distances, self._side)
            found.append(boxes_in_picture(boxes, self._side, max(1, int(width)), max(1, int(height))))
        return {"face-boxes": found}

    def close(self) -> None:
        self._detector = None


class _Torch:
    """DataComp's own weights, a batch at a time."""

    side = SIDE

    def __init__(self, path: Path, settings: ModelSettings) -> None:
        import torch

        self._torch = torch
        self.revision = file_revision(path)
        saved = load_tensors(path, "SCRFD")
        try:
            network = ScrfdNetwork(saved.get("state_dict", saved))
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            line = " ".join(str(error).split())[:300]
            raise InfrastructureError(f"{path} holds other weights than SCRFD's: {line}") from error
        dtype = settings.torch_dtype()
        network.move(settings.device, dtype)
        self._network: Any = network
        self._normalise = Normalise((0.5,) * 3, (0.5,) * 3, settings.device, dtype)

    def answers(self, batch: Batch, square: WhiteSquare) -> Iterator[Answer]:
        with self._torch.inference_mode():
            scores, distances = self._network(self._normalise(batch.device_tensor(square)))
            on_host = [[part.float().cpu().numpy() for part in parts] for parts in (scores, distances)]
        for i in range(len(batch)):
            yield [part[i] for part in on_host[0]], [part[i] for part in on_host[1]]


class _Onnx:
    """An exported SCRFD, a picture at a time: published exports mix up the pictures of a batch."""

    def __init__(self, path: Path, settings: ModelSettings) -> None:
        weights, self.revision = read_weights(path)
        gpu = int(settings.device.partition(":")[2] or 0) if settings.device.startswith("cuda") else None
        self._session, _ = open_session(weights, path, settings.threads, gpu)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) not in (6, 9):
            raise InfrastructureError(
                f"{path}: {len(inputs)} inputs and {len(outputs)} outputs; SCRFD with three strides has one, and six "
                "or (with keypoints) nine"
            )
        self._input = inputs[0].name
        fixed = [n for n in inputs[0].shape[2:] if isinstance(n, int)]
        if fixed and len(set(fixed)) != 1:
            raise InfrastructureError(f"{path}: takes pictures of {fixed}, not square ones")
        self.side = fixed[0] if fixed else SIDE

    def answers(self, batch: Batch, square: WhiteSquare) -> Iterator[Answer]:
        for crop in batch.prepared(square):
            pixels = (crop.astype(np.float32).transpose(2, 0, 1)[None] - 127.5) / 128  # as insightface's exports want
            found = self._session.run(None, {self._input: pixels})
            yield found[:3], found[3:6]
