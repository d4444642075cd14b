"""How the data of each stage was made: models with their revisions, and the options that were set.

They come from the records of options that a stage leaves beside its receipts, and from what it recorded about samples.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from curation.backends.faces import detector_class
from curation.commands.places import EDITS, FACES, METADATA, PROMPTS, RECAPTION
from curation.commands.status.scan import ScannedStage
from curation.errors import InfrastructureError
from curation.jsonio import clean_text
from curation.run.inputs import receipts_of
from curation.run.planned import Plan
from curation.storage.files import read_record

STAND_IN = "embedded/"  # the names of the models of --embedded begin with it
MAX_RECIPES = 5  # of one stage: each --rerun with other options makes one
_MAX_TEXT = 400
_MAX_STAGES = 100  # that are looked at before those of the report
_MODELS: Mapping[str, str] = {
    FACES: "face detector",
    PROMPTS: "language model",
    EDITS: "image model",
    RECAPTION: "captioner",
}
_MADE: Mapping[str, str] = {PROMPTS: "prompts", EDITS: "pictures", RECAPTION: "captions"}
_SHOWN_AS_MODEL = ("model", "revision", "weights")


@dataclass(frozen=True, slots=True, order=True)
class UsedModel:
    """A model as samples name it.  stage: the stage that called it."""

    stage: str
    name: str
    revision: str = ""


def recipes(stage: ScannedStage, shards: Mapping[int, int], used: Mapping[UsedModel, int]) -> list[dict[str, Any]]:
    """Returns the options under which the shards of a stage were made, the newest first.

    Args:
        stage: The stage with its versions of the options.
        shards: Version → shards that were done under it.
        used: The models that samples name.
    """
    versions = [version for version in reversed(stage.epochs) if shards.get(version.number)] or stage.epochs[-1:]
    name = stage.place.stage
    return [
        {
            "epoch": version.number,
            "shards": shards.get(version.number, 0),
            "models": _models(name, version.options, used),
            "options": _options(name, version.options),
        }
        for version in versions[:MAX_RECIPES]
    ]


def stand_ins(stages: Sequence[Mapping[str, Any]], used: Iterable[UsedModel]) -> list[dict[str, Any]]:
    """Returns the stand-in models that made something of the dataset, each with what it made."""
    found: Counter[tuple[str, str]] = Counter()
    for stage in stages:
        for recipe in stage["made"]:
            for model in recipe["models"]:
                if model["model"].startswith(STAND_IN) and recipe["shards"]:
                    found[stage["stage"], model["model"]] += recipe["shards"]
    for one in used:  # of a stage whose own records are not below the root
        if one.name.startswith(STAND_IN) and (one.stage, one.name) not in found:
            found[one.stage, one.name] = 0
    return [
        {"stage": stage, "made": _MADE.get(stage, "data"), "model": model, "shards": shards}
        for (stage, model), shards in sorted(found.items())
    ]


def models_before(stages: Sequence[ScannedStage]) -> set[UsedModel]:
    """Returns the models of the stages from whose files these were made, and which are not among them.

    A report about the folder of the hybrid shards alone finds so that stand-ins made their pictures.
    """
    seen = {str(stage.place.receipts) for stage in stages}
    left = [(stage.place.home / folder, name) for stage in stages for name, folder in stage.sources]
    found = set()
    while left and len(seen) < _MAX_STAGES:
        folder, name = left.pop()
        receipts = receipts_of(folder, name)
        if receipts is None or os.path.realpath(receipts) in seen:
            continue
        seen.add(os.path.realpath(receipts))
        options = None
        for number in range(1, _MAX_STAGES):
            if (record := read_record(receipts / f"_epoch.{number}.json")) is None:
                break
            options = record.get("options")
        if isinstance(options, dict) and isinstance(options.get("model"), str):
            found.add(UsedModel(name, text_of(options["model"]), text_of(options.get("revision"))))
        home = receipts.parent.parent
        plan = Plan(home, name, lambda warning: None)
        plan.look()
        left += [(home / further, stage) for stage, further in plan.sources]
    return found


def _models(stage: str, options: Mapping[str, Any], used: Mapping[UsedModel, int]) -> list[dict[str, str]]:
    if stage == METADATA:
        weights = options.get("weights")
        return [
            {"what": text_of(name), "model": text_of(name), "revision": text_of(exact)}
            for name, exact in (weights.items() if isinstance(weights, dict) else ())
        ]
    model, revision = text_of(options.get("model")), text_of(options.get("revision"))
    if stage == FACES:
        detector = options.get("pixels")
        model = text_of(detector) if detector else "none: the boxes that the metadata records"
        revision = text_of(options.get("model")) or ", ".join(_revisions(stage, model, used))
    if not model:
        return []
    return [
        {
            "what": _MODELS.get(stage, "model"),
            "model": model,
            "revision": revision or ", ".join(_revisions(stage, model, used)),
        }
    ]


def _revisions(stage: str, model: str, used: Mapping[UsedModel, int]) -> list[str]:
    return sorted({one.revision for one in used if (one.stage, one.name) == (stage, model) and one.revision})[:3]


def _options(stage: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Returns the options that are set, as text.  What is off, or left to its default, has no entry."""
    shown = {
        clean_text(str(name)[:200])[:80]: text_of(value)
        for name, value in options.items()
        if name not in _SHOWN_AS_MODEL and (value is not None and value is not False and value not in ("", [], {}))
    }
    if stage == FACES and isinstance(options.get("pixels"), str):
        try:
            detector = detector_class(options["pixels"])
        except InfrastructureError:  # of another version
            return shown
        shown.setdefault("threshold", f"{detector.default_threshold:g} (the detector's own)")
        shown.setdefault("det_size", f"{detector.default_det_size} (the detector's own)")
    return shown


def text_of(value: Any) -> str:
    """Returns a value of JSON as one line of bounded length; empty for null."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        value = ", ".join(map(str, value))
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    text = clean_text(text[: 4 * _MAX_TEXT])
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
