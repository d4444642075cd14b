"""Makes shards that are done pending again, to ask for their failed URLs or to decode their stored images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Literal

from curation.run.commit import requeue
from curation.run.ledger import Ledger, done_receipts
from curation.shards import record_path

Redo = Literal["urls", "images"]
"""What to do again of a done shard: ask for its failed rows once more, or decode its stored images."""


def requeue_all(ledger: Ledger, shards: Collection[str], what: Collection[Redo], run_id: str) -> Counter[str]:
    """Make done shards pending for ``what``; their outputs stay published until they are replaced.

    With ``urls`` alone, this selects only shards with failed rows.  Shards that this very run has done are skipped.
    Returns the number of selected shards by result: ``retry``, ``claimed``, ``lost``.
    """
    counts: Counter[str] = Counter()
    for receipt in done_receipts(ledger.root, ledger.stage):
        shard_id = str(receipt.get("shard"))
        asked = sorted({*what, *receipt.get("again", ())})
        if shard_id not in shards or receipt.get("status") not in ("done", "retry") or asked == receipt.get("again"):
            continue
        if (run_id and receipt.get("run") == run_id) or not ("images" in what or _has_failures(receipt)):
            continue
        claim = record_path(ledger.root / "_claims" / ledger.stage, shard_id, ".claim")
        counts[requeue(ledger.commit(shard_id), claim, receipt, {**receipt, "again": asked})] += 1
    return counts


def _has_failures(receipt: Mapping[str, Any]) -> bool:
    return bool((receipt.get("counts") or {}).get("failed"))
