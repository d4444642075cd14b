"""Writes an output shard from unchanged, edited, blurred or copied samples, with its index, and verifies it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.captioned.rows import CaptionsOfShard
from curation.cluster import Allocation
from curation.edits import EditReader
from curation.errors import SampleError
from curation.reshard.fitting import Fitting, ImageSuffix
from curation.reshard.mix import CAPTIONS_NOTE, LACKING_NOTE, Mix, Mixer
from curation.reshard.select import CHECK_NOTE, Choice
from curation.run import ShardContext
from curation.tar.prove import verify_splice
from curation.tar.random_access import SUFFIX, Entry, dump_index
from curation.tar.samples import PLAIN
from curation.tar.scan import SampleSpan, Window
from curation.tar.splice import UNCHANGED, Action, Copies, DecidedWindow, Decision, Edit, splice

if TYPE_CHECKING:  # they import image libraries for a flag that few runs use
    from curation.faces import FaceDetector
    from curation.reshard.blur import Blur


_GROUPS_TOLD = 12  # groups that the last line names


class ShardWriter:
    """Writes output shards, and their indexes if requested.

    Args:
        folder: The folder for the shards and the indexes.
        detector: Allocation → the detector of the faces to blur, or None to use the boxes that the metadata records.
            If this itself is None, nothing is blurred.
        index: Whether to write ``<shard>.idx``.
        verify: Whether to read each shard back before it is published.
        image_suffix: What new images are called, and so their format.
        image_member: Which of several pictures of a sample was read, and is replaced or blurred.
        mix: The shares of the captions; None if each sample keeps its own.
    """

    def __init__(
        self,
        folder: Path,
        detector: Callable[[Allocation], FaceDetector | None] | None,
        *,
        index: bool,
        verify: bool,
        image_suffix: ImageSuffix = "keep",
        image_member: str = PLAIN,
        mix: Mix | None = None,
    ) -> None:
        self._image_member, self._mix = image_member, mix
        self._image_suffix: ImageSuffix = image_suffix
        self._folder, self._index, self._verify = folder, index, verify
        self._find_detector = detector
        self._detector: FaceDetector | None = None

    def open(self, allocation: Allocation) -> None:
        """Load what blurring needs, once per process.  Raises InfrastructureError if it is missing."""
        if self._find_detector is not None:
            self._detector = self._find_detector(allocation)

    @property
    def blurs(self) -> bool:
        """Whether it blurs faces."""
        return self._find_detector is not None

    @property
    def changes_all(self) -> bool:
        """Whether samples that are chosen as they are may change too."""
        return self.blurs or self._mix is not None

    def changes(self) -> Changes:
        """New ``Changes`` for one output shard."""
        fitting = Fitting(self._image_suffix, self._image_member)
        mixer = None if self._mix is None else Mixer(self._mix, fitting)
        if not self.blurs:
            return Changes(fitting, None, mixer)
        from curation.reshard.blur import Blur

        return Changes(fitting, Blur(self._detector, fitting), mixer)

    def write(
        self,
        work: ShardContext,
        windows: Iterable[DecidedWindow],
        again: Callable[[], Iterable[DecidedWindow]],
        changes: Changes,
    ) -> None:
        """Write one output shard.

        Args:
            work: The attempt at the shard.
            windows: Its samples, with the decisions about them.
            again: Returns the same windows from the start, to verify the shard.
            changes: What decided about the samples of ``windows``.

        Raises:
            ShardError: The sources cannot be read, or the written shard does not match the decisions.
        """
        entries: list[Entry] | None = [] if self._index else None
        with work.phase("write"), work.output(self._folder / f"{work.shard.id}.tar") as file:
            splice(windows, file, entries)
        if entries is not None:
            with work.output(self._folder / f"{work.shard.id}{SUFFIX}") as index:
                index.write(dump_index(entries))
            work.note("samples_out", len(entries))
        changes.report(work)
        if self._verify:
            with work.phase("verify"):
                verify_splice(again(), file.temporary, f"{work.shard.id}.tar")
            work.note("verified", True)


def sums_of(notes: Mapping[str, Any]) -> dict[str, int]:
    """For ``Stage.sums``: the counts in notes that are objects, under names such as ``captions.web``."""
    found: dict[str, int] = {}
    for name in (CAPTIONS_NOTE, LACKING_NOTE, f"{CHECK_NOTE}.original", f"{CHECK_NOTE}.dropped"):
        note: Any = notes
        for part in name.split("."):
            note = note.get(part) if isinstance(note, Mapping) else None
        if isinstance(note, Mapping):
            found |= {f"{name}.{one}": count for one, count in note.items() if type(count) is int}
    return found


def words_of_result(counts: Mapping[str, int], *, blurs: bool) -> str:
    """What happened to the samples, for ``Stage.result``: ``5 replaced, 65 copied``.

    blurs: say how many were blurred, even if there were none.
    """
    copied = counts["kept"] - counts["edited"] - counts["blurred_samples"]
    words = f"{counts['edited']:,} replaced, {copied:,} copied"
    if blurs:
        words += f", {counts['blurred_samples']:,} blurred ({counts['blurred']:,} faces)"
    if gone := counts["dropped"] + counts["failed"]:
        words += f", {gone:,} left out"
    if counts["missing_edits"]:
        words += f"; {counts['missing_edits']:,} have a prompt and no edit"
    return words + words_of_rejected(counts) + _words_of_captions(counts)


def words_of_rejected(counts: Mapping[str, int]) -> str:
    """What happened to the samples whose picture a check of stage 03 rejected, for each group; empty without any."""
    words = ""
    for became, what in (("original", "stay the original photo"), ("dropped", "are left out")):
        if groups := _below(counts, f"{CHECK_NOTE}.{became}"):
            told = [f"{group or 'no group'}: {count:,}" for group, count in groups.most_common(_GROUPS_TOLD)]
            told += [f"{len(groups) - _GROUPS_TOLD} more groups"] if len(groups) > _GROUPS_TOLD else []
            words += f"; {groups.total():,} whose picture a check rejected {what} ({', '.join(told)})"
    return words


def _words_of_captions(counts: Mapping[str, int]) -> str:
    """Which captions the samples have, if captions were mixed."""
    taken = _below(counts, CAPTIONS_NOTE)
    if not taken:
        return ""
    words = f"; captions: {', '.join(f'{count:,} {name}' for name, count in taken.most_common())}"
    if lacking := _below(counts, LACKING_NOTE):
        told = ", ".join(f"{name}: {count:,}" for name, count in lacking.most_common())
        words += f"; {lacking.total():,} lack the caption that was chosen ({told}) and have another"
    if counts["captions_of_other_pictures"]:
        words += f"; the captions of {counts['captions_of_other_pictures']:,} are of another picture: not used"
    if counts["captions_untouched"]:
        words += f"; {counts['captions_untouched']:,} have no caption or no json that can be read: as they were"
    return words


def _below(counts: Mapping[str, int], name: str) -> Counter[str]:
    """The counts of a note that is an object."""
    start = f"{name}."
    return Counter({key.removeprefix(start): count for key, count in counts.items() if key.startswith(start)})


class Changes:
    """Decides what becomes of each sample of one output shard, and counts what is changed.

    Args:
        fitting: Fits new images into the shard.
        blur: Blurs samples that are not edited; None if nothing is blurred.
        mixer: Gives each sample its caption; None if it keeps its own.
    """

    def __init__(self, fitting: Fitting, blur: Blur | None, mixer: Mixer | None = None) -> None:
        self.fitting, self.blur, self.mixer = fitting, blur, mixer

    def decide(
        self,
        window: Window,
        span: SampleSpan,
        choice: Choice,
        edits: EditReader,
        keys: Sequence[str] = (),
        captions: CaptionsOfShard | None = None,
    ) -> tuple[Choice, Decision]:
        """Turn the choice for a sample into a decision for the writer.

        Args:
            window: The window that contains the sample.
            span: The sample.
            choice: The choice for it.
            edits: The edits of the sample's shard.
            keys: The keys under which the sample is written, if not under its own.
            captions: Those of the sample's shard, if captions are mixed.

        Returns:
            The choice, which changes to failed if the sample's new image cannot be made, and the decision for the
            writer.
        """
        edit: Edit | None = None
        try:
            if choice.copies and choice.edited:
                edit = self.fitting.fit(span, edits.read(span.key))
            elif choice.copies and self.blur is not None:
                edit = self.blur.edit(window, span)
            if choice.copies and self.mixer is not None and captions is not None:
                edit = self.mixer.mix(window, span, edit, captions, edited=choice.edited)
        except SampleError as error:  # the original may show a face, so it must not be kept instead
            choice = Choice(0, choice.edited, choice.wanted, failed=(error.reason, error.detail))
        if not choice.copies:
            return choice, Action.DROP
        return choice, Copies(keys, edit or UNCHANGED) if keys else edit or Action.KEEP

    def report(self, work: ShardContext) -> None:
        """Write into the receipt what was changed."""
        for name, value in self.fitting.notes().items():
            work.note(name, value)
        for line in self.fitting.warnings():
            work.warn(line)
        if self.mixer is not None:
            self.mixer.report(work)
        blur = self.blur
        if blur is None:
            return
        work.note("blurred", blur.faces)
        work.note("blurred_samples", blur.blurred)
        if blur.without_area:
            work.note("boxes_without_area", blur.without_area)
            work.warn(f"{blur.without_area:,} recorded face boxes have no area in the picture: ignored")
        if blur.not_looked_at:
            work.warn(f"{blur.not_looked_at:,} samples have further pictures: no faces are blurred in those")
        if blur.unknown:
            work.warn(f"{blur.unknown:,} samples do not say whether they show a face: not blurred")
