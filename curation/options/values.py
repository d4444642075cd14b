"""The values of options as people type them: lists, ranges of numbers, and paths that no shell has read."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from urllib.parse import unquote

from curation.errors import UsageError
from curation.options.declare import PATH, URL, URLS

Arguments = TypeVar("Arguments")

_MAX_RANGE = 1000
_QUOTES = frozenset(('""', "''", "``", "“”", "„“", "‘’", "‚‘", "«»"))
_VARIABLE = re.compile(r"(?:^|/)\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
_RANGE_SIGN = r"\s*(?:\.\.\.?|…|[-\u2013\u2014:])\s*"  # 3-7, 3..7, 3:7, 3–7
_BRACKETS = frozenset(("[]", "()", "{}"))


def unwrapped(text: str) -> str:
    """A list without brackets or quotation marks around the whole."""
    text = text.strip()
    while len(text) > 1 and text[0] + text[-1] in _QUOTES | _BRACKETS:
        text = text[1:-1].strip()
    return text


def items_in(text: str) -> list[str]:
    """The items of a list in an option's value: commas, semicolons or white space between them, outside of braces.

    Brackets and quotation marks around the whole are left out, and so are blanks around the sign of a range.
    """
    text = re.sub(rf"(\d){_RANGE_SIGN}(?=\d)", lambda found: "".join(found[0].split()), unwrapped(text))
    return [item for item in re.split(r"[\s,;]+(?![^{}]*\})", text) if item]


def range_in(item: str) -> tuple[str, str] | None:
    """The two ends of a range of numbers, both of which belong to it: ``3-7``, ``3..7``, ``3:7``; None for no range."""
    found = re.fullmatch(rf"(\d+){_RANGE_SIGN}(\d+)", item, re.ASCII)
    return (found[1], found[2]) if found else None


def numbers_in(flag: str, text: str, *, low: int, high: int, what: str, example: str) -> list[int]:
    """The different numbers of a list of numbers and ranges, in its order.

    Args:
        flag: The option, for the message.
        text: Its value.
        low: The smallest number that is allowed.
        high: The largest.
        what: What such a number is, for the message.
        example: What to write instead.

    Raises:
        UsageError: An item is no number or range, lies outside of the bounds, or a range runs backwards.
    """
    found: dict[int, None] = {}
    for item in items_in(text):
        ends = range_in(item) or (item, item)
        if not all(end.isascii() and end.isdigit() and low <= int(end[:20]) <= high for end in ends):
            raise UsageError(f"{flag}: {item!r} is not {what} ({low} to {high}); write {example}")
        first, last = map(int, ends)
        if first > last:
            raise UsageError(f"{flag}: the range {item!r} runs backwards; write {last}-{first}")
        if last - first >= _MAX_RANGE:
            raise UsageError(f"{flag}: the range {item!r} is longer than {_MAX_RANGE:,} numbers")
        found |= dict.fromkeys(range(first, last + 1))
    return list(found)


def size_in(text: str) -> tuple[int, int] | None:
    """Width and height: ``1024x768``, also with a ``×`` or ``*``; ``1024`` is a square; None for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX×*]\s*(\d{1,9})\s*)?", text, re.ASCII)
    return (int(found[1]), int(found[2] or found[1])) if found else None


def whole_number(text: str) -> int:
    """A whole number; also ``1e3``, and ``640x640`` for 640.

    Raises:
        ValueError: It is none.
    """
    size = size_in(text)
    if size and size[0] == size[1]:
        return size[0]
    if re.fullmatch(r"\d+(?:\.\d+)?[eE]\+?\d{1,2}", text.strip()) and float(text).is_integer():
        return int(float(text))
    return int(text)


def plain_path(flag: str, text: str, *, variables: bool = False) -> str:
    """The path that was meant by a text that no shell has read: from quotes, a list, a YAML file or an environment.

    A file of exactly that name goes first.  Otherwise white space and quotation marks around the text are left out,
    ``~`` and ``~user`` become a home folder, and ``file:///a%20b`` becomes ``/a b``.

    Args:
        flag: Where the text comes from, for the message.
        text: A path, or a pattern of paths.
        variables: A ``$VARIABLE`` without a value may stay in it: nobody will open the path.

    Raises:
        UsageError: The shell did not expand a ``$VARIABLE``, there is no such user, or the file is on another machine.
    """
    if os.path.lexists(text):
        return text
    path = text.strip()
    while len(path) > 1 and path[0] + path[-1] in _QUOTES:
        path = path[1:-1].strip()
    if path.lower().startswith("file:/"):
        path = _of_file_url(flag, path)
    path = os.path.expanduser(path)
    if os.path.lexists(path):
        return path
    if len(path) > 1 and os.path.lexists(path.rstrip("/")):  # a file, and no folder
        return path.rstrip("/")
    if not variables and (variable := _VARIABLE.search(path)):
        raise UsageError(
            f"{flag} {path}: the shell did not put a value in place of {variable[0].lstrip('/')}, because it is "
            'between single quotes or in a file; write the whole path, or use double quotes ("…")'
        )
    if path.startswith("~"):
        user = path[1:].partition("/")[0]
        raise UsageError(f"{flag} {path}: there is no user {user!r} here; write ./{path} if the name itself begins so")
    return path


def _of_file_url(flag: str, url: str) -> str:
    path, host = url[len("file:") :], ""
    if path.startswith("//"):
        host, _, path = path[2:].partition("/")
        path = f"/{path}"
    if host not in ("", "localhost"):
        raise UsageError(f"{flag} {url}: a file URL begins with file:/// (three slashes), or give the path alone")
    return path if os.path.lexists(path) else unquote(path)


def with_plain_paths(options: Arguments, *, variables: bool = False) -> Arguments:
    """The options with the paths that were meant (``plain_path``).

    Values of type ``str`` without ``PATH`` or ``URLS`` may be no paths: only a ``~`` in front of a path is expanded.
    """
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value, marks, flag = getattr(options, name, None), getattr(hint, "__metadata__", ()), f"--{name}"
        if isinstance(value, tuple):
            found[name] = tuple(
                plain_source(flag, one, variables=variables) if isinstance(one, str) else one for one in value
            )
        elif isinstance(value, Path):
            found[name] = Path(plain_path(flag, str(value), variables=variables))
        elif isinstance(value, str) and PATH in marks:
            found[name] = plain_path(flag, value, variables=variables)
        elif isinstance(value, str) and URLS not in marks and value.startswith("~") and "/" in value:
            found[name] = os.path.expanduser(value)
    return replace(options, **{name: value for name, value in found.items() if value != getattr(options, name)})  # type: ignore[type-var]


def plain_source(flag: str, text: str, *, variables: bool = False) -> str:
    """``plain_path`` of a text that may also be a command (``pipe:``) or a URL of another machine, which stay."""
    source = text.strip()
    if source.startswith("pipe:") or (URL.match(source) and not source.lower().startswith("file:")):
        return source
    return plain_path(flag, text, variables=variables)


_NUMBERS = re.compile(r"\d[\d.,:…\u2013-]*")


def goes_on(value: str, word: str) -> bool:
    """Whether the next word belongs to a list: after a comma, or one more number that is no file's name."""
    if word.startswith("-"):
        return False
    both = _NUMBERS.fullmatch(value) and _NUMBERS.fullmatch(word) and not os.path.lexists(word)
    return bool(value.rstrip().endswith(",") or word.startswith(",") or both)
