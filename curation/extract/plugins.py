"""``custom_pypath``: one Python file of the user's, loaded here and in the worker processes alike, and run.

The extractors of a plugin: by this project's API (``EXTRACTORS``), or in dataset2metadata's style.

A file of the latter has four tables: ``model_lookup``, ``preprocessor_lookup``, ``postprocess_parquet_lookup`` and
``postprocess_feature_lookup``.  A model class has ``raw_inputs`` (image, text), ``preprocessors``, ``dependencies``,
``to_device``, is made with the device and called with the stacked inputs.  What it gives is found out by a trial.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import xxhash

from curation.errors import InfrastructureError, UsageError
from curation.extract import api
from curation.extract import settings as model_settings
from curation.extract.api import Batch, Column, Extractor, Feature, Kind, Preparation, Takes
from curation.extract.settings import ModelSettings
from curation.libraries import Image, np

# Plugins written for version 0.1 import from modules that have other names now.
_FORMER_MODULES = {"curation.extracting": api, "curation.model_settings": model_settings}


class BuiltIns(Protocol):
    """What plugins in dataset2metadata's style may name or import of it.  Picklable, for the worker processes.

    names: of its preprocessors.
    """

    @property
    def names(self) -> Sequence[str]: ...

    def modules(self) -> Mapping[str, ModuleType]:
        """Modules that plugins import, by name, where they are not installed."""

    def preparation(self, name: str) -> Preparation | None:
        """What a name in ``preprocessors`` stands for; None for an unknown one."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One file of the user's.  built_in: what it may name beside its own; None for nothing."""

    path: str
    built_in: BuiltIns | None = None

    def load(self) -> ModuleType:
        """The module (``load_plugin``)."""
        return load_plugin(self.path, self.built_in)


def load_plugin(path: str, built_in: BuiltIns | None = None) -> ModuleType:
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
    for former, now in _FORMER_MODULES.items():
        sys.modules.setdefault(former, now)
    if built_in is not None:
        sys.modules.update(built_in.modules())
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InfrastructureError(f"custom_pypath {path}: {type(error).__name__}: {error}") from error
    return module


# ---- what dataset2metadata.postprocessors has


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


POSTPROCESSORS = (select, identity, batched_dot_product, batched_dot_product_index, transpose_list)
OWN_TABLE = "EXTRACTORS"


_PARTS = ("name", "revision", "columns", "features", "needs", "preparations", "compute", "close")


TABLES = ("model_lookup", "preprocessor_lookup", "postprocess_parquet_lookup", "postprocess_feature_lookup")


_OTHERS_FEATURES = ("oai-clip-vit-b32", "oai-clip-vit-l14")  # whose outputs are an image's and a text's features


def extractors_of(plugin: Plugin) -> Mapping[str, Callable[[str, ModelSettings], Any]]:
    """Directive → what makes its extractor.  Raises UsageError where the file has none."""
    module, path = plugin.load(), plugin.path
    own = getattr(module, OWN_TABLE, None)
    if isinstance(own, Mapping) and own and all(isinstance(name, str) for name in own):
        return own
    missing = [name for name in TABLES if not isinstance(getattr(module, name, None), Mapping)]
    if missing:
        tables = f" ({', '.join(missing)} of dataset2metadata's style are missing too)" if len(missing) < 4 else ""
        raise UsageError(f"custom_pypath {path}: it has no {OWN_TABLE} = {{directive: class}}{tables}")
    return {name: partial(UpstreamExtractor, plugin) for name in module.model_lookup}


def make_extractor(kind: Callable[[str, ModelSettings], Any], directive: str, settings: ModelSettings) -> Extractor:
    """A plugin's extractor.  Raises InfrastructureError where the user's code does not do its part."""
    try:
        extractor: Extractor = kind(directive, settings)
        missing = [name for name in _PARTS if not hasattr(extractor, name)]
    except (UsageError, InfrastructureError):
        raise
    except Exception as error:
        raise InfrastructureError(f"{directive}: cannot be made: {type(error).__name__}: {error}") from error
    if missing:
        raise UsageError(f"{directive}: the plugin's class has no {', '.join(missing)}")
    for feature in extractor.features:
        if not re.fullmatch(r"[\w.+=:@-]+", feature.name):  # becomes a member of the npz
            raise UsageError(f"{directive}: {feature.name!r} cannot name a feature: letters, digits and _.+=:@- only")
    return extractor


@dataclass(frozen=True, slots=True)
class UpstreamPreparation:
    """A preprocessor of the plugin, on one sample: a picture as a Pillow image, a caption as text."""

    plugin: Plugin
    name: str
    takes: Takes

    def __call__(self, given: Any) -> Any:
        made: Any = given if self.takes == "text" else Image.fromarray(given)
        if self.name != "identity":
            made = self.plugin.load().preprocessor_lookup[self.name](made)
        if isinstance(made, str):
            return {"value": made}
        array = made.numpy() if callable(getattr(made, "numpy", None)) else np.asarray(made)
        return np.ascontiguousarray(array)


class UpstreamExtractor:
    """One model of the plugin, with the columns and features that its tables make of it."""

    revision = "custom"

    def __init__(self, plugin: Plugin, directive: str, settings: ModelSettings) -> None:
        import torch

        self._torch = torch
        module = plugin.load()
        kind = module.model_lookup[directive]
        self.name = directive
        for name in kind.dependencies:
            if name not in _OTHERS_FEATURES:
                raise UsageError(f"{directive}: depends on {name!r}; of others only {_OTHERS_FEATURES} can be given")
        self._dependencies = tuple(kind.dependencies)
        self.needs = tuple(f"{name}-{part}" for name in self._dependencies for part in ("image", "text"))
        pairs = zip(kind.preprocessors, kind.raw_inputs, strict=True)
        self.preparations: tuple[Preparation, ...] = tuple(
            _preparation(plugin, directive, name, raw) for name, raw in pairs
        )
        self._to_device = bool(kind.to_device)
        self._device = settings.device
        number = settings.device.partition(":")[2]
        self._model = kind(int(number) if number else settings.device)
        self._tables = {**module.postprocess_parquet_lookup}, {**module.postprocess_feature_lookup}
        self.columns, self.features = self._try_out()

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        made = [self._given(batch, preparation) for preparation in self.preparations]
        made += [tuple(batch.features[f"{name}-{part}"] for part in ("image", "text")) for name in self._dependencies]
        outputs = self._run(made)
        wanted = {*(column.name for column in self.columns), *(feature.name for feature in self.features)}
        tables = {**self._tables[0], **self._tables[1]}
        return {name: tables[name](outputs) for name in wanted}

    def _given(self, batch: Batch, preparation: Preparation) -> Any:
        made = batch.prepared(preparation)
        if isinstance(made, list):
            return [values.get("value", "") for values in made]
        return batch.device_tensor(preparation) if self._to_device else self._torch.from_numpy(made)

    def _run(self, inputs: Sequence[Any]) -> dict[str, Any]:
        with self._torch.inference_mode():
            return {self.name: self._model(*inputs)}

    def _try_out(self) -> tuple[tuple[Column, ...], tuple[Feature, ...]]:
        """What two samples of nothing much give tells names, kinds and widths."""
        inputs: list[Any] = []
        for preparation in self.preparations:
            given = np.full((64, 64, 3), 128, np.uint8) if preparation.takes == "image" else "a"
            made = [preparation(given) for _ in range(2)]
            if isinstance(made[0], dict):
                inputs.append([values["value"] for values in made])
            else:
                tensor = self._torch.from_numpy(np.stack([np.asarray(array) for array in made]))
                inputs.append(tensor.to(self._device) if self._to_device else tensor)
        for name in self._dependencies:
            width = {"oai-clip-vit-b32": 512}.get(name, 768)
            inputs.append((self._torch.ones(2, width, device=self._device) / width**0.5,) * 2)
        outputs = self._run(inputs)
        columns, features = [], []
        for name, function in self._tables[0].items():
            if (values := _given(function, outputs)) is not None:
                columns.append(Column(name, _kind(values)))
        for name, function in self._tables[1].items():
            if (values := _given(function, outputs)) is not None:
                features.append(Feature(name, int(values.shape[1])))
        return tuple(columns), tuple(features)

    def close(self) -> None:
        self._model = None


def _preparation(plugin: Plugin, directive: str, name: str, raw: str) -> Preparation:
    if raw not in ("image", "text"):
        raise UsageError(f"{directive}: the input {raw!r} is neither image nor text")
    takes: Takes = "image" if raw == "image" else "text"
    if name == "identity" or name in plugin.load().preprocessor_lookup:
        return UpstreamPreparation(plugin, name, takes)
    found = None if plugin.built_in is None else plugin.built_in.preparation(name)
    if found is None:
        known = ", ".join(("identity", *(plugin.built_in.names if plugin.built_in is not None else ())))
        raise UsageError(
            f"{directive}: the file's preprocessor_lookup has no {name!r}; define it there, or name one of {known}"
        )
    if found.takes != takes:
        raise UsageError(f"{directive}: the preprocessor {name!r} takes the {found.takes}, not the {raw}")
    return found


def _given(function: Callable[[dict[str, Any]], Any], outputs: dict[str, Any]) -> Any:
    """None where the entry is made of another model's outputs."""
    try:
        return function(outputs)
    except KeyError:
        return None


def _kind(values: Any) -> Kind:
    first = values[0]
    if isinstance(first, str):
        return "string"
    if isinstance(first, list | tuple):
        return "boxes"
    kind = str(getattr(values, "dtype", type(first).__name__))
    if "bool" in kind:
        return "bool"
    return "int64" if "int" in kind else "float32"
