"""run_pipeline.sh: the stages as jobs that depend on each other, and on a machine without SLURM."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from curation.run.claims import Claims
from curation.shards import bucket_of
from tests import ROOT
from tests.processes import started, wait_until
from tests.slurm.chain import BAD, SHARDS, SOUND, STAGES, Chain, StandIn
from tests.slurm.jobs import Jobs, published, small_shards


@pytest.fixture
def chain(jobs: Jobs, llm_port: int) -> Chain:
    return Chain(jobs, llm_port)


def test_a_failed_shard_stops_nobody_but_itself(chain: Chain) -> None:
    jobs, cluster = chain.jobs, chain.jobs.cluster
    chain.damage()
    numbers = chain.submit("--", "--quiet")
    assert len(numbers) == 4
    assert cluster.facts(numbers[3])[0]["Dependency"].startswith(f"afterany:{numbers[2]}")
    codes = [set(cluster.wait(number)) for number in numbers]
    assert codes == [{1}, {0}, {0}, {1}], f"the first fails on it, the last lacks it\n{jobs.logs()}"
    assert [len(cluster.facts(number)) for number in numbers] == [4, 1, 1, 2], "ARRAY_01 and ARRAY_04"

    first, *rest = chain.receipts().values()
    assert first == {**SOUND, BAD: "failed"}
    assert rest == [SOUND, SOUND, SOUND]
    status = chain.status()
    assert status["01_filter_noface"]["failed"] == {"too_many_errors": 1}
    assert [failure["shard"] for failure in status["01_filter_noface"]["failures"]] == [BAD]
    assert {stage: told["done"] for stage, told in status.items()} == dict.fromkeys(STAGES, SHARDS - 1)
    before = published(jobs.root, *STAGES.values())
    assert not jobs.litter()

    # mended and made pending, it goes through; the rest is left as it is
    command = [sys.executable, "-m", "curation", "retry", str(jobs.root), "--stage", "01_filter_noface"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    told = chain.status()["01_filter_noface"]
    assert (told["failed"], told["pending"]) == ({}, 1)
    small_shards(chain.shards, SHARDS)
    numbers = chain.submit("--", "--quiet")
    assert [set(cluster.wait(number)) for number in numbers] == [{0}] * 4, jobs.logs()
    assert list(chain.receipts().values()) == [{**SOUND, BAD: "done"}] * 4
    after = published(jobs.root, *STAGES.values())
    assert {name: after[name] for name in before if BAD not in name} == {
        name: data for name, data in before.items() if BAD not in name
    }


def test_follow_works_on_what_is_published(chain: Chain) -> None:
    """All four stages are through with what there is while one shard of the first is still in somebody's hands."""
    jobs, cluster = chain.jobs, chain.jobs.cluster
    chain.damage()
    late = "00000005"
    others = Claims(jobs.root / "captions" / "_claims" / "01_filter_noface")
    others.heartbeat.start()
    claim = others.acquire(bucket_of(late), late)
    assert claim is not None
    numbers = chain.submit("--follow", "--", "--quiet", "--lease_s", "20")
    published_early = {shard: done for shard, done in SOUND.items() if shard != late}
    wait_until(lambda: chain.receipts()["04_reshard"] == published_early, jobs.logs)
    assert {state for state, _ in cluster.squeue().values()} == {"RUNNING"}
    others.release(claim)
    others.heartbeat.stop()
    codes = [set(cluster.wait(number)) for number in numbers]
    first, *rest = chain.receipts().values()
    assert (first, rest) == ({**SOUND, BAD: "failed"}, [SOUND, SOUND, SOUND]), jobs.logs()
    assert codes == [{1}, {1}, {1}, {1}], jobs.logs()
    assert not jobs.litter()
    for stage, folder in STAGES.items():
        assert (jobs.root / folder / "_plan" / stage).is_dir(), "where run_pipeline.sh looks for an earlier list"


# ---- what is submitted, with a program in place of the stages


def test_the_stages_words(jobs: Jobs) -> None:
    """Each stage has the folders that follow from ROOT, the flags for all, and its own behind them."""
    chain = StandIn(jobs, 11434, "0 1 2 0")
    numbers = chain.submit("--stages", "01-04", "--", "--lease_s", "60")
    assert [set(jobs.cluster.wait(number)) for number in numbers] == [{0}, {1}, {2}, {0}], "whatever it ended with"
    root = jobs.root
    assert list(dict.fromkeys(chain.started())) == [
        f"01_filter_noface.py --input {chain.shards} --output {root}/captions --edits {root}/edits --lease_s 60 "
        "--detector recorded",
        f"02_captions_processor.py --input {root}/captions --output {root}/prompts --model_name tulu3:fairclip "
        "--ports 11434 --lease_s 60 --api ollama",
        f"03_generate_images_multigpu.py --input {root}/prompts --output {root}/edits --lease_s 60 --embedded "
        "--height 64 --width 64 --steps 1 --batch_size 4",
        f"04_reshard.py --input {chain.shards} --edits {root}/edits --prompts {root}/prompts --output {root}/shards "
        "--lease_s 60",
    ]


def test_a_job_that_queues_itself_again_has_not_ended(jobs: Jobs) -> None:
    """The next stage waits for its restart too."""
    chain = StandIn(jobs, 11434, "wait 0 0 0")
    numbers = chain.submit("--stages=01-02", ARRAY_01="0-1")
    wait_until(lambda: len(chain.started()) == 2, "both elements")
    wait_until((chain.folder / "waiting").exists, "stage 01")
    jobs.cluster.call("scancel", "--batch", "--signal=USR1", f"{numbers[0]}_1")  # as SLURM does before the time limit
    wait_until(lambda: len(chain.started()) == 3, "the restart")
    assert f"requeueing {numbers[0]}_1" in jobs.logs()
    (chain.folder / "go").touch()
    assert set(jobs.cluster.wait(*numbers)) == {0}
    assert [line[:2] for line in chain.started()] == ["01", "01", "01", "02"]


def test_follow_starts_a_stage_while_the_one_before_runs(jobs: Jobs) -> None:
    """And while most of its array has not begun."""
    chain = StandIn(jobs, 11434, "wait 0 0 0")
    numbers = chain.submit("--follow", "--stages=01-03", ARRAY_01="2-5%1")
    assert set(jobs.cluster.wait(*numbers[1:])) == {0}
    states = [state for state, _ in jobs.cluster.squeue(numbers[0]).values()]
    assert sorted(states) == ["PENDING"] * 3 + ["RUNNING"]
    (chain.folder / "go").touch()
    assert set(jobs.cluster.wait(numbers[0])) == {0}
    assert {line[:2]: "--follow" in line for line in chain.started()} == {"01": False, "02": True, "03": True}


def test_a_follower_leaves_the_stage_before_time_to_make_an_earlier_list_longer(jobs: Jobs) -> None:
    chain = StandIn(jobs, 11434, "wait 0 0 0")
    (jobs.root / "captions" / "_plan" / "01_filter_noface").mkdir(parents=True)
    numbers = chain.submit("--follow")
    first, second, third = (jobs.cluster.facts(number)[0]["Dependency"] for number in numbers[1:])
    assert first.startswith(f"after:{numbers[0]}_2+1(")
    assert (second.split("(")[0], third.split("(")[0]) == (f"after:{numbers[1]}", f"after:{numbers[2]}")
    jobs.cluster.call("scancel", *numbers)


def test_a_dry_run_submits_nothing(jobs: Jobs) -> None:
    chain = StandIn(jobs, 11434, "0 0 0 0")
    known = jobs.cluster.call("scontrol", "show", "job", check=False).stdout
    said = chain.start("--dry_run", "--follow", ENDPOINTS_DIR="end points").stdout
    lines = [line for line in said.splitlines() if " sbatch " in line]
    assert [re.findall(r"--dependency=(\S+)", line) for line in lines] == [
        [], ["after:JOB_01_2"], ["after:JOB_02"], ["after:JOB_03"],
    ]  # fmt: skip
    assert ["--gpus-per-node=0" in line for line in lines] == [False, True, False, False], "it starts no servers"
    assert all("--kill-on-invalid-dep=yes" in line for line in lines)
    assert jobs.cluster.call("scontrol", "show", "job", check=False).stdout == known
    assert not jobs.root.exists()


def test_what_sbatch_refuses(jobs: Jobs) -> None:
    chain = StandIn(jobs, 11434, "wait 0 0 0")
    done = chain.start(check=False, SBATCH_03="--partition=nowhere")
    assert done.returncode == 2
    first, second = re.findall(r"^stage 0\d is job (\d+)$", done.stdout, flags=re.M)
    assert f"scancel {first} {second} takes them back" in done.stderr
    assert "error: sbatch did not take stage 03" in done.stderr
    jobs.cluster.call("scancel", first, second)


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        (("--quiet",), {}, "flags of the stages come after --"),
        (("--stages", "05"), {}, "--stages 05: write one of 01 to 04"),
        (("--stages=03-02",), {}, "runs backwards"),
        (("--stages",), {}, "--stages needs a value"),
        ((), {"ROOT": ""}, "ROOT is not set"),
        ((), {"SRC_DIR": ""}, "SRC_DIR is not set"),
        ((), {"SRC_DIR": "/nowhere at all"}, "SRC_DIR=/nowhere at all is not there"),
        ((), {"ARRAY_03": "0-9; true"}, "ARRAY_03=0-9; true: write it as"),
        ((), {"SBATCH_EXPORT": "NONE"}, "keeps the variables from the jobs"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], variables: Mapping[str, str], says: str, jobs: Jobs) -> None:
    chain = StandIn(jobs, 11434, "0 0 0 0")
    done = chain.start(*words, check=False, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


def test_the_source_is_not_overwritten(jobs: Jobs) -> None:
    """ROOT/shards takes the hybrid shards."""
    chain = StandIn(jobs, 11434, "0 0 0 0")
    done = chain.start(check=False, ROOT=str(chain.folder), SRC_DIR=f"{chain.folder}/shards")
    assert done.returncode == 2  # it is not there
    chain.shards.rename(chain.folder / "shards")
    done = chain.start(check=False, ROOT=str(chain.folder), SRC_DIR=f"{chain.folder}/shards/")
    assert done.returncode == 2
    assert "choose another ROOT" in done.stderr


# ---- without sbatch


@pytest.fixture
def workstation(tmp_path: Path) -> Mapping[str, str]:
    """A PATH without SLURM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    slurm = {"sbatch", "srun", "squeue", "scontrol", "sacct", "scancel", "nvidia-smi"}
    for place in os.environ["PATH"].split(":"):
        for program in Path(place).glob("*"):
            if program.name not in slurm and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    assert shutil.which("sbatch", path=str(folder)) is None
    return {"PATH": str(folder)}


def test_on_a_workstation(chain: Chain, workstation: Mapping[str, str]) -> None:
    """One after the other; a failed shard stops nobody but itself."""
    chain.damage()
    done = chain.start("--", "--quiet", check=False, **workstation)
    assert done.returncode == 1, done.stderr
    ends = re.findall(r"^stage 0\d ended with (\d)$", done.stdout, flags=re.M)
    assert ends == ["1", "0", "0", "1"]
    assert list(chain.receipts().values()) == [{**SOUND, BAD: "failed"}, SOUND, SOUND, SOUND]
    small_shards(chain.shards, SHARDS)
    assert chain.start("--stages", "01-04", "--", "--quiet", check=False, **workstation).returncode == 0


@pytest.mark.parametrize(
    ("codes", "expected", "stages"),
    [("0 0 0 0", 0, 4), ("0 1 0 0", 1, 4), ("1 75 0 0", 75, 2), ("1 0 2 0", 2, 3), ("137 0 0 0", 137, 1)],
)
def test_where_it_stops(codes: str, expected: int, stages: int, jobs: Jobs, workstation: Mapping[str, str]) -> None:
    chain = StandIn(jobs, 11434, codes)
    assert chain.start(check=False, **workstation).returncode == expected
    assert len(chain.started()) == stages
    assert all("--workers 1" in line for line in chain.started())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_it_hands_on_what_it_is_sent(name: str, jobs: Jobs, workstation: Mapping[str, str]) -> None:
    chain = StandIn(jobs, 11434, "0 wait 0 0")
    environment = jobs.cluster.environment({**chain.variables, **workstation})
    with started(["bash", ROOT / "run_pipeline.sh"], env=environment, cwd=chain.folder) as process:
        wait_until((chain.folder / "waiting").exists, "stage 02", while_runs=process)
        process.send_signal(signal.Signals[name])
        assert process.wait(120) == 75
    assert len(chain.started()) == 2
