"""Reads the receipts of a ledger, its commit records and the receipts of uploads.

The files are this package's own, but anybody may have changed or copied them.  A file that is not JSON was cut by a
crash and counts as missing.  A file that is JSON and no receipt is refused: to do its shard again might lose what it
stands for.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, SampleError
from curation.jsonio import clean_text, parse_json
from curation.shards import record_path
from curation.storage.files import MAX_RECEIPT_BYTES, names_in, read_record, read_whole
from curation.storage.urls import Source, Url

_TOKEN = re.compile(r"[0-9A-Za-z_-]{1,64}")
_STATUS = ("done", "failed", "retry")
_KINDS: Mapping[str, type] = {
    "status": str, "token": str, "shard": str, "stage": str, "run": str, "generation": int, "epoch": int,
    "attempts": int, "inputs": list, "outputs": list, "superseded": list, "counts": dict, "notes": dict, "error": dict,
}  # fmt: skip
_KINDS_OF_OUTPUT: Mapping[str, type] = {"path": str, "digest": str, "size": int, "temporary": str, "upload": dict}


def is_object(path: str) -> bool:
    """Whether the path of an output is the URL of an object, as receipts of versions before 0.6.0 may have it."""
    return "://" in path  # a normalised path has no two slashes in a row


def read_receipt(path: Path) -> dict[str, Any] | None:
    """The receipt in a file; None where there is none, or a crash cut it.

    Raises:
        InfrastructureError: The file holds JSON that is no receipt, or it cannot be read.
    """
    return _read(path, "a receipt; move it away, and its shard is processed again")


def read_commit(path: Path, root: Path) -> dict[str, Any] | None:
    """The receipt in the record of a commit, whose files may have to be renamed; None where there is none.

    Args:
        path: The record, ``root/_receipts/<stage>/<bucket>/.<shard>.<generation>.commit``.
        root: The stage's output folder, from which the paths of outputs start.

    Raises:
        InfrastructureError: The file holds JSON that is no such record, or it cannot be read.
    """
    value = _read(path, "a commit record; move it away, and its shard is processed again")
    if value is None:
        return None
    if not _TOKEN.fullmatch(value.get("token", "")) or value.get("generation", 0) < 1:
        raise _refused(
            path, "a commit record; move it away, and its shard is processed again", "its token or its generation"
        )
    for output in value.get("outputs", []):
        if not is_object(output["path"]):
            temporary = output.get("temporary", "")
            if os.path.basename(temporary) != temporary or not temporary.startswith("."):
                raise _refused(path, "a commit record; move it away", f"the temporary name {clean_text(temporary)!r}")
            refuse_outside(path, root, path.parent.parent.name, output["path"])
    return value


def refuse_outside(record: Path, root: Path, stage: str, path: str) -> None:
    """Refuse the path of an output that does not lie in one of the stage's output folders.

    Besides ``root``, these are the folders whose pointer ``_receipts/<stage>/_home.json`` leads to it.  No link may be
    on the way: outputs are recorded by their real paths.

    Raises:
        InfrastructureError: It lies elsewhere.
    """
    folder, name = os.path.split(path)
    if os.path.isabs(path) or "\0" in path or name in ("", ".", "..") or not _is_own(root, stage, folder):
        what = f"the path {clean_text(path)[:200]!r}, which is outside of the output folder"
        raise _refused(record, "a record of this output folder; move it away", what)


def _is_own(root: Path, stage: str, folder: str) -> bool:
    home = os.path.realpath(root)
    wanted = os.path.normpath(os.path.join(home, folder))
    if os.path.realpath(wanted) != wanted:  # a link on the way
        return False
    if wanted == home or wanted.startswith(home.rstrip(os.sep) + os.sep):
        return True
    for place in (Path(wanted), *Path(wanted).parents):
        pointer = read_record(place / "_receipts" / stage / "_home.json")
        if pointer is not None:
            return os.path.realpath(place / str(pointer.get("output", "."))) == home
    return False


UPLOADS = "_published"


def name_in_store(path: str) -> str:
    """Where an output lies below a store's folder, by its path relative to the stage's output folder.

    A stage with two output folders has paths such as ``../edits/00000000.json``, which is stored as
    ``edits/00000000.json``.
    """
    while path.startswith("../"):
        path = path[3:]
    return path


def read_upload_receipt(
    root: Path, store: str, stage: str, shard_id: str, receipt: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The receipt of the upload of a shard's outputs, as they are named by ``receipt``; None where there is none.

    Args:
        root: The stage's output folder.
        store: The name of the store's folder below ``_published``.
        stage: The name of the stage.
        shard_id: The shard.
        receipt: The shard's receipt: an upload of another generation or of another attempt does not count.

    Raises:
        InfrastructureError: It cannot be read.
    """
    found = read_record(upload_receipt(root, store, stage, shard_id, int(receipt.get("generation", 0))))
    if found is None or found.get("token") != receipt.get("token") or not isinstance(found.get("files"), list):
        return None
    return found


def upload_receipt(root: Path, store: str, stage: str, shard_id: str, generation: int) -> Path:
    """The path of the receipt of an upload."""
    return record_path(root / UPLOADS / store / stage, shard_id, f".{generation}.json")


def is_there(root: Path, stage: str, receipt: Mapping[str, Any], output: Mapping[str, Any]) -> bool:
    """Whether an output that a done receipt names is there: as a file of its size, or in a store.

    It is in a store if the receipt of an upload of the same generation names it with the same digest.  What versions
    before 0.6.0 wrote into a bucket counts as such.

    Args:
        root: The stage's output folder.
        stage: The name of the stage.
        receipt: The shard's receipt.
        output: One of its outputs.
    """
    if is_object(output["path"]):
        return True
    return place_of(root, stage, receipt, output) is not None


def place_of(root: Path, stage: str, receipt: Mapping[str, Any], output: Mapping[str, Any]) -> Source | None:
    """Where to read an output that a done receipt names: its file, else the object in a store; None for nowhere.

    A file of another size than the receipt says is not the output.

    Args:
        root: The stage's output folder.
        stage: The name of the stage.
        receipt: The shard's receipt.
        output: One of its outputs.
    """
    if is_object(output["path"]):
        return Url(output["path"])
    file = root / str(output["path"])
    with contextlib.suppress(OSError):
        if os.stat(file).st_size == int(output["size"]):
            return file
    name = name_in_store(output["path"])
    for store in sorted(names_in(root / UPLOADS)):
        found = read_upload_receipt(root, store, stage, str(receipt.get("shard")), receipt)
        if found is None:
            continue
        for stored in found["files"]:
            if isinstance(stored, dict) and (stored.get("name"), stored.get("digest")) == (name, output["digest"]):
                return _below(str(found["store"]), name)
    return None


def _below(store: str, name: str) -> Source:
    return Url(f"{store}/{name}") if "://" in store else Path(store) / name


def _read(path: Path, wanted: str) -> dict[str, Any] | None:
    data = read_whole(path)
    if data is None:
        return None
    try:
        value = parse_json(data, MAX_RECEIPT_BYTES)
    except SampleError:
        return None
    if not isinstance(value, dict):
        raise _refused(path, wanted, f"a {type(value).__name__} in place of an object")
    wrong = _wrong_field(value, _KINDS)
    if not wrong and value.get("status") not in _STATUS:
        wrong = "status"
    for output in value.get("outputs", []) if not wrong else ():
        if not isinstance(output, dict) or not isinstance(output.get("path"), str):
            wrong = "outputs"
        else:
            wrong = wrong or _wrong_field(output, _KINDS_OF_OUTPUT)
    if not wrong and not all(isinstance(one, str) for one in value.get("superseded", [])):
        wrong = "superseded"
    if wrong:
        raise _refused(path, wanted, f"its field {wrong!r}")
    return value


def _wrong_field(value: Mapping[str, Any], kinds: Mapping[str, type]) -> str:
    for name, kind in kinds.items():
        if name in value and (type(value[name]) is not kind or (kind is int and value[name] < 0)):
            return name
    return ""


def _refused(path: Path, wanted: str, found: str) -> InfrastructureError:
    return InfrastructureError(f"{path}: this is not {wanted} ({found} cannot be right)")
