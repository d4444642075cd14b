"""04_reshard.sh with stand-ins for srun and scontrol: the real stage, its folders and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import Undisturbed, copy_tree
from tests.test_generate_images_sh import SCONTROL, SRUN, STAGE

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "04_reshard.sh"


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with the stand-ins first on the path."""
    for name, text in (("srun", SRUN), ("python", STAGE.replace("$EDITS", "$HYBRID")), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHON": f"{tmp_path}/bin/python",
        "SHARDS": f"{tmp_path}/shards",
        "EDITS": f"{tmp_path}/edits",
        "PROMPTS": f"{tmp_path}/prompts",
        "HYBRID": f"{tmp_path}/hybrid with a space",
        "LOG": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def test_two_tasks_of_the_real_stage_give_the_bytes_of_one(
    job: dict[str, str], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    copy_tree(undisturbed.before["04_reshard"], tmp_path / "work")
    folders = {name.upper(): f"{tmp_path}/work/{name}" for name in ("shards", "edits", "prompts")}
    environment = {**job, **folders, "PYTHON": sys.executable, "TASK_CODES": "0 0"}
    done = subprocess.run([SCRIPT, "--verify", "--quiet"], env=environment, check=False, timeout=60)
    assert done.returncode == 0
    hybrid = undisturbed.root / "hybrid"
    assert {p.name: p.read_bytes() for p in Path(job["HYBRID"]).glob("*.tar")} == {
        p.name: p.read_bytes() for p in hybrid.glob("*.tar")
    }


@pytest.mark.parametrize(("codes", "expected"), [("0 0", 0), ("0 1 0", 1), ("0 2 1", 2), ("1 75", 75), ("137 0", 1)])
def test_the_jobs_exit_code(codes: str, expected: int, job: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--verify"], env={**job, "TASK_CODES": codes}, check=False, timeout=30)
    assert done.returncode == expected
    (line, *_) = (tmp_path / "stage").read_text().splitlines()
    folders = f"--input {job['SHARDS']} --edits {job['EDITS']} --prompts {job['PROMPTS']} --output {job['HYBRID']}"
    assert line == f"04_reshard.py {folders} --verify"


@pytest.mark.parametrize("missing", ["SHARDS", "EDITS", "PROMPTS", "HYBRID"])
def test_folders_must_be_given(missing: str, job: dict[str, str]) -> None:
    environment = {name: value for name, value in job.items() if name != missing}
    done = subprocess.run([SCRIPT], env=environment, check=False, timeout=30, capture_output=True, text=True)
    assert done.returncode != 0
    assert missing in done.stderr
