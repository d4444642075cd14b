"""Samples with several pictures in stage 04: the one that was read is replaced, and the others stay."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from curation.__main__ import main as command
from tests.shards import all_samples, noise, write_shard
from tests.stages.harness import read_json
from tests.test_nested_shards import run

BOXES = [[0.1, 0.1, 0.5, 0.5]]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(noise(seed))).convert("RGB").save(file, kind)
    return file.getvalue()


def edit(key: str, seed: int) -> dict[str, bytes]:
    jpg = picture(seed)
    told = {"caption": "new", "sha256": hashlib.sha256(jpg).hexdigest(), "width": 48, "height": 48}
    width, height = Image.open(io.BytesIO(jpg)).size
    told |= {"width": width, "height": height, "uid": f"{int(key):032x}", "face_bboxes": BOXES}
    return {"jpg": jpg, "txt": b"new", "json": json.dumps(told).encode()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards of four samples with three pictures; every second sample has an edit."""
    for shard in range(2):
        keys = [f"{shard}{number}" for number in range(4)]
        samples = {}
        for key in keys:
            told = {"uid": f"{int(key):032x}", "caption": "old", "face_bboxes": BOXES}
            seed = int(key) * 3
            samples[key] = {f"{n}.jpg": picture(seed + n) for n in range(3)}
            samples[key] |= {"txt": b"old", "json": json.dumps(told).encode()}
        write_shard(tmp_path / f"shards/{shard}.tar", samples)
        write_shard(tmp_path / f"edits/{shard}.tar", {key: edit(key, 1000 + int(key)) for key in keys[::2]})
    uids = sorted((0, n) for n in (0, 1, 2, 3, 10, 11, 12, 13, 0, 11))
    np.save(tmp_path / "keep.npy", np.array(uids, "u8,u8"))
    return tmp_path


@pytest.mark.parametrize("member", ["auto", "1"])
@pytest.mark.parametrize("how", ["plain", "datacomp", "spread"])
def test_every_picture_of_every_sample_is_read_back(
    how: str, member: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "plain": ("--verify",),
        "datacomp": ("--keys", "datacomp"),
        "spread": ("--spread_copies", "--subset", root / "keep.npy", "--shard_size", 5, "--keys", "datacomp"),
    }[how]
    where = ("--input", root / "shards", "--edits", root / "edits", "--output", root / "hybrid", "--quiet", "--verify")
    given = () if member == "auto" else ("--image_member", member)
    assert run("04_reshard", *where, *given, *[flag for flag in flags if flag != "--verify"]) == 0
    taken = "0.jpg" if member == "auto" else "1.jpg"
    source, edits = all_samples(root / "shards"), all_samples(root / "edits")
    due = {}
    for key, members in source.items():
        new = {taken if name == "jpg" else name: data for name, data in edits.get(key, {}).items()}
        due[int(json.loads(members["json"])["uid"], 16)] = members | new
    tars = [str(path) for path in sorted((root / "hybrid").glob("*.tar"))]
    read = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(read) == (10 if how == "spread" else 8)
    for sample in read:
        wanted = due[int(json.loads(sample["json"])["uid"], 16)]
        assert {name: data for name, data in sample.items() if not name.startswith("__")} == wanted
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    streamed = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    count = 0
    for sample in streamed:
        count += 1
        wanted = due[int(sample["json"]["uid"], 16)]
        for name in ("0.jpg", "1.jpg", "2.jpg"):
            there = np.asarray(sample[name].convert("RGB"))
            assert np.array_equal(there, np.asarray(Image.open(io.BytesIO(wanted[name])).convert("RGB")))
    assert count == len(read)
    if how == "plain":
        proof = ("verify", root / "shards", root / "hybrid", "--edits", root / "edits")
        assert command([*map(str, proof), "--no_provenance"]) == 0
        tar = root / "hybrid/0.tar"
        tar.write_bytes(tar.read_bytes().replace(source["00"]["2.jpg"], bytes(len(source["00"]["2.jpg"]))))
        assert command([*map(str, proof), "--no_provenance"]) == 1


def test_a_name_that_a_sample_lacks_and_one_that_is_taken(root: Path) -> None:
    where = ("--input", root / "shards/0.tar", "--edits", root / "edits", "--quiet", "--max_error_rate", 1)
    assert run("04_reshard", *where, "--output", root / "a", "--image_member", "7") == 0
    assert sorted(all_samples(root / "a")) == ["01", "03"]
    members = all_samples(root / "shards")["00"]
    write_shard(root / "shards/0.tar", {"00": {**members, "0.png": picture(9, "PNG")}})
    write_shard(root / "edits/0.tar", {"00": edit("00", 1000)})
    assert run("04_reshard", *where, "--output", root / "b", "--image_suffix", "png") == 0
    assert not all_samples(root / "b")


def test_a_picture_of_another_format_keeps_its_name(root: Path) -> None:
    members = all_samples(root / "shards")["00"]
    new = {"0.PNG": picture(9, "PNG"), "1.jpg": members["1.jpg"], "jpeg": members["2.jpg"], "json": members["json"]}
    write_shard(root / "shards/0.tar", {"00": new})
    write_shard(root / "edits/0.tar", {"00": edit("00", 1000)})
    where = ("--input", root / "shards/0.tar", "--edits", root / "edits", "--output", root / "a", "--quiet")
    assert run("04_reshard", *where, "--image_member", "0", "--verify") == 0
    found = all_samples(root / "a")["00"]
    name = next(name for name in found if name.lower() == "0.png")
    assert Image.open(io.BytesIO(found[name])).format == "PNG" and found[name] != new["0.PNG"]
    assert {found["1.jpg"], found["jpeg"]} == {new["1.jpg"], new["jpeg"]}


def test_the_picture_that_is_read_is_blurred(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--input", root / "shards/0.tar", "--output", root / "a", "--blur_faces", "recorded", "--verify")
    assert run("04_reshard", *where) == 0
    assert "4 samples have further pictures" in capsys.readouterr().err
    source, found = all_samples(root / "shards"), all_samples(root / "a")
    for key, members in found.items():
        assert members["0.jpg"] != source[key]["0.jpg"]
        assert hashlib.sha256(members["0.jpg"]).hexdigest() == json.loads(members["json"])["sha256"]
        assert (members["1.jpg"], members["2.jpg"]) == (source[key]["1.jpg"], source[key]["2.jpg"])
        assert "jpg" not in members


def test_a_folder_of_an_older_version_goes_on_as_it_was(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record of options lacks the option: taken out by hand."""
    where = ("--input", root / "shards", "--edits", root / "edits", "--output", root / "a")
    assert run("04_reshard", *where, "--image_member", "plain", "--shards", "0") == 0
    epoch = root / "a/_receipts/04_reshard/_epoch.1.json"
    record = read_json(epoch)
    del record["options"]["image_member"]
    epoch.write_text(json.dumps(record))
    capsys.readouterr()
    assert run("04_reshard", *where) == 0
    assert "--image_member plain: an older version has begun" in capsys.readouterr().err
    found, edits = all_samples(root / "a"), all_samples(root / "edits")
    assert (
        found["10"]["jpg"] == edits["10"]["jpg"] and found["10"]["0.jpg"] == all_samples(root / "shards")["10"]["0.jpg"]
    )
    proof = ("verify", root / "shards", root / "a", "--edits", root / "edits")
    assert command([*map(str, proof), "--no_provenance"]) == 0
