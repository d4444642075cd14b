"""Counts the samples of each group from the receipts and the provenance of stages 02 to 04.

It answers three questions: how many samples of a group reached each step; whether the share of one group differs
significantly from that of the others; and whether a prompt mentions the group that it should portray, or another one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

from curation.commands.findings import results_in_order
from curation.commands.places import EDITS, HYBRID, PROMPTS, StagePlace, find_stages, provenance, rejected
from curation.errors import UsageError

# Words that mention a value of an attribute, as regular expressions between word boundaries, for the groups of the
# published pipeline.  A value that is not listed is looked for by its own words.
_PERSON = (
    r"(?: (?!hair|haired|and|suit|dress|shirt)\w+)?[ -](?:man|men|woman|women|boys?|girls?|males?|females?|person"
    r"|people|couple|family|child|children|kids?|lady|ladies|gentlem[ae]n|baby|teenagers?|adults?|model|actor|actress)"
)  # black and white are colours too


WORDS: Mapping[str, Mapping[str, str]] = {
    "gender": {
        "male": r"males?|man|men|boys?|gentlem[ae]n|guys?|father|dad|son|husband|grandfather|king|prince|he|his|him",
        "female": r"females?|wom[ae]n|girls?|lady|ladies|mother|mom|daughter|wife|grandmother|queen|princess|she|hers?",
    },
    "ethnicity": {
        "black": rf"black{_PERSON}|african|african[- ]american|afro\w*",
        "white": rf"white{_PERSON}|caucasian|european",
        "asian": r"asian|east[- ]asian|chinese|japanese|korean|vietnamese|thai|filipin[oa]",
        "latino": r"latin[oax]|latin[- ]american|hispanic|mexican|brazilian|colombian",
        "middle east": r"middle[- ]east(?:ern)?|arab\w*|persian|iranian|turkish",
        "indian": r"indian|south[- ]asian|desi",
    },
}


@lru_cache(maxsize=4096)
def attributes_of(group: str) -> tuple[tuple[str, str], ...]:
    """Returns the (attribute, value) pairs of a group such as "middle east male".

    Words that belong to no known attribute become one value of the attribute "group".
    """
    rest, found = f" {group.lower()} ", []
    for attribute, values in WORDS.items():
        for value in sorted(values, key=len, reverse=True):
            if f" {value} " in rest:
                found.append((attribute, value))
                rest = rest.replace(f" {value} ", " ", 1)
                break
    if words := rest.strip():
        found.append(("group", words))
    return tuple(found)


def mentions(prompt: str, attribute: str, value: str) -> bool:
    """Returns whether the prompt has a word for the value."""
    return _pattern(attribute, value).search(prompt) is not None


def mentions_another(prompt: str, attribute: str, value: str) -> bool:
    """Returns whether the prompt has a word for another known value of the attribute."""
    return any(other != value and mentions(prompt, attribute, other) for other in WORDS.get(attribute, {}))


@lru_cache(maxsize=4096)
def _pattern(attribute: str, value: str) -> re.Pattern[str]:
    words = WORDS.get(attribute, {}).get(value) or re.escape(value)
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)


REPLIED = "reply_"  # the reasons of replies that were refused begin with this
STEPS = ("assigned", "rewritten", "accepted", "generated", "hybrid")
_CHUNK = 64  # shards that a process gets at once


@dataclass(slots=True)
class GroupCounts:
    """The counts of one group.

    steps: step → how many samples reached it; to_generate and to_hybrid are the accepted and the generated samples in
    shards that the next stage has done.  refused: "stage: reason" → samples.
    stated, contradicted: "attribute=value" → prompts that mention it, or that mention another value.
    """

    steps: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    stated: Counter[str] = field(default_factory=Counter)
    contradicted: Counter[str] = field(default_factory=Counter)

    def add(self, other: GroupCounts) -> None:
        for name in ("steps", "refused", "stated", "contradicted"):
            getattr(self, name).update(getattr(other, name))


@dataclass(slots=True)
class Tallies:
    """Counts over many shards.

    groups: name → its counts.  shards: stage → shards that are done.  warnings: what is not counted → times.
    """

    groups: dict[str, GroupCounts] = field(default_factory=dict)
    shards: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tallies) -> None:
        for name, counts in other.groups.items():
            self.groups.setdefault(name, GroupCounts()).add(counts)
        self.shards.update(other.shards)
        self.warnings.update(other.warnings)

    def of(self, group: str) -> GroupCounts:
        return self.groups.setdefault(group, GroupCounts())


def stage_places(root: Path) -> dict[str, StagePlace]:
    """Returns the one place of each stage below a folder.

    Raises:
        UsageError: Stage 02 is missing, or a stage ran on two folders.
    """
    places: dict[str, StagePlace] = {}
    for place in find_stages(root):
        if place.stage in places:
            raise UsageError(
                f"{root}: {place.stage} ran on {places[place.stage].home} and {place.home}; give one of them"
            )
        places[place.stage] = place
    if PROMPTS not in places:
        raise UsageError(f"{root}: there is no {PROMPTS}, which assigns groups")
    return places


def tally(places: Mapping[str, StagePlace], workers: int) -> Tallies:
    """Counts the samples of all shards that stage 02 has done, in ``workers`` processes."""
    ids = sorted(shards_tried(places[PROMPTS]))
    total = Tallies()
    one = partial(tally_shards, dict(places))
    chunks = [ids[begin : begin + _CHUNK] for begin in range(0, len(ids), _CHUNK)]
    for result in results_in_order(one, chunks, min(workers, len(chunks))):
        total.add(result)
    return total


def tally_shards(places: Mapping[str, StagePlace], ids: Iterable[str]) -> Tallies:
    total = Tallies()
    for shard_id in ids:
        _tally_shard(places, shard_id, total)
    return total


def _tally_shard(places: Mapping[str, StagePlace], shard_id: str, total: Tallies) -> None:
    prompts = _receipt(places.get(PROMPTS), shard_id)
    if prompts is None:
        return
    total.shards[PROMPTS] += 1
    noted = prompts.get("notes", {}).get("groups")
    if not isinstance(noted, dict):
        total.warnings[
            f"{PROMPTS}: shards whose receipts do not contain the number of refused samples in each group"
        ] += 1
    else:
        _add_noted(noted, total)
    groups: dict[str, str] = {}
    for line in provenance(places[PROMPTS], shard_id):
        key, group, prompt = str(line.get("key")), line.get("group"), line.get("prompt")
        if not isinstance(group, str) or not isinstance(prompt, str):
            continue
        groups[key] = group
        _add_words(group, prompt, total.of(group))
        if not isinstance(noted, dict):
            total.of(group).steps.update(assigned=1, rewritten=1, accepted=1)
    edits = _receipt(places.get(EDITS), shard_id)
    if edits is None:
        return
    total.shards[EDITS] += 1
    for group in groups.values():
        total.of(group).steps["to_generate"] += 1
    generated = {key for line in provenance(places[EDITS], shard_id) if (key := str(line.get("key"))) in groups}
    for key in generated:
        total.of(groups[key]).steps["generated"] += 1
    for line in rejected(places[EDITS], shard_id):
        if (key := str(line.get("key"))) in groups:
            total.of(groups[key]).refused[f"{EDITS}: {line.get('reason')}"] += 1
    hybrid = _receipt(places.get(HYBRID), shard_id)
    if hybrid is None:
        return
    total.shards[HYBRID] += 1
    lost = {str(line.get("key")) for line in rejected(places[HYBRID], shard_id)}
    for key in generated:
        total.of(groups[key]).steps["to_hybrid"] += 1
    for key in generated - lost:
        total.of(groups[key]).steps["hybrid"] += 1
    edited = hybrid.get("notes", {}).get("edited")
    if edited != len(generated - lost):
        total.warnings[
            f"{HYBRID}: shards in which the number of edits differs from the number of generated images"
        ] += 1


def _add_noted(noted: Mapping[str, Any], total: Tallies) -> None:
    for group, reasons in noted.items():
        if not isinstance(reasons, dict):
            continue
        counts = total.of(str(group))
        for reason, number in reasons.items():
            if type(number) is not int or number < 0:
                continue
            if reason in ("assigned", "accepted"):
                counts.steps[reason] += number
            else:
                counts.refused[f"{PROMPTS}: {reason}"] += number
            if reason == "accepted" or reason.startswith(REPLIED):
                counts.steps["rewritten"] += number


def _add_words(group: str, prompt: str, counts: GroupCounts) -> None:
    for attribute, value in attributes_of(group):
        name = f"{attribute}={value}"
        counts.stated[name] += mentions(prompt, attribute, value)
        counts.contradicted[name] += mentions_another(prompt, attribute, value)


def _receipt(place: StagePlace | None, shard_id: str) -> dict[str, Any] | None:
    """The receipt of a shard, with its notes, if the shard is done."""
    receipt = place.done_receipt(shard_id) if place is not None else None
    return receipt if receipt is not None and isinstance(receipt.get("notes"), dict) else None


def shards_tried(place: StagePlace) -> Iterator[str]:
    """Yields the ids of the shards that have a receipt, whatever it says."""
    for path in place.receipts.glob("[!_.]*/*.json"):
        if not path.name.startswith("."):
            yield path.stem


CONFIDENCE = 0.95
MIN_COMPARED = 20  # samples on each side of a comparison; fewer give no verdict


@dataclass(frozen=True, slots=True)
class Difference:
    """The share in one group minus the share in the others, with its confidence interval."""

    share: float
    others: float
    low: float
    high: float

    compared: bool = True
    """Whether both sides have ``MIN_COMPARED`` samples.  The interval of a single sample can exclude 0 as well."""

    @property
    def value(self) -> float:
        return self.share - self.others

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval excludes 0, of samples that are enough to be compared."""
        return self.compared and (self.low > 0 or self.high < 0)


def wilson(hits: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the confidence interval of a share: E. B. Wilson, JASA 22 (1927).

    It is (0, 1) where nothing was counted.
    """
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def difference(hits: int, count: int, other_hits: int, other_count: int, comparisons: int = 1) -> Difference | None:
    """Compares two shares by Newcombe's hybrid score interval (Statistics in Medicine 17 (1998), method 10).

    Args:
        hits, count: Of the group.
        other_hits, other_count: Of all other groups.
        comparisons: How many are made together: 95 % holds for all of them (Bonferroni).

    Returns:
        The difference, or None where one side has no sample.
    """
    if not count or not other_count:
        return None
    level = 1 - (1 - CONFIDENCE) / max(1, comparisons)
    share, others = hits / count, other_hits / other_count
    low, high = wilson(hits, count, level)
    other_low, other_high = wilson(other_hits, other_count, level)
    below = math.hypot(share - low, other_high - others)
    above = math.hypot(high - share, others - other_low)
    enough = min(count, other_count) >= MIN_COMPARED
    return Difference(share, others, share - others - below, share - others + above, enough)
