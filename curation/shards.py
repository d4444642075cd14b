"""Finds shards by folder, glob, braces, list file, URL or single path, and selects a subset of them.

A shard's id is its file's name without the suffix (``00000012.tar`` → ``00000012``); all records of the pipeline are
keyed by it.  The numbers may have gaps and different widths.  Where shards lie in folders below the one that a user
named, the id holds these folders (``14/00000744.tar`` → ``14/00000744``), and outputs lie in folders of the same names.
The functions below that make a path from an id are the only ones: records of a shard are files of underscore folders,
in whose names ``%2F`` stands for ``/``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import xxhash

from curation.errors import UsageError
from curation.options import items_in, plain_path, range_in, unwrapped
from curation.storage.files import read_record
from curation.storage.search import PACKED_TARS as PACKED_TARS
from curation.storage.search import TAR as TAR
from curation.storage.search import Search, numbered_lines, tell
from curation.storage.search import as_one_text as as_one_text
from curation.storage.search import expand_braces as expand_braces
from curation.storage.search import is_loose as is_loose
from curation.storage.search import is_tar as is_tar
from curation.storage.urls import Source

MAX_SHARDS = 10_000_000  # a brace pattern such as {0..99999999999} is a typing error
_MAX_ID = 200  # bytes, as a part of the names of files
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")  # becomes a file name in every output folder
# A folder of shards must be none of the folders of records, and must not have the name of another shard's output.
_SAFE_FOLDER = re.compile(
    r"(?!.*\.(?:tar|tgz|gz|json|jsonl|parquet|npz|npy|idx|csv|txt)\Z)[A-Za-z0-9][A-Za-z0-9_.+=@-]{0,199}"
)
LAYOUT_NOTE = "layout"  # a note in the receipts of regrouped shards, which have ids of their own
_SLASH = "%2F"  # stands for the / of an id in the names of records; no id has a %


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard.

    Attributes:
        id: Its name in every folder of the pipeline, with the folders in which it lies there.
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

    @property
    def home(self) -> Path:
        """The folder from which its id leads to its file.

        Raises:
            UsageError: The shard is a URL or a command.
        """
        return home_of(self.file, self.id)


def discover(
    sources: str | Sequence[str],
    suffix: str = TAR,
    *,
    inside: str = "shards",
    may_be_empty: bool = False,
    allow_pipe: bool = False,
    begun: Sequence[Path] = (),
    whole: bool = True,
) -> list[Shard]:
    """The shards that one or several sources name, sorted by id.

    A shard's id holds the folders that lie between its file and the folder that was named, the first wildcard of a
    pattern, or the folder of the list file that names it by a relative path.

    sources: each is a folder (every ``*<suffix>`` directly in it; if it has no tars, its tars compressed with gzip, its
        folders of loose files, or the tars in its subfolders), a glob, a brace pattern (``{00000..00042}.tar``,
        ``{a,b}``), a list file (one name per line, paths relative to the list, ``#`` comments), one file that ends in
        ``suffix``, or, with or without braces, a URL or ``pipe:`` and a command.  Where ``suffix`` is ``.tar``, names
        may also end in ``.tar.gz`` or ``.tgz``.  Several sources may also stand in one text, with white space or
        commas between them.
    inside: what the folder of such files is called inside the folder of a whole dataset, which may be given instead.
    may_be_empty: it is no error if no shard exists yet.  allow_pipe: commands may be run.
    begun: output folders of this run and of earlier stages.  Where an older version left receipts under ids without
        folders, the ids of all shards stay without them.
    whole: a stage's output folder, some of whose tars lie in a store alone, is an error; not where ``may_be_empty``.

    Raises UsageError if a source names nothing, two files would be the same shard, or a name is not UTF-8.
    """
    search = Search(
        suffix,
        inside,
        allow_pipe=allow_pipe,
        limit=MAX_SHARDS,
        wrote_into=_wrote_into,
        whole=whole and not may_be_empty,
    )
    found: list[tuple[Shard, str]] = []
    for path, folder in search.find((sources,) if isinstance(sources, str) else sources, may_be_empty=may_be_empty):
        found.append((Shard(_shard_id(path, folder, suffix), path), folder))
        if len(found) > MAX_SHARDS:
            raise UsageError(f"{sources} names more than {MAX_SHARDS:,} shards")
    if old := _begun_without_folders([shard.id for shard, _ in found], begun):
        tell(f"{old} was begun with shards' ids without folders ({_last(found[0][0].id)}), and goes on so")
        found = [(Shard(_last(shard.id), shard.path), "") for shard, _ in found]
    shards: dict[str, Shard] = {}
    renamed: list[Shard] = []
    for shard, folder in found:
        other = shards.setdefault(shard.id, shard)
        if other.path != shard.path and not _is_same(other.path, shard.path):
            raise UsageError(
                f"two files are shard {shard.id}: {other.path} and {shard.path}; rename one of them, or give them to "
                "two runs with an output folder each, or give the folder above both, which makes their folders a part "
                "of their ids"
            )
        if other is shard and shard.id != f"{folder}{_without_suffix(shard.path.name, suffix)}":
            renamed.append(shard)
    _tell_of_renamed(renamed)
    if not isinstance(sources, str) and len(sources) > 1:
        _tell_of_twins(shards.values())
    return sorted(shards.values(), key=lambda shard: shard.id)


def local_folders(shards: Iterable[Shard]) -> set[Path]:
    """The real paths of the folders of those shards that are on a filesystem, from which their ids lead to them."""
    return {Path(os.path.realpath(folder)) for folder in {s.home for s in shards if isinstance(s.path, Path)}}


def files_of(shards: Sequence[Shard]) -> dict[str, Path]:
    """Map each shard id to its file, for code that needs files on a filesystem.

    Raises:
        UsageError: A shard is not on a filesystem.
    """
    return {shard.id: shard.file for shard in shards}


def is_safe_id(text: str) -> bool:
    """Whether ``text`` can be a shard's id, and so the path of a file in every output folder.

    Parts that are empty, ``..``, or begin with a dot are refused, and folders that begin with an underscore.
    """
    *folders, name = text.split("/")
    if not _SAFE_ID.fullmatch(name) or (folders and len(record_name(text)) > _MAX_ID):
        return False
    return all(map(_SAFE_FOLDER.fullmatch, folders))


def record_name(shard_id: str) -> str:
    """The id as a part of the names of a shard's records, which lie beside those of others: ``14%2F00000744``."""
    return shard_id.replace("/", _SLASH)


def id_of_record(name: str) -> str:
    """The id of the shard whose records have this name; the name itself where that is no id."""
    shard_id = name.replace(_SLASH, "/")
    return shard_id if is_safe_id(shard_id) else name


def record_path(folder: Path, shard_id: str, ending: str = ".json") -> Path:
    """The path of a shard's record in a folder of buckets, such as its receipt in ``_receipts/<stage>``."""
    return folder / bucket_of(shard_id) / f"{record_name(shard_id)}{ending}"


def folders_of(shard_id: str) -> str:
    """The folders that an id holds, with a slash behind each: ``14/``; empty for most."""
    return shard_id[: shard_id.rfind("/") + 1]


def home_of(path: Path, shard_id: str) -> Path:
    """The folder of a shard's files of one kind, from the path of one: without the folders that the id holds."""
    return path.parents[shard_id.count("/")]


def bucket_of(shard_id: str) -> str:
    """The name of the folder for a shard's records; about a thousand shards share one."""
    if shard_id.isdigit():
        return shard_id[:-3] or "0"
    return "x" + xxhash.xxh3_64_hexdigest(shard_id.encode())[:3]


def select(shards: list[Shard], spec: str | None, *, may_be_empty: bool = False) -> list[Shard]:
    """The subset of ``shards`` that ``spec`` names; all of them if it is None.

    spec: ids or names of files, inclusive ranges ``00000010..00000019`` or ``10-19``, patterns (``14/*``), or files of
        those (``@ids.txt``, or the path of an existing file), one or more per line; commas or white space separate
        them.  Ranges may contain gaps; a single id must exist, and a pattern must name a shard.  A number without its
        zeros (``7``) will do if it is that of one shard.  A range and a number may follow folders (``14/10..19``).
    may_be_empty: shards may not exist yet, so that no missing shard is an error.

    Raises UsageError for an id that does not exist and for a spec that selects nothing.
    """
    if spec is None:
        return shards
    known = {shard.id: shard for shard in shards}
    names = {name: shard.id for shard in shards for name in _names_of(shard)} | {name: name for name in known}
    chosen: set[str] = set()
    for item in _spec_items(spec, names):
        last = _last(item)
        if item in names:
            chosen.add(names[item])
        elif any(c in item for c in "*?[") and (matching := [name for name in known if fnmatchcase(name, item)]):
            chosen.update(matching)
        elif (ends := range_in(last)) or ".." in last:
            chosen.update(_range_ids(item, ends, known))
        elif last.isdecimal() and (found := _range_ids(item, (last, last), known)):
            if len(found) > 1:
                raise UsageError(f"--shards: {item} may be shard {found[0]} or {found[1]}; write its whole id")
            chosen.update(found)
        elif not may_be_empty:
            if not shards:
                raise UsageError(f"--shards: there is no shard {item!r}, nor any other")
            first, last = shards[0].id, shards[-1].id
            there = f"there are {len(shards):,}: {first} to {last}"
            raise UsageError(f"--shards: there is no shard {item!r} ({there}){_meant(item, known)}")
    if not chosen and not may_be_empty:
        raise UsageError(f"--shards {spec!r} selects none of the {len(shards):,} shards")
    return [shard for shard in shards if shard.id in chosen]


def _meant(item: str, known: Iterable[str]) -> str:
    """``".  Did you mean …?"`` where an item of --shards names a folder, or lacks one; otherwise empty."""
    folder = item.rstrip("/") + "/"
    if any(name.startswith(folder) for name in known):
        return f".  Did you mean '{folder}*'?"
    near = [name for name in known if name.endswith("/" + item.removesuffix(TAR))]
    return f".  Did you mean {' or '.join(near[:3])}?" if near else ""


def _without_suffix(name: str, suffix: str) -> str:
    """The file's name without its suffix; without all of them where the file has another suffix."""
    endings = (suffix, *PACKED_TARS) if suffix == TAR else (suffix,)
    ending = next((ending for ending in endings if name.endswith(ending)), None)
    return name.split(".", 1)[0] if ending is None else name[: -len(ending)]


def _shard_id(path: Source, folder: str, suffix: str) -> str:
    """The folders and the file's name without its suffix; a safe name for each that has characters that no id has.

    A digest of the whole name is part of that, so that no two names become one id.  Each stage derives the same id from
    the same name.
    """
    name = _without_suffix(path.name, suffix)
    try:
        parts = [part if _SAFE_FOLDER.fullmatch(part) else f"x{_renamed(part)}" for part in folder.split("/")[:-1]]
        shard_id = "/".join((*parts, name if _SAFE_ID.fullmatch(name) else _renamed(name)))
    except UnicodeEncodeError:
        raise UsageError(f"{path}: this name is not UTF-8, so it cannot name a shard; rename the file (mv)") from None
    if not is_safe_id(shard_id):
        raise UsageError(
            f"{path}: the folders {folder[:_MAX_ID]!r} would be part of the shard's id, which is then longer than "
            f"{_MAX_ID} characters; give a folder that is nearer to the files"
        )
    return shard_id


def _renamed(name: str) -> str:
    digest = xxhash.xxh3_64_hexdigest(name.encode())
    return f"{re.sub(r'[^A-Za-z0-9_]+', '_', name[:100]) or '_'}-{digest}"


def _last(shard_id: str) -> str:
    """The id without the folders that it holds."""
    return shard_id[len(folders_of(shard_id)) :]


def _wrote_into(root: Path, folders: str) -> bool:
    """Whether a stage with the output folder ``root`` has a receipt of a shard whose id begins with ``folders``."""
    start = re.sub(r"([*?[])", r"[\1]", record_name(folders))
    return next(root.glob(f"_receipts/*/[!_.]*/{start}*.json"), None) is not None


def _begun_without_folders(ids: Sequence[str], roots: Sequence[Path]) -> Path | None:
    """The first output folder in which a stage has receipts of these shards under ids without their folders.

    The first receipt that can tell decides, so that few are looked at.
    """
    old = {_last(shard_id) for shard_id in ids if "/" in shard_id}
    if not old.isdisjoint(ids):  # a shard beside the folders has such an id
        return None
    for root in roots if old else ():
        for receipt in root.glob("_receipts/*/[!_.]*/[!.]*.json"):
            if _SLASH in receipt.name:
                return None
            if receipt.stem in old:
                notes = (read_record(receipt) or {}).get("notes", {})
                if LAYOUT_NOTE in notes:  # shards of another size have numbers of their own
                    return None
                return root
    return None


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
    """The ids whose last parts lie between two numbers, in the folders that ``item`` begins with."""
    if ends is None:
        raise UsageError(f"--shards: cannot read the range {item!r}; write 00000010..00000019")
    low, high = map(int, ends)
    if low > high:
        raise UsageError(f"--shards: the range {item!r} runs backwards; write {ends[1]}..{ends[0]}")
    folders = folders_of(item)
    numbered = (name for name in known if name.startswith(folders) and name[len(folders) :].isdecimal())
    return [name for name in numbered if low <= int(name[len(folders) :]) <= high]


def _names_of(shard: Shard) -> tuple[str, ...]:
    """What else than its id somebody may call a shard."""
    name = f"{folders_of(shard.id)}{shard.path.name}"
    return name, name.removesuffix(TAR) if name.endswith(TAR) else name.rpartition(".")[0]
