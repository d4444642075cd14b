"""Knows what is done: receipts, versions of the options, and whether a shard is pending, done, failed or blocked.

A ledger belongs to one stage in one output folder.  It consists of files in underscore folders below that folder, so
that every process can read its whole state.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
import xxhash

from curation.errors import InfrastructureError, UsageError
from curation.jsonio import clean_text
from curation.run.claims import Claims
from curation.run.commit import Commit
from curation.run.inputs import (
    Input,
    Upstream,
    numbered,
)
from curation.run.records import is_there, read_receipt
from curation.shards import Shard, bucket_of, record_name, select
from curation.storage.files import link_exclusively, make_folder, names_in, parse_record, read_record, read_whole

MAX_ATTEMPTS = 3  # a shard that failed so often runs again only if a run names it
_TRIES, _RETRY_S = 100, 0.05


@dataclass(frozen=True, slots=True)
class State:
    """``what`` is pending, done, failed or blocked; ``why`` explains the last two; ``inputs`` are the current ones.

    ``first`` names the stage that has to run before, if one is known: ``stage 03``.
    """

    what: str
    why: str = ""
    inputs: tuple[dict[str, Any], ...] = ()
    receipt: dict[str, Any] | None = None
    first: str = ""


@dataclass(frozen=True, slots=True)
class OptionsVersion:
    """One choice of options for a stage on a root.  It covers ``shards``, or all shards if that is None."""

    number: int
    version: int
    options: dict[str, Any]
    shards: frozenset[str] | None
    run_id: str

    @staticmethod
    def from_record(
        number: int,
        record: dict[str, Any],
        before: Mapping[str, Any] = MappingProxyType({}),
        gone: Collection[str] = (),
    ) -> OptionsVersion:
        """The version in a record.

        before: what options were before they existed, for a record that is older than they are.
        gone: options that do not count any more.
        """
        shards = record.get("shards")
        recorded = {name: value for name, value in dict(record.get("options", {})).items() if name not in gone}
        return OptionsVersion(
            number=number,
            version=int(record.get("version", 0)),
            options={**before, **recorded},
            shards=None if shards is None else frozenset(shards),
            run_id=str(record.get("run", "")),
        )

    def covers(self, shard_id: str) -> bool:
        return self.shards is None or shard_id in self.shards

    def same_options(self, options: dict[str, Any], version: int) -> bool:
        return self.version == version and self.options == options


@dataclass(frozen=True, slots=True)
class _Listing:
    """The receipts and the records of unfinished commits in one bucket, as they were when it was listed."""

    receipts: frozenset[str]
    commits: tuple[str, ...]


class Ledger:
    """The receipts of ``stage`` below ``root``.  ``prepare`` creates the folders.

    kept_by_rerun: what --rerun keeps, for the message about changed options.
    before: for each option that older versions of the stage did not have, the value that gives the bytes that they
        wrote.  A record of options that lacks the option counts as a record of this value.
    gone: options that older versions recorded and that do not change the output any more.
    read_only: write nothing; otherwise, reading also finishes commits that a dead process left half-done.
    """

    def __init__(
        self,
        root: Path,
        stage: str,
        version: int,
        options: dict[str, Any],
        *,
        kept_by_rerun: str = "",
        before: Mapping[str, Any] = MappingProxyType({}),
        gone: Collection[str] = (),
        read_only: bool = False,
    ) -> None:
        self.root = root
        self.stage = stage
        self.version = version
        try:
            self.options = orjson.loads(orjson.dumps(options))  # in the form in which a receipt returns them
        except TypeError as error:
            raise UsageError(f"{stage}: an option cannot be recorded: {error}") from None
        self.receipts = root / "_receipts" / stage
        self._kept_by_rerun = kept_by_rerun
        self._before = {name: value for name, value in before.items() if name in options}
        self._gone = frozenset(gone)
        self._read_only = read_only
        self._options_versions: list[OptionsVersion] = []
        self._coming: OptionsVersion | None = None  # the one that this run will begin
        self._entered = 1  # the number of the last options version when this run began
        self._lock = threading.Lock()
        self._listings: dict[str, _Listing] = {}
        self._upstream = Upstream()

    # ---- folders

    def prepare(self, other_outputs: Sequence[Path], *, look: bool = False) -> None:
        """Create the folders, and write a pointer to the receipts in every other output folder.

        look: only check that the other folders point to no other receipts, and write nothing.

        Raises UsageError for a folder that has the outputs of another ``--output``.
        """
        for folder in () if look else (self.root, self.receipts, *other_outputs):
            make_folder(folder)
        for folder in other_outputs:
            if folder.resolve() != self.root.resolve():
                self._leave_pointer(folder, look=look)

    def _leave_pointer(self, folder: Path, *, look: bool) -> None:
        pointer = folder / "_receipts" / self.stage / "_home.json"
        home = os.path.relpath(self.root.resolve(), folder.resolve())
        there = read_record(pointer)
        if there is None and look:
            return
        if there is None:
            make_folder(pointer.parent)
            record = orjson.dumps({"output": home}, option=orjson.OPT_INDENT_2)
            link_exclusively(pointer, record)
            there = read_record(pointer) or {}
        if there.get("output") != home:
            raise UsageError(
                f"{folder}: {self.stage} has put its files there with --output {clean_text(str(there.get('output')))} "
                f"(relative to it); use that --output, or another folder, or remove {pointer} and its files"
            )

    def place(self, kind: str, shard_id: str, suffix: str) -> Path:
        """The path of a shard's file in ``_rejects`` or ``_provenance``."""
        return self.root / f"_{kind}" / self.stage / f"{record_name(shard_id)}{suffix}"

    def commit(self, shard_id: str) -> Commit:
        folder = self.receipts / bucket_of(shard_id)
        return Commit(self.root, folder, shard_id)

    # ---- versions of the options

    @cached_property
    def fingerprint(self) -> str:
        """Part of the names of partial files, so that work done under other options is not reused."""
        # An option that is as it was before it existed does not count, so that an older version's work is used.
        counted = {n: v for n, v in self.options.items() if n not in self._before or v != self._before[n]}
        return xxhash.xxh3_64_hexdigest(orjson.dumps([self.version, counted], option=orjson.OPT_SORT_KEYS))

    def enter(
        self,
        run_id: str,
        rerun: bool,
        subset: Sequence[str] | None,
        selected: Sequence[str],
        claims: Claims | None = None,
        *,
        look: bool = False,
    ) -> bool:
        """Find or create the options version under which this run works.

        Args:
            run_id: What all processes of this run have in common.
            rerun: Whether the user asked for ``--rerun``.
            subset: The shards that a new options version is for; None for all.
            selected: The shards of this run.
            claims: This process's, with which it sees whether others work under a version.  Without them, and without
                ``look``, the options of this run never take the place of others.
            look: Only check, and record nothing.

        Returns:
            Whether there is an options version for this run; with ``look`` there may be none yet.

        Raises:
            UsageError: The stage ran here with other options, and ``rerun`` is not set.
        """
        self.load_options_versions()
        self._coming = None
        covered = None if subset is None else frozenset(subset)
        for _ in range(_TRIES):
            self._entered = max(1, len(self._options_versions))
            superseded: int | None = None  # the number of a version under which nothing was done
            if not rerun and self._options_versions:
                base = self._base_version()
                if self._are_the_same(base, selected):
                    return True
                if not self._may_be_replaced(base, claims, look=look):
                    if self.load_options_versions():
                        continue  # what was done is perhaps that of another process of this run
                    raise self._other_options(base)
                superseded = base.number
            if rerun and any(self._is_of_this_run(past, run_id, covered) for past in self._options_versions):
                return True  # this run began it: in another task, or before the job was requeued
            number = len(self._options_versions) + 1
            new_shards = covered if rerun else None
            if look or self._read_only:
                self._coming = OptionsVersion(number, self.version, self.options, new_shards, run_id)
                return False
            record = self._record(number, new_shards, run_id, superseded)
            if claims is not None:
                claims.heartbeat.works_under(number)  # before it appears, so that nobody takes it for an unused one
            if not link_exclusively(self.receipts / f"_epoch.{number}.json", record):
                time.sleep(_RETRY_S)  # another process was first; its record may take a moment to appear here
            self.load_options_versions()  # the loop then checks again whether it fits
        raise InfrastructureError(f"{self.receipts}: the options of this run cannot be recorded; try again")

    def _record(self, number: int, shards: frozenset[str] | None, run_id: str, superseded: int | None) -> bytes:
        record = {
            "epoch": number,
            "stage": self.stage,
            "version": self.version,
            "options": self.options,
            "shards": None if shards is None else sorted(shards),
            **({} if superseded is None else {"supersedes": superseded}),
            "run": run_id,
        }
        return orjson.dumps(record, option=orjson.OPT_INDENT_2)

    def _is_of_this_run(self, past: OptionsVersion, run_id: str, covered: frozenset[str] | None) -> bool:
        return (
            bool(run_id)
            and past.run_id == run_id
            and past.shards == covered
            and past.same_options(self.options, self.version)
        )

    def governing(self, shard_id: str) -> OptionsVersion:
        """The last options version that covers a shard; the one that this run will begin, if it has looked."""
        if self._coming is not None and self._coming.covers(shard_id):
            return self._coming
        for options in reversed(self._options_versions):
            if options.covers(shard_id):
                return options
        return OptionsVersion(1, self.version, self.options, None, "")  # nothing ran here yet

    def check_options_version(self, shard_id: str, *, look: bool = True) -> None:
        """Raise InfrastructureError if an options version that began after ``enter`` now covers the shard.

        look: first read newer options versions from the disk.
        """
        if look:
            self.load_options_versions()
        if self.governing(shard_id).number > self._entered:
            raise InfrastructureError(
                f"{self.stage} on {self.root}: another run has begun with other options; this older run stops"
            )

    def load_options_versions(self) -> bool:
        """Read the options versions that have begun since the last call; returns whether there are any."""
        found = False
        with self._lock:
            while True:
                number = len(self._options_versions) + 1
                path = self.receipts / f"_epoch.{number}.json"
                data = read_whole(path)
                if data is None:
                    return found
                value = parse_record(data) or read_record(path)  # it may be only a moment old
                if value is None:
                    raise InfrastructureError(
                        f"{path}: not a record of options; move it away to start from the beginning"
                    )
                try:
                    self._options_versions.append(OptionsVersion.from_record(number, value, self._before, self._gone))
                except (TypeError, ValueError):
                    raise InfrastructureError(f"{path}: not a record of options; restore it from a copy") from None
                found = True

    @property
    def options_versions(self) -> Sequence[OptionsVersion]:
        """The versions that ``load_options_versions`` has read, in the order in which they began."""
        return tuple(self._options_versions)

    @property
    def entered(self) -> int:
        """The number of the last options version when this run entered."""
        return self._entered

    def _base_version(self) -> OptionsVersion:
        """The last options version for all shards."""
        return next((e for e in reversed(self._options_versions) if e.shards is None), self._options_versions[0])

    def _are_the_same(self, base: OptionsVersion, selected: Sequence[str]) -> bool:
        if base.same_options(self.options, self.version):
            return True
        # Or this run continues a subset that was rerun with these options.
        return bool(selected) and all(self.governing(s).same_options(self.options, self.version) for s in selected)

    def _may_be_replaced(self, base: OptionsVersion, claims: Claims | None, *, look: bool) -> bool:
        """Whether nothing was done under a version, and (but for ``look``) no other process works under it."""
        if not self._nothing_was_done(base):
            return False
        if look or claims is None:
            return look
        # Asked again, because a process that this one has waited for may have done something in between.
        return not claims.others_work_under(base.number) and self._nothing_was_done(base)

    def _nothing_was_done(self, base: OptionsVersion) -> bool:
        """Whether nothing done would be done again if this run's options took the place of ``base``.

        That is, no shard has an unfinished commit, a partial file, or a receipt of ``base``, of a later version (a
        rerun of some shards), or of an earlier one with this run's options (the rerun was given up).
        """
        kept = {past.number for past in self._options_versions if past.same_options(self.options, self.version)}
        for folder in _folders_in(self.receipts):
            for name in names_in(folder):
                if name.endswith(".commit"):
                    return False
                if name.endswith(".json") and name[0] != ".":
                    epoch = (read_receipt(folder / name) or {}).get("epoch")
                    if not isinstance(epoch, int) or epoch >= base.number or epoch in kept:
                        return False
        return not any(names_in(folder) for folder in _folders_in(self.root / "_partial" / self.stage))

    def _other_options(self, base: OptionsVersion) -> UsageError:
        changes = []
        if base.version != self.version:
            changes.append(f"stage version {base.version} → {self.version}")
        for name in sorted(base.options.keys() | self.options.keys()):
            before, now = base.options.get(name), self.options.get(name)
            if before != now:
                changes.append(f"{name}: {_short(before)} → {_short(now)}")
        return UsageError(
            f"{self.stage} ran on {self.root} with other options ({'; '.join(changes)}). "
            "Use the same ones, another output folder, or --rerun to repeat it with the present ones."
            f"{' ' if self._kept_by_rerun else ''}{self._kept_by_rerun}"
        )

    # ---- states

    def state(self, shard_id: str, inputs: Sequence[Input], *, fresh: bool = False, cursory: bool = False) -> State:
        """Whether a shard should be done.  ``fresh``: read the disk even if the folder's listing has no receipt.

        cursory: the state will be checked again after claiming, so inputs that were made elsewhere are not checked
        if there is no receipt to compare them with.
        """
        cursory = cursory and all(wanted.stage is None and not wanted.optional for wanted in inputs)
        receipt = self.receipt(shard_id, fresh=fresh) if cursory else None
        now: list[dict[str, Any]] = []
        for wanted in () if cursory and receipt is None else inputs:
            record, why = self._upstream.identify(wanted, shard_id, fresh=fresh)
            if record is None:
                return State("blocked", why, first=numbered(wanted.stage))
            now.append(record)
        current = tuple(now)
        if not cursory:
            receipt = self.receipt(shard_id, fresh=fresh)
        in_force = self.governing(shard_id)
        if receipt is None:
            if not in_force.same_options(self.options, self.version):
                return State("blocked", _other_rerun(in_force), current)
            return State("pending", inputs=current)
        gone = next((record["unavailable"] for record in current if "unavailable" in record), None)
        if gone is not None and receipt.get("status") == "done":
            return State("blocked", f"{inputs[0].path}: {gone}; its outputs stay", current, receipt)
        same = receipt.get("epoch") == in_force.number and receipt.get("inputs") == list(current)
        if same and receipt.get("status") == "failed":
            return State("failed", str(receipt.get("error", {}).get("message", "")), current, receipt)
        if same and receipt.get("status") == "done" and self._outputs_are_there(receipt):
            return State("done", inputs=current, receipt=receipt)
        if not in_force.same_options(self.options, self.version):
            return State("blocked", _other_rerun(in_force), current, receipt)
        return State("pending", inputs=current, receipt=receipt)

    def receipt(self, shard_id: str, *, fresh: bool = True) -> dict[str, Any] | None:
        """Finish a commit that a dead process may have left half-done, and return the shard's receipt."""
        commit = self.commit(shard_id)
        if not fresh:
            listing = self._listing(bucket_of(shard_id))
            if not self._read_only and listing.commits and commit.finish_pending(names=listing.commits):
                return commit.read_receipt()
            return commit.read_receipt() if f"{record_name(shard_id)}.json" in listing.receipts else None
        receipt = commit.read_receipt()
        generation = int(receipt.get("generation", 0)) if receipt else 0
        if not self._read_only and commit.finish_pending(generation):
            return commit.read_receipt()
        return receipt

    def forget_listing(self, bucket: str | None = None) -> None:
        """Forget the listing of a bucket, or of all, so that the next call lists the folder again."""
        if bucket is None:
            self._listings.clear()
        else:
            self._listings.pop(bucket, None)

    def _listing(self, bucket: str) -> _Listing:
        """The listing of a bucket.  A process lists a bucket once, and again when the listing proves out of date."""
        listing = self._listings.get(bucket)
        if listing is None:
            names = names_in(self.receipts / bucket)
            receipts = frozenset(name for name in names if not name.startswith("."))
            listing = _Listing(receipts, tuple(name for name in names if name.endswith(".commit")))
            self._listings[bucket] = listing
        return listing

    def _outputs_are_there(self, receipt: dict[str, Any]) -> bool:
        return all(
            is_there(self.root, self.stage, receipt, output)
            for output in receipt.get("outputs", [])
            if output.get("checked", True)
        )


def recorded_options(root: Path, stage: str, shards: str | None = None) -> Mapping[str, Any] | None:
    """The options with which a stage has begun on ``root``; None where it has not.

    shards: the shards of ``--shards``; those of a rerun with options of its own have these.
    """
    ledger = Ledger(root, stage, 0, {}, read_only=True)
    if not ledger.receipts.is_dir():
        return None
    ledger.load_options_versions()
    versions = ledger.options_versions
    if not versions:
        return None
    for version in reversed(versions):
        if version.shards is None:
            return version.options
        ids = [Shard(shard_id, root) for shard_id in sorted(version.shards)]
        if shards is not None and select(ids, shards, may_be_empty=True):
            return version.options
    return versions[0].options


def done_receipts(root: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Yield every receipt of a stage below its output folder, done and failed, in the order of the shards."""
    receipts = root / "_receipts" / stage
    try:
        buckets = sorted(entry.name for entry in os.scandir(receipts) if entry.is_dir())
    except FileNotFoundError:
        return
    for bucket in buckets:
        for name in sorted(os.listdir(receipts / bucket)):
            if name.endswith(".json") and not name.startswith("."):
                receipt = read_receipt(receipts / bucket / name)
                if receipt is not None:
                    yield receipt


def receipts_of_all(root: Path, stage: str, ids: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The receipts of these shards in their order, and the first shard that is not done ("" if all are done)."""
    found = {receipt["shard"]: receipt for receipt in done_receipts(root, stage)}
    receipts: list[dict[str, Any]] = []
    for shard_id in ids:
        receipt = found.get(shard_id)
        if receipt is None or receipt.get("status") != "done":
            return receipts, shard_id
        receipts.append(receipt)
    return receipts, ""


def _other_rerun(version: OptionsVersion) -> str:
    return (
        f"it belongs to a rerun with other options (epoch {version.number}): run it with --shards and those, or use "
        "--rerun --shards to repeat it with the present options"
    )


def _folders_in(folder: Path) -> list[Path]:
    """Its buckets; other files, such as those of a file manager, do not count."""
    return [folder / name for name in names_in(folder) if (folder / name).is_dir()]


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
