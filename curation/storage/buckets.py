"""Outputs in buckets: where they go, how they are written without a copy on a disk, and whether they are there.

An upload that is not completed is to an object what a temporary file is to a file: nobody sees it.  Completing it is
like the rename: it can happen only once, replaces in one step what was there, and anyone who knows the upload can ask
for it any number of times.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from curation import PROGRAM
from curation.errors import InfrastructureError, LostClaim, UsageError
from curation.storage import remote_read
from curation.storage.files import AtomicWriter, Published
from curation.storage.retry import TransientError, with_retries
from curation.storage.urls import Source, Url, error_line, filesystem, object_info, redact

WRITABLE: Final = ("s3", "gs")
PART_BYTES: Final = 16 << 20  # of every part, because some stores want equal ones; S3 takes 10,000 of at least 5 MiB
MAX_PARTS: Final = 10_000
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN: Final = "curation-token"  # noqa: S105 - in the object's metadata: the attempt that wrote it
_CHECKSUMS: Final = ("ETag", "ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")
_TRANSIENT: Final = frozenset(
    ("RequestTimeout", "OperationAborted", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
     "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
)  # fmt: skip
_LOST: Final = ("InvalidPart", "InvalidPartOrder", "EntityTooSmall")  # parts of an upload that somebody tampered with
_ADVICE: Final = "fix this and start again, nothing published is lost"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as the store describes it.

    Attributes:
        size: In bytes.
        token: Of the attempt that wrote it, "" where the store does not say.
        mark: What a removal can make a condition (its ETag).
    """

    size: int
    token: str = ""
    mark: str = ""

    def is_of(self, output: Mapping[str, Any]) -> bool:
        """Whether it is the output that a receipt names."""
        return bool(self.size == output["size"] and self.token in ("", output["upload"]["token"]))


class NoUpload(Exception):
    """The upload is completed or aborted."""


class UploadedObject(Protocol):
    """One object, which is there or not, and the uploads to it.

    ``parallel`` parts may be sent at once.  Every method raises InfrastructureError where the store cannot be asked.
    """

    parallel: int

    def begin(self, token: str) -> str:
        """Begin an upload and return its id."""

    def put(self, upload: str, number: int, data: bytes | bytearray) -> dict[str, str]:
        """Send part ``number``, from 1; returns what completing it needs.  Raises LostClaim after an abort."""

    def end(self, upload: str) -> None:
        """Make everything durable after the last part; nobody sees it yet."""

    def complete(self, upload: str, parts: Sequence[Mapping[str, str]]) -> None:
        """Make the object appear.  Does nothing where the upload was completed or aborted before."""

    def abort(self, upload: str) -> None:
        """Remove what was uploaded.  Does nothing where the upload was completed before."""

    def under_way(self) -> list[str]:
        """The ids of all uploads to this object."""

    def info(self) -> StoredObject | None:
        """The object, None where there is none."""

    def remove(self, found: StoredObject) -> None:
        """Remove the object if it is still the one that was found, as far as the store can tell."""


def object_at(file: Url) -> UploadedObject:
    """The object that a URL names.  Raises InfrastructureError where the store's package is missing."""
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
        infos = _ask_store(file, lambda: store.ls(folder.rstrip("/"), detail=True))
    except FileNotFoundError:  # the folder is empty
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
            answer = self._ask_of(upload, "upload_part", PartNumber=number, Body=data)
        except NoUpload:
            raise LostClaim(f"{self._file}: its upload was aborted; another worker has taken the shard") from None
        return {name: str(answer[name]) for name in _CHECKSUMS if answer.get(name)}

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
            page = self._ask("list_multipart_uploads", Prefix=self._place["Key"], **after)
            found += [u["UploadId"] for u in page.get("Uploads") or () if u["Key"] == self._place["Key"]]
            if not page.get("IsTruncated"):
                return found
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def info(self) -> StoredObject | None:
        try:
            head = self._ask("head_object")
        except FileNotFoundError:
            return None
        token, etag = head.get("Metadata", {}).get(_TOKEN, ""), str(head.get("ETag", ""))
        return StoredObject(int(head["ContentLength"]), token, etag)

    def remove(self, found: StoredObject) -> None:
        try:
            self._ask("delete_object", **({"IfMatch": found.mark} if found.mark else {}))
        except _Refused as error:
            if error.status == 501:  # the store knows no conditions
                self._ask("delete_object")
            elif error.status != 412:  # else the object is another one by now
                raise
        except FileNotFoundError:
            pass

    def _ask_of(self, upload: str, method: str, **arguments: Any) -> Any:
        try:
            return self._ask(method, UploadId=upload, **arguments)
        except InfrastructureError:
            if upload in self.under_way():
                raise
        raise NoUpload  # not every store says so itself

    def _ask(self, method: str, **arguments: Any) -> Any:
        return _ask_store(self._file, lambda: self._store.call_s3(method, **self._place, **arguments))


class MovedObject:
    """Written under a hidden name beside its place and moved there by the store.

    For stores of which fsspec does not show the multipart uploads.
    """

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
        with _translated(self._file):  # its filesystem tries again by itself; what it gives up is lost
            self._opened.write(data)
        return {}

    def end(self, upload: str) -> None:
        with _translated(self._file):
            self._opened.close()

    def complete(self, upload: str, parts: Sequence[Mapping[str, str]]) -> None:
        with contextlib.suppress(FileNotFoundError):
            _ask_store(self._file, lambda: self._store.mv(upload, self._file.target))

    def abort(self, upload: str) -> None:
        opened, self._opened = self._opened, None
        with contextlib.suppress(Exception):  # not all filesystems can discard; a closed file is removed below
            if opened is not None and not opened.closed:
                opened.discard()
                opened.closed = True
        with contextlib.suppress(FileNotFoundError):
            _ask_store(self._file, lambda: self._store.rm_file(upload))

    def under_way(self) -> list[str]:
        names = _ask_store(self._file, lambda: self._store.glob(f"{self._folder}/.{self._name}.*.tmp"))
        return [f"{self._folder}/{name.rpartition('/')[2]}" for name in names]

    def info(self) -> StoredObject | None:
        try:
            known = object_info(_ask_store(self._file, lambda: self._store.info(self._file.target)))
        except FileNotFoundError:
            return None
        return StoredObject(known.size or 0, "", known.etag)

    def remove(self, found: StoredObject) -> None:
        if self.info() == found:
            with contextlib.suppress(FileNotFoundError):
                _ask_store(self._file, lambda: self._store.rm_file(self._file.target))


# ---- errors


class _Refused(InfrastructureError):
    """The store has refused the request; ``status`` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _ask_store(file: Url, ask: Callable[[], Any]) -> Any:
    """The store's answer; it is asked again where the connection broke or it was busy.

    Raises NoUpload, FileNotFoundError, and InfrastructureError for everything else.
    """
    policy = remote_read.RETRIES

    def request() -> Any:
        with _translated(file):
            return ask()

    try:
        return with_retries(request, policy)
    except TransientError as error:
        why = f"the store cannot be reached, {policy.tries} times: {error}"
        raise InfrastructureError(f"{file}: {why}; {_ADVICE}") from error


@contextlib.contextmanager
def _translated(file: Url) -> Iterator[None]:
    """Turn what a filesystem raises into NoUpload, FileNotFoundError, TransientError or InfrastructureError."""
    try:
        yield
    except (InfrastructureError, TransientError):
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
        raise TransientError(error_line(error)) from error


def _answer(error: BaseException) -> tuple[str, int]:
    """The store's error code and HTTP status, "" and 0 where it did not answer."""
    for raised in (error, error.__cause__):
        answer = getattr(raised, "response", None)
        if isinstance(answer, dict):
            code = str(answer.get("Error", {}).get("Code", ""))
            return code, int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return "", int(getattr(error, "code", 0) or 0) if type(error).__name__ == "HttpError" else 0


# ---- folders


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder of a bucket that shards are written to; ``folder / name`` is a file in it."""

    url: str

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        """The names of the objects right below it."""
        return list(list_objects(self.url))

    def holds(self, files: Iterable[Path | Url]) -> bool:
        """Whether one of the files lies right below it."""
        return any(file == self / file.name for file in files)


Folder = Path | RemoteFolder  # where outputs go


def remote_folder(url: str) -> RemoteFolder:
    """The folder that ``--publish_to`` names.  Raises UsageError where shards cannot be written to it."""
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    shown = redact(url)
    if mark and scheme == "hf":
        raise UsageError(
            f"--publish_to {shown}: the hub accepts commits, not single shards; write to --output and upload from "
            f"there with {PROGRAM} publish"
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
    """Where an output lies that a receipt names; ``root`` is the stage's output folder."""
    return Url(path) if "://" in path else root / path  # a normalised path has no two slashes in a row


class RemoteOutput(AtomicWriter):
    """An object that is uploaded in parts while it is written.  It appears when the commit completes the upload.

    It holds one part in memory that is being filled, and those that are being sent.
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
        self._senders.shutdown(cancel_futures=True)  # a part that arrives after the abort might stay
        self._part = bytearray()
        with contextlib.suppress(InfrastructureError):  # whoever does the shard next finds the upload
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
    """Whether the objects that receipts name are there.

    Their folder is listed once; only an object that the listing does not show as it should be is asked for by itself.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, int]] = {}  # folder → name → bytes

    def holds(self, output: Mapping[str, Any], *, fresh: bool) -> bool:
        """Whether the output that a receipt names is there; ``fresh``: at this moment, not in the listing."""
        file = Url(output["path"])
        if not fresh and self._listed(file) == output["size"]:
            return True
        found = object_at(file).info()
        return found is not None and found.is_of(output)

    def shows(self, file: Url) -> bool:
        """Whether anything was there when its folder was listed."""
        return self._listed(file) is not None

    def _listed(self, file: Url) -> int | None:
        folder, _, name = file.target.rpartition("/")
        if folder not in self._sizes:
            self._sizes[folder] = list_objects(folder)
        return self._sizes[folder].get(name)
