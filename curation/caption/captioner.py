"""What a captioner is: the models by their names, the seam to their backends, and batches that shrink to what fits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from curation.errors import InfrastructureError, SampleError

Detail = Literal["brief", "detailed", "more_detailed"]


Quantize = Literal["4bit", "8bit"]


Compile = Literal["none", "decode", "all"]


class OutOfMemory(Exception):
    """A batch did not fit on the device: a smaller one may."""


class Prepared(Protocol):
    """An image as the model takes it, on the host.  A batch holds images of one ``shape`` only."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


class CaptionBackend(Protocol):
    """One captioner on one device.  ``name`` and ``revision`` say exactly which model it is.

    device_kind: on what batches that fit, and the last bits, depend (a GPU's name and memory).
    """

    name: str
    revision: str
    device_kind: str

    def prepare(self, image: Any) -> Any:
        """The Pillow image (RGB) as ``Prepared``.  Called in many threads.

        Raises SampleError ``processor_refused`` where the model's processor cannot use it.
        """

    def caption(self, batch: Sequence[Any], seeds: Sequence[int]) -> Sequence[str | SampleError]:
        """A caption, or why there is none, for each prepared image: one call of the device, from one thread.

        seeds: one for each image, for models that sample.  Raises OutOfMemory.
        """

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Family:
    """What holds for all models of a family unless a flag says otherwise: upstream's defaults, one each.

    model_types: of ``config.json``.
    """

    batch_size: int
    max_tokens: int
    model_types: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "florence2": Family(16, 256, ("florence2",)),
        "gemma3": Family(1, 256, ("gemma3",)),
        "llava": Family(48, 120, ("llava", "llava_next", "llava_onevision")),
        "qwen": Family(48, 120, ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
        "endpoint": Family(256, 120),  # many: a batch ends with its slowest answer
    }
)


@dataclass(frozen=True, slots=True)
class Model:
    """One line of ``--list_models``.  memory_gb: of the device, weights in 16 bits and a small batch,
    reckoned from the number of parameters and not measured."""

    short: str
    source: str
    family: str
    memory_gb: float
    suits: str


MODELS: tuple[Model, ...] = (
    Model("florence2-base", "florence-community/Florence-2-base", "florence2", 2, "millions of images: the fastest"),
    Model("florence2-large", "florence-community/Florence-2-large", "florence2", 4, "the same, more exact, slower"),
    Model("florence2-base-ft", "florence-community/Florence-2-base-ft", "florence2", 2, "tuned on public captions"),
    Model("florence2-large-ft", "florence-community/Florence-2-large-ft", "florence2", 4, "tuned on public captions"),
    Model("gemma3-4b", "google/gemma-3-4b-it", "gemma3", 10, "style, medium, palette, mood; licence to be accepted"),
    Model("gemma3-12b", "google/gemma-3-12b-it", "gemma3", 26, "the same, better"),
    Model("gemma3-27b", "google/gemma-3-27b-it", "gemma3", 58, "the same, best; 4bit: 20 GB"),
    Model("llava-1.6", "llava-hf/llava-v1.6-mistral-7b-hf", "llava", 18, "plain descriptions"),
    Model("llava-onevision-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava", 4, "small cards"),
    Model(
        "llava-onevision-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava", 20, "charts and text in images too"
    ),
    Model("qwen2-vl-2b", "Qwen/Qwen2-VL-2B-Instruct", "qwen", 7, "small cards; text in images"),
    Model("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "qwen", 20, "text in images, many languages"),
    Model("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen", 10, "small cards; text in images"),
    Model("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen", 20, "documents and text in images"),
    Model("qwen3-vl-2b", "Qwen/Qwen3-VL-2B-Instruct", "qwen", 7, "small cards"),
    Model("qwen3-vl-4b", "Qwen/Qwen3-VL-4B-Instruct", "qwen", 12, "good captions for their cost"),
    Model("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", "qwen", 22, "long, exact captions"),
)

_ALIASES: Mapping[str, str] = MappingProxyType(  # upstream's own names; Microsoft's repositories bring code along
    {
        "base": "florence2-base",
        "large": "florence2-large",
        "llava": "llava-1.6",
        "qwen": "qwen2-vl-7b",
        **{
            f"microsoft/florence-2-{size}{tuned}": f"florence2-{size}{tuned}"
            for size in ("base", "large")
            for tuned in ("", "-ft")
        },
    }
)


_FAMILY_NAMES = (  # hub ids of models that are not in the list, without asking the hub
    (r"florence-?2", "florence2"),
    (r"gemma-?3(?!n)", "gemma3"),
    (r"llava", "llava"),
    (r"qwen-?(2|2\.5|3)-?vl", "qwen"),
)


def resolve(model: str) -> tuple[str, str]:
    """(family, source) of ``--model``: a short name, a folder, a hub id, or ``endpoint:<the server's model>``.

    Raises InfrastructureError where no backend can load it.
    """
    if model.startswith("endpoint:"):
        return "endpoint", model.partition(":")[2]
    if os.path.isdir(model):
        return _family_of_folder(model), model
    lower = model.lower()
    lower = _ALIASES.get(lower, lower)
    for known in MODELS:
        if lower in (known.short, known.source.lower()):
            return known.family, known.source
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        name = lower.partition("/")[2].replace("_", "-")
        for pattern, family in _FAMILY_NAMES:
            if re.search(pattern, name):
                return family, model
        raise InfrastructureError(
            f"--model {model}: of no family that is known here ({', '.join(FAMILIES)}); a folder's config.json tells it"
        )
    shorts = ", ".join(known.short for known in MODELS)
    raise InfrastructureError(f"--model {model}: neither a folder, nor a hub id, nor a short name ({shorts})")


def _family_of_folder(folder: str) -> str:
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            model_type = json.load(file)["model_type"]
    except OSError:
        raise InfrastructureError(f"--model {folder}: not a model's folder (it has no config.json)") from None
    except (ValueError, KeyError, TypeError):
        raise InfrastructureError(f"--model {folder}: its config.json names no model_type") from None
    for name, family in FAMILIES.items():
        if model_type in family.model_types:
            return name
    types = ", ".join(kind for family in FAMILIES.values() for kind in family.model_types)
    raise InfrastructureError(f"--model {folder}: is a {model_type!r}; there are backends for {types}")


def list_models() -> str:
    """The table of ``--list_models``."""
    rows = [("name", "hub id", "GPU memory, about", "suits")]
    rows += [(m.short, m.source, f"{m.memory_gb:g} GB", m.suits) for m in MODELS]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    lines.append("A folder, another hub id of these families, or endpoint:<model> for a vision server serve as well.")
    return "\n".join(lines)
