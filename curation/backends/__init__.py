"""Models, a folder a kind: ``load("faces", "centerface")`` imports ``curation.backends.faces.centerface``.

The folder is the registry: a module that has a ``Backend`` is a model of that kind, the others are what models share.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError


@cache
def names(kind: str) -> list[str]:
    """The names of every model of a kind (``faces``, ``generate``, …), by the files that are in its folder."""
    folder = Path(__file__).parent / kind
    return sorted(file.stem for file in folder.glob("[!_]*.py") if _has_a_backend(file))


def load(kind: str, name: str) -> Any:
    """The ``Backend`` class of ``curation.backends.<kind>.<name>``.

    Raises InfrastructureError for a name that no module has, and lists those that are there.
    """
    if name not in names(kind):
        raise InfrastructureError(f"no {kind} backend named {name!r}; there are: {', '.join(names(kind)) or 'none'}")
    return importlib.import_module(f"{__name__}.{kind}.{name}").Backend


def _has_a_backend(file: Path) -> bool:
    """Told without importing it: a model's module may want a library that is not installed."""
    body = ast.parse(file.read_bytes()).body
    return any(isinstance(node, ast.ClassDef) and node.name == "Backend" for node in body)
