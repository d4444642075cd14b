"""A stage as small as one can be has all that every stage has."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests import EXAMPLES
from tests.run import smallest_stage
from tests.stages.harness import Run


class CountWords(Run):
    stage, script, output = "count_words", smallest_stage, "counts"

    def arguments(self) -> list[str]:
        return ["--input", str(EXAMPLES), "--output", str(self.folder)]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CountWords:
    return CountWords(tmp_path, capsys)


def test_it_counts_the_words_of_every_caption(run: CountWords) -> None:
    assert run() == 0
    shards = sorted(path.stem for path in EXAMPLES.glob("*.tar"))
    assert sorted(path.stem for path in run.folder.glob("*.json")) == shards
    for shard in shards:
        counts = json.loads((run.folder / f"{shard}.json").read_bytes())
        receipt = run.receipt(shard)
        assert receipt["counts"]["kept"] == len(counts) > 0
        assert receipt["seconds"]["read"] > 0
        assert all(isinstance(count, int) for count in counts.values())
    before = run.published()
    assert run() == 0
    assert f"{len(shards)} were done before" in run.log, "nothing is done again"
    assert run.published() == before


def test_it_takes_the_flags_of_every_stage(run: CountWords) -> None:
    first, second, *_ = sorted(path.stem for path in EXAMPLES.glob("*.tar"))
    assert run("--shards", second, "--quiet") == 0
    assert [path.stem for path in run.folder.glob("*.json")] == [second]
    assert run("--workers", "0") == 2
    assert "--workers must be at least 1" in run.log
    assert run("--dry_run") == 0
    assert "1 done" in run.out
    assert not (run.folder / f"{first}.json").exists()


def test_a_shard_that_cannot_be_read_fails_and_the_others_go_on(run: CountWords) -> None:
    run.put("shards/00000000.tar", b"no tar at all" * 100)
    run.put("shards/00000001.tar", next(iter(sorted(EXAMPLES.glob("*.tar")))).read_bytes())
    assert run("--input", str(run.root / "shards")) == 1
    assert run.receipt("00000000")["status"] == "failed"
    assert run.receipt("00000001")["status"] == "done"


def test_it_is_small() -> None:
    """What a reader has to write for a stage of their own: about 40 lines, blank ones and docstrings left out."""
    source = Path(smallest_stage.__file__).read_text("utf-8")
    texts = sum(
        node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    assert sum(1 for line in source.splitlines() if line.strip()) - texts <= 45
