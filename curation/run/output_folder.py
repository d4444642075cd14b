"""What an output folder holds already: a stage's own shards, which it goes on with, or others, which stay."""

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
    """Raise UsageError where ``place`` holds tars that no receipt of ``stage`` vouches for, or shards of another
    layout.  overwrite: such tars are replaced where they are in the way; shards of another layout are removed.

    output: where the receipts are.  place: where the tars go, which may be a bucket.
    ids: the shards that are to be there, None where that is not known yet.  regroups: these are all there may be.
    """
    names = place.names() if isinstance(place, RemoteFolder) else _names(place)
    tars = {name.removesuffix(TAR) for name in names if name.endswith(TAR) and name[0] != "."}
    own = _own(output / "_receipts" / stage)  # looked up after the tars: a commit publishes them before its receipt
    if (foreign := tars - own) and not overwrite:
        raise UsageError(
            f"{place} already holds {len(foreign):,} shards that {stage} has not made: {some(foreign)}. Give "
            "another folder, or --overwrite to replace those that are in the way"
        )
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


def _names(folder: Path) -> list[str]:
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
    """The receipt goes first: files without one are nobody's."""
    path = _receipt(output, stage, shard_id)
    record = read_record(path) or {}
    path.unlink(missing_ok=True)
    home = os.path.realpath(output)
    for told in record.get("outputs", []):
        if "upload" in told:
            there = object_at(Url(told["path"]))
            if (found := there.info()) is not None and found.is_of(told):
                there.remove(found)
            continue
        file = os.path.realpath(output / str(told.get("path", "")))
        if file.startswith(home + os.sep):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.unlink(file)
