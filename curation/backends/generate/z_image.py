"""Z-Image of Tongyi-MAI, and Z-Image-Turbo, which is distilled from it.

The figures are those of the cards of Tongyi-MAI/Z-Image-Turbo (9 steps, which are 8 calls of the transformer; guidance
0) and Tongyi-MAI/Z-Image (50 steps, guidance 4).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset

_PARTS = MappingProxyType({"transformer": 6.155, "Qwen3 4B": 4.022, "VAE": 0.084})


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
            parameters=_PARTS,
            facts=MappingProxyType({"_class_name": "ZImagePipeline", "scheduler.shift": 3.0}),
        ),
        "z-image": Preset(
            model="Tongyi-MAI/Z-Image",
            steps=50,
            guidance=4.0,
            height=1024,
            width=1024,
            text_tokens=512,
            batch_size=8,
            licence="Apache-2.0",
            parameters=_PARTS,
            facts=MappingProxyType({"_class_name": "ZImagePipeline"}),
        ),
    }
    text_results: ClassVar = {"ZImagePipeline": ("prompt_embeds", "negative_prompt_embeds")}
