"""The main job on the example shards, for tests that need all four stages: small models, a deterministic language
model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests import EXAMPLES, processes


@dataclass(frozen=True)
class StageRun:
    """How to start a stage on a folder, and which of the folder's own folders it publishes into."""

    name: str
    command: Callable[[Path], list[str]]
    outputs: tuple[str, ...]


def stage_runs(llm_port: int) -> list[StageRun]:
    """Stages 01 to 04 on ``root/shards``, ready to be started in that order."""
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
                *["--ports", str(llm_port), "--api", "ollama", *quick],
            ],
            ("prompts",),
        ),
        StageRun(
            "03_generate_images",
            lambda root: [
                *["03_generate_images_multigpu.py", "--input", f"{root}/prompts", "--output", f"{root}/edits"],
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


def start(stage: StageRun, root: Path, *more: str) -> subprocess.Popen[str]:
    """The stage's script as a user starts it, in a process group of its own."""
    return processes.start([sys.executable, *stage.command(root), *more])


@dataclass
class Undisturbed:
    """One whole run: the folder before and after each stage, and each stage's seconds."""

    stages: list[StageRun]
    before: dict[str, Path] = field(default_factory=dict)
    after: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str) -> StageRun:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def root(self) -> Path:
        return self.after["04_reshard"]


def copy_tree(source: Path, target: Path) -> None:
    """With modification times: inputs made elsewhere count by them."""
    shutil.copytree(source, target, copy_function=shutil.copy2)


def run_undisturbed(base: Path, llm_port: int) -> Undisturbed:
    """Run stages 01 to 04 one after the other; a folder in which that has been done is taken as it is."""
    run, done = Undisturbed(stage_runs(llm_port)), base / "seconds.json"
    if done.exists():
        run.seconds = json.loads(done.read_bytes())
    current = base / "input"
    if not run.seconds:
        copy_tree(EXAMPLES, current / "shards")
    for stage in run.stages:
        run.before[stage.name] = current
        after = base / f"after_{stage.name}"
        if not done.exists():
            copy_tree(current, after)
            began = time.monotonic()
            with processes.ended_at_last(start(stage, after)) as process:
                code = process.wait(timeout=300)
            assert code == 0, f"{stage.name} ended with {code}"
            run.seconds[stage.name] = time.monotonic() - began
        run.after[stage.name] = current = after
    done.write_text(json.dumps(run.seconds))
    return run
