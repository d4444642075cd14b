"""The rules of sites on disk, so that all processes of a root ask a site once a day.

``<root>/_opt_out/<token>/<day>/<bucket>.log``: a site is in one of 256 buckets, by a hash of its origin, so there are
few files, however many sites there are, and no name of a site is a name of a file.  A file is only ever appended to,
by all processes.  A record has a checksum, so that one that was torn is no record.  Whoever wants to ask a site
appends a claim first and reads the file again: of the claims that are not settled yet the first one asks, and the
others wait for its result.  A result of the folder of today or of yesterday counts; older folders are removed.

Nothing here is needed for an output to be right.  Where records are lost, a site is asked twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import xxhash

from curation.cluster import host_identity, process_is_gone, process_start
from curation.download.opt_out.rules import SiteRecord
from curation.errors import SampleError
from curation.jsonio import dump_json, parse_json_object

DAY_S: Final = 86_400
_HEADER: Final = struct.Struct("<4sQIQ")  # magic, hash of the origin, length of the payload, xxh3-64 of it
_MAGIC: Final = b"cor1"
_MAX_PAYLOAD_BYTES: Final = 4 << 20
_MAX_READ_BYTES: Final = 256 << 20  # of the end of one bucket
_SKEW_S: Final = 600.0  # by which clocks of nodes may differ


@dataclass(frozen=True, slots=True)
class Kept:
    """What was found out about a site.

    Attributes:
        rules: As JSON.
        at: When the site was asked, Unix time.
        for_s: For how long it counts.
    """

    rules: SiteRecord
    at: float
    for_s: float

    def left_s(self, now: float) -> float:
        """Seconds for which it still counts; as from now, if the clock of another node is ahead."""
        return min(self.at + self.for_s - now, self.for_s)


class SiteCache:
    """The rules that the processes of a root share.  Any thread may call it; each call reads and writes files.

    Args:
        folder: Of the root, ``_opt_out``.
        token: The product token for which the rules were read.
        claim_s: For how long a process that has claimed a site may take to ask it.
        clock: Unix time, which decides the folder of the day.
    """

    def __init__(self, folder: Path, token: str, claim_s: float, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder / sha256(token.lower().encode("utf-8", "replace")).hexdigest()[:16]
        self._claim_s, self._clock = claim_s, clock
        self._me = secrets.token_hex(8)
        pid = os.getpid()
        self._process = [*host_identity(), pid, process_start(pid) or ""]
        self._remove_old()

    def claim(self, origin: str) -> Kept | str:
        """What is known of a site; else whose turn it is to ask it, ``""`` for ours.

        Raises OSError where the files cannot be read or written.
        """
        found = self._look(origin)
        if found is None:
            self._append(origin, {"claim": self._me, "by": self._process, "at": self._clock()})
            found = self._look(origin)
        return "" if found is None or found == self._me else found

    def put(self, origin: str, kept: Kept) -> None:
        """Settle all claims of a site.  Raises OSError."""
        self._append(origin, {"rules": kept.rules, "at": kept.at, "for": kept.for_s})

    def give_up(self, origin: str, whose: str = "") -> None:
        """Settle one claim of a site without a result, ours if ``whose`` is empty.  Raises OSError."""
        self._append(origin, {"over": whose or self._me})

    # ---- one bucket

    def _look(self, origin: str) -> Kept | str | None:
        """The newest result that still counts, else the first claim that is not settled, else None."""
        kept: Kept | None = None
        claims: dict[str, dict[str, Any]] = {}
        for record in self._records(origin):
            if "rules" in record:
                found = Kept(record["rules"], float(record["at"]), float(record["for"]))
                kept = found if found.at < self._clock() + _SKEW_S else kept
                claims.clear()
            elif "claim" in record:
                claims.setdefault(str(record["claim"]), record)
            else:
                claims.pop(str(record.get("over")), None)
        if kept is not None and kept.left_s(self._clock()) > 0:
            return kept
        return next((whose for whose, record in claims.items() if self._lives(record)), None)

    def _lives(self, record: dict[str, Any]) -> bool:
        if abs(self._clock() - float(record["at"])) > self._claim_s + _SKEW_S:
            return False
        *host, pid, start = record["by"]
        return host != self._process[:3] or not host[1] or not process_is_gone(int(pid), str(start))

    def _records(self, origin: str) -> Iterator[dict[str, Any]]:
        mark = _MAGIC + struct.pack("<Q", _hash(origin))
        for folder in self._days():
            data = _read_end(folder / self._bucket(origin))
            at = data.find(mark)
            while at >= 0:
                record = _record(data, at)
                if record is not None and record.get("origin") == origin:
                    yield record
                at = data.find(mark, at + 1)

    def _append(self, origin: str, record: dict[str, Any]) -> None:
        payload = dump_json({"origin": origin, **record})
        if len(payload) > _MAX_PAYLOAD_BYTES:
            return
        header = _HEADER.pack(_MAGIC, _hash(origin), len(payload), xxhash.xxh3_64_intdigest(payload))
        path = self._days()[1] / self._bucket(origin)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            file = os.open(path, flags, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, flags, 0o666)
        try:
            os.write(file, header + payload)  # in one call: other processes append too
        finally:
            os.close(file)

    @staticmethod
    def _bucket(origin: str) -> str:
        return f"{_hash(origin) % 256:02x}.log"

    def _days(self) -> tuple[Path, Path]:
        """The folders of yesterday and today."""
        day = int(self._clock() // DAY_S)
        return self._folder / str(day - 1), self._folder / str(day)

    def _remove_old(self) -> None:
        day = int(self._clock() // DAY_S)
        with contextlib.suppress(OSError):
            for folder in list(self._folder.iterdir()):
                if re.fullmatch(r"\d{1,9}", folder.name) and int(folder.name) < day - 1:
                    shutil.rmtree(folder, ignore_errors=True)


def _hash(origin: str) -> int:
    return xxhash.xxh3_64_intdigest(origin.encode("utf-8", "surrogatepass"))


def _read_end(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_READ_BYTES))
            return file.read(_MAX_READ_BYTES)
    except FileNotFoundError:
        return b""


def _record(data: bytes, at: int) -> dict[str, Any] | None:
    """The record at this place, None where there is none or its end is missing."""
    if len(data) < at + _HEADER.size:
        return None
    _, _, length, checksum = _HEADER.unpack_from(data, at)
    payload = data[at + _HEADER.size : at + _HEADER.size + length]
    if len(payload) < length or xxhash.xxh3_64_intdigest(payload) != checksum:
        return None
    try:
        return parse_json_object(payload, _MAX_PAYLOAD_BYTES, keep_surrogates=True)
    except SampleError:
        return None
