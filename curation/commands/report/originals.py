"""Where the pictures of a sample lie: the source shard that a stage read, and the shard of edited samples.

A receipt names the folder of each input.  The folder is looked for relative to the stage's output first, so that a root
that was moved together with its sources is understood, and then at its absolute path.  A shard that has another size
than the receipt says is another shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from curation.commands.places import EDITS, FACES, HYBRID, METADATA, RECAPTION, StagePlace
from curation.jsonio import clean_text
from curation.shards import PACKED_TARS, TAR

_MAX_PATH = 4096
_READ_BY = {RECAPTION: (RECAPTION,), METADATA: (METADATA,)}  # stages that read shards of their own
_SOURCES = (FACES, HYBRID)  # stages that read source shards, the first of them that is there


class Originals:
    """The shards that stages read.

    away: folders that receipts name and where the shard no longer is.
    """

    def __init__(self, root: Path, places: Sequence[StagePlace], given: Path | None) -> None:
        """given: the folder that the user names; it is looked at first."""
        self.away: set[str] = set()
        self._places = {place.stage: place for place in reversed(places)}
        self._given = given
        beside = root / "shards"
        homes = {place.home for place in places}
        self._beside = beside if beside.is_dir() and Path(os.path.realpath(beside)) not in homes else None

    def source(self, stage: str, shard_id: str) -> Path | None:
        """Returns what the stage, or the first stage that came before it, read as this shard; None if it is away."""
        found = _shard_in(self._given, shard_id) if self._given else None
        named: list[str] = []
        for reader in _READ_BY.get(stage, _SOURCES):
            if found is None and reader in self._places:
                found = _recorded(self._places[reader], shard_id, named)
        if found is None and self._beside is not None:
            found = _shard_in(self._beside, shard_id)
        if found is None:
            self.away.update(named[:1])
        return found

    def edited(self, stage: str, shard_id: str) -> Path | None:
        """Returns the edited samples of this shard."""
        return _shard_in(self._places[EDITS].home, shard_id) if EDITS in self._places else None


def _shard_in(folder: Path, shard_id: str) -> Path | None:
    paths = (folder / f"{shard_id}{suffix}" for suffix in (TAR, *PACKED_TARS))
    loose = folder / shard_id
    return next((path for path in paths if path.is_file()), loose if loose.is_dir() else None)


def _recorded(place: StagePlace, shard_id: str, named: list[str]) -> Path | None:
    """Returns the first input that the shard's receipt names; ``named`` gets the folders in which it was looked for."""
    receipt = place.done_receipt(shard_id) or {}
    record, source = _first(receipt.get("inputs")), _first(receipt.get("sources"))
    name = record.get("path")
    if not isinstance(name, str) or not name or os.path.basename(name) != name or "\0" in name:
        return None
    for folder in _folders(place, source):
        named.insert(0, clean_text(str(folder)))
        path = folder / name
        try:
            if path.is_dir() or (path.is_file() and record.get("size") in (None, path.stat().st_size)):
                return path
        except (OSError, ValueError):
            continue
    return None


def _folders(place: StagePlace, source: dict[str, Any]) -> Iterator[Path]:
    for folder in (source.get("folder"), source.get("absolute")):
        if isinstance(folder, str) and 0 < len(folder) < _MAX_PATH and "\0" not in folder:
            yield Path(os.path.normpath(place.home / folder))


def _first(values: Any) -> dict[str, Any]:
    value = values[0] if isinstance(values, list) and values else None
    return value if isinstance(value, dict) else {}
