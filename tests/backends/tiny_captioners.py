"""Tiny captioners of every model type, with random weights, saved like models of the hub and loaded by the real code.

They have 0.3 to 1 MB each.  A caption of a few tokens takes milliseconds on one core, and says nothing.

``save`` builds the tiny model of any type that transformers knows, from the type's default config with small sizes,
so that a new captioner needs no builder of its own.  Types for which that is not enough have one in ``BUILDERS``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from curation.backends.extract.tokens import byte_letters
from curation.backends.generate.tiny import fill_with_noise, strengthen

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_florence2(folder: Path) -> None:
    from transformers import (
        BartTokenizerFast,
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_letters()]
    tokenizer = BartTokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], extra_special_tokens={"image_token": "<image>"}
    )
    images = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    images.image_seq_length = 1 + 2 * 2
    config = Florence2Config(
        vision_config={
            "embed_dim": [8, 16, 32, 32], "depths": [1] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4,
            "window_size": 4, "projection_dim": 32,
        },
        text_config={
            "model_type": "bart", "d_model": 32, "vocab_size": len(tokenizer), "encoder_layers": 1,
            "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64, "max_position_embeddings": 256,
        },
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.update(
        num_beams=3, no_repeat_ngram_size=3, decoder_start_token_id=2, bos_token_id=0, eos_token_id=2, pad_token_id=1
    )  # as the real ones come
    _save(model, Florence2Processor(images, tokenizer, post_processor_config={"pure_text": {}}), folder)


def save_gemma3(folder: Path) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    tokenizer = _byte_tokenizer(
        "<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>",
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    config = Gemma3Config(
        text_config={
            **TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 1,
        },
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    template = "{{ bos_token }}" + CHAT.replace("IMAGE", "<start_of_image>")
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    _save(Gemma3ForConditionalGeneration(config), processor, folder, eos="<end_of_turn>")


def save_paligemma(folder: Path) -> None:
    """PaliGemma 2: the language model is Gemma 2, and there is no chat template."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
    )

    tokenizer = _byte_tokenizer(
        "<pad>", "<eos>", "<bos>", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", image_token="<image>"
    )
    images = SiglipImageProcessorPil(size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        text_config={
            **TEXT, "model_type": "gemma2", "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 4096,
            "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32},
        projection_dim=32,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    _save(PaliGemmaForConditionalGeneration(config), processor, folder)


def save_llava_next(folder: Path) -> None:
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    tokenizer = _chat_tokenizer("<image>", image_token="<image>")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        text_config={**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
    )  # fmt: skip
    _save(LlavaNextForConditionalGeneration(config), processor, folder)


def save_llava_onevision(folder: Path) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
    )

    tokenizer = _chat_tokenizer("<image>", "<video>", image_token="<image>", video_token="<video>")
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints)
    processor = _images_only(LlavaOnevisionProcessor)(
        images, tokenizer, num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
    )  # fmt: skip
    _save(LlavaOnevisionForConditionalGeneration(config), processor, folder)


def _qwen(folder: Path, generation: str) -> None:
    import transformers
    from transformers import Qwen2VLImageProcessorPil

    prefixes = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL", "3-moe": "Qwen3VLMoe", "3.5": "Qwen3_5"}
    prefix = {**prefixes, "3.5-moe": "Qwen3_5Moe"}[generation]
    is_third = generation.startswith("3")
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _chat_tokenizer(*tokens, image_token="<|image_pad|>", video_token="<|video_pad|>")
    patch = 16 if is_third else 14
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": patch}
    if generation == "2":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    if generation == "2.5":
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    if is_third:
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, "tie_word_embeddings": False}
    if is_third:
        text |= {"head_dim": 8}
        rope |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
    if generation.startswith("3.5"):  # three quarters of its layers have no attention, but a state
        text |= {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        }  # fmt: skip
    if generation.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text |= {"shared_expert_intermediate_size": 32} if generation.startswith("3.5") else {}
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), tokens, strict=True
        )
    }
    config = getattr(transformers, f"{prefix}Config")(vision_config=vision, text_config=text, **ids)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}, patch_size=patch, merge_size=2
    )
    kind = "Qwen3VLProcessor" if is_third else "Qwen2_5_VLProcessor" if generation == "2.5" else f"{prefix}Processor"
    processor = _images_only(getattr(transformers, kind))(
        images, tokenizer, chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    )
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, top_p=0.001)  # as the real ones come
    _save(model, processor, folder)


def save_qwen2_vl(folder: Path) -> None:
    _qwen(folder, "2")


def save_qwen2_5_vl(folder: Path) -> None:
    _qwen(folder, "2.5")


def save_qwen3_vl(folder: Path) -> None:
    _qwen(folder, "3")


def save_qwen3_vl_moe(folder: Path) -> None:
    _qwen(folder, "3-moe")


def save_qwen3_5(folder: Path) -> None:
    _qwen(folder, "3.5")


def save_qwen3_5_moe(folder: Path) -> None:
    _qwen(folder, "3.5-moe")


BUILDERS: dict[str, Callable[[Path], None]] = {
    "florence2": save_florence2,
    "gemma3": save_gemma3,
    "paligemma": save_paligemma,
    "llava_next": save_llava_next,
    "llava_onevision": save_llava_onevision,
    "qwen2_vl": save_qwen2_vl,
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
    "qwen3_vl_moe": save_qwen3_vl_moe,
    "qwen3_5": save_qwen3_5,
    "qwen3_5_moe": save_qwen3_5_moe,
}


def save(model_type: str, folder: Path, processor_class: str | None = None, ends_after: int | None = None) -> None:
    """Save a tiny model.

    Args:
        model_type: Of ``config.json``.
        folder: Where to.
        processor_class: The processor of the captioner, where it has one of its own.
        ends_after: Its texts end after about so many tokens; otherwise hardly any text of random weights ends, and the
            stage rejects those that it had to cut.
    """
    if model_type in BUILDERS:
        BUILDERS[model_type](folder)
    else:
        _save_any(model_type, folder, processor_class)
    if ends_after is not None:
        path = folder / "generation_config.json"
        settings = json.loads(path.read_bytes())
        settings["exponential_decay_length_penalty"] = [ends_after, 1e4]
        path.write_text(json.dumps(settings))


def _save_any(model_type: str, folder: Path, processor_class: str | None) -> None:
    import transformers
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    tokens = {
        "image_token": "<image>", "video_token": "<video>", "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    tokenizer = _chat_tokenizer(**tokens)
    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    text = {**TEXT, "head_dim": 8, "vocab_size": len(tokenizer)}
    ids = {f"image_token_{name}": tokenizer.image_token_id for name in ("id", "index")}
    config = kind(
        text_config=_known(text, usual.text_config),
        vision_config=_known(VISION, usual.vision_config),
        **{name: value for name, value in ids.items() if hasattr(usual, name)},
    )
    images = getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["pil"])()
    for name in ("size", "crop_size", "max_image_size"):
        if sizes := getattr(images, name, None):
            side = VISION["image_size"] * (4 if name == "size" and hasattr(images, "max_image_size") else 1)
            setattr(images, name, {key: side for key, value in dict(sizes).items() if value})
    processor = processor_class_from_name(processor_class or PROCESSOR_MAPPING_NAMES[model_type])
    patches = (VISION["image_size"] // VISION["patch_size"]) ** 2
    given = {
        "patch_size": VISION["patch_size"],
        "image_seq_len": patches // getattr(config, "scale_factor", 1) ** 2,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "num_additional_image_tokens": 1,
    }
    taken = {name: value for name, value in given.items() if name in inspect.signature(processor.__init__).parameters}
    template = CHAT.replace("IMAGE", "<image>")
    built = _images_only(processor)(images, tokenizer, chat_template=template, **taken)
    _save(AutoModelForImageTextToText.from_config(config), built, folder)


def _known(sizes: dict[str, Any], config: Any) -> dict[str, Any]:
    """Those of some sizes that a config has, with its own type."""
    return {name: value for name, value in sizes.items() if hasattr(config, name)} | {"model_type": config.model_type}


def _chat_tokenizer(*more: str, **named: str) -> Any:
    return _byte_tokenizer(*CHAT_TOKENS, *more, pad_token="<|endoftext|>", eos_token="<|im_end|>", **named)


def _byte_tokenizer(*special: str, **named: str) -> Any:
    """One token a byte, and the special ones.  ``named``: which of those is which."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: Sequence[str] = list(dict.fromkeys([*special, *named.values()]))
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*byte_letters(), *tokens])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    standard = {name: named.pop(name) for name in ("pad_token", "eos_token", "bos_token") if name in named}
    return PreTrainedTokenizerFast(tokenizer_object=core, **standard, extra_special_tokens=named)


def _images_only(kind: Any) -> Any:
    """A processor without its video half, which cannot be made without torchvision."""
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: ["image_processor", "tokenizer"])})


def _save(model: Any, processor: Any, folder: Path, eos: str | None = None) -> None:
    fill_with_noise(model, 1)
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # four tokens of Gemma's picture among 300 of its question
            strengthen(parameter, 20.0)
    model.generation_config.update(min_new_tokens=3)  # random weights may well begin with the end
    if eos is not None:
        model.generation_config.update(eos_token_id=processor.tokenizer.convert_tokens_to_ids(eos))
    elif model.generation_config.eos_token_id is None:
        model.generation_config.update(eos_token_id=processor.tokenizer.eos_token_id)
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
