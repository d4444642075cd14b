"""Where a diffusers pipeline comes from (a folder, the hub, its cache), which revision it is, and how it is loaded.

Only safetensors are ever read, and no code that a model brings along is run.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from curation.backends.diffusion_presets import is_hub_id, public_name
from curation.errors import InfrastructureError

HUB_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAMPLES, _SAMPLE_BYTES, _HEAD_BYTES = 16, 64 << 10, 1 << 20
_CONTENT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")  # what decides a pipeline's output


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One exact model.  ``name`` and ``revision`` go into the dataset, ``location`` (a folder or a hub id) does not."""

    name: str
    location: str
    revision: str
    variant: str | None = None

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.location)


def resolve(model: str, revision: str | None = None, variant: str | None = None) -> ModelSource:
    """Find out which exact model ``--model`` and ``--revision`` mean, before any process loads it.

    A folder's revision is a digest of its configuration and of samples of its weights (``local-…``), so that other
    weights under the same name count as another model; a folder of the hub's cache has its commit.  A hub id's is the
    commit that the branch or tag stands for now; with no network, the one in the cache.
    Raises InfrastructureError, one line, when the model is not there, is gated, or is not a diffusers pipeline.
    """
    if os.path.isdir(model):
        return _resolve_folder(Path(model), revision, variant)
    if not is_hub_id(model):
        raise InfrastructureError(f"--model {model}: there is no such folder (nor is it a hub id, organisation/name)")
    commit = _hub_commit(model, revision or "main")
    return ModelSource(name=model, location=model, revision=commit, variant=variant)


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
    folder = _snapshot(source.location, source.revision)
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


def _resolve_folder(folder: Path, revision: str | None, variant: str | None) -> ModelSource:
    if not (folder / "model_index.json").is_file():
        raise InfrastructureError(f"--model {folder}: not a diffusers pipeline (it has no model_index.json)")
    path = str(folder.absolute())
    commit = folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None
    found = commit or folder_digest(folder)
    if revision is not None and revision != found:
        raise InfrastructureError(f"--revision {revision}: the folder {folder} is {found} and has no other revision")
    return ModelSource(name=public_name(path), location=path, revision=found, variant=variant)


def folder_digest(folder: Path) -> str:
    """``local-`` and 16 hex digits over names, sizes, configurations and samples of the weights.

    Not over every byte: a model of 30 GB would cost each process minutes, and training moves every tensor, so that
    samples tell.
    """
    digest = xxhash.xxh3_64()
    try:
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if any(part.startswith(".") for part in relative.parts) or path.suffix not in _CONTENT_SUFFIXES:
                continue
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{relative.as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
            with open(path, "rb") as file:
                digest.update(file.read(_HEAD_BYTES))
                for index in range(_SAMPLES if size > _HEAD_BYTES else 0):
                    file.seek(_HEAD_BYTES + (size - _HEAD_BYTES) * index // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise InfrastructureError(f"--model {folder}: cannot be read ({error.strerror})") from error
    return f"local-{digest.hexdigest()}"


def _hub_commit(model: str, revision: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cached = _cached_commit(model, revision)
    if cached == revision or (cached and _offline()):  # a commit never moves
        return cached
    if _offline():
        raise InfrastructureError(
            f"--model {model}: revision {revision} is not in the hub's cache and HF_HUB_OFFLINE is set; "
            "download it first, or give a folder"
        )
    try:
        commit = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except GatedRepoError as error:
        raise InfrastructureError(
            f"--model {model}: gated; accept its licence on the hub and set HF_TOKEN, or give a folder"
        ) from error
    except RevisionNotFoundError as error:
        raise InfrastructureError(f"--model {model}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise InfrastructureError(f"--model {model}: no such folder, and the hub shows no such model") from error
    except _hub_errors() as error:
        if cached:
            logging.getLogger(__name__).warning("the hub does not answer; using %s %s from its cache", model, cached)
            return cached
        raise InfrastructureError(
            f"--model {model}: no such folder, not in the hub's cache, and the hub does not answer "
            f"({hub_error_line(error)})"
        ) from error
    if not commit:
        raise InfrastructureError(f"--model {model}: the hub names no commit for revision {revision!r}")
    return commit


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when the hub or the network does not work: its HTTP library has changed twice."""
    import huggingface_hub.errors as errors

    transport = getattr(errors, "HTTPError", OSError)
    return (OSError, errors.HfHubHTTPError, transport)


def _cached_commit(model: str, revision: str) -> str | None:
    """The commit of a branch, tag or commit in the hub's cache, None where it is not there."""
    from huggingface_hub import constants

    commit = revision
    if not _COMMIT.fullmatch(revision):
        if ".." in Path(revision).parts:
            return None
        folder = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
    return commit if (_snapshot(model, commit) / "model_index.json").is_file() else None


def _snapshot(model: str, commit: str) -> Path:
    """Where the hub's cache keeps a commit of a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots" / commit


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


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
    except _hub_errors() as error:
        raise OSError(f"download failed: {hub_error_line(error)}") from error


def _refuse_pickles(folder: Path, source: ModelSource) -> None:
    """transformers would fall back to a pickled file for its part of a pipeline; say so before that."""
    for part in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        names = [entry.name for entry in part.iterdir()]
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise InfrastructureError(
                f"--model {source.location}: {part.name}/{pickled[0]} is a pickle; only safetensors are loaded"
            )


def quiet_libraries() -> None:
    """Model libraries write bars and advice to stderr, where this run's own progress is.  Call it before the imports
    that already give advice."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import diffusers.utils.logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def hub_error_line(error: BaseException) -> str:
    """The first line that says something, short enough for a terminal."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
