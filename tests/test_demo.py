"""``make demo`` as a new user runs it: four stages with the embedded models, the funnel, and nothing to do again."""

import re
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.processes import cpu_time_of


def run_demo(output: Path) -> tuple[str, float]:
    """What it prints, and the seconds of CPU time that it takes."""
    seconds, said = cpu_time_of([sys.executable, "examples/demo.py", output])
    assert said.returncode == 0, said.stderr
    return said.stdout, seconds


def funnel(printed: str) -> dict[str, int]:
    names = ("in", "with a face", "English", "rewritten", "generated", "replaced")
    found = {name: re.search(rf"^  {name} +(\d+)", printed, flags=re.M) for name in names}
    assert all(found.values()), printed
    return {name: int(match.group(1)) for name, match in found.items() if match}


@pytest.mark.slow
def test_the_demo_shows_what_happened_and_does_nothing_twice(tmp_path: Path) -> None:
    printed, _ = run_demo(tmp_path / "demo")
    counts = funnel(printed)
    rows = (ROOT / "examples" / "truth.tsv").read_text("utf-8").splitlines()
    assert counts["in"] == len(rows) - 1
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts["generated"] == counts["replaced"] > 0
    assert "small stand-in model" in printed
    assert "noise" in printed
    for shard in (ROOT / "examples" / "shards").glob("*.tar"):
        assert (tmp_path / "demo" / "shards" / shard.name).is_file()

    page = (tmp_path / "demo" / "report.html").read_text("utf-8")
    assert "replaced in the hybrid shards" in page
    assert page.count("data:image/jpeg;base64,") > 2 * counts["generated"]

    again, seconds = run_demo(tmp_path / "demo")
    assert funnel(again) == counts
    assert seconds < 20
