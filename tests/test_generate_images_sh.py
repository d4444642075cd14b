"""03_generate_images.sh with stand-ins for srun and scontrol: exit codes, signals, and when it queues itself again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "03_generate_images.sh"

# Runs the task once for each of $TASK_CODES, one after the other, and ends with the highest code, as srun does.
# Signals reach every process of a task, as SLURM sends them.
SRUN = """#!/bin/bash
echo "$@" >>"$LOG/srun"
shift
highest=0 number=0 child=
trap 'kill -USR1 -- -"$child"' USR1
trap 'kill -TERM -- -"$child"' TERM
for code in $TASK_CODES; do
    SLURM_PROCID=$number CODE=$code setsid "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"; ended=$?
    [ "$ended" -gt "$highest" ] && highest=$ended
    number=$((number + 1))
done
exit "$highest"
"""
# Stands in for the stage: ends with $CODE; "wait" means 75 once it is asked to stop, with something finished meanwhile.
STAGE = """#!/bin/bash
echo "$@" >>"$LOG/stage"
if [ "$CODE" = wait ]; then
    trap 'stop=1' USR1 TERM
    touch "$LOG/waiting"
    while [ -z "$stop" ]; do sleep 0.05; done
    [ -n "$FINISHES" ] && mkdir -p "$EDITS/_receipts" && touch "$EDITS/_receipts/0.json"
    exit 75
fi
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$LOG/scontrol"
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with the stand-ins first on the path."""
    for name, text in (("srun", SRUN), ("python", STAGE), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "edits").mkdir()
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHON": f"{tmp_path}/bin/python",
        "PROMPTS": f"{tmp_path}/prompts with a space",
        "EDITS": f"{tmp_path}/edits",
        "LOG": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0 0", 0), ("0 1 0", 1), ("0 2 1", 2), ("75 2", 2), ("1 75", 75), ("75 0", 75), ("137 0", 1), ("139", 1)],
)
def test_the_jobs_exit_code(codes: str, expected: int, job: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--seed", "1"], env={**job, "TASK_CODES": codes}, check=False, timeout=30)
    assert done.returncode == expected
    assert not (tmp_path / "scontrol").exists(), "nobody was at a time limit"
    (line, *_) = (tmp_path / "stage").read_text().splitlines()
    assert line == f"03_generate_images_multigpu.py --prompts {job['PROMPTS']} --edits {job['EDITS']} --seed 1"
    assert not list((tmp_path / "edits").iterdir()), "nothing is left behind"


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
    process = subprocess.Popen([SCRIPT], env=environment, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=20) == 75
    asked = (tmp_path / "scontrol").read_text().split() if (tmp_path / "scontrol").exists() else []
    assert asked == (["requeue", "70_3"] if requeued else [])
    assert {path.name for path in (tmp_path / "edits").iterdir()} <= {"_receipts"}


@pytest.mark.parametrize("missing", ["PROMPTS", "EDITS"])
def test_folders_must_be_given(missing: str, job: dict[str, str]) -> None:
    environment = {name: value for name, value in job.items() if name != missing}
    done = subprocess.run([SCRIPT], env=environment, check=False, timeout=30, capture_output=True, text=True)
    assert done.returncode != 0 and missing in done.stderr
