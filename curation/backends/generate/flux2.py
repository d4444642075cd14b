"""FLUX.2 [klein] of Black Forest Labs: two sizes, each distilled to four steps, and as *base* for fifty.

The figures are those of the cards of black-forest-labs/FLUX.2-klein-4B and -9B (4 steps, guidance 1) and of
FLUX.2-klein-base-4B and -9B (50 steps, guidance 4).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset

_DISTILLED = MappingProxyType({"_class_name": "Flux2KleinPipeline", "is_distilled": True})
_BASE = MappingProxyType({"_class_name": "Flux2KleinPipeline", "is_distilled": False})
_LARGE = MappingProxyType({"transformer.num_layers": 8})
_PARTS_4B = MappingProxyType({"transformer": 3.876, "Qwen3 4B": 4.022, "VAE": 0.084})
_PARTS_9B = MappingProxyType({"transformer": 9.079, "Qwen3 8B": 8.191, "VAE": 0.084})
_NON_COMMERCIAL = "FLUX non-commercial licence"


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
            parameters=_PARTS_4B,
            other_names=("flux.2-klein", "flux-klein"),
            facts=_DISTILLED,
            distilled=True,
            sibling="flux.2-klein-base-4b",
        ),
        "flux.2-klein-9b": Preset(
            model="black-forest-labs/FLUX.2-klein-9B",
            steps=4,
            guidance=1.0,
            height=1024,
            width=1024,
            text_tokens=512,
            batch_size=8,
            licence=_NON_COMMERCIAL,
            parameters=_PARTS_9B,
            gated=True,
            facts=MappingProxyType({**_DISTILLED, **_LARGE}),
            distilled=True,
            sibling="flux.2-klein-base-9b",
        ),
        "flux.2-klein-base-4b": Preset(
            model="black-forest-labs/FLUX.2-klein-base-4B",
            steps=50,
            guidance=4.0,
            height=1024,
            width=1024,
            text_tokens=512,
            batch_size=8,
            licence="Apache-2.0",
            parameters=_PARTS_4B,
            other_names=("flux.2-klein-base",),
            facts=_BASE,
            distilled=False,
            sibling="flux.2-klein-4b",
        ),
        "flux.2-klein-base-9b": Preset(
            model="black-forest-labs/FLUX.2-klein-base-9B",
            steps=50,
            guidance=4.0,
            height=1024,
            width=1024,
            text_tokens=512,
            batch_size=8,
            licence=_NON_COMMERCIAL,
            parameters=_PARTS_9B,
            gated=True,
            facts=MappingProxyType({**_BASE, **_LARGE}),
            distilled=False,
            sibling="flux.2-klein-9b",
        ),
    }
    text_results: ClassVar = {"Flux2KleinPipeline": ("prompt_embeds", None)}
