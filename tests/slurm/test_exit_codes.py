"""What a job ends with, and when it queues itself again: the stages' scripts with a program in place of the stage,
under the real sbatch, srun and scontrol."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT
from tests.processes import wait_until
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs

# Stands in for Python and the stage.  $CODES: what each task ends with; "wait": 75 when it is asked to stop, with
# something finished before if $FINISHES is set; "kill": bash and all are killed, as when memory runs out; "broken": its
# device fails.  $STATES: what a dry run says of the shards.
STAGE = """#!/bin/bash
case " $* " in *' --dry_run '*) echo "a stage into an: output: $STATES" && exit ;; esac
echo "$@" >>"$LOG/stage"
set -- $CODES
shift "${SLURM_PROCID:-0}"
case $1 in
wait)
    trap 'stop=1' USR1 TERM INT
    touch "$LOG/waiting.$SLURM_RESTART_COUNT"
    while [ -z "$stop" ]; do sleep 0.05; done
    [ -n "$FINISHES" ] && touch "$CURATION_PROGRESS"
    exit 75 ;;
kill) kill -9 "$PPID"; exit 0 ;;
broken)
    [ -n "$FINISHES" ] && touch "$CURATION_PROGRESS"
    touch "$CURATION_BROKEN.$SLURMD_NODENAME"
    exit 69 ;;
*) exit "$1" ;;
esac
"""
FOLDERS = {
    "01_filter_noface.sh": ("captions", "01_filter_noface.py --input {src} --output {target} --edits {root}/edits"),
    "03_generate_images.sh": ("edits", "03_generate_images_multigpu.py --input {src} --output {target}"),
    "04_reshard.sh": (
        "shards",
        "04_reshard.py --input {src} --edits {root}/edits --prompts {root}/prompts --output {target}",
    ),
}


class Job:
    """A stage's script whose stage is the stand-in."""

    def __init__(self, jobs: Jobs, folder: Path, script: str = "01_filter_noface.sh") -> None:
        self.jobs, self.folder, self.script = jobs, folder, script
        self.target = folder / "a root" / FOLDERS[script][0]
        stage = folder / "stage.sh"  # without a space: SLURM 22.05 overlooks processes that have one in their name
        stage.write_text(STAGE)
        stage.chmod(0o755)
        self.variables = {
            "PYTHON": str(stage), "LOG": str(folder), "SRC_DIR": f"{folder}/in put", "ROOT": f"{folder}/a root",
        }  # fmt: skip

    def submit(self, codes: str, *flags: str, sbatch: tuple[str, ...] = (), **variables: str) -> str:
        more = {**self.variables, "CODES": codes, **variables}
        return self.jobs.submit(self.script, *flags, sbatch=sbatch, tasks=len(codes.split()), variables=more)

    def left(self) -> list[str]:
        return [path.name for path in self.target.iterdir() if path.name != "_receipts"]


@pytest.fixture
def job(jobs: Jobs, tmp_path: Path) -> Job:
    return Job(jobs, tmp_path)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0 0", 0), ("0 1 0", 1), ("0 2 1", 2), ("75 2", 2), ("1 75", 75), ("75 0", 75), ("137 0", 1), ("kill 0", 1)],
)
def test_the_jobs_exit_code(codes: str, expected: int, job: Job) -> None:
    """srun alone would give the highest."""
    number = job.submit(codes)
    assert job.jobs.cluster.wait(number) == [expected], job.jobs.logs()
    assert "requeueing" not in job.jobs.logs(), "the time limit is far"
    assert not job.left(), "nothing is left behind"


@pytest.mark.parametrize(
    ("codes", "states", "finishes", "restarts", "expected", "says"),
    [
        ("0 broken", "12 done", "", "50", 0, "a device has failed on: node"),
        ("0 broken", "2 done, 1 failed", "yes", "50", 1, "tasks ended with: 0 69"),
        ("1 broken", "12 done", "yes", "50", 1, ""),
        ("0 broken", "11 done, 1 pending", "yes", "0", 75, "MAX_RESTARTS"),  # it came after the other's end
        ("broken broken", "12 pending", "", "50", 2, "no device of this job has worked"),
        ("broken 75", "", "yes", "0", 75, "MAX_RESTARTS"),
        ("broken 2", "12 pending", "yes", "50", 2, ""),
        ("broken kill", "12 done", "yes", "50", 1, ""),
    ],
)
def test_a_device_that_fails_is_its_tasks_alone(
    codes: str, states: str, finishes: str, restarts: str, expected: int, says: str, job: Job
) -> None:
    number = job.submit(codes, STATES=states, FINISHES=finishes, MAX_RESTARTS=restarts)
    assert job.jobs.cluster.wait(number) == [expected], job.jobs.logs()
    assert says in job.jobs.logs()
    assert "requeueing" not in job.jobs.logs()
    assert not job.left()


def test_under_plain_bash_a_device_that_fails_is_work_left(jobs: Jobs, tmp_path: Path) -> None:
    job = Job(jobs, tmp_path)
    environment = {**os.environ, **job.variables, "CODES": "69"}
    assert subprocess.run(["bash", ROOT / job.script], env=environment, check=False, timeout=30).returncode == 75


@pytest.mark.parametrize("script", sorted(FOLDERS))
def test_the_stages_command(script: str, jobs: Jobs, tmp_path: Path) -> None:
    job = Job(jobs, tmp_path, script)
    assert jobs.cluster.wait(job.submit("0", "--quiet", "--shards=two words")) == [0]
    words = FOLDERS[script][1].format(src=f"{tmp_path}/in put", root=f"{tmp_path}/a root", target=job.target)
    (line,) = (tmp_path / "stage").read_text().splitlines()
    assert line == f"{ROOT}/{words} --quiet --shards=two words"


@pytest.mark.parametrize("script", sorted(FOLDERS))
def test_under_plain_bash(script: str, jobs: Jobs, tmp_path: Path) -> None:
    job = Job(jobs, tmp_path, script)
    environment = {**os.environ, **job.variables, "CODES": "75", "WORKERS": "3"}
    done = subprocess.run(["bash", ROOT / script, "--quiet"], env=environment, check=False, timeout=30)
    assert done.returncode == 75
    (line,) = (tmp_path / "stage").read_text().splitlines()
    assert line.endswith("--workers 3 --quiet")


@pytest.mark.parametrize(
    ("signal", "finishes", "restarts", "says"),
    [
        ("USR1", "follow", "50", "requeueing"),  # it may only have waited for the stage before
        ("USR1", "yes", "50", "requeueing"),
        ("USR1", "", "50", "nothing was finished"),  # it would go round for ever
        ("USR1", "yes", "0", "MAX_RESTARTS"),
        ("TERM", "yes", "50", "asked to stop by TERM"),
    ],
)
def test_it_queues_itself_again_only_at_the_time_limit_and_with_something_done(
    signal: str, finishes: str, restarts: str, says: str, job: Job, tmp_path: Path
) -> None:
    cluster = job.jobs.cluster
    flags = ["--follow"] if finishes == "follow" else []
    saved = "" if flags else finishes
    number = job.submit("wait 0", *flags, sbatch=("--array=3",), FINISHES=saved, MAX_RESTARTS=restarts)
    element = f"{number}_3"
    wait_until((tmp_path / "waiting.").exists, job.jobs.logs)
    # USR1 as SLURM sends it before the end, to the script; TERM as it sends it to the tasks
    cluster.call("scancel", *(["--batch"] if signal == "USR1" else []), f"--signal={signal}", element)
    if says == "requeueing":
        wait_until((tmp_path / "waiting.1").exists, lambda: job.jobs.logs() + str(cluster.facts(number)))
        cluster.call("scancel", element)
        cluster.wait(number)
    else:
        assert cluster.wait(number) == [75], job.jobs.logs()
        assert cluster.facts(number)[0]["Restarts"] == "0"
    assert says in job.jobs.logs()
    assert not job.left()


def test_a_job_that_is_cancelled_does_not_come_back(job: Job, tmp_path: Path) -> None:
    number = job.submit("wait wait", FINISHES="yes")
    wait_until((tmp_path / "waiting.").exists, job.jobs.logs)
    job.jobs.cluster.call("scancel", number)
    job.jobs.cluster.wait(number)
    (facts,) = job.jobs.cluster.facts(number)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")


def test_the_end_of_the_job_is_asked_for_again(job: Job, tmp_path: Path) -> None:
    """It was moved, and SLURM's warning was for the old one."""
    cluster = job.jobs.cluster
    number = job.submit("wait", FINISHES="yes", TIME_CHECK_S="1", WARNING_S="70", sbatch=("--signal=B:USR1@0",))
    wait_until((tmp_path / "waiting.").exists, job.jobs.logs)
    time.sleep(1.5)
    assert "tasks ended" not in job.jobs.logs()
    cluster.call("scontrol", "update", f"JobId={number}", "EndTime=now+20")  # that SLURM rounds to a minute
    wait_until(lambda: "requeueing" in job.jobs.logs(), job.jobs.logs)
    wait_until(lambda: cluster.squeue(number)[number][0] == "PENDING", "the job in the queue again")
    cluster.call("scancel", number)
    cluster.wait(number)


# ---- what the site lacks


def test_no_scontrol_on_the_node(job: Job, tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    wanted = "srun squeue bash env dirname mktemp mkdir touch cat sort tr rm sleep awk head timeout date hostname"
    for name in wanted.split():
        (bin_folder / name).symlink_to(str(shutil.which(name)))
    number = job.submit("wait", FINISHES="yes", sbatch=(f"--export=ALL,PATH={bin_folder}",))
    wait_until((tmp_path / "waiting.").exists, job.jobs.logs)
    job.jobs.cluster.call("scancel", "--batch", "--signal=USR1", number)
    assert job.jobs.cluster.wait(number) == [75]
    assert "no scontrol on this node; submit the same command again" in job.jobs.logs()


def test_a_folder_that_is_not_shared(job: Job, cluster: Cluster, tmp_path: Path) -> None:
    """A task on a node where another filesystem is mounted there."""
    job.target.mkdir(parents=True)
    wrap = tmp_path / "on another filesystem"
    elsewhere = f'mount -t tmpfs none "{job.target}" && exec "$@"'
    wrap.write_text(f"#!/bin/bash\nexec unshare --mount sh -c '{elsewhere}' sh \"$@\"\n")
    wrap.chmod(0o755)
    link = Path("/tmp") / f"wrap-{os.getpid()}"
    link.symlink_to(wrap)
    try:
        assert cluster.wait(job.submit("0 0", CURATION_WRAP=str(link))) == [2]
    finally:
        link.unlink()
    assert "must be on a filesystem that all nodes share" in job.jobs.logs()
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("missing", ["SRC_DIR", "ROOT"])
def test_folders_must_be_given(missing: str, job: Job) -> None:
    assert job.jobs.cluster.wait(job.submit("0", **{missing: ""})) == [2]
    assert f"{'TARGET_DIR' if missing == 'ROOT' else missing} is not set" in job.jobs.logs()


def test_a_wrong_array_element(job: Job) -> None:
    wrong = {"PYTHON": sys.executable, "CURATION_WRAP": "env SLURM_ARRAY_TASK_ID=99"}
    number = job.submit("0", "--dry_run", sbatch=("--array=1",), SRC_DIR=str(job.jobs.shards), **wrong)
    assert job.jobs.cluster.wait(number) in ([0], [2])
    assert job.jobs.cluster.wait(
        job.submit("0", "--quiet", sbatch=("--array=1",), SRC_DIR=str(job.jobs.shards), **wrong)
    ) == [2], job.jobs.logs()
    assert "SLURM_ARRAY_TASK_ID='99' is not an element of this job's array (1 to 1)" in job.jobs.logs()


def test_the_sites_own_setup(job: Job, tmp_path: Path) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text('echo "modules loaded: $NOT_SET" >&2\nexport CODES=1\n')
    assert job.jobs.cluster.wait(job.submit("0", CURATION_SETUP=str(setup))) == [1]
    assert "modules loaded" in job.jobs.logs()
    assert job.jobs.cluster.wait(job.submit("0", CURATION_SETUP=f"{setup}.not")) == [2]


def test_submitted_from_the_repository_and_from_elsewhere(job: Job, tmp_path: Path) -> None:
    """sbatch copies the script; the rest of the project is found all the same."""
    cluster = job.jobs.cluster
    variables = {**job.variables, "CODES": "0", "CURATION_HOME": ""}
    for cwd in (ROOT, tmp_path):
        number = cluster.sbatch(
            f"--output={tmp_path}/log", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem-per-cpu=100M", "--time=10",
            str(ROOT / job.script), cwd=cwd, variables=variables,
        )  # fmt: skip
        assert cluster.wait(number) == [0], (tmp_path / "log").read_text()
