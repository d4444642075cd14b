"""Nodes that SLURM loses while their jobs live on, and nodes that die with all that runs there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.processes import wait_until
from tests.slurm.cluster import Cluster
from tests.slurm.rewriting import Rewriting


def node_of(cluster: Cluster, job: str) -> str:
    return cluster.facts(job)[0]["NodeList"]


def test_a_lost_node_whose_job_lives_on(rewriting: Rewriting) -> None:
    """slurmd is killed, SLURM starts the job elsewhere, and both copies run: no sample is lost or doubled."""
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server(latency_s=1.0) as port:
        number = rewriting.submit(port)
        wait_until(rewriting.under_way, "requests")
        lost = node_of(cluster, number)
        (first,) = rewriting.processes(lost)
        for pid in cluster.job_processes(lost, number):  # the network is cut: srun hears nothing of what SLURM decides
            if Path(f"/proc/{pid}/comm").read_text().strip() == "srun":
                os.kill(pid, signal.SIGSTOP)
        cluster.kill_slurmd(lost)
        cluster.call("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")  # requeues at once
        wait_until(lambda: cluster.squeue(number).get(number, ("", ""))[1] not in ("", lost), "it runs elsewhere")
        other = node_of(cluster, number)
        wait_until(lambda: rewriting.processes(other), "the second copy")
        assert first in rewriting.processes(lost), "both copies run"
        assert cluster.wait(number) == [0], jobs.logs()
        wait_until(lambda: first not in rewriting.processes(lost), "the first copy ends by itself")
        hosts = {receipt["host"] for receipt in jobs.receipts("prompts", "02_captions_processor").values()}
        assert hosts == {lost, other}, "they shared the shards"
        assert cluster.facts(number)[0]["Restarts"] == "1"
        rewriting.insist_on_all(workers=2)


def test_a_node_that_dies_with_its_processes(rewriting: Rewriting) -> None:
    """Its claims expire within --lease_s, and its shards are finished by others."""
    jobs, cluster = rewriting.jobs, rewriting.jobs.cluster
    with rewriting.server() as port:
        number = rewriting.submit(port, "--array=0-1", "--no-requeue")
        wait_until(rewriting.under_way, "requests")
        nodes = [node for _, node in cluster.squeue(number).values()]
        wait_until(lambda: all(rewriting.processes(node) for node in nodes), "both elements")
        dying = cluster.squeue(number)[f"{number}_1"][1]
        assert dying != cluster.squeue(number)[f"{number}_0"][1]
        cluster.kill_node(dying)
        assert not rewriting.processes(dying)
        claimed = {path.name for path in jobs.root.glob("prompts/_claims/*/*/*.claim")}
        assert claimed, "the dead still hold some"
        wait_until(lambda: len(jobs.receipts("prompts", "02_captions_processor")) == 40, jobs.logs)
        receipts = jobs.receipts("prompts", "02_captions_processor")
        assert {receipt["status"] for receipt in receipts.values()} == {"done"}
        wait_until(lambda: f"{number}_0" not in cluster.squeue(number), "the other element")
        cluster.call("scontrol", "update", f"NodeName={dying}", "State=DOWN", "Reason=test")
        rewriting.insist_on_all(workers=2)


def test_endpoints_come_and_go(rewriting: Rewriting, cluster: Cluster) -> None:
    """A server dies with its job in mid-run, another job is added: stage 02 goes on, and no prompt is lost."""
    jobs = rewriting.jobs
    folder = jobs.root / "endpoints"
    first = rewriting.serve(folder)
    number = rewriting.submit(0, PORTS="", ENDPOINTS_DIR=str(folder))
    wait_until(rewriting.under_way, "requests")
    (where,) = cluster.squeue(first).values()
    for pid in cluster.job_processes(where[1], first):
        os.kill(pid, signal.SIGKILL)
    second = rewriting.serve(folder)
    assert cluster.wait(number) == [0], jobs.logs()
    cluster.call("scancel", first, second, check=False)
    cluster.wait(first, second)
    assert "answers again" in jobs.logs() or "no requests to it for" in jobs.logs() or "gone" in jobs.logs()
    rewriting.insist_on_all(workers=1)
