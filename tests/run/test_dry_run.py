"""A dry run checks what the real run would check, and writes nothing."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from curation.errors import InfrastructureError
from curation.images import encode_jpeg
from tests.run import toy_stage
from tests.run.toy_runs import Place
from tests.shards import member, tar_of

PHOTO = encode_jpeg(np.full((64, 64, 3), 127, np.uint8), 90)
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


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_stage_01_whose_samples_need_its_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Err, more: list[str]
) -> None:
    """auto: only a sample without recorded boxes needs the detector, whose weights are not on this machine."""
    stage = importlib.import_module("01_filter_noface")
    told = shard(tmp_path / "told")
    not_told = shard(tmp_path / "in")
    (not_told / "1.tar").write_bytes(tar_of([member("b.jpg", PHOTO), member("b.json", b'{"caption": "a woman"}')]))
    monkeypatch.setattr("curation.backends.faces.scrfd.DEFAULT_MODEL", tmp_path / "absent.onnx")

    def run(source: Path, name: str) -> int:
        folders = ["--output", str(tmp_path / f"c{name}"), "--edits", str(tmp_path / f"e{name}")]
        code: int = stage.main(["--input", str(source), *folders, *more])
        return code

    assert run(not_told, "1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: SCRFD's model is not there")
    assert run(told, "2") == 0


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_stage_06_without_its_judge(tmp_path: Path, capsys: Err, more: list[str]) -> None:
    folders = ["--input", str(shard(tmp_path / "in")), "--output", str(tmp_path / "out")]
    stage = importlib.import_module("06_metadata")
    assert (
        stage.main([*folders, "--models", "judge", "--judge", "{model: m, endpoints: http://127.0.0.1:9}", *more]) == 2
    )
    assert "127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_stage_without_the_server_program_that_it_is_to_start(tmp_path: Path, capsys: Err, more: list[str]) -> None:
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions/0.json").write_text('{"a.json": "A woman reads a newspaper in the park"}')
    flags = ["--served", "llama", "--served_python", str(tmp_path / "env"), *more]
    model = ["--model", str(tmp_path / "captions/0.json")]
    rewrite, caption = map(importlib.import_module, ("02_captions_processor", "05_recaption"))
    told = set()
    for folder, main in ((tmp_path / "captions", rewrite.main), (shard(tmp_path / "in"), caption.main)):
        assert main(["--input", str(folder), "--output", str(tmp_path / "out"), *model, *flags]) == 2
        told.add(capsys.readouterr().err.splitlines()[-1])
    assert told == {f"error: --served_python {tmp_path}/env: there is no program {tmp_path}/llama-server"}
