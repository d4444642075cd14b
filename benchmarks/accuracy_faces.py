"""How often a detector is right about "this photo shows a face", on photos whose faces people have counted.

    python benchmarks/accuracy_faces.py --data DATA [--tiny]

DATA holds shards/*.tar and truth.tsv (columns shard, key, faces; "?" is left out), and may hold extras/*.tar, pictures
that are no photos.  Threshold and size are chosen on the shards of --choose and reported on those of --report, which
the choice never sees.  Prints Markdown: docs/accuracy-faces.md keeps the last run.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from measuring import ROOT, print_table

from curation.backends import load
from curation.commands.audit.intervals import wilson
from curation.faces import DetectorSettings, FaceDetector
from curation.images import Pixels, decode_rgb
from curation.options import parse_options
from curation.tar.samples import (
    image_of,
    read_samples,
)

FLOOR = 0.05  # detections below this score are not looked at
THRESHOLDS = [round(0.20 + 0.05 * i, 2) for i in range(13)]
AUTHORS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Options:
    """Accuracy of a face detector on labelled photos."""

    data: Path = ROOT / "examples"
    """Folder with shards/, truth.tsv and perhaps extras/."""
    detector: str = "centerface"
    model: Path | None = None
    sizes: tuple[int, ...] = (320, 416, 512, 640, 800)
    """Values of --det_size to choose from."""
    choose: tuple[str, ...] = ("00000000", "00000003", "00000007")
    report: tuple[str, ...] = ("00000001", "00000004")
    threads: int = 1
    tiny: bool = False
    """One size on two small shards: tells whether the code runs."""


@dataclass(frozen=True)
class Photo:
    """One picture, and the faces that people counted on it (None: not counted)."""

    shard: str
    key: str
    faces: int | None
    pixels: Pixels


@dataclass(frozen=True)
class FaceConfusion:
    """Photos with a face found and missed, photos without one that passed and were taken for one."""

    found: int
    missed: int
    false: int
    passed: int

    @staticmethod
    def count(scores: Sequence[tuple[float, int]], threshold: float) -> FaceConfusion:
        """From (best score, faces counted by eye) of each photo."""
        tally = {(seen, hit): 0 for seen in (True, False) for hit in (True, False)}
        for score, faces in scores:
            tally[faces > 0, score >= threshold] += 1
        return FaceConfusion(tally[True, True], tally[True, False], tally[False, True], tally[False, False])

    @property
    def errors(self) -> int:
        """Misses and false alarms."""
        return self.missed + self.false


def share(hits: int, total: int) -> str:
    """``61/63 = 0.968 (0.892–0.991)``."""
    low, high = wilson(hits, total)
    return f"{hits}/{total} = {hits / max(total, 1):.3f} ({low:.3f}–{high:.3f})"


def read_photos(tar: Path, truth: dict[tuple[str, str], str]) -> Iterator[Photo]:
    """Every decodable picture of a shard."""
    for sample in read_samples(tar):
        counted = truth.get((tar.stem, sample.key), "?")
        faces = None if counted == "?" else int(counted)
        yield Photo(tar.stem, sample.key, faces, decode_rgb(image_of(sample)))


def best_scores(detector: FaceDetector, photos: Sequence[Photo]) -> tuple[list[float], float]:
    """The best box's score of each photo (0 without one), and milliseconds a photo."""
    began = time.perf_counter()
    scores = [float(boxes[0, 4]) if len(boxes := detector.detect(photo.pixels)) else 0.0 for photo in photos]
    return scores, 1e3 * (time.perf_counter() - began) / max(1, len(photos))


def print_counts(detector: FaceDetector, photos: Sequence[Photo]) -> None:
    """How often the number of faces is right, which --min_faces depends on."""
    pairs = [(photo.faces or 0, len(detector.detect(photo.pixels))) for photo in photos if photo.faces]
    several = [(counted, found) for counted, found in pairs if counted > 1]
    right, right_of_several = (sum(counted == found for counted, found in group) for group in (pairs, several))
    print(
        f"\nAs many faces as people count: on {share(right, len(pairs))} of the photos with a face, "
        f"on {share(right_of_several, len(several))} of those with several."
    )


def choose(by_size: dict[int, list[tuple[float, int]]]) -> tuple[int, float]:
    """(size, threshold) with the fewest errors; then the smaller size, then the threshold nearest the authors' 0.5."""
    return min(
        ((size, threshold) for size in by_size for threshold in THRESHOLDS),
        key=lambda st: (FaceConfusion.count(by_size[st[0]], st[1]).errors, st[0], abs(st[1] - AUTHORS_THRESHOLD)),
    )


def print_choice(by_size: dict[int, list[tuple[float, int]]], ms: dict[int, float], options: Options) -> None:
    """Errors of every size and threshold on the shards that the choice is made on."""
    pairs = next(iter(by_size.values()))
    faces = sum(1 for _, n in pairs if n)
    print(f"## Choice, on {', '.join(options.choose)}: {faces} photos with a face, {len(pairs) - faces} without\n")
    print("Missed + false alarms by threshold; milliseconds a photo.\n")
    rows = []
    for size, scores in by_size.items():
        cells = [FaceConfusion.count(scores, t) for t in THRESHOLDS]
        rows.append((size, f"{ms[size]:.0f}", *(f"{c.missed}+{c.false}" for c in cells)))
    print_table(["det_size", "ms", *(f"{t:.2f}" for t in THRESHOLDS)], rows)


def print_report(rows: Sequence[tuple[str, FaceConfusion]]) -> None:
    """Recall, precision and specificity with their intervals."""
    columns = ["shards", "with a face, found (recall)", "taken for one, rightly (precision)"]
    cells = [
        (
            name,
            share(c.found, c.found + c.missed),
            share(c.found, c.found + c.false),
            share(c.passed, c.passed + c.false),
        )
        for name, c in rows
    ]
    print_table([*columns, "without, passed (specificity)"], cells)


def print_extras(options: Options, detector: FaceDetector) -> None:
    """Which of the pictures that are no photos the detector sees a face in, to be judged by eye."""
    for tar in sorted((options.data / "extras").glob("*.tar"))[:1]:
        photos = list(read_photos(tar, {}))
        scores, _ = best_scores(detector, photos)
        hits = [(photo, score) for photo, score in zip(photos, scores, strict=True) if score >= detector.threshold]
        print(f"\n## Pictures that are no photos (extras/{tar.name})\n")
        print(f"A face is seen in {share(len(hits), len(photos))} of them:\n")
        for photo, score in hits:
            print(f"- {photo.key}, score {score:.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Choose on one part, report on the other."""
    options = parse_options(Options, argv)
    if options.tiny:
        options = replace(options, sizes=(320,), choose=("00000000",), report=("00000003",))
    with open(options.data / "truth.tsv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        truth = {(row["shard"], row["key"]): row["faces"] for row in rows}
    wanted = [*options.choose, *options.report]
    photos = [p for shard in wanted for p in read_photos(options.data / "shards" / f"{shard}.tar", truth)]
    counted = [photo for photo in photos if photo.faces is not None]
    print(f"{len(photos)} photos, {len(photos) - len(counted)} of them ambiguous and left out\n")

    backend = load("faces", options.detector)
    scores, ms = {}, {}
    for size in options.sizes:
        scores[size], ms[size] = best_scores(
            backend(DetectorSettings(options.model, size, FLOOR, options.threads)), counted
        )

    def part(shards: Sequence[str], size: int) -> list[tuple[float, int]]:
        pairs = zip(counted, scores[size], strict=True)
        return [(score, photo.faces or 0) for photo, score in pairs if photo.shard in shards]

    by_size = {size: part(options.choose, size) for size in options.sizes}
    print_choice(by_size, ms, options)
    size, threshold = choose(by_size)
    print(
        f"\nChosen: `--det_size {size} --threshold {threshold:.2f}`\n\n## Accuracy, share and 95 % interval (Wilson)\n"
    )
    print_report(
        [
            *((shard, FaceConfusion.count(part([shard], size), threshold)) for shard in options.report),
            (f"**{' + '.join(options.report)}**", FaceConfusion.count(part(options.report, size), threshold)),
            ("for comparison, those of the choice", FaceConfusion.count(by_size[size], threshold)),
        ]
    )
    chosen = backend(DetectorSettings(options.model, size, threshold, options.threads))
    print_counts(chosen, [photo for photo in counted if photo.shard in options.report])
    pairs = zip(counted, scores[size], strict=True)
    wrong = [(p, score) for p, score in pairs if p.shard in options.report and (score >= threshold) != bool(p.faces)]
    print("\nWrong on the reported shards: " + ("" if wrong else "none.") + "\n" * bool(wrong))
    for photo, score in wrong:
        print(f"- {photo.shard} {photo.key}: {photo.faces} faces by eye, best score {score:.2f}")
    print_extras(options, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
