"""Tiny pipelines of every architecture that has a preset, with random weights, for the code paths of each.

They are saved in diffusers format and loaded through the real code; an image of 64×64 takes 20 to 100 ms on one core.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.backends.extract.tokens import byte_letters
from curation.backends.generate.tiny import (
    clip_text_config,
    clip_tokenizer,
    fill_with_noise,
    quiet_save,
    save_tiny_sd,
    t5_tokenizer,
)


def save_sd_with_safety_checker(folder: Path) -> None:
    """The embedded pipeline with Stable Diffusion's safety checker, its weights random."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    base = folder.with_name(folder.name + "-base")
    save_tiny_sd(base)
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16, "projection_dim": 8,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    fill_with_noise(checker, 7)
    fill(checker.concept_embeds_weights, -2.0)  # below every cosine: everything is flagged
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=checker, feature_extractor=processor)
    quiet_save(pipeline, folder)


def save_tiny_sdxl(folder: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = clip_text_config(CLIPTextConfig, tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModel(config),
        "text_encoder_2": CLIPTextModelWithProjection(config),
        "unet": unet,
        "vae": _small_vae(AutoencoderKL, latent_channels=4),
    }
    scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    _save(StableDiffusionXLPipeline, parts, folder, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer)


def save_tiny_flux(folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModel(clip_text_config(CLIPTextConfig, tokenizer)),
        "text_encoder_2": T5EncoderModel(
            T5Config(
                vocab_size=len(t5), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
        "transformer": FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
        "vae": _small_vae(AutoencoderKL, latent_channels=16),
    }  # fmt: skip
    _save(
        FluxPipeline, parts, folder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), tokenizer=tokenizer, tokenizer_2=t5,
    )  # fmt: skip


def save_tiny_flux2_klein(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    text_config = Qwen3Config(  # the pipeline takes the hidden states of layers 9, 18 and 27
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "text_encoder": Qwen3ForCausalLM(text_config),
        "transformer": Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        "vae": AutoencoderKLFlux2(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
    }  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    _save(Flux2KleinPipeline, parts, folder, scheduler=scheduler, tokenizer=tokenizer, is_distilled=True)


def save_tiny_z_image(folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    text_config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "text_encoder": Qwen3Model(text_config),
        "transformer": ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=32, axes_dims=[4, 4, 8], axes_lens=[1024, 64, 64],
        ),
        "vae": _small_vae(AutoencoderKL, latent_channels=16),
    }  # fmt: skip
    _save(ZImagePipeline, parts, folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer)


def save_tiny_qwen_image(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    # The pipeline leaves out the first 34 tokens, which are its template up to the prompt: a token a word, as Qwen's.
    words = "color, shape, size, texture, quantity, text, spatial relationships of the objects and background"
    words = f"Describe the image by detailing the {words}"
    tokenizer.add_tokens(["system", "user", *dict.fromkeys(re.findall(r"^\w+| \w+", words))])
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text_config = {
        "vocab_size": max(len(tokenizer), 300), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope,
    }  # fmt: skip
    vision_config = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config)
    parts: dict[str, Any] = {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "transformer": QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
    }  # fmt: skip
    _save(QwenImagePipeline, parts, folder, scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer)


def save_tiny_sd3(folder: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    config = clip_text_config(CLIPTextConfig, tokenizer)
    t5_config = T5Config(
        vocab_size=len(t5), d_model=64, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModelWithProjection(config),
        "text_encoder_2": CLIPTextModelWithProjection(config),
        "text_encoder_3": T5EncoderModel(t5_config),
        "transformer": SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, out_channels=16,
            pos_embed_max_size=32,
        ),
        "vae": _small_vae(AutoencoderKL, latent_channels=16),
    }  # fmt: skip
    _save(
        StableDiffusion3Pipeline, parts, folder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=t5,
    )  # fmt: skip


def save_tiny_sana(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    _save_sana(SanaPipeline, FlowMatchEulerDiscreteScheduler(), folder, guidance_embeds=False)


def save_tiny_sana_sprint(folder: Path) -> None:
    """The pipeline that AutoPipelineForText2Image does not know."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    _save_sana(SanaSprintPipeline, SCMScheduler(), folder, guidance_embeds=True)


def _save_sana(kind: Any, scheduler: Any, folder: Path, *, guidance_embeds: bool) -> None:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = qwen_tokenizer()
    text_config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "text_encoder": Gemma2Model(text_config),
        "transformer": SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
            sample_size=32, qk_norm="rms_norm_across_heads", guidance_embeds=guidance_embeds,
        ),
        "vae": AutoencoderDC(
            latent_channels=4, attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
            decoder_act_fns="silu", scaling_factor=0.41407,
        ),
    }  # fmt: skip
    _save(kind, parts, folder, scheduler=scheduler, tokenizer=tokenizer)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "tiny-sd": save_tiny_sd,
    "tiny-sdxl-turbo": save_tiny_sdxl,
    "tiny-FLUX.1-schnell": save_tiny_flux,
    "tiny-FLUX.2-klein-4B": save_tiny_flux2_klein,
    "tiny-Z-Image-Turbo": save_tiny_z_image,
    "tiny-Sana_Sprint": save_tiny_sana_sprint,
    "tiny-SANA1.5": save_tiny_sana,
    "tiny-sd3.5-large-turbo": save_tiny_sd3,
    "tiny-Qwen-Image": save_tiny_qwen_image,
}


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    pieces = [*byte_letters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    return tokenizer


def _small_vae(kind: Any, latent_channels: int) -> Any:
    return kind(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.1,
        scaling_factor=0.36,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def fill(parameter: Any, value: float) -> None:
    import torch

    with torch.no_grad():
        parameter.fill_(value)


def _save(kind: Any, modules: dict[str, Any], folder: Path, **rest: Any) -> None:
    for seed, module in enumerate(modules.values()):
        fill_with_noise(module, seed)
    quiet_save(kind(**modules, **rest), folder)
