"""Says with which flags stage 06 makes columns and features that a table lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from curation.backends.extract import families
from curation.extract.config import DATACOMP_NAMES
from curation.extract.outputs import FIELD_TYPES

_OWN_NAMES = {name: own for own, name in DATACOMP_NAMES.items()}
_FIELD_OF = {"text": "caption"}  # DataComp's name → the field of the samples' json


def how_to_make(names: Iterable[str]) -> str:
    """The command of stage 06 that makes columns or features.

    Args:
        names: Of columns and features, also with underscores in place of dashes, and DataComp's names.

    Returns:
        ``python3 06_metadata.py …`` with the flags for all of them that some model or field is known for, and "" where
        none is known for any of them.
    """
    outputs = {
        _plain(output): (directive.name, number, getattr(family, "needs", ()))
        for family in families()
        for directive in family.directives
        if not directive.is_prefix
        for number, kind in enumerate(directive.outputs(directive.name))
        for output in kind
    }
    models: dict[str, None] = {}
    fields: dict[str, None] = {}
    features: dict[str, None] = {}
    for name in names:
        own = _OWN_NAMES.get(name.lower(), name)
        if (made := outputs.get(_plain(own))) is not None:
            models |= dict.fromkeys(outputs[_plain(needed)][0] for needed in made[2])
            models[made[0]] = None
            if made[1]:
                features[own] = None
        elif (field := _FIELD_OF.get(own.lower(), own.lower())) in FIELD_TYPES:
            fields[field] = None
    flags = (("models", models), ("additional_fields", fields), ("postprocess_features", features))
    told = [f"--{flag} {','.join(values)}" for flag, values in flags if values]
    return " ".join(["python3 06_metadata.py", *told]) if told else ""


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name).lower()
