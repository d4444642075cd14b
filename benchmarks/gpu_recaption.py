"""The part of ``recaption.py`` for a GPU: Florence-2-base as it is, and what each step of the stage's way gives.

Three sizes of input, 60 tokens forced, bf16.  For each: the published loop at its batch of 16; the stage's backend on
prepared tensors, one thing added to the row above at a time; attention kernels and precisions beside it; a sweep of
batch sizes with what was best; where a batch's time goes; and the stage itself, from tar to JSONL, at the best batch.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import florence2
import recaption

UPSTREAM_BATCH, LADDER_BATCH, AIM, PUBLISHED = 16, 64, 1000, 24
SIDES, BATCHES = (256, 512, 768), (16, 32, 64, 128, 256, 512)
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    batch: int
    rate: float  # images a second
    memory_gb: float


class Bench:
    """One size of input on one device."""

    def __init__(self, folder: Path, side: int, options: argparse.Namespace) -> None:
        self.folder, self.side, self.tokens, self.device = folder, side, options.tokens, options.device
        self.tiny, self.rounds = options.tiny, options.rounds
        self.model, self.shard = folder / "model", folder / "photos" / "0.tar"
        florence2.save(self.model, "tiny" if self.tiny else "base", side, self.tokens)
        recaption.make_shard(self.shard, 2 * UPSTREAM_BATCH if not self.tiny else 8, side)
        self.rows: list[Row] = []

    def backend(self, compile_how: str = "none", dtype: str = "auto") -> Any:
        from curation import backends
        from curation.caption.captioner import CaptionSettings

        return backends.load("caption", "florence2")(
            str(self.model),
            CaptionSettings(max_tokens=self.tokens, device=self.device, dtype=dtype, compile=compile_how, threads=4),
        )

    def wait(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def measure(self, what: str, batch: int, run: Callable[[], int]) -> float:
        """``run`` captions some images and says how many.  Twice to warm up, for compiling; the median counts."""
        import torch

        cuda = self.device.startswith("cuda")
        try:
            for _ in range(2):
                run()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            rates = []
            for _ in range(self.rounds):
                self.wait()
                began = time.perf_counter()
                images = run()
                self.wait()
                rates.append(images / (time.perf_counter() - began))
        except Exception as error:  # noqa: BLE001 - an experiment that fails is a row, and the others are measured
            print(
                f"{self.side}² {what}, batch {batch}: {type(error).__name__} {str(error).splitlines()[:1]}", flush=True
            )
            return 0.0
        memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        self.rows.append(Row(what, batch, statistics.median(rates), memory))
        print(f"{self.side}² {what}, batch {batch}: {self.rows[-1].rate:.1f} images/s", flush=True)
        return self.rows[-1].rate

    # ---- the rows

    def upstream(self) -> None:
        """The published script's loop, from the tar on."""
        import torch

        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        loaded = recaption.load(self.model, self.device, dtype)
        count = sum(map(len, recaption.batches_of(self.shard, UPSTREAM_BATCH)))

        def run() -> int:
            recaption.plain_loop(*loaded, self.shard, UPSTREAM_BATCH, self.tokens)
            return count

        self.measure("published loop: decode, processor, generate", UPSTREAM_BATCH, run)

    def bare(self, what: str, backend: Any, batch: int, around: AbstractContextManager[Any] | None = None) -> float:
        """Prepared tensors only, so that the device alone is measured."""
        images = next(recaption.batches_of(self.shard, UPSTREAM_BATCH))
        ready = [backend.prepare(images[number % len(images)]) for number in range(batch)]

        def run() -> int:
            backend.caption(ready, [0] * batch)
            return batch

        with around or contextlib.nullcontext():
            return self.measure(what, batch, run)

    def ladder(self, batch: int) -> str:
        """One thing at a time.  Returns how to compile, which was best."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = self.backend()
        backend.generation.no_repeat_ngram_size, ours = backend._ngram, backend._ngram
        backend._ngram = 0
        self.bare("transformers' generate on prepared tensors", backend, batch)
        backend._ngram, backend.generation.no_repeat_ngram_size = ours, 0
        rates = {"none": self.bare("+ repetitions banned on the device", backend, batch)}
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
        for compile_how, what in (("decode", "+ keys in place, a graph a step"), ("all", "+ compiled image encoder")):
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
        images = next(recaption.batches_of(self.shard, UPSTREAM_BATCH))
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

    def stage(self, compile_how: str, batch: int, images: int) -> None:
        """From the tar to the JSONL, by the receipts; a first run warms up."""
        shards = self.folder / "many"
        recaption.make_shard(shards / "0.tar", images, self.side)
        flags: list[object] = ["--batch_size", batch, "--max_tokens", self.tokens, "--compile", compile_how]
        best: tuple[float, dict[str, float]] = (0.0, {})
        for _ in range(2):
            with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
                seconds, phases = recaption.run_stage(self.model, shards, Path(out), *flags)
            best = max(best, (images / seconds, phases), key=lambda run: run[0])
        waits = best[1]["wait"] / (best[1]["wait"] + best[1]["infer"])
        self.rows.append(Row(f"stage 05, tar to JSONL; the model waits {waits:.1%}", batch, best[0], 0.0))

    def all_rows(self, batches: Sequence[int]) -> None:
        self.upstream()
        compile_how = self.ladder(LADDER_BATCH if not self.tiny else 4)
        backend = self.backend(compile_how)
        rates = {batch: self.bare(f"all of it (--compile {compile_how})", backend, batch) for batch in batches}
        backend.close()
        best = max(rates, key=rates.__getitem__)
        self.stage(compile_how, best, 16 * best if not self.tiny else 12)


def print_table(side: int, where: str, rows: Sequence[Row]) -> None:
    print(f"\nFlorence-2, inputs {side}², on {where}\n\n| | batch | images/s | of the published loop | GPU memory |")
    print("|---|---|---|---|---|")
    for row in rows:
        memory = f"{row.memory_gb:.1f} GB" if row.memory_gb else ""
        print(f"| {row.what} | {row.batch} | {row.rate:.1f} | {row.rate / rows[0].rate:.2f} | {memory} |")
    best = max(row.rate for row in rows)
    print(f"\nbest {best:.0f} images/s; aim {AIM}; published: about {PUBLISHED} a second per GPU\n")


def main(options: argparse.Namespace) -> int:
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured here (--device cpu --tiny runs the code)")
        return 0
    where = torch.cuda.get_device_name(0) if options.device.startswith("cuda") else "the CPU"
    for side in SIDES if not options.tiny else (64,):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), side, options)
            bench.all_rows(BATCHES if not options.tiny else (2, 4))
        print_table(side, f"{where}, torch {torch.__version__}", bench.rows)
    return 0
