"""Plans which images are generated together: sizes follow the originals, and the plan depends only on the shard."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

# Width to height.  They are few, because every size has an incomplete last batch and a compiled graph of its own.
ASPECT_RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0)  # and their inverses
MIN_AREA = 0.75  # as a share of the requested area


@dataclass(frozen=True, slots=True)
class Job:
    """One image to generate.  ``digest``: the digest of everything on which it depends, as 16 hex digits."""

    key: str
    prompt: str
    width: int
    height: int
    digest: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs of one size that are generated together.  ``digest`` covers all of them: a batch is always done as a whole,
    because the last bits of an image depend on the other images in its batch."""

    width: int
    height: int
    jobs: tuple[Job, ...]
    digest: str


def bucket_sizes(width: int, height: int, multiple: int) -> list[tuple[int, int]]:
    """The (width, height) for each of ``ASPECT_RATIOS``, in pixels, none larger in area than ``width`` × ``height``.

    Sides are multiples of ``multiple``.  Each is the possible size that is nearest in ratio and area, both measured by
    the logarithm, with double weight for the ratio.  Small areas give fewer sizes, because several ratios coincide.
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
    """The size nearest in ratio to the sample's ``width`` and ``height``; ``fixed`` if the sample has none."""
    width, height = (metadata.get(name) for name in ("width", "height"))
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 1 << 31 for side in (width, height)):
        return fixed
    ratio = math.log(width / height)  # type: ignore[operator]
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))


def plan_batches(jobs: Iterable[Job], batch_size: int, round_number: int = 0) -> list[Batch]:
    """Put jobs of one size into batches of ``batch_size``, in the shard's order; batches are sorted by first job.

    round_number: How many times these samples were tried before; it is part of the batches' digests.
    """
    waiting: dict[tuple[int, int], list[Job]] = {}
    numbered: list[tuple[int, Batch]] = []
    first: dict[tuple[int, int], int] = {}
    for number, job in enumerate(jobs):
        size = (job.width, job.height)
        row = waiting.setdefault(size, [])
        first.setdefault(size, number)
        row.append(job)
        if len(row) == batch_size:
            numbered.append((first.pop(size), _batch(row, round_number)))
            del waiting[size]
    numbered += [(first[size], _batch(row, round_number)) for size, row in waiting.items()]
    return [batch for _, batch in sorted(numbered, key=lambda item: item[0])]


def shrunk_batches(batches: Sequence[Batch], limit: Callable[[int, int], int]) -> dict[str, int]:
    """``"<width>x<height>"`` → how many images fit at once, for each size whose batches must be divided.

    limit: (width, height) → how many images of that size fit.
    """
    fullest: dict[tuple[int, int], int] = {}
    for batch in batches:
        size = (batch.width, batch.height)
        fullest[size] = max(len(batch.jobs), fullest.get(size, 0))
    limits = {size: limit(*size) for size in fullest}
    return {f"{w}x{h}": most for (w, h), most in limits.items() if most < fullest[w, h]}


def seed_of(seed: int, key: str, round_number: int = 0) -> int:
    """The 63-bit seed of one try of a sample: a hash of the run's seed, the sample's key and, from the second try on,
    the number of the round.  It is independent of the batch."""
    text = f"{seed}\0{key}\0{round_number}" if round_number else f"{seed}\0{key}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _batch(jobs: list[Job], round_number: int) -> Batch:
    parts = [job.digest for job in jobs] + ([f"round {round_number}"] if round_number else [])
    digest = xxhash.xxh3_64_hexdigest("\0".join(parts).encode())
    return Batch(jobs[0].width, jobs[0].height, tuple(jobs), digest)
