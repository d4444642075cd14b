"""What an index was made from: the tables of a folder with their digests, and the model that computed the feature."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from curation.backends.extract import families
from curation.commands.tables.missing import other_name
from curation.commands.tables.tables import ShardTable
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.extract.api import Directive
from curation.jsonio import clean_text, parse_json_object
from curation.run.ledger import done_receipts
from curation.storage.files import names_in

_MAX_METADATA_BYTES = 1 << 20  # of a table's schema
_SUFFIXES = (".parquet", ".npz")


@dataclass(frozen=True, slots=True)
class SourceState:
    """The tables of a folder at one moment.

    Attributes:
        folder: Their folder, as an absolute path.
        stage: The stage whose receipts name them; "" where the tables were made elsewhere.
        shards: How many shards there are, also those that are not done.
        digest: Of the receipts' digests of tables and features; of names, sizes and times where there are no receipts.
        buckets: The time of each folder of receipts, which changes when a receipt is published in it.
    """

    folder: str
    stage: str
    shards: int
    digest: str
    buckets: Mapping[str, int]

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def change(self) -> str:
        """Returns how the folder differs now, in a sentence; "" where it does not, so that the index is up to date."""
        folder = Path(self.folder)
        if not folder.is_dir():
            return f"{folder} is not there, so nobody can tell whether its tables have changed since"
        if self.stage and _buckets(folder, self.stage) == self.buckets:  # a look at each thousand receipts
            return ""
        now = state_of(folder, self.stage)
        if now.digest == self.digest:
            return ""
        return (
            f"{folder} has changed since the index was made ({self.shards:,} shards then, {now.shards:,} now); "
            "run `index` again with the same flags"
        )


def state_of(folder: Path, stage: str) -> SourceState:
    """Looks at the tables of a folder.

    Args:
        folder: Where they are.
        stage: The stage that has its receipts there; "" for none.
    """
    buckets = _buckets(folder, stage) if stage else {}
    digest, shards = xxhash.xxh3_128(), 0
    for shards, line in enumerate(_of_stage(folder, stage) if stage else _made_elsewhere(folder), 1):  # noqa: B007
        digest.update(line)
    return SourceState(os.path.abspath(folder), stage, shards, digest.hexdigest(), buckets)


def _of_stage(folder: Path, stage: str) -> Iterator[bytes]:
    for receipt in done_receipts(folder, stage):
        outputs = [
            [output["path"], output["size"], output.get("digest")]
            for output in receipt.get("outputs", [])
            if str(output["path"]).endswith(_SUFFIXES)
        ]
        yield orjson.dumps([receipt.get("shard"), receipt.get("status"), sorted(outputs)])


def _made_elsewhere(folder: Path) -> Iterator[bytes]:
    with os.scandir(folder) as entries:
        tables = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.name.endswith(_SUFFIXES))
    for name, size, mtime_ns in tables:
        yield orjson.dumps([os.fsencode(name).hex(), size, mtime_ns])


def _buckets(folder: Path, stage: str) -> dict[str, int]:
    receipts = folder / "_receipts" / stage
    found = {}
    for name in sorted(names_in(receipts)):
        try:
            if (receipts / name).is_dir():
                found[name] = (receipts / name).stat().st_mtime_ns
        except OSError as error:
            raise InfrastructureError(f"{receipts / name}: cannot be read ({error.strerror})") from None
    return found


# ---- the model


@dataclass(frozen=True, slots=True)
class FeatureModel:
    """The model that computed a feature.

    Attributes:
        directive: How stage 06 was asked for it, such as ``oai-clip-vit-b32``.
        revision: Of its weights; "" where the tables do not tell, because another program made them.
    """

    directive: str
    revision: str


def model_of(feature: str, tables: Sequence[ShardTable]) -> FeatureModel | None:
    """Returns the model that computed a feature; None where it is no model of this project, but a plugin's or unknown.

    Raises:
        UsageError: Different models or weights computed it for different shards, so that one query fits only some.
        InfrastructureError: A table cannot be read.
    """
    found: FeatureModel | None = None
    for number, table in enumerate(tables):
        model = _recorded(feature, table)
        if number and model != found:
            raise UsageError(
                f"{table.parquet}: its {clean_text(feature)!r} is of {_told(model)}, and that of the tables before is "
                f"of {_told(found)}; run stage 06 on all shards with one model"
            )
        found = model
    return found


def _told(model: FeatureModel | None) -> str:
    return "an unknown model" if model is None else f"{clean_text(model.directive)} ({clean_text(model.revision)[:60]})"


def _recorded(feature: str, table: ShardTable) -> FeatureModel | None:
    """What a table's own metadata says; where it says nothing, the model is told by the feature's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(table.parquet)
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None
    told = (schema.metadata or {}).get(b"curation")
    names = {feature, other_name(feature)}
    if told is None:
        known = [d for family in families() for d in family.directives if not d.is_prefix]
        return next((FeatureModel(d.name, "") for d in known if names & {*d.outputs(d.name)[1]}), None)
    try:
        models = parse_json_object(told[:_MAX_METADATA_BYTES]).get("models")
    except SampleError:
        models = None
    for name, model in models.items() if isinstance(models, dict) else ():
        known_one = _directive(name)
        if known_one is not None and names & {*known_one.outputs(name)[1]} and isinstance(model, dict):
            return FeatureModel(name, str(model.get("revision", "")))
    return None


def _directive(name: str) -> Directive | None:
    every = {d.name: d for family in families() for d in family.directives}
    prefix, colon, _ = name.partition(":")
    return every.get(f"{prefix}:") if colon else every.get(name)
