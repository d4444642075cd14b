"""SANA-Sprint of NVIDIA."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset


class Backend(diffusers.Backend):
    """Any SANA-Sprint pipeline."""

    presets: ClassVar = {
        "sana-sprint": Preset(
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
            parameters=MappingProxyType({"transformer": 1.610, "Gemma 2 2B": 2.614, "DC-AE": 0.312}),
            other_names=("sana-sprint-1.6b",),
        )
    }
    text_results: ClassVar = {"SanaSprintPipeline": ("prompt_embeds", "prompt_attention_mask")}
