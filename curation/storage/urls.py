"""URLs and commands that name shards: how they are found, and what may be said of them.

Nothing is read here; ``remote_read`` does that.  ``redact`` takes secrets out of URLs and of what libraries say in
their errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from curation.errors import InfrastructureError, UsageError, install
from curation.errors import redact as redact  # it is on the floor of the log, and known by this module's name

PIPE: Final = "pipe:"
HTTP: Final = frozenset(("http", "https"))
MAX_DEPTH: Final = 4  # levels of folders below the one that is named
MAX_FOLDERS: Final = 10_000  # looked through for tars: the whole disk, or store, was not meant
PACKAGES: Final = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}  # through fsspec
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_COPY_TO_STDOUT = re.compile(r"aws s3 cp ([sS]3://[^\s'\"$`|;&()<>\\]+) -")  # as in the files of dataset2metadata
_MAX_MESSAGE = 300
_MAX_HEADER_BYTES = 64 << 10
_COMPRESSIONS: Final = frozenset(("gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz"))
_ETAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id")  # what the filesystems of fsspec call it
_TIMES = ("LastModified", "updated", "mtime")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a server says of a file: its size (None where it does not say), its ETag and its time ("" for none)."""

    size: int | None
    etag: str = ""
    modified: str = ""

    def record(self) -> dict[str, Any]:
        """For receipts: another record means another file."""
        return {**({} if self.size is None else {"size": self.size}), **self.mark()}

    def mark(self) -> dict[str, str]:
        """What tells one version of the file from another."""
        return {"etag": self.etag} if self.etag else {"modified": self.modified} if self.modified else {}

    def differs(self, other: ObjectInfo) -> bool:
        """Whether the two cannot be of one version of a file."""
        if None not in (self.size, other.size) and self.size != other.size:
            return True
        if self.etag and other.etag:
            return self.etag != other.etag
        return bool(self.modified and other.modified and self.modified != other.modified)


@dataclass(frozen=True)
class Url:
    """A URL, or ``pipe:`` and a command whose output is the file.  ``str`` of it holds no secrets.

    Attributes:
        target: As it was given, secrets included.
        known: What a listing said of the file.
    """

    target: str = field(repr=False)
    known: ObjectInfo | None = field(default=None, compare=False, repr=False)

    @property
    def command(self) -> str | None:
        return self.target[len(PIPE) :].strip() if self.target.startswith(PIPE) else None

    @property
    def scheme(self) -> str:
        return "pipe" if self.command is not None else self.target.partition(":")[0].lower()

    @cached_property
    def name(self) -> str:
        """The file's name; for a command, the name of the last tar in it."""
        if self.command is None:
            path = urlsplit(self.target).path if self.scheme in HTTP else self.target.partition("://")[2]
            return unquote(path.rpartition("/")[2])
        tars = re.findall(r"[^\s'\"=/|;&()<>?#]+\.tar(?=$|[.\s'\"?#|;&)<>])", self.command)
        return tars[-1] if tars else ""

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def __str__(self) -> str:
        if self.command is not None:
            return f"{PIPE}{self.command.split()[0] if self.command else ''} … {self.name or '(no tar)'}"
        return redact(self.target)

    def __repr__(self) -> str:
        return f"Url({self})"


Source = Path | Url  # where a shard is read from


def is_remote(text: str) -> bool:
    """Whether ``text`` is a URL or a command, and not a path.  Raises UsageError for a URL of an unknown kind."""
    if text.startswith(PIPE):
        return True
    match = _SCHEME.match(text)
    if match is None:
        return False
    if match[1].lower() not in {*HTTP, *PACKAGES}:
        known = ", ".join(f"{scheme}://" for scheme in (*sorted(HTTP), *PACKAGES))
        raise UsageError(f"{match[0]}: no such source; there are {known} and pipe:")
    return True


def error_line(error: BaseException) -> str:
    """What went wrong, on one line and without secrets."""
    text = " ".join(redact(str(error)).split())[:_MAX_MESSAGE]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def compressions_in(content_encoding: str) -> list[str]:
    """The compressions that a ``Content-Encoding`` names, in the order in which they were applied.

    Many servers send a value that names none (``utf-8``, ``none``, a media type); that is no fault of the file.
    """
    return [name for word in content_encoding.split(",") if (name := word.strip().lower()) in _COMPRESSIONS]


def find_remote(text: str, suffixes: tuple[str, ...], *, allow_pipe: bool) -> Iterator[Url]:
    """The files that a URL or a command names; a bucket's folder and a glob are listed.

    Args:
        text: A URL or command, whose braces are expanded already.
        suffixes: How the files' names may end.  Of a listing, the files with the first of these suffixes that any has.
        allow_pipe: Whether commands may be run.

    Raises:
        UsageError: It cannot be listed, or it is a command without ``allow_pipe``.
        InfrastructureError: The store cannot be asked.
    """
    file = Url(text)
    copied = None if allow_pipe or file.command is None else _COPY_TO_STDOUT.fullmatch(file.command)
    if copied is not None:  # what the command would do is done here, and no command is run
        text = copied[1]
        file = Url(text)
    if file.command is not None:
        if not allow_pipe:
            raise UsageError(f"{file}: commands are run only with --allow_pipe, because they can do anything")
        if not file.name:
            raise UsageError(f"{file}: the command contains no *.tar, which would give the shard its name")
        yield file
    elif file.scheme in HTTP:
        if not file.name.endswith(suffixes):
            raise UsageError(
                f"{file}: web servers list no folders; name *{suffixes[0]} files, by braces or in a list file"
            )
        yield file
    else:
        filesystem(file.scheme)  # say at once that a package is missing
        if any(c in text for c in "*?["):
            yield from _listed(file, suffixes)
        elif not text.endswith(suffixes):
            yield from _in_folder(file, suffixes, MAX_DEPTH, [0])
        else:
            yield file


def filesystem(scheme: str) -> Any:
    """fsspec's filesystem for a scheme, with the credentials and proxies of the environment.

    Raises InfrastructureError where its package is missing.
    """
    # Without trust_env, aiohttp would use no proxies; by itself, it takes header lines of 8 kB.
    client = {"trust_env": True, "max_line_size": _MAX_HEADER_BYTES, "max_field_size": _MAX_HEADER_BYTES}
    web = {"client_kwargs": client} if scheme in HTTP else {}
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False, **web)
    except ImportError as error:
        module = "fsspec" if error.name == "fsspec" else PACKAGES.get(scheme, "aiohttp")
        raise InfrastructureError(f"{scheme}:// needs {module} ({error}): {install(module)}") from None


def object_info(info: Mapping[str, Any]) -> ObjectInfo:
    """What fsspec says of a file, whose filesystems have several names for the same things."""
    etag = next((str(info[name]) for name in _ETAGS if info.get(name)), "")
    modified = next((str(info[name]) for name in _TIMES if info.get(name)), "")
    return ObjectInfo(info.get("size"), etag, "" if etag else modified)


def _in_folder(folder: Url, suffixes: tuple[str, ...], depth: int, count: list[int]) -> Iterator[Url]:
    """The files of a store's folder; without any, those of the folders in it, as in folders of this machine.

    depth: how many levels of folders may follow.  count: of the folders that were listed so far.
    """
    count[0] += 1
    if count[0] > MAX_FOLDERS:
        raise UsageError(f"more than {MAX_FOLDERS:,} folders were searched for *{suffixes[0]} files: give a glob")
    files, folders = [], []
    for found, is_file in _entries(folder):
        if is_file and found.name.endswith(suffixes):
            files.append(found)
        elif not is_file and depth and not found.name.startswith("_") and found.target != folder.target.rstrip("/"):
            folders.append(found)
    of_kinds = ([found for found in files if found.name.endswith(suffix)] for suffix in suffixes)
    yield from next((kind for kind in of_kinds if kind), [])
    for below in () if files else folders:
        yield from _in_folder(below, suffixes, depth - 1, count)


def _listed(file: Url, suffixes: tuple[str, ...]) -> Iterator[Url]:
    return (found for found, is_file in _entries(file) if is_file and found.name.endswith(suffixes))


def _entries(file: Url) -> Iterator[tuple[Url, bool]]:
    """What a store's folder or a pattern holds, in order, and whether it is a file."""
    store, url = filesystem(file.scheme), file.target
    try:
        is_pattern = any(c in url for c in "*?[")
        if is_pattern and store.isfile(url):  # a name may hold such characters
            found = {info["name"]: info for info in [store.info(url)]}
        elif is_pattern and not store.isdir(url):
            found = store.glob(url, detail=True)
        else:
            found = {info["name"]: info for info in store.ls(url.rstrip("/"), detail=True)}
    except FileNotFoundError:
        raise UsageError(f"{file} is not there") from None
    except PermissionError as error:
        raise UsageError(f"{file}: cannot be listed: {error_line(error)}") from None
    except Exception as error:
        raise InfrastructureError(
            f"{file}: cannot be listed: {error_line(error)} (credentials come from the environment)"
        ) from error
    for name in sorted(found):
        path, kind = name.rstrip("/"), found[name].get("type")
        if kind in ("file", "directory") and not path.rpartition("/")[2].startswith("."):
            yield Url(f"{file.scheme}://{path}", object_info(found[name])), kind == "file"
