"""New images in a hybrid shard have the name and the format of the image whose place they take."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.__main__ import main as curation
from curation.edits import GENERATED_XMP
from curation.images import encode_as, encode_jpeg, encoders, written_format
from curation.reshard import fitting
from curation.tar.samples import TarWriter, read_samples
from tests.shards import member, tar_of
from tests.stages.test_stage_04_reshard import Stage04

SIDE = 48


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Stage04:
    return Stage04(tmp_path, capsys)


def noise(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


JPEG = encode_jpeg(noise(1), 95, GENERATED_XMP)


def put(run: Stage04, names: list[str], edit: bytes = JPEG, **more: object) -> None:
    """One sample for each name, in one shard; the last is edited."""
    parts = []
    for name in names:
        key, _, suffix = name.partition(".")
        kind = {"jpeg": "jpg", "JPG": "jpg", "gif": "png", "tiff": "png"}.get(suffix, suffix)
        parts += [member(name, encode_as(kind, noise(0), 95)), member(f"{key}.json", b"{}"), member(f"{key}.txt", b"x")]
    run.put("shards/0.tar", tar_of(parts))
    key = names[-1].partition(".")[0]
    told = {"caption": "new", "sha256": hashlib.sha256(edit).hexdigest(), "width": SIDE, "height": SIDE}
    file = io.BytesIO()
    writer = TarWriter(file)
    writer.add(f"{key}.jpg", edit)
    writer.add(f"{key}.txt", b"new")
    writer.add(f"{key}.json", json.dumps(told | {"curation": {"prompt": "new"}} | more).encode())
    writer.close()
    run.put("edits/0.tar", file.getvalue())


def edited(run: Stage04, key: str) -> tuple[str, bytes, dict[str, Any]]:
    """What the edited sample's image is called behind the dot, its bytes and its json."""
    (found,) = [sample for sample in read_samples(run.root / "hybrid/0.tar") if sample.key == key]
    (suffix,) = set(found.suffixes) - {"txt", "json"}
    return suffix, bytes(found.members[suffix]), json.loads(found.members["json"])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG"])
def test_over_a_jpeg_the_edit_goes_in_byte_for_byte(run: Stage04, suffix: str) -> None:
    put(run, [f"a.{suffix}", f"b.{suffix}"])
    assert run("--verify") == 0, run.log
    _, image, told = edited(run, "b")
    assert image == JPEG
    assert f"b.{suffix}".encode() in run.result()
    assert "encoded" not in told["curation"]
    assert "encoded" not in run.receipt()["notes"]


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_over_another_format_it_is_encoded_anew_and_says_so(run: Stage04, kind: str) -> None:
    put(run, [f"a.{kind}", f"b.{kind}"])
    assert run("--verify") == 0, run.log
    suffix, image, told = edited(run, "b")
    assert (suffix, written_format(image)) == (kind, kind)
    opened = Image.open(io.BytesIO(image))
    assert opened.info["xmp"].strip(b"\0") in (GENERATED_XMP, GENERATED_XMP.strip(b"\0"))
    assert opened.size == (SIDE, SIDE)
    loss = np.asarray(opened.convert("RGB")).astype(float) - np.asarray(Image.open(io.BytesIO(JPEG)))
    assert np.sqrt((loss**2).mean()) < (1e-9 if kind == "png" else 4)
    assert told["sha256"] == hashlib.sha256(image).hexdigest()
    assert told["curation"]["encoded"]["edit_sha256"] == hashlib.sha256(JPEG).hexdigest()
    assert run.receipt()["notes"]["encoded"] == {kind: 1, "by": encoders()}
    first = run.result()
    assert run("--rerun") == 0
    assert run.result() == first, "the same software gives the same bytes"


def test_its_json_tells_the_size_of_the_image(run: Stage04) -> None:
    """An edit that was made elsewhere may have that of the image whose place it takes."""
    put(run, ["a.webp", "b.webp"], width=640, height=480)
    assert run("--verify") == 0, run.log
    _, _, told = edited(run, "b")
    assert (told["width"], told["height"]) == (SIDE, SIDE)


def test_over_a_format_that_is_not_written_it_stays_jpg_and_is_counted(run: Stage04) -> None:
    put(run, ["a.gif", "b.gif"])
    assert run("--verify") == 0, run.log
    assert edited(run, "b")[:2] == ("jpg", JPEG)
    assert run.receipt()["notes"]["kept_jpg"] == {"gif": 1}
    assert "stay .jpg where the format of the source is not written here: 1 over .gif" in run.log


@pytest.mark.parametrize("wanted", ["jpg", "webp", "png"])
def test_the_flag_gives_all_new_images_one_format(run: Stage04, wanted: str) -> None:
    put(run, ["a.webp", "b.png"])
    assert run("--verify", "--image_suffix", wanted) == 0, run.log
    suffix, image, _ = edited(run, "b")
    assert (suffix, written_format(image)) == (wanted, wanted)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_bytes_never_contradict_their_suffix(run: Stage04, kind: str) -> None:
    """An edit that was made elsewhere, called .jpg."""
    put(run, ["a.jpg", "b.jpg"], encode_as(kind, noise(2), 90))
    assert run("--verify") == 0, run.log
    suffix, image, told = edited(run, "b")
    assert (suffix, written_format(image)) == ("jpg", "jpg")
    assert told["sha256"] == hashlib.sha256(image).hexdigest()


@pytest.mark.parametrize("edit", [b"no image", encode_as("png", noise(2), 90)[:200]])
def test_an_edit_that_is_no_image_is_left_out_and_told(run: Stage04, edit: bytes) -> None:
    put(run, ["a.jpg", "b.jpg"], edit)
    assert run("--max_error_rate", "1") == 0
    assert run.rejects() == {"b": "undecodable"}
    assert [sample.key for sample in read_samples(run.root / "hybrid/0.tar")] == ["a"]


def test_a_mixed_source_is_told(run: Stage04) -> None:
    put(run, ["a.jpg", "b.webp", "c.webp"])
    assert run() == 0
    assert "images of several suffixes (2 .webp, 1 .jpg)" in run.log


def test_an_older_folder_goes_on_with_the_edits_own_bytes(run: Stage04) -> None:
    put(run, ["a.webp", "b.webp"])
    assert run("--image_suffix", "keep") == 0
    (path,) = (run.root / "hybrid/_receipts/04_reshard").glob("_epoch.1.json")
    record = json.loads(path.read_bytes())
    del record["options"]["image_suffix"]
    path.write_text(json.dumps(record))
    before = run.result()
    (run.root / "hybrid/0.tar").unlink()
    assert run() == 0
    assert run.result() == before
    assert "--image_suffix keep: an older version has begun" in run.log
    assert run("--rerun") == 0
    assert edited(run, "b")[0] == "webp"


def verify(run: Stage04) -> int:
    folders = [str(run.root / name) for name in ("shards", "hybrid")]
    return curation(["verify", *folders, "--edits", str(run.root / "edits"), "--no_provenance", "--workers", "1"])


@pytest.mark.parametrize("wanted", ["source", "keep", "jpg", "png"])
def test_verify_proves_it_by_encoding_again(run: Stage04, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(run, ["a.webp", "b.webp"])
    assert run("--image_suffix", wanted) == 0
    assert verify(run) == 0, capsys.readouterr()
    data = bytearray(run.result())
    at = data.index(b"b.") + 512 + 300
    data[at] ^= 1
    (run.root / "hybrid/0.tar").write_bytes(data)
    assert verify(run) == 1


def test_verify_with_other_software_says_so(
    run: Stage04, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run, ["a.webp", "b.webp"])
    with monkeypatch.context() as other:
        other.setattr(fitting, "encoders", lambda: "Pillow 1.0")
        other.setattr(fitting, "QUALITY", 50)
        assert run() == 0
    assert verify(run) == 1
    told = capsys.readouterr()
    assert "stage 04 encoded images with Pillow 1.0" in told.out + told.err
