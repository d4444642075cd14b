"""The contact sheet: one HTML file that shows hits with their pictures, captions and scores.

Everything is escaped; the page loads nothing and runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from curation.commands.places import METADATA, StagePlace
from curation.commands.report.originals import Originals
from curation.commands.report.page import csp_hash
from curation.commands.report.pictures import Thumbnails
from curation.commands.search.stored import Hit, IndexRecord
from curation.jsonio import clean_text
from curation.storage.files import make_folder, storage_errors, write_whole

MAX_PICTURE_BYTES = 8_000_000
_MAX_HITS = 1000  # on the page
_MAX_CAPTION = 600


def write_sheet(
    path: Path, query: Mapping[str, str], record: IndexRecord, hits: Sequence[Hit], source: Path | None
) -> list[str]:
    """Writes the page, whole or not at all.

    Args:
        path: The file.
        query: Its kind and value.
        record: Of the index.
        hits: The best first; more than 1,000 are not shown.
        source: The folder of the shards, None for those that the receipts name.

    Returns:
        What could not be shown, in whole sentences.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    shown = hits[:_MAX_HITS]
    pictures, troubles = _pictures(record, shown, source)
    if len(hits) > len(shown):
        troubles.append(f"{path}: shows the first {len(shown):,} of {len(hits):,} samples")
    folder = files("curation.commands.search")
    style = (folder / "sheet.css").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string((folder / "sheet.html.j2").read_text("utf-8")).render(
        query=query,
        feature=record.feature,
        model=record.model.directive if record.model else "",
        rows=record.rows,
        style=Markup(style),  # noqa: S704 - the package's own file
        style_hash=csp_hash(style),
        hits=[_shown(hit, pictures) for hit in shown],
    )
    make_folder(path.parent)
    with storage_errors(path):
        write_whole(path, html.encode("utf-8", "replace"))
    return troubles


def _pictures(record: IndexRecord, hits: Sequence[Hit], source: Path | None) -> tuple[Thumbnails, list[str]]:
    pictures = Thumbnails(MAX_PICTURE_BYTES)
    home = Path(os.path.realpath(record.source.folder))
    places = [StagePlace(METADATA, home)] if record.source.stage == METADATA else []
    find = Originals(home.parent, places, source)
    wanted = [(METADATA, hit.texts["shard"] or "", hit.texts["key"] or "") for hit in hits]
    troubles = pictures.add("hit", find.source, wanted)
    if missing := sum(not pictures.get("hit", shard, key) for _, shard, key in wanted):
        where = "" if source else "; name the folder of the shards with --source"
        troubles.append(f"{missing:,} of {len(hits):,} pictures are not on the sheet{where}")
    return pictures, troubles


def _shown(hit: Hit, pictures: Thumbnails) -> dict[str, Any]:
    texts = {name: clean_text(value or "") for name, value in hit.texts.items()}
    caption = texts["caption"]
    return {
        **texts,
        "caption": caption if len(caption) <= _MAX_CAPTION else caption[: _MAX_CAPTION - 1] + "…",
        "score": f"{hit.score:.4f}",
        "link": _link(texts["url"]),
        "picture": pictures.get("hit", hit.texts["shard"] or "", hit.texts["key"] or ""),
    }


def _link(url: str) -> str:
    """The URL where it is one of the web; "" for anything else, such as javascript:."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return url if parts.scheme.lower() in ("http", "https") and parts.netloc else ""
