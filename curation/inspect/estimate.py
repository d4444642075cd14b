"""What a few shards tell of the rest: ratio estimates with their error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5 % quantile, by degrees of freedom; beyond the table the normal distribution's.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Estimate:
    """A sum and half the width of its 95 % interval: None where one shard alone was measured."""

    value: float
    error: float | None = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        """Of two sums that err independently."""
        if self.error is None or other.error is None:
            return Estimate(self.value + other.value, None)
        return Estimate(self.value + other.value, math.hypot(self.error, other.error))

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, None if self.error is None else self.error * abs(factor))


def ratio_estimate(sizes: Sequence[float], values: Sequence[float], rest: float, rest_count: int) -> Estimate:
    """The sum of a quantity over shards that were not measured, from those that were.

    sizes, values: of each measured shard its size and the quantity, which is taken to grow with the size.
    rest, rest_count: the sum of the sizes of the others, and their number.
    The classical ratio estimator with its finite population correction: W. G. Cochran, Sampling Techniques (1977),
    chapter 6.
    """
    n = len(sizes)
    measured = sum(sizes)
    if rest_count == 0:
        return Estimate(0.0)
    if n == 0:
        raise ValueError("nothing was measured")
    ratio = sum(values) / measured if measured else 0.0
    value = ratio * rest
    if n == 1:
        return Estimate(value, None)
    deviation = sum((y - ratio * x) ** 2 for x, y in zip(sizes, values, strict=True)) / (n - 1)
    # the mean over the rest errs with the sample's mean and with its own scatter around the ratio
    scale = rest / (measured / n) if measured else float(rest_count)
    variance = scale**2 * deviation / n + rest_count * deviation
    return Estimate(value, t_quantile(n - 1) * math.sqrt(variance))


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    return 1.96 + 2.4 / degrees
