"""Where ``--captions`` leads: to the rows of stage 05, or to tables of another tool."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from curation.captioned.adopted import AdoptedCaptions, ShardCaptions
from curation.captioned.rows import SYNTHETIC, Captioned, CaptionsOfShard, RowFile
from curation.errors import ShardError, UsageError
from curation.reshard.mix import Mix
from curation.run.inputs import VERIFY_BYTES, Input, check_made_by, receipts_of
from curation.shards import Shard
from curation.storage.files import names_in
from curation.storage.urls import Source

CAPTIONS_STAGE: Final = "05_recaption"
ROWS: Final = "rows"
_BESIDE: Final = (ROWS, "parquet", "captions.jsonl", "all_captions.parquet")  # may be named in place of the folder
_MOST_FILES: Final = 100  # of another tool, all of which are inputs of every shard

Records = Mapping[Source, Mapping[str, Any]]


class CaptionSource:
    """The captions of all shards.

    Args:
        given: A folder of stage 05 or a file in it; or a folder, a file or a glob of another tool's captions.
        output: A folder that gets an index of another tool's captions.
        mix: The weights.

    Attributes:
        mix: The weights.

    Raises:
        UsageError: There are no captions.
    """

    def __init__(self, given: str, output: Path, mix: Mix) -> None:
        self.mix, self._given = mix, given
        self._home = _folder_of_stage_05(Path(given))
        self._tables: AdoptedCaptions | None = None
        if self._home is None:
            if os.path.isdir(given):
                check_made_by("--captions", Path(given), CAPTIONS_STAGE)
            self._tables = AdoptedCaptions([given], output, "--captions")
        elif receipts_of(self._home, CAPTIONS_STAGE) is None and not names_in(self._home / ROWS):
            raise UsageError(f"--captions: {self._home / ROWS} is empty: run stage 05 first")

    def prepare(self) -> None:
        """Write the index of another tool's captions, where there is none yet.

        Raises:
            UsageError: A name that the mix gives a weight is not in any row.
        """
        if self._tables is not None:
            self._tables.prepare()
            if lacking := _lacking(self.mix, {SYNTHETIC, *self._tables.names()}):
                raise UsageError(f"--captions {self._given}: {lacking}")

    def inputs(self, shard: Shard) -> list[Input]:
        """The files with the captions of a shard.  Raises UsageError if nothing tells which these are."""
        if self._tables is None:
            return [Input(self._rows(shard), CAPTIONS_STAGE, below=ROWS)]
        files = self._tables.files
        if len(files) > _MOST_FILES:
            files = [path for path in files if path.with_suffix("").as_posix().endswith(f"/{shard.id}")]
            if not files:
                raise UsageError(
                    f"--captions {self._given}: there are more than {_MOST_FILES} files, and none is called after the "
                    f"shard {shard.id}: call each after its shard, or put all rows into one file"
                )
        return [Input(path) for path in files]

    @contextlib.contextmanager
    def open(self, shard: Shard, records: Records) -> Iterator[CaptionsOfShard]:
        """Open the captions of a shard.

        Args:
            shard: The shard.
            records: The runner's records of its inputs.

        Raises:
            ShardError: They cannot be read, or a name that the mix gives a weight is not in any row.
        """
        if self._tables is not None:
            with contextlib.closing(_OfTables(self._tables.of_shard(shard.id), self.mix)) as found:
                yield found
            return
        path = self._rows(shard)
        record = records.get(path, {})
        whole = record.get("digest") if record.get("size", 0) > VERIFY_BYTES else None
        with contextlib.closing(RowFile(path, self.mix.synthetic, whole)) as rows:
            if rows.count and (lacking := _lacking(self.mix, rows.names)):
                raise ShardError(f"{path}: {lacking}")
            yield rows

    def where(self, shard: Shard) -> str:
        """Where the captions of a shard come from, for messages."""
        return self._given if self._tables is not None else str(self._rows(shard))

    def _rows(self, shard: Shard) -> Path:
        assert self._home is not None
        return self._home / ROWS / f"{shard.id}.jsonl"


class _OfTables:
    """The captions of another tool for one shard, by name."""

    def __init__(self, captions: ShardCaptions, mix: Mix) -> None:
        self._captions, self.names = captions, mix.synthetic

    def find(self, key: str, metadata: Mapping[str, Any]) -> Captioned | None:
        found = self._captions.find(key, metadata)
        if found is None:
            return None
        return Captioned({SYNTHETIC: found.text, **found.named}, found.sha256, found.image_sha256)

    def close(self) -> None:
        self._captions.close()


def _folder_of_stage_05(given: Path) -> Path | None:
    """The output folder of stage 05 that is meant; None if it is not one."""
    if given.is_dir() and (receipts_of(given, CAPTIONS_STAGE) is not None or (given / ROWS).is_dir()):
        return given
    if given.name in _BESIDE and receipts_of(given.parent, CAPTIONS_STAGE) is not None:
        return given.parent
    return given.parent if given.name == ROWS and given.is_dir() else None


def _lacking(mix: Mix, names: Collection[str]) -> str:
    """What is wrong if names that the mix gives a weight are not among these; empty if they all are."""
    lacking = [name for name in mix.synthetic if mix.weights[name] and name not in names]
    if not lacking:
        return ""
    there = f"there are {', '.join(sorted(names))}" if names else "a run of stage 05 with one prompt has synthetic"
    return f"no row has a caption named {', '.join(lacking)}, which --mix names ({there})"
