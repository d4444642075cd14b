"""What a receipt says: the whole story of one shard in one stage, in one JSON object."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from curation import __version__
from curation.cluster import Allocation, gpu_name, host_identity, slurm_ids
from curation.inputs import Input
from curation.ledger import MAX_ATTEMPTS
from curation.storage.files import Published
from curation.work import ShardWork


class _Named(Protocol):
    name: str
    version: int


def build_receipt(
    work: ShardWork,
    stage: _Named,
    allocation: Allocation,
    token: str,
    *,
    epoch: int,
    outputs: Sequence[Published],
    began: float,
    error: dict[str, Any] | None,
    quarantine: bool = False,
    sources: Sequence[Input] = (),
    open_s: float = 0.0,
) -> dict[str, Any]:
    """The receipt of one attempt.  ``error`` None: done.  Times and hosts stand here and nowhere else.

    sources: where the inputs come from, one for each of ``work.inputs``.
    open_s: what it took this process to get ready, models and all.
    quarantine: count the failure as the last that is tried unasked.
    Units: seconds are wall-clock seconds by phase, summed over threads; ``started`` and ``finished`` are Unix times.
    """
    previous = work.previous or {}
    receipt: dict[str, Any] = {
        "shard": work.shard.id,
        "stage": stage.name,
        "version": stage.version,
        "status": "failed" if error else "done",
        "epoch": epoch,
        "generation": int(previous.get("generation", 0)) + 1,
        "token": token,
        "run": allocation.run_id,
        "counts": {
            "in": work.samples_in,
            "kept": work.kept,
            "dropped": dict(sorted(work.dropped.items())),
            "failed": dict(sorted(work.failed.items())),
        },
        "inputs": list(work.inputs),
        "sources": [source.origin(work.root) for source in sources],
        "outputs": [output.record() for output in outputs],
        "notes": work.notes,
        "warnings": work.warnings,
        "seconds": {phase: round(seconds, 4) for phase, seconds in sorted(work.seconds.items())},
        "host": host_identity()[0],
        "rank": allocation.rank,
        "slurm": slurm_ids(),
        "gpu": gpu_name(allocation.gpu),
        "cpus": allocation.threads,
        "open_s": round(open_s, 3),
        "code": code_version(),
        "started": round(began, 3),
        "finished": round(time.time(), 3),
    }
    superseded = _superseded(work, {o.path for o in outputs})
    if superseded:
        receipt["superseded"] = superseded
    if error:
        receipt["error"] = error
        failed_before = previous.get("status") in ("failed", "retry") and previous.get("epoch") == epoch
        attempts = int(previous.get("attempts", 0)) + 1 if failed_before else 1
        receipt["attempts"] = max(attempts, MAX_ATTEMPTS) if quarantine else attempts
    return receipt


def _superseded(work: ShardWork, paths: set[str]) -> list[str]:
    """Files that the last receipt named and this one does not: to be removed, by whoever finds them after a crash.

    Those that the last one superseded stay listed: one may be lying aside just now, under a name that nobody knows.
    """
    previous = work.previous or {}
    named = [output["path"] for output in previous.get("outputs", []) if output.get("checked", True)]
    return [path for path in dict.fromkeys([*named, *previous.get("superseded", [])]) if path not in paths]


@lru_cache(maxsize=1)
def code_version() -> str:
    """The package's version, with the commit where it runs from a checkout."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return __version__
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"
