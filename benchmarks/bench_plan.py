"""How far off forecasts are: a sample is measured, the rest is forecast, and then done.

    python benchmarks/bench_plan.py [--json] [--shards 16] [--sample 5] [--folder DIR]

Stages 01 (CenterFace), 02 (a deterministic server), 03 (tiny random weights) and 04 run on the sample, ``python -m
curation plan`` forecasts, and they run on the rest.  Aim: time and bytes within 20 % of what the rest then took.  The
shards are of different sizes: 60 to 180 of the example photos, about half of them with a face, each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from curation.shards import discover
from curation.tar.samples import TarWriter, read_samples
from tests.servers import deterministic_llm_server

ROOT = Path(__file__).resolve().parent.parent
WITHIN = 0.20
SUFFIXES = {"jpg", "txt", "json"}


def make_shards(folder: Path, count: int) -> None:
    source = random.Random(11)
    shards = discover(str(ROOT / "examples" / "shards"))
    samples = [sample.members for shard in shards for sample in read_samples(shard.path, SUFFIXES)]
    faces = [members for members in samples if json.loads(members["json"]).get("face_bboxes")]
    for number in range(count):
        with open(folder / f"{number:08d}.tar", "wb") as file:
            tar = TarWriter(file)
            for place in range(source.randrange(60, 181)):
                chosen = faces if source.random() < 0.5 else samples  # of 76 photos few have one
                for suffix, data in source.choice(chosen).items():
                    tar.add(f"{number:08d}{place:04d}.{suffix}", bytes(data))
            tar.close()


def run(command: list[str], environment: dict[str, str]) -> str:
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout


def spent(root: Path, stage: str, but: set[str]) -> tuple[float, int, set[str]]:
    """Seconds of one worker, getting ready included, bytes and shards of a stage's receipts, but for some shards."""
    paths = [path for path in root.glob(f"*/_receipts/{stage}/*/0*.json") if path.stem not in but]
    receipts = [json.loads(path.read_bytes()) for path in paths]
    spans = sorted((receipt["started"], receipt["finished"]) for receipt in receipts)
    busy, until = max((receipt["open_s"] for receipt in receipts), default=0.0), 0.0
    for began, ended in spans:
        busy, until = busy + max(0.0, ended - max(began, until)), max(until, ended)
    return busy, sum(o["size"] for receipt in receipts for o in receipt["outputs"]), {path.stem for path in paths}


def measure(folder: Path, shards: int, sample: int) -> list[dict[str, Any]]:
    source, root = folder / "in", folder / "root"
    source.mkdir(parents=True)
    make_shards(source, shards)
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
        plan = [sys.executable, "-m", "curation", "plan", str(source), str(root), "--sample", str(sample), "--json"]
        plan += ["--tasks", "1"]
        forecast = json.loads(run(plan, environment))
        before = {stage["stage"]: spent(root, stage["stage"], set()) for stage in forecast["stages"]}
        subprocess.run(
            ["bash", str(ROOT / "run_pipeline.sh"), "--here"], cwd=ROOT, env=environment, stdout=2, check=True
        )
    rows = []
    for stage in forecast["stages"]:
        _, was_bytes, sampled = before[stage["stage"]]
        seconds, written, rest = spent(root, stage["stage"], sampled)
        wall = stage["wall_clock_s"]
        rows.append(
            {
                "stage": stage["stage"],
                "measured": len(sampled),
                "rest": len(rest),
                "forecast_s": wall["value"],
                "error_s": wall["error"],
                "took_s": seconds,
                "forecast_bytes": stage["bytes"]["value"] - was_bytes,
                "wrote_bytes": written,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--sample", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        rows = measure(Path(folder), flags.shards, flags.sample)
    if flags.json:
        print(json.dumps(rows))
    else:
        print("| stage | measured | rest | seconds forecast | took | off | MB forecast | wrote | off |")
        print("|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            off_s = row["forecast_s"] / row["took_s"] - 1
            off_b = row["forecast_bytes"] / row["wrote_bytes"] - 1
            seconds = f"{row['forecast_s']:.2f} ± {row['error_s']:.2f} | {row['took_s']:.2f} | {off_s:+.0%}"
            megabytes = f"{row['forecast_bytes'] / 1e6:.3f} | {row['wrote_bytes'] / 1e6:.3f} | {off_b:+.0%}"
            print(f"| {row['stage']} | {row['measured']} | {row['rest']} | {seconds} | {megabytes} |")
    pairs = [(row["forecast_s"], row["took_s"]) for row in rows]
    pairs += [(row["forecast_bytes"], row["wrote_bytes"]) for row in rows]
    worst = max(abs(forecast / came - 1) for forecast, came in pairs)
    print(f"worst: {worst:.0%}; aim: {WITHIN:.0%}", file=sys.stderr)
    return 0 if worst <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
