"""What a dry run of resharding tells: how many samples would go on, in how many bytes.  Reads, and writes nothing."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curation.errors import ShardError
from curation.material import Material
from curation.run.inputs import Upstream
from curation.shards import Shard
from curation.tar.samples import TarPass

logger = logging.getLogger("curation")


class _Count:
    """The account of one shard."""

    def __init__(self, shard: Shard, tally: Counter[str]) -> None:
        self.shard = shard
        self._tally = tally

    def sample_in(self, count: int = 1) -> None:
        self._tally["in"] += count

    def keep(self, count: int = 1) -> None:
        self._tally["kept"] += count

    def drop(self, key: str, reason: str) -> None:
        self._tally[f"dropped: {reason}"] += 1

    def fail(self, key: str, reason: str, detail: str = "") -> None:
        self._tally[f"failed: {reason}"] += 1

    def note(self, name: str, value: object) -> None:
        if name in ("edited", "copies") and isinstance(value, int):
            self._tally[name] += value

    def warn(self, text: str) -> None:
        logger.warning(f"{self.shard.id}: {text}")


def survey(material: Material, shards: Sequence[Shard], size: int | None, *, cursory: bool) -> str:
    """One line for all of the shards.

    size: of the shards that they are regrouped into.  cursory: every sample goes on, so that the files' sizes do.
    Bytes are those of the samples as they are: edits and blurred images may be larger or smaller.
    """
    tally: Counter[str] = Counter()
    bytes_out = samples_out = 0
    for shard in shards:
        if cursory:
            bytes_out += _size(shard)
            continue
        records = _records(material, shard)
        if records is None:
            tally["blocked shards"] += 1
            continue
        account = _Count(shard, tally)
        with material.open(shard, records) as (_, selection):
            for window in TarPass(shard.path).windows():
                selection.look(window)
                chosen = [(span, selection.choose(span)) for span in window.spans if span.key]
                selection.count(chosen, account)
                for span, choice in chosen:
                    samples_out += choice.copies
                    bytes_out += choice.copies * sum(end - start for start, end in span.own_extents)
            selection.report(account, "edits")
    if cursory:
        return f"{len(shards):,} shards would go on in about {bytes_out:,} bytes"
    told = ", ".join(f"{count:,} {what}" for what, count in sorted(tally.items()) if count)
    made = f" in {-(-samples_out // size):,} shards" if size else ""
    return f"{samples_out:,} samples would go on{made}, about {bytes_out:,} bytes ({told or 'nothing comes in'})"


def _records(material: Material, shard: Shard) -> dict[Path, Mapping[str, Any]] | None:
    """What is known of a shard's inputs, None where one is missing."""
    upstream = Upstream()
    records: dict[Path, Mapping[str, Any]] = {}
    for wanted in material.inputs(shard):
        record, why = upstream.identify(wanted, shard.id)
        if record is None:
            logger.warning(f"{shard.id} blocked: {why}")
            return None
        if isinstance(wanted.path, Path):
            records[wanted.path] = record
    return records


def _size(shard: Shard) -> int:
    try:
        return os.stat(shard.path).st_size if isinstance(shard.path, Path) else 0
    except OSError as error:
        raise ShardError(f"{shard.path}: cannot be read ({error.strerror})") from error
