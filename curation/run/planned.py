"""The shards that the runs of a stage plan to do: lists below the stage's output folder, one file for each list.

A stage that follows another one reads there which shards will come, and ``status`` which are pending.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import orjson
import xxhash

from curation.errors import InfrastructureError
from curation.jsonio import clean_text
from curation.shards import MAX_SHARDS, is_safe_id
from curation.storage.files import link_exclusively, make_folder, read_record

logger = logging.getLogger("curation")

MAX_LISTS = 10_000  # of one stage: a run writes one list, and one more each time that its list grows
_MAX_SOURCES = 64
_MAX_PATH = 4096


def record_plan(output: Path, stage: str, ids: Iterable[str], sources: Sequence[Mapping[str, str]] = ()) -> None:
    """Record that a run of ``stage`` plans to do these shards.  Runs that record the same list share one file.

    sources: the origin of the shards in the form of receipts: ``{"stage": ..., "folder": relative to output}``.  Those
        that no stage's receipts record are left out.
    """
    shards = sorted(set(ids))
    if not shards:
        return
    named = sorted((dict(source) for source in sources if "stage" in source), key=lambda s: (s["stage"], s["folder"]))
    unique = [source for number, source in enumerate(named) if source not in named[:number]]
    data = orjson.dumps({"stage": stage, "sources": unique, "shards": shards})
    path = output / "_plan" / stage / f"{xxhash.xxh3_128_hexdigest(data)}.json"
    if not path.exists():
        make_folder(path.parent)
        link_exclusively(path, data)


def planned(output: Path, stage: str, on_warning: Callable[[str], None] = logger.warning) -> set[str]:
    """Every shard that a run of ``stage`` planned to do; empty if no run has written a list."""
    plan = Plan(output, stage, on_warning)
    plan.look()
    return plan.ids


class Plan:
    """All lists of one stage together.  A list never changes, so each is read once.

    sources: (stage, folder relative to the output folder) of the shards' inputs.
    """

    def __init__(self, output: Path, stage: str, on_warning: Callable[[str], None] = logger.warning) -> None:
        self.ids: set[str] = set()
        self.sources: set[tuple[str, str]] = set()
        self._folder = output / "_plan" / stage
        self._stage = stage
        self._warn = on_warning
        self._read: set[str] = set()

    def look(self) -> bool:
        """Read the new lists; returns whether they name further shards."""
        before = len(self.ids)
        for name in self._new_names():
            if len(self._read) >= MAX_LISTS or len(self.ids) > MAX_SHARDS:
                self._warn(f"{self._folder}: more lists than {MAX_LISTS:,}, or more shards than {MAX_SHARDS:,}")
                break
            self._read.add(name)
            self._take(self._folder / name)
        return len(self.ids) > before

    def _new_names(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if entry.name.endswith(".json") and entry.name[0] != "." and entry.name not in self._read
                )
        except OSError:  # no run has written a list yet
            return []

    def _take(self, path: Path) -> None:
        try:
            record = None if path.is_symlink() or not path.is_file() else read_record(path)
        except (OSError, InfrastructureError):
            record = None
        shards = record.get("shards") if record else None
        if record is None or not isinstance(shards, list) or record.get("stage", self._stage) != self._stage:
            self._warn(f"{path}: not a plan")
            return
        safe = {shard_id for shard_id in shards if isinstance(shard_id, str) and is_safe_id(shard_id)}
        self.ids |= safe
        if len(safe) < len(shards):
            self._warn(f"{path}: {len(shards) - len(safe):,} names are not valid shard ids, or are repeated")
        sources = record.get("sources", [])
        for source in sources[:_MAX_SOURCES] if isinstance(sources, list) else []:
            stage, folder = (source.get("stage"), source.get("folder")) if isinstance(source, dict) else (None, None)
            if isinstance(stage, str) and is_safe_id(stage) and isinstance(folder, str) and len(folder) < _MAX_PATH:
                self.sources.add((stage, clean_text(folder)))
