"""Checks one tar: the archive, its samples, and whether it agrees with its receipt."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from curation import PROGRAM
from curation.commands.findings import Findings
from curation.commands.fsck.salvage import salvage
from curation.commands.fsck.samples import Kinds, Pictures, sample_problems
from curation.errors import ShardError
from curation.jsonio import clean_text
from curation.run.inputs import receipts_of, vouched_for
from curation.shards import home_of, record_path
from curation.storage.files import fast_digest, read_record
from curation.tar.headers import BLOCK, Member
from curation.tar.scan import Damage, SampleSpan, TarScan, Window

_MAX_REMEMBERED = 100_000  # keys whose members are remembered, to tell a split sample from a second one

_SALVAGE = "--repair DIR saves every whole sample; or download, copy or make the shard again"


REMEDIES: Final[Mapping[str, str]] = {
    "damaged": _SALVAGE,
    "bad_checksum": _SALVAGE,
    "cut_member": _SALVAGE,
    "torn_sample": _SALVAGE,
    "missing_end": _SALVAGE,
    "early_end": "tar stops reading at the first end of archive: --repair DIR writes a tar without it",
    "behind_end": _SALVAGE,
    "padding": _SALVAGE,
    "odd_header": "readers lose the members after it: --repair DIR writes such headers again; stage 04 does the same",
    "duplicate_key": "rename it at its source, or leave it out with --repair DIR: stages 01 to 04 use only the first",
    "duplicate_member": "--repair DIR keeps the first of each, or leaves the sample out; WebDataset refuses it",
    "split_sample": "--repair DIR puts its members together",
    "incomplete_sample": "--repair DIR leaves it out; the missing members may be in another copy of the shard",
    "cut_key": "rename its members: a key ends at the first dot, as 22.05.jpg to 22_05.jpg",
    "no_picture": "rename the members to <key>.jpg, <key>.txt and <key>.json, or give the tars with the pictures",
    "overlong_key": "rename it at its source, or leave it out with --repair DIR: no file can have such a name",
    "unsafe_name": "never unpack the tar; --repair DIR leaves the sample out",
    "not_a_file": "--repair DIR leaves it out",
    "member_too_large": "--repair DIR leaves it out: no stage loads such a member",
    "undecodable": "--repair DIR leaves it out; stage 01 rejects it too",
    "image_too_large": "--repair DIR leaves it out; stage 01 rejects it too",
    "empty_image": "--repair DIR leaves it out; stage 01 rejects it too",
    "bad_json": "--repair DIR leaves it out; stage 01 rejects it too",
    "caption_differs": "json and txt are of different captions: make or download the sample again",
    "wrong_sha256": "the picture is not the one that was generated: run stages 03 and 04 again for the shard (--rerun)",
    "wrong_size": "the picture is not the one that was generated: run stages 03 and 04 again for the shard (--rerun)",
    "no_provenance": "run stages 03 and 04 again for the shard (--rerun)",
    "wrong_digest": "it differs from the published file: run the stage again for the shard (--rerun --shards <shard>)",
    "not_done": f"it is no longer in the receipts of a stage: see `{PROGRAM} status`",
    "not_a_tar": "nothing can be saved from it: download the tar itself, as the finding says",
    "unreadable": "check the file and the disk; copy it again",
}


@dataclass(frozen=True, slots=True)
class Task:
    """One tar to check.  images: whether to decode every image.  repair: the folder for intact samples, or None."""

    path: Path
    shard_id: str
    images: bool
    repair: Path | None


@dataclass(slots=True)
class Verdict:
    """The result for one tar.  salvaged: number of samples in the new tar; None if none was written."""

    path: Path
    shard_id: str
    findings: Findings = field(default_factory=Findings)
    samples: int = 0
    size: int = 0
    salvaged: int | None = None
    salvage_path: str = ""
    seconds: float = 0.0


def check_shard(task: Task) -> Verdict:
    """Find everything that is wrong with one tar.  It raises only for a bug, or if the folder cannot be written."""
    began = time.perf_counter()
    verdict = Verdict(task.path, task.shard_id)
    try:
        verdict.size = task.path.stat().st_size
        _check_archive(task, verdict)
        _check_receipts(task, verdict.findings)
        if task.repair is not None and verdict.findings:
            found = dict(verdict.findings.counts.most_common())
            saved = salvage(task.path, task.shard_id, task.repair, found, images=task.images)
            verdict.salvaged, verdict.salvage_path = saved, str(task.repair / f"{task.shard_id}.tar")
    except ShardError as error:
        verdict.findings.add("not_a_tar" if error.reason == "not_a_tar" else "unreadable", "", str(error))
    except OSError as error:
        verdict.findings.add("unreadable", "", f"{task.path}: {error.strerror}")
    verdict.seconds = time.perf_counter() - began
    return verdict


def _check_archive(task: Task, verdict: Verdict) -> None:
    findings = verdict.findings
    tar = TarScan(task.path)
    kinds, pictures = Kinds(), Pictures()
    parts: dict[int, frozenset[str]] = {}  # hash of a key → the suffixes of its first run, of incomplete ones
    for window in tar.windows():
        for span in window.spans:
            pictures.add(span, findings)
            if not span.key:
                _check_foreign(span, findings)
                continue
            verdict.samples += 1
            _check_span(task, window, span, kinds, parts, findings)
    kinds.tell(findings)
    pictures.tell(findings)
    report = tar.report
    for damage in report.damages:
        findings.add(_kind_of(damage), "", f"at byte {damage.offset:,}, {damage.length:,} bytes: {damage.detail}")
    for gap in report.gaps:
        findings.add("early_end", "", f"zeros at byte {gap:,}, followed by members")
    if report.missing_end:
        findings.add("missing_end", "", "the end-of-archive blocks are missing: the tar was cut off, or never finished")
    elif report.end_bytes < 2 * BLOCK:
        findings.add("missing_end", "", "one of two end-of-archive blocks is missing: the tar was cut off")


def _kind_of(damage: Damage) -> str:
    if damage.detail.startswith("behind the end"):
        return "behind_end"
    if "by every program" in damage.detail:
        return "odd_header"
    if "is cut" in damage.detail:
        return "cut_member"
    return "bad_checksum" if "checksum" in damage.detail else "damaged"


def _check_foreign(span: SampleSpan, findings: Findings) -> None:
    if span.torn:
        findings.add("torn_sample", "", span.torn)
    for member in span.foreign:
        if member.odd:
            findings.add("odd_header", "", f"{member.text_name}: {member.odd}")


def _tell_of_copies(span: SampleSpan, findings: Findings) -> None:
    copies, rest = divmod(span.surplus, len(span.members))
    if rest:
        findings.add("duplicate_member", span.key, f"{span.surplus} of its members are repeated after or before it")
    else:
        findings.add("duplicate_key", span.key, f"it comes {copies + 1} times in a row: readers merge them and stop")


def _check_span(
    task: Task,
    window: Window,
    span: SampleSpan,
    kinds: Kinds,
    parts: dict[int, frozenset[str]],
    findings: Findings,
) -> None:
    key = span.key
    if span.torn:
        findings.add("torn_sample", key, span.torn)
    if not span.members:
        return
    suffixes = frozenset(member.suffix for member in span.members)
    mark = hash(key)
    if span.repeated:
        split = mark in parts and not parts[mark] & suffixes
        if split:
            findings.add("split_sample", key, "its members are not consecutive: readers treat it as two samples")
        else:
            findings.add("duplicate_key", key, "an earlier sample of the shard has the same key")
    else:
        if len(parts) < _MAX_REMEMBERED:
            parts[mark] = suffixes
        if not span.torn:
            kinds.add(key, span.kinds)
    if any(span.members[0].start < member.start < span.members[-1].start for member in span.foreign):
        findings.add("split_sample", key, f"{span.foreign[0].text_name} stands between its members")
    if span.surplus:
        _tell_of_copies(span, findings)
    for member in span.members:
        if member.odd:
            findings.add("odd_header", key, f"{member.text_name}: {member.odd}")
        if member.end - member.data - member.size and (rest := padding_of(window, member)).strip(b"\0"):
            findings.add("padding", key, f"{member.text_name}: {len(rest)} bytes of padding are not zeros")
    for kind, detail in sample_problems(span, lambda m: window.read(m.data, m.size), images=task.images):
        findings.add(kind, key, detail)


def padding_of(window: Window, member: Member) -> bytes:
    end = member.data + member.size
    return window.read(end, -end % BLOCK if member.end > end else 0)[: member.end - end]


def _check_receipts(task: Task, findings: Findings) -> None:
    """If a stage has published the file, compare it with the size and digest in its receipt."""
    folder = home_of(task.path, task.shard_id)
    try:
        stages = sorted(entry.name for entry in os.scandir(folder / "_receipts") if entry.is_dir())
    except OSError:
        return
    place = f"{os.path.realpath(task.path.parent)}/{task.path.name}"
    for stage in stages:
        receipts = receipts_of(folder, stage)
        receipt = read_record(record_path(receipts, task.shard_id)) if receipts else None
        if receipts is None or receipt is None:
            continue
        home = os.path.realpath(receipts.parent.parent)
        if home == os.path.realpath(folder) and receipt.get("status") != "done":
            findings.add("not_done", "", f"the receipt of {stage} says {clean_text(str(receipt.get('status')))!r}")
        try:
            said = vouched_for(place, home, receipt.get("outputs", []), loose=False)
        except (TypeError, KeyError, AttributeError):  # made by hand, or damaged
            findings.add("wrong_digest", "", f"the receipt of {stage} is not valid")
            continue
        if said is None:
            continue
        size = task.path.stat().st_size
        digest = fast_digest(task.path) if size == said["size"] else ""
        if digest != said["digest"]:
            now = f"{size:,} bytes" + (f", {digest}" if digest else "")
            findings.add(
                "wrong_digest", "", f"{stage} published {said['size']:,} bytes, {said['digest']}; it has {now}"
            )
