"""``curation retry ROOT --stage S`` makes failed shards pending again.

A receipt is never deleted, because the commit is safe only while generations grow.  Instead a receipt of the next
generation, with the status ``retry``, is committed in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from curation import PROJECT
from curation.commands.places import StagePlace, stage_named
from curation.errors import EXIT_OK, UsageError
from curation.jsonio import clean_text
from curation.options import LISTED, POSITIONAL, exit_code, parse_arguments
from curation.run.attempt import code_version
from curation.run.claims import is_gone, read_claim
from curation.run.commit import Commit, requeue
from curation.run.ledger import MAX_ATTEMPTS, done_receipts
from curation.shards import Shard, bucket_of, id_of_record, select

_KEPT = ("shard", "stage", "version", "epoch", "inputs", "sources", "error")  # of the receipt that is replaced


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make failed shards of a stage pending again; the next run of the stage does them."""

    root: Annotated[Path, POSITIONAL]
    """The folder of the dataset, or the stage's output folder."""
    stage: str
    """The stage's name, as status shows it: 01_filter_noface."""
    reason: str | None = None
    """Only failures with this reason, or with this text in their message."""
    shards: Annotated[str | None, LISTED] = None
    """Only these shards: ids, ranges (00000010..00000019) or a file of them.  Shards that have failed three times are
    quarantined: they run again only if they are named here."""
    dry_run: bool = False
    """Only print the changes; change nothing."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "retry")
    place = stage_named(options.root, options.stage)
    counts: Counter[str] = Counter()
    for receipt in _failed(place, options, counts):
        counts[_retry(place, receipt, named=options.shards is not None, dry_run=options.dry_run)] += 1
    would = "would be" if options.dry_run else "are"
    print(f"{place.stage} in {place.home}: {counts['retry']:,} failed shards {would} pending again")
    for what, text in _LEFT.items():
        if counts[what]:
            print(f"  {counts[what]:,} {text}")
    if counts["retry"] and not options.dry_run:
        print(f"now start the stage again, as before: {_command(place.stage)}")
    return EXIT_OK


_LEFT = {
    "quarantined": f"not changed: they have failed {MAX_ATTEMPTS} times and run again only when --shards names them",
    "claimed": "not changed: a worker has a claim on them",
    "lost": "not changed: a worker was just committing them",
    "other": "not changed: they failed for other reasons",
    "sound": "of the shards that you named have not failed",
}


def _failed(place: StagePlace, options: Options, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yields the receipts of the failed shards that the options select, and counts the others."""
    for receipt in _receipts(place, options.shards):
        if receipt.get("status") != "failed":
            counts["sound"] += options.shards is not None
        elif options.reason is not None and not _matches(receipt, options.reason):
            counts["other"] += 1
        else:
            yield receipt


def _receipts(place: StagePlace, spec: str | None) -> Iterator[dict[str, Any]]:
    if spec is None:
        yield from done_receipts(place.home, place.stage)
        return
    paths = place.receipts.glob("*/[!.]*.json")
    shards = sorted((Shard(id_of_record(path.stem), path) for path in paths), key=lambda shard: shard.id)
    if not shards:
        raise UsageError(f"{place.stage} in {place.home} has no receipts yet: nothing has failed")
    for shard in select(shards, spec):
        receipt = _commit(place, shard.id).read_receipt()
        if receipt is not None:
            yield receipt


def _matches(receipt: dict[str, Any], reason: str) -> bool:
    error = receipt.get("error") or {}
    return reason == error.get("reason") or reason in str(error.get("message", ""))


def _commit(place: StagePlace, shard_id: str) -> Commit:
    return Commit(place.home, place.receipts / bucket_of(shard_id), shard_id)


def _retry(place: StagePlace, receipt: dict[str, Any], *, named: bool, dry_run: bool) -> str:
    """Makes a shard pending.  Returns ``retry``, or the reason why it was left as it is."""
    shard_id = str(receipt["shard"])
    attempts = int(receipt.get("attempts", 1))
    if attempts >= MAX_ATTEMPTS and not named:
        return "quarantined"
    if dry_run:
        holder = read_claim(place.claim(shard_id))
        return "claimed" if holder is not None and not is_gone(holder) else "retry"
    last = [output["path"] for output in receipt.get("outputs", []) if output.get("checked", True)]
    superseded = [*last, *receipt.get("superseded", [])]  # the next attempt removes them
    fields = {
        **{name: receipt[name] for name in _KEPT if name in receipt},
        "outputs": [],
        "attempts": 0 if named else attempts,
        "code": code_version(),
        **({"superseded": superseded} if superseded else {}),
    }
    return requeue(_commit(place, shard_id), place.claim(shard_id), receipt, fields)


def _command(stage: str) -> str:
    """Returns how the stage is started, from the scripts beside the package."""
    scripts = [path.name for path in sorted(PROJECT.glob("[0-9]*.sh")) if path.stem == stage]
    programs = [path.name for path in sorted(PROJECT.glob("[0-9]*.py")) if path.stem.startswith(stage)]
    commands = [f"sbatch {name}" for name in scripts] + [f"python {name} ..." for name in programs]
    return " or ".join(commands) or clean_text(stage)
