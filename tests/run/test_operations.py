"""How many filesystem metadata operations a shard costs, as strace counts them in a real worker."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_claims

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace here")


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
