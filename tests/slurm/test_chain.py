"""run_pipeline.sh: the stages as jobs that depend on each other, and on a machine without SLURM."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from curation.tar import TarWriter, read_samples
from tests.pipeline import ROOT
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import SIZE, Jobs, published, small_shards

SHARDS = 6
BAD = "00000003"
STAGES = {
    "01_filter_noface": "captions",
    "02_captions_processor": "prompts",
    "03_generate_images": "edits",
    "04_reshard": "shards",
}
FLAGS = {
    "FLAGS_01": "--detector recorded",
    "FLAGS_02": "--api ollama",
    "FLAGS_03": "--embedded --height 64 --width 64\n --steps 1 --batch_size 4",
}


class Chain:
    """run_pipeline.sh on a few shards of which one may be damaged beyond use."""

    def __init__(self, jobs: Jobs, port: int) -> None:
        self.jobs = jobs
        self.folder = jobs.root.parent
        self.shards = self.folder / "source shards"
        self.shards.mkdir()
        small_shards(self.shards, SHARDS)
        small = " ".join(("--ntasks-per-node=1", *SIZE, f"--output={self.folder}/logs/%x-%j.log"))
        (self.folder / "logs").mkdir()
        self.variables = {
            **jobs.variables({"CURATION_HOME": "", "SRC_DIR": str(self.shards), "PORTS": str(port), **FLAGS}),
            **{f"SBATCH_0{n}": small for n in range(1, 5)},
            "SBATCH_03": f"{small} --gpus-per-task=0",
            "ARRAY_01": "2-5",
            "ARRAY_04": "0-1",
            "TARGET_DIR": "/not/for/any/stage",
        }

    def start(self, *words: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """From a folder that is not the project's."""
        command = ("bash", str(ROOT / "run_pipeline.sh"), *words)
        return self.jobs.cluster.call(*command, check=check, cwd=self.folder, more={**self.variables, **more})

    def submit(self, *words: str, **more: str) -> list[str]:
        """The jobs' ids."""
        said = self.start(*words, **more).stdout
        assert f"-m curation status {self.jobs.root}" in said
        return re.findall(r"^stage 0\d is job (\d+)$", said, flags=re.M)

    def damage(self) -> None:
        """None of the samples of one shard has metadata that can be read."""
        path = self.shards / f"{BAD}.tar"
        samples = list(read_samples(path, {"jpg", "txt", "json"}))
        with open(path, "wb") as file:
            tar = TarWriter(file)
            for sample in samples:
                for suffix, data in sample.members.items():
                    tar.add(f"{sample.key}.{suffix}", b"{" if suffix == "json" else data)
            tar.close()

    def status(self) -> dict[str, dict[str, Any]]:
        command = [sys.executable, "-m", "curation", "status", str(self.jobs.root), "--json", "--look_s", "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        return {stage["stage"]: stage for stage in json.loads(done.stdout)["stages"]}

    def receipts(self) -> dict[str, dict[str, str]]:
        """Stage → shard → its status."""
        return {
            stage: {shard: receipt["status"] for shard, receipt in self.jobs.receipts(folder, stage).items()}
            for stage, folder in STAGES.items()
        }


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

    sound = {f"{n:08d}": "done" for n in range(SHARDS) if f"{n:08d}" != BAD}
    first, *rest = chain.receipts().values()
    assert first == {**sound, BAD: "failed"}
    assert rest == [sound, sound, sound]
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
    assert list(chain.receipts().values()) == [{**sound, BAD: "done"}] * 4
    after = published(jobs.root, *STAGES.values())
    assert {name: after[name] for name in before if BAD not in name} == {
        name: data for name, data in before.items() if BAD not in name
    }
