"""``curation select FOLDER --where …`` writes the uids of the samples whose scores fulfil a condition.

With ``--balance`` it writes fewer of what is frequent among them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation.commands.balance.options import BalanceOptions, tell_balance
from curation.commands.balance.rows import BalanceRows
from curation.commands.tables.baselines import Baseline, BaselineOptions, RowTests, chosen, open_tests
from curation.commands.tables.conditions import Condition, SqlFilter
from curation.commands.tables.results import ResultOptions, as_given, results_in_stores
from curation.commands.tables.tables import FolderTables, check_columns, find_tables
from curation.errors import EXIT_OK, InfrastructureError, UsageError
from curation.options import POSITIONAL, URLS, also, exit_code, parse_arguments
from curation.reshard.uids import UID_DTYPE, Subset, Uids, parse_uids, write_subset


@dataclass(frozen=True, kw_only=True)
class Options(BaselineOptions, BalanceOptions, ResultOptions):
    """Write the uids of the samples that fulfil a condition on the columns of a folder's tables."""

    folder: Annotated[Path, POSITIONAL, also("--metadata_dir")]
    """The folder of the tables: stage 06's output, or DataComp's own metadata."""
    out: Annotated[Path, URLS, also("--save_path")]
    """The subset file to write: a sorted NumPy array of pairs of uint64, as DataComp's resharder takes it.  A URL such
    as s3://bucket/keep.npy with --work_dir."""
    where: str | None = None
    """The condition, in DuckDB's SQL, such as "clip_l14_similarity_score > 0.28 and language = 'en'"."""
    unique: bool = False
    """Take each uid once.  Otherwise a uid in several rows is written as many times, as in DataComp's tools."""
    skip_bad_uids: bool = False
    """Leave out rows whose uid is missing or is not 32 hexadecimal digits; otherwise such a row is an error."""
    memory_mb: int = 2000
    """Memory of the query; the rest is written to a temporary folder beside --out."""
    threads: Annotated[int, also("--num_workers")] = 4
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
    baseline = _checked(options)
    with results_in_stores(options) as local:
        tables = find_tables(options.folder)
        for warning in tables.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        check_columns(tables.tables)
        result = _select(local, baseline, tables) if options.balance is None else _balance(local, baseline, tables)
    result |= {"out": as_given(options.out)}
    result["seconds"] = round(time.monotonic() - began, 3)
    if options.json:
        print(orjson.dumps(result).decode())
    else:
        _tell(result)
    return EXIT_OK


def _checked(options: Options) -> Baseline | None:
    if options.where is None and options.baseline is None and options.balance is None:
        raise UsageError("give a condition with --where, or one of DataComp's with --baseline")
    options.check_balance()
    for flag in ("num_gpus", "batch_size"):
        if getattr(options, flag) is not None:
            print(f"note: --{flag} has no effect here", file=sys.stderr)
    if options.threads < 1 or options.memory_mb < 100:
        raise UsageError("--threads is at least 1, and --memory_mb at least 100")
    return chosen(options)


def _select(options: Options, baseline: Baseline | None, tables: FolderTables) -> dict[str, Any]:
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".spill", dir=out.parent) as name:
        spill = Path(name)
        paths = [table.parquet.absolute() for table in tables.tables]
        positions = baseline is not None and "cluster" in baseline.tests
        with _filter(paths, spill, options, positions=positions) as selection:
            if "uid" not in selection.columns:
                raise UsageError(f"{options.folder}: the tables have no column uid")
            baseline, note = _for_columns(baseline, selection.columns)
            condition = selection.condition(_text(options, baseline, selection))
            tests = open_tests(baseline, options) if baseline and baseline.tests else RowTests([])
            notes = [*note, *tests.notes]
            for line in notes:
                print(f"note: {line}", file=sys.stderr)
            taken = _SelectCounts()
            if baseline and baseline.tests:
                passed = spill / "passed.parquet"
                rows = selection.rows(condition, tests.columns, order=tests.order)
                _write_passing(passed, tests.passing(rows, tables.tables, options.folder))
                with _filter([passed], spill, options) as rest:
                    kept = write_subset(out, _sorted_uids(rest, rest.condition("true"), options, taken))
            else:
                kept = write_subset(out, _sorted_uids(selection, condition, options, taken))
            count = selection.count()
    return {
        "shards": len({table.shard_id for table in tables.tables}),
        "rows": count,
        "kept": kept,
        "bad_uids": taken.bad,
        "out": str(out),
        "condition": condition.text,
        "tests": list(baseline.tests) if baseline else [],
        "used": tests.used,
        "notes": notes,
        "thresholds": dict(condition.thresholds),
        "warnings": list(tables.warnings),
    }


def _balance(options: Options, baseline: Baseline | None, tables: FolderTables) -> dict[str, Any]:
    """As ``_select``, with fewer of what is frequent."""
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".spill", dir=out.parent) as spill:
        within: Path | None = None
        first: dict[str, Any] = {"condition": "", "tests": [], "used": {}, "notes": [], "thresholds": {}}
        if options.where is not None or baseline is not None:
            within = Path(spill, "within.npy")
            first |= _select(replace(options, out=within, unique=True, balance=None), baseline, tables)
            if not first["kept"]:
                raise UsageError("no row fulfils the condition, so that there is nothing to balance")
        rows = BalanceRows(tables.tables, Subset(within) if within else None, options.skip_bad_uids)
        balanced = options.balance_rows(rows, options.folder, options.threads, Path(spill))
        with SqlFilter([balanced.kept], Path(spill), memory_mb=options.memory_mb, threads=options.threads) as kept:
            written = write_subset(out, _sorted_uids(kept, kept.condition("true"), options, _SelectCounts()))
    if options.report is not None:
        balanced.write_report(options.report)
    return first | {
        "shards": len({table.shard_id for table in tables.tables}),
        "rows": rows.counts["rows"],
        "kept": written,
        "bad_uids": rows.counts["bad_uids"],
        "out": str(out),
        "warnings": list(tables.warnings),
        "balance": {
            "by": options.balance,
            "seed": options.seed or 0,
            "before": rows.counts["balanced"],
            "after": written,
        }
        | dict(balanced.told)
        | {"largest": balanced.largest()},
    }


def _text(options: Options, baseline: Baseline | None, selection: SqlFilter) -> str:
    if baseline is None or not options.where:
        return baseline.condition if baseline else options.where or ""
    selection.condition(options.where)  # alone it is a condition too: no parenthesis of it closes one of ours
    return f"(\n{options.where}\n)\nand (\n{baseline.condition}\n)"


def _filter(paths: Sequence[Path], spill: Path, options: Options, *, positions: bool = False) -> SqlFilter:
    return SqlFilter(paths, spill, memory_mb=options.memory_mb, threads=options.threads, positions=positions)


def _for_columns(baseline: Baseline | None, columns: Sequence[str]) -> tuple[Baseline | None, list[str]]:
    """The baseline for tables with these columns, and what is to be said of it."""
    if baseline is None or not baseline.by_language or {"text", "caption"} & set(columns) or "language" not in columns:
        return baseline, []
    note = (
        "the tables have no captions: their column language says which are English, and DataComp looks at the caption"
    )
    return Baseline(baseline.by_language), [note]


def _write_passing(path: Path, batches: Iterable[Any]) -> None:
    """Writes arrays of uids as a table with the column ``uid``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("uid", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
        for uids in batches:
            if len(uids):
                writer.write_batch(pa.record_batch([uids.cast(pa.string())], schema=schema))


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
    for name, what in result["used"].items():
        print(f"{name}: {what}")
    if result["bad_uids"]:
        print(f"left out: {result['bad_uids']:,} rows without a uid")
    if "balance" in result:
        tell_balance(result["balance"])
