"""Where each sample lies in a finished shard: ``<shard>.idx`` beside it, and the list of all shards for ``wids``.

``<shard>.idx`` has a line for each sample in the shard's order: the key as a JSON string, the offset and the length in
bytes, with tabs in between.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from curation.errors import ShardError
from curation.jsonio import dump_json
from curation.storage.files import storage_error, temporary_name

SUFFIX: Final = ".idx"
MAX_INDEX_BYTES: Final = 1 << 30
WIDS: Final = "wids.json"

Entry = tuple[str, int, int]  # key, offset, length


def dump_index(entries: Sequence[Entry]) -> bytes:
    return b"".join(b"%s\t%d\t%d\n" % (_quoted(key), offset, length) for key, offset, length in entries)


def place_of(shard: Path, key: str) -> tuple[int, int] | None:
    """(offset, length) of a sample, None for a key that the shard lacks.  ShardError where there is no index."""
    path = shard.with_suffix(SUFFIX)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_INDEX_BYTES)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); stage 04 writes it with --index") from error
    wanted = _quoted(key) + b"\t"
    begin = 0 if data.startswith(wanted) else data.find(b"\n" + wanted) + 1
    if begin == 0 and not data.startswith(wanted):
        return None
    fields = data[begin + len(wanted) : data.find(b"\n", begin)].split(b"\t")
    if len(fields) != 2 or not all(field.isdigit() and len(field) < 20 for field in fields):
        raise ShardError(f"{path}: damaged at byte {begin:,}; run stage 04 with --index again")
    return int(fields[0]), int(fields[1])


def write_wids(folder: Path, receipts: Iterable[Mapping[str, Any]]) -> Path:
    """``wids.json`` for ``wids.ShardListDataset``: each tar that receipts name.  The same receipts, the same bytes: any
    process may write it, the last one stays."""
    listed = []
    for receipt in receipts:
        tar = f"{receipt['shard']}.tar"
        output = next(output for output in receipt["outputs"] if output["path"].rpartition("/")[2] == tar)
        listed.append({"url": output["path"], "nsamples": receipt["notes"]["samples_out"], "filesize": output["size"]})
    record = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}
    path = folder / WIDS
    temporary = folder / temporary_name(WIDS, secrets.token_hex(8))
    try:
        with open(temporary, "xb") as file:
            file.write(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error
    return path


def _quoted(key: str) -> bytes:
    """A JSON string; a key whose bytes are not UTF-8 with escapes for them."""
    return dump_json(key)
