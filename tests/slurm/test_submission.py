"""From where a stage is started: a step's shell, another allocation, another checkout; a program is in its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import ROOT
from tests.slurm.jobs import SIZE, Jobs

# Prints what it was given and what it finds in its environment.
STAGE = """#!/bin/bash
echo "RAN $*"
env | grep -E '^(SLURM|SRUN|SBATCH|CUDA)_' | sed 's/^/in the task: /'
"""
SMALL = ("--ntasks-per-node=1", *SIZE)


class Here:
    """Jobs whose stage is the stand-in, and what they say."""

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self.cluster, self.folder = jobs.cluster, folder
        stage = folder / "stage.sh"
        stage.write_text(STAGE)
        stage.chmod(0o755)
        self.variables = {
            **jobs.variables({"PYTHON": str(stage), "SRC_DIR": f"{folder}/source", "CURATION_HOME": ""}),
            "ROOT": f"{folder}/root",
        }
        (folder / "source").mkdir()

    def call(self, *command: str, check: bool = True, cwd: Path | None = None, **more: str) -> str:
        """What a command says on both of its streams."""
        done = self.cluster.call(
            "timeout", "60", *command, check=check, cwd=cwd or self.folder, more={**self.variables, **more}
        )
        return done.stdout + done.stderr

    def submitted_in(self, *outer: str, inner: tuple[str, ...] = (), **more: str) -> tuple[dict[str, str], str]:
        """Stage 01's script, submitted by a shell that ``outer`` starts: the variables in its task, and its log."""
        log = self.folder / "inner.log"
        words = ("sbatch", "--wait", f"--output={log}", *SMALL, *inner, str(ROOT / "01_filter_noface.sh"))
        (self.folder / "submit.sh").write_text('#!/bin/bash\nexec "$@"\n')
        (self.folder / "submit.sh").chmod(0o755)
        if outer[0] == "sbatch":
            self.call(*outer, str(self.folder / "submit.sh"), *words, **more)
        else:
            self.call(*outer, *words, **more)
        text = log.read_text()
        found = [
            line.removeprefix("in the task: ").split("=", 1) for line in text.splitlines() if "in the task: " in line
        ]
        return dict(found), text


@pytest.fixture
def here(jobs: Jobs, tmp_path: Path) -> Here:
    return Here(jobs, tmp_path)


def project_at(folder: Path, version: str) -> Path:
    """The parts of the project that a job script reads before it starts the stage."""
    (folder / "curation").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "curation" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    for path in ROOT.glob("*.sh"):
        shutil.copy(path, folder)
    return folder


# ---- in a step


@pytest.mark.parametrize("script", ["01_filter_noface.sh", "04_reshard.sh"])
def test_in_the_shell_of_a_step(script: str, here: Here) -> None:
    """A second srun would wait for ever for the CPUs that the step holds."""
    said = here.call("srun", "-N1", "-n1", "-c2", "bash", "-c", f"bash {ROOT}/{script} --quiet; echo ended with $?")
    assert said.count("RAN ") == 1
    assert "--workers 1 --quiet" in said
    assert "ended with 0" in said


def test_each_task_of_a_step_is_a_worker(here: Here) -> None:
    said = here.call("srun", "-N1", "-n3", "bash", str(ROOT / "01_filter_noface.sh"))
    assert said.count("RAN ") == 3
    assert {f"in the task: SLURM_PROCID={n}" for n in range(3)} <= {*said.splitlines()}


def test_in_the_shell_of_salloc(here: Here) -> None:
    """That is no step: srun starts all tasks of the allocation."""
    said = here.call("salloc", "-N1", "-n2", "-c1", "--gpus-per-task=1", "bash", str(ROOT / "01_filter_noface.sh"))
    assert said.count("RAN ") == 2
    assert "in the task: CUDA_VISIBLE_DEVICES=1" in said
    assert "tasks ended with: 0" in said


# ---- from inside another allocation


@pytest.mark.parametrize(
    "outer",
    [
        ("salloc", "-N1", "-n1", "-c2", "--gpus-per-task=1", "--mem-per-cpu=300M", "--distribution=plane=2"),
        ("salloc", "-N1", "-n2", "--gpus=2", "--mem=2G", "srun", "-n1", "--distribution=block", "--cpu-bind=none"),
        ("srun", "-N1", "-n1", "-c3", "--gpus=2", "--mem=1G"),
        ("sbatch", "--wait", "--array=7", "--gpus-per-node=2", "--cpus-per-gpu=2", "--mem-per-gpu=200M"),
        ("sbatch", "--wait", "--array=7", "--gres=gpu:1", "--export=ALL,SLURM_RESTART_COUNT=7"),
    ],
    ids=["salloc", "a step in salloc", "srun", "an element of an array", "gres"],
)
def test_nothing_of_the_outer_allocation_reaches_the_job(outer: tuple[str, ...], here: Here) -> None:
    found, log = (
        here.submitted_in(*outer, SRUN_CPUS_PER_TASK="5") if outer[0] != "salloc" else here.submitted_in(*outer)
    )
    assert "tasks ended with: 0" in log, log
    assert found.pop("SLURM_DISTRIBUTION") == "cyclic", "srun's own word for the default"
    foreign = ("GPU", "DIST", "ARRAY", "RESTART", "MEM_PER_GPU", "MEM_PER_NODE", "CPUS_PER_GPU", "CUDA")
    assert not [name for name in found if any(word in name for word in foreign)], found
    assert found["SLURM_CPUS_PER_TASK"] == "1"
    assert found["SLURM_NTASKS"] == "1"
    assert found.get("SLURM_MEM_PER_CPU", "100") == "100"


def test_what_is_given_for_the_job_stays(here: Here) -> None:
    inner = ("--gpus-per-task=2", "--cpus-per-task=2", "--array=4")
    found, log = here.submitted_in(
        "salloc", "-N1", "-n1", "--gpus-per-task=1", "--mem=3G", inner=inner, SLURM_QOS="high", SBATCH_ACCOUNT="us"
    )
    assert "tasks ended with: 0" in log, log
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert (found["SLURM_CPUS_PER_TASK"], found["SLURM_ARRAY_TASK_ID"]) == ("2", "4")
    assert found["SLURM_CONF"] == str(here.cluster.configuration)
    assert (found["SLURM_QOS"], found["SBATCH_ACCOUNT"]) == ("high", "us")


def test_outside_of_an_allocation_every_option_stays(here: Here) -> None:
    found, log = here.submitted_in("env", inner=("--distribution=plane=1",))
    assert "tasks ended with: 0" in log, log
    assert found["SLURM_DISTRIBUTION"] == "plane"


def test_run_pipeline_from_inside_an_allocation(here: Here) -> None:
    """sbatch's own variables of that kind too; those of accounts and the like, and SBATCH_0N, go on."""
    outer = ("salloc", "-N1", "-n1", "--gpus-per-task=1", "--mem-per-cpu=300M")
    words = f"--output={here.folder}/%x.log {' '.join(SMALL)}"
    said = here.call(
        *outer, "bash", str(ROOT / "run_pipeline.sh"), "--stages", "01",
        SBATCH_01=f"{words} --cpus-per-task=2", SBATCH_GPUS_PER_TASK="1", SBATCH_MEM_BIND="none",
        SBATCH_PARTITION="urgent",
    )  # fmt: skip
    (number,) = [line.split()[-1] for line in said.splitlines() if line.startswith("stage 01 is job ")]
    assert here.cluster.wait(number) == [0]
    (facts,) = here.cluster.facts(number)
    assert (facts["Partition"], facts["CPUs/Task"]) == ("urgent", "2")
    assert "TresPerTask" not in facts
    log = (here.folder / "01_filter_noface.log").read_text()
    assert "GPU" not in log
    assert "in the task: SBATCH_PARTITION=urgent" in log


# ---- which code


@pytest.mark.parametrize("how", ["absolute", "relative", "link", "wrap", "array"])
def test_a_script_runs_its_own_code_from_wherever_it_is_submitted(how: str, here: Here, tmp_path: Path) -> None:
    own = project_at(tmp_path / "a (b) 'c' \"d\" & 5%j;", "1.2.3")
    other = project_at(tmp_path / "other", "9.9.9")
    script = str(own / "01_filter_noface.sh")
    if how == "relative":
        script = f"../{own.name}/01_filter_noface.sh"
    elif how == "link":
        (other / "own").symlink_to(own)
        script = "own/01_filter_noface.sh"
    words = (
        ["--wrap", f"bash '{own.parent}'/a*/01_filter_noface.sh two\\ words"]
        if how == "wrap"
        else [script, "two words"]
    )
    array = ["--array=1"] if how == "array" else []
    here.call("sbatch", "--wait", f"--output={tmp_path}/log", *SMALL, *array, *words, cwd=other)
    log = (tmp_path / "log").read_text()
    place = other / "own" if how == "link" else own
    assert log.splitlines()[0] in (f"code: {place}, version 1.2.3", f"code: {own}, version 1.2.3")
    assert f"{log.splitlines()[0].removeprefix('code: ').removesuffix(', version 1.2.3')}/01_filter_noface.py" in log
    assert "two words" in log


def test_run_pipeline_in_a_folder_with_spaces(here: Here, tmp_path: Path) -> None:
    own = project_at(tmp_path / "a (b) 'c' 5%j", "1.2.3")
    said = here.call(
        "bash", str(own / "run_pipeline.sh"), "--stages", "01", SBATCH_01=" ".join(SMALL), ROOT=f"{tmp_path}/my root"
    )
    number = said.split(" is job ")[1].split()[0]
    assert here.cluster.wait(number) == [0]
    log = (own / "logs" / f"01_filter_noface-{number}.log").read_text()
    assert log.startswith(f"code: {own}, version 1.2.3\n")
    assert f"--output {tmp_path}/my root/captions" in log


def test_a_wrong_home_is_told(here: Here, tmp_path: Path) -> None:
    said = here.call("bash", str(ROOT / "01_filter_noface.sh"), check=False, CURATION_HOME=str(tmp_path))
    assert said == f"error: the project is not in '{tmp_path}': set CURATION_HOME to its folder\n"


# ---- nothing starts


def test_no_task_starts(here: Here, tmp_path: Path) -> None:
    """srun itself ends with 1, which would say that some shards failed."""
    number = here.cluster.sbatch(
        f"--output={tmp_path}/log", *SMALL, str(ROOT / "01_filter_noface.sh"),
        cwd=tmp_path, variables={**here.variables, "SRUN_CPUS_PER_TASK": "100"},
    )  # fmt: skip
    assert here.cluster.wait(number) == [2], (tmp_path / "log").read_text()
    assert "no task of job" in (tmp_path / "log").read_text()
    assert not list((tmp_path / "root" / "captions").iterdir())
