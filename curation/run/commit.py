"""Outputs that appear whole or not at all, and the commit that only one attempt at a shard can win.

Every output is written under a temporary name in its own folder, or as an upload that is not completed yet, and is
hashed as it is written.  The commit is a hard link that only one attempt of a generation can create.  Renames and
completions follow, which anyone can finish after a crash.

Obsolete outputs are files that the last receipt named and the newest one does not.  Whoever finds one removes it.
Between a look at the receipt and the removal another attempt may publish a file of the same name, and no filesystem
removes a file only if it is the one that was looked at.  So the file is first renamed aside, under a name of the
remover's own, and only then the records are read: where no record of a newer commit is there, the renamed file cannot
belong to one.  An object in a bucket is looked at in its place, in the same order, and removed on the condition that it
has not changed.

Attempts that were killed leave temporary files, which one listing of a folder by each process finds, and uploads, which
one question for each shard finds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, LostClaim
from curation.jsonio import dump_json
from curation.storage.buckets import Presence, complete_upload, object_at, place_of
from curation.storage.files import (
    _TRIES,
    _own_file_error,
    fast_digest,
    fsync_folder,
    read_record,
    storage_error,
    temporary_name,
    write_durably,
)
from curation.storage.urls import Source, Url


class Commit:
    """The commit of one shard in the receipts folder of one stage.

    root: the stage's output folder, which every path in a receipt is relative to.  folder: the bucket of receipts.
    named: whether a valid record may name this attempt's temporary files, which must then stay for whoever finishes it.
    """

    def __init__(self, root: Path, folder: Path, shard_id: str) -> None:
        self._root = root
        self._folder = folder
        self._shard_id = shard_id
        self.receipt_path = folder / f"{shard_id}.json"
        self.named = False

    def read_receipt(self) -> dict[str, Any] | None:
        """The shard's receipt, None without one, or where the file is no receipt (the shard is then done again)."""
        return read_record(self.receipt_path)

    def write(self, receipt: dict[str, Any]) -> None:
        """Publish the outputs that ``receipt`` names, and the receipt last.  Its outputs are durable under their
        temporary names already.  Raises LostClaim when another attempt won."""
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
                return  # only this process can have renamed our receipt, so it was published, whatever followed it
            final = self.read_receipt()
            if final is not None and final.get("token") == token:
                return
            self.named = False  # whoever won, a record of ours is void from here on
            prepared.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.receipt_path, error) from error
        raise LostClaim(f"shard {self._shard_id}: another attempt committed first")

    def finish_pending(self, after_generation: int = 0, names: Iterable[str] | None = None) -> bool:
        """Finish a commit that a dead process left; whether there was any.

        A valid record has the generation that follows the receipt's: only that one is looked for, or those among
        ``names`` of the folder.
        """
        if names is None:
            records = [self.record(after_generation + 1)]
        else:
            prefix = f".{self._shard_id}."
            middles = [n[len(prefix) : -7] for n in names if n.startswith(prefix) and n.endswith(".commit")]
            records = [self.record(int(middle)) for middle in middles if middle.isdecimal()]
        found = False
        for record in records:
            value = read_record(record)
            if value is not None:
                found = True
                try:
                    self._finish(record, value)
                except OSError as error:
                    raise storage_error(self.receipt_path, error) from error
        return found

    def _link(self, prepared: Path, record: Path, receipt: dict[str, Any]) -> dict[str, Any]:
        """Step 2: the receipt of the attempt that holds the record, which is this one if it could be linked."""
        for _ in range(_TRIES):
            try:
                self.named = True
                os.link(prepared, record)
                return receipt
            except FileExistsError:
                self.named = False
                winner = read_record(record)
                if winner is not None:
                    # True where our link was made, but the filesystem's answer was lost
                    self.named = winner.get("token") == receipt["token"]
                    return winner
                # Finished in between.  Going on without a record of our own would be unsafe: link it, and step 3
                # finds it void.
                time.sleep(0.001)
            except FileNotFoundError:
                self.named = False
                raise LostClaim(f"shard {self._shard_id}: its files were cleared; another attempt won") from None
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    self.named = False
                    raise InfrastructureError(
                        f"{self._folder}: this filesystem has no hard links ({error.strerror}), and commits need them"
                    ) from error
                raise
        raise InfrastructureError(f"{record}: is no record of a commit; move it away and start again")

    def _finish(self, record: Path, value: dict[str, Any]) -> bool:
        """Steps 3 and 4, which any process may take, in this order, at any time, any number of times.

        Returns whether this call put the receipt in its place; False where another had, or the record was void.
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
            final = self._root / output["path"]
            with contextlib.suppress(FileNotFoundError):  # renamed already
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
    """Whether a file is still there that ``receipt`` superseded.  presence: of objects in buckets."""
    presence = presence or Presence()
    places = (place_of(root, path) for path in (receipt or {}).get("superseded", ()))
    return any(presence.shows(at) if isinstance(at, Url) else os.path.lexists(at) for at in places)


def remove_obsolete(
    root: Path, commit: Commit, receipt: Mapping[str, Any], token: str, dead: Sequence[str] = ()
) -> None:
    """Remove what ``receipt`` superseded, if it is the newest one; what ``dead`` had put aside as well.

    token: of the attempt that removes.  Raises OSError, and InfrastructureError where a bucket cannot be asked.
    """
    superseded = receipt.get("superseded", [])
    current = commit.read_receipt() if superseded else None
    if current is None or current.get("token") != receipt["token"]:
        return  # else they may be a newer one's
    places = {path: place_of(root, path) for path in superseded}
    paths = [path for path, place in places.items() if isinstance(place, Path)]
    for source in ("", *dead):
        moved = [path for path in paths if _move_aside(root / path, token, source)]
        if not moved:
            continue
        named = _named(commit, int(receipt["generation"]))
        for path in moved:
            aside = _aside(root / path, token)
            if any(_is(aside, output) for output in named if output["path"] == path):
                with contextlib.suppress(FileExistsError, FileNotFoundError):  # yet a newer one; cleared away
                    os.link(aside, root / path)
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
    """source: the dead attempt that had moved the file already, empty for the file under its own name."""
    try:
        os.rename(_aside(final, source) if source else final, _aside(final, token))
    except FileNotFoundError:
        return False
    return True


def _named(commit: Commit, generation: int) -> list[dict[str, Any]]:
    """The outputs of the newest receipt, and of the commit that follows it where its record is there already.

    generation: of a receipt that was read.  The record is read first: one that is not there is not finished either
    if the receipt is still the same afterwards, so that nothing of it was published before.
    """
    while True:
        record = read_record(commit.record(generation + 1))
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
    """What lay about under temporary names when this process first looked into a folder.

    It is cleared per shard, and only after one's own commit of that shard: an attempt that had written a temporary
    file before then had read an older receipt, so that its own commit, should it still live, is void.
    """

    def __init__(self) -> None:
        self._found: dict[Path, dict[str, list[str]]] = {}  # folder → the name without token → names
        self._uploads: dict[Url, list[str]] = {}

    def look(self, places: Collection[Source]) -> None:
        """List the folders of ``places`` that are not listed yet, and the uploads to them.  Before the commit."""
        for place in places:
            if isinstance(place, Url):  # one that may not be listed is left to the bucket's own rules
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
        """Remove what other attempts left beside ``places``; ``dead_tokens`` are of those that died since the look.

        Raises OSError, and InfrastructureError where a bucket cannot be asked.
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
