"""What the benchmarks share: options, photos, shards, receipts, a process for each contender, and tables.

A **contender** is one of the things that are compared: the stage, another program that does the same (a peer), a plain
loop, or what limits them all.  Contenders take turns in **rounds**, so that a busy machine slows all of them alike.  An
**aim** is the figure that the stage should reach; a benchmark ends with 1 where it does not.

Every benchmark has a **tiny** size (``--tiny``), which tells whether its code still runs, and nothing about speed.

Import this module first: it makes the project importable.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from curation.shards import Shard, discover
from curation.tar.samples import Sample, TarWriter, read_samples

VERDICTS = {True: "met", False: "**missed**", None: "not measured"}  # of an aim


# ---- options and the exit code


def make_parser(documentation: str | None, *, memory: bool = False) -> argparse.ArgumentParser:
    """Returns a parser with the flags that every benchmark has.

    Args:
        documentation: The benchmark's own docstring, shown by ``--help``.
        memory: Whether the default of ``--folder`` is a filesystem in memory instead of the temporary folder.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("/dev/shm")
    folder = shared if memory and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=folder, help=f"where to work; default: {folder}")
    parser.add_argument("--tiny", action="store_true", help="a tiny size: tells whether the code runs, not a speed")
    return parser


def parse(parser: argparse.ArgumentParser, **tiny: object) -> argparse.Namespace:
    """Parses the command line; with ``--tiny`` the values of ``tiny`` are the defaults."""
    options = parser.parse_args()
    if options.tiny:
        parser.set_defaults(**tiny)
        options = parser.parse_args()
    return options


def exit_code(met: bool, options: argparse.Namespace) -> int:
    """Returns 1 where an aim was missed; a tiny run has no aim."""
    return 0 if met or options.tiny else 1


# ---- photos and shards


def example_samples() -> list[Sample]:
    """Returns the samples of the example shards, in their order."""
    return [sample for tar in sorted((ROOT / "examples" / "shards").glob("*.tar")) for sample in read_samples(tar)]


def example_jpegs() -> list[bytes]:
    """Returns the example shards' JPEG files as they lie there."""
    return [sample.members["jpg"] for sample in example_samples() if "jpg" in sample.members]


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes | memoryview]]], mtime: int = 0) -> None:
    """Writes a durable tar of (key, suffix → bytes), so that it may be dropped from the page cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        tar = TarWriter(file)
        for key, members in samples:
            for suffix, data in members.items():
                tar.add(f"{key}.{suffix}", data, mtime)
        tar.close()
        file.flush()
        os.fsync(file.fileno())


def make_empty_shards(folder: Path, count: int) -> list[Shard]:
    """Makes files that have a shard's name and no content, and finds them as a stage does."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:08d}.tar").touch()
    return discover(str(folder))


# ---- a stage and its receipts


def run_stage(script: str, *flags: object) -> None:
    """Runs a numbered script in this process; SystemExit where it does not end with 0."""
    code = importlib.import_module(script).main([*map(str, flags), "--quiet"])
    if code != 0:
        raise SystemExit(f"{script} ended with {code}")


@dataclass(frozen=True)
class StageReceipts:
    """The receipts that a stage left."""

    receipts: Sequence[dict[str, Any]]

    @staticmethod
    def read(output: Path, stage: str) -> StageReceipts:
        paths = output.glob(f"_receipts/{stage}/*/*.json")
        return StageReceipts([json.loads(path.read_bytes()) for path in sorted(paths)])

    @property
    def seconds(self) -> float:
        """From the first shard's start to the last one's commit: start-up is not in it."""
        return float(max(r["finished"] for r in self.receipts) - min(r["started"] for r in self.receipts))

    @property
    def phases(self) -> Counter[str]:
        """Phase → seconds, of all shards together."""
        total: Counter[str] = Counter()
        for receipt in self.receipts:
            total.update(receipt["seconds"])
        return total

    def count(self, what: str) -> int:
        """Samples that came ``in`` or were ``kept``."""
        return sum(receipt["counts"][what] for receipt in self.receipts)


def tell_phases(phases: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in sorted(phases.items()))


# ---- measuring


Contender = Callable[[str, argparse.Namespace], dict[str, Any]]  # its name and the options → its figures


def run_apart(contender: Contender, role: str, options: argparse.Namespace, **changed: object) -> dict[str, Any]:
    """Runs one contender in a process of its own, by this benchmark's command line with ``--role``.

    They are apart because the computing threads of one process disturb each other's OpenMP teams.  A tiny run stays in
    this process, which saves the imports.

    Args:
        contender: Called as ``contender(role, options)``; the benchmark's ``main`` prints what it returns as JSON.
        role: Which contender it is.
        options: Those of this process; ``threads`` are the contender's.
        changed: Options that differ for the contender.
    """
    if options.tiny:
        return contender(role, argparse.Namespace(**{**vars(options), **changed}))
    flags = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *sys.argv, "--role", role, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{role}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cpu_seconds(*who: int) -> float:
    """User and system time of ``resource.RUSAGE_SELF``, ``RUSAGE_CHILDREN`` (those that have ended), or both."""
    used = [resource.getrusage(one) for one in who]
    return sum(one.ru_utime + one.ru_stime for one in used)


def median_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


# ---- what is printed


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a Markdown table: the first column to the left, the others to the right."""
    print(f"| {' | '.join(columns)} |")
    print(f"|---|{'---:|' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
