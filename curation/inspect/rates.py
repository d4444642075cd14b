"""Whether a share in one group differs from that in the others beyond chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """The share in one group less that in the others, with its interval.

    beyond_chance: the interval does not hold 0.
    """

    share: float
    others: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.share - self.others

    @property
    def beyond_chance(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(hits: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a share: E. B. Wilson, JASA 22 (1927).  (0, 1) where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def difference(hits: int, count: int, other_hits: int, other_count: int, comparisons: int = 1) -> Difference | None:
    """Of two shares, with Newcombe's hybrid score interval (Statistics in Medicine 17 (1998), method 10).

    comparisons: how many are looked at together; each is held to a level such that all of them keep 95 % (Bonferroni).
    None where one side has nothing.
    """
    if not count or not other_count:
        return None
    level = 1 - (1 - CONFIDENCE) / max(1, comparisons)
    share, others = hits / count, other_hits / other_count
    low, high = wilson(hits, count, level)
    other_low, other_high = wilson(other_hits, other_count, level)
    below = math.hypot(share - low, other_high - others)
    above = math.hypot(high - share, others - other_low)
    return Difference(share, others, share - others - below, share - others + above)
