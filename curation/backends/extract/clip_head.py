"""Small networks on the picture features of CLIP ViT-L/14: DataComp's NSFW classifier and the aesthetic predictor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curation.errors import InfrastructureError
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation
from curation.extract.settings import ModelSettings, WeightSource, file_revision, load_tensors
from curation.models.weights import fetch_weights

WIDTH = 768  # of ViT-L/14's features


_RELEASE = "https://github.com/mlfoundations/dataset2metadata/releases/download/v0.1.0-alpha/"


_AESTHETIC = "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/main/"


@dataclass(frozen=True, slots=True)
class _Head:
    """A directive's column and weights, and where those come from, in words."""

    column: str
    source: WeightSource
    origin: str
    licence: str
    parameters: float


HEADS = {
    "nsfw-image-oai-clip-vit-l-14": _Head(
        "nsfw-image-score",
        WeightSource(f"{_RELEASE}nsfw_torch.pt", "3c97d5478477c181bfa29a33e6933f710c8ec587e3c3551ff855e293acdaf390"),
        "dataset2metadata's release",
        "MIT",
        0.00022,
    ),
    "aesthetic": _Head(
        "aesthetic-score",
        WeightSource(
            f"{_AESTHETIC}sac%2Blogos%2Bava1-l14-linearMSE.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
        "improved-aesthetic-predictor",
        "Apache-2.0",
        0.00093,
    ),
}


class Backend(Extractor):
    """One head; it takes the features as they are stored, of length one, as upstream does."""

    directives = tuple(
        Directive(name, (head.column,), (), head.origin, head.licence, head.parameters) for name, head in HEADS.items()
    )
    needs: tuple[str, ...] = ("oai-clip-vit-l14-image",)
    preparations: tuple[Preparation, ...] = ()

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        import torch

        self._torch = torch
        [source] = self.sources(directive, settings)
        path = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        self.name, self.revision = directive, file_revision(path)
        head = _aesthetic() if directive == "aesthetic" else _nsfw()
        try:
            head.load_state_dict(load_tensors(path, "head on CLIP's features"))
        except (RuntimeError, TypeError, AttributeError) as error:
            line = " ".join(str(error).split())[:300]
            raise InfrastructureError(
                f"{directive}: {path} holds other weights than its network has: {line}"
            ) from error
        self._head = head.to(settings.device).eval()
        self.columns = (Column(HEADS[directive].column, "float32"),)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        default = HEADS[directive].source
        return [settings.source(default) or default]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """In float32, whatever the features were computed in."""
        features = self._torch.as_tensor(batch.features[self.needs[0]])
        with self._torch.inference_mode():
            weights = next(self._head.parameters())
            scores = self._head(features.to(weights.device, weights.dtype))[:, 0]
        return {self.columns[0].name: scores.cpu().numpy()}

    def close(self) -> None:
        self._head = None


def _nsfw() -> Any:
    """768 → 64 → 512 → 256 → 1 between ReLUs, a normalisation before and a sigmoid behind."""
    from torch import nn

    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm1d(WIDTH, eps=0.0),
            dense=nn.Linear(WIDTH, 64),
            relu=nn.ReLU(),
            dense1=nn.Linear(64, 512),
            relu1=nn.ReLU(),
            dense2=nn.Linear(512, 256),
            relu2=nn.ReLU(),
            dense3=nn.Linear(256, 1),
            sigmoid=nn.Sigmoid(),
        )
    )


def _aesthetic() -> Any:
    """768 → 1024 → 128 → 64 → 16 → 1, linear throughout; the numbers are those of the published file, whose dropouts
    (1, 3 and 5) do nothing at inference."""
    from torch import nn

    sizes = {0: (WIDTH, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = nn.ModuleDict({str(number): nn.Linear(*size) for number, size in sizes.items()})

    class Predictor(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, features: Any) -> Any:
            for layer in self.layers.values():
                features = layer(features)
            return features

    return Predictor()
