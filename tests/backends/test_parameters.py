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

    def flux2(layers: int, single: int, heads: int, text: int) -> Callable[[], Any]:
        return lambda: diffusers.Flux2Transformer2DModel(
            num_layers=layers, num_single_layers=single, num_attention_heads=heads, joint_attention_dim=text,
            guidance_embeds=False,
        )  # fmt: skip

    def sana(layers: int, heads: int, cross_heads: int, *, sprint: bool) -> Callable[[], Any]:
        return lambda: diffusers.SanaTransformer2DModel(
            in_channels=32, out_channels=32, num_attention_heads=heads, attention_head_dim=32, num_layers=layers,
            num_cross_attention_heads=cross_heads, cross_attention_head_dim=32 * heads // cross_heads,
            cross_attention_dim=32 * heads, caption_channels=2304, mlp_ratio=2.5, sample_size=32, patch_size=1,
            guidance_embeds=sprint, qk_norm="rms_norm_across_heads",
        )  # fmt: skip

    def sd3() -> Any:
        return diffusers.SD3Transformer2DModel(
            sample_size=128, num_layers=38, num_attention_heads=38, attention_head_dim=64, joint_attention_dim=4096,
            caption_projection_dim=2432, pooled_projection_dim=2048, pos_embed_max_size=192, qk_norm="rms_norm",
        )  # fmt: skip

    def qwen3_8b() -> Any:
        return transformers.Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        )  # fmt: skip

    def qwen3_4b() -> Any:
        return transformers.Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        )  # fmt: skip

    counted = {
        ("flux.1-schnell", "transformer"): lambda: diffusers.FluxTransformer2DModel(guidance_embeds=False),
        ("flux.2-klein-4b", "transformer"): flux2(5, 20, 24, 7680),
        ("flux.2-klein-9b", "transformer"): flux2(8, 24, 32, 12288),
        ("flux.2-klein-9b", "Qwen3 8B"): lambda: transformers.Qwen3ForCausalLM(qwen3_8b()),
        ("qwen-image", "transformer"): diffusers.QwenImageTransformer2DModel,
        ("qwen-image", "VAE"): diffusers.AutoencoderKLQwenImage,
        ("sana-sprint", "transformer"): sana(20, 70, 20, sprint=True),
        ("sana-sprint-0.6b", "transformer"): sana(28, 36, 16, sprint=True),
        ("sana-1.5", "transformer"): sana(20, 70, 20, sprint=False),
        ("sd3.5-large-turbo", "transformer"): sd3,
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
        graph = onnx.load(str(kind.model_file())).graph
        assert sum(math.prod(tensor.dims) for tensor in graph.initializer) / 1e9 == pytest.approx(
            kind.parameters, rel=0.02
        )
