#!/usr/bin/env python3
"""Stage 03 beside the bare diffusers pipeline called in a loop at the same batch size: images a second, in one run.

Both use the embedded tiny pipeline on the CPU, with enough steps that the model takes nearly all of the time, the same
prompts, seeds, batches and threads.  The loop throws its pictures away; the stage reads prompts and metadata, encodes
JPEGs, checkpoints and publishes the tar.  Each runs in a process of its own; start-up (imports, loading, a first batch)
is left out.  Rounds alternate, so that a busy machine slows both alike; the medians are compared.  Aim: at least 0.95.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import StageReceipts, exit_code, make_parser, parse, print_table, run_apart, run_stage, tell_phases

AIM = 0.95


def make_input(root: Path, shards: int, images: int) -> list[tuple[str, str]]:
    """Prompts and metadata for ``shards`` × ``images`` samples; returns (key, prompt) in order."""
    samples = []
    for folder in ("prompts", "edits"):
        (root / folder).mkdir(parents=True)
    for shard in range(shards):
        keys = [f"{shard:06d}{number:06d}" for number in range(images)]
        prompts = {f"{key}.json": f"A photo of person {key} in a street" for key in keys}
        metadata = {name: {"caption": "before", "width": 512, "height": 512, "face_bboxes": []} for name in prompts}
        (root / f"prompts/{shard:08d}.json").write_text(json.dumps(prompts))
        (root / f"edits/{shard:08d}.json").write_text(json.dumps(metadata))
        samples += list(zip(keys, prompts.values(), strict=True))
    return samples


def time_bare_loop(pipeline: Any, samples: list[tuple[str, str]], side: int, steps: int, batch_size: int) -> float:
    """Seconds for the pipeline called batch after batch, as its documentation shows."""
    import torch

    from curation.generate.batches import seed_of

    began = time.perf_counter()
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        pipeline(
            prompt=[prompt for _, prompt in batch],
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=[torch.Generator("cpu").manual_seed(seed_of(0, key)) for key, _ in batch],
        )
    return time.perf_counter() - began


def time_stage(root: Path, side: int, steps: int, batch_size: int) -> tuple[float, Mapping[str, float]]:
    """Seconds from the first shard's start to the last one's commit, by the receipts; and the seconds of each phase."""
    flags: list[object] = ["--input", root / "prompts", "--output", root / "edits", "--embedded"]
    flags += ["--height", side, "--width", side, "--steps", steps, "--batch_size", batch_size]
    run_stage("03_generate_images_multigpu", *flags)
    receipts = StageReceipts.read(root / "edits", "03_generate_images")
    return receipts.seconds, receipts.phases


def measure(role: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: its seconds and phases."""
    work = (options.side, options.steps, options.batch_size)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        warm, root = Path(folder) / "warm", Path(folder) / "measured"
        warm_up = make_input(warm, 1, 2 * options.batch_size)
        samples = make_input(root, options.shards, options.images)
        if role == "stage":
            time_stage(warm, *work)
            seconds, phases = time_stage(root, *work)
        else:
            pipeline = load_embedded(options.threads)
            time_bare_loop(pipeline, warm_up, *work)
            seconds, phases = time_bare_loop(pipeline, samples, *work), {}
    return {"seconds": seconds, "phases": phases}


def load_embedded(threads: int) -> Any:
    import torch

    from curation.backends.generate.loading import load_pipeline
    from curation.backends.generate.tiny import build_embedded, embedded_source

    torch.set_num_threads(threads)
    source = embedded_source()
    build_embedded(source)
    return load_pipeline(source, "float32", "cpu")


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--images", type=int, default=40, help="images a shard")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads, in both")
    parser.add_argument("--role", choices=["bare", "stage"], help=argparse.SUPPRESS)
    options = parse(parser, shards=1, images=2, side=32, steps=1, batch_size=2, rounds=1)
    if options.role:
        print(json.dumps(measure(options.role, options)))
        return 0
    bare, staged = [], []
    for _ in range(options.rounds):
        bare.append(run_apart(measure, "bare", options))
        staged.append(run_apart(measure, "stage", options))
    count = options.shards * options.images
    loop, stage = (statistics.median(run["seconds"] for run in runs) for runs in (bare, staged))
    each = [one["seconds"] / other["seconds"] for one, other in zip(bare, staged, strict=True)]
    print(f"stage 03, {options.side}×{options.side}, {options.steps} steps, batch {options.batch_size}, ", end="")
    print(f"{options.threads} thread(s), {count} images in {options.shards} shards, {options.rounds} rounds")
    ratio = f"{loop / stage:.3f} (rounds {min(each):.3f} to {max(each):.3f})"
    rows = [("bare pipeline in a loop", f"{count / loop:.2f}", 1), ("stage 03", f"{count / stage:.2f}", ratio)]
    print()
    print_table(["", "images/s", "of the bare loop"], rows)
    print(f"\nphases of the last round: {tell_phases(staged[-1]['phases'])}")
    return exit_code(loop / stage >= AIM, options)


if __name__ == "__main__":
    sys.exit(main())
