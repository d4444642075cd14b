"""Face detectors: one file each, found by the scan in ``curation.backends``.

A file's ``Backend`` is a ``DetectorClass``: it turns the pixels of one picture into scored boxes, and says its licence,
its default size and threshold, and where its weights come from.  ``fitting`` has what several detectors share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from curation import backends
from curation.errors import UsageError
from curation.faces import AS_PUBLISHED, DetectorSettings, FaceDetector
from curation.models.known import Model, nearest, spelling
from curation.models.needs import WeightsNeed

if TYPE_CHECKING:
    DetectorName = str
else:
    DetectorName = Literal[*backends.names("faces")]  # of a flag, whose help then lists them


class DetectorClass(Protocol):
    """What the ``Backend`` of a file in this folder is."""

    name: str
    licence: str  # of the weights
    parameters: float  # in thousand millions
    source: str  # where the weights come from
    default_det_size: int  # pixels
    default_threshold: float
    packages: tuple[str, ...]  # modules that it imports when it is loaded

    def __call__(self, settings: DetectorSettings = AS_PUBLISHED) -> FaceDetector:
        """Load the detector.

        Raises:
            InfrastructureError: The weights are not there, or are of another network.
        """

    def is_here(self) -> bool:
        """Whether the weights are on this machine."""

    def model_file(self) -> Path:
        """The file with the detector's own weights.

        Raises:
            InfrastructureError: It is not on this machine.
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


def known_models() -> list[Model]:
    """The detectors, as ``--list_models`` shows them."""
    found = [(name, detector_class(name)) for name in backends.names("faces")]
    return [Model(name, kind.source, kind.parameters, kind.licence, bits=32) for name, kind in found]


def here(model: Model) -> str:
    """Whether a detector's weights are on this machine; see ``listing.Here``."""
    return "yes" if detector_class(model.short).is_here() else "no"


def detector_named(name: str, others: Sequence[str] = (), flag: str = "--detector") -> str:
    """The detector, or one of the other words that a flag takes, that a name in whatever spelling stands for.

    Raises:
        UsageError: There is none; the message names the nearest.
    """
    words = [*others, *backends.names("faces")]
    by_spelling = {spelling(word): word for word in words}
    if (found := by_spelling.get(spelling(name))) is not None:
        return found
    meant = nearest(name, words) or words
    raise UsageError(
        f"{flag} {name}: there is no such detector.  Did you mean {' or '.join(meant)}?  --list_models shows them"
    )


def defaults_of_all(attribute: str) -> str:
    """A default of every detector, for a flag's help: ``0.4 for centerface, 0.5 for scrfd``."""
    return ", ".join(f"{getattr(detector_class(name), attribute):g} for {name}" for name in backends.names("faces"))
