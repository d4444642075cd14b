"""What lies in the folder of an index, and how it is opened: every file is mapped or read in parts, none as a whole.

``index.json`` is written last and names the build, a folder beside it.  The build's files never change:

- ``vectors.npy``: the feature of each row as stage 06 wrote it, not normalised.
- ``samples.arrow``: uid, key, tar, shard, caption and url of each row, in record batches of ``BATCH_ROWS``.
- ``flat.faiss``: all vectors, normalised, for an exact search; or ``lists.faiss`` with ``lists.ivfdata``: an inverted
  file with product quantization (Jégou et al. 2011, doi:10.1109/TPAMI.2010.57), whose lists are mapped from disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from curation import PROGRAM
from curation.commands.search.source import FeatureModel, SourceState
from curation.commands.tables.similarity import Rows, normalise
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.jsonio import clean_text, dump_json, parse_json_object
from curation.storage.files import storage_errors, write_whole

FORMAT = 1
RECORD = "index.json"
VECTORS, SAMPLES, FLAT, LISTS, LISTS_DATA = "vectors.npy", "samples.arrow", "flat.faiss", "lists.faiss", "lists.ivfdata"
TEXTS = ("uid", "key", "tar", "shard", "caption", "url")
BATCH_ROWS = 16_384
BUILD = re.compile(r"[0-9a-f]{32}")
_MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """What ``index.json`` says.

    Attributes:
        build: The folder of the files, named by a digest of what they are made from.
        feature: The feature's name.
        kind: ``exact`` or ``ivfpq``.
        rows: How many vectors there are.
        width: How many numbers each has.
        without_feature: How many samples of the tables are left out, because they have no feature.
        lists: Of ``ivfpq``, how many lists; 0 for exact.
        normalised: How vectors are scaled before they are compared: ``l2``, so that an inner product is a cosine.
        seed: Of the training.
        model: What computed the feature; None where no query can be computed.
        source: The tables, as they were.
        made_by: The version of this project.
    """

    build: str
    feature: str
    kind: str
    rows: int
    width: int
    without_feature: int
    lists: int
    normalised: str
    seed: int
    model: FeatureModel | None
    source: SourceState
    made_by: str

    def write(self, folder: Path) -> None:
        data = dump_json({"format": FORMAT, **asdict(self)}, indent=True) + b"\n"
        with storage_errors(folder / RECORD):
            write_whole(folder / RECORD, data)

    @staticmethod
    def check_place(folder: Path) -> None:
        """Raise UsageError where the folder has an ``index.json`` of another program, which would be replaced."""
        path = folder / RECORD
        try:
            with open(path, "rb") as file:
                told = parse_json_object(file.read(_MAX_RECORD_BYTES))
        except FileNotFoundError:
            return
        except (OSError, SampleError):
            told = {}
        if not {"format", "build"} <= told.keys():
            raise UsageError(f"{path}: is no index of this project; choose another folder")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises UsageError where there is no index, or one of a later version."""
        path = folder / RECORD
        try:
            with open(path, "rb") as file:
                told = parse_json_object(file.read(_MAX_RECORD_BYTES))
        except OSError as error:
            raise UsageError(
                f"{folder}: is no index ({RECORD}: {error.strerror}); `{PROGRAM} index` makes one"
            ) from None
        except SampleError as error:
            raise UsageError(f"{path}: is damaged ({error}); make the index again") from None
        try:
            if told.pop("format") != FORMAT:
                raise ValueError("it is of another version of this project")
            if not BUILD.fullmatch(told["build"]):
                raise ValueError("its build is no digest")
            model, source = told.pop("model"), SourceState(**told.pop("source"))
            return cls(**told, model=None if model is None else FeatureModel(**model), source=source)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path}: is no index that can be read ({clean_text(str(error))}); make it again"
            ) from None


class StoredVectors:
    """The vectors of a build, read by range or by number, normalised: rows × width, float32."""

    def __init__(self, path: Path) -> None:
        """Raises InfrastructureError where it cannot be read."""
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InfrastructureError(f"{path}: cannot be read: {error}; make the index again") from None
        self.path = path
        self.dtype = self._array.dtype
        self._offset: int = self._array.offset
        self._count, self.width = self._array.shape

    def __len__(self) -> int:
        return int(self._count)

    def read(self, start: int, stop: int) -> Rows:
        """Reads and does not map, so that the pages of a whole pass do not stay in this process's memory."""
        stop = min(stop, len(self))
        size = self.width * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), (stop - start) * size, self._offset + start * size)
        return normalise(np.frombuffer(data, self.dtype).reshape(-1, self.width).astype(np.float32))[0]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The vectors of the rows, of length one in double precision."""
        found = np.asarray(self._array[rows], np.float64)
        lengths: NDArray[np.float64] = np.sqrt(np.square(found).sum(axis=1, keepdims=True))
        return found / lengths

    def take_one(self, row: int) -> NDArray[np.float64]:
        """The vector of a row, of length one."""
        one: NDArray[np.float64] = self.take(np.array([row], np.int64))[0]
        return one


class StoredSamples:
    """The texts of the rows, mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowException) as error:
            raise InfrastructureError(f"{path}: cannot be read: {error}; make the index again") from None

    def __getitem__(self, row: int) -> Mapping[str, str | None]:
        batch = self._reader.get_batch(row // BATCH_ROWS)
        return {name: batch.column(name)[row % BATCH_ROWS].as_py() for name in TEXTS}

    def row_of(self, uid: str) -> int | None:
        """The first row that has the uid; None where no row has it."""
        import pyarrow.compute as pc

        for number in range(self._reader.num_record_batches):
            place = pc.index(self._reader.get_batch(number).column("uid"), uid).as_py()
            if place >= 0:
                return number * BATCH_ROWS + int(place)
        return None


@dataclass(frozen=True, slots=True)
class Hit:
    """A sample that was found.  score: its cosine with the query.  texts: uid, key, tar, shard, caption and url."""

    score: float
    texts: dict[str, str | None]


def read_lists(path: Path, faiss: Any) -> Any:
    """Opens ``lists.faiss``; the lists themselves stay on disk, in the file beside it, and are mapped.

    Raises RuntimeError where one of the two files is damaged.
    """
    with silence():
        index = faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)
    data = path.with_name(LISTS_DATA)
    if data.stat().st_size < faiss.downcast_InvertedLists(index.invlists).totsize:  # a mapped page would be missing
        raise RuntimeError(f"{data.name}: it is too short")
    return index


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Faiss prints names and sizes of files on the standard output, which belongs to the command's own result."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what faiss has printed waits in C's own buffer
        os.dup2(kept, 1)
        os.close(kept)
