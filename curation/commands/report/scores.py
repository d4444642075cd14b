"""The scores of a stage that writes parquets: the values of each column of floating-point numbers."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MAX_COLUMNS: Final = 24
MAX_VALUES: Final = 500_000  # of one column
MAX_FILE_BYTES: Final = 4 << 30
_BATCH = 16_384


@dataclass(slots=True)
class ScoreValues:
    """values: column → its numbers, null and NaN left out.  missing: pyarrow is not installed."""

    values: dict[str, array[float]] = field(default_factory=dict)
    missing: bool = False

    def read(self, path: Path) -> None:
        """Add what one file holds.  Raises ValueError for a file that is no parquet, OSError for one that is away."""
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:
            self.missing = True
            return
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes")
        with parquet.ParquetFile(path) as file:
            names = [column.name for column in file.schema_arrow if arrow.types.is_floating(column.type)]
            names = [name for name in names if name in self.values or len(self.values) < MAX_COLUMNS][:MAX_COLUMNS]
            for batch in file.iter_batches(_BATCH, columns=names):
                for name in names:
                    mine = self.values.setdefault(name, array("d"))
                    if len(mine) < MAX_VALUES:
                        column = batch.column(name).drop_null()
                        numbers = column.to_numpy(zero_copy_only=False).astype("float64")
                        mine.extend(numbers[numbers == numbers].tolist())
                if all(len(self.values[name]) >= MAX_VALUES for name in names):
                    break
