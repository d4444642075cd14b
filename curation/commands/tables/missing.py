"""Says which columns or features a table lacks, and with which flags stage 06 makes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Literal, NamedTuple

from curation.backends.extract import families
from curation.extract.config import DATACOMP_NAMES
from curation.extract.outputs import FIELD_TYPES
from curation.jsonio import clean_text

_OWN_NAMES = {name: own for own, name in DATACOMP_NAMES.items()}
_FIELD_OF = {"text": "caption"}  # DataComp's name → the field of the samples' json
_PLACES = {"column": "in the tables", "feature": "in the npz files"}
_SHOWN = 20  # names at most of what is there instead
_SURELY_MEANT, _PERHAPS_MEANT = 0.6, 0.4  # difflib's measure of how alike two names are


def what_is_missing(kind: Literal["column", "feature"], names: Sequence[str], there: Sequence[str]) -> str:
    """The message about columns or features that are not there.

    Args:
        kind: What the names are names of.
        names: Those that are not there.
        there: Those that are.

    Returns:
        All of ``names``; for each that stage 06 does not make, the nearest name that is there or that it makes; and
        the command of stage 06 that makes what it can.
    """
    told, made = [], []
    for name in names:
        if _plain(name) in _makeable(kind):
            made.append(name)
            told.append(repr(clean_text(name)))
            continue
        near = _nearest(name, there, kind)
        if near and near[0] not in there:
            made.append(near[0])
        others = ", ".join(map(clean_text, near or there[:_SHOWN])) or "none"
        told.append(f"{clean_text(name)!r} ({'the nearest' if near else 'there are'}: {others})")
    what = f"there is no {kind}" if len(names) == 1 else f"there are no {kind}s"
    which = ("it" if len(names) == 1 else "them") if made == list(names) else ", ".join(map(clean_text, made))
    making = f"; stage 06 makes {which}: {how_to_make(made)}" if made else ""
    return f"{what} {', '.join(told)} {_PLACES[kind]}{making}"


def other_name(name: str) -> str:
    """DataComp's name of a column or feature that has stage 06's own, or the other way round; else the same name."""
    return DATACOMP_NAMES.get(name) or _OWN_NAMES.get(name, name)


def how_to_make(names: Iterable[str]) -> str:
    """The command of stage 06 that makes columns or features.

    Args:
        names: Of columns and features, also with underscores in place of dashes, and DataComp's names.

    Returns:
        ``python3 06_metadata.py …`` with the flags for all of them that some model or field is known for, and "" where
        none is known for any of them.
    """
    models: dict[str, None] = {}
    fields: dict[str, None] = {}
    features: dict[str, None] = {}
    for name in names:
        own = _OWN_NAMES.get(name.lower(), name)
        if (made := _outputs().get(_plain(own))) is not None:
            models |= dict.fromkeys(made.needs)
            models[made.directive] = None
            if made.kind == "feature":
                features[made.name] = None
        elif (field := _FIELD_OF.get(own.lower(), own.lower())) in FIELD_TYPES:
            fields[field] = None
    flags = (("models", models), ("additional_fields", fields), ("postprocess_features", features))
    told = [f"--{flag} {','.join(values)}" for flag, values in flags if values]
    return " ".join(["python3 06_metadata.py", *told]) if told else ""


class _Output(NamedTuple):
    """A column or feature that stage 06 computes.  needs: the directives whose features it is made of."""

    name: str
    kind: Literal["column", "feature"]
    directive: str
    needs: tuple[str, ...]


@cache
def _outputs() -> Mapping[str, _Output]:
    """Everything that stage 06 computes, by its plain name."""
    found: dict[str, _Output] = {}
    for family in families():
        for directive in (directive for directive in family.directives if not directive.is_prefix):
            columns, features = directive.outputs(directive.name)
            kinds: dict[str, Literal["column", "feature"]] = dict.fromkeys(columns, "column")
            kinds |= dict.fromkeys(features, "feature")
            for name, kind in kinds.items():
                # Of directives that give the same column the first is meant: the one that computes least.
                output = _Output(name, kind, directive.name, directive.needs)
                found.setdefault(_plain(name), output)
    return MappingProxyType(found)


@cache
def _makeable(kind: str) -> Mapping[str, str]:
    """The plain name of each column or feature that stage 06 can make → its name."""
    names = [output.name for output in _outputs().values() if output.kind == kind]
    names += [name for name, own in _OWN_NAMES.items() if own in names]
    names += [*FIELD_TYPES, *_FIELD_OF] if kind == "column" else []
    return MappingProxyType({_plain(name): name for name in names})


def _nearest(name: str, there: Sequence[str], kind: str) -> list[str]:
    """The names that were probably meant: of those that are there, or else the one that stage 06 would make."""
    here = {_plain(other): other for other in there}
    every = {**_makeable(kind), **here}
    close = [every[plain] for plain in difflib.get_close_matches(_plain(name), every, 3, _SURELY_MEANT)]
    if close and close[0] not in there:
        return close[:1]
    close = [other for other in close if other in there]
    return close or [here[plain] for plain in difflib.get_close_matches(_plain(name), here, 3, _PERHAPS_MEANT)]


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name).lower()
