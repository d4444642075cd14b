"""Face boxes: those that DataComp records, those that detectors find, and how well the two agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from curation.errors import SampleError
from curation.images import Pixels
from curation.libraries import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Boxes: TypeAlias = "NDArray[np.float32]"  # n × 5: x0, y0, x1, y1, score

RECORDED_FIELD = "face_bboxes"  # in DataComp's metadata: corners as shares of the image, in [0, 1]
LOWEST, HIGHEST = -1.0, 2.0  # a coordinate outside this range is no share of the image but a number of pixels


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """How a face detector is loaded.

    Attributes:
        model: Another ONNX file of the same network.  Default: the detector's own.
        det_size: Pixels that the longest side of an image is brought to.  Default: the detector's own.
        threshold: The score, between 0 and 1, from which a detection is a face.  Default: the detector's own.
        threads: CPU threads of one ``detect``.  Several calls side by side with one thread each are faster than one
            call with several.
        gpu: Number of the GPU to use, if this torch or this onnxruntime can; None for the CPU.
        batch_size: Images that a detector which can look at many at once is shown at once; ``auto``: found by trials.
            Default: ``auto`` on a GPU; on the CPU one at a time.
        sizes: The folder in which processes that work together record what batch size was found.
    """

    model: Path | None = None
    det_size: int | None = None
    threshold: float | None = None
    threads: int = 1
    gpu: int | None = None
    batch_size: int | Literal["auto"] | None = None
    sizes: Path | None = None


AS_PUBLISHED = DetectorSettings()


@dataclass(frozen=True, slots=True)
class FittedImage:
    """An image as a detector's network takes it.

    Attributes:
        pixels: Rows × columns × 3 bytes, of the same size for all images.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        scale: How many pixels of ``pixels`` one of the image has become.
    """

    pixels: Pixels
    width: int
    height: int
    scale: float


class BatchDetector(Protocol):
    """A detector that looks at many images at once."""

    batch_size: int

    def fit(self, rgb: Pixels) -> FittedImage:
        """Bring an image, height × width × 3, to the network's size.  Several threads may call it at once."""

    def detect_all(self, images: Sequence[FittedImage]) -> list[Boxes | SampleError]:
        """Find the faces of several images; see ``FaceDetector.detect``.  What is found in one does not depend on the
        others.  An image for which memory does not suffice gets its error."""


class FaceDetector(Protocol):
    """A face detector with its weights loaded (``curation/backends/faces``)."""

    name: str
    batched: BatchDetector | None  # where many images at once are faster
    revision: str  # of the weights
    device: str
    det_size: int
    threshold: float
    wants_pixels: int  # it needs no more pixels than this on the longest side

    def detect(self, rgb: Pixels) -> Boxes:
        """Find the faces of one image.  Several threads may call it at once.

        Args:
            rgb: The image, height × width × 3.

        Returns:
            n × 5: corners x0, y0, x1, y1 as shares of width and height, and the score; the best first.
        """


def recorded_boxes(metadata: Mapping[str, Any]) -> list[list[float]] | None:
    """The face boxes that a sample's metadata records; [] if it records that there is no face.

    This is the one rule for recorded boxes, and every reader follows it.  A box is a list of x0, y0, x1 and y1 as
    shares of the image; numbers behind them, such as a score, are kept and not looked at.  A box may reach a little
    over the edge (``clipped`` cuts it).  A box without area in the image is left out (``without_area`` counts those).

    Args:
        metadata: The sample's metadata.

    Returns:
        The boxes as they are recorded, or None if the metadata does not say: the field is absent (blurring was
        skipped) or null (detection failed).

    Raises:
        SampleError: ``bad_face_bboxes``: It is not a list of lists of four or more finite numbers, the corners of a box
            are swapped, or a coordinate is below -1 or above 2, so that it must be a number of pixels.
    """
    value = metadata.get(RECORDED_FIELD)
    if value is None:
        return None
    if not isinstance(value, list):
        raise SampleError("bad_face_bboxes", f"{RECORDED_FIELD} is a {type(value).__name__}")
    for box in value:
        if not (isinstance(box, list) and len(box) >= 4 and all(map(_is_number, box))):
            raise SampleError("bad_face_bboxes", f"{RECORDED_FIELD} holds {str(box)[:60]!r}, not four numbers")
        if not all(LOWEST <= share <= HIGHEST for share in box[:4]):
            raise SampleError(
                "bad_face_bboxes",
                f"{RECORDED_FIELD} holds {str(box)[:60]!r}, which must be pixels: divide x by width and y by height",
            )
        if box[2] < box[0] or box[3] < box[1]:
            raise SampleError(
                "bad_face_bboxes", f"{RECORDED_FIELD} holds {str(box)[:60]!r}: x0, y0, x1, y1 with x0 <= x1, y0 <= y1"
            )
    return [box for box in value if has_area(box)]


def without_area(metadata: Mapping[str, Any]) -> int:
    """How many recorded boxes ``recorded_boxes`` leaves out; only for metadata that it accepts."""
    return sum(not has_area(box) for box in metadata.get(RECORDED_FIELD) or ())


def clipped(box: Sequence[float]) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a box as shares of the image, cut off at its edges."""
    x0, y0, x1, y1 = (min(max(float(share), 0.0), 1.0) for share in box[:4])
    return x0, y0, x1, y1


def has_area(box: Sequence[float]) -> bool:
    """Whether some of the box lies in the image."""
    x0, y0, x1, y1 = clipped(box)
    return x1 > x0 and y1 > y0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0


def normalised(boxes: Boxes, width: int, height: int) -> Boxes:
    """Convert boxes from pixels to shares of width and height, clipped to the image; scores are unchanged."""
    shares = boxes / np.array([width, height, width, height, 1], np.float32)
    return shares.clip(0, 1).astype(np.float32)


def non_maximum_suppression(boxes: Boxes, iou: float) -> NDArray[np.intp]:
    """Indices of the remaining boxes, best first: a box that overlaps a better one by ``iou`` or more is removed."""
    x0, y0, x1, y1, scores = boxes.T
    areas = (x1 - x0) * (y1 - y0)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        across = np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest])
        down = np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest])
        shared = across.clip(0) * down.clip(0)
        order = rest[shared < iou * (areas[best] + areas[rest] - shared)]
    return np.array(kept, np.intp)


@dataclass(slots=True)
class Agreement:
    """Compares recorded boxes with a detector's: counts samples with a face in both, in only one, or in neither."""

    both: int = 0
    only_recorded: int = 0
    only_detected: int = 0
    neither: int = 0

    def add(self, *, recorded: bool, detected: bool) -> None:
        """Count one sample."""
        if recorded and detected:
            self.both += 1
        elif recorded:
            self.only_recorded += 1
        elif detected:
            self.only_detected += 1
        else:
            self.neither += 1

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.both + other.both,
            self.only_recorded + other.only_recorded,
            self.only_detected + other.only_detected,
            self.neither + other.neither,
        )

    @property
    def total(self) -> int:
        """The number of samples counted."""
        return self.both + self.only_recorded + self.only_detected + self.neither

    @property
    def kappa(self) -> float:
        """Cohen's kappa (1960), how far two agree more often than by chance; 1.0 if both agree on every sample."""
        n, agreed = self.total, self.both + self.neither
        if n == agreed:
            return 1.0
        recorded, detected = self.both + self.only_recorded, self.both + self.only_detected
        chance = (recorded * detected + (n - recorded) * (n - detected)) / n**2
        return (agreed / n - chance) / (1 - chance)

    @property
    def is_low(self) -> bool:
        """Whether to warn the user: there are at least 20 samples, and kappa is below 0.6, which is at best moderate
        agreement (Landis and Koch 1977)."""
        return self.total >= 20 and self.kappa < 0.6

    def describe(self) -> str:
        """A sentence for the log and the receipt."""
        recorded = self.both + self.only_recorded
        return (
            f"the detector agrees with the recorded boxes on {self.both + self.neither:,} of {self.total:,} samples "
            f"(kappa {self.kappa:.2f}): it found a face in {self.both:,} of the {recorded:,} where one is recorded, "
            f"and in {self.only_detected:,} of the {self.total - recorded:,} where none is"
        )
