"""Uploads what the receipts of a stage name and a store lacks, shard by shard, and proves it by receipts of uploads.

Any number of publishers may work on one folder and one store, at any time.  Their claims only save work.  What keeps
the store right is the condition of every write: a first upload must find nothing there, and a newer generation must
find the version that the last receipt of an upload names.  A publisher that was stopped in mid-upload is refused when
it goes on, and reads the receipt again.

An object that is there although no receipt names it is one of these:

- ours, of this generation: a publisher was killed before it could write its receipt.  The object is taken as it is.
- ours, of an older generation: it is replaced.
- ours, of a newer generation: this publisher is late.  It reads the shard's receipt again.
- somebody else's: the run ends, unless ``overwrite`` is given.

Ours are those that have the mark of this folder in their stamp.  The mark is made once for a folder and a store.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import InfrastructureError
from curation.jsonio import clean_text, dump_json
from curation.publish.backlog import Backlog, Due
from curation.publish.store import Changed, Moved, Stamp, Store, StoredFile, Upload
from curation.run.claims import Claims
from curation.run.commit import remove_published
from curation.run.ledger import Ledger
from curation.run.records import UPLOADS, name_in_store, read_receipt, upload_receipt
from curation.shards import bucket_of, record_path
from curation.storage.files import (
    fast_digest,
    link_exclusively,
    make_folder,
    names_in,
    read_record,
    read_whole,
    storage_errors,
    write_whole,
)

logger = logging.getLogger("curation")

# Files of a whole stage beside those of its shards.  They are published last, and may be replaced at any time.
WHOLE_RUN_FILES = (
    "captions.jsonl", "all_captions.parquet", "full_metadata.parquet", "metadata.csv", "wids.json", "sizes.json",
    "MANIFEST.sha256",
)  # fmt: skip
AT_ONCE = 4  # shards in work at the same time, where a store takes one file at a time
_TRIES = 8
_POLL_S = 1.0


class Foreign(InfrastructureError):
    """The store has another file under a name that this folder wants to write."""


@dataclass(frozen=True, kw_only=True)
class PublisherOptions:
    """How to publish.

    Attributes:
        overwrite: Replace files in the store that this folder has not put there.
        remove_local: Remove the outputs of a shard from this filesystem when their upload is proved.
        kept: Outputs whose paths match one of these patterns stay nevertheless, because files of the whole run are made
            from them.
        lease_s: As for ``Claims``.
        stall_s: As for ``Claims``.
    """

    overwrite: bool = False
    remove_local: bool = False
    kept: tuple[str, ...] = ()
    lease_s: float = 60.0
    stall_s: float = 1800.0


@dataclass(slots=True)
class _Apart:
    """Shards that take no further part in a delivery.

    late: The store has a newer generation of theirs.  broken: Their files are not what their receipts say.
    """

    late: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    def __contains__(self, shard_id: str) -> bool:
        return shard_id in self.late or shard_id in self.broken


@dataclass(slots=True)
class Outcome:
    """What a publisher did.

    Attributes:
        shards: Whose upload is proved by a receipt that this publisher wrote.
        files: That it sent, receipts included.
        bytes: Of these.
        adopted: Files that were in the store already.
        removed: Files of this filesystem that were removed after their upload.
        pruned: Files of the store that were removed by ``prune``.
        changed: Outputs that are not what their receipt says (any more), at most a hundred of them.
        left: Shards that were not uploaded because the publisher was stopped.
    """

    shards: int = 0
    files: int = 0
    bytes: int = 0
    adopted: int = 0
    removed: int = 0
    pruned: int = 0
    changed: list[str] = field(default_factory=list)
    left: int = 0


class Publisher:
    """One stage's output folder and one store.

    Args:
        home: The stage's output folder.
        stage: The name of the stage.
        store: Where to publish.
        name: The name of the store's folder below ``_published``.
        options: How.
        stopping: Whether to begin no other shard.
    """

    def __init__(
        self,
        home: Path,
        stage: str,
        store: Store,
        name: str,
        options: PublisherOptions | None = None,
        *,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._home, self._stage, self._store, self._name = home, stage, store, name
        self._options = options or PublisherOptions()
        self._stopping = stopping
        self._backlog = Backlog(home, stage, name)
        self._folder = home / UPLOADS / name / stage
        self._lock = threading.Lock()
        self.outcome = Outcome()

    # ---- all shards

    def go(self, *, is_last: bool = True) -> Outcome:
        """Upload what is missing now.

        is_last: Also wait for what other publishers have begun, and publish the records and the files of the whole run.

        Raises:
            Foreign: The store has somebody else's files.
            InfrastructureError: The store refuses, or files cannot be read.
        """
        make_folder(self._folder)
        claims = Claims(
            self._home / "_claims" / f"{self._stage}.{self._name}", self._options.lease_s, self._options.stall_s
        )
        claims.heartbeat.start()
        try:
            everything = is_last
            while True:
                others = self._round(claims, everything=everything)
                if not (is_last and others) or self._stopping():
                    break
                time.sleep(_POLL_S)
                everything = False
            if is_last and not self._stopping():
                self._publish_records()
                self._publish_whole_files()
        finally:
            claims.heartbeat.stop()
        return self.outcome

    def _round(self, claims: Claims, *, everything: bool) -> int:
        """Upload the shards that are free; returns how many are in the hands of other publishers."""
        others = 0
        at_once = AT_ONCE if self._store.limits.files == 1 else 1
        with ThreadPoolExecutor(at_once, "publish") as pool:
            under_way: set[Any] = set()
            for batch in self._batches(everything=everything):
                if self._stopping():
                    self.outcome.left += len(batch)
                    continue
                while len(under_way) >= at_once:
                    done = next(as_completed(under_way))
                    under_way.remove(done)
                    others += done.result()
                under_way.add(pool.submit(self._publish, claims, batch))
            for done in as_completed(under_way):
                others += done.result()
        return others

    def _batches(self, *, everything: bool) -> Iterator[list[Due]]:
        """Shards that go into the store together: one, or as many as one commit of the hub takes."""
        limits = self._store.limits
        batch: list[Due] = []
        files = size = 0
        for due in self._backlog.shards(everything=everything):
            count = len(due.outputs) + 2
            if batch and (files + count > limits.files or size + due.size > limits.size):
                yield batch
                batch, files, size = [], 0, 0
            batch.append(due)
            files, size = files + count, size + due.size
        if batch:
            yield batch

    # ---- one batch

    def _publish(self, claims: Claims, batch: Sequence[Due]) -> int:
        """Upload some shards; returns how many another publisher has."""
        held = []
        try:
            for due in batch:
                claim = claims.acquire(bucket_of(due.shard_id), due.shard_id)
                if claim is not None:
                    held.append((due, claim))
            others = len(batch) - len(held)
            mine = [due for due, _ in held]
            for _ in range(_TRIES):
                mine = [now for due in mine if (now := self._backlog.of(self._receipt_of(due.shard_id))) is not None]
                if not mine or self._stopping():
                    self.outcome.left += len(mine)
                    break
                mine = self._attempt(mine, claims)
            else:
                raise InfrastructureError(
                    f"{self._store.url}: shards are published again and again: {mine[0].shard_id}"
                )
            return others
        finally:
            for _, claim in held:
                claims.release(claim)

    def _attempt(self, batch: Sequence[Due], claims: Claims) -> list[Due]:
        """Upload shards once; returns those that have a newer receipt by now."""
        sent: dict[str, list[tuple[StoredFile, str]]] = {due.shard_id: [] for due in batch}
        wanted: list[tuple[Due, Upload]] = []
        sound: list[Due] = []
        for due in batch:
            uploads = list(self._uploads(due))
            if all(self._is_readable(upload) for upload in uploads):
                sound.append(due)
                wanted += [(due, upload) for upload in uploads]
        apart = _Apart()
        for due, upload, stored in self._deliver(wanted, apart):
            sent[due.shard_id].append((stored, upload.stamp.digest))
            claims.heartbeat.progress(due.shard_id, 1)
        again, whole = [], []
        for due in sound:
            now = read_receipt(self._receipt_of(due.shard_id)) or {}
            if due.shard_id in apart.late or now.get("token") != due.receipt.get("token"):
                again.append(due)
            elif due.shard_id not in apart.broken:
                whole.append(due)
        self._settle(whole, sent)
        return again

    def _uploads(self, due: Due) -> Iterator[Upload]:
        before = self._last_upload(due)
        for output in due.outputs:
            name = name_in_store(str(output["path"]))
            stamp = self._stamp(str(output["digest"]), due)
            source = self._home / str(output["path"])
            yield Upload(name, source, int(output["size"]), stamp, before.get(name, ""))

    def _settle(self, batch: Sequence[Due], sent: dict[str, list[tuple[StoredFile, str]]]) -> None:
        """Publish the receipts of shards whose outputs are in the store, then the receipts of the uploads."""
        records = []
        for due in batch:
            path = self._receipt_of(due.shard_id)
            data = read_whole(path) or b""
            records.append((due, self._small(str(path.relative_to(self._home)), data, due)))
        apart = _Apart()
        for due, upload, stored in self._deliver(records, apart):
            sent[due.shard_id].append((stored, upload.stamp.digest))
        proofs = []
        for due in batch:
            if due.shard_id in apart:
                continue
            place = upload_receipt(self._home, self._name, self._stage, due.shard_id, due.generation)
            record = self._proof(due, sent[due.shard_id])
            proofs.append((due, replace(self._small(str(place.relative_to(self._home)), record, due), replaces=None)))
        for due, upload, _ in self._deliver(proofs, apart):
            place = self._home / upload.name
            make_folder(place.parent)
            with storage_errors(place):
                write_whole(place, upload.source if isinstance(upload.source, bytes) else b"")
            self._forget_older(due)
            with self._lock:
                self.outcome.shards += 1
            if self._options.remove_local and self._store.conditional:
                self._remove_local(due)

    def _small(self, name: str, data: bytes, due: Due) -> Upload:
        stamp = self._stamp(xxhash.xxh3_128_hexdigest(data), due)
        return Upload(name, data, len(data), stamp, self._last_upload(due).get(name, ""))

    def _proof(self, due: Due, sent: Iterable[tuple[StoredFile, str]]) -> bytes:
        """The receipt of the upload of one shard."""
        files = [
            {
                "name": stored.name,
                "size": stored.size,
                "version": stored.version,
                "checksum": stored.checksum,
                "digest": digest,
            }
            for stored, digest in sent
        ]
        names = {file["name"] for file in files}
        before = self._last_record(due)
        obsolete = [
            file for file in (*before.get("files", ()), *before.get("obsolete", ())) if file["name"] not in names
        ]
        record = {
            "store": self._store.url,
            "stage": self._stage,
            "shard": due.shard_id,
            "generation": due.generation,
            "token": due.receipt.get("token"),
            "files": files,
            **({"obsolete": obsolete} if obsolete else {}),
        }
        return dump_json(record, indent=True)

    # ---- one file

    def _deliver(self, wanted: Sequence[tuple[Due, Upload]], apart: _Apart) -> Iterator[tuple[Due, Upload, StoredFile]]:
        """Send files and yield them as they are stored, as many at once as the store takes.

        apart: receives the shards that take no further part.
        """
        many = self._store.limits.files
        for start in range(0, len(wanted), many):
            part = list(wanted[start : start + many])
            looked = not self._store.conditional
            for _ in range(_TRIES):
                part = [one for one in part if one[0].shard_id not in apart]
                if looked:
                    part = yield from self._adopt(part, apart)
                if not part:
                    break
                try:
                    stored = self._store.send([upload for _, upload in part])
                except Moved:
                    looked = True
                    continue
                except Changed as error:
                    self._note_changed(error.name)
                    apart.broken.update(due.shard_id for due, upload in part if upload.name == error.name)
                    continue
                with self._lock:
                    self.outcome.files += len(part)
                    self.outcome.bytes += sum(upload.size for _, upload in part)
                yield from ((due, upload, file) for (due, upload), file in zip(part, stored, strict=True))
                break
            else:
                names = ", ".join(upload.name for _, upload in part[:3])
                raise InfrastructureError(
                    f"{self._store.url}: {clean_text(names)} change again and again; does another program write there?"
                )

    def _adopt(
        self, part: Sequence[tuple[Due, Upload]], apart: _Apart
    ) -> Generator[tuple[Due, Upload, StoredFile], None, list[tuple[Due, Upload]]]:
        """Yield those that the store has already; return the others with the version that each must replace."""
        left = []
        for due, upload in part:
            found = self._store.look(upload.name)
            if found is not None and self._is_the_same(found, upload):
                with self._lock:
                    self.outcome.adopted += 1
                yield due, upload, found
                continue
            if found is not None and self._is_newer(found, upload):
                apart.late.add(due.shard_id)
                continue
            if found is not None:
                self._refuse_foreign(found, due)
            version = "" if found is None else found.version
            left.append((due, replace(upload, replaces=version if self._store.conditional else None)))
        return left

    def _is_the_same(self, found: StoredFile, upload: Upload) -> bool:
        if found.size != upload.size:
            return False
        if found.stamp is not None:
            return (found.stamp.digest, found.stamp.generation) == (upload.stamp.digest, upload.stamp.generation)
        if not found.checksum:
            return False
        return self._store.checksum_of(found, upload.source) == found.checksum

    def _is_newer(self, found: StoredFile, upload: Upload) -> bool:
        stamp = found.stamp
        return stamp is not None and self._is_ours(stamp) and stamp.generation > upload.stamp.generation

    def _refuse_foreign(self, found: StoredFile, due: Due) -> None:
        """Raise Foreign unless this folder may replace a file of the store."""
        if self._options.overwrite or not self._store.guards:
            return
        known = self._last_upload(due).get(found.name)
        if known is not None and known == found.version:
            return
        if found.stamp is not None and self._is_ours(found.stamp):
            return
        raise Foreign(
            f"{self._store.url}/{clean_text(found.name)}: this file was not put there from {self._home}; publish to "
            "another folder, or use --overwrite to replace what is in the way"
        )

    def _is_readable(self, upload: Upload) -> bool:
        try:
            if isinstance(upload.source, bytes) or os.stat(upload.source).st_size == upload.size:
                return True
        except OSError:
            pass
        self._note_changed(upload.name)
        return False

    def _note_changed(self, name: str) -> None:
        with self._lock:
            if len(self.outcome.changed) < 100:
                self.outcome.changed.append(name)

    # ---- whose files they are

    def _stamp(self, digest: str, due: Due) -> Stamp:
        return Stamp(digest, due.generation, f"{self._mark()}-{due.receipt.get('token', '')}")

    def _is_ours(self, stamp: Stamp) -> bool:
        return stamp.token.partition("-")[0] == self._mark()

    def _mark(self) -> str:
        """The mark of this folder at this store, the same for all publishers and for ever."""
        with self._lock:
            if not hasattr(self, "_known_mark"):
                path = self._home / UPLOADS / self._name / "_mark.json"
                make_folder(path.parent)
                record = {"store": self._store.url, "mark": secrets.token_hex(8)}
                link_exclusively(path, dump_json(record))
                there = read_record(path) or {}
                self._known_mark = str(there.get("mark", ""))
                if not self._known_mark.isalnum():
                    raise InfrastructureError(f"{path}: this is not the mark of a publisher; move it away")
            return self._known_mark

    # ---- receipts of uploads

    def _receipt_of(self, shard_id: str) -> Path:
        return record_path(self._home / "_receipts" / self._stage, shard_id)

    def _generations(self, due: Due) -> list[int]:
        """The generations of which there is a receipt of an upload, the newest first."""
        path = upload_receipt(self._home, self._name, self._stage, due.shard_id, 0)
        start, end = path.name.removesuffix("0.json"), ".json"
        middles = [name[len(start) : -len(end)] for name in names_in(path.parent) if name.startswith(start)]
        return sorted((int(middle) for middle in middles if middle.isdecimal()), reverse=True)

    def _last_record(self, due: Due) -> dict[str, Any]:
        """The newest receipt of an upload of the shard's earlier generations, or nothing."""
        for generation in self._generations(due):
            if generation <= due.generation:
                path = upload_receipt(self._home, self._name, self._stage, due.shard_id, generation)
                if (found := read_record(path)) is not None and isinstance(found.get("files"), list):
                    return found
        return {}

    def _last_upload(self, due: Due) -> dict[str, str]:
        """Name in the store → version, by the newest receipt of an upload."""
        record = self._last_record(due)
        known = [*record.get("obsolete", ()), *record.get("files", ())]
        return {str(file["name"]): str(file["version"]) for file in known if isinstance(file, dict)}

    def _forget_older(self, due: Due) -> None:
        for generation in self._generations(due):
            if generation < due.generation:
                path = upload_receipt(self._home, self._name, self._stage, due.shard_id, generation)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    # ---- local files

    def _remove_local(self, due: Due) -> None:
        paths = [
            str(output["path"])
            for output in due.outputs
            if not str(output["path"]).startswith(("_", "../"))
            and not any(fnmatch.fnmatchcase(str(output["path"]), pattern) for pattern in self._options.kept)
        ]
        commit = Ledger(self._home, self._stage, 0, {}, read_only=True).commit(due.shard_id)
        removed = remove_published(self._home, commit, due.receipt, secrets.token_hex(8), paths)
        with self._lock:
            self.outcome.removed += removed

    # ---- what is obsolete in the store

    def prune(self) -> None:
        """Remove from the store what an earlier generation put there and the newest one does not name.

        Files of shards that this folder does not have any more go too.  Only receipts of uploads tell which files are
        ours, so nobody else's file is removed.
        """
        for bucket in sorted(name for name in names_in(self._folder) if not name.startswith("_")):
            self._prune_receipts(bucket)
            for name in sorted(names_in(self._folder / bucket)):
                path = self._folder / bucket / name
                record = read_record(path)
                if record is None or self._stopping():
                    continue
                shard_id = str(record.get("shard"))
                gone = not self._receipt_of(shard_id).exists()
                files = [*record.get("obsolete", ()), *(record.get("files", ()) if gone else ())]
                for file in files:
                    self._remove(StoredFile(str(file["name"]), int(file["size"]), str(file["version"])))
                if gone:
                    if (proof := self._store.look(str(path.relative_to(self._home)))) is not None:
                        self._remove(proof)
                    with storage_errors(path):
                        path.unlink(missing_ok=True)
                elif files:
                    data = dump_json({name: value for name, value in record.items() if name != "obsolete"}, indent=True)
                    due = Due(shard_id, record, (), 0)
                    self._store.send(
                        [replace(self._small(str(path.relative_to(self._home)), data, due), replaces=None)]
                    )
                    with storage_errors(path):
                        write_whole(path, data)

    def _prune_receipts(self, bucket: str) -> None:
        """Remove from the store the receipts of uploads of older generations."""
        newest: dict[str, int] = {}
        for name in names_in(self._folder / bucket):
            shard, generation = _shard_and_generation(name)
            newest[shard] = max(generation, newest.get(shard, 0))
        below = str((self._folder / bucket).relative_to(self._home))
        for file in list(self._store.list(below)):
            shard, generation = _shard_and_generation(file.name.rpartition("/")[2])
            if 0 < generation < newest.get(shard, 0) and not self._stopping():
                self._remove(file)

    def _remove(self, file: StoredFile) -> None:
        self._store.remove(file)
        self.outcome.pruned += 1

    # ---- what belongs to no shard

    def _publish_records(self) -> None:
        """The options of the stage and its plan, so that ``status`` and ``verify`` work on a copy of the store."""
        folders = (self._home / "_receipts" / self._stage, self._home / "_plan" / self._stage)
        for folder in folders:
            for name in sorted(names_in(folder)):
                path = folder / name
                if name.endswith(".json") and not name.startswith(".") and path.is_file():
                    self._publish_loose(str(path.relative_to(self._home)), path)

    def _publish_whole_files(self) -> None:
        for name in WHOLE_RUN_FILES:
            path = self._home / name
            if path.is_file() and not path.is_symlink():
                self._publish_loose(name, path)

    def _publish_loose(self, name: str, path: Path) -> None:
        """Send a file that no shard's receipt names, if the store has another content under its name."""
        digest, size = fast_digest(path), path.stat().st_size
        place = self._folder / "_whole" / f"{name.replace('/', '%2F')}.json"
        known = read_record(place) or {}
        if known.get("digest") == digest and known.get("size") == size:
            return
        generation = int(known.get("generation", 0)) + 1
        due = Due(name, {"generation": generation, "token": "whole"}, (), size)
        upload = Upload(name, path, size, self._stamp(digest, due), str(known.get("version", "")))
        for _, _, stored in self._deliver([(due, upload)], _Apart()):
            make_folder(place.parent)
            record = {"generation": generation, "digest": digest, "size": size, "version": stored.version}
            with storage_errors(place):
                write_whole(place, dump_json({**record, "checksum": stored.checksum}))


def _shard_and_generation(name: str) -> tuple[str, int]:
    """Of the name of a receipt of an upload; the generation is 0 where it is no such name."""
    stem, _, generation = name.removesuffix(".json").rpartition(".")
    return stem, int(generation) if generation.isdecimal() and name.endswith(".json") else 0


def is_all_published(home: Path, stage: str, name: str) -> bool:
    """Whether every settled shard of a stage has a receipt of its upload."""
    return next(Backlog(home, stage, name).shards(everything=True), None) is None
