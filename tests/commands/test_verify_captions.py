"""``verify`` of captions of stage 05 that were checked: what its receipts say of the tries must add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import EXAMPLES
from tests.reshard.test_mix import Mixing, verify
from tests.stages import recaption_stub as stub
from tests.stages.harness import Records, read_jsonl

SHARD, STAGE = "00000000", "05_recaption"
Note = dict[str, Any]
records = Records(STAGE)


@pytest.fixture(params=[False, True], ids=["one caption", "several captions"])
def run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Mixing:
    """Of some images the first caption passes, of others the second one, and of others none."""
    (tmp_path / "edits").mkdir()
    run = Mixing(tmp_path, capsys)
    run.put(f"shards/{SHARD}.tar", (EXAMPLES / f"{SHARD}.tar").read_bytes())
    monkeypatch.setenv("CURATION_STUB_REPEATS", "0,1,9")
    flags = ["--check", "repeats", "--device", "cpu", "--quiet"]
    if request.param:
        # Captions begin with what was asked: the second one repeats itself for every image.
        again = "look at it and say what it is, " * 2
        (tmp_path / "prompts.yaml").write_text(f"short: What is it?\nlong: '{again}'\n")
        flags += ["--prompt_file", f"{tmp_path}/prompts.yaml"]
    assert stub.main(["--input", f"{tmp_path}/shards", "--output", f"{tmp_path}/recaptions", *flags]) == 0
    assert run() == 0, run.log
    return run


def receipt_of(run: Mixing) -> Path:
    [path] = (run.root / f"recaptions/_receipts/{STAGE}").glob(f"*/{SHARD}.json")
    return path


def plant(path: Path, change: Callable[[Note], object]) -> None:
    receipt = json.loads(path.read_bytes())
    change(receipt["notes"]["checks"])
    path.write_text(json.dumps(receipt))


def test_tries_for_captions_must_add_up(run: Mixing) -> None:
    path = receipt_of(run)
    note = json.loads(path.read_bytes())["notes"]["checks"]
    assert note["kept"] and note["failed_tries"] > note["rejected"] > 0, note
    listed = len(records.reject_lines(run.root / "recaptions", SHARD))
    has_several = "captions" in json.loads(path.read_bytes())["notes"]
    assert listed < note["rejected"] if has_several else listed == note["rejected"]
    assert verify(run)[0] == 0
    changes: list[tuple[str, Callable[[Note], object]]] = [
        ("are not", lambda told: told.update(tries=told["tries"] + 1)),
        ("are not", lambda told: told.update(kept=told["kept"] - 1)),
        ("captions kept", lambda told: told.update(kept=told["kept"] + 1, tries=told["tries"] + 1)),
        ("but the checks failed", lambda told: told["by_check"].clear()),
        ("but the checks failed", lambda told: told["by_check"].update(repeats=told["failed_tries"] - 1)),
        ("were rejected, of", lambda told: told.update(rejected=told["failed_tries"] + 1)),
        ("captions rejected: 0", lambda told: told.update(rejected=0)),
        (
            "captions failed_tries: 1",
            lambda told: told.update(failed_tries=1, tries=told["kept"] + 1, by_check={"repeats": 1}, rejected=1),
        ),
        ("no valid note", lambda told: told.pop("tries")),
        ("no valid note", lambda told: told.update(kept="many")),
    ]
    whole = path.read_bytes()
    for message, change in changes:
        plant(path, change)
        code, out = verify(run)
        assert code == 1 and message in out and STAGE in out, (message, out)
        path.write_bytes(whole)
    assert verify(run)[0] == 0


def test_tries_are_those_of_the_rows(run: Mixing) -> None:
    """Sums that add up, of which the rows say something else."""
    if "captions" not in json.loads(receipt_of(run).read_bytes())["notes"]:

        def more(told: Note) -> None:
            told.update(failed_tries=told["failed_tries"] + 1, tries=told["tries"] + 1)
            told["by_check"]["repeats"] += 1

        path = receipt_of(run)
        whole = path.read_bytes()
        plant(path, more)
        code, out = verify(run)
        assert code == 1 and "captions failed_tries" in out, out
        path.write_bytes(whole)
    rows = run.root / f"recaptions/rows/{SHARD}.jsonl"
    whole_rows = read_jsonl(rows)
    tried = [row.get("captions_tried") or {"": row["tried"]} for row in whole_rows]
    for one in tried[0].values():
        one["failed_captions"] += 1000
    rows.write_text("".join(json.dumps(row) + "\n" for row in whole_rows))
    code, out = verify(run)
    assert code == 1 and "captions failed_tries" in out, out


def test_captions_that_were_not_checked_have_no_tries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "edits").mkdir()
    run = Mixing(tmp_path, capsys)
    run.put(f"shards/{SHARD}.tar", (EXAMPLES / f"{SHARD}.tar").read_bytes())
    flags = ["--input", f"{tmp_path}/shards", "--output", f"{tmp_path}/recaptions", "--device", "cpu", "--quiet"]
    assert stub.main(flags) == 0 and run() == 0, run.log
    assert "checks" not in json.loads(receipt_of(run).read_bytes())["notes"]
    assert verify(run)[0] == 0
    assert verify(run, "--recaptions", f"{run.root}/recaptions/rows")[0] == 0, "the rows' folder means the same"
