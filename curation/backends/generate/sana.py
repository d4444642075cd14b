"""SANA-Sprint and SANA 1.5 of NVIDIA.

The figures are those of the cards of Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers and _0.6B_ (2 steps,
guidance 4.5) and of SANA1.5_1.6B_1024px_diffusers (20 steps, guidance 4.5).
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset

_TEXT, _VAE = 2.614, 0.312
_SPRINT = Preset(
    model="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    steps=2,
    guidance=4.5,
    height=1024,
    width=1024,
    text_tokens=300,
    batch_size=8,
    # Binning maps a size to the nearest trained one and crops back; sizes here are already chosen.
    extra=MappingProxyType({"use_resolution_binning": False}),
    licence="NVIDIA NSCL v2-custom; the text encoder under the Gemma terms",
    parameters=MappingProxyType({"transformer": 1.610, "Gemma 2 2B": _TEXT, "DC-AE": _VAE}),
    other_names=("sana-sprint-1.6b",),
    facts=MappingProxyType({"_class_name": "SanaSprintPipeline"}),
)


class Backend(diffusers.Backend):
    """Any SANA pipeline."""

    presets: ClassVar = {
        "sana-sprint": _SPRINT,
        "sana-sprint-0.6b": replace(
            _SPRINT,
            model="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
            parameters=MappingProxyType({"transformer": 0.594, "Gemma 2 2B": _TEXT, "DC-AE": _VAE}),
            other_names=(),
            facts=MappingProxyType({"_class_name": "SanaSprintPipeline", "transformer.num_layers": 28}),
        ),
        "sana-1.5": replace(
            _SPRINT,
            model="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
            steps=20,
            parameters=MappingProxyType({"transformer": 1.605, "Gemma 2 2B": _TEXT, "DC-AE": _VAE}),
            other_names=("sana1.5",),
            facts=MappingProxyType({"_class_name": "SanaPipeline"}),
        ),
    }
    text_results: ClassVar = {
        "SanaSprintPipeline": ("prompt_embeds", "prompt_attention_mask"),
        "SanaPipeline": (
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        ),
    }
