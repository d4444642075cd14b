"""``custom_pypath``: extractors from one Python file of the user's, by this project's API or in upstream's style."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from curation.errors import InfrastructureError, UsageError

TABLE = "EXTRACTORS"


def load_plugin(path: str) -> ModuleType:
    """The module of the file, run once per process under a name that follows from its path, so that what is pickled
    here is found in the worker processes.  Raises UsageError where it is not there or does not load."""
    file = Path(path).expanduser().absolute()
    name = f"curation_plugin_{xxhash.xxh3_64_hexdigest(str(file).encode('utf-8', 'surrogateescape'))}"
    if name in sys.modules:
        return sys.modules[name]
    if file.suffix != ".py" or not file.is_file():
        raise UsageError(f"custom_pypath {path}: no such Python file")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InfrastructureError(f"custom_pypath {path}: {type(error).__name__}: {error}") from error
    return module


def extractors_of(module: ModuleType, path: str) -> Mapping[str, Any]:
    """Directive → class of a plugin.  Raises UsageError where the file has none."""
    table = getattr(module, TABLE, None)
    if not isinstance(table, Mapping) or not table or not all(isinstance(name, str) for name in table):
        raise UsageError(f"custom_pypath {path}: it has no {TABLE} = {{directive: class}}")
    return table
