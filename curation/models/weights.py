"""Weights by path, by URL with their sha256, and by hub id: a whole file or folder on this machine, or a clear error.

A URL is downloaded once into a cache folder, however many processes ask for it.  A lock lets one of them download at a
time, a download that broke off goes on where it was, and only content with the right sha256 gets its final name.
(pooch would fetch and check as well, but it begins a broken download again, and weights have gigabytes.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from curation.errors import InfrastructureError, ShardError, UsageError
from curation.models.hub_errors import hub_errors, hub_trouble
from curation.storage.files import storage_errors
from curation.storage.remote_read import ResumingReader, open_remote
from curation.storage.retry import RetryPolicy
from curation.storage.urls import Url, redact

MAX_WEIGHTS_BYTES = 16 << 30
CACHE = Path("~/.cache/curation/weights")
RETRIES = RetryPolicy(tries=4, read_s=30.0)

# What a model folder is loaded from: no pickles, no code.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
# Of a model that was never saved as safetensors (openai/clip-vit-base-patch32, apple/DFN2B-CLIP-ViT-B-16): a pickle
# that is read as tensors only.
OLD_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HUB_FILE = re.compile(r"(?P<model>[^:@]+)(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # filesystems mounted without flock


def fetch_weights(
    source: str, sha256: str | None, cache: Path, *, name: str = "weights", max_bytes: int = MAX_WEIGHTS_BYTES
) -> Path:
    """Find or fetch the weights that ``source`` names, and check them.

    Args:
        source: A path; an http(s) URL, with ``sha256`` or with ``#sha256=…`` at its end; or ``organisation/model`` of
            the hub, with ``@revision`` for a commit, branch or tag and ``:path/in/it`` for one file.  A path that
            exists goes before a hub id.
        sha256: 64 hex digits of the file's content, compared on every call.
        cache: The folder in which downloads from URLs stay.  The hub's client has its own (``HF_HOME``).
        name: What messages call the weights, such as the flag that named them.
        max_bytes: A larger file is refused.

    Returns:
        The file; for a whole model of the hub, its folder.

    Raises:
        UsageError: A URL without a sha256, or a sha256 that is none.
        InfrastructureError: The weights are not there, cannot be fetched, or are something else.
    """
    url = is_url(source)
    if url:
        source, _, fragment = source.partition("#")
        sha256 = sha256 or fragment.removeprefix("sha256=") or None
        if sha256 is None:
            raise UsageError(f"{name} {redact(source)}: needs the sha256 of its content, here as <URL>#sha256=<digits>")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise UsageError(f"{name}: a sha256 has 64 hexadecimal digits, {sha256[:80]!r} is not one")
    if url and sha256 is not None:
        return _from_url(source, sha256.lower(), cache.expanduser(), max_bytes)
    path = Path(source).expanduser()
    if not path.exists():
        path = _from_hub(*hub_parts(name, source), name)
    if sha256 is not None:
        if path.is_dir():
            raise UsageError(f"{name} {source}: a sha256 is of one file, this is a folder")
        if sha256_of(path) != sha256.lower():
            raise InfrastructureError(f"{name} {source}: its sha256 is {sha256_of(path)}, not {sha256.lower()}")
    return path


def cached(source: str, sha256: str, cache: Path) -> Path:
    """The place of a URL's content in the cache.  Its digest is in the name, so that two contents never meet."""
    base = re.sub(r"[^A-Za-z0-9._-]", "_", urlsplit(source).path.rpartition("/")[2])[-80:].lstrip(".") or "weights"
    return cache.expanduser() / f"{sha256.lower()[:32]}-{base}"


def is_url(source: str) -> bool:
    return source.startswith(("https://", "http://"))


def hub_parts(name: str, source: str) -> tuple[str, str | None, str | None]:
    """``organisation/model@revision:file`` in its parts; the last two may be missing.

    Args:
        name: What messages call the weights.
        source: What is neither a path that exists nor a URL.

    Raises:
        InfrastructureError: It is no hub id either.
    """
    found = _HUB_FILE.fullmatch(source)
    if found is None or not is_hub_id(found["model"]):
        raise InfrastructureError(f"{name} {source}: no such file (nor is it a URL or a hub id, organisation/name)")
    return found["model"], found["revision"], found["file"]


def is_hub_id(model: str) -> bool:
    """Whether ``model`` has the form ``organisation/name``; the path of a folder may have it too."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None


# ---- the hub


def _from_hub(model: str, revision: str | None, file: str | None, name: str) -> Path:
    """Fetch by the hub's client, which has its own locks, goes on after a break, and compares the hub's digests."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(model, file, revision=revision))
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(MODEL_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*MODEL_FILES, *OLD_WEIGHTS]))
        return folder
    except hub_errors() as error:
        raise hub_trouble(error, model, revision, asked_by=name) from error


# ---- URLs


def _from_url(url: str, sha256: str, cache: Path, max_bytes: int) -> Path:
    path = cached(url, sha256, cache)
    with storage_errors(path):
        if _is(path, sha256):
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with _one_download(path) as part:
            if not _is(path, sha256):  # another process may have fetched it meanwhile
                _download(url, sha256, part, max_bytes)
                os.replace(part, path)
    return path


def _is(path: Path, sha256: str) -> bool:
    try:
        return sha256_of(path) == sha256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _one_download(path: Path) -> Iterator[Path]:
    """Let one process at a time download ``path``; gives the partial file in which the bytes are gathered.

    The lock goes with the process, and the partial file is kept where a download broke off.  On a filesystem without
    locks each process has a partial file of its own, which is not kept: nobody would find it again.
    """
    from filelock import FileLock

    part, lock_file = (path.with_name(f".{path.name}.{end}") for end in ("part", "lock"))
    lock = FileLock(lock_file, fallback_to_soft=False)  # a soft lock would outlive a process that was killed
    own = None
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        part = own = part.with_name(f"{part.name}.{secrets.token_hex(8)}")
    try:
        yield part
    finally:
        lock_file.unlink(missing_ok=True)  # while it is held: a process that waits for it opens a new one
        lock.release()
        if own is not None:
            own.unlink(missing_ok=True)


def _download(url: str, sha256: str, part: Path, max_bytes: int) -> None:
    """Download into ``part``, behind what an earlier attempt left there.  Raises where it is not ``sha256``."""
    try:
        with open(part, "a+b") as file:
            had = file.tell()
            found = _digest_with_rest(url, file, max_bytes)
            if found != sha256 and had:  # what was left may have been of another file
                file.truncate(0)
                found = _digest_with_rest(url, file, max_bytes)
            os.fsync(file.fileno())
        if found != sha256:
            raise WrongContent(f"{redact(url)}: its sha256 is {found}, not {sha256}: nothing is kept of it")
    except WrongContent:
        part.unlink()
        raise
    except InfrastructureError:
        if not part.stat().st_size:
            part.unlink()
        raise


class WrongContent(InfrastructureError):
    """What the URL gives is not what was asked for."""


def _digest_with_rest(url: str, file: IO[bytes], max_bytes: int) -> str:
    """The sha256 of ``file`` after everything that the URL has behind the file's end is appended to it."""
    start = file.seek(0, os.SEEK_END)
    try:
        with open_url(url, start=start) as reader:
            save(reader, file, url, max_bytes)
    except InfrastructureError as error:
        if not start or getattr(error.__cause__, "reason", "") != "changed":
            raise  # else the file is not as long as what was left: its digest decides
    file.flush()
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextlib.contextmanager
def open_url(url: str, what: str = "the weights", *, start: int = 0) -> Iterator[ResumingReader]:
    """Open a URL to read it from byte ``start``.  Raises InfrastructureError, in the block too."""
    try:
        with open_remote(Url(url), RETRIES, start=start) as reader:
            yield reader
    except ShardError as error:
        raise InfrastructureError(f"{what} cannot be fetched: {error}; start again to continue") from error


def save(reader: ResumingReader, file: IO[bytes], url: str, max_bytes: int, what: str = "the weights") -> None:
    """Write what ``reader`` gives at the end of ``file``.  Raises WrongContent where it is more than ``max_bytes``."""
    size, data = max(file.tell(), reader.info.size or 0), b""
    while size <= max_bytes and (data := reader.read()):
        file.write(data)
        size = max(size, file.tell())
    if size > max_bytes:
        raise WrongContent(f"{redact(url)}: more than {megabytes(max_bytes)}; that is not {what}")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/curation`` or ``~/.cache/curation``; a private temporary folder where that is read-only."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "curation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    private = Path(tempfile.gettempdir()) / f"curation-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:  # somebody else's folder could hold other weights
        raise InfrastructureError(f"{private}: is not this user's alone; set XDG_CACHE_HOME to a folder that is")
    return private
