"""Z-Image of Tongyi-MAI."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset


class Backend(diffusers.Backend):
    """Any Z-Image pipeline."""

    presets: ClassVar = {
        "z-image-turbo": Preset(
            model="Tongyi-MAI/Z-Image-Turbo",
            steps=9,
            guidance=0.0,
            height=1024,
            width=1024,
            text_tokens=512,
            batch_size=8,
            licence="Apache-2.0",
            parameters=MappingProxyType({"transformer": 6.155, "Qwen3 4B": 4.022, "VAE": 0.084}),
        )
    }
    text_results: ClassVar = {"ZImagePipeline": ("prompt_embeds", "negative_prompt_embeds")}
