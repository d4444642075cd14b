"""Counts the samples of each group from the receipts and the provenance of stages 02 to 04.

It answers three questions: how many samples of a group reached each step; what the checks of stage 03 said of its
pictures; and whether a prompt mentions the group that it should portray, or another one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from curation import PROGRAM
from curation.check.counts import REASON
from curation.commands.audit.checks import (
    CheckCounts,
    add_seen,
    adds_up,
    natural,
    noted_groups,
    rejected_groups,
    seen_in,
)
from curation.commands.findings import results_in_order
from curation.commands.places import (
    EDITS,
    HYBRID,
    INDEX,
    PROMPTS,
    StagePlace,
    chosen_by,
    find_stages,
    of_the_main_job,
    provenance,
    rejected,
)
from curation.errors import UsageError
from curation.rewrite.groups import attributes_of
from curation.shards import id_of_record

FLAGS = {PROMPTS: "prompts", EDITS: "edits", HYBRID: "hybrid"}  # stage → the option that names its output folder

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


def mentions(prompt: str, attribute: str, value: str) -> bool:
    """Returns whether the prompt has a word for the value."""
    return _pattern(attribute, value).search(prompt) is not None


def mentions_another(prompt: str, attribute: str, value: str) -> bool:
    """Returns whether the prompt has a word for another known value of the attribute."""
    return any(other != value and mentions(prompt, attribute, other) for other in WORDS.get(attribute, {}))


@lru_cache(maxsize=1 << 14)
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
    shards that the next stage has done, to_check those of to_generate in shards that were checked, and not_rejected
    those of them that no check rejected.  refused: "stage: reason" → samples.
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

    groups: name → its counts.  checks: the same of what checks said; "" for samples without a group.
    seen: group → kept pictures, of any group, in which the group check sees it.
    shards: stage → shards that are done.  checked: how many of stage 03's were checked.  pictures: those that stage 03
    made and stage 04 has not left out.  edited: samples that stage 04 replaces.  warnings: what is not counted → times.
    """

    groups: dict[str, GroupCounts] = field(default_factory=dict)
    checks: dict[str, CheckCounts] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    pictures: int = 0
    edited: int = 0
    shards: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tallies) -> None:
        for name, counts in other.groups.items():
            self.groups.setdefault(name, GroupCounts()).add(counts)
        for name, said in other.checks.items():
            self.checks.setdefault(name, CheckCounts()).add(said)
        for name, number in other.seen.items():
            add_seen(self.seen, name, number)
        self.checked += other.checked
        self.pictures += other.pictures
        self.edited += other.edited
        self.shards.update(other.shards)
        self.warnings.update(other.warnings)

    def of(self, group: str) -> GroupCounts:
        return self.groups.setdefault(group, GroupCounts())


def stage_places(root: Path, named: Mapping[str, Path | None] = MappingProxyType({})) -> dict[str, StagePlace]:
    """Returns the one place of each of stages 02 to 04 below a folder.

    Args:
        root: The folder of the dataset.
        named: By the option of ``audit`` that names one (``FLAGS``): a stage's output folder.

    Raises:
        UsageError: Stage 02 is missing, one of the stages ran on two folders, or has not run on the one that is named.
    """
    found = of_the_main_job(find_stages(root))
    places: dict[str, StagePlace] = {}
    for stage, flag in FLAGS.items():
        if folder := named.get(flag):
            places[stage] = place_named(stage, folder)
            continue
        mine = [place for place in found if place.stage == stage]
        if len(mine) > 1:
            homes = " and ".join(str(place.home) for place in mine)
            commands = f"{PROGRAM} audit" + (f" or {PROGRAM} report" if stage == HYBRID else "")
            raise UsageError(f"{root}: {stage} ran on {homes}; name one of them with --{flag} of {commands}")
        if mine:
            places[stage] = mine[0]
    if PROMPTS not in places:
        raise UsageError(
            f"{root}: there is no {PROMPTS}, which assigns groups, in it; give the folder of the whole dataset, or the "
            "stage's own folder with --prompts"
        )
    return places


def place_named(stage: str, folder: Path) -> StagePlace:
    """Returns the one place of a stage in the folder that an option of ``FLAGS`` names.

    Raises:
        UsageError: The stage has not run there, or ran on several folders in it.
    """
    mine = [place for place in find_stages(folder) if place.stage == stage]
    if len(mine) == 1:
        return mine[0]
    if not mine:
        raise UsageError(f"--{FLAGS[stage]} {folder}: {stage} has not run here")
    homes = " and ".join(str(place.home) for place in mine)
    raise UsageError(f"--{FLAGS[stage]} {folder}: {stage} ran on {homes}; name one of them")


def tally(places: Mapping[str, StagePlace], workers: int) -> Tallies:
    """Counts the samples of all shards that stage 02 has done, in ``workers`` processes."""
    ids = sorted(shards_tried(places[PROMPTS]))
    total = Tallies()
    chosen = {HYBRID: chosen_by(places[HYBRID])} if HYBRID in places else {}
    one = partial(tally_shards, {**places, **chosen})
    chunks = [ids[begin : begin + _CHUNK] for begin in range(0, len(ids), _CHUNK)]
    for result in results_in_order(one, chunks, min(workers, len(chunks))):
        total.add(result)
    if chosen and chosen[HYBRID].stage == INDEX and (written := _written(places[HYBRID])) < total.edited:
        total.warnings[f"{HYBRID}: replaced samples whose shards of the new size are not written yet"] += (
            total.edited - written
        )
    return total


def _written(hybrid: StagePlace) -> int:
    """How many replaced samples the hybrid shards hold that are done."""
    receipts = (_receipt(hybrid, shard_id) for shard_id in shards_tried(hybrid))
    return sum(natural(receipt["notes"].get("edited")) for receipt in receipts if receipt is not None)


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
    pictures = _tally_pictures(places[EDITS], shard_id, edits, groups, total)
    _warn_if_older(edits, prompts, EDITS, PROMPTS, total)
    total.pictures += len(pictures)
    generated = pictures & groups.keys()
    for key in generated:
        total.of(groups[key]).steps["generated"] += 1
    for line in rejected(places[EDITS], shard_id):
        if (key := str(line.get("key"))) in groups:
            total.of(groups[key]).refused[f"{EDITS}: {line.get('reason')}"] += 1
    hybrid = _receipt(places.get(HYBRID), shard_id)
    if hybrid is None:
        return
    total.shards[HYBRID] += 1
    for became, group, number in rejected_groups(hybrid["notes"].get("check_rejected")):
        total.checks.setdefault(group, CheckCounts()).add_rejected(became, number)
    lost = {str(line.get("key")) for line in rejected(places[HYBRID], shard_id)}
    for key in generated:
        total.of(groups[key]).steps["to_hybrid"] += 1
    for key in generated - lost:
        total.of(groups[key]).steps["hybrid"] += 1
    _warn_if_older(hybrid, edits, HYBRID, EDITS, total)
    total.pictures -= len(pictures & lost)
    edited = hybrid["notes"].get("edited")
    total.edited += natural(edited)
    if edited != len(pictures - lost):
        total.warnings[
            f"{HYBRID}: shards in which the number of edits differs from the number of generated images"
        ] += 1


def _tally_pictures(
    place: StagePlace, shard_id: str, receipt: Mapping[str, Any], groups: Mapping[str, str], total: Tallies
) -> set[str]:
    """Counts what the checks said of a shard's pictures.  Returns the keys of all of them."""
    noted = receipt["notes"].get("checks")
    checked = isinstance(noted, dict)
    total.checked += checked
    pictures = set()
    for line in provenance(place, shard_id):
        pictures.add(key := str(line.get("key")))
        if checked:
            asked = groups.get(key, line.get("group"))
            group = asked if isinstance(asked, str) else ""
            if total.checks.setdefault(group, CheckCounts()).add_picture(shard_id, line, group) and (
                seen := seen_in(line)
            ):
                add_seen(total.seen, seen)
    if not checked:
        return pictures
    if not adds_up(noted):
        total.warnings[f"{EDITS}: shards whose numbers of tries do not add up; curation verify names them"] += 1
    for group, row in noted_groups(noted):
        total.checks.setdefault(group, CheckCounts()).add_noted(row)
    refused = {str(line.get("key")) for line in rejected(place, shard_id) if _by_check(line)}
    for key, group in groups.items():
        total.of(group).steps.update(to_check=1, not_rejected=int(key not in refused))
    return pictures


def _warn_if_older(
    receipt: Mapping[str, Any], upstream: Mapping[str, Any], stage: str, of: str, total: Tallies
) -> None:
    if is_older(receipt, upstream):
        total.warnings[f"{stage}: shards that were done before {of} did them again; run {stage} again"] += 1


def is_older(receipt: Mapping[str, Any], upstream: Mapping[str, Any]) -> bool:
    """Returns whether a stage was done with a shard before the stage that made its input did that shard again.

    It was not if its receipt names the outputs that are there now.  Where it has no digest of them, the times decide.
    """
    read = {record.get("digest") for record in _records(receipt, "inputs")}
    made = [record.get("digest") for record in _records(upstream, "outputs") if not str(record["path"]).startswith("_")]
    if made and all(digest is not None and digest in read for digest in made):
        return False
    then, now = receipt.get("finished"), upstream.get("finished")
    return isinstance(then, int | float) and isinstance(now, int | float) and then < now


def _records(receipt: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    records = receipt.get(name)
    return [one for one in records if isinstance(one, dict) and "path" in one] if isinstance(records, list) else []


def _by_check(line: Mapping[str, Any]) -> bool:
    return str(line.get("reason")).startswith(REASON)


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
            yield id_of_record(path.stem)
