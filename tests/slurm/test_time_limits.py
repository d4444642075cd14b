"""Deadlines, preemption, scancel, and a process that hangs: the work in hand is saved, claims are given back, and the
restart takes it up."""

from __future__ import annotations

import os
import signal

import pytest

from tests.processes import wait_until
from tests.slurm.rewriting import Rewriting


def test_at_the_deadline_the_right_element_is_queued_again(rewriting: Rewriting) -> None:
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server() as port:
        number = rewriting.submit(port, "--array=0-1", TIME_CHECK_S="1", WARNING_S="70")
        wait_until(rewriting.under_way, "requests")
        cluster.call("scontrol", "update", f"JobId={number}_1", "EndTime=now+20")
        wait_until(lambda: f"requeueing {number}_1" in jobs.logs(), "the element's requeueing")
        assert f"requeueing {number}_0" not in jobs.logs()
        # its time limit is the short one now, and it would end at once
        wait_until(lambda: cluster.squeue(number).get(f"{number}_1", ("", ""))[0] == "PENDING", "in the queue")
        cluster.call("scontrol", "update", f"JobId={number}_1", "TimeLimit=10")
        assert cluster.wait(number) == [0, 0], jobs.logs()
        restarts = {facts["ArrayTaskId"]: facts["Restarts"] for facts in cluster.facts(number)}
        assert restarts == {"0": "0", "1": "1"}
        assert "stopped (SIGUSR1) with work left" in jobs.logs()
        rewriting.insist_on_all(workers=1)


@pytest.mark.parametrize("how", ["preempted", "cancelled"])
def test_preemption_and_scancel(how: str, rewriting: Rewriting) -> None:
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server() as port:
        number = rewriting.submit(port, "--array=0-1")
        wait_until(rewriting.under_way, "requests")
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
        rewriting.insist_on_all(workers=2)


def test_a_worker_that_stood_still_finds_that_it_has_lost_its_claim(rewriting: Rewriting) -> None:
    """SIGSTOP for longer than the lease, then SIGCONT: its result is discarded."""
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server() as port:
        first = rewriting.submit(port)
        wait_until(rewriting.under_way, "requests")
        (stopped,) = rewriting.processes(cluster.facts(first)[0]["NodeList"])
        os.kill(stopped, signal.SIGSTOP)
        held = {path.name.removesuffix(".claim") for path in jobs.root.glob("prompts/_claims/*/*/*.claim")}
        assert held
        second = rewriting.submit(port, "--exclude=" + cluster.facts(first)[0]["NodeList"])
        assert cluster.wait(second) == [0], jobs.logs()
        before = jobs.receipts("prompts", "02_captions_processor")
        assert len(before) == 40
        os.kill(stopped, signal.SIGCONT)
        assert cluster.wait(first) == [0], jobs.logs()
        assert jobs.receipts("prompts", "02_captions_processor") == before, "the late one published nothing"
        rewriting.insist_on_all(workers=2)
