"""A pipeline in one file of safetensors, as most fine-tuned models are shared.

Such a file holds the weights only.  How the pipeline is built is in the configuration of the model that it was made
from: a folder, or a model of the hub, of which the small files are enough.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, UsageError
from curation.jsonio import parse_json_object
from curation.models.hub_cache import PIPELINE, ModelSource, file_digest, resolve, snapshot
from curation.models.hub_errors import hub_errors, hub_trouble
from curation.models.needs import HubFile, WeightsNeed, whole_model

ENDING = ".safetensors"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")


def is_single_file(model: str) -> bool:
    """Whether ``--model`` names a file, be it there or not."""
    return model.endswith((ENDING, *_PICKLES)) and not os.path.isdir(model)


def find_single_file(model: str, config: str | None, revision: str | None, variant: str | None) -> ModelSource:
    """The exact model in a file.

    Args:
        model: The path.
        config: A folder or a hub id with the configuration; None for the one that diffusers knows for such weights.
        revision: Must be None or the file's own.
        variant: Must be None.

    Raises:
        InfrastructureError: The file is not there, is no safetensors, or its configuration cannot be found.
        UsageError: ``variant`` is given.
    """
    path = Path(model)
    if not path.is_file():
        raise InfrastructureError(f"--model {model}: there is no such file")
    if path.suffix != ENDING:
        raise InfrastructureError(f"--model {model}: is a pickle; only safetensors are loaded")
    if variant:
        raise UsageError(f"--variant {variant}: {path.name} is one file and has no variants; leave it out")
    digest = file_digest(path)
    if revision not in (None, digest):
        raise InfrastructureError(f"--revision {revision}: the file {model} is {digest} and has no other revision")
    known = config or usual_config(path)
    try:
        found = resolve(known, asked_by="--config")
    except InfrastructureError as error:
        if config:
            raise
        raise InfrastructureError(
            f"--model {model}: one file needs the configuration of its pipeline, as {known} has it: give --config with "
            f"a folder that has it, or a hub id ({error})"
        ) from error
    return ModelSource(name=path.name, location=str(path.absolute()), revision=digest, config=found)


def usual_config(path: Path) -> str:
    """The hub id of the model that diffusers takes the configuration of such weights from.

    Raises InfrastructureError if the file cannot be read.
    """
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise InfrastructureError(f"--model {path}: damaged weights: {error}") from error
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return str(fetch_diffusers_config(weights)["pretrained_model_name_or_path"])


def load_single_file(source: ModelSource, config: ModelSource, dtype: str) -> Any:
    """The pipeline.  The hub is asked only where the configuration's files are not here.

    Raises:
        InfrastructureError: The hub does not give the configuration, or it is of no pipeline that can be in one file.
        Exception: What diffusers raises.
    """
    folder = Path(config.location) if config.is_folder else snapshot(config.location, config.revision)
    if config.is_folder:
        return _load(source, folder, dtype)
    try:
        if (folder / PIPELINE[0]).is_file():
            return _load(source, folder, dtype)
    except OSError:  # some of its files are not here
        pass
    return _load(source, fetch_config(config), dtype)


def fetch_config(config: ModelSource) -> Path:
    """The folder with a hub model's configuration, without weights."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.location, revision=config.revision, allow_patterns=list(_CONFIG_FILES)))
    except hub_errors() as error:
        raise hub_trouble(error, config.location, config.revision, asked_by="--config") from error


def _load(source: ModelSource, folder: Path, dtype: str) -> Any:
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    _refuse_pickles(folder)
    index = parse_json_object((folder / PIPELINE[0]).read_bytes())
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise InfrastructureError(f"--config {folder}: diffusers has no pipeline {name!r}")
    load = getattr(kind, "from_single_file", None)
    if load is None:
        raise InfrastructureError(f"--config {folder}: {name} cannot be loaded from one file; give a folder as --model")
    given: dict[str, Any] = {}  # parts that the file lacks
    while True:
        try:
            return load(
                source.location, config=str(folder), dtype=getattr(torch, dtype), local_files_only=True, **given
            )
        except SingleFileComponentError as error:
            found = re.search(r"^(\w+) = ", str(error), re.MULTILINE)
            part = found[1] if found else "part of the pipeline"
            if part in given or not any((folder / part).glob(f"*{ENDING}")):
                raise InfrastructureError(
                    f"--model {source.location}: the file has no {part}, and {folder} has no weights for it: give the "
                    "folder of a whole pipeline as --config"
                ) from error
            given[part] = _load_part(folder, part, index.get(part), dtype)


def _load_part(folder: Path, part: str, kind: object, dtype: str) -> Any:
    """A part of a pipeline in a folder.  kind: the library and the class, as ``model_index.json`` has them."""
    import diffusers
    import torch
    import transformers

    libraries: dict[object, Any] = {"diffusers": diffusers, "transformers": transformers}
    library, name = kind if isinstance(kind, list) and len(kind) == 2 else (None, None)
    found = getattr(libraries.get(library), str(name), None)
    if found is None or not isinstance(found, type) or not issubclass(found, torch.nn.Module):
        raise InfrastructureError(f"--config {folder}: {part} is {str(kind)[:100]}, and no class of a known library")
    return found.from_pretrained(  # type: ignore[attr-defined]
        str(folder), subfolder=part, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )


def _refuse_pickles(folder: Path) -> None:
    """Parts that the file lacks come from the configuration's folder, where transformers would also take pickles."""
    for path in sorted(folder.glob("*/*pytorch_model*.bin")):
        if not any(path.parent.glob(f"*{ENDING}")):
            raise InfrastructureError(f"--config {folder}: {path.parent.name}/{path.name} is a pickle; remove it")


def config_weights(model: str, config: str | None) -> WeightsNeed:
    """What a single file needs beside itself: the configuration."""

    def small(files: Sequence[HubFile]) -> list[HubFile]:
        return [file for file in files if file.path.count("/") < 2 and file.path.endswith((".json", ".txt", ".model"))]

    return whole_model(config or usual_config(Path(model)), None, None, PIPELINE, small, fetch_config)
