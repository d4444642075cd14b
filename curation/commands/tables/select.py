"""``curation select FOLDER --where …`` writes the uids of the samples whose scores fulfil a condition."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation.commands.tables.conditions import BASELINES, Condition, SqlFilter
from curation.commands.tables.tables import FolderTables, check_columns, find_tables
from curation.errors import EXIT_OK, InfrastructureError, UsageError
from curation.options import POSITIONAL, exit_code, parse_arguments
from curation.reshard.uids import UID_DTYPE, Uids, parse_uids, write_subset


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the uids of the samples that fulfil a condition on the columns of a folder's tables."""

    folder: Annotated[Path, POSITIONAL]
    """The folder of the tables: stage 06's output, or DataComp's own metadata."""
    out: Path
    """The subset file to write: a sorted NumPy array of pairs of uint64, as DataComp's resharder takes it."""
    where: str | None = None
    """The condition, in DuckDB's SQL, such as "clip_l14_similarity_score > 0.28 and language = 'en'"."""
    baseline: str | None = None
    """One of DataComp's baselines as the condition.  With --where, a row must satisfy both."""
    unique: bool = False
    """Take each uid once.  Otherwise a uid in several rows is written as many times, as in DataComp's tools."""
    skip_bad_uids: bool = False
    """Leave out rows whose uid is missing or is not 32 hexadecimal digits; otherwise such a row is an error."""
    memory_mb: int = 2000
    """Memory of the query; the rest is written to a temporary folder beside --out."""
    threads: int = 4
    """Threads of the query."""
    json: bool = False
    """One JSON object on one line instead of text."""


@dataclass
class _SelectCounts:
    """What is counted while the uids are written."""

    bad: int = 0
    examples: list[str] = field(default_factory=list)


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "select")
    began = time.monotonic()
    text = _condition_text(options)
    tables = find_tables(options.folder)
    for warning in tables.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    check_columns(tables.tables)
    result = _select(options, text, tables)
    result["seconds"] = round(time.monotonic() - began, 3)
    if options.json:
        print(orjson.dumps(result).decode())
    else:
        _tell(result)
    return EXIT_OK


def _condition_text(options: Options) -> str:
    if options.where is None and options.baseline is None:
        raise UsageError("give a condition with --where, or one of DataComp's with --baseline")
    if options.threads < 1 or options.memory_mb < 100:
        raise UsageError("--threads is at least 1, and --memory_mb at least 100")
    if options.baseline is not None and options.baseline not in BASELINES:
        raise UsageError(f"--baseline {options.baseline}: unknown; choose one of {', '.join(BASELINES)}")
    given = [options.where, BASELINES.get(options.baseline or "")]
    return "\nand ".join(f"(\n{text}\n)" for text in given if text) if all(given) else next(filter(None, given), "")


def _select(options: Options, text: str, tables: FolderTables) -> dict[str, Any]:
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".spill", dir=out.parent) as spill:
        paths = [table.parquet.absolute() for table in tables.tables]
        with SqlFilter(paths, Path(spill), memory_mb=options.memory_mb, threads=options.threads) as selection:
            if "uid" not in selection.columns:
                raise UsageError(f"{options.folder}: the tables have no column uid")
            condition = selection.condition(text)
            taken = _SelectCounts()
            kept = write_subset(out, _sorted_uids(selection, condition, options, taken))
            rows = selection.count()
    return {
        "shards": len({table.shard_id for table in tables.tables}),
        "rows": rows,
        "kept": kept,
        "bad_uids": taken.bad,
        "out": str(out),
        "condition": text,
        "thresholds": dict(condition.thresholds),
        "warnings": list(tables.warnings),
    }


def _sorted_uids(selection: SqlFilter, condition: Condition, options: Options, taken: _SelectCounts) -> Iterator[Uids]:
    """DuckDB sorts the digits as text: in lower case that is the order of the numbers."""
    distinct = "DISTINCT " if options.unique else ""
    for batch in selection.rows(condition, f"{distinct}lower(uid::varchar) AS uid", order="uid"):
        uids, bad = parse_uids(batch.column(0))
        if bad.any():
            taken.bad += int(bad.sum())
            taken.examples += [str(batch.column(0)[int(place)].as_py()) for place in bad.nonzero()[0][:3]]
            if not options.skip_bad_uids:
                raise InfrastructureError(
                    f"{options.folder}: rows without a uid of 32 hexadecimal digits, such as "
                    f"{', '.join(map(repr, taken.examples[:3]))}; --skip_bad_uids leaves them out"
                )
            uids = uids[~bad]
        yield uids.astype(UID_DTYPE, copy=False)


def _tell(result: dict[str, Any]) -> None:
    share = result["kept"] / result["rows"] if result["rows"] else 0.0
    print(
        f"{result['out']}: {result['kept']:,} of {result['rows']:,} rows in {result['shards']:,} shards ({share:.2%})"
    )
    for name, threshold in result["thresholds"].items():
        print(f"top {name}: at least {threshold}")
    if result["bad_uids"]:
        print(f"left out: {result['bad_uids']:,} rows without a uid")
