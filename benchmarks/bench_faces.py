#!/usr/bin/env python3
"""Stage 01 beside its limits and a plain loop, in one run: with a detector, and with recorded boxes.

detector: images a second of the stage, of a plain loop (tarfile, Pillow, the ONNX graph as it is shipped, all cores),
    and the limit 1 / (t_model + t_decode): the network on ready arrays and the decoder on ready bytes, each measured
    alone on the same cores.  Aim: at least 0.9 of the limit.
recorded: megabytes a second of the stage, of a plain loop (tarfile and json), and of `cat`, all from a cold cache, over
    ten shards of DataComp's size.  Aim: at least half of `cat`.

Start-up (imports, loading the model) is taken off everywhere.  Rounds alternate, so that a busy machine slows all
alike; the median of the rounds' ratios counts.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import (
    StageReceipts,
    example_samples,
    exit_code,
    make_parser,
    median_ratio,
    parse,
    print_table,
    run_stage,
    write_shard,
)

DETECTOR_AIM, RECORDED_AIM = 0.9, 0.5
DATACOMP_SAMPLES = 9150  # in a shard
DATACOMP_BYTES = 35_000  # of a sample: 450 GB for 12.8 million


def example_photos() -> list[tuple[bytes, dict[str, Any]]]:
    """The JPEGs of the example shards with their metadata."""
    from curation.tar.samples import metadata_of

    return [(sample.members["jpg"], metadata_of(sample)) for sample in example_samples() if "jpg" in sample.members]


def members_of(image: bytes, metadata: dict[str, Any]) -> dict[str, bytes]:
    """A sample as DataComp has it, with indented metadata."""
    return {
        "jpg": image,
        "json": json.dumps(metadata, indent=4).encode(),
        "txt": metadata["caption"].encode(),
    }


def time_stage(source: Path, work: Path, *flags: str) -> float:
    """Seconds from the first shard's start to the last one's commit, by the receipts; the output is thrown away."""
    folders = ["--input", source, "--output", work / "captions", "--edits", work / "edits"]
    run_stage("01_filter_noface", *folders, *flags)
    seconds = StageReceipts.read(work / "captions", "01_filter_noface").seconds
    shutil.rmtree(work)
    return seconds


# ---- with a detector


def side_by_side(call: Callable[[Any], object], items: Sequence[Any], threads: int) -> float:
    """Seconds a thing takes for all items, ``threads`` calls at a time."""
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for _ in pool.map(call, items):
            pass
        return time.perf_counter() - began


def shipped_session(threads: int) -> Any:
    """CenterFace's graph as the package has it, but for free dimensions: its weights stay listed as inputs."""
    import onnx
    import onnxruntime

    from curation.backends.faces import centerface

    model = onnx.load(str(centerface.Backend.model_file()))
    for value in (model.graph.input[0], *model.graph.output):
        for i in (0, 2, 3):
            value.type.tensor_type.shape.dim[i].dim_param = f"{value.name}_{i}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def plain_detector_loop(tar: Path, session: Any) -> float:
    """Seconds of a loop as one would first write it."""
    import numpy as np
    from PIL import Image

    began = time.perf_counter()
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                data = archive.extractfile(member).read()  # type: ignore[union-attr]
                image = Image.open(io.BytesIO(data)).convert("RGB")
                scale = 640 / max(image.size)
                width, height = (-(-round(side * scale) // 32) * 32 for side in image.size)
                pixels = np.asarray(image.resize((width, height)), np.float32).transpose(2, 0, 1)[None]
                session.run(None, {"input.1": pixels})
    return time.perf_counter() - began


def bench_detector(work: Path, images: int, threads: int, rounds: int) -> dict[str, Any]:
    """Images a second: decoder, network, limit, stage, plain loop."""
    from curation.backends.faces.centerface import Backend
    from curation.images import decode_rgb

    photos = example_photos()
    data = [photos[i % len(photos)] for i in range(images)]
    bare = [(f"{i:09}", members_of(image, {"caption": meta["caption"]})) for i, (image, meta) in enumerate(data)]
    write_shard(work / "shards" / "00000000.tar", bare)
    detector = Backend()
    pictures = [decode_rgb(image, at_least=detector.wants_pixels) for image, _ in data]
    arrays = [detector.prepare(picture)[0] for picture in pictures]
    shipped = shipped_session(threads)
    seconds: dict[str, list[float]] = {"decoder": [], "network": [], "stage": [], "plain loop": []}
    for _ in range(rounds + 1):  # the first warms up
        seconds["decoder"].append(
            side_by_side(lambda image: decode_rgb(image, at_least=640), [image for image, _ in data], threads)
        )
        seconds["network"].append(side_by_side(detector.infer, arrays, threads))
        seconds["stage"].append(
            time_stage(work / "shards", work / "out", "--detector", "centerface", "--threads", str(threads))
        )
        seconds["plain loop"].append(plain_detector_loop(work / "shards" / "00000000.tar", shipped))
    rates = {name: images / statistics.median(values[1:]) for name, values in seconds.items()}
    limits = [images / (d + n) for d, n in zip(seconds["decoder"], seconds["network"], strict=True)][1:]
    ratio = median_ratio([images / s for s in seconds["stage"][1:]], limits)
    return {"unit": "images/s", **rates, "limit": statistics.median(limits), "ratio": ratio}


# ---- with recorded boxes


def make_recorded_shards(folder: Path, shards: int, samples: int) -> int:
    """Shards of DataComp's size and mixture from the example photos, every fourth sample with a face; bytes in all."""
    import numpy as np
    from PIL import Image

    from curation.images import decode_rgb, encode_jpeg

    folder.mkdir(parents=True)
    rng = random.Random(0)
    images = []
    for image, metadata in example_photos():
        for side in (256, 320, 384, 448, 512):
            picture = Image.fromarray(decode_rgb(image))
            picture.thumbnail((side, side))
            images.append((encode_jpeg(np.asarray(picture), 92), metadata))
    images.sort(key=lambda pair: len(pair[0]))
    while statistics.mean(len(image) for image, _ in images) > DATACOMP_BYTES:
        images.pop()  # DataComp's are smaller on average
    for shard in range(shards):
        made = []
        for _ in range(samples):
            image, metadata = rng.choice(images)
            uid = f"{rng.getrandbits(128):032x}"
            boxes = [[round(rng.random(), 6) for _ in range(4)]] if rng.random() < 0.25 else []
            made.append((f"{uid}-0", members_of(image, {**metadata, "uid": uid, "face_bboxes": boxes})))
        write_shard(folder / f"{shard:08d}.tar", made)
    return sum(path.stat().st_size for path in folder.iterdir())


def drop_from_cache(folder: Path) -> None:
    """Have the kernel forget the files' pages (they are durable, so it may)."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_cat(folder: Path) -> float:
    """Seconds of ``cat`` of all shards into nothing."""
    began = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        subprocess.run(["cat", *sorted(map(str, folder.iterdir()))], stdout=nothing, check=True)
    return time.perf_counter() - began


def plain_recorded_loop(folder: Path) -> float:
    """Seconds of a loop as upstream's: tarfile, json, one dictionary a shard."""
    began = time.perf_counter()
    for path in sorted(folder.iterdir()):
        captions = {}
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    metadata = json.loads(archive.extractfile(member).read())  # type: ignore[union-attr]
                    if metadata["face_bboxes"]:
                        captions[member.name] = metadata["caption"].replace("\n", " ")
        json.dumps(captions)
    return time.perf_counter() - began


def bench_recorded(work: Path, shards: int, samples: int, rounds: int) -> dict[str, Any]:
    """Megabytes a second from a cold cache: cat, stage (as it is by default: --detector auto), plain loop."""
    folder = work / "shards"
    total = make_recorded_shards(folder, shards, samples)
    timers: dict[str, Callable[[], float]] = {
        "cat": lambda: time_cat(folder),
        "stage": lambda: time_stage(folder, work / "out"),
        "plain loop": lambda: plain_recorded_loop(folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            drop_from_cache(folder)
            seconds[name].append(timer())
    rates = {name: total / 1e6 / statistics.median(values) for name, values in seconds.items()}
    size = {"shards": shards, "samples": shards * samples, "bytes a sample": total // (shards * samples)}
    return {"unit": "MB/s", **rates, **size, "ratio": median_ratio(seconds["cat"], seconds["stage"])}


def print_results(results: dict[str, dict[str, Any]]) -> None:
    """One row a bench."""
    rows = []
    for name, r in results.items():
        if "limit" in r:
            limit = f"{r['limit']:.1f} (network {r['network']:.1f}, decoder {r['decoder']:.0f})"
        else:
            limit = f"{r['cat']:.0f} (`cat`)"
        stage, plain = f"{r['stage']:.1f}", f"{r['plain loop']:.1f}"
        rows.append((name, r["unit"], stage, limit, f"**{r['ratio']:.2f}**", r["aim"], plain))
    print_table(["stage 01", "unit", "stage", "limit", "of the limit", "aim", "plain loop"], rows)


def main() -> int:
    """Run what was asked for; exit code 1 where an aim is missed."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=["detector", "recorded"])
    parser.add_argument("--images", type=int, default=120, help="of the detector's bench")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shards", type=int, default=10, help="of the recorded bench: 3 GB with the default size")
    parser.add_argument("--samples", type=int, default=DATACOMP_SAMPLES, help="in each of those shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parse(parser, images=4, threads=1, shards=1, samples=20, rounds=1)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        if options.only != "recorded":
            results["detector"] = bench_detector(work / "detector", options.images, options.threads, options.rounds)
            results["detector"]["aim"] = DETECTOR_AIM
        if options.only != "detector":
            results["recorded"] = bench_recorded(work / "recorded", options.shards, options.samples, options.rounds)
            results["recorded"]["aim"] = RECORDED_AIM
    print_results(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return exit_code(all(r["ratio"] >= r["aim"] for r in results.values()), options)


if __name__ == "__main__":
    sys.exit(main())
