"""``dedup-isc-ft-v107``: a descriptor that copies of a picture share, and how near the nearest of given pictures is.

The winner of the image-similarity challenge's descriptor track (Yokoo 2021, arXiv:2104.13298), as DataComp uses it to
find its evaluation sets' pictures: 512 × 512, 256 numbers of length one, the score the largest cosine.

The network of the image-similarity challenge's descriptor: EfficientNetV2, pooling, 256 numbers of length one.

EfficientNetV2 is Tan and Le 2021 (arXiv:2104.00298) in TensorFlow's variant ("same" padding, ε = 0.001); tensors have
the names that timm gives them, as in the published file.  Depths and widths are the tensors' own, so that the sizes S,
M, L and XL load alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.backends.extract.layers import NamedTensors, built, has_16_bits
from curation.backends.extract.pictures import Normalise, Squeeze
from curation.errors import InfrastructureError, UsageError
from curation.extract.api import Batch, Column, Directive, Extractor, Feature, Preparation
from curation.extract.settings import ModelSettings, WeightSource, file_revision, load_tensors
from curation.libraries import np
from curation.models.weights import fetch_weights

STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the stages; S has the first six


_EPSILON = 1e-3


_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.(\d+)\.")


_TRIAL_SIDE = 64


class IscNetwork:
    """Pictures (samples × 3 × side × side, −1 to 1) → descriptors of length one."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """tensors: under the published names, or those of the wrapper that it was trained in.

        Raises KeyError, ValueError or RuntimeError where they are of no such network.
        """
        import torch

        self._functional = torch.nn.functional
        self._layers = NamedTensors({name.removeprefix("module."): tensor for name, tensor in tensors.items()})
        found = {(int(m[1]), int(m[2])) for name in self._layers.names() if (m := _BLOCK.match(name))}
        self._blocks = sorted(found)
        if not found or max(found)[0] >= len(STRIDES):
            raise ValueError("no blocks of EfficientNetV2, which has six or seven stages")
        self.width = int(self._layers["fc.weight"].shape[0])
        with torch.inference_mode():
            self(torch.zeros(1, 3, _TRIAL_SIDE, _TRIAL_SIDE))  # tensors of another shape are told now
        if unused := self._layers.unused():
            raise ValueError(f"tensors that it has no place for: {', '.join(unused[:3])}")

    def move(self, device: str, dtype: Any) -> None:
        self._layers.move(device, dtype)

    def __call__(self, pictures: Any) -> Any:
        layers = self._layers
        x = layers.convolution("backbone.conv_stem", pictures, 2, same=True)
        x = self._functional.silu(layers.batch_norm("backbone.bn1", x, _EPSILON))
        for stage, block in self._blocks:
            x = self._block(f"backbone.blocks.{stage}.{block}", x, STRIDES[stage] if block == 0 else 1)
        # GeM pooling with p = 1, which is what upstream's create_model takes for inference: a mean.
        pooled = x.clamp(min=1e-6).mean((2, 3))
        return self._functional.normalize(layers.batch_norm("bn", layers.linear("fc", pooled)))

    def _block(self, name: str, x: Any, stride: int) -> Any:
        """Any of the three kinds; which convolutions it has is which tensors there are."""
        if f"{name}.conv.weight" in self._layers:
            order = ["conv"]
        elif f"{name}.conv_exp.weight" in self._layers:
            order = ["conv_exp", "conv_pwl"]
        else:
            order = ["conv_pw", "conv_dw", "conv_pwl"]
        strided = "conv_dw" if "conv_dw" in order else order[0]
        y = x
        for number, part in enumerate(order, 1):
            if part == "conv_pwl" and f"{name}.se.conv_reduce.weight" in self._layers:
                y = self._gated(f"{name}.se", y)
            own = stride if part == strided else 1
            y = self._layers.convolution(f"{name}.{part}", y, own, same=True, is_depthwise=part == "conv_dw")
            y = self._layers.batch_norm(f"{name}.bn{number}", y, _EPSILON)
            if part != "conv_pwl":
                y = self._functional.silu(y)
        return x + y if stride == 1 and x.shape[1] == y.shape[1] else y

    def _gated(self, name: str, x: Any) -> Any:
        """Squeeze and excite."""
        squeezed = self._layers.convolution(f"{name}.conv_reduce", x.mean((2, 3), keepdim=True))
        return x * self._layers.convolution(f"{name}.conv_expand", self._functional.silu(squeezed)).sigmoid()


SIDE = 512


WEIGHTS_URL = "https://github.com/lyakaap/ISC21-Descriptor-Track-1st/releases/download/v1.0.1/isc_ft_v107.pth.tar"


# Where upstream's package downloads it to; nobody publishes its digest, so that this project fetches it only with one.
UPSTREAM_CACHE = Path("~/.cache/torch/hub/isc_ft_v107.pth.tar")


EMBEDDINGS = WeightSource(
    "https://github.com/mlfoundations/dataset2metadata/releases/download/v0.1.0-alpha/eval_dedup_embeddings.pt",
    "18aeb08e1d53638761e05ac95254a2ef49653bfdb59a631c9304117ceef23d14",
)


NO_EMBEDDINGS = "none"


_ROWS_AT_ONCE = 1 << 16  # of the embeddings: 64 MB of scores for a batch of 256


class Backend(Extractor):
    """The network, and the embeddings that pictures are compared with."""

    directives = (
        Directive(
            "dedup-isc-ft-v107",
            ("{}-score",),
            ("{}-image",),
            "ISC21's release, named by you",
            "MIT",
            0.0526,
            packages=("torch",),
        ),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        import torch

        self._torch = torch
        weights, *embeddings = self.sources(directive, settings)
        path = fetch_weights(weights.source, weights.sha256, settings.cache, name=directive)
        self.name, self.revision = directive, file_revision(path)
        saved = load_tensors(path, "descriptor network")
        network = built(lambda found: IscNetwork(found.get("state_dict", found)), saved, directive, path)
        dtype = settings.torch_dtype()
        network.move(settings.device, dtype)
        self._network: Any = network
        self._crop = Squeeze(SIDE)
        half = (0.5,) * 3
        self._normalise = Normalise(half, half, settings.device, dtype, channels_last=has_16_bits(dtype))
        self.preparations: tuple[Preparation, ...] = (self._crop,)
        self.features = (Feature(f"{directive}-image", network.width),)
        self.columns: tuple[Column, ...] = ()
        for source in embeddings:
            file = fetch_weights(source.source, source.sha256, settings.cache, name="embeddings")
            rows = torch.from_numpy(read_embeddings(file, network.width))
            self._others: Any = rows.to(settings.device)
            self.columns = (Column(f"{directive}-score", "float32"),)
            self.revision += f" embeddings {file_revision(file)}"

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        """Its weights, and the embeddings if any."""
        found = settings.source(WeightSource(str(UPSTREAM_CACHE)) if UPSTREAM_CACHE.expanduser().is_file() else None)
        if found is None:
            raise InfrastructureError(
                f"{directive}: its weights are not here.  Get {WEIGHTS_URL} and name the file in `weights`, "
                f"or put it at {UPSTREAM_CACHE}"
            )
        if settings.embeddings == NO_EMBEDDINGS:
            return [found]
        if settings.embeddings is None:
            return [found, EMBEDDINGS]
        return [found, WeightSource(settings.embeddings, settings.embeddings_sha256)]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """Descriptors; and for each its largest cosine with any of the embeddings."""
        torch = self._torch
        with torch.inference_mode():
            found = self._network(self._normalise(batch.device_tensor(self._crop))).float()
            found = found / found.norm(dim=1, keepdim=True)
            computed = {self.features[0].name: found}
            if self.columns:
                nearest = torch.full((len(found),), -torch.inf, device=found.device)
                for rows in self._others.split(_ROWS_AT_ONCE):
                    nearest = torch.maximum(nearest, (found @ rows.T).amax(1))
                computed[self.columns[0].name] = nearest.cpu().numpy()
        return computed

    def close(self) -> None:
        self._network = self._others = None


def read_embeddings(path: Path, width: int) -> Any:
    """rows × width float32 of length one, from .npy, .npz (its only array) or .pt; nothing in the file is run.

    Raises UsageError where it holds something else, InfrastructureError where it cannot be read.
    """
    try:
        if path.suffix == ".npy":
            rows = np.load(path, allow_pickle=False, mmap_mode="r")
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                if len(arrays.files) != 1:
                    raise UsageError(f"{path}: one array of embeddings is due, it holds {', '.join(arrays.files[:9])}")
                rows = arrays[arrays.files[0]]
        else:
            rows = load_tensors(path, "tensor of embeddings")
            rows = rows.float().numpy() if hasattr(rows, "numpy") else rows
        rows = np.asarray(rows, np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise InfrastructureError(f"{path}: no embeddings that can be read ({error})") from error
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) == 0:
        raise UsageError(f"{path}: embeddings are rows of {width} numbers, this is {rows.dtype} {rows.shape}")
    if not np.isfinite(rows).all():
        raise UsageError(f"{path}: embeddings with numbers that are not finite")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, 1e-12)
