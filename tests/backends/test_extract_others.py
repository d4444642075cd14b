"""Faces, copies, hashes, language and sizes: against what other people's code answers to the same inputs.

The references were recorded by tests/backends/extractor_references.py in an environment that has that code.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from curation.backends.extract import hashes, isc, language, nudenet, scrfd, sscd, statistics
from curation.backends.extract.isc import IscNetwork
from curation.backends.extract.scrfd import MAX_SQUARE_SIDE, WhiteSquare
from curation.backends.faces import centerface
from curation.errors import InfrastructureError, UsageError
from curation.extract.api import SampleFacts
from curation.extract.settings import ModelSettings
from curation.models.onnx_torch import UnknownGraph
from tests.backends import tiny_extractors as tiny
from tests.backends.scrfd_from_centerface import build_scrfd
from tests.backends.tiny_extractors import SampleBatch

REFERENCES = json.loads((Path(__file__).resolve().parents[1] / "data" / "extractor_references.json").read_bytes())
PICTURES = ((1, 300, 200), (2, 101, 333), (3, 640, 480), (4, 50, 700), (5, 224, 224))
PHOTOS = tuple(f"0000000100{number}.jpg" for number in ("19", "22", "27", "28", "36", "38", "00", "03"))
ISC = "dedup-isc-ft-v107"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_scrfd(folder / "scrfd.pt")
    tiny.save_isc(folder / "isc.pth.tar")
    build_scrfd(centerface.Backend.model_file(), folder / "scrfd.onnx")
    return folder


@pytest.fixture(scope="module")
def photos() -> list[Any]:
    shard = sorted((Path(__file__).resolve().parents[2] / "examples" / "shards").glob("*.tar"))[1]
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(name) for name in PHOTOS]
        return [np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")) for file in files if file]


def settings(weights: Path | str, **more: Any) -> ModelSettings:
    return ModelSettings(weights=str(weights), **more)


def pictures() -> SampleBatch:
    return SampleBatch([tiny.picture(*p) for p in PICTURES], [""] * len(PICTURES))


# ---- faces


def test_boxes_are_dataset2metadatas_own(models: Path) -> None:
    found = scrfd.Backend("faces-scrfd10g", settings(models / "scrfd.pt")).compute(pictures())["face-boxes"]
    for ours, theirs in zip(found, REFERENCES["scrfd"], strict=True):
        assert len(theirs) > 20
        assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-5


def test_boxes_of_an_onnx_file_are_within_a_pixel_of_insightfaces(models: Path, photos: list[Any]) -> None:
    from insightface.model_zoo.scrfd import SCRFD

    backend = scrfd.Backend("faces-scrfd10g", settings(models / "scrfd.onnx"))
    found = backend.compute(SampleBatch(photos, [""] * len(photos)))["face-boxes"]
    detector = SCRFD(model_file=str(models / "scrfd.onnx"))
    detector.prepare(-1, input_size=(224, 224), det_thresh=0.3, nms_thresh=0.45)
    compared = 0
    for photo, boxes in zip(photos, found, strict=True):
        square = WhiteSquare(224)(photo)
        theirs = np.asarray(detector.detect(np.ascontiguousarray(square[:, :, ::-1]))[0]).reshape(-1, 5)
        height, width = photo.shape[:2]
        longest = max(height, width)
        left, top = (longest - width) // 2, (longest - height) // 2
        edges = theirs[:, :4] * longest / 224 - [left, top, left, top]
        expected = edges.clip(0, [width, height, width, height])
        ours = np.array(boxes).reshape(-1, 4) * [width, height, width, height]
        assert ours.shape == expected.shape
        if len(ours):
            compared += len(ours)
            assert np.abs(ours - expected).max() < 1.0
    assert compared >= 3


def test_boxes_are_shares_of_the_picture_and_inside_it(models: Path) -> None:
    backend = scrfd.Backend("faces-scrfd10g", settings(models / "scrfd.pt"))
    for boxes in backend.compute(pictures())["face-boxes"]:
        found = np.array(boxes)
        assert found.min() >= 0
        assert found.max() <= 1
        assert (found[:, :2] <= found[:, 2:]).all()


def test_an_extreme_picture_does_not_become_an_extreme_square() -> None:
    assert WhiteSquare(224)(np.zeros((1, 50 * MAX_SQUARE_SIDE, 3), np.uint8)).shape == (224, 224, 3)


def test_an_exported_scrfd_in_torch_answers_as_onnxruntime(models: Path, tmp_path: Path) -> None:
    """As on a GPU, where it is computed so; on the CPU a picture at a time is faster."""
    file = tiny.save_scrfd_onnx(tmp_path / "exported.onnx")
    backend = scrfd.Backend("faces-scrfd10g", settings(file))
    assert type(backend._detector) is scrfd._Onnx
    expected = backend.compute(pictures())["face-boxes"]
    backend._detector = scrfd._OnnxInTorch(file, settings(file))
    found = backend.compute(pictures())["face-boxes"]
    assert sum(map(len, found)) > 20
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(np.subtract(ours, theirs)).max(initial=0) < 1e-5
    with pytest.raises(UnknownGraph, match="the operation "):
        scrfd._OnnxInTorch(models / "scrfd.onnx", settings(models / "scrfd.onnx"))


def test_a_file_that_is_no_scrfd_is_told(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="other weights than SCRFD's"):
        scrfd.Backend("faces-scrfd10g", settings(tiny.save_aesthetic_head(tmp_path / "a.pt")))
    with pytest.raises(InfrastructureError, match="4 outputs; SCRFD"):
        scrfd.Backend("faces-scrfd10g", settings(centerface.Backend.model_file()))


# ---- copies


def test_the_descriptor_network_is_timms_with_the_published_head() -> None:
    shapes = tiny.isc_shapes()
    listed = [f"{n} {s}" for n, s in sorted(shapes.items()) if n.startswith("backbone.")]
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest() == REFERENCES["isc"]["names"]
    network = IscNetwork(tiny.filled(shapes, 6))
    seen = np.stack([tiny.picture(seed, 97, 97) for seed in (1, 2)]).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        found = network(torch.from_numpy(seen.astype(np.float32) / 127.5 - 1))
    assert np.abs(found[:, :32].numpy() - REFERENCES["isc"]["descriptors"]).max() < 1e-5


def test_16_bits_put_the_channels_last_and_stay_near_the_reference(models: Path) -> None:
    """On the CPU in bfloat16, which it can compute; docs/stage-06.md has the command that measures real weights."""
    given = {"embeddings": "none"}
    exact, rough = (
        isc.Backend(ISC, settings(models / "isc.pth.tar", dtype=d, **given)) for d in ("float32", "bfloat16")
    )
    for backend, is_last in ((exact, False), (rough, True)):
        weight = backend._network._layers["backbone.conv_stem.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last) is is_last
        seen = backend._normalise(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
        assert seen.is_contiguous(memory_format=torch.channels_last) is is_last
        assert seen.is_contiguous() is not is_last
    found = [backend.compute(pictures())[f"{ISC}-image"] for backend in (exact, rough)]
    assert (found[0] * found[1]).sum(1).min() > 0.99
    faces = scrfd.Backend("faces-scrfd10g", settings(models / "scrfd.pt", dtype="bfloat16"))
    assert [len(boxes) > 10 for boxes in faces.compute(pictures())["face-boxes"]] == [True] * len(PICTURES)


def test_the_score_is_the_largest_cosine_with_any_of_the_embeddings(models: Path, tmp_path: Path) -> None:
    alone = isc.Backend(ISC, settings(models / "isc.pth.tar", embeddings="none"))
    assert alone.columns == ()
    descriptors = alone.compute(pictures())[f"{ISC}-image"].numpy()
    assert np.allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-6)
    others = np.random.default_rng(0).normal(size=(70_000, 256)).astype(np.float32)
    others[69_000] = 3 * descriptors[2]  # not of length one
    files = {"npy": tmp_path / "e.npy", "npz": tmp_path / "e.npz", "pt": tmp_path / "e.pt"}
    np.save(files["npy"], others)
    np.savez(files["npz"], others)
    torch.save(torch.from_numpy(others), files["pt"])
    expected = (descriptors @ (others / np.linalg.norm(others, axis=1, keepdims=True)).T).max(1)
    for file in files.values():
        backend = isc.Backend(ISC, settings(models / "isc.pth.tar", embeddings=str(file)))
        scores = backend.compute(pictures())[f"{ISC}-score"]
        assert np.allclose(scores, expected, atol=1e-5)
        assert scores[2] == pytest.approx(1, abs=1e-5)


def test_embeddings_that_are_none_are_told(tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.zeros((3, 8)))
    np.save(tmp_path / "nan.npy", np.full((3, 256), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros((1, 256)), b=np.zeros((1, 256)))
    for name, error in (("narrow.npy", "rows of 256"), ("nan.npy", "not finite"), ("two.npz", "one array")):
        with pytest.raises(UsageError, match=error):
            isc.read_embeddings(tmp_path / name, 256)
    for name in ("objects.npy", "missing.npy", "missing.pt"):
        with pytest.raises(InfrastructureError):
            isc.read_embeddings(tmp_path / name, 256)


def test_weights_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isc, "UPSTREAM_CACHE", tmp_path / "none")
    with pytest.raises(InfrastructureError, match="name the file in"):
        isc.Backend.sources(ISC, ModelSettings())


def test_sscds_descriptors_are_torchvisions_resnet_with_its_pooling(tmp_path: Path) -> None:
    listed = [f"{n} {s}" for n, s in sorted(tiny.sscd_shapes((3, 4, 6, 3), 512).items())]
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest() == REFERENCES["sscd"]["names"]
    file = tiny.save_sscd(tmp_path / "sscd.torchvision.pt")
    found = sscd.Backend("sscd", settings(file)).compute(pictures())["sscd-image"]
    assert np.abs(found.numpy() - REFERENCES["sscd"]["descriptors"]).max() < 1e-5
    one = SampleBatch([tiny.picture(*PICTURES[0])], [""])
    for dtype, cosine in (("float16", 0.9999), ("bfloat16", 0.999)):
        half = sscd.Backend("sscd", settings(file, dtype=dtype)).compute(one)["sscd-image"]
        assert half.dtype == torch.float32
        assert (half * found[:1]).sum() > cosine


def test_files_that_are_no_sscd_are_told_in_a_line(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"ends with \.torchvision\.pt"):
        sscd.Backend("sscd", settings(tiny.save_sscd(tmp_path / "a.torchscript.pt")))
    with pytest.raises(InfrastructureError, match="holds another network's weights") as raised:
        sscd.Backend("sscd", settings(models / "scrfd.pt"))
    assert "\n" not in str(raised.value)
    with pytest.raises(InfrastructureError, match="--weights sscd=/path/sscd_disc_mixup"):
        sscd.Backend.sources("sscd", ModelSettings())


# ---- without a model


def test_hashes_are_imagehashs(models: Path) -> None:
    backend = hashes.Backend("hashes", ModelSettings())
    shown = [tiny.picture(*p) for p in PICTURES] + [np.full((9, 9, 3), (1, 2, 3), np.uint8)]
    found = backend.compute(SampleBatch(shown, [""] * len(shown)))
    assert [list(pair) for pair in zip(found["phash"], found["dhash"], strict=True)] == REFERENCES["hashes"]


def test_language_is_stage_02s() -> None:
    backend = language.Backend("language", ModelSettings())
    found = backend.compute(SampleBatch([None] * 3, ["a photo of a cat on the sofa", "ein Hund auf der Wiese", "17"]))
    assert found["language"] == ["en", "de", "zxx"]
    assert min(found["language-probability"]) > 0.5


def test_statistics_are_null_where_there_is_nothing_to_count() -> None:
    count = statistics.Statistics()
    whole = count(SampleFacts("k", {}, "two words", b"12345", (300, 200)))
    assert whole == {
        "image-bytes": 5, "image-width": 300, "image-height": 200, "image-aspect": 1.5,
        "caption-words": 2, "caption-characters": 9,
    }  # fmt: skip
    assert count(SampleFacts("k", {}, None, b"", None)) == {}
    assert {c.name for c in statistics.Backend.columns} == set(whole)


# ---- NudeNet


def test_nudenet_sees_what_its_package_sees(photos: list[Any]) -> None:
    try:
        backend = nudenet.Backend("nudenet", ModelSettings())
    except InfrastructureError as error:
        pytest.skip(str(error))
    seen = []
    detect = nudenet.detections
    session, name = backend._session, backend._input
    for photo in photos:
        pixels = nudenet.CornerSquare()(photo)[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255
        seen.append(detect(session.run(None, {name: pixels})[0]))
    for ours, theirs in zip(seen, REFERENCES["nudenet"], strict=True):
        assert [label for label, _ in ours] == [label for label, _ in theirs]
        assert np.allclose([score for _, score in ours], [score for _, score in theirs], atol=0.03)
    found = backend.compute(SampleBatch(photos, [""] * len(photos)))
    counted = [[d for d in theirs if d[0] in nudenet.COUNTED] for theirs in REFERENCES["nudenet"]]
    assert found["nudenet-label"] == [d[0][0] if d else None for d in counted]


def test_without_the_package_nudenet_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match="pip install --no-deps nudenet"):
        nudenet.Backend.sources("nudenet", ModelSettings())
