"""Counts the tries of a shard's samples, per check and per group, for its receipt; and checks such counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TRIES, KEPT, FAILED_TRIES, KEPT_THOUGH_FAILED, REJECTED, BY_CHECK, GROUPS = (
    "tries", "kept", "failed_tries", "kept_though_failed", "rejected", "by_check", "groups",
)  # fmt: skip
REASON = "check_"  # in front of a check's name: why a sample was left out
_NUMBERS = (TRIES, KEPT, FAILED_TRIES, KEPT_THOUGH_FAILED, REJECTED)


class TryCounts:
    """What a receipt's note ``checks`` says.

    Every try is either kept or a failed one, so that ``tries`` = ``kept`` + ``failed_tries`` in every row.  A picture
    that is kept although it failed is one of ``kept``, and is counted in ``kept_though_failed`` as well.  ``by_check``
    counts for each check the pictures that failed it, those that are kept although they failed among them; a picture
    without pixels to judge counts under the reason for that.  ``rejected`` counts samples.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = {}
        self._by_check: dict[str, Counter[str]] = {}

    def add(
        self,
        group: str | None,
        kept: Sequence[str] | None,
        failed: Sequence[Sequence[str]],
        *,
        rejected: bool = False,
    ) -> None:
        """Count one sample.

        Args:
            group: The group that it portrays; None for none.
            kept: What the picture that is kept has failed; empty for nothing.  None: no picture is kept.
            failed: What each of the other pictures has failed.
            rejected: Whether the sample is left out because all its pictures failed.
        """
        row = self._rows.setdefault(group or "", Counter())
        row[KEPT] += kept is not None
        row[KEPT_THOUGH_FAILED] += bool(kept)
        row[FAILED_TRIES] += len(failed)
        row[REJECTED] += rejected
        row[TRIES] += (kept is not None) + len(failed)
        by_check = self._by_check.setdefault(group or "", Counter())
        for failures in (kept or (), *failed):
            by_check.update(failures)

    def note(self) -> dict[str, Any]:
        """The value for the receipt."""
        groups = {group: _row(self._rows[group], self._by_check[group]) for group in sorted(self._rows)}
        whole: Counter[str] = Counter()
        by_check: Counter[str] = Counter()
        for group in groups:
            whole.update(self._rows[group])
            by_check.update(self._by_check[group])
        return {**_row(whole, by_check), GROUPS: groups}


def _row(numbers: Mapping[str, int], by_check: Mapping[str, int]) -> dict[str, Any]:
    return {**{name: numbers.get(name, 0) for name in _NUMBERS}, BY_CHECK: dict(sorted(by_check.items()))}


def problems_of(note: Mapping[str, Any]) -> Iterator[str]:
    """What does not add up in a receipt's note ``checks``.

    Raises:
        KeyError, TypeError, AttributeError: It is no such note.
    """
    groups = note[GROUPS]
    for name, row in (("", note), *groups.items()):
        where = f"of the group {name!r} " if row is not note else ""
        yield from _problems_of_row(row, row[KEPT_THOUGH_FAILED], "pictures", where)
    for name in _NUMBERS:
        if note[name] != (total := sum(row[name] for row in groups.values())):
            yield f"{name} is {note[name]:,}, and {total:,} over all groups"


def problems_of_captions(note: Mapping[str, Any]) -> Iterator[str]:
    """The same of a stage whose tries are captions: they have no groups, and none is kept though it failed.

    Raises:
        KeyError, TypeError, AttributeError: It is no such note.
    """
    yield from _problems_of_row(note, 0, "captions")
    if note[REJECTED] > note[FAILED_TRIES]:
        yield f"{note[REJECTED]:,} captions were rejected, of {note[FAILED_TRIES]:,} that failed"


def _problems_of_row(row: Mapping[str, Any], though: int, what: str, where: str = "") -> Iterator[str]:
    """though: how many were kept though they failed."""
    if row[TRIES] != row[KEPT] + row[FAILED_TRIES]:
        yield f"{row[TRIES]:,} tries {where}are not {row[KEPT]:,} kept + {row[FAILED_TRIES]:,} failed"
    if though > row[KEPT]:
        yield f"{though:,} {what} {where}were kept though they failed, of {row[KEPT]:,} kept"
    bad, found = row[FAILED_TRIES] + though, row[BY_CHECK].values()
    if not max(found, default=0) <= bad <= sum(found):
        yield f"{bad:,} {what} {where}failed, but the checks failed {dict(row[BY_CHECK])}"


def as_sums(note: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of a note that a run adds up over its shards, each under a name of its own."""
    return {
        **{f"checks.{name}": note[name] for name in _NUMBERS},
        **{f"checks.{BY_CHECK}.{name}": count for name, count in note[BY_CHECK].items()},
    }


def in_words(sums: Mapping[str, int]) -> str:
    """What came of the tries of a run, for its last line.

    sums: Those of ``as_sums``; others are not looked at.
    """
    if not sums.get(f"checks.{TRIES}"):
        return ""
    start = f"checks.{BY_CHECK}."
    found = sorted(
        ((count, name[len(start) :]) for name, count in sums.items() if name.startswith(start)), reverse=True
    )
    why = ", ".join(f"{count:,} {name}" for count, name in found if count)
    number = {name: sums.get(f"checks.{name}", 0) for name in _NUMBERS}
    though = f", {number[KEPT_THOUGH_FAILED]:,} of them though they failed" if number[KEPT_THOUGH_FAILED] else ""
    parts = [f"{number[TRIES]:,} tries: {number[KEPT]:,} kept{though}", f"{number[FAILED_TRIES]:,} failed and not kept"]
    if number[REJECTED]:
        parts.append(f"{number[REJECTED]:,} samples rejected")
    return "; ".join(parts) + (f" (failed checks: {why})" if why else "")
