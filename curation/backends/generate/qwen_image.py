"""Qwen-Image of Alibaba.

The figures are those of the card of Qwen/Qwen-Image: 50 steps, true_cfg_scale 4, 1328×1328.  The pipeline guides only
against a negative prompt, which may be empty; the preset has it guide.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from curation.backends.generate import diffusers
from curation.backends.generate.presets import Preset


class Backend(diffusers.Backend):
    """Any Qwen-Image pipeline."""

    presets: ClassVar = {
        "qwen-image": Preset(
            model="Qwen/Qwen-Image",
            steps=50,
            height=1328,
            width=1328,
            text_tokens=512,
            batch_size=4,
            true_cfg_scale=4.0,
            licence="Apache-2.0",
            parameters=MappingProxyType({"transformer": 20.430, "Qwen2.5-VL 7B": 8.292, "VAE": 0.127}),
            facts=MappingProxyType({"_class_name": "QwenImagePipeline"}),
        )
    }
