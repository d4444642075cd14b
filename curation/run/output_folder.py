"""Guards the output folder: a stage goes on with its own shards there, and leaves those of others as they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from curation.errors import InfrastructureError, UsageError
from curation.jsonio import some
from curation.shards import TAR, bucket_of
from curation.storage.buckets import Folder, RemoteFolder, object_at
from curation.storage.files import read_record
from curation.storage.urls import Url

LAYOUT_NOTE = "layout"  # of receipts of shards that were regrouped


def refuse_foreign_shards(
    output: Path, place: Folder, stage: str, ids: Collection[str] | None, *, regroups: bool, overwrite: bool
) -> None:
    """Refuse to write among tars that the stage did not make, or among its own shards of another layout.

    Args:
        output: Where the receipts are.
        place: Where the tars go, which may be a bucket.
        stage: The name of the stage.
        ids: The shards that are to be there; None where that is not known yet.
        regroups: These are all the shards that there may be.
        overwrite: Tars that are in the way are replaced, and shards of another layout are removed.

    Raises:
        UsageError: ``place`` holds such shards, and ``overwrite`` was not asked for.
    """
    tars = {name.removesuffix(TAR) for name in _names(place) if name.endswith(TAR) and name[0] != "."}
    own = _own(output / "_receipts" / stage)  # looked up after the tars: a commit publishes them before its receipt
    if not overwrite:
        _refuse(place, stage, tars - own, "--overwrite")
    surplus = own - set(ids) if ids is not None else set()
    if surplus and not regroups:  # shards of other sources may stand beside these, but not those of a layout
        record = read_record(_receipt(output, stage, min(surplus))) or {}
        surplus = surplus if LAYOUT_NOTE in record.get("notes", {}) else set()
    if not surplus:
        return
    if not overwrite:
        raise UsageError(
            f"{place} holds {len(surplus):,} shards of another layout, which would stay beside the new ones: "
            f"{some(surplus)}. Give another folder, or --overwrite to remove them"
        )
    for shard_id in sorted(surplus):
        _remove(output, stage, shard_id)


def refuse_foreign_files(output: Path, place: Folder, stage: str, ids: Collection[str], *, rerun: bool) -> None:
    """Refuse to begin a stage where anything lies already that has the name of one of its shards.

    This is for a stage that writes several files, or a folder, for each shard.  A stage that has begun in ``output``
    goes on there.

    Raises:
        UsageError: ``place`` holds such files, and ``rerun`` was not asked for.
    """
    receipts = output / "_receipts" / stage
    if rerun or receipts.exists():
        return
    foreign = {name.partition(".")[0] for name in _names(place)} & set(ids)
    if not receipts.exists():  # else another worker has begun meanwhile
        _refuse(place, stage, foreign, "--rerun")


def _refuse(place: Folder, stage: str, foreign: Collection[str], flag: str) -> None:
    if foreign:
        raise UsageError(
            f"{place} already holds {len(foreign):,} shards that {stage} has not made: {some(foreign)}. Give "
            f"another folder, or {flag} to replace those that are in the way"
        )


def _names(folder: Folder) -> list[str]:
    if isinstance(folder, RemoteFolder):
        return folder.names()
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InfrastructureError(f"{folder}: cannot be read ({error.strerror})") from error


def _own(receipts: Path) -> set[str]:
    """Shards with a receipt, or with a commit under way."""
    found = set()
    for bucket in _names(receipts):
        if bucket[0] == "_" or not (receipts / bucket).is_dir():
            continue
        for name in _names(receipts / bucket):
            if name.endswith(".commit"):
                found.add(name[1:].rsplit(".", 2)[0])
            elif name.endswith(".json") and name[0] != ".":
                found.add(name.removesuffix(".json"))
    return found


def _receipt(output: Path, stage: str, shard_id: str) -> Path:
    return output / "_receipts" / stage / bucket_of(shard_id) / f"{shard_id}.json"


def _remove(output: Path, stage: str, shard_id: str) -> None:
    """Remove a shard: its receipt first, because files that no receipt names belong to no shard."""
    path = _receipt(output, stage, shard_id)
    record = read_record(path) or {}
    path.unlink(missing_ok=True)
    home = os.path.realpath(output)
    for named in record.get("outputs", []):
        if "upload" in named:
            there = object_at(Url(named["path"]))
            if (found := there.info()) is not None and found.is_of(named):
                there.remove(found)
            continue
        file = os.path.realpath(output / str(named.get("path", "")))
        if file.startswith(home + os.sep):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.unlink(file)
