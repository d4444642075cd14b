"""How much an image looks watermarked: an ONNX classifier of two classes on the CPU, as upstream runs it.

256×256 pixels, ImageNet's mean and deviation, softmax; class 1 is "watermarked".  The weights of
boomb0om/watermark-detectors (ConvNeXt-tiny), exported to ONNX, fit.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.backends.onnx_sessions import open_session, read_weights
from curation.errors import InfrastructureError, UsageError
from curation.images import Pixels

SIDE = 256
CACHE = Path("~/.cache/curation")
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
MAX_WEIGHTS_BYTES = 4 << 30
_TIMEOUT_S = 30.0


class Backend:
    """The classifier of one ONNX file.  ``score`` may be called from several threads at once."""

    def __init__(self, path: Path) -> None:
        data, self.revision = read_weights(path)
        self._session, _ = open_session(data, path, threads=1, gpu=None)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise InfrastructureError(f"{path}: no classifier of images (it has {len(inputs)} inputs)")
        self._input = inputs[0].name

    def score(self, pixels: Pixels) -> float:
        """0 to 1, rounded to what a float32 tells."""
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        normal = (np.asarray(image, np.float32) / 255 - _MEAN) / _DEVIATION
        logits: Any = self._session.run(None, {self._input: normal.transpose(2, 0, 1)[None].astype(np.float32)})[0]
        logits = np.asarray(logits, np.float64).reshape(-1)
        if logits.size < 2:
            raise InfrastructureError("the watermark classifier gives one number an image, two are needed")
        weights = np.exp(logits - logits.max())
        return round(float(weights[1] / weights.sum()), 6)


def weights_file(place: str, sha256: str | None, cache: Path = CACHE) -> Path:
    """The classifier's file: ``place`` is a path, or an https:// URL whose content must have that sha256.

    A URL is fetched once into ``cache``.  Raises InfrastructureError where it is not there or is something else.
    """
    if not place.startswith(("https://", "http://")):
        path = Path(place).expanduser()
        if not path.is_file():
            raise InfrastructureError(f"--watermark_model {place}: no such file")
        if sha256 is not None and _sha256(path) != sha256.lower():
            raise InfrastructureError(f"--watermark_model {place}: its sha256 is not {sha256}")
        return path
    if sha256 is None:
        raise UsageError("--watermark_model by URL needs --watermark_sha256")
    path = cache.expanduser() / f"watermark-{sha256.lower()[:32]}.onnx"
    if not path.is_file() or _sha256(path) != sha256.lower():
        _fetch(place, sha256.lower(), path)
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, sha256: str, path: Path) -> None:
    import requests

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with requests.get(url, stream=True, timeout=_TIMEOUT_S) as response, open(temporary, "xb") as file:
            response.raise_for_status()
            for block in response.iter_content(1 << 20):
                size += len(block)
                if size > MAX_WEIGHTS_BYTES:
                    raise InfrastructureError(f"{url}: more than {MAX_WEIGHTS_BYTES:,} bytes")
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            raise InfrastructureError(f"{url}: its sha256 is {digest.hexdigest()}, not {sha256}")
        os.replace(temporary, path)
    except (requests.RequestException, OSError) as error:
        raise InfrastructureError(f"{url}: cannot be fetched: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
