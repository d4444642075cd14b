"""Which pictures are made together: their sizes follow the originals, and only the shard decides the batch plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

# Width to height.  Few: every size has a last batch that is not full, and a compiled graph.
ASPECT_RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0)  # and their inverses
MIN_AREA = 0.75  # of the area asked for


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to make.  ``digest``: of everything that it depends on, as 16 hex digits."""

    key: str
    prompt: str
    width: int
    height: int
    digest: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs of one size that are made together.  ``digest`` covers all of them: a batch is done whole or not at all,
    since a picture's last bits depend on its neighbours."""

    width: int
    height: int
    jobs: tuple[Job, ...]
    digest: str


def bucket_sizes(width: int, height: int, multiple: int) -> list[tuple[int, int]]:
    """The (width, height) for each of ``ASPECT_RATIOS``, in pixels, none larger in area than ``width`` × ``height``.

    Sides are multiples of ``multiple``; of the sizes that are possible, the nearest in ratio and in area, both by the
    logarithm, the ratio counting double.  Small areas give fewer sizes, as several ratios fall on one.
    """
    budget = width * height
    possible = [
        (w, h)
        for w in range(multiple, min(3 * math.isqrt(budget), budget // multiple) + 1, multiple)
        for h in range(budget // w // multiple * multiple, multiple - 1, -multiple)
        if w * h >= MIN_AREA * budget
    ]

    def cost(size: tuple[int, int], ratio: float) -> float:
        w, h = size
        return 2 * abs(math.log(w / h / ratio)) + math.log(budget / (w * h))

    if not possible:
        return [(width, height)]
    upright = {min(possible, key=lambda size: (cost(size, ratio), size)) for ratio in ASPECT_RATIOS}
    return sorted(upright | {(h, w) for w, h in upright}, key=lambda size: size[0] / size[1])


def nearest_size(
    sizes: Sequence[tuple[int, int]], metadata: Mapping[str, Any], fixed: tuple[int, int]
) -> tuple[int, int]:
    """Of ``sizes`` the nearest in ratio to the sample's ``width`` and ``height``; ``fixed`` where it has none."""
    width, height = (metadata.get(name) for name in ("width", "height"))
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 1 << 31 for side in (width, height)):
        return fixed
    ratio = math.log(width / height)  # type: ignore[operator]
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))


def plan_batches(jobs: Iterable[Job], batch_size: int) -> list[Batch]:
    """Jobs of one size together, ``batch_size`` at a time: the shard's order within a size, by first job overall."""
    waiting: dict[tuple[int, int], list[Job]] = {}
    numbered: list[tuple[int, Batch]] = []
    first: dict[tuple[int, int], int] = {}
    for number, job in enumerate(jobs):
        size = (job.width, job.height)
        row = waiting.setdefault(size, [])
        first.setdefault(size, number)
        row.append(job)
        if len(row) == batch_size:
            numbered.append((first.pop(size), _batch(row)))
            del waiting[size]
    numbered += [(first[size], _batch(row)) for size, row in waiting.items()]
    return [batch for _, batch in sorted(numbered, key=lambda item: item[0])]


def shrunk_batches(batches: Sequence[Batch], limit: Callable[[int, int], int]) -> dict[str, int]:
    """``"<width>x<height>"`` → how many pictures fit at once, for each size of which a batch had to be divided.

    limit: (width, height) → how many pictures of that size fit.
    """
    fullest = {(batch.width, batch.height): len(batch.jobs) for batch in reversed(batches)}
    limits = {size: limit(*size) for size in fullest}
    return {f"{w}x{h}": most for (w, h), most in limits.items() if most < fullest[w, h]}


def seed_of(seed: int, key: str) -> int:
    """The 63-bit seed of one sample's randomness: a hash of the run's seed and the sample's key, whatever its batch."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _batch(jobs: list[Job]) -> Batch:
    digest = xxhash.xxh3_64_hexdigest("\0".join(job.digest for job in jobs).encode())
    return Batch(jobs[0].width, jobs[0].height, tuple(jobs), digest)
