#!/usr/bin/env python3
"""Stage 05 beside a plain loop and beside the bare model on tensors prepared before: images a second, in one run.

All three caption the same photos with the same model (Florence-2's architecture, random weights, a fixed number of
tokens), in the same batches.  The plain loop does one thing after the other, as published scripts do: decode,
processor, ``generate``, batch by batch.  The stage reads the tar, decodes and prepares ahead, captions, checkpoints and
publishes.

On the CPU each is a process of its own whose model has ``--threads`` threads, and the stage prepares on the other cores
as it would beside a GPU.  Rounds alternate; the fastest of each is compared, since whatever else a machine does only
slows down.  Aims: the model waits for less than 0.05 of its time, and the stage does at least 0.95 of the bare model.

    python benchmarks/recaption.py                              # on the CPU, a small model
    python benchmarks/recaption.py --gpu                        # Florence-2-base as it is: see gpu_recaption.py
    python benchmarks/recaption.py --gpu --device cpu --tiny    # tells whether that code runs, not a speed
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import florence2

from curation.tar.samples import TarWriter

MOST_WAITING, LEAST_OF_BARE = 0.05, 0.95
TASK = "<MORE_DETAILED_CAPTION>"


def photos() -> list[bytes]:
    """The example shards' photos, as they lie there."""
    found = []
    for path in sorted((ROOT / "examples" / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def make_shard(path: Path, images: int, side: int | None = None) -> None:
    """``images`` real photos in one shard, again and again; squares of ``side`` pixels where it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = photos()
    if side is not None:
        data = [_square(one, side) for one in data]
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for number in range(images):
            writer.add(f"{number:08d}.jpg", data[number % len(data)])
            writer.add(f"{number:08d}.txt", b"a photo")
        writer.close()


def _square(data: bytes, side: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").resize((side, side)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


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


def run_stage(model: Path, shards: Path, out: Path, *flags: object) -> tuple[float, dict[str, float]]:
    """Seconds of the shards by their receipts, and of each phase."""
    stage = importlib.import_module("05_recaption")
    command = [str(shards), "-o", str(out), "--model", str(model), "--num_gpus", "1", "--quiet", *map(str, flags)]
    if stage.main(command) != 0:
        raise SystemExit("the stage failed")
    receipts = [json.loads(path.read_bytes()) for path in out.glob("_receipts/05_recaption/*/*.json")]
    if failed := sum(sum(receipt["counts"]["failed"].values()) for receipt in receipts):
        raise SystemExit(f"{failed} images have no caption: nothing to compare")
    phases: dict[str, float] = {}
    for receipt in receipts:
        for phase, seconds in receipt["seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    return sum(receipt["finished"] - receipt["started"] for receipt in receipts), phases


# ---- one side in a process of its own


def measure(role: str, options: argparse.Namespace) -> None:
    """Prints its seconds and phases as JSON.  A first shard, of a few batches, warms up."""
    folder = Path(options.folder)
    model, warm, shard = folder / "model", folder / "warm" / "0.tar", folder / "measured" / "0.tar"
    phases: dict[str, float] = {}
    if role == "stage":
        flags = ("--batch_size", options.batch_size, "--max_tokens", options.tokens)
        flags += ("--dataloader_num_workers", options.decoders)
        with tempfile.TemporaryDirectory() as out:
            run_stage(model, warm, Path(out) / "warm", *flags)
            seconds, phases = run_stage(model, shard, Path(out) / "measured", *flags)
    else:
        import torch

        from curation import backends
        from curation.caption.captioner import CaptionSettings

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
    print(json.dumps({"seconds": seconds, "phases": phases}))


def in_process_of_its_own(role: str, folder: Path, threads: int) -> dict[str, Any]:
    """What ``measure`` prints.  Apart: computing threads of one process disturb each other's OpenMP teams."""
    command = [sys.executable, __file__, *sys.argv[1:], "--role", role, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, env=environment, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{role}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def on_the_cpu(options: argparse.Namespace) -> int:
    runs: dict[str, list[dict[str, Any]]] = {"bare": [], "stage": [], "plain": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        florence2.save(folder / "model", "tiny" if options.tiny else "small", options.side, options.tokens)
        make_shard(folder / "warm/0.tar", 2 * options.batch_size)
        make_shard(folder / "measured/0.tar", options.images)
        for _ in range(options.rounds):
            for role, done in runs.items():
                done.append(in_process_of_its_own(role, folder, options.threads))
    seconds = {role: min(run["seconds"] for run in done) for role, done in runs.items()}
    shares = [run["phases"]["wait"] / (run["phases"]["wait"] + run["phases"]["infer"]) for run in runs["stage"]]
    of_bare, waits = seconds["bare"] / seconds["stage"], statistics.median(shares)
    print(
        f"{options.images} photos, inputs {options.side}², {options.tokens} tokens, batch {options.batch_size}, ",
        end="",
    )
    print(f"model on {options.threads} thread(s), {options.decoders} to prepare, {options.rounds} rounds\n")
    print("| | images/s | of the bare model | the model waits |\n|---|---|---|---|")
    print(f"| bare model, tensors prepared before | {options.images / seconds['bare']:.2f} | 1 | |")
    print(f"| stage 05 | {options.images / seconds['stage']:.2f} | {of_bare:.3f}, aim {LEAST_OF_BARE} | ", end="")
    print(f"{waits:.1%}, aim under {MOST_WAITING:.0%} |")
    print(f"| plain loop | {options.images / seconds['plain']:.2f} | {seconds['bare'] / seconds['plain']:.3f} | |\n")
    phases = ", ".join(f"{name} {value:.2f} s" for name, value in sorted(runs["stage"][-1]["phases"].items()))
    print(f"phases of the stage's last round: {phases}")
    return 0 if of_bare >= LEAST_OF_BARE and waits < MOST_WAITING else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--side", type=int, default=256, help="pixels of the model's input")
    parser.add_argument("--tokens", type=int, default=None, help="of each caption; default 20, with --gpu 60")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="the model's CPU threads, in all three")
    parser.add_argument("--decoders", type=int, default=1, help="threads that prepare images, in the stage")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--gpu", action="store_true", help="the other part: Florence-2-base on a GPU")
    parser.add_argument("--device", default="cuda:0", help="of --gpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tells whether the code runs")
    parser.add_argument("--role", choices=["bare", "stage", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokens = options.tokens or (60 if options.gpu else 20)
    if options.role:
        measure(options.role, options)
        return 0
    if options.gpu:
        import gpu_recaption

        return gpu_recaption.main(options)
    return on_the_cpu(options)


if __name__ == "__main__":
    sys.exit(main())
