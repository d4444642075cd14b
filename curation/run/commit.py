"""Publishes a shard's outputs: they appear complete or not at all, and only one attempt at a shard can commit.

Every output is written under a temporary name in its own folder and is hashed while it is written.  The commit is a
hard link that only one attempt of a generation can create.  After it the files are renamed; any process can finish this
after a crash.

Obsolete outputs are files that the last receipt named and the newest one does not.  Whoever finds one removes it.
Between reading the receipt and removing the file, another attempt may publish a file of the same name, and no
filesystem can remove a file on the condition that it is still the same one.  So the file is first renamed to a name
that only the remover uses, and only then the records are read: if there is no record of a newer commit, the renamed
file cannot belong to one.

Attempts that were killed leave temporary files.  Each process lists a folder once to find them.

What goes to a bucket is uploaded after the commit (``curation.publish``).  Versions before 0.6.0 wrote objects in the
commit; an object that their receipts name stays where it is and counts as published.
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
from curation.run.records import is_object, read_commit, read_receipt, refuse_outside
from curation.shards import record_name
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
        self._name = record_name(shard_id)
        self.receipt_path = folder / f"{self._name}.json"
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
            prefix = f".{self._name}."
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
        outputs = value.get("outputs", [])
        if any(is_object(output["path"]) for output in outputs):  # an upload of an older version: done again, as a file
            record.unlink(missing_ok=True)
            self.prepared(str(value["token"])).unlink(missing_ok=True)
            return False
        folders: set[Path] = set()
        for output in outputs:
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
        return self._folder / temporary_name(self._name, token)

    def record(self, generation: int) -> Path:
        return self._folder / f".{self._name}.{generation}.commit"


def has_obsolete_outputs(root: Path, receipt: Mapping[str, Any] | None) -> bool:
    """Whether an output that ``receipt`` superseded still exists."""
    return any(os.path.lexists(root / path) for path in (receipt or {}).get("superseded", ()) if not is_object(path))


def remove_obsolete(
    root: Path, commit: Commit, receipt: Mapping[str, Any], token: str, dead: Sequence[str] = ()
) -> None:
    """Remove the outputs that ``receipt`` superseded, if it is the newest one, and those that ``dead`` renamed aside.

    token: that of the attempt that removes them.  Raises OSError.
    """
    superseded = [path for path in receipt.get("superseded", []) if not is_object(path)]
    current = commit.read_receipt() if superseded else None
    if current is None or current.get("token") != receipt["token"]:
        return  # the files may belong to a newer receipt
    for path in superseded:
        refuse_outside(commit.receipt_path, root, commit.stage, path)
    for source in ("", *dead):
        moved = [path for path in superseded if _move_aside(root / path, token, source)]
        if not moved:
            continue
        named = _named(commit, int(receipt["generation"]))
        for path in moved:
            aside = _aside(root / path, token)
            if any(_is(aside, output) for output in named if output["path"] == path):
                with contextlib.suppress(FileExistsError, FileNotFoundError):  # restored or removed by another
                    make_link(aside, root / path)
            aside.unlink(missing_ok=True)


def remove_published(root: Path, commit: Commit, receipt: Mapping[str, Any], token: str, paths: Sequence[str]) -> int:
    """Remove outputs whose upload is proved, if ``receipt`` is still the newest one; returns how many.

    The order is that of ``remove_obsolete``, so that a file that another attempt publishes meanwhile stays.

    token: that of whoever removes them, used for nothing else.  Raises OSError.
    """
    removed = 0
    for path in paths:
        refuse_outside(commit.receipt_path, root, commit.stage, path)
        if not _move_aside(root / path, token, ""):
            continue
        aside = _aside(root / path, token)
        record = read_commit(commit.record(int(receipt["generation"]) + 1), commit.root)
        now = commit.read_receipt()
        if record is None and now is not None and now.get("token") == receipt["token"]:
            removed += 1
        elif any(_is(aside, output) for output in _named(commit, int(receipt["generation"])) if output["path"] == path):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                make_link(aside, root / path)
        aside.unlink(missing_ok=True)
    return removed


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

    def look(self, places: Collection[Path]) -> None:
        """Before the commit, list the folders of ``places`` that are not listed yet."""
        for folder in {place.parent for place in places} - self._found.keys():
            found: dict[str, list[str]] = {}
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith((".tmp", ".old")):
                        found.setdefault(_without_token(entry.name), []).append(entry.name)
            self._found[folder] = found

    def clear(self, places: Iterable[Path], own_token: str, dead_tokens: Iterable[str] = ()) -> None:
        """Remove what other attempts left beside ``places``.  ``dead_tokens``: attempts that died since ``look``.

        Raises OSError.
        """
        dead_tokens = list(dead_tokens)
        for place in places:
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
