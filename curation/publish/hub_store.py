"""A dataset repository of the Hugging Face Hub as a store: many files in one commit, on top of a known one.

A commit names its parent, so that nobody's commit is lost.  The hub keeps every version of a file and no words of ours
with it; a file is known by its SHA-256 or by git's name for it, which the listing tells.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from curation.errors import InfrastructureError, UsageError
from curation.publish import contents
from curation.publish.contents import Contents
from curation.publish.repository import Addition, Conflict, Head, HubFile, Repository, Retryable, check_access, connect
from curation.publish.store import Limits, Moved, StoredFile, Upload
from curation.storage.retry import RetryPolicy

MAX_COMMIT_FILES: Final = 200
MAX_COMMIT_BYTES: Final = 32 << 30  # uploaded before they are committed: as much may be left for the next try
RETRIES = RetryPolicy(first_wait_s=1.5, longest_wait_s=90.0)
_CONFLICTS = RetryPolicy(tries=20, first_wait_s=1.0, longest_wait_s=10.0)
_LONGEST_WAIT_S: Final = 600.0  # a hub that asks for more is left alone
Result = TypeVar("Result")


class HubStore:
    """See ``Store``.

    Args:
        repo: ``user/name``.
        folder: In the repository; "" for all of it.
        public: Whether ``check`` creates a repository that does not exist as a public one.

    Raises:
        UsageError: No client, offline, no token.
    """

    def __init__(self, repo: str, folder: str, *, public: bool = False) -> None:
        check_access()
        self.url = f"hf://datasets/{repo}/{folder}".rstrip("/")
        self.conditional = True
        self.guards = False
        self.limits = Limits(MAX_COMMIT_FILES, MAX_COMMIT_BYTES)
        self._repo, self._public = repo, public
        self._prefix = f"{folder}/" if folder else ""
        self._open = contextlib.ExitStack()
        self._repository: Repository | None = None
        self._head: Head | None = None
        self._lock = threading.RLock()

    def check(self) -> None:
        """Create the repository unless it exists, which needs a token that may write, and list it."""
        with self._lock:
            self._retried(lambda: self._connected().create(public=self._public))
            self._listed()

    def look(self, name: str) -> StoredFile | None:
        """What the repository holds now.  It is listed again only by ``list`` and by ``send``."""
        found = self._known().files.get(self._prefix + name)
        return None if found is None else _described(name, found)

    def list(self, below: str = "") -> Iterator[StoredFile]:
        with self._lock:
            files = self._listed().files
        prefix = self._prefix + (f"{below}/" if below else "")
        for path in sorted(files):
            if path.startswith(prefix):
                yield _described(path[len(self._prefix) :], files[path])

    def read(self, name: str, at_most: int) -> bytes | None:
        with self._lock:
            head = self._known()
            return self._retried(lambda: self._connected().read(head, self._prefix + name, at_most))

    def send(self, uploads: Sequence[Upload]) -> Sequence[StoredFile]:
        additions = [_addition(upload, self._prefix) for upload in uploads]
        message = f"add {len(additions):,} files"
        with self._lock:
            for failures in range(1, _CONFLICTS.tries + 1):
                head = self._known()
                wanted = self._wanted(uploads, additions, head)
                if not wanted:
                    break
                try:
                    self._head = self._retried(partial(self._connected().commit, head, wanted, (), message))
                    break
                except Conflict:
                    self._head = None
                    time.sleep(_CONFLICTS.wait_s(failures))
            else:
                raise InfrastructureError(f"{self.url}: somebody else commits again and again; publish again later")
        return [self._sent(upload) for upload in uploads]

    def _sent(self, upload: Upload) -> StoredFile:
        found = self.look(upload.name)
        if found is None:
            raise Moved(f"{self.url}/{upload.name}: it is not there any more", [upload.name])
        return found

    def _wanted(self, uploads: Sequence[Upload], additions: Sequence[Addition], head: Head) -> Sequence[Addition]:
        """What the repository lacks.  Raises Moved for what it holds in another version than is to be replaced."""
        moved, wanted = [], []
        for upload, addition in zip(uploads, additions, strict=True):
            if addition.is_in(head.files):
                continue
            there = self.look(upload.name)
            if upload.replaces is not None and (there.version if there else "") != upload.replaces:
                moved.append(upload.name)
            wanted.append(addition)
        if moved:
            raise Moved(f"{self.url}: the repository holds other versions of {len(moved)} files by now", moved)
        return wanted

    def remove(self, file: StoredFile) -> None:
        with self._lock:
            there = self.look(file.name)
            if there is None or there.version != file.version:
                return
            head = self._known()
            try:
                path = self._prefix + file.name
                self._head = self._retried(lambda: self._connected().commit(head, (), [path], "remove 1 file"))
            except Conflict:
                self._head = None
                self.remove(file)

    def checksum_of(self, file: StoredFile, source: Path | bytes) -> str:
        kind = file.checksum.partition(":")[0]
        return f"{kind}:{contents.checksum_of(source, kind)}"

    def close(self) -> None:
        self._open.close()
        self._repository = None

    # ---- the repository

    def _connected(self) -> Repository:
        if self._repository is None:
            self._repository = self._open.enter_context(connect(self._repo))
        return self._repository

    def _known(self) -> Head:
        with self._lock:
            return self._head or self._listed()

    def _listed(self) -> Head:
        head = self._retried(lambda: self._connected().head())
        if head is None:
            raise UsageError(f"{self.url}: there is no such repository, or it is hidden from this token")
        self._head = head
        return head

    def _retried(self, request: Callable[[], Result]) -> Result:
        for failures in range(1, RETRIES.tries + 1):
            try:
                return request()
            except Retryable as error:
                asked_s = error.after_s or 0.0
                if failures == RETRIES.tries or asked_s > _LONGEST_WAIT_S:
                    raise InfrastructureError(f"{self.url}: {error}; publish again later") from error
                time.sleep(max(asked_s, RETRIES.wait_s(failures)))
        raise AssertionError("unreachable")


def _described(name: str, file: HubFile) -> StoredFile:
    checksum = f"sha256:{file.sha256}" if file.sha256 else f"git:{file.git_oid}"
    return StoredFile(name, file.size, file.sha256 or file.git_oid, checksum)


def _addition(upload: Upload, prefix: str) -> Addition:
    """The file with its SHA-256 and git's name, read once and compared with its receipt.  Raises Changed."""
    hashes = contents.hashes_of(Contents(upload), ("sha256", "git"))
    return Addition(prefix + upload.name, upload.source, upload.size, git_oid=hashes["git"], sha256=hashes["sha256"])
