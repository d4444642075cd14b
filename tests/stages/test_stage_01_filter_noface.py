"""Stage 01 on real photos, on hostile input, and after interruptions."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.cluster import visible_gpus
from tests import EXAMPLES, ROOT
from tests.processes import ended_at_last, wait_until
from tests.shards import member, plain, samples_of, tar_of
from tests.stages.harness import Run
from tests.test_images import huge_png

stage_01 = importlib.import_module("01_filter_noface")
NAME = "01_filter_noface"


# ---- running the stage and reading what it left


class Stage01(Run):
    """``root/shards`` → ``root/captions`` and ``root/edits``."""

    stage, script, output = NAME, stage_01, "captions"

    def arguments(self) -> list[str]:
        return [
            *["--input", f"{self.root}/shards", "--output", f"{self.root}/captions", "--edits", f"{self.root}/edits"],
            *["--threads", "1"],
        ]

    def add(self, shard: str, *samples: tuple[str, dict[str, bytes]]) -> Path:
        members = [member(f"{key}.{suffix}", data) for key, parts in samples for suffix, data in parts.items()]
        return self.put(f"shards/{shard}.tar", tar_of(members))

    def captions(self, shard: str = "00000000") -> dict[str, str]:
        return self.json(f"captions/{shard}.json")

    def edits(self, shard: str = "00000000") -> dict[str, Any]:
        return self.json(f"edits/{shard}.json")

    def files(self) -> dict[str, bytes]:
        return self.published("captions", "edits")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Stage01:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody's SCRFD
    return Stage01(tmp_path, capsys)


def example(run: Stage01, *shards: str) -> None:
    (run.root / "shards").mkdir()
    for shard in shards:
        os.link(EXAMPLES / f"{shard}.tar", run.root / "shards" / f"{shard}.tar")


def plain_jpeg(shade: int = 128) -> bytes:
    return plain((shade, shade, shade), 64, "JPEG")


FACE = [[0.1, 0.1, 0.4, 0.5]]


def sample(key: str, boxes: object = FACE, **members: bytes | None) -> tuple[str, dict[str, bytes]]:
    """A sample as DataComp has it; ``json=None`` leaves a member out."""
    metadata = {"uid": key, "face_bboxes": boxes, "caption": f"caption of {key}", "key": key}
    if boxes == "absent":
        del metadata["face_bboxes"]
    made = {"jpg": plain_jpeg(), "txt": f"text of {key}".encode(), "json": json.dumps(metadata, indent=4).encode()}
    merged = {**made, **members}
    return key, {suffix: data for suffix, data in merged.items() if data is not None}


# ---- recorded boxes


def test_recorded_boxes_decide_and_everything_is_written_as_it_was(run: Stage01) -> None:
    example(run, "00000001")
    assert run("--detector", "recorded") == 0
    source = {key: json.loads(members["json"]) for key, members in samples_of(EXAMPLES / "00000001.tar").items()}
    expected = {key: metadata for key, metadata in source.items() if metadata["face_bboxes"]}
    assert 0 < len(expected) < len(source)
    assert list(run.edits("00000001").items()) == [(f"{key}.json", metadata) for key, metadata in expected.items()]
    captions = [(f"{key}.json", " ".join(metadata["caption"].split())) for key, metadata in expected.items()]
    assert list(run.captions("00000001").items()) == captions
    assert run.drops("00000001") == {key: "no_face" for key in source if key not in expected}
    counts = run.receipt("00000001")["counts"]
    assert counts["in"] == len(source)
    assert counts["kept"] == len(expected)
    assert not list((run.root / "captions").rglob("*.jsonl")), "nothing failed, and nothing empty is written"


def test_boxes_in_pixels_are_rejected_and_one_without_area_is_no_face(run: Stage01) -> None:
    face, point = [0.1, 0.1, 0.4, 0.5], [0.3, 0.3, 0.3, 0.6]
    boxes = {"pixels": [[10, 6, 38, 32]], "swapped": [[0.4, 0.1, 0.1, 0.5]], "point": [point], "both": [point, face]}
    run.add("00000000", *[sample(key, boxes=value) for key, value in boxes.items()])
    assert run("--detector", "recorded", "--max_error_rate", "1") == 0
    assert run.rejects() == {"pixels": "bad_face_bboxes", "swapped": "bad_face_bboxes"}
    assert run.drops() == {"point": "no_face"}
    assert list(run.captions()) == ["both.json"]
    assert run.receipt()["notes"]["boxes_without_area"] == 2
    assert "1 samples with a face found" in run.log.splitlines()[-1]


def test_recorded_boxes_need_no_model_and_no_image(run: Stage01) -> None:
    """auto without SCRFD's weights: DataComp's own shards have every box recorded."""
    run.add("00000000", sample("a"), sample("b", jpg=None), sample("c", boxes=[]), sample("d", jpg=b"no image"))
    assert run() == 0
    assert list(run.captions()) == ["a.json", "b.json", "d.json"]
    assert run.drops() == {"c": "no_face"}


def test_null_and_absent_are_told_apart_from_empty(run: Stage01) -> None:
    run.add("00000000", sample("a"), sample("b", boxes=None), sample("c", boxes="absent"), sample("d", boxes=[]))
    assert run("--detector", "recorded", "--max_error_rate", "0.5") == 0
    reasons = run.rejects()
    assert reasons == {"b": "null_face_bboxes", "c": "absent_face_bboxes"}
    assert run.drops() == {"d": "no_face"}
    assert list(run.captions()) == ["a.json"]


def test_boxes_that_are_none_fail_the_sample(run: Stage01) -> None:
    run.add("00000000", sample("a"), sample("b", boxes="[]"), sample("c", boxes=[[1, 2]]), *map(sample, "defghijk"))
    assert run() == 0
    assert set(run.rejects().values()) == {"bad_face_bboxes"}
    assert set(run.rejects()) == {"b", "c"}


def test_min_faces_and_select(run: Stage01) -> None:
    run.add("00000000", sample("none", boxes=[]), sample("one"), sample("two", boxes=FACE * 2))
    assert run("--min_faces", "2") == 0
    assert list(run.captions()) == ["two.json"]
    assert run.drops() == {"none": "no_face", "one": "too_few_faces"}
    assert run("--min_faces", "2", "--select", "noface", "--rerun") == 0
    assert list(run.captions()) == ["none.json", "one.json"]
    assert run.drops() == {"two": "face"}


# ---- detectors


def test_without_scrfds_weights_auto_ends_with_one_clear_line(run: Stage01) -> None:
    run.add("00000000", sample("a", boxes=None))
    assert run() == 2
    (line,) = [line for line in run.log.splitlines() if line.startswith("error: ")]
    for part in ("det_10g.onnx", "non-commercial", "--embedded", "--detector centerface", "--model"):
        assert part in line
    assert not (run.root / "captions" / "00000000.json").exists()


def counted_by_eye(shard: str) -> dict[str, int]:
    with open(ROOT / "examples" / "truth.tsv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["key"]: int(row["faces"]) for row in rows if row["shard"] == shard and row["faces"] != "?"}


def test_the_embedded_detector_keeps_the_photos_on_which_people_count_faces(run: Stage01) -> None:
    example(run, "00000000", "00000004")
    assert run("--embedded", "--threads", "2") == 0
    wrong = total = 0
    for shard in ("00000000", "00000004"):
        kept = {name.removesuffix(".json") for name in run.captions(shard)}
        truth = counted_by_eye(shard)
        wrong += sum((faces > 0) != (key in kept) for key, faces in truth.items())
        total += len(truth)
        (path,) = (run.root / "captions" / "_provenance" / NAME).rglob(f"{shard}.jsonl")
        for line in map(json.loads, path.read_bytes().splitlines()):
            assert line["key"] in kept
            assert len(line["boxes"]) == line["faces"] >= 1
            assert all(0 <= value <= 1 for box in line["boxes"] for value in box)
            assert line["detector"] == "centerface"
            assert line["revision"].startswith("sha256:")
        for name, metadata in run.edits(shard).items():
            source = samples_of(EXAMPLES / f"{shard}.tar")[name.removesuffix(".json")]
            assert metadata == json.loads(source["json"]), "what was detected does not enter the metadata"
    assert total >= 20
    assert wrong <= 1
    assert set(run.receipt()["seconds"]) >= {"read", "decode", "infer"}


def test_auto_detects_only_where_nothing_is_recorded(run: Stage01) -> None:
    faces = {key for key, n in counted_by_eye("00000001").items() if n}
    picture = next(members["jpg"] for key, members in samples_of(EXAMPLES / "00000001.tar").items() if key in faces)
    run.add(
        "00000000",
        sample("recorded", jpg=plain_jpeg()),  # trusted, although there is nothing to be seen
        sample("trusted", boxes=[], jpg=picture),  # and so is this one
        sample("null", boxes=None, jpg=picture),
        sample("absent", boxes="absent", jpg=plain_jpeg()),
    )
    assert run("--embedded") == 0
    assert list(run.captions()) == ["recorded.json", "null.json"]
    assert run.drops() == {"trusted": "no_face", "absent": "no_face"}


def test_scrfd_through_insightface_and_its_agreement_with_recorded_boxes(run: Stage01) -> None:
    from tests.backends.scrfd_from_centerface import build_scrfd
    from tests.test_faces import _centerface_file

    example(run, "00000001")
    model = build_scrfd(_centerface_file(), run.root / "scrfd.onnx")
    assert run("--detector", "scrfd", "--model", str(model), "--threshold", "0.5") == 0
    recorded = {key for key, m in samples_of(EXAMPLES / "00000001.tar").items() if json.loads(m["json"])["face_bboxes"]}
    assert {name.removesuffix(".json") for name in run.captions("00000001")} == recorded
    assert f"agrees with the recorded boxes on {run.receipt('00000001')['counts']['in']} of" in run.log
    assert "blurred" not in run.log
    agreement = run.receipt("00000001")["notes"]["agreement"]
    assert agreement["both"] == len(recorded)
    assert agreement["kappa"] == 1


def test_scrfd_in_batches_finds_what_it_finds_one_by_one(run: Stage01) -> None:
    """The real network with random weights; samples that need no detector, and a broken one, lie between."""
    from tests.backends.tiny_extractors import save_scrfd_onnx

    photos = [members["jpg"] for members in samples_of(EXAMPLES / "00000001.tar").values() if "jpg" in members][:5]
    seen = [sample(f"{number}", boxes=None, jpg=photo) for number, photo in enumerate(photos)]
    run.add("00000000", seen[0], sample("recorded"), *seen[1:4], sample("x", boxes=None, jpg=b"no image"), seen[4])
    flags = ["--model", str(save_scrfd_onnx(run.root / "exported.onnx")), "--det_size", "224", "--threshold", "0.8"]
    assert run(*flags, "--max_error_rate", "1") == 0
    one_by_one, rejects = run.files(), run.rejects()
    assert 1 < len(run.captions()) < 6 and rejects == {"x": "undecodable"}
    assert run(*flags, "--max_error_rate", "1", "--rerun", "--batch_size", "2") == 0
    assert "on cpu, 2 images at once" in run.log
    assert run.files() == one_by_one and run.rejects() == rejects


def test_low_agreement_with_recorded_boxes_is_a_warning(run: Stage01) -> None:
    """Blurred faces: boxes are recorded, and a detector sees nothing."""
    blurred = [sample(f"{i:03}", jpg=plain_jpeg(i)) for i in range(12)]
    faceless = [sample(f"{i:03}", boxes=[], jpg=plain_jpeg(i)) for i in range(12, 24)]
    run.add("00000000", *blurred, *faceless)
    assert run("--detector", "centerface", "--det_size", "64", "--quiet") == 0
    assert "on 12 of 24 samples" in run.log
    assert "often blurred" in run.log
    assert run.captions() == {}
    assert any("often blurred" in warning for warning in run.receipt()["warnings"])


def test_bytes_do_not_depend_on_threads(run: Stage01, tmp_path: Path) -> None:
    example(run, "00000000")
    run.add("00000001", *[sample(f"{i:03}", boxes=None, jpg=b"x" if i % 9 == 0 else None) for i in range(30)])
    arguments = ["--embedded", "--det_size", "320", "--max_error_rate", "1"]
    assert run(*arguments) == 0
    first = run.files()
    assert run(*arguments, "--rerun", "--threads", "4") == 0
    assert run.files() == first


# ---- captions


@pytest.mark.parametrize(
    ("caption", "txt", "expected"),
    [
        ("two\nlines\r\nand\ttabs", None, "two lines and tabs"),
        ("  NUL \x00 and bell \x07 ", None, "NUL and bell"),
        ("lone \ud83d surrogate", None, "lone \ufffd surrogate"),
        ("x" * 100_000, None, "x" * 100_000),
        ("", b"the txt counts", "the txt counts"),
        ("", None, ""),
        (None, b"from the txt\n", "from the txt"),
        (7, "où est Zoë".encode(), "où est Zoë"),
        (None, b"not \xff UTF-8", "not \ufffd UTF-8"),
    ],
)
def test_captions_become_one_clean_line(run: Stage01, caption: object, txt: bytes | None, expected: str) -> None:
    metadata = {"face_bboxes": FACE, "caption": caption}
    if caption is None:
        del metadata["caption"]
    run.add("00000000", sample("a", json=json.dumps(metadata).encode(), txt=txt))
    assert run() == 0
    assert run.captions() == {"a.json": expected}
    whole = json.dumps(metadata).encode().replace(b"\\ud83d", b"\\ufffd")
    clean = json.loads(whole)
    assert run.edits() == {"a.json": clean}


# ---- bad input: the sample is named, conservation holds, the others come out


GOOD = [sample(f"good{i}", boxes=FACE if i % 2 else None) for i in range(8)]


def deep() -> bytes:
    return b'{"a":' * 100 + b"1" + b"}" * 100


LONG_CAPTION = b'{"face_bboxes": [[0, 0, 1, 1]], "caption": "' + b"x" * 2_000_000 + b'"}'
BAD_SAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "no json": ({"json": None}, "no_json"),
    "JSON that is not JSON": ({"json": b"{'caption': 1}"}, "bad_json"),
    "JSON that is cut": ({"json": b'{"caption": "x'}, "bad_json"),
    "JSON that is a list": ({"json": b"[1, 2]"}, "json_not_an_object"),
    "50 MB of JSON": ({"json": b'{"caption": "' + b"x" * 50_000_000 + b'"}'}, "json_too_large"),
    "JSON too deep": ({"json": deep()}, "json_too_deep"),
    "no image": ({"jpg": None, "boxes": None}, "no_image"),
    "an undecodable image": ({"jpg": b"<html>404</html>", "boxes": None}, "undecodable"),
    "a cut image": ({"jpg": plain_jpeg()[:-20], "boxes": None}, "undecodable"),
    "a zero-byte image": ({"jpg": b"", "boxes": None}, "empty_image"),
    "30,000 × 30,000 pixels": ({"jpg": huge_png(), "boxes": None}, "image_too_large"),
    "2 MB of caption": ({"json": LONG_CAPTION}, "caption_too_long"),
}


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_a_bad_sample_is_named_and_the_others_come_out(run: Stage01, what: str) -> None:
    changes, reason = BAD_SAMPLES[what]
    # Faces are recorded in every second good sample; the others are looked at, and show none.
    run.add("00000000", *GOOD[:4], sample("bad", **changes), *GOOD[4:])
    assert run("--embedded", "--det_size", "64") == 0
    assert run.rejects()["bad"] == reason
    assert list(run.captions()) == [f"good{i}.json" for i in (1, 3, 5, 7)]
    assert list(run.edits()) == list(run.captions())
    counts = run.receipt()["counts"]
    assert counts == {"in": 9, "kept": 4, "dropped": {"no_face": 4}, "failed": {reason: 1}}


def test_a_sample_without_any_caption(run: Stage01) -> None:
    metadata = json.dumps({"face_bboxes": FACE}).encode()
    run.add("00000000", *GOOD, sample("bad", json=metadata, txt=None))
    assert run("--embedded", "--det_size", "64") == 0
    (line,) = run.reject_lines()
    assert (line["key"], line["reason"], line["detail"]) == ("bad", "no_caption", "neither in the json nor as a txt")


def test_a_faceless_sample_needs_no_caption(run: Stage01) -> None:
    run.add("00000000", sample("a", json=b'{"face_bboxes": []}', txt=None))
    assert run() == 0
    assert run.drops() == {"a": "no_face"}


def test_the_second_of_two_samples_with_one_key_fails(run: Stage01) -> None:
    run.add("00000000", *GOOD[:3], sample("good1", boxes=FACE * 3), *GOOD[3:])
    assert run("--embedded", "--det_size", "64") == 0
    assert run.rejects()["good1"] == "duplicate_key"
    assert run.edits()["good1.json"]["face_bboxes"] == FACE
    assert run.receipt()["counts"]["in"] == 9


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/outside", "a/./../../b"])
@pytest.mark.parametrize("layout", ["tar", "files"])
def test_names_never_lead_outside(run: Stage01, key: str, layout: str) -> None:
    run.add("00000000", *GOOD[:4], sample(key), *GOOD[4:])
    before = set(run.root.parent.iterdir())
    assert run("--embedded", "--det_size", "64", "--edits_layout", layout) == 0
    assert run.rejects()[key] == "unsafe_name"
    assert list(run.captions()) == [f"good{i}.json" for i in (1, 3, 5, 7)]
    assert set(run.root.parent.iterdir()) == before
    assert not list(run.root.parent.rglob("outside*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_followed(run: Stage01, kind: bytes) -> None:
    path = run.add("00000000", *GOOD)
    with tarfile.open(path, "a") as tar:
        tar.addfile(member("bad.jpg", type=kind, linkname="../../target")[0])
        info, data = member("bad.json", sample("bad")[1]["json"])
        tar.addfile(info, io.BytesIO(data))
    assert run("--embedded", "--det_size", "64") == 0
    assert run.rejects()["bad"] == "not_a_file"
    assert "bad.json" not in run.captions()


def test_a_cut_tar_is_read_to_its_last_whole_sample(run: Stage01) -> None:
    path = run.add("00000000", *GOOD)
    with tarfile.open(path) as tar:
        cut = tar.getmember("good6.txt").offset_data + 3
    os.truncate(path, cut)
    assert run("--embedded", "--det_size", "64", "--max_error_rate", "0.5") == 0
    assert run.rejects()["good6"] == "damaged_tar"
    assert list(run.captions()) == ["good1.json", "good3.json", "good5.json"]
    assert "00000000.tar" in run.log


def test_too_much_damage_fails_the_shard_and_the_others_are_done(run: Stage01) -> None:
    path = run.add("00000000", *GOOD)
    path.write_bytes(np.random.default_rng(0).bytes(20_000))
    run.add("00000001", *GOOD)
    assert run("--embedded", "--det_size", "64") == 1
    assert run.receipt("00000000")["status"] == "failed"
    assert run.receipt("00000001")["status"] == "done"
    assert len(run.captions("00000001")) == 4


def test_garbage_in_the_middle_costs_no_sound_sample(run: Stage01) -> None:
    path = run.add("00000000", *GOOD)
    with tarfile.open(path) as tar:
        header = tar.getmember("good4.jpg").offset
        end = tar.getmember("good5.jpg").offset
    data = bytearray(path.read_bytes())
    data[header:end] = np.random.default_rng(0).bytes(end - header)
    path.write_bytes(data)
    assert run("--embedded", "--det_size", "64", "--max_error_rate", "0.5") == 0
    assert list(run.captions()) == ["good1.json", "good3.json", "good5.json", "good7.json"]
    assert set(run.rejects().values()) == {"damaged_tar"}
    assert "damaged" in run.log


def test_an_empty_shard_is_done_with_a_warning(run: Stage01) -> None:
    run.add("00000000")
    assert run() == 0
    assert run.captions() == run.edits() == {}
    assert run.receipt()["counts"]["in"] == 0
    assert run.log.count("no samples") == 1
    assert "00000000.tar" in run.log


# ---- loose files


def test_loose_files_beside_the_dictionary(run: Stage01) -> None:
    run.add(
        "00000000", sample("a"), sample("folder/b"), sample("c", boxes=[]), sample("with.json/d"), *map(sample, "efgh")
    )
    assert run("--edits_layout", "files") == 0
    loose = run.root / "edits" / "00000000"
    found = {str(path.relative_to(loose)) for path in loose.rglob("*") if path.is_file()}
    assert found == {"a.json", "folder/b.json", *(f"{key}.json" for key in "efgh")}
    for name in found:
        assert json.loads((loose / name).read_bytes()) == run.edits()[name]
    assert run.rejects()["with.json/d"] == "unsafe_name"


def test_the_tar_layout_leaves_one_file_a_shard(run: Stage01) -> None:
    run.add("00000000", *map(sample, "abcdefgh"))
    assert run() == 0
    assert [path.name for path in (run.root / "edits").iterdir() if not path.name.startswith("_")] == ["00000000.json"]


# ---- again, and after interruptions


def count_detections(monkeypatch: pytest.MonkeyPatch, fail_at: int = 10**9) -> list[int]:
    """Counts what the detector looks at; raises at the given call."""
    from curation.backends.faces import centerface

    calls: list[int] = []
    original: Callable[..., Any] = centerface.Backend.detect

    def detect(self: Any, rgb: Any) -> Any:
        calls.append(1)
        if len(calls) == fail_at:
            raise RuntimeError("pulled the plug")
        return original(self, rgb)

    monkeypatch.setattr(centerface.Backend, "detect", detect)
    return calls


def test_a_finished_stage_does_nothing_and_loads_nothing(run: Stage01, monkeypatch: pytest.MonkeyPatch) -> None:
    run.add("00000000", *GOOD)
    assert run("--embedded", "--det_size", "64") == 0
    before = run.files()
    monkeypatch.setattr("curation.backends.load", None)
    assert run("--embedded", "--det_size", "64") == 0
    assert run.files() == before


def test_other_options_are_refused_until_rerun(run: Stage01) -> None:
    run.add("00000000", *GOOD)
    assert run("--embedded", "--det_size", "64") == 0
    assert run("--embedded", "--det_size", "96") == 2
    assert "det_size" in run.log
    assert run("--embedded", "--det_size", "96", "--rerun") == 0


def test_detections_are_taken_up_after_an_interruption(run: Stage01, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_01, "CHECKPOINT", 5)
    shades = [sample(f"{i:03}", boxes=None, jpg=plain_jpeg(i)) for i in range(30)]
    run.add("00000000", *shades)
    arguments = ["--embedded", "--det_size", "64"]
    with monkeypatch.context() as patch:
        count_detections(patch, fail_at=23)
        assert run(*arguments) == 1
    assert "pulled the plug" in run.log
    with monkeypatch.context() as patch:
        calls = count_detections(patch)
        assert run(*arguments, "--retry_failed") == 0
    assert 30 - 22 <= len(calls) <= 30 - 15, "what was checkpointed is not looked at again"
    assert run.receipt()["notes"]["recovered"] >= 15
    interrupted = run.files()
    assert run(*arguments, "--rerun") == 0
    assert run.files() == interrupted


def test_another_picture_under_the_same_key_is_looked_at_again(run: Stage01, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_01, "CHECKPOINT", 2)
    run.add("00000000", *[sample(f"{i}", boxes=None, jpg=plain_jpeg(i)) for i in range(8)])
    with monkeypatch.context() as patch:
        count_detections(patch, fail_at=8)
        assert run("--embedded", "--det_size", "64") == 1
    run.add("00000000", *[sample(f"{i}", boxes=None, jpg=plain_jpeg(100 + i)) for i in range(8)])
    calls = count_detections(monkeypatch)
    assert run("--embedded", "--det_size", "64", "--retry_failed") == 0
    assert len(calls) == 8


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min_faces", "0"], "--min_faces"),
        (["--threshold", "1.5"], "--threshold"),
        (["--det_size", "100"], "--det_size"),
        (["--threads", "0"], "--threads"),
        (["--detector", "centerface", "--batch_size", "4"], "--batch_size is for --detector scrfd"),
        (["--embedded", "--detector", "scrfd"], "--embedded"),
        (["--detector", "recorded", "--threshold", "0.3"], "--detector recorded"),
        (["--model", "/nowhere/model.onnx"], "/nowhere/model.onnx"),
        (["--detector", "centerface", "--model", "/nowhere/model.onnx"], "/nowhere/model.onnx"),
        (["--shards", "00000007"], "00000007"),
    ],
)
def test_values_that_make_no_sense_end_with_exit_2(run: Stage01, arguments: list[str], message: str) -> None:
    run.add("00000000", *GOOD)
    assert run(*arguments) == 2
    (line,) = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (run.root / "captions" / "00000000.json").exists()


def test_output_and_edits_are_two_folders(run: Stage01) -> None:
    run.add("00000000", *GOOD)
    assert run("--edits", f"{run.root}/captions") == 2
    assert "two folders" in run.log


def test_the_folder_of_the_sources_is_not_that_of_the_edits(run: Stage01) -> None:
    """Stage 03 would write its tars over the source shards."""
    source = run.add("00000000", *GOOD)
    before = source.read_bytes()
    assert run("--edits", str(source.parent)) == 2
    assert "--edits must not be the folder of the source shards" in run.log
    assert source.read_bytes() == before


def test_a_missing_input_ends_with_exit_2(run: Stage01) -> None:
    assert run() == 2
    assert "shards" in run.log


def start(*arguments: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, str(ROOT / "01_filter_noface.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_unknown_flag_ends_with_exit_2() -> None:
    result = start("--input", "x", "--output", "y", "--edits", "z", "--min-face", "1")
    assert result.returncode == 2
    assert "--min-face" in result.stdout + result.stderr


def unprivileged() -> list[str]:
    """What makes root keep to permissions as everybody else does; nothing for everybody else."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and there is no setpriv here")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]


def test_a_read_only_output_folder_is_named(run: Stage01) -> None:
    run.add("00000000", *GOOD)
    run.root.chmod(0o555)
    try:
        folders = ["--output", f"{run.root}/captions", "--edits", f"{run.root}/edits"]
        result = start("--input", f"{run.root}/shards", *folders, before=unprivileged())
    finally:
        run.root.chmod(0o755)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"{run.root}/captions" in line


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_what_is_done_and_ends_with_75(run: Stage01, sent: signal.Signals) -> None:
    shades = [sample(f"{i:03}", boxes=None, jpg=plain_jpeg(i)) for i in range(192)]
    run.add("00000000", *shades)
    options = ["--embedded", "--det_size", "192"]
    partial = run.root / "captions" / "_partial"
    with ended_at_last(run.start(*options)) as process:
        wait_until(lambda: any(path.is_file() for path in partial.rglob("*")), "a checkpoint", while_runs=process)
        process.send_signal(sent)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 75, log
    assert sent.name in log
    assert not (run.root / "captions" / "00000000.json").exists()
    assert run(*options) == 0
    assert 64 <= run.receipt()["notes"]["recovered"] <= 192
    taken_up = run.files()
    assert run(*options, "--rerun") == 0
    assert run.files() == taken_up


# ---- names of detectors


@pytest.mark.parametrize(
    ("name", "detector"), [("YuNet", "yunet"), ("Center_Face", "centerface"), ("RECORDED", "recorded")]
)
def test_a_detector_is_found_in_any_spelling_and_recorded_in_its_own(name: str, detector: str, tmp_path: Path) -> None:
    options = stage_01.Options(input="x", output=str(tmp_path / "a"), edits=str(tmp_path / "b"), detector=name)
    options.check()
    assert stage_01.FilterFaces(options).fingerprint()["detector"] == detector


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--detector", "yunt"], "--detector yunt: there is no such detector. Did you mean yunet?"),
        (["--detector", "qqq"], "Did you mean auto or recorded or centerface or scrfd or yunet?"),
        (["--model", "scrfd"], "--model scrfd: is for an ONNX file; a detector is named with --detector"),
    ],
)
def test_a_name_that_is_no_detector(flags: list[str], told: str, run: Stage01) -> None:
    assert run(*flags) == 2
    assert told in run.log


def test_a_job_with_gpus_does_not_look_for_faces_on_the_cpu(run: Stage01, monkeypatch: pytest.MonkeyPatch) -> None:
    if visible_gpus():
        pytest.skip("this machine has GPUs")
    run.add("00000000", sample("a"))
    small = ("--detector", "centerface", "--det_size", "64", "--quiet")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert run(*small) == 2
    assert "with --device cpu it computes on the CPU" in run.log
    assert run(*small, "--device", "cpu") == 0
    assert run("--detector", "recorded", "--rerun", "--max_error_rate", "1") == 0, "it reads no pixels"
    assert run("--embedded", "--det_size", "64", "--rerun") == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(*small, "--rerun") == 0, "whoever hides the GPUs has asked for the CPU"


def test_a_device_that_fails_blames_no_shard(run: Stage01, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = stage_01.detector_class("centerface")
    failed = type("Fail", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})

    def fails(self: Any, rgb: Any) -> Any:
        raise failed("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 719: unspecified launch failure ; GPU=0")

    run.add("00000000", sample("a", "absent"))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "detect", fails)
        assert run("--embedded", "--det_size", "64") == 2
        assert "error: node " in run.log and "CUDA failure 719: unspecified launch failure" in run.log
        patch.setenv("SLURM_NTASKS", "2")
        assert run("--embedded", "--det_size", "64") == 69, "the other task's device may work"
    assert run("--embedded", "--det_size", "64") == 0, "the shard was not blamed"
