"""Finds shards by folder, glob, braces, list file, URL or single path, and selects a subset of them.

A shard's id is its file's name without the suffix (``00000012.tar`` → ``00000012``); all records of the pipeline are
keyed by it.  The numbers may have gaps and different widths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import xxhash

from curation.errors import UsageError
from curation.options import logger
from curation.storage.files import glob_paths
from curation.storage.urls import PIPE, Source, Url, find_remote, is_remote

TAR = ".tar"
PACKED_TARS = (".tar.gz", ".tgz")  # read like tars; stage 04 alone takes none
MAX_SHARDS = 10_000_000  # a brace pattern such as {0..99999999999} is a typing error
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")  # becomes a file name in every output folder


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard.

    Attributes:
        id: Its name in every folder of the pipeline.
        path: Where it is read from: a file, a folder of loose files (``is_loose``), a URL or a command.
    """

    id: str
    path: Source

    @property
    def file(self) -> Path:
        """The file or folder of a shard that is on a filesystem of this machine.

        Raises:
            UsageError: The shard is a URL or a command.
        """
        if isinstance(self.path, Path):
            return self.path
        raise UsageError(f"{self.path}: not on a filesystem of this machine, which is required here")


def discover(source: str, suffix: str = ".tar", *, may_be_empty: bool = False, allow_pipe: bool = False) -> list[Shard]:
    """The shards that ``source`` names, sorted by id.

    source: a folder (every ``*<suffix>`` directly in it; if it has no tars, its tars compressed with gzip or its
        folders of loose files), a glob, a brace pattern (``{00000..00042}.tar``, ``{a,b}``), a list file (one name per
        line, paths relative to the list, ``#`` comments), one file that ends in ``suffix``, or, with or without braces,
        a URL or ``pipe:`` and a command.  Where ``suffix`` is ``.tar``, names may also end in ``.tar.gz`` or ``.tgz``.
    may_be_empty: it is no error if no shard exists yet.  allow_pipe: commands may be run.

    Raises UsageError if nothing is found, two files would be the same shard, or a name is unsafe.
    """
    shards: dict[str, Shard] = {}
    for path in _paths(source, suffix, allow_pipe):
        shard = Shard(_shard_id(path, suffix), path)
        other = shards.setdefault(shard.id, shard)
        if other.path != path:
            raise UsageError(f"two files are shard {shard.id}: {other.path} and {path}; give each shard one id")
        if len(shards) > MAX_SHARDS:
            raise UsageError(f"{source} names more than {MAX_SHARDS:,} shards")
    if not shards and not may_be_empty:
        raise UsageError(f"no *{suffix} shards found in {source!r}")
    return sorted(shards.values(), key=lambda shard: shard.id)


def is_tar(source: Source | str) -> bool:
    """Whether a name is that of a tar, be it compressed with gzip or not."""
    return str(getattr(source, "name", source)).endswith((TAR, *PACKED_TARS))


def refuse_packed(shards: Iterable[Shard]) -> None:
    """For a stage that copies tars byte for byte.

    Raises:
        UsageError: A shard is a tar that is compressed with gzip; the message says how to unpack it.
    """
    for shard in shards:
        if shard.path.name.endswith(PACKED_TARS):
            raise UsageError(
                f"{shard.path}: a tar compressed with gzip, which every other stage reads; here bytes of the tar are "
                "copied: unpack it first (gzip -d) and give the tars"
            )


def is_loose(path: Path) -> bool:
    """Whether a folder is a shard of loose files (img2dataset): its name is a number, or its table is next to it."""
    name = path.name
    return path.is_dir() and ((name.isascii() and name.isdigit()) or path.with_name(f"{name}.parquet").is_file())


def local_folders(shards: Iterable[Shard]) -> set[Path]:
    """The real paths of the folders of those shards that are on a filesystem."""
    return {Path(os.path.realpath(folder)) for folder in {s.path.parent for s in shards if isinstance(s.path, Path)}}


def files_of(shards: Sequence[Shard]) -> dict[str, Path]:
    """Map each shard id to its file, for code that needs files on a filesystem.

    Raises:
        UsageError: A shard is not on a filesystem.
    """
    return {shard.id: shard.file for shard in shards}


def is_safe_id(text: str) -> bool:
    """Whether ``text`` can be a shard's id, and so a file name in every output folder."""
    return _SAFE_ID.fullmatch(text) is not None


def bucket_of(shard_id: str) -> str:
    """The name of the folder for a shard's records; about a thousand shards share one."""
    if shard_id.isdigit():
        return shard_id[:-3] or "0"
    return "x" + xxhash.xxh3_64_hexdigest(shard_id.encode())[:3]


def select(shards: list[Shard], spec: str | None, *, may_be_empty: bool = False) -> list[Shard]:
    """The subset of ``shards`` that ``spec`` names; all of them if it is None.

    spec: comma-separated ids, inclusive ranges ``00000010..00000019``, or files of those (``@ids.txt``, or the path
        of an existing file), one or more per line.  Ranges may contain gaps; a single id must exist.
    may_be_empty: shards may not exist yet, so that no missing shard is an error.

    Raises UsageError for an id that does not exist and for a spec that selects nothing.
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


def expand_braces(pattern: str, *, leave_others: bool = False) -> Iterator[str]:
    """Expand ``{a,b}`` and ``{000..042}`` (zero padding is kept) as Bash does, from left to right.

    leave_others: keep other braces unchanged, as in a command; otherwise they raise UsageError.
    It is lazy, so that a caller can stop at a pattern that names too many.
    """
    match = re.search(r"\{(\d+\.\.\d+|[^{}\s]*,[^{}\s]*)\}" if leave_others else r"\{([^{}]*)\}", pattern)
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
        for rest in expand_braces(after, leave_others=leave_others):
            yield f"{before}{choice}{rest}"


def _paths(source: str, suffix: str, allow_pipe: bool) -> Iterator[Source]:
    if is_remote(source):
        yield from _remote(source, suffix, allow_pipe)
        return
    path = Path(source)
    if path.is_dir():
        yield from _in_folder(path, suffix)
    elif source.endswith(_endings(suffix)) and path.is_file():
        yield path
    elif path.is_file():
        yield from _listed(path, suffix, allow_pipe)
    elif "{" in source:
        for name in islice(expand_braces(source), MAX_SHARDS + 1):
            if os.path.exists(name):  # the range may contain gaps
                yield Path(name)
            elif any(c in name for c in "*?["):
                yield from map(Path, glob_paths(name))
    elif any(c in source for c in "*?["):
        yield from map(Path, glob_paths(source))
    else:
        raise UsageError(f"{source!r} does not exist: give a folder, a glob, braces, a list file or one *{suffix}")


def _in_folder(folder: Path, suffix: str) -> Iterator[Path]:
    """The folder's files with the suffix; without tars, its folders of loose files, or itself if it is one."""
    try:
        with os.scandir(folder) as entries:  # one listing, no stat per shard
            every = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed ({error.strerror})") from None
    names = [entry.name for entry in every if entry.name.endswith(suffix)]
    packed = [entry.name for entry in every if suffix == TAR and entry.name.endswith(PACKED_TARS)]
    if names:
        _tell_of_others(folder, names, packed)
    elif packed:
        names = packed
    elif suffix == TAR:
        names = [entry.name for entry in every if entry.is_dir() and is_loose(folder / entry.name)]
        if not names and is_loose(folder):
            yield folder
    yield from (folder / name for name in sorted(names))


def _tell_of_others(folder: Path, tars: Iterable[str], packed: Iterable[str]) -> None:
    """Warn of packed tars in a folder of tars, which are not read, except of those that are a tar's own packed copy."""
    ids = {_without_suffix(name, TAR) for name in tars}
    if others := sorted(name for name in packed if _without_suffix(name, TAR) not in ids):
        logger.warning(
            f"{folder}: {len(others):,} files such as {others[0]} are not read, because there are tars beside them; to "
            "read both, name them in a list file"
        )


def _endings(suffix: str) -> tuple[str, ...]:
    return (suffix, *PACKED_TARS) if suffix == TAR else (suffix,)


def _without_suffix(name: str, suffix: str) -> str:
    """The file's name without its suffix; without all of them where the file has another suffix."""
    ending = next((ending for ending in _endings(suffix) if name.endswith(ending)), None)
    return name.split(".", 1)[0] if ending is None else name[: -len(ending)]


def _remote(text: str, suffix: str, allow_pipe: bool) -> Iterator[Url]:
    if suffix != TAR:
        raise UsageError(f"{Url(text)}: only tars are read from a URL or command; copy *{suffix} files to this machine")
    for name in islice(expand_braces(text, leave_others=text.startswith(PIPE)), MAX_SHARDS + 1):
        yield from find_remote(name, _endings(suffix), allow_pipe=allow_pipe)


def _listed(list_file: Path, suffix: str, allow_pipe: bool) -> Iterator[Source]:
    for number, name in _lines(list_file):
        if is_remote(name):
            yield from _remote(name, suffix, allow_pipe)
            continue
        path = list_file.parent / name
        if not path.is_file() and not is_loose(path):
            raise UsageError(f"{list_file}, line {number}: no file {name!r}")
        yield path


def _lines(list_file: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a list without comments, which begin with a ``#`` at the start or after white space."""
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{list_file}: not a list in UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if text:
            yield number, text


def _shard_id(path: Source, suffix: str) -> str:
    shard_id = _without_suffix(path.name, suffix)
    if not _SAFE_ID.fullmatch(shard_id):
        raise UsageError(f"{path}: {shard_id!r} cannot name a shard: letters, digits and _.+=@- only")
    return shard_id


def _spec_items(spec: str, known: Container[str], inside: Path | None = None) -> Iterator[str]:
    for item in filter(None, (part.strip() for part in spec.split(","))):
        file = Path(item.removeprefix("@"))
        if item in known or not (item.startswith("@") or file.is_file()):  # an id wins over a file of that name
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
