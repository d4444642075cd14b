#!/usr/bin/env python3
"""Stage 06 with CLIP ViT-B/32 beside the bare model, a plain loop, and what the cores alone decode and resize.

The architecture is the real one with random weights, built here (speed does not depend on the weights); the photos are
those of examples/shards, repeated.  All rows are measured in one run, the stage and the bare model in turn.  Aims: the
stage at least 0.95 of the bare model on preloaded tensors (or, where the cores' decoding is slower than the model, at
least 0.9 of that), and less than 5 % of the stage's time spent waiting for data.  On a GPU: ``gpu.py``.

    python benchmarks/metadata.py                        # one core computes, the others decode
    python benchmarks/metadata.py --tiny                 # small sizes: tells whether the code runs, not a speed
    python benchmarks/metadata.py --distances SHARD.tar  # only what an inexact resize gives, and how far features move
    python benchmarks/metadata.py --compare FOLDER FOLDER  # how far two outputs of the stage are apart
    python benchmarks/metadata.py --toxicity SHARD.tar --tokenizer FOLDER  # only detoxify, padded and in buckets
    python benchmarks/metadata.py --ocr SHARD.tar        # only what finding and reading text costs
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpu_models import save_clip
from measuring import (
    ROOT,
    StageReceipts,
    exit_code,
    make_parser,
    parse,
    print_table,
    run_stage,
    write_shard,
)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the model on the CPU: before torch is imported

import numpy as np
from PIL import Image

from curation.backends.extract import pp_ocr, toxicity
from curation.backends.extract.pictures import OPENAI_MEAN, OPENAI_STD, CentreCrop, FastCentreCrop, Normalise
from curation.extract.settings import ModelSettings
from curation.images import decode_rgb, image_size

STAGE, DIRECTIVE = "06_metadata", "oai-clip-vit-b32"
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
EXACT, FAST = CentreCrop(), FastCentreCrop()
EXAMPLES = sorted((ROOT / "examples" / "shards").glob("*.tar"))
DISTANCE_ROUNDS = 3
MODEL_SHARE, CORES_SHARE, WAIT_SHARE, CACHED_PER_S = 0.95, 0.9, 0.05, 10_000


@dataclass(frozen=True)
class Setting:
    device: str
    images: int
    shards: int
    batch: int
    processes: int
    repeats: int


# ---- what is measured


def photos(shards: list[Path]) -> list[tuple[bytes, bytes]]:
    """(image, caption) of some shards, in their order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in shards:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if file := tar.extractfile(member):
                    found.setdefault(f"{path.stem}/{key}", {})[suffix] = file.read()
    return [(s.get("jpg") or s["webp"], s.get("txt", b"")) for s in found.values() if "jpg" in s or "webp" in s]


def write_shards(folder: Path, samples: list[tuple[bytes, bytes]], setting: Setting) -> None:
    numbered = iter(enumerate(itertools.cycle(samples)))
    for shard in range(setting.shards):
        part = itertools.islice(numbered, setting.images // setting.shards)
        write_shard(
            folder / f"{shard:08d}.tar",
            (
                (f"{n:012d}", {"jpg": image, "txt": text, "json": json.dumps({"uid": f"{n:032x}"}).encode()})
                for n, (image, text) in part
            ),
        )


# ---- the rows


class Bare:
    """The model in the precision that the stage computes in, and nothing around it."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from transformers import CLIPModel

        self.torch, self.device = torch, device
        self.dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self.model = CLIPModel.from_pretrained(folder, dtype=self.dtype).to(device).eval()
        self.normalise = Normalise(OPENAI_MEAN, OPENAI_STD, device, self.dtype)

    def __call__(self, pictures: Any, tokens: Any) -> Any:
        with self.torch.inference_mode():
            image = self.model.get_image_features(pixel_values=pictures).pooler_output
            self.model.get_text_features(input_ids=tokens).pooler_output  # noqa: B018 - the work is what counts
        return image.float()

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            self.torch.cuda.synchronize()

    def tokens(self, count: int) -> Any:
        tokens = self.torch.full((count, 77), 300, dtype=self.torch.long)
        tokens[:, 76] = 49407
        return tokens.to(self.device)

    def on_tensors(self, crops: np.ndarray[Any, Any], batches: int) -> float:
        """Images a second on tensors that lie on the device."""
        pictures = self.normalise(self.torch.from_numpy(crops).to(self.device))
        tokens = self.tokens(len(crops))
        return self._speed(len(crops), batches, lambda: self(pictures, tokens))

    def on_cached_crops(self, crops: np.ndarray[Any, Any], batches: int) -> float:
        """Images a second where uint8 crops are sent to the device and normalised there, and features come back."""
        source = self.torch.from_numpy(crops)
        if self.device.startswith("cuda"):
            source = source.pin_memory()
        tokens = self.tokens(len(crops))

        def step() -> None:
            crops_there = source.to(self.device, non_blocking=True)
            self(self.normalise(crops_there), tokens).to("cpu", non_blocking=True)

        return self._speed(len(crops), batches, step)

    def _speed(self, count: int, batches: int, step: Any) -> float:
        step()
        self.wait()
        began = time.perf_counter()
        for _ in range(batches):
            step()
        self.wait()
        return count * batches / (time.perf_counter() - began)


def time_stage(shards: Path, output: Path, model: Path, setting: Setting, resize: str) -> tuple[float, float]:
    """(images a second, share of the time that the model waits), from the first shard's start to the last one's end:
    loading the model and starting processes is left out."""
    flags: list[object] = ["--input", shards, "--output", output, "--models", DIRECTIVE]
    flags += ["--weights", f"{DIRECTIVE}={model}", "--postprocess_features", "all", "--resize", resize]
    flags += ["--batch_size", setting.batch, "--nworkers", setting.processes]
    run_stage(STAGE, *flags, "--device", setting.device.removeprefix("cuda:"))
    receipts = StageReceipts.read(output, STAGE)
    return receipts.count("in") / receipts.seconds, receipts.phases["wait"] / receipts.seconds


def plain_loop(samples: list[tuple[bytes, bytes]], bare: Bare, batch: int, images: int) -> float:
    """Images a second where one process decodes, resizes and computes by turns."""
    began, pending, done = time.perf_counter(), [], 0
    for image, _ in itertools.islice(itertools.cycle(samples), images):
        pending.append(EXACT.of(Image.open(io.BytesIO(image))))
        if len(pending) == batch:
            done += len(_compute(bare, pending))
            pending = []
    if pending:
        done += len(_compute(bare, pending))
    bare.wait()
    return done / (time.perf_counter() - began)


def _compute(bare: Bare, crops: list[Any]) -> Any:
    pictures = bare.normalise(bare.torch.from_numpy(np.stack(crops)).to(bare.device))
    return bare(pictures, bare.tokens(len(crops))).cpu()


def crop_exactly(image: bytes) -> np.ndarray[Any, Any]:
    return EXACT(decode_rgb(image, on_white=False))


def crop_fast(image: bytes, crop: FastCentreCrop = FAST) -> np.ndarray[Any, Any]:
    short, long = sorted(image_size(image))
    return crop(decode_rgb(image, at_least=-(-crop.min_short_side * long // short), on_white=False))


def crop_as_on_a_device(image: bytes) -> np.ndarray[Any, Any]:
    """Decoded whole, resized by torch's antialiased bicubic, as a GPU would."""
    import torch

    pixels = torch.from_numpy(decode_rgb(image, on_white=False)).permute(2, 0, 1)[None].float()
    height, width = pixels.shape[2:]
    size = [int(224 * side / min(height, width)) for side in (height, width)]
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    top, left = (round((side - 224) / 2) for side in size)
    crop = resized[0, :, top : top + 224, left : left + 224]
    pixels_out: np.ndarray[Any, Any] = crop.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return pixels_out


def _crop_many(task: tuple[list[bytes], bool]) -> int:
    images, exact = task
    return sum(len((crop_exactly if exact else crop_fast)(image)) > 0 for image in images)


def cores_alone(samples: list[tuple[bytes, bytes]], processes: int, images: int, *, exact: bool) -> float:
    """Images a second that so many processes decode and resize, with nothing else to do."""
    everything = [image for image, _ in itertools.islice(itertools.cycle(samples), images)]
    tasks = [(everything[n::processes], exact) for n in range(processes)]
    warm = [(everything[:2], exact)] * processes
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_crop_many, warm))
        began = time.perf_counter()
        done = sum(pool.map(_crop_many, tasks))
        return done / (time.perf_counter() - began)


def print_distances(samples: list[tuple[bytes, bytes]], bare: Bare) -> None:
    """What an inexact resize gives and costs, on one thread: a table.  On a CPU the time of the device's way says
    nothing about a GPU; random weights only tell which way is nearer."""
    ways: dict[str, Callable[[bytes], Any]] = {
        "exact": crop_exactly,
        "`fast`": crop_fast,
        "`fast`, from no fewer than 448 pixels": functools.partial(crop_fast, crop=FastCentreCrop(margin=2)),
        "antialiased bicubic, as on a device": crop_as_on_a_device,
    }
    expected: tuple[Any, Any] | None = None
    rows = []
    for name, way in ways.items():
        spent = []
        for _ in range(DISTANCE_ROUNDS):
            began = time.perf_counter()
            crops = np.stack([way(image) for image, _ in samples])
            spent.append(time.perf_counter() - began)
        parts = [_compute(bare, list(crops[start : start + 64])) for start in range(0, len(crops), 64)]
        features = np.concatenate([part.numpy() for part in parts]).astype(np.float64)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        expected = expected or (crops.astype(float), features)
        levels = np.sqrt(((crops - expected[0]) ** 2).mean())
        cosines = (features * expected[1]).sum(axis=1)
        cosine = (f"{cosines.mean():.5f}", f"{cosines.min():.5f}")
        rows.append((name, f"{1000 * min(spent) / len(samples):.1f}", f"{levels:.2f}", *cosine))
    print_table(["", "ms a picture", "difference in levels (rms)", "cosine with exact, mean", "least"], rows)


def print_comparison(first: Path, second: Path) -> None:
    """How far the columns and features of two outputs of the stage are apart, over the shards that both have."""
    from pyarrow import parquet, types

    shards = [path.stem for path in sorted(first.glob("*.parquet")) if (second / path.name).is_file()]
    apart: dict[str, list[Any]] = {}
    nulls: Counter[str] = Counter()
    for shard in shards:
        tables = [parquet.read_table(folder / f"{shard}.parquet") for folder in (first, second)]
        if tables[0]["key"].to_pylist() != tables[1]["key"].to_pylist():
            raise SystemExit(f"{shard}: the two folders have other samples")
        for name in (n for n in tables[0].column_names if n in tables[1].column_names):
            pairs = list(zip(tables[0][name].to_pylist(), tables[1][name].to_pylist(), strict=True))
            if types.is_floating(tables[0].schema.field(name).type):
                nulls[name] += sum((a is None) != (b is None) for a, b in pairs)
                apart.setdefault(name, []).extend(abs(a - b) for a, b in pairs if a is not None and b is not None)
            else:
                nulls[name] += sum(a != b for a, b in pairs)
    rows: list[tuple[object, ...]] = [
        (name, len(found), f"{max(found, default=0):.2g}", f"{statistics.mean(found or [0]):.2g}", nulls.pop(name, 0))
        for name, found in sorted(apart.items())
    ]
    rows += [(name, "", "", "", differing) for name, differing in sorted(nulls.items()) if differing]
    print_table(["column", "values", "largest difference", "mean", "other values or nulls"], rows)
    cosines: dict[str, list[Any]] = {}
    for shard in shards:
        paths = [folder / f"{shard}.npz" for folder in (first, second)]
        if not all(path.is_file() for path in paths):
            continue
        with np.load(paths[0], allow_pickle=False) as one, np.load(paths[1], allow_pickle=False) as other:
            for name in (n for n in one.files if n in other.files):
                a, b = one[name].astype(np.float64), other[name].astype(np.float64)
                cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
                cosines.setdefault(name, []).extend(cosine[np.isfinite(cosine)])
    shown = [(n, len(c), f"{np.mean(c):.6f}", f"{min(c):.6f}") for n, c in sorted(cosines.items()) if c]
    if shown:
        print_table(["feature", "rows", "mean cosine", "least"], shown)


def print_toxicity(samples: list[tuple[bytes, bytes]], tokenizer: Path, options: argparse.Namespace) -> None:
    """Captions a second of detoxify's architecture with random weights: one batch padded to its longest caption, and
    in buckets of similar lengths, in turn."""
    import torch
    from tokenizers import Tokenizer
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    small = TINY if options.tiny else {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    layers = {"num_hidden_layers": 2 if options.tiny else 12}
    config = XLMRobertaConfig(**small | layers, vocab_size=1000, max_position_embeddings=514, num_labels=16)
    dtype = getattr(torch, options.dtype)
    model = XLMRobertaForSequenceClassification(config).to(options.device, dtype).eval()
    core = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    core.enable_truncation(toxicity.MAX_TOKENS - 2)
    lengths = np.array([len(core.encode(text.decode("utf-8", "replace")).ids) + 2 for _, text in samples])
    tokens = torch.randint(5, 1000, (len(lengths), lengths.max())).to(options.device)
    ways: dict[str, list[tuple[Any, int]]] = {
        "padded to the longest": [(np.arange(len(lengths)), int(lengths.max()))],
        "in buckets of similar lengths": toxicity.length_buckets(lengths),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for name, buckets in itertools.chain(*([ways.items()] * (DISTANCE_ROUNDS + 1))):
        began = time.perf_counter()
        with torch.inference_mode():
            for rows, longest in buckets:
                mask = torch.from_numpy(np.arange(longest) < lengths[rows][:, None]).long().to(options.device)
                found = model(input_ids=tokens[rows, :longest], attention_mask=mask).logits
            found.float().cpu()
        speeds[name].append(len(lengths) / (time.perf_counter() - began))
    before = statistics.median(speeds["padded to the longest"][1:])
    rows_of_table = []
    for name, buckets in ways.items():
        speed = statistics.median(speeds[name][1:])  # the first call also warms up
        computed = sum(len(rows) * longest for rows, longest in buckets)
        rows_of_table.append((name, len(buckets), f"{computed:,}", f"{speed:,.1f}", f"{speed / before:.1f}"))
    print(f"{len(lengths)} captions, median {np.median(lengths):g} tokens, longest {lengths.max()}, {options.dtype}")
    print_table(["", "calls", "tokens computed", "captions/s", "of padded"], rows_of_table)


def print_text(samples: list[tuple[bytes, bytes]]) -> None:
    """What finding and reading text costs: seconds of a core a picture, and the process's memory.  The last row is a
    blank picture of the largest size."""
    pictures = [decode_rgb(image, on_white=False) for image, _ in samples]
    rows = []
    for directive in ("pp-ocr-boxes", "pp-ocr"):
        [find] = pp_ocr.Backend(directive, ModelSettings()).preparations
        for what, shown in (("these", pictures), ("2,000 × 2,000", [np.zeros((2000, 2000, 3), np.uint8)])):
            began = time.process_time()
            lines = sum(len(find(picture)["text-boxes"]) for picture in shown)
            each = (time.process_time() - began) / len(shown)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
            rows.append((directive, what, f"{len(shown)}", f"{lines}", f"{each:.2f}", f"{memory:.1f}"))
    print_table(["", "pictures", "", "lines", "s of a core", "GB at most"], rows)


# ---- the table


def measure(setting: Setting, options: argparse.Namespace, folder: Path) -> int:
    model = save_clip(folder / "model", "tiny-b32" if options.tiny else "b32")
    samples = photos(EXAMPLES)
    write_shards(folder / "shards", samples, setting)
    bare = Bare(model, setting.device)
    crops = np.stack([crop_exactly(image) for image, _ in itertools.islice(itertools.cycle(samples), setting.batch)])
    batches = max(1, setting.images // setting.batch)
    on_tensors, exact, waits, plain_speeds = [], [], [], []
    for number in range(setting.repeats):
        on_tensors.append(bare.on_tensors(crops, batches))
        speed, wait = time_stage(folder / "shards", folder / f"exact{number}", model, setting, "exact")
        exact.append(speed)
        waits.append(wait)
        plain_speeds.append(plain_loop(samples, bare, setting.batch, max(setting.batch, setting.images // 4)))
    on_tensors.append(bare.on_tensors(crops, batches))
    fast, _ = time_stage(folder / "shards", folder / "fast", model, setting, "fast")
    cached = bare.on_cached_crops(crops, batches)
    alone = cores_alone(samples, setting.processes, setting.images, exact=True)
    alone_fast = cores_alone(samples, setting.processes, setting.images, exact=False)

    top, stage, wait = statistics.median(on_tensors), statistics.median(exact), statistics.median(waits)
    beside = statistics.median(  # each run beside the bare model's just before and after: other load comes and goes
        speed / statistics.mean(pair) for speed, pair in zip(exact, itertools.pairwise(on_tensors), strict=True)
    )
    share = CORES_SHARE if alone < top else MODEL_SHARE
    speeds = {
        "bare model, preloaded tensors": top,
        "model from cached uint8 crops": cached,
        f"decode and resize alone, exact ({setting.processes} processes)": alone,
        f"decode and resize alone, fast ({setting.processes} processes)": alone_fast,
        "stage 06, exact": stage,
        "stage 06, --resize fast": fast,
        "plain loop, one process": statistics.median(plain_speeds),
    }
    rows = [(name, f"{speed:,.1f}", f"{speed / top:.3f}") for name, speed in speeds.items()]
    print_table(["", "images/s", "of the bare model"], rows)
    print(f"\nthe model waits for data {wait:.1%} of the stage's time; what limits: ", end="")
    print("the cores' decoding" if alone < top else "the model")
    reached = stage / alone if alone < top else beside
    met = reached >= share and (alone < top or wait < WAIT_SHARE)
    met = met and (not setting.device.startswith("cuda") or cached >= CACHED_PER_S)
    print(f"stage / limit = {reached:.3f} (aim {share}): {'met' if met else 'missed'}\n")
    print_distances(samples[: 8 if options.tiny else None], bare)
    return exit_code(met, options)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--images", type=int, help="photos in the shards")
    parser.add_argument("--processes", type=int, help="that decode; default: the cores, less one on a CPU")
    parser.add_argument(
        "--distances", nargs="+", type=Path, metavar="SHARD", help="only what inexact resizes cost, on these"
    )
    parser.add_argument("--ocr", nargs="+", type=Path, metavar="SHARD", help="only what finding text costs, on these")
    parser.add_argument("--clip", type=Path, help="with --distances: a folder with a trained CLIP ViT-B/32")
    parser.add_argument("--least_side", type=int, default=0, help="with --distances: only photos of so many pixels")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FOLDER", help="only how far two outputs are apart")
    parser.add_argument("--toxicity", nargs="+", type=Path, metavar="SHARD", help="only detoxify, on these captions")
    parser.add_argument("--tokenizer", type=Path, help="with --toxicity: a folder with a tokenizer.json")
    parser.add_argument("--dtype", default="float32", help="with --toxicity: what it computes in")
    options = parse(parser, images=16, processes=1)
    cores = len(os.sched_getaffinity(0))
    on_cpu = options.device == "cpu"
    images = options.images or 512
    setting = Setting(
        device=options.device,
        images=images,
        shards=1 if images < 5_000 else 4,
        batch=8 if options.tiny else 32,
        processes=options.processes or max(1, cores - 1 if on_cpu else cores),
        repeats=1 if options.tiny else 3,
    )
    if options.compare:
        print_comparison(*options.compare)
        return 0
    if options.toxicity:
        if options.tokenizer is None:
            parser.error("--toxicity needs --tokenizer: a folder with the tokenizer.json of detoxify or another model")
        captions = itertools.islice(itertools.cycle(photos(options.toxicity)), options.images or setting.batch)
        print_toxicity(list(captions), options.tokenizer, options)
        return 0
    if options.ocr:
        print_text(photos(options.ocr)[: options.images])
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-metadata-", dir=options.folder) as folder:
        if options.distances:
            bare = Bare(options.clip or save_clip(Path(folder), "tiny-b32" if options.tiny else "b32"), options.device)
            bare.torch.set_num_threads(1)
            samples = [s for s in photos(options.distances) if min(image_size(s[0])) >= options.least_side]
            print_distances(samples[: options.images], bare)
            return 0
        return measure(setting, options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
