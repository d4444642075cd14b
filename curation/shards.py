"""Finds shards by folder, glob, braces, list file, URL or single path, and selects a subset of them.

A shard's id is its file's name without the suffix (``00000012.tar`` → ``00000012``); all records of the pipeline are
keyed by it.  The numbers may have gaps and different widths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from curation.errors import UsageError
from curation.options import items_in, plain_path, range_in, unwrapped
from curation.storage.search import PACKED_TARS as PACKED_TARS
from curation.storage.search import TAR as TAR
from curation.storage.search import Search, numbered_lines, tell
from curation.storage.search import as_one_text as as_one_text
from curation.storage.search import expand_braces as expand_braces
from curation.storage.search import is_loose as is_loose
from curation.storage.search import is_tar as is_tar
from curation.storage.urls import Source

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


def discover(
    sources: str | Sequence[str],
    suffix: str = TAR,
    *,
    inside: str = "shards",
    may_be_empty: bool = False,
    allow_pipe: bool = False,
) -> list[Shard]:
    """The shards that one or several sources name, sorted by id.

    sources: each is a folder (every ``*<suffix>`` directly in it; if it has no tars, its tars compressed with gzip, its
        folders of loose files, or the tars in its subfolders), a glob, a brace pattern (``{00000..00042}.tar``,
        ``{a,b}``), a list file (one name per line, paths relative to the list, ``#`` comments), one file that ends in
        ``suffix``, or, with or without braces, a URL or ``pipe:`` and a command.  Where ``suffix`` is ``.tar``, names
        may also end in ``.tar.gz`` or ``.tgz``.  Several sources may also stand in one text, with white space or
        commas between them.
    inside: what the folder of such files is called inside the folder of a whole dataset, which may be given instead.
    may_be_empty: it is no error if no shard exists yet.  allow_pipe: commands may be run.

    Raises UsageError if a source names nothing, two files would be the same shard, or a name is not UTF-8.
    """
    shards: dict[str, Shard] = {}
    renamed: list[Shard] = []
    search = Search(suffix, inside, allow_pipe=allow_pipe, limit=MAX_SHARDS)
    for path in search.find((sources,) if isinstance(sources, str) else sources, may_be_empty=may_be_empty):
        shard = Shard(_shard_id(path, suffix), path)
        other = shards.setdefault(shard.id, shard)
        if other.path != path and not _is_same(other.path, path):
            raise UsageError(
                f"two files are shard {shard.id}: {other.path} and {path}; rename one of them, or give them to two "
                "runs with an output folder each"
            )
        if other is shard and shard.id != _without_suffix(path.name, suffix):
            renamed.append(shard)
        if len(shards) > MAX_SHARDS:
            raise UsageError(f"{sources} names more than {MAX_SHARDS:,} shards")
    _tell_of_renamed(renamed)
    if not isinstance(sources, str) and len(sources) > 1:
        _tell_of_twins(shards.values())
    return sorted(shards.values(), key=lambda shard: shard.id)


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

    spec: ids or names of files, inclusive ranges ``00000010..00000019`` or ``10-19``, or files of those (``@ids.txt``,
        or the path of an existing file), one or more per line; commas or white space separate them.  Ranges may contain
        gaps; a single id must exist.  A number without its zeros (``7``) will do if it is that of one shard.
    may_be_empty: shards may not exist yet, so that no missing shard is an error.

    Raises UsageError for an id that does not exist and for a spec that selects nothing.
    """
    if spec is None:
        return shards
    known = {shard.id: shard for shard in shards}
    names = {name: shard.id for shard in shards for name in _names_of(shard)} | {name: name for name in known}
    chosen: set[str] = set()
    for item in _spec_items(spec, names):
        if item in names:
            chosen.add(names[item])
        elif (ends := range_in(item)) or ".." in item:
            chosen.update(_range_ids(item, ends, known))
        elif item.isdecimal() and (found := _range_ids(item, (item, item), known)):
            if len(found) > 1:
                raise UsageError(f"--shards: {item} may be shard {found[0]} or {found[1]}; write its whole id")
            chosen.update(found)
        elif not may_be_empty:
            if not shards:
                raise UsageError(f"--shards: there is no shard {item!r}, nor any other")
            first, last = shards[0].id, shards[-1].id
            raise UsageError(f"--shards: there is no shard {item!r} (there are {len(shards):,}: {first} to {last})")
    if not chosen and not may_be_empty:
        raise UsageError(f"--shards {spec!r} selects none of the {len(shards):,} shards")
    return [shard for shard in shards if shard.id in chosen]


def _without_suffix(name: str, suffix: str) -> str:
    """The file's name without its suffix; without all of them where the file has another suffix."""
    endings = (suffix, *PACKED_TARS) if suffix == TAR else (suffix,)
    ending = next((ending for ending in endings if name.endswith(ending)), None)
    return name.split(".", 1)[0] if ending is None else name[: -len(ending)]


def _shard_id(path: Source, suffix: str) -> str:
    """The file's name without its suffix, or, with characters that no id has, a safe one that is made of it.

    A digest of the whole name is part of that, so that no two names become one id.  Each stage derives the same id from
    the same name.
    """
    name = _without_suffix(path.name, suffix)
    if is_safe_id(name):
        return name
    try:
        digest = xxhash.xxh3_64_hexdigest(name.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{path}: this name is not UTF-8, so it cannot name a shard; rename the file (mv)") from None
    return f"{re.sub(r'[^A-Za-z0-9_]+', '_', name[:100]) or '_'}-{digest}"


def _is_same(one: Source, other: Source) -> bool:
    """Whether two paths lead to one file: ``a/../b.tar`` and ``b.tar``."""
    local = isinstance(one, Path) and isinstance(other, Path)
    return local and os.path.realpath(str(one)) == os.path.realpath(str(other))


def _tell_of_twins(shards: Iterable[Shard]) -> None:
    """Warn if two shards are one file, which would then be processed twice."""
    seen: dict[str, Shard] = {}
    for shard in shards:
        if isinstance(shard.path, Path):
            other = seen.setdefault(os.path.realpath(shard.path), shard)
            if other is not shard:
                tell(f"{other.path} and {shard.path} are one file under two names: its samples are processed twice")
                return


def _tell_of_renamed(shards: Sequence[Shard]) -> None:
    if shards:
        others = f", and so are {len(shards) - 1:,} others" if len(shards) > 1 else ""
        tell(
            f"{shards[0].path.name[:80]!r} has characters that no shard's id has (only letters, digits and _.+=@-), so "
            f"it is shard {shards[0].id} in all outputs{others}"
        )


def _spec_items(spec: str, known: Container[str], inside: Path | None = None) -> Iterator[str]:
    """The items of a list of shards; an id goes before a file of that name, and that before what blanks separate."""
    for part in [spec] if spec.strip() in known else unwrapped(spec).split(","):
        whole = part.strip()
        one = whole in known or whole.startswith("@") or Path(plain_path("--shards", whole)).is_file()
        for item in [whole] if one else items_in(whole):
            file = Path(plain_path("--shards", item.removeprefix("@")))
            if item in known or not (item.startswith("@") or file.is_file()):
                yield item
            elif inside is not None:
                raise UsageError(f"--shards: {file} is named inside {inside}, which is a list itself")
            elif not file.is_file():
                raise UsageError(f"--shards: no file {str(file)!r}")
            else:
                for _, line in numbered_lines(file):
                    yield from _spec_items(line, known, file)


def _range_ids(item: str, ends: tuple[str, str] | None, known: Iterable[str]) -> list[str]:
    if ends is None:
        raise UsageError(f"--shards: cannot read the range {item!r}; write 00000010..00000019")
    low, high = map(int, ends)
    if low > high:
        raise UsageError(f"--shards: the range {item!r} runs backwards; write {ends[1]}..{ends[0]}")
    return [name for name in known if name.isdecimal() and low <= int(name) <= high]


def _names_of(shard: Shard) -> tuple[str, ...]:
    """What else than its id somebody may call a shard."""
    name = shard.path.name
    return name, name.removesuffix(TAR) if name.endswith(TAR) else name.rpartition(".")[0]
