"""CLIP and SigLIP: features of picture and caption of length one, and the score that is their dot product.

``oai-clip-vit-b32`` and ``oai-clip-vit-l14`` are DataComp's: OpenAI's weights, preprocessing and tokens.
``clip:…`` and ``siglip:…`` take any model of the two families by hub id or folder, with its own preprocessing;
``openclip:…`` a checkpoint as OpenCLIP saves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.backends.extract import openclip
from curation.backends.extract.pictures import (
    OPENAI_MEAN,
    OPENAI_SIDE,
    OPENAI_STD,
    CentreCrop,
    FastCentreCrop,
    Normalise,
    NormalisePatches,
    Patches,
    PatchGrid,
    Squeeze,
)
from curation.backends.extract.tokens import ClipTokens, FolderTokens, is_clip_vocabulary
from curation.errors import InfrastructureError, UsageError
from curation.extract.api import Batch, Column, Directive, Extractor, Feature, Preparation, short_name
from curation.extract.settings import ModelSettings, WeightSource
from curation.models.hub_cache import TRANSFORMER, folder_digest, quiet_transformers
from curation.models.weights import fetch_weights

# By directive: the hub id, and how many parameters it has in thousand millions.
OPENAI = {
    "oai-clip-vit-b32": ("openai/clip-vit-base-patch32", 0.151),
    "oai-clip-vit-l14": ("openai/clip-vit-large-patch14", 0.428),
}


OPENCLIP = "openclip:"

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "regex", "ftfy")

MAX_PATCHES = 4096  # of a picture: its memory grows with their square


def _clip(name: str, source: str = "", parameters: float = 0.0) -> Directive:
    columns, features = ("{}-score",), ("{}-image", "{}-text")
    return Directive(name, columns, features, source, "MIT", parameters, bits=16, packages=_PACKAGES)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """How a model wants its pictures."""

    crop: Preparation
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


class Backend(Extractor):
    """One model on one device."""

    directives = (
        *(_clip(name, *model) for name, model in OPENAI.items()),
        _clip("clip:"),
        _clip(OPENCLIP),
        Directive(
            "siglip:",
            ("{}-score", "{}-probability"),
            ("{}-image", "{}-text"),
            packages=("torch", "transformers", "safetensors", "tokenizers"),
        ),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        import torch

        quiet_transformers()
        self._torch = torch
        [source] = self.sources(directive, settings)
        folder = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        self.name = short_name(directive)
        self.revision = folder_digest(folder)
        dtype = settings.torch_dtype(half_on_gpu=True)
        wants_sigmoid = directive.startswith("siglip:")
        if directive.startswith(OPENCLIP):
            own = openclip.load(directive, folder, settings, dtype)
            model, config, pictures = own.model, own.model.config, _Pictures(own.crop, own.mean, own.deviation)
            self._tokens: ClipTokens | FolderTokens = own.tokens
        else:
            model = _load(directive, folder, dtype, wants_sigmoid=wants_sigmoid)
            config = model.config
            pictures = _openai_pictures(settings) if directive in OPENAI else _own_pictures(folder, settings)
            self._tokens = _tokens(folder, config)
        self._grid: PatchGrid | None = None
        if isinstance(pictures.crop, Patches):
            self._grid = PatchGrid(pictures.crop.side, pictures.crop.most)
        _check_size(directive, pictures.crop, config)
        self._model: Any = model.to(settings.device).eval()
        self._crop = pictures.crop
        self._normalise: Normalise | NormalisePatches
        kind = Normalise if self._grid is None else NormalisePatches
        self._normalise = kind(pictures.mean, pictures.deviation, settings.device, dtype)
        self.preparations: tuple[Preparation, ...] = (self._crop, self._tokens)
        if self._grid is not None:
            self.preparations += (self._grid,)
        width = int(getattr(config, "projection_dim", 0) or config.vision_config.hidden_size)
        self.features = (
            Feature(f"{self.name}-image", width, needs_text=False),
            Feature(f"{self.name}-text", width, needs_image=False),
        )
        self.columns: tuple[Column, ...] = (Column(f"{self.name}-score", "float32"),)
        self._sigmoid: tuple[float, float] | None = None
        if wants_sigmoid:
            self._sigmoid = (math.exp(model.logit_scale.item()), model.logit_bias.item())
            self.columns += (Column(f"{self.name}-probability", "float32"),)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        place = OPENAI[directive][0] if directive in OPENAI else directive.partition(":")[2]
        marker = openclip.CONFIG if directive.startswith(OPENCLIP) else TRANSFORMER[0]
        default = WeightSource(place, marker=marker) if place else None
        found = settings.source(default)
        if found is None:
            raise UsageError(
                f"{directive}: no such CLIP model; there are {', '.join(OPENAI)}, clip:…, openclip:… and siglip:…"
            )
        return [found]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """Features in float32, whatever the model computes in."""
        torch = self._torch
        with torch.inference_mode():
            image, text = self.picture_features(batch), self.text_features(batch)
            score = (image * text).sum(1)
            found = {f"{self.name}-image": image, f"{self.name}-text": text}
            found[f"{self.name}-score"] = score.cpu().numpy()
            if self._sigmoid is not None:
                scale, bias = self._sigmoid
                found[f"{self.name}-probability"] = torch.sigmoid(score * scale + bias).cpu().numpy()
        return found

    def picture_features(self, batch: Batch) -> Any:
        """Of the pictures alone: samples × width float32 on the device, rows of length one."""
        with self._torch.inference_mode():
            return _unit(self._model.get_image_features(**self._picture_inputs(batch)).pooler_output)

    def text_features(self, batch: Batch) -> Any:
        """Of the captions alone, likewise."""
        with self._torch.inference_mode():
            tokens = batch.device_tensor(self._tokens).long()
            return _unit(self._model.get_text_features(**self._text_inputs(tokens)).pooler_output)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before the softmax or the sigmoid: the inverse of the temperature."""
        return math.exp(float(self._model.logit_scale.item()))

    def _picture_inputs(self, batch: Batch) -> dict[str, Any]:
        pictures = self._normalise(batch.device_tensor(self._crop))
        if self._grid is None:
            return {"pixel_values": pictures}
        shapes = batch.device_tensor(self._grid).long().clamp(min=1)  # of a picture that cannot be read: zeros
        places = self._torch.arange(pictures.shape[1], device=pictures.device)
        mask = places < shapes.prod(1, keepdim=True)
        pictures = pictures * mask[:, :, None].to(pictures.dtype)
        return {"pixel_values": pictures, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}

    def _text_inputs(self, tokens: Any) -> dict[str, Any]:
        if isinstance(self._tokens, FolderTokens) and self._tokens.masked:
            return {"input_ids": tokens, "attention_mask": (tokens != self._tokens.padding).long()}
        return {"input_ids": tokens}

    def close(self) -> None:
        self._model = None


def load_openai(directive: str, settings: ModelSettings, *, folder_only: bool = False) -> tuple[Any, Path]:
    """One of ``OPENAI``, as the extractor loads it.

    Args:
        directive: Its name.
        settings: How it is loaded.
        folder_only: Do not load the network, which is then None.

    Returns:
        transformers' network and the folder of its weights and vocabulary.

    Raises:
        InfrastructureError: The weights are not there.
    """
    quiet_transformers()
    [source] = Backend.sources(directive, settings)
    folder = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
    if folder_only:
        return None, folder
    model = _load(directive, folder, settings.torch_dtype(half_on_gpu=True), wants_sigmoid=False)
    return model.to(settings.device).eval(), folder


def _unit(features: Any) -> Any:
    """Rows of length one, in float32."""
    features = features.float()
    return features / features.norm(dim=1, keepdim=True)


def _load(directive: str, folder: Path, dtype: Any, *, wants_sigmoid: bool) -> Any:
    """The folder's model, which has to be CLIP or SigLIP."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(str(folder))
        _check_family(directive, config.model_type, wants_sigmoid)
        return AutoModel.from_pretrained(str(folder), dtype=dtype, config=config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = str(error).strip().partition("\n")[0][:300]
        hint = f"; it is a checkpoint of OpenCLIP: use {OPENCLIP}" if (folder / openclip.CONFIG).is_file() else ""
        raise InfrastructureError(f"{directive}: {folder} cannot be loaded: {line}{hint}") from error


def _check_family(directive: str, model_type: str, wants_sigmoid: bool) -> None:
    expected = ("siglip", "siglip2") if wants_sigmoid else ("clip",)
    if model_type not in expected:
        hint = "siglip:" if model_type.startswith("siglip") else "clip:" if model_type == "clip" else "a plugin"
        raise UsageError(f"{directive}: a model of the type {model_type!r}, not {' or '.join(expected)}: use {hint}")


def _check_size(directive: str, crop: Any, config: Any) -> None:
    if isinstance(crop, Patches):
        own, most = int(config.vision_config.patch_size), int(config.vision_config.num_patches)
        if crop.side != own or not 1 <= crop.most <= MAX_PATCHES:
            raise InfrastructureError(
                f"{directive}: the model has {most} patches of {own} pixels, its preprocessing gives {crop.most} of "
                f"{crop.side}"
            )
        return
    side = int(config.vision_config.image_size)
    if crop.side != side:
        raise InfrastructureError(f"{directive}: the model sees {side} pixels, its preprocessing gives {crop.side}")


def _openai_pictures(settings: ModelSettings) -> _Pictures:
    crop = FastCentreCrop(OPENAI_SIDE) if settings.resize == "fast" else CentreCrop(OPENAI_SIDE)
    return _Pictures(crop, OPENAI_MEAN, OPENAI_STD)


def _own_pictures(folder: Path, settings: ModelSettings) -> _Pictures:
    """As the folder's image processor says; a centre crop is placed as torchvision places it."""
    from transformers import AutoImageProcessor

    try:
        own = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
        size, resample = own.size or {}, int(own.resample)
        mean, deviation = tuple(map(float, own.image_mean)), tuple(map(float, own.image_std))
        crop: Preparation
        if getattr(own, "max_num_patches", None):
            crop = Patches(int(own.patch_size), int(own.max_num_patches), resample)
        elif size.get("shortest_edge"):
            side = int(own.crop_size["height"])
            if side != int(own.crop_size["width"]) or side != int(size["shortest_edge"]) or not own.do_center_crop:
                raise ValueError("it crops to another size than it resizes to")
            crop = FastCentreCrop(side, resample) if settings.resize == "fast" else CentreCrop(side, resample)
        else:
            side = int(size["height"])
            if side != int(size["width"]):
                raise ValueError("its pictures are not square")
            crop = Squeeze(side, resample)
        if abs(own.rescale_factor * 255 - 1) > 1e-6:
            raise ValueError(f"its rescale_factor is {own.rescale_factor}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = str(error).strip().partition("\n")[0][:300]
        raise InfrastructureError(f"{folder}: its preprocessing is none that can be followed: {line}") from error
    return _Pictures(crop, mean, deviation)


def _tokens(folder: Path, config: Any) -> ClipTokens | FolderTokens:
    length = int(config.text_config.max_position_embeddings)
    if config.model_type == "clip" and is_clip_vocabulary(folder):
        return ClipTokens(str(folder), length)
    # SigLIP was trained on captions padded to the full length, and sees the padding.
    return FolderTokens.of(folder, length, masked=config.model_type == "clip")
