"""FLUX.1 of Black Forest Labs.  The preset of FLUX.1-schnell is the published hybrid dataset's."""

from __future__ import annotations

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
        )
    }
    text_results: ClassVar = {"FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None)}
