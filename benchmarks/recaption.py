#!/usr/bin/env python3
"""Stage 05 beside a plain loop and beside the bare model on tensors prepared before: images a second, in one run.

All three caption the same photos with the same model (Florence-2's architecture, random weights, a fixed number of
tokens), in the same batches.  The plain loop does one thing after the other, as published scripts do: decode,
processor, ``generate``, batch by batch.  The stage reads the tar, decodes and prepares ahead, captions, checkpoints and
publishes.

On the CPU each is a process of its own whose model has ``--threads`` threads, and the stage prepares on the other cores
as it would beside a GPU.  Rounds alternate; the fastest of each is compared, since whatever else a machine does only
slows down.  Aims: the model waits for less than 0.05 of its time, and the stage does at least 0.97 of the bare model.

On a GPU: ``gpu.py``.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import florence2
from measuring import (
    StageReceipts,
    example_jpegs,
    exit_code,
    make_parser,
    parse,
    print_table,
    run_apart,
    run_stage,
    tell_phases,
    write_shard,
)

from curation.caption.captioner import CaptionSettings

MOST_WAITING, LEAST_OF_BARE = 0.05, 0.97
TASK = "<MORE_DETAILED_CAPTION>"


def make_shard(path: Path, images: int) -> None:
    """``images`` real photos in one shard, again and again."""
    photos = example_jpegs()
    write_shard(path, ((f"{n:08d}", {"jpg": photos[n % len(photos)], "txt": b"a photo"}) for n in range(images)))


# ---- the three


def batches_of(shard: Path, size: int) -> Iterator[list[Any]]:
    """Decoded photos of a shard, one batch after the other, by what everybody has at hand."""
    from PIL import Image

    batch = []
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                batch.append(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))  # type: ignore[union-attr]
                if len(batch) == size:
                    yield batch
                    batch = []
    if batch:
        yield batch


def load(model: Path, device: str, dtype: Any) -> tuple[Any, Any]:
    """The model and its processor, as the model's card shows."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
    return loaded, AutoProcessor.from_pretrained(model, backend="pil")


def plain_loop(model: Any, processor: Any, shard: Path, batch_size: int, tokens: int) -> float:
    """Seconds of the published loop: nothing overlaps."""
    import torch

    began = time.perf_counter()
    for images in batches_of(shard, batch_size):
        inputs = processor(text=[TASK] * len(images), images=images, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=tokens, num_beams=1, do_sample=False)
        for text, image in zip(processor.batch_decode(ids, skip_special_tokens=False), images, strict=True):
            processor.post_process_generation(text=text, task=TASK, image_size=image.size)
    return time.perf_counter() - began


def bare_model(backend: Any, shard: Path, batch_size: int) -> float:
    """Seconds of the stage's own backend on tensors that were prepared before."""
    ready = [[backend.prepare(image) for image in images] for images in batches_of(shard, batch_size)]
    began = time.perf_counter()
    for batch in ready:
        backend.caption(batch, [0] * len(batch))
    return time.perf_counter() - began


def time_stage(model: Path, shards: Path, out: Path, *flags: object) -> tuple[float, Mapping[str, float]]:
    """Seconds of the shards by their receipts, and of each phase."""
    import torch

    device = ("--num_gpus", 1) if torch.cuda.is_available() else ("--device", "cpu")
    run_stage("05_recaption", shards, "-o", out, "--model", model, *device, *flags)
    receipts = StageReceipts.read(out, "05_recaption")
    if failed := receipts.count("in") - receipts.count("kept"):
        raise SystemExit(f"{failed} images have no caption: nothing to compare")
    return receipts.seconds, receipts.phases


# ---- one side in a process of its own


def measure(role: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: its seconds and phases.  A first shard, of a few batches, warms up."""
    folder = options.folder
    model, warm, shard = folder / "model", folder / "warm" / "0.tar", folder / "measured" / "0.tar"
    phases: Mapping[str, float] = {}
    if role == "stage":
        flags: tuple[object, ...] = ("--batch_size", options.batch_size, "--max_tokens", options.tokens)
        flags += ("--dataloader_num_workers", options.decoders)
        with tempfile.TemporaryDirectory() as out:
            time_stage(model, warm, Path(out) / "warm", *flags)
            seconds, phases = time_stage(model, shard, Path(out) / "measured", *flags)
    else:
        import torch

        from curation import backends

        torch.set_num_threads(options.threads)
        if role == "plain":
            loaded = load(model, "cpu", torch.float32)
            plain_loop(*loaded, warm, options.batch_size, options.tokens)
            seconds = plain_loop(*loaded, shard, options.batch_size, options.tokens)
        else:
            backend = backends.load("caption", "florence2")(
                str(model), CaptionSettings(max_tokens=options.tokens, threads=options.threads)
            )
            bare_model(backend, warm, options.batch_size)
            seconds = bare_model(backend, shard, options.batch_size)
    return {"seconds": seconds, "phases": phases}


def on_the_cpu(options: argparse.Namespace) -> int:
    runs: dict[str, list[dict[str, Any]]] = {"bare": [], "stage": [], "plain": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        florence2.save(folder / "model", "tiny" if options.tiny else "small", options.side, options.tokens)
        make_shard(folder / "warm/0.tar", 2 * options.batch_size)
        make_shard(folder / "measured/0.tar", options.images)
        for _ in range(options.rounds):
            for role, done in runs.items():
                done.append(run_apart(measure, role, options, folder=folder))
    seconds = {role: min(run["seconds"] for run in done) for role, done in runs.items()}
    shares = [run["phases"]["wait"] / (run["phases"]["wait"] + run["phases"]["infer"]) for run in runs["stage"]]
    of_bare, waits = seconds["bare"] / seconds["stage"], statistics.median(shares)
    print(
        f"{options.images} photos, inputs {options.side}², {options.tokens} tokens, batch {options.batch_size}, ",
        end="",
    )
    print(f"model on {options.threads} thread(s), {options.decoders} to prepare, {options.rounds} rounds\n")
    rates = {role: f"{options.images / spent:.2f}" for role, spent in seconds.items()}
    reached, waiting = f"{of_bare:.3f}, aim {LEAST_OF_BARE}", f"{waits:.1%}, aim under {MOST_WAITING:.0%}"
    rows = [
        ("bare model, tensors prepared before", rates["bare"], 1, ""),
        ("stage 05", rates["stage"], reached, waiting),
        ("plain loop", rates["plain"], f"{seconds['bare'] / seconds['plain']:.3f}", ""),
    ]
    print_table(["", "images/s", "of the bare model", "the model waits"], rows)
    print(f"\nphases of the stage's last round: {tell_phases(runs['stage'][-1]['phases'])}")
    return exit_code(of_bare >= LEAST_OF_BARE and waits < MOST_WAITING, options)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--side", type=int, default=256, help="pixels of the model's input")
    parser.add_argument("--tokens", type=int, default=20, help="of each caption")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="the model's CPU threads, in all three")
    parser.add_argument("--decoders", type=int, default=1, help="threads that prepare images, in the stage")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--role", choices=["bare", "stage", "plain"], help=argparse.SUPPRESS)
    options = parse(parser, images=4, side=64, tokens=4, batch_size=2, rounds=1)
    if options.role:
        print(json.dumps(measure(options.role, options)))
        return 0
    return on_the_cpu(options)


if __name__ == "__main__":
    sys.exit(main())
