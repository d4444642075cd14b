"""Features of the generated pictures, and of the photos that they replace, from runs of stage 06."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash

from curation.commands.audit.groups import is_older
from curation.commands.audit.variety import PictureFeatures, Place
from curation.commands.places import EDITS, HYBRID, METADATA, StagePlace, chosen_by, find_stages, provenance, rejected
from curation.commands.tables.similarity import BLOCK_ROWS, feature_blocks, feature_shape
from curation.commands.tables.tables import ShardTable, find_tables, with_features
from curation.errors import InfrastructureError, UsageError
from curation.extract.outputs import import_arrow
from curation.jsonio import clean_text
from curation.options import logger
from curation.shards import id_of_record

_ENDS: Final = ("-image", "_img")
_NOT_CLIP: Final = "dedup"  # descriptors of copies, whose distances do not say how different the contents are


def feature_folders(root: Path, places: Mapping[str, StagePlace]) -> tuple[Path | None, Path | None]:
    """Returns the folders of stage 06's runs on the generated pictures, and on the source shards, where there are any.

    Of several runs the one on the edits counts before one on the hybrid shards.  Runs that made scores alone do not
    count.
    """
    on_edits = on_hybrid = on_source = None
    for place in find_stages(root):
        if place.stage != METADATA or (read := _read_folder(place)) is None:
            continue
        if EDITS in places and read.is_relative_to(places[EDITS].home):
            on_edits = on_edits or place.home
        elif HYBRID in places and read.is_relative_to(places[HYBRID].home):
            on_hybrid = on_hybrid or place.home
        else:
            on_source = on_source or place.home
    return on_edits or on_hybrid, on_source


def _read_folder(place: StagePlace) -> Path | None:
    """The folder of the shards of which the stage has made features, as one of its receipts names it."""
    for path in place.receipts.glob("[!_.]*/[!.]*.json"):
        receipt = place.done_receipt(id_of_record(path.stem)) or {}
        if not any(str(output.get("path")).endswith(".npz") for output in receipt.get("outputs", ())):
            continue
        sources = receipt.get("sources")
        source = sources[0] if isinstance(sources, list) and sources and isinstance(sources[0], dict) else {}
        if isinstance(folder := source.get("folder"), str) and "\0" not in folder:
            return Path(os.path.realpath(place.home / folder))
    return None


class GroupedShards:
    """Which pictures of a shard were generated, for which group.

    Attributes:
        sampled: Whether only a part of them is taken.
        all_: How many there are.
    """

    def __init__(self, places: Mapping[str, StagePlace], most: int | None, generated: int) -> None:
        """most: how many pictures of all of ``generated`` are taken, chosen by a hash of their keys; None: all."""
        self._edits = places[EDITS]
        self._chosen = chosen_by(places[HYBRID]) if HYBRID in places else None
        self.all_ = generated
        self._bound = (1 << 64) if most is None or most >= generated else (most << 64) // generated
        self.sampled = self._bound < 1 << 64

    def groups_of(self, shard_id: str) -> dict[str, str]:
        """Returns key → group; "" for a sample without one."""
        lost = {str(line.get("key")) for line in rejected(self._chosen, shard_id)} if self._chosen else set()
        found = {}
        for line in provenance(self._edits, shard_id):
            key, group = str(line.get("key")), line.get("group")
            if key not in lost and xxhash.xxh3_64_intdigest(key.encode("utf-8", "replace")) < self._bound:
                found[key] = group if isinstance(group, str) else ""
        return found

    def made_again(self, shard_id: str, features: StagePlace) -> bool:
        """Returns whether stage 03 made pictures of a shard again after its features were computed."""
        receipt, edits = features.done_receipt(shard_id), self._edits.done_receipt(shard_id)
        return receipt is not None and edits is not None and is_older(receipt, edits)


@dataclass(frozen=True, slots=True)
class FeatureRun:
    """The output of a run of stage 06.

    Attributes:
        folder: It.
        flag: Of ``audit`` that names it.
        named: Whether the user has named it; otherwise it was found.
        reads: What stage 06 should have been run on, in words.
    """

    folder: Path
    flag: str
    named: bool
    reads: str

    def __str__(self) -> str:
        return f"{self.flag} {self.folder}" + ("" if self.named else " (found)")

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Names the flag in every error about these files, because nobody may have given the folder."""
        try:
            yield
        except InfrastructureError as error:
            if self.named:
                text = f"{self.flag}: {error}; the flag takes stage 06's output on {self.reads}"
            else:
                text = f"the run of stage 06 that was found on {self.reads} does not fit: {error}; or give another"
                text += f" run's output with {self.flag}"
            raise type(error)(text) from None


def measure_variety(
    run: FeatureRun,
    source: FeatureRun | None,
    feature: str | None,
    near: float,
    grouped: GroupedShards,
    scratch: Path | None,
) -> dict[str, Any]:
    """Returns the diversity and the near copies of the generated pictures, and of the photos that they replace.

    Args:
        run: Stage 06's on the edits or the hybrid shards.
        source: Its run on the source shards; None: the photos are not compared.
        feature: The feature; None: the one that there is.
        near: The least cosine of near copies.
        grouped: Which pictures count.
        scratch: A folder for the vectors; None: the system's temporary folder.

    Raises:
        UsageError: There is no such feature, the runs have features of different widths, or no row belongs to a
            generated picture, or to a photo in a run that the user has named.
    """
    with run.named_in_errors():
        feature = feature or the_feature(run.folder)
        tables = find_tables(run.folder).tables
    if source is not None:
        _check_alike(run, source, feature)
    originals = None
    with tempfile.TemporaryDirectory(prefix=".audit.", dir=scratch) as temporary:
        generated = _measure(run, feature, near, grouped, Path(temporary) / "generated")
        found = _rows_of(generated)
        if not found:
            raise UsageError(
                f"{run}: no row belongs to a generated picture by its shard and key; run stage 06 on the folder of "
                "the edits (--input) and give its output as --features"
            )
        if source is not None:
            originals = _measure(source, feature, near, grouped, Path(temporary) / "source")
    if source is not None and originals is not None and not _rows_of(originals):
        what = f"{source}: no row belongs to a photo that was replaced, by its shard and key"
        if source.named:
            raise UsageError(f"{what}; run stage 06 on the source shards (--input) and give its output")
        logger.warning(f"{what}: the photos are not compared; name the run on the source shards with {source.flag}")
        originals = None
    here = StagePlace(METADATA, run.folder)
    older = sum(grouped.made_again(table.shard_id, here) for table in tables)
    return {
        "feature": feature,
        "near": near,
        "sampled": grouped.sampled,
        "missing": 0 if grouped.sampled else max(0, grouped.all_ - found),
        "older_shards": older,
        "generated": generated,
        "source": originals,
    }


def _check_alike(run: FeatureRun, source: FeatureRun, feature: str) -> None:
    """Looks before hours of work whether both runs have the feature, from models of one size.  Raises UsageError."""
    widths = []
    for one in (run, source):
        with one.named_in_errors():
            _, path = next(with_features(find_tables(one.folder).tables, one.folder, feature))
            widths.append(feature_shape(path, feature)[1])
    if widths[0] != widths[1]:
        raise UsageError(
            f"{source}: {feature} has {widths[1]:,} numbers a picture, and {widths[0]:,} in {run}, so that two models "
            "made them; run stage 06 on one of the two again, with the same --models and weights as on the other, and "
            f"give its output with {run.flag} or {source.flag}"
        )


def _rows_of(measured: Mapping[str, Any]) -> int:
    rows: int = measured["all"]["pictures"] + measured["without_feature"]
    return rows


def the_feature(folder: Path) -> str:
    """Returns the one feature of pictures in the folder's npz files that can say how different pictures are.

    Raises:
        UsageError: There are several, or none.
    """
    tables = find_tables(folder).tables
    names: list[str] = []
    for _, path in with_features(tables[:1], folder, "oai-clip-vit-b32-image"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(name.removesuffix(".npy") for name in archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise InfrastructureError(f"{path}: cannot be read: {error}; run stage 06 again for this shard") from None
    fit = [name for name in names if name.endswith(_ENDS) and not name.startswith(_NOT_CLIP)]
    if len(fit) != 1:
        there = ", ".join(map(clean_text, fit or names)) or "none"
        raise UsageError(f"{folder}: name the feature of the pictures with --feature; there are: {there}")
    return fit[0]


def _measure(run: FeatureRun, feature: str, near: float, grouped: GroupedShards, scratch: Path) -> dict[str, Any]:
    pictures = PictureFeatures(scratch)
    try:
        with run.named_in_errors():
            tables = find_tables(run.folder).tables
            for table, path in with_features(tables, run.folder, feature):
                if groups := grouped.groups_of(table.shard_id):
                    _add(table, path, feature, groups, pictures)
        return pictures.measure(near, _finder(tables))
    finally:
        pictures.close()


def _add(table: ShardTable, path: Path, feature: str, groups: Mapping[str, str], pictures: PictureFeatures) -> None:
    keys, start = _keys(table), 0
    for block in feature_blocks(path, feature, BLOCK_ROWS):
        mine = [row for row in range(len(block)) if start + row < len(keys) and keys[start + row] in groups]
        if mine and pictures.width not in (0, block.shape[1]):
            raise InfrastructureError(
                f"{path}: {feature} has {block.shape[1]:,} numbers a picture, and {pictures.width:,} in the shards "
                "before; run stage 06 again with one model for all shards (--rerun)"
            )
        if mine:
            numbers = [start + row for row in mine]
            pictures.add(table.shard_id, numbers, [groups[keys[number]] for number in numbers], block[mine])
        start += len(block)
    if start != len(keys):
        raise InfrastructureError(
            f"{path}: {start:,} rows, {table.parquet.name} has {len(keys):,}; run stage 06 again for this shard"
        )


def _keys(table: ShardTable) -> list[str]:
    pa, pq = import_arrow()
    try:
        if "key" not in pq.read_schema(table.parquet).names:
            raise UsageError(
                f"{table.parquet}: has no column key, which tells the group of a picture; stage 06 writes it"
            )
        found = pq.read_table(table.parquet, columns=["key"], partitioning=None)["key"].cast(pa.string())
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None
    return [value or "" for value in found.to_pylist()]


def _finder(tables: Iterable[ShardTable]) -> Callable[[Sequence[Place]], list[str]]:
    by_id = {table.shard_id: table for table in tables}

    def find(places: Sequence[Place]) -> list[str]:
        known = {shard_id: _keys(by_id[shard_id]) for shard_id in {shard_id for shard_id, _ in places}}
        return [known[shard_id][row] for shard_id, row in places]

    return find
