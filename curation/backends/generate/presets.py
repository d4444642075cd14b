"""How each text-to-image model is meant to be called: a few lines of data a model, and no code but the look-up.

The figures are those of the models' own cards; FLUX.1-schnell's are the ones of the published hybrid dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from curation.models.hub_cache import plain_name, public_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What a model is called with unless a flag says otherwise.  None leaves the value to the pipeline's own default.

    height, width: pixels.  text_tokens: the length that prompts are padded to (``max_sequence_length``), for
    pipelines that take one.  extra: further arguments of the pipeline's call.
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


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "flux.1-schnell": Preset(
            model="black-forest-labs/FLUX.1-schnell",
            steps=2, guidance=0.0, height=384, width=384, text_tokens=256, batch_size=32,
            licence="Apache-2.0",
        ),
        "sd-turbo": Preset(
            model="stabilityai/sd-turbo",
            steps=1, guidance=0.0, height=512, width=512, batch_size=32,
            licence="Stability AI non-commercial research community licence",
        ),
        "sdxl-turbo": Preset(
            model="stabilityai/sdxl-turbo",
            steps=1, guidance=0.0, height=512, width=512, batch_size=16,
            licence="Stability AI non-commercial research community licence",
        ),
        "sana_sprint": Preset(
            model="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
            steps=2, guidance=4.5, height=1024, width=1024, text_tokens=300, batch_size=8,
            # binning maps a size to the nearest trained one and crops back; sizes here are already chosen
            extra=MappingProxyType({"use_resolution_binning": False}),
            licence="NVIDIA NSCL v2-custom; the text encoder under the Gemma terms",
        ),
        "z-image-turbo": Preset(
            model="Tongyi-MAI/Z-Image-Turbo",
            steps=9, guidance=0.0, height=1024, width=1024, text_tokens=512, batch_size=8,
            licence="Apache-2.0",
        ),
        "tiny-sd": Preset(  # the embedded pipeline: random weights, pictures of noise
            model="embedded/tiny-sd",
            steps=1, guidance=0.0, height=256, width=256, dtype="float32", batch_size=8,
            licence="none needed: random weights",
        ),
    }
)  # fmt: skip

DEFAULT_MODEL = PRESETS["flux.1-schnell"].model


def preset_for(model: str) -> tuple[str | None, Preset]:
    """The preset of a hub id or a folder, by its last name: ``(name, preset)``.

    A model that none is known for gets ``(None, …)``: the pipeline's own defaults.  ``sdxl-turbo-finetuned`` matches
    ``sdxl-turbo``, since a fine-tuned turbo model is called like its parent; spelling (``_``, ``-``, case) is ignored.
    """
    name = plain_name(public_name(os.path.abspath(model) if os.path.isdir(model) else model).rpartition("/")[2])
    for key, preset in sorted(PRESETS.items(), key=lambda item: -len(item[0])):
        if re.search(rf"(?<![a-z0-9]){re.escape(plain_name(key))}(?![a-z0-9])", name):
            return key, preset
    return None, Preset(model=model)
