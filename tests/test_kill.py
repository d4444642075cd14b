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
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from curation.__main__ import main
from tests.pipeline import StageRun, Undisturbed, copy_tree, start
from tests.processes import cpu_time_of, ended_at_last, imported_modules
from tests.stages.harness import hashes, read_jsonl
from tests.test_architecture import HEAVY, UNUSED

SEED = int(os.environ.get("CURATION_KILL_SEED", "20261121"))
HAVE_TIMES = {"_receipts", "_claims", "_partial"}  # times and hosts stand in receipts only
STAGES = ["01_filter_noface", "02_captions_processor", "03_generate_images", "04_reshard"]


def published(root: Path, stage: StageRun) -> list[dict[str, str]]:
    """Path → sha256 of every file in each of the stage's folders but for the records that have times in them."""
    return [hashes(root / folder, HAVE_TIMES) for folder in stage.outputs]


def counts(root: Path, stage: StageRun) -> dict[str, dict[str, object]]:
    receipts = (root / stage.outputs[0]).glob(f"_receipts/{stage.name}/*/*.json")
    return {path.stem: json.loads(path.read_bytes())["counts"] for path in receipts}


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_killed_while_it_makes_further_tries(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """With a real check that about half of the stand-in's noise fails.  ``tests/stages/test_stage_03_checks.py`` cuts
    the checkpoint at each of its ends."""
    before, plain = undisturbed.before["03_generate_images"], undisturbed.stage("03_generate_images")

    def checked(most: float, root: Path) -> tuple[StageRun, list[dict[str, Any]], float]:
        """The stage, what its provenance says of the samples that are kept, and its seconds."""
        flags = ["--check", "safety", "--max_nsfw", str(most), "--tries", "3"]
        stage = replace(plain, command=lambda root: [*plain.command(root), *flags])
        copy_tree(before, root)
        began = time.monotonic()
        with ended_at_last(start(stage, root)) as process:
            assert process.wait(timeout=280) == 0
        seconds = time.monotonic() - began
        lines = [line for path in root.glob("edits/_provenance/03_generate_images/*") for line in read_jsonl(path)]
        return stage, lines, seconds

    whole = tmp_path / "whole"
    scores = sorted(line["checks"]["safety"]["nsfw"] for line in checked(1, tmp_path / "scores")[1])
    stage, lines, seconds = checked(scores[len(scores) // 2] - 0.00005, whole)
    assert any(line["failed_tries"] for line in lines)
    run = replace(undisturbed, stages=[stage], before={stage.name: before}, after={stage.name: whole})
    run.seconds = {stage.name: seconds}
    kill_and_go_on(run, stage.name, 8, tmp_path)
    with ended_at_last(start(undisturbed.stage("04_reshard"), whole)) as process:
        assert process.wait(timeout=280) == 0
    assert main(["verify", f"{whole}/shards", f"{whole}/hybrid", "--quiet", "--workers", "1"]) == 0


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
    unused = imported_modules(said.stderr) & {*HEAVY, *UNUSED}
    assert not unused, "nothing is pending: neither a model nor a picture nor a server is needed"
    assert state() == before
