"""FLUX.2 [klein] of Black Forest Labs, distilled to four steps.  Its *base* models are not, and have no preset."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset


class Backend(diffusers.Backend):
    """Any FLUX.2 [klein] pipeline."""

    presets: ClassVar = {
        "flux.2-klein-4b": Preset(
            model="black-forest-labs/FLUX.2-klein-4B",
            steps=4,
            guidance=1.0,
            height=1024,
            width=1024,
            text_tokens=512,
            batch_size=8,
            licence="Apache-2.0",
            parameters=MappingProxyType({"transformer": 3.876, "Qwen3 4B": 4.022, "VAE": 0.084}),
            other_names=("flux.2-klein", "flux-klein"),
        )
    }
    text_results: ClassVar = {"Flux2KleinPipeline": ("prompt_embeds", None)}
