#!/usr/bin/env python3
"""`curation verify` beside `sha256sum` of the same hybrid shards, in one run.

Both are measured in seconds of CPU, user and system, with everything in the page cache, and bandwidth is the hybrid
shards' bytes over those: what a core does.  verify reads the source beside the hybrid, compares every byte, and hashes
the hybrid twice (SHA-256 for the manifest, xxh3-128 for the receipt); sha256sum does one of these.  The shards are of
10,000 samples with 10 % of them edited, written by stage 04 itself.  `openssl`'s SHA-256, which Python's hashlib and so
verify use, is shown as well: where the processor has instructions for it, it is the faster of the two.

Aim: at least half of sha256sum's bandwidth per core, with one process and with two.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_reshard import SHARD, make_input
from measuring import (
    ROOT,
    VERDICTS,
    cpu_seconds,
    example_jpegs,
    exit_code,
    make_parser,
    parse,
    print_table,
    run_stage,
    write_shard,
)

AIM = 0.5
SHARDS = 6
PROCESSES = 2
_OPENSSL = """
import hashlib, sys
buffer = bytearray(1 << 20)
for path in sys.argv[1:]:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    print(digest.hexdigest())
"""


def make_dataset(folder: Path, samples: int) -> None:
    """shards/, edits/ and hybrid/ with ``SHARDS`` shards each; every tenth sample is edited, with a whole picture."""
    make_input(folder, samples, 0.1)
    write_edits(folder / f"shards/{SHARD}.tar", folder / f"edits/{SHARD}.tar")
    for name in ("shards", "edits"):
        for number in range(1, SHARDS):
            os.link(folder / name / f"{SHARD}.tar", folder / name / f"{number:08d}.tar")
    folders = ("--input", folder / "shards", "--edits", folder / "edits", "--output", folder / "hybrid")
    run_stage("04_reshard", *folders, "--edits_layout", "tar")


def write_edits(source: Path, target: Path) -> None:
    """Edits that say the truth about themselves, as verify asks of them; the pictures are the examples'."""
    from curation.edits import edited_metadata, json_of, txt_of
    from curation.images import image_size
    from curation.tar.samples import read_samples

    pictures = example_jpegs()
    numbers = {"seed": 0, "steps": 4, "guidance": 0.0, "text_tokens": None, "size": [384, 384], "quality": 90}
    prompt = "A portrait of someone"
    texts = {"prompt": prompt, "prompt_suffix": "", "negative_prompt": "", "group": None}
    made = {"models": {"image": {"name": "none", "revision": "1"}}, "stages": {"03_generate_images": 1}}

    def edits() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, sample in enumerate(read_samples(source, {"json"})):
            if number % 10 == 3:
                jpg = pictures[number // 10 % len(pictures)]
                sha256 = hashlib.sha256(jpg).hexdigest()
                curation = {**texts, **made, **numbers}
                metadata = edited_metadata(json.loads(sample.members["json"]), curation, sha256, *image_size(jpg))
                yield sample.key, {"jpg": jpg, "txt": txt_of(prompt), "json": json_of(metadata)}

    write_shard(target, edits())


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds of CPU, wall-clock seconds) of a command and its children."""
    before = cpu_seconds(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    wall_s = time.perf_counter() - began
    if code != 0:
        raise SystemExit(f"{command[:4]} ended with {code}")
    return cpu_seconds(resource.RUSAGE_CHILDREN) - before, wall_s


def verify_command(folder: Path, workers: int) -> list[str]:
    folders = [f"{folder}/shards", f"{folder}/hybrid", "--edits", f"{folder}/edits"]
    return [sys.executable, "-m", "curation", "verify", *folders, "--quiet", "--json", "--workers", str(workers)]


def main() -> int:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser, samples=20, rounds=1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_dataset(folder, options.samples)
        tars = [str(path) for path in sorted((folder / "hybrid").glob("*.tar"))]
        size = sum(os.path.getsize(path) for path in tars)
        commands = {
            "sha256sum": ["sha256sum", *tars],
            "openssl's SHA-256": [sys.executable, "-c", _OPENSSL, *tars],
            "verify, 1 process": verify_command(folder, 1),
            f"verify, {PROCESSES} processes": verify_command(folder, PROCESSES),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                seconds[name].append(measure(command))
    about = f"{SHARDS} hybrid shards of {options.samples:,} samples, {size / 1e6:,.0f} MB"
    print(f"{about}; medians of {options.rounds} rounds\n")
    met, rows = True, []
    base = [cpu for cpu, _ in seconds["sha256sum"]]
    for name, pairs in seconds.items():
        cpu, wall = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratios = [one / own for one, (own, _) in zip(base, pairs, strict=True)]
        ratio, aimed = statistics.median(ratios), name.startswith("verify")
        met = met and (not aimed or ratio >= AIM)
        aim = (f">= {AIM}", VERDICTS[ratio >= AIM]) if aimed else ("", "")
        spread = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append((name, f"{cpu:.2f}", f"{size / cpu / 1e6:,.0f}", spread, f"{wall:.2f}", *aim))
    columns = ["what", "CPU s", "MB/s a core", "of sha256sum (rounds)", "wall-clock s", "aim", ""]
    print_table(columns, rows)
    return exit_code(met, options)


if __name__ == "__main__":
    sys.exit(main())
