"""How a text-to-image model is meant to be called, and which family a model belongs to.

The presets are data in the families' own files, with the figures of the models' own cards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from curation import backends
from curation.models.hub_cache import PIPELINE, plain_name, public_name
from curation.models.known import Model, model_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What a model is called with unless a flag says otherwise.  None leaves the value to the pipeline's own default.

    Attributes:
        model: The hub id.
        steps: Denoising steps.
        guidance: The guidance scale.
        height: In pixels.
        width: In pixels.
        text_tokens: The length that prompts are padded to (``max_sequence_length``), of pipelines that take one.
        dtype: A torch dtype's name.
        batch_size: Pictures generated at once.
        extra: Further arguments of the pipeline's call.
        licence: Of the weights.
        parameters: Of each part of the pipeline, in thousand millions: counted from its published configuration.
        gated: The hub gives the weights only to accounts that have accepted the licence.
        other_names: Further short names, beside the preset's own.
    """

    model: str
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    text_tokens: int | None = None
    dtype: str = "bfloat16"
    batch_size: int = 8
    extra: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    licence: str = "see the model's card"
    parameters: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    gated: bool = False
    other_names: tuple[str, ...] = ()


@cache
def families() -> Mapping[str, Any]:
    """The class ``Backend`` of every family, by the name of its file."""
    return MappingProxyType({name: backends.load("generate", name) for name in backends.names("generate")})


@cache
def presets() -> Mapping[str, Preset]:
    """Every family's presets, by name."""
    return MappingProxyType({name: preset for kind in families().values() for name, preset in kind.presets.items()})


_BITS = MappingProxyType({"bfloat16": 16, "float16": 16, "float32": 32})


@cache
def known_models() -> tuple[Model, ...]:
    """The models that have presets, as ``--list_models`` shows them.  A preset's name is the model's short name."""
    real = [kind for kind in families().values() if not kind.is_stand_in]
    return tuple(
        Model(
            short=name,
            source=preset.model,
            parameters=sum(preset.parameters.values()),
            licence=preset.licence,
            other_names=preset.other_names,
            gated=preset.gated,
            bits=_BITS[preset.dtype],
            steps=preset.steps,
        )
        for kind in real
        for name, preset in kind.presets.items()
    )


def model_named(name: str) -> tuple[str, str]:
    """The hub id or folder that a value of ``--model`` means, and a line for the log; see ``known.model_of``."""
    return model_of(name, known_models(), PIPELINE[0])


@cache
def text_results() -> Mapping[str, tuple[str | None, ...]]:
    """What ``encode_prompt`` of a pipeline returns, by the name of the pipeline's class; see ``Backend``."""
    return MappingProxyType({name: names for kind in families().values() for name, names in kind.text_results.items()})


def preset_for(model: str) -> tuple[str | None, Preset]:
    """Find the preset of a model by its last name.

    ``sdxl-turbo-finetuned`` matches ``sdxl-turbo``, since a fine-tuned turbo model is called like its parent.  The
    spelling (``_``, ``-``, case) does not matter.

    Args:
        model: A hub id or a folder.

    Returns:
        The preset's name and the preset; None and the pipeline's own defaults for a model that no preset is known for.
    """
    name = plain_name(public_name(os.path.abspath(model) if os.path.isdir(model) else model).rpartition("/")[2])
    for key, preset in sorted(presets().items(), key=lambda item: -len(item[0])):
        if re.search(rf"(?<![a-z0-9]){re.escape(plain_name(key))}(?![a-z0-9])", name):
            return key, preset
    return None, Preset(model=model)


def family_for(model: str) -> Any:
    """The class ``Backend`` of the family that has the model's preset, or the one that runs any pipeline.

    The stand-in of ``--embedded`` never runs another model, whatever that is called.
    """
    name, _ = preset_for(model)
    found = (kind for kind in families().values() if name in kind.presets and not kind.is_stand_in)
    return next(found, families()["diffusers"])
