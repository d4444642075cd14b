"""Killing a stage with SIGKILL at any moment and starting it again gives the bytes of an undisturbed run.

Three random moments a stage here, twenty under ``-m soak``.  The language model is the deterministic server, so that
stage 02's prompts can be compared byte for byte too.  CURATION_KILL_SEED sets other moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import StageRun, Undisturbed, copy_tree, start
from tests.processes import cpu_time_of, ended_at_last, imported_modules
from tests.stages.harness import hashes
from tests.test_architecture import HEAVY

SEED = int(os.environ.get("CURATION_KILL_SEED", "20261121"))
HAVE_TIMES = {"_receipts", "_claims", "_partial"}  # times and hosts stand in receipts only
STAGES = ["01_filter_noface", "02_captions_processor", "03_generate_images", "04_reshard"]


def published(root: Path, stage: StageRun) -> list[dict[str, str]]:
    """Path → sha256 of every file in each of the stage's folders but for the records that have times in them."""
    return [hashes(root / folder, HAVE_TIMES) for folder in stage.outputs]


def counts(root: Path, stage: StageRun) -> dict[str, dict[str, object]]:
    receipts = (root / stage.outputs[0]).glob(f"_receipts/{stage.name}/*/*.json")
    return {path.stem: json.loads(path.read_bytes())["counts"] for path in receipts}


def kill_and_go_on(run: Undisturbed, name: str, moments: int, tmp_path: Path) -> None:
    stage, seconds = run.stage(name), run.seconds[name]
    rng = random.Random(f"{SEED}:{name}:{moments}")
    for number in range(moments):
        root = tmp_path / str(number)
        copy_tree(run.before[name], root)
        # much of a short stage is start-up: every other moment falls into its second half
        moment = seconds * rng.uniform(0.5 if number % 2 else 0.0, 1.0)
        with ended_at_last(start(stage, root)) as victim, contextlib.suppress(subprocess.TimeoutExpired):
            victim.wait(timeout=moment)
        with ended_at_last(start(stage, root)) as process:
            code = process.wait(timeout=280)
        assert code == 0, f"{name} started again after a kill at {moment:.2f} s ended with {code}"
        assert published(root, stage) == published(run.after[name], stage), f"killed at {moment:.2f} of {seconds:.2f} s"
        assert counts(root, stage) == counts(run.after[name], stage)
        partial = [p for folder in stage.outputs for p in (root / folder / "_partial").rglob("*") if p.is_file()]
        assert not partial, f"checkpoints were left behind: {partial}"
        shutil.rmtree(root)


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_started_again_gives_the_same_bytes(name: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    kill_and_go_on(undisturbed, name, 3, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", STAGES)
def test_killed_at_twenty_moments(name: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    kill_and_go_on(undisturbed, name, 20, tmp_path)


@pytest.mark.parametrize("name", STAGES)
def test_a_finished_stage_started_again_does_nothing_quickly(
    name: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    root = tmp_path / "again"
    copy_tree(undisturbed.after[name], root)

    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}

    before = state()
    command = [sys.executable, "-X", "importtime", *undisturbed.stage(name).command(root)]
    seconds, said = cpu_time_of(command)
    assert said.returncode == 0
    assert seconds < 5
    assert not imported_modules(said.stderr) & set(HEAVY), "nothing is pending: no model needs loading"
    assert state() == before
