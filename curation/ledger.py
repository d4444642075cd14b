"""What is done: receipts, epochs of options, and whether a shard is pending, done, failed or blocked.

One ledger is one stage on one output folder.  Everything is files below underscore folders of that folder; nothing
is kept in memory that another process could not read.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import xxhash

from curation.errors import InfrastructureError, ShardError, UsageError
from curation.publish import Commit, fast_digest, link_exclusively, read_record, storage_error

MAX_ATTEMPTS = 3  # a shard that failed so often runs again only when it is named
VERIFY_BYTES = 64 << 20  # inputs up to this size are hashed before they are used; larger ones by those who read them


@dataclass(frozen=True, slots=True)
class Input:
    """One file that a shard is made from.

    stage: the upstream stage whose receipt vouches for it; where that stage left no receipts in the file's folder, or
    with None, the file was made elsewhere and counts by size and modification time.
    optional: it may be absent, and its absence is recorded.
    """

    path: Path
    stage: str | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """``what``: pending | done | failed | blocked; ``why`` for the last two; the inputs as they are now."""

    what: str
    why: str = ""
    inputs: tuple[dict[str, Any], ...] = ()
    receipt: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Epoch:
    """One choice of options for a stage on a root.  ``shards`` None: for all of them."""

    number: int
    version: int
    options: dict[str, Any]
    shards: frozenset[str] | None
    run_id: str

    def covers(self, shard_id: str) -> bool:
        return self.shards is None or shard_id in self.shards

    def same_options(self, options: dict[str, Any], version: int) -> bool:
        return self.version == version and self.options == options


def bucket_of(shard_id: str) -> str:
    """The folder of about a thousand shards that a shard's records live in."""
    if shard_id.isdigit():
        return shard_id[:-3] or "0"
    return "x" + xxhash.xxh3_64_hexdigest(shard_id.encode())[:3]


class Ledger:
    """Receipts of ``stage`` below ``root``.  Reading creates nothing; ``prepare`` makes the folders."""

    def __init__(self, root: Path, stage: str, version: int, options: dict[str, Any]) -> None:
        self.root = root
        self.stage = stage
        self.version = version
        self.options = orjson.loads(orjson.dumps(options))  # as a receipt will give them back
        self.receipts = root / "_receipts" / stage
        self._epochs: list[Epoch] = []
        self._listings: dict[str, set[str]] = {}
        self._upstream: dict[tuple[Path, str], Path | None] = {}

    # ---- folders

    def prepare(self, other_outputs: Sequence[Path]) -> None:
        """Make the folders, and leave a pointer to the receipts in every further output folder."""
        for folder in (self.root, self.receipts, *other_outputs):
            make_folder(folder)
        for folder in other_outputs:
            if folder.resolve() != self.root.resolve():
                place = folder / "_receipts" / self.stage
                make_folder(place)
                home = os.path.relpath(self.root, folder)
                record = orjson.dumps({"output": home}, option=orjson.OPT_INDENT_2)
                link_exclusively(place / "_home.json", record, secrets.token_hex(4))

    def place(self, kind: str, shard_id: str, suffix: str) -> Path:
        """The path of a shard's file in ``_rejects`` or ``_provenance``."""
        return self.root / f"_{kind}" / self.stage / f"{shard_id}{suffix}"

    def commit(self, shard_id: str) -> Commit:
        folder = self.receipts / bucket_of(shard_id)
        return Commit(self.root, folder, shard_id)

    # ---- epochs

    @cached_property
    def fingerprint(self) -> str:
        """Names partial files: work done under other options is not taken up."""
        return xxhash.xxh3_64_hexdigest(orjson.dumps([self.version, self.options], option=orjson.OPT_SORT_KEYS))

    def enter(self, run_id: str, rerun: bool, subset: Sequence[str] | None, selected: Sequence[str]) -> None:
        """Find or make the epoch under which this run works.

        Raises UsageError when the stage ran here with other options and ``rerun`` was not asked for.
        """
        self._load_epochs()
        while True:
            if not rerun:
                if self._epochs:
                    self._insist_on_same_options(selected)
                    return
                shards = None
            else:
                latest = self._epochs[-1] if self._epochs else None
                if latest and run_id and latest.run_id == run_id and latest.same_options(self.options, self.version):
                    return  # another task of this submission made it
                shards = None if subset is None else sorted(subset)
            number = len(self._epochs) + 1
            record = {
                "epoch": number,
                "stage": self.stage,
                "version": self.version,
                "options": self.options,
                "shards": shards,
                "run": run_id,
            }
            data = orjson.dumps(record, option=orjson.OPT_INDENT_2)
            link_exclusively(self.receipts / f"_epoch.{number}.json", data, secrets.token_hex(4))
            self._load_epochs()
            if not rerun:
                continue  # another process may have been first, with other options
            mine = self._epochs[number - 1]
            if mine.run_id == run_id and mine.same_options(self.options, self.version):
                return

    def governing(self, shard_id: str) -> Epoch:
        """The last epoch that covers a shard."""
        for epoch in reversed(self._epochs):
            if epoch.covers(shard_id):
                return epoch
        return Epoch(1, self.version, self.options, None, "")  # nothing ran here yet

    def insist_on_epoch(self, shard_id: str, number: int) -> None:
        """Raise InfrastructureError when a newer epoch has taken the shard over since ``number`` was read."""
        if (self.receipts / f"_epoch.{len(self._epochs) + 1}.json").exists():
            self._load_epochs()
        if self.governing(shard_id).number != number:
            raise InfrastructureError(
                f"{self.stage} on {self.root}: another run began with --rerun and other options; this older run stops"
            )

    def _load_epochs(self) -> None:
        while True:
            path = self.receipts / f"_epoch.{len(self._epochs) + 1}.json"
            value = read_record(path)
            if value is None:
                if path.exists():
                    raise InfrastructureError(f"{path}: not a record of options; move it away to start afresh")
                return
            shards = value.get("shards")
            self._epochs.append(
                Epoch(
                    number=len(self._epochs) + 1,
                    version=int(value.get("version", 0)),
                    options=value.get("options", {}),
                    shards=None if shards is None else frozenset(shards),
                    run_id=str(value.get("run", "")),
                )
            )

    def _insist_on_same_options(self, selected: Sequence[str]) -> None:
        base = next((e for e in reversed(self._epochs) if e.shards is None), self._epochs[0])
        if base.same_options(self.options, self.version):
            return
        if all(self.governing(s).same_options(self.options, self.version) for s in selected):
            return  # going on with a subset that was rerun with these options
        changes = []
        if base.version != self.version:
            changes.append(f"stage version {base.version} → {self.version}")
        for name in sorted(base.options.keys() | self.options.keys()):
            before, now = base.options.get(name), self.options.get(name)
            if before != now:
                changes.append(f"{name}: {_short(before)} → {_short(now)}")
        raise UsageError(
            f"{self.stage} ran on {self.root} with other options ({'; '.join(changes)}). "
            "Use the same ones, another --output, or --rerun to do it again with these."
        )

    # ---- states

    def state(self, shard_id: str, inputs: Sequence[Input], *, fresh: bool = False) -> State:
        """Whether a shard is to be done.  ``fresh``: look at the disk even if the folder's listing knows no receipt."""
        now: list[dict[str, Any]] = []
        for wanted in inputs:
            record, why = self._identify(wanted, shard_id)
            if record is None:
                return State("blocked", why)
            now.append(record)
        current = tuple(now)
        receipt = self.receipt(shard_id, fresh=fresh)
        epoch = self.governing(shard_id)
        if receipt is None:
            if not epoch.same_options(self.options, self.version):
                return State("blocked", f"it belongs to a rerun with other options (epoch {epoch.number})", current)
            return State("pending", inputs=current)
        same = receipt.get("epoch") == epoch.number and receipt.get("inputs") == list(current)
        if same and receipt.get("status") == "failed":
            return State("failed", str(receipt.get("error", {}).get("message", "")), current, receipt)
        if same and self._outputs_are_there(receipt):
            return State("done", inputs=current, receipt=receipt)
        if not epoch.same_options(self.options, self.version):
            why = f"it belongs to a rerun with other options (epoch {epoch.number})"
            return State("blocked", why, current, receipt)
        return State("pending", inputs=current, receipt=receipt)

    def receipt(self, shard_id: str, *, fresh: bool = True) -> dict[str, Any] | None:
        """The shard's receipt, after finishing a commit that a dead process may have left half-done."""
        bucket = bucket_of(shard_id)
        names = self._listing(bucket)
        commit = self.commit(shard_id)
        if any(name.startswith(f".{shard_id}.") and name.endswith(".commit") for name in self._commits(names)):
            commit.finish_pending(self._commits(names))
            names.add(f"{shard_id}.json")
        if not fresh and f"{shard_id}.json" not in names:
            return None
        return commit.read_receipt()

    def forget_listing(self) -> None:
        """Look at the folders again at the next question."""
        self._listings.clear()

    def _listing(self, bucket: str) -> set[str]:
        """The names in a bucket: one listing per bucket and process, until it is known to be out of date."""
        if bucket not in self._listings:
            try:
                self._listings[bucket] = set(os.listdir(self.receipts / bucket))
            except FileNotFoundError:
                self._listings[bucket] = set()
        return self._listings[bucket]

    @staticmethod
    def _commits(names: set[str]) -> list[str]:
        return [name for name in names if name.endswith(".commit")]

    def _outputs_are_there(self, receipt: dict[str, Any]) -> bool:
        for output in receipt.get("outputs", []):
            if not output.get("checked", True):
                continue
            try:
                if os.stat(self.root / output["path"]).st_size != output["size"]:
                    return False
            except OSError:
                return False
        return True

    # ---- inputs

    def _identify(self, wanted: Input, shard_id: str) -> tuple[dict[str, Any] | None, str]:
        """What the input is now, or None and why the shard is not ready."""
        name = wanted.path.name
        receipts = self._upstream_receipts(wanted.path.parent, wanted.stage) if wanted.stage else None
        if receipts is None:
            try:
                found = os.stat(wanted.path)
            except OSError as error:
                if wanted.optional and isinstance(error, FileNotFoundError):
                    return {"path": name, "absent": True}, ""
                return None, f"{wanted.path}: {error.strerror}"
            return {"path": name, "size": found.st_size, "mtime_ns": found.st_mtime_ns}, ""
        receipt = read_record(receipts / bucket_of(shard_id) / f"{shard_id}.json")
        if receipt is None:
            return None, f"{wanted.stage} has no receipt for it yet in {receipts}"
        if receipt.get("status") != "done":
            return None, f"{wanted.stage} failed on it; mend that first (its receipt is in {receipts})"
        home = receipts.parent.parent
        for output in receipt.get("outputs", []):
            if os.path.basename(output["path"]) == name and _same_path(home / output["path"], wanted.path):
                return {"path": name, "size": output["size"], "digest": output["digest"]}, ""
        if wanted.optional:
            return {"path": name, "absent": True}, ""
        return None, f"the receipt of {wanted.stage} names no {name}"

    def _upstream_receipts(self, folder: Path, stage: str) -> Path | None:
        """The receipts folder of ``stage`` for files in ``folder``; None where that stage never ran there."""
        if (folder, stage) not in self._upstream:
            self._upstream[(folder, stage)] = receipts_of(folder, stage)
        return self._upstream[(folder, stage)]


def verify_inputs(inputs: Sequence[Input], records: Sequence[dict[str, Any]]) -> None:
    """Raise ShardError unless every input that a receipt vouches for is whole: size, and digest up to 64 MiB."""
    for wanted, record in zip(inputs, records, strict=True):
        if "digest" not in record:
            continue
        try:
            size = wanted.path.stat().st_size
            whole = size == record["size"] and (size > VERIFY_BYTES or fast_digest(wanted.path) == record["digest"])
        except OSError as error:
            raise ShardError(f"{wanted.path}: cannot be read ({error.strerror})") from error
        if not whole:
            raise ShardError(
                f"{wanted.path}: is not what {wanted.stage} published (its receipt says {record['size']:,} bytes, "
                f"{record['digest']}); run {wanted.stage} again for this shard"
            )


def receipts_of(folder: Path, stage: str) -> Path | None:
    """The receipts folder of ``stage`` for files in ``folder``; None where it never ran there."""
    place = folder / "_receipts" / stage
    pointer = read_record(place / "_home.json")
    if pointer is not None:
        return Path(os.path.normpath(folder / str(pointer.get("output", ".")))) / "_receipts" / stage
    return place if place.is_dir() else None


def stage_version(folder: Path, stage: str, shard_id: str) -> int | None:
    """The version of ``stage`` that made a shard's files in ``folder``; None for files made elsewhere."""
    receipts = receipts_of(folder, stage)
    receipt = read_record(receipts / bucket_of(shard_id) / f"{shard_id}.json") if receipts else None
    version = receipt.get("version") if receipt else None
    return version if isinstance(version, int) else None


def done_receipts(root: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Every receipt of a stage below its output folder, done and failed, in the order of the shards."""
    receipts = root / "_receipts" / stage
    try:
        buckets = sorted(entry.name for entry in os.scandir(receipts) if entry.is_dir())
    except FileNotFoundError:
        return
    for bucket in buckets:
        for name in sorted(os.listdir(receipts / bucket)):
            if name.endswith(".json") and not name.startswith("."):
                receipt = read_record(receipts / bucket / name)
                if receipt is not None:
                    yield receipt


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; InfrastructureError names what stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error


def _same_path(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
