"""The per-shard JSON dictionaries ``{"<key>.json": value}`` that stages 01 to 03 hand each other, and JSON's bounds.

Whatever is read here came from the open web or from another tool: size and depth are bounded, lone surrogates do not
break the reader, and a text that goes on is cleaned of control characters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final, Protocol

import orjson

from curation.errors import SampleError, ShardError

KEY_SUFFIX = ".json"
MAX_SAMPLE_JSON_BYTES = 4 << 20  # DataComp's are about 1 kB, some with long EXIF reach 100 kB
MAX_DICTIONARY_BYTES = 1 << 30
MAX_DEPTH = 64

# C0 and C1 controls, and the bidirectional overrides that make a log or a page show another text than it holds
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_SPACES = re.compile(r"[\s\x85\u2028\u2029]+")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_OPENING = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]')


class BinaryWriter(Protocol):
    """Whatever bytes can be written to: an open file, or an output of the stage."""

    def write(self, data: bytes, /) -> int: ...


def clean_text(text: str) -> str:
    """One line of printable text: runs of white space become one space (upstream turns newlines into spaces),
    control characters go, lone surrogates become U+FFFD, the ends are stripped."""
    text = _SURROGATES.sub("\ufffd", text) if not text.isascii() else text
    return _SPACES.sub(" ", _CONTROLS.sub("", text)).strip()


def parse_json(data: bytes | memoryview, max_bytes: int = MAX_SAMPLE_JSON_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Parse untrusted JSON, bounded in size before parsing and in depth.

    A ``\\ud800`` without its partner, which orjson refuses, is kept as Python's json does.
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
    """``parse_json``, and SampleError ``json_not_an_object`` where it is a list, a number, a text or null."""
    value = parse_json(data, max_bytes, max_depth)
    if not isinstance(value, dict):
        raise SampleError("json_not_an_object", f"it is a {type(value).__name__}")
    return value


def dump_json(value: Any, *, indent: bool = False) -> bytes:
    """The value as UTF-8 JSON, the same bytes for the same value; lone surrogates survive as escapes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else 0)
    except (TypeError, ValueError):  # a lone surrogate, or an integer beyond 64 bits
        separators = None if indent else (",", ":")
        return json.dumps(value, indent=2 if indent else None, separators=separators, allow_nan=False).encode("ascii")


def read_dictionary(path: Path, max_bytes: int = MAX_DICTIONARY_BYTES) -> dict[str, Any]:
    """A stage's dictionary ``{"<key>.json": value}`` in the file's order; files made elsewhere are taken as they are.

    Raises ShardError that names the file: not there, not JSON, not an object, or a key without ``.json``.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        value = parse_json_object(data, max_bytes, MAX_DEPTH + 1)  # a sample's value lies one level deeper here
    except SampleError as error:
        raise ShardError(f"{path}: not a dictionary of samples: {error}") from None
    for key in value:
        if not key.endswith(KEY_SUFFIX):
            raise ShardError(f'{path}: the entry {clean_text(key)[:200]!r} is not named "<key>.json"')
    return value


def write_dictionary(file: BinaryWriter, items: Iterable[tuple[str, Any]]) -> int:
    """Write ``{"<key>.json": value, …}``, one entry a line in the given order; returns how many entries.

    The names are given whole, with their ``.json``.  Deterministic, and streamed: nothing is held but one entry.
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
    if data.count(b"[") + data.count(b"{") <= max_depth:  # nearly every sample: no need to look at the nesting
        return True
    if len(data) > MAX_SAMPLE_JSON_BYTES:  # a whole shard's dictionary: orjson's own bound of 1024 is enough
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
    """Python's json for the one thing it may take and orjson may not: lone surrogates."""
    if b"\\u" not in data and b"\\U" not in data:
        raise SampleError("bad_json", strict_error)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        raise SampleError("bad_json", strict_error) from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # could not be written again
        raise ValueError(f"{text} is infinity as a double")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


NAMED: Final = 5  # keys that a message names; the rest are counted


def some(keys: Collection[str]) -> str:
    """A few keys for a message, and how many more there are."""
    named = ", ".join(clean_text(key)[:100] for key in sorted(keys)[:NAMED])
    return f"{named} and {len(keys) - NAMED:,} more" if len(keys) > NAMED else named
