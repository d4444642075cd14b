"""``python -m curation audit ROOT``: what became of each group's samples, and whether a group fared otherwise.

It reads receipts, provenance and rejects, and, where ``--clip`` names a model, some of the generated images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import tyro

from curation.dictionaries import clean_text
from curation.errors import EXIT_OK, UsageError
from curation.inspect.arguments import parse_arguments
from curation.inspect.by_group import STEPS, GroupCounts, Tallies, stage_places, tally
from curation.inspect.rates import CONFIDENCE, Difference, difference, wilson
from curation.inspect.stated import attributes_of
from curation.options import exit_code

AUDIT_FORMAT = 1
# what is lost at each step: name → (those who came, those who went on), what is said of a sample that did not
LOSSES: Mapping[str, tuple[str, str, str]] = {
    "prompt": ("assigned", "accepted", "got no prompt"),
    "image": ("to_generate", "generated", "got no image"),
    "hybrid": ("to_hybrid", "hybrid", "did not reach the hybrid shards"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show for each group how many samples were assigned, rewritten, accepted, generated and resharded."""

    root: Annotated[Path, tyro.conf.Positional]
    """The folder of the dataset: stages 02 to 04 are found in it or in a folder in it."""
    workers: int | None = None
    """Processes that read.  Default: one a CPU, at most 8."""
    json: bool = False
    """One JSON object on one line instead of tables in Markdown."""

    def check(self) -> None:
        """Raise UsageError for values that make no sense."""
        if self.workers is not None and self.workers < 1:
            raise UsageError("--workers must be at least 1")


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "audit")
    options.check()
    result = audit(options.root, options.workers)
    print(orjson.dumps(result).decode() if options.json else "\n".join(as_markdown(result)), flush=True)
    return EXIT_OK


def audit(root: Path, workers: int | None = None) -> dict[str, Any]:
    """Everything that is shown, as one JSON value; docs/audit.md describes it."""
    tallies = tally(stage_places(root), workers or min(8, os.cpu_count() or 1))
    if not tallies.groups:
        raise UsageError(f"{root}: no sample was assigned to a group (stage 02 ran with --groups none, or on nothing)")
    return as_result(root, tallies)


def as_result(root: Path, tallies: Tallies) -> dict[str, Any]:
    everyone = GroupCounts()
    for counts in tallies.groups.values():
        everyone.add(counts)
    names = sorted(tallies.groups)
    groups = [_group_result(name, tallies.groups[name], everyone, len(names)) for name in names]
    return {
        "format": AUDIT_FORMAT,
        "root": str(root),
        "confidence": CONFIDENCE,
        "shards": dict(sorted(tallies.shards.items())),
        "groups": groups,
        "all": {step: everyone.steps[step] for step in STEPS},
        "attributes": _attributes(tallies),
        "warnings": [f"{text}: {count:,}" for text, count in sorted(tallies.warnings.items())],
    }


def _group_result(name: str, counts: GroupCounts, everyone: GroupCounts, groups: int) -> dict[str, Any]:
    """groups: how many are compared, each with the others."""
    losses = {}
    for loss, (came, went, _) in LOSSES.items():
        mine, all_ = counts.steps[came], everyone.steps[came]
        lost, all_lost = mine - counts.steps[went], all_ - everyone.steps[went]
        losses[loss] = _as_json(lost, mine, difference(lost, mine, all_lost - lost, all_ - mine, groups))
    stated = {
        f"{attribute}={value}": {
            "stated": counts.stated[f"{attribute}={value}"],
            "contradicted": counts.contradicted[f"{attribute}={value}"],
            "prompts": counts.steps["accepted"],
        }
        for attribute, value in attributes_of(name)
    }
    return {
        "group": clean_text(name),
        **{step: counts.steps[step] for step in STEPS},
        "refused": {clean_text(reason): number for reason, number in counts.refused.most_common()},
        "losses": losses,
        "stated": stated,
    }


def _as_json(lost: int, count: int, found: Difference | None) -> dict[str, Any]:
    low, high = wilson(lost, count)
    share = lost / count if count else None
    base = {"lost": lost, "of": count, "share": share, "low": low if count else None, "high": high if count else None}
    if found is None:
        return {
            **base,
            "others": None,
            "difference": None,
            "difference_low": None,
            "difference_high": None,
            "beyond_chance": False,
        }
    return {
        **base,
        "others": found.others,
        "difference": found.value,
        "difference_low": found.low,
        "difference_high": found.high,
        "beyond_chance": found.beyond_chance,
    }


def _attributes(tallies: Tallies) -> list[dict[str, Any]]:
    """How far prompts state each value, over all groups that have it."""
    stated: dict[tuple[str, str], list[int]] = {}
    for name, counts in tallies.groups.items():
        for attribute, value in attributes_of(name):
            key = f"{attribute}={value}"
            sums = stated.setdefault((attribute, value), [0, 0, 0])
            for place, number in enumerate((counts.steps["accepted"], counts.stated[key], counts.contradicted[key])):
                sums[place] += number
    return [
        {
            "attribute": attribute,
            "value": clean_text(value),
            "prompts": sums[0],
            "stated": sums[1],
            "contradicted": sums[2],
        }
        for (attribute, value), sums in sorted(stated.items())
    ]


# ---- as Markdown


def as_markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """Tables that can be put into a data card."""
    yield "| group | assigned | rewritten | accepted | generated | in the hybrid set | got no prompt | got no image |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for group in result["groups"]:
        counts = " | ".join(f"{group[step]:,}" for step in STEPS)
        losses = " | ".join(_share(group["losses"][name]) for name in ("prompt", "image"))
        yield f"| {cell(group['group'])} | {counts} | {losses} |"
    yield "| all | " + " | ".join(f"{result['all'][step]:,}" for step in STEPS) + " | | |"
    yield ""
    found = list(findings(result))
    yield from found or ["No group lost samples at another rate than the others beyond chance."]
    yield ""
    yield f"Shares with their {result['confidence']:.0%} intervals (Wilson).  Each group is compared with the others"
    yield "(Newcombe's interval of the difference, widened for the number of groups as Bonferroni has it)."
    yield ""
    yield "| attribute | value | prompts | state it | name another |"
    yield "|---|---|---:|---:|---:|"
    for row in result["attributes"]:
        shares = " | ".join(_percent(row[name], row["prompts"]) for name in ("stated", "contradicted"))
        yield f"| {cell(row['attribute'])} | {cell(row['value'])} | {row['prompts']:,} | {shares} |"
    for warning in result["warnings"]:
        yield ""
        yield f"Note: {warning}"


def findings(result: Mapping[str, Any]) -> Iterator[str]:
    """Where a group fares otherwise beyond chance, in words."""
    for group in result["groups"]:
        for name, loss in group["losses"].items():
            if loss["beyond_chance"]:
                more = "more" if loss["difference"] > 0 else "less"
                low, high = sorted((abs(loss["difference_low"]), abs(loss["difference_high"])))
                share = f"{loss['share']:.1%} of its samples {LOSSES[name][2]}, {loss['others']:.1%} of the others'"
                points = f"{abs(loss['difference']) * 100:.1f} points {more} ({low * 100:.1f} to {high * 100:.1f})"
                yield f"- **{cell(group['group'])}**: {share}: {points}, beyond chance."


def cell(text: str) -> str:
    """Text from the data within a Markdown table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|`*_[]" else c for c in text)


def _share(loss: Mapping[str, Any]) -> str:
    if loss["share"] is None:
        return "-"
    return f"{loss['share']:.1%} ({loss['low']:.1%} to {loss['high']:.1%})"


def _percent(number: int, count: int) -> str:
    return f"{number / count:.1%}" if count else "-"
