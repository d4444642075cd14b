"""``python -m curation retry``: failed shards become pending again, by a commit like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from curation.__main__ import main
from curation.run.claims import Claims
from tests.processes import ended_at_last, wait_until
from tests.run import toy_stage
from tests.run.toy_runs import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """One shard done, one that fails as a shard, one with a bug, one with too many bad samples."""
    place = Place(tmp_path)
    place.shard("00000000", "keep")
    place.shard("00000001", "keep", "fail", "shard error")
    place.shard("00000002", "bug")
    place.shard("00000003", "fail", "keep")
    assert place.run() == 1
    return place


def retry(place: Place, *more: str) -> int:
    return main(["retry", str(place.root), "--stage", "toy", *more])


def statuses(place: Place) -> str:
    """d(one), f(ailed), r(etry) of the four."""
    return "".join(receipt["status"][0] for _, receipt in sorted(place.receipts().items()))


def test_failed_shards_are_done_by_the_next_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    generations = {shard: receipt["generation"] for shard, receipt in place.receipts().items()}
    place.forget_journal()
    assert place.run() == 1
    assert place.lines("begin") == [], "what has failed is left alone"
    assert retry(place) == 0
    assert "3 failed shards are pending again" in capsys.readouterr().out
    assert statuses(place) == "drrr"
    assert place.receipt("00000001")["generation"] == generations["00000001"] + 1
    for shard in ("00000001", "00000002"):
        place.shard(shard, "keep")
    assert place.run() == 1
    assert statuses(place) == "dddf"
    assert place.receipt("00000003")["attempts"] == 2, "the attempts before count"
    assert place.receipt("00000001")["generation"] == generations["00000001"] + 2
    assert place.litter() == []
    assert not list(place.out.glob("_rejects/toy/00000001*")), "the rejects of the failed attempt went with it"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("shard_error", "drff"),
        ("KeyError", "dfrf"),
        ("too_many_errors", "dffr"),
        ("truncated", "drff"),
        ("nonsense", "dfff"),
    ],
    ids=range(5),  # messages have the test's folder in them
)
def test_by_reason(place: Place, reason: str, expected: str) -> None:
    assert retry(place, "--reason", reason) == 0
    assert statuses(place) == expected


def test_a_reason_is_the_whole_word(place: Place) -> None:
    """Of the slug; of the message any part will do."""
    assert retry(place, "--reason", "shard_err") == 0
    assert statuses(place) == "dfff"


@pytest.mark.parametrize("name", ["03_generate_images", "03", "3", "generate", "03_generate_images_multigpu"])
def test_a_stage_under_each_of_its_names(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("03_generate_images", "04_reshard"):
        (tmp_path / "out" / "_receipts" / stage).mkdir(parents=True)
    assert main(["retry", str(tmp_path), "--stage", name]) == 0
    assert capsys.readouterr().out.startswith("03_generate_images in ")
    assert main(["retry", str(tmp_path), "--stage", "05"]) == 2
    assert "there is no stage '05'; there are: 03_generate_images, 04_reshard" in capsys.readouterr().err


def test_dry_run_changes_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = place.receipts()
    assert retry(place, "--dry_run") == 0
    assert "3 failed shards would be" in capsys.readouterr().out
    assert place.receipts() == before


def test_three_failures_are_quarantined_until_they_are_named(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for _ in range(2):
        assert retry(place) == 0
        assert place.run() == 1
    assert place.receipt("00000001")["attempts"] == 3
    capsys.readouterr()
    assert retry(place) == 0
    out = capsys.readouterr().out
    assert "0 failed shards" in out
    assert "3 not changed: they have failed 3 times" in out
    assert statuses(place) == "dfff"
    names = tmp_path / "names.txt"
    names.write_text("00000001\n00000000\n")
    assert retry(place, "--shards", f"00000002..00000002,@{names}") == 0
    assert "1 of the shards that you named have not failed" in capsys.readouterr().out
    assert statuses(place) == "drrf"
    assert place.run() == 1
    assert place.receipt("00000001")["attempts"] == 1, "its quarantine is lifted"
    assert place.run("--retry_failed") == 1
    assert place.receipt("00000001")["attempts"] == 2


def test_a_shard_in_work_is_left(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Its worker would lose the commit to this one."""
    claims = Claims(place.out / "_claims" / "toy")
    claim = claims.acquire("00000", "00000001")
    assert claim is not None
    try:
        assert retry(place) == 0
        assert "1 not changed: a worker has a claim" in capsys.readouterr().out
        assert statuses(place) == "dfrr"
    finally:
        claims.release(claim)


def test_a_claim_of_a_process_that_is_gone_is_no_obstacle(place: Place) -> None:
    with ended_at_last(place.start("--retry_failed", "--sample_s", "3600")) as slow:  # SIGKILL
        wait_until(lambda: list((place.out / "_claims").rglob("*.claim")), "a claim", while_runs=slow)
    assert retry(place) == 0
    assert statuses(place) == "drrr"


def test_downstream_waits_for_it(place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place.out / "00000001.tar").touch()
    down = ["--input", str(place.out), "--output", str(tmp_path / "down"), "--upstream", "toy", "--as_stage", "down"]
    assert retry(place, "--shards", "00000001") == 0
    assert toy_stage.main([*down, "--lease_s", "1"]) == 1
    assert "00000001 blocked: toy has not finished it yet" in capfd.readouterr().err


def test_what_is_not_there(place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["retry", str(place.root), "--stage", "other"]) == 2
    assert "there are: toy" in capsys.readouterr().err
    assert main(["retry", str(tmp_path / "absent"), "--stage", "toy"]) == 2
    assert retry(place, "--shards", "00000077") == 2
    assert "there is no shard '00000077'" in capsys.readouterr().err


def test_the_output_folder_itself_will_do(place: Place) -> None:
    assert main(["retry", str(place.out), "--stage", "toy"]) == 0
    assert statuses(place) == "drrr"


def test_without_a_command_the_commands_are_shown() -> None:
    for arguments in ([], ["--help"]):
        result = subprocess.run(
            [sys.executable, "-m", "curation", *arguments], capture_output=True, text=True, check=True, timeout=60
        )
        assert "status" in result.stdout
        assert "retry" in result.stdout
    assert main(["tidy"]) == 2
