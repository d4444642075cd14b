"""``faces-scrfd10g``: boxes of faces, as DataComp's metadata has them.

The picture in a white square of 224, SCRFD-10GF, scores above 0.3, overlap below 0.45.  Two kinds of weights load:
DataComp's own file (torch), and any ONNX file of SCRFD such as insightface's ``det_10g.onnx``, which stage 01 uses too.

What SCRFD is shown of a picture, as DataComp shows it, and the boxes that its answers mean.

SCRFD-10GF as a torch network (Guo et al. 2021, arXiv:2105.04714), for the weights that DataComp detects faces with.

A residual network, a path-aggregation neck (Liu et al. 2018, arXiv:1803.01534) and one head for the strides 8, 16 and
32 with two anchors a cell.  Tensors have the names of the published file; depths and widths are their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curation.backends.extract.layers import NamedTensors, has_16_bits
from curation.backends.extract.pictures import Normalise
from curation.errors import InfrastructureError
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation
from curation.extract.resample import BICUBIC, Window, resized
from curation.extract.settings import ModelSettings, WeightSource, file_revision, load_tensors
from curation.faces import non_maximum_suppression
from curation.images import Pixels
from curation.libraries import Image, np
from curation.models.onnx import open_session, read_weights
from curation.models.onnx_torch import TorchGraph, UnknownGraph
from curation.models.weights import fetch_weights
from curation.options import logger

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANCHORS = 2  # a cell


STRIDES = (8, 16, 32)


LEAST_SCORE = 0.3


LARGEST_OVERLAP = 0.45  # upstream suppresses more than insightface, which has 0.4


# A picture with a longer side is made smaller before it is padded: its square would not fit into memory.
MAX_SQUARE_SIDE = 4096


@dataclass(frozen=True, slots=True)
class WhiteSquare:
    """A picture in the middle of a white square, resized to side × side × 3 bytes with Pillow's bicubic filter."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int

    def __call__(self, pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels)
        if max(image.size) > MAX_SQUARE_SIDE:
            shrink = MAX_SQUARE_SIDE / max(image.size)
            size = [max(1, round(n * shrink)) for n in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), (255, 255, 255))
        square.paste(image, _offset(*image.size))
        return np.asarray(square.resize((self.side, self.side), Image.Resampling.BICUBIC))

    def fits_device(self, width: int, height: int) -> bool:
        return max(width, height) <= MAX_SQUARE_SIDE

    def on_device(self, pictures: Sequence[Any]) -> Any:
        squares = [_white_square(picture) for picture in pictures]
        return resized(squares, [Window(self.side, self.side)] * len(squares), self.side, BICUBIC)


@dataclass(frozen=True, slots=True)
class PictureSize:
    """(width, height) of the picture that was decoded: where in its square it lies."""

    takes: ClassVar[Literal["image"]] = "image"

    def __call__(self, pixels: Pixels) -> NDArray[np.int32]:
        return np.array([pixels.shape[1], pixels.shape[0]], np.int32)

    def fits_device(self, width: int, height: int) -> bool:
        return True

    def on_device(self, pictures: Sequence[Any]) -> Any:
        import torch

        sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
        return torch.tensor(sizes, dtype=torch.int32, device=pictures[0].device)


def _white_square(picture: Any) -> Any:
    """A tensor of height × width × 3 in the middle of a white square."""
    height, width = picture.shape[:2]
    longest = max(height, width)
    left, top = _offset(width, height)
    square = picture.new_full((longest, longest, 3), 255)
    square[top : top + height, left : left + width] = picture
    return square


def _offset(width: int, height: int) -> tuple[int, int]:
    """Of the picture's corner in its square; half a pixel goes to the other side."""
    longest = max(width, height)
    return (longest - width) // 2, (longest - height) // 2


@dataclass(frozen=True, slots=True)
class Candidates:
    """The anchors of one stride whose score is high enough, of a batch.

    pictures, anchors: which; the anchors of a picture count row by row, the two of a cell side by side.  scores: one
    each.  reach: candidates × 4, the distances of the box's sides in steps of the stride.
    """

    stride: int
    pictures: NDArray[np.int64]
    anchors: NDArray[np.int64]
    scores: NDArray[np.float32]
    reach: NDArray[np.float32]

    def corners(self, side: int) -> NDArray[np.float32]:
        """candidates × 5: corners in pixels of the square, and score."""
        y, x = np.divmod(self.anchors // ANCHORS, -(-side // self.stride))
        centre = np.stack([x, y, x, y], 1) * self.stride
        steps = self.reach * np.array([-self.stride, -self.stride, self.stride, self.stride])
        corners = (centre + steps).clip(0, side)
        found: NDArray[np.float32] = np.concatenate([corners, self.scores[:, None]], 1).astype(np.float32)
        return found


def boxes_of_batch(candidates: Sequence[Candidates], sizes: NDArray[np.int32], side: int) -> list[list[list[float]]]:
    """The boxes of each picture, best first, as shares of its width and height.

    It needs no device: a worker process does it while the device computes the next batch.

    candidates: of the strides side/8, side/16 and side/32.  sizes: pictures × (width, height).
    """
    corners = np.concatenate([found.corners(side) for found in candidates])
    pictures = np.concatenate([found.pictures for found in candidates])
    order = np.argsort(pictures, kind="stable")
    ends = np.searchsorted(pictures[order], np.arange(len(sizes)), side="right")
    all_boxes = []
    for (width, height), own in zip(sizes.tolist(), np.split(order, ends[:-1]), strict=True):
        boxes = corners[own]
        boxes = boxes[non_maximum_suppression(boxes, LARGEST_OVERLAP)]
        all_boxes.append(boxes_in_picture(boxes, side, max(1, width), max(1, height)))
    return all_boxes


def boxes_in_picture(boxes: NDArray[np.float32], side: int, width: int, height: int) -> list[list[float]]:
    """[x0, y0, x1, y1] for each, as shares of the picture's width and height, clipped to it."""
    longest = max(width, height)
    left, top = _offset(width, height)
    in_pixels = boxes[:, :4].astype(np.float64) * (longest / side) - [left, top, left, top]
    shares = (in_pixels / [width, height, width, height]).clip(0, 1)
    return [[float(value) for value in box] for box in shares.astype(np.float32)]


_GROUPS = 16  # of the head's group normalisation


_IGNORED = ["bbox_head.integral.project"]  # of another kind of head


_TRIAL_SIDE = 64


class ScrfdNetwork:
    """samples × 3 × side × side, −1 to 1 → for each stride the scores (samples × anchors) and, in steps of the stride,
    the distances of the four sides from the anchor (samples × anchors × 4)."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """Raises KeyError, ValueError or RuntimeError where the tensors are of no such network."""
        import torch

        self._functional = torch.nn.functional
        self._layers = NamedTensors(tensors)
        with torch.inference_mode():
            self(torch.zeros(1, 3, _TRIAL_SIDE, _TRIAL_SIDE))  # tensors of another shape are told now
        if unused := [name for name in self._layers.unused() if name not in _IGNORED]:
            raise ValueError(f"tensors that it has no place for: {', '.join(unused[:3])}")

    def move(self, device: str, dtype: Any) -> None:
        self._layers.move(device, dtype)

    def __call__(self, pictures: Any) -> tuple[list[Any], list[Any]]:
        scores, distances = [], []
        for number, features in enumerate(self._neck(self._backbone(pictures))):
            score, reach = self._head(features, number)
            scores.append(score.permute(0, 2, 3, 1).flatten(1))
            distances.append(reach.permute(0, 2, 3, 1).reshape(len(reach), -1, 4))
        return scores, distances

    def _activated(self, convolution: str, norm: str, x: Any, stride: int = 1) -> Any:
        return self._functional.relu(self._layers.batch_norm(norm, self._layers.convolution(convolution, x, stride)))

    def _backbone(self, x: Any) -> list[Any]:
        """Features at the strides 8, 16 and 32."""
        for number, stride in ((0, 2), (3, 1), (6, 1)):
            x = self._activated(f"backbone.stem.{number}", f"backbone.stem.{number + 1}", x, stride)
        x = self._functional.max_pool2d(x, 2, 2)
        found = []
        for stage in range(1, 5):
            block = 0
            while f"backbone.layer{stage}.{block}.conv1.weight" in self._layers:
                x = self._residual(f"backbone.layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
                block += 1
            found.append(x)
        return found[1:]

    def _residual(self, name: str, x: Any, stride: int) -> Any:
        y = self._activated(f"{name}.conv1", f"{name}.bn1", x, stride)
        y = self._layers.batch_norm(f"{name}.bn2", self._layers.convolution(f"{name}.conv2", y))
        if f"{name}.downsample.1.weight" in self._layers:
            x = self._functional.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
            x = self._layers.batch_norm(f"{name}.downsample.2", self._layers.convolution(f"{name}.downsample.1", x))
        return self._functional.relu(y + x)

    def _neck(self, features: list[Any]) -> list[Any]:
        """Down the pyramid, and up again."""
        layers = self._layers
        found = [layers.convolution(f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(features)]
        for i in (1, 0):
            found[i] = found[i] + self._functional.interpolate(found[i + 1], size=found[i].shape[2:], mode="nearest")
        found = [layers.convolution(f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(found)]
        for i in (0, 1):
            found[i + 1] = found[i + 1] + layers.convolution(f"neck.downsample_convs.{i}.conv", found[i], 2)
        return [found[0], *(layers.convolution(f"neck.pafpn_convs.{i}.conv", found[i + 1]) for i in (0, 1))]

    def _head(self, x: Any, number: int) -> tuple[Any, Any]:
        layer = 0
        while f"{(name := f'bbox_head.cls_stride_convs.0.{layer}')}.conv.weight" in self._layers:
            x = self._layers.group_norm(f"{name}.gn", self._layers.convolution(f"{name}.conv", x), _GROUPS)
            x = self._functional.relu(x)
            layer += 1
        reach = self._layers.convolution("bbox_head.stride_reg.0", x)
        score = self._layers.convolution("bbox_head.stride_cls.0", x).sigmoid()
        return score, reach * self._layers[f"bbox_head.scales.{number}.scale"]


SIDE = 224


SOURCE = WeightSource(
    "https://github.com/mlfoundations/dataset2metadata/releases/download/v0.1.0-alpha/scrfd_10g.pt",
    "963570df5e0ebf6bb313239d0f9f3f0c096c1ff6937e8e28e45abad4d8b1d5c7",
)

_LICENCE = "non-commercial research"


class Backend(Extractor):
    """The detector, whichever kind its weights are."""

    directives = (Directive("faces-scrfd10g", ("face-boxes",), (), "dataset2metadata's release", _LICENCE, 0.0039),)
    columns = (Column("face-boxes", "boxes"),)

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        [source] = self.sources(directive, settings)
        path = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        self.name = directive
        self._detector: _Onnx | _Torch | None
        self._detector = _exported(path, settings) if path.suffix == ".onnx" else _Torch(path, settings)
        self.revision = self._detector.revision
        self._side = self._detector.side
        self._square, self._size = WhiteSquare(self._side), PictureSize()
        self.preparations: tuple[Preparation, ...] = (self._square, self._size)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        return [settings.source(SOURCE) or SOURCE]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """A list of boxes for each sample, empty where there is no face."""
        assert self._detector is not None
        candidates = self._detector.candidates(batch, self._square)
        sizes = np.array(batch.prepared(self._size))
        return {"face-boxes": batch.beside(boxes_of_batch, candidates, sizes, self._side)}

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
        half = (0.5,) * 3
        self._normalise = Normalise(half, half, settings.device, dtype, channels_last=has_16_bits(dtype))

    def candidates(self, batch: Batch, square: WhiteSquare) -> list[Candidates]:
        """Few numbers of many leave the device."""
        found = []
        with self._torch.inference_mode():
            scores, distances = self._network(self._normalise(batch.device_tensor(square)))
            for stride, score, reach in zip(STRIDES, scores, distances, strict=True):
                pictures, anchors = (score.float() > LEAST_SCORE).nonzero(as_tuple=True)
                kept = score[pictures, anchors].float(), reach[pictures, anchors].float()
                on_host = [part.cpu().numpy() for part in (pictures, anchors, *kept)]
                found.append(Candidates(stride, *on_host))
        return found


def _exported(path: Path, settings: ModelSettings) -> _Onnx | _Torch:
    """An exported SCRFD: on a GPU in torch, a batch at a time, wherever that answers as onnxruntime does."""
    if settings.device == "cpu":
        return _Onnx(path, settings)  # a picture at a time is faster there
    try:
        return _OnnxInTorch(path, settings)
    except (UnknownGraph, ImportError) as error:
        logger.warning(f"{path.name}: onnxruntime computes it, one picture at a time: torch cannot ({error})")
        return _Onnx(path, settings)


class _OnnxInTorch(_Torch):
    """An exported SCRFD in torch.  Raises UnknownGraph where it does not answer as onnxruntime does."""

    def __init__(self, path: Path, settings: ModelSettings) -> None:
        import onnx
        import torch

        self._torch = torch
        on_cpu = _Onnx(path, replace(settings, device="cpu"))
        self.revision, self.side = on_cpu.revision, on_cpu.side
        graph = TorchGraph(onnx.load_model(str(path)).graph, [1] * 3 + [4] * 3)
        graph.check(lambda pixels: on_cpu._session.run(None, {on_cpu._input: pixels}), self.side, self.side)
        dtype = settings.torch_dtype()
        graph.move(settings.device, dtype)

        def network(pictures: Any) -> tuple[list[Any], list[Any]]:
            *scores, near, middle, far = graph(pictures)
            return [score.flatten(1) for score in scores], [near, middle, far]

        self._network = network
        mean, deviation = (0.5,) * 3, (128 / 255,) * 3  # as insightface's exports want
        self._normalise = Normalise(mean, deviation, settings.device, dtype, channels_last=has_16_bits(dtype))


class _Onnx:
    """An exported SCRFD, a picture at a time: published exports mix up the pictures of a batch."""

    def __init__(self, path: Path, settings: ModelSettings) -> None:
        weights, self.revision = read_weights(path)
        self._session, _ = open_session(weights, path, settings.threads, settings.gpu)
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

    def candidates(self, batch: Batch, square: WhiteSquare) -> list[Candidates]:
        found: list[list[Candidates]] = [[] for _ in STRIDES]
        for number, crop in enumerate(batch.prepared(square)):
            pixels = (crop.astype(np.float32).transpose(2, 0, 1)[None] - 127.5) / 128  # as insightface's exports want
            answer = self._session.run(None, {self._input: pixels})
            for own, stride, scores, reach in zip(found, STRIDES, answer[:3], answer[3:6], strict=True):
                score = scores.reshape(-1)
                anchors = (score > LEAST_SCORE).nonzero()[0]
                here = np.full(len(anchors), number)
                own.append(Candidates(stride, here, anchors, score[anchors], reach.reshape(-1, 4)[anchors]))
        return list(map(_together, found))


def _together(parts: Sequence[Candidates]) -> Candidates:
    """Of one stride."""
    arrays = ("pictures", "anchors", "scores", "reach")
    return Candidates(parts[0].stride, *(np.concatenate([getattr(part, name) for part in parts]) for name in arrays))
