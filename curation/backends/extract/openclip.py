"""OpenCLIP's checkpoints as the hub's CLIP: its configuration read, its tensors under the other library's names.

OpenCLIP (Ilharco et al. 2021, doi:10.5281/zenodo.5143773) saves ``open_clip_config.json`` beside
``open_clip_model.safetensors`` or ``open_clip_pytorch_model.bin``: LAION's models, Apple's DFN, DataComp's.  Its
package needs torchvision; the network is CLIP's, so that transformers' computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.backends.extract.pictures import (
    OPENAI_MEAN,
    OPENAI_STD,
    CentreCrop,
    FastCentreCrop,
    Squeeze,
)
from curation.backends.extract.tokens import OPENCLIP_MARKS, ClipTokens, is_clip_vocabulary
from curation.errors import InfrastructureError
from curation.extract.api import Preparation
from curation.extract.resample import BICUBIC, BILINEAR
from curation.extract.settings import ModelSettings, load_tensors
from curation.jsonio import clean_text, parse_json

CONFIG = "open_clip_config.json"

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

MAX_CONFIG_BYTES = 1 << 20

_FILTERS = {"bicubic": BICUBIC, "bilinear": BILINEAR}

# What the configuration may say beside what is read: nothing that changes the network.  Values are OpenCLIP's defaults.
_OF_TRAINING = {"patch_dropout", "output_tokens", "init_logit_scale", "pad_id", "eos_id", "cast_dtype", "output_dict"}
_READ = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
_DEFAULTS = {
    "pos_embed_type": ("learnable",), "pool_type": ("tok", "argmax"), "block_type": ("default",),
    "proj_type": ("linear",), "attn_pooler_queries": (256,), "attn_pooler_heads": (8,), "tokenizer_mode": ("clip",),
    "timm_pool": ("avg",), "timm_proj": ("linear",), "hf_proj_type": ("mlp",), "hf_pooler_type": ("mean_pooler",),
    "hf_model_pretrained": (True,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpenClip:
    """A checkpoint as it is computed with.  model: transformers' ``CLIPModel`` on the CPU; crop, mean, deviation: how
    it wants its pictures."""

    model: Any
    crop: Preparation
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    tokens: ClipTokens


def load(directive: str, folder: Path, settings: ModelSettings, dtype: Any) -> OpenClip:
    """Read the checkpoint of a folder.

    Raises:
        InfrastructureError: It is none, or its network, preprocessing or tokenizer is another than CLIP's.
    """
    try:
        saved = parse_json(_bytes_of(folder / CONFIG), MAX_CONFIG_BYTES)
        model_config = _checked("model_cfg", saved["model_cfg"])
        vision = _checked("vision_cfg", model_config["vision_cfg"])
        text = _checked("text_cfg", model_config["text_cfg"])
        crop, mean, deviation = _pictures(saved.get("preprocess_cfg") or {}, vision, settings)
        if not is_clip_vocabulary(folder):
            raise ValueError("its tokenizer is not here (vocab.json and merges.txt, or tokenizer.json)")
        tokens = ClipTokens(str(folder), int(text.get("context_length", 77)), OPENCLIP_MARKS)
        config = _clip_config(model_config, vision, text)
        model = _model(folder, config, dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        line = clean_text(f"{'it lacks ' if isinstance(error, KeyError) else ''}{error}")[:300]
        raise InfrastructureError(f"{directive}: {folder} cannot be loaded as OpenCLIP's: {line}") from error
    return OpenClip(model, crop, mean, deviation, tokens)


def _bytes_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def _checked(part: str, told: Any) -> Mapping[str, Any]:
    """A part of the configuration, if nothing in it makes the network another than CLIP's."""
    if not isinstance(told, dict):
        raise ValueError(f"{part} is no object")
    for name, value in told.items():
        plain = name in _READ[part] or name in _OF_TRAINING or not value or value in _DEFAULTS.get(name, ())
        if not plain:
            hint = " (SigLIP's own checkpoints load as siglip:…)" if "siglip" in str(value).lower() else ""
            raise ValueError(f"its {part} has {name} = {value!r:.80}, which makes it no plain CLIP{hint}")
    return told


def _clip_config(model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    from transformers import CLIPConfig

    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    vocabulary = int(text.get("vocab_size", 49408))

    def tower(part: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": int(width * float(part.get("mlp_ratio", 4.0))),
            "num_hidden_layers": int(part.get("layers", 12)),
            "num_attention_heads": heads,
            "hidden_act": activation,
            "projection_dim": int(model["embed_dim"]),
        }

    side, wide = vision.get("image_size", 224), int(vision.get("width", 768))
    if not isinstance(vision.get("layers", 12), int):
        raise ValueError("its vision_cfg is a ResNet's, only vision transformers can be loaded")
    words = tower(text, int(text.get("width", 512)), int(text.get("heads", 8)))
    sight = tower(vision, wide, wide // int(vision.get("head_width", 64)))
    # The last two of the vocabulary are the marks; the features are those of the place of the end.
    words |= {"vocab_size": vocabulary, "max_position_embeddings": int(text.get("context_length", 77))}
    words |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 0}
    sight |= {"image_size": _side(side), "patch_size": _side(vision.get("patch_size", 16))}
    return CLIPConfig(text_config=words, vision_config=sight, projection_dim=int(model["embed_dim"]))


def _side(told: Any) -> int:
    sides = {int(n) for n in (told if isinstance(told, list) else [told])}
    if len(sides) != 1:
        raise ValueError(f"its pictures are not square: {told!r:.40}")
    return sides.pop()


def _pictures(
    told: Mapping[str, Any], vision: Mapping[str, Any], settings: ModelSettings
) -> tuple[Preparation, tuple[float, ...], tuple[float, ...]]:
    side = _side(told.get("size") or vision.get("image_size", 224))
    filter_name, mode = told.get("interpolation") or "bicubic", told.get("resize_mode") or "shortest"
    if filter_name not in _FILTERS or mode not in ("shortest", "squash"):
        raise ValueError(f"its pictures are resized by {mode!r:.20} with {filter_name!r:.20}, which is not known here")
    resample = int(_FILTERS[filter_name])
    crop: Preparation
    if mode == "squash":
        crop = Squeeze(side, resample)
    else:
        crop = FastCentreCrop(side, resample) if settings.resize == "fast" else CentreCrop(side, resample)
    mean, deviation = (
        tuple(float(n) for n in told.get(name) or own) for name, own in (("mean", OPENAI_MEAN), ("std", OPENAI_STD))
    )
    if len(mean) != 3 or len(deviation) != 3 or 0 in deviation:
        raise ValueError("its mean and deviation are not of three colours")
    return crop, mean, deviation


# ---- tensors


def _model(folder: Path, config: Any, dtype: Any) -> Any:
    import torch
    from transformers import CLIPModel

    tensors = dict(_renamed(_tensors(folder)))
    with torch.device("meta"):
        wanted = CLIPModel(config).state_dict()
    for name, tensor in wanted.items():
        if name not in tensors:
            raise ValueError(f"its weights lack {name}")
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, its configuration says {tuple(tensor.shape)}"
            raise ValueError(f"its weights are of another size: {name} has {shapes}")
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"its weights have tensors that CLIP has no place for: {', '.join(unknown[:3])}")
    return CLIPModel.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def _tensors(folder: Path) -> Mapping[str, Any]:
    """By OpenCLIP's names.  A file of torch is read as tensors only."""
    for name in WEIGHTS:
        path = folder / name
        if path.suffix == ".safetensors" and path.is_file():
            from safetensors.torch import load_file

            try:
                return dict(load_file(path))
            except Exception as error:  # safetensors raises a kind of its own
                raise ValueError(f"{name} cannot be read: {error}") from error
        if path.is_file():
            saved = load_tensors(path, "OpenCLIP checkpoint")
            return dict(saved.get("state_dict", saved))
    raise ValueError(f"there is neither {' nor '.join(WEIGHTS)}")


_TOWERS = {"visual": "vision_model", "text": "text_model"}

_PARTS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip

_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
    **{f"visual.ln_pre.{part}": f"vision_model.pre_layrnorm.{part}" for part in ("weight", "bias")},
    **{f"visual.ln_post.{part}": f"vision_model.post_layernorm.{part}" for part in ("weight", "bias")},
    **{f"text.ln_final.{part}": f"text_model.final_layer_norm.{part}" for part in ("weight", "bias")},
}

_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text.text_projection": "text_projection.weight"}


def _renamed(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each tensor under the hub's name; one whose name is unknown keeps it, and is told of as such."""
    for given, tensor in tensors.items():
        name = given.removeprefix("module.")
        if not name.startswith(("visual.", "text.", "logit_")):
            name = f"text.{name}"  # the text tower stands at the top, unless the model was made with custom_text
        if name == "text.attn_mask":
            continue
        tower, _, rest = name.partition(".")
        if name in _SINGLE:
            yield _SINGLE[name], tensor.reshape(()) if name == "logit_scale" else tensor
        elif name in _PROJECTIONS:
            yield _PROJECTIONS[name], tensor.T.contiguous()
        elif rest.startswith("transformer.resblocks."):
            number, _, part = rest.removeprefix("transformer.resblocks.").partition(".")
            place = f"{_TOWERS[tower]}.encoder.layers.{number}"
            layer, _, kind = part.rpartition(".")
            if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{place}.self_attn.{letter}_proj.{part.rpartition('_')[2]}", piece.contiguous()
            else:
                yield f"{place}.{_PARTS.get(layer, layer)}.{kind}", tensor
        else:
            yield given, tensor
