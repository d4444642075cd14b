"""01_filter_noface.sh with stand-ins for srun and scontrol: the real stage, exit codes, signals, and queueing again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_generate_images_sh import SCONTROL, SRUN, STAGE

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "01_filter_noface.sh"


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with the stand-ins first on the path."""
    stage = STAGE.replace("$EDITS", "$CAPTIONS")
    for name, text in (("srun", SRUN), ("python", stage), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHON": f"{tmp_path}/bin/python",
        "SHARDS": f"{tmp_path}/shards/{{00000000..00000004}}.tar",
        "CAPTIONS": f"{tmp_path}/captions with a space",
        "EDITS": f"{tmp_path}/edits",
        "LOG": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def test_two_tasks_of_the_real_stage_share_the_shards(job: dict[str, str], tmp_path: Path) -> None:
    shards = f"{ROOT}/examples/shards/{{00000001,00000003}}.tar"
    flags = ["--detector", "recorded", "--quiet"]
    environment = {**job, "PYTHON": sys.executable, "SHARDS": shards, "TASK_CODES": "0 0"}
    assert subprocess.run([SCRIPT, *flags], env=environment, check=False, timeout=60).returncode == 0
    for shard in ("00000001", "00000003"):
        captions = json.loads((Path(job["CAPTIONS"]) / f"{shard}.json").read_bytes())
        assert list(captions) == list(json.loads((Path(job["EDITS"]) / f"{shard}.json").read_bytes()))
        assert captions


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0 0", 0), ("0 1 0", 1), ("0 2 1", 2), ("75 2", 2), ("1 75", 75), ("75 0", 75), ("137 0", 1), ("139", 1)],
)
def test_the_jobs_exit_code(codes: str, expected: int, job: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--embedded"], env={**job, "TASK_CODES": codes}, check=False, timeout=30)
    assert done.returncode == expected
    assert not (tmp_path / "scontrol").exists(), "nobody was at a time limit"
    (line, *_) = (tmp_path / "stage").read_text().splitlines()
    folders = f"--input {job['SHARDS']} --output {job['CAPTIONS']} --edits {job['EDITS']}"
    assert line == f"01_filter_noface.py {folders} --embedded"
    assert not list(Path(job["CAPTIONS"]).iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("number", "finishes", "restarts", "requeued"),
    [
        (signal.SIGUSR1, "yes", "0", True),
        (signal.SIGUSR1, "", "0", False),  # it would go round for ever
        (signal.SIGUSR1, "yes", "50", False),
        (signal.SIGTERM, "yes", "0", False),  # scancel
    ],
)
def test_it_queues_itself_again_only_at_the_time_limit_and_with_something_done(
    number: signal.Signals, finishes: str, restarts: str, requeued: bool, job: dict[str, str], tmp_path: Path
) -> None:
    environment = {**job, "TASK_CODES": "wait", "FINISHES": finishes, "SLURM_RESTART_COUNT": restarts}
    with subprocess.Popen([SCRIPT], env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 20
        while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=20) == 75
    asked = (tmp_path / "scontrol").read_text().split() if (tmp_path / "scontrol").exists() else []
    assert asked == (["requeue", "70_3"] if requeued else [])


@pytest.mark.parametrize("missing", ["SHARDS", "CAPTIONS", "EDITS"])
def test_folders_must_be_given(missing: str, job: dict[str, str]) -> None:
    environment = {name: value for name, value in job.items() if name != missing}
    done = subprocess.run([SCRIPT], env=environment, check=False, timeout=30, capture_output=True, text=True)
    assert done.returncode != 0
    assert missing in done.stderr
