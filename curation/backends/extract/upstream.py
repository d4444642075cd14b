"""What plugins in dataset2metadata's style may name or import: its preprocessors, its CLIP, and the package ``clip``.

dataset2metadata, and OpenAI's package ``clip`` that it and its examples import, are not on PyPI.  Where they are not
installed, their names stand for functions here that do the same with this project's code: OpenAI's pictures and tokens,
and CLIP's networks from the same weights in the hub's form.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from curation.backends.extract.clip import OPENAI, load_openai
from curation.backends.extract.pictures import OPENAI_MEAN, OPENAI_SIDE, OPENAI_STD, CentreCrop, Squeeze
from curation.backends.extract.tokens import CONTEXT_LENGTH, ClipTokens, encoder
from curation.extract import plugins
from curation.extract.api import Preparation
from curation.extract.resample import BILINEAR
from curation.extract.settings import ModelSettings, WeightSource
from curation.images import Pixels
from curation.libraries import Image, np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIRECTIVES: Final = {"ViT-B/32": "oai-clip-vit-b32", "ViT-L/14": "oai-clip-vit-l14"}
_DEDUP_SIDE: Final = 512
_DEDUP_MEAN: Final = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class NormalisedPicture:
    """3 × side × side float32, as torchvision's ToTensor and Normalize make it of a crop."""

    takes: ClassVar[Literal["image"]] = "image"
    crop: CentreCrop | Squeeze
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, pixels: Pixels) -> NDArray[np.float32]:
        mean, deviation = np.array(self.mean, np.float32), np.array(self.deviation, np.float32)
        found = (self.crop(pixels).astype(np.float32) / np.float32(255) - mean) / deviation
        return np.ascontiguousarray(found.transpose(2, 0, 1), np.float32)


CLIP_PICTURE: Final = NormalisedPicture(CentreCrop(OPENAI_SIDE), OPENAI_MEAN, OPENAI_STD)
DEDUP_PICTURE: Final = NormalisedPicture(Squeeze(_DEDUP_SIDE, BILINEAR), _DEDUP_MEAN, _DEDUP_MEAN)


@dataclass(frozen=True, slots=True)
class BuiltIns:
    """dataset2metadata's names for plugins (``plugins.BuiltIns``).

    weights: in place of a directive's own.
    """

    names: ClassVar[tuple[str, ...]] = ("clip-aug", "clip-tokens", "dedup-aug")
    weights: tuple[tuple[str, WeightSource], ...] = ()

    def preparation(self, name: str) -> Preparation | None:
        """What a name in a plugin's ``preprocessors`` stands for; None for a name that dataset2metadata lacks."""
        if name == "clip-tokens":
            return ClipTokens(self._vocabulary())
        return {"clip-aug": CLIP_PICTURE, "dedup-aug": DEDUP_PICTURE}.get(name)

    def modules(self) -> Mapping[str, ModuleType]:
        """The modules that a plugin may import, by name; only those of packages that are not installed."""
        found = {name: module for name, module in self._modules().items() if not _is_installed(name.partition(".")[0])}
        for name, module in found.items():
            package, _, last = name.rpartition(".")
            if package:
                setattr(found[package], last, module)
        return found

    def _modules(self) -> dict[str, ModuleType]:
        clip: dict[str, Any] = {
            "load": self._load, "tokenize": self._tokenize, "available_models": lambda: list(_DIRECTIVES),
            "_transform": lambda n_px: _picture_of(NormalisedPicture(CentreCrop(n_px), OPENAI_MEAN, OPENAI_STD)),
        }  # fmt: skip
        pre = {
            "oai_clip_image": _picture_of(CLIP_PICTURE), "oai_clip_text": self._oai_clip_text,
            "dedup": _picture_of(DEDUP_PICTURE), "identity": _same,
        }  # fmt: skip
        post = {function.__name__: function for function in plugins.POSTPROCESSORS}
        return {
            "clip": _module("clip", clip),
            "clip.clip": _module("clip.clip", clip),
            "dataset2metadata": _module("dataset2metadata", {}),
            "dataset2metadata.postprocessors": _module("dataset2metadata.postprocessors", post),
            "dataset2metadata.preprocessors": _module("dataset2metadata.preprocessors", pre),
            "dataset2metadata.models": _module("dataset2metadata.models", {}, self._classes),
            "dataset2metadata.registry": _module("dataset2metadata.registry", _lookups(pre), self._model_lookup),
        }

    def _settings(self, directive: str, device: Any) -> ModelSettings:
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        own = dict(self.weights).get(directive)
        if own is None:
            return ModelSettings(device=name)
        return ModelSettings(weights=own.source, sha256=own.sha256, device=name)

    def _vocabulary(self) -> str:
        """The folder with CLIP's vocabulary: all its models have the same."""
        return str(load_openai("oai-clip-vit-b32", self._settings("oai-clip-vit-b32", "cpu"), folder_only=True)[1])

    # ---- the package clip

    def _load(self, name: str, device: Any = None, jit: bool = False, download_root: str | None = None) -> Any:
        """(model, preprocess), as ``clip.load``; ``jit`` and ``download_root`` have no effect."""
        import torch

        directive = _DIRECTIVES.get(name, name)
        if directive not in OPENAI:
            raise RuntimeError(f"Model {name} not found; available models = {list(_DIRECTIVES)}")
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        model, _ = load_openai(directive, self._settings(directive, where))
        return _openai_class()(model), _picture_of(CLIP_PICTURE)

    def _tokenize(
        self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
    ) -> Any:
        import torch

        found = np.zeros((1 if isinstance(texts, str) else len(texts), context_length), np.int32)
        encode = encoder(self._vocabulary()).encode
        for row, text in zip(found, [texts] if isinstance(texts, str) else texts, strict=True):
            tokens = encode(text, context_length + 1)
            if len(tokens) > context_length:
                if not truncate:
                    raise RuntimeError(f"Input {text} is too long for context length {context_length}")
                tokens = encode(text, context_length)
            row[: len(tokens)] = tokens
        return torch.from_numpy(found)

    def _oai_clip_text(self, text: str) -> Any:
        return self._tokenize(text, truncate=True)[0]

    # ---- dataset2metadata.models and dataset2metadata.registry

    def _classes(self) -> dict[str, Any]:
        named = {"OaiClipVitB32Wrapper": "ViT-B/32", "OaiClipVitL14Wrapper": "ViT-L/14"}
        return {name: _wrapper(name, model, self._load) for name, model in named.items()}

    def _model_lookup(self) -> dict[str, Any]:
        return {"model_lookup": {kind.name: kind for kind in self._classes().values()}}


class _Module(ModuleType):
    """A module some of whose names need torch, which is imported when the first of them is asked for."""

    def __init__(self, name: str, names: Mapping[str, Any], late: Callable[[], Mapping[str, Any]] | None) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []
        self.__dict__.update(names)
        self._late = late

    def __getattr__(self, name: str) -> Any:
        late = self.__dict__.get("_late")
        if late is not None and not name.startswith("_"):
            self._late = None
            self.__dict__.update(late())
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"{self.__name__} has no {name!r} here: dataset2metadata itself is not installed")


def _module(name: str, names: Mapping[str, Any], late: Callable[[], Mapping[str, Any]] | None = None) -> ModuleType:
    return _Module(name, names, late)


def _is_installed(package: str) -> bool:
    if isinstance(sys.modules.get(package), _Module):  # an earlier plugin's
        return False
    return importlib.util.find_spec(package) is not None


def _same(value: Any) -> Any:
    return value


def _picture_of(preparation: NormalisedPicture) -> Callable[[Image.Image], Any]:
    """A function from a Pillow image to a tensor."""

    def preprocess(image: Image.Image) -> Any:
        import torch

        return torch.from_numpy(preparation(np.asarray(image.convert("RGB"))))

    return preprocess


def _lookups(pre: Mapping[str, Any]) -> dict[str, Any]:
    """The registry's tables, but for ``model_lookup``."""
    b32, l14 = OPENAI
    return {
        "preprocessor_lookup": {
            "clip-aug": pre["oai_clip_image"], "clip-tokens": pre["oai_clip_text"], "identity": pre["identity"],
            "dedup-aug": pre["dedup"],
        },
        "postprocess_parquet_lookup": {
            f"{name}-score": functools.partial(plugins.batched_dot_product, model=name) for name in (b32, l14)
        },
        "postprocess_feature_lookup": {
            f"{name}-{part}": functools.partial(plugins.select, model=name, index=number)
            for name in (b32, l14) for number, part in enumerate(("image", "text"))
        },
    }  # fmt: skip


@functools.cache
def _openai_class() -> Any:
    """A torch module with the methods of OpenAI's class ``CLIP`` around transformers' network."""
    import torch

    class CLIP(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
        context_length = CONTEXT_LENGTH

        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network
            self.visual = SimpleNamespace(input_resolution=int(network.config.vision_config.image_size))

        @property
        def dtype(self) -> Any:
            return self.network.dtype

        @property
        def logit_scale(self) -> Any:
            return self.network.logit_scale

        def encode_image(self, image: Any) -> Any:
            return self.network.get_image_features(pixel_values=image.to(self.dtype)).pooler_output

        def encode_text(self, text: Any) -> Any:
            return self.network.get_text_features(input_ids=text.long()).pooler_output

        def forward(self, image: Any, text: Any) -> Any:
            pictures, texts = self.encode_image(image), self.encode_text(text)
            pictures, texts = (f / f.norm(dim=1, keepdim=True) for f in (pictures, texts))
            logits = self.logit_scale.exp() * pictures @ texts.t()
            return logits, logits.t()

    return CLIP


def _wrapper(name: str, model: str, load: Callable[..., Any]) -> Any:
    """dataset2metadata's class of one CLIP."""
    import torch

    def construct(self: Any, device: Any) -> None:
        torch.nn.Module.__init__(self)
        self.model, _ = load(model, device=device)
        self.model.eval()

    def forward(self: Any, x: Any, t: Any) -> Any:
        found = self.model.encode_image(x), self.model.encode_text(t)
        return tuple(features / features.norm(dim=1, keepdim=True) for features in found)

    told = {
        "name": _DIRECTIVES[model], "raw_inputs": ["image", "text"], "preprocessors": ["clip-aug", "clip-tokens"],
        "dependencies": [], "to_device": True, "__init__": construct, "forward": forward,
    }  # fmt: skip
    return type(name, (torch.nn.Module,), told)
