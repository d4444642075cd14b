"""``curation index FOLDER --feature … --out INDEX`` makes an index, in which ``curation search`` finds samples."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
import xxhash

from curation.errors import EXIT_OK, InfrastructureError, UsageError
from curation.options import POSITIONAL, at_least, between, exit_code, parse_arguments
from curation.storage.files import make_folder

if TYPE_CHECKING:  # they need numpy, and --help does without
    from curation.commands.search.build import Plan
    from curation.commands.search.stored import IndexRecord
    from curation.commands.tables.tables import FolderTables


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a search index of a feature that stage 06 computed; run again, it is brought up to date."""

    folder: Annotated[Path, POSITIONAL]
    """Stage 06's output: tables and features."""
    feature: str
    """The feature of the npz files, such as oai-clip-vit-b32-image."""
    out: Path
    """The folder of the index."""
    kind: Literal["auto", "exact", "ivfpq"] = "auto"
    """exact: a search compares with every vector.  ivfpq: faiss's inverted file with product quantization, for large
    sets.  auto: exact up to 100,000 vectors."""
    seed: Annotated[int, between(0, 0x7FFFFFFF)] = 7
    """Seed of the training."""
    threads: Annotated[int, at_least(1)] = 4
    """Blocks of vectors that are encoded at a time; the index does not depend on it."""
    json: bool = False
    """One JSON object on one line instead of text."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "index")
    from curation.commands.search.build import build, remove_other_builds
    from curation.commands.search.stored import IndexRecord
    from curation.commands.tables.tables import find_tables

    began = time.monotonic()
    if options.out.resolve() == options.folder.resolve():
        raise UsageError("--out is the folder of the tables: an index needs a folder of its own")
    tables = find_tables(options.folder)
    for warning in tables.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    plan = _plan(options, tables)
    make_folder(options.out)
    IndexRecord.check_place(options.out)
    with _alone(options.out):
        record = _finished(options.out, plan)
        is_new = record is None
        if record is None:
            record = build(plan, tables, options.out, options.threads, lambda step: print(step, file=sys.stderr))
        remove_other_builds(options.out, plan.name)
    _tell(options, record, is_new=is_new, seconds=time.monotonic() - began)
    return EXIT_OK


def _plan(options: Options, tables: FolderTables) -> Plan:
    from curation.commands.search.build import Plan
    from curation.commands.search.source import model_of, state_of
    from curation.commands.search.stored import FORMAT

    source = state_of(options.folder, tables.stage)
    model = model_of(options.feature, tables.tables)
    decided = [FORMAT, source.digest, options.feature, options.kind, options.seed, model and [*_fields(model)]]
    name = xxhash.xxh3_128_hexdigest(orjson.dumps(decided))
    return Plan(name, options.feature, options.kind, options.seed, model, source)


def _fields(model: Any) -> Iterator[str]:
    yield from (model.directive, model.revision)


def _finished(folder: Path, plan: Plan) -> IndexRecord | None:
    """The index, if it is just the one that is wanted."""
    from curation.commands.search.nearest import OpenIndex
    from curation.commands.search.stored import IndexRecord

    try:
        record = IndexRecord.read(folder)
        if record.build != plan.name:
            return None
        OpenIndex(folder)
    except InfrastructureError:
        return None
    return record


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time make this index; where the filesystem has no locks, its user has to see to it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", fallback_to_soft=False, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"{folder}: another process makes this index now; wait until it ends") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def _tell(options: Options, record: IndexRecord, *, is_new: bool, seconds: float) -> None:
    told = {
        "index": str(options.out),
        "feature": record.feature,
        "kind": record.kind,
        "rows": record.rows,
        "width": record.width,
        "without_feature": record.without_feature,
        "lists": record.lists,
        "shards": record.source.shards,
        "model": record.model and record.model.directive,
        "revision": record.model and record.model.revision,
        "made": is_new,
        "seconds": round(seconds, 3),
    }
    if options.json:
        print(orjson.dumps(told).decode())
        return
    model = record.model.directive if record.model else "unknown, so that only --like can search"
    what = "made" if is_new else "is up to date"
    print(
        f"{options.out}: {what}: {record.rows:,} vectors of {record.width:,} numbers ({record.kind}), "
        f"{record.without_feature:,} samples without the feature, model {model}"
    )
