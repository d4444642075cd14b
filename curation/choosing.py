"""Which samples of a shard go into the output, how often, and which of them as their edit."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import orjson

from curation.errors import SampleError, ShardError
from curation.jsonio import KEY_SUFFIX, parse_json_object, some
from curation.shards import Shard
from curation.subset import Halves, Subset, uid_of
from curation.tar.samples import MAX_MEMBER_BYTES, SampleSpan, Window, problem_of

MAX_REJECTS_BYTES: Final = 1 << 30


_ROOM_FOR_A_NUMBER = 16  # bytes that a key may grow by


@dataclass(frozen=True, slots=True)
class Choice:
    """copies: how often the sample goes into the output.  dropped: why it does not; failed: reason and detail.

    wanted: it has a prompt, so that an edit of it is missed.
    """

    copies: int
    edited: bool = False
    wanted: bool = False
    dropped: str = ""
    failed: tuple[str, str] | None = None


class Account(Protocol):
    """Where every sample is counted: see ``ShardWork``."""

    shard: Shard

    def sample_in(self, count: int = 1) -> None: ...
    def keep(self, count: int = 1) -> None: ...
    def drop(self, key: str, reason: str) -> None: ...
    def fail(self, key: str, reason: str, detail: str = "") -> None: ...
    def note(self, name: str, value: Any) -> None: ...
    def warn(self, text: str) -> None: ...


AS_IT_IS, _EDITED = Choice(1), Choice(1, edited=True)


_MISSED, _LEFT_OUT = Choice(1, wanted=True), Choice(0, wanted=True, dropped="no_edit")


_NOT_IN_SUBSET = Choice(0, dropped="not_in_subset")


class Selection:
    """The choice for each sample of one shard, and the count of what was chosen.

    edited: keys that have an edit.  prompts: "<key>.json" of the samples that are to be edited, None: all that have
    an edit.  rejected: key → the stage that rejected it, of those that go for that.
    """

    def __init__(
        self,
        edited: Collection[str] = (),
        prompts: Collection[str] | None = None,
        *,
        drops_missing: bool = False,
        rejected: Mapping[str, str] | None = None,
        subset: Subset | None = None,
    ) -> None:
        self._edited, self._prompts, self._drops_missing = edited, prompts, drops_missing
        self._rejected = rejected or {}
        self._subset = subset
        self._found: dict[int, int | SampleError] = {}  # of the samples of the window, by where they begin
        self.unused = set(edited)  # edits that no sample has claimed yet
        self.unasked = 0  # edits without a prompt
        self.applied = 0
        self.left_out: list[str] = []  # samples with an edit that go all the same
        self.missing: list[str] = []  # samples with a prompt, without an edit
        self.copies = 0  # beyond the first of each sample

    def look(self, window: Window) -> None:
        """Shown each window before ``choose`` is asked about its samples: the subset is searched for all at once."""
        if self._subset is None:
            return
        self._found.clear()
        uids: list[Halves] = []
        starts: list[int] = []
        for span in window.spans:
            if span.key and not span.torn:
                try:
                    uids.append(_uid(window, span))
                    starts.append(span.start)
                except SampleError as error:
                    self._found[span.start] = error
        self._found.update(zip(starts, self._subset.counts(uids), strict=True))

    def choose(self, span: SampleSpan) -> Choice:
        """The same answer each time it is asked.  Of samples with one key the first is edited."""
        if span.torn:
            return Choice(0, failed=("damaged_tar", span.torn))
        if self._subset is not None:
            return self._by_subset(span, self._found[span.start])
        return self._by_edits(span)

    def count(self, chosen: Sequence[tuple[SampleSpan, Choice]], work: Account) -> None:
        """Every sample once: kept, dropped or failed."""
        work.sample_in(len(chosen))
        kept = 0
        for span, choice in chosen:
            if choice is AS_IT_IS and span.key not in self.unused:  # nearly all of them
                kept += 1
                continue
            if choice.copies:
                kept += 1
                self.copies += choice.copies - 1
            elif choice.failed is not None:
                work.fail(span.key, *choice.failed)
                if span.torn:
                    continue
            else:
                work.drop(span.key, choice.dropped)
            self._note(span, choice)
        work.keep(kept)

    def report(self, work: Account, edits: str) -> None:
        """What was found beside the samples.  ShardError for edits that match no sample."""
        if self.unused:
            raise ShardError(
                f"{edits}: edits of shard {work.shard.id} match no sample of {work.shard.path}: {some(self.unused)}"
            )
        if self.unasked:
            work.warn(f"{self.unasked:,} edits have no prompt: not applied")
        if self.left_out:
            work.warn(
                f"{len(self.left_out):,} edits are of samples that do not go into the output (the receipt counts why): "
                f"not applied: {some(self.left_out)}"
            )
        if self.missing:
            kept = "dropped" if self._drops_missing else "kept as they were"
            work.warn(f"{len(self.missing):,} samples with a prompt have no edit, {kept}: {some(self.missing)}")
        work.note("edited", self.applied)
        work.note("missing_edits", len(self.missing))
        if self._subset is not None:
            work.note("copies", self.copies)
            work.note("edits_left_out", len(self.left_out))

    def _by_subset(self, span: SampleSpan, found: int | SampleError) -> Choice:
        if isinstance(found, SampleError):
            return Choice(0, failed=(found.reason, found.detail))
        if found == 0:
            return _NOT_IN_SUBSET
        choice = self._by_edits(span)
        if found == 1 or not choice.copies:
            return choice
        problem = problem_of(span)
        if problem is not None and problem[0] == "not_a_file":
            return Choice(0, failed=problem)
        if len(span.key) + _ROOM_FOR_A_NUMBER > 1000:
            return Choice(0, failed=("key_too_long", "its copies would need longer ones"))
        return Choice(found, choice.edited, choice.wanted)

    def _by_edits(self, span: SampleSpan) -> Choice:
        if span.repeated:
            return AS_IT_IS
        wanted = self._prompts is None or span.key + KEY_SUFFIX in self._prompts
        if wanted and span.key in self._edited:
            return _EDITED
        if (stage := self._rejected.get(span.key)) is not None:
            return Choice(0, wanted=wanted and self._prompts is not None, dropped=f"rejected_by_{stage}")
        if not wanted or self._prompts is None:
            return AS_IT_IS
        return _LEFT_OUT if self._drops_missing else _MISSED

    def _note(self, span: SampleSpan, choice: Choice) -> None:
        """Keep account of the edits: each is applied, unasked for, left out, or it is missing."""
        if span.repeated:
            return
        if span.key in self.unused:
            self.unused.remove(span.key)
            if choice.edited and choice.copies:
                self.applied += 1
            elif choice.copies:
                self.unasked += 1
            else:
                self.left_out.append(span.key)
        elif choice.wanted:
            self.missing.append(span.key)


def copy_keys(key: str, copies: int) -> list[str]:
    """The keys of a sample that goes into the output more than once."""
    return [f"{key}-{number}" for number in range(copies)]


def read_rejected(folders: Iterable[tuple[Path, str]], shard_id: str) -> dict[str, str]:
    """key → stage, of the samples that stages failed or dropped.  folders: (output, stage), the first one to name a
    sample counts."""
    rejected: dict[str, str] = {}
    for folder, stage in folders:
        place = folder / "_rejects" / stage
        for line in _lines(place / f"{shard_id}.jsonl"):
            try:
                key = parse_json_object(line).get("key")
            except SampleError as error:
                raise ShardError(f"{place / shard_id}.jsonl: {error}") from None
            rejected.setdefault(str(key), stage)
        for line in _lines(place / f"{shard_id}.drops.tsv.gz"):
            try:
                key = orjson.loads(line.partition(b"\t")[2])
            except ValueError:
                raise ShardError(f"{place / shard_id}.drops.tsv.gz: not a list of dropped keys") from None
            rejected.setdefault(str(key), stage)
    return rejected


def reject_files(folder: Path, stage: str, shard_id: str) -> list[Path]:
    """Where a stage that writes below ``folder`` names the samples that did not go on."""
    place = folder / "_rejects" / stage
    return [place / f"{shard_id}.jsonl", place / f"{shard_id}.drops.tsv.gz"]


def _uid(window: Window, span: SampleSpan) -> Halves:
    member = next((member for member in span.members if member.suffix == "json"), None)
    if member is None or not member.regular or member.size > MAX_MEMBER_BYTES:
        raise SampleError("no_uid", "it has no json")
    return uid_of(parse_json_object(window.read(member.data, member.size)))


def _lines(path: Path) -> list[bytes]:
    try:
        if path.suffix != ".gz":
            with open(path, "rb") as file:
                data = file.read(MAX_REJECTS_BYTES + 1)
        else:
            with gzip.open(path) as unpacked:
                data = unpacked.read(MAX_REJECTS_BYTES + 1)
    except FileNotFoundError:
        return []
    except (OSError, EOFError, zlib.error) as error:
        raise ShardError(f"{path}: cannot be read ({error})") from error
    if len(data) > MAX_REJECTS_BYTES:
        raise ShardError(f"{path}: more than {MAX_REJECTS_BYTES:,} bytes")
    return data.splitlines()
