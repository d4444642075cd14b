"""Weights by path, by URL with their sha256, and by hub id: a file or folder on this machine, whole, or a clear error.

A URL is downloaded once into a cache folder, whoever asks: the partial file is the lock, a broken download goes on
where it was, and only content with the given sha256 ever gets its final name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from curation.errors import InfrastructureError, UsageError
from curation.storage.files import storage_error

MAX_WEIGHTS_BYTES = 16 << 30


CACHE = Path("~/.cache/curation/weights")


# What a model folder is loaded from: no pickles, no code.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


# Of a model that was never saved as safetensors (openai/clip-vit-base-patch32): a pickle that is read as tensors only.
OLD_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


_HUB_FILE = re.compile(r"(?P<model>[^:@]+)(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?")


_TIMEOUT_S = 30.0  # to connect, and between two blocks


_ATTEMPTS, _PAUSE_S = 4, 0.5


_BLOCK = 1 << 20


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # filesystems mounted without flock


class BrokeOff(InfrastructureError):
    """The connection ended early; what arrived is kept."""


def fetch_weights(
    source: str, sha256: str | None, cache: Path, *, name: str = "weights", max_bytes: int = MAX_WEIGHTS_BYTES
) -> Path:
    """The file (or, for a whole model of the hub, the folder) that ``source`` names, checked before it is returned.

    source: a path; an http(s) URL, with ``sha256`` or with ``#sha256=…`` at its end; or ``organisation/model`` with
        ``@revision`` for a commit, branch or tag of it and ``:path/in/it`` for one file.  A path that is there goes
        before a hub id.
    sha256: 64 hex digits of the file's content; looked at on every call.
    cache: the folder that downloads from URLs stay in; the hub's client has its own (``HF_HOME``).
    name: what messages call it, such as the flag that it was given by.
    Raises InfrastructureError where it is not there, cannot be fetched, or is something else.
    """
    url = is_url(source)
    if url:
        source, _, fragment = source.partition("#")
        sha256 = sha256 or fragment.removeprefix("sha256=") or None
        if sha256 is None:
            raise UsageError(f"{name} {shown(source)}: needs the sha256 of its content, here as <URL>#sha256=<digits>")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise UsageError(f"{name}: a sha256 has 64 hexadecimal digits, {sha256[:80]!r} is none")
    if url and sha256 is not None:
        return _from_url(source, sha256.lower(), cache.expanduser(), max_bytes)
    path = Path(source).expanduser()
    if not path.exists():
        found = _HUB_FILE.fullmatch(source)
        if found is None or not is_hub_id(found["model"]):
            raise InfrastructureError(f"{name} {source}: no such file (nor is it a URL or a hub id, organisation/name)")
        path = _from_hub(found["model"], found["revision"], found["file"], name)
    if sha256 is not None:
        if path.is_dir():
            raise UsageError(f"{name} {source}: a sha256 is of one file, this is a folder")
        if sha256_of(path) != sha256.lower():
            raise InfrastructureError(f"{name} {source}: its sha256 is {sha256_of(path)}, not {sha256.lower()}")
    return path


def cached(source: str, sha256: str, cache: Path) -> Path:
    """Where a URL's content lies, or would lie, in the cache: named by its digest, so that two never meet."""
    base = re.sub(r"[^A-Za-z0-9._-]", "_", urlsplit(source).path.rpartition("/")[2])[-80:].lstrip(".") or "weights"
    return cache.expanduser() / f"{sha256.lower()[:32]}-{base}"


def is_url(source: str) -> bool:
    return source.startswith(("https://", "http://"))


def is_hub_id(model: str) -> bool:
    """Whether ``model`` has the form ``organisation/name``.  A folder may have it too: the caller looks."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None


def shown(url: str) -> str:
    """The URL as messages show it: without a password or a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# ---- the hub


def _from_hub(model: str, revision: str | None, file: str | None, name: str) -> Path:
    """The hub's client locks, goes on with what broke off, and compares with the hub's digests."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(model, file, revision=revision))
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(MODEL_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*MODEL_FILES, *OLD_WEIGHTS]))
        return folder
    except hub_errors() as error:
        raise InfrastructureError(f"{name} {model}: cannot be fetched from the hub: {hub_error_line(error)}") from error


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when the hub or the network does not work: its HTTP library has changed twice."""
    import huggingface_hub.errors as errors

    transport = getattr(errors, "HTTPError", OSError)
    return (OSError, errors.HfHubHTTPError, transport)


def hub_error_line(error: BaseException) -> str:
    """The first line that says something, short enough for a terminal."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


# ---- URLs


def _from_url(url: str, sha256: str, cache: Path, max_bytes: int) -> Path:
    path = cached(url, sha256, cache)
    try:
        if _is(path, sha256):
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.part")) as part:
            if not _is(path, sha256):  # another process may have fetched it meanwhile
                _download(url, sha256, part, max_bytes)
                os.fsync(part.fileno())
                os.replace(part.name, path)
    except OSError as error:
        raise storage_error(path, error) from error
    return path


def _is(path: Path, sha256: str) -> bool:
    try:
        return sha256_of(path) == sha256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BufferedRandom]:
    """The partial file, open and held by this process alone; the lock goes with the process.

    It is kept only where a download broke off.  A filesystem without locks gives each process a file of its own.
    """
    while True:
        file = open(part, "r+b", opener=_create)  # noqa: SIM115 - closed below, or handed on
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            part.unlink(missing_ok=True)
            file = open(part.with_name(f"{part.name}.{secrets.token_hex(8)}"), "x+b")  # noqa: SIM115
            break
        if _still_named(file, part):
            break
        file.close()  # it was renamed or removed while this process waited for it
    try:
        yield file
    except BrokeOff:
        if Path(file.name) != part:  # nobody would find it again
            os.unlink(file.name)
        raise
    except InfrastructureError:
        os.unlink(file.name)
        raise
    else:
        if _still_named(file, Path(file.name)):  # nothing was to be downloaded
            os.unlink(file.name)
    finally:
        file.close()


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _still_named(file: BufferedRandom, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _download(url: str, sha256: str, part: BufferedRandom, max_bytes: int) -> None:
    """All of ``url``, behind what an earlier attempt left in ``part``; an error where it is not ``sha256``."""
    had = part.seek(0, os.SEEK_END)
    for attempt in range(_ATTEMPTS):
        try:
            _go_on(url, part, max_bytes)
        except BrokeOff:
            if attempt + 1 == _ATTEMPTS:
                os.fsync(part.fileno())
                raise
            time.sleep(_PAUSE_S * 2**attempt)
            continue
        found = _digest(part)
        if found == sha256:
            return
        if not had:
            raise InfrastructureError(f"{shown(url)}: its sha256 is {found}, not {sha256}: nothing is kept of it")
        had = 0  # what was left may have been of another file
        part.truncate(0)
    raise InfrastructureError(f"{shown(url)}: its sha256 is not {sha256}: nothing is kept of it")


def _go_on(url: str, part: BufferedRandom, max_bytes: int) -> None:
    start = part.seek(0, os.SEEK_END)
    try:
        response = open_url(url, start)
    except InfrastructureError as error:
        if start:
            raise BrokeOff(f"{error}; start again to go on") from error
        raise
    with response:
        if response.status_code == 416:  # nothing behind ``start``: whole already, or longer than the file
            return
        if response.status_code != 206:
            part.truncate(0)
        part.seek(0, os.SEEK_END)
        save(response, part, url, max_bytes)


def open_url(url: str, start: int = 0) -> Any:
    """The response to a GET of ``url`` from byte ``start``, not read yet; 206 where the server honoured that."""
    import requests

    headers = {"Range": f"bytes={start}-"} if start else {}
    headers["Accept-Encoding"] = "identity"  # the bytes that the digest is of, and a length that can be compared
    try:
        response = requests.get(url, stream=True, timeout=_TIMEOUT_S, headers=headers)
        if not (start and response.status_code == 416):
            response.raise_for_status()
    except requests.RequestException as error:
        raise InfrastructureError(f"{shown(url)}: cannot be fetched: {_why(error)}") from error
    return response


def _why(error: Exception) -> str:
    """What the library says, without its own names, addresses in memory, and what a URL must not show."""
    said = re.sub(r"\?\S*|//\S*@", "", hub_error_line(error))
    if (inner := re.search(r"Failed to resolve '[^']*'|Connection refused|timed out", str(error))) is not None:
        said = inner[0]
    return said


def save(response: Any, file: BinaryIO, url: str, max_bytes: int, what: str = "the weights") -> None:
    """The response's body at the end of ``file``; BrokeOff where it ends early, InfrastructureError where it is more
    than ``max_bytes`` and so not ``what``."""
    import requests

    stated = response.headers.get("Content-Length", "")
    begin = file.tell()
    end = begin + int(stated) if stated.isdigit() else None
    size = begin
    if end is not None and end > max_bytes:
        raise InfrastructureError(f"{shown(url)}: more than {megabytes(max_bytes)}; that is not {what}")
    try:
        for block in response.iter_content(_BLOCK):
            size += len(block)
            if size > max_bytes:
                raise InfrastructureError(f"{shown(url)}: more than {megabytes(max_bytes)}; that is not {what}")
            file.write(block)
    except requests.RequestException as error:
        file.flush()
        raise BrokeOff(f"{shown(url)}: broke off after {size:,} bytes; start again to go on") from error
    file.flush()
    if end is not None and size != end:
        raise BrokeOff(f"{shown(url)}: broke off after {size:,} of {end:,} bytes; start again to go on")


def _digest(file: BufferedRandom | BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return _digest(file)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/curation`` or ``~/.cache/curation``; a private temporary one where that cannot be written."""
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
