"""How different the pictures of a group are, and how many of them are near copies of another one.

The difference is the mean of 1 − cosine over all pairs of a group's pictures, computed exactly from the sum S of its n
unit vectors: 1 − (|S|² − n) / (n(n − 1)).  Its interval is the jackknife's: what the mean would be without one picture
depends on that picture's product with S alone, so that a second pass over the vectors gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from curation.commands.audit.intervals import difference, loss_result, z_of
from curation.commands.audit.words import cell, key_told, reservations, share_text
from curation.commands.tables.similarity import (
    BLOCK_ROWS,
    EXACT_ROWS,
    Groups,
    Rows,
    Vectors,
    cell_pairs,
    exact_pairs,
    import_faiss,
    normalise,
)
from curation.jsonio import clean_text

MAX_GROUPS: Final = 500  # whose sums are kept; pictures of others count among all
CLUSTERS, MEMBERS = 6, 6  # of near copies, that are named

Place = tuple[str, int]
"""A shard and the number of a row of its table."""


class PictureFeatures:
    """Features of pictures, in a scratch file, with the group of each."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch
        self._vectors = Vectors(scratch / "pictures.f32")
        self._numbers: dict[str, int] = {}
        self._groups: list[NDArray[np.int32]] = []
        self._shards: list[tuple[int, str]] = []
        self._rows: list[NDArray[np.int32]] = []
        self.without = 0

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def width(self) -> int:
        """How many numbers a picture has; 0 as long as there is none."""
        return self._vectors.width

    def add(self, shard_id: str, rows: Sequence[int], groups: Sequence[str], features: Rows) -> None:
        """Adds pictures of one shard.

        Args:
            shard_id: The shard.
            rows: The number of each picture in the shard's table.
            groups: Of each picture.
            features: One row for each; one without a length (NaN, zeros) is counted and left out.
        """
        normal, valid = normalise(features)
        self.without += int((~valid).sum())
        self._shards.append((len(self._vectors), shard_id))
        if valid.any():
            self._vectors.append(normal[valid])
        numbers = np.array([self._number_of(group) for group in groups], np.int32)
        self._groups.append(numbers[valid])
        self._rows.append(np.array(rows, np.int32)[valid])

    def _number_of(self, group: str) -> int:
        if group not in self._numbers and len(self._numbers) >= MAX_GROUPS:
            return MAX_GROUPS
        return self._numbers.setdefault(group, len(self._numbers))

    def measure(self, near: float, find_keys: Callable[[Sequence[Place]], Sequence[str]]) -> dict[str, Any]:
        """Returns what is known of the pictures, as a JSON value.

        Args:
            near: Two pictures with at least this cosine are near copies.
            find_keys: Returns the keys of the pictures at some places.
        """
        groups = np.concatenate([np.empty(0, np.int32), *self._groups])
        distances = self._distances(groups)
        exact = len(self) <= EXACT_ROWS
        if not exact:
            import_faiss(f"near copies among more than {EXACT_ROWS:,} pictures")
        found = Groups(len(self))
        pairs = exact_pairs(self._vectors, near) if exact else cell_pairs(self._vectors, near, self._scratch)
        for pair in pairs if len(self) else ():
            found.connect(pair)
        roots = found.roots()
        sizes = np.bincount(roots, minlength=len(roots))
        close = sizes[roots] > 1
        everyone = int(close.sum())
        rows = []
        for name in sorted(self._numbers):
            mine = groups == self._numbers[name]
            count, hits = int(mine.sum()), int(close[mine].sum())
            compared = difference(hits, count, everyone - hits, len(self) - count, len(self._numbers))
            members = np.bincount(roots[mine & close], minlength=len(roots))
            rows.append(
                {
                    "group": clean_text(name),
                    "pictures": count,
                    **distances[self._numbers[name]],
                    "near": loss_result(hits, count, compared),
                    "clusters": int((members > 0).sum()),
                    "largest": int(members.max(initial=0)),
                }
            )
        all_ = {
            "pictures": len(self),
            **distances[-1],
            "near": loss_result(everyone, len(self), None),
            "clusters": int((sizes > 1).sum()),
            "largest": int(sizes.max(initial=0)) if everyone else 0,
        }
        named = self._named(roots, sizes, groups, find_keys)
        index = "exact" if exact else "cells"
        return {"groups": rows, "all": all_, "without_feature": self.without, "index": index, "largest": named}

    def _distances(self, groups: NDArray[np.int32]) -> list[dict[str, Any]]:
        """The mean distance of each group, and last that of all, in two passes over the vectors."""
        kinds, width = len(self._numbers) + 1, max(1, self._vectors.width)
        own = np.where(groups < len(self._numbers), groups, -1)
        sums, squares = np.zeros((kinds, width)), np.zeros(kinds)
        for block, numbers in self._blocks(own):
            for kind, mine in _kinds(numbers, kinds - 1):
                sums[kind] += block[mine].sum(axis=0)
                squares[kind] += np.square(block[mine]).sum()
        counts = np.append(np.bincount(own[own >= 0], minlength=kinds - 1), len(self))
        products = np.square(sums).sum(axis=1)
        spread = np.zeros(kinds)
        for block, numbers in self._blocks(own):
            for kind, mine in _kinds(numbers, kinds - 1):
                spread[kind] += np.square(block[mine] @ sums[kind] - products[kind] / counts[kind]).sum()
        return [_distance(*values) for values in zip(counts, products, squares, spread, strict=True)]

    def _blocks(self, groups: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int32]]]:
        for start in range(0, len(self), BLOCK_ROWS):
            block = self._vectors.read(start, start + BLOCK_ROWS)
            yield block.astype(np.float64), groups[start : start + len(block)]

    def _named(
        self,
        roots: NDArray[np.int64],
        sizes: NDArray[np.int64],
        groups: NDArray[np.int32],
        find_keys: Callable[[Sequence[Place]], Sequence[str]],
    ) -> list[dict[str, Any]]:
        """The largest clusters of near copies, each with its first members."""
        names = {number: clean_text(name) for name, number in self._numbers.items()}
        largest = [root for root in np.lexsort((np.arange(len(sizes)), -sizes))[:CLUSTERS] if sizes[root] > 1]
        members = [np.flatnonzero(roots == root)[:MEMBERS] for root in largest]
        wanted = [self._place(int(row)) for part in members for row in part]
        keys = iter(find_keys(wanted))
        places = iter(wanted)
        return [
            {
                "pictures": int(sizes[root]),
                "first": [
                    {
                        "shard": clean_text(next(places)[0]),
                        "key": key_told(next(keys)),
                        "group": names.get(int(groups[row]), ""),
                    }
                    for row in part
                ],
            }
            for root, part in zip(largest, members, strict=True)
        ]

    def _place(self, row: int) -> Place:
        starts = [start for start, _ in self._shards]
        number = int(np.searchsorted(starts, row, side="right")) - 1
        start, shard_id = self._shards[number]
        return shard_id, int(self._rows[number][row - start])

    def close(self) -> None:
        self._vectors.close()


def _kinds(numbers: NDArray[np.int32], all_: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yields the number of each group in a block with its rows, and last ``all_`` with all rows."""
    for kind in np.unique(numbers[numbers >= 0]):
        yield int(kind), numbers == kind
    yield all_, np.ones(len(numbers), bool)


def _distance(count: int, product: float, squares: float, spread: float) -> dict[str, Any]:
    """The mean distance of all pairs, with the jackknife's interval.

    Args:
        count: Number n of vectors.
        product: |S|², of their sum S.
        squares: The sum of their squared lengths: n, but for rounding.
        spread: The sum of (x·S − mean of x·S)² over the vectors x.
    """
    if count < 2:
        return {"distance": None, "distance_low": None, "distance_high": None}
    mean = float(1 - (product - squares) / (count * (count - 1)))
    if count < 3:
        return {"distance": mean, "distance_low": None, "distance_high": None}
    slope = 2 / ((count - 1) * (count - 2))
    half = z_of() * math.sqrt((count - 1) / count * slope * slope * float(spread))
    return {"distance": mean, "distance_low": mean - half, "distance_high": mean + half}


# ---- as Markdown


def as_markdown(variety: Mapping[str, Any] | None) -> Iterator[str]:
    """The tables about diversity and near copies, or the line that says that nothing was measured."""
    yield ""
    yield "### Diversity and near copies"
    yield ""
    if variety is None:
        yield "Not measured: there are no features of the generated pictures.  Compute them with stage 06 on the folder"
        yield "of the edits (docs/audit.md has the commands), or name a model with --clip."
        return
    source = variety["source"]
    yield f"By {cell(variety['feature'])}, of {variety['generated']['all']['pictures']:,} generated pictures."
    yield f"Two pictures with a cosine of at least {variety['near']:g} are near copies."
    yield ""
    yield "| group | pictures | mean distance | with a near copy | clusters | largest |" + (
        " originals: mean distance | originals: with a near copy |" if source else ""
    )
    yield "|---|---:|---:|---:|---:|---:|" + ("---:|---:|" if source else "")
    originals = {row["group"]: row for row in source["groups"]} if source else {}
    for row in (*variety["generated"]["groups"], {"group": "all", **variety["generated"]["all"]}):
        line = f"| {cell(row['group'])} | {row['pictures']:,} | {distance_text(row)} | {share_text(row['near'])} "
        line += f"| {row['clusters']:,} | {row['largest']:,} |"
        if source:
            other = source["all"] if row["group"] == "all" else originals.get(row["group"])
            line += f" {distance_text(other)} | {share_text(other['near'])} |" if other else " - | - |"
        yield line
    for line in reservations(variety):
        yield ""
        yield line


def distance_text(row: Mapping[str, Any]) -> str:
    if row["distance"] is None:
        return "-"
    if row["distance_low"] is None:
        return f"{row['distance']:.3f}"
    return f"{row['distance']:.3f} ({row['distance_low']:.3f} to {row['distance_high']:.3f})"
