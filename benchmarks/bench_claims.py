"""What sharing the work by claims costs, and what it saves: many processes on one folder, beside static splits.

    python benchmarks/bench_claims.py [--json] [--folder DIR] [--shards 10000] [--workers 64] [--operations]
                                      [--flat 10000 43028 200000] [--tiny]

Aims: 64 processes do each of 10,000 trivial shards exactly once, for under 10 ms of CPU time a shard, all that they
spend counted; at most 16 filesystem metadata operations a shard of one output, none a listing; and on shards whose cost
is log-normal (σ = 1; they sleep, so that two cores are enough) the last shard is done within 1.1 of the ideal, which is
the whole cost shared evenly, or the longest shard.  The static splits run the same code on lists of their own.

``--flat`` runs the many workers alone, on each of these numbers of shards: the CPU time of a shard must not grow with
their number.  Each run is followed by a second one, whose processes count which records they open and list.

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
import contextlib
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
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import VERDICTS, cpu_seconds, exit_code, make_empty_shards, make_parser, parse, print_table

from curation.cluster import Allocation, StopSignal
from curation.options import RunOptions, set_up_logging
from curation.run.attempt import code_version
from curation.run.runner import run_shards
from curation.run.work import ShardContext, Stage
from curation.shards import Shard, discover

CPU_MS, OPERATIONS, MAKESPAN = 10.0, 16.0, 1.1
GROWTH = 1.25  # of the CPU time of a shard, from the smallest number of shards to the largest
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
class ClaimsRun:
    codes: list[int]
    cpu_s: float  # of all workers
    wall_s: float  # from the start of the first to the end of the last
    makespan_s: float  # from when all were ready until the last shard was done
    attempts: Counter[str]
    receipts: int
    megabytes: float  # of the largest worker, what it shares with the others included
    touched: Counter[str]


class Touched(Counter[str]):
    """Counts the records that this process opens and lists, as Python's audit events tell: ``opened``, ``listed``, and
    ``names`` of the listings.  It cannot be switched off again."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self._start = f"{output}/_"
        self._counting = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._counting or event not in ("open", "os.listdir", "os.scandir"):
            return
        path = arguments[0]
        if not isinstance(path, str | Path) or not str(path).startswith(self._start):
            return
        self["opened" if event == "open" else "listed"] += 1
        if event != "open":
            self._counting = True
            with contextlib.suppress(OSError):
                self["names"] += len(os.listdir(path))
            self._counting = False


def run(
    base: Path, lists: Sequence[Sequence[Shard]], costs: dict[str, float] | None = None, *, count: bool = False
) -> ClaimsRun:
    """One process for each list of shards, all on the same output.  count: tell what they touch, which takes time."""
    journal, output = base / "journal", base / "out"
    context = multiprocessing.get_context("fork")  # 64 interpreters would take longer to start than to work
    ready, results = context.Barrier(len(lists)), context.SimpleQueue()

    def work(rank: int) -> None:
        stage = Trivial(output, journal, costs)
        touched: Counter[str] = Touched(output) if count else Counter()
        ready.wait()
        began = time.time()
        allocation = Allocation(rank=rank, world=len(lists), run_id="bench")
        code = run_shards(stage, lists[rank], RunOptions(quiet=True, lease_s=LEASE_S), allocation, StopSignal())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        results.put((code, began, peak, dict(touched)))

    code_version()  # asks git: once, not 64 times
    before, began = cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter()
    processes = [context.Process(target=work, args=(rank,)) for rank in range(len(lists))]
    for process in processes:
        process.start()
    ended = [results.get() for _ in processes]
    for process in processes:
        process.join()
    ends = [json.loads(path.read_bytes())["finished"] for path in (output / "_receipts").rglob("[!_.]*.json")]
    return ClaimsRun(
        codes=[code for code, *_ in ended],
        cpu_s=cpu_seconds(resource.RUSAGE_CHILDREN) - before,
        wall_s=time.perf_counter() - began,
        makespan_s=max(ends) - min(start for _, start, *_ in ended),
        attempts=Counter(journal.read_text("utf-8").split()),
        receipts=len(ends),
        megabytes=max(peak for _, _, peak, _ in ended),
        touched=sum((Counter(touched) for *_, touched in ended), Counter()),
    )


# ---- the parts


@dataclass(frozen=True)
class ManyWorkers:
    shards: int
    workers: int
    done: int
    worked_on_twice: int
    codes: list[int]
    cpu_ms_a_shard: float
    wall_s: float
    megabytes: float


@dataclass(frozen=True)
class UnevenSplit:
    split: str
    makespan_s: float
    ideal_s: float
    worked_on_twice: int

    @property
    def of_ideal(self) -> float:
        return self.makespan_s / self.ideal_s


def many_workers(folder: Path, shards: int, workers: int) -> ManyWorkers:
    with tempfile.TemporaryDirectory(prefix="bench-claims-", dir=folder) as base:
        found = make_empty_shards(Path(base) / "in", shards)
        outcome = run(Path(base), [found] * workers)
    return ManyWorkers(
        shards=shards,
        workers=workers,
        done=outcome.receipts,
        worked_on_twice=sum(count - 1 for count in outcome.attempts.values()),
        codes=sorted(set(outcome.codes)),
        cpu_ms_a_shard=outcome.cpu_s / shards * 1e3,
        wall_s=outcome.wall_s,
        megabytes=outcome.megabytes,
    )


def touched(folder: Path, shards: int, workers: int, of_a_bucket: int = 1000) -> dict[str, float]:
    """Records that all workers together open and list, a shard: ``opened``, ``listed`` and ``names``.

    of_a_bucket: how many shards share a bucket; with fewer than a thousand, few shards behave like many.
    """
    with tempfile.TemporaryDirectory(prefix="bench-claims-", dir=folder) as base:
        source = Path(base) / "in"
        source.mkdir()
        for number in range(shards):
            (source / f"{number // of_a_bucket:05d}{number % of_a_bucket:03d}.tar").touch()
        outcome = run(Path(base), [discover(str(source))] * workers, count=True)
    if outcome.codes != [0] * workers or outcome.receipts != shards:
        raise RuntimeError(f"of {shards} shards {outcome.receipts} are done; exit codes {outcome.codes}")
    return {what: outcome.touched[what] / shards for what in ("opened", "listed", "names")}


def uneven(folder: Path, shards: int, workers: int, median_s: float) -> list[UnevenSplit]:
    """Claims and two static splits on the same shards."""
    rng = random.Random(0)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-claims-", dir=folder) as name:
        base = Path(name)
        found = make_empty_shards(base / "in", shards)
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
            rows.append(UnevenSplit(split, outcome.makespan_s, ideal, again))
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
        make_empty_shards(base / "in", shards)
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


@dataclass(frozen=True)
class Aim:
    """met: None where it could not be measured."""

    what: str
    figure: str
    aim: str
    met: bool | None


def aims(many: ManyWorkers, claims: UnevenSplit, calls: dict[str, float] | None) -> list[Aim]:
    once = many.done == many.shards and many.worked_on_twice == 0 and many.codes == [0]
    what = f"{many.shards:,} shards, {many.workers} workers: done, worked on twice"
    cpu, ratio = many.cpu_ms_a_shard, claims.of_ideal
    return [
        Aim(what, f"{many.done:,}, {many.worked_on_twice}", "all, 0", once),
        Aim("CPU ms a shard, all that the workers spend", f"{cpu:.2f}", f"< {CPU_MS:g}", cpu < CPU_MS),
        Aim("makespan of claims / ideal, uneven shards", f"{ratio:.3f}", f"≤ {MAKESPAN:g}", ratio <= MAKESPAN),
        *aims_of_operations(calls),
    ]


def aims_of_operations(calls: dict[str, float] | None) -> list[Aim]:
    if calls is None:
        return [Aim("metadata operations a shard", "no strace here", f"≤ {OPERATIONS:g}", None)]
    total = metadata(calls)
    listings = sum(count for what, count in calls.items() if what.startswith("list "))
    return [
        Aim("metadata operations a shard", f"{total:.1f}", f"≤ {OPERATIONS:g}", total <= OPERATIONS),
        Aim("of them listings", f"{listings:.2f}", "0", listings < 0.05),
    ]


def main() -> int:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--uneven_shards", type=int, default=UNEVEN_SHARDS)
    parser.add_argument("--uneven_median_s", type=float, default=MEDIAN_S, help="what half of the uneven shards take")
    parser.add_argument("--traced", type=int, nargs=2, default=(FEW, MANY), help="shards of the two runs under strace")
    parser.add_argument("--operations", action="store_true", help="count the metadata operations, and nothing else")
    parser.add_argument("--flat", type=int, nargs="+", help="numbers of shards; their cost is all that is measured")
    parser.add_argument("--one_worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--outputs", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parse(parser, shards=20, workers=4, uneven_shards=32, uneven_median_s=0.01, traced=(4, 12))
    set_up_logging(quiet=True)
    if arguments.one_worker:
        return one_worker(arguments.one_worker, arguments.outputs)
    if arguments.flat:
        return show_flat(arguments)
    few, many_traced = arguments.traced
    calls = operations(arguments.folder, 1, few, many_traced)
    if arguments.operations:
        return show_operations(arguments, calls)
    many = many_workers(arguments.folder, arguments.shards, arguments.workers)
    rows = uneven(arguments.folder, arguments.uneven_shards, UNEVEN_WORKERS, arguments.uneven_median_s)
    checked = aims(many, rows[0], calls)
    passed = all(aim.met is not False for aim in checked)
    if arguments.json:
        result = {"folder": str(arguments.folder), "passed": passed, "many": asdict(many), "operations": calls}
        lists = {"uneven": [asdict(row) for row in rows], "aims": [asdict(aim) for aim in checked]}
        print(json.dumps(result | lists, indent=2))
        return exit_code(passed, arguments)
    print(f"in {arguments.folder}, {os.cpu_count()} cores; {many.workers} workers took {many.wall_s:.0f} s\n")
    show_aims(checked)
    print(f"\n{arguments.uneven_shards} shards, log-normal cost, {UNEVEN_WORKERS} workers:\n")
    print_table(
        ["split", "last shard done after s", "of the ideal", "worked on twice"],
        [(r.split, f"{r.makespan_s:.1f}", f"{r.of_ideal:.2f}", r.worked_on_twice) for r in rows],
    )
    if calls:
        show_calls(arguments, calls)
    return exit_code(passed, arguments)


def show_flat(arguments: argparse.Namespace) -> int:
    """The cost of a shard for several numbers of shards."""
    rows, counts = [], []
    for number in sorted(arguments.flat):
        rows.append(many_workers(arguments.folder, number, arguments.workers))
        counts.append(touched(arguments.folder, number, arguments.workers))
    once = all(row.done == row.shards and not row.worked_on_twice and row.codes == [0] for row in rows)
    growth = max(row.cpu_ms_a_shard for row in rows) / rows[0].cpu_ms_a_shard
    if arguments.json:
        told = [asdict(row) | {"touched": count} for row, count in zip(rows, counts, strict=True)]
        print(json.dumps({"passed": once and growth <= GROWTH, "growth": growth, "flat": told}, indent=2))
    else:
        print(f"in {arguments.folder}, {os.cpu_count()} cores, {arguments.workers} workers; each shard once: {once}\n")
        heads = ["shards", "CPU ms a shard", "MB of a worker", "records opened a shard", "names listed a shard"]
        print_table(
            heads,
            [
                (
                    f"{r.shards:,}",
                    f"{r.cpu_ms_a_shard:.2f}",
                    f"{r.megabytes:.0f}",
                    f"{c['opened']:.1f}",
                    f"{c['names']:.1f}",
                )
                for r, c in zip(rows, counts, strict=True)
            ],
        )
        print(f"\nCPU time of a shard grows to {growth:.2f} of the smallest run's (aim: ≤ {GROWTH:g})")
    return exit_code(once and growth <= GROWTH, arguments)


def show_aims(checked: list[Aim]) -> None:
    print_table(["what", "measured", "aim", ""], [(a.what, a.figure, a.aim, VERDICTS[a.met]) for a in checked])


def show_calls(arguments: argparse.Namespace, calls: dict[str, float]) -> None:
    few, many = arguments.traced
    two = operations(arguments.folder, 2, few, many) or {}
    rows = [*calls.items(), ("a further output in a folder of its kind", metadata(two) - metadata(calls))]
    print()
    print_table(["metadata operation of one worker", "a shard"], [(what, f"{count:.2f}") for what, count in rows])


def show_operations(arguments: argparse.Namespace, calls: dict[str, float] | None) -> int:
    checked = aims_of_operations(calls)
    passed = all(aim.met is not False for aim in checked)
    if arguments.json:
        print(json.dumps({"folder": str(arguments.folder), "passed": passed, "operations": calls}, indent=2))
        return exit_code(passed, arguments)
    show_aims(checked)
    if calls:
        show_calls(arguments, calls)
    return exit_code(passed, arguments)


if __name__ == "__main__":
    sys.exit(main())
