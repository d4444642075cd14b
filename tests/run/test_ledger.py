"""What is pending, done, failed or blocked: epochs of options, stale inputs, receipts of other stages."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from curation.errors import InfrastructureError, ShardError, UsageError
from curation.run.inputs import Input, receipts_of, stage_version, verify_inputs
from curation.run.ledger import Ledger, done_receipts
from curation.storage.files import AtomicFile
from tests.run.toy_runs import Place

SHARD = "00000012"


def ledger(root: Path, stage: str = "stage", version: int = 1, *, read_only: bool = False, **options: Any) -> Ledger:
    return Ledger(root, stage, version, options, read_only=read_only)


def entered(
    root: Path, run: str = "r1", *, rerun: bool = False, subset: list[str] | None = None, **rest: Any
) -> Ledger:
    made = ledger(root, **rest)
    made.prepare(())
    made.enter(run, rerun, subset, subset or [SHARD, "00000013"])
    return made


def publish(
    made: Ledger, shard: str = SHARD, *, inputs: list[Input] | None = None, text: str = "x", status: str = "done",
    folder: Path | None = None, run: str = "r1",
) -> None:  # fmt: skip
    """One finished attempt at a shard."""
    state = made.state(shard, inputs or [], fresh=True)
    token = os.urandom(8).hex()
    with AtomicFile((folder or made.root) / f"{shard}.json", token) as file:
        file.write(text.encode())
    output = {
        "path": os.path.relpath(file.final, made.root), "temporary": file.temporary.name, "size": file.size,
        "digest": file.digest,
    }  # fmt: skip
    generation = int(state.receipt["generation"]) + 1 if state.receipt else 1
    made.commit(shard).write(
        {
            "shard": shard, "status": status, "version": made.version, "token": token, "generation": generation,
            "epoch": made.governing(shard).number, "inputs": list(state.inputs), "outputs": [output], "run": run,
            "error": {"message": "it broke"},
        }
    )  # fmt: skip


def what(made: Ledger, shard: str = SHARD, inputs: list[Input] | None = None) -> str:
    """A new process's view and a fresh look must agree."""
    fresh = made.state(shard, inputs or [], fresh=True).what
    made.forget_listing()
    assert made.state(shard, inputs or []).what == fresh
    return fresh


# ---- states


def test_pending_then_done(tmp_path: Path) -> None:
    made = entered(tmp_path)
    assert what(made) == "pending"
    publish(made)
    assert what(made) == "done"
    assert what(entered(tmp_path, "r2")) == "done"
    assert what(made, "00000013") == "pending"


def test_reading_creates_nothing(tmp_path: Path) -> None:
    made = ledger(tmp_path / "out", read_only=True)
    made.enter("r", False, None, [SHARD])
    assert made.state(SHARD, []).what == "pending"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_receipt_whose_output_is_not_there_is_no_done_shard(tmp_path: Path, damage: str) -> None:
    made = entered(tmp_path)
    publish(made)
    output = tmp_path / f"{SHARD}.json"
    if damage == "missing":
        output.unlink()
    else:
        output.write_bytes(b"")
    assert what(made) == "pending"
    publish(made)
    assert made.receipt(SHARD)["generation"] == 2  # type: ignore[index]
    assert what(made) == "done"


def test_what_is_no_receipt_counts_as_none(tmp_path: Path) -> None:
    made = entered(tmp_path)
    publish(made)
    made.commit(SHARD).receipt_path.write_bytes(b"\0" * 100)
    assert what(made) == "pending"


def test_a_failed_shard_says_why(tmp_path: Path) -> None:
    made = entered(tmp_path)
    publish(made, status="failed")
    state = made.state(SHARD, [])
    assert (state.what, state.why) == ("failed", "it broke")


def test_a_commit_left_half_done_is_finished_by_whoever_looks(tmp_path: Path) -> None:
    made = entered(tmp_path)
    publish(made)
    path = made.commit(SHARD).receipt_path
    record = json.loads(path.read_bytes()) | {"generation": 2, "token": "second"}
    record["outputs"][0]["temporary"] = f".{SHARD}.json.second.tmp"
    for fresh in (True, False):
        (tmp_path / f".{SHARD}.json.second.tmp").write_bytes(b"y")
        path.with_name(f".{SHARD}.second.tmp").write_text(json.dumps(record))
        os.link(path.with_name(f".{SHARD}.second.tmp"), path.with_name(f".{SHARD}.{record['generation']}.commit"))
        looker = ledger(tmp_path, read_only=True)
        looker.enter("r", False, None, [SHARD])
        assert looker.state(SHARD, [], fresh=fresh).receipt["generation"] == record["generation"] - 1  # type: ignore[index]
        looker = entered(tmp_path, "r3")
        assert looker.state(SHARD, [], fresh=fresh).receipt["token"] == "second"  # type: ignore[index]
        assert not list(path.parent.glob(".*"))
        assert (tmp_path / f"{SHARD}.json").read_bytes() == b"y"
        record["generation"] += 1


# ---- epochs


def test_other_options_are_refused_and_named(tmp_path: Path) -> None:
    entered(tmp_path, seed=1, model="a", same=[1, 2])
    with pytest.raises(UsageError) as caught:
        entered(tmp_path, seed=2, same=[1, 2], new="\x1b")
    text = str(caught.value)
    assert "seed: 1 → 2" in text
    assert 'model: "a" → null' in text
    assert "new: null" in text
    assert "same" not in text.partition("(")[2].partition(")")[0]
    assert "--rerun" in text
    entered(tmp_path, seed=1, model="a", same=[1, 2])


def test_another_version_of_the_stage_is_another_option(tmp_path: Path) -> None:
    entered(tmp_path)
    with pytest.raises(UsageError, match="stage version 1 → 2"):
        entered(tmp_path, version=2)


def test_a_rerun_makes_everything_pending_once(tmp_path: Path) -> None:
    made = entered(tmp_path, seed=1)
    publish(made)
    again = entered(tmp_path, "r2", rerun=True, seed=2)
    assert what(again) == "pending"
    publish(again)
    assert what(again) == "done"
    assert what(entered(tmp_path, "r3", seed=2)) == "done"
    with pytest.raises(UsageError, match="seed: 2 → 1"):
        entered(tmp_path, "r4", seed=1)


def test_a_rerun_with_the_same_options_does_it_again(tmp_path: Path) -> None:
    publish(entered(tmp_path, seed=1))
    assert what(entered(tmp_path, "r2", rerun=True, seed=1)) == "pending"


def test_tasks_of_one_run_share_its_rerun(tmp_path: Path) -> None:
    """So does the same job after it was requeued: else every requeue would begin from nothing."""
    entered(tmp_path, seed=1)
    first = entered(tmp_path, "slurm-7", rerun=True, seed=2)
    publish(first)
    for _ in range(3):
        task = entered(tmp_path, "slurm-7", rerun=True, seed=2)
        assert what(task) == "done"
    assert len(list((tmp_path / "_receipts/stage").glob("_epoch.*.json"))) == 2
    assert what(entered(tmp_path, "slurm-8", rerun=True, seed=2)) == "pending", "another job, another rerun"
    assert what(entered(tmp_path, "slurm-7", rerun=True, seed=2)) == "pending", "the older job starts no third one"
    assert len(list((tmp_path / "_receipts/stage").glob("_epoch.*.json"))) == 3


def test_a_run_may_rerun_two_subsets_one_after_the_other(tmp_path: Path) -> None:
    """Two commands of one job: the second is not the first, though all else is the same."""
    for shard in (SHARD, "00000013"):
        publish(entered(tmp_path), shard)
    assert what(entered(tmp_path, "slurm-7", rerun=True, subset=[SHARD])) == "pending"
    assert what(entered(tmp_path, "slurm-7", rerun=True, subset=["00000013"]), "00000013") == "pending"


def test_a_subset_done_again_is_not_undone_by_the_next_full_run(tmp_path: Path) -> None:
    for shard in (SHARD, "00000013"):
        publish(entered(tmp_path, seed=1), shard)
    part = entered(tmp_path, "r2", rerun=True, subset=[SHARD], seed=2)
    assert what(part) == "pending"
    assert what(part, "00000013") == "done"
    publish(part)
    full = entered(tmp_path, "r3", seed=1)
    assert what(full) == "done"
    assert what(full, "00000013") == "done"
    assert full.receipt(SHARD)["epoch"] == 2  # type: ignore[index]
    assert entered(tmp_path, "r4", subset=[SHARD], seed=2), "going on with the subset needs no --rerun"
    with pytest.raises(UsageError):
        entered(tmp_path, "r5", subset=["00000013"], seed=2)


def test_a_subset_that_is_not_done_yet_is_left_to_its_options(tmp_path: Path) -> None:
    publish(entered(tmp_path, seed=1))
    entered(tmp_path, "r2", rerun=True, subset=[SHARD], seed=2)
    state = entered(tmp_path, "r3", seed=1).state(SHARD, [])
    assert state.what == "blocked"
    assert "epoch 2" in state.why


def test_an_older_run_stops_when_a_newer_one_takes_its_shards(tmp_path: Path) -> None:
    old = entered(tmp_path, seed=1)
    old.check_options_version(SHARD)
    entered(tmp_path, "r2", rerun=True, subset=["00000013"], seed=2)
    old.check_options_version(SHARD)
    with pytest.raises(InfrastructureError, match="this older run stops"):
        old.check_options_version("00000013")
    entered(tmp_path, "r3", rerun=True, seed=3)
    with pytest.raises(InfrastructureError):
        old.check_options_version(SHARD)


def test_an_epoch_that_is_none_is_not_overwritten(tmp_path: Path) -> None:
    entered(tmp_path)
    (tmp_path / "_receipts/stage/_epoch.1.json").write_bytes(b"")
    with pytest.raises(InfrastructureError, match=r"_epoch\.1\.json: not a record"):
        entered(tmp_path)


def test_options_that_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be recorded"):
        ledger(tmp_path, prompt="\ud800")


# ---- inputs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "shards" / f"{SHARD}.tar"
    path.parent.mkdir()
    path.write_bytes(b"data")
    return path


def test_inputs_made_elsewhere_count_by_size_and_time(tmp_path: Path, source: Path) -> None:
    made, inputs = entered(tmp_path / "out"), [Input(source)]
    publish(made, inputs=inputs)
    assert what(made, inputs=inputs) == "done"
    os.utime(source, (1, 1))
    assert what(made, inputs=inputs) == "pending"
    publish(made, inputs=inputs)
    source.write_bytes(b"data2")
    os.utime(source, (1, 1))
    assert what(made, inputs=inputs) == "pending"


def test_a_failed_shard_is_pending_again_once_its_input_changed(tmp_path: Path, source: Path) -> None:
    made, inputs = entered(tmp_path / "out"), [Input(source)]
    publish(made, inputs=inputs, status="failed")
    assert what(made, inputs=inputs) == "failed"
    source.write_bytes(b"mended")
    assert what(made, inputs=inputs) == "pending"


def test_a_missing_input_blocks_and_an_optional_one_does_not(tmp_path: Path, source: Path) -> None:
    made = entered(tmp_path / "out")
    absent = tmp_path / "shards" / "absent.json"
    state = made.state(SHARD, [Input(source), Input(absent)])
    assert state.what == "blocked"
    assert str(absent) in state.why
    inputs = [Input(source), Input(absent, optional=True)]
    assert made.state(SHARD, inputs).inputs[1] == {"path": "absent.json", "absent": True}
    publish(made, inputs=inputs)
    assert what(made, inputs=inputs) == "done"
    absent.write_text("{}")
    assert what(made, inputs=inputs) == "pending", "it came"


def upstream(tmp_path: Path) -> tuple[Ledger, Input]:
    made = entered(tmp_path / "captions", stage="01", run="u")
    return made, Input(tmp_path / "captions" / f"{SHARD}.json", "01")


def test_upstream_receipts_vouch_for_inputs(tmp_path: Path) -> None:
    up, wanted = upstream(tmp_path)
    made = entered(tmp_path / "prompts", stage="02")
    assert made.state(SHARD, [wanted]).what == "blocked"
    assert "no receipt for it yet" in made.state(SHARD, [wanted]).why
    publish(up)
    assert what(made, inputs=[wanted]) == "pending"
    publish(made, inputs=[wanted])
    os.utime(wanted.path, (1, 1))
    assert what(made, inputs=[wanted]) == "done", "its time says nothing: its receipt does"
    publish(up)
    assert what(made, inputs=[wanted]) == "done", "the same bytes again"
    publish(up, text="other")
    assert what(made, inputs=[wanted]) == "pending"
    publish(up, status="failed")
    state = made.state(SHARD, [wanted], fresh=True)
    assert state.what == "blocked"
    assert "01 failed on it" in state.why


def test_a_failed_upstream_blocks_that_shard_alone(tmp_path: Path) -> None:
    up, wanted = upstream(tmp_path)
    other = Input(tmp_path / "captions" / "00000013.json", "01")
    publish(up, status="failed")
    publish(up, "00000013")
    made = entered(tmp_path / "prompts", stage="02")
    assert what(made, inputs=[wanted]) == "blocked"
    assert what(made, "00000013", [other]) == "pending"


def test_files_made_elsewhere_need_no_receipts(tmp_path: Path) -> None:
    wanted = Input(tmp_path / f"{SHARD}.json", "01")
    wanted.path.write_text("{}")
    made = entered(tmp_path / "out")
    assert "mtime_ns" in made.state(SHARD, [wanted]).inputs[0]
    up = entered(tmp_path, stage="01", run="u")  # the stage begins while this run goes on
    assert made.state(SHARD, [wanted], fresh=True).what == "blocked"
    publish(up)
    assert "digest" in made.state(SHARD, [wanted], fresh=True).inputs[0]


def test_an_output_that_the_receipt_does_not_name_is_not_taken(tmp_path: Path) -> None:
    """A leftover in the right place, from another time."""
    up, wanted = upstream(tmp_path)
    publish(up)
    leftover = Input(tmp_path / "captions" / f"{SHARD}.tar", "01")
    leftover.path.write_bytes(b"old")
    made = entered(tmp_path / "out")
    state = made.state(SHARD, [wanted, leftover])
    assert state.what == "blocked"
    assert f"does not name {SHARD}.tar" in state.why
    optional = Input(leftover.path, "01", optional=True)
    assert made.state(SHARD, [wanted, optional]).inputs[1] == {"path": f"{SHARD}.tar", "absent": True}


@pytest.mark.parametrize("how", ["plain", "relative", "symlink"])
def test_a_pointer_leads_from_a_further_output_to_the_receipts(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, edits = tmp_path / "captions", tmp_path / "deep" / "er" / "edits"
    if how == "symlink":
        (tmp_path / "far" / "away" / "edits").mkdir(parents=True)
        edits.parent.mkdir(parents=True)
        edits.symlink_to(tmp_path / "far" / "away" / "edits")
    if how == "relative":
        monkeypatch.chdir(tmp_path)
        captions, edits = Path("captions"), Path("deep/er/edits")
    up = ledger(captions, "01")
    up.prepare((edits, captions))
    up.enter("r", False, None, [SHARD])
    assert not (captions / "_receipts/01/_home.json").exists()
    publish(up, folder=edits, text="in edits")
    monkeypatch.chdir("/")
    reached = (tmp_path / "deep/er/edits").resolve() if how == "symlink" else tmp_path / "deep/er/edits"
    for folder in {reached, tmp_path / "deep/er/edits"}:
        wanted = Input(folder / f"{SHARD}.json", "01")
        made = entered(tmp_path / "out")
        state = made.state(SHARD, [wanted])
        assert state.what == "pending", state.why
        assert "digest" in state.inputs[0]
        verify_inputs([wanted], state.inputs)
        assert receipts_of(folder, "01") == tmp_path.resolve() / "captions/_receipts/01"
        assert stage_version(folder, "01", SHARD) == 1
        assert stage_version(folder, "04", SHARD) is None


def test_a_folder_of_another_output_is_refused(tmp_path: Path) -> None:
    """Readers of the edits would be led to the receipts of the first output, which say nothing of these files."""
    ledger(tmp_path / "a", "01").prepare((tmp_path / "edits",))
    ledger(tmp_path / "a", "01").prepare((tmp_path / "edits",))
    ledger(tmp_path / "c", "03").prepare((tmp_path / "edits",))
    with pytest.raises(UsageError, match=r"--output \.\./a"):
        ledger(tmp_path / "b", "01").prepare((tmp_path / "edits",))


def test_a_moved_tree_keeps_its_ledger(tmp_path: Path) -> None:
    up = ledger(tmp_path / "old" / "captions", "01")
    up.prepare((tmp_path / "old" / "edits",))
    up.enter("r", False, None, [SHARD])
    publish(up, folder=tmp_path / "old" / "edits")
    (tmp_path / "old").rename(tmp_path / "new")
    made = entered(tmp_path / "out")
    assert made.state(SHARD, [Input(tmp_path / "new/edits" / f"{SHARD}.json", "01")]).what == "pending"
    moved = ledger(tmp_path / "new" / "captions", "01")
    moved.prepare((tmp_path / "new" / "edits",))
    moved.enter("r", False, None, [SHARD])
    assert what(moved) == "done"


@pytest.mark.parametrize("damage", ["other bytes", "other size", "missing"])
def test_damaged_inputs_are_noticed_before_they_are_used(tmp_path: Path, damage: str) -> None:
    up, wanted = upstream(tmp_path)
    publish(up)
    state = entered(tmp_path / "out").state(SHARD, [wanted])
    verify_inputs([wanted], state.inputs)
    if damage == "missing":
        wanted.path.unlink()
    else:
        wanted.path.write_bytes(b"y" if damage == "other bytes" else b"yy")
    with pytest.raises(ShardError, match=f"{SHARD}.json"):
        verify_inputs([wanted], state.inputs)


def test_all_receipts_of_a_stage(tmp_path: Path) -> None:
    made = entered(tmp_path)
    for shard in ("00000012", "00001012", "00000003"):
        publish(made, shard)
    (tmp_path / "_receipts/stage/00000/.00000012.0123456789abcdef.tmp").touch()
    assert [receipt["shard"] for receipt in done_receipts(tmp_path, "stage")] == ["00000003", "00000012", "00001012"]
    assert list(done_receipts(tmp_path, "other")) == []


def test_one_listing_serves_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = entered(tmp_path)
    publish(made)
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    again = ledger(tmp_path)
    for number in range(1000):
        again.state(f"{number:08d}", [])
    assert len(listed) == 1


# ---- through the runner


def test_runs_with_other_options_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    place.shards(3)
    assert place.run() == 0
    before = place.published()
    assert place.run("--mark", "y") == 2
    assert 'mark: "x" → "y"' in capsys.readouterr().err
    assert place.published() == before
    assert place.run("--mark", "y", "--rerun", "--shards", "00000001") == 0
    assert place.run() == 0
    after = place.published()
    assert {name for name in before if before[name] != after[name]} == {
        "out/00000001.txt", "out/_provenance/toy/00000001.jsonl",
    }  # fmt: skip
    assert place.run("--mark", "z", "--rerun") == 0
    assert all(receipt["epoch"] == 3 for receipt in place.receipts().values())


def test_failed_attempts_are_counted_and_end(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.shard("1", "shard error")
    place.shard("2", "keep")
    assert place.run() == 1
    assert place.receipt("1")["attempts"] == 1
    assert place.run() == 1
    assert place.receipt("1")["attempts"] == 1, "not without being asked"
    for attempts in (2, 3, 3, 3):
        assert place.run("--retry_failed") == 1
        assert place.receipt("1")["attempts"] == attempts
    assert place.run("--shards", "1") == 1
    assert place.receipt("1")["attempts"] == 4, "named, it is always tried"
    assert place.run("--shards", "2") == 0
    time.sleep(0.01)
    place.shard("1", "keep")
    assert place.run() == 0
    assert place.receipt("1")["status"] == "done"
    assert place.lines("begin 2") == ["begin 2 running 1"]


def test_an_upstream_stage_and_one_that_follows(tmp_path: Path) -> None:
    first = Place(tmp_path)
    first.shards(3)
    first.shard("00000001", "shard error")
    assert first.run("--as_stage", "up") == 1
    second = Place(tmp_path / "second")
    arguments = ["--input", first.out, "--upstream", "up", "--suffix", ".txt"]
    first.out.joinpath("00000001.txt").write_text("a leftover\n")
    assert second.run(*arguments) == 1, "one is blocked"
    assert sorted(second.receipts()) == ["00000000", "00000002"]
    first.shard("00000001", "keep")
    assert first.run("--as_stage", "up") == 0
    assert second.run(*arguments) == 0
    assert sorted(second.receipts()) == ["00000000", "00000001", "00000002"]
