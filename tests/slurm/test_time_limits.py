"""Deadlines, preemption and scancel: the work in hand is saved, claims are given back, and the restart takes it up."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.servers import ollama_stub
from tests.slurm.cluster import wait_until
from tests.slurm.jobs import Jobs, published

THREADS = 4


@pytest.fixture
def rewriting(jobs: Jobs, tmp_path: Path) -> "Rewriting":
    return Rewriting(jobs, tmp_path)


class Rewriting:
    """Stage 02 against a slow server that notes every request: what is computed twice is counted there."""

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self.jobs, self.log = jobs, folder / "requests"
        jobs.alone(jobs.root, "01_filter_noface.sh", "--detector", "recorded", "--quiet")

    def server(self):  # type: ignore[no-untyped-def]
        return ollama_stub(slots=4, latency_s=0.25, log=self.log)

    def submit(self, port: int, *sbatch: str, **variables: str) -> str:
        return self.jobs.submit(
            "02_captions_processor.sh", "--api", "ollama", "--num_threads", str(THREADS), "--lease_s", "5",
            sbatch=sbatch, variables={"PORTS": str(port), **variables},
        )  # fmt: skip

    def asked(self) -> Counter[str]:
        return Counter(self.log.read_text().splitlines()) if self.log.exists() else Counter()

    def under_way(self) -> bool:
        return self.asked().total() > 12

    def insist_on_all(self, port: int, workers: int) -> None:
        """Every shard is done, as an undisturbed run makes it, and little was asked for twice."""
        jobs = self.jobs
        receipts = jobs.receipts("prompts", "02_captions_processor")
        assert len(receipts) == 40
        assert {receipt["status"] for receipt in receipts.values()} == {"done"}
        twice = sum(count - 1 for count in self.asked().values())
        assert twice <= THREADS * workers, "at most what each worker had in hand"
        alone = jobs.root.parent / "alone"
        jobs.alone(alone, "01_filter_noface.sh", "--detector", "recorded", "--quiet")
        jobs.alone(alone, "02_captions_processor.sh", "--api", "ollama", "--quiet", variables={"PORTS": str(port)})
        assert published(jobs.root, "captions", "edits", "prompts") == published(alone, "captions", "edits", "prompts")
        assert not jobs.litter()


def test_at_the_deadline_the_right_element_is_queued_again(rewriting: Rewriting) -> None:
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server() as port:
        number = rewriting.submit(port, "--array=0-1", TIME_CHECK_S="1", WARNING_S="70")
        wait_until(rewriting.under_way, 30, "requests")
        cluster.call("scontrol", "update", f"JobId={number}_1", "EndTime=now+20")
        wait_until(lambda: f"requeueing {number}_1" in jobs.logs(), 40, "the element's requeueing")
        assert f"requeueing {number}_0" not in jobs.logs()
        # its time limit is the short one now, and it would end at once
        wait_until(lambda: cluster.squeue(number).get(f"{number}_1", ("", ""))[0] == "PENDING", 20, "in the queue")
        cluster.call("scontrol", "update", f"JobId={number}_1", "TimeLimit=10")
        assert cluster.wait(number) == [0, 0], jobs.logs()
        restarts = {facts["ArrayTaskId"]: facts["Restarts"] for facts in cluster.facts(number)}
        assert restarts == {"0": "0", "1": "1"}
        assert "stopped (SIGUSR1) with work left" in jobs.logs()
        rewriting.insist_on_all(port, workers=1)


@pytest.mark.parametrize("how", ["preempted", "cancelled"])
def test_preemption_and_scancel(how: str, rewriting: Rewriting) -> None:
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server() as port:
        number = rewriting.submit(port, "--array=0-1")
        wait_until(rewriting.under_way, 30, "requests")
        if how == "preempted":
            urgent = cluster.sbatch(
                "--partition=urgent", "--exclusive", "--nodes=3", "--time=1", "--output=/dev/null", "--wrap=sleep 3",
                cwd=jobs.root, variables={},
            )  # fmt: skip
            assert cluster.wait(urgent) == [0]
            assert cluster.wait(number) == [0, 0], jobs.logs()
            assert {facts["Restarts"] for facts in cluster.facts(number)} == {"1"}
        else:
            cluster.call("scancel", number)
            cluster.wait(number)
            assert {facts["JobState"] for facts in cluster.facts(number)} == {"CANCELLED"}
            assert "requeueing" not in jobs.logs()
            left = jobs.litter()
            assert not [name for name in left if name.endswith((".tmp", ".claim", ".commit"))], "nothing half-written"
            assert [name for name in left if "_partial" in name], "partial work is kept"
            assert cluster.wait(rewriting.submit(port, "--array=0-1")) == [0, 0], jobs.logs()
        rewriting.insist_on_all(port, workers=2)


def test_a_worker_that_stood_still_finds_that_it_has_lost_its_claim(rewriting: Rewriting) -> None:
    """SIGSTOP for longer than the lease, then SIGCONT: its result is discarded."""
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server() as port:
        first = rewriting.submit(port)
        wait_until(rewriting.under_way, 30, "requests")
        stopped = [pid for pid in cluster.job_processes(None) if "02_captions_processor.py" in cmdline(pid)]
        for pid in stopped:
            signal.pidfd_send_signal(open_process(pid), signal.SIGSTOP)
        held = {path.name.removesuffix(".claim") for path in jobs.root.glob("prompts/_claims/*/*/*.claim")}
        assert held
        second = rewriting.submit(port, "--exclude=" + cluster.facts(first)[0]["NodeList"])
        assert cluster.wait(second) == [0], jobs.logs()
        before = jobs.receipts("prompts", "02_captions_processor")
        assert len(before) == 40
        for pid in stopped:
            signal.pidfd_send_signal(open_process(pid), signal.SIGCONT)
        assert cluster.wait(first) == [0], jobs.logs()
        assert jobs.receipts("prompts", "02_captions_processor") == before, "the late one published nothing"
        rewriting.insist_on_all(port, workers=2)


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def open_process(pid: int) -> int:
    import os

    return os.pidfd_open(pid)
