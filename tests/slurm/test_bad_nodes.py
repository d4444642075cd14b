"""What can be wrong with a site: a broken GPU, a full disk, no inodes, a clock that is off, other claims."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs, published
from tests.slurm.rewriting import Rewriting

RECORDED = ("--detector", "recorded", "--quiet")
ARRAY = ("--array=0-2",)


@pytest.fixture
def small_disk(cluster: Cluster, forty_shards: Path, tmp_path: Path) -> Iterator[Jobs]:
    """The dataset's root is a filesystem of its own, which ``grow`` makes larger."""
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", root], check=True)
    try:
        yield Jobs(cluster, forty_shards, root)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def remount(root: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", root], check=True)


@pytest.mark.parametrize(
    ("limits", "says"),
    [("size=400k,nr_inodes=10000", "the disk is full"), ("size=50m,nr_inodes=60", "no inodes are left")],
)
def test_a_disk_that_is_full(limits: str, says: str, small_disk: Jobs, tmp_path: Path) -> None:
    jobs = small_disk
    remount(jobs.root, limits)
    codes = jobs.cluster.wait(jobs.submit("01_filter_noface.sh", *RECORDED, sbatch=ARRAY))
    assert 2 in codes, jobs.logs()
    assert set(codes) <= {0, 2}
    assert says in jobs.logs()
    done = jobs.receipts("captions", "01_filter_noface")
    assert len(done) < 40
    remount(jobs.root, "size=50m,nr_inodes=10000")
    jobs.run("01_filter_noface.sh", *RECORDED, sbatch=ARRAY)
    after = jobs.receipts("captions", "01_filter_noface")
    assert len(after) == 40
    assert {shard: after[shard] for shard in done} == done, "what was published is not lost"
    jobs.alone(tmp_path / "alone", "01_filter_noface.sh", *RECORDED)
    assert published(jobs.root, "captions", "edits") == published(tmp_path / "alone", "captions", "edits")


def test_a_clock_that_is_ten_minutes_off_on_one_node(rewriting: Rewriting, tmp_path: Path) -> None:
    """Deadlines come from the time that SLURM says is left, leases from each process's own monotonic clock."""
    wrap = tmp_path / "wrap.sh"
    # faketime gives a sleep that is over before it begins EINVAL: this select does not pass through it
    (tmp_path / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    )
    off = f"env FAKETIME_DONT_FAKE_MONOTONIC=1 PYTHONPATH={tmp_path} faketime -f +600s"
    wrap.write_text(f'#!/bin/bash\n[ "$(hostname)" = node2 ] && exec {off} "$@"\nexec "$@"\n')
    wrap.chmod(0o755)
    jobs = rewriting.jobs
    with rewriting.server() as port:
        # ten minutes is all the time that the job has
        number = rewriting.submit(port, *ARRAY, CURATION_WRAP=f"bash {wrap}")
        assert jobs.cluster.wait(number) == [0, 0, 0], jobs.logs()
    receipts = jobs.receipts("prompts", "02_captions_processor").values()
    finished = {host: [r["finished"] for r in receipts if r["host"] == host] for host in ("node1", "node2", "node3")}
    assert min(finished["node2"]) > max(finished["node1"] + finished["node3"]) + 500, "its clock was off"
    rewriting.insist_on_all(workers=0)


BREAKS = """
import os, numpy as np
from pathlib import Path
from curation.extract import Column
class Breaks:
    name, revision, needs, features, preparations, columns = "x", "1", (), (), (), (Column("x", "float32"),)
    def __init__(self, directive, settings): self.batches = 0
    def compute(self, batch):
        self.batches += 1
        first = Path({first!r})
        if not first.exists():
            first.write_text(os.environ["SLURMD_NODENAME"])
        if self.batches > 2 and os.environ["SLURMD_NODENAME"] == first.read_text():
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return {{"x": np.zeros(len(batch), np.float32)}}
    def close(self): pass
EXTRACTORS = {{"x": Breaks}}
"""


def test_a_job_goes_on_without_the_node_whose_gpu_is_broken(jobs: Jobs, tmp_path: Path) -> None:
    plugin, first = tmp_path / "breaks.py", tmp_path / "first"
    plugin.write_text(BREAKS.format(first=str(first)))
    flags = ("--models", "x", "--custom_pypath", str(plugin), "--device", "cpu", "--nworkers", "1")
    flags = (*flags, "--max_error_rate", "1", "--shards", "0-5")  # some of these samples have no picture
    number = jobs.submit(
        "06_metadata.sh", *flags, sbatch=("--array=5", "--exclude=node3", "--gpus-per-task=0"),
        variables={"SRC_DIR": str(jobs.shards), "TARGET_DIR": str(jobs.root / "metadata")},
    )  # fmt: skip
    assert jobs.cluster.wait(number) == [0], jobs.logs()
    broken = first.read_text()
    (facts,) = jobs.cluster.facts(number)
    assert facts["Restarts"] == "1"
    assert set(jobs.cluster.call("scontrol", "show", "hostnames", facts["ExcNodeList"]).stdout.split()) == {
        broken, "node3",
    }  # fmt: skip
    log = jobs.logs()
    assert f"error: node {broken}: CUDA error: uncorrectable ECC" in log
    assert f"a device has failed on: {broken}" in log
    receipts = jobs.receipts("metadata", "06_metadata").values()
    assert len(receipts) == 6
    assert {receipt["status"] for receipt in receipts} == {"done"}
    assert len({receipt["host"] for receipt in receipts}) == 2
    assert not jobs.litter()


def test_claims_of_another_version(jobs: Jobs) -> None:
    claims = jobs.root / "captions" / "_claims" / "01_filter_noface" / "00000"
    claims.mkdir(parents=True)
    (claims / "00000003.claim").write_text(json.dumps({"format": 99, "owner": {"uuid": 7}}))
    (claims / "00000004.claim").write_bytes(b"\x00\xff not JSON")
    jobs.run("01_filter_noface.sh", *RECORDED, "--lease_s", "2", sbatch=ARRAY)
    assert len(jobs.receipts("captions", "01_filter_noface")) == 40
    assert "00000003.claim" in jobs.logs(), "a clear line that names it"
    assert not jobs.litter()
