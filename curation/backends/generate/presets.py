"""How a text-to-image model is meant to be called, and which family a model belongs to.

The presets are data in the families' own files, with the figures of the models' own cards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from curation import backends
from curation.errors import SampleError
from curation.jsonio import parse_json_object
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
        true_cfg_scale: Scale of the guidance by the negative prompt, of pipelines that take one.
        extra: Further arguments of the pipeline's call.
        licence: Of the weights.
        parameters: Of each part of the pipeline, in thousand millions: counted from its published configuration.
        gated: The hub gives the weights only to accounts that have accepted the licence.
        other_names: Further short names, beside the preset's own.
        facts: What the pipeline's own files say of such a model, for a folder whose name says nothing: the fields of
            ``model_index.json`` and, as ``part.field``, those of a part's configuration.  Empty: they do not tell it.
        distilled: Whether the model is distilled to few steps, where ``model_index.json`` says that too
            (``is_distilled``).
        sibling: The preset of the same model with the other value of ``distilled``.
    """

    model: str
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    text_tokens: int | None = None
    dtype: str = "bfloat16"
    batch_size: int = 8
    true_cfg_scale: float | None = None
    extra: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    licence: str = "see the model's card"
    parameters: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    gated: bool = False
    other_names: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    distilled: bool | None = None
    sibling: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model beside the preset's own: also the hub id without the organisation."""
        return (self.model.rpartition("/")[2], *self.other_names)


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


FEW_STEPS = MappingProxyType({"lightning": (4, 0.0), "hyper": (8, 0.0), "lcm": (4, 1.0)})
"""Words in a model's name that say that it was merged with a distilled one: word → (steps, guidance).

The figures are those of the cards of ByteDance/SDXL-Lightning (4-step checkpoint, guidance 0), ByteDance/Hyper-SD
(8 steps, guidance 0) and latent-consistency/lcm-ssd-1b (4 steps, guidance 1).  A number of steps in the name, such as
``4step``, replaces that of the table.
"""
_FEW_STEPS_FIT = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_FEW_STEPS_NAMES = re.compile(r"(?<![a-z0-9])(?:lightning|hyper|lcm|turbo|schnell|dmd2?|flash|distill(?:ed)?)(?![a-z])")
MANY_STEPS = 12  # a preset with so many is not distilled
_CONFIG_NAMES = MappingProxyType({"scheduler": "scheduler_config.json"})  # of other parts: config.json


def preset_for(model: str, folder: Path | None = None) -> tuple[str | None, Preset]:
    """Find the preset of a model: by its last name, or by what the pipeline's own files say.

    ``sdxl-turbo-finetuned`` matches ``sdxl-turbo``, since a fine-tuned turbo model is called like its parent.  The
    spelling (``_``, ``-``, case) does not matter.  Where ``model_index.json`` says whether the model is distilled, this
    counts more than the name.  A folder whose name says nothing gets the preset whose ``facts`` its files have.

    Args:
        model: A hub id, a folder or a file.
        folder: Where the pipeline's files are, as far as they are known.  Default: the model, if it is a folder.

    Returns:
        The preset's name and the preset; None and the pipeline's own defaults for a model that no preset is known for.
    """
    is_folder = os.path.isdir(model)
    name = _plain_last_name(model)
    files = _PipelineFiles(Path(model) if folder is None and is_folder else folder)
    key = _named(name)
    if key is None and files.folder is not None:
        key = _described(files)
    if key is not None:
        preset = presets()[key]
        distilled = files.get("is_distilled")
        if preset.sibling and isinstance(distilled, bool) and distilled is not preset.distilled:
            key, preset = preset.sibling, presets()[preset.sibling]
        if key == "qwen-image" and "lightning" in name:  # lightx2v/Qwen-Image-Lightning: 8 steps, true_cfg_scale 1
            return "Qwen-Image-Lightning", replace(preset, steps=_steps_in(name) or 8, true_cfg_scale=1.0)
        return key, preset
    return _few_steps(model, name, files)


def says_few_steps(model: str) -> bool:
    """Whether a model's name has a word such as "turbo", which says that it is distilled to few steps."""
    return _FEW_STEPS_NAMES.search(_plain_last_name(model)) is not None


def _plain_last_name(model: str) -> str:
    last = public_name(os.path.abspath(model) if os.path.exists(model) else model).rpartition("/")[2]
    return plain_name(last.removesuffix(".safetensors"))


def _named(name: str) -> str | None:
    """The preset with the longest name that is in this one."""
    names = [(plain_name(one), key) for key, preset in presets().items() for one in (key, *preset.names)]
    for one, key in sorted(names, key=lambda item: -len(item[0])):
        if re.search(rf"(?<![a-z0-9]){re.escape(one)}(?![a-z0-9])", name):
            return key
    return None


def _described(files: _PipelineFiles) -> str | None:
    """The preset with the most facts, all of which the files have."""
    found = [
        (len(preset.facts), key)
        for key, preset in presets().items()
        if preset.facts and all(files.get(name) == value for name, value in preset.facts.items())
    ]
    return max(found)[1] if found else None


def _few_steps(model: str, name: str, files: _PipelineFiles) -> tuple[str | None, Preset]:
    """A Stable Diffusion model without a preset, whose name says with what it was merged."""
    kind = files.get("_class_name")
    fits = kind in _FEW_STEPS_FIT if kind else re.search(r"xl|sd|diffusion", name) is not None and "flux" not in name
    word = next((word for word in FEW_STEPS if re.search(rf"(?<![a-z]){word}(?![a-z])", name)), None)
    if word is None or not fits or re.search(r"(?<![a-z])cfg(?![a-z])", name):  # Hyper-SD's CFG models keep guidance
        return None, Preset(model=model)
    steps, guidance = FEW_STEPS[word]
    return word, Preset(model=model, steps=_steps_in(name) or steps, guidance=guidance)


def _steps_in(name: str) -> int | None:
    """The number of steps that a name such as ``sdxl-lightning-4step`` tells, if it is a small one."""
    found = re.search(r"(?<![a-z0-9])(\d{1,2})-?steps?(?![a-z])", name)
    return int(found[1]) if found and 0 < int(found[1]) <= MANY_STEPS else None


class _PipelineFiles:
    """The configuration of a pipeline in a folder, of which some files may be absent."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._read: dict[str, Mapping[str, Any]] = {}

    def get(self, name: str) -> object:
        """The value of a field of ``model_index.json`` or, as ``part.field``, of a part; None where there is none."""
        part, _, entry = name.rpartition(".")
        path = f"{part}/{_CONFIG_NAMES.get(part, 'config.json')}" if part else PIPELINE[0]
        if path not in self._read:
            self._read[path] = self._object(path)
        return self._read[path].get(entry)

    def _object(self, path: str) -> Mapping[str, Any]:
        if self.folder is None:
            return {}
        try:
            return parse_json_object((self.folder / path).read_bytes())
        except (OSError, SampleError):  # loading the pipeline tells of it
            return {}


def family_for(model: str) -> Any:
    """The class ``Backend`` of the family that has the model's preset, or the one that runs any pipeline.

    The stand-in of ``--embedded`` never runs another model, whatever that is called.
    """
    name, _ = preset_for(model)
    found = (kind for kind in families().values() if name in kind.presets and not kind.is_stand_in)
    return next(found, families()["diffusers"])
