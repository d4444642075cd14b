"""Histograms: their bins, their numbers as a table, and where the template draws bars, lines and labels.

Every chart has a title and a description for those who do not see it.  The page's style gives the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 400, 210  # of a drawing, in its own units; the other lengths are in the same
_MARGIN, _FOOT = 14, 24
_LETTER = 6.5  # about the width of a character of a label: 11 units high
_TICKS = 5
_MOST_BINS = 48
_LAST_S = 1e11  # Unix time: the year 5138
_LENGTHS = (  # seconds that a clock shows as round
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200),
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A histogram in the units of its SVG.

    bars: (x, y, width, height).  x_ticks, y_ticks: (place, label).  left, right: ends of the horizontal lines.
    """

    bars: list[tuple[float, float, float, float]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    left: float
    right: float
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True, slots=True)
class Chart:
    """description: what the drawing shows, in words.  rows: (what, number) as text."""

    title: str
    note: str
    description: str
    drawing: Drawing
    columns: tuple[str, str]
    rows: list[tuple[str, str]]


def histogram(
    title: str,
    values: Sequence[float],
    unit: str,
    *,
    show: Callable[[float], str] | None = None,
    whole: bool = False,
    within: tuple[float, float] | None = None,
    bins: int = 24,
) -> Chart | None:
    """Counts how often values occur.

    Args:
        title: The chart's name.
        values: What is counted; values that are not finite are left out.
        unit: Of the values, in words.
        show: Turns a value into a label.
        whole: Whether bins begin at whole numbers.
        within: The (low, high) ends of the axis.  Without it the axis goes from the least value to the 99.5th
            percentile, and the last bin holds what is above that.
        bins: About how many there are: their width is a round number.

    Returns:
        The chart, or None where there is no value.
    """
    show = show or short_number
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return None
    low, high = within or (float(numbers.min()), float(np.percentile(numbers, 99.5)))
    edges = _edges(low, high, bins, whole=whole)
    counts, _ = np.histogram(np.clip(numbers, edges[0], edges[-1]), edges)
    middle, mean = float(np.median(numbers)), float(numbers.mean())
    note = f"{len(numbers):,} values, median {show(middle)}, mean {show(mean)} {unit}".strip()
    beyond = int((numbers > edges[-1]).sum())
    bars = [(int(count), float(a), float(b)) for count, a, b in zip(counts, edges, edges[1:], strict=False)]
    rows = [(f"{show(a)} to {show(b)}", f"{count:,}") for count, a, b in bars]
    if beyond:
        rows[-1] = (f"{show(bars[-1][1])} and more", rows[-1][1])
    spoken = f"Histogram. {note}. {_peak(rows)}"
    return Chart(title, note, spoken, _draw(bars, show, _nice, counts=True), (unit or "value", "count"), rows)


def counted(title: str, counts: Mapping[int, int], width: float, unit: str) -> Chart | None:
    """Draws how often values occur that somebody has counted in bins.

    Args:
        title: The chart's name.
        counts: Number of a bin → values in it; the bin n goes from n × width to (n + 1) × width.
        width: Of a bin.
        unit: Of the values, in words.
    """
    total = sum(counts.values())
    if not total:
        return None
    low, high = min(counts), max(counts)
    together = max(1, math.ceil((high - low + 1) / _MOST_BINS))  # bins that share a bar
    tallied: dict[int, int] = {}
    for number, count in counts.items():
        tallied[(number - low) // together] = tallied.get((number - low) // together, 0) + count
    edges = [(low + together * place) * width for place in range((high - low) // together + 2)]
    bars = [(float(tallied.get(place, 0)), edges[place], edges[place + 1]) for place in range(len(edges) - 1)]
    rows = [(f"{short_number(a)} to {short_number(b)}", f"{count:,.0f}") for count, a, b in bars]
    mean = sum((number + 0.5) * count for number, count in counts.items()) * width / total
    note = f"{total:,} values, mean {short_number(mean)}"
    spoken = f"Histogram. {note}. {_peak(rows)}"
    return Chart(title, note, spoken, _draw(bars, short_number, _nice, counts=True), (unit, "count"), rows)


def over_time(title: str, spans: Sequence[float], *, bins: int = 48) -> Chart | None:
    """Draws samples a second while a stage ran; an attempt's samples are spread evenly over its time.

    Args:
        title: The chart's name.
        spans: Of each attempt, one after the other: when it started and finished (Unix time), and its samples.
        bins: How many parts the time is cut into.

    Returns:
        The chart, or None where the receipts do not say when they were made.
    """
    rows = np.asarray(spans, dtype=np.float64).reshape(-1, 3)
    rows = rows[(rows[:, 1] >= rows[:, 0]) & (rows[:, 0] > 0) & (rows[:, 1] < _LAST_S)]  # clocks may be wrong
    if not len(rows):
        return None
    rows[:, 1] = np.maximum(rows[:, 1], rows[:, 0] + 1e-3)  # receipts are exact to milliseconds
    began, ended = float(rows[:, 0].min()), float(rows[:, 1].max())
    step = (ended - began) / bins
    edges = began + step * np.arange(bins + 1)
    # How much was done before each edge is a sum of ramps; its differences are what was done in each bin.
    before = np.zeros(bins + 1)
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        done = np.clip((edges[:, None] - part[:, 0]) / (part[:, 1] - part[:, 0]), 0, 1)
        before += (done * part[:, 2]).sum(axis=1)
    rates = np.diff(before) / step
    bars = [(float(rate), step * number, step * (number + 1)) for number, rate in enumerate(rates)]
    clock = _clock(began, ended)
    note = f"{int(rows[:, 2].sum()):,} samples in {short_time(ended - began)}, from {clock(began)} UTC"
    table = [(clock(began + a), f"{rate:,.1f}") for rate, a, _ in bars]
    spoken = f"Rate over time. {note}. Highest {rates.max():,.1f} samples a second."
    return Chart(title, note, spoken, _draw(bars, short_time, _nice_time), ("time (UTC)", "samples/s"), table)


def short_number(value: float) -> str:
    """Three digits, or all before the point: ``0.0312``, ``19.1``, ``1,234``"""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short_time(seconds: float) -> str:
    """``0``, ``850 ms``, ``12.3 s``, ``4 min 10 s``, ``3 h 20 min``, ``2 d 4 h``"""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms" if seconds else "0"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h" if hours else f"{days:,} d"
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def _edges(low: float, high: float, bins: int, *, whole: bool) -> NDArray[np.float64]:
    if high <= low:
        high = low + (1.0 if whole or not low else abs(low) * 0.1)
    step = _nice((high - low) / bins)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.floor(low / step)
    edges: NDArray[np.float64] = step * np.arange(first, max(math.ceil(high / step), first + 1) + 1, dtype=np.float64)
    return edges


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= step * (1 - 1e-9))


def _nice_time(step: float) -> float:
    """The next length of time that a clock shows as a round one."""
    return next((length for length in _LENGTHS if length >= step), 0.0) or 86400 * _nice(step / 86400)


def _clock(began: float, ended: float) -> Callable[[float], str]:
    form = "%Y-%m-%d %H:%M" if ended - began >= 600 else "%Y-%m-%d %H:%M:%S"
    return lambda seconds: _as_utc(seconds, form)


def _as_utc(seconds: float, form: str) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (OverflowError, ValueError, OSError):  # the clock was wrong
        return "?"


def _peak(rows: Sequence[tuple[str, str]]) -> str:
    label, count = max(rows, key=lambda row: int(row[1].replace(",", "")))
    return f"Most are {label}: {count}."


def _draw(
    bars: Sequence[tuple[float, float, float]],
    show: Callable[[float], str],
    nice: Callable[[float], float],
    *,
    counts: bool = False,
) -> Drawing:
    """Lays out bars of (height, from, to).  nice: the next round stride of the horizontal axis."""
    top = max(height for height, _, _ in bars) or 1.0
    step = max(1.0, _nice(top / _TICKS)) if counts else _nice(top / _TICKS)
    heights = [step * number for number in range(math.ceil(top / step) + 1)]
    left, right = bars[0][1], bars[-1][2]
    stride = nice((right - left) / _TICKS)
    first, last = math.ceil(left / stride - 1e-9), math.floor(right / stride + 1e-9)
    places = [(stride * number, show(stride * number)) for number in range(first, last + 1)]
    labels = [f"{height:,.10g}" for height in heights]
    x0 = _MARGIN + _LETTER * max(map(len, labels))
    x1 = WIDTH - max(_MARGIN, *(_LETTER * len(label) / 2 for _, label in places))
    y0, y1 = HEIGHT - _FOOT, _MARGIN

    def x(value: float) -> float:
        return round(x0 + (value - left) / (right - left) * (x1 - x0), 2)

    def y(value: float) -> float:
        return round(y0 - value / heights[-1] * (y0 - y1), 2)

    return Drawing(
        bars=[(x(a), y(height), round(x(b) - x(a), 2), round(y0 - y(height), 2)) for height, a, b in bars],
        x_ticks=[(x(place), label) for place, label in places],
        y_ticks=[(y(height), label) for height, label in zip(heights, labels, strict=True)],
        left=x(left),
        right=x(right),
    )
