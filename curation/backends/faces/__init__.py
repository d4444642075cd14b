"""Face detectors: one file each, found by the scan in ``curation.backends``.

A file's ``Backend`` is a ``DetectorClass``: it turns the pixels of one picture into scored boxes, and says its licence,
its default size and threshold, and where its weights come from.  ``fitting`` has what several detectors share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from curation import backends
from curation.faces import AS_PUBLISHED, DetectorSettings, FaceDetector
from curation.models.needs import WeightsNeed

if TYPE_CHECKING:
    DetectorName = str
else:
    DetectorName = Literal[*backends.names("faces")]  # of a flag, whose help then lists them


class DetectorClass(Protocol):
    """What the ``Backend`` of a file in this folder is."""

    name: str
    licence: str  # of the weights
    default_det_size: int  # pixels
    default_threshold: float

    def __call__(self, settings: DetectorSettings = AS_PUBLISHED) -> FaceDetector:
        """Load the detector.

        Raises:
            InfrastructureError: The weights are not there, or are of another network.
        """

    def weights(self) -> WeightsNeed:
        """Where the detector's own weights come from.

        Raises:
            InfrastructureError: They come with a package that is not installed.
        """


def detector_class(name: str) -> DetectorClass:
    """The detector of that name.

    Raises:
        InfrastructureError: No file of this folder has it; the message lists those that are there.
    """
    found: DetectorClass = backends.load("faces", name)
    return found


def defaults_of_all(attribute: str) -> str:
    """A default of every detector, for a flag's help: ``0.4 for centerface, 0.5 for scrfd``."""
    return ", ".join(f"{getattr(detector_class(name), attribute):g} for {name}" for name in backends.names("faces"))
