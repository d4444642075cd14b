#!/usr/bin/env python3
"""SCRFD on a CPU: one picture at a time in onnxruntime against many at once in torch, seconds of one core a picture.

The network is insightface's SCRFD-10GF with random weights, 640 × 640.  Seconds of the process's time are counted, so
that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=640, help="pixels of the network's square")
    options = parser.parse_args()
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        settings = DetectorSettings(save_scrfd_onnx(Path(folder) / "scrfd.onnx"), options.side, 0.9)
        alone = Backend(settings)
        print(f"onnxruntime, one picture: {seconds(lambda: alone.detect(picture), options.rounds):.3f} s a picture")
        for size in (1, 4, 8):
            batched = Backend(replace(settings, batch_size=size)).batched
            assert batched is not None
            fitted = [batched.fit(picture)] * size

            def call(look: Callable[..., object] = batched.detect_all, images: object = fitted) -> object:
                return look(images)

            print(f"torch, {size} at once: {seconds(call, options.rounds) / size:.3f} s a picture")


if __name__ == "__main__":
    main()
