"""Checks what stage 03 says of its tries: receipts, provenance and the edits themselves must agree.  So must what
stage 05 says of the tries for its captions: receipts, rows and rejects.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from curation.captioned.rows import parse_row
from curation.check.counts import (
    BY_CHECK,
    FAILED_TRIES,
    GROUPS,
    KEPT,
    KEPT_THOUGH_FAILED,
    REASON,
    REJECTED,
    TRIES,
    problems_of,
    problems_of_captions,
)
from curation.commands.findings import Findings
from curation.commands.verify.conservation import Record
from curation.edits import CHECK_FIELDS
from curation.errors import SampleError
from curation.jsonio import parse_json_object

_NO_PICTURE = ("blank_image", "flagged_by_safety_checker")  # of samples that failed, whose tries nothing lists


@dataclass(frozen=True, slots=True)
class Mark:
    """What is said of the picture that is kept of a sample, in its provenance or its json.

    Attributes:
        check: ``passed`` or ``failed``; None where nothing was checked.
        tries: Pictures that were made.
        round: In which this one was made.
        group: That the sample portrays; empty for none.
        failed: Which checks this picture and the failed tries have failed, and why others had no picture; a name for
            each time.  Only the provenance says it of the failed tries.
        failed_tries: How many of these it lists; None where it lists none.
    """

    check: Any = None
    tries: Any = None
    round: Any = None
    group: str = ""
    failed: tuple[str, ...] = field(default=(), compare=False)
    failed_tries: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        check, tries, number = (said.get(name) for name in CHECK_FIELDS[:3])
        group, listed = said.get("group"), said.get("failed_tries")
        others = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        failed = tuple(name for one in (said, *others) for name in _failures(one))
        count = len(others) if isinstance(listed, list) else None
        return cls(check, tries, number, group if isinstance(group, str) else "", failed, count)

    @property
    def count(self) -> int:
        return self.tries if isinstance(self.tries, int) else 0


def _failures(said: Mapping[str, Any]) -> list[str]:
    """The checks that a picture has failed; or the reason why there is none."""
    if isinstance(reason := said.get("reason"), str) and not reason.startswith(REASON):
        return [reason]
    checks = said.get("checks")
    found = checks.items() if isinstance(checks, dict) else ()
    return [sys.intern(name) for name, one in found if isinstance(one, dict) and one.get("passed") is False]


def check_mark(key: str, json: bytes, told: Mapping[str, Mark], findings: Findings) -> None:
    """Check that an edit's json says of its tries what the provenance says.

    told: What the provenance says, by key.
    """
    try:
        curation = parse_json_object(json).get("curation")
    except SampleError:  # which is told elsewhere
        return
    if key in told and isinstance(curation, dict) and (mine := Mark.of(curation)) != told[key]:
        findings.add("tries_differ", key, f"its json says {mine}, the provenance {told[key]}")


def check_tries(record: Record, told: Mapping[str, Mark], findings: Findings) -> None:
    """Check that the numbers of a receipt add up, and that they are those of the edits and of the rejected samples.

    told: What the provenance says of each edit, by key.
    """
    notes = record.receipt.get("notes")
    note = notes.get("checks") if isinstance(notes, dict) else None
    checked = [mark for mark in told.values() if mark.check is not None]
    if note is None:
        if checked:
            findings.add("tries_differ", "", f"{len(checked):,} edits say that they were checked, the receipt does not")
        return
    try:
        for problem in problems_of(note):
            findings.add("tries_differ", "", f"the receipt of {record.stage}: {problem}")
        lost = sum(record.receipt["counts"]["failed"].get(reason, 0) for reason in _NO_PICTURE)
        _compare(note, checked, record.rejected, findings, all_are_listed=not lost)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        findings.add("bad_record", "", f"the receipt of {record.stage} has no valid note of checks: {error!r}")


def _compare(
    note: Mapping[str, Any],
    checked: Sequence[Mark],
    rejected: Iterable[Mapping[str, Any]],
    findings: Findings,
    *,
    all_are_listed: bool,
) -> None:
    """all_are_listed: Whether every sample that was tried is among the edits or the rejected ones."""
    found: dict[str, Counter[str]] = {group: Counter() for group in note[GROUPS]}
    failed: dict[str, Counter[str]] = {group: Counter() for group in note[GROUPS]}
    unlisted = {mark.group for mark in checked if mark.failed_tries is None}
    for mark in checked:
        found.setdefault(mark.group, Counter()).update(
            {TRIES: mark.count, KEPT: 1, KEPT_THOUGH_FAILED: int(mark.check != "passed")}
        )
        failed.setdefault(mark.group, Counter()).update(mark.failed)
        if mark.failed_tries is not None and mark.count != mark.failed_tries + 1:
            findings.add("tries_differ", "", f"a sample of {mark.count} tries lists {mark.failed_tries} failed ones")
    for line in rejected:
        given = line.get("group")
        group = given if isinstance(given, str) else ""
        found.setdefault(group, Counter()).update({TRIES: int(line.get("tries", 0)), REJECTED: 1})
        failed.setdefault(group, Counter()).update(_failures(line))
    for group, row in found.items():
        said, whose = note[GROUPS].get(group, {}), f" of the group {group!r}" if group else ""
        for name in (TRIES, KEPT, KEPT_THOUGH_FAILED, REJECTED):
            is_at_least = name == TRIES and not all_are_listed
            if _differs(said.get(name, 0), row[name], is_at_least=is_at_least):
                findings.add("tries_differ", "", f"{name}{whose}: {said.get(name, 0):,}, counted {row[name]:,}")
        by_check = said.get(BY_CHECK, {})
        is_at_least = (
            bool(row[REJECTED]) or group in unlisted or not all_are_listed
        )  # one try of a rejected sample is told
        for name in sorted({*by_check, *failed[group]}):
            if _differs(by_check.get(name, 0), failed[group][name], is_at_least=is_at_least):
                told = f"{by_check.get(name, 0):,}, counted {failed[group][name]:,}"
                findings.add("tries_differ", "", f"tries that failed {name}{whose}: {told}")


def check_caption_tries(record: Record, rows: Path, findings: Findings) -> None:
    """Check that the numbers of a receipt of stage 05 add up, and that they are those of its rows and rejects.

    Args:
        record: The stage's.
        rows: The file with the captions of the shard.
        findings: What is found.

    Raises:
        OSError, ShardError: The rows cannot be read.
    """
    notes = record.receipt.get("notes")
    if not isinstance(notes, dict) or (note := notes.get("checks")) is None:
        return
    try:
        for problem in problems_of_captions(note):
            findings.add("tries_differ", "", f"the receipt of {record.stage}: {problem}")
        found, by_check = _tries_in(rows)
        for line in record.rejected:
            found.update({FAILED_TRIES: int(line["tries"]), REJECTED: 1})
        # Of an image with several captions, what was tried for the rejected ones is not listed.
        has_several = "captions" in notes
        told = [
            (name, note[name], found[name], has_several and name != KEPT) for name in (KEPT, FAILED_TRIES, REJECTED)
        ]
        for name in sorted({*note[BY_CHECK], *by_check}):
            # Nor is how often a rejected caption failed each check.
            is_at_least = has_several or bool(record.rejected)
            told.append((f"that failed {name}", note[BY_CHECK].get(name, 0), by_check[name], is_at_least))
        for name, said, counted, is_at_least in told:
            if _differs(said, counted, is_at_least=is_at_least):
                findings.add("tries_differ", "", f"{record.stage}, captions {name}: {said:,}, counted {counted:,}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        findings.add("bad_record", "", f"the receipt of {record.stage} has no valid note of checks: {error!r}")


def _tries_in(rows: Path) -> tuple[Counter[str], Counter[str]]:
    """The captions in rows that were checked, with the others that failed before them; and how many of these failed
    each check.  Raises OSError, ShardError."""
    found, by_check = Counter[str](), Counter[str]()
    with rows.open("rb") as lines:
        for line in lines:
            row = parse_row(line, str(rows))
            of_names = row.get("captions_tried")
            for tried in of_names.values() if isinstance(of_names, dict) else filter(None, (row.get("tried"),)):
                found.update({KEPT: 1, FAILED_TRIES: tried["failed_captions"]})
                by_check.update(tried["failed_checks"])
    return found, by_check


def _differs(said: int, counted: int, *, is_at_least: bool) -> bool:
    """is_at_least: Whether there may be more than what was counted."""
    return counted > said or (counted < said and not is_at_least)
