"""A shared folder in which model servers register: one small file per server, which every worker of every node reads.

A registration appears whole, is written again every few seconds with a counter that rises, and is removed when its
server ends.  A counter that stands still, by the reader's own clock, marks what a dead job left behind; what decides in
the end is whether the server answers.

``curation register --dir D --url U --model M`` waits for the server at U, lets it load the model, registers
it, and keeps the registration until it gets a signal or the server stops answering.

``RegistryWatcher`` keeps a pool of servers in step with such a folder.  Servers that appear are opened while the run
goes on.  A server leaves the pool when its registration is gone, or when that stands still and the server fails too.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import re
import secrets
import signal
import stat
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self, get_args
from urllib.parse import urlsplit

from curation.cluster import slurm_ids
from curation.errors import EXIT_OK, EXIT_USAGE, InfrastructureError, SampleError, redact
from curation.jsonio import clean_text, dump_json, parse_json_object
from curation.options import URLS, parse_arguments
from curation.serving.connection import (
    EndpointError,
    ModelMissing,
    answers,
    is_no_server,
    read_key,
)
from curation.serving.pool import Denied, Endpoint, EndpointPool
from curation.serving.wire import CONTEXT_TOKENS, SERVER_APIS, Api, detect_api
from curation.storage.files import make_folder, write_whole
from curation.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from curation.serving.session import Session  # it needs requests

AnyApi = Literal["auto", "ollama", "openai"]
SUFFIX = ".json"
MAX_BYTES, MAX_DEPTH, MAX_TEXT = 16 << 10, 4, 512
MAX_SERVERS = 4096
BEAT_S = 3.0
SILENCE_S = 30.0  # a counter that has not changed for so long belongs to a dead job
FORGET_S = 600.0  # then, if its server does not answer, the process of another server removes its file
PROBE_S = 5.0  # for a sign of life
MUTE_S = 60.0  # without a sign of life, until a server is given up
EXIT_NO_SERVER = 3  # the server does not answer: whoever started it should start it again

logger = logging.getLogger("curation")


# ---- one registration


@dataclass(frozen=True, slots=True)
class Registration:
    """One server: where it is, what it serves, and who started it (which only people read)."""

    url: str
    model: str
    api: AnyApi = "auto"
    host: str = ""
    pid: int = 0
    slurm: Mapping[str, str] = field(default_factory=dict)
    beat: int = 0


def server_url(text: str) -> str:
    """Return ``text`` if it is http(s)://host:port of what can be a model server and nothing more.

    Raises ValueError, whose text shows no password.
    """
    shown = redact(text[:MAX_TEXT])
    parts = urlsplit(text) if len(text) <= MAX_TEXT and text.isascii() else None
    host = parts.hostname if parts else None
    if not parts or not host or parts.scheme not in ("http", "https") or not parts.port:
        raise ValueError(f"{shown!r} is not http://host:port")
    if not re.fullmatch(r"[\w.-]+|[\da-f:.]+", host):
        raise ValueError(f"{host!r} is not a host name")
    plain = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{parts.port}"
    if text.lower().rstrip("/") != plain:
        raise ValueError(f"{shown!r} is more than http://host:port")
    if why := is_no_server(host, registered=True):
        raise ValueError(f"{why}, no model server")
    return plain


def parse_registration(data: bytes) -> Registration:
    """Parse a file of the folder.  Raises ValueError where it is not a registration."""
    try:
        value = parse_json_object(data, MAX_BYTES, MAX_DEPTH)
    except SampleError as error:
        raise ValueError(str(error)) from None
    url, model, api, beat = (value.get(name) for name in ("url", "model", "api", "beat"))
    if not isinstance(url, str):
        raise ValueError("it names no url")
    if not isinstance(model, str) or not 0 < len(model) <= MAX_TEXT:
        raise ValueError("it names no model")
    if api != "auto" and api != "ollama" and api != "openai":
        raise ValueError(f"its api is {str(api)[:40]!r}, not one of {', '.join(get_args(AnyApi))}")
    if type(beat) is not int or not 0 <= beat < 1 << 63:
        raise ValueError("its beat is no counter")
    host, pid, slurm = value.get("host"), value.get("pid"), value.get("slurm")
    return Registration(
        server_url(url),
        model,
        api,
        host=host if isinstance(host, str) else "",
        pid=pid if type(pid) is int else 0,
        slurm={str(k): str(v) for k, v in slurm.items()} if isinstance(slurm, dict) else {},
        beat=beat,
    )


# ---- reading


@dataclass(slots=True)
class Listed:
    """A registration as this reader has seen it; its counter last moved at ``since`` (monotonic)."""

    name: str
    registration: Registration
    since: float

    def silent(self, seconds: float = SILENCE_S) -> bool:
        return time.monotonic() - self.since > seconds


class Registry:
    """A folder of registrations, for one reader that reads it again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, Listed] = {}
        self._warned: set[tuple[str, str]] = set()

    def read(self) -> dict[str, Listed]:
        """The registrations by URL.  A damaged file is left out, with one line in the log.

        Raises OSError where the folder cannot be listed.
        """
        with os.scandir(self.folder) as entries:
            named = (e.name for e in entries if e.name.endswith(SUFFIX) and not e.name.startswith("."))
            names = heapq.nsmallest(MAX_SERVERS + 1, named)
        if len(names) > MAX_SERVERS:
            self._warn("", f"more than {MAX_SERVERS:,} files: the others are ignored")
        seen = {name: listed for name in names[:MAX_SERVERS] if (listed := self._read_one(name)) is not None}
        self._seen = seen
        found: dict[str, Listed] = {}
        for listed in sorted(seen.values(), key=lambda listed: listed.since):  # of two for one URL, the later one
            found[listed.registration.url] = listed
        return found

    def _read_one(self, name: str) -> Listed | None:
        before = self._seen.get(name)
        try:
            registration = parse_registration(_read_plain_file(self.folder / name))
        except FileNotFoundError:
            return None
        except OSError as error:  # the filesystem failed, not the server
            self._warn(name, str(error.strerror))
            return before
        except ValueError as error:
            self._warn(name, str(error))
            return None
        if before is not None and before.registration == registration:
            return before
        return Listed(name, registration, time.monotonic())

    def _warn(self, name: str, why: str) -> None:
        if (name, why) not in self._warned and len(self._warned) < 4 * MAX_SERVERS:
            self._warned.add((name, why))
            logger.warning(clean_text(f"{self.folder / name}: ignored: {why}"))


def _read_plain_file(path: Path) -> bytes:
    """The first bytes of a file, one more than a registration may have.  Raises ValueError for a link or a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would block
    except OSError as error:
        if path.is_symlink():
            raise ValueError("it is a link") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no plain file")
        return os.read(descriptor, MAX_BYTES + 1)
    finally:
        os.close(descriptor)


# ---- writing


class OwnRegistration:
    """The registration that this process writes."""

    def __init__(self, folder: Path, registration: Registration) -> None:
        parts = urlsplit(registration.url)
        host = re.sub(r"[^\w.-]", "_", parts.hostname or "")[:100]
        self._name = f"{host}-{parts.port}-{secrets.token_hex(4)}"
        self._folder = folder
        self._registration = registration
        self._beats = 0

    @property
    def path(self) -> Path:
        return self._folder / f"{self._name}{SUFFIX}"

    def beat(self) -> None:
        """Write the registration with its next count, also where somebody removed it by mistake."""
        self._beats += 1
        data = dump_json(asdict(replace(self._registration, beat=self._beats)), indent=True) + b"\n"
        write_whole(self.path, data, durable=False)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


# ---- the process beside each server


@dataclass(frozen=True, kw_only=True)
class Options:
    """Register one model server while it lives."""

    dir: Path
    """The folder of registrations."""
    url: Annotated[str, URLS]
    """http://host:port, as the readers reach it."""
    model: str
    """The model that the server loads."""
    api: AnyApi = "auto"
    """The server's API; auto asks the server."""
    pid: int = 0
    """The server's process, recorded as information."""
    api_key_env: str | None = None
    """The environment variable with its key.  Default: CURATION_API_KEY."""
    start_timeout: float = 600.0
    """Seconds to wait for its first answer."""
    load_timeout: float = 600.0
    """Seconds to wait until the model is loaded."""


def _wait_for_server(session: Session, url: str, api: AnyApi, timeout_s: float) -> Api:
    """The server's API, once it answers.  Raises EndpointError where it does not answer within ``timeout_s``."""
    ends = time.monotonic() + timeout_s
    while True:
        try:
            found = detect_api(session, url, PROBE_S)
            return found if api == "auto" else api
        except EndpointError:
            if time.monotonic() > ends:
                raise
        time.sleep(0.3)


def register(arguments: Options) -> int:
    """Register a server until a signal or until it stops answering, and return the exit code.

    It is 0 after a signal, 3 where the server does not answer (any more), 2 where it cannot serve the model.
    """
    url = server_url(arguments.url)
    from curation.serving.session import Session

    with Session(read_key(arguments.api_key_env, registered=False)) as session, Session(registered=True) as others:
        api = _wait_for_server(session, url, arguments.api, arguments.start_timeout)
        SERVER_APIS[api].load(session, url, arguments.model, CONTEXT_TOKENS, arguments.load_timeout)
        slurm = slurm_ids()
        make_folder(arguments.dir)
        registration = Registration(url, arguments.model, api, os.uname().nodename, arguments.pid, slurm)
        registrar = OwnRegistration(arguments.dir, registration)
        try:
            return _keep(registrar, Registry(arguments.dir), session, others, url)
        finally:
            _on_signals(signal.SIG_IGN)  # so that no signal interrupts the removal
            registrar.remove()


def _keep(registrar: OwnRegistration, folder: Registry, session: Session, others: Session, url: str) -> int:
    """Renew the registration as long as the server answers.  others: without the key, for servers of the folder."""
    last_sign = time.monotonic()
    announced, trouble = False, ""
    while time.monotonic() - last_sign < MUTE_S:
        if answers(session, url, PROBE_S):
            last_sign = time.monotonic()
            try:
                registrar.beat()
                if not announced:
                    logger.info(f"{url} is registered in {registrar.path.parent}")
                announced, trouble = True, ""
                _remove_dead(folder, others, registrar.path.name)
            except OSError as error:  # a full disk, a folder that went away: the next beat may succeed
                if trouble != str(error):
                    logger.warning(f"{registrar.path}: {error.strerror}; trying again")
                trouble = str(error)
        time.sleep(BEAT_S)
    logger.warning(f"{url} has not answered for {MUTE_S:g} s")
    return EXIT_NO_SERVER


def _remove_dead(folder: Registry, session: Session, own: str) -> None:
    """Remove what killed jobs left.  Should one of them be alive after all, it soon writes its file again."""
    for listed in folder.read().values():
        if listed.name != own and listed.silent(FORGET_S) and not answers(session, listed.registration.url, PROBE_S):
            (folder.folder / listed.name).unlink(missing_ok=True)
            logger.info(f"{folder.folder / listed.name}: removed, its server is gone")


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_OK)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(Options, argv, "register")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stderr)
    _on_signals(_end)
    why: Exception
    try:
        return register(arguments)
    except SampleError as error:
        code, why = EXIT_USAGE, InfrastructureError(f"{redact(arguments.url)}: {error.detail}")
    except (InfrastructureError, ModelMissing, ValueError) as error:
        code, why = EXIT_USAGE, error
    except EndpointError as error:
        code, why = EXIT_NO_SERVER, InfrastructureError(f"{redact(arguments.url)}: {error}")
    print(f"error: {clean_text(redact(str(why)))}", file=sys.stderr, flush=True)
    return code


RESCAN_S = 3.0
REOPENING = RetryPolicy(first_wait_s=3.0, longest_wait_s=60.0)  # of a server that does not answer
OPENING_AT_ONCE = 64  # each is a thread that waits for a server to load its model


@dataclass(slots=True)
class _Trouble:
    """A server that could not be opened, and when it is tried again."""

    who: tuple[str, int]  # host and pid: another process at the same URL is tried at once
    why: str
    failures: int
    again_at: float


class RegistryWatcher:
    """A thread that keeps a pool in step with a folder of registrations, from ``start`` to ``close``."""

    def __init__(self, pool: EndpointPool, folder: Registry) -> None:
        self._pool = pool
        self._folder = folder
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._opening: set[str] = set()
        self._trouble: dict[str, _Trouble] = {}
        self._others: set[str] = set()  # models of servers that get no requests
        self._unreadable = ""

    def start(self) -> Self:
        threading.Thread(target=self._run, name="endpoints", daemon=True).start()
        return self

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            self.sync()
            self._ended.wait(RESCAN_S)

    def sync(self) -> None:
        """Compare the folder with the pool once."""
        try:
            listed = self._folder.read()
        except OSError as error:
            self._cannot_read(error)
            return
        self._unreadable = ""
        mine = {url: entry for url, entry in listed.items() if entry.registration.model == self._pool.model}
        self._note_others({entry.registration.model for entry in listed.values()} - {self._pool.model})
        members = self._pool.members()
        for url, sound in members.items():
            if url not in mine or (mine[url].silent() and not sound):
                why = "is silent" if url in mine else "is no longer registered"
                logger.info(f"{url}: {why}; it gets no more requests")
                self._pool.leave(url)
        with self._lock:
            self._trouble = {url: trouble for url, trouble in self._trouble.items() if url in mine}
            due = [entry for url, entry in mine.items() if url not in members and self._is_due(entry)]
            due = due[: OPENING_AT_ONCE - len(self._opening)]
            self._opening.update(entry.registration.url for entry in due)
        for entry in due:
            threading.Thread(target=self._open, args=(entry,), name="open endpoint", daemon=True).start()
        self._tell_absence()

    def _is_due(self, entry: Listed) -> bool:
        url = entry.registration.url
        trouble = self._trouble.get(url)
        if url in self._opening:
            return False
        return trouble is None or trouble.who != _who(entry) or time.monotonic() >= trouble.again_at

    def _open(self, entry: Listed) -> None:
        url = entry.registration.url
        try:
            found = self._pool.try_to_open(url, entry.registration.api)
        except InfrastructureError as error:  # it does not have the model that it is registered with
            found = str(error)
        with self._lock:
            self._opening.discard(url)
            if isinstance(found, Endpoint):
                self._trouble.pop(url, None)
                self._pool.add(found)
                logger.info(f"{url}: gets requests from now on")
            else:
                self._retry_later(entry, found)

    def _retry_later(self, entry: Listed, why: str) -> None:
        """Try the server again later, after a wait that doubles; after the longest one if its job seems dead."""
        url, before = entry.registration.url, self._trouble.get(entry.registration.url)
        if before is not None and before.who != _who(entry):
            before = None
        failures = before.failures + 1 if before else 1
        pause_s = REOPENING.longest_wait_s if entry.silent() else REOPENING.wait_s(failures)
        if before is None or before.why != why:
            logger.warning(clean_text(f"{self._folder.folder / entry.name}: {url}: {why}; trying again now and then"))
        self._trouble[url] = _Trouble(_who(entry), why, failures, time.monotonic() + pause_s)

    # ---- the log

    def _cannot_read(self, error: OSError) -> None:
        """Log it.  The known servers stay in the pool, because what counts is that they answer."""
        self._pool.absence = f"{self._folder.folder}: {error.strerror}"
        if self._unreadable != str(error):
            self._unreadable = str(error)
            waiting = isinstance(error, FileNotFoundError) and not self._pool.members()
            say = logger.info if waiting else logger.warning
            say(f"{self._folder.folder}: {error.strerror}; {'waiting for servers' if waiting else 'trying again'}")

    def _note_others(self, models: set[str]) -> None:
        new = models - self._others
        if new:
            self._others |= set(sorted(new)[:100])
            names = ", ".join(sorted(new)[:5])
            logger.info(clean_text(f"{self._folder.folder}: servers of other models get no requests: {names}"))

    def _tell_absence(self) -> None:
        with self._lock:
            problems = "; ".join(f"{url}: {trouble.why}" for url, trouble in sorted(self._trouble.items())[:5])
        others = f"servers of {', '.join(sorted(self._others)[:5])} only" if self._others else ""
        why = problems or others or "nothing is registered"
        with self._lock:
            denied = bool(self._trouble) and all(isinstance(trouble.why, Denied) for trouble in self._trouble.values())
        self._pool.denied = denied and not self._opening
        self._pool.absence = f"{self._folder.folder}, model {self._pool.model!r}: {why}"


def _who(entry: Listed) -> tuple[str, int]:
    return entry.registration.host, entry.registration.pid
