"""``curation search INDEX --text … | --image … | --like …`` finds the samples that are nearest, and shows them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import orjson

from curation.errors import EXIT_OK, InfrastructureError, UsageError, install
from curation.jsonio import clean_text
from curation.options import POSITIONAL, URLS, at_least, between, exit_code, parse_arguments

if TYPE_CHECKING:  # they need numpy, and --help does without
    from curation.commands.search.nearest import OpenIndex
    from curation.commands.search.stored import Hit

_COLUMNS = ("score", "uid", "key", "shard", "caption", "url")
_WIDTHS = {"caption": 60, "url": 80}  # characters that the table shows; --json has them whole


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the samples of an index that are nearest to a text, a picture or another sample."""

    example: ClassVar[str] = 'INDEX --text "a red bicycle" --sheet hits.html'

    index: Annotated[Path, POSITIONAL]
    """The folder that `curation index` made."""
    text: Annotated[str | None, URLS] = None
    """Find the nearest to this text."""
    image: Path | None = None
    """Find the nearest to this picture, a file."""
    like: str | None = None
    """Find the nearest to the sample with this uid.  No model is needed."""
    count: Annotated[int, at_least(1)] = 20
    """How many samples are found at most."""
    min_score: Annotated[float | None, between(-1, 1)] = None
    """Leave out samples with a smaller cosine."""
    out: Path | None = None
    """A subset file (uids, as `select` writes them) with the samples that were found, for stage 04's --subset."""
    sheet: Path | None = None
    """A contact sheet: one HTML file with the samples that were found, and their pictures where the shards are here."""
    source: Path | None = None
    """The shards, for the pictures.  Default: the folders in stage 06's receipts."""
    model: str | None = None
    """The model of the query.  It has to be the one that the index names, which is the default."""
    weights: Annotated[str | None, URLS] = None
    """Other weights for the model, as stage 06's --weights: a path, a hub id, or a URL with #sha256=."""
    probes: Annotated[int | None, at_least(1)] = None
    """Of a large index, how many of its lists are looked into: more find more, and take longer.  Default: 32, and more
    where --count needs them."""
    threads: Annotated[int, at_least(1)] = 1
    """Threads of the model and of the search."""
    json: bool = False
    """One JSON object on one line instead of text."""

    def check(self) -> None:
        """Raise UsageError for flags that do not belong together."""
        if sum(given is not None for given in (self.text, self.image, self.like)) != 1:
            raise UsageError("give one of --text, --image and --like")
        if self.like is not None and (self.model is not None or self.weights is not None):
            raise UsageError("--like needs no model; leave --model and --weights out")
        if self.image is not None and not self.image.is_file():
            raise UsageError(f"--image {self.image}: no such file")
        if self.source is not None and not self.source.is_dir():
            raise UsageError(f"--source {self.source}: no such folder")


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "search")
    options.check()
    if options.sheet is not None:
        _need_jinja2()
    from curation.commands.search.nearest import open_index

    index = open_index(options.index)
    if stale := index.record.source.change():
        print(f"warning: {stale}", file=sys.stderr)
    began = time.monotonic()
    hits, searched_ms = _search(options, index)
    if options.out is not None:
        _write_subset(options.out, hits)
    troubles: Sequence[str] = ()
    if options.sheet is not None:
        from curation.commands.search.page import write_sheet

        troubles = write_sheet(options.sheet, _told(options), index.record, hits, options.source)
    for trouble in troubles:
        print(f"warning: {trouble}", file=sys.stderr)
    if options.json:
        result: dict[str, Any] = {"index": str(options.index), "query": _told(options), "stale": stale}
        result |= {"search_ms": round(searched_ms, 3), "seconds": round(time.monotonic() - began, 3)}
        result["hits"] = [*map(_record, hits)]
        print(orjson.dumps(result).decode())
        return EXIT_OK
    _print(hits)
    for written in filter(None, (options.out, options.sheet)):
        print(f"written: {written}")
    return EXIT_OK


def _need_jinja2() -> None:
    try:
        import jinja2  # noqa: F401 - before the model is loaded, which may take long
    except ImportError as error:
        raise InfrastructureError(f"--sheet needs jinja2 ({error}): {install('jinja2')}") from None


def _search(options: Options, index: OpenIndex) -> tuple[list[Hit], float]:
    """Returns the hits, the best first, and the milliseconds of the search without those of the query's model."""
    without = None
    if options.like is not None:
        uid = options.like.strip().lower()
        without = index.samples.row_of(uid)
        if without is None:
            shown = clean_text(uid)[:60]
            raise UsageError(f"--like {shown}: the index has no sample with this uid (32 hexadecimal digits)")
        query = index.vectors.take_one(without)
    else:
        from curation.commands.search.query import QueryModel

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        model = QueryModel(index.record, options.model, options.weights, options.threads)
        try:
            if options.text is None:
                query = model.of_image(options.image or Path())
            else:
                query = model.of_text(options.text)
                if not model.reads_to_the_end(options.text):
                    print("warning: the model does not read the end of --text: it is too long for it", file=sys.stderr)
        finally:
            model.close()
    from curation.commands.search.stored import Hit

    began = time.perf_counter()
    index.use_threads(options.threads)
    rows, scores = index.nearest(query, options.count, probes=options.probes, without=without)
    if len(rows) < min(options.count, len(index.vectors) - (without is not None)):
        print(f"warning: only {len(rows):,} samples are in the lists that were looked into; --probes", file=sys.stderr)
    least = -2.0 if options.min_score is None else options.min_score
    found = [
        Hit(score, dict(index.samples[row]))
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        if score >= least
    ]
    return found, 1000 * (time.perf_counter() - began)


def _told(options: Options) -> dict[str, str]:
    """What was searched for: its kind, and the text or name."""
    if options.text is not None:
        return {"kind": "text", "value": clean_text(options.text)}
    if options.image is not None:
        return {"kind": "image", "value": clean_text(str(options.image))}
    return {"kind": "like", "value": clean_text(options.like or "")}


def _record(hit: Hit) -> dict[str, Any]:
    return {"score": hit.score, **hit.texts}


def _write_subset(path: Path, hits: Sequence[Hit]) -> None:
    import numpy as np
    import pyarrow as pa

    from curation.reshard.uids import parse_uids, sort_uids, write_subset

    uids, bad = parse_uids(pa.array([hit.texts["uid"] for hit in hits], pa.string()))
    if bad.any():
        shown = clean_text(str(hits[int(bad.argmax())].texts["uid"]))[:60]
        raise InfrastructureError(f"--out {path}: a hit has no uid of 32 hexadecimal digits ({shown!r})")
    write_subset(path, [np.unique(sort_uids(uids))])


def _print(hits: Sequence[Hit]) -> None:
    """A table; texts are cut, and hold no control characters."""
    rows = [_COLUMNS, *(_cells(hit) for hit in hits)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not hits:
        print("nothing was found")


def _cells(hit: Hit) -> tuple[str, ...]:
    cells = [f"{hit.score:.4f}"]
    for name in _COLUMNS[1:]:
        text, most = clean_text(hit.texts[name] or "").strip(), _WIDTHS.get(name, 200)
        cells.append(text if len(text) <= most else text[: most - 1] + "…")
    return tuple(cells)
