"""URLs of stores: which there are, what they may be, and the name under which a folder's records keep one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import xxhash

from curation.errors import UsageError, redact
from curation.publish.repository import check_name
from curation.publish.store import Store

SCHEMES: Final = ("s3", "gs", "hf", "file")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NOT_IN_FOLDERS = re.compile(r"[?*\[\]{}#]")
_LONGEST_NAME: Final = 80
_READ_IN_A_ROOT: Final = ("shards", "captions", "prompts")  # what stages read of a folder that holds them
# Which servers the same URL means on this machine.
_ENDPOINTS: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "hf": ("HF_ENDPOINT",),
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store is.

    Attributes:
        scheme: One of ``SCHEMES``.
        place: A bucket, a dataset repository (``user/name``), or nothing for a path.
        folder: In the bucket or repository, "" for all of it; or the path.
    """

    scheme: str
    place: str
    folder: str

    @property
    def url(self) -> str:
        """As records and messages have it; a path has no scheme."""
        if self.scheme == "file":
            return self.folder
        middle = "datasets/" if self.scheme == "hf" else ""
        return f"{self.scheme}://{middle}{self.place}/{self.folder}".rstrip("/")


def is_store(text: str) -> bool:
    """Whether a text is the URL of a store, and not a path."""
    found = _SCHEME.match(text)
    return found is not None and found[1].lower() in (*SCHEMES, "gcs")


def address_of(url: str) -> Address:
    """What a URL or a path means.  Raises UsageError where nothing can be published there."""
    shown = redact(url)
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else "file"
    scheme = {"gcs": "gs"}.get(scheme, scheme)
    if scheme not in SCHEMES:
        raise UsageError(
            f"{shown}: nothing can be published there: give s3://bucket/folder, gs://bucket/folder, "
            "hf://datasets/user/name, or a folder of another filesystem"
        )
    if found is None and (word := re.match(r"([A-Za-z0-9]+):/", url)) and word[1].lower() in (*SCHEMES, "gcs"):
        raise UsageError(f"{shown}: is this a URL?  Type {word[0]}/{shown[word.end() :]}")
    if scheme == "file":
        return Address("file", "", _path(url if found is None else url[found.end() :], shown, is_url=found is not None))
    assert found is not None
    words = url[found.end() :].rstrip("/").split("/")
    if scheme == "hf":
        if len(words) < 3 or words[0] != "datasets":
            raise UsageError(f"{shown}: give a dataset repository, such as hf://datasets/user/name")
        place, folder = "/".join(words[1:3]), words[3:]
        check_name(place)
    else:
        place, folder = words[0], words[1:]
        if not _BUCKET.fullmatch(place):
            raise UsageError(f"{shown}: give a bucket and a folder, such as {scheme}://bucket/folder")
    if any(word in ("", ".", "..") or not word.isprintable() or _NOT_IN_FOLDERS.search(word) for word in folder):
        raise UsageError(f"{shown}: a folder's name has no ? * [ ] {{ }} #, no empty part and no ..")
    return Address(scheme, place, "/".join(folder))


def _path(text: str, shown: str, *, is_url: bool) -> str:
    if is_url:
        host, slash, rest = text.partition("/")
        if host not in ("", "localhost") or not slash or re.search(r"[?#]", rest):
            raise UsageError(f"{shown}: give a path of this machine, such as file:///path/to/folder")
        text = "/" + unquote(rest)
    if not text.strip() or not text.isprintable() or ".." in Path(text).parts:
        raise UsageError(f"{shown!r}: give a folder of another filesystem, without ..")
    return os.path.abspath(text if is_url else os.path.expanduser(text))


def open_store(url: str) -> Store:
    """The store that a URL names.  Nothing is asked yet.

    Raises:
        UsageError: It is no such URL, or its package is missing.
    """
    address = address_of(url)
    if address.scheme == "s3":
        from curation.publish.s3 import S3Store

        return S3Store(address.place, address.folder)
    if address.scheme == "gs":
        from curation.publish.gcs import GoogleStore

        return GoogleStore(address.place, address.folder)
    if address.scheme == "hf":
        from curation.publish.hub_store import HubStore

        return HubStore(address.place, address.folder)
    from curation.publish.folder import FolderStore

    return FolderStore(Path(address.folder))


def refuse_own_folder(url: str, home: Path) -> None:
    """Raise UsageError if a stage's output folder would be published into itself, where nothing is a copy."""
    address = address_of(url)
    if address.scheme == "file":
        there, here = Path(os.path.realpath(address.folder)), Path(os.path.realpath(home))
        if there.is_relative_to(here) or here.is_relative_to(there):
            raise UsageError(
                f"{redact(url)}: this is the output folder {home} itself, or lies inside it or around it; publish to "
                "another folder"
            )


def refuse_folders_of(url: str, option: str, places: Iterable[str]) -> None:
    """Raise UsageError if a stage would publish into a folder that it reads, where outputs would lie among inputs.

    Args:
        url: Where to publish.
        option: The name of the option that names what is read.
        places: Its values: folders, files, patterns and URLs.
    """
    address = address_of(url)
    for place in places:
        if address.scheme != "file":
            first = re.split(r"[*?\[{]", place.replace("gcs://", "gs://", 1), maxsplit=1)[0]
            clash = address.url in (first.rstrip("/"), first.rpartition("/")[0])
        else:
            real = os.path.realpath(place)
            folders = [real, *(os.path.join(real, name) for name in _READ_IN_A_ROOT)]
            clash = os.path.realpath(address.folder) in (folders if os.path.isdir(real) else [os.path.dirname(real)])
        if clash:
            raise UsageError(f"{redact(url)}: --{option} names this folder; publish to another folder")


def store_name(url: str) -> str:
    """The name of the folder in which the records of a store are kept: readable, and another one for another store.

    Servers with different endpoints are different stores: the variables that name them belong to it.
    """
    address = address_of(url)
    server = next((value for name in _ENDPOINTS.get(address.scheme, ()) if (value := os.environ.get(name))), "")
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{address.scheme}-{address.place}-{address.folder}").strip("-.")
    identity = "\n".join((address.url, redact(server).rstrip("/")))
    return f"{words[:_LONGEST_NAME].rstrip('-.')}-{xxhash.xxh32_hexdigest(identity.encode())}"


def repository_in(url: str) -> str | None:
    """The whole dataset repository that ``hf://datasets/user/name`` names; None for every other URL."""
    address = address_of(url)
    return address.place if address.scheme == "hf" and not address.folder else None
