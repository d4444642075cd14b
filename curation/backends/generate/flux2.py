"""FLUX.2 [klein] of Black Forest Labs: two sizes, each distilled to four steps, and as *base* for fifty.

The figures are those of the cards of black-forest-labs/FLUX.2-klein-4B and -9B (4 steps, guidance 1) and of
FLUX.2-klein-base-4B and -9B (50 steps, guidance 4).
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset

_LARGE = MappingProxyType({"transformer.num_layers": 8})
_DISTILLED_4B = Preset(
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
    facts=MappingProxyType({"_class_name": "Flux2KleinPipeline", "is_distilled": True}),
    distilled=True,
    sibling="flux.2-klein-base-4b",
)
_BASE_4B = replace(
    _DISTILLED_4B,
    model="black-forest-labs/FLUX.2-klein-base-4B",
    steps=50,
    guidance=4.0,
    other_names=("flux.2-klein-base",),
    facts=MappingProxyType({"_class_name": "Flux2KleinPipeline", "is_distilled": False}),
    distilled=False,
    sibling="flux.2-klein-4b",
)


def _large(small: Preset, model: str, sibling: str) -> Preset:
    """The 9B model that is called as the 4B model is."""
    return replace(
        small,
        model=model,
        licence="FLUX non-commercial licence",
        parameters=MappingProxyType({"transformer": 9.079, "Qwen3 8B": 8.191, "VAE": 0.084}),
        gated=True,
        other_names=(),
        facts=MappingProxyType({**small.facts, **_LARGE}),
        sibling=sibling,
    )


class Backend(diffusers.Backend):
    """Any FLUX.2 [klein] pipeline."""

    presets: ClassVar = {
        "flux.2-klein-4b": _DISTILLED_4B,
        "flux.2-klein-9b": _large(_DISTILLED_4B, "black-forest-labs/FLUX.2-klein-9B", "flux.2-klein-base-9b"),
        "flux.2-klein-base-4b": _BASE_4B,
        "flux.2-klein-base-9b": _large(_BASE_4B, "black-forest-labs/FLUX.2-klein-base-9B", "flux.2-klein-9b"),
    }
    text_results: ClassVar = {"Flux2KleinPipeline": ("prompt_embeds", None)}
