"""Does the picture show what its prompt says?  By the cosine of a CLIP or SigLIP model, stage 06's score of a pair.

It judges any picture with any text: stage 03's prompts, and captions that stage 05 has written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from curation.backends.check import located
from curation.backends.check.features import PreparedPicture, cosine, shared
from curation.check.api import Asked, Verdict
from curation.check.settings import CheckSettings
from curation.errors import UsageError
from curation.images import Pixels
from curation.models.needs import WeightsNeed

DEFAULT_MODEL: Final = CheckSettings().prompt_model

MIN_SCORES: Final = MappingProxyType({"oai-clip-vit-b32": 0.2, "oai-clip-vit-l14": 0.15})
"""The lowest score that passes, where a model's own is known.

They are far below what DataComp asks of pairs from the web (0.281 and 0.243 keep its best 30 %), so that only pictures
of something else fail.
"""


class Backend:
    """One model, shared with other checks that name the same.

    Attributes:
        stage: Whose check it is.
        model_flag, least_flag: The stage's options for the model and for what passes.
    """

    name = "prompt"
    stage, model_flag, least_flag = "03", "prompt_model", "min_prompt_score"

    def __init__(self, settings: CheckSettings) -> None:
        self.record = self.identify(settings)
        self._least: float = self.record["min_score"]
        self._model = shared(self._wanted(settings), settings)
        self.device = settings.device

    @classmethod
    def require(cls, settings: CheckSettings) -> None:
        cls._wanted(settings).require()

    @classmethod
    def weights(cls, settings: CheckSettings) -> Sequence[WeightsNeed]:
        return located.weights_of(cls._wanted(settings), settings.cache)

    @classmethod
    def identify(cls, settings: CheckSettings) -> Mapping[str, Any]:
        model = cls._wanted(settings)
        least = MIN_SCORES.get(model.directive) if settings.min_prompt_score is None else settings.min_prompt_score
        if least is None:
            raise UsageError(
                f"--{cls.model_flag} {model.directive}: the scores of each model have a scale of their own, and none "
                f"is known of this one: say what passes with --{cls.least_flag}"
            )
        found = located.locate(model, settings.cache)
        return {"model": found.public, "revision": found.revision, "min_score": least}

    def prepare(self, picture: Pixels) -> PreparedPicture:
        return self._model.prepare(picture)

    def judge(self, prepared: Sequence[PreparedPicture], asked: Sequence[Asked]) -> list[Verdict]:
        """Scores: ``score``, the cosine of picture and text."""
        if not prepared:
            return []
        texts = self._model.texts([about.text for about in asked])
        scores = [round(float(score), 4) for score in cosine(self._model.pictures(prepared), texts)]
        return [Verdict(score >= self._least, {"score": score}) for score in scores]

    def close(self) -> None:
        del self._model

    @classmethod
    def _wanted(cls, settings: CheckSettings) -> located.Wanted:
        found = located.wanted(cls.name, cls.model_flag, settings.prompt_model, DEFAULT_MODEL, "clip")
        return replace(found, stage=cls.stage)
