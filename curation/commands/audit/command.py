"""``curation audit ROOT`` shows the attrition of each group, and which groups differ significantly.

It reads receipts, provenance and rejects; stage 06's features of the generated pictures where there are any; and, if
``--clip`` names a model, some of the pictures themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation.cluster import Allocation
from curation.commands.audit import checks
from curation.commands.audit.groups import FLAGS, STEPS, GroupCounts, Tallies, stage_places, tally
from curation.commands.audit.intervals import CONFIDENCE, MIN_COMPARED, difference, loss_result, share_result
from curation.commands.audit.words import cell, percent_text, points, share_text
from curation.commands.places import EDITS, HYBRID, StagePlace, find_stages
from curation.errors import EXIT_OK, UsageError
from curation.jsonio import clean_text
from curation.options import POSITIONAL, exit_code, logger, parse_arguments, set_up_logging
from curation.rewrite.groups import attributes_of

AUDIT_FORMAT = 1


# The losses: name → (the step before, the step after, the words for a lost sample)
LOSSES: Mapping[str, tuple[str, str, str]] = {
    "prompt": ("assigned", "accepted", "got no prompt"),
    "image": ("to_generate", "generated", "got no image"),
    "check": ("to_check", "not_rejected", "were rejected by a check"),
    "hybrid": ("to_hybrid", "hybrid", "did not reach the hybrid shards"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the groups of a dataset: how many samples each lost at every stage, what the checks of stage 03 said of
    its pictures, and how different these are."""

    root: Annotated[Path, POSITIONAL]
    """The folder of the dataset: stages 02 to 04 are found in it or in a folder in it."""
    prompts: Path | None = None
    """Stage 02's output folder, if the stage ran on several folders in ROOT."""
    edits: Path | None = None
    """The same of stage 03."""
    hybrid: Path | None = None
    """The same of stage 04.  Without it, folders that were written without edits do not count."""
    workers: int | None = None
    """Number of reading processes.  Default: one for each CPU, at most 8."""
    clip: str | None = None
    """Classify generated images, and the photos that they replace, with this model: oai-clip-vit-b32,
    oai-clip-vit-l14, clip:<hub id or folder>, siglip:<hub id or folder>."""
    clip_weights: str | None = None
    """Use these weights for that model: a folder or a hub id."""
    images: int = 1000
    """Number of images to classify, spread over the shards."""
    device: str = "cpu"
    """The model's device: cpu, cuda, cuda:1."""
    features: Path | None = None
    """The output of stage 06 on the generated pictures (the folder of the edits) or on the hybrid shards.  Default: a
    run of stage 06 in ROOT, else the features of --clip."""
    source_features: Path | None = None
    """The output of stage 06 on the source shards.  Default: a run of stage 06 in ROOT."""
    feature: str | None = None
    """The feature of the npz files that is compared.  Default: the one feature of pictures that there is."""
    near: float = 0.95
    """Pictures with at least this cosine count as near copies."""
    source: Path | None = None
    """With --clip: the folder of the source shards.  Default: those that the receipts name."""
    scratch: Path | None = None
    """Folder for the features during the comparison (4 bytes per number).  Default: the system's temporary folder."""
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
        if not -1 <= self.near <= 1:
            raise UsageError("--near is a cosine, between -1 and 1")
        for flag in ("source", "scratch"):
            if (folder := getattr(self, flag)) is not None and not folder.is_dir():
                raise UsageError(f"--{flag} {folder}: no such folder")


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "audit")
    options.check()
    set_up_logging(options.json)
    places = stage_places(options.root, {flag: getattr(options, flag) for flag in FLAGS.values()})
    result = audit(options.root, places, options.workers)
    result["variety"] = variety_of(options, places, result)
    if options.clip is not None:
        _look_at_images(places, result, options)
    if options.card is not None:
        _write_cards(places, result, options)
    print(orjson.dumps(result).decode() if options.json else "\n".join(as_markdown(result)), flush=True)
    return EXIT_OK


def audit(root: Path, places: Mapping[str, StagePlace] | None = None, workers: int | None = None) -> dict[str, Any]:
    """Returns all that receipts and provenance say, as one JSON value; docs/audit.md describes it.

    Args:
        root: The folder of the dataset.
        places: The stages below it; None: they are looked for.
        workers: Processes that read; None: one for each CPU, at most 8.

    Raises:
        UsageError: Stage 02 assigned no sample to a group, and stage 03 checked no picture.
    """
    places = places or stage_places(root)
    tallies = tally(places, workers or min(8, os.cpu_count() or 1))
    if not tallies.groups and not tallies.checked:
        raise UsageError(f"{root}: no sample was assigned to a group (stage 02 ran with --groups none, or on nothing)")
    options = checks.check_options(places[EDITS].home) if tallies.checked else {}
    return as_result(root, tallies, options)


def variety_of(
    options: Options, places: Mapping[str, StagePlace], result: Mapping[str, Any], most: int | None = None
) -> dict[str, Any] | None:
    """Returns how different the pictures are, by features of stage 06; None where there are none.

    Args:
        options: The user's.
        places: The stages.
        result: Of ``audit``.
        most: How many pictures are compared, chosen by a hash of their keys; None: all.

    Raises:
        UsageError: The features are not of the generated pictures.
    """
    from curation.commands.audit.features import FeatureRun, GroupedShards, feature_folders, measure_variety

    found = feature_folders(options.root, places) if EDITS in places else (None, None)
    folder, source = options.features or found[0], options.source_features or found[1]
    if folder is None:
        if options.source_features is not None or (options.feature is not None and options.clip is None):
            raise UsageError("--source_features and --feature need --features, the features of the generated pictures")
        return None
    if EDITS not in places:
        raise UsageError(f"{options.root}: --features compares generated images, but {EDITS} has made none")
    grouped = GroupedShards(places, most, result["pictures"])
    run = FeatureRun(folder, "--features", options.features is not None, "the generated pictures")
    on_photos = (
        FeatureRun(source, "--source_features", options.source_features is not None, "the source shards")
        if source is not None
        else None
    )
    return measure_variety(run, on_photos, options.feature, options.near, grouped, options.scratch)


def _look_at_images(places: Mapping[str, StagePlace], result: dict[str, Any], options: Options) -> None:
    """Adds what the model of --clip sees, and what its features say where there are none of stage 06."""
    from curation.commands.audit.zero_shot import look_at_images
    from curation.commands.report.originals import Originals
    from curation.extract.settings import ModelSettings

    assert options.clip is not None
    if EDITS not in places:
        raise UsageError(f"{options.root}: --clip classifies generated images, but {EDITS} has made none")
    settings = ModelSettings(weights=options.clip_weights, device=options.device, threads=Allocation.detect().threads)
    groups = [group["group"] for group in result["groups"]]
    originals = Originals(options.root, find_stages(options.root), options.source)
    near = options.near if result["variety"] is None else None
    seen = look_at_images(places, groups, options.clip, settings, options.images, originals, near)
    if not seen.images + seen.unreadable:
        raise UsageError(f"{options.root}: --clip asks which group an image shows, and no generated image has a group")
    if seen.variety is not None:
        sampled = seen.images + seen.unreadable < result["all"]["generated"]
        result["variety"] = seen.variety | {"sampled": sampled, "missing": 0, "older_shards": 0}
    rows = []
    for (attribute, value), (count, agreed) in seen.shown.items():
        share = share_result(agreed, count)
        rows.append(
            {"attribute": attribute, "value": value, "images": count, "agreed": agreed}
            | {"low": share["low"], "high": share["high"]}
        )
    found = [
        {
            "attribute": attribute,
            "value": value,
            "generated": share_result(seen.found[attribute, value, False], seen.images),
            "source": share_result(seen.found[attribute, value, True], seen.originals),
        }
        for attribute, value in sorted({(attribute, value) for attribute, value, _ in seen.found})
    ]
    counts = {"images": seen.images, "originals": seen.originals, "unreadable": seen.unreadable}
    result["images"] = {"model": seen.model, **counts, "shown": rows, "found": found}


def _write_cards(places: Mapping[str, StagePlace], result: Mapping[str, Any], options: Options) -> None:
    from curation.commands.audit.cards import figures, write_cards

    assert options.card is not None
    if HYBRID not in places:
        raise UsageError(f"{options.root}: --card describes hybrid shards, but {HYBRID} has made none")
    manifest = places[HYBRID].home / "manifest.tsv"
    found = [*findings(result), *(checks.findings(result["checks"]) if result["checks"] else ())]
    said = figures(result, [line.removeprefix("- ").replace("**", "") for line in found] or [verdict(result)])
    for path in write_cards(options.card, places[HYBRID], manifest, as_markdown(result), options.license, said):
        logger.info(f"written: {path}")


def as_result(root: Path, tallies: Tallies, options: Mapping[str, Any]) -> dict[str, Any]:
    """options: of the checks, as stage 03 recorded them."""
    everyone = GroupCounts()
    for counts in tallies.groups.values():
        everyone.add(counts)
    names = sorted(tallies.groups)
    measured = sum(everyone.steps[came] > 0 for came, _, _ in LOSSES.values())
    groups = [_group_result(name, tallies.groups[name], everyone, len(names) * measured) for name in names]
    return {
        "format": AUDIT_FORMAT,
        "root": str(root),
        "confidence": CONFIDENCE,
        "shards": dict(sorted(tallies.shards.items())),
        "groups": groups,
        "all": {step: everyone.steps[step] for step in STEPS},
        "pictures": tallies.pictures,
        "attributes": _attributes(tallies),
        "checks": checks.as_result(tallies.checks, tallies.seen, tallies.checked, tallies.shards[EDITS], options),
        "variety": None,
        "warnings": [f"{text}: {count:,}" for text, count in sorted(tallies.warnings.items())],
    }


def _group_result(name: str, counts: GroupCounts, everyone: GroupCounts, comparisons: int) -> dict[str, Any]:
    """comparisons: how many are made, each of one loss of one group with that of the others."""
    losses = {}
    for loss, (came, went, _) in LOSSES.items():
        mine, all_ = counts.steps[came], everyone.steps[came]
        lost, all_lost = mine - counts.steps[went], all_ - everyone.steps[went]
        losses[loss] = loss_result(lost, mine, difference(lost, mine, all_lost - lost, all_ - mine, comparisons))
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
    from curation.commands.audit import variety  # it needs numpy, and --help does without

    yield "### What each group lost"
    yield ""
    names = "assigned | rewritten | accepted | generated | in the hybrid set"
    yield f"| group | {names} | got no prompt | got no image | rejected by a check | lost in stage 04 |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for group in result["groups"]:
        counts = " | ".join(f"{group[step]:,}" for step in STEPS)
        losses = " | ".join(share_text(group["losses"][name]) for name in LOSSES)
        yield f"| {cell(group['group'])} | {counts} | {losses} |"
    yield "| all | " + " | ".join(f"{result['all'][step]:,}" for step in STEPS) + " | | | | |"
    yield ""
    yield from findings(result)
    if text := verdict(result):
        yield text
    yield ""
    yield f"Shares with their {result['confidence']:.0%} intervals (Wilson).  Each group is compared with the others"
    yield "(Newcombe's interval of the difference, widened for the number of comparisons after Bonferroni)."
    yield ""
    yield "### Does the prompt mention the group?"
    yield ""
    yield "Shares of the prompts with a word for the value, and with a word for another value:"
    yield ""
    yield "| attribute | value | prompts | this value | another value |"
    yield "|---|---|---:|---:|---:|"
    for row in result["attributes"]:
        shares = " | ".join(percent_text(row[name], row["prompts"]) for name in ("stated", "contradicted"))
        yield f"| {cell(row['attribute'])} | {cell(row['value'])} | {row['prompts']:,} | {shares} |"
    yield from checks.as_markdown(result["checks"])
    yield from variety.as_markdown(result["variety"])
    if "images" in result:
        yield from _images_as_markdown(result["images"])
    for warning in result["warnings"]:
        yield ""
        yield f"Note: {warning}"


def _images_as_markdown(images: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "### What a model sees"
    yield ""
    yield f"What {cell(images['model'])} sees in {images['images']:,} generated images, if it must choose one value:"
    yield ""
    yield "| attribute | value | images | it chooses that value |"
    yield "|---|---|---:|---:|"
    for row in images["shown"]:
        share = f"{row['agreed'] / row['images']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        yield f"| {cell(row['attribute'])} | {cell(row['value'])} | {row['images']:,} | {share} |"
    if images["originals"]:
        yield ""
        yield f"Which value it finds most likely in {images['originals']:,} of the photos that were replaced:"
        yield ""
        yield "| attribute | value | in the photos | in the generated images |"
        yield "|---|---|---:|---:|"
        for row in images["found"]:
            shares = f"{share_text(row['source'])} | {share_text(row['generated'])}"
            yield f"| {cell(row['attribute'])} | {cell(row['value'])} | {shares} |"
    if images["unreadable"]:
        yield ""
        yield f"{images['unreadable']:,} images could not be read."


def findings(result: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about each significant difference."""
    for group in result["groups"]:
        for name, loss in group["losses"].items():
            if loss["beyond_chance"]:
                yield f"- **{cell(group['group'])}**: {points(loss, LOSSES[name][2])}"


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
