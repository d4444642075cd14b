"""Stages 01 and 04 and verify on inputs as people have them: subfolders, odd names, and files that are no tars."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import pytest
import xxhash

from curation.__main__ import main as command
from tests.shards import plain, samples_of, write_shard

FACE = {"caption": "a face", "face_bboxes": [[0.1, 0.1, 0.5, 0.5]]}
ODD = "000/my_shard_1_-" + xxhash.xxh3_64_hexdigest(b"my shard (1)")


def sample(colour: int) -> dict[str, bytes]:
    return {"jpg": plain((colour, 0, 0), format="jpeg"), "json": json.dumps(FACE).encode(), "txt": b"a face"}


def run(script: str, *words: object) -> int:
    code: int = importlib.import_module(script).main([*map(str, words), "--quiet"])
    return code


def test_a_shard_with_an_odd_name_goes_through_all_stages_beside_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    write_shard(source / "000" / "my shard (1).tar", {"a": sample(1)})
    write_shard(source / "001" / "00001.tar", {"b": sample(2)})
    captions, edits, hybrid = tmp_path / "captions", tmp_path / "edits", tmp_path / "shards"
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ["--output", captions, "--edits", edits]
    assert run("01_filter_noface", "--input", "~/source", *places, "--detector", "recorded") == 0
    assert {str(path.relative_to(captions)) for path in captions.glob("0*/*.json")} == {"001/00001.json", f"{ODD}.json"}

    new = sample(9)
    facts = {"caption": "new", "width": 32, "height": 32, "sha256": hashlib.sha256(new["jpg"]).hexdigest()}
    write_shard(edits / f"{ODD}.tar", {"a": {**new, "txt": b"new", "json": json.dumps(FACE | facts).encode()}})
    tars = [source]
    assert run("04_reshard", "--input", f"{source}/*/*.tar", "--edits", edits, "--output", hybrid) == 0
    assert samples_of(hybrid / f"{ODD}.tar")["a"]["txt"] == b"new"
    assert run("04_reshard", "--input", source, "--edits", edits, "--output", hybrid) == 0
    capsys.readouterr()
    assert command(["verify", *map(str, tars), str(hybrid), "--no_provenance", "--quiet"]) == 0, capsys.readouterr().out
    assert command(["fsck", *map(str, tars), "--quiet"]) == 0

    # what is no tar fails as a shard, and the others are done
    (source / "001" / "broken.tar").symlink_to("absent")
    (source / "001" / "empty.tar").touch()
    assert run("04_reshard", "--input", source, "--edits", edits, "--output", tmp_path / "new") == 1
    assert {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").glob("0*/*.tar")} == {
        "001/00001.tar",
        f"{ODD}.tar",
    }


@pytest.mark.parametrize(("script", "given", "says"), [
    ("01_filter_noface", "captions", "was written by 01_filter_noface"),
    ("01_filter_noface", "absent", "did you mean"),
    ("02_captions_processor", "prompts", "was written by 02_captions_processor"),
    ("03_generate_images_multigpu", "absents", "does not exist"),
    ("03_generate_images_multigpu", "shards", r"no *.json shards found"),
    ("04_reshard", "captions", "was written by 01_filter_noface"),
])  # fmt: skip
def test_a_folder_of_another_kind_is_told(
    script: str, given: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, stage in (("captions", "01_filter_noface"), ("prompts", "02_captions_processor"), ("absen", "")):
        (tmp_path / folder / "_receipts" / stage).mkdir(parents=True)
    (tmp_path / "captions" / "0.json").write_text("{}")
    write_shard(tmp_path / "shards" / "0.tar", {"a": sample(1)})
    places = ["--output", tmp_path / "out"]
    places += ["--edits", tmp_path / "edits"] if script.startswith("01") else []
    places += ["--index"] if script.startswith("04") else []
    assert run(script, "--input", tmp_path / given, *places) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
