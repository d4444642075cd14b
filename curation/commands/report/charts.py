"""Charts as inline SVG: drawn by pygal, without its script, styles and interaction, coloured by the page's variables.

Every chart has its numbers beside it as a table, and a title and a description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, tostring

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 400, 210


_SVG = "{http://www.w3.org/2000/svg}"


_NOT_SHOWN = ("tooltip", "tooltip-overlay", "text-overlay", "overlay", "titles")


_TICKS = 5


_LAST_S = 1e11  # Unix time: the year 5138


_LENGTHS = (  # seconds that a clock shows as round
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200),
)


@dataclass(frozen=True, slots=True)
class Chart:
    """svg: ready for the page.  rows: (what, number) as text."""

    title: str
    note: str
    svg: Markup
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
    """How often values occur; None where there is none.  whole: bins begin at whole numbers.
    within: (low, high) of the axis; else from the least value to the 99.5th percentile, with what is above in the last
    bin."""
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
    return Chart(title, note, _histogram_svg(bars, title, spoken, show, counts=True), (unit or "value", "count"), rows)


def over_time(title: str, spans: Sequence[float], *, bins: int = 48) -> Chart | None:
    """Samples a second while a stage ran: started, finished and samples of each attempt, one after the other.

    An attempt's samples are spread evenly over its time; None where the receipts do not tell.
    """
    rows = np.asarray(spans, dtype=np.float64).reshape(-1, 3)
    rows = rows[(rows[:, 1] >= rows[:, 0]) & (rows[:, 0] > 0) & (rows[:, 1] < _LAST_S)]  # clocks may be out of order
    if not len(rows):
        return None
    rows[:, 1] = np.maximum(rows[:, 1], rows[:, 0] + 1e-3)  # receipts tell milliseconds
    began, ended = float(rows[:, 0].min()), float(rows[:, 1].max())
    step = (ended - began) / bins
    edges = began + step * np.arange(bins + 1)
    # How much was done before each edge: a sum of ramps, so that the differences are what was done in each bin.
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
    svg = _histogram_svg(bars, title, spoken, short_time, _nice_time)
    return Chart(title, note, svg, ("time (UTC)", "samples/s"), table)


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
    except (OverflowError, ValueError, OSError):  # a clock that is out of its mind
        return "?"


def _peak(rows: Sequence[tuple[str, str]]) -> str:
    label, count = max(rows, key=lambda row: int(row[1].replace(",", "")))
    return f"Most are {label}: {count}."


def _histogram_svg(
    bars: Sequence[tuple[float, float, float]],
    title: str,
    description: str,
    show: Callable[[float], str],
    nice: Callable[[float], float] | None = None,
    *,
    counts: bool = False,
) -> Markup:
    import pygal
    from pygal.style import Style

    style = Style(label_font_size=11, major_label_font_size=11)
    chart = pygal.Histogram(
        style=style, js=(), css=(), width=WIDTH, height=HEIGHT, show_legend=False, margin=6, margin_right=14, spacing=4
    )
    top = max(height for height, _, _ in bars) or 1.0
    step = max(1.0, _nice(top / _TICKS)) if counts else _nice(top / _TICKS)
    ticks = [step * number for number in range(math.ceil(top / step) + 1)]
    chart.y_labels = [{"value": tick, "label": f"{tick:,.10g}"} for tick in ticks]
    left, right = bars[0][1], bars[-1][2]
    stride = (nice or _nice)((right - left) / _TICKS)
    first, last = math.ceil(left / stride - 1e-9), math.floor(right / stride + 1e-9)
    places = [stride * number for number in range(first, last + 1)]
    chart.x_labels = [{"value": place, "label": show(place)} for place in places]
    chart.range = (0, ticks[-1])
    chart.xrange = (left, right)
    chart.add("", list(bars))
    return _cleaned(chart.render_tree(), title, description)


def _cleaned(tree: Element, title: str, description: str) -> Markup:
    """The drawing alone, named for screen readers.  What pygal put in came through ElementTree, which escapes it."""
    from markupsafe import Markup

    _strip(tree)
    for name in ("id", "xmlns", "class"):
        tree.attrib.pop(name, None)
    tree.attrib.update({"class": "chart", "role": "img", "aria-label": f"{title}. {description}"})
    for name, text in (("desc", description), ("title", title)):
        element = Element(name)
        element.text = text
        tree.insert(0, element)
    return Markup(tostring(tree, encoding="unicode"))  # noqa: S704


def _strip(element: Element) -> None:
    for child in list(element):
        tag = child.tag if isinstance(child.tag, str) else ""
        classes = child.get("class", "").split()
        if tag.removeprefix(_SVG) in ("", "defs", "script", "style", "title", "desc") or set(classes) & set(_NOT_SHOWN):
            element.remove(child)
            continue
        child.attrib.pop("style", None)
        for name in ("x", "y", "width", "height", "rx", "ry"):
            if name in child.attrib:
                child.set(name, _rounded(child.attrib[name]))
        if child.get("rx") == "0":
            del child.attrib["rx"], child.attrib["ry"]
        _strip(child)


def _rounded(text: str) -> str:
    try:
        return f"{float(text):.2f}".rstrip("0").rstrip(".")
    except ValueError:
        return text
