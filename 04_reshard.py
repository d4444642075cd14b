#!/usr/bin/env python3
"""Stage 04: write the hybrid shards.  Edited samples are replaced in place, every other byte stays as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from curation.backends.faces import DetectorName, detector_class
from curation.cluster import Allocation
from curation.edits import Edits
from curation.errors import EXIT_OK, EXIT_WORK_LEFT, UsageError
from curation.models.needs import WeightsNeed
from curation.options import at_least, exit_code, logger, parse_options
from curation.reshard.layout import IS_EDITED, IndexReader, IndexWriter, Placed, ShardLayout
from curation.reshard.select import AS_IT_IS, Choice, Records, ReshardInputs, copy_keys, survey
from curation.reshard.uids import Subset
from curation.reshard.write import ShardWriter
from curation.run import Follows, Input, RunOptions, ShardContext, Stage, run_stage
from curation.run.ledger import receipts_of_all
from curation.run.output_folder import LAYOUT_NOTE, refuse_foreign_shards
from curation.run.workers import is_worker
from curation.shards import Shard, discover, local_folders, select
from curation.storage.buckets import Folder, RemoteFolder, remote_folder
from curation.tar.random_access import GatheredScan, Piece, write_wids
from curation.tar.scan import SampleSpan, TarReport, TarScan
from curation.tar.sources import open_blocks
from curation.tar.splice import Action, Decision, ObservedPass, Windows

if TYPE_CHECKING:
    from curation.reshard.blur import Blur

PROMPTS_STAGE = "02_captions_processor"
EDITS_STAGE = "03_generate_images"
STAGE, INDEX_STAGE = "04_reshard", "04_index"


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Replace the edited samples of each shard; copy everything else byte for byte.  Or take a subset, and regroup."""

    input: str
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands."""
    output: str
    """Folder for the hybrid shards, one <shard>.tar each."""
    edits: str | None = None
    """Folder with the edits: <shard>.tar, or <shard>/<key>.jpg, .txt and .json.  An edit is all three together."""
    prompts: str | None = None
    """Folder with the prompts (<shard>.json): only samples that have one are edited, and those whose edit is missing
    are known.  Default: every edit is applied."""
    on_missing: Literal["keep", "drop"] = "keep"
    """A sample with a prompt but without an edit: keep it as it was, or leave it out."""
    edits_layout: Literal["auto", "tar", "files"] = "auto"
    """Where the edits are.  auto: in the tar if there is one, else in loose files."""
    subset: str | None = None
    """A sorted .npy array of uids (dtype u8,u8): only these samples, each as often as it stands there."""
    drop_rejected: bool = False
    """Leave out the samples that stages 02 and 03 rejected; without it they stay as they were."""
    blur_faces: Literal["recorded"] | DetectorName | None = None
    """Blur faces of samples that are not edited: in the boxes that the metadata records, or in a detector's."""
    shard_size: Annotated[int | None, at_least(1)] = None
    """Regroup into shards 00000000.tar, 00000001.tar … of so many samples each.  Default: shards stay as they are."""
    shuffle_buffer: Annotated[int, at_least(0)] = 0
    """With --shard_size: shuffle so many samples together, one block after the other.  0: keep their order."""
    seed: int = 0
    """Of the shuffling."""
    step: Literal["all", "index", "write"] = "all"
    """With --shard_size: index the source shards, write the output shards, or first the one and then the other."""
    index: bool = False
    """Write <shard>.idx beside each output shard, and wids.json for all of them."""
    publish_to: str | None = None
    """Write the hybrid shards to this place in a bucket (s3://bucket/folder, gs://…); all else goes to --output."""
    overwrite: bool = False
    """Replace shards there that this stage has not made, and remove those of another layout."""
    verify: bool = False
    """Read each output back before it is published and compare it with the source and the edits."""

    def check(self) -> None:
        super().check()
        for flag, folder in (("edits", self.edits), ("prompts", self.prompts)):
            if folder is not None and not self.follow and not Path(folder).is_dir():
                raise UsageError(f"--{flag}: there is no folder {folder}")
        if self.edits is not None and Path(self.output).resolve() == Path(self.edits).resolve():
            raise UsageError("--output and --edits must be two folders: both hold <shard>.tar")
        if self.publish_to is not None and self.verify:
            raise UsageError("--verify reads a tar back before it is published, which no upload allows: leave one out")
        if self.edits is None and self.follow:
            raise UsageError("--follow waits for the edits: it needs --edits")
        if self.is_plain and not (self.edits or self.blur_faces or self.index):
            raise UsageError("--edits is missing: without it, and without a flag that changes the shards, they stay")
        if self.on_missing == "drop" and (self.prompts is None or self.edits is None):
            raise UsageError("--on_missing drop needs --prompts and --edits: without them no edit is missing")
        if self.shard_size is None and (self.shuffle_buffer or self.step != "all"):
            raise UsageError("--shuffle_buffer and --step need --shard_size: else each shard keeps its samples")
        if self.shard_size is not None and self.follow:
            raise UsageError("--shard_size needs all source shards before it can write one: leave --follow out")

    @property
    def is_plain(self) -> bool:
        """Whether every source shard becomes one of as many samples, at the same place."""
        return not (self.subset or self.drop_rejected or self.on_missing == "drop" or self.shard_size is not None)

    @cached_property
    def material(self) -> ReshardInputs:
        return ReshardInputs(
            edits=None if self.edits is None else (Path(self.edits), EDITS_STAGE),
            prompts=None if self.prompts is None else (Path(self.prompts), PROMPTS_STAGE),
            layout=self.edits_layout,
            drops_missing=self.on_missing == "drop",
            drops_rejected=self.drop_rejected,
            subset=None if self.subset is None else Subset(Path(self.subset)),
        )

    @cached_property
    def tars(self) -> Folder:
        """Where the hybrid shards go."""
        return Path(self.output) if self.publish_to is None else remote_folder(self.publish_to)

    def choices(self) -> dict[str, object]:
        """What decides which samples go on; flags that are not given are not named, as before there were such."""
        chosen: dict[str, object] = {"prompts": self.prompts is not None, "on_missing": self.on_missing}
        chosen["edits_layout"] = self.edits_layout
        named = {"edits": self.edits is None, "subset": self.subset is not None, "drop_rejected": self.drop_rejected}
        return chosen | {name: name != "edits" for name, given in named.items() if given}

    def forms(self) -> dict[str, object]:
        """What decides the form in which they do."""
        named = {"blur_faces": self.blur_faces, "index": self.index, "publish_to": self.publish_to and str(self.tars)}
        return {name: value for name, value in named.items() if value}


class Pass(Stage[Options]):
    """What the passes share."""

    name = STAGE

    def __init__(self, options: Options) -> None:
        super().__init__(options, options.output)
        self.material = options.material
        self._blur: Callable[[], Blur] | None = None

    def open(self, allocation: Allocation) -> None:
        if (boxes := self.options.blur_faces) is not None:
            from curation.reshard.blur import Blur

            detector = None
            if boxes != "recorded":
                detector = detector_class(boxes)(gpu=allocation.gpu)
            self._blur = partial(Blur, detector)

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        boxes = options.blur_faces
        return [] if boxes in (None, "recorded") else [detector_class(boxes).weights()]

    def writer(self) -> ShardWriter:
        o, blur = self.options, None if self._blur is None else self._blur()
        return ShardWriter(self.output, o.tars, blur, index=o.index, verify=o.verify)


class Reshard(Pass):
    """One shard: shards/<shard>.tar and its edits → <output>/<shard>.tar."""

    def fingerprint(self) -> dict[str, object]:
        return self.options.choices() | self.options.forms()

    def inputs(self, shard: Shard) -> list[Input]:
        return self.material.inputs(shard)

    def process(self, work: ShardContext) -> None:
        o, source, writer, report = self.options, work.shard.path, self.writer(), TarReport()
        with contextlib.ExitStack() as stack:
            with work.phase("read"):
                opened = self.material.open(work.shard, records_of(self.inputs(work.shard), work))
                edits, selection = stack.enter_context(opened)
            reports = iter((report,))
            before = ""  # the key of the last sample that was written
            plain, choose, chosen = o.is_plain and writer.changes_nothing, selection.choose, writer.chosen

            def begin() -> Windows:
                nonlocal before
                before = ""
                return ObservedPass(TarScan(source, next(reports, None)), selection.look, writer.look)

            def decide(span: SampleSpan) -> Decision:
                nonlocal before
                choice = choose(span)
                if plain and choice is AS_IT_IS:  # nearly all of them
                    chosen.append((span, choice))
                    return Action.KEEP
                if choice.copies and not plain:
                    if span.key == before:  # what lay between them was left out: they would be taken for one
                        choice = Choice(0, failed=("duplicate_key", "it would lie right behind another of this key"))
                    before = span.key
                keys = copy_keys(span.key, choice.copies) if choice.copies > 1 else ()
                return writer.make(span, choice, edits, keys)

            writer.write(work, begin, decide, lambda: selection.count(writer.chosen, work))
            tell(report, edits, work)
            selection.report(work, str(o.edits))


class Index(Pass):
    """One source shard: which of its samples go on, and where they lie → <output>/_index/<shard>.npy."""

    name = INDEX_STAGE

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.output = Path(options.output) / "_index"

    def fingerprint(self) -> dict[str, object]:
        return self.options.choices()

    def inputs(self, shard: Shard) -> list[Input]:
        return self.material.inputs(shard)

    def open(self, allocation: Allocation) -> None:
        pass

    def process(self, work: ShardContext) -> None:
        writer, report, foreign = IndexWriter(), TarReport(), 0
        opened = self.material.open(work.shard, records_of(self.inputs(work.shard), work))
        with work.phase("read"), opened as (edits, selection):
            for window in TarScan(work.shard.path, report).windows():
                selection.look(window)
                chosen = [(span, selection.choose(span)) for span in window.spans if span.key]
                for span, choice in chosen:
                    if choice.copies:
                        writer.add(span.own_extents, choice.copies, IS_EDITED if choice.edited else 0)
                foreign += sum(len(span.foreign) for span in window.spans)
                selection.count(chosen, work)
                work.check_stop(urgent_only=True)
            tell(report, edits, work)
            selection.report(work, str(self.options.edits))
        if foreign:
            work.warn(f"{foreign:,} members that belong to no sample are not taken along")
        with work.output(self.output / f"{work.shard.id}.npy") as file:
            file.write(writer.dump())
        work.note("samples_out", writer.samples)
        work.note("bytes_out", writer.bytes)


class Regroup(Pass):
    """One output shard: its samples out of the source shards and their edits → <output>/<number>.tar."""

    def __init__(self, options: Options, layout: ShardLayout) -> None:
        super().__init__(options)
        self.layout = layout
        self.index = Index(options).output

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        cut = {"shard_size": o.shard_size, "shuffle_buffer": o.shuffle_buffer, "seed": o.seed}
        return o.choices() | o.forms() | cut | {"layout": self.layout.mark}

    def inputs(self, shard: Shard) -> list[Input]:
        inputs = []
        for number in self.layout.draw(int(shard.id)).distinct:
            source = self.layout.sources[number]
            inputs.append(Input(self.index / f"{source.id}.npy", INDEX_STAGE, shard=source.id))
            inputs += self.material.sources_of(source)
        return inputs

    def process(self, work: ShardContext) -> None:
        sources, draw = self.layout.sources, self.layout.draw(int(work.shard.id))
        records = records_of(self.inputs(work.shard), work)
        with contextlib.ExitStack() as stack:
            edits: dict[int, Edits] = {}
            with work.phase("read"):
                indexes = {n: IndexReader(self.index / f"{sources[n].id}.npy") for n in draw.distinct}
                for n in draw.distinct:
                    edits[n] = stack.enter_context(self.material.open_edits(sources[n], records))
                drawn = [
                    (int(n), indexes[int(n)].place(int(k))) for n, k in zip(draw.sources, draw.samples, strict=True)
                ]
            pieces = [Piece(n, placed.extents) for n, placed in drawn]
            writer = self.writer()
            turn: Iterator[tuple[int, Placed]]
            taken: set[str] = set()

            def begin() -> Windows:
                nonlocal turn
                turn = iter(drawn)
                taken.clear()
                gathered = GatheredScan(str(self.index), pieces, lambda n: open_blocks(sources[n].path))
                return ObservedPass(gathered, writer.look)

            def decide(span: SampleSpan) -> Decision:
                number, placed = next(turn)
                key = copy_keys(span.key, placed.copies)[placed.copy] if placed.copies > 1 else span.key
                while key in taken:  # of a sample of another shard
                    key = f"{key}-{sources[number].id}"
                taken.add(key)
                choice = Choice(1, edited=placed.is_edited)
                return writer.make(span, choice, edits[number], () if key == span.key else (key,))

            def count() -> None:
                work.sample_in(len(writer.chosen))
                for span, choice in writer.chosen:
                    if choice.failed is None:
                        work.keep()
                    else:
                        work.fail(span.key, *choice.failed)

            writer.write(work, begin, decide, count)
        work.note(LAYOUT_NOTE, self.layout.mark)


def records_of(inputs: Sequence[Input], work: ShardContext) -> Records:
    return {wanted.path: record for wanted, record in zip(inputs, work.inputs, strict=True)}


def tell(report: TarReport, edits: Edits, work: ShardContext) -> None:
    """What a pass found besides samples."""
    for line in report.warnings():
        work.warn(line)
    if edits.incomplete:
        work.warn(f"{edits.incomplete:,} edits lack their jpg, txt or json: they are none")


def regroup(options: Options, shards: Sequence[Shard]) -> int:
    """Index every source shard; when all are, write the output shards."""
    index = Index(options)
    claim_place(options, None)
    if options.step != "write":
        whole = options.shards is None  # --shards names output shards
        step = replace(options, step="index", shards=None, rerun=options.rerun and whole)
        code = run_stage(index, step, shards)
        if code != EXIT_OK or options.step == "index":
            return code
    receipts, missing = receipts_of_all(index.output, INDEX_STAGE, [shard.id for shard in shards])
    if missing and options.dry_run:
        return EXIT_OK
    if missing:
        logger.warning(f"{missing} is not indexed yet: start the same command again")
        return EXIT_WORK_LEFT
    counts = [int(receipt["notes"]["samples_out"]) for receipt in receipts]
    layout = ShardLayout(shards, counts, options.shard_size or 1, options.shuffle_buffer, options.seed)
    logger.info(f"{layout.total:,} samples of {len(shards):,} shards make {len(layout):,} of {options.shard_size:,}")
    outputs = layout.shards
    claim_place(options, outputs)
    code = run_stage(Regroup(options, layout), replace(options, step="write"), outputs)
    return finish(options, outputs) if code == EXIT_OK else code


def claim_place(options: Options, shards: Sequence[Shard] | None) -> None:
    """UsageError where the hybrid shards, None where they are not known yet, would stand among others."""
    if not is_worker():
        o, ids = options, None if shards is None else {shard.id for shard in shards}
        refuse_foreign_shards(
            Path(o.output), o.tars, STAGE, ids, regroups=o.shard_size is not None, overwrite=o.overwrite
        )


def finish(options: Options, shards: Sequence[Shard]) -> int:
    """The list of all output shards, when they are all there."""
    if not options.index or is_worker() or options.dry_run:
        return EXIT_OK
    receipts, missing = receipts_of_all(Path(options.output), STAGE, [shard.id for shard in shards])
    if missing:
        logger.info(f"{missing} is not done yet: wids.json will be written when all shards are")
    else:
        write_wids(Path(options.output), receipts)
    return EXIT_OK


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    options.check()
    shards = discover(options.input, allow_pipe=options.allow_pipe)
    if Path(options.output).resolve() in local_folders(shards):
        raise UsageError("--output must not be the folder of the source shards: it would replace them")
    if isinstance(options.tars, RemoteFolder) and options.tars.holds(shard.path for shard in shards):
        raise UsageError("--publish_to must not be the folder of the source shards: it would replace them")
    if not is_worker():
        options.material.check()
    if options.dry_run:
        chosen = shards if options.shard_size is not None else select(shards, options.shards)
        print(survey(options.material, chosen, options.shard_size, cursory=options.is_plain))
    if options.shard_size is not None:
        return regroup(options, shards)
    claim_place(options, shards)
    code = run_stage(Reshard(options), options, shards, Follows(EDITS_STAGE, Path(options.edits or "")))
    return finish(options, shards) if code == EXIT_OK else code


if __name__ == "__main__":
    sys.exit(main())
