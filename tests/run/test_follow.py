"""--follow, in real processes: stages that start together, upstreams that fail, die, grow and come late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.run.follow import Follower, Follows
from curation.run.planned import planned, record_plan
from curation.shards import Shard, bucket_of
from tests import EXAMPLES, ROOT, processes, replaced
from tests.pipeline import Undisturbed, copy_tree, start
from tests.processes import end, ended_at_last, wait_until
from tests.run import toy_stage
from tests.run.toy_runs import Place

SUFFIXES = {"a": ".tar", "b": ".txt", "c": ".txt"}
UPSTREAM = {"b": "a", "c": "b"}
LIMIT_S = 200


class Chain:
    """Toy stages a → b → c below one folder, each in a process of its own."""

    def __init__(self, root: Path) -> None:
        self.place = Place(root)
        self.root = root
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, stage: str, *more: object) -> subprocess.Popen[str]:
        upstream = UPSTREAM.get(stage)
        words: list[object] = ["--output", self.root / stage, "--as_stage", stage, "--suffix", SUFFIXES[stage]]
        words += ["--input", self.root / upstream if upstream else self.place.source]
        words += ["--journal", self.root / "journal", "--lease_s", "1"]
        if upstream:
            words += ["--upstream", upstream, "--follow"]
        command = [sys.executable, toy_stage.__file__, *replaced(words, more)]
        process = processes.start(command, stderr=subprocess.PIPE)
        self.processes.append(process)
        return process

    def receipts(self, stage: str) -> dict[str, str]:
        """shard → status"""
        found = (self.root / stage / "_receipts" / stage).glob("*/[!.]*.json")
        return {path.stem: json.loads(path.read_bytes())["status"] for path in found}

    def events(self, pattern: str) -> list[tuple[int, int]]:
        """(line of the journal, process) of what begins so."""
        lines = (self.root / "journal").read_text().splitlines() if (self.root / "journal").exists() else []
        pairs = [line.split(" ", 1) for line in lines]
        return [(number, int(pid)) for number, (pid, what) in enumerate(pairs) if what.startswith(pattern)]

    def samples(self, process: subprocess.Popen[str]) -> list[int]:
        return [number for number, pid in self.events("sample") if pid == process.pid]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, text = process.communicate(timeout=LIMIT_S)
    return process.returncode, text


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    made = Chain(tmp_path)
    yield made
    for process in made.processes:
        end(process)


# ---- plans


def test_a_list_is_one_file_however_often_it_is_recorded_and_lists_add_up(tmp_path: Path) -> None:
    for ids in (["1", "2"], ["2", "1", "2"], ["3"], []):
        record_plan(tmp_path, "toy", ids)
    assert len(list((tmp_path / "_plan" / "toy").iterdir())) == 2
    assert planned(tmp_path, "toy") == {"1", "2", "3"}
    assert planned(tmp_path, "other") == set()


def test_a_million_shards_can_be_planned(tmp_path: Path) -> None:
    ids = [f"{number:08d}" for number in range(1_000_000)]
    began = time.process_time()
    record_plan(tmp_path, "toy", ids)
    assert len(planned(tmp_path, "toy")) == 1_000_000
    assert time.process_time() - began < 20


def test_files_that_are_no_plans_are_told_of_and_passed_over(tmp_path: Path) -> None:
    record_plan(tmp_path, "toy", ["good"])
    folder = tmp_path / "_plan" / "toy"
    (folder / "damaged.json").write_bytes(b'{"stage": "toy", "shards": ["half')
    (folder / "deep.json").write_bytes(b"[" * 100_000)
    (folder / "list.json").write_text('["1"]')
    (folder / "foreign.json").write_text('{"stage": "other", "shards": ["x"]}')
    (folder / "names.json").write_text('{"stage": "toy", "shards": ["../../etc", 7, "fine"], "sources": [1, {}]}')
    (folder / "folder.json").mkdir()
    (folder / "link.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.json")
    warnings: list[str] = []
    assert planned(tmp_path, "toy", warnings.append) == {"good", "fine"}
    assert len(warnings) == 8
    assert sum("not a plan" in warning for warning in warnings) == 7


def test_a_run_records_what_it_selected_and_a_dry_run_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    ids = place.shards(4)
    assert place.run("--dry_run") == 0
    assert not (place.out / "_plan").exists()
    assert place.run("--shards", "00000001..00000002") == 0
    assert planned(place.out, "toy") == set(ids[1:3])
    assert place.run() == place.run() == 0
    assert planned(place.out, "toy") == set(ids)
    assert len(list((place.out / "_plan" / "toy").iterdir())) == 2


# ---- chains


def test_two_stages_started_together(chain: Chain) -> None:
    ids = chain.place.shards(6)
    b = chain.start("b")
    a = chain.start("a", "--sample_s", "0.2")
    (code_a, text_a), (code_b, text_b) = ended(a), ended(b)
    assert (code_a, code_b) == (0, 0), text_a + text_b
    assert chain.receipts("b") == dict.fromkeys(ids, "done")
    assert chain.samples(b)[0] < chain.samples(a)[-1], "it began before upstream had ended"


def test_three_stages_started_together_with_workers(chain: Chain) -> None:
    ids = chain.place.shards(10)
    c = chain.start("c", "--workers", "2")
    b = chain.start("b", "--workers", "2", "--sample_s", "0.05")
    a = chain.start("a", "--sample_s", "0.1")
    assert [ended(p)[0] for p in (a, b, c)] == [0, 0, 0]
    for stage in "abc":
        assert chain.receipts(stage) == dict.fromkeys(ids, "done")
        assert planned(chain.root / stage, stage) == set(ids)
    for shard_id in ids:
        assert len(chain.events(f"begin {shard_id} ")) == 3, "each stage did it once"
    a_lines = chain.samples(a)
    others = [n for n, pid in chain.events("sample") if pid != a.pid]
    assert others[0] < a_lines[-1]


def test_no_model_is_loaded_before_the_first_shard_is_ready_nor_when_none_is(chain: Chain) -> None:
    chain.place.shards(1, "keep", "keep", "keep")
    b = chain.start("b")
    a = chain.start("a", "--sample_s", "0.5")
    assert (ended(a)[0], ended(b)[0]) == (0, 0)
    (opened,) = [n for n, pid in chain.events("open") if pid == b.pid]
    assert opened > chain.samples(a)[-1]
    again = chain.start("b")
    assert ended(again)[0] == 0
    assert not [n for n, pid in chain.events("open") if pid == again.pid]


def test_a_shard_that_fails_upstream_is_blocked_all_along_the_chain_and_the_rest_is_done(chain: Chain) -> None:
    good = chain.place.shards(3)
    chain.place.shard("00000003", "shard error")
    c, b = chain.start("c"), chain.start("b")
    a = chain.start("a", "--sample_s", "0.05")
    (code_a, _), (code_b, text_b), (code_c, text_c) = ended(a), ended(b), ended(c)
    assert (code_a, code_b, code_c) == (1, 1, 1), "and nobody waits for what will never come"
    assert "00000003 blocked: a failed on it" in text_b
    assert "00000003 blocked" in text_c
    assert chain.receipts("b") == chain.receipts("c") == dict.fromkeys(good, "done")


def test_an_upstream_that_is_killed_ends_the_follower_and_both_go_on_later(chain: Chain) -> None:
    ids = chain.place.shards(6)
    a = chain.start("a", "--hold", "00000004")
    wait_until(lambda: len(chain.receipts("a")) == 4, while_runs=a)
    b = chain.start("b", "--follow_idle_s", "3")
    wait_until(lambda: len(chain.receipts("b")) >= 2, while_runs=b)
    a.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, text = ended(b)
    assert code == 1
    assert time.monotonic() - killed >= 2
    missing = len(ids) - len(chain.receipts("b"))
    assert f"{missing} shards are missing" in text
    assert "run a again" in text
    again = [chain.start("b", "--follow_idle_s", "100"), chain.start("a")]
    assert [ended(p)[0] for p in again] == [0, 0]
    assert chain.receipts("b") == dict.fromkeys(ids, "done")


def test_a_follower_goes_on_when_upstream_is_started_again_in_time(chain: Chain) -> None:
    ids = chain.place.shards(4)
    b = chain.start("b", "--follow_idle_s", "100")
    a = chain.start("a", "--hold", "00000002")
    wait_until(lambda: chain.receipts("b"), while_runs=b)
    a.send_signal(signal.SIGKILL)
    a.wait()
    assert ended(chain.start("a"))[0] == 0
    assert ended(b)[0] == 0
    assert chain.receipts("b") == dict.fromkeys(ids, "done")


def test_an_upstream_that_works_long_on_one_shard_is_not_idle(chain: Chain) -> None:
    chain.place.shards(1, *["keep"] * 12)
    a = chain.start("a", "--sample_s", "1")
    wait_until(lambda: chain.events("sample"), while_runs=a)
    b = chain.start("b", "--follow_idle_s", "5")
    assert (ended(a)[0], ended(b)[0]) == (0, 0)


def test_an_upstream_that_never_begins_is_told_of(chain: Chain) -> None:
    began = time.monotonic()
    code, text = ended(chain.start("b", "--follow_idle_s", "2"))
    assert code == 1
    assert time.monotonic() - began >= 2
    assert "no list of planned shards" in text


def test_a_plan_that_grows_in_mid_run(chain: Chain) -> None:
    ids = chain.place.shards(5)
    c, b = chain.start("c"), chain.start("b")
    a = chain.start("a", "--hold", "00000004")  # still at it when the others are told of more
    wait_until(lambda: chain.receipts("c"), while_runs=c)
    more = [f"1{number:07d}" for number in range(3)]
    for shard_id in more:
        chain.place.shard(shard_id, "keep", "keep")
    assert a.poll() is None
    second = chain.start("a")
    wait_until(lambda: more[-1] in chain.receipts("a"), while_runs=second)
    (chain.root / "go").touch()
    assert [ended(p)[0] for p in (a, second, b, c)] == [0, 0, 0, 0]
    assert chain.receipts("c") == dict.fromkeys(ids + more, "done")


def test_a_subset_of_shards_that_are_not_there_yet(chain: Chain) -> None:
    ids = chain.place.shards(6)
    b = chain.start("b", "--shards", "00000001,00000004..00000005")
    a = chain.start("a", "--sample_s", "0.05")
    assert (ended(a)[0], ended(b)[0]) == (0, 0)
    chosen = [ids[1], *ids[4:]]
    assert chain.receipts("b") == dict.fromkeys(chosen, "done")
    assert planned(chain.root / "b", "b") == set(chosen)
    code, text = ended(chain.start("b", "--shards", "typo"))
    assert code == 2
    assert "there is no shard 'typo'" in text


def test_a_shard_that_upstream_has_not_planned_is_not_waited_for(chain: Chain) -> None:
    chain.place.shards(2)
    (chain.root / "a").mkdir()
    (chain.root / "a" / "notes.txt").write_text("keep\n")
    a, b, c = chain.start("a"), chain.start("b"), chain.start("c")
    assert [ended(p)[0] for p in (a, b, c)] == [0, 1, 0]
    assert "notes" not in chain.receipts("b")


def test_receipts_of_an_older_epoch_are_not_what_is_waited_for(chain: Chain) -> None:
    ids = chain.place.shards(4)
    assert ended(chain.start("a"))[0] == 0
    a = chain.start("a", "--mark", "new", "--rerun", "--hold", "00000003")
    wait_until(lambda: (chain.root / "a" / "_receipts" / "a" / "_epoch.2.json").exists(), while_runs=a)
    b = chain.start("b")
    wait_until(lambda: chain.receipts("b"), while_runs=b)
    (chain.root / "go").touch()
    assert (ended(a)[0], ended(b)[0]) == (0, 0)
    for shard_id in ids:
        receipt = json.loads((chain.root / f"b/_receipts/b/{bucket_of(shard_id)}/{shard_id}.json").read_bytes())
        assert receipt["generation"] == 1, "done once, from the new"
    assert chain.samples(b)[0] < chain.samples(a)[-1]


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_follower_that_waits(chain: Chain, name: signal.Signals) -> None:
    chain.place.shards(1, "keep", "keep")
    b = chain.start("b")
    a = chain.start("a", "--hold", "00000000")
    wait_until((chain.root / "b" / "_plan").exists)
    b.send_signal(name)
    code, text = ended(b)
    assert code == 75
    assert "1 left" in text
    assert a.poll() is None


def test_a_deadline_ends_a_follower_that_knows_of_no_shard_yet(chain: Chain) -> None:
    code, _ = ended(chain.start("b", "--deadline", "2s"))
    assert code == 75


def test_a_dry_run_counts_who_waits(chain: Chain) -> None:
    chain.place.shards(3)
    assert ended(chain.start("a", "--shards", "00000000"))[0] == 0
    record_plan(chain.root / "a", "a", ["00000000", "00000001"])
    words = ["--input", chain.root / "a", "--suffix", ".txt", "--upstream", "a", "--follow", "--dry_run"]
    command = [sys.executable, toy_stage.__file__, *map(str, words), "--output", str(chain.root / "b")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout
    assert "1 pending, 1 waiting" in shown
    assert not (chain.root / "b").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rerun", "--shards", "1"], "leave --follow out"),
        (["--follow_idle_s", "0"], "at least 1"),
        (["--lease_s", "60", "--follow_idle_s", "30"], "shorter than --lease_s"),
    ],
)
def test_flags_that_make_no_sense_together(chain: Chain, more: list[str], said: str) -> None:
    code, text = ended(chain.start("b", *more))
    assert code == 2
    assert said in text


def test_the_first_stage_has_none_to_follow(tmp_path: Path) -> None:
    copy_tree(EXAMPLES, tmp_path / "shards")
    command = [sys.executable, "01_filter_noface.py", "--input", f"{tmp_path}/shards", "--output", f"{tmp_path}/c"]
    command += ["--edits", f"{tmp_path}/e", "--follow"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 2
    assert "no stage before 01_filter_noface" in run.stderr
    assert not (tmp_path / "c").exists()


def test_a_glob_cannot_be_followed(tmp_path: Path) -> None:
    command = [sys.executable, "03_generate_images_multigpu.py", "--input", f"{tmp_path}/p/*.json", "--embedded"]
    command += ["--edits", f"{tmp_path}/e", "--follow"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 2
    assert "waits for a folder of 02_captions_processor" in run.stderr


# ---- many


def test_a_look_at_a_hundred_thousand_waiting_shards_is_short(tmp_path: Path) -> None:
    ids = [f"{number:08d}" for number in range(100_000)]
    record_plan(tmp_path, "a", ids)
    receipts = tmp_path / "_receipts" / "a"
    receipts.mkdir(parents=True)
    for shard_id in ids[::10]:
        path = receipts / bucket_of(shard_id) / f"{shard_id}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"status": "done", "epoch": 1}')
    follower = Follower(Follows("a", tmp_path, ".txt"), [], None, 900.0, 60.0)
    assert len(follower.planned()) == 100_000
    arrived = follower.poll()
    assert [shard.id for shard in arrived] == ids[::10]
    assert all(follower.settled(shard) for shard in arrived)
    path.with_name("00099991.json").write_text('{"status": "done", "epoch": 1}')
    wait_until(lambda: time.monotonic() > follower._next_look)
    began = time.process_time()
    assert follower.poll() == [Shard("00099991", tmp_path / "00099991.txt")]
    assert time.process_time() - began < 0.5
    assert follower.waiting == 89_999


def test_where_shards_are_found_elsewhere_only_those_are_waited_for_that_both_name(tmp_path: Path) -> None:
    """As in stage 04: the list of sources is the frame, the plan says which of them will come."""
    sources = [Shard(shard_id, tmp_path / f"{shard_id}.tar") for shard_id in ("1", "2", "3")]
    record_plan(tmp_path, "a", ["1", "2", "9"])
    receipts = tmp_path / "_receipts" / "a" / "0"
    receipts.mkdir(parents=True)
    follower = Follower(Follows("a", tmp_path), sources, None, 900.0, 60.0)
    assert (follower.planned(), follower.waiting) == (["1", "2"], 3)
    assert follower.poll() == []
    arrived = []
    for shard_id in ("1", "2"):
        (receipts / f"{shard_id}.json").write_text('{"status": "failed", "epoch": 1}')
    wait_until(lambda: arrived.extend(follower.poll()) or not follower.expecting)
    assert arrived == sources, "the third at the end: nobody will do it"


# ---- the real stages


def test_the_four_stages_started_together_make_what_they_make_one_after_the_other(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    copy_tree(EXAMPLES, tmp_path / "shards")
    running = []
    for stage in reversed(undisturbed.stages):
        more = [] if stage.name == "01_filter_noface" else ["--follow", "--follow_idle_s", "200"]
        running.append(start(stage, tmp_path, *more))
    with ended_at_last(*running):
        assert [process.wait(timeout=280) for process in running] == [0, 0, 0, 0]
    for folder in ("captions", "edits", "prompts", "hybrid"):
        expected, found = outputs(undisturbed.root / folder), outputs(tmp_path / folder)
        assert expected
        assert found == expected


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything but the pipeline's records, in which times and hosts stand."""
    skipped = {"_receipts", "_claims", "_plan", "_partial"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not skipped & set(path.relative_to(folder).parts)
    }
