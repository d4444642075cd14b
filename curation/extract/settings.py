"""How an extractor's model is to be loaded: which weights, on what device, in which precision."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from curation.errors import InfrastructureError
from curation.extract.judging import JudgeSettings
from curation.models.hub_cache import TRANSFORMER
from curation.serving.pool import LONG, Waiting

Precision = Literal["auto", "half", "float32", "float16", "bfloat16"]


Resize = Literal["exact", "fast"]


Decode = Literal["cpu", "gpu"]  # where JPEGs are decoded and resized


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where weights come from when the user names no others.

    sha256: of one file behind a URL.  marker: a file that every model of this kind on the hub has.
    """

    source: str
    sha256: str | None = None
    marker: str = TRANSFORMER[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What ``Backend(directive, settings)`` is given.

    weights, sha256: in place of the directive's own; a path, a hub id, or a URL with its sha256.
    revision: of a hub id.
    embeddings, embeddings_sha256: of the images that near duplicates are looked for in, likewise.
    device: torch's name for it.  threads: of one session on the CPU.
    dtype: auto is what upstream computes in: float16 for CLIP on a GPU, float32 elsewhere.  half: float16 on a GPU,
    float32 on the CPU, whatever upstream does.
    resize: ``fast`` lets pictures be shrunk by cheaper means than upstream's.
    judge: Of a judge: whom to ask, and what.
    waiting: Of a judge: how long a request is sent again and again.
    cache: the folder that downloads stay in.
    """

    weights: str | None = None
    sha256: str | None = None
    revision: str | None = None
    embeddings: str | None = None
    embeddings_sha256: str | None = None
    device: str = "cpu"
    threads: int = 1
    dtype: Precision = "auto"
    resize: Resize = "exact"
    judge: JudgeSettings | None = None
    waiting: Waiting = LONG
    cache: Path = Path("~/.cache/curation/weights")

    def source(self, default: WeightSource | None) -> WeightSource | None:
        """The user's weights, or else the directive's own."""
        if self.weights is None:
            found = default
        else:
            found = WeightSource(self.weights, self.sha256, TRANSFORMER[0] if default is None else default.marker)
        if found is not None and self.revision and "@" not in found.source and not Path(found.source).exists():
            return replace(found, source=f"{found.source}@{self.revision}")
        return found

    @property
    def gpu(self) -> int | None:
        """The index of the device, None for the CPU, as ``models.onnx.open_session`` takes it."""
        return None if self.device == "cpu" else int(self.device.partition(":")[2] or 0)

    def torch_dtype(self, *, half_on_gpu: bool = False) -> Any:
        """The dtype that the model computes in.  half_on_gpu: whether upstream runs this one in float16 there."""
        import torch

        if self.dtype in ("auto", "half"):
            half = self.device != "cpu" and (half_on_gpu or self.dtype == "half")
            return torch.float16 if half else torch.float32
        return getattr(torch, self.dtype)


def file_revision(path: Path) -> str:
    """``sha256:`` and 16 hex digits of a file's content."""
    try:
        with open(path, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise InfrastructureError(f"{path}: cannot be read ({error.strerror})") from error


def load_tensors(path: Path, what: str) -> Any:
    """What torch.save wrote into ``path``, tensors and plain containers only: nothing in the file is run.

    An argparse.Namespace, which training scripts like to leave there, counts as one: it holds values and no code.
    """
    import argparse

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever a file that is none leads it to
        line = str(error).strip().partition("\n")[0][:200]
        raise InfrastructureError(f"{path}: no {what} that can be loaded safely ({line})") from error
