"""``dedup-isc-ft-v107``: a descriptor that copies of a picture share, and how near the nearest of given pictures is.

The winner of the image-similarity challenge's descriptor track (Yokoo 2021, arXiv:2104.13298), as DataComp uses it to
find its evaluation sets' pictures: 512 × 512, 256 numbers of length one, the score the largest cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curation.backends.clip_preparation import Normalise, Squeeze
from curation.backends.isc_network import IscNetwork
from curation.errors import InfrastructureError, UsageError
from curation.extract.api import Batch, Column, Feature, Preparation
from curation.extract.settings import ModelSettings, WeightSource, file_revision, load_tensors
from curation.models.weights import fetch_weights

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


def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
    """What has to be on this machine before the model can be loaded: its weights, and the embeddings if any."""
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


class Backend:
    """The network, and the embeddings that pictures are compared with."""

    needs: tuple[str, ...] = ()

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        import torch

        self._torch = torch
        weights, *embeddings = sources(directive, settings)
        path = fetch_weights(weights.source, weights.sha256, settings.cache, name=directive)
        self.name, self.revision = directive, file_revision(path)
        saved = load_tensors(path, "descriptor network")
        try:
            network = IscNetwork(saved.get("state_dict", saved))
        except (KeyError, ValueError, IndexError, RuntimeError, TypeError, AttributeError) as error:
            line = " ".join(str(error).split())[:300]
            raise InfrastructureError(f"{directive}: {path} holds another network's weights: {line}") from error
        dtype = settings.torch_dtype()
        network.move(settings.device, dtype)
        self._network: Any = network
        self._crop = Squeeze(SIDE)
        self._normalise = Normalise((0.5,) * 3, (0.5,) * 3, settings.device, dtype)
        self.preparations: tuple[Preparation, ...] = (self._crop,)
        self.features = (Feature(f"{directive}-image", network.width),)
        self.columns: tuple[Column, ...] = ()
        for source in embeddings:
            file = fetch_weights(source.source, source.sha256, settings.cache, name="embeddings")
            rows = torch.from_numpy(read_embeddings(file, network.width))
            self._others: Any = rows.to(settings.device)
            self.columns = (Column(f"{directive}-score", "float32"),)
            self.revision += f" embeddings {file_revision(file)}"

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
