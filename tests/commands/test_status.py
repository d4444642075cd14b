"""``python -m curation status``: what real runs left, looked at from outside."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curation.__main__ import main
from curation.commands.places import find_stages
from curation.commands.status import live_claims, scan
from curation.commands.status.scan import ReceiptScan, StageCounts, speed
from curation.commands.status.watch import limit_of
from curation.shards import bucket_of
from tests import ROOT
from tests.processes import ended_at_last, started, wait_until
from tests.run import toy_stage
from tests.run.toy_runs import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def status(place: Place, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Stage → what status says of it."""

    def look(*more: str) -> dict[str, Any]:
        capsys.readouterr()
        before = snapshot(place.root)
        assert main(["status", str(place.root), "--json", *more]) == 0
        assert snapshot(place.root) == before, "status writes nothing"
        result = json.loads(capsys.readouterr().out)
        assert result["format"] == 1
        return {stage["stage"]: stage for stage in result["stages"]}

    return look


def snapshot(root: Path) -> dict[str, int]:
    """Times of all files but those that a worker writes meanwhile."""
    moving = {"_beats", "_claims", "journal"}
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*") if not moving & {*p.parts}}


def follow(place: Place, name: str, source: Path, upstream: str, *more: str) -> int:
    """A toy stage that is made from another's output."""
    out = place.root / name
    arguments = ["--input", source, "--output", out, "--as_stage", name, "--suffix", ".txt", "--upstream", upstream]
    return toy_stage.main([str(word) for word in (*arguments, "--lease_s", "1", *more)])


def plan(place: Place, stage: str, *shards: str) -> None:
    folder = place.out / "_plan" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{len(list(folder.iterdir()))}.json").write_text(json.dumps({"stage": stage, "shards": shards}))


Status = Callable[..., dict[str, Any]]


def test_done_failed_pending_and_samples(place: Place, status: Status) -> None:
    place.shards(3, "keep", "drop", "keep", "keep", "keep", "fail")
    place.shard("00000003", "bug")
    place.shard("00000004", "shard error")
    assert place.run() == 1
    plan(place, "toy", *(f"{number:08d}" for number in range(7)))
    plan(place, "toy", "00000006", "1000", "../../x")
    toy = status()["toy"]
    assert (toy["done"], toy["pending"], toy["planned"], toy["running"]) == (3, 3, 8, [])
    assert toy["failed"] == {"KeyError": 1, "shard_error": 1}
    assert toy["quarantined"] == toy["stale"] == {}
    assert toy["samples"] == {"in": 18, "kept": 12, "dropped": {"not_wanted": 3}, "failed": {"broken": 3}}
    assert toy["samples_per_s"] > 0
    assert toy["folder"] == str(place.out)
    failures = {failure["shard"]: failure for failure in toy["failures"]}
    assert failures["00000004"]["reason"] == "shard_error"
    assert failures["00000004"]["message"].endswith("is truncated")


def test_without_a_plan_it_says_that_it_does_not_know(place: Place, status: Status) -> None:
    place.shards(2)
    assert place.run("--shards", "00000000") == 0
    assert status()["toy"]["planned"] == 1, "what was selected, and no more"
    shutil.rmtree(place.out / "_plan")
    assert status()["toy"]["planned"] is None
    assert status()["toy"]["pending"] == 0


def test_pending_is_what_the_stage_before_has_done_also_after_a_run_of_some_shards(
    place: Place, status: Status
) -> None:
    place.shards(4)
    assert place.run("--shards", "00000000..00000002") == 0
    assert follow(place, "next", place.out, "toy", "--shards", "00000001") == 0
    assert status()["toy"]["pending"] == 0, "what its inputs are was not made by a stage"
    following = status()["next"]
    assert (following["done"], following["pending"], following["planned"]) == (1, 2, 1)
    assert follow(place, "next", place.out, "toy") == 0
    assert (status()["next"]["done"], status()["next"]["pending"]) == (3, 0)
    assert place.run() == 0
    assert status()["next"]["pending"] == 1


def test_pending_counts_shards_whose_makers_no_receipt_names(place: Place, status: Status) -> None:
    """Stages 01, 05 and 06 read shards as files made elsewhere, also if stage 00 has made them."""
    place.shards(3)
    assert place.run() == 0
    arguments = ["--input", place.out, "--output", place.root / "later", "--as_stage", "later", "--suffix", ".txt"]
    assert toy_stage.main([*map(str, arguments), "--shards", "00000001"]) == 0
    assert (status()["later"]["done"], status()["later"]["pending"], status()["toy"]["pending"]) == (1, 2, 0)


def test_quarantined_stand_apart_and_retry_makes_pending(place: Place, status: Status) -> None:
    place.shard("00000000", "shard error")
    for _ in range(3):
        assert place.run("--retry_failed") == 1
    toy = status()["toy"]
    assert toy["failed"] == {}
    assert toy["quarantined"] == {"shard_error": 1}
    assert main(["retry", str(place.root), "--stage", "toy", "--shards", "00000000"]) == 0
    toy = status()["toy"]
    assert (toy["quarantined"], toy["pending"]) == ({}, 1)


def test_what_a_rerun_of_a_subset_makes_stale(place: Place, status: Status, capsys: pytest.CaptureFixture[str]) -> None:
    place.shards(3)
    assert place.run() == 0
    assert follow(place, "b", place.out, "toy") == 0
    assert follow(place, "c", place.root / "b", "b") == 0
    assert [status()[name]["stale"] for name in ("toy", "b", "c")] == [{}, {}, {}]
    assert place.run("--rerun", "--shards", "00000001", "--mark", "y") == 0
    found = status()
    assert found["toy"]["stale"] == {}
    assert (found["b"]["done"], found["b"]["stale"]) == (2, {"inputs": 1})
    assert (found["c"]["done"], found["c"]["stale"]) == (2, {"upstream": 1})
    for folder, why in (("b", "inputs"), ("c", "upstream")):  # what they read lies elsewhere
        assert main(["status", str(place.root / folder), "--json"]) == 0
        [alone] = json.loads(capsys.readouterr().out)["stages"]
        assert (alone["stage"], alone["done"], alone["stale"]) == (folder, 2, {why: 1})
    assert follow(place, "b", place.out, "toy") == 0
    assert status()["b"]["stale"] == {}


def test_shards_of_an_older_epoch_are_stale(place: Place, status: Status) -> None:
    place.shards(3)
    assert place.run() == 0
    place.shard("00000000", *["keep"] * 400)
    with ended_at_last(place.start("--rerun", "--mark", "y", "--hold", "00000000")) as process:
        place.wait_for("begin", process, count=4)
        found = status()["toy"]
        assert found["stale"] == {"epoch": 3}


def test_downstream_of_a_retry_is_stale(place: Place, status: Status) -> None:
    place.shards(2)
    assert place.run() == 0
    assert follow(place, "b", place.out, "toy") == 0
    place.shard("00000001", "shard error")
    assert place.run() == 1
    assert status()["b"]["stale"] == {"inputs": 1}


def test_who_is_at_work_and_how_far(place: Place, status: Status) -> None:
    place.shards(2, *["keep"] * 1000)
    ids = {"SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"}
    with ended_at_last(place.start("--sample_s", "0.05", environment=ids)) as process:
        place.wait_for("sample", process, count=20)  # the heart beats every quarter of a second
        plan(place, "toy", "00000000", "00000001")
        toy = status()["toy"]
        (claim,) = toy["running"]
        assert claim["shard"] == "00000000"
        assert (claim["pid"], claim["job"], claim["life"]) == (process.pid, "40_7", "alive")
        assert 1 <= claim["samples"] <= 1000
        assert abs(claim["since"] - time.time()) < 60
        assert claim["trouble"] == ""
        assert (toy["done"], toy["pending"]) == (0, 1)
    (claim,) = status()["toy"]["running"]
    assert claim["life"] == "gone", "its process ran on this machine"


def foreign_claim(place: Place, beat: str, lease_s: float = 2.0, **more: object) -> None:
    """A worker on another node has it, as far as can be seen."""
    path = place.out / "_claims" / "toy" / "00000" / "00000001.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"format": 1, "token": "ab", "beat": beat, "host": "far", "boot": "x", "pid_namespace": "y", "pid": 7,
              "pid_start": "1", "slurm": {"job_id": "99"}, "since": 5.0, "lease_s": lease_s}  # fmt: skip
    path.write_text(json.dumps({**record, **more}))


@pytest.fixture
def ran(place: Place) -> Place:
    place.shard("00000000", "keep")
    assert place.run() == 0
    return place


def test_a_heartbeat_elsewhere_is_looked_at_twice(ran: Place, status: Status) -> None:
    foreign_claim(ran, "feed", lease_s=60)
    beat = ran.out / "_claims" / "toy" / "_beats" / "feed"
    beat.parent.mkdir(exist_ok=True)
    beat.write_bytes(b"%020d {}" % 1)
    (claim,) = status("--look_s", "0.1")["toy"]["running"]
    assert claim["life"] == "unknown"
    script = (
        "import sys, time\nfor n in range(2, 10**6):\n"
        "    open(sys.argv[1], 'r+b').write(b'%020d {\"working\": {\"00000001\": 12}}\\n' % n)\n    time.sleep(0.05)"
    )
    with started([sys.executable, "-c", script, beat]) as process:
        wait_until(lambda: beat.read_bytes()[:20] != b"%020d" % 1, "a beat", while_runs=process)
        (claim,) = status("--look_s", "3")["toy"]["running"]
        assert (claim["life"], claim["samples"], claim["host"]) == ("alive", 12, "far")


def test_one_that_stands_still_for_a_lease_is_dead(ran: Place, status: Status) -> None:
    foreign_claim(ran, "feed", lease_s=0.5)
    (claim,) = status("--look_s", "0.8")["toy"]["running"]
    assert claim["life"] == "gone"
    assert 0.5 <= claim["silent_s"] < 10


@pytest.mark.parametrize("content", [b"", b"junk", b"[]", b'{"format": 7, "since": "x", "lease_s": {}}'])
def test_a_claim_of_another_version_is_told_of(content: bytes, ran: Place, status: Status) -> None:
    foreign_claim(ran, "feed")
    (path,) = (ran.out / "_claims").rglob("*.claim")
    path.write_bytes(content)
    (claim,) = status("--look_s", "0")["toy"]["running"]
    assert claim["life"] == "unknown"
    assert bool(claim["trouble"]) == bool(content)
    assert main(["status", str(ran.root), "--look_s", "0"]) == 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"status": "done", "counts": 7, "started": "x", "inputs": [], "outputs": 3}']
)
def test_receipts_that_are_none_break_nothing(content: bytes, ran: Place, status: Status) -> None:
    ran.shard("00000001", "keep")
    assert ran.run() == 0
    assert follow(ran, "b", ran.out, "toy") == 0
    folder = ran.out / "_receipts" / "toy" / bucket_of("00000001")
    (folder / "00000001.json").write_bytes(content)
    found = status()
    assert found["toy"]["done"] >= 1
    assert found["b"]["done"] == 1
    assert found["b"]["stale"] or found["b"]["unreadable"]


def test_many_buckets_are_read_by_several_processes(ran: Place, status: Status) -> None:
    data = ran.receipt("00000000")
    for number in range(1, 40):
        folder = ran.out / "_receipts" / "toy" / f"{number:05d}"
        folder.mkdir()
        (folder / f"{number:05d}000.json").write_text(json.dumps({**data, "shard": f"{number:05d}000", "gpu": 0}))
    toy = status()["toy"]
    assert toy["done"] == toy["samples"]["in"] == 40
    assert toy["gpu_seconds"] == pytest.approx(39 * (data["finished"] - data["started"]), abs=0.2)


def test_speed_counts_time_in_which_something_was_worked_on() -> None:
    together = array("d", [0, 100, 1000, 0, 100, 1000, 1000, 1100, 500])
    fast = speed(together)
    assert fast.samples_per_s == 2500 / 200, "not the pause between"
    assert fast.recent == pytest.approx(500 / 600)
    assert speed(array("d")).samples_per_s is None
    assert speed(array("d", [5, 5, 1])).samples_per_s is None
    steady = array("d", [x for n in range(1000) for x in (n * 10, n * 10 + 10, 50)])
    assert speed(steady).recent == pytest.approx(5, rel=0.02)


def test_no_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "no stage has run" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "absent")]) == 2


def test_folders_that_point_elsewhere_are_counted_once(place: Place, status: Status) -> None:
    place.shards(2)
    assert place.run("--more", place.more) == 0
    assert (place.more / "_receipts" / "toy" / "_home.json").exists()
    assert list(status()) == ["toy"]
    assert status()["toy"]["done"] == 2


def command(place: Place, *more: str) -> list[str]:
    return [sys.executable, "-m", "curation", "status", str(place.root), *more]


def test_plain_lines_in_a_log(ran: Place) -> None:
    ran.shard("00000002", "bug")
    assert ran.run() == 1
    result = subprocess.run(command(ran), capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    assert "toy  done 1  running 0" in result.stdout
    assert "failed: 1 KeyError" in result.stdout
    assert "\x1b" not in result.stdout


def test_tables_on_a_terminal(ran: Place) -> None:
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command(ran), stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    told = b""
    try:
        while block := os.read(mine, 65536):
            told += block
    except OSError:
        pass  # the other end is closed
    os.close(mine)
    assert process.wait(timeout=120) == 0
    assert "quarantined" in told.decode()
    assert "━" in told.decode()


def test_watch_draws_again_until_it_is_interrupted(ran: Place) -> None:
    plan(ran, "toy", "00000009")  # pending, so that there is something to wait for
    with started(command(ran, "--watch", "0.2", "--json"), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        ran.shard("00000002", "keep")
        assert ran.run() == 0
        while json.loads(process.stdout.readline())["stages"][0]["done"] != 2:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert first["stages"][0]["done"] == 1


@pytest.mark.parametrize("arguments", [["--watch", "--json"], ["--watch"]])
def test_watch_needs_no_number(arguments: list[str], ran: Place) -> None:
    plan(ran, "toy", "00000009")
    with started(command(ran, *arguments), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert "toy" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0


def test_watch_ends_when_nothing_is_left_and_says_so(ran: Place) -> None:
    def watched() -> str:
        told = subprocess.run(
            command(ran, "--watch", "0.1"), capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
        )
        return told.stdout.splitlines()[-1]

    assert watched() == "all shards of all stages that have begun are done"
    ran.shard("00000002", "bug")
    assert ran.run() == 1
    assert watched() == "nothing is left to do, but 1 shards failed: `curation retry` makes them pending again"


def test_watch_draws_one_table_in_its_place_on_a_terminal(ran: Place) -> None:
    plan(ran, "toy", "00000009")
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    process = subprocess.Popen(command(ran, "--watch", "0.3"), stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    told = b""
    while told.count(b"what limits it") < 3:
        told += os.read(mine, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    os.close(mine)
    assert "toy" in told.decode()
    assert "1/2" in told.decode()
    assert "\x1b[1A" in told.decode(), "the cursor goes up, so that the next table replaces the last"


def test_watch_reads_each_receipt_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.shards(3, "keep", "drop")
    place.shard("00000003", "shard error")
    assert place.run() == 1
    assert follow(place, "next", place.out, "toy") == 0
    read: list[str] = []
    really = scan._read_receipt

    def reading(folder: int, name: str) -> dict[str, Any] | None:
        read.append(name[:-5])
        return really(folder, name)

    monkeypatch.setattr(scan, "_read_receipt", reading)
    memory = scan.Memory()

    def look() -> list[StageCounts]:
        places = find_stages(place.root)
        whole = ReceiptScan(places).read(StageCounts)
        read.clear()
        found = ReceiptScan(places, memory).read(StageCounts)
        assert found == whole, "what is remembered is what is there"
        return found

    first = look()
    assert len(read) == 7, "four of the first stage, three of the next"
    assert look() == first
    assert read == []
    assert place.run("--rerun", "--shards", "00000001", "--mark", "y") == 0
    stale = [counts.stale for counts in look()]
    assert len(read) == 7, "other options: everything may be stale now"
    assert follow(place, "next", place.out, "toy") == 0
    now = [counts.stale for counts in look()]
    assert read == ["00000001", "00000001"], "that of the next stage is new, and says what it was made from"
    assert ([*stale], [*now]) == ([{"inputs": 1}, {}], [{}, {}])


def test_two_outputs_of_one_stage_are_told_apart(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.shards(1)
    for folder in ("first", "second"):
        arguments = ["--input", place.source, "--output", place.root / folder, "--journal", place.journal]
        assert toy_stage.main([str(word) for word in arguments]) == 0
    capsys.readouterr()
    monkeypatch.chdir(place.root.parent)
    for root in (place.root, Path(place.root.name)):
        assert main(["status", str(root)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition("  ")[0] for line in lines] == ["toy in first", "toy in second"]
        assert main(["status", str(root), "--json"]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        assert [(stage["stage"], stage["name"], stage["folder"]) for stage in stages] == [
            ("toy", "toy in first", str(place.root / "first")),
            ("toy", "toy in second", str(place.root / "second")),
        ]
    assert main(["status", str(place.root / "first"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["name"] == "toy"


@pytest.mark.parametrize(
    ("changes", "before", "limit"),
    [
        ({}, [], "the model (80% of the time)"),
        ({"phase_seconds": {}}, [], ""),
        ({"running": []}, [], "no worker is seen"),
        ({"running": [{"life": "gone"}]}, [], "no worker is seen"),
        ({"running": [], "pending": 0}, [], ""),
        ({"running": [], "pending": 0}, [("01_filter_noface", 3)], "waits for stage 01"),
        ({"running": [], "pending": 0}, [("01_filter_noface", 0)], ""),
        ({"phase_seconds": {"polish": 2.0}}, [("01_filter_noface", 3)], "polish (100% of the time)"),
        ({"phase_seconds": {"<b>": 1.0}}, [], "<b> (100% of the time)"),
    ],
)
def test_what_limits_a_stage(changes: dict[str, Any], before: list[tuple[str, int]], limit: str) -> None:
    stage = {"running": [{"life": "alive"}], "pending": 5, "phase_seconds": {"infer": 8.0, "read": 1.0, "write": 1.0}}
    others = [{"stage": name, "name": name, "pending": count, "running": []} for name, count in before]
    assert limit_of({**stage, **changes}, others) == limit


# ---- SLURM's word, by a program of sacct's name that answers as sacct does


def sacct(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / "sacct"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_failures_and_dead_claims_carry_slurms_cause(
    ran: Place, status: Status, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    beside = tmp_path_factory.mktemp("slurm")
    ran.shard("00000002", "bug")
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    assert ran.run() == 1
    foreign_claim(ran, "feed", lease_s=0.2)
    answer = "55|55|OUT_OF_MEMORY\\n98|98|COMPLETED\\n99|99|REQUEUED\\n99|99|NODE_FAIL\\n99|99|RUNNING"
    sacct(beside, f"echo $@ > {beside}/asked; printf '{answer}\\n'", monkeypatch)
    toy = status("--look_s", "0.4")["toy"]
    assert toy["slurm_causes"] == {"KeyError": {"OUT_OF_MEMORY": 1}}
    assert toy["failures"][0]["slurm_states"] == ["OUT_OF_MEMORY"]
    assert toy["running"][0]["slurm_state"] == "NODE_FAIL"
    assert "--jobs=99,55" in (beside / "asked").read_text()


@pytest.mark.parametrize(
    "script", ["exit 1", "printf 'junk\\n|||\\n55|OUT\\n'", "head -c 100000 /dev/urandom", "kill -9 $$"]
)
def test_a_sacct_that_answers_nonsense_breaks_nothing(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sacct(tmp_path, script, monkeypatch)
    assert live_claims.slurm_states(["55"]) == {}


def test_a_sacct_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sacct(tmp_path, "exec sleep 3600", monkeypatch)
    monkeypatch.setattr(live_claims, "TIMEOUT_S", 0.5)
    assert live_claims.slurm_states(str(number) for number in range(3000)) == {}


def test_ids_reach_sacct_only_as_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sacct(tmp_path, f"echo $@ >> {tmp_path}/asked; echo '7|7|TIMEOUT'; echo '40_3|43|CANCELLED by 0'", monkeypatch)
    found = live_claims.slurm_states(["7", "40_3", "1; rm -rf x", "--help", "", "9" * 50])
    assert found == {"7": "TIMEOUT", "40_3": "CANCELLED"}
    assert (tmp_path / "asked").read_text().split()[-1] == "--jobs=40_3,7"
