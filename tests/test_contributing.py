"""The tutorial of CONTRIBUTING.md, step by step: its files are saved and its commands run in a copy of the project."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import EXAMPLES, ROOT
from tests.run import smallest_stage
from tests.test_docs import saved_files
from tests.test_examples import members

PAGE = ROOT / "CONTRIBUTING.md"
NEEDED = ("curation", "tests", "examples/shards", "pyproject.toml")
# A block of commands, and the output that the page shows behind it.
STEP = re.compile(r"^```bash\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", flags=re.M | re.S)


def section(heading: str) -> str:
    """The text under a heading of the page."""
    return PAGE.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the tutorial uses, and the numbered scripts."""
    for name in (*NEEDED, *(script.name for script in ROOT.glob("[0-9][0-9]_*.py"))):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def follow(heading: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what the page says under a heading, as a reader does; what a command prints is what the page shows."""
    ((name, text),) = saved_files(section(heading)).items()
    assert not (project / name).exists(), f"{name} would be replaced"
    (project / name).write_text(text, "utf-8")
    python = project / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(python.parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    steps = STEP.findall(section(heading))
    assert any(expected for _, expected in steps), "the page shows no output"
    for commands, expected in steps:
        bash = ["bash", "-e", "-o", "pipefail", "-c", commands]
        done = subprocess.run(bash, cwd=project, capture_output=True, text=True, check=False, timeout=250)
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        if expected:
            assert done.stdout == expected, commands
        if "pytest" in commands:
            assert re.search(r"^\d+ passed", done.stdout, flags=re.M), done.stdout


@pytest.mark.slow
def test_a_captioner(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    follow("A captioner", project, monkeypatch)
    rows = [json.loads(line) for line in (project / "demo-output/captions/captions.jsonl").read_bytes().splitlines()]
    assert [row["key"] for row in rows] == [key for shard in sorted(EXAMPLES.glob("*.tar")) for key in members(shard)]
    assert all({"caption", "original_caption"} <= row.keys() for row in rows)
    assert len({row["caption"] for row in rows}) > 1


@pytest.mark.slow
def test_an_extractor(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    follow("An extractor", project, monkeypatch)
    for shard in EXAMPLES.glob("*.tar"):
        table = parquet.read_table(project / "demo-output/contrast" / f"{shard.stem}.parquet").to_pydict()
        assert table["key"] == list(members(shard))
        contrast = np.array(table["contrast"], float)
        assert ((contrast > 0) & (contrast <= 0.5)).all()
        assert len({*contrast}) > 1


@pytest.mark.slow
def test_a_stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow("A stage", project, monkeypatch)
    for shard in EXAMPLES.glob("*.tar"):
        counts = json.loads((project / "demo-output/words" / f"{shard.stem}.json").read_bytes())
        captions = {key: json.loads(sample["json"])["caption"] for key, sample in members(shard).items()}
        assert counts == {f"{key}.json": len(caption.split()) for key, caption in captions.items()}


def test_the_stage_is_the_one_that_is_tested() -> None:
    (text,) = saved_files(section("A stage")).values()
    assert text == Path(smallest_stage.__file__).read_text("utf-8")
