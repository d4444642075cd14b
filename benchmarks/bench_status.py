"""How long status takes over 100,000 receipts, how long --watch needs to draw again, and finding 100,000 shards.

    python benchmarks/bench_status.py [--json] [--folder DIR] [--receipts 100000] [--million] [--tiny]

Aims: status in under 5 s and 300 MB (the whole of its processes), a redraw and discovery in under 2 s.  Receipts are of
two stages, the second made from the first, so that each of its shards is checked for being stale; they are of the size
that a stage with a detector leaves, in buckets as the ledger makes them.  A hundred are stale and a hundred have
failed, and status must say so.

``--million`` measures status, report, plan and discovery on ``--receipts`` receipts and on twice as many (a shard has
two, one of each stage), by CPU time and memory, and computes a million of them from the slope.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import ROOT, VERDICTS, exit_code, make_empty_shards, make_parser, parse, print_table

from curation.commands.places import find_stages
from curation.commands.status.scan import Memory, ReceiptScan, StageCounts
from curation.shards import bucket_of
from curation.storage.files import temporary_name

STATUS_S, STATUS_MB, REDRAW_S, DISCOVERY_S = 5.0, 300.0, 2.0, 2.0
DISCOVER = """
import sys, time
from curation.shards import discover
began = time.perf_counter()
found = discover(sys.argv[1])
print(len(found), time.perf_counter() - began)
"""


@dataclass(frozen=True)
class StatusRow:
    what: str
    number: int
    seconds: float
    aim_s: float
    megabytes: float | None = None
    aim_mb: float | None = None

    @property
    def met(self) -> bool:
        return self.seconds < self.aim_s and (self.megabytes is None or self.megabytes < (self.aim_mb or 0))


def receipt(stage: str, shard: str, number: int, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> bytes:
    """As ``curation.run.attempt`` writes it, indented as the ledger does."""
    failed = stage == "02" and number % 500 == 7
    value: dict[str, Any] = {
        "shard": shard, "stage": stage, "version": 1, "status": "failed" if failed else "done", "epoch": 1,
        "generation": 1, "token": f"{number:016x}", "run": "slurm-4711",
        "counts": {
            "in": 10_000, "kept": 1234, "dropped": {"english": 1, "no_face": 8760, "too_small": 3},
            "failed": {"bad_json": 1, "bad_image": 1},
        },
        "inputs": inputs,
        "sources": [{"stage": "01", "folder": "../captions"}] if stage == "02" else [{}],
        "outputs": [] if failed else outputs,
        "notes": {"languages": {"es": 1000, "en": 200, "fr": 34}, "recovered": 7}, "warnings": [],
        "seconds": {"commit": 0.0123, "decode": 101.5, "infer": 88.25, "read": 3.5, "write": 0.75},
        "host": f"node{number % 64:03d}", "rank": number % 64,
        "slurm": {"job_id": str(5000 + number % 64), "array_job_id": "4711", "array_task_id": str(number % 64),
                  "procid": "0", "job_partition": "gpu"},
        "gpu": 0, "code": "0.1.0+0123456789ab", "started": 1.7e9 + number, "finished": 1.7e9 + number + 190,
    }  # fmt: skip
    if failed:
        value["error"] = {"reason": "shard_error", "message": f"{shard}: is truncated", "traceback": ""}
        value["attempts"] = 1
    return json.dumps(value, indent=2).encode()


def output(folder: str, shard: str, suffix: str, digest: str) -> dict[str, Any]:
    name = f"{shard}{suffix}"
    return {
        "path": f"{folder}{name}", "temporary": temporary_name(name, digest[:16]), "size": 123_456, "digest": digest,
        "checked": True,
    }  # fmt: skip


def make(root: Path, receipts: int) -> int:
    """Half of them of each stage; returns the bytes of one."""
    options = json.dumps({"version": 1, "options": {"mark": "x"}, "run": "slurm-4711"}).encode()
    for stage, folder in (("01", "captions"), ("02", "prompts")):
        place = root / folder / "_receipts" / stage
        place.mkdir(parents=True)
        (place / "_epoch.1.json").write_bytes(options)
        for number in range(receipts // 2):
            shard = f"{number:08d}"
            bucket = place / bucket_of(shard)
            if number % 1000 == 0:
                bucket.mkdir()
            stale = stage == "02" and number % 500 == 3
            first = {"path": f"{shard}.json", "size": 123_456, "digest": f"{number + stale:032x}"}
            source = {"path": f"{shard}.tar", "size": 300_000_000, "mtime_ns": 1_700_000_000_000_000_000}
            data = receipt(
                stage, shard, number, [first if stage == "02" else source],
                [
                    output("", shard, ".json", f"{number:032x}"),
                    output("../edits/", shard, ".json", f"{number:032x}"),
                    output(f"_rejects/{stage}/", shard, ".drops.tsv.gz", f"{number:032x}"),
                    output(f"_provenance/{stage}/", shard, ".jsonl", f"{number:032x}"),
                ],
            )  # fmt: skip
            (bucket / f"{shard}.json").write_bytes(data)
    return len(data)


def tree_megabytes(pid: int) -> float:
    """The memory of a process and its children, each page counted once."""
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                todo += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1e3
        except (OSError, StopIteration):
            continue  # it has ended
    return total


def run_status(root: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds from start to end of the command, megabytes at most, what it said."""
    command = [sys.executable, "-m", "curation", "status", str(root), "--json"]
    began = time.perf_counter()
    peak = 0.0
    with tempfile.TemporaryFile() as told, subprocess.Popen(command, stdout=told, cwd=ROOT) as process:
        while process.poll() is None:
            peak = max(peak, tree_megabytes(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        told.seek(0)
        result: dict[str, Any] = json.loads(told.read())
    return seconds, peak, result


def measure_status(base: Path, receipts: int, rounds: int) -> tuple[StatusRow, int]:
    size = make(base, receipts)
    runs = [run_status(base) for _ in range(rounds)]
    for _, _, result in runs:
        first, second = result["stages"]
        half, some = receipts // 2, receipts // 2 // 500
        found = (first["done"], second["done"], second["stale"].get("inputs", 0), sum(second["failed"].values()))
        if found != (half, half - 2 * some, some, some):
            raise RuntimeError(f"status is wrong: {found}")
    seconds, megabytes = min(run[0] for run in runs), max(run[1] for run in runs)
    return StatusRow("status", receipts, seconds, STATUS_S, megabytes, STATUS_MB), size


def measure_redraw(base: Path, receipts: int, rounds: int) -> StatusRow:
    """What ``--watch`` reads to draw again where a hundred receipts are new."""
    memory, seconds = Memory(), []
    ReceiptScan(find_stages(base), memory).read(StageCounts)
    for _ in range(rounds):
        for path in islice(base.glob("*/_receipts/*/*/*.json"), 100):
            (fresh := path.with_name(f".{path.name}")).write_bytes(path.read_bytes())
            fresh.rename(path)
        began = time.perf_counter()
        counts = ReceiptScan(find_stages(base), memory).read(StageCounts)
        seconds.append(time.perf_counter() - began)
        if counts != ReceiptScan(find_stages(base)).read(StageCounts):
            raise RuntimeError("--watch counts otherwise than status")
    return StatusRow("a redraw of status --watch", receipts, min(seconds), REDRAW_S)


def measure_discovery(base: Path, shards: int, rounds: int) -> StatusRow:
    make_empty_shards(base, shards)
    runs = []
    for _ in range(rounds):
        command = [sys.executable, "-c", DISCOVER, str(base)]
        told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
        if int(told[0]) != shards:
            raise RuntimeError(f"{told[0]} shards were found")
        runs.append(float(told[1]))
    return StatusRow("discovery", shards, min(runs), DISCOVERY_S)


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    megabytes: float

    def at(self, other: Cost, million: float) -> Cost:
        """The cost at a million, where ``self`` is that of a number and ``other`` that of twice as many.

        million: a million as a multiple of that number.
        """
        steps = million - 1
        return Cost(
            self.cpu_s + steps * (other.cpu_s - self.cpu_s), self.megabytes + steps * (other.megabytes - self.megabytes)
        )


MEASURE = """
import importlib, io, json, os, resource, sys
sys.stdout, out = io.StringIO(), sys.stdout
code = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([code, sum(one.ru_utime + one.ru_stime for one in both), both[0].ru_maxrss / 1e3]), file=out)
"""


def measure_command(code: str, *arguments: str) -> Cost:
    """CPU seconds of a command with its children, and the memory of its own process at most."""
    command = [sys.executable, "-c", code, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    result, cpu_s, megabytes = json.loads(told)
    if result != 0:
        raise RuntimeError(f"{arguments[0]} ended with {result}")
    return Cost(cpu_s, megabytes)


def measure_commands(folder: Path, receipts: int) -> dict[str, Cost]:
    """What each command costs on so many receipts, two for each shard."""
    with tempfile.TemporaryDirectory(prefix="bench-status-", dir=folder) as name:
        base = Path(name)
        source = base / "shards"
        make(base, receipts)
        for shard in range(receipts // 2):
            source.mkdir(exist_ok=True)
            (source / f"{shard:08d}.tar").touch()
        find = MEASURE.replace("importlib.import_module(sys.argv[1]).main", "(lambda argv: discover(argv[0]) and 0)")
        return {
            "discover": measure_command(f"from curation.shards import discover\n{find}", "discover", str(source)),
            "status": measure_command(MEASURE, "curation.commands.status.command", str(base), "--json"),
            "report": measure_command(
                MEASURE, "curation.commands.report.command", str(base), "--json", "--no_audit", "--sample_shards", "0"
            ),
            "plan": measure_command(MEASURE, "curation.commands.plan.command", str(source), str(base), "--json"),
        }


def show_million(arguments: argparse.Namespace) -> int:
    number = arguments.receipts
    one, two = measure_commands(arguments.folder, number), measure_commands(arguments.folder, 2 * number)
    at_a_million = {name: cost.at(two[name], 1e6 / number) for name, cost in one.items()}
    if arguments.json:
        told = {str(number): one, str(2 * number): two, "1000000 (computed)": at_a_million}
        print(
            json.dumps({n: {name: vars(cost) for name, cost in costs.items()} for n, costs in told.items()}, indent=2)
        )
        return 0
    sizes = [f"{number:,}", f"{2 * number:,}", "1,000,000 (computed)"]
    heads = ["command", *(f"{what}, {size}" for size in sizes for what in ("CPU s", "MB"))]
    print_table(
        heads,
        [
            (
                name,
                *(
                    text
                    for c in (one[name], two[name], at_a_million[name])
                    for text in (f"{c.cpu_s:.1f}", f"{c.megabytes:.0f}")
                ),
            )
            for name in one
        ],
    )
    return 0


def main() -> int:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--receipts", type=int, default=100_000)
    parser.add_argument(
        "--rounds", type=int, default=3, help="the best counts: the machine may be busy with other things"
    )
    parser.add_argument("--million", action="store_true", help="compute from --receipts and twice as many")
    arguments = parse(parser, receipts=2000, rounds=1)
    if arguments.million:
        return show_million(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-status-", dir=arguments.folder) as base:
        status, size = measure_status(Path(base), arguments.receipts, arguments.rounds)
        redraw = measure_redraw(Path(base), arguments.receipts, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="bench-status-", dir=arguments.folder) as base:
        rows = [status, redraw, measure_discovery(Path(base), arguments.receipts, arguments.rounds)]
    passed = all(row.met for row in rows)
    if arguments.json:
        print(json.dumps({"passed": passed, "receipt_bytes": size, "rows": [vars(row) for row in rows]}, indent=2))
        return exit_code(passed, arguments)
    print(
        f"in {arguments.folder}, {os.cpu_count()} cores, receipts of {size:,} bytes; "
        f"the best of {arguments.rounds} runs"
    )
    table = []
    for row in rows:
        held = ("", "") if row.megabytes is None else (f"{row.megabytes:.0f}", f"< {row.aim_mb:g}")
        table.append((row.what, f"{row.number:,}", f"{row.seconds:.2f}", f"< {row.aim_s:g}", *held, VERDICTS[row.met]))
    print_table(["what", "files", "seconds", "aim", "MB at most", "aim", ""], table)
    return exit_code(passed, arguments)


if __name__ == "__main__":
    sys.exit(main())
