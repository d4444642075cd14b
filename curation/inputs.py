"""What a shard is made from: its input files as they are now, and the upstream receipts that vouch for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import ShardError
from curation.publish import fast_digest, read_record
from curation.shards import bucket_of

VERIFY_BYTES = 64 << 20  # inputs up to this size are hashed before they are used; larger ones by those who read them


@dataclass(frozen=True, slots=True)
class Input:
    """One file that a shard is made from.

    stage: the upstream stage whose receipt vouches for it; where that stage left no receipts in the file's folder, or
    with None, the file was made elsewhere and counts by size and modification time.
    optional: it may be absent, and its absence is recorded.
    loose: a folder of files, of which the receipt names each; whoever reads them compares (``published_below``).
    """

    path: Path
    stage: str | None = None
    optional: bool = False
    loose: bool = False


class Upstream:
    """The receipts of upstream stages, found once a folder."""

    def __init__(self) -> None:
        self._places: dict[tuple[Path, str], Path] = {}

    def identify(self, wanted: Input, shard_id: str) -> tuple[dict[str, Any] | None, str]:
        """What the input is now, or None and why the shard is not ready."""
        name = wanted.path.name
        receipts = self._receipts(wanted.path.parent, wanted.stage) if wanted.stage else None
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
        if wanted.loose and (files := _below(wanted.path, home, receipt)):
            lines = "".join(f"{path} {size} {digest}\n" for path, (size, digest) in sorted(files.items()))
            digest = xxhash.xxh3_128_hexdigest(lines.encode("utf-8", "surrogateescape"))
            return {"path": f"{name}/", "files": len(files), "digest": digest}, ""
        for output in receipt.get("outputs", []):
            path = home / output["path"]
            if path.name == name and _real(path.parent) == _real(wanted.path.parent):
                return {"path": name, "size": output["size"], "digest": output["digest"]}, ""
        if wanted.optional:
            return {"path": name, "absent": True}, ""
        return None, f"the receipt of {wanted.stage} names no {name}"

    def _receipts(self, folder: Path, stage: str) -> Path | None:
        place = self._places.get((folder, stage)) or receipts_of(folder, stage)
        if place is not None:  # where there are none yet, the stage may begin while this run goes on
            self._places[(folder, stage)] = place
        return place


def verify_inputs(inputs: Sequence[Input], records: Sequence[dict[str, Any]]) -> None:
    """Raise ShardError unless every input that a receipt vouches for is whole: size, and digest up to 64 MiB."""
    for wanted, record in zip(inputs, records, strict=True):
        if "digest" not in record or wanted.loose:
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
    return _below(folder, receipts.parent.parent, receipt)


def stage_version(folder: Path, stage: str, shard_id: str) -> int | None:
    """The version of ``stage`` that made a shard's files in ``folder``; None for files made elsewhere."""
    receipts = receipts_of(folder, stage)
    receipt = read_record(receipts / bucket_of(shard_id) / f"{shard_id}.json") if receipts else None
    version = receipt.get("version") if receipt else None
    return version if isinstance(version, int) else None


def _below(folder: Path, home: Path, receipt: dict[str, Any]) -> dict[str, tuple[int, str]]:
    start = os.path.relpath(_real(folder.parent) + "/" + folder.name, _real(home)) + "/"
    return {
        output["path"][len(start) :]: (output["size"], output["digest"])
        for output in receipt.get("outputs", [])
        if output["path"].startswith(start)
    }


@lru_cache(maxsize=1024)
def _real(folder: Path) -> str:
    return os.path.realpath(folder)
