"""Objects in buckets that appear whole, when the upload that wrote them is completed.

An upload under way is to an object what a temporary file is to a file: nobody sees it, and completing it is the rename
that can happen once, replaces what was there in one step, and can be asked for by anyone who knows the upload, any
number of times.

Outputs in buckets: where they go, how they are written without a copy on a disk, and whether they are there.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from curation.errors import InfrastructureError, LostClaim, UsageError
from curation.storage import remote_read
from curation.storage.files import AtomicWriter, Published
from curation.storage.urls import Source, Url, error_line, filesystem, redact, told_by

PART_BYTES: Final = 16 << 20  # all alike, which some stores insist on; S3 takes 10,000 of at least 5 MiB


MAX_PARTS: Final = 10_000


_TOKEN: Final = "curation-token"  # noqa: S105 - in the object's metadata: the attempt that wrote it


_CHECKSUMS: Final = ("ETag", "ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")


_TRANSIENT: Final = frozenset(
    ("RequestTimeout", "OperationAborted", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
     "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
)  # fmt: skip


_LOST: Final = ("InvalidPart", "InvalidPartOrder", "EntityTooSmall")  # parts of an upload that was tampered with


_ADVICE: Final = "mend it and start again, nothing published is lost"


@dataclass(frozen=True, slots=True)
class Found:
    """An object as it lies there.  token: of the attempt that wrote it, "" where the store does not tell; mark: what a
    removal can insist on."""

    size: int
    token: str = ""
    mark: str = ""

    def is_of(self, output: Mapping[str, Any]) -> bool:
        """Whether it is what a receipt names."""
        return bool(self.size == output["size"] and self.token in ("", output["upload"]["token"]))


class NoUpload(Exception):
    """The upload is completed or aborted."""


class UploadedObject(Protocol):
    """One object, which is there or not, and the uploads to it.  Everything raises InfrastructureError where the store
    cannot be asked.  ``parallel``: parts that may be sent at once."""

    parallel: int

    def begin(self, token: str) -> str:
        """A new upload's id."""

    def put(self, upload: str, number: int, data: bytes | bytearray) -> dict[str, str]:
        """Send part ``number``, from 1; returns what completing it needs.  LostClaim when the upload was aborted."""

    def end(self, upload: str) -> None:
        """After the last part: everything is durable, and still not to be seen."""

    def complete(self, upload: str, parts: Sequence[Mapping[str, str]]) -> None:
        """The object appears.  Nothing happens where the upload was completed or aborted before."""

    def abort(self, upload: str) -> None:
        """Nothing of the upload is left.  Nothing happens where it was completed before."""

    def under_way(self) -> list[str]:
        """The ids of all uploads to this object."""

    def look(self) -> Found | None: ...

    def remove(self, found: Found) -> None:
        """Remove the object if it is still the one that was found, as far as the store can tell."""


def object_at(file: Url) -> UploadedObject:
    """InfrastructureError where the store's package is missing."""
    store = filesystem(file.scheme)
    return S3Object(file, store) if file.scheme == "s3" else MovedObject(file, store)


def complete_upload(output: Mapping[str, Any]) -> None:
    """Publish an output of a receipt whose commit is recorded."""
    upload = output["upload"]
    object_at(Url(output["path"])).complete(upload["id"], upload["parts"])


def list_objects(folder: str) -> dict[str, int]:
    """Names and sizes of the objects right below ``folder``, a URL."""
    file = Url(folder)
    store = filesystem(file.scheme)
    try:
        infos = _patiently(file, lambda: store.ls(folder.rstrip("/"), detail=True))
    except FileNotFoundError:  # nothing lies there yet
        return {}
    return {info["name"].rpartition("/")[2]: int(info["size"] or 0) for info in infos if info.get("type") == "file"}


class S3Object:
    """Through a multipart upload."""

    parallel = 3

    def __init__(self, file: Url, store: Any) -> None:
        self._file, self._store = file, store
        bucket, _, key = file.target.partition("://")[2].partition("/")
        self._place = {"Bucket": bucket, "Key": key}

    def begin(self, token: str) -> str:
        return str(self._ask("create_multipart_upload", Metadata={_TOKEN: token})["UploadId"])

    def put(self, upload: str, number: int, data: bytes | bytearray) -> dict[str, str]:
        if number > MAX_PARTS:
            raise InfrastructureError(f"{self._file}: larger than an upload's {MAX_PARTS:,} parts")
        try:
            told = self._ask_of(upload, "upload_part", PartNumber=number, Body=data)
        except NoUpload:
            raise LostClaim(f"{self._file}: its upload was aborted; another worker has taken the shard") from None
        return {name: str(told[name]) for name in _CHECKSUMS if told.get(name)}

    def end(self, upload: str) -> None:
        pass

    def complete(self, upload: str, parts: Sequence[Mapping[str, str]]) -> None:
        numbered = [{"PartNumber": number, **part} for number, part in enumerate(parts, 1)]
        with contextlib.suppress(NoUpload):
            self._ask_of(upload, "complete_multipart_upload", MultipartUpload={"Parts": numbered})

    def abort(self, upload: str) -> None:
        with contextlib.suppress(NoUpload):
            self._ask("abort_multipart_upload", UploadId=upload)

    def under_way(self) -> list[str]:
        found: list[str] = []
        after: dict[str, str] = {}
        while True:
            told = self._ask("list_multipart_uploads", Prefix=self._place["Key"], **after)
            found += [u["UploadId"] for u in told.get("Uploads") or () if u["Key"] == self._place["Key"]]
            if not told.get("IsTruncated"):
                return found
            after = {"KeyMarker": told["NextKeyMarker"], "UploadIdMarker": told["NextUploadIdMarker"]}

    def look(self) -> Found | None:
        try:
            told = self._ask("head_object")
        except FileNotFoundError:
            return None
        return Found(int(told["ContentLength"]), told.get("Metadata", {}).get(_TOKEN, ""), str(told.get("ETag", "")))

    def remove(self, found: Found) -> None:
        try:
            self._ask("delete_object", **({"IfMatch": found.mark} if found.mark else {}))
        except _Refused as error:
            if error.status == 501:  # a store that knows no conditions
                self._ask("delete_object")
            elif error.status != 412:  # of which the object is another one by now
                raise
        except FileNotFoundError:
            pass

    def _ask_of(self, upload: str, method: str, **arguments: Any) -> Any:
        try:
            return self._ask(method, UploadId=upload, **arguments)
        except InfrastructureError:
            if upload in self.under_way():
                raise
        raise NoUpload  # which not every store says

    def _ask(self, method: str, **arguments: Any) -> Any:
        return _patiently(self._file, lambda: self._store.call_s3(method, **self._place, **arguments))


class MovedObject:
    """Written beside its place, under a hidden name, and moved there by the store.  For stores whose multipart uploads
    their filesystem does not show."""

    parallel = 1

    def __init__(self, file: Url, store: Any) -> None:
        self._file, self._store = file, store
        self._folder, _, self._name = file.target.rpartition("/")
        self._opened: Any = None

    def begin(self, token: str) -> str:
        upload = f"{self._folder}/.{self._name}.{token}.tmp"
        with _translated(self._file):
            self._opened = self._store.open(upload, "wb", block_size=PART_BYTES)
        return upload

    def put(self, upload: str, number: int, data: bytes | bytearray) -> dict[str, str]:
        with _translated(self._file):  # its filesystem tries again; what it gives up cannot be taken up
            self._opened.write(data)
        return {}

    def end(self, upload: str) -> None:
        with _translated(self._file):
            self._opened.close()

    def complete(self, upload: str, parts: Sequence[Mapping[str, str]]) -> None:
        with contextlib.suppress(FileNotFoundError):
            _patiently(self._file, lambda: self._store.mv(upload, self._file.target))

    def abort(self, upload: str) -> None:
        opened, self._opened = self._opened, None
        with contextlib.suppress(Exception):  # not all filesystems can; what was closed is removed below
            if opened is not None and not opened.closed:
                opened.discard()
                opened.closed = True
        with contextlib.suppress(FileNotFoundError):
            _patiently(self._file, lambda: self._store.rm_file(upload))

    def under_way(self) -> list[str]:
        names = _patiently(self._file, lambda: self._store.glob(f"{self._folder}/.{self._name}.*.tmp"))
        return [f"{self._folder}/{name.rpartition('/')[2]}" for name in names]

    def look(self) -> Found | None:
        try:
            info = _patiently(self._file, lambda: self._store.info(self._file.target))
        except FileNotFoundError:
            return None
        size, marks = told_by(info)
        return Found(size or 0, "", dict(marks).get("etag", ""))

    def remove(self, found: Found) -> None:
        if self.look() == found:
            with contextlib.suppress(FileNotFoundError):
                _patiently(self._file, lambda: self._store.rm_file(self._file.target))


# ---- errors


class _Refused(InfrastructureError):
    """The store has said no.  status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _patiently(file: Url, ask: Callable[[], Any]) -> Any:
    """An answer of the store, asked again where the connection broke or it was busy.

    Raises NoUpload and FileNotFoundError, and InfrastructureError for everything else.
    """
    patience = remote_read.PATIENCE
    for left in reversed(range(patience.tries)):
        try:
            with _translated(file):
                return ask()
        except remote_read.TransientError as error:
            if not left:
                why = f"the store cannot be reached, {patience.tries} times: {error}"
                raise InfrastructureError(f"{file}: {why}; {_ADVICE}") from error
            pause_s = patience.first_wait_s * 2 ** (patience.tries - 1 - left)
            time.sleep(min(patience.longest_wait_s, pause_s) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _translated(file: Url) -> Iterator[None]:
    """What a filesystem raises, as NoUpload, FileNotFoundError, Interrupted or InfrastructureError."""
    try:
        yield
    except (InfrastructureError, remote_read.TransientError):
        raise
    except Exception as error:
        code, status = _answer(error)
        if code == "NoSuchUpload" or code in _LOST:
            raise NoUpload from None
        if code == "NoSuchBucket":
            raise InfrastructureError(f"{file}: there is no such bucket; {_ADVICE}") from None
        if isinstance(error, FileNotFoundError):
            raise
        if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
            line = f"{code}: {error_line(error)}" if code else error_line(error)
            raise InfrastructureError(
                f"{file}: refused: {line} (credentials come from the environment); {_ADVICE}"
            ) from None
        if status == 501 or (400 <= status < 500 and status not in (408, 429) and code not in _TRANSIENT):
            raise _Refused(f"{file}: refused: {code}: {error_line(error)}; {_ADVICE}", status) from None
        raise remote_read.TransientError(error_line(error)) from error


def _answer(error: BaseException) -> tuple[str, int]:
    """The store's error code and HTTP status, "" and 0 where it did not answer."""
    for raised in (error, error.__cause__):
        told = getattr(raised, "response", None)
        if isinstance(told, dict):
            code = str(told.get("Error", {}).get("Code", ""))
            return code, int(told.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return "", int(getattr(error, "code", 0) or 0) if type(error).__name__ == "HttpError" else 0


WRITABLE: Final = ("s3", "gs")


_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A place in a bucket that shards are written to; ``folder / name`` is a file there."""

    url: str

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        """Of the objects right below it."""
        return list(list_objects(self.url))

    def holds(self, files: Iterable[Path | Url]) -> bool:
        """Whether one of the files lies right here."""
        return any(file == self / file.name for file in files)


Folder = Path | RemoteFolder


"""Where outputs go."""


def remote_folder(url: str) -> RemoteFolder:
    """What ``--publish_to`` names.  UsageError for what shards cannot be written to."""
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    shown = redact(url)
    if mark and scheme == "hf":
        raise UsageError(
            f"--publish_to {shown}: the hub takes whole commits, not single shards; write to --output and push from "
            "there with python -m curation publish"
        )
    if not mark or scheme not in WRITABLE:
        raise UsageError(f"--publish_to {shown}: shards are written to {' and '.join(f'{s}://' for s in WRITABLE)}")
    bucket, _, folder = rest.partition("/")
    folder = folder.strip("/")
    words = folder.split("/") if folder else []
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"--publish_to {shown}: give a bucket and a folder, such as {scheme}://bucket/folder")
    if any(word in ("", ".", "..") or not word.isprintable() or re.search(r"[?*\[\]{}#]", word) for word in words):
        raise UsageError(f"--publish_to {shown}: a folder's name has no ? * [ ] {{ }} #, no empty part and no ..")
    return RemoteFolder("/".join((f"{scheme}://{bucket}", *words)))


def place_of(root: Path, path: str) -> Source:
    """Where an output lies that a receipt names; root: the stage's output folder."""
    return Url(path) if "://" in path else root / path  # a normalised path has no two slashes in a row


class RemoteOutput(AtomicWriter):
    """An object that is uploaded in parts while it is written; it appears when the commit completes the upload.

    Memory: a part that is being filled, and those that are under way.
    """

    def __init__(self, final: Url, token: str) -> None:
        super().__init__()
        self.final = final
        self._token = token
        self._object = object_at(final)
        self._upload = self._object.begin(token)
        self._part = bytearray()
        self._parts: list[Mapping[str, str]] = []
        self._under_way: deque[Future[dict[str, str]]] = deque()
        self._begun = 0
        self._senders = ThreadPoolExecutor(self._object.parallel, "upload")
        self._closed = False

    def close(self) -> None:
        if self._closed:
            return
        self._drain()
        if self._part or not self._begun:
            self._send()
        while self._under_way:
            self._parts.append(self._under_way.popleft().result())
        self._object.end(self._upload)
        self._senders.shutdown()
        self._closed = True

    def discard(self) -> None:
        self._senders.shutdown(cancel_futures=True)  # a part that came after the end of the upload might stay
        self._part = bytearray()
        with contextlib.suppress(InfrastructureError):  # whoever does the shard next finds it
            self._object.abort(self._upload)

    def published(self, root: Path, *, checked: bool) -> Published:
        upload = {"id": self._upload, "token": self._token, "parts": self._parts}
        return Published(self.final.target, "", self.size, self.digest, checked, upload)

    def _put(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        for piece in pieces:
            rest = memoryview(piece)
            self.size += len(rest)
            while len(self._part) + len(rest) >= PART_BYTES:
                room = PART_BYTES - len(self._part)
                self._part += rest[:room]
                rest = rest[room:]
                self._send()
            self._part += rest

    def _send(self) -> None:
        if len(self._under_way) >= self._object.parallel:
            self._parts.append(self._under_way.popleft().result())
        part, self._part = self._part, bytearray()
        self._begun += 1
        self._under_way.append(self._senders.submit(self._object.put, self._upload, self._begun, part))


class Presence:
    """Whether the objects that receipts name are there: by one listing of their folder, and by asking for each that it
    does not show as it should be."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, int]] = {}  # folder → name → bytes

    def holds(self, output: Mapping[str, Any], *, fresh: bool) -> bool:
        """Whether what a receipt names is there.  fresh: as it is now."""
        file = Url(output["path"])
        if not fresh and self._listed(file) == output["size"]:
            return True
        found = object_at(file).look()
        return found is not None and found.is_of(output)

    def shows(self, file: Url) -> bool:
        """Whether anything was there when its folder was listed."""
        return self._listed(file) is not None

    def _listed(self, file: Url) -> int | None:
        folder, _, name = file.target.rpartition("/")
        if folder not in self._sizes:
            self._sizes[folder] = list_objects(folder)
        return self._sizes[folder].get(name)
