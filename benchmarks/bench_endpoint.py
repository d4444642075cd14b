#!/usr/bin/env python3
"""Stage 05 with a model server: the share of the server's slots that have nothing to do, in one run with a plain loop.

The server has 32 slots and answers in 0.35 to 0.85 s, one answer in a hundred in 1.8 s, whatever it is asked.  The
stage captions small images of three shards, from tar to JSONL.  A slot's idle time counts from the time at which every
slot was busy once until the last request came.  Aim: less than 0.02 of the slots' time is lost.

The plain loop beside it asks 32 questions at once and waits for all of them before it goes on, as the stage did before.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measuring import exit_code, make_parser, parse, print_table, run_stage, write_shard
from PIL import Image

from curation.serving.connection import post
from curation.serving.session import Session
from tests.servers import ollama_stub

SLOTS, LATENCY_S, LOST_AIM = 32, 0.6, 0.02
MODEL, STAGE = "tulu3:fairclip", "05_recaption"


def small_images(count: int) -> list[bytes]:
    made = []
    rng = np.random.default_rng(0)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(buffer, "jpeg")
        made.append(buffer.getvalue())
    return made


def lost_share(log: Path) -> tuple[float, float]:
    """The share of the slots' time that was lost, and the requests a second, from what the server wrote."""
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    steady = asked[len(asked) // 4 :]
    seconds = steady[-1]["at"] - steady[0]["at"]
    return sum(line["idle_s"] for line in steady[1:]) / (SLOTS * seconds), len(steady) / seconds


def measured(latency_s: float, ask_all: Callable[[int], None]) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "requests.jsonl"
        with ollama_stub(api="openai", slots=SLOTS, latency_s=latency_s, uneven=True, log=log) as port:
            ask_all(port)
        return lost_share(log)


def the_stage(shards: Path, batch: object) -> Callable[[int], None]:
    def ask_all(port: int) -> None:
        with tempfile.TemporaryDirectory() as out:
            flags = ["--input", shards, "--output", out, "--model", f"endpoint:{MODEL}", "--ports", port]
            run_stage(STAGE, *flags, "--batch_size", batch)

    return ask_all


def plain_loop(images: int) -> Callable[[int], None]:
    def ask_all(port: int) -> None:
        def ask(number: int) -> None:
            body = {"model": MODEL, "messages": [{"role": "user", "content": f"Number {number}"}]}
            with Session() as session:
                post(session, f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), 60.0)

        with ThreadPoolExecutor(SLOTS) as threads:
            for start in range(0, images, SLOTS):
                list(threads.map(ask, range(start, min(start + SLOTS, images))))

    return ask_all


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--latency_s", type=float, default=LATENCY_S)
    options = parse(parser, images=48, latency_s=0.05)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        images = [(f"{number:06d}", {"jpg": image}) for number, image in enumerate(small_images(options.images))]
        for number in range(3):
            write_shard(Path(folder) / f"{number:08d}.tar", images[number::3])
        asked = {
            "stage 05, --batch_size auto": the_stage(Path(folder), "auto"),
            f"stage 05, --batch_size {SLOTS}": the_stage(Path(folder), SLOTS),
            "plain loop, batch by batch": plain_loop(options.images),
        }
        measured_shares = {name: measured(options.latency_s, ask_all) for name, ask_all in asked.items()}
    rows = [(name, f"{rate:.1f}", f"{lost:.1%}") for name, (lost, rate) in measured_shares.items()]
    print_table(["", "requests/s", "slots' time lost"], rows)
    return exit_code(measured_shares["stage 05, --batch_size auto"][0] < LOST_AIM, options)


if __name__ == "__main__":
    sys.exit(main())
