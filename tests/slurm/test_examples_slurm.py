"""The job scripts and their examples, without SLURM: what the pages must say of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.test_docs import flags_of

SCRIPTS = [path for path in sorted(ROOT.glob("*.sh")) if path.name != "install.sh"]
EXAMPLES = sorted((ROOT / "examples" / "slurm").glob("*.sh"))
STAGES = {path.name[:2]: path for path in ROOT.glob("0[1-4]_*.py")}
OURS_TO_READ = ("SLURM", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")  # set by others


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_variable_is_documented(script: Path) -> None:
    """Those that a script gives a default to, or insists on."""
    text = script.read_text("utf-8")
    names = set(re.findall(r"\$\{([A-Z][A-Z_0-9]+)[:+-]", text) + re.findall(r"^need ([A-Z_]+) ", text, flags=re.M))
    pages = "".join((ROOT / "docs" / page).read_text("utf-8") for page in ("slurm.md", "stage-02.md"))
    missing = {
        name for name in names if not name.startswith(OURS_TO_READ) and not re.search(rf"`[^`]*\b{name}\b", pages)
    }
    own = {"SERVE_FOR", "PROJECT", "DEFINE_ONLY", "PACKAGE"}  # between two of the scripts, or within one
    assert not missing - own - {"BASH_REMATCH"}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_an_example_names_flags_that_there_are(script: Path) -> None:
    for stage, words in re.findall(r"FLAGS_(0\d)(?:=\$\{\w+:-|=')(--[^}']+)", script.read_text("utf-8")):
        assert set(re.findall(r"--(\w+)", words)) <= flags_of(STAGES[stage]), words


def test_the_folder_for_logs_is_there() -> None:
    """SLURM makes none, and fails a job whose log it cannot open."""
    listed = subprocess.run(["git", "ls-files", "logs"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert (ROOT / "logs").is_dir()
    assert listed.strip() or not (ROOT / ".git").exists(), "a fresh clone has it too"
