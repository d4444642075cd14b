"""The stages' scripts as jobs of the test cluster, and what they leave."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.tar.samples import TarWriter, read_samples
from tests import EXAMPLES, ROOT
from tests.slurm.cluster import Cluster

HAVE_TIMES = {"_receipts", "_claims", "_plan"}
SIZE = ("--cpus-per-task=1", "--mem-per-cpu=100M", "--time=10")


def small_shards(folder: Path, count: int) -> Path:
    """The example photos, dealt out to ``count`` shards."""
    samples = [
        sample.members
        for path in sorted(EXAMPLES.glob("*.tar"))
        for sample in read_samples(path, {"jpg", "txt", "json"})
        if "json" in sample.members
    ]
    boxes = [json.loads(members["json"]).get("face_bboxes") for members in samples]
    with_face = [members for members, found in zip(samples, boxes, strict=True) if found]
    others = [members for members, found in zip(samples, boxes, strict=True) if found == []]
    faces, rest = itertools.cycle(with_face), itertools.cycle(others)
    for number in range(count):
        with open(folder / f"{number:08d}.tar", "wb") as file:
            tar = TarWriter(file)
            for place, members in enumerate((next(faces), next(rest), next(faces))):
                for suffix, data in members.items():
                    tar.add(f"{number:08d}{place:04d}.{suffix}", data)
            tar.close()
    return folder


@dataclass
class Jobs:
    """One dataset's root folder, and the stages as jobs on it."""

    cluster: Cluster
    shards: Path
    root: Path

    def variables(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "ROOT": str(self.root), "CURATION_HOME": str(ROOT)}
        return {**kept, **(more or {})}

    def submit(
        self,
        script: str,
        *flags: str,
        sbatch: tuple[str, ...] = (),
        tasks: int = 1,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """``sbatch script flags``, small enough for the cluster; the job's id."""
        self.root.mkdir(exist_ok=True)
        logs = self.root.parent / "logs"
        logs.mkdir(exist_ok=True)
        own = {"SRC_DIR": str(self.shards)} if script in ("01_filter_noface.sh", "04_reshard.sh") else {}
        return self.cluster.sbatch(
            f"--output={logs}/%x-%j.log", f"--ntasks-per-node={tasks}", *SIZE, *sbatch, str(ROOT / script), *flags,
            cwd=self.root, variables=self.variables({**own, **(variables or {})}),
        )  # fmt: skip

    def run(self, script: str, *flags: str, expected: int = 0, **more: Any) -> None:
        """Submit and wait; every element ends with the ``expected`` code."""
        codes = self.cluster.wait(self.submit(script, *flags, **more))
        assert set(codes) == {expected}, f"{codes}\n{self.logs()}"

    def alone(self, root: Path, script: str, *flags: str, variables: Mapping[str, str] | None = None) -> None:
        """The same script under plain bash, in one process, into another root."""
        own = {"SRC_DIR": str(self.shards)} if script in ("01_filter_noface.sh", "04_reshard.sh") else {}
        environment = self.cluster.environment(self.variables({**own, "ROOT": str(root), **(variables or {})}))
        subprocess.run(["bash", ROOT / script, *flags], env=environment, check=True, timeout=120)

    def logs(self) -> str:
        return "".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.root.parent.glob("logs/*")))

    def receipts(self, folder: str, stage: str) -> dict[str, dict[str, Any]]:
        found = (self.root / folder / "_receipts" / stage).glob("*/*.json")
        return {path.stem: json.loads(path.read_bytes()) for path in found if not path.name.startswith(".")}

    def litter(self) -> list[str]:
        """What may lie about only while somebody works."""
        return sorted(
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if path.is_file() and (path.name.startswith(".") or {"_claims", "_partial"} & set(path.parts))
        )


def published(root: Path, *folders: str) -> dict[str, bytes]:
    """Everything below ``folders`` but records with times in them, and what the scripts of killed jobs left."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and not HAVE_TIMES & set(path.parts) and not path.parent.name.startswith(".job-")
    }
