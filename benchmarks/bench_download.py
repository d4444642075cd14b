#!/usr/bin/env python3
"""Stage 00 beside img2dataset, on the same web server of real photos in one run.  5,000 URLs on 50 hosts.

Both write webdataset tars with captions, in one process with the same number of threads: images kept as they came
without a look into them; decoded and kept (img2dataset encodes anew what is no JPEG); decoded, resized to 256 pixels
(keep_ratio) and encoded as JPEG.  Start-up is part of neither: img2dataset's is taken from its own
statistics, the stage's from its receipts.  Rounds alternate, and the median of the rounds' ratios counts.

img2dataset lives in an environment of its own, which this script makes once (--venv), because its pins (webdataset<0.3,
pandas<3) are not this project's.  Aim: at least its speed in each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PEER = "img2dataset==1.47.0"
HOSTS = 50
ROWS_PER_SHARD = 1000
# What is done to an image: the stage's flags, img2dataset's flags.
MODES = {
    "kept, not looked into": (["--image_check", "header"], ["--disable_all_reencoding", "True"]),
    "decoded, kept": ([], ["--resize_mode", "no", "--skip_reencode", "True"]),
    "decoded, resized, encoded": (
        ["--encode", "jpg", "--image_size", "256", "--resize_mode", "keep_ratio"],
        ["--image_size", "256", "--resize_mode", "keep_ratio", "--encode_quality", "95"],
    ),
}


def make_peer(folder: Path) -> Path:
    """The Python of an environment with img2dataset."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        # opencv's headless build goes without the system's libGL
        subprocess.run([python, "-m", "pip", "install", "-q", PEER, "setuptools<81"], check=True)
        (folder / ".installed").touch()
    return python


def write_table(path: Path, port: int, count: int) -> None:
    import pyarrow
    from pyarrow.parquet import write_table as write

    urls = [f"http://127.0.0.{1 + i % HOSTS}:{port}/photo/{i}" for i in range(count)]
    write(pyarrow.table({"url": urls, "caption": [f"photo {i}" for i in range(count)]}), path)


def stage(table: Path, output: Path, mode: str, threads: int) -> float:
    command = [sys.executable, str(ROOT / "00_download.py"), "--input", str(table), "--output", str(output), "--quiet"]
    command += ["--allow_private", "127.0.0.0/8", "--threads", str(threads)]
    command += ["--workers", "1", "--rows_per_shard", str(ROWS_PER_SHARD)]
    command += MODES[mode][0]
    subprocess.run(command, check=True, env=quiet_environment())
    receipts = [json.loads(path.read_bytes()) for path in output.glob("_receipts/00_download/*/*.json")]
    counts = [receipt["counts"] for receipt in receipts]
    assert sum(c["kept"] for c in counts) == sum(c["in"] for c in counts), counts
    return float(max(r["finished"] for r in receipts) - min(r["started"] for r in receipts))


def peer(python: Path, table: Path, output: Path, mode: str, threads: int) -> float:
    code = "from img2dataset.main import main; main()"
    command = [str(python), "-c", code, "--url_list", str(table), "--output_folder", str(output)]
    command += ["--input_format", "parquet", "--output_format", "webdataset", "--caption_col", "caption"]
    command += ["--processes_count", "1", "--thread_count", str(threads), "--enable_wandb", "False"]
    command += ["--number_sample_per_shard", str(ROWS_PER_SHARD)]
    command += MODES[mode][1]
    subprocess.run(command, check=True, env=quiet_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stats = [json.loads(path.read_bytes()) for path in output.glob("*_stats.json")]
    assert sum(s["successes"] for s in stats) == sum(s["count"] for s in stats), stats
    return float(max(s["end_time"] for s in stats) - min(s["start_time"] for s in stats))


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}


def cpu_seconds() -> float:
    """Of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--latency_s", type=float, default=0.02, help="of the server, before it answers")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-img2dataset")
    options = parser.parse_args()
    from tests.servers import photo_server

    python = make_peer(options.venv)
    seconds: dict[tuple[str, str], list[float]] = {(who, m): [] for m in MODES for who in ("stage 00", "img2dataset")}
    cpu: dict[tuple[str, str], list[float]] = {key: [] for key in seconds}
    with (
        tempfile.TemporaryDirectory() as name,
        photo_server(ROOT / "examples" / "shards", options.latency_s) as port,
    ):
        folder = Path(name)
        table = folder / "urls.parquet"
        write_table(table, port, options.count)
        for _ in range(options.rounds):
            for mode in MODES:
                for who in ("stage 00", "img2dataset"):
                    out = folder / "out"
                    cpu_began = cpu_seconds()
                    took = (
                        stage(table, out, mode, options.threads)
                        if who == "stage 00"
                        else peer(python, table, out, mode, options.threads)
                    )
                    seconds[who, mode].append(took)
                    cpu[who, mode].append(cpu_seconds() - cpu_began)
                    shutil.rmtree(out)
    print(f"{options.count:,} URLs, {options.threads} at once, {options.latency_s * 1000:g} ms latency, ", end="")
    print(f"median of {options.rounds} rounds\n")
    print("| | | URLs/s | so many times as fast | CPU, ms a URL, with start-up |\n|---|---|---|---|---|")
    met = True
    for mode in MODES:
        pairs = list(zip(seconds["img2dataset", mode], seconds["stage 00", mode], strict=True))
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        met = met and ratio >= 1
        for who in ("stage 00", "img2dataset"):
            rate = options.count / statistics.median(seconds[who, mode])
            cpu_ms = 1000 * statistics.median(cpu[who, mode]) / options.count
            print(f"| {mode} | {who} | {rate:.0f} | {f'{ratio:.2f}' if who == 'stage 00' else ''} | {cpu_ms:.2f} |")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
