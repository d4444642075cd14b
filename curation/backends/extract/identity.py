"""Which weights the extractors of stage 06 load, and exactly which those are, without loading them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from curation.backends import load
from curation.extract.settings import ModelSettings, WeightSource, file_revision
from curation.models.hub_cache import TRANSFORMER, folder_digest, resolve
from curation.models.weights import is_hub_id, is_url


def weight_sources(family: str, directive: str, settings: ModelSettings) -> list[WeightSource]:
    """What has to be on this machine before the directive's extractor can be made; none for one without weights."""
    module = import_module(load("extract", family).__module__)
    sources = getattr(module, "sources", None)
    return list(sources(directive, settings)) if sources is not None else []


def identify(directive: str, sources: Iterable[WeightSource]) -> list[str]:
    """A line for each of a directive's: other weights give another one, wherever they lie.

    Raises InfrastructureError where a hub id's revision cannot be found out.
    """
    return [_identify(directive, source) for source in sources]


def _identify(directive: str, source: WeightSource) -> str:
    if is_url(source.source):
        return f"sha256:{source.sha256}"
    path = Path(source.source).expanduser()
    if path.is_dir():
        return folder_digest(path)
    if path.exists():
        return file_revision(path)
    model, _, revision = source.source.partition("@")
    if is_hub_id(model):
        return f"{model}@{resolve(model, revision or None, kind=TRANSFORMER, asked_by=directive).revision}"
    return source.source
