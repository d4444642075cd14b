"""Models that have a short name, and what is known of them without asking anybody.

The files of the backends declare them.  A **short name** stands for a model's id on the hub, and what a run records is
the id.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.errors import UsageError

_FREE_LICENCES = ("Apache-2.0", "MIT")
_ALIKE = 0.6  # of difflib's ratio, from which a name is probably a misspelt one
MOST_NAMED = 3  # names in a message


@dataclass(frozen=True, slots=True)
class Model:
    """One line of ``--list_models``.

    Attributes:
        short: Its name for ``--model``.
        source: Its id on the hub; for other weights, where they come from, in a few words.
        parameters: Of all its parts together, in thousand millions.
        licence: Of the weights.
        suits: What it is good for, in a few words.
        other_names: Further names, such as the id of a copy in another layout.
        gated: The hub gives the weights only to accounts that have accepted the licence.
        bits: Of one parameter, in the precision in which the weights are kept by default.
        steps: Denoising steps, of a model that generates images.
    """

    short: str
    source: str
    parameters: float
    licence: str
    suits: str = ""
    other_names: tuple[str, ...] = ()
    gated: bool = False
    bits: float = 16
    steps: int | None = None

    @property
    def weights_gb(self) -> float:
        """What the weights take on the device, in GB."""
        return weights_gb(self.parameters, self.bits)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that stands for it: also the hub id without the organisation."""
        return tuple(dict.fromkeys((self.short, self.source, self.source.rpartition("/")[2], *self.other_names)))


def weights_gb(parameters: float, bits: float) -> float:
    """What weights take in memory, in GB (1e9 bytes).

    Args:
        parameters: How many, in thousand millions.
        bits: Of each.
    """
    return parameters * bits / 8


def spelling(name: str) -> str:
    """A name without what people write differently: capitals, and the separators ``-``, ``_``, ``.`` and blanks."""
    return re.sub(r"[-_.\s]+", "", name.casefold())


def find(name: str, models: Sequence[Model]) -> Model | None:
    """The model that has this name, in whatever spelling; None where there is none."""
    wanted = spelling(name)
    return next((model for model in models if wanted in map(spelling, model.names)), None)


def nearest(name: str, names: Sequence[str]) -> list[str]:
    """The names that were probably meant, the likeliest first: those with nearly the same letters, or that contain
    the name."""
    wanted = spelling(name)
    by_spelling = {spelling(known): known for known in names}
    close = difflib.get_close_matches(wanted, by_spelling, MOST_NAMED, _ALIKE)
    close += [known for known in by_spelling if known not in close and len(wanted) > 2 and wanted in known]
    return [by_spelling[known] for known in close[:MOST_NAMED]]


def is_short_name(name: str) -> bool:
    """Whether it can be a short name only: it is neither a path nor a hub id."""
    return "/" not in name and name not in (".", "..") and not name.startswith("~")


def model_of(name: str, models: Sequence[Model], marker: str, *, flag: str = "--model") -> tuple[str, str]:
    """What a value of ``--model`` means: a short name becomes the id on the hub; a path or a hub id stays as it is.

    A local folder with a model goes before a short name; a folder without one does not.

    Args:
        name: What the user wrote.
        models: Those that have short names.
        marker: The file that makes a folder a model, such as ``model_index.json``.
        flag: What messages call it.

    Returns:
        The id, hub id or path, and a line for the log where the name could mean two things ("" where it could not).

    Raises:
        UsageError: It is none of them.  The message names those that were probably meant.
    """
    path = Path(name).expanduser()
    if not is_short_name(name):
        return (str(path) if name.startswith("~") else name), ""
    model = find(name, models)
    if (path / marker).is_file():
        other = f"; the model of that name on the hub is {flag} {model.source}" if model else ""
        return name, f"{flag} {name}: the folder ./{name} of this machine{other}" if model else ""
    if model is not None:
        folder = f"the folder ./{name} is no model (it has no {marker})"
        return model.source, f"{flag} {name}: {model.source} of the hub, for {folder}" if path.exists() else ""
    if os.path.lexists(path):
        return name, ""
    raise UsageError(unknown(name, models, flag))


def unknown(name: str, models: Sequence[Model], flag: str) -> str:
    """What to say of a name that is neither a short name nor a folder."""
    shorts = [model.short for model in models]
    meant = nearest(name, shorts)
    by_short = {model.short: model.source for model in models}
    hint = f"Did you mean {' or '.join(f'{short} ({by_short[short]})' for short in meant)}? " if meant else ""
    return (
        f"{flag} {name}: no model has this short name, and there is no such folder.  {hint}--list_models shows the "
        "short names; a hub id is organisation/name"
    )


def free_alternative(source: str, models: Sequence[Model]) -> Model | None:
    """The model to take in place of one that is gated: not gated, under a free licence, and nearest to it in size.

    In place of a model of unknown size it is the largest of those.
    """
    free = [model for model in models if not model.gated and model.licence in _FREE_LICENCES]
    gated = find(source, models)
    if gated is None:
        return max(free, key=lambda model: model.parameters, default=None)
    return min(free, key=lambda model: abs(model.parameters - gated.parameters), default=None)
