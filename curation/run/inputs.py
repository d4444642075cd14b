"""What a shard is made from: its input files as they are now, and the receipts of the stages that made them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import ShardError
from curation.shards import TAR, Shard, bucket_of
from curation.storage.files import fast_digest, read_record
from curation.storage.remote_read import Unavailable, fetch_info
from curation.storage.urls import Source, Url
from curation.tar.sources import table_of

VERIFY_BYTES = 64 << 20  # inputs up to this size are hashed before they are used; larger ones by those who read them


@dataclass(frozen=True, slots=True)
class Input:
    """One file that a shard is made from: a file or folder, or a remote one, which no stage vouches for.

    stage: the upstream stage whose receipt vouches for it; where that stage left no receipts in the file's folder, or
    with None, the file was made elsewhere and counts by size and modification time.
    optional: it may be absent, and its absence is recorded.
    loose: a folder of files, of which the receipt names each; whoever reads them compares (``published_below``).
    shard: the one whose receipt that is, where it is not the one that is worked on.
    """

    path: Source
    stage: str | None = None
    optional: bool = False
    loose: bool = False
    shard: str | None = None

    def origin(self, root: Path) -> dict[str, str]:
        """For the receipt of a stage whose output folder is ``root``: the input's folder as seen from there, and the
        stage that vouches for it.  Empty for an input that was made elsewhere, or is vouched for by none."""
        if self.stage is None or isinstance(self.path, Url):
            return {}
        return {"stage": self.stage, "folder": os.path.relpath(_real(self.path.parent), _real(root))}


def source_inputs(shard: Shard) -> list[Input]:
    """A source shard that was made elsewhere; of loose files the table beside them too."""
    if isinstance(shard.path, Path) and shard.path.suffix != TAR and shard.path.is_dir():
        return [Input(shard.path), Input(table_of(shard.path), optional=True)]
    return [Input(shard.path)]


class Upstream:
    """The receipts of upstream stages, found once a folder."""

    def __init__(self) -> None:
        self._places: dict[tuple[Path, str], Path] = {}

    def identify(self, wanted: Input, shard_id: str, *, fresh: bool = True) -> tuple[dict[str, Any] | None, str]:
        """What the input is now, or None and why the shard is not ready.

        fresh: of a remote file, not what its listing said.
        """
        if isinstance(wanted.path, Url):
            return _identify_remote(wanted.path, fresh=fresh)
        shard_id = shard_id if wanted.shard is None else wanted.shard
        name = wanted.path.name
        receipts = self._receipts(wanted.path.parent, wanted.stage) if wanted.stage else None
        if receipts is None:
            try:
                there = os.stat(wanted.path)
            except OSError as error:
                if wanted.optional and isinstance(error, FileNotFoundError):
                    return {"path": name, "absent": True}, ""
                return None, f"{wanted.path}: {error.strerror}"
            return {"path": name, "size": there.st_size, "mtime_ns": there.st_mtime_ns}, ""
        receipt = read_record(receipts / bucket_of(shard_id) / f"{shard_id}.json")
        if receipt is None:
            return None, f"{wanted.stage} has no receipt for it yet in {receipts}"
        if receipt.get("status") == "retry":
            return None, f"{wanted.stage} has not done it yet: it is to try it again"
        if receipt.get("status") != "done":
            return None, f"{wanted.stage} failed on it; mend that first (its receipt is in {receipts})"
        place = f"{_real(wanted.path.parent)}/{name}"
        found = vouched_for(place, _real(receipts.parent.parent), receipt.get("outputs", []), loose=wanted.loose)
        if found is None and wanted.optional:
            return {"path": name, "absent": True}, ""
        return found, "" if found else f"the receipt of {wanted.stage} names no {name}"

    def _receipts(self, folder: Path, stage: str) -> Path | None:
        place = self._places.get((folder, stage)) or receipts_of(folder, stage)
        if place is not None:  # where there are none yet, the stage may begin while this run goes on
            self._places[(folder, stage)] = place
        return place


def _identify_remote(file: Url, *, fresh: bool) -> tuple[dict[str, Any] | None, str]:
    """Its size, and its etag or time; of a command, its text.  One that is not to be had is an input of that kind, so
    that the shard fails until that changes."""
    if file.command is not None:
        return {"path": file.name, "command": xxhash.xxh3_128_hexdigest(file.command.encode("utf-8", "replace"))}, ""
    if file.known is not None and not fresh:
        return {"path": file.name, **file.known.record()}, ""
    try:
        return {"path": file.name, **fetch_info(file).record()}, ""
    except Unavailable as error:
        return {"path": file.name, "unavailable": error.why}, ""
    except ShardError as error:
        return None, str(error)


def check_same_remote(inputs: Sequence[Input], records: Sequence[dict[str, Any]]) -> None:
    """Raise ShardError where a remote input is another one than when the shard was begun: each pass reads it anew.

    Of one that cannot be looked at any more, such as by a URL that has expired, nothing is known, and what was read of
    it counts.
    """
    for wanted, record in zip(inputs, records, strict=True):
        if isinstance(wanted.path, Url):
            now, _ = _identify_remote(wanted.path, fresh=True)
            if now is not None and "unavailable" not in now and now != record:
                raise ShardError(f"{wanted.path}: it changed while it was worked on; start again", "changed")


def vouched_for(path: str, home: str, outputs: Sequence[dict[str, Any]], *, loose: bool) -> dict[str, Any] | None:
    """What a receipt says of the input ``path``, as the receipts of those who read it record it; None for nothing.

    home: the real path of the output folder that the paths in ``outputs`` are relative to.  loose: ``path`` may be a
    folder of files that the receipt names.
    """
    name = os.path.basename(path)
    if loose and (files := _below(path, home, outputs)):
        lines = "".join(f"{below} {size} {digest}\n" for below, (size, digest) in sorted(files.items()))
        digest = xxhash.xxh3_128_hexdigest(lines.encode("utf-8", "surrogateescape"))
        return {"path": f"{name}/", "files": len(files), "digest": digest}
    for output in outputs:
        folder, _, end = output["path"].rpartition("/")
        if end == name and f"{_folder_of(home, folder)}/{name}" == path:
            return {"path": name, "size": output["size"], "digest": output["digest"]}
    return None


def verify_inputs(inputs: Sequence[Input], records: Sequence[dict[str, Any]]) -> None:
    """Raise ShardError unless every input that a receipt vouches for is whole: size, and digest up to 64 MiB."""
    for wanted, record in zip(inputs, records, strict=True):
        if "digest" not in record or wanted.loose or isinstance(wanted.path, Url):
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
        return Path(os.path.realpath(folder / str(pointer.get("output", ".")))) / "_receipts" / stage
    return place if place.is_dir() else None


def published_below(folder: Path, stage: str, shard_id: str) -> dict[str, tuple[int, str]] | None:
    """The files below ``folder`` that a shard's receipt of ``stage`` names: path below it → (size, digest).

    None where the stage never ran there: the files were made elsewhere.
    """
    receipts = receipts_of(folder.parent, stage)
    if receipts is None:
        return None
    receipt = read_record(receipts / bucket_of(shard_id) / f"{shard_id}.json") or {}
    place = f"{_real(folder.parent)}/{folder.name}"
    return _below(place, _real(receipts.parent.parent), receipt.get("outputs", []))


def stage_version(folder: Path, stage: str, shard_id: str) -> int | None:
    """The version of ``stage`` that made a shard's files in ``folder``; None for files made elsewhere."""
    receipts = receipts_of(folder, stage)
    receipt = read_record(receipts / bucket_of(shard_id) / f"{shard_id}.json") if receipts else None
    version = receipt.get("version") if receipt else None
    return version if isinstance(version, int) else None


def _below(place: str, home: str, outputs: Sequence[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    start = os.path.relpath(place, home) + "/"
    return {
        output["path"][len(start) :]: (output["size"], output["digest"])
        for output in outputs
        if output["path"].startswith(start)
    }


@lru_cache(maxsize=1024)
def _folder_of(home: str, relative: str) -> str:
    """The real path of the folder ``relative`` to ``home``."""
    return os.path.realpath(os.path.join(home, relative))


@lru_cache(maxsize=1024)
def _real(folder: Path) -> str:
    return os.path.realpath(folder)
