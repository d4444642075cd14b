"""Which files a text names that a user has typed: folders, globs, braces, lists, files, URLs and commands.

What is meant is done where only one thing can be meant, with a line that says so.  Otherwise the message says what to
type.  Nothing is left out without a line.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

from curation.cluster import WORKER_VARIABLE
from curation.errors import UsageError
from curation.jsonio import clean_text
from curation.options import logger, plain_path, plain_source
from curation.storage.files import existing_part, glob_paths, is_pattern, read_record
from curation.storage.urls import MAX_DEPTH, MAX_FOLDERS, PIPE, Source, Url, find_remote, is_remote

TAR: Final = ".tar"
PACKED_TARS: Final = (".tar.gz", ".tgz")  # read like tars
Found = tuple[Source, str]  # a file, and the folders between it and what was named, with a slash behind each
_NO_LISTS: Final = (
    TAR, *PACKED_TARS, ".tar.zst", ".tar.bz2", ".tar.xz", ".zip", ".json", ".jsonl", ".parquet", ".npz", ".npy",
    ".jpg", ".jpeg", ".png", ".webp", ".idx", ".md", ".sh", ".yml", ".yaml", ".log",
)  # fmt: skip
_PACKED_OTHERWISE: Final = (".tar.zst", ".tar.bz2", ".tar.xz", ".zip")
_INCOMPLETE: Final = (".part", ".partial", ".tmp", ".crdownload", ".aria2", ".download", ".filepart")
_SAMPLE_FILES: Final = frozenset(("jpg", "jpeg", "png", "webp", "txt"))
_PUBLISHED: Final = "_published"  # receipts of what a publisher has uploaded
_EDITS: Final = ("edits", "03_generate_images")  # tars of edited samples alone: nobody's source


def tell(text: str) -> None:
    """Warn once: a run's workers find the same files again, and say nothing."""
    if WORKER_VARIABLE not in os.environ:
        logger.warning(text)


def is_tar(source: Source | str) -> bool:
    """Whether a name is that of a tar, be it compressed with gzip or not."""
    return str(getattr(source, "name", source)).endswith((TAR, *PACKED_TARS))


def is_loose(path: Path) -> bool:
    """Whether a folder is a shard of loose files (img2dataset): its name is a number, or its table is next to it.

    A folder that holds tars, or nothing but folders, is none: ``shards/000/00000.tar``.  Nor is an empty one in the
    output folder of a stage, which is what remains when all tars in it were published and removed.
    """
    if path.name in ("", ".."):  # "." and "/" have no name, and ".." has another one
        path = Path(os.path.abspath(path))
    name = path.name
    if not name:
        return False
    has_table = path.with_name(f"{name}.parquet").is_file()
    named = (name.isascii() and name.isdigit()) or has_table
    # In a stage's output folder, an empty one held tars that were removed after their upload.
    published = not has_table and any(path.with_name("_receipts").glob("*/*"))
    return named and path.is_dir() and not _holds_shards(path, empty=published)


def _holds_shards(folder: Path, *, empty: bool) -> bool:
    """Whether a folder holds a tar, or folders alone.  The first file of a sample ends the search.

    empty: the answer for an empty folder.
    """
    folders = files = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                is_folder = _is_folder(entry)
                if is_tar(entry.name) and not is_folder:
                    return True
                if not is_folder and entry.name.rpartition(".")[2].lower() in _SAMPLE_FILES:
                    return False
                folders, files = folders + is_folder, files + (not is_folder)
    except OSError:
        return False
    return files == 0 and (folders > 0 or empty)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


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


def numbered_lines(list_file: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a list without comments, which begin with a ``#`` at the start or after white space."""
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{list_file}: not a list in UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if text:
            yield number, text


def is_wild(text: str) -> bool:
    """Whether a text may be a pattern: it has wildcards or braces."""
    return any(c in text for c in "*?[{")


def _fixed_folder(url: str) -> str:
    """The folder before the first wildcard of a URL."""
    return re.split(r"[*?\[{]", url, maxsplit=1)[0].rpartition("/")[0]


def _folders_between(start: str, folder: str) -> str:
    """The folders from ``start`` to a folder in it, with a slash behind each; none where the folder lies elsewhere."""
    above, parts = PurePosixPath(start).parts, PurePosixPath(folder).parts
    if parts[: len(above)] != above or ".." in parts[len(above) :]:
        return ""
    return "".join(f"{part}/" for part in parts[len(above) :])


def separate(text: str) -> list[str]:
    """The sources in one text: itself if it names something, else what white space or commas separate.

    So an environment variable can hold several, as in ``SRC_DIR="a.tar b.tar"``; each of them must name something.
    """
    if text.lstrip().startswith(PIPE) or not re.search(r"[\s,]", text.strip()) or _names_something(text):
        return [text]
    for separator in (r"[\r\n]+", r"[\s,]+", r"\s+", r","):
        parts = [part.strip() for part in re.split(separator, text) if part.strip()]
        if len(parts) > 1 and all(map(_names_something, parts)):
            return parts
    return [text]


def as_one_text(sources: Sequence[str]) -> str:
    """One text that ``separate`` takes apart again, for an environment variable."""
    return ("\n" if any(re.search(r"\s", source) for source in sources) else " ").join(sources)


def _names_something(text: str) -> bool:
    try:
        if is_remote(text.strip()):
            return len(text.split()) == 1 and not re.search(r",\s*\w+://", text)
        path = plain_path("", text)
        return os.path.lexists(path) or next(_matches(path), None) is not None
    except UsageError:
        return False


def _matches(pattern: str, limit: int = 1000) -> Iterator[str]:
    """What a glob names, or a pattern with braces: of that only what exists, because a range may have gaps.

    limit: how many braces are expanded.
    """
    braces = "{" in pattern
    for name in islice(expand_braces(pattern), limit + 1) if braces else (pattern,):
        if braces and os.path.lexists(name):
            yield name
        elif any(c in name for c in "*?["):
            yield from glob_paths(name)


class Search:
    """Finds the files that sources name.

    Args:
        suffix: How the files' names end; with ``.tar``, tars that are compressed with gzip count as well.
        inside: What the folder of such files is called inside the folder of a whole dataset.
        allow_pipe: Commands may be run.
        limit: How many files a pattern with braces may name.
        wrote_into: Whether a stage whose output folder is given has receipts of shards in a folder below it.
        whole: A stage's output folder, some of whose tars lie in a store alone, is refused.
    """

    def __init__(
        self,
        suffix: str,
        inside: str,
        *,
        allow_pipe: bool,
        limit: int,
        wrote_into: Callable[[Path, str], bool],
        whole: bool,
    ) -> None:
        self._wrote_into, self._whole = wrote_into, whole
        self._suffix, self._inside = suffix, inside
        self._endings = (suffix, *PACKED_TARS) if suffix == TAR else (suffix,)
        self._allow_pipe, self._limit = allow_pipe, limit
        self._folders = 0
        self._skipped: list[str] = []

    def find(self, sources: Sequence[str], *, may_be_empty: bool) -> Iterator[Found]:
        """The files that all sources name together, in the sources' order, each with the folders that its id holds.

        Raises:
            UsageError: A source names nothing, and ``may_be_empty`` is not set.
        """
        words = [word for source in sources for word in separate(source)]
        beside = len(words) > 1 and any(word.endswith(self._endings) for word in words)
        for word in words:
            if beside and self._skip(word):
                continue
            if not word.strip():  # as a path it would be the folder of this process
                raise UsageError("a source is empty: perhaps a variable or a pattern of the shell was empty")
            source, found = plain_source("", word), False
            for one in self._named(source):
                found = True
                yield one
            if not found and not may_be_empty:
                raise UsageError(self._why_none(source))
        if self._skipped:
            first, count = self._skipped[0], len(self._skipped)
            which = f"{first} is" if count == 1 else f"{count:,} files such as {first} are"
            tell(f"{which} not read: only *{self._suffix} files are wanted here")

    def _skip(self, name: str) -> bool:
        """Whether a name is that of a file beside shards, as ``shards/*`` names them too, or of a folder of records."""
        if name.endswith(self._endings) or not name.endswith((*_NO_LISTS, *_INCOMPLETE, "/")):
            base = os.path.basename(name)
            return base.startswith("_") and os.path.isdir(name)
        if os.path.isdir(name) or is_remote(name) or not os.path.lexists(name):
            return False
        self._skipped.append(name)
        return True

    def _named(self, source: str) -> Iterator[Found]:
        if is_remote(source):
            yield from self._remote(source)
            return
        path = Path(source)
        if path.is_dir():
            yield from self._in_folder(path)
        elif source.rstrip("/").endswith(self._endings) and os.path.lexists(path):
            yield path, ""
        elif path.is_file():
            self._check_list(path)
            yield from self._listed(path)
        elif is_wild(source):
            yield from self._matching(source)
        else:
            raise UsageError(
                f"{source!r} does not exist{_near(source)}: give a folder, a glob, braces, a list file or one "
                f"*{self._suffix}"
            )

    def _matching(self, pattern: str) -> Iterator[Found]:
        names = list(islice(_matches(pattern, self._limit), self._limit + 1))
        beside = any(name.endswith(self._endings) for name in names)
        start = existing_part(pattern)[0]
        for name in names:
            path = Path(name)
            above = _folders_between(start, os.path.dirname(name))
            if name.endswith(self._endings):
                yield path, above  # without a look at each
            elif beside and self._skip(name):
                continue
            elif is_loose(path) or not path.exists():
                yield path, above
            elif beside:
                self._skipped.append(name)
            elif path.is_dir():
                if not path.name.startswith("_"):
                    yield from self._in_folder(path, _folders_between(start, name))
            else:
                self._check_list(path)
                yield from self._listed(path)

    def _remote(self, text: str) -> Iterator[Found]:
        if self._suffix != TAR:
            raise UsageError(
                f"{Url(text)}: only tars are read from a URL or command; copy *{self._suffix} files to this machine"
            )
        start = "" if text.startswith(PIPE) else _fixed_folder(text) if is_wild(text) else text.rstrip("/")
        for name in islice(expand_braces(text, leave_others=text.startswith(PIPE)), self._limit + 1):
            for file in find_remote(name, self._endings, allow_pipe=self._allow_pipe):
                yield file, _folders_between(start, os.path.dirname(file.target)) if start else ""

    # ---- lists

    def _check_list(self, path: Path) -> None:
        """Raise UsageError for a file that is no list of shards, by its name."""
        if not path.name.lower().endswith(_NO_LISTS):
            return
        wanted = f"*{self._suffix} files are wanted here, or a text file that lists them, one path a line"
        if path.name.lower().endswith(_PACKED_OTHERWISE):
            raise UsageError(f"{path}: this kind of archive is not read; unpack it first; {wanted}")
        raise UsageError(f"{path}: {wanted}{_made_by(path.parent)}")

    def _listed(self, list_file: Path) -> Iterator[Found]:
        for number, name in numbered_lines(list_file):
            if is_remote(name):
                yield from self._remote(name)
                continue
            path = list_file.parent / name
            if not os.path.lexists(path):
                name = plain_source(f"{list_file}, line {number}:", name)
                path = list_file.parent / name
            inside = "" if os.path.isabs(name) else f"{self._inside}/"
            above = "" if os.path.isabs(name) else _folders_between("", os.path.dirname(name)).removeprefix(inside)
            if path.is_file() or is_loose(path) or (path.is_symlink() and is_tar(path)):
                yield path, above
            elif path.is_dir():
                yield from self._in_folder(path)
            elif is_pattern(str(path)) and (names := list(_matches(str(path)))):
                start = str(list_file.parent) if inside else existing_part(name)[0]
                yield from (
                    (Path(one), _folders_between(start, os.path.dirname(one)).removeprefix(inside)) for one in names
                )
            else:
                raise UsageError(f"{list_file}, line {number}: no file {name!r}")

    # ---- folders

    def _in_folder(
        self, folder: Path, above: str = "", depth: int = 0, root: Path | None = None
    ) -> Iterator[tuple[Path, str]]:
        """The folder's files with the suffix; without tars, its folders of loose files, or itself if it is one, or
        the tars in its subfolders.  With the files of a stage's output go those that it has written below.

        above: the folders that all their ids hold.  root: the output folder of a stage in which it lies.
        """
        self._folders += 1
        if self._folders > MAX_FOLDERS:
            raise UsageError(f"more than {MAX_FOLDERS:,} folders were searched for *{self._suffix} files: give a glob")
        try:
            with os.scandir(folder) as entries:  # one listing, no stat per shard
                every = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise UsageError(f"{folder}: cannot be listed ({error.strerror})") from None
        root = folder if any(entry.name == "_receipts" for entry in every) else root
        named = [entry for entry in every if entry.name.endswith(self._endings)]
        unpacked = {entry.name for entry in named if _is_folder(entry)}
        names = [entry.name for entry in named if entry.name not in unpacked and entry.name.endswith(self._suffix)]
        packed = [entry.name for entry in named if entry.name not in unpacked and not entry.name.endswith(self._suffix)]
        if names and self._whole and any(entry.name == _PUBLISHED for entry in every):
            _refuse_removed(folder, set(names))
        if names or packed:
            self._tell_of_others(folder, names, packed, unpacked, [entry.name for entry in every])
            yield from ((folder / name, above) for name in sorted(names or packed))
            if root is not None:
                places = sorted(folder / entry.name for entry in every if _is_folder(entry))
                yield from self._nested(places, above, depth, root)
            return
        subfolders = sorted(entry.name for entry in every if _is_folder(entry))
        if self._suffix == TAR:
            names = [name for name in subfolders if is_loose(folder / name)]
            yield from ((folder / name, above) for name in names)
        if self._suffix == TAR and not names and is_loose(folder):
            yield folder, above.removesuffix(f"{folder.name}/")
        elif not names:
            yield from self._below(folder, subfolders, above, depth, root)

    def _below(
        self, folder: Path, subfolders: Sequence[str], above: str, depth: int, root: Path | None
    ) -> Iterator[tuple[Path, str]]:
        """The files in a dataset's folder of them, or the tars in all subfolders but those of records and edits."""
        inside = folder / self._inside
        if self._inside in subfolders and (found := list(self._in_folder(inside, above, MAX_DEPTH - 1))):
            tell(f"{folder} has no *{self._suffix} files itself: those in {inside} are read")
            yield from found
            return
        places = [folder / name for name in subfolders if not name.startswith("_")]
        if self._suffix != TAR:
            yield from self._nested(places, above, depth, root)
            return
        edits = [place for place in places if _holds_edits(place)]
        found = list(self._nested([place for place in places if place not in edits], above, depth, None))
        if found and depth == 0 and not (root is not None and self._wrote_into(root, found[0][1])):
            left_out = f"; {edits[0]} is not, because it holds edits" if edits else ""
            tell(
                f"{folder} has no tars itself: the {len(found):,} in its subfolders, such as {found[0][0]}, are read, "
                f"with these folders in their ids{left_out}"
            )
        yield from found

    def _nested(self, places: Iterable[Path], above: str, depth: int, root: Path | None) -> Iterator[tuple[Path, str]]:
        """The files in folders, which their ids hold.  root: take only folders into which the stage there has written,
        and no others of the dataset; None where tars are looked for wherever they are."""
        if depth >= MAX_DEPTH or (root is None and self._suffix != TAR):
            return
        for place in places:
            if root is None or (place.name[0] != "_" and self._wrote_into(root, f"{place.relative_to(root)}/")):
                yield from self._in_folder(place, f"{above}{place.name}/", depth + 1, root)

    def _tell_of_others(
        self, folder: Path, tars: Iterable[str], packed: Iterable[str], unpacked: Iterable[str], every: Iterable[str]
    ) -> None:
        """Warn of what is not read in a folder of shards, except of packed copies of tars that are there."""
        ids = {name[: -len(self._suffix)] for name in tars}
        if ids and (
            others := sorted(name for name in packed if name.removesuffix(".tgz").removesuffix(".tar.gz") not in ids)
        ):
            tell(
                f"{folder}: {len(others):,} files such as {others[0]} are not read, because there are tars beside "
                "them; to read both, name them in a list file"
            )
        if folders := sorted(unpacked):
            tell(f"{folder}: {len(folders):,} folders such as {folders[0]} are named like shards and are not read")
        endings = tuple(f"{ending}{end}" for ending in self._endings for end in _INCOMPLETE)
        if parts := sorted(name for name in every if name.endswith(endings)):
            tell(f"{folder}: {len(parts):,} incomplete files such as {parts[0]} are not read")

    def _why_none(self, source: str) -> str:
        """What to say of a source that names no file."""
        text = f"no *{self._suffix} shards found in {source!r}"
        folder = Path(source)
        if is_remote(source) or not folder.is_dir():
            return text
        names = [name for name in _names_in(folder) if name[0] not in "._"]
        kinds = Counter(f"*{Path(name).suffix}" for name in names if Path(name).suffix)
        if kinds:
            text += f"; it holds {', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common(3))}"
        text += _made_by(folder)
        meant = [name for name in sorted(names) if any(n.endswith(self._suffix) for n in _names_in(folder / name))]
        if meant:
            text += f"; did you mean {' or '.join(str(folder / name) for name in meant[:3])}?"
        elif kinds.keys() & {"*.parquet", "*.csv", "*.tsv"} and self._suffix == TAR:
            text += "; if these are tables of URLs, let stage 00 (00_download.py) download the images first"
        return text


def _names_in(folder: Path) -> list[str]:
    """For a message: what lies in a folder, as far as that can be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _holds_edits(folder: Path) -> bool:
    name, stage = _EDITS
    return folder.name == name or os.path.isdir(folder / "_receipts" / stage)


def _refuse_removed(folder: Path, names: Collection[str]) -> None:
    """Raise UsageError if tars of a stage's output folder lie in a store alone: the others would seem to be all.

    names: of the tars in the folder.
    """
    for record in (folder / _PUBLISHED).glob("*/[0-9]*/[!_]*/*.json"):
        if f"{record.name.rsplit('.', 2)[0]}{TAR}" in names:
            continue
        told = read_record(record) or {}
        there = [str(file.get("name")) for file in told.get("files") or () if isinstance(file, dict)]
        if gone := [name for name in there if name.endswith(TAR) and not os.path.lexists(folder / name)]:
            raise UsageError(
                f"{folder}: {clean_text(gone[0])} lies only in {clean_text(str(told.get('store')))}: give this as "
                "--input, or copy the tars back"
            )


def _made_by(folder: Path) -> str:
    """For a message: which stages wrote a folder's files, as their receipts say."""
    stages = [name for name in sorted(_names_in(folder / "_receipts")) if re.fullmatch(r"\d\d_\w+", name)]
    marks = [folder / _PUBLISHED / name / "_mark.json" for name in sorted(_names_in(folder / _PUBLISHED))]
    stores = [str(record["store"]) for mark in marks if "store" in (record := read_record(mark) or {})]
    if not stages:
        return ""
    by, also = " and ".join(stages), f", and published to {clean_text(' and '.join(stores))}" if stores else ""
    return f"; {folder} was written by {by}{also}: give the folder{' or URL' if also else ''} that this one is to read"


def _near(source: str) -> str:
    """For a message: quotation marks of a web page, or a name beside it that is nearly the same."""
    if any(mark in source for mark in "“”„‘’«»"):
        return ' (it has typographic quotation marks, perhaps copied from a web page: type "…" instead)'
    path = Path(source)
    close = difflib.get_close_matches(path.name, _names_in(path.parent)[:10_000], 1, 0.7)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
