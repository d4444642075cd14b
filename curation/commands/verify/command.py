"""``curation verify SOURCE HYBRID`` proves that a hybrid dataset is its source with the edits applied.

It only reads files: it needs no server and no SLURM, and takes no claim.  It writes nothing except the manifest.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation import PROGRAM
from curation.cluster import Allocation
from curation.commands.findings import Findings, as_lines, as_record, results_in_order
from curation.commands.verify import stored
from curation.commands.verify.shard import (
    CAPTIONS,
    EDITS,
    HYBRID,
    PROMPTS,
    REMEDIES,
    MixTask,
    Task,
    Verdict,
    verify_shard,
)
from curation.errors import EXIT_OK, EXIT_SHARDS_FAILED, UsageError
from curation.jsonio import clean_text
from curation.options import LISTED, PATH, POSITIONAL, Files, exit_code, logger, parse_arguments, set_up_logging
from curation.reshard.captions import CAPTIONS_STAGE
from curation.run.inputs import check_made_by, receipts_of
from curation.run.ledger import Ledger
from curation.run.progress import Progress
from curation.shards import Shard, discover, files_of, folders_of, id_of_record, is_safe_id, record_path, select
from curation.storage.files import names_in, read_record, write_manifest

VERIFY_FORMAT = 1


MANIFEST = "manifest.tsv"
_NOT_PROVED = ("subset", "blur_faces", "shard_size", "keys")  # options of stage 04


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prove that a hybrid dataset is its source with the edits applied, and nothing else.

    With one URL in place of the folders (verify s3://bucket/folder [--records DIR] [--json] [--quiet]): prove what was
    published there.
    """

    source: Annotated[Files, POSITIONAL]
    """Source shards: a folder of tars, a glob, braces, a list file or one tar."""
    hybrid: Annotated[Path, POSITIONAL]
    """Folder with the hybrid shards: stage 04's --output."""
    edits: Path | None = None
    """Folder with the edits.  Default, as for the next two: the folder that stage 04's receipts name."""
    prompts: Path | None = None
    """Folder with the prompts: stage 02's --output."""
    captions: Path | None = None
    """Folder with the captions: stage 01's --output."""
    recaptions: Annotated[str | None, PATH] = None
    """The captions that stage 04 mixed in: its --captions.  Default: the folder of stage 05 that its receipts name."""
    shards: Annotated[str | None, LISTED] = None
    """Only these shards: ids and inclusive ranges (00000003,00000010..00000019), or a file of them."""
    workers: int | None = None
    """Number of processes.  Default: one per CPU."""
    manifest: Path | None = None
    """File for the digests of the hybrid shards, for `sha256sum -c`; written only if no fault was found.
    Default: manifest.tsv in the hybrid folder, when all shards are verified."""
    provenance: bool = True
    """--no_provenance: do not require provenance in edited samples, for edits from other programs."""
    json: bool = False
    """One JSON object on one line instead of text."""
    quiet: bool = False
    """Show only the findings and the last line, no progress."""

    def check(self) -> None:
        """Raise UsageError for values that make no sense."""
        if not self.hybrid.is_dir():
            raise UsageError(f"there is no folder {self.hybrid}")
        for flag, folder in (("edits", self.edits), ("prompts", self.prompts), ("captions", self.captions)):
            if folder is not None and not folder.is_dir():
                raise UsageError(f"--{flag}: there is no folder {folder}")
        if self.workers is not None and self.workers < 1:
            raise UsageError("--workers must be at least 1")


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[2:] if argv is None else argv
    if stored.is_of_a_store(argv):
        return stored.main(argv)
    options = parse_arguments(Options, argv, "verify")
    options.check()
    set_up_logging(options.quiet)
    options = _with_folder_of_shards(options)
    began = time.monotonic()
    given = (options.hybrid, options.edits, options.prompts, options.captions)
    everything = discover(options.source, begun=[folder for folder in given if folder is not None])
    files, sources = files_of(everything), {shard.home for shard in everything}
    if options.hybrid.resolve() in {folder.resolve() for folder in sources}:
        raise UsageError("HYBRID is the folder of the source shards: there would be nothing to compare")
    _check_places(options, sources)
    shards = select(everything, options.shards)
    _check_made_from_edits_alone(options.hybrid, shards)
    with tempfile.TemporaryDirectory(prefix="curation-verify-") as scratch:
        mixes = _mixes(options, shards, Path(scratch))
        edits, prompts, captions = _folders(options, shards, mixed=bool(mixes))
        verdicts = _strays(options, everything, edits)
        tasks = [
            Task(s.id, files[s.id], options.hybrid / f"{s.id}.tar", edits, prompts, captions, options.provenance,
                 mixes.get(s.id))
            for s in shards
        ]  # fmt: skip
        verdicts += _verified(tasks, options)
    faulty = [verdict for verdict in verdicts if verdict.findings]
    manifest = _manifest(options, verdicts) if not faulty else None
    _show(options, verdicts, faulty, manifest, time.monotonic() - began)
    return EXIT_SHARDS_FAILED if faulty else EXIT_OK


def _verified(tasks: Sequence[Task], options: Options) -> list[Verdict]:
    verdicts = []
    workers = min(options.workers or Allocation.detect().threads, len(tasks))
    with Progress("verify", [task.shard_id for task in tasks], options.quiet) as progress:
        for verdict in results_in_order(verify_shard, tasks, workers):
            progress.samples_done(verdict.samples)
            progress.shard_passed(verdict.shard_id, verdict.samples)
            verdicts.append(verdict)
    return verdicts


def _mixes(options: Options, shards: Sequence[Shard], scratch: Path) -> dict[str, MixTask]:
    """How captions were mixed into each shard, by its id.  Raises UsageError if it is not known from where."""
    ledger = Ledger(options.hybrid, HYBRID, 0, {}, read_only=True)
    ledger.load_options_versions()
    made_with = {shard.id: ledger.governing(shard.id).options for shard in shards}
    mixed = {shard_id: made for shard_id, made in made_with.items() if made.get("mix")}
    if not mixed:
        return {}
    captions = options.recaptions or _named_by(options.hybrid, HYBRID, CAPTIONS_STAGE, shards)
    if captions is None:
        raise UsageError(
            f"stage 04 mixed captions into {options.hybrid}, and its receipts name no folder of stage 05 that is "
            "there; give what was its --captions: --recaptions PATH"
        )
    found = {
        shard_id: MixTask(str(captions), str(made["mix"]), int(str(made.get("seed", 0))), scratch)
        for shard_id, made in mixed.items()
    }
    for weights in {task.weights: task for task in found.values()}.values():
        weights.source().prepare()  # each worker reads the index
    return found


def _with_folder_of_shards(options: Options) -> Options:
    """The options with the folder of the hybrid shards where the folder of the whole dataset is given."""
    inside = options.hybrid / "shards"
    if receipts_of(options.hybrid, HYBRID) is not None or receipts_of(inside, HYBRID) is None:
        return options
    logger.warning(f"{options.hybrid} is no output of stage 04: the hybrid shards in {inside} are verified")
    return replace(options, hybrid=inside)


def _check_places(options: Options, sources: set[Path]) -> None:
    """Raise UsageError if a folder holds what another stage made, so that arguments must have been swapped."""
    if receipts_of(options.hybrid, HYBRID) is None and any(receipts_of(folder, HYBRID) for folder in sources):
        raise UsageError(
            f"SOURCE has receipts of {HYBRID}, and HYBRID {options.hybrid} has none: were the two swapped? "
            "The source shards come first"
        )
    check_made_by("HYBRID", options.hybrid, HYBRID)
    if options.edits is not None:
        check_made_by("--edits", options.edits, EDITS, beside=(CAPTIONS,))
    if options.prompts is not None:
        check_made_by("--prompts", options.prompts, PROMPTS)
    if options.captions is not None:
        check_made_by("--captions", options.captions, CAPTIONS)


def _check_made_from_edits_alone(hybrid: Path, shards: Sequence[Shard]) -> None:
    """Raise UsageError if stage 04 was told to do what cannot be computed from the source and the edits."""
    ledger = Ledger(hybrid, HYBRID, 0, {}, read_only=True)
    ledger.load_options_versions()
    for shard in shards:
        made_with = ledger.governing(shard.id).options
        if told := [f"--{name}" for name in _NOT_PROVED if made_with.get(name)]:
            raise UsageError(
                f"stage 04 made {hybrid} with {', '.join(told)}: this command can only check changes by "
                "edits. Use --verify of stage 04, which reads each shard back, or check the shards with fsck"
            )


def _folders(options: Options, shards: Sequence[Shard], *, mixed: bool) -> tuple[Path, Path | None, Path | None]:
    """The folders of edits, prompts and captions: as given, otherwise as the stages' receipts name them.

    mixed: stage 04 mixed captions, which it does without edits too; then there need be no folder of edits.
    """
    edits = options.edits or _named_by(options.hybrid, HYBRID, EDITS, shards)
    edits = edits or (options.hybrid / "_no_edits" if mixed else None)
    if edits is None:
        for folder in ("hybrid", "shards"):  # the root of the dataset was meant
            if receipts_of(options.hybrid / folder, HYBRID) is not None:
                raise UsageError(f"HYBRID {options.hybrid}: did you mean {options.hybrid / folder}?")
        without = (
            "" if receipts_of(options.hybrid, HYBRID) is None else ", or an empty folder if stage 04 had no --edits"
        )
        raise UsageError(
            f"no receipt of {HYBRID} in {options.hybrid} names the edits; give them: --edits FOLDER{without}"
        )
    prompts = options.prompts or _named_by(options.hybrid, HYBRID, PROMPTS, shards)
    prompts = prompts or _named_by(edits, EDITS, PROMPTS, shards)
    captions = options.captions or (_named_by(prompts, PROMPTS, CAPTIONS, shards) if prompts else None)
    return edits, prompts, captions


def _named_by(folder: Path, stage: str, upstream: str, shards: Sequence[Shard]) -> Path | None:
    """The folder from which a stage read ``upstream``'s files according to its receipts; None if none names it."""
    receipts = receipts_of(folder, stage)
    if receipts is None:
        return None
    for shard in shards:
        receipt = read_record(record_path(receipts, shard.id)) or {}
        for source in receipt.get("sources", ()):
            found = source.get("folder") if isinstance(source, dict) and source.get("stage") == upstream else None
            if isinstance(found, str) and (place := Path(os.path.realpath(receipts.parent.parent / found))).is_dir():
                return place
    return None


def _strays(options: Options, everything: Sequence[Shard], edits: Path) -> list[Verdict]:
    """Hybrid shards, receipts and edits of shards that the source lacks.  With --shards they are not searched for."""
    if options.shards is not None:
        return []
    known = {shard.id for shard in everything}
    found: dict[str, Verdict] = {}

    def tell(shard_id: str, kind: str, detail: str) -> None:
        found.setdefault(shard_id, Verdict(clean_text(shard_id)[:100])).findings.add(kind, "", detail)

    for folder, kind in ((options.hybrid, "extra_shard"), (edits, "stray_edits")):
        for below in sorted({folders_of(shard_id) for shard_id in known} | {""}):
            names = sorted(name for name in names_in(folder / below) if name.endswith(".tar") and name[0] != ".")
            for name in (f"{below}{name}" for name in names):
                if name[:-4] not in known:
                    tell(name[:-4], kind, f"{folder / name}: the source has no shard of that name")
    receipts = receipts_of(options.hybrid, HYBRID)
    for path in sorted(receipts.glob("*/[!.]*.json")) if receipts is not None else ():
        shard_id = id_of_record(path.stem)
        if shard_id not in known and is_safe_id(shard_id) and shard_id not in found:
            tell(shard_id, "extra_shard", f"{path} is the receipt of a shard that the source does not have")
    return list(found.values())


def _manifest(options: Options, verdicts: Sequence[Verdict]) -> Path | None:
    """Write the manifest and return its path; None if it was not requested or could not be written."""
    path = options.manifest or (options.hybrid / MANIFEST if options.shards is None else None)
    if path is None:
        return None
    rows = [(options.hybrid / f"{verdict.shard_id}.tar", verdict.sha256) for verdict in verdicts if verdict.sha256]
    try:
        write_manifest(path, rows)
    except OSError as error:
        if options.manifest is not None:
            raise UsageError(f"--manifest {path}: cannot be written ({error.strerror})") from None
        logger.warning(f"{path}: cannot be written ({error.strerror}); give another path: --manifest FILE")
        return None
    return path


def _show(
    options: Options, verdicts: Sequence[Verdict], faulty: Sequence[Verdict], manifest: Path | None, seconds: float
) -> None:
    captions = sum((verdict.captions for verdict in verdicts), Counter[str]())
    total: dict[str, Any] = {
        "format": VERIFY_FORMAT,
        "ok": not faulty,
        "shards": len(verdicts),
        "faulty": len(faulty),
        "samples": sum(verdict.samples for verdict in verdicts),
        "edited": sum(verdict.edited for verdict in verdicts),
        **({"captions": dict(captions.most_common())} if captions else {}),
        "elsewhere": sum(bool(verdict.elsewhere) for verdict in verdicts),
        "hybrid_bytes": sum(verdict.hybrid_bytes for verdict in verdicts),
        "seconds": round(seconds, 3),
        "manifest": None if manifest is None else str(manifest),
    }
    if options.json:
        total["findings"] = {v.shard_id: as_record(v.findings, REMEDIES) for v in faulty}
        print(orjson.dumps(total).decode(), flush=True)
        return
    pairs: list[tuple[str, Findings]] = [(verdict.shard_id, verdict.findings) for verdict in faulty]
    for line in as_lines(pairs, REMEDIES):
        print(line)
    if elsewhere := [verdict for verdict in verdicts if verdict.elsewhere]:
        folder = elsewhere[0].elsewhere.removesuffix(f"/{elsewhere[0].shard_id}.tar")
        print(f"{len(elsewhere):,} shards lie only in a store, and were not read: {PROGRAM} verify {folder}")
    rate = total["hybrid_bytes"] / 1e6 / max(seconds, 1e-9)
    about = (
        f"{total['shards']:,} shards, {total['samples']:,} samples, {total['edited']:,} of them edited, "
        f"{total['hybrid_bytes'] / 1e9:,.2f} GB in {seconds:,.1f} s ({rate:,.0f} MB/s)"
    )
    if captions:
        about += f"; captions: {', '.join(f'{count:,} {name}' for name, count in captions.most_common())}"
    if faulty:
        count = sum(verdict.findings.counts.total() for verdict in faulty)
        print(f"FAULTY: {count:,} findings in {len(faulty):,} shards; {about}", flush=True)
    else:
        nothing = (
            ""
            if total["edited"] or captions or len(elsewhere) == len(verdicts)
            else ", but nothing was edited: every sample is that of the source"
        )
        print(f"OK{nothing}: {about}" + (f"; digests in {manifest}" if manifest else ""), flush=True)
