"""A dry run checks what the real run would check, and writes nothing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from curation.errors import InfrastructureError
from tests.run import toy_stage
from tests.run.toy_runs import Place
from tests.shards import member, tar_of

Err = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.shards(2)
    return place


def test_a_stage_that_opens_quickly_is_opened(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Err) -> None:
    monkeypatch.setattr(toy_stage.Toy, "opens_quickly", True)
    assert place.run("--dry_run", "--mark", "no model") == 2
    told = capsys.readouterr()
    assert "2 pending" in told.out
    assert "there is no such model" in told.err
    assert place.lines("close") == ["close"]
    assert not place.out.exists()
    assert place.run("--dry_run") == 0


def test_with_nothing_to_do_nothing_is_opened(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.run() == 0
    place.forget_journal()
    monkeypatch.setattr(toy_stage.Toy, "opens_quickly", True)
    assert place.run("--dry_run") == 0
    assert place.lines("open") == []


def test_what_the_options_lacked_ends_it(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Err) -> None:
    monkeypatch.setattr(toy_stage.Toy, "trouble", InfrastructureError("a/b: no such model"))
    assert place.run("--dry_run") == 2
    assert "2 pending" in capsys.readouterr().out


def test_a_deadline_that_makes_no_sense(place: Place, capsys: Err) -> None:
    assert place.run("--dry_run", "--deadline=-5m") == 2
    assert "--deadline '-5m': write none, 30m" in capsys.readouterr().err


def shard(folder: Path) -> Path:
    folder.mkdir()
    told = b'{"uid": "0", "caption": "a woman", "face_bboxes": [[0.1, 0.1, 0.5, 0.5]]}'
    (folder / "0.tar").write_bytes(tar_of([member("a.jpg", b"x"), member("a.json", told), member("a.txt", b"a woman")]))
    return folder


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_stage_01_without_its_detector(tmp_path: Path, capsys: Err, more: list[str]) -> None:
    folders = ["--input", str(shard(tmp_path / "in")), "--output", str(tmp_path / "c"), "--edits", str(tmp_path / "e")]
    stage = importlib.import_module("01_filter_noface")
    assert stage.main([*folders, "--detector", "scrfd", "--model", str(tmp_path / "absent.onnx"), *more]) == 2
    assert "absent.onnx" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_stage_02_without_a_server(tmp_path: Path, capsys: Err, more: list[str]) -> None:
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions/0.json").write_text('{"a.json": "A woman reads a newspaper in the park"}')
    flags = ["--input", str(tmp_path / "captions"), "--output", str(tmp_path / "out"), "--endpoint_wait", "1"]
    stage = importlib.import_module("02_captions_processor")
    assert stage.main([*flags, "--endpoints", "http://127.0.0.1:9", *more]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_stage_06_without_its_weights(tmp_path: Path, capsys: Err, more: list[str]) -> None:
    folders = ["--input", str(shard(tmp_path / "in")), "--output", str(tmp_path / "out")]
    stage = importlib.import_module("06_metadata")
    weights = ["--models", "oai-clip-vit-b32", "--weights", f"oai-clip-vit-b32={tmp_path}/absent"]
    assert stage.main([*folders, *weights, *more]) == 2
    assert "absent" in capsys.readouterr().err
