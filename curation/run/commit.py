"""Publishes a shard's outputs: they appear complete or not at all, and only one attempt at a shard can commit.

Every output is written under a temporary name in its own folder, or as an upload that is not completed yet, and is
hashed while it is written.  The commit is a hard link that only one attempt of a generation can create.  After it the
files are renamed and the uploads are completed; any process can finish these steps after a crash.

Obsolete outputs are files that the last receipt named and the newest one does not.  Whoever finds one removes it.
Between reading the receipt and removing the file, another attempt may publish a file of the same name, and no
filesystem can remove a file on the condition that it is still the same one.  So the file is first renamed to a name
that only the remover uses, and only then the records are read: if there is no record of a newer commit, the renamed
file cannot belong to one.  An object in a bucket is checked in its place, in the same order, and removed on the
condition that it has not changed.

Attempts that were killed leave temporary files and uploads.  Each process lists a folder once to find the files, and
asks the bucket once for each shard to find the uploads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from curation.errors import InfrastructureError, LostClaim
from curation.jsonio import dump_json
from curation.run.claims import is_gone, read_claim
from curation.run.records import read_commit, read_receipt, refuse_outside
from curation.storage.buckets import Presence, complete_upload, object_at, place_of
from curation.storage.files import (
    _TRIES,
    _own_file_error,
    fast_digest,
    fsync_folder,
    make_link,
    storage_error,
    temporary_name,
    write_durably,
)
from curation.storage.urls import Source, Url


class Commit:
    """The commit of one shard in the receipts folder of one stage.

    root: the stage's output folder; paths in a receipt are relative to it.  folder: the bucket of receipts.
    named: whether a valid record may name this attempt's temporary files.  They must then stay, because another process
    may finish the commit.
    """

    def __init__(self, root: Path, folder: Path, shard_id: str) -> None:
        self.root = root
        self._folder = folder
        self._shard_id = shard_id
        self.stage = folder.parent.name
        self.receipt_path = folder / f"{shard_id}.json"
        self.named = False

    def read_receipt(self) -> dict[str, Any] | None:
        """The shard's receipt; None if there is none or a crash cut it (the shard is then done again).  Raises
        InfrastructureError if the file is JSON and no receipt."""
        return read_receipt(self.receipt_path)

    def write(self, receipt: dict[str, Any]) -> None:
        """Publish the outputs that ``receipt`` names, then the receipt.  The outputs are already durable under their
        temporary names.  Raises LostClaim when another attempt committed first."""
        token, generation = str(receipt["token"]), int(receipt["generation"])
        prepared = self.prepared(token)
        try:
            write_durably(prepared, dump_json(receipt, indent=True))
            winner = self._link(prepared, self.record(generation), receipt)
        except BaseException as error:
            if not self.named:
                with contextlib.suppress(OSError):
                    prepared.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _own_file_error(prepared, error) from error
            raise
        try:
            if self._finish(self.record(generation), winner) and winner.get("token") == token:
                return  # only this process can rename our receipt, so it was published, even if a newer one followed
            final = self.read_receipt()
            if final is not None and final.get("token") == token:
                return
            self.named = False  # another attempt won, so a record of ours is void from here on
            prepared.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.receipt_path, error) from error
        raise LostClaim(f"shard {self._shard_id}: another attempt committed first")

    def finish_pending(self, after_generation: int = 0, names: Iterable[str] | None = None) -> bool:
        """Finish a commit that a dead process left half-done; returns whether there was one.

        A valid record has the generation that follows the receipt's.  So only that record is tried, or the records
        among ``names``, which is a listing of the folder.
        """
        if names is None:
            records = [self.record(after_generation + 1)]
        else:
            prefix = f".{self._shard_id}."
            middles = [n[len(prefix) : -7] for n in names if n.startswith(prefix) and n.endswith(".commit")]
            records = [self.record(int(middle)) for middle in middles if middle.isdecimal()]
        found = False
        for record in records:
            value = read_commit(record, self.root)
            if value is not None:
                found = True
                try:
                    self._finish(record, value)
                except OSError as error:
                    raise storage_error(self.receipt_path, error) from error
        return found

    def _link(self, prepared: Path, record: Path, receipt: dict[str, Any]) -> dict[str, Any]:
        """Step 2: try to link the record; returns the receipt of the attempt that owns it, which may be another."""
        for _ in range(_TRIES):
            try:
                self.named = True
                make_link(prepared, record)
                return receipt
            except FileExistsError:
                self.named = False
                winner = read_commit(record, self.root)
                if winner is not None:
                    # The same file if our link was made but the filesystem's answer was lost.
                    self.named = winner.get("token") == receipt["token"]
                    return winner
                # Another process has just finished this commit.  To go on without a record of our own would be
                # unsafe, so the link is tried again, and step 3 finds our record void.
                time.sleep(0.001)
            except FileNotFoundError:
                self.named = False
                raise LostClaim(f"shard {self._shard_id}: its files were cleared; another attempt won") from None
            except InfrastructureError:  # there are no hard links here
                self.named = False
                raise
        raise InfrastructureError(f"{record}: this file is not a commit record; move it away and start again")

    def _finish(self, record: Path, value: dict[str, Any]) -> bool:
        """Steps 3 and 4.  Any process may run them, in this order, at any time and any number of times.

        Returns whether this call published the receipt; False if another process did, or the record was void.
        """
        current = self.read_receipt()  # after the record was read
        if current is not None and int(current.get("generation", 0)) >= int(value["generation"]):
            record.unlink(missing_ok=True)
            return False
        folders: set[Path] = set()
        for output in value.get("outputs", []):
            if "upload" in output:
                complete_upload(output)
                continue
            final = self.root / output["path"]
            with contextlib.suppress(FileNotFoundError):  # it was renamed before
                os.rename(final.with_name(output["temporary"]), final)
            folders.add(final.parent)
        for folder in folders:
            fsync_folder(folder)
        published = False
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.prepared(str(value["token"])), self.receipt_path)
            published = True
        fsync_folder(self._folder)
        record.unlink(missing_ok=True)
        return published

    def prepared(self, token: str) -> Path:
        """The receipt of an attempt before it is committed."""
        return self._folder / temporary_name(self._shard_id, token)

    def record(self, generation: int) -> Path:
        return self._folder / f".{self._shard_id}.{generation}.commit"


def has_obsolete_outputs(root: Path, receipt: Mapping[str, Any] | None, presence: Presence | None = None) -> bool:
    """Whether an output that ``receipt`` superseded still exists.  presence: which objects exist in buckets."""
    presence = presence or Presence()
    places = (place_of(root, path) for path in (receipt or {}).get("superseded", ()))
    return any(presence.shows(at) if isinstance(at, Url) else os.path.lexists(at) for at in places)


def remove_obsolete(
    root: Path, commit: Commit, receipt: Mapping[str, Any], token: str, dead: Sequence[str] = ()
) -> None:
    """Remove the outputs that ``receipt`` superseded, if it is the newest one, and those that ``dead`` renamed aside.

    token: that of the attempt that removes them.  Raises OSError, and InfrastructureError if a bucket does not answer.
    """
    superseded = receipt.get("superseded", [])
    current = commit.read_receipt() if superseded else None
    if current is None or current.get("token") != receipt["token"]:
        return  # the files may belong to a newer receipt
    places = {path: place_of(root, path) for path in superseded}
    paths = [path for path, place in places.items() if isinstance(place, Path)]
    for path in paths:
        refuse_outside(commit.receipt_path, root, commit.stage, path)
    for source in ("", *dead):
        moved = [path for path in paths if _move_aside(root / path, token, source)]
        if not moved:
            continue
        named = _named(commit, int(receipt["generation"]))
        for path in moved:
            aside = _aside(root / path, token)
            if any(_is(aside, output) for output in named if output["path"] == path):
                with contextlib.suppress(FileExistsError, FileNotFoundError):  # restored or removed by another
                    make_link(aside, root / path)
            aside.unlink(missing_ok=True)
    for path, place in places.items():
        if isinstance(place, Url):
            _remove_object(path, place, commit, int(receipt["generation"]))


def _remove_object(path: str, place: Url, commit: Commit, generation: int) -> None:
    there = object_at(place)
    found = there.info()
    if found is not None and all(output["path"] != path for output in _named(commit, generation)):
        there.remove(found)


def _aside(final: Path, token: str) -> Path:
    return final.with_name(temporary_name(final.name, token, "old"))


def _move_aside(final: Path, token: str, source: str) -> bool:
    """source: the token of the dead attempt that had renamed the file; empty for the file under its own name."""
    try:
        os.rename(_aside(final, source) if source else final, _aside(final, token))
    except FileNotFoundError:
        return False
    return True


def _named(commit: Commit, generation: int) -> list[dict[str, Any]]:
    """The outputs of the newest receipt, and those of the commit that follows it if its record exists.

    generation: that of a receipt that was read before.  The record is read before the receipt: if there is no record
    and the receipt is still the same afterwards, no newer commit has published anything.
    """
    while True:
        record = read_commit(commit.record(generation + 1), commit.root)
        receipt = commit.read_receipt() or {}
        newest = int(receipt.get("generation", 0))
        if newest <= generation:
            return [*receipt.get("outputs", []), *(record or {}).get("outputs", [])]
        generation = newest


def _is(path: Path, output: Mapping[str, Any]) -> bool:
    try:
        return bool(path.stat().st_size == output["size"] and fast_digest(path) == output["digest"])
    except OSError:
        return False


class StaleTempFiles:
    """The temporary files that a folder contained when this process first listed it.

    They are removed shard by shard, and only after this process has committed the shard: an attempt that wrote its
    temporary file earlier had read an older receipt, so its commit is void even if the attempt is still alive.
    """

    def __init__(self) -> None:
        self._found: dict[Path, dict[str, list[str]]] = {}  # folder → the name without token → names
        self._uploads: dict[Url, list[str]] = {}

    def look(self, places: Collection[Source]) -> None:
        """Before the commit, list the folders of ``places`` that are not listed yet, and the uploads to them."""
        for place in places:
            if isinstance(place, Url):  # where listing is not allowed, the bucket's own rules clean up
                with contextlib.suppress(InfrastructureError):
                    self._uploads[place] = object_at(place).under_way()
        for folder in {place.parent for place in places if isinstance(place, Path)} - self._found.keys():
            found: dict[str, list[str]] = {}
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith((".tmp", ".old")):
                        found.setdefault(_without_token(entry.name), []).append(entry.name)
            self._found[folder] = found

    def clear(
        self,
        places: Iterable[Source],
        own_token: str,
        dead_tokens: Iterable[str] = (),
        own_uploads: Collection[str] = (),
    ) -> None:
        """Remove what other attempts left beside ``places``.  ``dead_tokens``: attempts that died since ``look``.

        Raises OSError, and InfrastructureError if a bucket does not answer.
        """
        dead_tokens = list(dead_tokens)
        for place in places:
            if isinstance(place, Url):
                for upload in self._uploads.pop(place, ()):
                    if upload not in own_uploads:
                        object_at(place).abort(upload)
                continue
            own = temporary_name(place.name, own_token)
            names = self._found.get(place.parent, {}).pop(_without_token(own), [])
            for name in {*names, *(temporary_name(place.name, token) for token in dead_tokens)} - {own}:
                place.with_name(name).unlink(missing_ok=True)


def _without_token(name: str) -> str:
    return name.rsplit(".", 2)[0]


def requeue(
    commit: Commit, claim: Path, receipt: Mapping[str, Any], fields: Mapping[str, Any]
) -> Literal["retry", "claimed", "lost"]:
    """Make a shard that has a receipt pending again: commit one with the status ``retry`` in its place.

    The receipt is not deleted, because the commit is safe only while generations grow.

    claim: the path of a worker's claim on the shard.  Returns ``claimed`` if a live worker holds the shard, ``lost``
    if another process is committing it.
    """
    holder = read_claim(claim)
    if holder is not None and not is_gone(holder):  # this commit would discard its work
        return "claimed"
    generation = int(receipt.get("generation", 0))
    if commit.finish_pending(generation):  # a worker died during a newer commit
        return "lost"
    token, now = secrets.token_hex(8), round(time.time(), 3)
    try:
        commit.write({**fields, "status": "retry", "generation": generation + 1, "token": token, "finished": now})
    except LostClaim:
        return "lost"
    return "retry"
