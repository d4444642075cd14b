"""Chooses the samples of a shard for the output: how often each is written, and whether as its edit.

The choice depends on the shard's edits, prompts and rejects, and on the subset.  The dry run of resharding, which
writes nothing, counts the chosen samples and their bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from curation.captioned.rows import CaptionsOfShard
from curation.check.counts import REASON
from curation.edits import EditReader, LooseEditReader, TarEditReader
from curation.errors import SampleError, ShardError, UsageError
from curation.jsonio import KEY_SUFFIX, clean_text, parse_json, parse_json_object, read_dictionary, some
from curation.options import logger
from curation.reshard.captions import CaptionSource
from curation.reshard.mix import Acquaintance
from curation.reshard.uids import Halves, Subset, uid_of
from curation.run import ShardContext
from curation.run.inputs import VERIFY_BYTES, Input, Upstream, published_below, receipts_of, source_inputs
from curation.shards import Shard, record_name, record_path
from curation.storage.files import read_record
from curation.storage.urls import Source
from curation.tar.samples import MAX_MEMBER_BYTES, problem_of
from curation.tar.scan import Run, SampleSpan, TarReport, TarScan, Window

MAX_REJECTS_BYTES: Final = 1 << 30


_ROOM_FOR_A_NUMBER = 16  # bytes by which a key may grow
CHECK_NOTE: Final = "check_rejected"  # of a receipt: original or dropped → group → samples
_MOST_GROUPS, _MOST_OF_A_GROUP, _OTHER_GROUPS = 200, 100, "(further groups)"


@dataclass(frozen=True, slots=True)
class Choice:
    """copies: how often the sample is written.  dropped: why it is not; failed: reason and detail.

    wanted: it has a prompt, so that it should have an edit.  rejected: a check of stage 03 rejected its edit.
    """

    copies: int
    edited: bool = False
    wanted: bool = False
    dropped: str = ""
    failed: tuple[str, str] | None = None
    rejected: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """A sample that an earlier stage left out.

    Attributes:
        stage: The stage.
        by_check: Whether the picture was made, and a check rejected it.
        group: The group that it was to portray; empty for none.
    """

    stage: str
    by_check: bool = False
    group: str = ""


Keys = Literal["source", "datacomp"]
AS_IT_IS, _EDITED = Choice(1), Choice(1, edited=True)


_MISSED, _LEFT_OUT = Choice(1, wanted=True), Choice(0, wanted=True, dropped="no_edit")


_NOT_IN_SUBSET = Choice(0, dropped="not_in_subset")


_STAYS_A_PHOTO = Choice(1, rejected=True)
_REJECTED_BY_CHECK = Choice(0, dropped="rejected_by_check", rejected=True)


class SampleSelector:
    """Chooses the samples of one shard, and counts the choices.

    edited: keys that have an edit.  prompts: "<key>.json" of the samples that should be edited; None: all that have
    an edit.  rejected: key → why an earlier stage left it out.  drops_rejected: drop these; without it only those
    count here that a check rejected, which stay the photos that they were.
    """

    def __init__(
        self,
        edited: Collection[str] = (),
        prompts: Collection[str] | None = None,
        *,
        drops_missing: bool = False,
        rejected: Mapping[str, Rejected] | None = None,
        drops_rejected: bool = False,
        subset: Subset | None = None,
    ) -> None:
        self._edited, self._prompts, self._drops_missing = edited, prompts, drops_missing
        self._rejected, self._drops_rejected = rejected or {}, drops_rejected
        self._subset = subset
        named = (prompt.removesuffix(KEY_SUFFIX) for prompt in prompts or ())
        self._touched = {*edited, *self._rejected, *named}  # without a subset, all others stay as they are
        self._found: dict[int, int | SampleError] = {}  # offset of a sample in the window → its count
        self.unused = set(edited)  # edits for which no sample was found yet
        self.unasked = 0  # edits without a prompt
        self.applied = 0
        self.left_out: list[str] = []  # dropped samples that have an edit
        self.missing: list[str] = []  # samples with a prompt, without an edit
        self.copies = 0  # beyond the first of each sample
        self.by_check: dict[str, Counter[str]] = {"original": Counter(), "dropped": Counter()}  # → group → samples

    def look(self, window: Window) -> None:
        """Search the subset for all samples of a window at once; call it before ``choose``."""
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

    def parts(self, window: Window) -> Iterator[SampleSpan | Run]:
        """The window's samples in their order.  Those that stay as they are, if nothing else changes all samples,
        may come in runs: they need not be chosen one by one, and ``count`` is told how many they are."""
        if self._subset is not None:
            yield from window.spans
            return
        for part in window.parts:
            if isinstance(part, Run):
                yield from part.without(self._touched)
            else:
                yield part

    def choose(self, span: SampleSpan) -> Choice:
        """Choose for one sample; repeated calls give the same result.  Of samples with one key, the first is edited."""
        if self._subset is None and span.key not in self._touched and not span.torn and not span.refused:
            return AS_IT_IS
        if span.torn:
            return Choice(0, failed=("damaged_tar", span.torn))
        if span.refused:
            return Choice(0, failed=span.refused)
        if self._subset is not None:
            return self._by_subset(span, self._found[span.start])
        return self._by_edits(span)

    def count(self, chosen: Sequence[tuple[SampleSpan, Choice]], work: ShardContext, kept: int = 0) -> None:
        """Count every sample once: kept, dropped or failed.  kept: how many more there were, in runs."""
        work.sample_in(kept + len(chosen))
        for span, choice in chosen:
            if choice is AS_IT_IS and span.key not in self.unused:  # true for nearly all samples
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

    def report(self, work: ShardContext, edits: str) -> None:
        """Report on the edits.  Raises ShardError for edits that match no sample."""
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
        if by_check := {became: dict(sorted(groups.items())) for became, groups in self.by_check.items() if groups}:
            work.note(CHECK_NOTE, by_check)
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
        return replace(choice, copies=found)

    def _by_edits(self, span: SampleSpan) -> Choice:
        if span.repeated:
            return AS_IT_IS
        wanted = self._prompts is None or span.key + KEY_SUFFIX in self._prompts
        if wanted and span.key in self._edited:
            return _EDITED
        if (why := self._rejected.get(span.key)) is not None:
            if why.by_check:
                return _REJECTED_BY_CHECK if self._drops_rejected else _STAYS_A_PHOTO
            return Choice(0, wanted=wanted and self._prompts is not None, dropped=f"rejected_by_{why.stage}")
        if not wanted or self._prompts is None:
            return AS_IT_IS
        return _LEFT_OUT if self._drops_missing else _MISSED

    def _note(self, span: SampleSpan, choice: Choice) -> None:
        """Count the edits: each is applied, has no prompt, is left out, or is missing."""
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
        elif choice.rejected:
            groups = self.by_check["original" if choice.copies else "dropped"]
            group = self._rejected[span.key].group
            groups[group if group in groups or len(groups) < _MOST_GROUPS else _OTHER_GROUPS] += 1
        elif choice.wanted:
            self.missing.append(span.key)


def copy_keys(key: str, copies: int, keys: Keys = "source") -> list[str]:
    """The keys of a sample that is written once or more often.  datacomp: its resharder numbers all samples."""
    return [f"{key}-{number}" for number in range(copies)] if copies > 1 or keys == "datacomp" else [key]


def uid_key(window: Window, span: SampleSpan) -> str:
    """The uid of a sample as DataComp's resharder writes it in keys; the sample's own key where it has none."""
    try:
        high, low = _uid(window, span)
    except SampleError:
        return span.key
    return f"{high:016x}{low:016x}"


def read_rejected(folders: Iterable[tuple[Path, str]], shard_id: str) -> dict[str, Rejected]:
    """key → why a stage failed or dropped the sample.  folders: (output, stage); the first one that names a sample
    counts."""
    rejected: dict[str, Rejected] = {}
    for folder, stage in folders:
        of_stage = read_rejected_by_checks(folder, stage, shard_id)
        failed, dropped = reject_files(folder, stage, shard_id)
        for line in _lines(failed):
            key = str(_record(failed, line).get("key"))
            of_stage.setdefault(key, Rejected(stage))
        for line in _lines(dropped):
            reason, _, text = line.partition(b"\t")
            try:
                key = str(parse_json(text, keep_surrogates=True))
            except SampleError:
                raise ShardError(f"{dropped}: not a list of dropped keys") from None
            of_stage.setdefault(key, Rejected(stage, reason.startswith(REASON.encode())))
        rejected = of_stage | rejected
    return rejected


def read_rejected_by_checks(folder: Path, stage: str, shard_id: str) -> dict[str, Rejected]:
    """key → the group, of the samples that were left out because their picture did not pass a check."""
    path = reject_files(folder, stage, shard_id)[0]
    found: dict[str, Rejected] = {}
    for line in _lines(path):
        if REASON.encode() not in line:  # true for nearly all lines of nearly all shards
            continue
        record = _record(path, line)
        if str(record.get("reason")).startswith(REASON):
            group = record.get("group")
            told = clean_text(group[:1000])[:_MOST_OF_A_GROUP] if isinstance(group, str) else ""
            found.setdefault(str(record.get("key")), Rejected(stage, by_check=True, group=told))
    return found


def _record(path: Path, line: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(line, keep_surrogates=True)
    except SampleError as error:
        raise ShardError(f"{path}: {error}") from None


def reject_files(folder: Path, stage: str, shard_id: str) -> list[Path]:
    """The files in which a stage that writes below ``folder`` names the samples that it failed or dropped."""
    place = folder / "_rejects" / stage
    return [place / f"{record_name(shard_id)}.jsonl", place / f"{record_name(shard_id)}.drops.tsv.gz"]


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


Records = Mapping[Source, Mapping[str, Any]]


"""Path of an input → its record."""


@dataclass(frozen=True, kw_only=True)
class ReshardInputs:
    """The input folders, and the stages that made their files.

    edits, prompts: (folder, stage), or None.  layout: that of the edits.  captions: what is mixed in, or None.
    """

    edits: tuple[Path, str] | None
    prompts: tuple[Path, str] | None = None
    layout: Literal["auto", "tar", "files"] = "auto"
    drops_missing: bool = False
    drops_rejected: bool = False
    subset: Subset | None = None
    captions: CaptionSource | None = None

    def check(self) -> None:
        """Raise UsageError if the records that an option needs do not exist, or a file cannot be used."""
        if self.subset is not None:
            self.subset.check_order()
        made_by = [(folder / "_receipts" / stage).is_dir() for folder, stage in self._made]
        if self.drops_rejected and not any(made_by):
            raise UsageError(
                "--drop_rejected: neither --prompts nor --edits was made by these stages, so that nothing is known of "
                "rejected samples"
            )

    @property
    def edits_folder(self) -> str:
        """The edits' folder, for messages."""
        return str(self.edits and self.edits[0])

    @property
    def _made(self) -> list[tuple[Path, str]]:
        return [made for made in (self.prompts, self.edits) if made is not None]

    def sources(self, shard: Shard) -> list[Input]:
        """The source shard, its edits and its captions."""
        inputs = source_inputs(shard)
        if self.edits is not None:
            folder, stage = self.edits
            if self.layout != "files":
                inputs.append(Input(folder / f"{shard.id}.tar", stage, optional=True))
            if self.layout != "tar":
                inputs.append(Input(folder / shard.id, stage, optional=True, loose=True))
        if self.captions is not None:
            inputs += self.captions.inputs(shard)
        return inputs

    def inputs(self, shard: Shard) -> list[Input]:
        """The source shard, its edits, and the files that determine the choice."""
        inputs = self.sources(shard)
        if self.prompts is not None:
            inputs.append(Input(self.prompts[0] / f"{shard.id}.json", self.prompts[1]))
        if self.drops_rejected:
            for folder, stage in self._made:
                inputs += [Input(path, optional=True) for path in reject_files(folder, stage, shard.id)]
        elif self.drops_missing and self._is_checked(shard):
            assert self.edits is not None
            inputs.append(Input(reject_files(*self.edits, shard.id)[0], optional=True))
        if self.subset is not None:
            inputs.append(Input(self.subset.path))
        return inputs

    def sources_of(self, shard: Shard) -> list[Input]:
        """``sources`` as inputs of an output shard, which is made from several source shards."""
        return [replace(wanted, shard=shard.id) for wanted in self.sources(shard)]

    @contextlib.contextmanager
    def open(self, shard: Shard, records: Records) -> Iterator[tuple[EditReader, SampleSelector]]:
        """Open the shard's edits, and the selector of its samples."""
        prompts = None
        if self.prompts is not None:
            prompts = read_dictionary(self.prompts[0] / f"{shard.id}.json").keys()
        with self.open_edits(shard, records) as edits:
            yield (
                edits,
                SampleSelector(
                    edits.keys(),
                    prompts,
                    drops_missing=self.drops_missing,
                    rejected=self._rejected(shard),
                    drops_rejected=self.drops_rejected,
                    subset=self.subset,
                ),
            )

    def open_captions(self, shard: Shard, records: Records) -> AbstractContextManager[CaptionsOfShard | None]:
        """Open the shard's captions; None if there is no mix."""
        return contextlib.nullcontext() if self.captions is None else self.captions.open(shard, records)

    def acquaintance(self, shard: Shard, captions: CaptionsOfShard | None) -> Acquaintance:
        """What tells whether the captions are of the shard's samples."""
        return Acquaintance(captions, "" if self.captions is None else self.captions.where(shard))

    def _rejected(self, shard: Shard) -> Mapping[str, Rejected]:
        if self.drops_rejected:
            return read_rejected(self._made, shard.id)
        return {} if self.edits is None else read_rejected_by_checks(*self.edits, shard.id)

    def _is_checked(self, shard: Shard) -> bool:
        """Whether stage 03 checked the pictures of the shard.  Without checks the shard has the inputs that it always
        had, so that nothing is done again in folders of older versions."""
        folder, stage = self.edits or (Path(), "")
        receipts = receipts_of(folder, stage)
        receipt = read_record(record_path(receipts, shard.id)) if receipts is not None else None
        notes = receipt.get("notes") if receipt is not None else None
        return isinstance(notes, dict) and "checks" in notes

    def open_edits(self, shard: Shard, records: Records) -> EditReader:
        """Open the shard's edits: only files that a receipt names, if a stage of this project made them."""
        if self.edits is None:
            return LooseEditReader(Path(shard.id), {})
        folder, stage = self.edits
        tar, loose = folder / f"{shard.id}.tar", folder / shard.id
        absent = {"absent": True}
        if not (record := records.get(tar, absent)).get("absent"):
            return TarEditReader(tar, record.get("digest") if record["size"] > VERIFY_BYTES else None)
        if not records.get(loose, absent).get("absent"):
            return LooseEditReader(loose, published_below(loose, stage, shard.id))
        return LooseEditReader(loose, {})


def records_of(inputs: Sequence[Input], work: ShardContext) -> Records:
    """The runner's records of a shard's inputs, by path."""
    return {wanted.path: record for wanted, record in zip(inputs, work.inputs, strict=True)}


def warn_of_pass(report: TarReport, edits: EditReader, work: ShardContext) -> None:
    """Warn of irregularities in a source shard, and of incomplete edits."""
    for line in report.warnings():
        work.warn(line)
    if edits.incomplete:
        work.warn(f"{edits.incomplete:,} edits lack their jpg, txt or json and are ignored")


class _Tally(ShardContext):
    """The counts of a dry run, which claims, writes and records nothing."""

    def __init__(self, shard: Shard, tally: Counter[str]) -> None:
        self.shard = shard
        self._tally = tally

    def sample_in(self, count: int = 1) -> None:
        self._tally["in"] += count

    def keep(self, count: int = 1) -> None:
        self._tally["kept"] += count

    def drop(self, key: str, reason: str) -> None:
        self._tally[f"dropped: {reason}"] += 1

    def fail(self, key: str, reason: str, detail: str = "") -> None:
        self._tally[f"failed: {reason}"] += 1

    def note(self, name: str, value: object) -> None:
        if name in ("edited", "copies") and isinstance(value, int):
            self._tally[name] += value

    def warn(self, text: str) -> None:
        logger.warning(f"{self.shard.id}: {text}")


def dry_run(material: ReshardInputs, shards: Sequence[Shard], size: int | None, *, cursory: bool) -> str:
    """Return one line with the counts of all shards.

    size: that of regrouped shards.  cursory: every sample is kept, so that the sizes of the files are enough.
    The bytes are those of the source samples; edits and blurred images may be larger or smaller.
    """
    tally: Counter[str] = Counter()
    bytes_out = samples_out = 0
    for shard in shards:
        if cursory:
            bytes_out += _size(shard)
            continue
        records = _records(material, shard)
        if records is None:
            tally["blocked shards"] += 1
            continue
        account = _Tally(shard, tally)
        with material.open(shard, records) as (_, selection):
            for window in TarScan(shard.path).windows():
                selection.look(window)
                chosen = [(span, selection.choose(span)) for span in window.spans if span.key]
                selection.count(chosen, account)
                for span, choice in chosen:
                    samples_out += choice.copies
                    bytes_out += choice.copies * sum(end - start for start, end in span.own_extents)
            selection.report(account, "edits")
    if cursory:
        return f"{len(shards):,} shards would be written in about {bytes_out:,} bytes"
    told = ", ".join(f"{count:,} {what}" for what, count in sorted(tally.items()) if count)
    made = f" in {-(-samples_out // size):,} shards" if size else ""
    return f"{samples_out:,} samples would be written{made}, about {bytes_out:,} bytes ({told or 'nothing comes in'})"


def _records(material: ReshardInputs, shard: Shard) -> Records | None:
    """The records of a shard's inputs; None if an input is missing."""
    upstream = Upstream()
    records: dict[Source, Mapping[str, Any]] = {}
    for wanted in material.inputs(shard):
        record, why = upstream.identify(wanted, shard.id)
        if record is None:
            logger.warning(f"{shard.id} blocked: {why}")
            return None
        records[wanted.path] = record
    return records


def _size(shard: Shard) -> int:
    try:
        return os.stat(shard.path).st_size if isinstance(shard.path, Path) else 0
    except OSError as error:
        raise ShardError(f"{shard.path}: cannot be read ({error.strerror})") from error
