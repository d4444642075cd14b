"""Tiny models of the chat family, of the shape that their published ones have, and what is known of those.

``PUBLISHED`` has the values of the published ``config.json`` that decide how an image becomes tokens and how the layers
are built; widths, depths and vocabularies are small.  ``source`` says where the values were read, because the hub was
not at hand: in tests of other projects that have copied them, or in transformers' own defaults.  The chat templates are
ours: no package carries those of the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.backends.caption.chat import image_marks
from curation.backends.caption.processing import without_other_parts
from curation.backends.caption.torchless import find_class
from tests.backends.tiny_captioners import CHAT, TEXT, _chat_tokenizer, _save

DEFAULTS = "transformers 5.23's defaults of the type"
WIDTHS = {**TEXT, "head_dim": 8}
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Published:
    """A model of the hub, and how its tiny one is made.

    Attributes:
        name: On the hub.
        model_type: Of its ``config.json``.
        source: Where the values were read.
        config: Of its ``config.json``, with small widths.
        images: What its image processor has other than by default.
        processor: What its processor has other than by default.
        tokens: Special tokens that its tokenizer names.
        processor_class: The one that its files name, where transformers has none for the type.
    """

    name: str
    model_type: str
    source: str
    config: Mapping[str, Any]
    images: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    processor_class: str | None = None


PUBLISHED = (
    Published(
        "google/gemma-4-E2B-it",
        "gemma4",
        "the language model: a test of the Rust project ullm with the published config; the image encoder: " + DEFAULTS,
        {
            "text_config": {
                **WIDTHS, "num_hidden_layers": 4, "num_key_value_heads": 1, "global_head_dim": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 512,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
                    "full_attention": {
                        "rope_type": "proportional", "rope_theta": 1000000, "partial_rotary_factor": 0.25,
                    },
                },
                "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8,
                "final_logit_softcapping": 30.0, "enable_moe_block": False, "attention_k_eq_v": False,
                "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
            },
            "vision_config": {**EYE, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
        },
        images={"max_soft_tokens": 70},
        tokens={"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
                "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
                "video_token": "<|video|>"},
    ),
    Published(
        "OpenGVLab/InternVL3_5-8B-HF",
        "internvl",
        DEFAULTS + ", with the language model that the name has (qwen3)",
        {
            "text_config": {"model_type": "qwen3", **WIDTHS},
            "vision_config": {**EYE, "image_size": [112, 112], "patch_size": [14, 14]},
            "downsample_ratio": 0.5,
        },
        images={"size": {"height": 112, "width": 112}, "max_patches": 4},
        processor={"image_seq_length": 16},
        tokens={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>"},
    ),
    Published(
        "allenai/Molmo2-8B",
        "molmo2",
        "the patches and the layers that are read: a test of mlx-swift-lm with the published config; else " + DEFAULTS,
        {
            "text_config": WIDTHS,
            "vision_config": {**EYE, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 14,
                              "num_position_embeddings": 14 * 14},
            "adapter_config": {**EYE, "num_key_value_heads": 2, "head_dim": 16, "text_hidden_size": 32,
                               "vision_feature_layer": [-1, -2]},
        },
        images={"size": {"height": 196, "width": 196}, "max_crops": 2},
        tokens={"image_token": "<|image|>", "video_token": "<|video|>", "patch": "<im_patch>", "col": "<im_col>",
                "start": "<im_start>", "low": "<low_res_im_start>", "end": "<im_end>", "frame": "<frame_start>",
                "frame_end": "<frame_end>", "im_low": "<im_low>"},
    ),
    Published(
        "openbmb/MiniCPM-V-4.6",
        "minicpmv4_6",
        "tests/unittest of NVIDIA's TensorRT-LLM with the published config",
        {
            "text_config": {
                "model_type": "qwen3_5_text", **WIDTHS, "layer_types": ["linear_attention", "full_attention"],
                "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_num_key_heads": 2,
                "linear_num_value_heads": 2, "linear_value_head_dim": 8, "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
                "tie_word_embeddings": True,
            },
            "vision_config": {**EYE, "image_size": 980, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh"},
            "insert_layer_id": 0, "drop_vision_last_layer": False, "image_size": 1120,
        },
        images={"scale_resolution": 112, "max_slice_nums": 2},
        tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
                "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
                "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
    ),
    Published(
        "LiquidAI/LFM2-VL-450M",
        "lfm2_vl",
        "a test of the Rust project candle-lfm2-vl that compares the published weights' names and shapes",
        {
            "downsample_factor": 2, "projector_hidden_size": 64, "projector_use_layernorm": False,
            "tie_word_embeddings": True,
            "text_config": {
                **TEXT, "block_ff_dim": 64, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0,
                "block_multiple_of": 16, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"],
            },
            "vision_config": {**EYE, "patch_size": 16, "num_patches": 256, "vision_use_head": False},
        },
        images={"tile_size": 128, "min_image_tokens": 4, "max_image_tokens": 16, "max_num_patches": 64},
        tokens={"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
                "image_thumbnail": "<|img_thumbnail|>"},
    ),
    Published(
        "zai-org/GLM-4.1V-9B-Thinking",
        "glm4v",
        DEFAULTS,
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**PATCHES, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        images={"size": {"shortest_edge": 112 * 112, "longest_edge": 224 * 224}},
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
    ),
    Published(
        "zai-org/GLM-4.5V",
        "glm4v_moe",
        DEFAULTS,
        {
            "text_config": {
                **TEXT, "rope_parameters": MROPE, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32, "first_k_dense_replace": 1, "head_dim": 8,
            },
            "vision_config": {**PATCHES, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        images={"size": {"shortest_edge": 112 * 112, "longest_edge": 224 * 224}},
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
    ),
    Published(
        "zai-org/GLM-4.6V-Flash",
        "glm46v",
        DEFAULTS,
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**PATCHES, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        images={"size": {"shortest_edge": 112 * 112, "longest_edge": 224 * 224}},
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
    ),
    Published(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral3",
        DEFAULTS,
        {
            "text_config": {"model_type": "mistral", **WIDTHS},
            "vision_config": {"model_type": "pixtral", **EYE, "head_dim": 16, "image_size": 112, "patch_size": 14},
            "spatial_merge_size": 2, "vision_feature_layer": -1,
        },
        images={"size": {"longest_edge": 112}, "patch_size": 14},
        processor={"patch_size": 14, "spatial_merge_size": 2},
        tokens={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    ),
)  # fmt: skip


def save_chat(model: Published, folder: Path, template: str | None = None) -> None:
    """Save the tiny model of a published one.  template: in place of the one that is made for it."""
    import transformers
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    tokenizer = _chat_tokenizer(**model.tokens)
    named = IMAGE_PROCESSOR_MAPPING_NAMES.get(model.model_type) or {"pil": "Glm4vImageProcessorPil"}
    images = find_class(named.get("pil") or named["torchvision"])(**model.images)
    kind = find_class(model.processor_class or PROCESSOR_MAPPING_NAMES[model.model_type])
    processor = without_other_parts(kind, {"image_processor": images, "tokenizer": tokenizer}, model.processor)
    marks = image_marks(processor)
    processor.chat_template = template or CHAT.replace("IMAGE", marks[0])
    config = CONFIG_MAPPING[model.model_type](**_with_vocabulary(model, processor))
    assert transformers
    _save(AutoModelForImageTextToText.from_config(config), processor, folder)


def _with_vocabulary(model: Published, processor: Any) -> dict[str, Any]:
    """The config with the tiny tokenizer's numbers of the special tokens."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tokenizer = processor.tokenizer
    config = {name: dict(value) if isinstance(value, Mapping) else value for name, value in model.config.items()}
    text = config["text_config"] | {"vocab_size": len(tokenizer)}
    usual = CONFIG_MAPPING[model.model_type]()
    if hasattr(getattr(usual, "text_config", None), "vocab_size_per_layer_input"):
        text["vocab_size_per_layer_input"] = len(tokenizer)
    numbers = {
        "image_token_id": processor.image_token, "image_token_index": processor.image_token,
        "image_patch_id": "<im_patch>", "video_token_id": getattr(processor, "video_token", None),
        "boi_token_id": model.tokens.get("boi_token"), "eoi_token_id": model.tokens.get("eoi_token"),
        "audio_token_id": model.tokens.get("audio_token"), "boa_token_id": model.tokens.get("boa_token"),
    }  # fmt: skip
    known = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in numbers.items()
        if token in tokenizer.get_vocab() and hasattr(usual, name)
    }
    if "image_patch_id" in known:  # Molmo's other two are other names of it
        known = {"image_patch_id": known["image_patch_id"]}
    return {**config, "text_config": text, **known}
