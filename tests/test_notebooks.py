"""The notebook in ``examples/notebooks`` runs on the example shards and shows what the receipts say."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.__main__ import main
from curation.run.ledger import done_receipts
from tests import EXAMPLES, ROOT
from tests.pipeline import Undisturbed

NOTEBOOK = ROOT / "examples" / "notebooks" / "hybrid_dataset.ipynb"


def cells(kind: str) -> Iterator[dict[str, Any]]:
    yield from (cell for cell in json.loads(NOTEBOOK.read_bytes())["cells"] if cell["cell_type"] == kind)


def test_it_is_committed_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_it_runs_on_what_its_own_commands_make(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code cells, one after the other in one namespace, as a kernel runs them."""
    matplotlib = pytest.importorskip("matplotlib")
    for package in ("duckdb", "pyarrow", "webdataset", "fasttext"):
        pytest.importorskip(package)
    monkeypatch.chdir(ROOT)
    commands = "".join(next(cells("markdown"))["source"]).replace("\\\n", " ")
    (extract,) = re.findall(r"^curation (extract .*)$", commands, flags=re.M)
    extract = extract.replace("demo-output/shards", f"{undisturbed.root}/hybrid")
    assert main(shlex.split(extract.replace("demo-output/metadata", f"{tmp_path}/metadata"))) == 0

    matplotlib.use("agg")
    pictures: list[int] = []

    def show() -> None:
        figure = matplotlib.pyplot.gcf()
        figure.savefig(tmp_path / "figure.png")
        pictures.append(len(figure.axes))
        matplotlib.pyplot.close("all")

    import matplotlib.pyplot

    monkeypatch.setattr(matplotlib.pyplot, "show", show)
    monkeypatch.chdir(NOTEBOOK.parent)
    for name, path in (("ROOT", undisturbed.root), ("HYBRID", undisturbed.root / "hybrid")):
        monkeypatch.setenv(name, str(path))
    monkeypatch.setenv("METADATA", str(tmp_path / "metadata"))
    names: dict[str, Any] = {"__name__": "__main__"}
    capsys.readouterr()
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)

    counts = [receipt["counts"] for receipt in done_receipts(undisturbed.root / "hybrid", "04_reshard")]
    total = sum(count["in"] for count in counts)
    assert names["funnel"].fetchall()[-1] == ("04_reshard", len(list(EXAMPLES.glob("*.tar"))), total, total)
    prompts = sum(len(json.loads(path.read_bytes())) for path in (undisturbed.root / "prompts").glob("*.json"))
    assert len(names["edited"]) == prompts > 4
    assert len(names["edited"]) + names["untouched"] == total == len(names["features"])
    assert sum(row[1] for row in names["compared"].fetchall()) == total
    assert sum(names["groups"].values()) == prompts
    assert pictures == [1, 4, 1, 1]
    assert "no_face" in capsys.readouterr().out
