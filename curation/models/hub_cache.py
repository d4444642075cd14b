"""Where a model comes from (a folder, the hub, the hub's cache), and which exact model that is.

Nothing here loads a model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import InfrastructureError
from curation.models.hub_errors import (
    FETCH_FIRST,
    also_gated,
    called,
    gated_line,
    hub_error_line,
    hub_errors,
    hub_trouble,
    is_refusal,
)
from curation.models.known import Model
from curation.models.weights import is_hub_id


def public_name(model: str) -> str:
    """The name that a dataset may record: a hub id, or the last name of a folder, but never a path of this machine.

    A folder of the hub's cache, ``…/models--org--name/snapshots/<commit>``, is called ``org/name``.
    """
    if match := re.search(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/*$", model):
        return f"{match[1]}/{match[2]}"
    if is_hub_id(model):
        return model
    return model.rstrip("/").rpartition("/")[2] or "model"


def plain_name(name: str) -> str:
    """A model's name in lower case, with one kind of separator."""
    return re.sub(r"[_\s.]+", "-", name.lower())


HUB_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAMPLES, _SAMPLE_BYTES, _HEAD_BYTES = 16, 64 << 10, 1 << 20
_CONTENT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")  # what decides a pipeline's output

# The file that makes a folder a model of a kind, and what the kind is called.
PIPELINE = ("model_index.json", "diffusers pipeline")
TRANSFORMER = ("config.json", "transformers model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One exact model.  ``name`` and ``revision`` go into the dataset, ``location`` (a folder or a hub id) does not.

    config: Of a single file: the model whose configuration it has.
    known: Models with short names, which messages suggest where the hub does not give this one.
    """

    name: str
    location: str
    revision: str
    variant: str | None = None
    config: ModelSource | None = None
    known: Sequence[Model] = field(default=(), repr=False, compare=False)

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.location)


def resolve(
    model: str,
    revision: str | None = None,
    variant: str | None = None,
    kind: tuple[str, str] = PIPELINE,
    *,
    asked_by: str = "--model",
    known: Sequence[Model] = (),
) -> ModelSource:
    """Find out which exact model is meant, before any process loads it.

    A folder's revision is a digest of its configuration and of samples of its weights (``local-…``), so that other
    weights under the same name count as another model; a folder of the hub's cache has its commit.  The revision of a
    hub id is the commit that the branch or tag stands for now; without a network, the one in the cache.

    Args:
        model: A folder or a hub id.
        revision: A commit, branch or tag; None for ``main``, or for the folder as it is.
        variant: Of the weights' files, such as ``fp16``.
        kind: The file that makes a folder a model of the kind, and the kind's name.
        asked_by: What messages call the model: the flag or the directive that names it.
        known: Models with short names, among which messages suggest another one.

    Raises:
        InfrastructureError: The model is not there, is gated, or is not of the kind.
    """
    if os.path.isdir(model):
        return _resolve_folder(Path(model), revision, variant, kind, asked_by)
    if not is_hub_id(model):
        raise InfrastructureError(
            f"{asked_by} {model}: there is no such folder (nor is it a hub id, organisation/name)"
        )
    commit = _hub_commit(model, revision or "main", kind[0], asked_by, known)
    return ModelSource(name=model, location=model, revision=commit, variant=variant, known=known)


def _resolve_folder(
    folder: Path, revision: str | None, variant: str | None, kind: tuple[str, str], asked_by: str
) -> ModelSource:
    marker, called = kind
    if not (folder / marker).is_file():
        raise InfrastructureError(f"{asked_by} {folder}: not a {called} (it has no {marker})")
    path = str(folder.absolute())
    commit = folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None
    found = commit or folder_digest(folder)
    if revision is not None and revision != found:
        raise InfrastructureError(f"--revision {revision}: the folder {folder} is {found} and has no other revision")
    return ModelSource(name=public_name(path), location=path, revision=found, variant=variant)


def folder_digest(folder: Path) -> str:
    """``local-`` and 16 hex digits over names, sizes, configurations and samples of the weights.

    To read every byte of a model of 30 GB would cost each process minutes.  Samples are enough, because training
    changes every tensor.
    """
    digest = xxhash.xxh3_64()
    try:
        paths = sorted(folder.rglob("*"))
        has_safetensors = any(path.suffix == ".safetensors" for path in paths)
        suffixes = _CONTENT_SUFFIXES if has_safetensors else (*_CONTENT_SUFFIXES, ".bin")  # what is loaded then
        for path in paths:
            relative = path.relative_to(folder)
            if any(part.startswith(".") for part in relative.parts) or path.suffix not in suffixes:
                continue
            if path.is_file():
                _add_samples(digest, relative.as_posix(), path)
    except OSError as error:
        raise InfrastructureError(f"--model {folder}: cannot be read ({error.strerror})") from error
    return f"local-{digest.hexdigest()}"


def file_digest(path: Path, asked_by: str = "--model") -> str:
    """The same of one file, whatever it is called."""
    digest = xxhash.xxh3_64()
    try:
        _add_samples(digest, "", path)
    except OSError as error:
        raise InfrastructureError(f"{asked_by} {path}: cannot be read ({error.strerror})") from error
    return f"local-{digest.hexdigest()}"


def _add_samples(digest: xxhash.xxh3_64, name: str, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    with open(path, "rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        for index in range(_SAMPLES if size > _HEAD_BYTES else 0):
            file.seek(_HEAD_BYTES + (size - _HEAD_BYTES) * index // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))


def _hub_commit(model: str, revision: str, marker: str, asked_by: str, known: Sequence[Model]) -> str:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    cached = cached_commit(model, revision, marker)
    if cached == revision or (cached and _offline()):  # a commit never moves
        return cached
    where = called(asked_by, model)
    if _offline():
        raise InfrastructureError(
            f"{where}: revision {revision} is not in the hub's cache and HF_HUB_OFFLINE is set; {FETCH_FIRST}"
            f"{also_gated(model, known)}"
        )
    try:
        info = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S)
    except (RevisionNotFoundError, RepositoryNotFoundError) as error:  # the latter also of a gated one
        raise hub_trouble(error, model, revision, asked_by=asked_by, known=known) from error
    except hub_errors() as error:
        if cached:
            logging.getLogger(__name__).warning("the hub does not answer; using %s %s from its cache", model, cached)
            return cached
        if is_refusal(error):
            raise hub_trouble(error, model, revision, asked_by=asked_by, known=known) from error
        raise InfrastructureError(
            f"{where}: no such folder, not in the hub's cache, and the hub does not answer "
            f"({hub_error_line(error)}); {FETCH_FIRST}{also_gated(model, known)}"
        ) from error
    if not info.sha:
        raise InfrastructureError(f"{where}: the hub names no commit for revision {revision!r}")
    if info.gated and get_token() is None and not (snapshot(model, info.sha) / marker).is_file():
        # The hub describes a gated model to everybody, and refuses its files: say so before anything is done.
        raise InfrastructureError(f"{where}: {gated_line(model, known)}")
    return str(info.sha)


def cached_commit(model: str, revision: str, marker: str) -> str | None:
    """The commit that a branch, tag or commit means in the hub's cache, None where the cache does not have it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, marker, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


@cache
def hub_config(model: str, revision: str) -> dict[str, Any] | None:
    """The ``config.json`` of a model on the hub: from the hub's cache, else what the hub says of it.

    Args:
        model: The hub id.
        revision: A commit, branch or tag.

    Returns:
        Its content; None where it cannot be had, for whatever reason.  What loads the model finds the reason.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import HfApi

    unreadable: tuple[type[Exception], ...] = (*hub_errors(), ValueError)
    cached = cached_commit(model, revision, TRANSFORMER[0])
    config: Any = None
    try:
        if cached:
            config = json.loads((snapshot(model, cached) / TRANSFORMER[0]).read_bytes())
        elif not _offline():  # one request, and no second one where there is no network
            config = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).config
    except unreadable:
        return None
    return config if isinstance(config, dict) and "model_type" in config else None


def snapshot(model: str, commit: str) -> Path:
    """Where the hub's cache keeps a commit of a model."""
    return hub_folder(model) / "snapshots" / commit


def hub_folder(model: str) -> Path:
    """Where the hub's cache keeps a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def quiet_transformers() -> None:
    """Stop transformers from writing bars and advice to stderr, where this run shows its own progress."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def import_bitsandbytes() -> None:
    """Import bitsandbytes, where it is installed, before another library imports it.

    On a CPU with AVX512-BF16 its import asks the hub for one more kernel and warns where it gets none.  That is a wait
    on nodes without internet, and code that nobody asked for; its own kernels do the same work.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    with _hidden("kernels"), _without_line("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward"):
        importlib.import_module("bitsandbytes")


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let imports of the package fail during the block."""
    before = {package: sys.modules[package]} if package in sys.modules else {}
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(before)


@contextlib.contextmanager
def _without_line(name: str, words: str) -> Iterator[None]:
    """Keep lines with these words out of a logger during the block."""

    def others(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    log = logging.getLogger(name)
    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)
