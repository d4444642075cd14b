"""The flags of ``select --balance``, what they start, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from curation.commands.tables.tables import with_features
from curation.errors import UsageError
from curation.jsonio import clean_text
from curation.options import at_least, less_than, more_than

if TYPE_CHECKING:  # they are imported where rows are balanced
    from curation.commands.balance.rows import Balanced, BalanceRows

MAX_MATCHES = 20_000  # MetaCLIP's for 400 million samples
# An option → the kinds of --balance that it is for.
_EFFECTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("entries", "max_matches"), ("concepts",)),
        **dict.fromkeys(("feature", "epsilon", "clusters", "keep"), ("clusters",)),
        **dict.fromkeys(("seed", "report"), ("concepts", "clusters")),
    }
)


@dataclass(frozen=True, kw_only=True)
class BalanceOptions:
    """Whether fewer of what is frequent is kept, and how."""

    balance: Literal["concepts", "clusters"] | None = None
    """Of the rows that fulfil the condition (without one, of all), keep fewer of what is frequent.  concepts: as
    MetaCLIP, by the --entries that captions match.  clusters: as SemDeDup, by the --feature of samples."""
    entries: Path | None = None
    """Of --balance concepts: the words and phrases that captions are searched for, one a line, or a JSON list."""
    max_matches: Annotated[int | None, at_least(1)] = None
    """Of --balance concepts: MetaCLIP's t.  An entry with n matches keeps each with the probability min(1, t/n).
    Default: 20000."""
    feature: str | None = None
    """Of --balance clusters: the feature of the npz files that is compared, such as oai-clip-vit-b32-image."""
    epsilon: Annotated[float | None, more_than(0), less_than(2)] = None
    """Of --balance clusters: within a cluster, samples with a cosine above 1 - epsilon are the same."""
    clusters: Annotated[int | None, at_least(1)] = None
    """Of --balance clusters: how many there are.  Default: twice the square root of the number of samples."""
    keep: Literal["hard", "easy", "random"] | None = None
    """Of --balance clusters: which of the same samples is kept.  hard: the farthest from the cluster's centroid.
    easy: the nearest.  random: by a hash of --seed and the uid.  Default: hard."""
    seed: int | None = None
    """Seed of --balance: of its draws, and of k-means.  Default: 0."""
    report: Path | None = None
    """A parquet to write with --balance: each entry or cluster, and how many samples it has before and after."""

    def check_balance(self) -> None:
        """Raise UsageError for flags of --balance that are missing, or that have no effect."""
        needs = {"concepts": ("entries",), "clusters": ("feature", "epsilon"), None: ()}
        for name in needs[self.balance]:
            if getattr(self, name) is None:
                raise UsageError(f"--balance {self.balance} needs --{name}")
        for name, kinds in _EFFECTS.items():
            if getattr(self, name) is not None and self.balance not in kinds:
                kind = f"{kinds[0]} " if len(kinds) == 1 else ""
                raise UsageError(f"--{name} has an effect with --balance {kind}only")

    def balance_rows(self, rows: BalanceRows, folder: Path, threads: int, scratch: Path) -> Balanced:
        """Chooses the rows that stay.

        Args:
            rows: The rows.
            folder: Of their tables, for messages.
            threads: At most.
            scratch: A folder for what is kept of each row.
        """
        from curation.commands.balance.clusters import SemanticSettings, balance_clusters
        from curation.commands.balance.concepts import balance_concepts, read_entries

        if self.balance == "concepts":
            assert self.entries is not None
            entries, most = read_entries(self.entries), self.max_matches or MAX_MATCHES
            return balance_concepts(rows, entries, most, self.seed or 0, scratch)
        assert self.feature is not None and self.epsilon is not None
        features = [path for _, path in with_features(rows.tables, folder, self.feature)]
        settings = SemanticSettings(
            self.feature, self.epsilon, self.clusters, self.keep or "hard", self.seed or 0, threads
        )
        return balance_clusters(rows, features, settings, scratch)


def tell_balance(told: dict[str, Any]) -> None:
    """Counts, and a table of the largest entries or clusters."""
    print(", ".join(f"{name} {value:,}" for name, value in told.items() if isinstance(value, int)))
    if not told["largest"]:
        return
    rows = [[*told["largest"][0]], *([_cell(cell) for cell in row.values()] for row in told["largest"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return clean_text(value)[:60]
    return f"{int(value):,}" if value == int(value) else f"{value:.4g}"
