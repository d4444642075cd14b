"""Stable Diffusion and Stable Diffusion XL of Stability AI, in their versions for one step."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset


class Backend(diffusers.Backend):
    """Any Stable Diffusion pipeline."""

    presets: ClassVar = {
        "sd-turbo": Preset(
            model="stabilityai/sd-turbo",
            steps=1,
            guidance=0.0,
            height=512,
            width=512,
            batch_size=32,
            licence="Stability AI non-commercial research community licence",
            parameters=MappingProxyType({"UNet": 0.866, "OpenCLIP-H": 0.340, "VAE": 0.084}),
        ),
        "sdxl-turbo": Preset(
            model="stabilityai/sdxl-turbo",
            steps=1,
            guidance=0.0,
            height=512,
            width=512,
            batch_size=16,
            licence="Stability AI non-commercial research community licence",
            parameters=MappingProxyType({"UNet": 2.567, "CLIP-L": 0.123, "OpenCLIP-G": 0.695, "VAE": 0.084}),
        ),
    }
    text_results: ClassVar = {
        "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
        "StableDiffusionXLPipeline": (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
    }
