"""What the samples of a source shard are chosen by and edited with: its edits, prompts, rejects and the subset."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from curation.choosing import Selection, read_rejected, reject_files
from curation.edits import Edits, LooseEdits, TarredEdits
from curation.errors import UsageError
from curation.jsonio import read_dictionary
from curation.run.inputs import VERIFY_BYTES, Input, published_below, source_inputs
from curation.shards import Shard
from curation.subset import Subset

Records = Mapping[Path, Mapping[str, Any]]
"""What is known of the inputs, by path."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """The folders, and the stages that made what lies in them.

    edits, prompts: (folder, stage), None without.  layout: of the edits.
    """

    edits: tuple[Path, str] | None
    prompts: tuple[Path, str] | None = None
    layout: Literal["auto", "tar", "files"] = "auto"
    drops_missing: bool = False
    drops_rejected: bool = False
    subset: Subset | None = None

    def check(self) -> None:
        """Raises UsageError where nothing is known of what is asked for."""
        if self.subset is not None:
            self.subset.check_order()
        made_by = [(folder / "_receipts" / stage).is_dir() for folder, stage in self._made]
        if self.drops_rejected and not any(made_by):
            raise UsageError(
                "--drop_rejected: neither --prompts nor --edits was made by these stages, so that nothing is known of "
                "rejected samples"
            )

    @property
    def _made(self) -> list[tuple[Path, str]]:
        return [made for made in (self.prompts, self.edits) if made is not None]

    def sources(self, shard: Shard) -> list[Input]:
        """The source shard and its edits."""
        inputs = source_inputs(shard)
        if self.edits is not None:
            folder, stage = self.edits
            if self.layout != "files":
                inputs.append(Input(folder / f"{shard.id}.tar", stage, optional=True))
            if self.layout != "tar":
                inputs.append(Input(folder / shard.id, stage, optional=True, loose=True))
        return inputs

    def inputs(self, shard: Shard) -> list[Input]:
        """And what decides which of its samples go on."""
        inputs = self.sources(shard)
        if self.prompts is not None:
            inputs.append(Input(self.prompts[0] / f"{shard.id}.json", self.prompts[1]))
        if self.drops_rejected:
            for folder, stage in self._made:
                inputs += [Input(path, optional=True) for path in reject_files(folder, stage, shard.id)]
        if self.subset is not None:
            inputs.append(Input(self.subset.path))
        return inputs

    def sources_of(self, shard: Shard) -> list[Input]:
        """``sources`` as inputs of another shard, which is made of several."""
        return [replace(wanted, shard=shard.id) for wanted in self.sources(shard)]

    @contextlib.contextmanager
    def open(self, shard: Shard, records: Records) -> Iterator[tuple[Edits, Selection]]:
        """The shard's edits, and the choice among its samples."""
        prompts = None
        if self.prompts is not None:
            prompts = read_dictionary(self.prompts[0] / f"{shard.id}.json").keys()
        rejected = read_rejected(self._made, shard.id) if self.drops_rejected else None
        with self.open_edits(shard, records) as edits:
            yield (
                edits,
                Selection(
                    edits.keys(), prompts, drops_missing=self.drops_missing, rejected=rejected, subset=self.subset
                ),
            )

    def open_edits(self, shard: Shard, records: Records) -> Edits:
        """The shard's edits, of those files alone that the stage which made them vouches for, where it did."""
        if self.edits is None:
            return LooseEdits(Path(shard.id), {})
        folder, stage = self.edits
        tar, loose = folder / f"{shard.id}.tar", folder / shard.id
        absent = {"absent": True}
        if not (record := records.get(tar, absent)).get("absent"):
            return TarredEdits(tar, record.get("digest") if record["size"] > VERIFY_BYTES else None)
        if not records.get(loose, absent).get("absent"):
            return LooseEdits(loose, published_below(loose, stage, shard.id))
        return LooseEdits(loose, {})
