"""Checks of pictures: one file each, found by the scan in ``curation.backends``.

A file's ``Backend`` is a ``CheckClass``: loaded with ``CheckSettings`` it is a ``Check``, which says of a picture
whether it is what was asked for.  Without loading anything it says which weights it needs and what it will record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from curation import backends
from curation.check.api import Check
from curation.check.settings import CheckSettings
from curation.models.needs import WeightsNeed

CheckName = Literal["face", "prompt", "group", "safety"]

ORDER: Final[tuple[CheckName, ...]] = ("face", "prompt", "group", "safety")
"""A picture that fails several checks is rejected for the first of them."""


class CheckClass(Protocol):
    """What the ``Backend`` of a file in this folder is."""

    name: str

    def __call__(self, settings: CheckSettings) -> Check:
        """Load the check's model.

        Raises:
            InfrastructureError: A model is not on this machine; the message names the command that fetches it.
        """

    def require(self, settings: CheckSettings) -> None:
        """Look whether the packages that it needs are on this machine.

        Raises:
            InfrastructureError: One is missing; the message has the command that installs it.
        """

    def weights(self, settings: CheckSettings) -> Sequence[WeightsNeed]:
        """What has to be on this machine before it can be loaded."""

    def identify(self, settings: CheckSettings) -> Mapping[str, Any]:
        """Its ``record``, found without loading a model.

        Raises:
            InfrastructureError: A model is not on this machine; the message names the command that fetches it.
        """


def check_class(name: str) -> CheckClass:
    """The check of that name.

    Raises:
        InfrastructureError: No file of this folder has it; the message lists those that are there.
    """
    found: CheckClass = backends.load("check", name)
    return found


def in_order(names: Sequence[str]) -> list[str]:
    """The names of checks, each once, in the order in which they are judged."""
    return [name for name in ORDER if name in names]


def load_checks(names: Sequence[str], settings: CheckSettings) -> list[Check]:
    """Load checks, in their order.

    Raises:
        InfrastructureError: A model is not on this machine; the message names the command that fetches it.
    """
    return [check_class(name)(settings) for name in in_order(names)]


def identify(names: Sequence[str], settings: CheckSettings) -> dict[str, dict[str, Any]]:
    """What each check will record, by name and in their order, found without loading a model.

    Raises:
        InfrastructureError: A model is not on this machine; the message names the command that fetches it.
    """
    return {name: dict(check_class(name).identify(settings)) for name in in_order(names)}


def require(names: Sequence[str], settings: CheckSettings) -> None:
    """Look whether the packages that the checks need are on this machine.

    Raises:
        InfrastructureError: One is missing; the message has the command that installs it.
    """
    for name in in_order(names):
        check_class(name).require(settings)


def weights(names: Sequence[str], settings: CheckSettings) -> list[WeightsNeed]:
    """What has to be on this machine before the checks can be loaded, for ``models fetch``."""
    return [need for name in in_order(names) for need in check_class(name).weights(settings)]
