"""Small networks on a model's picture features: DataComp's NSFW classifier, and how pleasing a picture is.

The NSFW classifier and two of the aesthetic predictors stand on OpenAI's CLIP, the newest one on SigLIP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curation.errors import InfrastructureError
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation, short_name
from curation.extract.settings import ModelSettings, WeightSource, file_revision, load_tensors
from curation.models.weights import fetch_weights

_RELEASE = "https://github.com/mlfoundations/dataset2metadata/releases/download/v0.1.0-alpha/"


_AESTHETIC = "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/main/"


_LINEAR = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_{}_linear.pth"


_SIGLIP = "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"


@dataclass(frozen=True, slots=True)
class _Head:
    """A directive's column, the model whose picture feature it takes, and its weights.

    source: None where nobody publishes a digest, so that the user has to name the file.  url: where it is published.
    layers: the names of its linear layers, one after the other; none for the NSFW classifier.
    """

    column: str
    model: str
    source: WeightSource | None
    url: str
    origin: str
    licence: str
    parameters: float
    layers: tuple[str, ...] = ()


def _linear(model: str, name: str) -> _Head:
    """LAION's first predictor: one linear layer."""
    return _Head("{}-score", model, None, _LINEAR.format(name), "LAION-AI's file, named by you", "MIT", 1e-6, ("",))


HEADS = {
    "nsfw-image-oai-clip-vit-l-14": _Head(
        "nsfw-image-score",
        "oai-clip-vit-l14",
        WeightSource(f"{_RELEASE}nsfw_torch.pt", "3c97d5478477c181bfa29a33e6933f710c8ec587e3c3551ff855e293acdaf390"),
        f"{_RELEASE}nsfw_torch.pt",
        "dataset2metadata's release",
        "MIT",
        0.00022,
    ),
    "aesthetic": _Head(
        "aesthetic-score",
        "oai-clip-vit-l14",
        WeightSource(
            f"{_AESTHETIC}sac%2Blogos%2Bava1-l14-linearMSE.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
        f"{_AESTHETIC}sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "improved-aesthetic-predictor",
        "Apache-2.0",
        0.00093,
        # The numbers are those of the published file, whose dropouts (1, 3 and 5) do nothing at inference.
        tuple(f"layers.{number}." for number in (0, 2, 4, 6, 7)),
    ),
    "aesthetic-v1-l14": _linear("oai-clip-vit-l14", "l_14"),
    "aesthetic-v1-b32": _linear("oai-clip-vit-b32", "b_32"),
    "aesthetic-v1-b16": _linear("clip:openai/clip-vit-base-patch16", "b_16"),
    "aesthetic-v2-5": _Head(
        "{}-score",
        "siglip:google/siglip-so400m-patch14-384",
        None,
        _SIGLIP,
        "aesthetic-predictor-v2-5's file, named by you",
        "AGPL-3.0",
        0.0013,
        tuple(f"scoring_head.{number}." for number in (0, 2, 4, 6, 8)),
    ),
}


class Backend(Extractor):
    """One head; it takes the features as they are stored, of length one, as upstream does."""

    directives = tuple(
        Directive(
            name,
            (h.column,),
            (),
            h.origin,
            h.licence,
            h.parameters,
            needs=(h.model,),
            packages=("torch",),
        )
        for name, h in HEADS.items()
    )
    preparations: tuple[Preparation, ...] = ()

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        import torch

        self._torch = torch
        [source] = self.sources(directive, settings)
        path = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        self.name, self.revision = directive, file_revision(path)
        head = HEADS[directive]
        tensors = load_tensors(path, "head on a model's features")
        try:
            self._head = _Linears(tensors, head.layers) if head.layers else _Nsfw(tensors)
        except (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
            line = " ".join(str(error).split())[:300]
            raise InfrastructureError(
                f"{directive}: {path} holds other weights than its network has: {line}"
            ) from error
        self._head.move(settings.device)
        self.needs = (f"{short_name(head.model)}-image",)
        self.widths = {self.needs[0]: self._head.width}
        self.columns = (Column(head.column.format(directive), "float32"),)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        """Its file, or the user's."""
        head = HEADS[directive]
        found = settings.source(head.source)
        if found is None:
            raise InfrastructureError(
                f"{directive}: its weights are not here, and nobody publishes their digest.  Get {head.url} and name "
                f"the file: --weights {directive}=/path/{head.url.rpartition('/')[2]}"
            )
        return [found]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """In float32, whatever the features were computed in."""
        features = self._torch.as_tensor(batch.features[self.needs[0]])
        with self._torch.inference_mode():
            scores = self._head(features)
        return {self.columns[0].name: scores.cpu().numpy()}

    def close(self) -> None:
        self._head = None  # type: ignore[assignment]


class _Linears:
    """Linear layers one after the other.  width: numbers of a feature that the first one takes."""

    def __init__(self, tensors: Mapping[str, Any], layers: tuple[str, ...]) -> None:
        from torch.nn.functional import linear

        names = [(f"{layer}weight", f"{layer}bias") for layer in layers]
        if unknown := sorted(tensors.keys() - {name for pair in names for name in pair}):
            raise ValueError(f"tensors that it has no place for: {', '.join(map(str, unknown[:3]))}")
        if missing := [name for pair in names for name in pair if name not in tensors]:
            raise ValueError(f"it lacks {', '.join(missing[:3])}")
        self._linear = linear
        self._layers = [(tensors[weight].float(), tensors[bias].float()) for weight, bias in names]
        self.width = inputs = int(self._layers[0][0].shape[-1])
        for (weight, bias), (name, _) in zip(self._layers, names, strict=True):
            if weight.ndim != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
                raise ValueError(f"{name} has {tuple(weight.shape)} numbers and its bias {tuple(bias.shape)}")
            inputs = int(weight.shape[0])
        if inputs != 1:
            raise ValueError(f"it ends with {inputs} numbers, not with one")

    def move(self, device: str) -> None:
        self._layers = [(weight.to(device), bias.to(device)) for weight, bias in self._layers]

    def __call__(self, features: Any) -> Any:
        found = features.to(self._layers[0][0].device).float()
        for weight, bias in self._layers:
            found = self._linear(found, weight, bias)
        return found[:, 0]


class _Nsfw:
    """768 → 64 → 512 → 256 → 1 between ReLUs, a normalisation before and a sigmoid behind."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        from torch import nn

        self.width = 768
        self._network = nn.Sequential(
            OrderedDict(
                norm=nn.BatchNorm1d(self.width, eps=0.0),
                dense=nn.Linear(self.width, 64),
                relu=nn.ReLU(),
                dense1=nn.Linear(64, 512),
                relu1=nn.ReLU(),
                dense2=nn.Linear(512, 256),
                relu2=nn.ReLU(),
                dense3=nn.Linear(256, 1),
                sigmoid=nn.Sigmoid(),
            )
        ).eval()
        self._network.load_state_dict(tensors)

    def move(self, device: str) -> None:
        self._network = self._network.to(device)

    def __call__(self, features: Any) -> Any:
        weights = self._network.dense.weight
        return self._network(features.to(weights.device, weights.dtype))[:, 0]
