"""The models of the checks, as ``--list_models`` shows them."""

from __future__ import annotations

from dataclasses import replace

from curation import PROGRAM, backends
from curation.backends import faces
from curation.backends.check import ORDER
from curation.extract import catalogue
from curation.extract.api import ExtractorFamily
from curation.models.known import Model
from curation.models.listing import table

_DETECTORS = ("centerface", "scrfd")
_CLIPS = ("oai-clip-vit-l14", "oai-clip-vit-b32")
_NSFW = ("open-nsfw", "nsfw-image-oai-clip-vit-l-14")
_MORE = (
    "--prompt_model and --group_model also take clip:…, openclip:… and siglip:… with a hub id or a folder, as stage 06."
)


def list_checks(stage: str) -> str:
    """The table of the checks' models, and how to fetch them.

    Args:
        stage: The number of the script that ``models fetch`` is given.
    """
    fetch = f"To fetch those of some checks: {PROGRAM} models fetch {stage} --check {','.join(ORDER)}"
    return "\n".join(["Models of --check:", *table(known_models(), here), "", fetch, _MORE])


def known_models() -> list[Model]:
    """The models that have a short name, and which flag of which check names them."""
    known = {model.short: model for model in (*faces.known_models(), *catalogue.known_models(_families()))}
    found = [replace(known[name], suits="face: --face_detector") for name in _DETECTORS]
    found += [replace(known[name], suits="prompt, group: --prompt_model, --group_model") for name in _CLIPS]
    return [*found, *(replace(known[name], suits="safety: --nsfw_model") for name in _NSFW)]


def here(model: Model) -> str:
    """Whether a model's weights are on this machine; see ``listing.Here``."""
    return faces.here(model) if model.short in _DETECTORS else catalogue.here(_families(), model)


def _families() -> list[ExtractorFamily]:
    return [backends.load("extract", name) for name in ("clip", "open_nsfw", "clip_head")]
