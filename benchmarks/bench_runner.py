"""What the machinery costs: CPU time of run_shards on work that is empty, and the time of a restart with nothing to do.

    python benchmarks/bench_runner.py [--json] [--folder DIR] [--shards 100,1000,10000] [--tiny]

Bar: under 5 ms of CPU time (user + system) a shard, and flat from 100 to 10,000 shards.  The work on each shard is one
sample that is kept; a shard leaves one small output, a line of provenance and its receipt.  Runs in memory (/dev/shm)
where that is to be had, so that the system's share is the filesystem calls and not the disk.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import cpu_seconds, exit_code, make_empty_shards, make_parser, parse, print_table

from curation.cluster import Allocation, StopSignal
from curation.options import RunOptions, set_up_logging
from curation.run.runner import run_shards
from curation.run.work import ShardContext, Stage
from curation.shards import Shard

BAR_MS = 5.0
EVERYBODY = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # a child is git, asked once for the code's version
FLAT = 1.5  # a shard among the most costs at most so many times what one among the fewest does


class Empty(Stage[RunOptions]):
    """A stage that does nothing but what every stage must."""

    name = "empty"

    def __init__(self, output: Path, publishes: bool) -> None:
        super().__init__(RunOptions(), output)
        self._publishes = publishes

    def fingerprint(self) -> dict[str, object]:
        return {"publishes": self._publishes}

    def process(self, work: ShardContext) -> None:
        work.sample_in()
        work.keep()
        if self._publishes:
            work.provenance({"key": work.shard.id})
            with work.output(self.output / f"{work.shard.id}.json") as file:
                file.write(b"{}\n")


@dataclass(frozen=True)
class RunnerRow:
    work: str
    shards: int
    cpu_ms: float  # a shard
    wall_ms: float
    restart_cpu_ms: float
    restart_wall_s: float  # of the whole run


def measure(base: Path, shards: int, publishes: bool) -> RunnerRow:
    source = base / "in"
    found = make_empty_shards(source, shards)
    stage = Empty(base / "out", publishes)
    (cpu_s, wall_s), (restart_cpu_s, restart_wall_s) = run(stage, found), run(stage, found)
    for folder in (source, base / "out"):
        shutil.rmtree(folder)
    return RunnerRow(
        work="output + provenance" if publishes else "nothing",
        shards=shards,
        cpu_ms=cpu_s / shards * 1e3,
        wall_ms=wall_s / shards * 1e3,
        restart_cpu_ms=restart_cpu_s / shards * 1e3,
        restart_wall_s=restart_wall_s,
    )


def run(stage: Empty, shards: Sequence[Shard]) -> tuple[float, float]:
    """(CPU seconds, wall-clock seconds) of one run over all shards."""
    before, began = cpu_seconds(*EVERYBODY), time.perf_counter()
    code = run_shards(stage, shards, RunOptions(quiet=True), Allocation(), StopSignal())
    if code != 0:
        raise RuntimeError(f"run_shards ended with {code}")
    return cpu_seconds(*EVERYBODY) - before, time.perf_counter() - began


def main() -> int:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--shards", default="100,1000,10000")
    arguments = parse(parser, shards="20,40")
    set_up_logging(quiet=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-runner-", dir=arguments.folder) as base:
        measure(Path(base), 20, True)  # imports, caches
        for publishes in (False, True):
            rows += [measure(Path(base), int(count), publishes) for count in arguments.shards.split(",")]
    empty = [row.cpu_ms for row in rows if row.work == "nothing"]
    passed = max(empty) < BAR_MS and empty[-1] <= FLAT * empty[0]
    if arguments.json:
        result = {"folder": str(arguments.folder), "bar_cpu_ms": BAR_MS, "passed": passed}
        print(json.dumps(result | {"rows": [vars(row) for row in rows]}, indent=2))
        return exit_code(passed, arguments)
    print(f"run_shards in {arguments.folder}; one process, {os.cpu_count()} cores")
    print_table(
        ["work", "shards", "CPU ms/shard", "wall ms/shard", "restart CPU ms/shard", "restart s"],
        [
            (
                row.work,
                f"{row.shards:,}",
                f"{row.cpu_ms:.2f}",
                f"{row.wall_ms:.2f}",
                f"{row.restart_cpu_ms:.3f}",
                f"{row.restart_wall_s:.2f}",
            )
            for row in rows
        ],
    )
    print(f"bar: under {BAR_MS:g} ms of CPU on empty work, and flat: {'reached' if passed else 'MISSED'}")
    return exit_code(passed, arguments)


if __name__ == "__main__":
    sys.exit(main())
