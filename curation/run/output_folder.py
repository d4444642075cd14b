"""Guards the output folder: a stage continues its own shards there, and does not overwrite those of others."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from curation.errors import UsageError
from curation.jsonio import some
from curation.run.records import read_receipt
from curation.shards import LAYOUT_NOTE, TAR, folders_of, id_of_record, record_path
from curation.storage.files import names_in

# What img2dataset and this project write for a shard: its tar or its folder, its table, its counts.
_NUMBERED = re.compile(r"([0-9]+)(?:\.tar|\.parquet|_stats\.json|\.tfrecord)?")


def refuse_foreign_shards(
    output: Path, stage: str, ids: Collection[str] | None, *, regroups: bool, overwrite: bool
) -> None:
    """Refuse to write into a folder with tars that the stage did not make, or with its own shards of another layout.

    Args:
        output: The folder of the receipts.
        stage: The name of the stage.
        ids: The shards that this run will write; None if they are not known yet.
        regroups: No other shards than these may exist.
        overwrite: Replace tars that are in the way, and remove shards of another layout.

    Raises:
        UsageError: ``output`` holds such shards, and ``overwrite`` is not set.
    """
    tars = {name.removesuffix(TAR) for name in _names_of_shards(output, ids or ()) if name.endswith(TAR)}
    own = _own(output / "_receipts" / stage)  # read after the tars, because a commit publishes tars before its receipt
    if not overwrite:
        _refuse(output, stage, tars - own, "--overwrite")
    surplus = own - set(ids) if ids is not None else set()
    if surplus and not regroups:  # shards of other sources may be in the folder, but not of another layout
        record = read_receipt(_receipt(output, stage, min(surplus))) or {}
        surplus = surplus if LAYOUT_NOTE in record.get("notes", {}) else set()
    if not surplus:
        return
    if not overwrite:
        raise UsageError(
            f"{output} holds {len(surplus):,} shards of another layout, which would stay beside the new ones: "
            f"{some(surplus)}. Use another folder, or --overwrite to remove them"
        )
    for shard_id in sorted(surplus):
        _remove(output, stage, shard_id)


def refuse_foreign_files(output: Path, stage: str, ids: Collection[str], *, rerun: bool) -> None:
    """Refuse to begin a stage in a folder that already has shards, those of img2dataset in five digits included.

    This is for a stage that writes several files, or a folder, for each shard.  A stage that has begun in ``output``
    continues there.

    Raises:
        UsageError: ``output`` holds entries with the name of one of the shards, and ``rerun`` is not set; or it holds
            other shards, which would stay among the new ones.
    """
    receipts = output / "_receipts" / stage
    if receipts.exists():
        return
    names = _names_of_shards(output, ids)
    foreign = {f"{folders_of(name)}{name[len(folders_of(name)) :].partition('.')[0]}" for name in names} & set(ids)
    others = {match[1] for name in names if (match := _NUMBERED.fullmatch(name))} - set(ids)
    if receipts.exists():  # another worker has begun meanwhile
        return
    if others:
        raise UsageError(
            f"{output} already holds {len(others):,} shards that {stage} has not made: {some(others)}. They would stay "
            "among the new ones: use another folder"
        )
    if not rerun:
        _refuse(output, stage, foreign, "--rerun")


def _refuse(place: Path, stage: str, foreign: Collection[str], flag: str) -> None:
    if foreign:
        raise UsageError(
            f"{place} already holds {len(foreign):,} shards that {stage} has not made: {some(foreign)}. Use "
            f"another folder, or {flag} to replace those that are in the way"
        )


def _names_of_shards(place: Path, ids: Collection[str]) -> list[str]:
    """The names in a folder, and in those below it that these shards' ids hold; without hidden ones."""
    found = {folder: names_in(place / folder) for folder in {"", *map(folders_of, ids)}}
    return [f"{folder}{name}" for folder, names in found.items() for name in names if name[0] != "."]


def _own(receipts: Path) -> set[str]:
    """The shards that have a receipt or an unfinished commit."""
    found = set()
    for bucket in names_in(receipts):
        if bucket[0] == "_" or not (receipts / bucket).is_dir():
            continue
        for name in names_in(receipts / bucket):
            if name.endswith(".commit"):
                found.add(id_of_record(name[1:].rsplit(".", 2)[0]))
            elif name.endswith(".json") and name[0] != ".":
                found.add(id_of_record(name.removesuffix(".json")))
    return found


def _receipt(output: Path, stage: str, shard_id: str) -> Path:
    return record_path(output / "_receipts" / stage, shard_id)


def _remove(output: Path, stage: str, shard_id: str) -> None:
    """Remove a shard: the receipt first, because files that no receipt names belong to no shard."""
    path = _receipt(output, stage, shard_id)
    record = read_receipt(path) or {}
    path.unlink(missing_ok=True)
    home = os.path.realpath(output)
    for named in record.get("outputs", []):
        file = os.path.realpath(output / str(named.get("path", "")))
        if file.startswith(home + os.sep):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.unlink(file)
