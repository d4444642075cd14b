#!/usr/bin/env python3
"""What the checks of stage 03 cost, as a share of the time in which its presets generate.

Measured on this machine:
    for each check the milliseconds of CPU time that a picture takes on one thread, while it is prepared and while it is
    judged.  CLIP has the size of the published ViT-L/14 (--clip b32: of ViT-B/32) and random weights, on which the
    speed does not depend.  Prompt and group together share one pass.
    a device that generates, emulated by waiting as long as FLUX.1-schnell needs for a batch, with and without the
    default check beside it: how much longer it is kept.  Aim: less than 5 %.

Computed for an H100 (989 TFLOPS in 16 bits), so that no GPU is needed: the operations of a picture, counted by torch,
over the speed that networks of their kind reach there (assumed, see SPEEDS).  Aim: CLIP takes less than 5 % of every
preset's time, eager and compiled.  CenterFace and Open NSFW compute on the node's CPU meanwhile: the table has the
cores that keep up with the preset, by the milliseconds measured here.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import VERDICTS, example_jpegs, exit_code, make_parser, parse, print_table

AIM = 0.05
CLIPS = {"l14": (24, 1024, 14, 12, 768, 768), "b32": (12, 768, 32, 12, 512, 512), "tiny": (1, 32, 32, 1, 32, 32)}
# A preset → the TFLOP of a picture, and what an H100 reaches of its 989 TFLOPS in each part: (TFLOP, eager, compiled).
# The operations were counted with the published configurations; the speeds are assumed from what such networks reach.
SPEEDS = {
    "flux.1-schnell": ((22.5, 400, 520), (2.4, 400, 400), (1.41, 180, 350)),
    "sd-turbo": ((0.804, 250, 450), (2.51, 180, 350), (0.045, 250, 300)),
    "sdxl-turbo": ((1.59, 300, 470), (2.51, 180, 350), (0.12, 250, 300)),
    "sana-sprint": ((5.93, 300, 420), (8.37, 180, 350), (1.6, 400, 400)),
    "z-image-turbo": ((9 * 56.6, 430, 520), (4.1, 400, 400), (10.5, 180, 350)),
    "flux.2-klein-4b": ((4 * 34.8, 430, 520), (4.1, 400, 400), (10.5, 180, 350)),
}
CLIP_SPEED = {"l14": 450, "b32": 350, "tiny": 350}  # TFLOPS that CLIP reaches there


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--clip", choices=CLIPS, default="l14", help="the size of CLIP; default: l14, as stage 03's")
    parser.add_argument("--images", type=int, default=4, help="pictures of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4, help="of the emulated device")
    options = parse(parser, clip="tiny", images=2, rounds=1, batches=1)
    pictures = generated(options.images, 1024)
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        clip, tflop = make_clip(Path(work), options.clip)
        costs = measure(clip, pictures, options.rounds)
    kept = emulate(options.batches, options.rounds, 32 if not options.tiny else 2)
    rows = [[name, f"{prepare:.1f}", f"{judge:.1f}"] for name, (prepare, judge) in costs.items()]
    print("Measured, milliseconds of CPU time of a picture on one thread:\n")
    print_table(["check", "prepared", "judged"], rows)
    longer = kept["face"] / kept["nothing"] - 1
    print(f"\nMeasured, an emulated device that generates as FLUX.1-schnell: {longer:+.1%} longer with --check face "
          f"(aim: less than {AIM:.0%}, {VERDICTS[longer < AIM]})\n")  # fmt: skip
    met = print_computed(tflop, CLIP_SPEED[options.clip], costs)
    return exit_code(met and longer < AIM, options)


# ---- measured


def generated(count: int, side: int) -> list[Any]:
    """Photos at the size of generated pictures, as decoded JPEGs."""
    import numpy as np
    from PIL import Image

    from curation.images import decode_rgb, encode_jpeg

    photos = example_jpegs()
    sized = (Image.fromarray(decode_rgb(photos[i % len(photos)])).resize((side, side)) for i in range(count))
    return [decode_rgb(encode_jpeg(np.asarray(picture), 90)) for picture in sized]


def make_clip(folder: Path, size: str) -> tuple[Path, float]:
    """A CLIP of a published size with random weights, and the TFLOP of a picture and a text."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPConfig, CLIPModel

    from tests.backends.tiny_extractors import save_clip

    layers, width, patch, text_layers, text_width, projection = CLIPS[size]
    config = CLIPConfig(
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                       "num_attention_heads": max(1, width // 64), "patch_size": patch, "image_size": 224},
        text_config={"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers,
                     "num_attention_heads": max(1, text_width // 64)},
        projection_dim=projection,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.get_image_features(pixel_values=torch.zeros(1, 3, 224, 224))
        model.get_text_features(input_ids=torch.zeros(1, 77, dtype=torch.long))
    save_clip(folder / "clip", width=32)  # its tokenizer and preprocessing
    (folder / "clip" / "model.safetensors").unlink()
    model.save_pretrained(folder / "clip")
    return folder / "clip", counter.get_total_flops() / 1e12


def measure(clip: Path, pictures: Sequence[Any], rounds: int) -> dict[str, tuple[float, float]]:
    """Check → milliseconds of a picture while it is prepared and while it is judged, on one thread; medians."""
    import torch

    from curation.backends.check import load_checks
    from curation.check import Asked, CheckSettings
    from curation.rewrite.groups import read_groups

    torch.set_num_threads(1)
    name, groups = f"clip:{clip}", read_groups("default")
    settings = CheckSettings(prompt_model=name, group_model=name, groups=groups, min_prompt_score=0.0)
    prompt = "A middle eastern woman throws a basketball at an office."
    asked = [Asked(str(i), prompt, groups[i % len(groups)]) for i in range(len(pictures))]
    found = {}
    for names in (("face",), ("safety",), ("prompt",), ("group",), ("prompt", "group")):
        checks = load_checks(names, settings)
        seconds: list[tuple[float, float]] = []
        for _ in range(rounds):
            fresh = [picture.copy() for picture in pictures]
            began = time.process_time()
            prepared = [[check.prepare(picture) for picture in fresh] for check in checks]
            middle = time.process_time()
            for check, ready in zip(checks, prepared, strict=True):
                check.judge(ready, asked)
            seconds.append((middle - began, time.process_time() - middle))
        for check in checks:
            check.close()
        del checks
        prepare, judge = (statistics.median(s[i] for s in seconds) * 1000 / len(pictures) for i in (0, 1))
        found[" and ".join(names)] = (prepare, judge)
    return found


def emulate(batches: int, rounds: int, batch: int) -> dict[str, float]:
    """Seconds for which a device that generates is kept, without checks and with CenterFace beside it.

    The device waits as long as an H100 needs for a batch of FLUX.1-schnell; the CPU of this machine is free meanwhile,
    as on a node with a GPU.  A batch is prepared while the next ones are generated, and at most two of them wait.
    """
    import os

    from curation.backends.check import load_checks
    from curation.check import Asked, CheckSettings

    seconds_of_batch = batch * seconds("flux.1-schnell", compiled=False)
    pictures = generated(batch, 384)
    asked = [Asked(str(i), "a photo") for i in range(batch)]
    found: dict[str, list[float]] = {"nothing": [], "face": []}
    for _ in range(rounds):
        for name, taken in found.items():
            checks = load_checks([name] if name == "face" else [], CheckSettings())
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                waiting: list[tuple[Any, list[Future[Any]]]] = []
                began = time.perf_counter()
                for _ in range(batches):
                    time.sleep(seconds_of_batch)
                    for check in checks:
                        waiting.append((check, [pool.submit(check.prepare, picture) for picture in pictures]))
                    while len(waiting) > 2:
                        check, tasks = waiting.pop(0)
                        check.judge([task.result() for task in tasks], asked)
                taken.append(time.perf_counter() - began)
                for check, tasks in waiting:
                    check.judge([task.result() for task in tasks], asked)
    return {name: statistics.median(taken) for name, taken in found.items()}


# ---- computed


def seconds(preset: str, *, compiled: bool) -> float:
    """Of a picture on an H100."""
    return sum(tflop / (fast if compiled else eager) for tflop, eager, fast in SPEEDS[preset])


def print_computed(tflop: float, speed: float, costs: dict[str, tuple[float, float]]) -> bool:
    """Print the table; returns whether the aim is met at every preset."""
    of_clip = tflop / speed
    rows, shares = [], []
    for preset in SPEEDS:
        for compiled in (False, True):
            needed = seconds(preset, compiled=compiled)
            shares.append(of_clip / needed)
            times = [f"{needed * 1000:.1f}", f"{of_clip * 1000:.2f}", f"{of_clip / needed:.1%}"]
            cores = [f"{sum(costs[name]) / 1000 / needed:.1f}" for name in ("face", "safety")]
            rows.append([preset, "compiled" if compiled else "eager", *times, *cores])
    print("Computed for an H100, of a picture:\n")
    heads = ["preset", "flags", "generated, ms", "prompt and group, ms", "share", "cores: face", "cores: Open NSFW"]
    print_table(heads, rows)
    met = max(shares) < AIM
    print(f"\nlargest share {max(shares):.1%}, aim: less than {AIM:.0%}: {VERDICTS[met]}")
    return met


if __name__ == "__main__":
    sys.exit(main())
