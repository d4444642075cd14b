"""Shares and means with their confidence intervals, and whether the shares of two groups differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
MIN_COMPARED = 20  # samples on each side of a comparison; fewer give no verdict


@dataclass(frozen=True, slots=True)
class Difference:
    """The share in one group minus the share in the others, with its confidence interval."""

    share: float
    others: float
    low: float
    high: float

    compared: bool = True
    """Whether both sides have ``MIN_COMPARED`` samples.  The interval of a single sample can exclude 0 as well."""

    @property
    def value(self) -> float:
        return self.share - self.others

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval excludes 0, of samples that are enough to be compared."""
        return self.compared and (self.low > 0 or self.high < 0)


def wilson(hits: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the confidence interval of a share: E. B. Wilson, JASA 22 (1927).

    It is (0, 1) where nothing was counted.
    """
    if count == 0:
        return 0.0, 1.0
    z = z_of(confidence)
    share = hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def difference(hits: int, count: int, other_hits: int, other_count: int, comparisons: int = 1) -> Difference | None:
    """Compares two shares by Newcombe's hybrid score interval (Statistics in Medicine 17 (1998), method 10).

    Args:
        hits, count: Of the group.
        other_hits, other_count: Of all other groups.
        comparisons: How many are made together: 95 % holds for all of them (Bonferroni).

    Returns:
        The difference, or None where one side has no sample.
    """
    if not count or not other_count:
        return None
    level = 1 - (1 - CONFIDENCE) / max(1, comparisons)
    share, others = hits / count, other_hits / other_count
    low, high = wilson(hits, count, level)
    other_low, other_high = wilson(other_hits, other_count, level)
    below = math.hypot(share - low, other_high - others)
    above = math.hypot(high - share, others - other_low)
    enough = min(count, other_count) >= MIN_COMPARED
    return Difference(share, others, share - others - below, share - others + above, enough)


def z_of(confidence: float = CONFIDENCE) -> float:
    """Returns how many standard errors the half of an interval has: 1.96 for 95 %."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


@dataclass(slots=True)
class Moments:
    """What is needed of many numbers for their mean and its interval."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value

    def update(self, other: Moments) -> None:
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float | None:
        """The mean; None of no numbers."""
        return self.total / self.count if self.count else None

    def interval(self) -> tuple[float, float] | None:
        """Returns the normal interval of the mean, for independent numbers; None of fewer than two."""
        if self.count < 2:
            return None
        mean = self.total / self.count
        variance = max(0.0, self.squares - self.count * mean * mean) / (self.count - 1)
        half = z_of() * math.sqrt(variance / self.count)
        return mean - half, mean + half


# ---- as JSON


def share_result(hits: int, count: int) -> dict[str, Any]:
    """A share with its interval; null where nothing was counted."""
    low, high = wilson(hits, count) if count else (None, None)
    return {"count": hits, "of": count, "share": hits / count if count else None, "low": low, "high": high}


def loss_result(lost: int, count: int, found: Difference | None) -> dict[str, Any]:
    """The share that a group lost, and how it differs from that of the others."""
    base = {("lost" if name == "count" else name): value for name, value in share_result(lost, count).items()}
    return {
        **base,
        "others": found.others if found else None,
        "difference": found.value if found else None,
        "difference_low": found.low if found else None,
        "difference_high": found.high if found else None,
        "compared": found.compared if found else False,
        "beyond_chance": found.beyond_chance if found else False,
    }
