"""How long a query takes in an index of 100,000 vectors or more on one core, how many of the nearest it finds, and
what the index and the two balances of ``select`` cost.

    python benchmarks/bench_search.py [--rows 1000000] [--width 512] [--folder DIR] [--balance] [--tiny]

Aim: 95 of 100 queries in under 50 ms each, texts of 20 hits included, on one core that the process does not leave.
Features are random vectors in float16 around one centre for each 50 rows.  Memory is the peak of the command's
process, with the pages of files that it has mapped.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ROOT, VERDICTS, exit_code, make_parser, parse, print_table

QUERY_MS = 50.0
SHARD_ROWS, ROWS_AROUND_A_CENTRE, SPREAD = 10_000, 50, 0.6
FEATURE = "vectors-image"
HITS, QUERIES, COMPARED = 20, 200, 50
QUERY = """
import json, os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
from pathlib import Path
from curation.commands.search.nearest import OpenIndex
began = time.perf_counter()
index = OpenIndex(Path(sys.argv[1]))
index.use_threads(1)
opened, found, took = time.perf_counter() - began, [], []
for query in np.load(sys.argv[2], allow_pickle=False):
    began = time.perf_counter()
    rows, scores = index.nearest(query, int(sys.argv[3]))
    texts = [index.samples[row] for row in rows.tolist()]
    took.append(1000 * (time.perf_counter() - began))
    found.append(rows.tolist())
print(json.dumps({"opened": opened, "took": took, "found": found}))
"""


@dataclass(frozen=True)
class SearchRow:
    what: str
    figure: float
    unit: str
    aim: float | None = None
    megabytes: float | None = None

    @property
    def met(self) -> bool:
        return self.aim is None or self.figure < self.aim


def make(folder: Path, rows: int, width: int, words: int) -> None:
    """Tables and features as stage 06 names them, of random vectors and captions of random words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    chance, texts = np.random.default_rng(1), random.Random(1)
    centres = chance.standard_normal((max(1, rows // ROWS_AROUND_A_CENTRE), width), np.float32)
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        vectors = centres[chance.integers(0, len(centres), count)]
        vectors = vectors + SPREAD * chance.standard_normal((count, width), np.float32)
        vectors /= np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
        numbers = range(start, start + count)
        table = {
            "uid": [f"{texts.getrandbits(64):016x}{n:016x}" for n in numbers],
            "key": [f"{n:09d}" for n in numbers],
            "tar": [f"{shard:08d}.tar"] * count,
            "caption": [caption(texts, words) for _ in numbers],
            "url": [f"https://example.org/images/{n}.jpg" for n in numbers],
        }
        pq.write_table(pa.table(table), folder / f"{shard:08d}.parquet")
        arrays: dict[str, Any] = {FEATURE: vectors.astype(np.float16)}
        np.savez(folder / f"{shard:08d}.npz", **arrays)


def caption(texts: random.Random, words: int) -> str:
    """Ten words, of which some are much more frequent than others."""
    return " ".join(f"w{int(words ** texts.random())}" for _ in range(10))


def write_entries(path: Path, count: int, words: int) -> None:
    """All single words, and pairs of them."""
    texts = random.Random(2)
    names = {f"w{n}" for n in range(words)}
    while len(names) < count:
        names.add(" ".join(f"w{int(words ** texts.random())}" for _ in range(2)))
    path.write_text("\n".join(sorted(names)), "utf-8")


def run(*words: object) -> tuple[dict[str, Any], float, float]:
    """What a command says, its seconds, and the megabytes that it had at most."""
    command = [sys.executable, "-m", "curation", *map(str, words), "--json"]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as told, subprocess.Popen(command, stdout=told, cwd=ROOT) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"{words[0]} ended with {process.returncode}")
        told.seek(0)
        result: dict[str, Any] = json.loads(told.read())
    return result, seconds, used.ru_maxrss / 1000


def make_queries(folder: Path, count: int) -> np.ndarray[Any, Any]:
    """Vectors near some of the rows, as the queries of a user are near some samples."""
    chance = np.random.default_rng(3)
    paths = sorted(folder.glob("*.npz"))
    found = []
    for number in chance.integers(0, len(paths), count):
        with np.load(paths[number], allow_pickle=False) as archive:
            row = archive[FEATURE][int(chance.integers(len(archive[FEATURE])))].astype(np.float64)
        found.append(row + 0.3 * chance.standard_normal(len(row)) / np.sqrt(len(row)))
    return np.array(found)


def nearest_of_all(folder: Path, queries: np.ndarray[Any, Any]) -> list[set[int]]:
    """The rows that are nearest to each query, by every cosine."""
    rows: list[np.ndarray[Any, Any]] = []
    scores: list[np.ndarray[Any, Any]] = []
    start = 0
    unit = (queries / np.sqrt(np.square(queries).sum(axis=1, keepdims=True))).astype(np.float32)
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            vectors = archive[FEATURE].astype(np.float32)
        vectors /= np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
        cosines = unit @ vectors.T
        best = np.argsort(-cosines, axis=1)[:, :HITS]
        rows.append(best + start)
        scores.append(np.take_along_axis(cosines, best, axis=1))
        start += len(vectors)
    all_rows, all_scores = np.concatenate(rows, axis=1), np.concatenate(scores, axis=1)
    order = np.argsort(-all_scores, axis=1)[:, :HITS]
    return [set(row) for row in np.take_along_axis(all_rows, order, axis=1).tolist()]


def measure_search(base: Path, kind: str, queries: int) -> list[SearchRow]:
    told, seconds, megabytes = run(
        "index", base / "tables", "--feature", FEATURE, "--out", base / "index", "--kind", kind, "--threads", 2
    )
    vectors = make_queries(base / "tables", queries)
    np.save(base / "queries.npy", vectors)
    command = [sys.executable, "-c", QUERY, str(base / "index"), str(base / "queries.npy"), str(HITS)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    took = np.sort(said["took"])
    exact = nearest_of_all(base / "tables", vectors[:COMPARED])
    found = [len(there & set(rows)) for there, rows in zip(exact, said["found"], strict=False)]
    return [
        SearchRow(f"index ({told['kind']}, {told['lists']:,} lists)", seconds, "s", None, megabytes),
        SearchRow("opening the index", 1000 * said["opened"], "ms"),
        SearchRow("a query, median", float(took[len(took) // 2]), "ms"),
        SearchRow("a query, 95 of 100 are faster", float(took[int(0.95 * len(took))]), "ms", QUERY_MS),
        SearchRow(f"of the {HITS} nearest, found", 100 * sum(found) / (HITS * len(found)), "%"),
    ]


def measure_balance(base: Path, entries: int, words: int) -> list[SearchRow]:
    write_entries(base / "entries.txt", entries, words)
    shared = ("select", base / "tables", "--out", base / "keep.npy", "--threads", 2, "--balance")
    found = []
    for what, flags in (
        (
            f"select --balance concepts, {entries:,} entries",
            ("concepts", "--entries", base / "entries.txt", "--max_matches", 100),
        ),
        ("select --balance clusters", ("clusters", "--feature", FEATURE, "--epsilon", 0.3)),
    ):
        told, seconds, megabytes = run(*shared, *flags)
        found.append(SearchRow(f"{what}: keeps {told['kept']:,}", seconds, "s", None, megabytes))
    return found


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--kind", choices=("auto", "exact", "ivfpq"), default="ivfpq")
    parser.add_argument("--balance", action="store_true", help="measure the balances of select, too")
    parser.add_argument("--entries", type=int, default=500_000, help="of the balance over concepts")
    arguments = parse(parser, rows=4000, width=32, queries=20, balance=True, entries=2000)
    words = min(50_000, arguments.entries // 4)
    with tempfile.TemporaryDirectory(prefix="bench-search-", dir=arguments.folder) as name:
        base = Path(name)
        make(base / "tables", arguments.rows, arguments.width, words)
        rows = measure_search(base, arguments.kind, arguments.queries)
        rows += measure_balance(base, arguments.entries, words) if arguments.balance else []
    passed = all(row.met for row in rows)
    if arguments.json:
        print(json.dumps({"passed": passed, "rows": [vars(row) for row in rows]}, indent=2))
        return exit_code(passed, arguments)
    print(
        f"{arguments.rows:,} vectors of {arguments.width} numbers; {arguments.queries} queries on one core of "
        f"{os.cpu_count()}; the nearest of all were compared for {min(COMPARED, arguments.queries)} of them"
    )
    table = []
    for row in rows:
        megabytes = "" if row.megabytes is None else f"{row.megabytes:,.0f}"
        aim, verdict = ("", "") if row.aim is None else (f"< {row.aim:g} {row.unit}", VERDICTS[row.met])
        table.append((row.what, f"{row.figure:,.1f} {row.unit}", megabytes, aim, verdict))
    print_table(["what", "figure", "MB at most", "aim", ""], table)
    return exit_code(passed, arguments)


if __name__ == "__main__":
    sys.exit(main())
