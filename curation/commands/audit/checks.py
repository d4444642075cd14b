"""What stage 03's checks said of the pictures of each group, counted from its receipts and provenance.

A **try** is a picture that was made for a sample: it is kept, or it failed.  A sample is **kept though failed** where
no try passed and the best one was taken, and **rejected** where none was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from curation.check.counts import problems_of
from curation.commands.audit.intervals import CONFIDENCE, Moments, difference, loss_result, share_result
from curation.commands.audit.words import cell, key_told, points, share_text
from curation.commands.places import EDITS
from curation.jsonio import clean_text
from curation.rewrite.groups import MAX_GROUPS
from curation.run.ledger import recorded_options

ORDER: Final = ("face", "prompt", "group", "safety")
SUMS: Final = ("tries", "kept", "failed_tries", "kept_though_failed", "rejected")
BECAME: Final = ("original", "dropped")
SCORES: Mapping[str, tuple[str, ...]] = {
    "face": ("faces", "largest"),
    "prompt": ("score",),
    "group": ("probability",),
    "safety": ("nsfw",),
}
WORST: Final = 12  # pictures of a group that are named
BINS_A_UNIT: Final = 100  # of the prompt scores
NO_GROUP = "(no group)"
MAX_NAMES: Final = 60  # different names that one group's pictures may bring: of checks, and of groups that were seen
_COUNTED: Final = ("samples", "tries", "kept", "rejected", *BECAME)
_MAX_NAME, _MAX_GROUP, _MAX_PROMPT, _MAX_KEY = 80, 1000, 400, 1000

# The losses that only checks cause: name → (the count before, the lost ones, the words for a lost sample).
LOSSES: Mapping[str, tuple[str, str, str]] = {
    "first_try": ("samples", "first_failed", "got a first picture that failed a check"),
    "kept_though_failed": ("kept", "kept_though_failed", "have a picture that failed a check"),
}


@dataclass(frozen=True, slots=True, order=True)
class WorstPicture:
    """A kept picture; the worst is the least.

    rank: of the picture among those of its group: how many checks it failed, negated, and then its score.
    scores: check → what it measured, with whether it passed.
    """

    rank: tuple[float, float]
    shard: str
    key: str
    prompt: str = field(compare=False)
    tries: int = field(compare=False)
    passed: bool = field(compare=False)
    scores: Mapping[str, Mapping[str, Any]] = field(compare=False)


@dataclass(slots=True)
class CheckCounts:
    """What the checks said of one group.

    Attributes:
        sums: The counts of ``SUMS``, which the receipts hold; first_failed: samples whose first picture failed;
            original, dropped: rejected samples that stage 04 left as the original photo, or left out.
        by_check: Check → tries that failed it.
        judged, failed: Check → kept pictures that it judged, and those of them that failed it.
        seen: Group → kept pictures in which the group check sees it in place of the one that was asked for; where it
            sees that one, they are ``sums["agreed"]``.
        scores: ``check.score`` → its moments over the kept pictures.
        bins: A hundredth of the prompt score → kept pictures.
        worst: Of the kept pictures, the worst first; a few more than ``WORST`` while they are counted.
    """

    sums: Counter[str] = field(default_factory=Counter)
    by_check: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Moments] = field(default_factory=dict)
    bins: Counter[int] = field(default_factory=Counter)
    worst: list[WorstPicture] = field(default_factory=list)

    def add(self, other: CheckCounts) -> None:
        self.sums.update(other.sums)
        for name in ("by_check", "judged", "failed", "seen"):
            mine: Counter[str] = getattr(self, name)
            for key, number in getattr(other, name).items():
                _count(mine, key, number)
        self.bins.update(other.bins)
        for score, moments in other.scores.items():
            self.scores.setdefault(score, Moments()).update(moments)
        self.worst = sorted([*self.worst, *other.worst])[:WORST]

    def add_noted(self, row: Mapping[str, Any]) -> None:
        """Adds a group's row of a receipt."""
        numbers = {name: natural(row.get(name)) for name in SUMS}
        self.sums.update({name: number for name, number in numbers.items() if number})
        by_check = row.get("by_check")
        for name, number in by_check.items() if isinstance(by_check, dict) else ():
            _count(self.by_check, short(name), natural(number))

    def add_rejected(self, became: str, number: Any) -> None:
        """Adds rejected samples of a receipt of stage 04.  became: one of ``BECAME``."""
        self.sums[became] += natural(number)

    def add_picture(self, shard_id: str, line: Mapping[str, Any], asked: str) -> bool:
        """Adds a kept picture, as its line of the provenance describes it.  Returns whether a check judged it.

        asked: the group that it should show; "" for none.
        """
        if line.get("check") not in ("passed", "failed"):
            return False
        passed = line["check"] == "passed"
        self.sums["first_failed"] += not passed or natural(line.get("round")) > 0
        checks = said if isinstance(said := line.get("checks"), dict) else {}
        verdicts = {short(name): said for name, said in checks.items() if isinstance(said, dict)}
        for name, said in verdicts.items():
            if isinstance(said.get("passed"), bool):
                _count(self.judged, name, 1)
                _count(self.failed, name, int(not said["passed"]))
            for score in SCORES.get(name, ()):
                if (value := number_of(said.get(score))) is not None:
                    self.scores.setdefault(f"{name}.{score}", Moments()).add(value)
        if (likeness := _score(verdicts, "prompt", "score")) is not None:
            self.bins[math.floor(max(-10.0, min(10.0, likeness)) * BINS_A_UNIT + 1e-9)] += 1
        if (seen := seen_in(line)) is not None:
            if asked and seen == group_name(asked):
                self.sums["agreed"] += 1
            else:
                _count(self.seen, seen, 1)
        self._keep_if_bad(shard_id, line, verdicts, passed)
        return True

    def _keep_if_bad(
        self, shard_id: str, line: Mapping[str, Any], verdicts: Mapping[str, Mapping[str, Any]], passed: bool
    ) -> None:
        """Failed checks first, then the lowest prompt score, or where there is none the lowest probability."""
        fails = sum(said.get("passed") is False for said in verdicts.values())
        score = _score(verdicts, "prompt", "score")
        score = _score(verdicts, "group", "probability") if score is None else score
        rank = (-float(max(fails, not passed)), math.inf if score is None else score)
        key = str(line.get("key"))[:_MAX_KEY]
        if len(self.worst) >= WORST and (rank, shard_id, key) >= (self.worst[-1].rank, *_place(self.worst[-1])):
            return
        told = {
            name: {"passed": said.get("passed") if isinstance(said.get("passed"), bool) else None, **_told(name, said)}
            for name, said in sorted(verdicts.items(), key=lambda item: in_order(item[0]))[:MAX_NAMES]
        }
        prompt = line.get("prompt") if isinstance(line.get("prompt"), str) else ""
        one = WorstPicture(rank, shard_id, key, str(prompt)[:_MAX_PROMPT], natural(line.get("tries")), passed, told)
        self.worst = sorted([*self.worst, one])[:WORST]


def _place(one: WorstPicture) -> tuple[str, str]:
    return one.shard, one.key


def _told(name: str, said: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        score: value for score in SCORES.get(name, ()) if (value := number_of(said.get(score))) is not None
    }
    if name == "group" and isinstance(said.get("seen"), str):
        found["seen"] = short(said["seen"])
    return found


def _count(counts: Counter[str], name: str, number: int, most: int = MAX_NAMES) -> None:
    """Counts a name; where data bring too many different ones, those after the first are counted together."""
    counts[name if name in counts or len(counts) < most else "(others)"] += number


def add_seen(seen_in_all: Counter[str], name: str, number: int = 1) -> None:
    """Counts a kept picture, of whichever group, in which the group check sees a group.  All that a run can ask for
    have room."""
    _count(seen_in_all, name, number, MAX_GROUPS)


def seen_in(line: Mapping[str, Any]) -> str | None:
    """Returns the group that the group check sees in a kept picture; None where it judged none.  line: as above."""
    checks = line.get("checks")
    said = checks.get("group") if isinstance(checks, dict) else None
    seen = said.get("seen") if isinstance(said, dict) else None
    return group_name(seen) if isinstance(seen, str) else None


def group_name(name: str) -> str:
    """A group's name from the data as one line, whole: names of many attributes are long, and differ at their ends."""
    return clean_text(name[: 4 * _MAX_GROUP])[:_MAX_GROUP]


def short(name: object) -> str:
    """A name from the data as one short line."""
    return clean_text(str(name)[: 4 * _MAX_NAME])[:_MAX_NAME]


def in_order(name: str) -> tuple[int, str]:
    """What names of checks are sorted by: the order in which a sample is rejected, and then the name."""
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def natural(value: Any) -> int:
    """A count of the data; 0 for what is none."""
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def number_of(value: Any) -> float | None:
    """A finite number of the data, which bool is not; else None."""
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e12:
        return None
    return float(value)


def _score(verdicts: Mapping[str, Mapping[str, Any]], name: str, score: str) -> float | None:
    return number_of(verdicts.get(name, {}).get(score))


def adds_up(noted: Mapping[str, Any]) -> bool:
    """Whether the sums of a receipt's note are right."""
    try:
        return not any(problems_of(noted))
    except (KeyError, TypeError, AttributeError):
        return False


def rejected_groups(noted: Any) -> Iterator[tuple[str, str, Any]]:
    """Yields (what stage 04 made of them, group, number) of rejected samples, by a receipt's note."""
    for became in BECAME:
        groups = noted.get(became) if isinstance(noted, dict) else None
        for group, number in groups.items() if isinstance(groups, dict) else ():
            yield became, str(group), number


def noted_groups(noted: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the rows of a receipt's note, group by group."""
    groups = noted.get("groups")
    for group, row in groups.items() if isinstance(groups, dict) else ():
        if isinstance(row, dict):
            yield str(group), row


def check_options(edits: Path) -> dict[str, str]:
    """The checks with their models and thresholds, and the options of tries, that stage 03 has recorded last.

    edits: its output folder.
    """
    recorded = recorded_options(edits, EDITS) or {}
    record = recorded.get("checks")
    options: dict[str, Any] = dict(record) if isinstance(record, dict) else {}
    options |= {name: recorded[name] for name in ("tries", "on_check_failure") if recorded.get(name) is not None}
    return {short(name): _one_line(value) for name, value in list(options.items())[:MAX_NAMES]}


def _one_line(value: Any) -> str:
    """A recorded option in a few words: ``detector centerface, min_face 0.05``."""
    if isinstance(value, dict):
        return ", ".join(f"{short(name)} {_one_line(one)}" for name, one in list(value.items())[:MAX_NAMES])[:400]
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return clean_text(text[:2000])[:200]


# ---- as JSON


def as_result(
    counts: Mapping[str, CheckCounts],
    seen_in_all: Mapping[str, int],
    shards: int,
    done: int,
    options: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Returns what the checks said as a JSON value, None where no shard was checked.

    Args:
        counts: Group → its counts.
        seen_in_all: Group → kept pictures, of any group, in which the group check sees it.
        shards: How many shards were checked.
        done: How many stage 03 has done.
        options: Those of the checks, as stage 03 recorded them.
    """
    if not shards:
        return None
    everyone = CheckCounts()
    for of_group in counts.values():
        _add_samples(of_group)
        everyone.add(of_group)
    lost = {loss: sum(_lost(one, loss)[0] for one in counts.values()) for loss in LOSSES}
    groups = [
        _group_result(name, counts[name], everyone, lost, len(counts))
        | {"seen_in_all": seen_in_all.get(group_name(name), 0)}
        for name in sorted(counts)
    ]
    bins = {str(number / BINS_A_UNIT): everyone.bins[number] for number in sorted(everyone.bins)}
    return {
        "shards": shards,
        "of": done,
        "options": dict(options),
        "all": _sums(everyone) | {"by_check": _by_check(everyone), "kept_pictures": _kept(everyone)},
        "groups": groups,
        "scores": _scores(everyone),
        "prompt_scores": bins,
    }


def _add_samples(counts: CheckCounts) -> None:
    """Samples that got a picture or were rejected.  The first picture of a rejected one has failed as well."""
    counts.sums["samples"] = counts.sums["kept"] + counts.sums["rejected"]
    counts.sums["first_failed"] += counts.sums["rejected"]


def _sums(counts: CheckCounts) -> dict[str, int]:
    return {name: counts.sums[name] for name in ("samples", *SUMS, *BECAME, "first_failed")}


def _lost(counts: CheckCounts, loss: str) -> tuple[int, int]:
    """How many samples a group lost in this way, and of how many."""
    of, lost, _ = LOSSES[loss]
    return min(counts.sums[lost], counts.sums[of]), counts.sums[of]


def _group_result(
    name: str, mine: CheckCounts, all_: CheckCounts, all_lost: Mapping[str, int], groups: int
) -> dict[str, Any]:
    """all_, all_lost: the sums of all groups.  groups: how many there are."""
    losses = {}
    for loss, (of, _, _) in LOSSES.items():
        hits, count = _lost(mine, loss)
        found = difference(hits, count, all_lost[loss] - hits, all_.sums[of] - count, groups * len(LOSSES))
        losses[loss] = loss_result(hits, count, found)
    agreed = mine.sums["agreed"]
    judged = agreed + mine.seen.total() if name else 0
    seen = mine.seen | (Counter({group_name(name): agreed}) if agreed else Counter())
    return {
        "group": clean_text(name) or NO_GROUP,
        **_sums(mine),
        "losses": losses,
        "by_check": _by_check(mine),
        "kept_pictures": _kept(mine),
        "asked": judged,
        "agreed": share_result(agreed, judged),
        "seen": dict(seen.most_common()),
        "scores": _scores(mine),
        "worst": [
            {
                "shard": clean_text(one.shard),
                "key": key_told(one.key),
                "prompt": clean_text(one.prompt),
                "tries": one.tries,
                "passed": one.passed,
                "checks": one.scores,
            }
            for one in mine.worst
        ],
    }


def _by_check(counts: CheckCounts) -> dict[str, Any]:
    """Check → the share of all tries that failed it."""
    tries = counts.sums["tries"]
    return {
        name: share_result(min(counts.by_check[name], tries), tries) for name in sorted(counts.by_check, key=in_order)
    }


def _kept(counts: CheckCounts) -> dict[str, Any]:
    """Check → the share of the kept pictures that it judged which failed it."""
    return {
        name: share_result(counts.failed[name], counts.judged[name]) for name in sorted(counts.judged, key=in_order)
    }


def _scores(counts: CheckCounts) -> dict[str, Any]:
    found = {}
    for name in sorted(counts.scores, key=lambda score: in_order(score.partition(".")[0])):
        moments = counts.scores[name]
        low, high = moments.interval() or (None, None)
        found[name] = {"count": moments.count, "mean": moments.mean, "low": low, "high": high}
    return found


# ---- as Markdown


def as_markdown(checks: Mapping[str, Any] | None) -> Iterator[str]:
    """The tables about checks, or the line that says that there were none."""
    yield ""
    yield "### Checks of the pictures"
    yield ""
    if checks is None:
        yield "Not checked: stage 03 made these pictures without `--check`."
        return
    if checks["shards"] < checks["of"]:
        yield f"Only {checks['shards']:,} of {checks['of']:,} shards were checked."
        yield ""
    if checks["options"]:
        yield "; ".join(f"{cell(name)}: {cell(value)}" for name, value in checks["options"].items()) + "."
        yield ""
    names = "samples | tries | kept | rejected | of these the original photo | of these left out"
    yield f"| group | {names} | first picture failed | kept though failed |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for group in checks["groups"]:
        counts = " | ".join(f"{group[name]:,}" for name in _COUNTED)
        losses = " | ".join(share_text(group["losses"][name]) for name in LOSSES)
        yield f"| {cell(group['group'])} | {counts} | {losses} |"
    all_ = " | ".join(f"{checks['all'][name]:,}" for name in _COUNTED)
    yield f"| all | {all_} | | |"
    yield ""
    if found := list(findings(checks)):
        yield from found
        yield ""
    yield from _checks_as_markdown(checks)
    yield from _seen_as_markdown(checks)
    yield from _scores_as_markdown(checks)


def _checks_as_markdown(checks: Mapping[str, Any]) -> Iterator[str]:
    names = sorted({*checks["all"]["by_check"], *checks["all"]["kept_pictures"]}, key=in_order)
    if not checks["all"]["by_check"]:
        yield "No try failed a check."
        return
    yield "Tries that failed each check.  Tries of one sample are alike, so that the true intervals are wider:"
    yield ""
    yield "| group | tries | " + " | ".join(map(cell, names)) + " |"
    yield "|---|---:|" + "---:|" * len(names)
    for row in (*checks["groups"], {"group": "all", **checks["all"]}):
        failed = (row["by_check"].get(name) or share_result(0, row["tries"]) for name in names)
        shares = " | ".join(map(share_text, failed))
        yield f"| {cell(row['group'])} | {row['tries']:,} | {shares} |"


def _seen_as_markdown(checks: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    groups = [group for group in checks["groups"] if group["asked"]]
    if not groups:
        yield "Which group the pictures show was not measured: the check `group` judged none."
        return
    yield "Which group the check `group` sees in the kept pictures.  It is a classifier with a bias of its own:"
    yield ""
    yield "| group | pictures asked for | pictures that show it | seen as asked | most often seen instead |"
    yield "|---|---:|---:|---:|---|"
    for group in groups:
        others = ", ".join(f"{cell(name)} {number:,}" for name, number in instead(group, 2)) or "-"
        agreed = share_text(group["agreed"])
        yield f"| {cell(group['group'])} | {group['asked']:,} | {group['seen_in_all']:,} | {agreed} | {others} |"


def instead(group: Mapping[str, Any], most: int) -> list[tuple[str, int]]:
    """Returns the groups that the check sees most often where it does not see the one that was asked for."""
    return [(name, number) for name, number in group["seen"].items() if name != group_name(group["group"])][:most]


def _scores_as_markdown(checks: Mapping[str, Any]) -> Iterator[str]:
    names = list(checks["scores"])
    if not names:
        return
    yield ""
    yield f"Means of the kept pictures' scores, with their {CONFIDENCE:.0%} intervals:"
    yield ""
    yield "| group | " + " | ".join(map(cell, names)) + " |"
    yield "|---|" + "---:|" * len(names)
    for row in (*checks["groups"], {"group": "all", **checks}):
        yield f"| {cell(row['group'])} | " + " | ".join(mean_text(row["scores"].get(name)) for name in names) + " |"


def mean_text(score: Mapping[str, Any] | None) -> str:
    """A mean with its interval; a dash where nothing was measured."""
    if score is None or score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f}" + (
        f" ({score['low']:.3f} to {score['high']:.3f})" if score["low"] is not None else ""
    )


def findings(checks: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about each significant difference."""
    for group in checks["groups"]:
        for name, loss in group["losses"].items():
            if loss["beyond_chance"]:
                yield f"- **{cell(group['group'])}**: {points(loss, LOSSES[name][2])}"
