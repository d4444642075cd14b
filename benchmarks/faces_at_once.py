#!/usr/bin/env python3
"""SCRFD on a CPU: one picture at a time in onnxruntime against many at once in torch, seconds of one core a picture.

The network is insightface's SCRFD-10GF with random weights, 640 × 640.  Seconds of the process's time are counted, so
that other work on the machine disturbs little.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from measuring import make_parser, parse, print_table

from curation.backends.faces.scrfd import Backend
from curation.faces import DetectorSettings
from tests.backends.tiny_extractors import save_scrfd_onnx


def seconds(call: Callable[[], object], rounds: int) -> float:
    """The least time of this process that a call takes, after one that is not counted."""
    call()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=640, help="pixels of the network's square")
    options = parse(parser, rounds=1, side=64)
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = DetectorSettings(save_scrfd_onnx(Path(folder) / "scrfd.onnx"), options.side, 0.9)
        alone = Backend(settings)
        rows = [("onnxruntime, one picture", f"{seconds(lambda: alone.detect(picture), options.rounds):.3f}")]
        for size in (1, 4, 8):
            batched = Backend(replace(settings, batch_size=size)).batched
            assert batched is not None
            fitted = [batched.fit(picture)] * size

            def call(look: Callable[..., object] = batched.detect_all, images: object = fitted) -> object:
                return look(images)

            rows.append((f"torch, {size} at once", f"{seconds(call, options.rounds) / size:.3f}"))
    print_table(["", "seconds a picture"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
