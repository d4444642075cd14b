"""Which value of an attribute a picture shows, by what a CLIP or SigLIP model finds most like it: a question for each.

The check ``group``, the command ``measure`` and ``audit --clip`` ask the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from curation.rewrite.groups import attributes_of

WHOLE = "group"  # the attribute whose values are whole groups

# What is asked of the model about a value of an attribute.
_QUESTIONS: Mapping[str, str] = {
    "male": "a photo of a man",
    "female": "a photo of a woman",
    "asian": "a photo of an asian person",
    "indian": "a photo of an indian person",
    "middle east": "a photo of a middle eastern person",
}


class TextFeatures(Protocol):
    """A model that gives features of texts (``ClipFeatures``)."""

    def texts(self, texts: Sequence[str], /) -> NDArray[np.float32]: ...


def question(value: str) -> str:
    """What is asked about a value of an attribute."""
    article = "an" if value[:1].lower() in "aeiou" else "a"
    return _QUESTIONS.get(value, f"a photo of {article} {value} person")


def values_of(groups: Sequence[str]) -> dict[str, list[str]]:
    """For each attribute the values that groups have, in alphabetical order; only attributes with several values."""
    values: dict[str, set[str]] = {}
    for group in groups:
        for attribute, value in attributes_of(group):
            values.setdefault(attribute, set()).add(value)
    return {attribute: sorted(found) for attribute, found in values.items() if len(found) > 1}


class Questions:
    """The questions about some attributes, and what the model makes of their texts.

    Attributes:
        values: Attribute → the values that are asked about.
    """

    def __init__(self, model: TextFeatures, values: Mapping[str, Sequence[str]]) -> None:
        self.values = values
        self._features = {name: model.texts([question(value) for value in found]) for name, found in values.items()}

    def cosines(self, picture: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """For each attribute the cosine of a picture's feature with each value's question."""
        return {name: (texts * picture).sum(1) for name, texts in self._features.items()}

    def answers(self, picture: NDArray[np.float32]) -> dict[str, str]:
        """For each attribute the value whose question is nearest to the picture's feature."""
        return {name: self.values[name][int(np.argmax(found))] for name, found in self.cosines(picture).items()}


class GroupQuestions:
    """The groups that a run asks for, as combinations of values of attributes.

    The logit of a group is the sum of the logits of its values, so that its probability is the product of those of its
    values where the groups are all combinations of them.  Groups that do not all have the same attributes, such as
    "asian female" beside "child", are asked about whole.

    Attributes:
        groups: Those that differ, in the order in which they were given.
    """

    def __init__(self, model: TextFeatures, groups: Sequence[str], scale: float) -> None:
        """scale: what the model multiplies cosines by."""
        pairs = {group: dict(attributes_of(group)) for group in groups}
        values = values_of(groups)
        if len({frozenset(found) for found in pairs.values()}) > 1:
            pairs = {group: {WHOLE: " ".join(group.split()).lower()} for group in groups}
            values = {WHOLE: sorted({found[WHOLE] for found in pairs.values()})}
        self._questions = Questions(model, values)
        self._scale = scale
        places = {group: tuple(values[name].index(found[name]) for name in values) for group, found in pairs.items()}
        first: dict[tuple[int, ...], int] = {}
        self._place = {group: first.setdefault(place, len(first)) for group, place in places.items()}
        self._choices = np.array(list(first), np.intp)
        self.groups = [next(group for group in groups if self._place[group] == number) for number in range(len(first))]

    def __contains__(self, group: object) -> bool:
        return group in self._place

    def place(self, group: str) -> int:
        """Where a group stands in ``groups``: groups with the same attributes are one."""
        return self._place[group]

    def probabilities(self, picture: NDArray[np.float32]) -> NDArray[np.float64]:
        """The probability of each of ``groups``, of which one is taken to be there; their sum is 1.

        picture: its feature, of length one.
        """
        cosines = self._questions.cosines(picture)
        logits = np.zeros(len(self.groups))
        for number, name in enumerate(self._questions.values):
            logits += self._scale * cosines[name].astype(np.float64)[self._choices[:, number]]
        shares = np.exp(logits - logits.max())
        return np.asarray(shares / shares.sum(), np.float64)
