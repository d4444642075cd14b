"""The models of ``gpu.py``: real shapes from the published configurations, random weights, made on the device itself.

Nothing is downloaded; the speed does not depend on the weights.  The tokenizers are small ones: what they give is
padded to the real length, or has about as many tokens as the real one gives.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import measuring  # noqa: F401 - makes the project importable

from curation.backends.extract.tokens import byte_letters
from curation.backends.generate.loading import load_pipeline
from curation.backends.generate.tiny import clip_tokenizer, fill_with_noise, t5_tokenizer
from curation.models.hub_cache import ModelSource, resolve
from tests.backends import tiny_captioners, tiny_extractors, tiny_pipelines
from tests.backends.tiny_pipelines import qwen_tokenizer

VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SD_VAE = VAE | {"latent_channels": 4, "scaling_factor": 0.18215}
FLUX_VAE = VAE | {
    "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
OPENCLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 512,
}  # fmt: skip
QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}  # fmt: skip


# ---- text to images


def on_the_host(scheduler: Any, **settings: Any) -> Any:
    """A scheduler whose tables are in the host's memory, as they are where a pipeline is loaded."""
    import torch

    with torch.device("cpu"):
        return scheduler(**settings)


def build_sd_turbo() -> Any:
    """stabilityai/sd-turbo."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=64,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**SD_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**OPENCLIP_H)),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=on_the_host(
            EulerDiscreteScheduler,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl_turbo() -> Any:
    """stabilityai/sdxl-turbo."""
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SD_VAE | {"scaling_factor": 0.13025}),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**OPENCLIP_G)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=on_the_host(EulerAncestralDiscreteScheduler, timestep_spacing="trailing", steps_offset=1),
    )


def build_flux_schnell() -> Any:
    """black-forest-labs/FLUX.1-schnell."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
    )
    return FluxPipeline(
        scheduler=on_the_host(FlowMatchEulerDiscreteScheduler, shift=1.0),
        vae=AutoencoderKL(**FLUX_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def build_z_image_turbo() -> Any:
    """Tongyi-MAI/Z-Image-Turbo."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    return ZImagePipeline(
        scheduler=on_the_host(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=AutoencoderKL(**FLUX_VAE),
        text_encoder=Qwen3Model(Qwen3Config(**QWEN3_4B)),
        tokenizer=qwen_tokenizer(),
        transformer=ZImageTransformer2DModel(),
    )


def build_flux2_klein() -> Any:
    """black-forest-labs/FLUX.2-klein-4B."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=5,
        num_single_layers=20,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=on_the_host(FlowMatchEulerDiscreteScheduler),
        vae=AutoencoderKLFlux2(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B)),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        is_distilled=True,
    )


def save_taesd(folder: Path) -> Path:
    """madebyollin/taesd: its published configuration is diffusers' default."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny()
    fill(vae)
    vae.save_pretrained(folder)
    return folder


# Preset → how the pipeline is built, and the tests' tiny one of the same architecture.
PIPELINES: dict[str, tuple[Callable[[], Any], str]] = {
    "sd-turbo": (build_sd_turbo, "tiny-sd"),
    "sdxl-turbo": (build_sdxl_turbo, "tiny-sdxl-turbo"),
    "flux.1-schnell": (build_flux_schnell, "tiny-FLUX.1-schnell"),
    "z-image-turbo": (build_z_image_turbo, "tiny-Z-Image-Turbo"),
    "flux.2-klein-4b": (build_flux2_klein, "tiny-FLUX.2-klein-4B"),
}


@contextlib.contextmanager
def made_on(device: str, dtype: Any) -> Iterator[None]:
    """Modules that are built inside have their parameters on the device, in ``dtype``."""
    import torch

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def fill(module: Any) -> None:
    """Matrices normal with deviation 1/√fan-in, norms one, biases zero: what is computed stays finite."""
    import torch

    with torch.no_grad():
        for label, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0.0 if label.endswith("bias") else 1.0)


def pipeline(name: str, device: str, tiny: bool = False) -> Any:
    """The pipeline of a preset, of its real shape, on the device in bf16; tiny: the tests' of that architecture."""
    import torch

    build, other = PIPELINES[name]
    if tiny:
        with tempfile.TemporaryDirectory() as folder:
            tiny_pipelines.BUILDERS[other](Path(folder) / other)
            return load_pipeline(resolve(str(Path(folder) / other)), "float32", device)
    with made_on(device, torch.bfloat16):
        built = build()
    built.to(device, torch.bfloat16)
    for module in built.components.values():
        if isinstance(module, torch.nn.Module):
            fill(module)
    built.set_progress_bar_config(disable=True)
    return built


@contextlib.contextmanager
def in_place_of_the_hub(name: str, device: str, tiny: bool) -> Iterator[None]:
    """Stage 03 gets the pipeline of random weights where it would load the model."""
    ready = pipeline(name, device, tiny)
    backend = "curation.backends.generate.diffusers"
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch(f"{backend}.load_pipeline", lambda *_, **__: ready),
    ):
        source = ModelSource(name=name, location=folder, revision="random weights")
        (Path(folder) / "model_index.json").write_text(json.dumps({"_class_name": type(ready).__name__}))
        with mock.patch(f"{backend}.resolve", lambda *_, **__: source):
            yield


# ---- captioners


def save_qwen(folder: Path, tokens: int, *, tiny: bool) -> None:
    """Qwen/Qwen2.5-VL-7B-Instruct but for its weights: configuration, and a processor of the real geometry.

    Each caption has ``tokens`` tokens, of which the last one ends it.  tiny: the tests' model.
    """
    from transformers import Qwen2_5_VLConfig

    tiny_captioners.save("qwen2_5_vl", folder)
    path = folder / "generation_config.json"
    words = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
    end = next(word["id"] for word in words if word["content"] == "<|im_end|>")
    lengths = {"min_new_tokens": tokens - 1, "exponential_decay_length_penalty": [tokens - 2, 1e4]}
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **lengths, "eos_token_id": end, "pad_token_id": 0}))
    (folder / "model.safetensors").unlink()
    if tiny:
        return
    settings = json.loads((folder / "config.json").read_bytes())
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_window_layers": 28, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "patch_size": 14,
    }  # fmt: skip
    ids = {name: value for name, value in settings.items() if name.endswith("_token_id")}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids).save_pretrained(folder)
    for path in folder.glob("*processor*.json"):
        numbers = path.read_text("utf-8")
        path.write_text(numbers.replace(str(32 * 32), str(56 * 56)).replace(str(128 * 128), str(28 * 28 * 1280)))


@contextlib.contextmanager
def random_weights(device: str) -> Iterator[None]:
    """``from_pretrained`` of transformers builds the model of the folder's configuration, its weights random."""
    from transformers import PreTrainedModel

    def build(kind: Any, /, folder: Any, *_: Any, config: Any = None, dtype: Any = None, **more: Any) -> Any:
        from transformers import GenerationConfig

        config = config or kind.config_class.from_pretrained(folder)
        with made_on(device, dtype):
            model = kind._from_config(config, dtype=dtype)
        fill(model)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        loading: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}
        return (model, loading) if more.get("output_loading_info") else model

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(build)):
        yield


# ---- what stage 06 computes


def save_clip(folder: Path, name: str) -> Path:
    """OpenAI's CLIP ``b32`` or ``l14``; ``tiny-…`` is small.  The text is always 77 tokens."""
    from transformers import CLIPConfig, CLIPModel

    words = tiny_extractors.clip_vocabulary()
    end = 49407
    marks = {"vocab_size": 49408, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    words |= {"<|startoftext|>": end - 1, "<|endoftext|>": end}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text_b = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    vision, text, patch, width = {
        "b32": (CLIP_L, text_b, 32, 512),
        "l14": (large, CLIP_L, 14, 768),
        "tiny-b32": (small, small, 32, 512),
        "tiny-l14": (small, small, 32, 768),
    }[name]
    config = CLIPConfig(
        text_config={**text, **marks, "hidden_act": "quick_gelu"},
        vision_config={**vision, "patch_size": patch, "image_size": 224, "hidden_act": "quick_gelu"},
        projection_dim=width,
    )
    model = CLIPModel(config)
    fill_with_noise(model, 1)  # as it is initialised, all pictures would have nearly the same features
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(words), "utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(map(" ".join, tiny_extractors.MERGES)) + "\n", "utf-8"
    )
    return folder


def save_toxicity(folder: Path) -> Path:
    """detoxify's multilingual model: XLM-RoBERTa base with sixteen outputs.  One token a word."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForSequenceClassification

    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = {piece: i for i, piece in enumerate([*marks, *byte_letters()])}
    core = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    named = dict(enumerate(tiny_extractors.TOXICITY_LABELS))
    config = XLMRobertaConfig(
        vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, num_labels=len(named), id2label=named
    )
    model = XLMRobertaForSequenceClassification(config)
    fill_with_noise(model, 3)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_max_length=512,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_extractors(folder: Path, *, tiny: bool) -> dict[str, Path]:
    """The models of examples/datacomp.yml and the descriptor network: directive → its weights."""
    size = "tiny-" if tiny else ""
    folder.mkdir(parents=True, exist_ok=True)
    isc = folder / "isc.pth"
    if tiny:
        tiny_extractors.save_isc(isc)
    else:
        import torch

        torch.save({"state_dict": tiny_extractors.filled(tiny_extractors.isc_shapes(), 6)}, isc)
    toxicity = tiny_extractors.save_toxicity if tiny else save_toxicity
    return {
        "oai-clip-vit-b32": save_clip(folder / "b32", f"{size}b32"),
        "oai-clip-vit-l14": save_clip(folder / "l14", f"{size}l14"),
        "nsfw-detoxify": toxicity(folder / "detoxify"),
        "nsfw-image-oai-clip-vit-l-14": tiny_extractors.save_nsfw_head(folder / "nsfw.pth"),
        "faces-scrfd10g": tiny_extractors.save_scrfd(folder / "scrfd.pth"),
        "dedup-isc-ft-v107": isc,
    }
