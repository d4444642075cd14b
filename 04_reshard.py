#!/usr/bin/env python3
"""Stage 04: write the hybrid shards.  Edited samples are replaced in place, every other byte stays as it was."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curation.cluster import Allocation
from curation.dictionaries import KEY_SUFFIX, clean_text, read_dictionary
from curation.edits import Edits, LooseEdits, TarredEdits
from curation.errors import ShardError, UsageError
from curation.inputs import VERIFY_BYTES, Input, published_below, source_inputs
from curation.options import RunOptions, exit_code, parse_options
from curation.runner import Follows, ShardWork, run_stage
from curation.shards import Shard, discover, local_folders
from curation.splice import Edit, Fate, splice, verify_splice
from curation.tar import SampleSpan, TarPass, TarReport

PROMPTS_STAGE = "02_captions_processor"
EDITS_STAGE = "03_generate_images"
NAMED = 5  # keys that a message names; the rest are counted


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Replace the edited samples of each shard; copy everything else byte for byte."""

    input: str
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands."""
    edits: str
    """Folder with the edits: <shard>.tar, or <shard>/<key>.jpg, .txt and .json.  An edit is all three together."""
    output: str
    """Folder for the hybrid shards, one <shard>.tar each."""
    prompts: str | None = None
    """Folder with the prompts (<shard>.json): only samples that have one are edited, and those whose edit is missing
    are known.  Default: every edit is applied."""
    on_missing: Literal["keep", "drop"] = "keep"
    """A sample with a prompt but without an edit: keep it as it was, or leave it out."""
    edits_layout: Literal["auto", "tar", "files"] = "auto"
    """Where the edits are.  auto: in the tar if there is one, else in loose files."""
    verify: bool = False
    """Read each output back before it is published and compare it with the source and the edits."""

    def check(self) -> None:
        super().check()
        for flag, folder in (("edits", self.edits), ("prompts", self.prompts)):
            if folder is not None and not self.follow and not Path(folder).is_dir():
                raise UsageError(f"--{flag}: there is no folder {folder}")
        if Path(self.output).resolve() == Path(self.edits).resolve():
            raise UsageError("--output and --edits must be two folders: both hold <shard>.tar")
        if self.on_missing == "drop" and self.prompts is None:
            raise UsageError("--on_missing drop needs --prompts: without them no edit is missing")


class Plan:
    """What is to become of the samples of one shard, and what has become of them.

    prompts: "<key>.json" of the samples that are to be edited; None: those that have an edit.
    """

    def __init__(self, edits: Edits, prompts: Collection[str] | None, drops_missing: bool) -> None:
        self.edits, self.prompts, self.drops_missing = edits, prompts, drops_missing
        self.edited = edits.keys()
        self.unused = set(self.edited)  # edits that no sample has claimed yet
        self.unasked = 0  # edits without a prompt
        self.missing: list[str] = []  # samples with a prompt, without an edit

    def decide(self, span: SampleSpan) -> Edit | Fate:
        """The same answer each time it is asked.  Of samples with one key the first is edited."""
        if span.torn:
            return Fate.LEFT_OUT
        if span.repeated or (self.prompts is not None and span.key + KEY_SUFFIX not in self.prompts):
            return Fate.STAYS
        if span.key in self.edited:
            return self.edits.read(span.key)
        return Fate.LEFT_OUT if self.drops_missing else Fate.STAYS

    def count(self, decided: Sequence[tuple[SampleSpan, Edit | Fate]], work: ShardWork) -> None:
        """Every sample once: kept, dropped or failed."""
        work.sample_in(len(decided))
        kept = len(decided)
        for span, fate in decided:
            if fate is Fate.LEFT_OUT:
                kept -= 1
                if span.torn:
                    work.fail(span.key, "damaged_tar", span.torn)
                    continue
                work.drop(span.key, "no_edit")
            if span.key in self.unused and not span.repeated:
                self.unused.remove(span.key)
                self.unasked += not isinstance(fate, Edit)
            elif self.prompts is not None and span.key + KEY_SUFFIX in self.prompts and not span.repeated:
                self.missing.append(span.key)
        work.keep(kept)


class Reshard:
    """One shard: shards/<shard>.tar and its edits → <output>/<shard>.tar."""

    name = "04_reshard"
    version = 1
    other_outputs: tuple[Path, ...] = ()
    shards_in_flight = 1

    def __init__(self, options: Options) -> None:
        self.options = options
        self.output = Path(options.output)

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        return {"prompts": o.prompts is not None, "on_missing": o.on_missing, "edits_layout": o.edits_layout}

    def inputs(self, shard: Shard) -> list[Input]:
        o, edits = self.options, Path(self.options.edits)
        inputs = source_inputs(shard)
        if o.edits_layout != "files":
            inputs.append(Input(edits / f"{shard.id}.tar", EDITS_STAGE, optional=True))
        if o.edits_layout != "tar":
            inputs.append(Input(edits / shard.id, EDITS_STAGE, optional=True, loose=True))
        if o.prompts is not None:
            inputs.append(Input(Path(o.prompts) / f"{shard.id}.json", PROMPTS_STAGE))
        return inputs

    def open(self, allocation: Allocation) -> None:
        pass

    def close(self) -> None:
        pass

    def process(self, work: ShardWork) -> None:
        source, o = work.shard.path, self.options
        with work.phase("read"):
            prompts = read_dictionary(Path(o.prompts) / f"{work.shard.id}.json") if o.prompts is not None else None
            edits = self._open_edits(work)
        with edits:
            plan = Plan(edits, prompts.keys() if prompts is not None else None, o.on_missing == "drop")
            report = TarReport()
            with work.phase("write"), work.output(self.output / f"{work.shard.id}.tar") as file:
                for decided in splice(TarPass(source, report), file, plan.decide):
                    plan.count(decided, work)
                    work.check_stop(urgent_only=True)
            self._report(plan, report, work)
            if o.verify:
                with work.phase("verify"):
                    verify_splice(source, file.temporary, plan.decide)
                work.note("verified", True)

    def _open_edits(self, work: ShardWork) -> Edits:
        """The shard's edits, of those files alone that the stage which made them vouches for, where it did."""
        folder, shard = Path(self.options.edits), work.shard
        records = dict(zip((wanted.path for wanted in self.inputs(shard)), work.inputs, strict=True))
        tar, loose = folder / f"{shard.id}.tar", folder / shard.id
        if not (record := records.get(tar, {"absent": True})).get("absent"):
            return TarredEdits(tar, record.get("digest") if record["size"] > VERIFY_BYTES else None)
        if not records.get(loose, {"absent": True}).get("absent"):
            return LooseEdits(loose, published_below(loose, EDITS_STAGE, shard.id))
        return LooseEdits(loose, {})

    def _report(self, plan: Plan, report: TarReport, work: ShardWork) -> None:
        """What was found beside the samples.  ShardError for edits that match no sample."""
        source, edits = work.shard.path, plan.edits
        if plan.unused:
            raise ShardError(
                f"{self.options.edits}: edits of shard {work.shard.id} match no sample of {source}: {some(plan.unused)}"
            )
        for line in report.warnings():
            work.warn(line)
        if edits.incomplete:
            work.warn(f"{edits.incomplete:,} edits lack their jpg, txt or json: they are none")
        if plan.unasked:
            work.warn(f"{plan.unasked:,} edits have no prompt: not applied")
        if plan.missing:
            kept = "dropped" if plan.drops_missing else "kept as they were"
            work.warn(f"{len(plan.missing):,} samples with a prompt have no edit, {kept}: {some(plan.missing)}")
        work.note("edited", len(plan.edited) - plan.unasked)
        work.note("missing_edits", len(plan.missing))


def some(keys: Collection[str]) -> str:
    """A few keys for a message, and how many more there are."""
    named = ", ".join(clean_text(key)[:100] for key in sorted(keys)[:NAMED])
    return f"{named} and {len(keys) - NAMED:,} more" if len(keys) > NAMED else named


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    options.check()
    shards = discover(options.input, allow_pipe=options.allow_pipe)
    if Path(options.output).resolve() in local_folders(shards):
        raise UsageError("--output must not be the folder of the source shards: it would replace them")
    return run_stage(Reshard(options), options, shards, Follows(EDITS_STAGE, Path(options.edits)))


if __name__ == "__main__":
    sys.exit(main())
