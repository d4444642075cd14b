"""A folder with the receipts of many shards in stages 01 to 04, as the stages leave them, without the work."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from curation.run.planned import record_plan
from curation.shards import bucket_of

STAGES = (
    ("01_filter_noface", "captions"),
    ("02_captions_processor", "prompts"),
    ("03_generate_images", "edits"),
    ("04_reshard", "hybrid"),
)
HOSTILE = '<img src=x onerror="window.hacked=1">'
BEGAN = 1_795_000_000.0


@dataclass
class Synthetic:
    """root: the folder.  sums: (stage, what) → how many, as the receipts say."""

    root: Path
    shards: int
    sums: Counter[tuple[str, str]] = field(default_factory=Counter)


def make_root(root: Path, shards: int, *, host: str = "node{:03d}") -> Synthetic:
    """Every 100th shard failed in stage 02 and is not there after; the last tenth is only planned."""
    made = Synthetic(root, shards)
    ids = [f"{number:08d}" for number in range(shards)]
    for order, (stage, folder) in enumerate(STAGES):
        home = root / folder
        record_plan(home, stage, ids)
        for bucket in {bucket_of(shard) for shard in ids}:
            (home / "_receipts" / stage / bucket).mkdir(parents=True)
        for number, shard in enumerate(ids):
            if number >= 0.9 * shards or (number % 100 == 7 and order > 1):
                continue
            failed = number % 100 == 7 and order == 1
            text = json.dumps(_receipt(stage, order, shard, number, host, failed=failed, made=made))
            (home / "_receipts" / stage / bucket_of(shard) / f"{shard}.json").write_text(text)
    return made


def _receipt(
    stage: str, order: int, shard: str, number: int, host: str, *, failed: bool, made: Synthetic
) -> dict[str, object]:
    came = (1000, 120, 100, 1000)[order] + (number % 7 if order == 1 else 0)
    gone = {"no_face": came - 120} if order == 0 else {"not_english": 20} if order == 1 else {}
    kept = came - sum(gone.values())
    began = BEGAN + 3600 * order + 4 * (number % 2500)
    seconds = 25.0 + number % 13 + (number * 7919 % 1000) / 250 + (60 if number % 997 == 0 else 0)
    receipt = {
        "shard": shard, "stage": stage, "version": 1, "status": "failed" if failed else "done", "epoch": 1,
        "generation": 1, "token": f"{number:016x}", "run": "run-1",
        "counts": {"in": came, "kept": kept, "dropped": gone, "failed": {}},
        "inputs": [], "sources": [],
        "outputs": [{"path": f"{shard}.json", "size": 1000, "digest": "0" * 32, "checked": True}],
        "notes": {"languages": {"en": kept, "de": 20}} if order == 1 else {"edited": 90} if order == 3 else {},
        "warnings": [], "seconds": {"read": 1.5, "infer": 20.0 + number % 11, "write": 0.5, "commit": 0.1},
        "host": host.format(number % 40), "rank": number % 8, "slurm": {"job_id": "4711"}, "gpu": None,
        "started": began, "finished": began + seconds,
    }  # fmt: skip
    if failed:
        receipt |= {"error": {"reason": "too_many_errors", "message": "900 of 1000 samples failed"}, "attempts": 1}
        made.sums[stage, "failed_shards"] += 1
    else:
        made.sums[stage, "done"] += 1
        made.sums[stage, "in"] += came
        made.sums[stage, "kept"] += kept
    return receipt
