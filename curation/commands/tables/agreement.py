"""``curation agreement FOLDER`` says how far two judges of stage 06 agree: Cohen's kappa with quadratic weights."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson

from curation.commands.tables.missing import what_is_missing
from curation.commands.tables.tables import FolderTables, ShardTable, check_columns, find_tables
from curation.errors import EXIT_OK, InfrastructureError, SampleError, UsageError
from curation.extract.judging import columns_of, is_judge
from curation.jsonio import clean_text, parse_json_object
from curation.options import LISTED, POSITIONAL, at_least, exit_code, items_in, parse_arguments

MOST_VALUE = 1 << 53  # floats hold every whole number up to it
MOST_PAIRS = 20_000  # of different values: scores have at most 101 each
_DRAWS_AT_ONCE = 100
_INTERVAL = (2.5, 97.5)  # percentiles of the draws

Pair = tuple[int, int]
Scores = tuple[int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say how far two judges of stage 06 agree, with intervals."""

    folder: Annotated[Path, POSITIONAL]
    """The folder of the tables: stage 06's output."""
    other: Path | None = None
    """The folder of the second judge's tables, if it is another one.  Rows belong together by shard and key."""
    judges: Annotated[str | None, LISTED] = None
    """The two judges, such as judge:qwen,judge:gemma.  Default: the two of the tables, or the one of each folder."""
    columns: Annotated[str | None, LISTED] = None
    """Two columns of whole numbers to compare, instead of all axes that two judges share."""
    draws: Annotated[int, at_least(0)] = 2000
    """Bootstrap samples for the intervals; 0: no intervals."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the bootstrap."""
    json: bool = False
    """One JSON object on one line instead of text."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "agreement")
    first = _tables(options.folder)
    second = first if options.other is None else _tables(options.other)
    compared = _compared(options, first, second)
    counted = {name: Counter[Scores]() for name in compared}
    unmatched = matched = 0
    for rows in _rows(first, second, list(compared.values()), apart=options.other is not None):
        unmatched += rows[0]
        matched += len(rows[1][0])
        for name, scores in zip(compared, rows[1], strict=True):
            counted[name].update(scores)
            if len(counted[name]) > MOST_PAIRS:
                raise UsageError(f"{' and '.join(compared[name])}: more than {MOST_PAIRS:,} pairs of values; no scores")
    if options.other is not None and not matched:
        raise UsageError(
            f"--other {options.other}: none of its rows has the shard and the key of a row of {options.folder}; give "
            "the tables of two judges that rated the same shards"
        )
    result = {
        "axes": {
            name: {"columns": compared[name], **agreement(counted[name], draws=options.draws, seed=options.seed)}
            for name in compared
        },
        "unmatched_rows": unmatched,
        "draws": options.draws,
        "seed": options.seed,
    }
    print(orjson.dumps(result).decode() if options.json else "\n".join(_lines(result)))
    return EXIT_OK


def agreement(counts: Mapping[Scores, int], *, draws: int, seed: int) -> dict[str, Any]:
    """How far two raters agree.

    Args:
        counts: Their scores of one row → how many rows have these; None where there is no score.
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        ``both``: rows that both scored; of these ``kappa`` (None where it is not defined, because all scores are one),
        its ``interval`` of 95 % (percentiles of the bootstrap over rows; None without one), the shares ``equal`` and
        ``within_1``; and how many rows lack the score of the ``first_null``, the ``second_null`` or of ``both_null``.
    """
    pairs = {(x, y): n for (x, y), n in sorted(_scored(counts))}
    both = sum(pairs.values())
    cells = np.array([*pairs], np.int64).reshape(-1, 2)
    rows = np.array([*pairs.values()], np.int64)
    apart = np.abs(cells[:, 0] - cells[:, 1])
    return {
        "both": both,
        "kappa": _finite(kappas(cells, rows[None])[0]) if both else None,
        "interval": _interval(cells, rows, draws, seed) if both and draws else None,
        "equal": float(rows[apart == 0].sum() / both) if both else None,
        "within_1": float(rows[apart <= 1].sum() / both) if both else None,
        "first_null": sum(n for (x, y), n in counts.items() if x is None and y is not None),
        "second_null": sum(n for (x, y), n in counts.items() if x is not None and y is None),
        "both_null": counts.get((None, None), 0),
    }


def _scored(counts: Mapping[Scores, int]) -> Iterator[tuple[Pair, int]]:
    for (x, y), n in counts.items():
        if x is not None and y is not None:
            yield (x, y), n


def kappas(cells: Any, rows: Any) -> Any:
    """Cohen's kappa with quadratic weights (Cohen 1968), for several countings.

    It is 1 − Σ (x − y)² observed / Σ (x − y)² expected.  Expected is what the same scores of each rater give where they
    are independent, so that its sum is n · (var x + var y + (mean x − mean y)²).

    Args:
        cells: pairs × 2: the different pairs of scores.
        rows: countings × pairs: how many rows have each of them.

    Returns:
        One number for each counting; NaN where all scores of both raters are the same.
    """
    scores = cells.astype(np.float64)
    scores -= scores.min()  # exact, and the squares stay small
    n = rows.sum(1)
    means, squares = rows @ scores / n[:, None], rows @ scores**2 / n[:, None]
    observed = rows @ (scores[:, 0] - scores[:, 1]) ** 2 / n
    expected = squares.sum(1) - 2 * means[:, 0] * means[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 1e-12, 1 - observed / expected, np.nan)


def _interval(cells: Any, rows: Any, draws: int, seed: int) -> list[float] | None:
    """The bootstrap draws how many rows have each pair of scores, which is as good as drawing the rows."""
    random = np.random.default_rng(seed)
    both = int(rows.sum())
    found = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        drawn = random.multinomial(both, rows / both, min(_DRAWS_AT_ONCE, draws - start))
        found.append(kappas(cells, drawn))
    defined = np.concatenate(found)
    defined = defined[np.isfinite(defined)]
    return [float(end) for end in np.percentile(defined, _INTERVAL)] if len(defined) else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


# ---- what is compared


def _tables(folder: Path) -> FolderTables:
    tables = find_tables(folder)
    for warning in tables.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    check_columns(tables.tables)
    return tables


def _compared(options: Options, first: FolderTables, second: FolderTables) -> dict[str, tuple[str, str]]:
    """Axis → the columns of the two judges.

    Raises:
        UsageError: It is not clear which two judges are meant, or they share no axis.
    """
    if options.columns is not None:
        names = items_in(options.columns)
        if len(names) != 2 or options.judges is not None:
            raise UsageError("--columns takes two columns, and stands in place of --judges")
        _refuse_one_twice(first, second, names)
        return {f"{names[0]}, {names[1]}": (names[0], names[1])}
    ours, theirs = _judges(first.tables[0]), _judges(second.tables[0])
    if options.judges is not None:
        named = items_in(options.judges)
    else:
        named = [*ours] if options.other is None else [*ours][:1] + [*theirs][:1]
        if options.other is not None and (len(ours) > 1 or len(theirs) > 1):
            named = []
    if len(named) != 2:
        there = ", ".join(dict.fromkeys([*ours, *theirs])) or "none"
        raise UsageError(
            "name two judges with --judges, the folder of the second one's tables with --other, or two columns with "
            f"--columns; the tables' judges: {there}"
        )
    for name, judges in zip(named, (ours, theirs), strict=True):
        if name not in judges:
            raise UsageError(
                f"--judges: the tables have no {clean_text(name)!r}; there are: {', '.join(judges) or 'none'}"
            )
    _refuse_one_twice(first, second, named)
    mine, others = ours[named[0]], theirs[named[1]]
    shared = {axis: (mine.columns[axis], others.columns[axis]) for axis in mine.columns if axis in others.columns}
    if not shared:
        raise UsageError(f"{' and '.join(named)} share no axis: compare two columns with --columns")
    if mine.scale != others.scale:
        told = " and ".join(f"{name} {scale}" for name, scale in zip(named, (mine.scale, others.scale), strict=True))
        raise UsageError(f"the two judges rate on other scales: {told}; let both rate on one")
    for axis in shared:
        if mine.rubrics[axis] != others.rubrics[axis]:
            print(f"warning: the two judges were asked about {axis} with different rubrics", file=sys.stderr)
    return shared


def _refuse_one_twice(first: FolderTables, second: FolderTables, names: Sequence[str]) -> None:
    """Raise UsageError where scores would be compared with themselves."""
    if names[0] == names[1] and first.tables[0].parquet.resolve() == second.tables[0].parquet.resolve():
        raise UsageError(
            f"{clean_text(names[0])!r} is compared with itself: name two judges, or another folder as --other"
        )


@dataclass(frozen=True, slots=True)
class _Judge:
    """What a table says of a judge.

    Attributes:
        columns: Axis → its column.
        rubrics: Axis → its rubric.
        scale: The lowest and the highest score, as text.
    """

    columns: Mapping[str, str]
    rubrics: Mapping[str, Any]
    scale: str


def _judges(table: ShardTable) -> dict[str, _Judge]:
    """The judges of a table by directive, as its own metadata says."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(table.parquet)
    try:
        told = parse_json_object((schema.metadata or {}).get(b"curation", b"{}"))
    except SampleError:
        return {}
    models = told.get("models")
    found = {}
    for directive, model in models.items() if isinstance(models, dict) else ():
        axes = model.get("axes") if isinstance(model, dict) else None
        if is_judge(directive) and isinstance(axes, dict):
            try:
                columns = dict(zip(axes, columns_of(directive, axes), strict=False))
            except ValueError:  # a name that stage 06 takes for no judge
                continue
            there = {axis: column for axis, column in columns.items() if column in schema.names}
            ends = model.get("scale")
            scale = "-".join(map(str, ends)) if isinstance(ends, list) else ""
            found[directive] = _Judge(there, axes, clean_text(scale)[:20])
    return found


# ---- rows


def _rows(
    first: FolderTables, second: FolderTables, compared: Sequence[tuple[str, str]], *, apart: bool
) -> Iterator[tuple[int, list[list[Scores]]]]:
    """For each shard the rows that have no partner, and the scores of the others for each pair of columns.

    A key that a table has twice, or that is null, tells no row from another, so that its rows have none.
    """
    if not apart:
        for table in first.tables:
            columns = _read(table, [name for pair in compared for name in pair])
            yield 0, [list(zip(columns[one], columns[other], strict=True)) for one, other in compared]
        return
    others = {table.shard_id: table for table in second.tables}
    for table in first.tables:
        mine = _read(table, ["key", *(one for one, _ in compared)])
        partner = others.pop(table.shard_id, None)
        theirs = _read(partner, ["key", *(other for _, other in compared)]) if partner is not None else {"key": []}
        here, there = _places(mine["key"]), _places(theirs["key"])
        pairs = [(number, there[key]) for key, number in here.items() if key in there]
        yield (
            len(mine["key"]) + len(theirs["key"]) - 2 * len(pairs),
            [[(mine[one][first_row], theirs[other][row]) for first_row, row in pairs] for one, other in compared],
        )
    for table in others.values():
        yield len(_read(table, ["key"])["key"]), [[] for _ in compared]


def _places(keys: Sequence[str | None]) -> dict[str, int]:
    """Key → its row, of the keys that one row has."""
    times = Counter(keys)
    return {key: number for number, key in enumerate(keys) if key is not None and times[key] == 1}


def _read(table: ShardTable, names: Sequence[str]) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(table.parquet)
        if missing := [name for name in names if name not in schema.names]:
            raise UsageError(f"{table.parquet}: {what_is_missing('column', missing, schema.names)}")
        for name in names:
            if name != "key" and not pa.types.is_integer(schema.field(name).type):
                raise UsageError(f"{table.parquet}: column {clean_text(name)!r} has no whole numbers")
        found: dict[str, list[Any]] = pq.read_table(table.parquet, columns=[*dict.fromkeys(names)]).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None
    for name in names:
        if name != "key" and any(value is not None and abs(value) > MOST_VALUE for value in found[name]):
            raise UsageError(
                f"{table.parquet}: column {clean_text(name)!r} has numbers above {MOST_VALUE:,}; no scores"
            )
    return found


# ---- text


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, result["axes"]))
    yield f"{'axis':{width}}  {'both':>10}  {'kappa':>6}  {'95 % interval':>15}  {'equal':>7}  {'within 1':>8}  nulls"
    for name, told in result["axes"].items():
        low_high = "–".join(f"{end:z.3f}" for end in told["interval"]) if told["interval"] else ""
        kappa = "none" if told["kappa"] is None else f"{told['kappa']:z.3f}"
        shares = [f"{told[share]:.1%}" if told[share] is not None else "" for share in ("equal", "within_1")]
        nulls = f"{told['first_null']:,} first, {told['second_null']:,} second, {told['both_null']:,} both"
        yield (
            f"{name:{width}}  {told['both']:>10,}  {kappa:>6}  {low_high:>15}  {shares[0]:>7}  {shares[1]:>8}  {nulls}"
        )
    undefined = [(name, told["both"]) for name, told in result["axes"].items() if told["kappa"] is None]
    if alike := [name for name, both in undefined if both]:
        yield f"kappa is not defined for {', '.join(alike)}: both judges gave all rows one and the same score"
    if empty := [name for name, both in undefined if not both]:
        yield f"kappa is not defined for {', '.join(empty)}: no row has the scores of both judges"
    if result["unmatched_rows"]:
        yield f"{result['unmatched_rows']:,} rows have no partner in the other folder (by shard and key)"
