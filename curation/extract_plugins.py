"""``custom_pypath``: one Python file of the user's, loaded here and in the worker processes alike, and run."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from curation.errors import InfrastructureError, UsageError

_PACKAGE = "dataset2metadata"


def load_plugin(path: str) -> ModuleType:
    """The module of the file, run once per process under a name that follows from its path, so that what is made of its
    classes here is understood in the worker processes.  Raises UsageError where it is not there, InfrastructureError
    where it does not load."""
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
        with upstream_modules():
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InfrastructureError(f"custom_pypath {path}: {type(error).__name__}: {error}") from error
    return module


# ---- what plugins import from dataset2metadata where it is not installed


@contextlib.contextmanager
def upstream_modules() -> Iterator[None]:
    """``from dataset2metadata.postprocessors import select, …`` finds functions that do the same."""
    if _PACKAGE in sys.modules or _is_installed():
        yield
        return
    package, post = ModuleType(_PACKAGE), ModuleType(f"{_PACKAGE}.postprocessors")
    for function in (select, identity, batched_dot_product, batched_dot_product_index, transpose_list):
        setattr(post, function.__name__, function)
    package.postprocessors = post  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, post.__name__: post}
    try:
        yield
    finally:
        for module in (package, post):
            sys.modules.pop(module.__name__, None)


def _is_installed() -> bool:
    return importlib.util.find_spec(_PACKAGE) is not None


def select(cache: dict[str, Any], model: str, index: int, to_cpu: bool = True) -> Any:
    """One of a model's outputs."""
    return cache[model][index].cpu() if to_cpu else cache[model][index]


def identity(cache: dict[str, Any], model: str, to_cpu: bool = True) -> Any:
    """A model's only output."""
    return cache[model].cpu() if to_cpu else cache[model]


def batched_dot_product_index(cache: dict[str, Any], model: str, i: int, j: int, to_cpu: bool = True) -> Any:
    """Row by row, of two of a model's outputs."""
    products = (cache[model][i] * cache[model][j]).sum(1)
    return products.cpu() if to_cpu else products


def batched_dot_product(cache: dict[str, Any], model: str, to_cpu: bool = True) -> Any:
    """Row by row, of a model's first two outputs."""
    return batched_dot_product_index(cache, model, 0, 1, to_cpu)


def transpose_list(cache: dict[str, Any], model: str) -> list[list[Any]]:
    """Rows to columns."""
    return [list(column) for column in zip(*cache[model], strict=True)]
