"""How a diffusers pipeline is loaded, from its folder or the hub's cache.

Only safetensors are ever read, and no code that a model brings along is run.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from curation.backends.generate.presets import known_models
from curation.backends.generate.single_file import load_single_file
from curation.errors import InfrastructureError, SampleError
from curation.jsonio import parse_json_object
from curation.models.hub_cache import PIPELINE, ModelSource, import_bitsandbytes, quiet_transformers, snapshot
from curation.models.hub_errors import hub_error_line, hub_errors, hub_trouble
from curation.models.needs import HubFile, WeightsNeed, is_other_weight, list_model, whole_model

# The names under which diffusers and transformers look for the weights of a part: whole, of a variant, or in shards.
_SAFETENSORS = re.compile(r"(diffusion_pytorch_model|model)([.-].+)?\.safetensors")
_PICKLE = re.compile(r"(diffusion_)?pytorch_model([.-].+)?\.bin")


def load_pipeline(source: ModelSource, dtype: str, device: str) -> Any:
    """The pipeline, on ``device``, in ``dtype`` (a torch dtype's name), without progress bars.

    A hub model is read from the hub's cache without asking the hub, as long as it is whole there: compute nodes often
    have no network, and a thousand processes need not ask.
    Raises InfrastructureError, one line, for whatever keeps it from loading.
    """
    quiet_libraries()
    import torch
    from safetensors import SafetensorError

    try:
        if source.config is not None:
            pipeline = load_single_file(source, source.config, dtype)
        else:
            pipeline = _from_cache(source, dtype) or _from_folder(Path(download(source)), source, dtype)
        pipeline.to(device)
    except torch.OutOfMemoryError as error:
        raise InfrastructureError(f"--model {source.location}: does not fit on {device} in {dtype}") from error
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, AttributeError) as error:
        raise InfrastructureError(f"--model {source.location}: cannot be loaded: {hub_error_line(error)}") from error
    except SafetensorError as error:
        raise InfrastructureError(f"--model {source.location}: damaged weights: {hub_error_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_cache(source: ModelSource, dtype: str) -> Any:
    """The hub model from the hub's cache; None where it is not there or not whole."""
    folder = snapshot(source.location, source.revision)
    if source.is_folder or not (folder / "model_index.json").is_file():
        return None
    try:
        return _from_folder(folder, source, dtype)
    except OSError:
        return None


def _from_folder(folder: Path, source: ModelSource, dtype: str) -> Any:
    import torch
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    _refuse_pickles(folder, source)
    arguments: dict[str, Any] = {"use_safetensors": True, "dtype": getattr(torch, dtype), "local_files_only": True}
    if source.variant:
        arguments["variant"] = source.variant
    try:
        return AutoPipelineForText2Image.from_pretrained(str(folder), **arguments)
    except ValueError as error:
        if "can't find a pipeline linked to" not in str(error):
            raise
        return DiffusionPipeline.from_pretrained(str(folder), **arguments)  # SanaSprintPipeline is not in Auto's map


def download(source: ModelSource) -> str:
    """The model's folder: its own, or one of the hub's cache, filled if need be (the hub's client locks)."""
    if source.is_folder:
        return source.location
    from diffusers import DiffusionPipeline

    arguments: dict[str, Any] = {"variant": source.variant} if source.variant else {}
    try:
        return str(
            DiffusionPipeline.download(source.location, revision=source.revision, use_safetensors=True, **arguments)
        )
    except hub_errors() as error:
        raise hub_trouble(error, source.location, source.revision, asked_by="--model", known=source.known) from error


def pipeline_files(source: ModelSource) -> Path | None:
    """The folder with the pipeline's own files, as far as they are on this machine.

    Of a hub model ``model_index.json`` is fetched if need be: it says which preset the model has.

    Returns:
        The folder; None where there is none, and the hub does not give that file.
    """
    source = source.config or source
    if source.is_folder:
        return Path(source.location)
    from huggingface_hub import hf_hub_download

    folder = snapshot(source.location, source.revision)
    if (folder / PIPELINE[0]).is_file():
        return folder
    try:
        return Path(hf_hub_download(source.location, PIPELINE[0], revision=source.revision)).parent
    except hub_errors():
        return None


def pipeline_weights(model: str, revision: str | None, variant: str | None) -> WeightsNeed:
    """A diffusers pipeline, in the hub's cache or in a folder."""

    wanted = partial(wanted_files, variant=variant)
    return whole_model(model, revision, variant, PIPELINE, wanted, _fetch, known_models())


def _fetch(source: ModelSource) -> Path:
    """Fetch the files of a hub model's pipeline into the hub's cache.

    The hub's client does it alone, because to import diffusers takes seconds, and a login node need not have it.

    Returns:
        The folder.

    Raises:
        InfrastructureError: One of the parts that the pipeline's index names has its weights in a pickle only.
        Exception: What the hub's client raises.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    folder = Path(hf_hub_download(source.location, PIPELINE[0], revision=source.revision)).parent
    files, parts = list_model(source.location, source.revision).files, _named(folder)
    for part in parts:
        inside = [file.path.removeprefix(f"{part}/") for file in files if file.path.startswith(f"{part}/")]
        _refuse_pickled(part, inside, source)
    wanted = [file.path for file in wanted_files(files, source.variant) if file.path.rpartition("/")[0] in ("", *parts)]
    snapshot_download(source.location, revision=source.revision, allow_patterns=[glob.escape(path) for path in wanted])
    return folder


def wanted_files(files: Sequence[HubFile], variant: str | None) -> list[HubFile]:
    """The files that a pipeline is loaded from, by path.

    They are the index in the top folder and, in each part's folder, its configuration and its safetensors: those of the
    variant where the part has them.
    """
    parts: dict[str, list[HubFile]] = {}
    for file in files:
        folder, _, name = file.path.rpartition("/")
        if (folder and "/" not in folder) or name == "model_index.json":
            parts.setdefault(folder, []).append(file)
    wanted: list[HubFile] = []
    for group in parts.values():
        weights = [file for file in group if ".safetensors" in file.path]
        plain = [file for file in weights if len(file.path.rpartition("/")[2].split(".")) == 2]
        of_variant = [file for file in weights if variant and f".{variant}" in file.path.rpartition("/")[2]]
        others = [file for file in group if file not in weights and not is_other_weight(file.path)]
        wanted += [*(of_variant or plain), *others]
    return sorted(wanted, key=lambda file: file.path)


def _refuse_pickles(folder: Path, source: ModelSource) -> None:
    """transformers would fall back to a pickled file for its part of a pipeline; say so before that.

    Looked at is what would be loaded: the weights of the parts that ``model_index.json`` names.  Copies of the hub's
    repositories hold more, such as OpenVINO's ``openvino_model.bin``, which is no pickle, and a trainer's
    ``optimizer.pt``; nothing opens these.
    """
    for part in _named(folder):
        if (folder / part).is_dir():
            _refuse_pickled(part, sorted(entry.name for entry in (folder / part).iterdir()), source)


def _refuse_pickled(part: str, names: Sequence[str], source: ModelSource) -> None:
    """names: of the files in the part's folder."""
    pickled = [name for name in names if _PICKLE.fullmatch(name)]
    if pickled and not any(map(_SAFETENSORS.fullmatch, names)):
        raise InfrastructureError(
            f"--model {source.location}: {part}/{pickled[0]} is a pickle; only safetensors are loaded"
        )


def _named(folder: Path) -> list[str]:
    """The parts that a pipeline's index names, sorted; none where it is no index, which diffusers will say."""
    try:
        index = parse_json_object((folder / "model_index.json").read_bytes())
    except (OSError, SampleError):
        return []
    named = [name for name, what in index.items() if isinstance(what, list) and what and what[0]]
    return sorted(name for name in named if name == Path(name).name)


def quiet_libraries() -> None:
    """Model libraries write bars and advice to stderr, where this run's own progress is.  Call it before the imports
    that already give advice."""
    quiet_transformers()
    import_bitsandbytes()
    import diffusers.utils.logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
