"""``statistics``: sizes of picture and caption, as filters on them need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from curation.extract.api import Column, Directive, PreparedColumns, SampleFacts


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


class Backend(PreparedColumns):
    """What the preparation found, as columns."""

    columns = (
        Column("image-width", "int64", needs_image=True, needs_text=False),
        Column("image-height", "int64", needs_image=True, needs_text=False),
        Column("image-aspect", "float64", needs_image=True, needs_text=False),
        Column("image-bytes", "int64", needs_image=False, needs_text=False),
        Column("caption-words", "int64", needs_image=False, needs_text=True),
        Column("caption-characters", "int64", needs_image=False, needs_text=True),
    )

    directives = (Directive("statistics", tuple(column.name for column in columns)),)
    preparation = Statistics()
