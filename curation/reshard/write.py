"""An output shard out of samples as they were, edited, blurred or copied; its index; and reading it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from curation.edits import Edits
from curation.errors import SampleError
from curation.reshard.select import Account, Choice
from curation.storage.buckets import Folder
from curation.storage.files import AtomicFile, AtomicWriter
from curation.storage.urls import Source
from curation.tar.prove import verify_splice
from curation.tar.random_access import SUFFIX, Entry, dump_index
from curation.tar.scan import SampleSpan, Window
from curation.tar.splice import UNCHANGED, Action, Copies, Decision, Edit, Windows, splice

if TYPE_CHECKING:  # it brings image libraries, for a flag that few runs have
    from curation.reshard.blur import Blur


class Work(Account, Protocol):
    """What is given for one shard: see ``ShardContext``."""

    def output(self, path: Source, /) -> AbstractContextManager[AtomicWriter]: ...
    def phase(self, name: str, /) -> AbstractContextManager[None]: ...
    def check_stop(self, *, urgent_only: bool = False) -> None: ...


class ShardWriter:
    """One output shard: what becomes of its samples, and the files.  tars: where it goes; folder: its index."""

    def __init__(self, folder: Path, tars: Folder, blur: Blur | None, *, index: bool, verify: bool) -> None:
        self._folder, self._tars, self._blur, self._index, self._verify = folder, tars, blur, index, verify
        self.chosen: list[tuple[SampleSpan, Choice]] = []  # since they were last counted
        self._window: Window

    def look(self, window: Window) -> None:
        self._window = window
        self.chosen.clear()

    @property
    def changes_nothing(self) -> bool:
        """Whether samples that are not edited stay as they are."""
        return self._blur is None

    def make(self, span: SampleSpan, choice: Choice, edits: Edits, keys: Sequence[str] = ()) -> Decision:
        """keys: those that the sample goes out under, where they are not its own."""
        edit: Edit | None = None
        if choice.copies and choice.edited:
            edit = edits.read(span.key)
        elif choice.copies and self._blur is not None:
            try:
                edit = self._blur.edit(self._window, span)
            except SampleError as error:  # it may show a face: it does not go on as it is
                choice = Choice(0, failed=(error.reason, error.detail))
        self.chosen.append((span, choice))
        if not choice.copies:
            return Action.DROP
        return Copies(keys, edit or UNCHANGED) if keys else edit or Action.KEEP

    def write(
        self,
        work: Work,
        begin: Callable[[], Windows],
        decide: Callable[[SampleSpan], Decision],
        count: Callable[[], None],
    ) -> None:
        """begin: starts a pass over the samples; decide: about each; count: those that were just decided."""
        entries: list[Entry] | None = [] if self._index else None
        with work.phase("write"), work.output(self._tars / f"{work.shard.id}.tar") as file:
            for _ in splice(begin(), file, decide, entries):
                count()
                work.check_stop(urgent_only=True)
        if entries is not None:
            with work.output(self._folder / f"{work.shard.id}{SUFFIX}") as index:
                index.write(dump_index(entries))
            work.note("samples_out", len(entries))
        if self._blur is not None:
            work.note("blurred", self._blur.blurred)
            if self._blur.unknown:
                work.warn(f"{self._blur.unknown:,} samples do not say whether they show a face: not blurred")
        if self._verify and isinstance(file, AtomicFile):
            with work.phase("verify"):
                verify_splice(begin(), file.temporary, decide)
            work.note("verified", True)
