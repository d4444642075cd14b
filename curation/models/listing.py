"""What ``--list_models`` prints: the models that have short names, and which of them are on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from curation import PROGRAM
from curation.models.hub_cache import hub_folder
from curation.models.known import Model
from curation.models.weights import is_hub_id

Here = Callable[[Model], str]  # "yes", "in part" or "no"
_PART_FILES = ("scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def asks_for_models(argv: Sequence[str] | None) -> bool:
    """Whether a command line has ``--list_models``, which needs no other option and lets no other one count."""
    words = sys.argv[1:] if argv is None else argv
    return any(word.replace("-", "_").lower() in ("__list_models", "__list_models=true") for word in words)


def list_models(stage: str, models: Sequence[Model], more: str, here: Here, fetch: str = "--model NAME") -> str:
    """The table of ``--list_models``, with what else there is to know below it.

    Args:
        stage: The number of the stage's script.
        models: Those that have short names.
        more: What else the flag takes, in whole sentences.
        here: Whether the weights are on this machine.
        fetch: The flag of ``models fetch`` that names the model.
    """
    lines = [*table(models, here), "", f"To fetch one: {PROGRAM} models fetch {stage} {fetch}", more]
    return "\n".join([*lines, WEIGHTS_NOTE, "Licences may change: check each model card."])


WEIGHTS_NOTE = (
    "weights: the GPU memory that the weights alone take, parameters x bytes; what is computed comes on top of it."
)


def table(models: Sequence[Model], here: Here | None = None) -> list[str]:
    """The lines of the table.  here: None leaves its column out."""
    rows = [header(models, here is not None)]
    rows += [row(model, models, here(model) if here else None) for model in models]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def header(models: Sequence[Model], with_here: bool = False) -> list[str]:
    """The names of the columns: those that some model has something for."""
    more = (["steps"] if any(m.steps for m in models) else []) + (["here"] if with_here else [])
    use = ["use"] if any(m.suits for m in models) else []
    source = "hub id" if all(is_hub_id(m.source) for m in models) else "weights from"
    return ["name", source, "weights", *more, "gated", "licence", *use]


def row(model: Model, models: Sequence[Model], here: str | None = None) -> list[str]:
    """One model's cells, in the columns of ``header(models)``."""
    names = header(models, here is not None)
    cells = {
        "weights from": model.source or "-",
        "name": model.short,
        "hub id": model.source or "-",
        "weights": _size(model.weights_gb),
        "steps": str(model.steps or "-"),
        "here": here or "",
        "gated": "yes" if model.gated else "no",
        "licence": model.licence or "-",
        "use": model.suits,
    }
    return [cells[name] for name in names]


def _size(gb: float) -> str:
    if not gb:
        return "-"
    return f"{gb:.1f} GB" if gb >= 0.1 else f"{gb * 1000:.0f} MB" if gb >= 0.001 else "< 1 MB"


# ---- what is on this machine


def on_this_machine(marker: str) -> Here:
    """Whether the hub's cache has a model, found without the network and without loading anything.

    marker: the file that makes a folder a model, such as ``model_index.json``.
    """
    return partial(_in_cache, marker)


def _in_cache(marker: str, model: Model) -> str:
    try:
        snapshots = [path for path in (hub_folder(model.source) / "snapshots").iterdir() if (path / marker).is_file()]
    except OSError:
        return "no"
    if any(_is_whole(folder, marker) for folder in snapshots):
        return "yes"
    return "in part" if snapshots else "no"


def _is_whole(folder: Path, marker: str) -> bool:
    """Whether each part of a model has its configuration and all files of its weights."""
    if marker != "model_index.json":
        return _has_weights(folder)
    try:
        index = json.loads((folder / marker).read_bytes())
        parts = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    except (OSError, ValueError, AttributeError):
        return False
    return bool(parts) and all(_is_part(folder / name) for name in parts if _is_name(name))


def _is_name(name: str) -> bool:
    return "/" not in name and name not in ("", ".", "..")


def _is_part(folder: Path) -> bool:
    if (folder / "config.json").is_file():
        return _has_weights(folder)
    return any((folder / name).is_file() for name in _PART_FILES)


def _has_weights(folder: Path) -> bool:
    """Whether all the files that an index names are there, or one file with all weights."""
    indexes = [*folder.glob("*.safetensors.index*.json"), *folder.glob("pytorch_model.bin.index.json")]
    if not indexes:
        return any(path.is_file() for name in ("*.safetensors", "pytorch_model.bin") for path in folder.glob(name))
    for index in indexes:
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
        if all(isinstance(name, str) and _is_name(name) and (folder / name).is_file() for name in names):
            return True
    return False
