"""Makes shards of one size, in two stages.

``Index`` lists the chosen samples of a source shard and their places; ``Regroup`` makes an output shard from ranges of
source shards.  ``regroup`` runs one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from curation.captioned.rows import CaptionsOfShard
from curation.cluster import Allocation
from curation.edits import EditReader
from curation.errors import EXIT_OK, EXIT_WORK_LEFT, UsageError
from curation.options import logger, set_up_logging
from curation.reshard.fitting import LATER
from curation.reshard.layout import IS_EDITED, Draw, IndexReader, IndexWriter, Placed, ShardLayout
from curation.reshard.select import Choice, Keys, ReshardInputs, copy_keys, records_of, uid_key, warn_of_pass
from curation.reshard.write import ShardWriter, sums_of, words_of_rejected, words_of_result
from curation.run import Input, RunOptions, ShardContext, Stage, run_stage
from curation.run.ledger import receipts_of_all
from curation.shards import LAYOUT_NOTE, Shard
from curation.tar.random_access import GatheredScan, Piece
from curation.tar.scan import SampleSpan, TarReport, TarScan
from curation.tar.sources import open_blocks
from curation.tar.splice import DecidedWindow, Decision

INDEX_STAGE = "04_index"


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How shards are regrouped.

    Attributes:
        size: The number of samples in each output shard except the last.
        shuffle: The number of samples in one shuffled block; 0 keeps the order.
        seed: The seed of the shuffling.
        spread_copies: Whether copies of a sample are spread over all shards.
        step: ``index`` the source shards, ``write`` the output shards, or ``all``.
    """

    size: int
    shuffle: int
    seed: int
    spread_copies: bool
    step: Literal["all", "index", "write"]


class Index(Stage[RunOptions]):
    """Indexes one source shard: its chosen samples and their places → <output>/_index/<shard>.npy."""

    name = INDEX_STAGE

    def __init__(
        self, options: RunOptions, output: Path, sources: ReshardInputs, fingerprint: dict[str, object]
    ) -> None:
        """output: the folder of the index, ``_index`` in the folder of the output shards."""
        super().__init__(options, output)
        self.sources = sources
        self._fingerprint = fingerprint

    def fingerprint(self) -> dict[str, object]:
        return self._fingerprint

    def inputs(self, shard: Shard) -> list[Input]:
        return self.sources.inputs(shard)

    def result(self, counts: Mapping[str, int]) -> str:
        edited = f", {counts['edited']:,} of them to be replaced" if self.sources.edits is not None else ""
        return f"{counts['samples_out']:,} samples chosen{edited}{words_of_rejected(counts)}"

    def sums(self, notes: Mapping[str, Any]) -> dict[str, int]:
        return super().sums(notes) | sums_of(notes)

    def process(self, work: ShardContext) -> None:
        writer, report, foreign = IndexWriter(), TarReport(), 0
        records = records_of(self.inputs(work.shard), work)
        with (
            work.phase("read"),
            self.sources.open(work.shard, records) as (edits, selector),
            self.sources.open_captions(work.shard, records) as captions,
        ):
            acquaintance = self.sources.acquaintance(work.shard, captions)
            for window in TarScan(work.shard.path, report).windows():
                acquaintance.meet(window)
                selector.look(window)
                chosen = [(span, selector.choose(span)) for span in window.spans if span.key]
                for span, choice in chosen:
                    if choice.copies:
                        writer.add(span.own_extents, choice.copies, IS_EDITED if choice.edited else 0)
                foreign += sum(len(span.foreign) for span in window.spans)
                selector.count(chosen, work)
                work.check_stop(urgent_only=True)
            warn_of_pass(report, edits, work)
            acquaintance.check()
            selector.report(work, self.sources.edits_folder)
        if foreign:
            work.warn(f"{foreign:,} members that belong to no sample are left out")
        with work.output(self.output / f"{work.shard.id}.npy") as file:
            file.write(writer.dump())
        work.note("samples_out", writer.samples)
        work.note("bytes_out", writer.bytes)
        work.note("with_copy", writer.with_copy)


class Regroup(Stage[RunOptions]):
    """Writes one output shard from samples of source shards and their edits → <output>/<number>.tar."""

    later = LATER
    gone = frozenset({"publish_to"})

    def __init__(
        self,
        name: str,
        options: RunOptions,
        output: Path,
        index: Index,
        fingerprint: dict[str, object],
        layout: ShardLayout,
        writer: ShardWriter,
        keys: Keys,
    ) -> None:
        super().__init__(options, output)
        self.name, self.keys = name, keys
        self.index, self.sources = index, index.sources
        self.layout, self.writer = layout, writer
        self._fingerprint = fingerprint

    def fingerprint(self) -> dict[str, object]:
        return self._fingerprint | {"layout": self.layout.mark}

    def inputs(self, shard: Shard) -> list[Input]:
        inputs = []
        for number in self.layout.draw(int(shard.id)).distinct:
            source = self.layout.sources[number]
            inputs.append(Input(self.index.output / f"{source.id}.npy", INDEX_STAGE, shard=source.id))
            inputs += self.sources.sources_of(source)
        return inputs

    def open(self, allocation: Allocation) -> None:
        self.writer.open(allocation)

    def result(self, counts: Mapping[str, int]) -> str:
        return words_of_result(counts, blurs=self.writer.blurs)

    def sums(self, notes: Mapping[str, Any]) -> dict[str, int]:
        return super().sums(notes) | sums_of(notes)

    def process(self, work: ShardContext) -> None:
        sources, draw = self.layout.sources, self.layout.draw(int(work.shard.id))
        records = records_of(self.inputs(work.shard), work)
        changes = self.writer.changes()
        with contextlib.ExitStack() as stack:
            edits: dict[int, EditReader] = {}
            captions: dict[int, CaptionsOfShard | None] = {}
            with work.phase("read"):
                indexes = {n: IndexReader(self.index.output / f"{sources[n].id}.npy") for n in draw.distinct}
                for n in draw.distinct:
                    edits[n] = stack.enter_context(self.sources.open_edits(sources[n], records))
                    captions[n] = stack.enter_context(self.sources.open_captions(sources[n], records))
                drawn = [(n, _placed(indexes[n], draw, at)) for at, n in enumerate(map(int, draw.sources))]
            pieces = [Piece(n, placed.extents) for n, placed in drawn]

            def windows(*, counts: bool) -> Iterator[DecidedWindow]:
                """Yield the shard's samples with their decisions.  counts: whether to count them."""
                turn, taken = iter(drawn), set[str]()
                scan = GatheredScan(str(self.index.output), pieces, lambda n: open_blocks(sources[n].path))
                for window in scan.windows():
                    chosen: list[tuple[SampleSpan, Choice]] = []
                    decisions: list[tuple[SampleSpan, Decision]] = []
                    for span in window.spans:
                        number, placed = next(turn)
                        key = span.key if self.keys == "source" else uid_key(window, span)
                        key = copy_keys(key, placed.copies, self.keys)[placed.copy]
                        while key in taken:  # by a sample of another source shard
                            key = f"{key}-{sources[number].id.replace('/', '_')}"
                        taken.add(key)
                        keys = () if key == span.key else (key,)
                        choice = Choice(1, edited=placed.is_edited)
                        choice, decision = changes.decide(window, span, choice, edits[number], keys, captions[number])
                        chosen.append((span, choice))
                        decisions.append((span, decision))
                    yield window, decisions
                    if counts:
                        changes.fitting.look(window.spans)
                        count(chosen, work)

            self.writer.write(work, windows(counts=True), lambda: windows(counts=False), changes)
        work.note(LAYOUT_NOTE, self.layout.mark)
        work.note("edited", sum(placed.is_edited for _, placed in drawn))


def _placed(index: IndexReader, draw: Draw, at: int) -> Placed:
    number = int(draw.samples[at])
    return index.place(number) if draw.copies is None else index.place_of_copy(int(draw.copies[at]), number)


def count(chosen: Sequence[tuple[SampleSpan, Choice]], work: ShardContext) -> None:
    """Count the samples of an output shard: all are kept, except those that cannot be blurred."""
    work.sample_in(len(chosen))
    for span, choice in chosen:
        if choice.failed is None:
            work.keep()
        else:
            work.fail(span.key, *choice.failed)
    work.check_stop(urgent_only=True)


def regroup(
    options: RunOptions,
    shards: Sequence[Shard],
    grouping: Grouping,
    index: Callable[[RunOptions], Index],
    output: Callable[[Index, ShardLayout], Regroup],
    claim: Callable[[Sequence[Shard] | None], None],
) -> tuple[int, list[Shard] | None]:
    """Index every source shard; when all are indexed, write the output shards.

    Args:
        options: The options of the run.
        shards: The source shards.
        grouping: How they are regrouped.
        index: Makes the stage that indexes.
        output: Makes the stage that writes, once the layout is known.
        claim: Raises UsageError if the output folder has other shards; its argument is None while the output shards
            are not known.

    Returns:
        The exit code, and the output shards; None if none was to be written.
    """
    set_up_logging(options.quiet)  # the step "write" alone may end before a stage runs
    claim(None)
    steps: dict[str, Any] = {"step": "index", "shards": None, "rerun": options.rerun and options.shards is None}
    indexing = index(replace(options, **steps))  # --shards selects output shards
    if grouping.step != "write":
        code = run_stage(indexing, indexing.options, shards)
        if code != EXIT_OK or grouping.step == "index":
            return code, None
    receipts, missing = receipts_of_all(indexing.output, INDEX_STAGE, [shard.id for shard in shards])
    if missing and options.dry_run:
        return EXIT_OK, None
    if missing:
        logger.warning(f"{missing} is not indexed yet: run the same command again")
        return EXIT_WORK_LEFT, None
    counts = [int(receipt["notes"]["samples_out"]) for receipt in receipts]
    spread = None
    if grouping.spread_copies:
        spread = [list(map(int, receipt["notes"].get("with_copy", ()))) for receipt in receipts]
        if sum(map(sum, spread)) != sum(counts):
            raise UsageError(f"--spread_copies: {indexing.output} was made by an older version: use --rerun")
    layout = ShardLayout(shards, counts, grouping.size, grouping.shuffle, grouping.seed, spread)
    logger.info(f"{layout.total:,} samples of {len(shards):,} shards make {len(layout):,} of {grouping.size:,}")
    claim(layout.shards)
    writing = output(indexing, layout)
    return run_stage(writing, writing.options, layout.shards), layout.shards
