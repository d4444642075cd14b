"""The options of stage 03 that are about checks, and what checks are constructed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal

from curation.check import CheckSettings
from curation.errors import UsageError
from curation.options import FINITE, LISTED, also, at_least, between, items_in

NONE, DEFAULT = "none", "face"
_TRIES, _ON_FAILURE = 4, "best"

# The checks in their order, and which options each of them has.
_OPTIONS_OF: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "face": ("min_faces", "min_face", "face_detector"),
        "prompt": ("min_prompt_score", "prompt_model"),
        "group": ("groups", "group_model"),
        "safety": ("max_nsfw", "nsfw_model"),
    }
)


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Whether pictures are what was asked for, and what becomes of those that are not."""

    help_group: ClassVar[str] = "check"

    checks: Annotated[str | None, LISTED, also("--check")] = None
    """What each picture is checked for: any of face, prompt, group and safety, or none.  What fails is made again with
    another seed.  Default: face in new folders, none with --embedded."""
    tries: Annotated[int | None, at_least(1)] = None
    """Pictures that are made of a sample at most, until one passes every check.  Default: 4."""
    on_check_failure: Literal["best", "reject"] | None = None
    """best: if none passes, keep the best one and mark it.  reject: leave the sample out.  Default: best."""
    min_faces: Annotated[int | None, at_least(1)] = None
    """face: number of faces that a picture must show.  Default: 1."""
    min_face: Annotated[float | None, between(0, 1)] = None
    """face: the shorter side of a face's box as a share of the picture's shorter side; smaller faces do not count.
    Default: 0.05."""
    face_detector: Literal["centerface", "scrfd"] | None = None
    """face: the detector.  Default: centerface."""
    min_prompt_score: Annotated[float | None, FINITE] = None
    """prompt: the lowest score of picture and prompt that passes.  Default: known for the default model only."""
    prompt_model: str | None = None
    """prompt: a CLIP or SigLIP model, written as for stage 06's --models.  Default: oai-clip-vit-l14."""
    groups: str | None = None
    """group: the groups of people to decide between, as for stage 02: default, or a YAML file.  Default: those that
    stage 02 recorded."""
    group_model: str | None = None
    """group: a CLIP or SigLIP model, written as for stage 06's --models.  Default: oai-clip-vit-l14."""
    max_nsfw: Annotated[float | None, between(0, 1)] = None
    """safety: the highest probability of a picture that is not safe for work that passes.  Default: 0.5."""
    nsfw_model: str | None = None
    """safety: open-nsfw, or nsfw-image-oai-clip-vit-l-14.  Default: open-nsfw."""


@dataclass(frozen=True, slots=True)
class Checking:
    """What is checked, with a value for every option.

    Attributes:
        names: Of the checks, in their order; empty where nothing is checked.
        tries: Pictures of a sample at most.
        keeps_failed: Whether a picture is kept where none passed.
    """

    names: tuple[str, ...]
    tries: int
    keeps_failed: bool
    _given: Mapping[str, Any]

    @classmethod
    def of(cls, options: CheckOptions, *, default: str = DEFAULT) -> Checking:
        """What the options ask for.

        default: What is checked where ``--check`` is not given.

        Raises:
            UsageError: ``--check`` names something else than checks, or an option belongs to a check that is off.
        """
        names = _names_in(default if options.checks is None else options.checks)
        for name in ("tries", "on_check_failure"):
            if not names and getattr(options, name) is not None:
                raise UsageError(f"--{name}: nothing is checked here (--check {NONE}); leave it out, or give --check")
        given: dict[str, Any] = {}
        for check, its_options in _OPTIONS_OF.items():
            for name in its_options:
                if (value := getattr(options, name)) is None:
                    continue
                if check not in names:
                    here = ",".join(names) or NONE
                    raise UsageError(f"--{name}: is for --check {check}, and here is --check {here}; leave it out")
                given[name] = value
        return cls(
            names,
            (options.tries or _TRIES) if names else 1,
            (options.on_check_failure or _ON_FAILURE) == _ON_FAILURE,
            given,
        )

    def settings(self, groups: Sequence[str], **others: Any) -> CheckSettings:
        """What the checks are constructed with.

        groups: All groups that the run asks for.
        """
        given = {name: value for name, value in self._given.items() if name != "groups"}
        return CheckSettings(**given, groups=tuple(groups) if "group" in self.names else (), **others)

    def as_options(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The options as they are recorded.  record: what each check records of itself."""
        if not self.names:
            return {"checks": NONE, "tries": None, "on_check_failure": None}
        return {
            "checks": record,
            "tries": self.tries,
            "on_check_failure": "best" if self.keeps_failed else "reject",
        }


def _names_in(check: str) -> tuple[str, ...]:
    items = items_in(check)
    unknown = [item for item in items if item not in _OPTIONS_OF]
    if items == [NONE]:
        return ()
    if unknown or not items:
        what = unknown[0] if unknown else check
        raise UsageError(f"--check {what}: there are {', '.join(_OPTIONS_OF)}, and {NONE} alone")
    return tuple(name for name in _OPTIONS_OF if name in items)
