"""What the receipts of a stage name and a store lacks: shards of which no receipt of an upload is there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError
from curation.jsonio import clean_text
from curation.run.records import is_object, name_in_store, read_receipt, read_upload_receipt
from curation.storage.files import names_in

# A folder's time tells whether anything was added to it.  A file that is added within this time of the last look may
# have left the time of the folder as it was, on filesystems with coarse times.
_SETTLED_S = 10.0


@dataclass(frozen=True, slots=True)
class Due:
    """A done or failed shard that has to be uploaded.

    Attributes:
        shard_id: The shard.
        receipt: Its newest receipt.
        outputs: Those outputs of it that are files.
        size: Of these, in bytes.
    """

    shard_id: str
    receipt: dict[str, Any]
    outputs: tuple[dict[str, Any], ...]
    size: int

    @property
    def generation(self) -> int:
        """Of the receipt."""
        return int(self.receipt.get("generation", 0))


def outputs_to_send(receipt: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The outputs of a receipt that belong into a store, one for each name there.

    A failed shard has none, but for its rejects.  A copy that another stage may replace is not sent.

    Raises:
        InfrastructureError: Two of them would have the same name.
    """
    named: dict[str, dict[str, Any]] = {}
    for output in receipt.get("outputs", []):
        if output.get("checked", True) and not is_object(str(output["path"])):
            known = named.setdefault(name_in_store(str(output["path"])), output)
            if known["path"] != output["path"]:
                raise InfrastructureError(
                    f"{clean_text(str(known['path']))} and {clean_text(str(output['path']))} of a shard would have the "
                    "same name in a store; give the stage two output folders of which neither lies in the other"
                )
    return tuple(named.values())


class Backlog:
    """The shards of a stage that a store lacks, found again and again.  Memory stays flat in the number of shards.

    A bucket of receipts in which nothing was missing is not read again until something is added to it.

    Args:
        home: The stage's output folder.
        stage: The name of the stage.
        store: The name of the store's folder below ``_published``.
    """

    def __init__(self, home: Path, stage: str, store: str) -> None:
        self._home, self._stage, self._store = home, stage, store
        self._receipts = home / "_receipts" / stage
        self._settled: dict[str, int] = {}  # bucket → the time of its folder when nothing was missing

    def shards(self, *, everything: bool = False) -> Iterator[Due]:
        """The shards that are to be uploaded, in the order of their ids.

        everything: Look into all buckets, also those that were complete.

        Raises:
            InfrastructureError: The receipts cannot be read.
        """
        for bucket in sorted(name for name in names_in(self._receipts) if (self._receipts / name).is_dir()):
            changed_ns = os.stat(self._receipts / bucket).st_mtime_ns
            if not everything and self._settled.get(bucket) == changed_ns:
                continue
            missing = False
            for name in sorted(names_in(self._receipts / bucket)):
                if name.endswith(".json") and not name.startswith("."):
                    due = self.of(self._receipts / bucket / name)
                    if due is not None:
                        missing = True
                        yield due
            if not missing and time.time_ns() - changed_ns > _SETTLED_S * 1e9:
                self._settled[bucket] = changed_ns

    def of(self, path: Path) -> Due | None:
        """What has to be uploaded of the shard of a receipt; None where the store has it, or it is not settled."""
        receipt = read_receipt(path)
        if receipt is None or receipt.get("status") not in ("done", "failed"):
            return None
        shard_id = str(receipt.get("shard"))
        if read_upload_receipt(self._home, self._store, self._stage, shard_id, receipt) is not None:
            return None
        outputs = outputs_to_send(receipt)
        return Due(shard_id, receipt, outputs, sum(int(output["size"]) for output in outputs))
