"""Explains how a hybrid shard differs from the expected one, by samples and members.  This is slower than the proof, so
it is only done for shards that did not pass the proof."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from curation.commands.findings import Findings
from curation.commands.verify.edited_samples import is_edited, original_problems, self_problems
from curation.errors import SampleError
from curation.jsonio import parse_json_object
from curation.tar.headers import Member
from curation.tar.prove import ExpectedMember, expected_members
from curation.tar.random_access import RangeReader
from curation.tar.samples import MAX_MEMBER_BYTES
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, TarScan, Window
from curation.tar.splice import Action, Decision, Edit

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Due:
    """A sample as it should be, or as it is; ``span`` is where it lies in the tar that was read."""

    span: SampleSpan
    members: list[ExpectedMember]
    edited: bool
    digest: bytes


Decide = Callable[[Window, SampleSpan], Decision]


def explain(source: Path, hybrid: Path, decide: Decide, findings: Findings, *, provenance: bool, mixed: bool) -> None:
    """Add a finding for every difference; at least one, because the caller knows that there is one.

    mixed: captions were mixed, so that the text of each sample may be another one.
    """
    before = findings.counts.total()
    due, gone = _due(source, decide)
    found, strays = _found(hybrid, findings)
    _compare_keys(due, found, gone, findings)
    if strays != _strays(source):
        findings.add("wrong_members", "", "members that belong to no sample are not those of the source")
    with RangeReader(source) as old, RangeReader(hybrid) as new:
        here = _by_key(found)
        for key, wanted in _by_key(due).items():
            for one, other in zip(wanted, here.get(key, ()), strict=False):
                if one.digest != other.digest:
                    _tell(key, one, other.span, old, new, findings, mixed=mixed)
                    if one.edited and not mixed:
                        _tell_of_edit(key, one, other.span, old, new, findings, provenance)
    if findings.counts.total() == before:
        findings.add("bytes_differ", "", "it is not what its source and its edits make, outside of any sample")


def _due(source: Path, decide: Decide) -> tuple[list[_Due], set[str]]:
    """The expected samples in order, and the keys of those that must not be there."""
    due, gone = [], set()
    for window in TarScan(source).windows():
        for span in window.spans:
            decision = decide(window, span) if span.key else Action.DROP
            if decision is Action.DROP:
                gone.add(span.key)
                continue
            members = expected_members(span, decision)
            edited = isinstance(decision, Edit) and decision.image is not None
            due.append(_Due(span, members, edited, _digest(window, members)))
    return due, gone


def _found(hybrid: Path, findings: Findings) -> tuple[list[_Due], list[bytes]]:
    """The samples that exist, and the names of members before the first.  Damage becomes a finding."""
    tar = TarScan(hybrid)
    found: list[_Due] = []
    strays: list[bytes] = []
    for window in tar.windows():
        for span in window.spans:
            if span.torn:
                findings.add("damaged_tar", span.key, span.torn)
            if span.surplus:
                findings.add("wrong_members", span.key, f"{span.surplus:,} members are repeated")
            for member in span.in_order:
                if member.odd:
                    findings.add("damaged_tar", span.key, f"{member.text_name}: {member.odd}")
            if span.members:
                members = expected_members(span, Action.KEEP)
                found.append(_Due(span, members, edited=False, digest=_digest(window, members)))
            elif not span.key:
                strays += [member.name for member in span.foreign]
    for damage in tar.report.damages:
        findings.add("damaged_tar", "", f"at byte {damage.offset:,}, {damage.length:,} bytes: {damage.detail}")
    if tar.report.missing_end:
        findings.add("damaged_tar", "", "no end-of-archive blocks")
    for gap in tar.report.gaps:
        findings.add("damaged_tar", "", f"an end of archive at byte {gap:,}, followed by members")
    return found, strays


def _strays(source: Path) -> list[bytes]:
    """The names of members before any sample; those behind one are compared with it."""
    for window in TarScan(source).windows():
        for span in window.spans:
            return [] if span.key else [member.name for member in span.foreign]
    return []


def _compare_keys(due: list[_Due], found: list[_Due], gone: set[str], findings: Findings) -> None:
    wanted, here = [one.span.key for one in due], [one.span.key for one in found]
    too_few, too_many = Counter(wanted), Counter(here)
    too_few, too_many = too_few - too_many, too_many - too_few
    for key, count in too_few.items():
        findings.add(
            "lost_sample", key, f"in the source, but not here, and no reject or drop gives a reason{_times(count)}"
        )
    known = set(wanted)
    for key, count in too_many.items():
        if key in known:
            findings.add("doubled_sample", key, f"more often here than in the source{_times(count)}")
        elif key in gone:
            findings.add("unknown_sample", key, "it should have been left out")
        else:
            findings.add("unknown_sample", key, "the source has no such sample")
    odd = too_few.keys() | too_many.keys()
    first = [key for key in wanted if key not in odd]
    second = [key for key in here if key not in odd]
    for one, other in zip(first, second, strict=True):
        if one != other:
            findings.add("wrong_order", other, f"it is at the place of {one} in the source")


def _times(count: int) -> str:
    return f" ({count:,} times)" if count > 1 else ""


def _by_key(samples: list[_Due]) -> dict[str, list[_Due]]:
    grouped: defaultdict[str, list[_Due]] = defaultdict(list)
    for one in samples:
        grouped[one.span.key].append(one)
    return grouped


def _tell(
    key: str, due: _Due, found: SampleSpan, old: RangeReader, new: RangeReader, findings: Findings, *, mixed: bool
) -> None:
    """Report which member of a sample differs, and where."""
    names = [member.name for member in due.members]
    members = found.in_order
    if due.edited and _same(due.span.in_order, old, found, new):
        findings.add("not_the_edit", key, "the original is still there: the edit was not applied")
        return
    if not due.edited and not mixed and _says_edited(members, new):
        findings.add("bytes_differ", key, "it was replaced, but there is no edit of it (or no prompt)")
        return
    if names != [member.name for member in members]:
        said = ", ".join(member.text_name for member in members[:8])
        wanted = ", ".join(name.decode("utf-8", "replace") for name in names[:8])
        findings.add("wrong_members", key, f"its members are {said}; they should be {wanted}")
        return
    for wanted_member, member in zip(due.members, members, strict=True):
        offset = _first_difference(wanted_member, member, old, new)
        if offset is not None:
            kind = "not_the_edit" if wanted_member.new else "bytes_differ"
            whose = "the edit's" if wanted_member.new else "the source's"
            if mixed and wanted_member.new and member.suffix in ("txt", "json"):
                kind, whose = "wrong_caption", "what --mix and the captions give"
            where = f"first at its byte {offset:,}, header included"
            findings.add(kind, key, f"{member.text_name} is not {whose}, {where}")


def _tell_of_edit(
    key: str,
    due: _Due,
    found: SampleSpan,
    old: RangeReader,
    new: RangeReader,
    findings: Findings,
    provenance: bool,
) -> None:
    """What the edited sample in the hybrid says of itself."""
    parts: dict[str, bytes] = {}
    written = {one.name for one in due.members if one.new}
    for member in found.members:
        if member.name not in written:
            continue  # a picture that stays, or which is not the edit's
        part = "image" if member.suffix.rpartition(".")[2] in IMAGE_SUFFIXES else member.suffix
        if part in ("image", "txt", "json") and part not in parts:
            parts[part] = _read(new, member)
    if len(parts) < 3:
        return
    for kind, detail in self_problems(parts["image"], parts["txt"], parts["json"], provenance=provenance):
        findings.add(kind, key, detail)
    original = next((_read(old, m) for m in due.span.members if m.suffix == "json" and m.regular), None)
    if original is not None:
        for kind, detail in original_problems(parts["json"], original):
            findings.add(kind, key, detail)


def _says_edited(members: Sequence[Member], file: RangeReader) -> bool:
    for member in members:
        if member.suffix == "json":
            try:
                return is_edited(parse_json_object(_read(file, member)))
            except SampleError:
                return False
    return False


def _same(wanted: Sequence[Member], old: RangeReader, found: SampleSpan, new: RangeReader) -> bool:
    members = found.in_order
    return len(wanted) == len(members) and all(
        _first_difference(one, other, old, new) is None for one, other in zip(wanted, members, strict=True)
    )


def _first_difference(
    wanted: ExpectedMember | Member, member: Member, old: RangeReader, new: RangeReader
) -> int | None:
    """The first byte, counted from the header, at which a member differs; None if it does not."""
    new_bytes = wanted.new if isinstance(wanted, ExpectedMember) else b""
    size, wanted_size = member.end - member.start, len(new_bytes) + wanted.end - wanted.start
    for begin in range(0, max(size, wanted_size), _PIECE_BYTES):
        one = new_bytes[begin : begin + _PIECE_BYTES]
        missing = min(_PIECE_BYTES, wanted_size - begin) - len(one)
        if missing > 0:
            one += old.read(wanted.start + begin + len(one) - len(new_bytes), missing)
        other = new.read(member.start + begin, max(0, min(_PIECE_BYTES, size - begin)))
        if one != other:
            pairs = zip(one, other, strict=False)
            return begin + next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return None


def _digest(window: Window, members: list[ExpectedMember]) -> bytes:
    digest = xxhash.xxh3_128()
    for member in members:
        digest.update(member.new)
        for view in window.pieces(member.start, member.end):
            digest.update(view)
    return digest.digest()


def _read(file: RangeReader, member: Member) -> bytes:
    return file.read(member.data, min(member.size, MAX_MEMBER_BYTES))
