"""``sscd``: a descriptor that copies of a picture share, by SSCD (Pizzi et al. 2022, arXiv:2202.10261).

A ResNet (He et al. 2015, arXiv:1512.03385, with the stride in the 3 × 3 convolution), generalised mean pooling with
p = 3, a linear layer, length one.  Tensors have torchvision's names, as in the published ``.torchvision.pt`` files;
depths and widths are their own.  Cosines above 0.75 are copies at 90 % precision, say the authors of ``disc_mixup``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curation.backends.extract.layers import NamedTensors, built
from curation.backends.extract.pictures import Normalise, Squeeze
from curation.errors import InfrastructureError
from curation.extract.api import Batch, Column, Directive, Extractor, Feature, Preparation
from curation.extract.settings import ModelSettings, WeightSource, file_revision, load_tensors
from curation.models.weights import fetch_weights

SIDE = 320  # the authors' square, for batches

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchvision.pt"

_POWER, _LEAST = 3.0, 1e-6

_TRIAL_SIDE = 64


class SscdNetwork:
    """Pictures (samples × 3 × side × side, normalised) → descriptors of length one, in float32."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """Raises KeyError, ValueError or RuntimeError where the tensors are of no such network."""
        import torch

        self._functional = torch.nn.functional
        self._layers = NamedTensors(tensors)
        self._depths = [self._depth(stage) for stage in range(1, 5)]
        self.width = int(self._layers["backbone.fc.weight"].shape[0])
        with torch.inference_mode():
            self(torch.zeros(1, 3, _TRIAL_SIDE, _TRIAL_SIDE))  # tensors of another shape are told now
        if unused := self._layers.unused():
            raise ValueError(f"tensors that it has no place for: {', '.join(unused[:3])}")

    def _depth(self, stage: int) -> int:
        blocks = 0
        while f"backbone.layer{stage}.{blocks}.conv1.weight" in self._layers:
            blocks += 1
        return blocks

    def move(self, device: str, dtype: Any) -> None:
        self._layers.move(device, dtype)

    def __call__(self, pictures: Any) -> Any:
        relu, layers = self._functional.relu, self._layers
        x = relu(layers.batch_norm("backbone.bn1", layers.convolution("backbone.conv1", pictures, 2)))
        x = self._functional.max_pool2d(x, 3, 2, 1)
        for stage, depth in enumerate(self._depths, 1):
            for block in range(depth):
                x = self._block(f"backbone.layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
        # In float32: the third power of what 16 bits hold is beyond them.
        pooled = x.float().clamp(min=_LEAST).pow(_POWER).mean((2, 3)).pow(1 / _POWER)
        weight, bias = (layers[f"backbone.fc.{part}"].float() for part in ("weight", "bias"))
        return self._functional.normalize(self._functional.linear(pooled, weight, bias))

    def _block(self, name: str, x: Any, stride: int) -> Any:
        """With two convolutions, or with three around a narrow middle."""
        last = 3 if f"{name}.conv3.weight" in self._layers else 2
        y = x
        for number in range(1, last + 1):
            own = stride if number == last - 1 else 1
            y = self._layers.batch_norm(f"{name}.bn{number}", self._layers.convolution(f"{name}.conv{number}", y, own))
            if number < last:
                y = self._functional.relu(y)
        if f"{name}.downsample.0.weight" in self._layers:
            x = self._layers.convolution(f"{name}.downsample.0", x, stride)
            x = self._layers.batch_norm(f"{name}.downsample.1", x)
        return self._functional.relu(x + y)


class Backend(Extractor):
    """The network."""

    directives = (
        Directive(
            "sscd", (), ("{}-image",), "SSCD's release, named by you", "CC-BY-NC-4.0", 0.0246, packages=("torch",)
        ),
    )
    columns: tuple[Column, ...] = ()

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        [source] = self.sources(directive, settings)
        path = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        self.name, self.revision = directive, file_revision(path)
        if path.name.endswith((".torchscript.pt", ".classy.pt")):
            raise InfrastructureError(
                f"{directive}: {path} is a program or has Classy Vision's names; take the file of the same name that "
                "ends with .torchvision.pt"
            )
        saved = load_tensors(path, "descriptor network")
        network = built(SscdNetwork, saved, directive, path)
        dtype = settings.torch_dtype()
        network.move(settings.device, dtype)
        self._network: Any = network
        self._crop = Squeeze(SIDE)
        self._normalise = Normalise(MEAN, DEVIATION, settings.device, dtype)
        self.preparations: tuple[Preparation, ...] = (self._crop,)
        self.features = (Feature(f"{directive}-image", network.width),)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        found = settings.source(None)
        if found is None:
            raise InfrastructureError(
                f"{directive}: its weights are not here, and nobody publishes their digest.  Get {WEIGHTS_URL} and "
                f"name the file: --weights {directive}=/path/{WEIGHTS_URL.rpartition('/')[2]}"
            )
        return [found]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """Descriptors of length one."""
        import torch

        with torch.inference_mode():
            found = self._network(self._normalise(batch.device_tensor(self._crop)))
        return {self.features[0].name: found}

    def close(self) -> None:
        self._network = None
