"""Which shards there are: discovery by folder, glob, braces, list file or one path, and the choice of a subset.

A shard's id is its file's name without the suffix (``00000012.tar`` → ``00000012``); everything that the pipeline
records is keyed by it.  Numbering may have gaps and needs no common width.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import xxhash

from curation.errors import UsageError

MAX_SHARDS = 10_000_000  # a brace pattern such as {0..99999999999} is a slip of the finger, not a dataset
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")  # becomes a file name in every output folder


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: ``id`` names it in every folder of the pipeline, ``path`` is the file it is read from."""

    id: str
    path: Path


def discover(source: str, suffix: str = ".tar", *, may_be_empty: bool = False) -> list[Shard]:
    """The shards that ``source`` names, sorted by id.

    source: a folder (every ``*<suffix>`` in it, not below it), a glob, a brace pattern (``{00000..00042}.tar``,
        ``{a,b}``), a list file (one path a line, relative to the list; ``#`` comments), or one file that ends in
        ``suffix``.
    may_be_empty: nothing there is no error: it may come.
    Raises UsageError where nothing is found, where two files would be the same shard, or where a name is unsafe.
    """
    shards: dict[str, Shard] = {}
    for path in _paths(source, suffix):
        shard = Shard(_shard_id(path, suffix), path)
        other = shards.setdefault(shard.id, shard)
        if other.path != path:
            raise UsageError(f"two files are shard {shard.id}: {other.path} and {path}; give each shard one id")
        if len(shards) > MAX_SHARDS:
            raise UsageError(f"{source} names more than {MAX_SHARDS:,} shards")
    if not shards and not may_be_empty:
        raise UsageError(f"no *{suffix} shards found in {source!r}")
    return sorted(shards.values(), key=lambda shard: shard.id)


def is_safe_id(text: str) -> bool:
    """Whether ``text`` can name a shard, and so a file in every output folder."""
    return _SAFE_ID.fullmatch(text) is not None


def bucket_of(shard_id: str) -> str:
    """The folder of about a thousand shards that a shard's records live in."""
    if shard_id.isdigit():
        return shard_id[:-3] or "0"
    return "x" + xxhash.xxh3_64_hexdigest(shard_id.encode())[:3]


def select(shards: list[Shard], spec: str | None, *, may_be_empty: bool = False) -> list[Shard]:
    """The subset of ``shards`` that ``spec`` names; all of them where it is None.

    spec: comma-separated ids, inclusive ranges ``00000010..00000019``, or files of those (``@ids.txt``, or the path
        of an existing file), one or more a line.  Ranges may span gaps; a single id must exist.
    may_be_empty: of shards that are not there yet, none is missed.
    Raises UsageError for an id that is not there and for a spec that selects nothing.
    """
    if spec is None:
        return shards
    known = {shard.id: shard for shard in shards}
    chosen: set[str] = set()
    for item in _spec_items(spec, known):
        if item in known:
            chosen.add(item)
        elif ".." in item:
            chosen.update(_range_ids(item, known))
        elif not may_be_empty:
            if not shards:
                raise UsageError(f"--shards: there is no shard {item!r}, nor any other")
            first, last = shards[0].id, shards[-1].id
            raise UsageError(f"--shards: there is no shard {item!r} (there are {len(shards):,}: {first} to {last})")
    if not chosen and not may_be_empty:
        raise UsageError(f"--shards {spec!r} selects none of the {len(shards):,} shards")
    return [shard for shard in shards if shard.id in chosen]


def expand_braces(pattern: str) -> Iterator[str]:
    """Bash's brace expansion, of one or more ``{a,b}`` and ``{000..042}`` (zero padding kept), left to right.

    Lazy, so that a caller can stop a pattern that names too many.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    before, body, after = pattern[: match.start()], match.group(1), pattern[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    choices: Iterable[str]
    if span:
        first, last = span.groups()
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        choices = (str(n).zfill(width) for n in range(int(first), int(last) + step, step))
    elif "," in body:
        choices = body.split(",")
    else:
        raise UsageError(f"cannot read the braces {{{body}}} in {pattern!r}: use {{000..042}} or {{a,b}}")
    for choice in choices:
        for rest in expand_braces(after):
            yield f"{before}{choice}{rest}"


def _paths(source: str, suffix: str) -> Iterator[Path]:
    path = Path(source)
    if path.is_dir():
        try:
            with os.scandir(path) as entries:  # one listing, no stat per shard
                names = [e.name for e in entries if e.name.endswith(suffix) and not e.name.startswith(".")]
        except OSError as error:
            raise UsageError(f"{path}: cannot be listed ({error.strerror})") from None
        yield from (path / name for name in sorted(names))
    elif source.endswith(suffix) and path.is_file():
        yield path
    elif path.is_file():
        yield from _listed(path)
    elif "{" in source:
        for name in islice(expand_braces(source), MAX_SHARDS + 1):
            if any(c in name for c in "*?["):
                yield from _globbed(name)
            elif os.path.exists(name):  # a range over numbering with gaps
                yield Path(name)
    elif any(c in source for c in "*?["):
        yield from _globbed(source)
    else:
        raise UsageError(f"{source!r} is not there: give a folder, a glob, braces, a list file or one *{suffix}")


def _globbed(pattern: str) -> Iterator[Path]:
    yield from (Path(name) for name in sorted(glob.glob(pattern)))


def _listed(list_file: Path) -> Iterator[Path]:
    for number, name in _lines(list_file):
        path = list_file.parent / name
        if not path.is_file():
            raise UsageError(f"{list_file}, line {number}: no file {name!r}")
        yield path


def _lines(list_file: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a list, without comments: a ``#`` at the start or after white space."""
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{list_file}: not a list in UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if text:
            yield number, text


def _shard_id(path: Path, suffix: str) -> str:
    name = path.name
    shard_id = name[: -len(suffix)] if name.endswith(suffix) else name.split(".", 1)[0]
    if not _SAFE_ID.fullmatch(shard_id):
        raise UsageError(f"{path}: {shard_id!r} cannot name a shard: letters, digits and _.+=@- only")
    return shard_id


def _spec_items(spec: str, known: Container[str], inside: Path | None = None) -> Iterator[str]:
    for item in filter(None, (part.strip() for part in spec.split(","))):
        file = Path(item.removeprefix("@"))
        if item in known or not (item.startswith("@") or file.is_file()):  # an id goes before a file of that name
            yield item
        elif inside is not None:
            raise UsageError(f"--shards: {file} is named inside {inside}, which is a list itself")
        elif not file.is_file():
            raise UsageError(f"--shards: no file {str(file)!r}")
        else:
            for _, line in _lines(file):
                yield from _spec_items(line, known, file)


def _range_ids(item: str, known: dict[str, Shard]) -> list[str]:
    first, _, last = item.partition("..")
    if not (first.isdecimal() and last.isdecimal()):
        raise UsageError(f"--shards: cannot read the range {item!r}; write 00000010..00000019")
    low, high = int(first), int(last)
    if low > high:
        raise UsageError(f"--shards: the range {item!r} runs backwards")
    return [name for name in known if name.isdecimal() and low <= int(name) <= high]
