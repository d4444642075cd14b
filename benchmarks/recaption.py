#!/usr/bin/env python3
"""Stage 05 beside a plain loop and beside the bare model on tensors prepared before: images a second, in one run.

All three caption the same photos with the same model (Florence-2's architecture, random weights, a fixed number of
tokens), in the same batches.  The plain loop does one thing after the other, as published scripts do: decode,
processor, ``generate``, batch by batch.  The stage reads the tar, decodes and prepares ahead, captions, checkpoints and
publishes.

On the CPU each is a process of its own whose model has ``--threads`` threads, and the stage prepares on the other cores
as it would beside a GPU.  Rounds alternate; the fastest of each is compared, since whatever else a machine does only
slows down.  Aims: the model waits for less than 0.05 of its time, and the stage does at least 0.95 of the bare model.

On a GPU: three sizes of input, 60 tokens forced, bf16.  For each: the published loop at its batch of 16; the stage's
backend on prepared tensors, one thing added to the row above at a time; attention kernels and precisions beside it; a
sweep of batch sizes with what was best; where a batch's time goes; and the stage itself, from tar to JSONL, at the best
batch.

    python benchmarks/recaption.py                              # on the CPU, a small model
    python benchmarks/recaption.py --gpu                        # Florence-2-base as it is: what each step gives
    python benchmarks/recaption.py --gpu --device cpu --tiny    # tells whether that code runs, not a speed
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import florence2
from measuring import (
    DeviceRow,
    DeviceRows,
    StageReceipts,
    device_name,
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

from curation.caption.captioner import CaptionSettings, Compile

MOST_WAITING, LEAST_OF_BARE = 0.05, 0.95
UPSTREAM_BATCH, LADDER_BATCH, GPU_AIM, PUBLISHED = 16, 64, 1000, 24
SIDES, BATCHES = (256, 512, 768), (16, 32, 64, 128, 256, 512)
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
TASK = "<MORE_DETAILED_CAPTION>"


def make_shard(path: Path, images: int, side: int | None = None) -> None:
    """``images`` real photos in one shard, again and again; squares of ``side`` pixels where it is given."""
    photos = [data if side is None else _square(data, side) for data in example_jpegs()]
    write_shard(path, ((f"{n:08d}", {"jpg": photos[n % len(photos)], "txt": b"a photo"}) for n in range(images)))


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


# ---- on a GPU


class CaptionBench(DeviceRows):
    """Florence-2-base as it is, with one size of input on one device: what each step of the stage's way gives."""

    def __init__(self, folder: Path, side: int, options: argparse.Namespace) -> None:
        super().__init__(options.device, options.rounds)
        self.folder, self.side, self.tokens, self.tiny = folder, side, options.tokens, options.tiny
        self.model, self.shard = folder / "model", folder / "photos" / "0.tar"
        florence2.save(self.model, "tiny" if self.tiny else "base", side, self.tokens)
        make_shard(self.shard, 2 * UPSTREAM_BATCH if not self.tiny else 8, side)

    def backend(self, compile_how: Compile = "none", dtype: str = "auto") -> Any:
        from curation import backends

        return backends.load("caption", "florence2")(
            str(self.model),
            CaptionSettings(max_tokens=self.tokens, device=self.device, dtype=dtype, compile=compile_how, threads=4),
        )

    def add(self, what: str, batch: int, run: Callable[[], int]) -> float:
        """Adds a row; two runs warm up, for what is compiled."""
        return self.measure(f"{self.side}² {what}", batch, run, lambda: (run(), run()))

    def upstream(self) -> None:
        """The published script's loop, from the tar on."""
        import torch

        dtype = torch.bfloat16 if self.on_cuda else torch.float32
        loaded = load(self.model, self.device, dtype)
        count = sum(map(len, batches_of(self.shard, UPSTREAM_BATCH)))

        def run() -> int:
            plain_loop(*loaded, self.shard, UPSTREAM_BATCH, self.tokens)
            return count

        self.add("published loop: decode, processor, generate", UPSTREAM_BATCH, run)

    def bare(self, what: str, backend: Any, batch: int, around: AbstractContextManager[Any] | None = None) -> float:
        """Prepared tensors only, so that the device alone is measured."""
        images = next(batches_of(self.shard, UPSTREAM_BATCH))
        ready = [backend.prepare(images[number % len(images)]) for number in range(batch)]

        def run() -> int:
            backend.caption(ready, [0] * batch)
            return batch

        with around or contextlib.nullcontext():
            return self.add(what, batch, run)

    def ladder(self, batch: int) -> Compile:
        """Adds one thing after the other.  Returns which way to compile was best."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = self.backend()
        backend.generation.no_repeat_ngram_size, ours = backend._ngram, backend._ngram
        backend._ngram = 0
        self.bare("transformers' generate on prepared tensors", backend, batch)
        backend._ngram, backend.generation.no_repeat_ngram_size = ours, 0
        rates: dict[Compile, float] = {"none": self.bare("+ repetitions banned on the device", backend, batch)}
        for kernel in KERNELS:
            self.bare(f"the same, sdpa by {kernel}", backend, batch, sdpa_kernel(getattr(SDPBackend, kernel)))
        # Attention among channels is a transposed one, for which there is only the plain kernel, in float32.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        self.bare("the same, plain sdpa in 16 bits", backend, batch)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        self.profile(backend, batch)
        backend.close()
        for dtype in ("float16", "float32"):
            self.bare(f"the same, {dtype}", self.backend(dtype=dtype), batch)
        steps: list[tuple[Compile, str]] = [
            ("decode", "+ keys in place, a graph a step"),
            ("all", "+ compiled image encoder"),
        ]
        for compile_how, what in steps if not self.tiny else []:  # compiling on the CPU takes minutes
            backend = self.backend(compile_how)
            rates[compile_how] = self.bare(f"{what} (--compile {compile_how})", backend, batch)
            backend.close()
            gc.collect()
            torch.compiler.reset()
        return max(rates, key=rates.__getitem__)

    def profile(self, backend: Any, batch: int) -> None:
        """Where a batch's time goes: the images' encoder alone, and everything."""
        import torch

        spent = {"encoder": 0.0}
        encoder = backend._images_encoder()

        def before(*_: Any) -> None:
            self.wait()
            spent["encoder"] -= time.perf_counter()

        def after(*_: Any) -> None:
            self.wait()
            spent["encoder"] += time.perf_counter()

        handles = [encoder.register_forward_pre_hook(before), encoder.register_forward_hook(after)]
        images = next(batches_of(self.shard, UPSTREAM_BATCH))
        ready = [backend.prepare(images[number % len(images)]) for number in range(batch)]
        began = time.perf_counter()
        with torch.inference_mode():
            backend.caption(ready, [0] * batch)
        total = time.perf_counter() - began
        for handle in handles:
            handle.remove()
        print(f"{self.side}² of a batch of {batch}, {total:.3f} s: images' encoder {spent['encoder']:.3f} s, ", end="")
        print(f"the rest {total - spent['encoder']:.3f} s for {self.tokens} tokens", flush=True)
        began = time.perf_counter()
        for image in images:
            backend.prepare(image)
        print(
            f"{self.side}² preparing an image on the host: {1000 * (time.perf_counter() - began) / len(images):.2f} ms"
        )

    def stage(self, compile_how: Compile, batch: int, images: int) -> None:
        """From the tar to the JSONL, by the receipts; a first run warms up."""
        shards = self.folder / "many"
        make_shard(shards / "0.tar", images, self.side)
        flags: list[object] = ["--batch_size", batch, "--max_tokens", self.tokens, "--compile", compile_how]
        best: tuple[float, Mapping[str, float]] = (0.0, {})
        for _ in range(2):
            with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
                seconds, phases = time_stage(self.model, shards, Path(out), *flags)
            best = max(best, (images / seconds, phases), key=lambda run: run[0])
        waits = best[1]["wait"] / (best[1]["wait"] + best[1]["infer"])
        self.rows.append(DeviceRow(f"stage 05, tar to JSONL; the model waits {waits:.1%}", batch, best[0], 0.0))

    def all_rows(self, batches: Sequence[int]) -> None:
        self.upstream()
        compile_how = self.ladder(LADDER_BATCH if not self.tiny else 4)
        backend = self.backend(compile_how)
        rates = {batch: self.bare(f"all of it (--compile {compile_how})", backend, batch) for batch in batches}
        backend.close()
        best = max(rates, key=rates.__getitem__)
        self.stage(compile_how, best, 16 * best if not self.tiny else 12)


def on_the_gpu(options: argparse.Namespace) -> int:
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured here (--device cpu --tiny runs the code)")
        return 0
    for side in SIDES if not options.tiny else (options.side,):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = CaptionBench(Path(folder), side, options)
            bench.all_rows(BATCHES if not options.tiny else (2,))
        bench.print(f"Florence-2, inputs {side}², on {device_name(options.device)}", "the published loop")
        print(f"\nbest {bench.best.rate:.0f} images/s; aim {GPU_AIM}; published: about {PUBLISHED} a second per GPU\n")
    return 0


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--side", type=int, default=256, help="pixels of the model's input")
    parser.add_argument("--tokens", type=int, default=None, help="of each caption; default 20, with --gpu 60")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="the model's CPU threads, in all three")
    parser.add_argument("--decoders", type=int, default=1, help="threads that prepare images, in the stage")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--gpu", action="store_true", help="the other part: Florence-2-base on a GPU")
    parser.add_argument("--device", default="cuda:0", help="of --gpu")
    parser.add_argument("--role", choices=["bare", "stage", "plain"], help=argparse.SUPPRESS)
    options = parse(parser, images=4, side=64, tokens=4, batch_size=2, rounds=1)
    options.tokens = options.tokens or (60 if options.gpu else 20)
    if options.role:
        print(json.dumps(measure(options.role, options)))
        return 0
    if options.gpu:
        return on_the_gpu(options)
    return on_the_cpu(options)


if __name__ == "__main__":
    sys.exit(main())
