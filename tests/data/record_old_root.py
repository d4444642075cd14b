#!/usr/bin/env python3
"""Records ``old_root/``: a root that an earlier version of the stages left half done.

    python tests/data/record_old_root.py CHECKOUT

CHECKOUT is a checkout of that version; what is committed was recorded with the last version before the package was
sorted into subpackages.  Three source shards of three samples each; then stages 01 and 02 of the checkout run over two
of them, and stages 03 and 04 over the first.  Stage 02 is ended in the middle of the second shard, so that a checkpoint
holds the reply to one of its two questions.  Names of hosts are taken out of the receipts.

``test_old_root.py`` goes on from there with the present version.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.servers import ollama_stub
from tests.shards import plain, write_shard

ROOT = Path(__file__).parent / "old_root"
MTIME_NS = 1_700_000_000_000_000_000  # of all files: some inputs are known by size and time, which git does not keep
CAPTIONS = {
    "00000000": ("A woman walks her dog along the beach", "A red house by the lake", "An old man reads a newspaper"),
    "00000001": ("A boy plays football in the park", "A bowl of fruit", "Two girls on a swing ONCE-HANG in the garden"),
    "00000002": ("A nurse smiles in a hospital corridor", "A wooden table", "A farmer stands beside his tractor"),
}
FLAGS = {
    "01_filter_noface": ["--input", "shards", "--output", "captions", "--edits", "edits", "--detector", "recorded"],
    "02_captions_processor": ["--input", "captions", "--output", "prompts", "--api", "ollama", "--timeout", "2"],
    "03_generate_images_multigpu": [
        *["--prompts", "prompts", "--edits", "edits", "--embedded"],
        *["--height", "64", "--width", "64", "--batch_size", "2"],
    ],
    "04_reshard": ["--input", "shards", "--edits", "edits", "--prompts", "prompts", "--output", "hybrid"],
}


def write_sources(root: Path) -> None:
    """The second sample of each shard has no face."""
    for shard, captions in CAPTIONS.items():
        samples = {}
        for number, caption in enumerate(captions):
            boxes = [] if number == 1 else [[0.1, 0.1, 0.5, 0.5]]
            metadata = {"caption": caption, "face_bboxes": boxes, "uid": f"{shard}{number:024d}"}
            samples[f"{shard}{number}"] = {
                "jpg": plain((40 * number, 90, 60), 16, "jpeg"),
                "json": json.dumps(metadata).encode(),
                "txt": caption.encode(),
            }
        write_shard(root / "shards" / f"{shard}.tar", samples)


def set_times(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(MTIME_NS, MTIME_NS))


def command(checkout: Path, stage: str, port: int, *more: str) -> list[str]:
    ports = ["--ports", str(port)] if stage.startswith("02") else []
    return [sys.executable, str(checkout / f"{stage}.py"), *FLAGS[stage], *ports, *more]


def record(checkout: Path) -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    write_sources(ROOT)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    with ollama_stub(slots=1) as port:

        def run(stage: str, shards: str) -> None:
            set_times(ROOT)
            subprocess.run(command(checkout, stage, port, "--shards", shards), cwd=ROOT, env=environment, check=True)

        run("01_filter_noface", "00000000,00000001")
        run("02_captions_processor", "00000000")
        with subprocess.Popen(
            command(checkout, "02_captions_processor", port, "--shards", "00000001", "--timeout", "60"),
            cwd=ROOT,
            env=environment,
        ) as process:
            while not any(path.stat().st_size for path in ROOT.glob("prompts/_partial/*/*/00000001.*")):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        assert process.returncode == 75, process.returncode
        run("03_generate_images_multigpu", "00000000")
        run("04_reshard", "00000000")
    for path in ROOT.rglob("_receipts/*/*/*.json"):
        receipt = json.loads(path.read_bytes())
        path.write_text(json.dumps({**receipt, "host": "node1"}, indent=2))


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve())
