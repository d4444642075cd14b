"""Where stages have run below a folder, and what they left there: receipts, and lines of JSON about samples.

Lines are read leniently: a damaged line is left out, and the others are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from curation.commands.stages import find_script
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.jsonio import clean_text, parse_json
from curation.run.ledger import recorded_options
from curation.shards import record_name, record_path
from curation.storage.files import read_record

# The stages of the published pipeline, by the names that their receipts give.
FACES, PROMPTS, EDITS, HYBRID = "01_filter_noface", "02_captions_processor", "03_generate_images", "04_reshard"
RECAPTION, METADATA = "05_recaption", "06_metadata"
INDEX = "04_index"  # of stage 04 where it regroups, in a folder of its output

MAX_LIST_BYTES: Final = 1 << 30  # of a shard's rejects or drops, unpacked

_POINTER = "_home.json"  # stands in a folder whose receipts are elsewhere


@dataclass(frozen=True, slots=True)
class StagePlace:
    """One stage on one output folder.

    home: the folder, as a real path.
    """

    stage: str
    home: Path

    @property
    def receipts(self) -> Path:
        return self.home / "_receipts" / self.stage

    @property
    def claims(self) -> Path:
        return self.home / "_claims" / self.stage

    @property
    def rejects(self) -> Path:
        return self.home / "_rejects" / self.stage

    def claim(self, shard_id: str) -> Path:
        return record_path(self.claims, shard_id, ".claim")

    def done_receipt(self, shard_id: str) -> dict[str, Any] | None:
        """Returns the receipt of a shard that is done; None for any other."""
        receipt = read_record(record_path(self.receipts, shard_id))
        return receipt if receipt is not None and receipt.get("status") == "done" else None


def find_stages(root: Path) -> list[StagePlace]:
    """Returns the stages whose receipts are in ``root`` or in a folder in it, sorted by name.

    Raises:
        UsageError: There is no such folder, or no stage has run there.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    found: dict[str, StagePlace] = {}
    for folder in homes_below(root):
        for receipts in _folders_in(folder / "_receipts", hidden="."):
            if not (receipts / _POINTER).exists():
                real = Path(os.path.realpath(receipts))
                found[str(real)] = StagePlace(receipts.name, real.parent.parent)
    if not found:
        raise UsageError(f"{root}: no stage has run here or in a folder in it (there is no _receipts/<stage>/)")
    return sorted(found.values(), key=lambda place: (place.stage, place.home))


def chosen_by(hybrid: StagePlace) -> StagePlace:
    """Returns where stage 04 recorded what happened to the samples of each source shard.

    That is its own receipts.  Where it regrouped them (``--shard_size``), its shards are others than the source shards,
    and the receipts of its index say it.
    """
    regroups = "shard_size" in (recorded_options(hybrid.home, HYBRID) or {})
    return StagePlace(INDEX, hybrid.home / "_index") if regroups else hybrid


def of_the_main_job(places: Sequence[StagePlace]) -> list[StagePlace]:
    """Returns the places but for those where stage 04 wrote a subset or mixed captions and applied no edits.

    Where it has applied edits nowhere, all of its places stay.
    """
    edited = [
        place
        for place in places
        if place.stage == HYBRID and (recorded_options(place.home, HYBRID) or {}).get("edits", True)
    ]
    return [place for place in places if place.stage != HYBRID or place in edited or not edited]


def homes_below(root: Path) -> list[Path]:
    """Returns ``root`` and the folders in it, if there are any: where outputs of stages may be."""
    return [root, *_folders_in(root)]


def stage_named(root: Path, stage: str) -> StagePlace:
    """Returns the one stage of that name below ``root``.

    Args:
        root: The folder of a dataset, or of one stage's outputs.
        stage: The name that its receipts have, or what else a numbered script is called: ``03``, ``generate``.

    Raises:
        UsageError: There is none of that name, or more than one.
    """
    places = find_stages(root)
    matching = [place for place in places if place.stage == stage]
    with contextlib.suppress(InfrastructureError):
        number = find_script(stage).name[:3]
        matching = matching or [place for place in places if place.stage.startswith(number)]
    if not matching:
        names = ", ".join(sorted({clean_text(place.stage) for place in places}))
        raise UsageError(f"{root}: there is no stage {stage!r}; there are: {names}")
    if len(matching) > 1:
        folders = ", ".join(str(place.home) for place in matching)
        raise UsageError(f"{root}: {stage} ran on several folders ({folders}); give one of them")
    return matching[0]


def _folders_in(folder: Path, hidden: str = "._") -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.name[0] not in hidden and e.is_dir())
    except OSError:
        return []


def provenance(place: StagePlace, shard_id: str, max_bytes: int = MAX_LIST_BYTES) -> Iterator[dict[str, Any]]:
    """Yields what a stage recorded about each sample of a shard."""
    return json_lines(place.home / "_provenance" / place.stage / f"{record_name(shard_id)}.jsonl", max_bytes)


def rejected(place: StagePlace, shard_id: str, max_bytes: int = MAX_LIST_BYTES) -> Iterator[dict[str, Any]]:
    """Yields the samples of a shard that a stage refused, each with its key, reason and detail."""
    return json_lines(place.rejects / f"{record_name(shard_id)}.jsonl", max_bytes)


def json_lines(path: Path, max_bytes: int = MAX_LIST_BYTES) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a file, one a line.

    Args:
        path: A file that does not exist has no lines.
        max_bytes: Only the file's first bytes are read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes)
    except FileNotFoundError:
        return
    for line in data.splitlines():
        try:
            value = parse_json(line, keep_surrogates=True)
        except SampleError:
            continue
        if isinstance(value, dict):
            yield value
