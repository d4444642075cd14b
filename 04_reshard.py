#!/usr/bin/env python3
"""Stage 04: write the hybrid shards.  Edited samples are replaced in place; every other byte stays unchanged."""

import curation  # noqa: F401 - first: it refuses an old Python, and names packages that are missing

# isort: split

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from curation.backends.faces import DetectorName, detector_class
from curation.cluster import Allocation
from curation.errors import EXIT_OK, UsageError, require
from curation.faces import DetectorSettings, FaceDetector
from curation.models.needs import WeightsNeed
from curation.options import LISTED, PATH, FolderName, Sources, also, at_least, logger, parse_options
from curation.publish.running import published, room_for
from curation.reshard.captions import CaptionSource
from curation.reshard.fitting import LATER, ImageSuffix
from curation.reshard.folders import check_folders, of_one_tar
from curation.reshard.layout import ShardLayout
from curation.reshard.mix import Mix
from curation.reshard.regroup import Grouping, Index, Regroup, regroup
from curation.reshard.select import (
    AS_IT_IS,
    Choice,
    Keys,
    ReshardInputs,
    copy_keys,
    dry_run,
    records_of,
    uid_key,
    warn_of_pass,
)
from curation.reshard.uids import Subset
from curation.reshard.write import ShardWriter, sums_of, words_of_result
from curation.run import Follows, Input, Later, RunOptions, ShardContext, Stage, run_stage, stage_main
from curation.run.inputs import check_made_by
from curation.run.ledger import done_receipts, receipts_of_all
from curation.run.output_folder import refuse_foreign_shards
from curation.run.workers import is_worker
from curation.shards import Shard, discover, local_folders, select
from curation.tar.random_access import write_wids
from curation.tar.samples import AUTO
from curation.tar.scan import Run, SampleSpan, TarReport, TarScan, Window
from curation.tar.splice import Action, Decided, DecidedWindow, Decision

PROMPTS_STAGE = "02_captions_processor"
EDITS_STAGE = "03_generate_images"
STAGE = "04_reshard"

BEHIND_ITS_OWN_KEY = Choice(0, failed=("duplicate_key", "it would lie directly after another of this key"))


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Replace the edited samples of each shard and copy everything else byte for byte; or take a subset, or regroup."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "edits": "edit",
            "subset": "selection",
            "blur_faces": "image",
            "captions": "caption",
            "shard_size": "regrouping",
            "index": "output",
        }
    )
    example: ClassVar[str] = "--input shards --edits edits --output hybrid"
    overwrites_here: ClassVar[bool] = True
    instead: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "apply_blur": "--blur_faces recorded",
            "num_workers": "--workers",
            "j": "--workers",
            "num_shards": "--shards 0-99 for the first hundred",
            "n": "--shards 0-99 for the first hundred",
            "first_shard": "--shards, such as --shards 100-199",
        }
    )

    input: Annotated[Sources, also("-i", "--input_dir")]
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands; also
    several."""
    output: Annotated[FolderName, also("-o", "--output_dir")]
    """Folder for the hybrid shards, one <shard>.tar each.  With one tar as --input, also that file: out/<shard>.tar."""
    edits: Annotated[str | None, PATH] = None
    """Folder with the edits: <shard>.tar, or <shard>/<key>.jpg, .txt and .json.  An edit consists of all three files.
    With one tar as --input, also the shard's own folder or tar: edits/<shard>."""
    prompts: Annotated[str | None, PATH] = None
    """Folder with the prompts (<shard>.json): only samples with a prompt are edited, and missing edits are counted.
    Default: every edit is applied."""
    on_missing: Literal["keep", "drop"] = "keep"
    """A sample with a prompt but without an edit: keep it as it was, or leave it out."""
    edits_layout: Literal["auto", "tar", "files"] = "auto"
    """Place of the edits.  auto: the tar if there is one, otherwise loose files."""
    subset: Annotated[str | None, also("-s", "--subset_file"), PATH] = None
    """A sorted .npy array of uids (dtype u8,u8): only these samples, each as often as its uid occurs."""
    drop_rejected: bool = False
    """Leave out the samples that stages 02 and 03 rejected; without it they stay unchanged."""
    blur_faces: Literal["recorded"] | DetectorName | None = None
    """Blur faces of samples that are not edited: in the boxes of the metadata, or in the boxes of a detector."""
    image_suffix: ImageSuffix | None = None
    """Suffix of new images, and therefore their format: source (same as the image that they replace), jpg, png, webp,
    or keep (the edit's own bytes).  Default: source."""
    image_member: str | None = None
    """Which of several pictures of a sample an edit replaces, or is blurred: auto (key.jpg, else the first, such as
    key.0.jpg), plain (key.jpg alone), or a name: 0, 0.jpg.  Give the same as to stage 01.  Default: auto; plain in an
    output folder from an older version."""
    device: Literal["cpu"] | None = None
    """cpu: detect faces on the CPU, even if there are GPUs.  Default: a GPU if onnxruntime has CUDA."""
    captions: Annotated[str | None, PATH] = None
    """Captions to mix in (--mix): a folder of stage 05, or a folder, a file or a glob of jsonl or parquet files of
    datacomp-caption or ContraStyles."""
    mix: Annotated[str | None, LISTED] = None
    """Which share of the samples gets which caption: 0.3:web,0.7:synthetic.  The names are web, synthetic, and those of
    stage 05's named prompts; the weights add up to 1.  All captions stay in the json."""
    shard_size: Annotated[int | None, at_least(1)] = None
    """Regroup into shards 00000000.tar, 00000001.tar … of this number of samples each.  Default: the shards are not
    changed."""
    shuffle_buffer: Annotated[int, at_least(0), also("--shuffle_bufsize")] = 0
    """With --shard_size: shuffle the samples in blocks of this size.  0: keep their order."""
    seed: int = 0
    """Of the shuffling, and of the choice between captions."""
    spread_copies: bool = False
    """With --subset and --shard_size: spread the copies of a sample evenly over all shards.  Without it they are
    neighbours."""
    keys: Keys = "source"
    """Keys of the samples: source: their own; copies are numbered.  datacomp: <uid>-<number> for all samples, as
    DataComp's resharder writes them."""
    step: Literal["all", "index", "write"] = "all"
    """With --shard_size: index the source shards, write the output shards, or do both."""
    index: bool = False
    """Write <shard>.idx beside each output shard, and wids.json and open_clip's sizes.json for all of them."""
    overwrite: bool = False
    """Replace shards in the output folder, and with --publish_to in the store, that this stage did not write; remove
    those of another layout from the output folder."""
    verify: bool = False
    """Read each output back before it is published and compare it with the source and the edits."""

    def check(self) -> None:
        super().check()
        if self.edits is not None and Path(self.output).resolve() == Path(self.edits).resolve():
            raise UsageError("--output and --edits must be two folders: both contain <shard>.tar")
        if self.edits is None and self.follow:
            raise UsageError("--follow needs --edits, because it waits for them")
        if self.captions is not None and self.shares is None:
            raise UsageError(
                "--captions needs --mix: say which share of the samples gets which, as 0.3:web,0.7:synthetic"
            )
        if self.shares is not None and self.captions is None:
            raise UsageError("--mix needs --captions: the folder that stage 05 wrote")
        if self.is_plain and not (self.edits or self.blur_faces or self.index or self.captions):
            raise UsageError(
                "--edits is missing.  Give it, or an option that changes shards: --subset, --shard_size, --blur_faces, "
                "--captions"
            )
        if self.on_missing == "drop" and (self.prompts is None or self.edits is None):
            raise UsageError("--on_missing drop needs --prompts and --edits: without them no edit is missing")
        if self.shard_size is None and (self.shuffle_buffer or self.step != "all"):
            raise UsageError("--shuffle_buffer and --step need --shard_size: else each shard keeps its samples")
        if self.spread_copies and (self.shard_size is None or self.subset is None):
            raise UsageError("--spread_copies needs --subset and --shard_size: else copies cannot move to other shards")
        if self.shard_size is not None and self.follow:
            raise UsageError("--shard_size needs all source shards before it can write one: leave --follow out")

    def check_folders_are_there(self) -> None:
        """Raise UsageError for a folder to read from that does not exist; with --follow it may come later."""
        for flag, folder in (("edits", self.edits), ("prompts", self.prompts)):
            if folder is not None and not self.follow and not Path(folder).is_dir():
                raise UsageError(f"--{flag}: there is no folder {folder}")

    def of_all_shards(self, shards: Sequence[Shard]) -> "Options":
        """The same options with the folders of all shards, where the own files of one shard were given."""
        output, edits, prompts = of_one_tar(self.output, self.edits, self.prompts, shards)
        if output != self.output and self.shard_size is not None:
            raise UsageError(f"--shard_size writes shards with new names: --output {self.output} must be a folder")
        if edits != self.edits and self.edits_layout == "auto" and edits is not None:
            own = Path(edits) / shards[0].id
            if own.is_dir() and own.with_name(f"{own.name}.tar").is_file():
                raise UsageError(f"--edits: there is {own} and {own}.tar; say which: --edits_layout files or tar")
        return replace(self, output=output, edits=edits, prompts=prompts)

    @property
    def is_plain(self) -> bool:
        """Whether every source shard becomes one of as many samples, at the same place."""
        changes = self.subset or self.drop_rejected or self.on_missing == "drop" or self.keys != "source"
        return not (changes or self.shard_size is not None)

    @property
    def shares(self) -> Mix | None:
        """Which share of the samples gets which caption.  Raises UsageError."""
        return None if self.mix is None else Mix.parse(self.mix, self.seed)

    @cached_property
    def sources(self) -> ReshardInputs:
        """The inputs of the hybrid shards."""
        shares, captions = self.shares, None
        if shares is not None and self.captions is not None:
            captions = CaptionSource(self.captions, Path(self.output), shares)
        return ReshardInputs(
            edits=None if self.edits is None else (Path(self.edits), EDITS_STAGE),
            prompts=None if self.prompts is None else (Path(self.prompts), PROMPTS_STAGE),
            layout=self.edits_layout,
            drops_missing=self.on_missing == "drop",
            drops_rejected=self.drop_rejected,
            subset=None if self.subset is None else Subset(Path(self.subset)),
            captions=captions,
        )

    def choices(self) -> dict[str, object]:
        """The options that determine the choice of samples.  Unset flags are absent, as before these flags existed."""
        chosen: dict[str, object] = {"prompts": self.prompts is not None, "on_missing": self.on_missing}
        chosen["edits_layout"] = self.edits_layout
        named = {"edits": self.edits is None, "subset": self.subset is not None, "drop_rejected": self.drop_rejected}
        return chosen | {name: name != "edits" for name, given in named.items() if given}

    def forms(self) -> dict[str, object]:
        """The options that determine the form of the output."""
        named: dict[str, object] = {
            "image_suffix": self.image_suffix,
            "image_member": self.image_member,
            "blur_faces": self.blur_faces,
            "index": self.index,
            "keys": None if self.keys == "source" else self.keys,
        }
        mixed: dict[str, object] = {} if self.shares is None else {"mix": self.shares.record, "seed": self.seed}
        return {name: value for name, value in named.items() if value} | mixed


class Reshard(Stage[Options]):
    """One shard: shards/<shard>.tar and its edits → <output>/<shard>.tar."""

    name = STAGE
    opens_quickly = True
    later: ClassVar[Mapping[str, Later]] = LATER
    gone: ClassVar[frozenset[str]] = frozenset({"publish_to"})  # before 0.6.0 objects were written in the commit

    def __init__(self, options: Options) -> None:
        super().__init__(options, options.output)
        self.writer = shard_writer(options)

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        boxes = options.blur_faces
        return [] if boxes in (None, "recorded") else [detector_class(boxes).weights()]

    @classmethod
    def require(cls, options: Options) -> None:
        if options.blur_faces is not None:
            require("cv2")

    def fingerprint(self) -> dict[str, object]:
        return self.options.choices() | self.options.forms()

    def inputs(self, shard: Shard) -> list[Input]:
        return self.options.sources.inputs(shard)

    def open(self, allocation: Allocation) -> None:
        self.writer.open(allocation)

    def result(self, counts: Mapping[str, int]) -> str:
        return words_of_result(counts, blurs=self.writer.blurs)

    def sums(self, notes: Mapping[str, Any]) -> dict[str, int]:
        return super().sums(notes) | sums_of(notes)

    def process(self, work: ShardContext) -> None:
        report, changes = TarReport(), self.writer.changes()
        with contextlib.ExitStack() as stack:
            with work.phase("read"):
                sources, records = self.options.sources, records_of(self.inputs(work.shard), work)
                edits, selector = stack.enter_context(sources.open(work.shard, records))
                captions = stack.enter_context(sources.open_captions(work.shard, records))
                acquaintance = sources.acquaintance(work.shard, captions)

            def windows(report: TarReport | None = None) -> Iterator[DecidedWindow]:
                """Yield the samples with their decisions.  The pass with the report also counts them."""
                plain = self.options.is_plain and not self.writer.changes_all
                last = ""  # the key of the last sample that is kept
                numbers = Counter[str]()
                for window in TarScan(work.shard.path, report, ahead=report is None).windows():
                    selector.look(window)
                    acquaintance.meet(window)
                    chosen: list[tuple[SampleSpan, Choice]] = []
                    decisions: list[Decided] = []
                    staying = 0  # samples of runs
                    for span in selector.parts(window) if plain else window.spans:
                        if isinstance(span, Run):
                            staying += len(span)
                            last = span.keys[-1]
                            decisions.append((span, Action.KEEP))
                            continue
                        decision: Decision = Action.KEEP
                        if span.key:
                            choice = selector.choose(span)
                            if choice.copies:
                                if span.key == last:
                                    choice = BEHIND_ITS_OWN_KEY
                                last = span.key
                            if not plain or choice is not AS_IT_IS:  # few samples change
                                keys = self._keys(window, span, choice, numbers)
                                choice, decision = changes.decide(window, span, choice, edits, keys, captions)
                            chosen.append((span, choice))
                        decisions.append((span, decision))
                    yield window, decisions
                    if report is not None:
                        changes.fitting.look(window.parts)
                        selector.count(chosen, work, staying)
                        work.check_stop(urgent_only=True)

            self.writer.write(work, windows(report), windows, changes)
            warn_of_pass(report, edits, work)
            acquaintance.check()
            selector.report(work, self.options.sources.edits_folder)

    def _keys(self, window: Window, span: SampleSpan, choice: Choice, numbers: Counter[str]) -> Sequence[str]:
        """The keys under which a sample is written, if not under its own.  numbers: how many each uid has so far."""
        if self.options.keys == "source":
            return copy_keys(span.key, choice.copies) if choice.copies > 1 else ()
        uid = uid_key(window, span)
        first = numbers[uid]
        numbers[uid] += choice.copies
        return copy_keys(uid, first + choice.copies, "datacomp")[first:]


def shard_writer(options: Options) -> ShardWriter:
    o = options
    detector = None if o.blur_faces is None else partial(load_detector, o.blur_faces, o.device)
    return ShardWriter(
        Path(o.output),
        detector,
        index=o.index,
        verify=o.verify,
        image_suffix=o.image_suffix or "source",
        image_member=o.image_member or AUTO,
        mix=o.shares,
    )


def load_detector(name: str, device: str | None, allocation: Allocation) -> FaceDetector | None:
    if name == "recorded":
        return None
    detector: FaceDetector = detector_class(name)(DetectorSettings(gpu=None if device == "cpu" else allocation.gpu))
    return detector


def regroup_shards(options: Options, shards: Sequence[Shard]) -> int:
    o, output, size = options, Path(options.output), options.shard_size or 1
    grouping = Grouping(size=size, shuffle=o.shuffle_buffer, seed=o.seed, spread_copies=o.spread_copies, step=o.step)
    cut: dict[str, object] = {"shard_size": o.shard_size, "shuffle_buffer": o.shuffle_buffer, "seed": o.seed}
    cut |= {"spread_copies": True} if o.spread_copies else {}

    def index(of_step: RunOptions) -> Index:
        return Index(of_step, output / "_index", o.sources, o.choices())

    def regrouping(indexed: Index, layout: ShardLayout) -> Regroup:
        fingerprint = o.choices() | o.forms() | cut
        writer = shard_writer(o)
        stage = Regroup(STAGE, replace(o, step="write"), output, indexed, fingerprint, layout, writer, o.keys)
        stage.full = room_for(o, STAGE, output)
        return stage

    code, outputs = regroup(o, shards, grouping, index, regrouping, partial(claim_place, o))
    return finish(o, [shard.id for shard in outputs]) if code == EXIT_OK and outputs is not None else code


def claim_place(options: Options, shards: Sequence[Shard] | None) -> None:
    """Raise UsageError if the output folder has other shards.  shards: the hybrid shards; None if not known yet."""
    if not is_worker():
        o, ids = options, None if shards is None else {shard.id for shard in shards}
        refuse_foreign_shards(Path(o.output), STAGE, ids, regroups=o.shard_size is not None, overwrite=o.overwrite)


def finish(options: Options, ids: Sequence[str]) -> int:
    """Write the list of all output shards, once those of this run are done.

    It has the shards of runs with other sources as well, such as one tar each.
    """
    if not options.index or is_worker() or options.dry_run:
        return EXIT_OK
    output = Path(options.output)
    done = {receipt["shard"] for receipt in done_receipts(output, STAGE) if receipt["status"] == "done"}
    receipts, missing = receipts_of_all(output, STAGE, sorted(done.union(ids)))
    if missing:
        logger.info(f"{missing} is not done yet: wids.json and sizes.json will be written when all shards are")
    else:
        write_wids(output, receipts)
    return EXIT_OK


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    given = (options.output, Path(options.output) / "_index", options.edits, options.prompts)
    begun = [Path(folder) for folder in given if folder is not None]
    shards = discover(options.input, allow_pipe=options.allow_pipe, begun=begun)
    options = Reshard.settled(options.of_all_shards(shards))
    options.check()
    options.check_folders_are_there()
    every = options.shard_size is not None or options.follow  # regrouping reads all; a follower selects later
    chosen = shards if every else select(shards, options.shards)
    if Path(options.output).resolve() in local_folders(shards):
        raise UsageError("--output must not be the folder of the source shards: it would replace them")
    if not is_worker():
        options.sources.check()
        check_made_by("--output", Path(options.output), STAGE)
        check_folders(options.sources, chosen, shards, may_come=options.follow)
    if options.sources.captions is not None and not options.dry_run:
        options.sources.captions.prepare()
    if options.dry_run:
        print(dry_run(options.sources, chosen, options.shard_size, cursory=options.is_plain))
    if options.shard_size is not None:
        place = (STAGE, Path(options.output))
        return published(options, place, lambda: regroup_shards(options, shards))
    stage = Reshard(options)

    def run() -> int:
        claim_place(options, shards)
        code = run_stage(stage, options, shards, Follows(EDITS_STAGE, Path(options.edits or "")))
        return finish(options, [shard.id for shard in shards]) if code == EXIT_OK else code

    return published(options, stage, run)


if __name__ == "__main__":
    sys.exit(main())
