"""``curation audit ROOT`` shows the attrition of each group, and which groups differ significantly.

It reads receipts, provenance and rejects, and, if ``--clip`` names a model, some of the generated images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation.cluster import Allocation
from curation.commands.audit.groups import (
    CONFIDENCE,
    MIN_COMPARED,
    STEPS,
    Difference,
    GroupCounts,
    Tallies,
    attributes_of,
    difference,
    stage_places,
    tally,
    wilson,
)
from curation.commands.places import EDITS, HYBRID, StagePlace
from curation.errors import EXIT_OK, UsageError
from curation.jsonio import clean_text
from curation.options import POSITIONAL, exit_code, logger, parse_arguments, set_up_logging

AUDIT_FORMAT = 1


# The losses: name → (the step before, the step after, the words for a lost sample)
LOSSES: Mapping[str, tuple[str, str, str]] = {
    "prompt": ("assigned", "accepted", "got no prompt"),
    "image": ("to_generate", "generated", "got no image"),
    "hybrid": ("to_hybrid", "hybrid", "did not reach the hybrid shards"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show for each group how many samples were assigned, rewritten, accepted, generated and resharded."""

    root: Annotated[Path, POSITIONAL]
    """The folder of the dataset: stages 02 to 04 are found in it or in a folder in it."""
    workers: int | None = None
    """Number of reading processes.  Default: one for each CPU, at most 8."""
    clip: str | None = None
    """Classify generated images with this model: oai-clip-vit-b32, oai-clip-vit-l14, clip:<hub id or folder>,
    siglip:<hub id or folder>."""
    clip_weights: str | None = None
    """Use these weights for that model: a folder or a hub id."""
    images: int = 1000
    """Number of images to classify, spread over the shards."""
    device: str = "cpu"
    """The model's device: cpu, cuda, cuda:1."""
    card: Path | None = None
    """A folder: write a dataset card with these tables (README.md, whose other text is kept) and croissant.json."""
    license: str | None = None
    """The dataset's licence for the card, one of the hub's ids."""
    json: bool = False
    """One JSON object on one line instead of tables in Markdown."""

    def check(self) -> None:
        """Raises UsageError for values that make no sense."""
        if self.workers is not None and self.workers < 1:
            raise UsageError("--workers must be at least 1")
        if self.images < 1:
            raise UsageError("--images must be at least 1")
        if self.clip is None and self.clip_weights is not None:
            raise UsageError("--clip_weights needs --clip, which names the model")


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "audit")
    options.check()
    set_up_logging(options.json)
    places = stage_places(options.root)
    result = audit(options.root, places, options.workers)
    if options.clip is not None:
        result["images"] = _look_at_images(places, result, options)
    if options.card is not None:
        _write_cards(places, result, options)
    print(orjson.dumps(result).decode() if options.json else "\n".join(as_markdown(result)), flush=True)
    return EXIT_OK


def audit(root: Path, places: Mapping[str, StagePlace] | None = None, workers: int | None = None) -> dict[str, Any]:
    """Returns all that is shown, except what a model saw, as one JSON value; docs/audit.md describes it.

    Args:
        root: The folder of the dataset.
        places: The stages below it; None: they are looked for.
        workers: Processes that read; None: one for each CPU, at most 8.

    Raises:
        UsageError: Stage 02 assigned no sample to a group.
    """
    tallies = tally(places or stage_places(root), workers or min(8, os.cpu_count() or 1))
    if not tallies.groups:
        raise UsageError(f"{root}: no sample was assigned to a group (stage 02 ran with --groups none, or on nothing)")
    return as_result(root, tallies)


def _look_at_images(places: Mapping[str, StagePlace], result: Mapping[str, Any], options: Options) -> dict[str, Any]:
    from curation.commands.audit.zero_shot import look_at_images
    from curation.extract.settings import ModelSettings

    assert options.clip is not None
    if EDITS not in places:
        raise UsageError(f"{options.root}: --clip classifies generated images, but {EDITS} has made none")
    settings = ModelSettings(weights=options.clip_weights, device=options.device, threads=Allocation.detect().threads)
    groups = [group["group"] for group in result["groups"]]
    seen = look_at_images(places, groups, options.clip, settings, options.images)
    rows = []
    for (attribute, value), (count, agreed) in seen.shown.items():
        low, high = wilson(agreed, count)
        rows.append(
            {"attribute": attribute, "value": value, "images": count, "agreed": agreed, "low": low, "high": high}
        )
    return {"model": seen.model, "images": seen.images, "unreadable": seen.unreadable, "shown": rows}


def _write_cards(places: Mapping[str, StagePlace], result: Mapping[str, Any], options: Options) -> None:
    from curation.commands.audit.cards import write_cards

    assert options.card is not None
    if HYBRID not in places:
        raise UsageError(f"{options.root}: --card describes hybrid shards, but {HYBRID} has made none")
    manifest = places[HYBRID].home / "manifest.tsv"
    for path in write_cards(options.card, places[HYBRID], manifest, as_markdown(result), options.license):
        logger.info(f"written: {path}")


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
            "compared": False,
            "beyond_chance": False,
        }
    return {
        **base,
        "others": found.others,
        "difference": found.value,
        "difference_low": found.low,
        "difference_high": found.high,
        "compared": found.compared,
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
    yield from findings(result)
    if text := verdict(result):
        yield text
    yield ""
    yield f"Shares with their {result['confidence']:.0%} intervals (Wilson).  Each group is compared with the others"
    yield "(Newcombe's interval of the difference, widened for the number of groups after Bonferroni)."
    yield ""
    yield "| attribute | value | prompts | state it | name another |"
    yield "|---|---|---:|---:|---:|"
    for row in result["attributes"]:
        shares = " | ".join(_percent(row[name], row["prompts"]) for name in ("stated", "contradicted"))
        yield f"| {cell(row['attribute'])} | {cell(row['value'])} | {row['prompts']:,} | {shares} |"
    if "images" in result:
        yield from _images_as_markdown(result["images"])
    for warning in result["warnings"]:
        yield ""
        yield f"Note: {warning}"


def _images_as_markdown(images: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"What {cell(images['model'])} sees in {images['images']:,} generated images, if it must choose one value:"
    yield ""
    yield "| attribute | value | images | it chooses that value |"
    yield "|---|---|---:|---:|"
    for row in images["shown"]:
        share = f"{row['agreed'] / row['images']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        yield f"| {cell(row['attribute'])} | {cell(row['value'])} | {row['images']:,} | {share} |"
    if images["unreadable"]:
        yield ""
        yield f"{images['unreadable']:,} images could not be read."


def findings(result: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about each significant difference."""
    for group in result["groups"]:
        for name, loss in group["losses"].items():
            if loss["beyond_chance"]:
                more = "more" if loss["difference"] > 0 else "less"
                low, high = sorted((abs(loss["difference_low"]), abs(loss["difference_high"])))
                share = f"{loss['share']:.1%} of its samples {LOSSES[name][2]}, {loss['others']:.1%} of the others'"
                points = f"{abs(loss['difference']) * 100:.1f} points {more} ({low * 100:.1f} to {high * 100:.1f})"
                yield f"- **{cell(group['group'])}**: {share}: {points}, a significant difference."


def verdict(result: Mapping[str, Any]) -> str:
    """Returns one sentence about the groups without a significant difference; empty where each group has one.

    It says that there are too few samples where nothing can be compared: that is no proof of equal losses.
    """
    losses = [group["losses"].values() for group in result["groups"]]
    found = sum(any(loss["beyond_chance"] for loss in of_group) for of_group in losses)
    few = sum(not any(loss["compared"] for loss in of_group) for of_group in losses)
    count = f"n={result['all']['assigned']:,}"
    needed = f"a group is compared where it and the others together have at least {MIN_COMPARED} samples each"
    if few == len(losses):
        return f"Too few samples to compare the groups ({count}): {needed}."
    parts = [] if found else [f"No significant difference in loss between groups ({count})."]
    if few:
        have = "1 group has" if few == 1 else f"{few:,} groups have"
        parts.append(f"{have} too few samples to compare: {needed}.")
    return " ".join(parts)


def cell(text: str) -> str:
    """Escape a text from the data for a Markdown table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|`*_[]" else c for c in text)


def _share(loss: Mapping[str, Any]) -> str:
    if loss["share"] is None:
        return "-"
    return f"{loss['share']:.1%} ({loss['low']:.1%} to {loss['high']:.1%})"


def _percent(number: int, count: int) -> str:
    return f"{number / count:.1%}" if count else "-"
