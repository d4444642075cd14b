"""run_pipeline.sh on a few shards of the test cluster, with the stages or with a program in their place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from curation.tar.samples import TarWriter, read_samples
from tests import ROOT
from tests.slurm.jobs import SIZE, Jobs, small_shards

SHARDS = 6
BAD = "00000003"
SOUND = {f"{n:08d}": "done" for n in range(SHARDS) if f"{n:08d}" != BAD}
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


# $LOG/stages: a line for each start.  Stage n ends with the n-th of $CODES; "wait": 75 when asked to stop,
# with something done, or 0 once $LOG/go is there.
STAGE = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
log = pathlib.Path(os.environ["LOG"])
with open(log / "stages", "a") as file:
    print(*sys.argv[1:], file=file)
code = os.environ["CODES"].split()[int(pathlib.Path(sys.argv[1]).name[:2]) - 1]
if code != "wait":
    sys.exit(int(code))
def stop(*_):
    if "CURATION_PROGRESS" in os.environ:
        pathlib.Path(os.environ["CURATION_PROGRESS"]).touch()
    sys.exit(75)
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(name, stop)
(log / "waiting").touch()
while not (log / "go").exists():
    time.sleep(0.05)
"""


class StandIn(Chain):
    def __init__(self, jobs: Jobs, port: int, codes: str) -> None:
        super().__init__(jobs, port)
        stage = self.folder / "stage.sh"
        stage.write_text(STAGE)
        stage.chmod(0o755)
        self.variables |= {"PYTHON": str(stage), "LOG": str(self.folder), "CODES": codes}

    def started(self) -> list[str]:
        """What was started: each stage with its words."""
        try:
            return [line.replace(f"{ROOT}/", "") for line in (self.folder / "stages").read_text().splitlines()]
        except FileNotFoundError:
            return []
