"""What the publisher wants of a store: files under names, written on the condition of what was there before.

Whoever publishes may be late: stopped in mid-upload, or beaten by another.  So every write names the version that it
replaces, and the store refuses it where there is another one.  No lock is needed.

``BucketStore`` is what the stores of objects in buckets have in common: how they are asked, and what a refusal means.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeVar

from curation.errors import InfrastructureError, UsageError
from curation.storage.retry import RetryPolicy, TransientError, with_retries

_ADVICE: Final = "fix this and start again, nothing published is lost"
_STAMP: Final = {"digest": "curation-digest", "generation": "curation-generation", "token": "curation-token"}
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Stamp:
    """Of which receipt a file is, kept with the object where the store can keep such words.

    Attributes:
        digest: Of the content as the receipt says it: XXH3-128 in hexadecimal digits.
        generation: Of the receipt.
        token: Of the attempt that made the file.
    """

    digest: str
    generation: int
    token: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as the store describes it.

    Attributes:
        name: Its path below the store's folder.
        size: In bytes.
        version: What tells this content from every other that the name had or will have, for a condition: an ETag, a
            generation, a hash.  "" where the store has none.
        checksum: ``crc64nvme:``, ``crc32c:``, ``crc32:``, ``sha256:``, ``git:`` or ``xxh3:`` and hexadecimal digits of
            the whole content; ``<kind>-parts:<hex>-<n>`` for that of the checksums of n parts; "" where the store does
            not say.
        stamp: What was sent with it; None where the store keeps none, or does not say it in a listing.
    """

    name: str
    size: int
    version: str = ""
    checksum: str = ""
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to be sent.

    Attributes:
        name: Where it goes, below the store's folder.
        source: The file on this machine, or its bytes.
        size: In bytes.
        stamp: What is kept with it.
        replaces: The version that must be there now; "" for none at all; None for any (``--overwrite``, and stores
            without conditions).
    """

    name: str
    source: Path | bytes
    size: int
    stamp: Stamp
    replaces: str | None = ""


class Moved(Exception):
    """The store holds another version than the write names.  ``names``: of which files."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


class Changed(Exception):
    """The file on this machine is not what its receipt says (any more).  ``name``: of which file."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why ``verify`` does not accept a stored file, in words."""

    name: str
    why: str


@dataclass(slots=True)
class Limits:
    """How many files and bytes one call of ``send`` takes; a repository on the hub takes many in one commit."""

    files: int = 1
    size: int = field(default=1 << 62)


class Store(Protocol):
    """A folder in a store.  Made by ``open_store``; every method raises InfrastructureError where the store refuses.

    Methods may be called from several threads at once, except for stores whose ``limits.files`` is above 1.

    Attributes:
        url: Of the folder, without credentials and query.
        conditional: Whether a write can name the version that it replaces.  Known after ``check``.
        guards: Whether a file that was not put there from this folder must not be replaced.  A repository on the hub
            keeps every version that a file had, so there it may.
        limits: Of one ``send``.
    """

    url: str
    conditional: bool
    guards: bool
    limits: Limits

    def check(self) -> None:
        """List, write and remove a file of a random name, and find out whether conditions are kept.

        Raises UsageError where the bucket, the folder or the credentials are wrong: the message says what to do.
        """

    def look(self, name: str) -> StoredFile | None:
        """The file, with its checksum and stamp as far as the store tells them; None where there is none."""

    def list(self, below: str = "") -> Iterator[StoredFile]:
        """The files below a folder of the store, page by page, in the order of their names.  Memory stays flat."""

    def read(self, name: str, at_most: int) -> bytes | None:
        """A small file's content, None where there is none.  Raises InfrastructureError if it is larger."""

    def send(self, uploads: Sequence[Upload]) -> Sequence[StoredFile]:
        """Write files, all of them or none for the hub, one for other stores.

        Raises:
            Moved: A condition does not hold, so that nothing was written; or somebody has replaced the file since.
                Where the file that is there has the stamp and size of the upload, it counts as written: an earlier
                answer was lost.
            Changed: A source is not what its stamp says; nothing was written.
        """

    def remove(self, file: StoredFile) -> None:
        """Remove a file if it is still that version, as far as the store can tell.  None there is no error."""

    def checksum_of(self, file: StoredFile, source: Path | bytes) -> str:
        """The checksum of a file on this machine, in the form in which this store says that of ``file``."""

    def close(self) -> None:
        """End its connections."""


def proof_of(file: StoredFile, digests: Mapping[str, str]) -> str:
    """How well the stored file is proved by checksums that the upload receipt has, in words: ``sha256``, ``size only``.

    Raises ValueError where a checksum differs.
    """
    kind, _, value = file.checksum.partition(":")
    if kind and kind in digests:
        if digests[kind] != value:
            raise ValueError(f"{file.name}: its {kind} is {value}, not {digests[kind]}")
        return kind
    return "size only"


def ours(found: StoredFile | None, upload: Upload) -> StoredFile | None:
    """The file that is there, if it is what this upload writes: it was written now, or earlier."""
    same = found is not None and found.size == upload.size and found.stamp == upload.stamp
    return found if same else None


# ---- buckets


def words_of(stamp: Stamp) -> dict[str, str]:
    """A stamp as metadata of an object."""
    return {word: str(getattr(stamp, name)) for name, word in _STAMP.items()}


def stamp_of(words: Mapping[str, str]) -> Stamp | None:
    """The stamp in the metadata of an object; None where there is none."""
    try:
        return Stamp(words[_STAMP["digest"]], int(words[_STAMP["generation"]]), words[_STAMP["token"]])
    except (KeyError, ValueError):
        return None


def is_final(status: int) -> bool:
    """Whether the same request has the same answer later, by HTTP's status."""
    return (300 <= status < 500 and status not in (408, 429)) or status == 501


class Refused(InfrastructureError):
    """A store refuses a request.

    Args:
        shown: What was asked for.
        line: Why, without secrets.
        status: HTTP's; 0 where the request was not sent, because nothing may be sent without credentials.
        code: The store's own word: ``NoSuchBucket``, ``NoSuchUpload`` for an upload in parts that it does not know (any
            more), and others.
    """

    def __init__(self, shown: str, line: str, status: int, code: str = "") -> None:
        why = "there is no such bucket" if code == "NoSuchBucket" else f"refused: {line}"
        why += " (credentials come from the environment)" if status in (0, 401, 403) else ""
        super().__init__(f"{shown}: {why}; {_ADVICE}")
        self.status, self.code = status, code

    @property
    def is_missing(self) -> bool:
        return self.status == 404 and self.code != "NoSuchBucket"


class BucketStore(Store):
    """A folder of a bucket: an object appears whole or not at all, and keeps the stamp that was sent with it.

    Args:
        scheme: Of its URL.
        bucket: Its name.
        folder: In the bucket, without a slash at either end; "" for all of it.
    """

    def __init__(self, scheme: str, bucket: str, folder: str) -> None:
        self.url = f"{scheme}://{bucket}/{folder}".rstrip("/")
        self.conditional = False
        self.guards = True
        self.limits = Limits()
        self._prefix = f"{folder}/" if folder else ""

    def check(self) -> None:
        try:
            self._retried("", lambda: self._try_out(f".curation-{secrets.token_hex(8)}.check"))
        except Refused as error:
            raise UsageError(str(error)) from None

    def read(self, name: str, at_most: int) -> bytes | None:
        try:
            data = self._read(name, at_most)
        except Refused as error:
            if error.is_missing:
                return None
            raise
        if len(data) > at_most:
            raise InfrastructureError(f"{self._shown(name)}: it has more than {at_most:,} bytes")
        return data

    def send(self, uploads: Sequence[Upload]) -> Sequence[StoredFile]:
        (upload,) = uploads
        return [self._retried(upload.name, lambda: self._send(upload))]

    def _send(self, upload: Upload) -> StoredFile:
        """Write it once.  Raises TransientError where it must be begun again."""
        if not self.conditional and upload.replaces is not None:
            there = self.look(upload.name)
            if (there.version if there else "") != upload.replaces:
                return self._adopted(upload, there)
        sent = ""
        try:
            sent = self._write(upload)
        except Refused as error:
            if error.status == 409 or error.code == "NoSuchUpload":
                if ours(self.look(upload.name), upload) is None:
                    raise TransientError(str(error)) from error
            elif error.status != 412 and not (error.is_missing and upload.replaces):
                raise
        found = self._adopted(upload, self.look(upload.name))
        sent = sent or self.checksum_of(found, upload.source)
        if found.checksum != sent and found.checksum.partition(":")[0] == sent.partition(":")[0] != "":
            raise InfrastructureError(
                f"{self._shown(upload.name)}: the store keeps other bytes than were sent ({found.checksum} instead of "
                f"{sent}); remove the object and publish again"
            )
        return found

    def _adopted(self, upload: Upload, there: StoredFile | None) -> StoredFile:
        """What is there now, if it is this upload: written now, or earlier and the answer was lost.  Raises Moved."""
        found = ours(there, upload)
        if found is None:
            holds = "another object" if there else "no object"
            raise Moved(f"{self._shown(upload.name)}: the store holds {holds} by now", [upload.name])
        return found

    def remove(self, file: StoredFile) -> None:
        guarded = self.conditional and bool(file.version)
        if not guarded:
            there = self.look(file.name)
            if there is None or there.version != file.version:
                return
        try:
            self._delete(file.name, file.version if guarded else "")
        except Refused as error:
            if error.status != 412 and not error.is_missing:  # 412: it is another one by now
                raise

    # ---- requests

    def _asked(self, name: str, request: Callable[[], Result], tries: int = 0) -> Result:
        """The store's answer; it is asked again where the connection broke or the store was busy.

        Raises Refused, and InfrastructureError where it does not answer.
        """

        def once() -> Result:
            with self._translated(self._shown(name)):
                return request()

        return self._retried(name, once, tries)

    def _retried(self, name: str, request: Callable[[], Result], tries: int = 0) -> Result:
        policy = self._policy()
        tries = tries or policy.tries
        try:
            return with_retries(request, RetryPolicy(tries, policy.first_wait_s, policy.longest_wait_s))
        except TransientError as error:
            why = f"the store cannot be reached, {tries} times: {error}"
            raise InfrastructureError(f"{self._shown(name)}: {why}; {_ADVICE}") from error

    def _shown(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    # ---- what is special to a store

    @abstractmethod
    def _policy(self) -> RetryPolicy:
        """How often a request is sent."""

    @abstractmethod
    def _translated(self, shown: str) -> AbstractContextManager[None]:
        """Turn what the client raises into Refused or TransientError; no message holds a secret."""

    @abstractmethod
    def _try_out(self, name: str) -> None:
        """List, find out by a file of that name whether conditions are kept, and remove it.  Raises Refused."""

    @abstractmethod
    def _read(self, name: str, at_most: int) -> bytes:
        """The object, or its first ``at_most + 1`` bytes.  Raises Refused where there is none."""

    @abstractmethod
    def _write(self, upload: Upload) -> str:
        """Write it under its condition, and finish only if all bytes are those of the receipt.  Returns their checksum.

        Raises Refused, Changed, and TransientError where it must be begun again.
        """

    @abstractmethod
    def _delete(self, name: str, version: str) -> None:
        """Remove an object if it is that version; "" for any."""
