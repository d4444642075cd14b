"""How many filesystem operations a shard costs, as strace and Python's audit events count them in real workers."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_claims


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace here")
def test_a_shard_costs_at_most_16_metadata_operations_and_no_listing(tmp_path: Path) -> None:
    calls = bench_claims.operations(tmp_path, few=20, many=60)
    assert calls is not None
    assert 10 < bench_claims.metadata(calls) < 16.5, calls  # a heartbeat may fall into it
    assert not [what for what in calls if what.startswith("list ")]
    fsyncs = sum(calls.values()) - bench_claims.metadata(calls)
    assert round(fsyncs) == 4, "two files and their two folders are made durable"
    further = bench_claims.operations(tmp_path, outputs=2, few=20, many=60)
    assert further is not None
    assert round(bench_claims.metadata(further) - bench_claims.metadata(calls)) == 2


def test_what_a_shard_costs_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    """Eight workers on 5 and on 20 buckets: not each lists every bucket again and again, nor reads all receipts."""
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else tmp_path
    few, many = (bench_claims.touched(folder, shards, workers=8, of_a_bucket=20) for shards in (100, 400))
    assert many["names"] < 1.2 * few["names"] and many["names"] < 10, (few, many)
    assert many["opened"] < 1.2 * few["opened"] and many["opened"] < 14, (few, many)
