"""What a shard is made from: its input files as they are now, and the receipts of the stages that made them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import ShardError, UsageError
from curation.run.records import read_receipt
from curation.shards import TAR, Shard, folders_of, home_of, record_path
from curation.storage.files import fast_digest, names_in, read_record
from curation.storage.remote_read import Unavailable, fetch_info
from curation.storage.urls import Source, Url
from curation.tar.sources import table_of

VERIFY_BYTES = 64 << 20  # inputs up to this size are hashed before use; larger ones while they are read


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a shard: a file, a folder, or a remote file, which no stage's receipt records.

    stage: the upstream stage whose receipt records the input.  If it is None, or that stage left no receipts in
    the file's folder, the file was made elsewhere and is identified by its size and modification time.
    optional: the input may be absent; its absence is recorded.
    loose: a folder of files, each named in the receipt; the reader compares them (``published_below``).
    shard: the shard whose receipt records it, if that is not the shard being processed.
    below: the folder within the stage's output folder in which it lies; empty if it lies directly there.
    """

    path: Source
    stage: str | None = None
    optional: bool = False
    loose: bool = False
    shard: str | None = None
    below: str = ""

    def home(self, shard_id: str) -> Path:
        """The folder of all inputs of this kind, for the shard that is processed.  Only for a file, not for a URL."""
        assert isinstance(self.path, Path)
        shard_id = shard_id if self.shard is None else self.shard
        nested = f"{self.path.parent}/".endswith(f"/{folders_of(shard_id)}")  # records lie beside one another
        folder = home_of(self.path, shard_id) if nested else self.path.parent
        return folder.parent if self.below else folder

    def origin(self, root: Path, shard_id: str) -> dict[str, str]:
        """For the receipt of a stage whose output folder is ``root``: the stage that records the input, and the
        folder of its outputs relative to ``root``, with ``below`` if the input lies in a folder there.

        Where no receipt records it, the folder is given as an absolute path too, because it may be anywhere: a report
        looks there for the original images.  Empty for a remote file, and for a folder whose name is not text.
        """
        if isinstance(self.path, Url):
            return {}
        folder = _real(self.path.parent if self.stage is None else self.home(shard_id))
        relative = os.path.relpath(folder, _real(root))
        if self.stage is not None:
            return {"stage": self.stage, "folder": relative} | ({"below": self.below} if self.below else {})
        return {"folder": relative, "absolute": folder} if (relative + folder).isprintable() else {}


def source_inputs(shard: Shard) -> list[Input]:
    """The inputs for a source shard that was made elsewhere; for loose files also the table beside them."""
    if isinstance(shard.path, Path) and shard.path.suffix != TAR and shard.path.is_dir():
        return [Input(shard.path), Input(table_of(shard.path), optional=True)]
    return [Input(shard.path)]


class Upstream:
    """The receipts of upstream stages; each folder is searched once."""

    def __init__(self) -> None:
        self._places: dict[tuple[Path, str], Path] = {}

    def identify(self, wanted: Input, shard_id: str, *, fresh: bool = True) -> tuple[dict[str, Any] | None, str]:
        """The input's record as it is now, or None with the reason why the shard is not ready.

        fresh: ask for a remote file again instead of using its listing.
        """
        if isinstance(wanted.path, Url):
            return _identify_remote(wanted.path, fresh=fresh)
        shard_id = shard_id if wanted.shard is None else wanted.shard
        name = wanted.path.name
        receipts = self._receipts(wanted.home(shard_id), wanted.stage) if wanted.stage else None
        if receipts is None:
            try:
                there = os.stat(wanted.path)
            except OSError as error:
                if wanted.optional and isinstance(error, FileNotFoundError):
                    return {"path": name, "absent": True}, ""
                return None, f"{_first(wanted.stage)}{wanted.path}: {error.strerror}"
            return {"path": name, "size": there.st_size, "mtime_ns": there.st_mtime_ns}, ""
        receipt = read_receipt(record_path(receipts, shard_id))
        first = _first(wanted.stage)
        if receipt is None:
            return None, f"{first}{wanted.stage} has no receipt for it yet in {receipts}"
        if receipt.get("status") == "retry":
            return None, f"{first}{wanted.stage} has not finished it yet and will try it again"
        if receipt.get("status") != "done":
            return None, (
                f"{first}{wanted.stage} failed on it (its receipt in {receipts} says why); "
                "mend that and run it with --retry_failed"
            )
        place = f"{_real(wanted.path.parent)}/{name}"
        found = vouched_for(place, _real(receipts.parent.parent), receipt.get("outputs", []), loose=wanted.loose)
        if found is None and wanted.optional:
            return {"path": name, "absent": True}, ""
        return found, "" if found else f"{first}the receipt of {wanted.stage} does not name {name}"

    def _receipts(self, folder: Path, stage: str) -> Path | None:
        place = self._places.get((folder, stage)) or receipts_of(folder, stage)
        if place is not None:  # if there are none yet, the stage may begin during this run
            self._places[(folder, stage)] = place
        return place


def place_below(source: Mapping[str, Any], shard_id: str) -> str:
    """Where a shard's input lies in the folder that ``Input.origin`` names, with a slash at the end; mostly empty."""
    below = source.get("below")
    return f"{below}/{folders_of(shard_id)}" if isinstance(below, str) and below else folders_of(shard_id)


def numbered(stage: str | None) -> str:
    """How messages call a stage that has to run: ``stage 03``; empty for what is no numbered stage of this project."""
    return f"stage {stage[:2]}" if stage and stage[:2].isdigit() else ""


def _first(stage: str | None) -> str:
    return f"{name} first: " if (name := numbered(stage)) else ""


def _identify_remote(file: Url, *, fresh: bool) -> tuple[dict[str, Any] | None, str]:
    """Identify a file by its size and its etag or time, a command by its text.  An unavailable input has a record of
    its own, so that the shard fails until the input is available."""
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
    """Raise ShardError if a remote input has changed since the shard was begun, because each pass reads it again.

    If the input can no longer be checked, for example because its URL has expired, the data that was read is used.
    """
    for wanted, record in zip(inputs, records, strict=True):
        if isinstance(wanted.path, Url):
            now, _ = _identify_remote(wanted.path, fresh=True)
            if now is not None and "unavailable" not in now and now != record:
                raise ShardError(f"{wanted.path}: it changed while it was processed; start again", "changed")


def vouched_for(path: str, home: str, outputs: Sequence[dict[str, Any]], *, loose: bool) -> dict[str, Any] | None:
    """What a receipt says about the input ``path``, in the form in which a reader's receipt records it; else None.

    home: the real path of the output folder; the paths in ``outputs`` are relative to it.  loose: ``path`` may be a
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
    """Raise ShardError unless every input with a receipt has its size and, up to 64 MiB, its digest."""
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
                f"{wanted.path}: this differs from the file that {wanted.stage} published"
                f" (its receipt says {record['size']:,} bytes, {record['digest']}); run {wanted.stage} again for it"
            )


def receipts_of(folder: Path, stage: str) -> Path | None:
    """The receipts folder of ``stage`` for files in ``folder``; None if the stage never ran there."""
    place = folder / "_receipts" / stage
    pointer = read_record(place / "_home.json")
    if pointer is not None:
        return Path(os.path.realpath(folder / str(pointer.get("output", ".")))) / "_receipts" / stage
    return place if place.is_dir() else None


def check_made_by(
    flag: str, folder: Path, stage: str, *, beside: Sequence[str] = (), or_by: Sequence[str] = ()
) -> None:
    """Check that a folder that is given for the files of one stage does not hold those of another.

    Files that were made elsewhere, without receipts, are accepted.

    Args:
        flag: The option that names the folder, for the message: ``--edits``.
        folder: The folder.
        stage: The stage whose files are wanted.
        or_by: Other stages whose files serve as well.
        beside: Stages that may have put some of their files there, while their ``--output`` is elsewhere.

    Raises:
        UsageError: Other stages have their receipts there, and this one has none.
    """
    receipts = folder / "_receipts"
    found = [name for name in sorted(names_in(receipts)) if (receipts / name).is_dir()] if folder.is_dir() else []
    guests = {name for name in found if (receipts / name / "_home.json").exists()}  # their --output is elsewhere
    hosts = set()  # a run that could not begin leaves an empty folder
    for name in found:
        left = names_in(receipts / name)
        if "_epoch.1.json" in left or (left and name not in beside):
            hosts.add(name)
    others = [f"{name} (not its --output)" for name in found if name in guests and name not in beside]
    others += [name for name in found if name in hosts - guests]
    if others and not {stage, *or_by} & (set(found) - guests):
        what = "a new folder, or the one" if flag == "--output" else "the folder"
        raise UsageError(
            f"{flag}: {folder} holds the files of {', '.join(others)}, and not those of {stage}; give {what} "
            f"that {numbered(stage) or stage} wrote (perhaps two folders were swapped)"
        )


def published_below(folder: Path, stage: str, shard_id: str) -> dict[str, tuple[int, str]] | None:
    """The files below ``folder`` that a shard's receipt of ``stage`` names: path below it → (size, digest).

    None if the stage never ran there: the files were made elsewhere.
    """
    receipts = receipts_of(home_of(folder, shard_id), stage)
    if receipts is None:
        return None
    receipt = read_receipt(record_path(receipts, shard_id)) or {}
    place = f"{_real(folder.parent)}/{folder.name}"
    return _below(place, _real(receipts.parent.parent), receipt.get("outputs", []))


def stage_version(folder: Path, stage: str, shard_id: str) -> int | None:
    """The version of ``stage`` that made a shard's files in ``folder``; None for files made elsewhere."""
    receipts = receipts_of(folder, stage)
    receipt = read_receipt(record_path(receipts, shard_id)) if receipts else None
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
