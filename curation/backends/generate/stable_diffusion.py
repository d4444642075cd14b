"""Stable Diffusion, Stable Diffusion XL and Stable Diffusion 3.5 of Stability AI, in their versions for few steps.

The figures are those of the cards of stabilityai/sd-turbo, sdxl-turbo (1 step, guidance 0) and
stable-diffusion-3.5-large-turbo (4 steps, guidance 0).
"""

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
            other_names=("sd-xl-turbo",),
        ),
        "sd3.5-large-turbo": Preset(
            model="stabilityai/stable-diffusion-3.5-large-turbo",
            steps=4,
            guidance=0.0,
            height=1024,
            width=1024,
            text_tokens=256,
            batch_size=8,
            licence="Stability AI community licence",
            parameters=MappingProxyType(
                {"transformer": 8.057, "T5-XXL": 4.762, "CLIP-L": 0.124, "OpenCLIP-G": 0.695, "VAE": 0.084}
            ),
            gated=True,
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
        "StableDiffusion3Pipeline": (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
    }
