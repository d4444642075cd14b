"""Writes an output shard from unchanged, edited, blurred or copied samples, with its index, and verifies it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from curation.cluster import Allocation
from curation.edits import EditReader
from curation.errors import SampleError
from curation.reshard.fitting import Fitting, ImageSuffix
from curation.reshard.select import Choice
from curation.run import ShardContext
from curation.storage.buckets import Folder
from curation.storage.files import AtomicFile
from curation.tar.prove import verify_splice
from curation.tar.random_access import SUFFIX, Entry, dump_index
from curation.tar.scan import SampleSpan, Window
from curation.tar.splice import UNCHANGED, Action, Copies, DecidedWindow, Decision, Edit, splice

if TYPE_CHECKING:  # they import image libraries for a flag that few runs use
    from curation.faces import FaceDetector
    from curation.reshard.blur import Blur


class ShardWriter:
    """Writes output shards, and their indexes if requested.

    Args:
        folder: The folder for the indexes.
        tars: The folder for the shards, which may be a bucket.
        detector: Allocation → the detector of the faces to blur, or None to use the boxes that the metadata records.
            If this itself is None, nothing is blurred.
        index: Whether to write ``<shard>.idx``.
        verify: Whether to read each shard back before it is published.
        image_suffix: What new images are called, and so their format.
    """

    def __init__(
        self,
        folder: Path,
        tars: Folder,
        detector: Callable[[Allocation], FaceDetector | None] | None,
        *,
        index: bool,
        verify: bool,
        image_suffix: ImageSuffix = "keep",
    ) -> None:
        self._image_suffix: ImageSuffix = image_suffix
        self._folder, self._tars, self._index, self._verify = folder, tars, index, verify
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

    def changes(self) -> Changes:
        """New ``Changes`` for one output shard."""
        fitting = Fitting(self._image_suffix)
        if not self.blurs:
            return Changes(fitting, None)
        from curation.reshard.blur import Blur

        return Changes(fitting, Blur(self._detector, fitting))

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
        with work.phase("write"), work.output(self._tars / f"{work.shard.id}.tar") as file:
            splice(windows, file, entries)
        if entries is not None:
            with work.output(self._folder / f"{work.shard.id}{SUFFIX}") as index:
                index.write(dump_index(entries))
            work.note("samples_out", len(entries))
        changes.report(work)
        if self._verify and isinstance(file, AtomicFile):
            with work.phase("verify"):
                verify_splice(again(), file.temporary, f"{work.shard.id}.tar")
            work.note("verified", True)


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
    return words


class Changes:
    """Decides what becomes of each sample of one output shard, and counts what is changed.

    Args:
        fitting: Fits new images into the shard.
        blur: Blurs samples that are not edited; None if nothing is blurred.
    """

    def __init__(self, fitting: Fitting, blur: Blur | None) -> None:
        self.fitting, self.blur = fitting, blur

    def decide(
        self, window: Window, span: SampleSpan, choice: Choice, edits: EditReader, keys: Sequence[str] = ()
    ) -> tuple[Choice, Decision]:
        """Turn the choice for a sample into a decision for the writer.

        Args:
            window: The window that contains the sample.
            span: The sample.
            choice: The choice for it.
            edits: The edits of the sample's shard.
            keys: The keys under which the sample is written, if not under its own.

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
        blur = self.blur
        if blur is None:
            return
        work.note("blurred", blur.faces)
        work.note("blurred_samples", blur.blurred)
        if blur.without_area:
            work.note("boxes_without_area", blur.without_area)
            work.warn(f"{blur.without_area:,} recorded face boxes have no area in the picture: ignored")
        if blur.unknown:
            work.warn(f"{blur.unknown:,} samples do not say whether they show a face: not blurred")
