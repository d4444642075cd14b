"""The record of options: when a run writes it, when another takes its place, and options younger than a folder."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from curation.run.claims import Claims
from curation.run.ledger import Ledger
from curation.storage.files import link_exclusively
from tests.processes import wait_until
from tests.run.toy_runs import Place

Err = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def records(place: Place) -> list[dict[str, Any]]:
    paths = sorted((place.out / "_receipts" / "toy").glob("_epoch.*.json"))
    return [json.loads(path.read_bytes()) for path in paths]


# ---- a run that fails before its first shard


def test_a_model_that_is_missing_pins_no_options(place: Place) -> None:
    place.shards(2)
    assert place.run("--mark", "no model", "--more", place.more) == 2
    assert records(place) == []
    assert not (place.more / "_receipts").exists()
    assert place.run("--mark", "x") == 0
    assert [record["options"]["mark"] for record in records(place)] == ["x"]


def test_neither_does_it_with_several_workers(place: Place) -> None:
    place.shards(2)
    assert place.start("--mark", "no model", "--workers", 2).wait(120) == 2
    assert place.start("--mark", "x", "--workers", 2).wait(120) == 0
    assert [record["options"]["mark"] for record in records(place)] == ["x"]


def test_a_rerun_with_a_missing_model_pins_none_either(place: Place) -> None:
    place.shards(2)
    assert place.run() == 0
    assert place.run("--rerun", "--mark", "no model") == 2
    assert len(records(place)) == 1
    assert place.run("--rerun", "--mark", "y") == 0
    assert {receipt["epoch"] for receipt in place.receipts().values()} == {2}


def test_a_signal_before_the_first_shard_pins_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.shards(2)
    monkeypatch.setattr("tests.run.toy_stage.Toy.open", lambda self, allocation: signal.raise_signal(signal.SIGTERM))
    assert place.run() == 75
    assert records(place) == []


# ---- options under which nothing was done


def test_options_under_which_nothing_was_done_are_replaced(place: Place) -> None:
    place.shards(2)
    place.shard("00000000", "infrastructure")
    place.shard("00000001", "infrastructure")
    assert place.run("--mark", "wrong") == 2
    place.shards(2)
    assert place.run("--mark", "right") == 0
    first, second = records(place)
    assert (first["options"]["mark"], second["options"]["mark"], second["supersedes"]) == ("wrong", "right", 1)
    assert {receipt["epoch"] for receipt in place.receipts().values()} == {2}
    assert place.run("--mark", "wrong") == 2, "now something was done"


def test_a_rerun_of_some_shards_is_not_done_again(place: Place, capsys: Err) -> None:
    place.shards(2)
    place.shard("00000000", "infrastructure")
    assert place.run("--mark", "wrong", "--shards", "00000000") == 2
    assert place.run("--rerun", "--shards", "00000001", "--mark", "sound") == 0
    place.shards(2)
    assert place.run("--mark", "right") == 2
    assert 'mark: "wrong" → "right"' in capsys.readouterr().err
    assert "sound" in (place.out / "00000001.txt").read_text()


@pytest.mark.parametrize(("mark", "code"), [("first", 2), ("right", 0)])
def test_a_rerun_that_did_nothing(place: Place, mark: str, code: int) -> None:
    """Whoever gives it up does not want to do again what was done before; the corrected rerun may forget the flag."""
    place.shards(2)
    assert place.run("--mark", "first") == 0
    place.shard("00000000", "infrastructure")
    assert place.run("--rerun", "--mark", "wrong") == 2
    place.shards(2)
    assert place.run("--mark", mark) == code
    assert mark in (place.out / "00000001.txt").read_text()


def test_other_files_among_the_receipts_do_not_count(place: Place) -> None:
    place.shards(1)
    place.shard("00000000", "infrastructure")
    assert place.run("--mark", "wrong") == 2
    place.shards(1)
    (place.out / "_receipts" / "toy" / ".DS_Store").touch()
    (place.out / "_partial" / "toy").mkdir(parents=True)
    (place.out / "_partial" / "toy" / ".DS_Store").touch()
    assert place.run("--mark", "right") == 0


@pytest.mark.parametrize("what", ["a receipt", "a failed receipt", "a commit", "a partial file"])
def test_options_under_which_something_was_done_stay(place: Place, what: str, capsys: Err) -> None:
    place.shards(1, *["keep"] * 3)
    if what == "a failed receipt":
        place.shard("00000000", "shard error")
    assert place.run("--mark", "old") == (1 if what == "a failed receipt" else 0)
    (receipt,) = (place.out / "_receipts" / "toy").glob("*/*.json")
    if what == "a commit":
        receipt.rename(receipt.with_name(".00000000.1.commit"))
    elif what == "a partial file":
        receipt.unlink()
        partial = place.out / "_partial" / "toy" / receipt.parent.name / f"00000000.{'0' * 16}.{'1' * 16}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"")
    capsys.readouterr()
    assert place.run("--mark", "new") == 2
    assert 'mark: "old" → "new"' in capsys.readouterr().err
    assert len(records(place)) == 1


def test_options_of_a_live_process_stay(place: Place, capsys: Err) -> None:
    place.shards(1, *["keep"] * 10)
    other = place.start("--mark", "old", "--hold", "00000000")
    place.wait_for("sample 00000000", other)
    assert place.run("--mark", "new") == 2
    assert 'mark: "old" → "new"' in capsys.readouterr().err
    place.let_go()
    assert other.wait(120) == 0
    assert len(records(place)) == 1


def test_what_a_process_does_while_another_looks_at_it_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Err
) -> None:
    place.shards(1, *["keep"] * 10)
    other = place.start("--mark", "old", "--hold", "00000000")
    place.wait_for("sample 00000000", other)

    def look(claims: Claims, options_version: int) -> bool:
        place.let_go()
        assert other.wait(120) == 0
        return False

    monkeypatch.setattr(Claims, "others_work_under", look)
    assert place.run("--mark", "new") == 2
    assert 'mark: "old" → "new"' in capsys.readouterr().err
    assert len(records(place)) == 1


def test_a_process_tells_its_options_before_it_records_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one that finds the record must see that it is used."""
    claims = Claims(tmp_path / "_claims", lease_s=60)
    told: list[int] = []

    def link(path: Path, data: bytes) -> bool:
        told.append(claims.heartbeat.options_version)
        return link_exclusively(path, data)

    monkeypatch.setattr("curation.run.ledger.link_exclusively", link)
    ledger = Ledger(tmp_path, "toy", 1, {"mark": "x"})
    ledger.prepare(())
    assert ledger.enter("run", False, None, ["00000000"], claims)
    assert told == [1]


def test_several_processes_replace_them_at_once(place: Place) -> None:
    place.shards(6, "infrastructure")
    assert place.run("--mark", "wrong") == 2
    place.shards(6)
    processes = [place.start("--mark", "right") for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert [record["options"]["mark"] for record in records(place)] == ["wrong", "right"]


def test_options_of_a_process_that_was_killed_are_replaced(place: Place) -> None:
    place.shards(1, *["keep"] * 10)
    other = place.start("--mark", "old", "--hold", "00000000")
    place.wait_for("sample 00000000", other)
    other.kill()
    other.wait(120)
    assert place.run("--mark", "new") == 0
    assert [record["options"]["mark"] for record in records(place)] == ["old", "new"]
    assert "new" in (place.out / "00000000.txt").read_text()


def test_a_process_that_comes_late_stops(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Err) -> None:
    """While it loaded its model, another run recorded other options."""
    place.shards(2, *["keep"] * 10)

    def load(self: object, allocation: object) -> None:
        process = place.start("--mark", "first", "--hold", "00000000")
        place.wait_for("sample 00000000", process)

    monkeypatch.setattr("tests.run.toy_stage.Toy.open", load)
    assert place.run("--mark", "late") == 2
    assert 'mark: "first" → "late"' in capsys.readouterr().err
    place.let_go()
    wait_until(lambda: len(place.receipts()) == 2, "the first run's receipts")


# ---- options that are younger than a folder


def make_older(place: Place) -> None:
    """Take the younger option out of the record, as the version before it wrote it."""
    path = place.out / "_receipts" / "toy" / "_epoch.1.json"
    record = json.loads(path.read_bytes())
    assert record["options"].pop("flavour") is not None
    path.write_text(json.dumps(record))


def test_an_older_folder_goes_on_as_it_began(place: Place, capsys: Err) -> None:
    place.shards(1)
    assert place.run("--flavour", "salty") == 0
    make_older(place)
    place.shards(3)
    assert place.run() == 0
    texts = {(place.out / f"{number:08d}.txt").read_text() for number in range(3)}
    assert texts == {"0000 x salt\n0002 x salt\n"}
    assert len(records(place)) == 1
    assert "--flavour salty: an older version has begun" in capsys.readouterr().err


def test_several_workers_do_so_too(place: Place) -> None:
    place.shards(1)
    assert place.run("--flavour", "salty") == 0
    make_older(place)
    place.shards(3)
    assert place.start("--workers", "2").wait(120) == 0
    assert (place.out / "00000002.txt").read_text() == "0000 x salt\n0002 x salt\n"


def test_the_new_value_is_for_new_folders_and_reruns(place: Place, capsys: Err) -> None:
    place.shards(2)
    assert place.run("--flavour", "salty") == 0
    make_older(place)
    assert place.run("--flavour", "plain") == 2, "the user asked for it, and half the folder would have it"
    assert "flavour: " in capsys.readouterr().err
    assert place.run("--rerun", "--shards", "00000001") == 0
    assert (place.out / "00000001.txt").read_text() == "0000 x\n0002 x\n"
    place.shard("00000001", "keep", "keep")
    place.shard("00000000", "keep", "keep")
    assert place.run("--shards", "00000001") == 0, "it goes on with the options of that rerun"
    assert (place.out / "00000001.txt").read_text() == "0000 x\n0001 x\n"
    assert place.run("--shards", "00000000") == 0
    assert (place.out / "00000000.txt").read_text() == "0000 x salt\n0001 x salt\n"
    assert place.run("--rerun") == 0
    assert (place.out / "00000000.txt").read_text() == "0000 x\n0001 x\n"


def test_the_partial_work_of_an_older_version_is_used(tmp_path: Path) -> None:
    """Its name holds a digest of the options, which did not have the younger one."""
    older = Ledger(tmp_path, "toy", 1, {"mark": "x"})
    now = Ledger(tmp_path, "toy", 1, {"mark": "x", "flavour": "salty"}, before={"flavour": "salty"})
    assert now.fingerprint == older.fingerprint
    other = Ledger(tmp_path, "toy", 1, {"mark": "x", "flavour": "plain"}, before={"flavour": "salty"})
    assert other.fingerprint != older.fingerprint
