"""All that the page shows, gathered from the files of a dataset: numbers as one JSON value, and samples."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from curation.commands.audit.command import Options as AuditOptions
from curation.commands.audit.command import audit as audit_groups
from curation.commands.audit.command import variety_of
from curation.commands.audit.groups import FLAGS, place_named, stage_places
from curation.commands.places import (
    EDITS,
    FACES,
    HYBRID,
    PROMPTS,
    RECAPTION,
    StagePlace,
    find_stages,
    of_the_main_job,
)
from curation.commands.report.originals import Originals
from curation.commands.report.receipts import MAX_NAME, GridCell, ReceiptBounds, ReceiptStats, add_cell, cell_of, merged
from curation.commands.report.recipe import models_before, recipes, stand_ins
from curation.commands.report.samples import SampleStats, look
from curation.commands.status.command import add_names_and_limits, stage_result
from curation.commands.status.live_claims import ClaimWatcher
from curation.commands.status.scan import ReceiptScan, ScannedStage
from curation.errors import InfrastructureError, UsageError
from curation.jsonio import clean_text

REPORT_FORMAT = 1
CLOSE = 8  # shards whose samples are shown: each costs one pass over its tars
MAX_COMPARED = 20_000  # pictures whose features are compared with one another
MAX_HOSTS = 10
MAX_REASONS = 40
TITLES = {
    FACES: "Faces",
    PROMPTS: "Captions to prompts",
    EDITS: "Images",
    HYBRID: "Hybrid shards",
    RECAPTION: "New captions",
    "06_metadata": "Scores",
}


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """All that the page shows.

    told: the numbers, as one JSON value.  places, stats: of the stages, in the same order.  originals: where the
    original images are.
    """

    told: dict[str, Any]
    places: list[StagePlace]
    stats: list[ReceiptStats]
    looked: SampleStats
    originals: Originals


def gather(
    root: Path,
    source: Path | None,
    shards_page: int,
    sample_shards: int,
    *,
    audit: bool,
    hybrid: Path | None = None,
    claims: ClaimWatcher | None = None,
) -> ReportFacts:
    """Reads the dataset: receipts in several processes, and the samples of some shards.

    Args:
        root: The folder of the dataset.
        source: The folder of the source shards; None: those that receipts name, else ``root/shards``, unless a stage
            writes there.
        shards_page: Shards of a stage that are shown one by one.
        sample_shards: Shards of each stage whose samples are read.
        audit: Whether the groups are counted too, which reads the provenance of all shards.
        hybrid: Stage 04's output folder that counts, in the root or elsewhere; None: the one that there is.
        claims: The watcher that earlier pages used, which knows which heartbeats have changed.
    """
    began = time.monotonic()
    places, main_job = _places(root, hybrid)
    claims = claims or ClaimWatcher([])
    claims.follow(places)
    held_first = claims.look()
    scan = ReceiptScan(places)
    bounds = ReceiptBounds(_shards_a_cell(scan, shards_page), sample_shards)
    for stage, held in zip(scan.stages, held_first, strict=True):
        stage.claimed = {claim.shard_id for claim in held}
    stats = scan.read(partial(ReceiptStats, bounds=bounds))
    held_now = claims.look()
    stages = []
    for stage, stage_stats, held in zip(scan.stages, stats, held_now, strict=True):
        _see_the_others(stage, stage_stats, {claim.shard_id for claim in held})
        stages.append(_bounded(stage_result(stage, stage_stats, held, {})) | _more(stage, stage_stats, shards_page))
    add_names_and_limits(root, scan, stages)
    chosen = [[shard for _, shard in sorted(stage_stats.chosen, reverse=True)] for stage_stats in stats]
    looked = look(places, chosen, 500, CLOSE)
    for stage, stage_stats, shown in zip(scan.stages, stats, stages, strict=True):
        shown["made"] = recipes(stage, stage_stats.epochs, looked.models)
    told: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "root": clean_text(str(root.resolve())),
        "made": round(time.time(), 3),
        "stages": stages,
        "stand_ins": stand_ins(stages, looked.models.keys() | models_before(scan.stages)),
        "funnel": _funnel([shown for stage, shown in zip(scan.stages, stages, strict=True) if stage.place in main_job]),
        "looked_at": dict(looked.shards),
        "faces": dict(sorted(looked.faces.items())),
        "languages": _languages(stages),
        "audit": None,
        "warnings": [clean_text(warning) for warning in scan.warnings][:20],
    }
    if audit:
        _add_audit(root, hybrid, told)
    told["seconds"] = round(time.monotonic() - began, 3)
    return ReportFacts(told, places, stats, looked, Originals(root, places, source))


def _places(root: Path, hybrid: Path | None) -> tuple[list[StagePlace], list[StagePlace]]:
    """Returns all stages, and those of the main job.  Of stage 04's places the one that is named comes first, so that
    what is looked up by the stage's name is found there.

    Raises:
        UsageError: No stage has run in the root, or not stage 04 in the folder that is named.
    """
    places = find_stages(root)
    if hybrid is None:
        return places, of_the_main_job(places)
    named = place_named(HYBRID, hybrid)
    ordered = sorted({*places, named}, key=lambda place: (place.stage, place != named, place.home))
    return ordered, [place for place in ordered if place.stage != HYBRID or place == named]


def _shards_a_cell(scan: ReceiptScan, shards_page: int) -> int:
    """Returns how many shards share a cell, by what runs have planned, or else by the number of receipt folders."""
    expected = 0
    for stage in scan.stages:
        if stage.planned is not None:
            expected = max(expected, sum(map(len, stage.planned.values())))
        else:
            expected = max(expected, 1000 * sum(1 for _ in stage.place.receipts.glob("[!_.]*/")))
    return 1 if expected <= max(shards_page, 1000) else -(-expected // shards_page)


def _see_the_others(stage: ScannedStage, stage_stats: ReceiptStats, running: set[str]) -> None:
    """Adds the shards without a receipt that counts: those that a worker has claimed, and those that are planned."""
    for shard_id in sorted(running):
        stage_stats.see(GridCell(shard_id, shard_id, Counter(running=1)))
    planned: dict[str, GridCell] = {}
    for shard_id in (shard_id for ids in (stage.planned or {}).values() for shard_id in ids):
        name = cell_of(shard_id, stage_stats.bounds.shards_a_cell)
        add_cell(planned, name, GridCell(shard_id, shard_id, Counter(pending=1)))
    for name, cell in planned.items():
        seen = stage_stats.cells[name].states.total() if name in stage_stats.cells else 0
        if cell.states["pending"] > seen:  # it is not known which shards of the cell they are
            stage_stats.see(GridCell(cell.first, cell.last, Counter(pending=cell.states["pending"] - seen)))


def _more(stage: ScannedStage, stage_stats: ReceiptStats, shards_page: int) -> dict[str, Any]:
    hosts = sorted(stage_stats.hosts.items(), key=lambda item: -item[1].seconds / max(1, item[1].shards))
    cells = merged(stage_stats.cells, shards_page)
    return {
        "title": TITLES.get(stage.place.stage, clean_text(stage.place.stage)),
        "shards": sum(cell.states.total() for cell in cells),
        "worker_seconds": round(sum(host.seconds for host in stage_stats.hosts.values()), 1),
        "output_bytes": stage_stats.output_bytes,
        "phases": {name: round(float(seconds), 3) for name, seconds in stage_stats.phases.most_common(MAX_REASONS)},
        "notes": dict(stage_stats.notes.most_common(MAX_REASONS)),
        "languages": dict(stage_stats.languages.most_common()),
        "hosts": [
            {"host": name, "shards": host.shards, "failed": host.failed, "samples": host.samples,
             "seconds": round(host.seconds, 3)}
            for name, host in hosts[:MAX_HOSTS]
        ],
        "hosts_in_all": len(hosts),
        "slowest": [
            {"shard": shard, "host": host, "seconds": round(seconds, 3), "samples": samples}
            for seconds, shard, host, samples in sorted(stage_stats.slowest, reverse=True)
        ],
        "code": dict(stage_stats.codes.most_common(5)),
        "warned": stage_stats.warned,
        "warnings": stage_stats.warnings,
    }  # fmt: skip


def _bounded(value: Any) -> Any:
    """Shortens the texts of receipts and claims, which anybody may have written, to one line each.

    Counts under names that become equal are added.
    """
    if isinstance(value, str):
        return clean_text(value[:4000])[:300]
    if isinstance(value, list):
        return [_bounded(one) for one in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for name, one in value.items():
        short = clean_text(str(name)[:4000])[:MAX_NAME]
        if type(one) is int and type(found.get(short)) is int:
            found[short] += one
        else:
            found[short] = _bounded(one)
    return found


def _funnel(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the samples of the main job step by step: how many came, how many were left, how many were replaced."""
    by_name = {stage["stage"]: stage for stage in stages}
    steps: list[dict[str, Any]] = []
    first = next((by_name[name] for name in (FACES, PROMPTS, EDITS) if name in by_name), None)
    if first is None:
        return steps
    steps.append({"step": "samples", "count": first["samples"]["in"], "stage": first["stage"], "gone": {}})
    for name, step in ((FACES, "with a face"), (PROMPTS, "with a prompt"), (EDITS, "with a new image")):
        if name in by_name:
            samples = by_name[name]["samples"]
            gone = Counter(samples["dropped"]) + Counter(samples["failed"])
            steps.append({"step": step, "count": samples["kept"], "stage": name, "gone": dict(gone.most_common())})
    if HYBRID in by_name:
        edited = by_name[HYBRID]["notes"].get("edited", 0)
        steps.append({"step": "replaced in the hybrid shards", "count": edited, "stage": HYBRID, "gone": {}})
    return steps


def _languages(stages: Sequence[dict[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for stage in stages:
        total.update(stage["languages"])
    return dict(total.most_common())


def _add_audit(root: Path, hybrid: Path | None, told: dict[str, Any]) -> None:
    try:
        places = stage_places(root, {FLAGS[HYBRID]: hybrid})
        told["audit"] = found = audit_groups(root, places)
    except UsageError as error:  # no groups, or no stage that assigns them
        told["audit_missing"] = clean_text(str(error))
        return
    try:
        found["variety"] = variety_of(AuditOptions(root=root), places, found, MAX_COMPARED)
    except (UsageError, InfrastructureError) as error:  # several features, or files that do not belong together
        found["warnings"].append(clean_text(f"diversity and near copies are not measured: {error}")[:400])
