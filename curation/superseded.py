"""Files that the last receipt named and the newest does not: removed by whoever comes upon them, and no newer one's.

Between a look at the receipt and the removal another attempt may publish a file of the same name, and no filesystem
removes a file only if it is the one that was looked at.  So it is renamed aside, under a name of the remover's own, and
only then is it asked what is named: what was moved before no record of a newer commit was there is none of its files.
An object in a bucket is looked at in its place, in that order too, and removed on the condition that it is still that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curation.publish import Commit
from curation.storage.buckets import Presence, object_at, place_of
from curation.storage.files import fast_digest, read_record, temporary_name
from curation.storage.urls import RemoteFile


def lie_about(root: Path, receipt: Mapping[str, Any] | None, presence: Presence | None = None) -> bool:
    """Whether a file is still there that ``receipt`` superseded.  presence: of objects in buckets."""
    presence = presence or Presence()
    places = (place_of(root, path) for path in (receipt or {}).get("superseded", ()))
    return any(presence.shows(at) if isinstance(at, RemoteFile) else os.path.lexists(at) for at in places)


def remove_superseded(
    root: Path, commit: Commit, receipt: Mapping[str, Any], token: str, dead: Sequence[str] = ()
) -> None:
    """Remove what ``receipt`` superseded, if it is the newest one; what ``dead`` had put aside as well.

    token: of the attempt that removes.  Raises OSError, and InfrastructureError where a bucket cannot be asked.
    """
    superseded = receipt.get("superseded", [])
    current = commit.read_receipt() if superseded else None
    if current is None or current.get("token") != receipt["token"]:
        return  # else they may be a newer one's
    places = {path: place_of(root, path) for path in superseded}
    paths = [path for path, place in places.items() if isinstance(place, Path)]
    for source in ("", *dead):
        moved = [path for path in paths if _move_aside(root / path, token, source)]
        if not moved:
            continue
        named = _named(commit, int(receipt["generation"]))
        for path in moved:
            aside = _aside(root / path, token)
            if any(_is(aside, output) for output in named if output["path"] == path):
                with contextlib.suppress(FileExistsError, FileNotFoundError):  # yet a newer one; cleared away
                    os.link(aside, root / path)
            aside.unlink(missing_ok=True)
    for path, place in places.items():
        if isinstance(place, RemoteFile):
            _remove_object(path, place, commit, int(receipt["generation"]))


def _remove_object(path: str, place: RemoteFile, commit: Commit, generation: int) -> None:
    there = object_at(place)
    found = there.look()
    if found is not None and all(output["path"] != path for output in _named(commit, generation)):
        there.remove(found)


def _aside(final: Path, token: str) -> Path:
    return final.with_name(temporary_name(final.name, token, "old"))


def _move_aside(final: Path, token: str, source: str) -> bool:
    """source: the dead attempt that had moved the file already, empty for the file under its own name."""
    try:
        os.rename(_aside(final, source) if source else final, _aside(final, token))
    except FileNotFoundError:
        return False
    return True


def _named(commit: Commit, generation: int) -> list[dict[str, Any]]:
    """The outputs of the newest receipt, and of the commit that follows it where its record is there already.

    generation: of a receipt that was read.  The record is read first: one that is not there is not finished either
    if the receipt is still the same afterwards, so that nothing of it was published before.
    """
    while True:
        record = read_record(commit.record(generation + 1))
        receipt = commit.read_receipt() or {}
        newest = int(receipt.get("generation", 0))
        if newest <= generation:
            return [*receipt.get("outputs", []), *(record or {}).get("outputs", [])]
        generation = newest


def _is(path: Path, output: Mapping[str, Any]) -> bool:
    try:
        return bool(path.stat().st_size == output["size"] and fast_digest(path) == output["digest"])
    except OSError:
        return False
