"""The loop over shards, by a toy stage: what a run does, how it ends, and what it leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.cluster import StopSignal, process_start
from curation.errors import Stopped
from curation.options import RunOptions, logger, parse_options, set_up_logging
from curation.run import claims, runner
from curation.run.attempt import Attempts
from curation.run.workers import to_argv
from curation.shards import Shard
from curation.storage.files import fast_digest
from tests import ROOT
from tests.processes import wait_until
from tests.run import toy_stage
from tests.run.toy_runs import Place, drops, rejects


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


Err = pytest.CaptureFixture[str]


# ---- what comes out


def test_everything_is_published_with_its_receipt(place: Place) -> None:
    place.shard("00000000", "keep", "drop", "fail", "keep", "drop", "keep", "keep", "keep")
    assert place.run("--more", place.more) == 0
    receipt = place.receipt("00000000")
    assert receipt["status"] == "done"
    assert receipt["counts"] == {"in": 8, "kept": 5, "dropped": {"not_wanted": 2}, "failed": {"broken": 1}}
    assert receipt["inputs"][0]["path"] == "00000000.tar"
    assert {"host", "code", "seconds", "started", "finished", "run", "token", "slurm", "rank"} <= receipt.keys()
    assert {output["path"] for output in receipt["outputs"]} == {
        "00000000.txt", "../more/00000000.more", "_rejects/toy/00000000.jsonl", "_rejects/toy/00000000.drops.tsv.gz",
        "_provenance/toy/00000000.jsonl",
    }  # fmt: skip
    for output in receipt["outputs"]:
        path = place.out / output["path"]
        assert (path.stat().st_size, fast_digest(path)) == (output["size"], output["digest"])
    assert rejects(place, "00000000") == [{"key": "0002", "reason": "broken", "detail": "a detail with [31m colour"}]
    assert drops(place, "00000000") == [("not_wanted", "0001"), ("not_wanted", "0004")]
    assert (place.out / "_provenance/toy/00000000.jsonl").read_text().count("\n") == 5
    assert place.litter() == []


def test_nothing_empty_is_written(place: Place) -> None:
    place.shard("1", "keep")
    place.shard("2", "drop")
    assert place.run() == 0
    assert not (place.out / "_rejects/toy/1.jsonl").exists()
    assert not (place.out / "_rejects/toy/1.drops.tsv.gz").exists()
    assert not (place.out / "_provenance/toy/2.jsonl").exists()
    assert not (place.out / "2.txt").exists()
    assert all(path.stat().st_size for path in place.out.rglob("*") if path.is_file())


def test_an_empty_shard_is_done_with_a_warning(place: Place, capsys: Err) -> None:
    place.shard("1")
    assert place.run() == 0
    assert place.receipt("1")["counts"]["in"] == 0
    assert "1.tar: no samples" in place.receipt("1")["warnings"][0]
    assert "1.tar: no samples" in capsys.readouterr().err


def test_started_again_it_does_nothing_and_opens_no_model(place: Place) -> None:
    place.shards(50)
    assert place.run() == 0
    state = {path: path.stat().st_mtime_ns for path in place.out.rglob("*") if path.is_file()}
    place.forget_journal()
    assert place.run() == 0
    assert place.lines("open") == []
    assert place.lines("begin") == []
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*") if path.is_file()} == state


def test_only_what_is_asked_for(place: Place) -> None:
    place.shards(5)
    assert place.run("--shards", "00000001,3..4") == 0
    assert sorted(place.receipts()) == ["00000001", "00000003", "00000004"]


def test_dry_run_writes_nothing(place: Place, capsys: Err) -> None:
    place.shards(3)
    place.shard("00000001", "shard error")
    assert place.run("--dry_run") == 0
    assert "toy into" in capsys.readouterr().out
    assert not place.out.exists()
    assert not place.journal.exists()
    assert place.run() == 1
    place.shard("00000003", "keep")
    before = {path: path.stat().st_mtime_ns for path in place.root.rglob("*")}
    assert place.run("--dry_run") == 0
    assert capsys.readouterr().out.endswith(": 2 done, 1 failed, 1 pending\n")
    assert place.run("--dry_run", "--rerun", "--mark", "z") == 0
    assert capsys.readouterr().out.endswith(": 4 pending\n")
    assert place.run("--dry_run", "--mark", "z") == 2
    shutil.rmtree(place.out / "_receipts" / "toy" / "00000")
    (place.out / "_receipts" / "toy" / "_epoch.1.json").unlink()
    assert place.run("--dry_run") == 0
    assert not (place.out / "_receipts" / "toy" / "_epoch.1.json").exists()
    after = {path: path.stat().st_mtime_ns for path in place.root.rglob("*")}
    changed = {path for path, stamp in after.items() if before.get(path) != stamp}
    assert changed == {place.out / "_receipts" / "toy"}, "by this test"


# ---- what goes wrong


def test_a_shard_that_fails_does_not_stop_the_others(place: Place, capsys: Err) -> None:
    place.shards(3)
    place.shard("00000001", "keep", "shard error", "keep")
    assert place.run() == 1
    receipts = place.receipts()
    assert {shard: receipt["status"] for shard, receipt in receipts.items()} == {
        "00000000": "done", "00000001": "failed", "00000002": "done",
    }  # fmt: skip
    error = receipts["00000001"]["error"]
    assert error["message"].endswith("00000001.tar: is truncated")
    assert error["reason"] == "shard_error"
    assert error["traceback"] == ""
    assert "00000001 failed: " in capsys.readouterr().err
    assert place.litter() == []


def test_a_bug_makes_a_receipt_with_its_traceback(place: Place, capsys: Err) -> None:
    """Even one whose message is no text that can be written down."""
    place.shard("1", "bug")
    place.shard("2", "keep")
    assert place.run() == 1
    error = place.receipt("1")["error"]
    assert error["message"].startswith("KeyError: ")
    assert error["reason"] == "KeyError"
    assert "_go_wrong" in error["traceback"]
    assert "toy_stage.py" in error["traceback"]
    assert place.receipt("2")["status"] == "done"
    assert "Traceback" in capsys.readouterr().err


def test_a_sample_that_is_lost_fails_its_shard(place: Place) -> None:
    place.shard("1", "keep", "lose", "keep", "keep")
    assert place.run() == 1
    receipt = place.receipt("1")
    assert "4 samples came in, but 3 kept + 0 dropped + 0 failed = 3 came out" in receipt["error"]["message"]
    assert not (place.out / "1.txt").exists()


def test_max_error_rate(place: Place) -> None:
    place.shard("1", "keep", "fail", "keep", "keep")
    place.shard("2", "keep", "fail", "fail", "keep")
    assert place.run("--max_error_rate", "0.25") == 1
    assert place.receipt("1")["status"] == "done"
    assert place.receipt("2")["status"] == "failed"
    assert "2 of 4 samples failed (2 broken)" in place.receipt("2")["error"]["message"]
    assert place.receipt("2")["error"]["reason"] == "too_many_errors"
    assert len(rejects(place, "2")) == 2, "the rejects say which"
    assert not (place.out / "2.txt").exists()
    assert place.run("--retry_failed", "--max_error_rate", "0.5") == 0
    assert (place.out / "2.txt").exists()


def test_the_last_lines_tell_which_failed_shards_are_tried_again(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.shard("1", "keep", "lose")
    for _ in range(2):
        assert place.run("--retry_failed") == 1
        assert "; --retry_failed tries them again\n" in capsys.readouterr().err
    place.shard("2", "keep", "lose")
    assert place.run("--retry_failed") == 1
    said = capsys.readouterr().err
    assert "tries them again, but for 1 that failed three times or killed three workers: name these" in said
    assert "as with --shards 1\n" in said
    for _ in range(2):
        assert place.run("--retry_failed") == 1
    assert "they failed three times or killed three workers: name them to try them again" in capsys.readouterr().err


def test_half_an_output_is_not_published(place: Place) -> None:
    place.shard("1", "keep", "half")
    assert place.run() == 1
    assert [path.name for path in place.out.iterdir() if path.is_file()] == []
    assert place.litter() == []


def test_no_model_is_one_line_and_exit_2(place: Place, capsys: Err) -> None:
    place.shards(3)
    assert place.run("--mark", "no model") == 2
    assert capsys.readouterr().err == "error: models/absent: there is no such model\n"
    assert place.lines("begin") == []
    assert place.lines("close") == ["close"]
    assert place.litter() == []


def test_an_infrastructure_error_in_a_shard_stops_the_run(place: Place, capsys: Err) -> None:
    place.shards(5)
    place.shard("00000001", "infrastructure")
    assert place.run("--quiet") == 2
    assert capsys.readouterr().err == "error: no endpoint answers\n"
    assert sorted(place.receipts()) == ["00000000"], "it says nothing about the shard"
    assert place.litter() == []


def test_a_full_disk_met_by_the_stage_itself_is_no_shards_fault(place: Place, capsys: Err) -> None:
    place.shard("1", "disk full")
    assert place.run() == 2
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert place.receipts() == {}


def test_unknown_flags_and_values(place: Place) -> None:
    place.shards(1)
    for wrong in (["--no_such_flag"], ["--lease_s", "soon"], ["--workers"]):
        assert place.run(*wrong) == 2
    for wrong in (["--workers", "0"], ["--max_error_rate", "1.5"], ["--lease_s", "0"], ["--deadline", "soon"]):
        assert place.run(*wrong) == 2
    assert not place.out.exists()


def test_flags_may_have_dashes(place: Place) -> None:
    place.shards(1)
    assert place.run("--max-error-rate", "0.5", "--in-flight", "2") == 0


def test_no_input(place: Place, capsys: Err) -> None:
    assert place.run() == 2
    assert "no *.tar shards found" in capsys.readouterr().err
    assert place.run("--input", place.root / "absent") == 2


def test_an_output_that_is_a_file(place: Place, capsys: Err) -> None:
    place.shards(1)
    place.out.touch()
    assert place.run() == 2
    assert re.fullmatch(r"error: .*/out: cannot be written: File exists.*\n", capsys.readouterr().err)


UNPRIVILEGED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests import replaced
from tests.run import toy_stage
toy_stage.main(replaced(sys.argv[3:], ["--output", sys.argv[2], "--quiet"]))  # imports what the user may not read
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(toy_stage.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("what", ["root", "receipts", "claims"])
def test_a_folder_that_may_not_be_written(what: str) -> None:
    with tempfile.TemporaryDirectory() as base:  # pytest's own folders are closed to others
        place = Place(Path(base) / "work")
        place.shards(2)
        folders = {"root": "", "receipts": "_receipts/toy", "claims": "_claims"}
        closed = place.out / folders[what]
        closed.mkdir(parents=True)
        for path in [Path(base), place.root, *place.root.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o644)
        closed.chmod(0o555)
        arguments = ["--input", str(place.source), "--output", str(place.out)]
        if os.getuid() == 0:
            warm = str(Path(base) / "warm")
            command = [sys.executable, "-c", UNPRIVILEGED, str(ROOT), warm, *arguments]
        else:
            command = [sys.executable, toy_stage.__file__, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        closed.chmod(0o755)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {closed}")
    assert "Permission denied" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB, where one may be mounted."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no filesystem can be mounted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk(place: Place, small_disk: Path, capsys: Err) -> None:
    place.out = small_disk / "out"
    place.shard("1", "keep")
    place.shard("2", "big")
    assert place.run("--quiet") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2.big" in line
    assert "the disk is full" in line
    assert sorted(place.receipts()) == ["1"]
    assert place.litter() == []
    place.shard("2", "keep")
    assert place.run() == 0, "once it is mended, it goes on"


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.path.insert(0, sys.argv[1])
from tests.run import toy_stage
sys.exit(toy_stage.main(sys.argv[2:]))
"""


def test_a_file_that_may_grow_no_more(place: Place) -> None:
    """As a full disk, for those who may not mount one."""
    place.shard("1", "big")
    place.shard("2", "keep")
    command = [sys.executable, "-c", LIMITED, str(ROOT), *place.arguments("--quiet")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "1.big" in line
    assert "File too large" in line
    assert place.litter() == []


def test_a_commit_that_breaks_off_is_finished_by_the_next_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Err
) -> None:
    """Its record is valid: the outputs under their temporary names must outlive the process that wrote them."""
    place.shard("1", "keep", "fail", "keep", "keep", "keep", "keep")
    rename = os.rename

    def broken(source: Path, target: Path) -> None:
        if str(target).endswith("1.txt"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", broken)
        assert place.run("--quiet") == 2
    assert "Input/output error" in capsys.readouterr().err
    assert place.receipts() == {}
    place.forget_journal()
    assert place.run() == 0
    assert place.lines("begin") == [], "the work was done"
    assert place.receipt("1")["counts"]["kept"] == 5
    assert (place.out / "1.txt").read_text().count("\n") == 5
    assert place.litter() == []


def test_an_input_that_is_not_what_upstream_published_blocks_its_shard(place: Place, capsys: Err) -> None:
    """Not ready, not failed: upstream may be in the middle of its next commit."""
    place.shards(2)
    assert place.run("--as_stage", "up") == 0
    path = place.out / "00000001.txt"
    path.write_bytes(path.read_bytes().replace(b"x", b"y"))
    second = Place(place.root / "second")
    assert second.run("--input", place.out, "--upstream", "up", "--suffix", ".txt") == 1
    assert second.receipt("00000000")["status"] == "done"
    assert sorted(second.receipts()) == ["00000000"]
    assert re.search(
        r"00000001 blocked: .*00000001\.txt: this differs from the file that up published", capsys.readouterr().err
    )
    assert second.litter() == []


def test_leftover_outputs_are_removed(place: Place) -> None:
    """Nobody may take what an earlier run published for this run's."""
    place.shard("1", "keep", "drop", "fail", "keep", "keep", "keep", "keep", "keep")
    place.shard("2", "keep")
    assert place.run("--more", place.more) == 0
    assert len(place.published()) == 8
    place.shard("1", "drop", "drop", "drop")
    assert place.run("--more", place.more) == 0
    assert {name for name in place.published() if "/1." in name} == {"out/_rejects/toy/1.drops.tsv.gz"}
    place.shard("1", "shard error")
    assert place.run("--more", place.more) == 1
    assert {name for name in place.published() if "/1." in name} == set()
    assert {name for name in place.published() if "/2." in name} == {
        "out/2.txt", "more/2.more", "out/_provenance/toy/2.jsonl",
    }  # fmt: skip


def test_what_a_kill_right_after_the_commit_left_is_cleared_by_the_next_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is done and never claimed again, but its checkpoint, its old outputs and its claim lie about."""
    place.shard("1", "keep", "keep")
    assert place.run("--more", place.more, "--checkpoint") == 0
    place.shard("1", "drop", "drop", "keep")
    process = place.start("--checkpoint", environment={"PYTHONPATH": str(ROOT)})
    process.communicate()
    assert (place.out / "1.txt").exists()

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    place.shard("1", "drop", "drop")
    with monkeypatch.context() as patch:  # as if the process ended between the commit and what follows it
        patch.setattr("curation.run.attempt.Attempts._clear_away", killed)
        patch.setattr(claims.Claims, "release", lambda self, claim: None)
        patch.setattr(claims.Heartbeat, "stop", lambda self: None)
        with pytest.raises(Killed):
            place.run("--checkpoint")
    assert place.receipt("1")["superseded"] == ["1.txt", "_provenance/toy/1.jsonl", "../more/1.more"]
    assert (place.out / "1.txt").exists()
    claim = next(place.out.glob("_claims/toy/*/1.claim"))
    claim.write_text(claim.read_text().replace('"pid_start":"', '"pid_start":"9'))
    partial = place.out / "_partial" / "toy" / "0"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "1.f.0123456789abcdef").touch()
    place.forget_journal()
    assert place.run("--checkpoint") == 0
    assert place.lines("open") == [], "clearing up needs no model"
    assert not (place.out / "1.txt").exists()
    assert [name for name in place.litter() if "_beats" not in name] == []


def test_the_record_of_a_commit_is_cleared_by_whoever_takes_over_from_its_dead_finisher(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The taker listed the receipts before the record was there, and finds the shard done once it has claimed it."""
    place.shard("1", "keep")
    assert place.run() == 0
    receipt = next(place.out.glob("_receipts/toy/*/1.json"))
    done = receipt.read_bytes()
    receipt.unlink()
    attempt = Attempts.attempt

    def after_another_died(attempts: Attempts, shard: Shard, claim: claims.Claim, **how: bool) -> str:
        receipt.write_bytes(done)
        receipt.with_name(".1.1.commit").write_bytes(done)  # it was killed before it could unlink its record
        claim.predecessors.append(json.loads(done)["token"])
        return attempt(attempts, shard, claim, **how)

    monkeypatch.setattr(Attempts, "attempt", after_another_died)
    assert place.run() == 0
    assert receipt.read_bytes() == done
    assert place.litter() == []


def test_temporary_files_of_dead_attempts_are_cleared(place: Place) -> None:
    place.shards(2)
    assert place.run("--shards", "00000000") == 0
    dead = "0123456789abcdef"
    litter = [
        place.out / f".00000001.txt.{dead}.tmp",
        place.out / "_provenance" / "toy" / f".00000001.jsonl.{dead}.tmp",
        place.out / "_rejects" / "toy" / f".00000001.jsonl.{dead}.tmp",
        place.out / "_receipts" / "toy" / "00000" / f".00000001.{dead}.tmp",
    ]
    for path in litter:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    others = place.out / f".00000001.txt.b.{dead}.tmp"
    others.touch()
    assert place.run() == 0
    assert place.litter() == [str(others.relative_to(place.root))], "of another shard"


# ---- stopping


def undisturbed(place: Place, *arguments: object) -> dict[str, bytes]:
    """What the same run publishes elsewhere when nobody disturbs it."""
    other = Place(place.root / "undisturbed")
    shutil.rmtree(other.source)
    shutil.copytree(place.source, other.source, copy_function=shutil.copy2)
    assert other.run("--more", other.more, *arguments) == 0
    return other.published()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_saves_gives_back_and_exits_75(place: Place, name: str) -> None:
    place.shards(3, *["keep"] * 10)
    arguments = ["--more", place.more, "--checkpoint"]
    process = place.start(*arguments, "--sample_s", "0.03")
    place.wait_for("sample 00000001 0004", process)
    process.send_signal(getattr(signal, name))
    _, log = process.communicate(timeout=120)
    assert process.returncode == 75, log
    assert f"stopped ({name})" in log
    assert sorted(place.receipts()) == ["00000000"]
    (checkpoint,) = place.litter()
    assert "_partial" in checkpoint
    done = len(place.lines("sample"))
    assert place.run(*arguments) == 0
    assert len(place.lines("sample")) == 30, "nothing that was finished is done again"
    assert done < 30
    assert place.receipt("00000001")["notes"]["recovered"] == done - 10
    assert place.litter() == []
    assert place.published() == undisturbed(place, "--checkpoint")


def test_a_second_signal_ends_at_once(place: Place) -> None:
    place.shards(2, "keep")
    process = place.start("--sample_s", "3600")
    place.wait_for("begin", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)  # and not after the hour that a sample takes
    assert process.returncode == 75
    assert place.run() == 0
    assert place.litter() == []


def test_the_deadline_ends_a_run_in_time(place: Place) -> None:
    place.shards(1000, "keep")
    began = time.monotonic()
    assert place.run("--deadline", "3s", "--sample_s", "0.05") == 75
    assert 1 < time.monotonic() - began < 50, "it works nearly to the deadline, and not for as long as there is work"
    assert 1 <= len(place.receipts()) < 1000
    assert place.litter() == []
    place.forget_journal()
    assert place.run("--deadline", "2000-01-01") == 75
    assert place.lines("begin") == [], "nothing is begun"


def test_a_run_that_is_asked_to_stop_before_it_begins(place: Place) -> None:
    place.shards(2)
    stop = StopSignal()
    stop.ask("test")
    options = parse_options(toy_stage.Options, place.arguments())
    stage = toy_stage.Toy(options)
    shards = runner.select(toy_stage.discover(options.input), None)
    assert runner.run_shards(stage, shards, options, toy_stage.Allocation(), stop) == 75
    with pytest.raises(Stopped):
        stop.check()
    assert place.receipts() == {}


# ---- several at once


def test_shards_in_flight_overlap(place: Place) -> None:
    place.shards(6, "keep", "keep")
    assert place.run("--in_flight", "3", "--sample_s", "0.05") == 0
    assert any(line.endswith("running 3") for line in place.lines("begin"))
    assert not any(line.endswith("running 4") for line in place.lines("begin"))
    assert len(place.lines("open")) == 1
    assert len(place.receipts()) == 6
    assert place.litter() == []


def test_an_error_between_shards_stops_those_in_flight(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.shards(3, *["keep"] * 200)
    inputs = toy_stage.Toy.inputs

    def none_for_the_last(stage: toy_stage.Toy, shard: toy_stage.Shard) -> list[runner.Input]:
        if shard.id == "00000002":
            raise toy_stage.InfrastructureError("no such folder")
        return inputs(stage, shard)

    monkeypatch.setattr(toy_stage.Toy, "inputs", none_for_the_last)
    assert place.run("--in_flight", "3", "--sample_s", "0.05", "--checkpoint") == 2
    assert len(place.lines("sample")) < 200, "none was done to its end"


def test_a_signal_while_the_model_loads_begins_no_shard(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.shards(2)
    monkeypatch.setattr(toy_stage.Toy, "open", lambda stage, allocation: signal.raise_signal(signal.SIGTERM))
    assert place.run() == 75
    assert place.lines("begin") == []


def test_an_older_run_stops_before_it_commits_over_a_newer_one(place: Place) -> None:
    place.shards(2, *["keep"] * 10)
    old = place.start("--hold", "00000000", "--shards", "00000000..00000001")
    place.wait_for("sample 00000000", old)
    new = place.start("--mark", "new", "--rerun", "--shards", "00000000")
    wait_until((place.out / "_receipts" / "toy" / "_epoch.2.json").exists, "the new run", while_runs=new)
    place.let_go()
    _, log = old.communicate(timeout=120)
    new.communicate(timeout=120)
    assert new.returncode == 0
    assert old.returncode == 2
    assert "this older run stops" in log.splitlines()[-1]
    assert {shard: receipt["epoch"] for shard, receipt in place.receipts().items()} == {"00000000": 2}
    assert "new" in (place.out / "00000000.txt").read_text()
    assert place.litter() == []


def test_an_older_run_stops_before_it_works_for_nothing(place: Place) -> None:
    place.shards(2, *["keep"] * 10)
    old = place.start("--hold", "00000000")
    place.wait_for("sample 00000000", old)
    assert place.run("--mark", "new", "--rerun", "--shards", "00000001") == 0
    place.let_go()
    old.communicate(timeout=120)
    assert old.returncode == 2
    assert len(place.lines("begin 00000001")) == 1, "of the new run"
    assert {shard: receipt["epoch"] for shard, receipt in place.receipts().items()} == {"00000000": 1, "00000001": 2}


def test_a_worker_that_is_behind_looks_again_soon(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another has done everything while this one loaded its model: it does not claim each shard to find that out."""
    place.shards(100)
    monkeypatch.setattr(toy_stage.Toy, "open", lambda stage, allocation: place.start().communicate())
    taken = []
    take = claims.Claims.acquire
    monkeypatch.setattr(claims.Claims, "acquire", lambda *a: taken.append(a) or take(*a))
    assert place.run() == 0
    assert len(place.receipts()) == len(place.lines("begin")) == 100
    assert 0 < len(taken) < 50


def test_an_infrastructure_error_stops_the_others_in_flight(place: Place) -> None:
    place.shards(4, *["keep"] * 200)
    place.shard("00000001", "keep", "infrastructure")
    assert place.run("--in_flight", "3", "--sample_s", "0.05", "--checkpoint") == 2
    assert place.receipts() == {}, "the others did not go on to their end"


def test_a_shard_that_another_worker_takes_is_dropped_quietly(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heartbeat stood still for a lease: the attempt must not be committed, and the shard is looked at again."""
    place.shard("1", "keep")
    holds = claims.Claims.holds
    answers = iter([False, True])
    monkeypatch.setattr(claims.Claims, "holds", lambda self, claim: next(answers) and holds(self, claim))
    assert place.run() == 0
    assert place.receipt("1")["status"] == "done"
    assert len(place.lines("begin")) == 2
    assert place.litter() == []


def test_a_shard_that_is_lost_again_and_again_is_work_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.shard("1", "keep")
    monkeypatch.setattr(claims.Claims, "holds", lambda self, claim: False)
    assert place.run() == 75, "never 0: it is not done"
    assert len(place.lines("begin")) == 3


def test_shards_in_other_hands_are_waited_for_two_leases(place: Place) -> None:
    place.shards(2, *["keep"] * 3)
    process = place.start("--hold", "00000000", "--shards", "00000000")
    place.wait_for("sample 00000000 0000", process)
    began = time.monotonic()
    assert place.run("--shards", "00000000,00000001") == 0, "it is others' work, and they live"
    assert time.monotonic() - began > 2
    assert sorted(place.receipts()) == ["00000001"]
    process.kill()
    process.communicate()
    assert place.run() == 0
    assert sorted(place.receipts()) == ["00000000", "00000001"]
    assert place.litter() == []


def test_a_shard_given_back_is_taken_by_one_who_waits(place: Place) -> None:
    place.shards(1, *["keep"] * 100)
    process = place.start("--sample_s", "0.05", "--checkpoint")
    place.wait_for("sample 00000000 0003", process)
    waiter = place.start("--checkpoint")
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode == 75
    _, log = waiter.communicate(timeout=120)
    assert waiter.returncode == 0, log
    assert place.receipt("00000000")["counts"]["kept"] == 100
    assert len(place.lines("sample")) == 100, "and what was finished is not done again"


def test_workers_share_the_shards_and_survive_a_kill(place: Place) -> None:
    ids = place.shards(12, "keep", "drop", "keep")
    place.shard(ids[3], "keep", "kill once", "keep")
    process = place.start("--workers", "3", "--hold", ",".join(ids[:2]), "--more", place.more)
    wait_until(lambda: len(place.receipts()) == 10, "the third's shards", while_runs=process)
    place.let_go()
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "died: SIGKILL" in log
    receipts = place.receipts()
    assert sorted(receipts) == ids
    assert {receipt["status"] for receipt in receipts.values()} == {"done"}
    assert {receipt["generation"] for receipt in receipts.values()} == {1}
    assert len({receipt["run"] for receipt in receipts.values()}) == 1
    assert len({receipt["rank"] for receipt in receipts.values()}) == 3
    assert place.litter() == []
    (place.out / f"killed-{ids[3]}").unlink()
    other = Place(place.root / "undisturbed")
    shutil.rmtree(other.source)
    shutil.copytree(place.source, other.source, copy_function=shutil.copy2)
    other.out.mkdir()
    (other.out / f"killed-{ids[3]}").touch()
    assert other.run("--more", other.more) == 0
    (other.out / f"killed-{ids[3]}").unlink()
    assert other.published() == place.published()


def test_workers_pass_signals_on(place: Place) -> None:
    place.shards(4, *["keep"] * 100)
    process = place.start("--workers", "2", "--sample_s", "0.05", "--checkpoint")
    place.wait_for("sample", process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert all("_partial" in name for name in place.litter())


def test_workers_end_with_their_parent(place: Place) -> None:
    """Killed with SIGKILL, it can tell them nothing; nobody would ever end them."""
    place.shards(4, *["keep"] * 400)
    process = place.start("--workers", "2", "--sample_s", "0.05", "--checkpoint")
    place.wait_for("sample", process)
    process.kill()
    process.communicate(timeout=120)  # the pipes close when the last worker has ended
    pids = {int(line.split()[0]) for line in place.journal.read_text().splitlines()}
    wait_until(lambda: not any(process_start(pid) for pid in pids), "the end of the workers")


@pytest.mark.parametrize(
    ("wrong", "code", "lines"), [(["--mark", "no model"], 2, 2), (["--mark", "other"], 2, 1), ([], 1, None)]
)
def test_the_exit_code_of_workers(place: Place, wrong: list[str], code: int, lines: int | None) -> None:
    place.shards(3)
    if wrong[1:] == ["other"]:
        assert place.run("--shards", "00000000") == 0
    place.shard("00000001", "shard error")
    process = place.start("--workers", "2", "--quiet", *wrong)
    _, log = process.communicate(timeout=120)
    assert process.returncode == code, log
    assert lines is None or len(log.splitlines()) <= lines, log


def test_workers_get_the_same_options() -> None:
    given = [
        "--input=-odd {name}", "--output", "o u t", "--mark=--dash", "--sample_s", "0.5", "--checkpoint",
        "--workers", "3", "--shards", "1..2", "--more", "m",
    ]  # fmt: skip
    options = parse_options(toy_stage.Options, given)
    assert parse_options(toy_stage.Options, to_argv(options)) == options
    assert not any(argument.startswith("--quiet") for argument in to_argv(options))
    assert isinstance(options, RunOptions)


# ---- killed, and raced


def kill_at_random(place: Place, moments: int, seed: str) -> None:
    import random

    rng = random.Random(seed)
    arguments = ["--more", place.more, "--checkpoint", "--in_flight", "2"]
    place.shards(6, "keep", "drop", "keep", "fail", "keep", "keep", "keep", "keep")
    expected = undisturbed(place, "--checkpoint")
    for moment in range(moments):
        for folder in (place.out, place.more):
            shutil.rmtree(folder, ignore_errors=True)
        place.forget_journal()
        process = place.start(*arguments, "--sample_s", "0.005")
        place.wait_for("begin", process)  # before it, only its heartbeat would be left
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        assert place.run(*arguments) == 0
        assert place.published() == expected, f"kill {moment}"
        assert place.litter() == []


def test_killed_at_random_moments_it_gives_the_same_bytes(place: Place) -> None:
    kill_at_random(place, 3, os.environ.get("CURATION_KILL_SEED", "1"))


def test_the_overhead_on_empty_work_is_within_its_bar() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_runner.py"), "--shards", "60,600", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = json.loads(result.stdout)["rows"]
    assert {row["shards"] for row in rows} == {60, 600}
    assert max(row["cpu_ms"] for row in rows) < 5


def test_a_log_line_is_no_place_for_others_to_write_in(capsys: Err) -> None:
    set_up_logging(quiet=False, name="[1]")
    logger.info("caption \x1b[2J\x00\n12:00:00 all is well\r\n    indented \u202e")
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[1\] caption \[2J", first)
    assert second == "    12:00:00 all is well"
    assert third == "        indented"


@pytest.mark.soak
def test_killed_at_many_random_moments_it_gives_the_same_bytes(place: Place) -> None:
    kill_at_random(place, 20, os.environ.get("CURATION_KILL_SEED", "2"))


def race(place: Place, count: int, *more: object) -> None:
    """Several processes on one folder: each shard is committed once in its generation."""
    expected = undisturbed(place)
    processes = [place.start("--more", place.more, *more) for _ in range(count)]
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, logs
    assert {receipt["generation"] for receipt in place.receipts().values()} == {1}
    done = re.findall(r"(\d{8}) done:", "".join(logs))
    assert sorted(done) == sorted(place.receipts()), "each told once, by the one who won"
    assert len(place.lines("begin")) == len(done), "and nobody worked for nothing"
    assert place.published() == expected
    assert place.litter() == []


def test_four_processes_at_once(place: Place) -> None:
    for number in range(3):
        again = Place(place.root / str(number))
        again.shards(25)
        race(again, 4)


@pytest.mark.soak
def test_four_processes_at_once_many_times(place: Place) -> None:
    for number in range(60):
        again = Place(place.root / str(number))
        again.shards(40)
        race(again, 4, "--in_flight", str(1 + number % 3))


@pytest.mark.soak
def test_processes_that_are_killed_all_the_time(place: Place) -> None:
    """Four at once, one killed every moment and another started, until all is done."""
    import random

    rng = random.Random(3)
    ids = place.shards(60, "keep", "drop", "keep", "keep")
    expected = undisturbed(place, "--checkpoint")
    arguments = ["--more", place.more, "--checkpoint", "--sample_s", "0.01"]
    running = [place.start(*arguments) for _ in range(4)]
    for _ in range(60):
        time.sleep(rng.uniform(0.1, 0.5))
        victim = running.pop(rng.randrange(4))
        victim.kill()
        victim.communicate()
        running.append(place.start(*arguments))
    for process in running:
        assert process.wait(timeout=120) == 0
        process.communicate()
    assert sorted(place.receipts()) == ids
    assert place.run(*arguments) == 0
    assert place.published() == expected
    assert place.litter() == []
