"""Who is working on which shard, from claims and heartbeats alone, by this process's own clock.

SLURM's accounting adds how the jobs of silent workers ended: OUT_OF_MEMORY, TIMEOUT, NODE_FAIL, PREEMPTED …
That is left out where there is no sacct, where it has no accounting, or where it does not answer in time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.cluster import host_identity
from curation.commands.places import StagePlace
from curation.run.claims import MAX_BEAT_BYTES, ClaimRecord, is_gone, parse_beat, read_claim
from curation.shards import id_of_record, is_safe_id

MAX_CLAIMS = 100_000  # of one stage that are read


@dataclass(frozen=True, slots=True)
class LiveClaim:
    """A claim on a shard.

    life: ``alive`` (the heartbeat changed while we watched, or the process runs on this machine), ``gone`` (the process
    has ended on this machine, or the heartbeat did not change for a lease), ``unknown`` (we have not watched it long
    enough).  samples: how many are finished; None where the heartbeat does not say.  silent_s: for how long we have
    seen no change of the heartbeat.
    """

    path: Path
    shard_id: str
    holder: ClaimRecord
    life: str
    samples: int | None
    silent_s: float


class ClaimWatcher:
    """Reads claims again and again, and remembers for how long each heartbeat has not changed."""

    def __init__(self, places: Sequence[StagePlace]) -> None:
        self._places = places
        self._beats: dict[Path, tuple[bytes, float, bool]] = {}  # → counter, since when, whether we have seen it change

    def follow(self, places: Sequence[StagePlace]) -> None:
        """Takes these stages from now on, and keeps what is known of their heartbeats."""
        self._places = places

    def look(self) -> list[list[LiveClaim]]:
        """Returns the claims of each stage as they are now."""
        found, present = [], set()
        for place in self._places:
            read: dict[str, dict[str, int]] = {}
            mine = []
            for path, holder in _claims(place):
                if holder.beat not in read:
                    read[holder.beat] = self._read_beat(place.claims / "_beats" / holder.beat) if holder.beat else {}
                beat = place.claims / "_beats" / holder.beat if holder.beat else path
                present.add(beat)
                mine.append(self._live_claim(path, holder, beat, read[holder.beat]))
            found.append(sorted(mine, key=lambda claim: claim.shard_id))
        self._beats = {beat: seen for beat, seen in self._beats.items() if beat in present}
        return found

    def _live_claim(self, path: Path, holder: ClaimRecord, beat: Path, working: dict[str, int]) -> LiveClaim:
        now = time.monotonic()
        _, since, moved = self._beats.setdefault(beat, (b"", now, False))
        silent_s = now - since
        host, boot, namespace = host_identity()
        here = bool(boot) and (holder.host, holder.boot, holder.pid_namespace) == (host, boot, namespace)
        if here and holder.pid is not None and holder.pid_start:
            life = "gone" if is_gone(holder) else "alive"
        elif silent_s >= (holder.lease_s or float("inf")):
            life = "gone"
        else:
            life = "alive" if moved else "unknown"
        shard_id = id_of_record(path.stem)
        return LiveClaim(path, shard_id, holder, life, working.get(shard_id), silent_s)

    def _read_beat(self, path: Path) -> dict[str, int]:
        data = b""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            data = file.read(MAX_BEAT_BYTES)
        counter, working = parse_beat(data)
        before = self._beats.get(path)
        if before is None:
            self._beats[path] = (counter, time.monotonic(), False)
        elif counter and counter != before[0]:
            self._beats[path] = (counter, time.monotonic(), bool(before[0]) or before[2])
        return working


def _claims(place: StagePlace) -> list[tuple[Path, ClaimRecord]]:
    found: list[tuple[Path, ClaimRecord]] = []
    with contextlib.suppress(OSError), os.scandir(place.claims) as buckets:
        for bucket in sorted(entry.name for entry in buckets if not entry.name.startswith(("_", "."))):
            with contextlib.suppress(OSError):
                for name in os.listdir(place.claims / bucket):
                    path = place.claims / bucket / name
                    if len(found) < MAX_CLAIMS and name.endswith(".claim") and is_safe_id(id_of_record(name[:-6])):
                        holder = read_claim(path)
                        if holder is not None:
                            found.append((path, holder))
    return found


TIMEOUT_S = 10.0  # for all calls of sacct together
_BATCH = 500  # ids in one call: the length of a command line is limited
_MAX_JOBS = 5000
_ID = re.compile(r"\d{1,12}(?:_\d{1,9})?")
_STATE = re.compile(r"[A-Z_]{2,40}")


def slurm_states(jobs: Iterable[str]) -> dict[str, str]:
    """Asks SLURM's accounting about jobs.

    Args:
        jobs: Ids of jobs: 41, or 40_7 of an array.

    Returns:
        Job → its state, or the worst state of its runs where it was requeued.  Unknown jobs are left out.
    """
    wanted = sorted({job for job in jobs if _ID.fullmatch(job)}, key=_newest_first)[:_MAX_JOBS]
    found: dict[str, str] = {}
    if not wanted or not shutil.which("sacct"):
        return found
    end = time.monotonic() + TIMEOUT_S
    for start in range(0, len(wanted), _BATCH):
        answer = _ask(wanted[start : start + _BATCH], end - time.monotonic())
        if answer is None:
            break
        for job, state in _parse(answer):
            if job not in found or found[job] in _HARMLESS:
                found[job] = state
    return {job: found[job] for job in wanted if job in found}


_HARMLESS = {"COMPLETED", "RUNNING", "PENDING", "REQUEUED", "RESIZING", "SUSPENDED"}


def _ask(jobs: list[str], timeout_s: float) -> str | None:
    command = [
        "sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--format=JobID,JobIDRaw,State",
        f"--jobs={','.join(jobs)}",
    ]  # fmt: skip
    if timeout_s <= 0:
        return None
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout if result.returncode == 0 else None


def _parse(answer: str) -> list[tuple[str, str]]:
    found = []
    for line in answer.splitlines():
        fields = line.split("|")
        state = _STATE.match(fields[-1]) if len(fields) == 3 else None  # "CANCELLED by 1000"
        if state:
            found += [(name, state[0]) for name in dict.fromkeys(fields[:2]) if _ID.fullmatch(name)]
    return found


def _newest_first(job: str) -> tuple[int, int]:
    number, _, element = job.partition("_")
    return -int(number), int(element or 0)
