"""Reading the receipts of all stages below a folder, a bucket at a time, in a few processes.

A shard's receipts of all stages are looked at together, so that what is stale is found by comparing receipts, and
nothing is held but sums.  Nothing is written, and no file is hashed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import orjson

from curation.errors import InfrastructureError
from curation.inspect.counts import Counts
from curation.inspect.places import StagePlace
from curation.run.inputs import receipts_of, vouched_for
from curation.run.ledger import MAX_ATTEMPTS, Epoch
from curation.run.planned import planned
from curation.shards import bucket_of
from curation.storage.files import MAX_RECEIPT_BYTES, read_record

MAX_PROCESSES = 8  # a shared filesystem answers several at once; a login node is not ours alone
_BUCKETS_A_PROCESS = 4  # fewer are not worth starting one for
_READ_BYTES = 256 << 10


@dataclass(slots=True)
class Stage:
    """A stage as status reads it.  planned: bucket → shard ids, None where no run has left its plan.  claimed: shards
    that somebody has a claim on."""

    place: StagePlace
    epochs: list[Epoch]
    planned: dict[str, set[str]] | None
    claimed: set[str] = field(default_factory=set)

    def governing(self, shard_id: str) -> int:
        return next((e.number for e in reversed(self.epochs) if e.covers(shard_id)), 1)


@dataclass(slots=True)
class _Seen:
    """A shard's receipt in one stage, and why it is stale; None while that is not known."""

    receipt: dict[str, Any]
    why: str | None = None


AnyCounts = TypeVar("AnyCounts", bound=Counts)


class Survey:
    """The stages below a folder and what their receipts add up to."""

    def __init__(self, places: Sequence[StagePlace]) -> None:
        self.warnings: list[str] = []
        self.stages = [Stage(place, self._epochs(place), self._planned(place)) for place in places]
        self._index = {str(place.receipts): number for number, place in enumerate(places)}
        self._origins: dict[tuple[int, str, str], tuple[int | None, str]] = {}

    def read(self, new_counts: Callable[[], AnyCounts]) -> list[AnyCounts]:
        """The sums for each stage, in the order of ``stages``.

        new_counts: makes an empty sum.  A command that wants to know more than ``Counts`` holds has a subclass of it.
        """
        names = {name for stage in self.stages for name in _buckets(stage.place.receipts)}
        names |= {name for stage in self.stages for name in stage.planned or ()}
        buckets = sorted(names)
        wanted = min(MAX_PROCESSES, max(2, os.cpu_count() or 1), len(buckets) // _BUCKETS_A_PROCESS)
        if wanted < 2:
            return self._read(buckets, new_counts)
        context = multiprocessing.get_context("fork")  # they inherit what was read so far
        readers = []
        for number in range(wanted):
            mine, theirs = context.Pipe(duplex=False)
            mission = (buckets[number::wanted], new_counts, theirs)
            process = context.Process(target=self._tell, args=mission, daemon=True)
            process.start()
            theirs.close()
            readers.append((process, mine))
        total = [new_counts() for _ in self.stages]
        for process, pipe in readers:
            try:
                part = pipe.recv()
            except EOFError:
                raise InfrastructureError("a process that reads receipts ended without a word") from None
            process.join()
            if isinstance(part, str):
                raise InfrastructureError(part)
            for sum_, counts in zip(total, part, strict=True):
                sum_.add(counts)
        return total

    def _tell(self, buckets: list[str], new_counts: Callable[[], AnyCounts], pipe: Connection) -> None:
        try:
            pipe.send(self._read(buckets, new_counts))
        except InfrastructureError as error:
            pipe.send(str(error))

    def _read(self, buckets: Sequence[str], new_counts: Callable[[], AnyCounts]) -> list[AnyCounts]:
        total = [new_counts() for _ in self.stages]
        for bucket in buckets:
            self._read_bucket(bucket, total)
        return total

    def _read_bucket(self, bucket: str, total: Sequence[Counts]) -> None:
        with contextlib.ExitStack() as stack:
            folders: list[int | None] = []
            names: list[set[str]] = []
            for stage in self.stages:
                folder = _open_folder(stage.place.receipts / bucket)
                if folder is not None:
                    stack.callback(os.close, folder)
                folders.append(folder)
                names.append(set() if folder is None else _receipt_names(folder))
            for shard_id in set().union(*names):
                seen: dict[int, _Seen] = {}
                for number, folder in enumerate(folders):
                    if folder is not None and shard_id in names[number]:
                        receipt = _read_receipt(folder, f"{shard_id}.json")
                        if receipt is None:
                            total[number].unreadable.append(str(self.stages[number].place.receipts / bucket / shard_id))
                        else:
                            seen[number] = _Seen(receipt)
                for number, this in seen.items():
                    try:
                        self._count(number, shard_id, this, seen, total[number])
                    except (TypeError, ValueError, KeyError, AttributeError):  # made by hand
                        total[number].unreadable.append(str(self.stages[number].place.receipts / bucket / shard_id))
            for number, stage in enumerate(self.stages):
                planned = (stage.planned or {}).get(bucket, set())
                total[number].untouched += len(planned - names[number] - stage.claimed)

    def _count(self, number: int, shard_id: str, this: _Seen, seen: dict[int, _Seen], counts: Counts) -> None:
        status = this.receipt.get("status")
        if status == "done":
            counts.add_done(shard_id, this.receipt, self._why_stale(number, shard_id, seen))
        elif status == "failed":
            counts.add_failed(shard_id, this.receipt, MAX_ATTEMPTS)
        elif shard_id not in self.stages[number].claimed:
            counts.again += 1

    def _why_stale(self, number: int, shard_id: str, seen: dict[int, _Seen]) -> str:
        """Why a shard that is done would be done again: ``epoch`` | ``inputs`` | ``upstream``, empty if it is not."""
        this = seen[number]
        if this.why is None:
            this.why = ""  # for stages that read each other's outputs in a circle
            this.why = self._find_why(number, shard_id, this.receipt, seen)
        return this.why

    def _find_why(self, number: int, shard_id: str, receipt: dict[str, Any], seen: dict[int, _Seen]) -> str:
        if receipt.get("epoch") != self.stages[number].governing(shard_id):
            return "epoch"
        why = ""
        for record, source in zip(receipt.get("inputs", ()), receipt.get("sources", ()), strict=False):
            if "stage" not in source:
                continue
            upstream, folder = self._origin(number, source["stage"], source["folder"])
            if upstream is None or upstream == number:  # it does not lie below the folder that is looked at
                continue
            theirs = seen.get(upstream)
            if theirs is None or theirs.receipt.get("status") != "done":
                return "inputs"
            home = str(self.stages[upstream].place.home)
            name, absent = record["path"], record.get("absent") is True
            now = vouched_for(
                f"{folder}/{name.rstrip('/')}", home, theirs.receipt["outputs"], loose=absent or name.endswith("/")
            )
            if now != (None if absent else record):
                return "inputs"
            if self._why_stale(upstream, shard_id, seen):
                why = "upstream"
        return why

    def _origin(self, number: int, stage: str, folder: str) -> tuple[int | None, str]:
        """The stage that vouches for inputs in ``folder``, by its number, and the folder's real path."""
        key = (number, stage, folder)
        if key not in self._origins:
            real = os.path.realpath(self.stages[number].place.home / folder)
            receipts = receipts_of(Path(real), stage)
            place = None if receipts is None else self._index.get(os.path.realpath(receipts))
            self._origins[key] = (place, real)
        return self._origins[key]

    def _epochs(self, place: StagePlace) -> list[Epoch]:
        epochs: list[Epoch] = []
        while (path := place.receipts / f"_epoch.{len(epochs) + 1}.json").exists():
            record = read_record(path)
            if record is None:
                self.warnings.append(f"{path}: not a record of options")
                break
            epochs.append(Epoch.from_record(len(epochs) + 1, record))
        return epochs

    def _planned(self, place: StagePlace) -> dict[str, set[str]] | None:
        """The shards that the runs of a stage set out to do, by bucket."""
        found: dict[str, set[str]] = {}
        for shard_id in planned(place.home, place.stage, self.warnings.append):
            found.setdefault(bucket_of(shard_id), set()).add(shard_id)
        return found or None


def _buckets(receipts: Path) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(receipts) as entries:
        for entry in entries:
            if not entry.name.startswith(("_", ".")) and entry.is_dir():
                yield entry.name


def _open_folder(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None


def _receipt_names(folder: int) -> set[str]:
    return {name[:-5] for name in os.listdir(folder) if name.endswith(".json") and name[0] != "."}


def _read_receipt(folder: int, name: str) -> dict[str, Any] | None:
    try:
        descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
        try:
            data = block = os.read(descriptor, _READ_BYTES)
            while len(block) == _READ_BYTES and len(data) < MAX_RECEIPT_BYTES:
                data += (block := os.read(descriptor, _READ_BYTES))
        finally:
            os.close(descriptor)
        value = orjson.loads(data)
    except (OSError, orjson.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
