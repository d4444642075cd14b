"""Reads and writes untrusted JSON, and the dictionaries ``{"<key>.json": value}`` of a shard (stages 01 to 03).

The JSON comes from the open web or from another tool.  So size and depth are limited, lone surrogates are accepted,
and ``clean_text`` removes control characters from texts that are used further.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final, Protocol

import orjson

from curation.errors import SampleError, ShardError

KEY_SUFFIX = ".json"
MAX_SAMPLE_JSON_BYTES = 4 << 20  # DataComp's are about 1 kB, some with long EXIF reach 100 kB
MAX_DICTIONARY_BYTES = 1 << 30
MAX_DEPTH = 64

# C0 and C1 controls, and bidirectional overrides, with which a log or a page shows another text than it contains
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_SPACES = re.compile(r"[\s\x85\u2028\u2029]+")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_OPENING = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]')


class BinaryWriter(Protocol):
    """Anything to which bytes can be written: an open file, or an output of the stage."""

    def write(self, data: bytes, /) -> int: ...


def clean_text(text: str) -> str:
    """Return one line of printable text: each run of white space becomes one space, control characters are removed,
    lone surrogates become U+FFFD, and the ends are stripped."""
    text = _SURROGATES.sub("\ufffd", text) if not text.isascii() else text
    return _SPACES.sub(" ", _CONTROLS.sub("", text)).strip()


def parse_json(data: bytes | memoryview, max_bytes: int = MAX_SAMPLE_JSON_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Parse untrusted JSON with limits for its size and depth.

    A lone surrogate such as ``\\ud800``, which orjson refuses, is accepted as in Python's json.
    Raises SampleError ``json_too_large``, ``json_too_deep`` or ``bad_json``.
    """
    if len(data) > max_bytes:
        raise SampleError("json_too_large", f"{len(data):,} bytes, the bound is {max_bytes:,}")
    if not _depth_within_bound(data, max_depth):
        raise SampleError("json_too_deep", f"nested deeper than {max_depth}")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return _parse_leniently(bytes(data), str(error))


def parse_json_object(
    data: bytes | memoryview, max_bytes: int = MAX_SAMPLE_JSON_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """Like ``parse_json``, but raises SampleError ``json_not_an_object`` for a list, a number, a text or null."""
    value = parse_json(data, max_bytes, max_depth)
    if not isinstance(value, dict):
        raise SampleError("json_not_an_object", f"it is a {type(value).__name__}")
    return value


def dump_json(value: Any, *, indent: bool = False) -> bytes:
    """Write the value as UTF-8 JSON, deterministically; lone surrogates are written as escapes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else 0)
    except (TypeError, ValueError):  # a lone surrogate, or an integer beyond 64 bits
        separators = None if indent else (",", ":")
        return json.dumps(value, indent=2 if indent else None, separators=separators, allow_nan=False).encode("ascii")


def read_dictionary(path: Path, max_bytes: int = MAX_DICTIONARY_BYTES) -> dict[str, Any]:
    """Read a stage's dictionary ``{"<key>.json": value}`` in the file's order; other tools may have made the file.

    Raises ShardError if the file is missing, not JSON or not an object, or if a key lacks ``.json``.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        value = parse_json_object(data, max_bytes, MAX_DEPTH + 1)  # here a sample's value is one level deeper
    except SampleError as error:
        raise ShardError(f"{path}: not a dictionary of samples: {error}") from None
    for key in value:
        if not key.endswith(KEY_SUFFIX):
            raise ShardError(f'{path}: the entry {clean_text(key)[:200]!r} is not named "<key>.json"')
    return value


def write_dictionary(file: BinaryWriter, items: Iterable[tuple[str, Any]]) -> int:
    """Write ``{"<key>.json": value, …}``, one entry per line in the given order; returns the number of entries.

    ``items`` has the full names with ``.json``.  The output is deterministic, and only one entry is in memory.
    """
    count = 0
    file.write(b"{")
    for name, value in items:
        file.write(b",\n" if count else b"\n")
        file.write(dump_json(name) + b": " + dump_json(value))
        count += 1
    file.write(b"\n}\n" if count else b"}\n")
    return count


def _depth_within_bound(data: bytes | memoryview, max_depth: int) -> bool:
    data = bytes(data)
    if data.count(b"[") + data.count(b"{") <= max_depth:  # a fast test that nearly every sample passes
        return True
    if len(data) > MAX_SAMPLE_JSON_BYTES:  # the dictionary of a shard: orjson's own limit of 1024 is enough
        return True
    depth = 0
    for token in _OPENING.finditer(data):
        char = token.group()[0]
        if char in b"[{":
            depth += 1
            if depth > max_depth:
                return False
        elif char in b"]}":
            depth -= 1
    return True


def _parse_leniently(data: bytes, strict_error: str) -> Any:
    """Parse with Python's json, which accepts lone surrogates, unlike orjson."""
    if b"\\u" not in data and b"\\U" not in data:
        raise SampleError("bad_json", strict_error)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        raise SampleError("bad_json", strict_error) from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # it could not be written as JSON again
        raise ValueError(f"{text} is infinity as a double")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


NAMED: Final = 5  # how many keys a message names; the others are counted


def some(keys: Collection[str]) -> str:
    """A few keys for a message, and the number of the others."""
    named = ", ".join(clean_text(key)[:100] for key in sorted(keys)[:NAMED])
    return f"{named} and {len(keys) - NAMED:,} more" if len(keys) > NAMED else named


def repeated(names: Iterable[str]) -> list[str]:
    """The names that come more than once, such as those of a table's columns."""
    return [name for name, count in Counter(names).items() if count > 1]
