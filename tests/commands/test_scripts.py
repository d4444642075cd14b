"""``curation scripts`` and ``setup.py``: the job scripts for somebody who has the installed package and no clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curation import PROJECT, __version__
from curation.__main__ import main
from tests import ROOT

NAMED = ("slurm_tasks.sh", "run_pipeline.sh", "serve_endpoints.sh", "examples/ollama/Modelfile")
SCRIPTS = {*(path.name for path in ROOT.glob("[0-9][0-9]_*.*")), *NAMED}


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    folder = tmp_path / "my jobs"
    assert main(["scripts", str(folder)]) == 0
    return folder


def job(script: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "SRC_DIR": str(ROOT / "examples" / "shards"), **more}
    command = ["bash", str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=script.parent, env=environment)


def test_the_copies_are_the_scripts(copies: Path) -> None:
    files = {str(path.relative_to(copies)): path for path in copies.rglob("*") if path.is_file()}
    assert files.keys() == SCRIPTS | {"installed.sh"}
    assert (copies / "logs").is_dir()
    for name in SCRIPTS:
        assert files[name].read_bytes() == (ROOT / name).read_bytes()
        assert os.access(files[name], os.X_OK) == os.access(ROOT / name, os.X_OK)


def test_a_copied_job_runs_with_the_python_that_has_the_package(copies: Path, tmp_path: Path) -> None:
    flags = ("--shards", "00000000", "--dry_run", "--detector", "recorded")
    run = job(copies / "01_filter_noface.sh", *flags, ROOT=str(tmp_path / "root"))
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith(f"code: {copies}, version {__version__}\n")
    theirs = job(copies / "01_filter_noface.sh", ROOT=str(tmp_path / "root"), PYTHON="/nowhere/python")
    assert theirs.returncode == 2 and "there is no /nowhere/python" in theirs.stderr
    plan = job(copies / "run_pipeline.sh", "--dry_run", "--here", ROOT=str(tmp_path / "root"))
    assert plan.returncode == 0 and "04_reshard.sh" in plan.stdout


def test_edited_copies_are_not_replaced_unasked(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scripts", str(copies)]) == 0  # nothing differs
    edited = copies / "04_reshard.sh"
    edited.write_text("mine")
    assert main(["scripts", str(copies)]) == 2
    assert "04_reshard.sh differs from the package's: --overwrite replaces it" in capsys.readouterr().err
    assert edited.read_text() == "mine"
    assert main(["scripts", str(copies), "--overwrite"]) == 0
    assert edited.read_bytes() == (ROOT / "04_reshard.sh").read_bytes()


def test_copies_of_another_version_say_so(copies: Path, tmp_path: Path) -> None:
    settings = copies / "installed.sh"
    settings.write_text(settings.read_text().replace(f"SCRIPTS_VERSION={__version__}", "SCRIPTS_VERSION=0.0.1"))
    run = job(copies / "01_filter_noface.sh", ROOT=str(tmp_path / "root"))
    assert run.returncode == 2
    assert f"of version 0.0.1, the package is version {__version__}: run `curation scripts" in run.stderr
    settings.write_text("PACKAGE=/nowhere\n")
    run = job(copies / "01_filter_noface.sh", ROOT=str(tmp_path / "root"))
    assert run.returncode == 2 and "no longer in /nowhere" in run.stderr


def test_folders_that_cannot_take_the_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for folder, said in ((PROJECT, "give another folder"), (tmp_path / "file", "Not a directory")):
        assert main(["scripts", str(folder)]) == 2
        assert said in capsys.readouterr().err


def test_the_wheel_carries_the_scripts(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    folder = tmp_path / "curation" / "project"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == SCRIPTS | {"constraints.txt", "model-packages.txt"}
    assert all((folder / name).read_bytes() == (ROOT / name).read_bytes() for name in names)
    assert not (ROOT / "curation" / "project").exists()
