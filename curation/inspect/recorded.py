"""Lines of JSON that stages left about samples, read leniently: a damaged line costs itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from curation.inspect.conservation import MAX_LIST_BYTES
from curation.inspect.places import StagePlace


def provenance(place: StagePlace, shard_id: str, max_bytes: int = MAX_LIST_BYTES) -> Iterator[dict[str, Any]]:
    """What a stage recorded of each sample of a shard."""
    return json_lines(place.home / "_provenance" / place.stage / f"{shard_id}.jsonl", max_bytes)


def json_lines(path: Path, max_bytes: int = MAX_LIST_BYTES) -> Iterator[dict[str, Any]]:
    """JSON objects, a line each, of a file's first ``max_bytes``; a file that is not there has none."""
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes)
    except FileNotFoundError:
        return
    for line in data.splitlines():
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value
