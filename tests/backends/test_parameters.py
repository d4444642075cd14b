"""The numbers of parameters that ``--list_models`` computes the memory from, counted in the networks themselves.

The networks are built from the published configurations on torch's device ``meta``, which takes no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from curation import backends
from curation.backends.extract import families as extractors
from curation.backends.faces import detector_class
from curation.backends.faces.fitting import PackagedDetector
from curation.backends.generate.presets import presets
from curation.caption import known_models
from curation.extract.catalogue import known_models as directives
from tests.backends.tiny_extractors import isc_shapes, scrfd_shapes


def count(make: Callable[[], Any]) -> float:
    """In thousand millions."""
    import torch

    with torch.device("meta"):
        module = make()
    return sum({id(p): p.numel() for p in module.parameters()}.values()) / 1e9


def test_the_parts_of_pipelines() -> None:
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")

    def qwen3_4b() -> Any:
        return transformers.Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        )  # fmt: skip

    def flux2() -> Any:
        return diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )

    counted = {
        ("flux.1-schnell", "transformer"): lambda: diffusers.FluxTransformer2DModel(guidance_embeds=False),
        ("flux.2-klein-4b", "transformer"): flux2,
        ("z-image-turbo", "transformer"): diffusers.ZImageTransformer2DModel,
        ("z-image-turbo", "Qwen3 4B"): lambda: transformers.Qwen3Model(qwen3_4b()),
    }
    for (name, part), make in counted.items():
        assert count(make) == pytest.approx(presets()[name].parameters[part], abs=0.0006), (name, part)


def test_captioners() -> None:
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    [model] = [model for model in known_models(backends.families("caption")) if model.short == "qwen3-vl-4b"]
    found = count(lambda: transformers.AutoModelForImageTextToText.from_config(config))
    assert found == pytest.approx(model.parameters, abs=0.0006)


def test_extractors_and_detectors() -> None:
    onnx = pytest.importorskip("onnx")
    known = {model.short: model.parameters for model in directives(extractors())}
    for name, shapes in (("faces-scrfd10g", scrfd_shapes()), ("dedup-isc-ft-v107", isc_shapes())):
        assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(known[name], rel=0.02), name
    for name in ("centerface", "yunet"):
        kind = detector_class(name)
        assert isinstance(kind, type) and issubclass(kind, PackagedDetector)
        graph = onnx.load(str(kind.packaged_model())).graph
        assert sum(math.prod(tensor.dims) for tensor in graph.initializer) / 1e9 == pytest.approx(
            kind.parameters, rel=0.02
        )
