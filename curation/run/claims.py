"""Leased claims on shards over a shared filesystem: no server is needed, and clocks of other nodes are not trusted.

A claim avoids double work.  Two workers that hold the same shard waste time but do no harm, because the commit
(``commit``) lets only one attempt win.  docs/design.md explains why file ages, locks and node clocks are not used.

This file also defines what a claim and a heartbeat file say about the process that holds a shard.  Nothing that is
read is trusted: a file may be empty, cut short, of another version of this project, or made by hand.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from curation.cluster import Allocation, host_identity, process_is_gone, process_start, slurm_ids
from curation.jsonio import clean_text
from curation.shards import is_safe_id, record_name
from curation.storage.files import make_folder, names_in, storage_error, write_whole

logger = logging.getLogger("curation")

CLAIM_FORMAT = 1
COUNTER_DIGITS = 20  # observers compare only these digits of a heartbeat
MAX_CLAIM_BYTES = 64 << 10
MAX_BEAT_BYTES = 32 << 10
MAX_SHOWN = 64  # a heartbeat names at most so many shards in flight
MAX_PREDECESSORS = 16  # a claim lists at most so many dead attempts at its shard
MAX_PEERS = 4096  # a note on a bucket names at most so many processes; further ones look for themselves
_MAX_NOTE_BYTES = 128 << 10
_MAX_TEXT = 200
_NAME = re.compile(r"[0-9A-Za-z]{1,64}")  # tokens and heartbeats become parts of file names


@dataclass(frozen=True, slots=True)
class LostAttempt:
    """An attempt whose process died.  alone: the process worked on no other shard when it died."""

    token: str
    host: str
    pid: int | None
    slurm: dict[str, str]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class ClaimRecord:
    """The content of a claim.  A field that is missing or unusable is an empty text or None.

    beat: the name of its heartbeat file.  since: Unix time by its own node's clock.  lease_s: how long others wait
    for its heartbeat.  predecessors: tokens of the attempts that died while they held the shard, oldest first; deaths:
    what is known about them.  trouble: what is wrong with the claim, or an empty text.  raw: its bytes.
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
    deaths: tuple[LostAttempt, ...] = ()
    trouble: str = ""

    def died(self, *, alone: bool) -> tuple[LostAttempt, ...]:
        """The deaths that whoever takes over from this holder records."""
        death = LostAttempt(self.token, self.host, self.pid, self.slurm or {}, alone)
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
    deaths: Sequence[LostAttempt],
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


def read_claim(path: Path) -> ClaimRecord | None:
    """Read a claim.  The record is empty if the claim is not written yet; None means that there is no claim."""
    try:
        descriptor = os.open(path, os.O_RDONLY)  # open() would make further system calls
        try:
            data = os.read(descriptor, MAX_CLAIM_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return parse_claim(data)


def parse_claim(data: bytes) -> ClaimRecord:
    """Parse a claim.  It never raises: unusable fields are left out, and ``trouble`` says what is wrong."""
    if not data:
        return ClaimRecord()
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError:
        return ClaimRecord(raw=data, trouble="it is not JSON")
    if not isinstance(record, dict):
        return ClaimRecord(raw=data, trouble="it is not a JSON object")
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
    return ClaimRecord(
        raw=data,
        token=token,
        beat=beat,
        host=_text(record.get("host")),
        boot=_text(record.get("boot")) if own else "",  # without it the pid proves nothing about the process
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


def beat_content(counter: int, working: Mapping[str, int], options_version: int = 0) -> bytes:
    """The content of a heartbeat file: the counter and, for display, each shard in progress with its samples so far.

    options_version: the one under which the process works; 0 while it has recorded none.

    It ends with a line feed, because the file may still contain the end of a longer heartbeat.
    """
    shown = dict(islice(working.items(), MAX_SHOWN))
    return b"%0*d %s\n" % (COUNTER_DIGITS, counter, orjson.dumps({"working": shown, "epoch": options_version}))


def parse_beat(data: bytes) -> tuple[bytes, dict[str, int]]:
    """Return (the counter's digits, shard → samples so far); the mapping is empty if it cannot be read."""
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


def beat_options_version(data: bytes) -> int | None:
    """The options version under which the process works; 0: none yet; None: the heartbeat does not tell."""
    try:
        version = orjson.loads(data[COUNTER_DIGITS:].partition(b"\n")[0]).get("epoch")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    return version if type(version) is int else None


def _death(record: Mapping[str, Any]) -> LostAttempt:
    pid = record.get("pid")
    return LostAttempt(
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


@dataclass(slots=True)
class Claim:
    """A shard that this process holds.

    token: random for each attempt; the name of every file that the attempt writes contains it.
    predecessors: tokens of the attempts that died while they held this shard; their partial files can be reused.
    confirmed_dead: the token of the last of them if its process has certainly ended; the others are only
        presumed dead.
    deaths: what is known about those attempts.
    was_released: another process held the shard while this one ran, and released it.
    lapses: the heartbeat's ``lapses`` when the claim was last seen to belong to this process.
    """

    shard_id: str
    path: Path
    token: str
    predecessors: list[str] = field(default_factory=list)
    confirmed_dead: str | None = None
    deaths: tuple[LostAttempt, ...] = ()
    was_released: bool = False
    lapses: int | None = None


class Heartbeat:
    """One file per process with a counter in it that a thread raises every quarter of the lease.

    After the counter, the file shows how far the process is with each shard.  Observers open and read the file,
    because attribute caches make file times unreliable.  A process that reports no progress for ``stall_s`` stops
    its heartbeat, so that a process with a hung GPU does not keep its shard for ever.
    """

    def __init__(self, folder: Path, lease_s: float, stall_s: float) -> None:
        self.name = secrets.token_hex(8)
        self.lease_s = lease_s
        self.stall_s = stall_s
        self._path = folder / self.name
        self._counter = 0
        self._last_beat = -float("inf")
        self.lapses = 0  # times that the heartbeat stopped for a lease, so that others may have taken the claims
        self._last_progress = time.monotonic()
        self._lock = threading.Lock()
        self._working: dict[str, int] = {}  # shards claimed → samples so far
        self.options_version = 0  # the one under which this process works, once it is recorded
        self._working_lock = threading.Lock()  # never held during a filesystem call, which may block
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._require_heartbeat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def progress(self, shard_id: str | None = None, samples: int = 0) -> None:
        """Report that some work was finished, so that the process does not count as stalled.

        samples: how many further samples of ``shard_id`` are finished.
        """
        self._last_progress = time.monotonic()
        if samples and shard_id is not None:
            with self._working_lock:
                if shard_id in self._working:
                    self._working[shard_id] += samples

    def claimed(self, shard_id: str) -> None:
        """Record that a shard was claimed: from now on the process must report progress."""
        with self._working_lock:
            self._working[shard_id] = 0
        self.progress()

    def gave_back(self, shard_id: str) -> None:
        with self._working_lock:
            self._working.pop(shard_id, None)

    @property
    def fresh(self) -> bool:
        """Whether the last beat is so recent that no process can have taken over the claims of this one."""
        return time.monotonic() - self._last_beat < self.lease_s

    def written_at(self) -> float:
        """The modification time of the heartbeat's file, by the clock of its filesystem."""
        return os.stat(self._path).st_mtime

    def works_under(self, options_version: int) -> None:
        """Tell other processes under which options version this one works from now on."""
        self.options_version = options_version
        self._require_heartbeat()

    def _run(self) -> None:
        while not self._ended.wait(self.lease_s / 4 * random.uniform(0.8, 1.2)):
            if not self._working or time.monotonic() - self._last_progress < self.stall_s:
                with contextlib.suppress(OSError):  # may be temporary: a later beat succeeds, or the lease ends
                    self._beat()

    def _require_heartbeat(self) -> None:
        try:
            self._beat()
        except OSError as error:
            raise storage_error(self._path, error) from error

    def _beat(self) -> None:
        with self._lock:
            before = time.monotonic()  # taken before the write, so that our own lease ends before an observer's
            self._counter += 1
            with self._working_lock:
                content = beat_content(self._counter, self._working, self.options_version)
            try:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            except FileNotFoundError:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, content)
            finally:
                os.close(descriptor)
            self.lapses += time.monotonic() - self._last_beat >= self.lease_s
            self._last_beat = before


class Claims:
    """The claims of one stage below ``folder``.  Buckets of about a thousand shards keep its folders small."""

    def __init__(self, folder: Path, lease_s: float = 60.0, stall_s: float = 1800.0) -> None:
        self._folder = folder
        self._beats = folder / "_beats"
        self.heartbeat = Heartbeat(self._beats, lease_s, stall_s)
        self._lease_s = lease_s
        self._seen: dict[str, tuple[bytes, float]] = {}  # heartbeat → (its counter, when it last changed)
        self._listings: dict[str, set[str]] = {}
        self._warned: set[Path] = set()
        self._held: set[str] = set()  # shards that other processes held when this one looked
        self._rank = Allocation.detect().rank
        self._process = (os.getpid(), process_start(os.getpid()))

    def acquire(self, bucket: str, shard_id: str) -> Claim | None:
        """Claim a shard that is free or whose holder is dead; None while a live process holds it."""
        path = self._folder / bucket / f"{record_name(shard_id)}.claim"
        claim = self._create(path, shard_id)
        if claim is None:
            self._held.add(shard_id)
            observed = read_claim(path)
            if observed is None:  # it was released in between
                claim = self._create(path, shard_id)
            elif self._expired(path, shard_id, observed):
                claim = self._take_over(path, shard_id, observed)
        if claim is not None:
            claim.was_released = shard_id in self._held and not claim.predecessors
            self._held.discard(shard_id)
            self._seen.pop(_unsigned(shard_id), None)
            self.heartbeat.claimed(shard_id)
        return claim

    def mark_alone(self, claim: Claim) -> None:
        """Record that this process works on this shard alone: if the process dies, the shard is the cause."""
        try:
            os.close(os.open(_alone_mark(claim.path, claim.token), os.O_WRONLY | os.O_CREAT, 0o666))
        except OSError as error:
            raise storage_error(claim.path, error) from error

    def left_behind(self, bucket: str, shard_id: str) -> bool:
        """Whether the shard had a claim when this process first listed its bucket."""
        if bucket not in self._listings:
            try:
                self._listings[bucket] = set(os.listdir(self._folder / bucket))
            except OSError:
                self._listings[bucket] = set()
        return f"{record_name(shard_id)}.claim" in self._listings[bucket]

    def holds(self, claim: Claim) -> bool:
        """Whether the claim still belongs to this process and no other can have presumed this one dead."""
        lapses, current = self.heartbeat.lapses, read_claim(claim.path)
        held = current is not None and current.token == claim.token and self.heartbeat.fresh
        claim.lapses = lapses if held else None
        return held

    def release(self, claim: Claim) -> None:
        """Release a claim, once.  A claim that another process has taken over stays.

        It was not taken over if it belonged to this process when last read and the heartbeat has not lapsed since.
        """
        self.heartbeat.gave_back(claim.shard_id)
        ours = self.heartbeat.fresh and claim.lapses == self.heartbeat.lapses
        if not ours:
            current = read_claim(claim.path)
            ours = current is not None and current.token == claim.token
        with contextlib.suppress(OSError):  # otherwise the claim expires after this process has ended
            if claim.deaths:
                _alone_mark(claim.path, claim.token).unlink(missing_ok=True)
            if ours:
                claim.path.unlink(missing_ok=True)

    def others_work_under(self, options_version: int) -> bool:
        """Whether another process is alive that works under this options version.

        A heartbeat that a killed process left behind is watched for a lease, which is how long others wait for it.
        """
        watched: dict[str, bytes] = {}
        told = False
        end = time.monotonic() + self._lease_s
        while True:
            names = {name for name in names_in(self._beats) if name != self.heartbeat.name and _NAME.fullmatch(name)}
            for name in sorted(names):
                data = self._read_beat(name, MAX_BEAT_BYTES)
                if beat_options_version(data) not in (None, options_version):
                    watched.pop(name, None)
                elif watched.setdefault(name, data[:COUNTER_DIGITS]) != data[:COUNTER_DIGITS]:
                    return True
            watched = {name: counter for name, counter in watched.items() if name in names}
            if not watched or time.monotonic() > end:
                return False
            if not told:
                told = True
                logger.info(f"looking for up to {self._lease_s:g} s whether a process with other options is alive")
            time.sleep(min(0.5, self._lease_s / 8))

    def _create(
        self, path: Path, shard_id: str, predecessors: list[str] | None = None, deaths: tuple[LostAttempt, ...] = ()
    ) -> Claim | None:
        token = secrets.token_hex(8)
        predecessors = predecessors or []
        record = claim_record(
            token,
            self.heartbeat.name,
            host_identity(),
            self._process,
            slurm=slurm_ids(),
            rank=self._rank,
            lease_s=self._lease_s,
            predecessors=predecessors,
            deaths=deaths,
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        except FileNotFoundError:
            make_folder(path.parent)
            return self._create(path, shard_id, predecessors, deaths)
        except OSError as error:
            raise storage_error(path, error) from error
        try:
            try:
                os.write(descriptor, record)  # no fsync: a claim that a crash loses counts as released
            finally:
                os.close(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise storage_error(path, error) from error
        return Claim(shard_id, path, token, predecessors, deaths=deaths)

    def _expired(self, path: Path, shard_id: str, observed: ClaimRecord) -> bool:
        """Whether the holder is gone: its pid tells where it is visible, else a heartbeat that has stopped.

        All claims of a process share its heartbeat, so that they expire together when it dies.
        """
        if is_gone(observed):
            return True
        holder = observed.beat or _unsigned(shard_id)
        if observed.beat:
            self._seen.pop(_unsigned(shard_id), None)
        counter = self._read_beat(observed.beat)
        now = time.monotonic()
        seen = self._seen.get(holder)
        if seen is None or (counter and counter != seen[0]):
            self._seen[holder] = (counter, now)
            return False
        if observed.trouble and path not in self._warned:  # read twice, so it is not being written just now
            self._warned.add(path)
            logger.warning(
                f"{path}: not a claim that this version can read ({observed.trouble}); the shard is taken over once "
                f"its holder's heartbeat has not changed for {self._lease_s:g} s"
            )
        return now - seen[1] >= self._lease_s

    def _read_beat(self, name: str, size: int = COUNTER_DIGITS) -> bytes:
        if not name:  # an empty or foreign claim has no heartbeat: it expires like a dead one
            return b""
        try:
            with open(self._beats / name, "rb") as file:
                return file.read(size)
        except OSError:
            return b""

    def _take_over(self, path: Path, shard_id: str, observed: ClaimRecord) -> Claim | None:
        aside = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.stale")
        try:
            os.rename(path, aside)  # one of several processes succeeds; the others get ENOENT
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(path, error) from error
        moved = read_claim(aside) or ClaimRecord()
        if moved.raw != observed.raw:  # a live claim was created in between: put it back
            with contextlib.suppress(OSError):
                os.link(aside, path)
            aside.unlink(missing_ok=True)
            return None
        alone = _alone_mark(path, observed.token)
        predecessors = [*observed.predecessors, *([observed.token] if observed.token else [])][-MAX_PREDECESSORS:]
        claim = self._create(path, shard_id, predecessors, observed.died(alone=alone.exists()))
        if claim is not None and is_gone(observed):
            claim.confirmed_dead = observed.token
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
            if observed.deaths:
                alone.unlink(missing_ok=True)
            if observed.beat:  # the dead holder's; a holder that is alive after all writes it again
                (self._beats / observed.beat).unlink(missing_ok=True)
        return claim


class CheckedBuckets:
    """Buckets that a worker of the same run has found done, so that not each looks at all shards of the others.

    A look at a shard that is done costs some reads.  If each of 64 workers looked at each shard that the others have
    done, a shard would cost more for these looks than for its commit.  So the first worker that knows all shards of a
    bucket to be done notes it in a file beside their claims, and who comes later reads this one file.

    A worker believes a note that is about the same shards and the same run, and that names its own heartbeat: whoever
    wrote the note listed the heartbeats before its first look, so all these looks came after this worker's start.  No
    clock is needed for that, and a job that is requeued under its old id believes no older note.  Whoever finds no
    such note looks at the shards.  Thread-safe.

    folder: of the stage's claims.  beat: the name of this process's heartbeat.
    """

    def __init__(self, folder: Path, beat: str) -> None:
        self._folder = folder
        self._beat = beat
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str, list[str], set[str]]] = {}  # bucket → subject, peers, shards not known done

    def are_done(self, bucket: str, subject: str, shard_ids: Collection[str]) -> bool:
        """Whether another worker has found all of them done; if not, this worker begins to look at them.

        subject: what a note has to be about: a digest of the run, the shards and the options that they need.
        """
        if self._beat in self._noted(bucket, subject):
            return True
        peers = self._peers()[:MAX_PEERS]
        with self._lock:
            self._open[bucket] = subject, peers, set(shard_ids)
        return False

    def found_done(self, bucket: str, shard_id: str) -> None:
        """This worker knows that a shard is done: it has done the shard, or looked at it."""
        with self._lock:
            subject, peers, unknown = self._open.get(bucket, ("", [], {shard_id, ""}))
            unknown.discard(shard_id)
            if unknown:
                return
            del self._open[bucket]
        with contextlib.suppress(OSError):  # the others look at the shards then
            note = orjson.dumps({"checked": subject, "beats": peers})
            write_whole(self._note(bucket), note, durable=False)

    def passed(self, bucket: str) -> None:
        """This worker has looked at all shards of a bucket.  Those that were not done it may see again later."""
        with self._lock:
            if bucket in self._open:
                subject, peers, unknown = self._open[bucket]
                self._open[bucket] = subject, peers, set(unknown)  # a set never gets smaller by itself

    def _noted(self, bucket: str, subject: str) -> Sequence[str]:
        """The heartbeats in the note on a bucket; none where there is no usable note on this subject."""
        try:
            with open(self._note(bucket), "rb") as file:
                note = orjson.loads(file.read(_MAX_NOTE_BYTES))
        except (OSError, orjson.JSONDecodeError):
            return ()
        if not isinstance(note, dict) or note.get("checked") != subject or not isinstance(note.get("beats"), list):
            return ()
        return tuple(map(_name, note["beats"]))

    def clear(self) -> None:
        """At the end of a process: remove all notes if no other process is there that could read them."""
        if not self._peers():
            with contextlib.suppress(OSError):
                for bucket in os.listdir(self._folder):
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        self._note(bucket).unlink()

    def _peers(self) -> list[str]:
        """The names of the heartbeats, in any order."""
        try:
            return [name for name in os.listdir(self._folder / "_beats") if _NAME.fullmatch(name)]
        except OSError:
            return []

    def _note(self, bucket: str) -> Path:
        return self._folder / bucket / ".checked"


def is_gone(observed: ClaimRecord) -> bool:
    """Whether the holder's process has certainly ended; False if this process cannot see it (another node)."""
    host, boot, namespace = host_identity()
    if not boot or (observed.host, observed.boot, observed.pid_namespace) != (host, boot, namespace):
        return False
    if observed.pid is None or not observed.pid_start:
        return False
    return process_is_gone(observed.pid, observed.pid_start)


def _alone_mark(path: Path, token: str) -> Path:
    return path.with_name(f".{path.stem}.{token or 'unsigned'}.alone")


def _unsigned(shard_id: str) -> str:
    """The name used as heartbeat for an empty claim, whose holder was killed before it wrote or has yet to write."""
    return f"claim of {shard_id}"
