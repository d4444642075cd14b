"""``curation fsck TARS`` finds faults in tar shards, and copies every intact sample out of damaged ones."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation import PROGRAM
from curation.cluster import Allocation
from curation.commands.findings import as_lines, as_record, results_in_order
from curation.commands.fsck.shard import REMEDIES, Task, Verdict, check_shard
from curation.errors import EXIT_OK, EXIT_SHARDS_FAILED, UsageError
from curation.options import LISTED, POSITIONAL, Files, exit_code, parse_arguments, set_up_logging
from curation.run.ledger import done_receipts
from curation.run.progress import Progress
from curation.run.records import name_in_store, place_of
from curation.shards import TAR, discover, files_of, local_folders, select
from curation.storage.files import names_in

FSCK_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find faults in tar shards, and save every intact sample of damaged ones."""

    tars: Annotated[Files, POSITIONAL]
    """Shards: a folder of tars, a glob, braces, a list file or one tar."""
    repair: Path | None = None
    """Folder for a new tar with the intact samples of each faulty shard; not the folder of the tars."""
    shards: Annotated[str | None, LISTED] = None
    """Only these shards: ids and inclusive ranges (00000003,00000010..00000019), or a file of them."""
    workers: int | None = None
    """Number of processes.  Default: one per CPU."""
    images: bool = True
    """--no_images: do not decode the images, which takes most of the time."""
    json: bool = False
    """One JSON object on one line instead of text."""
    quiet: bool = False
    """Show only the findings and the last line, no progress."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, sys.argv[2:] if argv is None else argv, "fsck")
    if options.workers is not None and options.workers < 1:
        raise UsageError("--workers must be at least 1")
    set_up_logging(options.quiet)
    began = time.monotonic()
    elsewhere = _elsewhere(options)
    try:
        shards = select(discover(options.tars, whole=False), options.shards)
    except UsageError:
        if not elsewhere:
            raise
        shards = []
    files = files_of(shards)
    if options.repair is not None:
        if Path(os.path.realpath(options.repair)) in local_folders(shards):
            raise UsageError("--repair must not be the folder of the tars: it would replace them")
        if options.repair.exists() and not options.repair.is_dir():
            raise UsageError(f"--repair {options.repair}: this is not a folder")
    tasks = [Task(path, shard_id, options.images, options.repair) for shard_id, path in files.items()]
    verdicts: list[Verdict] = []
    with Progress("fsck", [task.shard_id for task in tasks], options.quiet) as progress:
        for verdict in results_in_order(
            check_shard, tasks, min(options.workers or Allocation.detect().threads, len(tasks) or 1)
        ):
            progress.samples_done(verdict.samples)
            progress.shard_passed(verdict.shard_id, verdict.samples)
            verdicts.append(verdict)
    faulty = [verdict for verdict in verdicts if verdict.findings]
    _show(options, verdicts, faulty, elsewhere, time.monotonic() - began)
    return EXIT_SHARDS_FAILED if faulty else EXIT_OK


def _elsewhere(options: Options) -> Counter[str]:
    """How many tars of a stage's output folder lie only in a store, by the store's folder.

    They were published and removed from this filesystem; without downloading nothing can be said of their samples.
    """
    found: Counter[str] = Counter()
    root = Path(options.tars[0])
    for stage in names_in(root / "_receipts") if options.shards is None and root.is_dir() else ():
        for receipt in done_receipts(root, stage):
            for output in receipt.get("outputs", ()) if receipt.get("status") == "done" else ():
                if str(output["path"]).endswith(TAR) and not (root / output["path"]).exists():
                    place = place_of(root, stage, receipt, output)
                    found[str(place).removesuffix(f"/{name_in_store(output['path'])}")] += place is not None
    return +found


def _show(
    options: Options, verdicts: Sequence[Verdict], faulty: Sequence[Verdict], elsewhere: Counter[str], seconds: float
) -> None:
    saved = [verdict for verdict in verdicts if verdict.salvaged is not None]
    total: dict[str, Any] = {
        "format": FSCK_FORMAT,
        "sound": not faulty,
        "shards": len(verdicts),
        "faulty": len(faulty),
        "samples": sum(verdict.samples for verdict in verdicts),
        "bytes": sum(verdict.size for verdict in verdicts),
        "salvaged_shards": len(saved),
        "salvaged_samples": sum(verdict.salvaged or 0 for verdict in saved),
        "elsewhere": elsewhere.total(),
        "seconds": round(seconds, 3),
    }
    if options.json:
        total["findings"] = {
            verdict.shard_id: {
                "path": str(verdict.path),
                **as_record(verdict.findings, REMEDIES),
                "salvaged": verdict.salvaged,
                "salvage_path": verdict.salvage_path or None,
            }
            for verdict in faulty
        }
        print(orjson.dumps(total).decode(), flush=True)
        return
    for line in as_lines(((verdict.shard_id, verdict.findings) for verdict in faulty), REMEDIES):
        print(line)
    about = (
        f"{total['shards']:,} shards, {total['samples']:,} samples, {total['bytes'] / 1e9:,.2f} GB in {seconds:,.1f} s"
    )
    for folder, gone in elsewhere.items():
        print(f"{gone:,} shards lie only in a store, and were not read: {PROGRAM} verify {folder}")
    if saved:
        print(f"repaired: {total['salvaged_samples']:,} samples of {len(saved):,} shards in {options.repair}")
    if faulty:
        count = sum(verdict.findings.counts.total() for verdict in faulty)
        print(f"FAULTY: {count:,} findings in {len(faulty):,} shards; {about}", flush=True)
    else:
        print(f"OK: {about}", flush=True)
