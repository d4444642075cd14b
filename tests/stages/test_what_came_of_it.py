"""A run says what came of it, and folders that do not belong together are refused before anything is written."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from curation.commands.stages import find_script, load_script, stage_class
from curation.run import Stage
from tests import EXAMPLES, ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("[0-9][0-9]_*.py"))
COUNTS = {"in": 70, "kept": 65, "dropped": 3, "failed": 2, "edited": 5, "reused": 4}


# ---- the last line


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("00", "65 pictures stored, 2 not available"),
        ("01", "65 samples with a face found"),
        ("02", "65 captions rewritten"),
        ("03", "61 images generated, 4 kept from before"),
        ("04", "5 replaced, 60 copied, 5 left out"),
        ("05", "65 captioned, 4 of them kept from before"),
        ("06", "65 scored"),
    ],
)
def test_each_stage_has_words_of_its_own(stage: str, words: str) -> None:
    kind = stage_class(load_script(find_script(stage)))
    made = kind.__new__(kind)  # a model or a server is not needed for this
    made.options = SimpleNamespace(select="face")
    vars(made)["writer"] = SimpleNamespace(blurs=False)
    assert made.result(Counter(COUNTS)) == words
    assert made.result(Counter()).startswith("0 ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_stage_is_without_them(script: str) -> None:
    assert stage_class(load_script(find_script(script))).result is not Stage.result


# ---- folders


def folder(root: Path, name: str, stage: str, home: str = "") -> Path:
    """A folder with one dictionary, as a stage leaves it.  home: the stage's --output, if that is another folder."""
    place = root / name
    receipts = place / "_receipts" / stage
    receipts.mkdir(parents=True)
    (place / "0.json").write_text('{"a.json": "a woman on a bridge"}')
    (receipts / "_home.json" if home else receipts / "_epoch.1.json").write_text(json.dumps({"output": home}))
    return place


@pytest.mark.parametrize(
    ("stage", "flags", "told"),
    [
        ("01", {"input": "shards", "output": "edits", "edits": "captions"}, "--output: "),
        ("01", {"input": "shards", "output": "new", "edits": "captions"}, "--edits: "),
        ("01", {"input": "shards", "output": "prompts", "edits": "new"}, "--output: "),
        ("02", {"input": "edits", "output": "new"}, "--input: "),
        ("02", {"input": "prompts", "output": "new"}, "--input: "),
        ("02", {"input": "captions", "output": "edits"}, "--output: "),
        ("02", {"input": "captions", "output": "captions"}, "--output: "),
        ("03", {"input": "edits", "output": "prompts"}, "--input: "),
        ("03", {"input": "captions", "output": "edits"}, "--input: "),
        ("03", {"input": "prompts", "output": "captions"}, "--output: "),
    ],
)
def test_the_files_of_another_stage_are_refused(
    stage: str, flags: dict[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, "captions", "01_filter_noface")
    folder(tmp_path, "edits", "01_filter_noface", "../captions")
    folder(tmp_path, "prompts", "02_captions_processor")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(bytes(10240))
    before = sorted(tmp_path.rglob("*"))
    arguments = [word for flag, name in flags.items() for word in (f"--{flag}", str(tmp_path / name))]
    for more in ([], ["--dry_run"]):
        assert load_script(find_script(stage)).main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert f"error: {told}{tmp_path / flags[told[2:-2]]} holds the files of" in error
        assert "swapped" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_sources_are_not_replaced_by_outputs_of_the_same_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 05's tars; stage 06's tables over those that img2dataset and DataComp put beside shards."""
    source = tmp_path / "shards"
    source.mkdir()
    shutil.copy(EXAMPLES / "00000003.tar", source)
    before = (source / "00000003.tar").read_bytes()
    flags = ["--model", "endpoint:m", "--endpoints", "http://127.0.0.1:9"]
    stage = importlib.import_module("05_recaption")
    assert stage.main([str(source), "-o", str(tmp_path), "--format", "jsonl,tar", *flags]) == 2
    assert "--output" in capsys.readouterr().err
    (source / "00000003.parquet").write_bytes(b"the source's own")
    flags = ["--models", "statistics", "--input", str(source), "--output", str(source)]
    stage = importlib.import_module("06_metadata")
    assert stage.main([*flags, "--nworkers", "1"]) == 2
    assert "00000003.parquet belongs to the source shards" in capsys.readouterr().err
    assert (source / "00000003.tar").read_bytes() == before
    assert (source / "00000003.parquet").read_bytes() == b"the source's own"
    (source / "00000003.parquet").unlink()
    assert stage.main([*flags, "--nworkers", "1"]) == 0
    assert stage.main([*flags, "--nworkers", "1"]) == 0, "it goes on where it has begun"
