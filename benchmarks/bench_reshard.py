#!/usr/bin/env python3
"""Stage 04 beside `cp`, Python's tarfile and webdataset, in one run.  One shard of 10,000 samples, 10 % of them edited.

The stage is the real one, through the runner: claim, digest, fsync, receipt, commit.  `cp` is followed by an fsync of
its copy; tarfile and webdataset do the same edits and an fsync.  All read from a warm cache; start-up (imports, the
command line) is taken off.  Each has a process of its own.  Rounds alternate, so that a busy machine slows all alike;
the median of the rounds' ratios counts.

CPU time is user and system time of the process and its children.  Unlike the seconds on the clock, it hardly depends on
what else the machine does.  "Two at once" are two processes that work side by side, each on an output of its own.

With ``--pax`` each member of the shard has a pax header with a time that is no whole number, as webdataset writes it.

Aims: at least 0.95 of cp's bandwidth, alone and two at once, at most 2 times cp's CPU time, 5 times tarfile, 9 times
webdataset, and a peak of memory under 150 MB that does not grow with the shard.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from measuring import (
    ROOT,
    cpu_seconds,
    example_jpegs,
    exit_code,
    make_parser,
    median_ratio,
    parse,
    print_table,
    write_shard,
)

SHARD = "00000000"
AIMS = {"cp + fsync": 0.95, "tarfile": 5.0, "webdataset": 9.0}
CPU_AIM, TWO_AIM = 2.0, 0.95  # times cp's CPU time; of the bandwidth of two copies
COPY, STAGE, MIXED = "cp + fsync", "stage 04", "stage 04 --mix"
MEMORY_AIM_MB = 150
MTIME = 1_700_000_000


# ---- the shard and its edits


def make_input(folder: Path, count: int, share: float, *, pax: bool = False) -> None:
    """shards/<shard>.tar with ``count`` samples of about 35 kB, edits/<shard>.tar for ``share`` of them, and in
    recaptions/ a row for each sample, with the fields that stage 05 writes.

    pax: write the shard with pax headers.
    """
    dice, payload = random.Random(1), memoryview(b"".join(example_jpegs()))  # real data, for pictures of any size

    def picture() -> memoryview:
        size = dice.randint(15_000, 55_000)
        begin = dice.randrange(len(payload) - size)
        return payload[begin : begin + size]

    edited: dict[str, dict[str, bytes | memoryview]] = {}
    rows: list[bytes] = []

    def samples() -> Iterator[tuple[str, dict[str, bytes | memoryview]]]:
        for number in range(count):
            key = f"{dice.getrandbits(128):032x}-0"
            metadata = {"uid": key[:32], "face_bboxes": [], "caption": "A photo of something", "exif": "x" * 500}
            metadata["sha256"] = f"{dice.getrandbits(256):064x}"
            row = {
                "key": key,
                "shard": SHARD,
                "url": "https://example.org/" + key,
                "caption": "A photo of " + "a thing " * 12,
            }
            rows.append(json.dumps(metadata | row | {"extra": {"exif": metadata["exif"]}}).encode() + b"\n")
            text = json.dumps(metadata, indent=4).encode()
            yield key, {"jpg": picture(), "json": text, "txt": b"A photo of something"}
            if number % round(1 / share) == 3:
                edit = json.dumps(metadata | {"curation": {"prompt": "y" * 300}}).encode()
                edited[key] = {"jpg": b"\xff\xd8\xff" + picture(), "txt": b"A portrait of someone", "json": edit}

    (with_pax_headers if pax else write_shard)(folder / f"shards/{SHARD}.tar", samples(), MTIME)
    write_shard(folder / f"edits/{SHARD}.tar", edited.items())
    (folder / "recaptions/rows").mkdir(parents=True, exist_ok=True)
    (folder / f"recaptions/rows/{SHARD}.jsonl").write_bytes(b"".join(rows))


def with_pax_headers(path: Path, samples: Iterable[tuple[str, dict[str, bytes | memoryview]]], mtime: int) -> None:
    """``write_shard``, as ``webdataset.TarWriter`` does it: with the moment in which each sample is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, (key, members) in enumerate(samples):
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime = len(data), mtime + number / 997
                tar.addfile(info, io.BytesIO(data))


# ---- the contenders: each writes ``output`` from shards/ and edits/


def stage(folder: Path, output: Path, **more: str) -> None:
    from curation.run.runner import run_stage
    from curation.shards import discover

    module = importlib.import_module("04_reshard")
    options = module.Options(input=f"{folder}/shards", edits=f"{folder}/edits", output=str(output), quiet=True, **more)
    if run_stage(module.Reshard(options), options, discover(options.input)) != 0:
        raise SystemExit("the stage failed")


def with_mix(folder: Path, output: Path) -> None:
    stage(folder, output, captions=f"{folder}/recaptions", mix="0.3:web,0.7:synthetic")


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

    output: The name of its output's folder.
    """

    def __init__(self, name: str, folder: Path, output: str = "output") -> None:
        command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--output", output]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds()

    def seconds(self) -> tuple[float, float]:
        """The seconds of a run on the clock, and of CPU time."""
        self.begin()
        return self.result()

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> tuple[float, float]:
        assert self._process.stdout is not None
        took, used = map(float, self._process.stdout.readline().split())
        return took, used

    def end(self) -> None:
        self._process.communicate()


def serve(contender: Callable[[Path, Path], None], folder: Path, output: str) -> None:
    """In the process of its own: a run for every line that comes in."""
    for _ in sys.stdin:
        print(*seconds_of(contender, folder, folder / output), flush=True)


def seconds_of(contender: Callable[[Path, Path], None], folder: Path, output: Path) -> tuple[float, float]:
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    os.sync()
    began, used = time.perf_counter(), cpu_seconds(*who)
    contender(folder, output)
    result = time.perf_counter() - began, cpu_seconds(*who) - used
    shutil.rmtree(output)
    return result


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


CONTENDERS = {COPY: cp, "tarfile": with_tarfile, "webdataset": with_webdataset, STAGE: stage, MIXED: with_mix}


def measure(folder: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """By contender, one after the other in each round: seconds, seconds of CPU time, and seconds of two at once."""
    apart = {name: Apart(name, folder) for name in CONTENDERS}
    second = {name: Apart(name, folder, "second") for name in (COPY, STAGE)}
    clock, cpu, two = ({name: list[float]() for name in CONTENDERS} for _ in range(3))
    for _ in range(rounds):
        for name, contender in apart.items():
            took, used = contender.seconds()
            clock[name].append(took)
            cpu[name].append(used)
        for name, other in second.items():
            apart[name].begin()
            other.begin()
            two[name].append(max(apart[name].result()[0], other.result()[0]))
    for contender in (*apart.values(), *second.values()):
        contender.end()
    return clock, cpu, two


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pax", action="store_true", help="a pax header for every member of the shard")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", default="output", help=argparse.SUPPRESS)
    options = parse(parser, samples=60, rounds=1)
    if options.contender:
        serve(CONTENDERS[options.contender], options.folder, options.output)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_input(folder, options.samples, 0.1, pax=options.pax)
        size = (folder / f"shards/{SHARD}.tar").stat().st_size
        same_members(folder)
        seconds, cpu, two = measure(folder, options.rounds)
        memory = peak_mb(folder)
        shutil.rmtree(folder / "shards")
        shutil.rmtree(folder / "edits")
        make_input(folder, 4 * options.samples, 0.1, pax=options.pax)
        memory_of_larger = peak_mb(folder)
    ratios = {name: median_ratio(seconds[name], seconds["stage 04"]) for name in AIMS if name in seconds}
    cpu_ratio, two_ratio = median_ratio(cpu[STAGE], cpu[COPY]), median_ratio(two[COPY], two[STAGE])
    met = all(ratio >= AIMS[name] for name, ratio in ratios.items()) and memory_of_larger < MEMORY_AIM_MB
    met = met and cpu_ratio <= CPU_AIM and two_ratio >= TWO_AIM
    mixed = median_ratio(seconds[MIXED], seconds[STAGE]), median_ratio(cpu[MIXED], cpu[STAGE])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    if options.json:
        figures = {"bytes": size, "seconds": seconds, "cpu": cpu, "two": two, "ratios": ratios}
        figures |= {"mix": mixed, "cpu_ratio": cpu_ratio, "two_ratio": two_ratio, "peak_mb": [memory, memory_of_larger]}
        print(json.dumps(figures))
        return exit_code(met, options)
    print(f"{options.samples:,} samples, {size / 1e6:.0f} MB, median of {options.rounds} rounds\n")
    rows = []
    for name, median in medians.items():
        ratio = (f"{ratios[name]:.2f}", f"{AIMS[name]:g}") if name in ratios else ("", "")
        used = f"{statistics.median(cpu[name]):.3f}"
        rows.append((name, f"{median:.3f}", f"{size / median / 1e6:.0f}", used, *ratio))
    print_table(["", "seconds", "MB/s", "CPU seconds", "stage 04 is so many times as fast", "aim"], rows)
    print(f"\nCPU time of stage 04: {cpu_ratio:.2f} times that of cp + fsync (aim: at most {CPU_AIM:g}).")
    print(
        f"With captions mixed: {mixed[0]:.2f} times the seconds of stage 04 without, {mixed[1]:.2f} times its CPU time."
    )
    print(f"Two at once: {two_ratio:.2f} of the bandwidth of two copies (aim: {TWO_AIM:g}).")
    print(f"\nPeak memory: {memory:.0f} MB; on a shard four times as large {memory_of_larger:.0f} MB (aim: under 150).")
    return exit_code(met, options)


if __name__ == "__main__":
    sys.exit(main())
