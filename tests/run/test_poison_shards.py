"""A shard that kills its workers is found, and the shards beside it are not blamed."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from curation.errors import ShardError
from curation.run.attempt import deaths_without_progress, fail_if_poison, may_be_poison
from curation.run.claims import LostAttempt
from tests.processes import wait_until
from tests.run.toy_runs import Place


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=120)
    return process.returncode


def test_a_shard_that_kills_three_workers_is_failed_by_the_fourth(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.shard("00000000", "keep", "kill")
    place.shard("00000001", "keep")
    environment = {"SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"}
    for _ in range(3):
        assert finish(place.start(environment=environment)) == -signal.SIGKILL
        assert "00000000" not in place.receipts()
    place.forget_journal()
    assert finish(place.start()) == 1
    receipt = place.receipt("00000000")
    assert receipt["status"] == "failed"
    assert receipt["attempts"] == 3, "nobody tries it again unasked"
    error = receipt["error"]
    assert error["reason"] == "workers_died"
    assert error["message"].count("SLURM job 40_7") == 3
    assert receipt["host"] in error["message"]
    assert place.receipt("00000001")["status"] == "done"
    assert not place.lines("begin 00000000"), "the fourth did not try it"
    assert place.litter() == []
    again = place.start("--retry_failed")
    said = again.communicate(timeout=120)
    assert again.returncode == 1
    assert any("name them to try them again, as with --shards 00000000" in text for text in said if text), said
    assert not place.lines("begin 00000000")
    assert finish(place.start("--shards", "00000000")) == -signal.SIGKILL, "asked for by name, it is tried"


def test_workers_that_got_on_do_not_count(tmp_path: Path) -> None:
    """Each attempt finishes a sample more before something kills it: that is a shard too long, not one that kills."""
    place = Place(tmp_path)
    place.shard("00000000", *["keep"] * 8)
    for number in range(5):
        process = place.start("--checkpoint", "--sample_s", "0.15")
        enough = 2 * number + 2
        wait_until(lambda n=enough, p=process: len(place.lines("sample")) >= n or p.poll() is not None, "progress")
        process.kill()
        finish(process)
        if "00000000" in place.receipts():
            break
    assert finish(place.start("--checkpoint")) == 0
    assert place.receipt("00000000")["status"] == "done"


def test_the_shards_beside_it_are_not_blamed(tmp_path: Path) -> None:
    """Three in flight in each process, and one of them kills it: the others are tried alone and done."""
    place = Place(tmp_path)
    place.shard("00000000", "keep", "keep", "keep", "kill")
    for number in (1, 2):
        place.shard(f"0000000{number}", *["keep"] * 40)
    for _ in range(12):
        code = finish(place.start("--in_flight", "3", "--sample_s", "0.02"))
        if code != -signal.SIGKILL:
            break
    assert code == 1
    receipts = place.receipts()
    assert {shard: receipt["status"] for shard, receipt in receipts.items()} == {
        "00000000": "failed", "00000001": "done", "00000002": "done",
    }  # fmt: skip
    assert receipts["00000000"]["error"]["reason"] == "workers_died"
    assert place.litter() == []


def test_a_worker_that_is_asked_to_end_does_not_count(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.shard("00000000", *["keep"] * 100)
    for _ in range(4):
        process = place.start("--sample_s", "0.02")
        place.wait_for("sample", process)
        process.send_signal(signal.SIGTERM)
        assert finish(process) == 75
        place.forget_journal()
    assert finish(place.start()) == 0


def deaths(*tokens: str, alone: str = "") -> list[LostAttempt]:
    return [LostAttempt(token, "node1", 7, {}, token == alone) for token in tokens]


def test_only_the_last_in_a_row_without_fruit_count() -> None:
    assert [d.token for d in deaths_without_progress(deaths("a", "b", "c", "d"), {"b"})] == ["c", "d"]
    assert deaths_without_progress(deaths("a", "b"), {"b"}) == []
    assert [d.token for d in deaths_without_progress(deaths("a", "", "b"), set())] == ["a", "b"], "one had not begun"


def test_nobody_is_blamed_for_a_death_in_company() -> None:
    fail_if_poison("1", deaths("a", "b", "c", "d"))
    fail_if_poison("1", deaths("a", "b", alone="b"))
    with pytest.raises(ShardError, match="3 workers died") as caught:
        fail_if_poison("1", deaths("a", "b", "c", alone="c"))
    assert caught.value.reason == "workers_died"
    assert not may_be_poison(deaths("a"))
    assert may_be_poison(deaths("a", "b"))
