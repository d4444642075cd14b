"""The page itself: one template, which escapes everything, makes it from facts, charts and thumbnails."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from curation import __version__
from curation.caption.preview import PAGE_NAME as COMPARISON
from curation.commands.audit.checks import LOSSES as CHECK_LOSSES
from curation.commands.audit.checks import WORST
from curation.commands.audit.command import LOSSES, verdict
from curation.commands.audit.words import reservations
from curation.commands.places import FACES, METADATA, RECAPTION, StagePlace
from curation.commands.report.charts import Chart, histogram, over_time, short_time
from curation.commands.report.checked import copy_rows, places_of, prompt_scores, seen_instead, worst_rows
from curation.commands.report.facts import ReportFacts
from curation.commands.report.pictures import Known, Thumbnails
from curation.commands.report.receipts import MAX_SECONDS, STATES, GridCell, ReceiptStats, merged
from curation.commands.report.samples import MAX_REASONS, GallerySample, decoded, in_order, with_captions
from curation.errors import InfrastructureError
from curation.jsonio import clean_text
from curation.run.ledger import recorded_options
from curation.shards import bucket_of
from curation.tar.samples import AUTO, PLAIN

MAX_CELLS: Final = 16_000  # on the page, of all stages together: 130 bytes each
FEW: Final = 150  # cells that are drawn larger
_ROOM: Final = 60_000  # bytes of the page that are not given to pictures
_PICTURE_SHARE: Final = 0.8
_OWN_SHARDS: Final = (RECAPTION, METADATA)  # stages whose shards may be others than those of stages 01 to 04


def render(
    facts: ReportFacts,
    page: Path,
    gallery: int,
    max_bytes: int,
    *,
    again_s: float | None = None,
    known: Known | None = None,
) -> bytes:
    """Returns the page as HTML; samples, and then cells, are left out until it is small enough.

    Args:
        facts: What it shows.
        page: The file that it will be, for its links.
        gallery: How many samples are shown at most.
        max_bytes: How large the page is at most.
        again_s: After so many seconds a browser loads the page again; None: it does not.
        known: The pictures that earlier pages have made; those of this page are added.

    Raises:
        InfrastructureError: It is larger even without samples.
    """
    charts = [_stage_charts(stage_stats) for stage_stats in facts.stats]
    looks = _look_charts(facts)
    shown, cells = gallery, MAX_CELLS
    while True:
        grids = _grids(facts, page, cells)
        bare = _fill(facts, page, charts, looks, grids, _samples(facts, shown, Thumbnails(0)), Thumbnails(0))
        left = max_bytes - len(bare) - _ROOM
        if left > 0:
            pictures = Thumbnails(int(left * _PICTURE_SHARE), {} if known is None else known)
            return _fill(facts, page, charts, looks, grids, _samples(facts, shown, pictures), pictures, again_s)
        if not shown and cells < len(facts.places):
            raise InfrastructureError(f"the page would have more than {max_bytes:,} bytes: name a folder in the root")
        shown, cells = shown // 2, cells if shown else cells // 2


def _fill(
    facts: ReportFacts,
    page: Path,
    charts: Sequence[dict[str, Any]],
    looks: Sequence[Chart],
    grids: Sequence[dict[str, Any]],
    samples: dict[str, Any],
    pictures: Thumbnails,
    again_s: float | None = None,
) -> bytes:
    folder = files("curation.commands.report")
    style, script = ((folder / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "time": short_time, "bytes": _bytes, "percent": _percent, "date": _date}
    template = environment.from_string((folder / "page.html.j2").read_text("utf-8"))
    html = template.render(
        **facts.told,
        looked=facts.looked,
        version=__version__,
        style=Markup(style),  # noqa: S704 - the package's own files
        script=Markup(script),  # noqa: S704
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        charts=charts,
        looks=looks,
        grids=grids,
        states=STATES,
        links=[_links(place, page) for place in facts.places],
        samples=samples,
        scores=prompt_scores(facts.told["audit"]),
        omitted=pictures.omitted,
        picture=pictures.get,
        again_s=again_s,
        own_shards=_OWN_SHARDS,
        software=sorted({code for stage in facts.told["stages"] for code in stage["code"]} - {"(unknown)"})[:10],
        losses={name: words for name, (_, _, words) in (*LOSSES.items(), *CHECK_LOSSES.items())},
        instead=seen_instead,
        reservations=_reservations(facts.told["audit"]),
        verdict=verdict(facts.told["audit"]) if facts.told["audit"] else "",
    )
    return html.encode("utf-8", "replace")


def _reservations(audit: Mapping[str, Any] | None) -> list[str]:
    variety = audit["variety"] if audit else None
    return [*reservations(variety)] if variety else []


def csp_hash(text: str) -> str:
    """Returns the name of an inline style or script for a Content-Security-Policy (CSP level 2, 4.2.5)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


# ---- charts


def _stage_charts(stage_stats: ReceiptStats) -> dict[str, Any]:
    lengths = (ended - began for began, ended in zip(stage_stats.spans[0::3], stage_stats.spans[1::3], strict=True))
    took = [length for length in lengths if 0 <= length < MAX_SECONDS]
    return {
        "rate": over_time("Samples a second", stage_stats.spans),
        "took": histogram("Time of a shard", took, "", show=short_time),
    }


def _look_charts(facts: ReportFacts) -> list[Chart]:
    looked = facts.looked
    charts = [
        histogram("Side of a face", [100 * side for side in looked.sides], "% of the image's side", within=(0, 100)),
        histogram("Length of captions", looked.captions, "characters", whole=True),
        histogram("Length of prompts", looked.prompts, "characters", whole=True),
        histogram("Length of new captions", looked.recaptions, "characters", whole=True),
        *(histogram(clean_text(name)[:80], values, "") for name, values in sorted(looked.scores.values.items())),
    ]
    return [chart for chart in charts if chart is not None]


# ---- the grid of shards


def _grids(facts: ReportFacts, page: Path, cells: int) -> list[dict[str, Any]]:
    """Returns the grid of each stage; ``cells`` is how many they have together at most."""
    at_most = max(1, cells // len(facts.places))
    return [
        _grid(place, merged(stage_stats.cells, at_most), page)
        for place, stage_stats in zip(facts.places, facts.stats, strict=True)
    ]


def _grid(place: StagePlace, cells: Sequence[GridCell], page: Path) -> dict[str, Any]:
    times = sorted(cell.seconds / done for cell in cells if (done := _done(cell)))
    median = times[len(times) // 2] if times else 0.0
    base = _link(place.receipts, page)
    shown = []
    for cell in cells:
        many = cell.first != cell.last
        look = _look_of(cell, median)
        told = ", ".join(f"{cell.states[name]:,} {name}" if many else name for name in STATES if cell.states[name])
        time = f", {short_time(cell.seconds)}" if cell.seconds else ""
        bucket = quote(bucket_of(cell.first))
        target = f"{bucket}/" if many else f"{bucket}/{quote(cell.first)}.json"
        linked = any(cell.states[name] for name in ("done", "stale", "failed"))
        shown.append(
            {
                "class": look,
                "label": f"{cell.first}{f' to {cell.last}' if many else ''}: {told}{time}",
                "href": f"{base}/{target}" if linked else "",
            }
        )
    together = any(cell.first != cell.last for cell in cells)
    return {"cells": shown, "together": together, "median": median, "few": len(cells) <= FEW}


def _look_of(cell: GridCell, median: float) -> str:
    """Returns the style of a cell: that of its worst state, or the pace of one that is done."""
    for state in ("failed", "running", "stale"):
        if cell.states[state]:
            return state[0]
    if cell.states["pending"]:
        return "h" if cell.states["done"] else "p"
    return f"d{_pace(cell.seconds / max(1, _done(cell)), median)}"


def _done(cell: GridCell) -> int:
    return cell.states["done"] + cell.states["stale"]


def _pace(seconds: float, median: float) -> int:
    """Returns 1 to 4: quick, like most, slow, very slow."""
    return 1 + sum(seconds > factor * median for factor in (0.75, 1.5, 3.0)) if median else 2


# ---- samples


def _samples(facts: ReportFacts, gallery: int, pictures: Thumbnails) -> dict[str, Any]:
    """Returns the samples that are shown, at most ``gallery`` edited ones, and makes their thumbnails."""
    looked = facts.looked
    edited = in_order(looked.edited)[:gallery]
    rejected = {name: in_order(heap)[: 4 if gallery else 0] for name, heap in looked.rejected.items()}
    recaptioned = in_order(looked.recaptioned)[: min(12, gallery)]
    worst = worst_rows(facts.told["audit"], min(WORST, gallery))
    copies = copy_rows(facts.told["audit"], min(WORST, gallery))
    refused = [one for ones in list(rejected.values())[:MAX_REASONS] for one in ones]
    if pictures.left:
        rows = places_of([*worst, *copies])
        _take_pictures(facts, edited, refused + recaptioned, rows, pictures)
    plain = with_captions(refused, facts.places)
    captions = {place: decoded(caption) for place, caption in plain.items()}
    told = []
    for (stage, reason), ones in sorted(rejected.items()):
        of_stage = next(one for place, one in zip(facts.places, facts.stats, strict=True) if place.stage == stage)
        count = of_stage.dropped[reason] + of_stage.samples_failed[reason]
        told.append({"stage": stage, "reason": reason, "count": count, "samples": ones})
    return {
        "edited": edited,
        "rejected": told,
        "recaptioned": recaptioned,
        "worst": worst,
        "copies": copies,
        "captions": captions,
        "decoded": plain != captions or any(one.decoded for one in (*edited, *recaptioned)),
    }


def _usual(stage: str) -> str:
    return AUTO  # an edit has one picture


def _member_of(facts: ReportFacts, stage: str) -> str:
    """Which of several pictures of a sample a stage read; the stages after 01 in the main job have its pictures."""
    for name in (stage, FACES):
        for place in facts.places:
            recorded = recorded_options(place.home, name) if place.stage == name else None
            member = (recorded or {}).get("image_member")
            if isinstance(member, str):
                return AUTO if member == PLAIN else member
    return AUTO


def _take_pictures(
    facts: ReportFacts,
    edited: Sequence[GallerySample],
    others: Sequence[GallerySample],
    rows: Sequence[tuple[str, str, str]],
    pictures: Thumbnails,
) -> None:
    """rows: (stage, shard, key) of generated pictures that are shown in rows."""
    find = facts.originals
    own = [one for one in others if one.stage in _OWN_SHARDS]
    of_main_job = [*edited, *(one for one in others if one.stage not in _OWN_SHARDS)]
    for kind, path_of, shown in (
        ("new", find.edited, edited),
        ("old", find.source, of_main_job),
        ("seen", find.source, own),
    ):
        places = [(one.stage, one.shard, one.key) for one in shown]
        if kind == "new":  # each once
            places = list(dict.fromkeys([*places, *rows]))
        for trouble in pictures.add(kind, path_of, places, partial(_member_of, facts) if kind != "new" else _usual):
            facts.looked.trouble(trouble)
    for folder in sorted(find.away)[:5]:
        facts.looked.trouble(
            f"{folder}: the original images are no longer in this folder; name their folder with --source"
        )


# ---- links and words


def _links(place: StagePlace, page: Path) -> dict[str, str]:
    rejects = place.rejects
    comparison = place.home / COMPARISON
    return {
        "receipts": _link(place.receipts, page),
        "rejects": _link(rejects, page) if rejects.is_dir() else "",
        "comparison": _link(comparison, page) if place.stage == RECAPTION and comparison.is_file() else "",
    }


def _link(target: Path, page: Path) -> str:
    """Returns a link relative to the page, so that both can be moved together; its colons are escaped, so that no part
    can be taken for a scheme."""
    relative = os.path.relpath(os.path.realpath(target), os.path.realpath(page.parent))
    return quote(os.fsencode(relative))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:,.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB"


def _date(made: float, *, seconds: bool = False) -> str:
    return datetime.fromtimestamp(made, UTC).strftime(f"%Y-%m-%d %H:%M{':%S' if seconds else ''} UTC")
