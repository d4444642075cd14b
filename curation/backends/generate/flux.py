"""FLUX.1 of Black Forest Labs.  The preset of FLUX.1-schnell is the published hybrid dataset's."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset


class Backend(diffusers.Backend):
    """Any FLUX.1 pipeline."""

    presets: ClassVar = {
        "flux.1-schnell": Preset(
            model="black-forest-labs/FLUX.1-schnell",
            steps=2,
            guidance=0.0,
            height=384,
            width=384,
            text_tokens=256,
            batch_size=32,
            licence="Apache-2.0",
            parameters=MappingProxyType({"transformer": 11.891, "T5-XXL": 4.762, "CLIP-L": 0.123, "VAE": 0.084}),
            gated=True,  # since 2025, although the licence is free
            other_names=("flux-schnell",),
            facts=MappingProxyType({"_class_name": "FluxPipeline", "transformer.guidance_embeds": False}),
        )
    }
    text_results: ClassVar = {"FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None)}
