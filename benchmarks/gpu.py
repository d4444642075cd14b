#!/usr/bin/env python3
"""Stages 03, 05 and 06 on one GPU beside the published loops and the card's limits, in one table, in under 10 minutes.

Offline: the models have their real shapes and random weights, made on the device.  Each row is a process of its own
under a time limit, and is printed as soon as it is measured; what fails, or is not installed, is one line.  A row of a
stage is the stage itself, from shards to what it publishes: its first shard warms up (compilation, batch sizes), and
the others are timed by their receipts.

Columns: images a second · how many times the published loop · share of the time that the device is busy (nvidia-smi) ·
share of the roofline: the model's operations a second, counted in the published loop, of what a large matrix product in
bf16 reaches on this card · host cores in use · the device's peak memory.

    python benchmarks/gpu.py                     # all rows
    python benchmarks/gpu.py --only 03 clip      # rows whose stage or model has such a word
    python benchmarks/gpu.py --vllm /path/to/python   # and vLLM, from an environment of its own
    python benchmarks/gpu.py --tiny              # on the CPU: tells whether the code runs, not a speed
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_models
from bench_generate import make_input
from measuring import StageReceipts, example_samples, make_parser, parse, print_table, run_stage, write_shard

from curation.errors import InfrastructureError

SHARDS = 4  # of a stage's row: the first one warms up
STAGE_SECONDS = 5.0  # a shard's images at the published loop's speed: a faster way needs less
LOOP_SECONDS = 6.0
LIMIT_S, MINUTES = 100, 9.5
BATCH_03, BATCH_05, BATCH_06, QUALITY = 32, 16, 256, 90
TOKENS, SIDE = 60, 768  # of Florence-2
COLUMNS = ["stage", "model", "flags", "images/s", "of the loop", "busy", "of the roofline", "cores", "memory"]
LOOP, AS_IT_IS, VLLM = "published loop", "as it is", "--served vllm"
STAGES = {"03": "03_generate_images", "05": "05_recaption", "06": "06_metadata"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        stage: ``03``, ``05`` or ``06``.
        model: The model's short name.
        flags: Of the stage, beside those of its input and output; LOOP is the loop that people publish.
        needs: A module without which there is nothing to measure.
        limit_s: Seconds after which the row is given up.
    """

    stage: str
    model: str
    flags: str = LOOP
    needs: str = ""
    limit_s: int = LIMIT_S

    @property
    def name(self) -> str:
        return f"{self.stage} {self.model} {self.flags}"


@dataclass
class Measured:
    """What a row's process found.  tflop: of one image, counted in the published loop; 0 where it was not."""

    images_per_s: float
    busy: float | None = None
    tflop: float = 0.0
    cores: float = 0.0
    memory_gb: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where and how a row is measured.  rate: images a second of the published loop, 0 where it has not run."""

    device: str
    tiny: bool
    folder: Path
    rate: float = 0.0
    vllm: str = ""

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def images(self, least: int) -> int:
        """Images of a shard, a multiple of ``least``."""
        if self.tiny:
            return least
        return max(1, round(self.rate * STAGE_SECONDS / least)) * least


ROWS = [
    Row("03", "flux.1-schnell"),
    Row("03", "flux.1-schnell", "--no-channels_last --no-fuse_qkv --text_batches 0"),
    Row("03", "flux.1-schnell", ""),
    Row("03", "flux.1-schnell", "--compile blocks", limit_s=150),
    Row("03", "flux.1-schnell", "--compile blocks --quantize fp8", "torchao", limit_s=150),
    Row("03", "flux.1-schnell", "--compile blocks --quantize fp8 --text_tokens 128", "torchao", limit_s=150),
    Row("03", "sd-turbo"),
    Row("03", "sd-turbo", ""),
    Row("03", "sd-turbo", "--compile blocks", limit_s=150),
    Row("03", "sd-turbo", "--vae taesd"),
    Row("03", "sd-turbo", "--vae taesd --compile blocks", limit_s=150),
    Row("03", "sdxl-turbo"),
    Row("03", "sdxl-turbo", ""),
    Row("03", "flux.2-klein-4b"),
    Row("03", "flux.2-klein-4b", ""),
    Row("03", "z-image-turbo"),
    Row("03", "z-image-turbo", ""),
    Row("05", "florence2-base"),
    Row("05", "florence2-base", ""),
    Row("05", "florence2-base", "--batch_size 256"),
    Row("05", "florence2-base", "--batch_size 256 --compile all", limit_s=150),
    Row("05", "qwen2.5-vl-7b", limit_s=150),
    Row("05", "qwen2.5-vl-7b", "--batch_size 48 --attention sdpa", limit_s=150),
    Row("05", "qwen2.5-vl-7b", "--batch_size 48", limit_s=150),
    Row("05", "qwen2.5-vl-7b", "--batch_size 48 --attention flash", "flash_attn", limit_s=150),
    Row("05", "qwen2.5-vl-7b", VLLM, "vllm", limit_s=240),
    Row("06", "clip-b32"),
    Row("06", "clip-b32", ""),
    Row("06", "clip-b32", "--decode gpu"),
    Row("06", "clip-l14"),
    Row("06", "clip-l14", ""),
    Row("06", "datacomp.yml"),
    Row("06", "datacomp.yml", ""),
    Row("06", "datacomp.yml", "--dtype half"),
    Row("06", "datacomp.yml", "--dtype half --decode gpu"),
]


# ---- what is measured beside the time


def used_cpu_s() -> float:
    """CPU seconds that this process and those below it have used so far; those that have ended count too."""
    ticks, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
                parents[int(entry.name)] = int(fields[1])
                ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    mine, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in mine} - mine
        mine, grown = mine | more, bool(more)
    return sum(ticks.get(pid, 0) for pid in mine) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Samples, in a thread, the CPU seconds used and how busy the device is, with the time of each."""

    def __init__(self, place: Place) -> None:
        self.cpu: list[tuple[float, float]] = []
        self.busy: list[tuple[float, float]] = []
        self._ended = threading.Event()
        self._smi = _nvidia_smi() if place.on_cuda else None
        self._threads = [threading.Thread(target=self._sample_cpu, daemon=True)]
        if self._smi:
            self._threads.append(threading.Thread(target=self._read_smi, daemon=True))
        for thread in self._threads:
            thread.start()

    def _sample_cpu(self) -> None:
        while not self._ended.wait(0.1):
            self.cpu.append((time.time(), used_cpu_s()))

    def _read_smi(self) -> None:
        assert self._smi is not None and self._smi.stdout is not None
        for line in self._smi.stdout:
            if line.strip().isdigit():
                self.busy.append((time.time(), int(line) / 100))

    def close(self) -> None:
        self._ended.set()
        if self._smi:
            self._smi.terminate()
        for thread in self._threads:
            thread.join(5)

    def cores_between(self, began: float, ended: float) -> float:
        inside = [(when, cpu) for when, cpu in self.cpu if began <= when <= ended]
        if len(inside) < 2:
            return 0.0
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    def busy_between(self, began: float, ended: float) -> float | None:
        inside = [busy for when, busy in self.busy if began <= when <= ended]
        return sum(inside) / len(inside) if inside else None


def _nvidia_smi() -> subprocess.Popen[str] | None:
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    try:
        return subprocess.Popen([*command, "-i", f"GPU-{uuid}"], stdout=subprocess.PIPE, text=True)
    except OSError:
        return None


def matrix_tflops(place: Place) -> float:
    """TFLOP a second of the best of some large bf16 products: the card's limit as it stands here."""
    import torch

    side = 256 if place.tiny else 8192
    a = torch.randn(side, side, device=place.device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(3 if place.tiny else 20):
        _wait(place)
        began = time.perf_counter()
        a @ a
        _wait(place)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def _wait(place: Place) -> None:
    import torch

    if place.on_cuda:
        torch.cuda.synchronize()


def measure_loop(place: Place, step: Callable[[], int]) -> Measured:
    """The published loop: ``step`` does one batch and returns its images."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        counted = step()
    step()
    _wait(place)
    watch, images = Watch(place), 0
    began = time.time()
    while images == 0 or (time.time() - began < LOOP_SECONDS and not place.tiny):
        images += step()
        _wait(place)
    ended = time.time()
    watch.close()
    return Measured(
        images / (ended - began),
        watch.busy_between(began, ended),
        counter.get_total_flops() / counted / 1e12,
        watch.cores_between(began, ended),
        torch.cuda.max_memory_allocated() / 1e9 if place.on_cuda else 0.0,
    )


def measure_stage(place: Place, script: str, output: Path, stage: str, *flags: object) -> Measured:
    """The stage, from the end of its first shard to the end of its last."""
    import torch

    watch = Watch(place)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run_stage(script, *flags)
    finally:
        watch.close()
    receipts = sorted(StageReceipts.read(output, stage).receipts, key=lambda receipt: receipt["finished"])
    if failed := sum(sum(receipt["counts"]["failed"].values()) for receipt in receipts):
        raise InfrastructureError(f"{failed} samples failed")
    began = receipts[0]["finished"]
    ended = max(receipts[-1]["finished"], began + 0.001)  # receipts tell milliseconds
    images = sum(receipt["counts"]["kept"] for receipt in receipts[1:])
    return Measured(
        images / (ended - began),
        watch.busy_between(began, ended),
        0.0,
        watch.cores_between(began, ended),
        torch.cuda.max_memory_allocated() / 1e9 if place.on_cuda else 0.0,
    )


def device_flags(place: Place) -> list[str]:
    return [] if place.on_cuda else ["--device", "cpu"]


# ---- stage 03


def measure_03(place: Place, row: Row) -> Measured:
    from curation.backends.generate.presets import presets

    preset = presets()[row.model]
    if row.flags == LOOP:
        return _loop_03(place, row.model, preset)
    flags: list[object] = [*row.flags.split(), *device_flags(place)]
    batch = 2 if place.tiny else BATCH_03 if preset.batch_size >= 16 or row.model == "flux.1-schnell" else 8
    flags += ["--batch_size", batch]
    make_input(place.folder, 2 if place.tiny else SHARDS, place.images(batch))
    flags = [gpu_models.save_taesd(place.folder / "taesd") if flag == "taesd" else flag for flag in flags]
    flags += ["--model", row.model]
    if "--check" not in row.flags:  # no picture of random weights shows a face, so that each would be made four times
        flags += ["--check", "none"]
    if place.tiny:
        flags += ["--dtype", "float32", "--height", 64, "--width", 64]
        flags += ["--text_tokens", 32] if preset.text_tokens else []
    edits = place.folder / "edits"
    with gpu_models.in_place_of_the_hub(row.model, place.device, place.tiny):
        flags = ["--input", place.folder / "prompts", "--output", edits, *flags]
        return measure_stage(place, "03_generate_images_multigpu", edits, STAGES["03"], *flags)


def _loop_03(place: Place, name: str, preset: Any) -> Measured:
    """Everything one after the other in one thread, as the published scripts do."""
    import torch

    side = 64 if place.tiny else preset.height
    batch = 2 if place.tiny else BATCH_03 if preset.batch_size >= 16 or name == "flux.1-schnell" else 8
    pipeline = gpu_models.pipeline(name, place.device, place.tiny)
    more = {"max_sequence_length": 32 if place.tiny else preset.text_tokens} if preset.text_tokens else {}
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = itertools.count()

    def step() -> int:
        prompts = [f"A photo of person {next(numbers)} who walks a dog in the evening light" for _ in range(batch)]
        made = pipeline(
            prompt=prompts,
            height=side,
            width=side,
            num_inference_steps=preset.steps,
            guidance_scale=preset.guidance,
            generator=generator,
            **more,
        )
        for image in made.images:
            image.save(io.BytesIO(), format="JPEG", quality=QUALITY)
        return len(made.images)

    with torch.inference_mode():
        return measure_loop(place, step)


# ---- stage 05


def measure_05(place: Place, row: Row) -> Measured:
    import florence2

    florence = row.model == "florence2-base"
    side = 64 if place.tiny else SIDE if florence else 640
    tokens = 4 if place.tiny else TOKENS if florence else 120
    model = place.folder / "model"
    if florence:
        florence2.save(model, "tiny" if place.tiny else "base", side, tokens)
    else:
        gpu_models.save_qwen(model, tokens, tiny=place.tiny)
    with contextlib.nullcontext() if florence else gpu_models.random_weights(place.device):
        if row.flags == LOOP:
            return _loop_05(place, model, florence, side, tokens)
        shards, output = place.folder / "shards", place.folder / "out"
        for number in range(2 if place.tiny else SHARDS):
            _write_photos(shards / f"{number}.tar", place.images(4 if place.tiny else 64), side)
        flags = [*row.flags.split(), "--input", shards, "--output", output, "--model", model]
        flags += ["--max_tokens", tokens]
        if row.flags == VLLM:  # which makes weights of its own
            flags += ["--served_args", "--load-format dummy --max-model-len 4096"]
            flags += ["--served_python", place.vllm] if place.vllm else []
        else:
            flags += device_flags(place)
        return measure_stage(place, "05_recaption", output, STAGES["05"], *flags)


def _write_photos(path: Path, images: int, width: int) -> None:
    """Real photos, again and again, ``width`` pixels wide and three quarters of that high."""
    from PIL import Image

    photos = []
    for sample in example_samples():
        if "jpg" in sample.members:
            buffer = io.BytesIO()
            image = Image.open(io.BytesIO(sample.members["jpg"])).convert("RGB")
            image.resize((width, width * 3 // 4)).save(buffer, "JPEG", quality=90)
            photos.append(buffer.getvalue())
    write_shard(path, ((f"{n:08d}", {"jpg": photos[n % len(photos)], "txt": b"a photo"}) for n in range(images)))


def _loop_05(place: Place, model: Path, florence: bool, side: int, tokens: int) -> Measured:
    """Decode, processor and ``generate`` in turn, in batches of 16."""
    import torch
    from recaption import TASK, batches_of

    from curation import backends
    from curation.caption.captioner import CaptionSettings

    batch = 2 if place.tiny else BATCH_05
    shard = place.folder / "photos.tar"
    _write_photos(shard, 4 * batch, side)
    captioner = backends.load("caption", "florence2" if florence else "qwen")
    loaded = captioner(str(model), CaptionSettings(max_tokens=tokens, device=place.device, threads=4))
    text = TASK
    if not florence:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]}]
        text = loaded.processor.apply_chat_template(asked, add_generation_prompt=True)

    def step() -> int:
        images = next(batches_of(shard, batch))
        inputs = loaded.processor(text=[text] * batch, images=images, return_tensors="pt", padding=True)
        inputs = inputs.to(place.device, loaded.dtype)
        ids = loaded.model.generate(**inputs, max_new_tokens=tokens, num_beams=1, do_sample=False)
        loaded.processor.batch_decode(ids, skip_special_tokens=False)
        return batch

    with torch.inference_mode():
        return measure_loop(place, step)


# ---- stage 06

DIRECTIVES = {
    "clip-b32": ["oai-clip-vit-b32"],
    "clip-l14": ["oai-clip-vit-l14"],
    "datacomp.yml": [
        "oai-clip-vit-b32", "oai-clip-vit-l14", "nsfw-detoxify", "nsfw-image-oai-clip-vit-l-14", "faces-scrfd10g",
        "dedup-isc-ft-v107",
    ],
}  # fmt: skip


def measure_06(place: Place, row: Row) -> Measured:
    weights = gpu_models.save_extractors(place.folder / "models", tiny=place.tiny)
    wanted = {name: weights[name] for name in DIRECTIVES[row.model]}
    photos = [(s.members["jpg"], s.members.get("txt", b"")) for s in example_samples() if "jpg" in s.members]
    if row.flags == LOOP:
        return _loop_06(place, wanted, photos)
    shards, output = place.folder / "shards", place.folder / "out"
    numbers = itertools.count()
    for shard in range(2 if place.tiny else SHARDS):
        members = (
            (f"{n:012d}", {"jpg": image, "txt": text, "json": json.dumps({"uid": f"{n:032x}"}).encode()})
            for n, (image, text) in zip(
                itertools.islice(numbers, place.images(4 if place.tiny else BATCH_06)),
                itertools.cycle(photos),
                strict=False,
            )
        )
        write_shard(shards / f"{shard}.tar", members)
    flags: list[object] = ["--input", shards, "--output", output, *device_flags(place), "--models", ",".join(wanted)]
    flags += [
        "--weights",
        ",".join(f"{name}={path}" for name, path in wanted.items()),
        "--postprocess_features",
        "all",
        "--embeddings",
        "none",
    ]
    flags += ["--batch_size", 2 if place.tiny else BATCH_06, *row.flags.split()]
    return measure_stage(place, "06_metadata", output, STAGES["06"], *flags)


def _loop_06(place: Place, wanted: dict[str, Path], photos: Sequence[tuple[bytes, bytes]]) -> Measured:
    """One process decodes, prepares and computes by turns, model after model."""
    import torch

    from curation import backends
    from curation.extract.api import order
    from curation.extract.catalogue import Catalogue
    from curation.extract.config import read_config
    from curation.images import decode_rgb
    from tests.backends.tiny_extractors import SampleBatch

    given = {"models": ",".join(wanted), "weights": ",".join(f"{name}={path}" for name, path in wanted.items())}
    given |= {"embeddings": "none", "input_tars": str(place.folder), "output_metadata_dir": str(place.folder)}
    families = [backends.load("extract", name) for name in backends.names("extract")]
    catalogue = Catalogue(families, read_config(None, given))
    made = order([catalogue.make(name, place.device, 1) for name in wanted])
    batch = 2 if place.tiny else BATCH_06
    endless = itertools.cycle(photos)

    def step() -> int:
        some = list(itertools.islice(endless, batch))
        pictures = [decode_rgb(image, on_white=False) for image, _ in some]
        view = SampleBatch(pictures, [text.decode() for _, text in some], {}, place.device)
        for extractor in made:
            found = extractor.compute(view)
            view.features.update({feature.name: found[feature.name] for feature in extractor.features})
            for values in found.values():
                _ = values.cpu() if isinstance(values, torch.Tensor) else values
        return batch

    with torch.inference_mode():
        return measure_loop(place, step)


# ---- the rows, each in a process of its own


def measure(row: Row, place: Place) -> Measured:
    from curation.backends.generate.loading import quiet_libraries

    quiet_libraries()
    if row.stage == "roofline":
        return Measured(matrix_tflops(place))
    return {"03": measure_03, "05": measure_05, "06": measure_06}[row.stage](place, row)


@dataclass
class Table:
    """Prints each row as it comes, beside the published loop of its model."""

    roofline: float
    loops: dict[str, Measured] = field(default_factory=dict)

    def add(self, row: Row, found: Measured) -> None:
        key = f"{row.stage} {row.model}"
        if row.flags == LOOP:
            self.loops[key] = found
        loop = self.loops.get(key)
        cells = [
            row.stage,
            row.model,
            row.flags or AS_IT_IS,
            f"{found.images_per_s:,.{1 if found.images_per_s < 100 else 0}f}",
            f"{found.images_per_s / loop.images_per_s:.2f}" if loop else "?",
            "?" if found.busy is None else f"{found.busy:.0%}",
            f"{found.images_per_s * loop.tflop / self.roofline:.1%}" if loop else "?",
            f"{found.cores:.1f}",
            f"{found.memory_gb:.1f} GB" if found.memory_gb else "?",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def run_apart(row: Row, options: argparse.Namespace, rate: float, limit_s: float) -> Measured:
    """The row in a process of its own.  Raises InfrastructureError, one line, where it fails or takes too long."""
    if row.needs and not (row.flags == VLLM and options.vllm) and find_spec(row.needs) is None:
        raise InfrastructureError(f"{row.needs} is not installed")
    if options.tiny:
        return measure_here(row, options)
    command = [sys.executable, __file__, "--row", json.dumps([row.stage, row.model, row.flags]), "--rate", str(rate)]
    command += ["--folder", str(options.folder), "--vllm", options.vllm]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(f"took more than {limit_s:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise InfrastructureError(lines[-1] if lines else f"ended with {done.returncode}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(row: Row, options: argparse.Namespace) -> Measured:
    device = "cpu" if options.tiny else "cuda:0"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return measure(row, Place(device, options.tiny, Path(folder), options.rate, options.vllm))


def machine(tiny: bool) -> str:
    """The card, its driver and the software in one line."""
    import torch

    if tiny:
        return f"the CPU, torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    with contextlib.suppress(OSError):
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        cores = f"{len(os.sched_getaffinity(0))} host cores"
        software = f"torch {torch.__version__}, Python {platform.python_version()}"
        return f"{properties.name}, {memory}, driver {driver or '?'}, {software}, {cores}"
    return f"{properties.name}, torch {torch.__version__}"


def chosen(words: Sequence[str] | None) -> Iterator[Row]:
    """The rows that were asked for."""
    for row in ROWS:
        if not words or any(any(word in part for part in (row.stage, row.model)) for word in words):
            yield row


def main() -> int:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose stage or model has one of these words")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no further row is begun")
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parse(parser)
    if options.row:
        print(json.dumps(vars(measure_here(Row(*json.loads(options.row)), options))))
        return 0
    import torch

    if not options.tiny and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing is measured (--tiny runs the code on the CPU).\n")
        rows = [(row.stage, row.model, row.flags or AS_IT_IS, "not measured") for row in chosen(options.only)]
        print_table(COLUMNS[:4], rows)
        return 0
    began = time.monotonic()
    table = Table(run_apart(Row("roofline", ""), options, 0.0, LIMIT_S).images_per_s)
    print(f"{machine(options.tiny)}; a large bf16 product reaches {table.roofline:,.2f} TFLOP a second\n", flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|---|{'---:|' * (len(COLUMNS) - 3)}", flush=True)
    not_measured = []
    for row in chosen(options.only):
        left = 60 * options.minutes - (time.monotonic() - began)
        loop = table.loops.get(f"{row.stage} {row.model}")
        try:
            if left < LIMIT_S / 3:
                raise InfrastructureError("no time is left (--minutes)")
            if loop is None and row.flags != LOOP:
                raise InfrastructureError("the published loop was not measured")
            if options.tiny and "--compile" in row.flags:
                raise InfrastructureError("to compile for the CPU takes minutes")
            table.add(row, run_apart(row, options, loop.images_per_s if loop else 0.0, min(row.limit_s, left)))
        except InfrastructureError as error:
            not_measured.append(f"{row.name}: not measured: {error}")
    print("\n" + "\n".join(f"- {line}" for line in not_measured) if not_measured else "", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
