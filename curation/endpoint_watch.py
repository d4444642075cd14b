"""A pool of model servers that follows a folder of registrations: who comes is opened beside the run, who goes is left.

A server is left when its registration is gone, or when that stands still and the server does not answer either.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Self

from curation.endpoint_folder import EndpointFolder, Listed
from curation.endpoints import Endpoint, EndpointPool
from curation.errors import InfrastructureError
from curation.jsonio import clean_text

RESCAN_S = 3.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 3.0, 60.0  # before a server that does not answer is tried again
OPENING_AT_ONCE = 64  # each is a thread that waits for a server to load its model

logger = logging.getLogger("curation")


@dataclass(slots=True)
class _Trouble:
    """A server that could not be opened."""

    who: tuple[str, int]  # (host, pid): another process at the same URL is tried at once
    why: str
    pause_s: float
    again_at: float


class FolderWatch:
    """The thread that keeps ``pool`` in step with ``folder``, from ``start`` to ``close``."""

    def __init__(self, pool: EndpointPool, folder: EndpointFolder) -> None:
        self._pool = pool
        self._folder = folder
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._opening: set[str] = set()
        self._trouble: dict[str, _Trouble] = {}
        self._others: set[str] = set()  # models of servers that are not asked
        self._unreadable = ""

    def start(self) -> Self:
        threading.Thread(target=self._run, name="endpoints", daemon=True).start()
        return self

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            self.look()
            self._ended.wait(RESCAN_S)

    def look(self) -> None:
        """Compare the folder with the pool, once."""
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
                logger.info(f"{url}: {'is silent' if url in mine else 'is no longer registered'}; it is asked no more")
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
        except InfrastructureError as error:  # it has not got the model that it is registered with
            found = str(error)
        with self._lock:
            self._opening.discard(url)
            if isinstance(found, Endpoint):
                self._trouble.pop(url, None)
                self._pool.add(found)
                logger.info(f"{url}: is asked from now on")
            else:
                self._put_off(entry, found)

    def _put_off(self, entry: Listed, why: str) -> None:
        """Each time for longer; what a dead job left behind, for long at once."""
        url, before = entry.registration.url, self._trouble.get(entry.registration.url)
        again = before is not None and before.who == _who(entry)
        pause_s = LONGEST_PAUSE_S if entry.silent() else FIRST_PAUSE_S
        if again and before is not None:
            pause_s = min(LONGEST_PAUSE_S, max(pause_s, 2 * before.pause_s))
        if not again or before is None or before.why != why:
            logger.warning(clean_text(f"{self._folder.folder / entry.name}: {url}: {why}; trying again now and then"))
        self._trouble[url] = _Trouble(_who(entry), why, pause_s, time.monotonic() + pause_s)

    # ---- telling

    def _cannot_read(self, error: OSError) -> None:
        """The servers that are known go on: that they answer is what counts."""
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
            logger.info(clean_text(f"{self._folder.folder}: servers of other models are not asked: {names}"))

    def _tell_absence(self) -> None:
        with self._lock:
            problems = "; ".join(f"{url}: {trouble.why}" for url, trouble in sorted(self._trouble.items())[:5])
        others = f"servers of {', '.join(sorted(self._others)[:5])} only" if self._others else ""
        why = problems or others or "nothing is registered"
        self._pool.absence = f"{self._folder.folder}, model {self._pool.model!r}: {why}"


def _who(entry: Listed) -> tuple[str, int]:
    return entry.registration.host, entry.registration.pid
