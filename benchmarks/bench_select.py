"""DataComp's baselines on tables as DataComp publishes them: rows per second, and memory.

    python benchmarks/bench_select.py [--json] [--rows 1000000] [--baselines basic laion2b …] [--folder DIR] [--tiny]

Captions are drawn from ``short_captions.tsv`` and its words.  ``text_based`` is left out where WordNet is not
installed.  ``image_based`` has fewer rows (``--feature_rows``) and centroids, and no aim: on a CPU its time is that of
the products.  A second run on a tenth of the rows tells how memory grows with them; the last column is the CPU time of
12.8 million rows, DataComp's pool ``small``, computed from both.  Aim: at most 15 minutes of CPU, and at most 100 MB
more for ten times the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import ROOT, exit_code, make_parser, parse, print_table

from curation.commands.tables.assets import WordNet, find_synsets
from curation.errors import InfrastructureError

ROWS_PER_TABLE = 100_000
POOL = 12_800_000
AIM_S, AIM_MB = 900.0, 100
WIDTH, CENTROIDS = 768, 1000
RUN = """
import re, sys, time
from curation.__main__ import main
code = main(sys.argv[1:])
print(time.process_time(), int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
sys.exit(code)
"""


def captions() -> Iterator[str]:
    """Half of them from the file, half of random words, without end and never the same twice."""
    import numpy as np

    random = np.random.default_rng(11)
    lines = (ROOT / "benchmarks" / "short_captions.tsv").read_text("utf-8").splitlines()
    known = [line.split("\t")[-1] for line in lines]
    words = sorted({word for line in known for word in line.split()})
    number = 0
    while True:
        counts = random.integers(3, 16, 10_000)
        picked = random.integers(0, len(words), counts.sum())
        start = 0
        for count in counts.tolist():
            number += 1
            text = " ".join(words[place] for place in picked[start : start + count].tolist())
            yield f"{known[number % len(known)]} {number}" if number % 2 else text
            start += count


def make_tables(folder: Path, rows: int, features: bool) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    random = np.random.default_rng(5)
    texts = captions()
    for number, start in enumerate(range(0, rows, ROWS_PER_TABLE)):
        count = min(ROWS_PER_TABLE, rows - start)
        columns = {
            "uid": [random.bytes(16).hex() for _ in range(count)],
            "text": [next(texts) for _ in range(count)],
            "original_width": random.integers(100, 1500, count),
            "original_height": random.integers(100, 1500, count),
            "clip_b32_similarity_score": random.normal(0.25, 0.05, count),
            "clip_l14_similarity_score": random.normal(0.21, 0.05, count),
        }
        pq.write_table(pa.table(columns), folder / f"{number:08d}.parquet", row_group_size=20_000)
        if features:
            np.savez(folder / f"{number:08d}.npz", l14_img=random.normal(size=(count, WIDTH)).astype(np.float16))


def run(folder: Path, baseline: str, scratch: Path) -> tuple[float, float, int, int]:
    """Seconds, seconds of CPU, the peak of memory in MB, and the rows that are kept."""
    command = [sys.executable, "-c", RUN, "select", str(folder), "--out", str(scratch / "keep.npy"), "--json"]
    command += ["--memory_mb", "500", "--threads", "2", "--baseline", baseline]
    if baseline == "image_based":
        command += ["--centroids", str(scratch / "centroids.npy"), "--targets", str(scratch / "targets.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    told, used = done.stdout.splitlines()[-2:]
    result = json.loads(told)
    cpu, peak = used.split()
    return result["seconds"], float(cpu), int(peak), result["kept"]


def make_clusters(folder: Path) -> None:
    import numpy as np

    random = np.random.default_rng(7)
    np.save(folder / "centroids.npy", random.normal(size=(CENTROIDS, WIDTH)).astype(np.float32))
    np.save(folder / "targets.npy", random.normal(size=(CENTROIDS // 4, WIDTH)).astype(np.float32))


def measure(flags: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    make_clusters(folder)
    found = []
    for baseline in flags.baselines:
        image = baseline == "image_based"
        rows = flags.feature_rows if image else flags.rows
        sizes = (max(1, rows // 10), rows)
        for size in sizes:
            if not (folder / f"{size}-{image}").exists():
                make_tables(folder / f"{size}-{image}", size, image)
        small, large = (run(folder / f"{size}-{image}", baseline, folder) for size in sizes)
        seconds, cpu, peak, kept = large
        each = max(0.0, cpu - small[1]) / (sizes[1] - sizes[0])
        found.append(
            {
                "baseline": baseline,
                "rows": rows,
                "kept": kept,
                "seconds": seconds,
                "cpu_s": cpu,
                "rows_per_s": rows / seconds,
                "peak_mb": peak,
                "more_mb": peak - small[2],
                "pool_cpu_s": cpu + each * (POOL - rows),
            }
        )
    return found


def has_wordnet() -> bool:
    try:
        WordNet().find(None, "")
        return find_synsets(None, "").is_file()
    except InfrastructureError:
        return False


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--feature_rows", type=int, default=100_000)
    chosen = ["no_filter", "basic", "laion2b", *(["text_based"] if has_wordnet() else []), "clip_l14_30", "image_based"]
    parser.add_argument("--baselines", nargs="+", default=chosen)
    flags = parse(parser, rows=2000, feature_rows=1000)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        found = measure(flags, Path(folder))
    if flags.json:
        print(json.dumps(found))
    else:
        columns = ["baseline", "rows/s", "rows", "kept", "seconds", "CPU s", "peak MB"]
        columns += ["MB more for 10 × rows", "12.8 M rows, CPU min"]
        print_table(
            columns,
            [
                (
                    row["baseline"],
                    f"{row['rows_per_s']:,.0f}",
                    f"{row['rows']:,}",
                    f"{row['kept']:,}",
                    f"{row['seconds']:.1f}",
                    f"{row['cpu_s']:.1f}",
                    row["peak_mb"],
                    row["more_mb"],
                    f"{row['pool_cpu_s'] / 60:.1f}",
                )
                for row in found
            ],
        )
    met = all(
        row["pool_cpu_s"] <= AIM_S and row["more_mb"] <= AIM_MB for row in found if row["baseline"] != "image_based"
    )
    return exit_code(met, flags)


if __name__ == "__main__":
    sys.exit(main())
