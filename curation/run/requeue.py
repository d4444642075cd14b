"""Makes a shard that has a receipt pending again, without deleting the receipt.

The commit is safe only while generations grow.  So a receipt of the next generation, with the status ``retry``, is
committed in place of the old one.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from curation.errors import LostClaim
from curation.run.claims import is_gone, read_claim
from curation.run.commit import Commit
from curation.run.ledger import Ledger, done_receipts
from curation.shards import bucket_of

Redo = Literal["urls", "images"]


"""What to redo of a done shard: request its failed rows once more, or decode its stored images."""


def requeue(
    commit: Commit, claim: Path, receipt: Mapping[str, Any], fields: Mapping[str, Any]
) -> Literal["retry", "claimed", "lost"]:
    """Commit a receipt with the status ``retry`` and these fields in place of ``receipt``.

    claim: the path of a worker's claim on the shard.  Returns ``claimed`` if a live worker holds the shard, ``lost``
    if another process is committing it.
    """
    holder = read_claim(claim)
    if holder is not None and not is_gone(holder):  # this commit would discard its work
        return "claimed"
    generation = int(receipt.get("generation", 0))
    if commit.finish_pending(generation):  # a worker died during a newer commit
        return "lost"
    token, now = secrets.token_hex(8), round(time.time(), 3)
    try:
        commit.write({**fields, "status": "retry", "generation": generation + 1, "token": token, "finished": now})
    except LostClaim:
        return "lost"
    return "retry"


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
        claim = ledger.root / "_claims" / ledger.stage / bucket_of(shard_id) / f"{shard_id}.claim"
        counts[requeue(ledger.commit(shard_id), claim, receipt, {**receipt, "again": asked})] += 1
    return counts


def _has_failures(receipt: Mapping[str, Any]) -> bool:
    return bool((receipt.get("counts") or {}).get("failed"))
