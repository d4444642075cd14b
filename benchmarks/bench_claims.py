"""What sharing the work by claims costs, and what it saves: many processes on one folder, beside static splits.

    python benchmarks/bench_claims.py [--json] [--folder DIR] [--shards 10000] [--workers 64] [--operations]

Aims: 64 processes do each of 10,000 trivial shards exactly once, for under 10 ms of CPU time a shard, all that they
spend counted; at most 16 filesystem metadata operations a shard of one output, none a listing; and on shards whose cost
is log-normal (σ = 1; they sleep, so that two cores are enough) the last shard is done within 1.1 of the ideal, which is
the whole cost shared evenly, or the longest shard.  The static splits run the same code on lists of their own.

``--operations`` counts the metadata operations alone, with strace.  What is left of them, for one output and one input
that was made elsewhere (docs/design.md says what each is for):

    claim    create it; read it before the commit; unlink it
    epoch    look for a newer one after claiming, and before the commit
    look     stat the input; open the receipt and the record of a commit that somebody may have left
    output   create the temporary file; rename it
    commit   create the receipt; link it as the record; open the receipt again; rename it; unlink the record

A further output costs the two of its line.  Folders are fsynced through descriptors that stay open; the fsyncs are
counted apart, because they are no look-up: one a file and one a folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from curation.cluster import Allocation, StopSignal
from curation.options import RunOptions, set_up_logging
from curation.run.attempt import code_version
from curation.run.runner import run_shards
from curation.run.work import ShardContext, Stage
from curation.shards import Shard, discover

CPU_MS, OPERATIONS, MAKESPAN = 10.0, 16.0, 1.1
UNEVEN_SHARDS, UNEVEN_WORKERS, MEDIAN_S = 1600, 16, 0.12
FEW, MANY = 100, 500  # shards of the two runs under strace: their difference is free of what a start costs
LEASE_S = 120.0


class Trivial(Stage[RunOptions]):
    """One small output a shard.  ``journal``: a line for each time that a shard was worked on."""

    name = "trivial"

    def __init__(
        self, output: Path, journal: Path | None = None, costs: dict[str, float] | None = None, outputs: int = 1
    ) -> None:
        super().__init__(RunOptions(), output)
        self._ends = [".json", *(f".{number}.json" for number in range(1, outputs))]
        self._costs = costs or {}
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if journal else None

    def fingerprint(self) -> dict[str, object]:
        return {}

    def process(self, work: ShardContext) -> None:
        work.sample_in()
        time.sleep(self._costs.get(work.shard.id, 0.0))
        work.keep()
        for end in self._ends:
            with work.output(self.output / f"{work.shard.id}{end}") as file:
                file.write(b"{}\n")
        if self._journal is not None:
            os.write(self._journal, f"{work.shard.id}\n".encode())


@dataclass(frozen=True)
class Outcome:
    codes: list[int]
    cpu_s: float  # of all workers
    wall_s: float  # from the start of the first to the end of the last
    makespan_s: float  # from when all were ready until the last shard was done
    attempts: Counter[str]
    receipts: int


def run(base: Path, lists: Sequence[Sequence[Shard]], costs: dict[str, float] | None = None) -> Outcome:
    """One process for each list of shards, all on the same output."""
    journal, output = base / "journal", base / "out"
    context = multiprocessing.get_context("fork")  # 64 interpreters would take longer to start than to work
    ready, results = context.Barrier(len(lists)), context.SimpleQueue()

    def work(rank: int) -> None:
        stage = Trivial(output, journal, costs)
        ready.wait()
        began = time.time()
        allocation = Allocation(rank=rank, world=len(lists), run_id="bench")
        code = run_shards(stage, lists[rank], RunOptions(quiet=True, lease_s=LEASE_S), allocation, StopSignal())
        results.put((code, began))

    code_version()  # asks git: once, not 64 times
    before, began = children_cpu_s(), time.perf_counter()
    processes = [context.Process(target=work, args=(rank,)) for rank in range(len(lists))]
    for process in processes:
        process.start()
    ended = [results.get() for _ in processes]
    for process in processes:
        process.join()
    receipts = [json.loads(path.read_bytes()) for path in (output / "_receipts").rglob("[!_.]*.json")]
    return Outcome(
        codes=[code for code, _ in ended],
        cpu_s=children_cpu_s() - before,
        wall_s=time.perf_counter() - began,
        makespan_s=max(receipt["finished"] for receipt in receipts) - min(start for _, start in ended),
        attempts=Counter(journal.read_text("utf-8").split()),
        receipts=len(receipts),
    )


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def make_shards(base: Path, count: int) -> list[Shard]:
    source = base / "in"
    source.mkdir()
    for number in range(count):
        (source / f"{number:08d}.tar").touch()
    return discover(str(source))


# ---- the three parts


def many_workers(folder: Path, shards: int, workers: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="bench-claims-", dir=folder) as base:
        found = make_shards(Path(base), shards)
        outcome = run(Path(base), [found] * workers)
    return {
        "shards": shards,
        "workers": workers,
        "done": outcome.receipts,
        "worked_on_twice": sum(count - 1 for count in outcome.attempts.values()),
        "codes": sorted(set(outcome.codes)),
        "cpu_ms_a_shard": outcome.cpu_s / shards * 1e3,
        "wall_s": outcome.wall_s,
    }


def uneven(folder: Path, shards: int, workers: int, median_s: float) -> list[dict[str, object]]:
    """Claims and two static splits on the same shards."""
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="bench-claims-", dir=folder) as name:
        base = Path(name)
        found = make_shards(base, shards)
        costs = {shard.id: rng.lognormvariate(0, 1) * median_s for shard in found}
        ideal = max(sum(costs.values()) / workers, *costs.values())
        even = -(-shards // workers)
        splits = {
            "claims": [found] * workers,
            "contiguous split": [found[start : start + even] for start in range(0, shards, even)],
            "modulo": [found[rank::workers] for rank in range(workers)],
        }
        for split, lists in splits.items():
            outcome = run(base, lists, costs)
            again = sum(count - 1 for count in outcome.attempts.values())
            rows.append({"split": split, "makespan_s": outcome.makespan_s, "ideal_s": ideal, "worked_on_twice": again})
            shutil.rmtree(base / "out")
            (base / "journal").unlink()
    return rows


def operations(folder: Path, outputs: int = 1, few: int = FEW, many: int = MANY) -> dict[str, float] | None:
    """Metadata operations and fsyncs a shard by one worker, as ``what it is → how many``; None without strace."""
    if shutil.which("strace") is None:
        return None
    less, more = traced(folder, few, outputs), traced(folder, many, outputs)
    found = {what: (more[what] - less[what]) / (many - few) for what in more}
    return {what: count for what, count in sorted(found.items(), key=lambda pair: -pair[1]) if count >= 0.01}


def metadata(calls: dict[str, float]) -> float:
    """How many of them are metadata operations."""
    return sum(count for what, count in calls.items() if not what.startswith("fsync"))


def traced(folder: Path, shards: int, outputs: int) -> Counter[str]:
    with tempfile.TemporaryDirectory(prefix="bench-claims-", dir=folder) as name:
        base = Path(name)
        make_shards(base, shards)
        log = base / "calls"
        trace = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file,getdents64,fsync", "-e", "signal=none", "-y"]
        command = [*trace, "-o", str(log), sys.executable, str(Path(__file__).resolve()), "--one_worker", str(base)]
        command += ["--outputs", str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"strace: {done.stderr.strip()[-500:]}")
        with log.open(encoding="utf-8") as lines:
            return Counter(what for line in lines if (what := describe(line, base)))


def describe(line: str, base: Path) -> str | None:
    """A line of strace's as the call and the kind of file that it is about; None for what has nothing to do with
    ``base``: its own files and the folders above it count, the interpreter's do not."""
    call = re.match(r"\d+\s+(\w+)\(", line)
    if call is None:
        return None
    named = [path for path in re.findall(r'"([^"]*)"', line) if path and concerns(path, base)]
    opened = [path for path in re.findall(r"\(\d+<([^>]*)>", line) if concerns(path, base)]
    if call[1] == "getdents64" and opened:
        return f"list {kind(opened[0], base)}"
    if named:
        flags = " (create)" if "O_CREAT" in line else " (folder, to fsync)" if "O_DIRECTORY" in line else ""
        return f"{call[1]}{flags} {' → '.join(kind(path, base) for path in named)}"
    return f"{call[1]} of the open {kind(opened[0], base)}" if opened else None


def concerns(path: str, base: Path) -> bool:
    return path == str(base) or path.startswith(f"{base}/") or (path != "/" and str(base).startswith(f"{path}/"))


def kind(path: str, base: Path) -> str:
    """A path without what differs from shard to shard: ``out/.<shard>.<token>.tmp``."""
    if str(base).startswith(path):
        return "folders above"
    name = re.sub(r"\b[0-9a-f]{16}\b", "<token>", path.removeprefix(f"{base}/"))
    return re.sub(r"/\d{5}(?=/|$)", "/<bucket>", re.sub(r"\b\d{8}\b", "<shard>", name))


def one_worker(base: Path, outputs: int) -> int:
    return run_shards(
        Trivial(base / "out", outputs=outputs),
        discover(str(base / "in")),
        RunOptions(quiet=True),
        Allocation(),
        StopSignal(),
    )


# ---- what is shown


def aims(many: dict[str, object], rows: list[dict[str, object]], calls: dict[str, float] | None) -> list[list[object]]:
    """What is measured, the figure, the aim, whether it is met (None: not measured)."""
    once = many["done"] == many["shards"] and many["worked_on_twice"] == 0 and many["codes"] == [0]
    cpu, ratio = float(many["cpu_ms_a_shard"]), float(rows[0]["makespan_s"]) / float(rows[0]["ideal_s"])  # type: ignore[arg-type]
    found: list[list[object]] = [
        [
            f"{many['shards']:,} shards, {many['workers']} workers: done, worked on twice",
            f"{many['done']:,}, {many['worked_on_twice']}",
            "all, 0",
            once,
        ],
        ["CPU ms a shard, all that the workers spend", f"{cpu:.2f}", f"< {CPU_MS:g}", cpu < CPU_MS],
        ["makespan of claims / ideal, uneven shards", f"{ratio:.3f}", f"≤ {MAKESPAN:g}", ratio <= MAKESPAN],
    ]
    return [*found, *aims_of_operations(calls)]


def aims_of_operations(calls: dict[str, float] | None) -> list[list[object]]:
    if calls is None:
        return [["metadata operations a shard", "no strace here", f"≤ {OPERATIONS:g}", None]]
    total = metadata(calls)
    listings = sum(count for what, count in calls.items() if what.startswith("list "))
    return [
        ["metadata operations a shard", f"{total:.1f}", f"≤ {OPERATIONS:g}", total <= OPERATIONS],
        ["of them listings", f"{listings:.2f}", "0", listings < 0.05],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=shared, help="where to run")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--uneven_shards", type=int, default=UNEVEN_SHARDS)
    parser.add_argument("--operations", action="store_true", help="count the metadata operations, and nothing else")
    parser.add_argument("--one_worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--outputs", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_up_logging(quiet=True)
    if arguments.one_worker:
        return one_worker(arguments.one_worker, arguments.outputs)
    calls = operations(arguments.folder)
    if arguments.operations:
        return show_operations(arguments.folder, calls, as_json=arguments.json)
    many = many_workers(arguments.folder, arguments.shards, arguments.workers)
    rows = uneven(arguments.folder, arguments.uneven_shards, UNEVEN_WORKERS, MEDIAN_S)
    checked = aims(many, rows, calls)
    passed = all(met is not False for *_, met in checked)
    if arguments.json:
        names = ("what", "figure", "aim", "met")
        result = {"folder": str(arguments.folder), "passed": passed, "many": many, "uneven": rows, "operations": calls}
        print(json.dumps(result | {"aims": [dict(zip(names, row, strict=True)) for row in checked]}, indent=2))
        return 0 if passed else 1
    print(f"in {arguments.folder}, {os.cpu_count()} cores; {many['workers']} workers took {many['wall_s']:.0f} s\n")
    print("| what | measured | aim | |\n|---|---:|---:|---|")
    show_aims(checked)
    print(f"\n{arguments.uneven_shards} shards, log-normal cost, {UNEVEN_WORKERS} workers:\n")
    print("| split | last shard done after s | of the ideal | worked on twice |\n|---|---:|---:|---:|")
    for row in rows:
        ratio = float(row["makespan_s"]) / float(row["ideal_s"])  # type: ignore[arg-type]
        print(f"| {row['split']} | {row['makespan_s']:.1f} | {ratio:.2f} | {row['worked_on_twice']} |")
    if calls:
        show_calls(arguments.folder, calls)
    return 0 if passed else 1


def show_aims(checked: list[list[object]]) -> None:
    words = {True: "met", False: "**MISSED**", None: "not measured"}
    for what, figure, aim, met in checked:
        print(f"| {what} | {figure} | {aim} | {words[met]} |")  # type: ignore[index]


def show_calls(folder: Path, calls: dict[str, float]) -> None:
    print("\n| metadata operation of one worker | a shard |\n|---|---:|")
    for what, count in calls.items():
        print(f"| {what} | {count:.2f} |")
    two = operations(folder, 2) or {}
    print(f"| a further output in a folder of its kind | {metadata(two) - metadata(calls):.2f} |")


def show_operations(folder: Path, calls: dict[str, float] | None, *, as_json: bool) -> int:
    checked = aims_of_operations(calls)
    passed = all(met is not False for *_, met in checked)
    if as_json:
        print(json.dumps({"folder": str(folder), "passed": passed, "operations": calls}, indent=2))
        return 0 if passed else 1
    print("| what | measured | aim | |\n|---|---:|---:|---|")
    show_aims(checked)
    if calls:
        show_calls(folder, calls)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
