#!/usr/bin/env python3
"""Stage 00 beside img2dataset, on the same web server of real photos in one run.  5,000 URLs on 50 hosts (--hosts).

Both write webdataset tars with captions, in one process with the same number of threads: images kept as they came
without a look into them; decoded and kept (img2dataset encodes anew what is no JPEG); decoded, resized to 256 pixels
(keep_ratio) and encoded as JPEG.  The stage runs twice: with --opt_out ignore it sends the same requests as
img2dataset, with respect two more for each host, for robots.txt and TDMRep, which the server does not have.  The ratio
counts for the former; for the latter it says what the look-ups cost.  Start-up is part of neither: img2dataset's is
taken from its own statistics, the stage's from its receipts.  Rounds alternate, and the median of the rounds' ratios
counts.

img2dataset lives in an environment of its own, which this script makes once (--venv), because its pins (webdataset<0.3,
pandas<3) are not this project's.  Aim: at least its speed in each.
"""

from __future__ import annotations

import functools
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

from measuring import ROOT, StageReceipts, cpu_seconds, exit_code, make_parser, median_ratio, parse, print_table

PEER = "img2dataset==1.47.0"
ROWS_PER_SHARD = 1000
# What is done to an image: the stage's flags, img2dataset's flags.
MODES = {
    "kept, not decoded": (["--image_check", "header"], ["--disable_all_reencoding", "True"]),
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


def host(number: int) -> str:
    """An address of this machine: all of 127.0.0.0/8 are."""
    return f"127.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def write_table(path: Path, port: int, count: int, hosts: int) -> None:
    import pyarrow
    from pyarrow.parquet import write_table as write

    urls = [f"http://{host(1 + i % hosts)}:{port}/photo/{i}" for i in range(count)]
    write(pyarrow.table({"url": urls, "caption": [f"photo {i}" for i in range(count)]}), path)


def stage(opt_out: str, table: Path, output: Path, mode: str, threads: int) -> float:
    command = [sys.executable, str(ROOT / "00_download.py"), "--input", str(table), "--output", str(output), "--quiet"]
    command += ["--allow_private", "127.0.0.0/8", "--threads", str(threads)]
    command += ["--opt_out", opt_out, "--workers", "1", "--rows_per_shard", str(ROWS_PER_SHARD)]
    command += MODES[mode][0]
    subprocess.run(command, check=True, env=quiet_environment())
    receipts = StageReceipts.read(output, "00_download")
    if receipts.count("kept") != receipts.count("in"):
        raise SystemExit(f"{receipts.count('in') - receipts.count('kept')} images were not kept")
    return receipts.seconds


def peer(python: Path, table: Path, output: Path, mode: str, threads: int) -> float:
    code = "from img2dataset.main import main; main()"
    command = [str(python), "-c", code, "--url_list", str(table), "--output_folder", str(output)]
    command += ["--input_format", "parquet", "--output_format", "webdataset", "--caption_col", "caption"]
    command += ["--processes_count", "1", "--thread_count", str(threads), "--enable_wandb", "False"]
    command += ["--number_sample_per_shard", str(ROWS_PER_SHARD)]
    command += MODES[mode][1]
    subprocess.run(command, check=True, env=quiet_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stats = [json.loads(path.read_bytes()) for path in output.glob("*_stats.json")]
    if sum(s["successes"] for s in stats) != sum(s["count"] for s in stats):
        raise SystemExit(f"img2dataset did not keep every image: {stats}")
    return float(max(s["end_time"] for s in stats) - min(s["start_time"] for s in stats))


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--latency_s", type=float, default=0.02, help="of the server, before it answers")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-img2dataset")
    options = parse(parser, count=40, rounds=1, threads=8, latency_s=0.0)
    from tests.servers import photo_server

    contenders = {f"stage 00, {what}": functools.partial(stage, what) for what in ("ignore", "respect")}
    if options.tiny and not (options.venv / ".installed").exists():
        print("img2dataset is not installed, and a tiny run installs nothing: it is left out\n")
    else:
        contenders["img2dataset"] = functools.partial(peer, make_peer(options.venv))
    seconds: dict[tuple[str, str], list[float]] = {(who, m): [] for m in MODES for who in contenders}
    cpu: dict[tuple[str, str], list[float]] = {key: [] for key in seconds}
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        photo_server(ROOT / "examples" / "shards", options.latency_s) as port,
    ):
        folder = Path(name)
        table = folder / "urls.parquet"
        write_table(table, port, options.count, options.hosts)
        for _ in range(options.rounds):
            for mode in MODES:
                for who, contender in contenders.items():
                    out = folder / "out"
                    before = cpu_seconds(resource.RUSAGE_CHILDREN)
                    seconds[who, mode].append(contender(table, out, mode, options.threads))
                    cpu[who, mode].append(cpu_seconds(resource.RUSAGE_CHILDREN) - before)
                    shutil.rmtree(out)
    print(f"{options.count:,} URLs on {options.hosts:,} hosts, {options.threads} at once, ", end="")
    print(f"{options.latency_s * 1000:g} ms latency, median of {options.rounds} rounds\n")
    met, rows = True, []
    for who, mode in sorted(seconds, key=lambda key: list(MODES).index(key[1])):
        ratio = ""
        if who != "img2dataset" and "img2dataset" in contenders:
            times = median_ratio(seconds["img2dataset", mode], seconds[who, mode])
            met, ratio = met and (times >= 1 or who.endswith("respect")), f"{times:.2f}"
        rate = options.count / statistics.median(seconds[who, mode])
        cpu_ms = 1000 * statistics.median(cpu[who, mode]) / options.count
        rows.append((mode, who, f"{rate:.0f}", ratio, f"{cpu_ms:.2f}"))
    print_table(["", "", "URLs/s", "speed-up", "CPU, ms per URL, with start-up"], rows)
    return exit_code(met, options)


if __name__ == "__main__":
    sys.exit(main())
