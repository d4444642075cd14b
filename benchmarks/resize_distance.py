"""What an inexact resize gives and costs: milliseconds a picture, and how far CLIP's features move.

    python benchmarks/resize_distance.py SHARDS... [--clip FOLDER]

One thread.  exact: decode, then OpenAI's preprocessing.  fast: --resize fast, JPEGs decoded at a reduced scale and only
what the crop shows resized.  fast, margin 2: the same from no fewer than twice the pixels.  device: decode whole,
resize with torch's antialiased bicubic, as a GPU would (timed on the CPU: its milliseconds say nothing about a GPU).
Features are of the model in --clip (any CLIP of the hub's layout); without it of ViT-B/32 with random weights, whose
distances only tell which way is nearer.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation.backends.clip_preparation import OPENAI_MEAN, OPENAI_STD, CentreCrop, FastCentreCrop, Normalise
from curation.backends.diffusion_tiny import fill_with_noise
from curation.images import decode_rgb, image_size

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--clip", default=None)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--least_side", type=int, default=0, help="only photos whose short side has this many pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jpegs = [data for shard in options.shards for data in photos(shard)]
    jpegs = [data for data in jpegs if min(image_size(data)) >= options.least_side][: options.images]
    if not jpegs:
        parser.error("no such photo in these shards")
    sizes = np.array([image_size(data) for data in jpegs])
    print(f"{len(jpegs)} photos, {sizes.prod(1).mean() / 1e6:.2f} MPix on average")
    model, normalise = load(options.clip), Normalise(OPENAI_MEAN, OPENAI_STD, "cpu", torch.float32)
    ways: dict[str, Callable[[bytes], Any]] = {
        "exact": lambda data: CentreCrop()(decode_rgb(data)),
        "fast": lambda data: fast(data, 1),
        "fast, margin 2": lambda data: fast(data, 2),
        "device": on_device,
    }
    expected, exact_crops = None, None
    print(f"{'':16}{'ms':>6}{'levels':>9}{'cosine':>10}{'least':>10}")
    for name, way in ways.items():
        spent = min(timed(way, jpegs) for _ in range(ROUNDS))
        crops = np.stack([way(data) for data in jpegs])
        with torch.inference_mode():
            parts = torch.from_numpy(crops).split(16)
            features = torch.cat([model.get_image_features(pixel_values=normalise(p)).pooler_output for p in parts])
        features = torch.nn.functional.normalize(features)
        if expected is None or exact_crops is None:
            expected, exact_crops = features, crops.astype(float)
        cosines = (features * expected).sum(1)
        moved = np.sqrt(((crops - exact_crops) ** 2).mean())
        line = f"{1000 * spent / len(jpegs):6.2f}{moved:9.2f}{cosines.mean():10.5f}{cosines.min():10.5f}"
        print(f"{name:16}{line}", flush=True)


def photos(shard: Path) -> list[bytes]:
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
        found = [file.read() for file in files if file]
    return [data for data in found if is_picture(data)]


def is_picture(data: bytes) -> bool:
    from curation.errors import SampleError

    try:
        decode_rgb(data)
    except SampleError:
        return False
    return True


def load(folder: str | None) -> Any:
    from transformers import CLIPConfig, CLIPModel

    if folder is not None:
        return CLIPModel.from_pretrained(folder).eval()
    model = CLIPModel(CLIPConfig()).eval()
    fill_with_noise(model, 1)
    return model


def timed(way: Callable[[bytes], Any], jpegs: list[bytes]) -> float:
    began = time.perf_counter()
    for data in jpegs:
        way(data)
    return time.perf_counter() - began


def fast(data: bytes, margin: int) -> Any:
    crop = FastCentreCrop(margin=margin)
    width, height = image_size(data)
    return crop(decode_rgb(data, at_least=-(-crop.min_short_side * max(width, height) // min(width, height))))


def on_device(data: bytes) -> Any:
    pixels = torch.from_numpy(decode_rgb(data)).permute(2, 0, 1)[None].float()
    height, width = pixels.shape[2:]
    size = [int(224 * side / min(height, width)) for side in (height, width)]
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    top, left = (round((side - 224) / 2) for side in size)
    crop = resized[0, :, top : top + 224, left : left + 224]
    return crop.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
