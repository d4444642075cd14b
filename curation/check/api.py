"""The seam between stages that have pictures judged, and the models that judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from curation.images import Pixels


@dataclass(frozen=True, slots=True)
class Asked:
    """What a picture was to show.

    Attributes:
        key: The sample's.
        text: The prompt that it was made from, or the caption that is to describe it, as the user reads it.
        group: The group of people that it should portray; None if it has none.
    """

    key: str
    text: str
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check says of one picture.

    Attributes:
        passed: None where there was nothing to judge (the group of a sample without one).
        scores: What the check has measured, as plain JSON of a few hundred bytes at most: numbers, short texts, lists
            of boxes.  They are written to checkpoints, to the sample's json and to the provenance.
    """

    passed: bool | None
    scores: Mapping[str, Any] = field(default_factory=dict)


def still_holds(judged_by: object, record: Mapping[str, Any], said: object) -> bool:
    """Whether what an earlier run's checks said is what those of this run would say, so that nothing is judged again.

    Args:
        judged_by: What the earlier checks have recorded of themselves, by name.
        record: What those of this run record.
        said: What the earlier ones said, by name.
    """
    return bool(record) and judged_by == record and isinstance(said, Mapping) and said.keys() == record.keys()


class Check(Protocol):
    """One kind of check on one device.

    The same pixels and the same text give the same verdict on the same software, kind of device and number of threads,
    whatever else is in the batch: each picture is computed so that its neighbours do not change its scores' rounding,
    or scores are rounded so far that this does not show.

    Attributes:
        name: ``face``, ``prompt``, ``group`` or ``safety``; a sample that fails it is rejected as ``check_<name>``.
        record: Model, revision and thresholds, as plain JSON: it goes into the recorded options and into the recipe, so
            with another record pictures are judged again.
    """

    name: str
    record: Mapping[str, Any]

    def prepare(self, picture: Pixels) -> Any:
        """Make of one decoded JPEG what ``judge`` takes.  It is called in many threads at once, without the device.

        picture: uint8 RGB, height × width × 3.
        """

    def judge(self, prepared: Sequence[Any], asked: Sequence[Asked]) -> list[Verdict]:
        """Judge pictures, in their order.  It is called from one thread at a time."""

    def close(self) -> None:
        """Let go of what was loaded."""
