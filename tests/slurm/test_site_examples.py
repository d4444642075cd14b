"""examples/slurm: what each script submits, and one of them run on the test cluster."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.slurm.chain import SHARDS, Chain
from tests.slurm.jobs import SIZE, Jobs

SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sh"))


@pytest.fixture
def site(jobs: Jobs, llm_port: int) -> Chain:
    """The examples' own settings, where the test cluster has them."""
    site = Chain(jobs, llm_port)
    taken = [name for name in site.variables if name.startswith(("SBATCH_", "FLAGS_", "ARRAY_"))]
    for name in [*taken, "PORTS", "CURATION_HOME", "TARGET_DIR"]:
        del site.variables[name]
    return site


def start(site: Chain, script: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return site.jobs.cluster.call("bash", str(script), *words, cwd=site.folder, more={**site.variables, **more})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_is_submitted(script: Path, site: Chain) -> None:
    said = start(site, script, "--dry_run").stdout
    lines = [line for line in said.splitlines() if " sbatch " in line]
    wanted = {"cpu-partition": "12"}.get(script.stem, "1234")
    assert re.findall(r"/0(\d)_\w+\.sh", said) == list(wanted)
    assert ["--follow" in line for line in lines] == [
        script.stem == "four-gpus-a-node" and n > 0 for n in range(len(lines))
    ]
    for line in lines:
        assert "--time=" in line
        assert f"ROOT={site.jobs.root}" in line


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_slurm_takes_every_word(script: Path, site: Chain) -> None:
    """The site's names for accounts and partitions aside; held, so that nothing starts."""
    hold = {f"SBATCH_0{n}": "--hold --ntasks-per-node=1 --cpus-per-task=1 --mem-per-cpu=100M" for n in range(1, 5)}
    names = {"SBATCH_PARTITION": "main", "CPU_PARTITION": "main", "GPU_PARTITION": "main"}
    numbers = re.findall(r"^stage 0\d is job (\d+)$", start(site, script, **names, **hold).stdout, flags=re.M)
    try:
        facts = [site.jobs.cluster.facts(number)[0] for number in numbers]
        assert {told["Account"] for told in facts} == {"my_account"}
        assert {told["Partition"] for told in facts} == {"main"}
        if script.stem == "backfill-one-gpu-30min":
            assert {told["TimeLimit"] for told in facts} == {"00:30:00"}
            assert "ArrayTaskThrottle" in facts[2]
    finally:
        site.jobs.cluster.call("scancel", *numbers)


def test_backfill_runs(site: Chain, llm_port: int) -> None:
    """Each task of stage 03 is given a GPU, and computes on the CPU all the same: this one is none."""
    small = " ".join(("--ntasks-per-node=1", *SIZE[:-1], f"--output={site.folder}/logs/%x-%j.log"))
    said = start(
        site, ROOT / "examples" / "slurm" / "backfill-one-gpu-30min.sh", "--", "--quiet",
        SBATCH_PARTITION="main", PORTS=str(llm_port), CURATION_WRAP="env CUDA_VISIBLE_DEVICES=",
        FLAGS_02="--api ollama", FLAGS_03="--embedded --height 64 --width 64 --steps 1 --batch_size 4",
        ARRAY_01="0-1", ARRAY_02="0", ARRAY_03="0-1%1", ARRAY_04="0", **{f"SBATCH_0{n}": small for n in range(1, 5)},
    ).stdout  # fmt: skip
    numbers = re.findall(r"^stage 0\d is job (\d+)$", said, flags=re.M)
    codes = [set(site.jobs.cluster.wait(number)) for number in numbers]
    assert codes == [{0}] * 4, site.jobs.logs()
    assert site.jobs.cluster.facts(numbers[2])[0]["TresPerTask"] == "gres:gpu:1"
    assert {stage: len(shards) for stage, shards in site.receipts().items()} == dict.fromkeys(site.receipts(), SHARDS)
