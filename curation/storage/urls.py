"""Files that lie on no filesystem: what URLs and commands name as shards, and how they are found.

Nothing is read here; ``transports.py`` does that.  What is said of such a file never shows a password, a signature or
the rest of a command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from curation.errors import InfrastructureError, UsageError

PIPE: Final = "pipe:"


HTTP: Final = frozenset(("http", "https"))


PACKAGES: Final = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}  # through fsspec


_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


_MAX_MESSAGE = 300

Told = tuple[int | None, tuple[tuple[str, str], ...]]


"""Size, and what tells one version of a file from another: (("etag", …),)."""


@dataclass(frozen=True)
class Url:
    """A URL, or ``pipe:`` and a command whose output is the file.  As text it is fit for messages.

    target: as it was given, secrets included.  known: what a listing told of it.
    """

    target: str = field(repr=False)
    known: Told | None = field(default=None, compare=False, repr=False)

    @property
    def command(self) -> str | None:
        return self.target[len(PIPE) :].strip() if self.target.startswith(PIPE) else None

    @property
    def scheme(self) -> str:
        return "pipe" if self.command is not None else self.target.partition(":")[0].lower()

    @cached_property
    def name(self) -> str:
        """The file's name; of a command, that of the last tar in it."""
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
        return f"RemoteFile({self})"


Source = Path | Url


"""Where a shard is read from."""


def is_remote(text: str) -> bool:
    """Whether ``text`` is a URL or a command, and no path.  UsageError for a URL of an unknown kind."""
    if text.startswith(PIPE):
        return True
    match = _SCHEME.match(text)
    if match is None:
        return False
    if match[1].lower() not in {*HTTP, *PACKAGES}:
        known = ", ".join(f"{scheme}://" for scheme in (*sorted(HTTP), *PACKAGES))
        raise UsageError(f"{match[0]}: no such source; there are {known} and pipe:")
    return True


def redact(text: str) -> str:
    """URLs without user, password, query and fragment."""
    text = re.sub(r"(://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1?…", text)


def find_remote(text: str, suffix: str, *, allow_pipe: bool) -> Iterator[Url]:
    """The files that a URL or a command without braces names; a bucket's folder and a glob are listed.

    Raises UsageError for what cannot be listed and for a command without ``allow_pipe``.
    """
    file = Url(text)
    if file.command is not None:
        if not allow_pipe:
            raise UsageError(f"{file}: commands are run only with --allow_pipe, for they may do anything")
        if not file.name:
            raise UsageError(f"{file}: the command names no *.tar that its shard could be named for")
        yield file
    elif file.scheme in HTTP:
        if not file.name.endswith(suffix):
            raise UsageError(f"{file}: web servers list no folders; name *{suffix} files, by braces or in a list file")
        yield file
    else:
        filesystem(file.scheme)  # say at once that a package is missing
        if any(c in text for c in "*?[") or not text.endswith(suffix):
            yield from _listed(file, suffix)
        else:
            yield file


def filesystem(scheme: str) -> Any:
    """fsspec's filesystem for a scheme, with the credentials of the environment; InfrastructureError without it."""
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise InfrastructureError(
            f"{scheme}:// needs {PACKAGES[scheme]} ({error}): pip install {PACKAGES[scheme]}"
        ) from None


def told_by(info: dict[str, Any]) -> Told:
    """What fsspec says of a file, by the names that its filesystems have for the same things."""
    size = info.get("size")
    for name in ("ETag", "etag", "generation", "md5Hash", "blob_id", "LastModified", "updated", "mtime"):
        if info.get(name):
            kind = "modified" if name in ("LastModified", "updated", "mtime") else "etag"
            return size, ((kind, str(info[name])),)
    return size, ()


def error_line(error: BaseException) -> str:
    """What went wrong, on one line and without secrets."""
    text = " ".join(redact(str(error)).split())[:_MAX_MESSAGE]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _listed(file: Url, suffix: str) -> Iterator[Url]:
    store, url = filesystem(file.scheme), file.target
    try:
        if any(c in url for c in "*?["):
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
        base = name.rpartition("/")[2]
        if found[name].get("type") == "file" and base.endswith(suffix) and not base.startswith("."):
            yield Url(f"{file.scheme}://{name}", told_by(found[name]))
