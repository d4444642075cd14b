"""Reads the receipts and the commit records of a ledger.

The files are this package's own, but anybody may have changed or copied them.  A file that is not JSON was cut by a
crash and counts as missing.  A file that is JSON and no receipt is refused: to do its shard again might lose what it
stands for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, SampleError
from curation.jsonio import clean_text, parse_json
from curation.storage.files import MAX_RECEIPT_BYTES, read_record, read_whole

_TOKEN = re.compile(r"[0-9A-Za-z_-]{1,64}")
_STATUS = ("done", "failed", "retry")
_KINDS: Mapping[str, type] = {
    "status": str, "token": str, "shard": str, "stage": str, "run": str, "generation": int, "epoch": int,
    "attempts": int, "inputs": list, "outputs": list, "superseded": list, "counts": dict, "notes": dict, "error": dict,
}  # fmt: skip
_KINDS_OF_OUTPUT: Mapping[str, type] = {"path": str, "digest": str, "size": int, "temporary": str, "upload": dict}


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
        if "upload" not in output:
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
