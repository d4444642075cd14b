"""One file per model family.  ``load("faces", "centerface")`` imports ``curation.backends.faces_centerface``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from curation.errors import InfrastructureError


def names(kind: str) -> list[str]:
    """The names of every backend of a kind (``faces``, ``generate``, …), by the files that are here."""
    prefix = kind + "_"
    return sorted(m.name[len(prefix) :] for m in pkgutil.iter_modules(__path__) if m.name.startswith(prefix))


def load(kind: str, name: str) -> Any:
    """The ``Backend`` class of ``curation.backends.<kind>_<name>``: the module's name is the registry.

    Raises InfrastructureError for a name that no module has, and lists those that are there.
    """
    if name not in names(kind):
        raise InfrastructureError(f"no {kind} backend named {name!r}; there are: {', '.join(names(kind)) or 'none'}")
    return importlib.import_module(f"{__name__}.{kind}_{name}").Backend
