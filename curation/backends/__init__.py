"""Models, in one folder for each kind: ``load("faces", "centerface")`` gives ``curation.backends.faces.centerface``.

The folder is the registry.  A **backend** is the class ``Backend`` of a module in it; its module has the **name** of a
family of models and carries everything that is known of the family.  Modules without one are what backends share.  A
file that is put into the folder is found without any other change.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError

__all__ = ["families", "load", "names"]

_BACKEND = re.compile(rb"^class Backend\b", re.MULTILINE)


@cache
def names(kind: str) -> list[str]:
    """The names of all backends of a kind, found without importing them.

    Args:
        kind: The name of a folder here: ``caption``, ``check``, ``extract``, ``faces``, ``generate``, ``llm`` or
            ``watermark``.
    """
    folders = importlib.import_module(f"{__name__}.{kind}").__path__
    files = (file for folder in folders for file in Path(folder).glob("[!_]*.py"))
    return sorted(file.stem for file in files if _has_a_backend(file))


def load(kind: str, name: str) -> Any:
    """The class ``Backend`` of ``curation.backends.<kind>.<name>``.

    Raises:
        InfrastructureError: There is no such backend (the message lists those that are there), or its module cannot be
            imported.
    """
    if name not in names(kind):
        raise InfrastructureError(f"no {kind} backend named {name!r}; there are: {', '.join(names(kind)) or 'none'}")
    module = f"{__name__}.{kind}.{name}"
    try:
        return importlib.import_module(module).Backend
    except ImportError as error:
        raise InfrastructureError(f"{module} cannot be imported: {error}") from error


@cache
def families(kind: str) -> dict[str, Any]:
    """What each backend of a kind declares of its family, by name: the class attribute ``family``.

    The modules of the kind are imported for this.  They import their heavy libraries inside functions.
    """
    return {name: load(kind, name).family for name in names(kind)}


def _has_a_backend(file: Path) -> bool:
    """Read from the source, because the module of a backend may need a library that is not installed.  It is not
    parsed: for the extractors that takes 40 ms, and a run with nothing to do takes 230 ms."""
    return _BACKEND.search(file.read_bytes()) is not None
