"""How far off forecasts are: a sample is measured, the rest is forecast, and then done.

    python benchmarks/bench_plan.py [--json] [--shards 16] [--sample 5] [--folder DIR] [--tiny]

Stages 01 (CenterFace), 02 (a deterministic server), 03 (tiny random weights) and 04 run on the sample, ``python -m
curation plan`` forecasts, and they run on the rest.  Aim: time and bytes within 20 % of what the rest then took.  The
shards are of different sizes: 60 to 180 of the example photos, about half of them with a face, each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import ROOT, example_samples, exit_code, make_parser, parse, print_table, write_shard

from curation.commands.status.scan import covered_seconds
from tests.servers import deterministic_llm_server

WITHIN = 0.20


def make_shards(folder: Path, count: int, sizes: Sequence[int]) -> None:
    source = random.Random(11)
    photos = [sample for sample in example_samples() if "jpg" in sample.members]
    samples = [{suffix: sample.members[suffix] for suffix in ("jpg", "txt", "json")} for sample in photos]
    faces = [members for members in samples if json.loads(members["json"]).get("face_bboxes")]
    for number in range(count):
        chosen = []
        for place in range(source.randint(*sizes)):
            pool = faces if source.random() < 0.5 else samples  # of 76 photos few have a face
            chosen.append((f"{number:08d}{place:04d}", source.choice(pool)))
        write_shard(folder / f"{number:08d}.tar", chosen)


def run(command: list[str], environment: dict[str, str]) -> str:
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout


def spent(root: Path, stage: str, but: set[str]) -> tuple[float, int, set[str]]:
    """Seconds of one worker, getting ready included, bytes and shards of a stage's receipts, but for some shards."""
    paths = [path for path in root.glob(f"*/_receipts/{stage}/*/0*.json") if path.stem not in but]
    receipts = [json.loads(path.read_bytes()) for path in paths]
    busy = max((receipt["open_s"] for receipt in receipts), default=0.0)
    busy += covered_seconds((receipt["started"], receipt["finished"]) for receipt in receipts)
    return busy, sum(o["size"] for receipt in receipts for o in receipt["outputs"]), {path.stem for path in paths}


def measure(folder: Path, flags: argparse.Namespace) -> list[dict[str, Any]]:
    source, root = folder / "in", folder / "root"
    make_shards(source, flags.shards, flags.sizes)
    with deterministic_llm_server(delay_s=0.02) as port:
        environment = {
            **os.environ,
            "FLAGS_01": "--embedded --quiet",
            "FLAGS_02": "--api ollama --quiet",
            "FLAGS_03": "--embedded --height 64 --width 64 --quiet",
            "FLAGS_04": "--quiet",
            "PORTS": str(port),
            "PYTHON": sys.executable,
            "SRC_DIR": str(source),
            "ROOT": str(root),
        }
        plan = [sys.executable, "-m", "curation", "plan", str(source), str(root), "--json"]
        plan += ["--tasks", "1", "--sample", str(flags.sample)]
        forecast = json.loads(run(plan, environment))
        before = {stage["stage"]: spent(root, stage["stage"], set()) for stage in forecast["stages"]}
        rest = ["bash", str(ROOT / "run_pipeline.sh"), "--here", "--stages", flags.stages]
        subprocess.run(rest, cwd=ROOT, env=environment, stdout=2, check=True)
    rows = []
    first, _, last = flags.stages.partition("-")
    for stage in (stage for stage in forecast["stages"] if first <= stage["stage"][:2] <= last):
        _, was_bytes, sampled = before[stage["stage"]]
        seconds, written, done = spent(root, stage["stage"], sampled)
        wall = stage["wall_clock_s"]
        rows.append(
            {
                "stage": stage["stage"],
                "measured": len(sampled),
                "rest": len(done),
                "forecast_s": wall["value"],
                "error_s": wall["error"],
                "took_s": seconds,
                "forecast_bytes": stage["bytes"]["value"] - was_bytes,
                "wrote_bytes": written,
            }
        )
    return rows


def off(forecast: float, came: float) -> float:
    """How far a forecast is from what came, as a share of it."""
    return forecast / came - 1 if came else math.inf


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--sample", type=int, default=5)
    parser.add_argument(
        "--sizes", type=int, nargs=2, default=(60, 180), help="samples in the least and the largest shard"
    )
    parser.add_argument("--stages", default="01-04", help="those that do the rest")
    flags = parse(parser, shards=3, sample=2, sizes=(10, 12), stages="01-02")
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        rows = measure(Path(folder), flags)
    if flags.json:
        print(json.dumps(rows))
    else:
        table = []
        for row in rows:
            off_s, off_b = off(row["forecast_s"], row["took_s"]), off(row["forecast_bytes"], row["wrote_bytes"])
            seconds = (f"{row['forecast_s']:.2f} ± {row['error_s']:.2f}", f"{row['took_s']:.2f}", f"{off_s:+.0%}")
            bytes_ = (f"{row['forecast_bytes'] / 1e6:.3f}", f"{row['wrote_bytes'] / 1e6:.3f}", f"{off_b:+.0%}")
            table.append((row["stage"], row["measured"], row["rest"], *seconds, *bytes_))
        columns = ["stage", "measured", "rest", "seconds forecast", "took", "off", "MB forecast", "wrote", "off"]
        print_table(columns, table)
    pairs = [(row["forecast_s"], row["took_s"]) for row in rows]
    pairs += [(row["forecast_bytes"], row["wrote_bytes"]) for row in rows]
    worst = max(abs(off(forecast, came)) for forecast, came in pairs)
    print(f"worst: {worst:.0%}; aim: {WITHIN:.0%}", file=sys.stderr)
    return exit_code(worst <= WITHIN, flags)


if __name__ == "__main__":
    sys.exit(main())
