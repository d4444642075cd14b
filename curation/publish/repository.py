"""A dataset repository on the hub: it is created, listed and committed to through the hub's own client.

Every failure becomes one of three errors: ``Retryable`` (the same may work later), ``Conflict`` (somebody else has
committed, so the repository must be listed again), or an InfrastructureError that waiting does not mend.  None of their
messages holds a secret.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, UsageError, install
from curation.jsonio import clean_text
from curation.storage.retry import retry_after_s
from curation.storage.urls import redact

CARD = "README.md"
MAX_CARD_BYTES = 4 << 20
REQUEST_TIMEOUT_S = 120.0  # the client itself would wait for ever
UPLOADS_AT_ONCE = 4
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_RETRYABLE_STATUS = (408, 425, 429)  # and 5xx
_RESETS_IN = re.compile(r";\s*t\s*=\s*(\d{1,6})")  # the hub's RateLimit header: "api";r=0;t=55


class Retryable(Exception):
    """It did not work now and may work later; ``after_s`` is what the hub asks to wait, None where it does not say."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class Conflict(Exception):
    """The repository has moved on since it was listed."""


class _Busy(Exception):
    """Raised inside the client, so that the waiting is done here.

    The client itself would wait without jitter, as long as any server says, and not at all where it sends commits.
    """

    def __init__(self, status: int, after_s: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of the repository.

    The content is known by ``sha256`` where the hub keeps it as a large file, else by ``git_oid``, git's name for it.
    """

    size: int
    git_oid: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The repository's files at one commit."""

    commit: str
    files: dict[str, HubFile]


@dataclass(frozen=True, slots=True)
class Addition:
    """A file to be added; its source is a path on this machine or the bytes themselves."""

    path: str
    source: Path | bytes
    size: int
    git_oid: str
    sha256: str

    def is_in(self, files: Mapping[str, HubFile]) -> bool:
        there = files.get(self.path)
        if there is None or there.size != self.size:
            return False
        return there.git_oid == self.git_oid if there.sha256 is None else there.sha256 == self.sha256


def check_name(repo: str) -> None:
    """Raise UsageError unless ``repo`` can be the name of a repository, ``user/name`` or ``name``."""
    owner, slash, name = repo.rpartition("/")
    words = [owner, name] if slash else [name]
    bad = not all(_NAME.fullmatch(word) for word in words) or "--" in repo or ".." in repo
    if bad or repo.endswith((".git", ".ipynb")):
        raise UsageError(
            f"{clean_text(repo)!r} is not the name of a repository: user/name, of letters, digits, '-', '_' and '.'"
        )


def check_access() -> None:
    """Raise UsageError where this machine cannot upload: no client, offline, no token.  Sends no request."""
    _token()


def _token() -> str:
    try:
        from huggingface_hub import constants, get_token
    except ImportError as error:
        raise UsageError(f"uploading needs huggingface_hub ({error}): {install('huggingface_hub')}") from None
    if constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set, so that nothing can be uploaded: unset it")
    token = get_token()
    if not token:
        raise UsageError("no token: log in with `hf auth login`, or set HF_TOKEN to one that may write")
    return token


class Repository:
    """One dataset repository.  Made by ``connect``."""

    def __init__(self, name: str, token: str) -> None:
        from huggingface_hub import HfApi

        self._token = token
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
        self._known = False
        self.name = name
        if "/" not in name:
            with self._translated():
                self.name = f"{self._api.whoami()['name']}/{name}"
            check_name(self.name)

    @property
    def url(self) -> str:
        return redact(f"{self._api.endpoint}/datasets/{self.name}", self._token)

    def create(self, *, public: bool) -> None:
        """Create the repository unless it exists.  An existing one stays as public or private as it is."""
        with self._translated():
            self._api.create_repo(self.name, repo_type="dataset", private=not public, exist_ok=True)

    def head(self) -> Head | None:
        """All files of the repository; None where it does not exist or is hidden from this token."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            with self._translated():
                commit = self._api.dataset_info(self.name, revision="main", expand=["sha"]).sha
                files: dict[str, HubFile] = {}
                for entry in self._api.list_repo_tree(self.name, recursive=True, revision=commit, repo_type="dataset"):
                    if isinstance(entry, RepoFile):
                        sha256 = None if entry.lfs is None else entry.lfs.sha256
                        files[entry.path] = HubFile(entry.size, entry.blob_id, sha256)
        except InfrastructureError as error:
            cause = error.__cause__
            if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
                return None
            raise
        return Head(str(commit), files)

    def card(self, head: Head) -> str:
        """The text of the card, "" where there is none."""
        data = self.read(head, CARD, MAX_CARD_BYTES)
        if data is None:
            return ""
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InfrastructureError(f"{self.name}: its {CARD} is not UTF-8; mend it or delete it") from None

    def read(self, head: Head, path: str, at_most: int) -> bytes | None:
        """A small file's content, None where there is none.  Raises InfrastructureError if it is larger."""
        there = head.files.get(path)
        if there is None:
            return None
        if there.size > at_most:
            raise InfrastructureError(f"{self.name}: its {path} has {there.size:,} bytes; make it shorter")
        with tempfile.TemporaryDirectory(prefix="curation-hub-") as folder, self._translated():
            local = self._api.hf_hub_download(
                self.name, path, repo_type="dataset", revision=head.commit, local_dir=folder
            )
            return Path(local).read_bytes()

    def commit(self, head: Head, additions: Sequence[Addition], deletions: Sequence[str], message: str) -> Head:
        """Upload files and commit them on top of ``head``.

        Args:
            head: What the repository is known to hold.
            additions: Files to add or replace.
            deletions: Paths to remove.
            message: Of the commit.

        Returns:
            The head that the commit makes.

        Raises:
            Conflict: The repository has moved on.  What was uploaded by then is not uploaded again.
            Retryable: The hub or the network does not work now.
            InfrastructureError: The hub refuses it.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._translated():
            added: list[Any] = []
            for addition in additions:
                source = addition.source if isinstance(addition.source, bytes) else str(addition.source)
                operation = CommitOperationAdd(addition.path, source)
                operation.upload_info.sha256 = bytes.fromhex(addition.sha256)  # so that the client need not read it
                added.append(operation)
            operations = [*(CommitOperationDelete(path, is_folder=False) for path in deletions), *added]
            made = self._api.create_commit(
                self.name,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision="main",
                parent_commit=head.commit,
                num_threads=UPLOADS_AT_ONCE,
            )
        for path in deletions:
            head.files.pop(path, None)
        for addition, operation in zip(additions, added, strict=True):
            inside = getattr(operation, "_upload_mode", "lfs") == "regular"  # in the commit, and not as a large file
            head.files[addition.path] = HubFile(addition.size, addition.git_oid, None if inside else addition.sha256)
        return Head(str(made.oid), head.files)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn whatever the client raises in the block into one of the three errors above."""
        try:
            yield
        except Exception as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> Exception:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None and len(chain) < 8:
            chain.append(cause)
        line = self._line(chain)
        busy = next((link for link in chain if isinstance(link, _Busy)), None)
        if busy is not None:
            return Retryable(f"{self.name}: the hub answers {busy}", busy.after_s)
        refusal = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
        if isinstance(refusal, RepositoryNotFoundError):
            return InfrastructureError(f"{self.name}: the hub shows no such repository to this token ({line})")
        if refusal is not None:
            status = refusal.response.status_code
            if status in (409, 412):
                return Conflict(f"{self.name}: somebody else has just committed")
            if status in (401, 403):
                return InfrastructureError(
                    f"{self.name}: the hub refuses this token ({line}); give one that may write there: "
                    "`hf auth login`, or HF_TOKEN"
                )
            if 400 <= status < 500:
                return InfrastructureError(f"{self.name}: the hub refuses this: {line}")
        if isinstance(error, HFValidationError) or "Invalid metadata in README.md" in str(error):
            return InfrastructureError(f"{self.name}: {line}")
        return Retryable(f"{self.name}: {line}")

    def _line(self, chain: Sequence[BaseException]) -> str:
        """The errors on one short line, without secrets and without the client's advice."""
        texts = []
        for link in chain[:3]:
            words = [line.strip() for line in str(link).splitlines() if line.strip()]
            texts.append(" ".join(words[:2]) or type(link).__name__)
        return clean_text(redact("; ".join(dict.fromkeys(texts)), self._token))[:400]


@contextmanager
def connect(name: str) -> Iterator[Repository]:
    """Open a repository with a client that has time limits and shows no progress bars.

    The hub's client has one HTTP client for the whole process, which is replaced during the block.  Raises UsageError
    like ``check_name`` and ``check_access``, and what ``Repository`` raises.
    """
    check_name(name)
    token = _token()
    from huggingface_hub import constants, get_session, set_client_factory
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    session = get_session()
    kind, hooks = type(session), session.event_hooks.get("request", [])
    bars = not are_progress_bars_disabled()
    handlers = logging.getLogger("huggingface_hub").handlers
    without_secrets = _Redacting(token)

    def bounded() -> Any:
        return kind(
            event_hooks={"request": hooks, "response": [_raise_busy]},
            follow_redirects=True,
            timeout=REQUEST_TIMEOUT_S,
        )

    set_client_factory(bounded)
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    for handler in handlers:
        handler.addFilter(without_secrets)
    try:
        yield Repository(name, token)
    finally:
        for handler in handlers:
            handler.removeFilter(without_secrets)
        if bars and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            enable_progress_bars()
        set_client_factory(lambda: kind(event_hooks={"request": hooks}, follow_redirects=True, timeout=None))


def _raise_busy(response: Any) -> None:
    """A hook on every answer of the hub and of its stores: raise _Busy where the request should be sent again later."""
    status = int(response.status_code)
    if status in _RETRYABLE_STATUS or status >= 500:
        raise _Busy(status, _retry_after_s(response.headers))


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub asks to wait, by Retry-After or by its own RateLimit header."""
    asked = retry_after_s(headers.get("Retry-After"))
    limit = headers.get("RateLimit") or ""
    resets = _RESETS_IN.search(limit) if asked is None and "r=0" in limit.replace(" ", "") else None
    return float(resets[1]) if resets else asked


class _Redacting(logging.Filter):
    """Takes secrets out of the client's own log lines, which name signed URLs."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), self._token), ()
        return True
