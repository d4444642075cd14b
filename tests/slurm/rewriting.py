"""Stage 02 as jobs against slow servers that note every request, so that what is asked twice can be counted."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path

from tests import ROOT
from tests.servers import STUB, ollama_stub
from tests.slurm.jobs import Jobs, published

THREADS = 4
LATENCY_S = 0.25


class Rewriting:
    """One dataset on which stage 01 has run."""

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self.jobs, self.log = jobs, folder / "requests"
        jobs.alone(jobs.root, "01_filter_noface.sh", "--detector", "recorded", "--quiet")

    def server(self, latency_s: float = LATENCY_S) -> contextlib.AbstractContextManager[int]:
        return ollama_stub(slots=4, latency_s=latency_s, log=self.log)

    def server_command(self) -> str:
        """The same server, for serve_endpoints.sh."""
        return f"{sys.executable} {STUB} --port {{port}} --slots 4 --latency_s {LATENCY_S} --log {self.log}"

    def submit(self, port: int, *sbatch: str, **variables: str) -> str:
        return self.jobs.submit(
            "02_captions_processor.sh", "--api", "ollama", "--num_threads", str(THREADS), "--lease_s", "5",
            sbatch=sbatch, variables={"PORTS": str(port), **variables},
        )  # fmt: skip

    def serve(self, folder: Path) -> str:
        """serve_endpoints.sh as a job with one GPU and one server."""
        cluster, logs = self.jobs.cluster, self.jobs.root.parent / "logs"
        logs.mkdir(exist_ok=True)
        variables = {"SERVER_COMMAND": self.server_command(), "ENDPOINTS_DIR": str(folder), "SERVER_LOGS": str(logs)}
        return cluster.sbatch(
            f"--output={logs}/serve-%j.log", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10",
            "--mem-per-cpu=100M", str(ROOT / "serve_endpoints.sh"),
            cwd=self.jobs.root, variables={**self.jobs.variables(), **variables},
        )  # fmt: skip

    def processes(self, node: str) -> list[int]:
        """The stage's own processes on a node, without srun and bash."""
        found = []
        for pid in self.jobs.cluster.job_processes(node):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if len(words) > 1 and b"python" in words[0] and words[1].endswith(b"02_captions_processor.py"):
                    found.append(pid)
        return found

    def asked(self) -> Counter[str]:
        return Counter(self.log.read_text().splitlines()) if self.log.exists() else Counter()

    def under_way(self) -> bool:
        return self.asked().total() > 8

    def insist_on_all(self, workers: int) -> None:
        """Every shard is done, as an undisturbed run makes it, and little was asked for twice."""
        jobs = self.jobs
        receipts = jobs.receipts("prompts", "02_captions_processor")
        assert len(receipts) == 40
        assert {receipt["status"] for receipt in receipts.values()} == {"done"}
        assert not any(receipt["counts"]["failed"] for receipt in receipts.values())
        twice = sum(count - 1 for count in self.asked().values())
        assert twice <= THREADS * workers, "at most what each worker had in hand"
        alone = jobs.root.parent / "alone"
        jobs.alone(alone, "01_filter_noface.sh", "--detector", "recorded", "--quiet")
        with ollama_stub(slots=8) as port:
            asks = {"PORTS": str(port)}
            jobs.alone(alone, "02_captions_processor.sh", "--api", "ollama", "--quiet", variables=asks)
        folders = ("captions", "edits", "prompts")
        here, there = published(jobs.root, *folders), published(alone, *folders)
        differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        assert not differ, f"not what an undisturbed run leaves: {differ}"
        assert not jobs.litter(), jobs.litter()
