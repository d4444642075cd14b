"""``statistics``: sizes of picture and caption, as filters on them need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from curation.extract.api import Batch, Column, Directive, Feature, Preparation, SampleFacts
from curation.extract.settings import ModelSettings, WeightSource


@dataclass(frozen=True, slots=True)
class Statistics:
    """Pixels as a viewer shows them, bytes as they are stored; words between whitespace, characters of Unicode."""

    takes: ClassVar[Literal["sample"]] = "sample"

    def __call__(self, facts: SampleFacts) -> dict[str, Any]:
        found: dict[str, Any] = {"image-bytes": len(facts.image)} if facts.image else {}
        if facts.size is not None:
            width, height = facts.size
            found |= {"image-width": width, "image-height": height, "image-aspect": width / height}
        if facts.caption is not None:
            found |= {"caption-words": len(facts.caption.split()), "caption-characters": len(facts.caption)}
        return found


class Backend:
    """What the preparation found, as columns."""

    revision = "1"
    needs: tuple[str, ...] = ()
    features: tuple[Feature, ...] = ()
    columns = (
        Column("image-width", "int64", needs_image=True, needs_text=False),
        Column("image-height", "int64", needs_image=True, needs_text=False),
        Column("image-aspect", "float64", needs_image=True, needs_text=False),
        Column("image-bytes", "int64", needs_image=False, needs_text=False),
        Column("caption-words", "int64", needs_image=False, needs_text=True),
        Column("caption-characters", "int64", needs_image=False, needs_text=True),
    )

    directives = (Directive("statistics", tuple(column.name for column in columns)),)

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        self.name = directive
        self._statistics = Statistics()
        self.preparations: tuple[Preparation, ...] = (self._statistics,)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        return []

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        found = batch.prepared(self._statistics)
        return {column.name: [row.get(column.name) for row in found] for column in self.columns}

    def close(self) -> None:
        """Nothing is held."""
