"""Reads and writes untrusted JSON, and the dictionaries ``{"<key>.json": value}`` of a shard (stages 01 to 03).

The JSON comes from the open web or from another tool.  So size and depth are limited, everything is accepted that
Python's json reads, and ``clean_text`` removes control characters from texts that are used further.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Protocol

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
_STARTS = (b"{", b"[", b'"', b" ", b"\n", b"\r", b"\t")  # of JSON in UTF-8 without a byte order mark
_DIGITS = bytes(ord("0") if chr(byte).isascii() and chr(byte).isdigit() else 0 for byte in range(256))
_MANY_DIGITS = b"0" * 19  # as many as the smallest integer of 64 bits has; the largest has one more
_MOST_DIGITS = 20  # of an integer of 64 bits, with its sign
_BEFORE_A_NUMBER = (b"", b":", b",", b"[", b" ", b"\t", b"\r", b"\n")
_ESCAPED_SURROGATE = re.compile(rb"\\[uU][dD][89a-fA-F]|\xed[\xa0-\xbf]")
_OPENING = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]')


_MARKS = (  # the longer ones first, because UTF-32's begins with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32-le"), (b"\x00\x00\xfe\xff", "utf-32-be"), (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"),
)  # fmt: skip


class BinaryWriter(Protocol):
    """Anything to which bytes can be written: an open file, or an output of the stage."""

    def write(self, data: bytes, /) -> int: ...


def clean_text(text: str) -> str:
    """Return one line of printable text: each run of white space becomes one space, control characters are removed,
    lone surrogates become U+FFFD, and the ends are stripped."""
    text = _SURROGATES.sub("\ufffd", text) if not text.isascii() else text
    return _SPACES.sub(" ", _CONTROLS.sub("", text)).strip()


def decode_text(data: bytes, errors: Literal["replace", "strict"] = "replace") -> str:
    """Decode a text by its byte order mark, which is left out: UTF-8, UTF-16 or UTF-32.  Without one it is UTF-8.

    errors: ``replace`` puts U+FFFD for bytes that are no text; ``strict`` raises UnicodeDecodeError.
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    return data[len(mark) :].decode(encoding, errors)


def parse_json(
    data: bytes | memoryview,
    max_bytes: int = MAX_SAMPLE_JSON_BYTES,
    max_depth: int = MAX_DEPTH,
    *,
    keep_surrogates: bool = False,
) -> Any:
    """Parse untrusted JSON with limits for its size and depth: all that Python's json reads, as all stages read it.

    NaN and numbers that are infinite become None, integers keep every digit, and UTF-16, UTF-32 and a byte order mark
    are recognised.  A lone surrogate such as ``\\ud800``, which no text in UTF-8 can hold, becomes U+FFFD.

    keep_surrogates: Leave lone surrogates as they are, for records of the pipeline's own that hold samples' keys.

    Raises SampleError ``json_too_large``, ``json_too_deep`` or ``bad_json``.
    """
    if len(data) > max_bytes:
        raise SampleError("json_too_large", f"{len(data):,} bytes, the bound is {max_bytes:,}")
    data = bytes(data)
    if data[:1] not in _STARTS or 0 in data[1:4]:
        data = _as_utf8(data)
    if not _depth_within_bound(data, max_depth):
        raise SampleError("json_too_deep", f"nested deeper than {max_depth}")
    if _may_hold_large_integers(data):  # orjson would give doubles in their place
        return _parse_leniently(data, keep_surrogates)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return _parse_leniently(data, keep_surrogates, str(error))


def parse_json_object(
    data: bytes | memoryview,
    max_bytes: int = MAX_SAMPLE_JSON_BYTES,
    max_depth: int = MAX_DEPTH,
    *,
    keep_surrogates: bool = False,
) -> dict[str, Any]:
    """Like ``parse_json``, but raises SampleError ``json_not_an_object`` for a list, a number, a text or null."""
    value = parse_json(data, max_bytes, max_depth, keep_surrogates=keep_surrogates)
    if not isinstance(value, dict):
        raise SampleError("json_not_an_object", f"it is a {type(value).__name__}")
    return value


def parse_strict_json(data: bytes, max_bytes: int = MAX_SAMPLE_JSON_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Parse untrusted JSON of which a doubtful part must not be guessed: RFC 8259 in UTF-8, with each name of an object
    once, integers of 64 bits and numbers that a double holds.  A lone surrogate becomes U+FFFD.

    Raises SampleError ``json_too_large``, ``json_too_deep`` or ``bad_json``.
    """
    if len(data) > max_bytes:
        raise SampleError("json_too_large", f"{len(data):,} bytes, the bound is {max_bytes:,}")
    if not _depth_within_bound(data, max_depth):
        raise SampleError("json_too_deep", f"nested deeper than {max_depth}")
    try:
        value = json.loads(
            data.decode("utf-8", "surrogatepass"),
            parse_constant=_refuse_constant,
            parse_float=_double,
            parse_int=_integer,
            object_pairs_hook=_each_once,
        )
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from None
    return _map_leaves(value, _without_surrogates)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _double(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"no double holds {text[:40]}")
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= _MOST_DIGITS else None
    if value is None or not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"no integer of 64 bits is {text[:40]}")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a name twice: {some(repeated(name for name, _ in pairs))}")
    return found


def dump_json(value: Any, *, indent: bool = False) -> bytes:
    """Write the value as UTF-8 JSON, deterministically: integers with every digit, numbers that are not finite as
    null, and lone surrogates, which only keys of samples have, as escapes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else 0)
    except (TypeError, ValueError):  # a lone surrogate, or an integer beyond 64 bits
        separators = None if indent else (",", ":")
        text = json.dumps(_map_leaves(value, _finite), indent=2 if indent else None, separators=separators)
        return text.encode("ascii")


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
        # Here a sample's value is one level deeper.  The names of the entries are keys, which stay as they are.
        value = parse_json_object(data, max_bytes, MAX_DEPTH + 1, keep_surrogates=True)
    except SampleError as error:
        raise ShardError(f"{path}: not a dictionary of samples: {error}") from None
    for key in value:
        if not key.endswith(KEY_SUFFIX):
            raise ShardError(f'{path}: the entry {clean_text(key)[:200]!r} is not named "<key>.json"')
    if _ESCAPED_SURROGATE.search(data):
        try:
            value = {key: _map_leaves(item, _without_surrogates) for key, item in value.items()}
        except RecursionError:
            raise ShardError(f"{path}: not a dictionary of samples: nested too deep") from None
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


def _depth_within_bound(data: bytes, max_depth: int) -> bool:
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


def _may_hold_large_integers(data: bytes) -> bool:
    """Whether a number may need more than 64 bits.  Digits within a text are no number, unless they look like one."""
    marked = data.translate(_DIGITS)
    at = marked.find(_MANY_DIGITS)
    while at >= 0:
        before = data[at - 1 : at]
        if before == b"-" or (before in _BEFORE_A_NUMBER and marked.startswith(b"0", at + len(_MANY_DIGITS))):
            return True
        at = marked.find(_MANY_DIGITS, at + len(_MANY_DIGITS))
    return False


def _as_utf8(data: bytes) -> bytes:
    """The JSON in UTF-8 without a byte order mark, from the encoding that Python's json recognises."""
    try:
        return data.decode(json.detect_encoding(data), "surrogatepass").encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise SampleError("bad_json", f"no text in {error.encoding}: {error.reason} at byte {error.start:,}") from None


def _parse_leniently(data: bytes, keep_surrogates: bool, strict_error: str = "") -> Any:
    """Parse with Python's json, which accepts more than orjson.  strict_error: what orjson said."""
    try:
        value = json.loads(data.decode("utf-8", "surrogatepass"), parse_constant=_null, parse_float=_finite_float)
        return value if keep_surrogates else _map_leaves(value, _without_surrogates)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", strict_error or str(error)) from None


def _null(name: str) -> None:
    """NaN, Infinity or -Infinity, which JSON cannot hold."""


def _finite_float(text: str) -> Any:
    return _finite(float(text))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_surrogates(value: Any) -> Any:
    return _SURROGATES.sub("\ufffd", value) if isinstance(value, str) and not value.isascii() else value


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with every text, number and name of a member as ``change`` returns it."""
    if isinstance(value, Mapping):
        return {change(name): _map_leaves(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_leaves(item, change) for item in value]
    return change(value)


NAMED: Final = 5  # how many keys a message names; the others are counted


def some(keys: Collection[str]) -> str:
    """A few keys for a message, and the number of the others."""
    named = ", ".join(clean_text(key)[:100] for key in sorted(keys)[:NAMED])
    return f"{named} and {len(keys) - NAMED:,} more" if len(keys) > NAMED else named


def repeated(names: Iterable[str]) -> list[str]:
    """The names that come more than once, such as those of a table's columns."""
    return [name for name, count in Counter(names).items() if count > 1]
