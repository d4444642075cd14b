"""Does the picture show a person of the group that it was made for?  By a zero-shot CLIP or SigLIP model.

The answer is the model's, with its bias: how often it is wrong about each group is measured by ``curation measure`` on
pictures with labels.  It says how a picture looks to a model, and identifies nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from curation.backends.check import located
from curation.backends.check.features import PreparedPicture, shared
from curation.backends.check.zero_shot import GroupQuestions
from curation.check.api import Asked, Verdict
from curation.check.settings import CheckSettings
from curation.errors import InfrastructureError, UsageError
from curation.images import Pixels
from curation.models.needs import WeightsNeed

DEFAULT_MODEL: Final = CheckSettings().group_model


class Backend:
    """One model, shared with other checks that name the same, and its questions about the groups."""

    name = "group"

    def __init__(self, settings: CheckSettings) -> None:
        self.record = self.identify(settings)
        self._model = shared(_wanted(settings), settings)
        self.device = settings.device
        self._questions = GroupQuestions(self._model, settings.groups, self._model.scale)
        if len(self._questions.groups) < 2:
            raise UsageError(f"--check group: {', '.join(settings.groups)} are the same group to it")

    @classmethod
    def require(cls, settings: CheckSettings) -> None:
        _wanted(settings).require()

    @classmethod
    def weights(cls, settings: CheckSettings) -> Sequence[WeightsNeed]:
        return located.weights_of(_wanted(settings), settings.cache)

    @classmethod
    def identify(cls, settings: CheckSettings) -> Mapping[str, Any]:
        if len(settings.groups) < 2:
            there = f"there is only {settings.groups[0]!r}" if settings.groups else "there are none"
            raise UsageError(f"--check group compares the groups that prompts were made for, and {there}: leave it out")
        found = located.locate(_wanted(settings), settings.cache)
        return {"model": found.public, "revision": found.revision, "groups": list(settings.groups)}

    def prepare(self, picture: Pixels) -> PreparedPicture:
        return self._model.prepare(picture)

    def judge(self, prepared: Sequence[PreparedPicture], asked: Sequence[Asked]) -> list[Verdict]:
        """Scores: ``probability``, of the group that was asked for, among all groups; ``seen``, the most probable one.
        Of a sample without a group nothing is said."""
        for about in asked:
            if about.group is not None and about.group not in self._questions:
                raise InfrastructureError(
                    f"--check group: sample {about.key} is of the group {about.group!r}, which is none of the groups "
                    "that the prompts were made for, as stage 02 recorded them"
                )
        judged = [one for one, about in zip(prepared, asked, strict=True) if about.group is not None]
        features = iter(self._model.pictures(judged) if judged else ())
        return [Verdict(None) if about.group is None else self._verdict(next(features), about.group) for about in asked]

    def close(self) -> None:
        del self._model, self._questions

    def _verdict(self, picture: NDArray[np.float32], group: str) -> Verdict:
        probabilities = self._questions.probabilities(picture)
        place = self._questions.place(group)
        own, others = float(probabilities[place]), np.delete(probabilities, place)
        seen = int(np.argmax(probabilities))
        passed = own > float(others.max())
        scores = {"probability": round(own, 4), "seen": group if passed else self._questions.groups[seen]}
        return Verdict(passed, scores)


def _wanted(settings: CheckSettings) -> located.Wanted:
    return located.wanted("group", "group_model", settings.group_model, DEFAULT_MODEL, "clip")
