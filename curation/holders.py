"""What a claim and a heartbeat file say of the process that holds a shard, whoever wrote them and in whatever state.

Nothing that is read here is trusted: a file may be empty, cut short, of another version of this project, or made by
hand.  Times are for show only.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from curation.jsonio import clean_text
from curation.shards import is_safe_id

CLAIM_FORMAT = 1
COUNTER_DIGITS = 20  # of a heartbeat: all that observers compare
MAX_CLAIM_BYTES = 64 << 10
MAX_BEAT_BYTES = 32 << 10
MAX_SHOWN = 64  # shards in flight that a heartbeat tells of
MAX_PREDECESSORS = 16  # that a claim remembers
_MAX_TEXT = 200
_NAME = re.compile(r"[0-9A-Za-z]{1,64}")  # tokens and heartbeats become parts of file names


@dataclass(frozen=True, slots=True)
class Death:
    """One attempt that ended without a word.  alone: its process worked on nothing else when it died."""

    token: str
    host: str
    pid: int | None
    slurm: dict[str, str]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Holder:
    """What a claim says.  Empty texts and None stand for what it does not say, or not in a form that can be used.

    beat: the name of its heartbeat file.  since: Unix time by its own node's clock.  lease_s: how long others wait
    for its heartbeat.  predecessors: tokens of those who died holding the shard, the last one last; deaths: what is
    known of them.  trouble: what is wrong with the claim, empty where nothing is.  raw: its bytes.
    """

    raw: bytes = b""
    token: str = ""
    beat: str = ""
    host: str = ""
    boot: str = ""
    pid_namespace: str = ""
    pid: int | None = None
    pid_start: str = ""
    slurm: dict[str, str] | None = None
    rank: int | None = None
    since: float | None = None
    lease_s: float | None = None
    predecessors: tuple[str, ...] = ()
    deaths: tuple[Death, ...] = ()
    trouble: str = ""

    def died(self, *, alone: bool) -> tuple[Death, ...]:
        """The deaths that whoever takes over from this holder records."""
        death = Death(self.token, self.host, self.pid, self.slurm or {}, alone)
        return (*self.deaths, death)[-MAX_PREDECESSORS:]


def claim_record(
    token: str,
    beat: str,
    identity: tuple[str, str, str],
    process: tuple[int, str | None],
    *,
    slurm: dict[str, str],
    rank: int,
    lease_s: float,
    predecessors: Sequence[str],
    deaths: Sequence[Death],
) -> bytes:
    """The content of a claim.  identity: ``cluster.host_identity()``; process: its pid and start time."""
    return orjson.dumps(
        {
            "format": CLAIM_FORMAT,
            "token": token,
            "beat": beat,
            "host": identity[0],
            "boot": identity[1],
            "pid_namespace": identity[2],
            "pid": process[0],
            "pid_start": process[1],
            "slurm": slurm,
            "rank": rank,
            "since": round(time.time(), 3),
            "lease_s": lease_s,
            "predecessors": list(predecessors),
            "deaths": [asdict(death) for death in deaths],
        }
    )


def read_claim(path: Path) -> Holder | None:
    """Who holds a shard; an empty Holder for a claim that is not written yet; None where there is no claim."""
    try:
        descriptor = os.open(path, os.O_RDONLY)  # unlike open(), it asks for nothing else
        try:
            data = os.read(descriptor, MAX_CLAIM_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return parse_claim(data)


def parse_claim(data: bytes) -> Holder:
    """Never raises: what cannot be used is left out, and ``trouble`` says so."""
    if not data:
        return Holder()
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError:
        return Holder(raw=data, trouble="it is not JSON")
    if not isinstance(record, dict):
        return Holder(raw=data, trouble="it is not a JSON object")
    token, beat, pid = _name(record.get("token")), _name(record.get("beat")), record.get("pid")
    pid = pid if type(pid) is int and 0 < pid < 1 << 31 else None
    own = record.get("format") == CLAIM_FORMAT
    trouble = ""
    if not own:
        theirs = clean_text(str(record.get("format")))[:20]
        trouble = f"its format is {theirs!r}, and this version writes {CLAIM_FORMAT}"
    elif lacking := [n for n, v in (("token", token), ("beat", beat), ("pid", pid)) if not v]:
        trouble = f"it has no usable {' and '.join(lacking)}"
    rank = record.get("rank")
    return Holder(
        raw=data,
        token=token,
        beat=beat,
        host=_text(record.get("host")),
        boot=_text(record.get("boot")) if own else "",  # without it nobody is presumed dead by pid
        pid_namespace=_text(record.get("pid_namespace")),
        pid=pid,
        pid_start=_text(record.get("pid_start")),
        slurm=_texts(record.get("slurm")),
        rank=rank if type(rank) is int else None,
        since=_number(record.get("since")),
        lease_s=_number(record.get("lease_s")),
        predecessors=tuple(filter(None, map(_name, _list(record.get("predecessors"))))),
        deaths=tuple(_death(item) for item in _list(record.get("deaths")) if isinstance(item, dict)),
        trouble=trouble,
    )


def beat_content(counter: int, working: Mapping[str, int]) -> bytes:
    """A heartbeat: the counter, and for show the shards that are worked on with their samples so far.

    It ends with a line feed, because a longer one may have stood in the file before.
    """
    shown = dict(islice(working.items(), MAX_SHOWN))
    return b"%0*d %s\n" % (COUNTER_DIGITS, counter, orjson.dumps({"working": shown}))


def parse_beat(data: bytes) -> tuple[bytes, dict[str, int]]:
    """(the counter's digits, shard → samples so far) of a heartbeat; the latter is empty where it cannot be read."""
    counter, rest = data[:COUNTER_DIGITS], data[COUNTER_DIGITS:].partition(b"\n")[0]
    try:
        working = orjson.loads(rest).get("working")
        return counter, {
            shard: count
            for shard, count in working.items()
            if is_safe_id(shard) and type(count) is int and 0 <= count < 1 << 53
        }
    except (orjson.JSONDecodeError, AttributeError):
        return counter, {}


def _death(record: Mapping[str, Any]) -> Death:
    pid = record.get("pid")
    return Death(
        _name(record.get("token")),
        _text(record.get("host")),
        pid if type(pid) is int else None,
        _texts(record.get("slurm")) or {},
        record.get("alone") is True,
    )


def _name(value: object) -> str:
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


def _text(value: object) -> str:
    return clean_text(value)[:_MAX_TEXT] if isinstance(value, str) else ""


def _texts(value: object) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    return {_text(name): _text(text) for name, text in islice(value.items(), 16) if isinstance(text, str)}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _list(value: object) -> list[Any]:
    return value[-MAX_PREDECESSORS:] if isinstance(value, list) else []
