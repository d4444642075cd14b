"""Killing a stage with SIGKILL at any moment and starting it again gives the bytes of an undisturbed run.

Three random moments a stage here, twenty under ``-m soak``.  The language model is the deterministic server, so that
stage 02's prompts can be compared byte for byte too.  The seed of the moments is in the test's id and can be set with
CURATION_KILL_SEED.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import deterministic_llm_server

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "shards"
SEED = int(os.environ.get("CURATION_KILL_SEED", "20261121"))
KEEPS_TIMES = ("_receipts", "_claims", "_partial")  # times and hosts stand in receipts only


@dataclass(frozen=True)
class StageRun:
    """How to start a stage on a folder, and which folders it publishes into."""

    name: str
    command: Callable[[Path], list[str]]
    outputs: tuple[str, ...]


def stage_runs(port: int) -> list[StageRun]:
    quick = ["--lease_s", "2", "--quiet"]
    return [
        StageRun(
            "01_filter_noface",
            lambda root: [
                *["01_filter_noface.py", "--input", f"{root}/shards", "--output", f"{root}/captions"],
                *["--edits", f"{root}/edits", "--embedded", "--threads", "1", *quick],
            ],
            ("captions", "edits"),
        ),
        StageRun(
            "02_captions_processor",
            lambda root: [
                *["02_captions_processor.py", "--input", f"{root}/captions", "--output", f"{root}/prompts"],
                *["--ports", str(port), "--api", "ollama", *quick],
            ],
            ("prompts",),
        ),
        StageRun(
            "03_generate_images",
            lambda root: [
                *["03_generate_images_multigpu.py", "--prompts", f"{root}/prompts", "--edits", f"{root}/edits"],
                *["--embedded", "--height", "64", "--width", "64", "--batch_size", "4", *quick],
            ],
            ("edits",),
        ),
        StageRun(
            "04_reshard",
            lambda root: [
                *["04_reshard.py", "--input", f"{root}/shards", "--edits", f"{root}/edits"],
                *["--prompts", f"{root}/prompts", "--output", f"{root}/hybrid", *quick],
            ],
            ("hybrid",),
        ),
    ]


@pytest.fixture(scope="module")
def llm_port() -> Iterator[int]:
    with deterministic_llm_server(delay_s=0.02) as port:
        yield port


@pytest.fixture(scope="module")
def undisturbed(llm_port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """The stages one after the other without a kill: a copy of the folder before each, and how long each took."""
    base = tmp_path_factory.mktemp("undisturbed")
    root = base / "work"
    shutil.copytree(EXAMPLES, root / "shards")
    befores = {}
    for stage in stage_runs(llm_port):
        before = base / f"before_{stage.name}"
        shutil.copytree(root, before, copy_function=shutil.copy2)
        began = time.monotonic()
        finished = start(stage, root).wait(timeout=300)
        assert finished == 0, f"{stage.name} undisturbed ended with {finished}"
        after = base / f"after_{stage.name}"
        shutil.copytree(root, after, copy_function=shutil.copy2)
        befores[stage.name] = (before, time.monotonic() - began)
        befores[f"{stage.name}:after"] = (after, 0.0)
    return befores


def start(stage: StageRun, root: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *stage.command(root)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def published(root: Path, stage: StageRun) -> dict[str, str]:
    """Path → sha256 of every file that the stage's folders hold, but for the records that have times in them."""
    found = {}
    for folder in stage.outputs:
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root)
            if path.is_file() and not set(relative.parts) & set(KEEPS_TIMES):
                found[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def counts(root: Path, stage: StageRun) -> dict[str, dict[str, object]]:
    receipts = (root / stage.outputs[0]).glob(f"_receipts/{stage.name}/*/*.json")
    return {path.stem: json.loads(path.read_bytes())["counts"] for path in receipts}


def kill_and_go_on(stage: StageRun, before: Path, after: Path, seconds: float, moments: int, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED}:{stage.name}:{moments}")
    for number in range(moments):
        root = tmp_path / str(number)
        shutil.copytree(before, root, copy_function=shutil.copy2)
        victim = start(stage, root)
        # most of a short stage is start-up: half the moments fall into its second half
        moment = seconds * (rng.uniform(0.5, 1.0) if number % 2 else rng.uniform(0.0, 1.0))
        try:
            victim.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(victim.pid, signal.SIGKILL)
            victim.wait()
        code = start(stage, root).wait(timeout=300)
        assert code == 0, f"{stage.name} started again after a kill at {moment:.2f} s ended with {code}"
        assert published(root, stage) == published(after, stage), f"killed at {moment:.2f} s of {seconds:.2f} s"
        assert counts(root, stage) == counts(after, stage)
        partial = [p for folder in stage.outputs for p in (root / folder / "_partial").rglob("*") if p.is_file()]
        assert not partial, f"checkpoints were left behind: {partial}"
        shutil.rmtree(root)


STAGES = ["01_filter_noface", "02_captions_processor", "03_generate_images", "04_reshard"]


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_started_again_gives_the_same_bytes(
    name: str, llm_port: int, undisturbed: dict[str, tuple[Path, float]], tmp_path: Path
) -> None:
    stage = next(s for s in stage_runs(llm_port) if s.name == name)
    before, seconds = undisturbed[name]
    kill_and_go_on(stage, before, undisturbed[f"{name}:after"][0], seconds, 3, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", STAGES)
def test_killed_at_twenty_moments(
    name: str, llm_port: int, undisturbed: dict[str, tuple[Path, float]], tmp_path: Path
) -> None:
    stage = next(s for s in stage_runs(llm_port) if s.name == name)
    before, seconds = undisturbed[name]
    kill_and_go_on(stage, before, undisturbed[f"{name}:after"][0], seconds, 20, tmp_path)


@pytest.mark.parametrize("name", STAGES)
def test_a_finished_stage_started_again_does_nothing_quickly(
    name: str, llm_port: int, undisturbed: dict[str, tuple[Path, float]], tmp_path: Path
) -> None:
    stage = next(s for s in stage_runs(llm_port) if s.name == name)
    root = tmp_path / "again"
    shutil.copytree(undisturbed[f"{name}:after"][0], root, copy_function=shutil.copy2)

    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}

    before = state()
    began = time.monotonic()
    assert start(stage, root).wait(timeout=60) == 0
    assert time.monotonic() - began < 5, "nothing is pending: no model needs loading"
    assert state() == before
