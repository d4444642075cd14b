#!/usr/bin/env python3
"""Stage 04 beside `cp`, Python's tarfile and webdataset, in one run.  One shard of 10,000 samples, 10 % of them edited.

The stage is the real one, through the runner: claim, digest, fsync, receipt, commit.  `cp` is followed by an fsync of
its copy; tarfile and webdataset do the same edits and an fsync.  All read from a warm cache; start-up (imports, the
command line) is taken off.  Each has a process of its own.  Rounds alternate, so that a busy machine slows all alike;
the median of the rounds' ratios counts.

Aims: at least 0.9 of cp's bandwidth, 5 times tarfile, 9 times webdataset, and a peak of memory under 150 MB that does
not grow with the shard.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from measuring import ROOT, example_jpegs, exit_code, make_parser, median_ratio, parse, print_table, write_shard

SHARD = "00000000"
AIMS = {"cp + fsync": 0.9, "tarfile": 5.0, "webdataset": 9.0}
MEMORY_AIM_MB = 150
MTIME = 1_700_000_000


# ---- the shard and its edits


def make_input(folder: Path, count: int, share: float) -> None:
    """shards/<shard>.tar with ``count`` samples of about 35 kB, and edits/<shard>.tar for ``share`` of them."""
    dice, payload = random.Random(1), memoryview(b"".join(example_jpegs()))  # real data, for pictures of any size

    def picture() -> memoryview:
        size = dice.randint(15_000, 55_000)
        begin = dice.randrange(len(payload) - size)
        return payload[begin : begin + size]

    edited: dict[str, dict[str, bytes | memoryview]] = {}

    def samples() -> Iterator[tuple[str, dict[str, bytes | memoryview]]]:
        for number in range(count):
            key = f"{dice.getrandbits(128):032x}-0"
            metadata = {"uid": key[:32], "face_bboxes": [], "caption": "A photo of something", "exif": "x" * 500}
            text = json.dumps(metadata, indent=4).encode()
            yield key, {"jpg": picture(), "json": text, "txt": b"A photo of something"}
            if number % round(1 / share) == 3:
                edit = json.dumps(metadata | {"curation": {"prompt": "y" * 300}}).encode()
                edited[key] = {"jpg": b"\xff\xd8\xff" + picture(), "txt": b"A portrait of someone", "json": edit}

    write_shard(folder / f"shards/{SHARD}.tar", samples(), MTIME)
    write_shard(folder / f"edits/{SHARD}.tar", edited.items())


# ---- the contenders: each writes ``output`` from shards/ and edits/


def stage(folder: Path, output: Path) -> None:
    from curation.run.runner import run_stage
    from curation.shards import discover

    module = importlib.import_module("04_reshard")
    options = module.Options(input=f"{folder}/shards", edits=f"{folder}/edits", output=str(output), quiet=True)
    if run_stage(module.Reshard(options), options, discover(options.input)) != 0:
        raise SystemExit("the stage failed")


def cp(folder: Path, output: Path) -> None:
    output.mkdir()
    subprocess.run(["cp", f"{folder}/shards/{SHARD}.tar", f"{output}/{SHARD}.tar"], check=True)
    descriptor = os.open(output / f"{SHARD}.tar", os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def with_tarfile(folder: Path, output: Path) -> None:
    output.mkdir()
    with (
        tarfile.open(folder / f"edits/{SHARD}.tar") as edits,
        tarfile.open(folder / f"shards/{SHARD}.tar") as source,
        durable(output / f"{SHARD}.tar") as file,
        tarfile.open(fileobj=file, mode="w") as target,
    ):
        edited = {member.name: member for member in edits}
        for member in source:
            data = source.extractfile(member)
            if (edit := edited.get(member.name)) is not None:
                member.size, data = edit.size, edits.extractfile(edit)
            target.addfile(member, data)


def with_webdataset(folder: Path, output: Path) -> None:
    import webdataset

    output.mkdir()
    read = {"shardshuffle": False, "nodesplitter": None, "workersplitter": None}
    edits = {s["__key__"]: s for s in webdataset.WebDataset(f"{folder}/edits/{SHARD}.tar", **read)}
    with durable(output / f"{SHARD}.tar") as file, webdataset.TarWriter(file, encoder=False) as target:
        for sample in webdataset.WebDataset(f"{folder}/shards/{SHARD}.tar", **read):
            edit = edits.get(sample["__key__"], {})
            target.write({name: edit.get(name, data) for name, data in sample.items() if name not in WDS_OWN})


WDS_OWN = ("__url__", "__local_path__")


@contextlib.contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    with open(path, "wb", buffering=1 << 20) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


# ---- measuring


class Apart:
    """A contender in a process of its own: what the others have imported does not burden it.

    It warms up with one run; then each ``seconds()`` is one more.
    """

    def __init__(self, name: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds()

    def seconds(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def serve(contender: Callable[[Path, Path], None], folder: Path) -> None:
    """In the process of its own: a run for every line that comes in."""
    for _ in sys.stdin:
        print(seconds_of(contender, folder), flush=True)


def seconds_of(contender: Callable[[Path, Path], None], folder: Path) -> float:
    output = folder / "output"
    os.sync()
    began = time.perf_counter()
    contender(folder, output)
    took = time.perf_counter() - began
    shutil.rmtree(output)
    return took


def same_members(folder: Path) -> None:
    """The stage's output and tarfile's have the same names and bytes."""
    listings = []
    for contender in (stage, with_tarfile):
        contender(folder, folder / "output")
        with tarfile.open(folder / f"output/{SHARD}.tar") as tar:
            listings.append([(member.name, tar.extractfile(member).read()) for member in tar])  # type: ignore[union-attr]
        shutil.rmtree(folder / "output")
    if listings[0] != listings[1]:
        raise SystemExit("the stage's output is not tarfile's")


def peak_mb(folder: Path) -> float:
    """Peak memory of the stage in a process of its own."""
    code = (
        "import importlib, re, sys; sys.path.insert(0, '.'); "
        "code = importlib.import_module('04_reshard').main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    flags = ["--input", f"{folder}/shards", "--edits", f"{folder}/edits", "--output", f"{folder}/output", "--quiet"]
    command = [sys.executable, "-c", code, *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    shutil.rmtree(folder / "output")
    return int(result.stdout) / 1024


CONTENDERS = {"cp + fsync": cp, "tarfile": with_tarfile, "webdataset": with_webdataset, "stage 04": stage}


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by contender, one after the other in each round."""
    apart = {name: Apart(name, folder) for name in CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, contender in apart.items():
            seconds[name].append(contender.seconds())
    for contender in apart.values():
        contender.end()
    return seconds


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parse(parser, samples=60, rounds=1)
    if options.contender:
        serve(CONTENDERS[options.contender], options.folder)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_input(folder, options.samples, 0.1)
        size = (folder / f"shards/{SHARD}.tar").stat().st_size
        same_members(folder)
        seconds = measure(folder, options.rounds)
        memory = peak_mb(folder)
        shutil.rmtree(folder / "shards")
        shutil.rmtree(folder / "edits")
        make_input(folder, 4 * options.samples, 0.1)
        memory_of_larger = peak_mb(folder)
    ratios = {name: median_ratio(seconds[name], seconds["stage 04"]) for name in AIMS if name in seconds}
    met = all(ratio >= AIMS[name] for name, ratio in ratios.items()) and memory_of_larger < MEMORY_AIM_MB
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    if options.json:
        print(json.dumps({"bytes": size, "seconds": seconds, "ratios": ratios, "peak_mb": [memory, memory_of_larger]}))
        return exit_code(met, options)
    print(f"{options.samples:,} samples, {size / 1e6:.0f} MB, median of {options.rounds} rounds\n")
    rows = []
    for name, median in medians.items():
        ratio = (f"{ratios[name]:.2f}", f"{AIMS[name]:g}") if name in ratios else ("", "")
        rows.append((name, f"{median:.3f}", f"{size / median / 1e6:.0f}", *ratio))
    print_table(["", "seconds", "MB/s", "stage 04 is so many times as fast", "aim"], rows)
    print(f"\nPeak memory: {memory:.0f} MB; on a shard four times as large {memory_of_larger:.0f} MB (aim: under 150).")
    return exit_code(met, options)


if __name__ == "__main__":
    sys.exit(main())
