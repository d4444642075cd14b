"""Stage 04 --blur_faces: faces cannot be recognised any more, all else stays as it was."""

from __future__ import annotations

import hashlib
import importlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from curation.images import decode_rgb, written_format
from curation.tar.samples import read_samples
from tests import EXAMPLES
from tests.shards import member, tar_of
from tests.stages.test_stage_04_regroup import Regroup, members_of, put_subset, run, uid
from tests.stages.test_stage_04_reshard import EDIT, tar_of_edits

__all__ = ["run"]  # the fixture

BOX = [0.25, 0.25, 0.5, 0.625]
WIDTH, HEIGHT = 200, 160
stage_04 = importlib.import_module("04_reshard")


def noise(format: str = "JPEG") -> bytes:
    pixels = (
        np.random.default_rng(0).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 1), np.uint8).repeat(3, 2)
    )  # JPEG halves colours
    file = io.BytesIO()
    Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST).save(file, format, quality=98)
    return file.getvalue()


def put(run: Regroup, boxes: dict[str, object], suffix: str = "jpg", image: bytes | None = None) -> None:
    """One sample for each; its face_bboxes are the value, absent for ...."""
    parts = []
    for number, (key, value) in enumerate(boxes.items()):
        told = {"uid": uid(number), "caption": "x", "sha256": "raw"} | ({} if value is ... else {"face_bboxes": value})
        parts += [member(f"{key}.{suffix}", noise() if image is None else image)]
        parts += [member(f"{key}.json", json.dumps(told, indent=4).encode()), member(f"{key}.txt", b"x")]
    run.put("shards/0.tar", tar_of(parts))


def expected(pixels: np.ndarray, boxes: list[list[float]]) -> np.ndarray:
    """The same by another way: as DataComp's tools are described, with SciPy's Gaussian."""
    mask = np.zeros(pixels.shape[:2], np.float64)
    largest = 0
    for x0, y0, x1, y1 in boxes:
        left, top, right, bottom = int(x0 * WIDTH), int(y0 * HEIGHT), int(x1 * WIDTH), int(y1 * HEIGHT)
        longer = max(right - left, bottom - top)
        largest = max(largest, longer)
        grown = 0.1 * longer
        mask[max(0, int(top - grown)) : int(bottom + grown), max(0, int(left - grown)) : int(right + grown)] = 1
    sigma = 0.1 * largest
    soft = gaussian_filter(mask, sigma, truncate=4, mode="mirror")[:, :, None]
    smooth = np.stack(
        [gaussian_filter(pixels[:, :, c].astype(float), sigma, truncate=4, mode="mirror") for c in range(3)], 2
    )
    return pixels * (1 - soft) + smooth * soft


def test_recorded_faces_are_blurred_and_nothing_else_is_touched(run: Regroup) -> None:
    put(run, {"face": [[*BOX, 0.9]], "none": [], "unknown": ..., "failed": None, "edited": [BOX]})
    run.put("edits/0.tar", tar_of_edits(["edited"]))
    assert run("--blur_faces", "recorded", "--verify") == 0
    old, new = (dict(members_of([run.root / f"{folder}/0.tar"])) for folder in ("shards", "hybrid"))
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"face.jpg", "face.json", "edited.jpg", "edited.json", "edited.txt"}
    samples = {sample.key: sample.members for sample in read_samples(run.root / "hybrid/0.tar")}
    assert samples["edited"]["jpg"] == EDIT["jpg"] + b"edited"  # a generated face is nobody's
    told = json.loads(samples["face"]["json"])
    assert told["sha256"] == hashlib.sha256(samples["face"]["jpg"]).hexdigest()
    assert told["face_bboxes"] == [BOX]
    assert (told["uid"], told["caption"], told["width"], told["height"]) == (uid(0), "x", WIDTH, HEIGHT)
    blur = told["curation"]["blur"]
    assert (blur["boxes"], blur["original_sha256"], blur["original_face_bboxes"]) == ("recorded", "raw", [[*BOX, 0.9]])
    notes, counts = run.receipt()["notes"], run.receipt()["counts"]
    assert (notes["blurred"], notes["edited"], counts["kept"]) == (1, 1, 5)
    assert "2 samples do not say whether they show a face: not blurred" in run.log


@pytest.mark.parametrize("boxes", [[BOX], [[0.0, 0.0, 0.3, 0.3]], [BOX, [0.7, 0.8, 1.0, 1.0]]])
def test_the_blur_is_datacomps_kernel(run: Regroup, boxes: list[list[float]]) -> None:
    put(run, {"face": boxes})
    assert run("--blur_faces", "recorded") == 0
    (sample,) = read_samples(run.root / "hybrid/0.tar")
    before, after = decode_rgb(noise()), decode_rgb(sample.members["jpg"]).astype(float)
    wanted = expected(before, boxes)
    assert np.abs(after - wanted).mean() < 3  # JPEG's loss
    for x0, y0, x1, y1 in boxes:
        face = slice(int(y0 * HEIGHT), int(y1 * HEIGHT)), slice(int(x0 * WIDTH), int(x1 * WIDTH))
        assert after[face].std() < 0.5 * before[face].std()


@pytest.mark.parametrize(("wanted", "suffix"), [("source", "png"), ("keep", "jpg"), ("webp", "webp")])
def test_a_blurred_picture_has_the_format_of_its_name_and_copies_are_blurred_too(
    run: Regroup, wanted: str, suffix: str
) -> None:
    put(run, {"face": [BOX], "none": []}, "png", noise("PNG"))
    flags = ["--image_suffix", wanted, "--blur_faces", "recorded", "--subset"]
    assert run(*flags, put_subset(run, [0, 0, 1]), "--shard_size", "2", "--verify") == 0
    samples = [s for path in run.tars() for s in read_samples(path)]
    assert [(s.key, s.suffixes) for s in samples] == [
        ("face-0", (suffix, "json", "txt")), ("face-1", (suffix, "json", "txt")), ("none", ("png", "json", "txt"))
    ]  # fmt: skip
    assert samples[0].members == samples[1].members
    assert written_format(samples[0].members[suffix]) == suffix
    assert decode_rgb(samples[0].members[suffix]).shape == (HEIGHT, WIDTH, 3)
    told = json.loads(samples[0].members["json"])
    assert told["sha256"] == hashlib.sha256(samples[0].members[suffix]).hexdigest()


def test_what_cannot_be_blurred_does_not_go_on(run: Regroup) -> None:
    put(run, {"huge": [[-1e300, 0, 1e300, 2]], "nan": [[0, 0, 1]], "text": "no list", "inside_out": [[1, 1, 0, 0]]})
    assert run("--blur_faces", "recorded", "--max_error_rate", "1") == 0
    assert run.rejects() == dict.fromkeys(("huge", "nan", "text", "inside_out"), "bad_face_bboxes")
    assert run.receipt()["notes"]["blurred"] == 0
    put(run, {"face": [BOX], "none": []}, image=b"\xff\xd8\xff no image")
    assert run("--blur_faces", "recorded", "--max_error_rate", "1") == 0
    assert [*run.rejects().values()] == ["undecodable"]  # nobody looked at the other one's
    assert run.keys() == {"0": ["none"]}


def test_blurred_counts_faces_and_boxes_without_area_are_none(run: Regroup) -> None:
    point, outside = [0.5, 0.5, 0.5, 0.9], [-0.4, 0, -0.1, 1]
    put(
        run,
        {"two": [BOX, [0.7, 0.8, 1.0, 1.02]], "one": [point, BOX], "none": [point, outside], "pixels": [[0, 0, 9, 9]]},
    )
    assert run("--blur_faces", "recorded", "--max_error_rate", "1") == 0
    notes = run.receipt()["notes"]
    assert (notes["blurred"], notes["blurred_samples"], notes["boxes_without_area"]) == (3, 2, 3)
    assert "3 recorded face boxes have no area in the picture: ignored" in run.log
    assert "0 replaced, 1 copied, 2 blurred (3 faces), 1 left out" in run.log.splitlines()[-1]
    old, new = (dict(members_of([run.root / f"{folder}/0.tar"])) for folder in ("shards", "hybrid"))
    assert new["none.jpg"] == old["none.jpg"]
    assert "pixels.jpg" not in new


@pytest.mark.parametrize(("width", "height"), [(60_000, 2), (2, 60_000), (20_000, 1000)])
def test_a_very_long_picture_is_blurred_within_bounds(
    run: Regroup, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    """The kernel of OpenCV would have 48,001 pixels for the first: 34 GB."""
    import cv2

    kernels: list[int] = []
    blur = cv2.GaussianBlur
    monkeypatch.setattr(
        cv2, "GaussianBlur", lambda image, size, sigma: kernels.append(max(size)) or blur(image, size, sigma)
    )
    stripes = np.zeros((height, width, 3), np.uint8)
    stripes[:: 4 if height > width else 1, :: 4 if width > height else 1] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    put(run, {"long": [[0, 0, 1, 1]]}, "png", file.getvalue())
    assert run("--blur_faces", "recorded") == 0
    (sample,) = read_samples(run.root / "hybrid/0.tar")
    after = decode_rgb(sample.members["png"])
    assert after.shape == stripes.shape
    assert after.std() < 6
    assert max(kernels) < 500


def test_a_picture_that_cannot_be_blurred_costs_its_sample(run: Regroup, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate 11.2 GiB")

    put(run, {"face": [BOX], "none": []})
    monkeypatch.setattr(cv2, "GaussianBlur", full)
    assert run("--blur_faces", "recorded", "--max_error_rate", "1") == 0
    assert run.rejects() == {"face": "blur_failed"}
    assert run.keys() == {"0": ["none"]}


def test_detected_faces_are_blurred(run: Regroup) -> None:
    pytest.importorskip("onnxruntime")
    (run.root / "shards").mkdir()
    (run.root / "shards/00000000.tar").symlink_to(EXAMPLES / "00000000.tar")
    assert run("--blur_faces", "centerface") == 0
    old, new = (dict(members_of(sorted((run.root / folder).glob("*.tar")))) for folder in ("shards", "hybrid"))
    changed = {name.rpartition(".")[0] for name in old if name.endswith(".jpg") and old[name] != new.get(name)}
    assert 1 <= len(changed) < 15
    told = [json.loads(s.members["json"]) for path in run.tars() for s in read_samples(path) if s.key in changed]
    assert {one["curation"]["blur"]["boxes"] for one in told} == {"centerface"}
    assert all(len(one["face_bboxes"]) >= 1 for one in told)
