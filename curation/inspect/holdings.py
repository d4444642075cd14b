"""Who is working on what, from claims and heartbeats alone, watched by this process's own clock."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.cluster import host_identity
from curation.inspect.places import StagePlace
from curation.run.claims import MAX_BEAT_BYTES, Holder, is_gone, parse_beat, read_claim
from curation.shards import is_safe_id

MAX_CLAIMS = 100_000  # of one stage: more are no claims of workers


@dataclass(frozen=True, slots=True)
class Holding:
    """A claim on a shard.

    life: ``alive`` (its heartbeat moved while we looked, or its process runs on this machine), ``gone`` (its process
    has ended on this machine, or its heartbeat stood still for a lease), ``unknown`` (it was not looked at for long
    enough).  samples: finished so far, None where the heartbeat does not say.  silent_s: for how long we saw it still.
    """

    path: Path
    shard_id: str
    holder: Holder
    life: str
    samples: int | None
    silent_s: float


class Holdings:
    """Looks at claims again and again, and remembers how long it has seen each heartbeat stand still."""

    def __init__(self, places: Sequence[StagePlace]) -> None:
        self._places = places
        self._beats: dict[Path, tuple[bytes, float, bool]] = {}  # → counter, since when, whether it was seen to move

    def follow(self, places: Sequence[StagePlace]) -> None:
        """These are the stages from now on; what was seen of their heartbeats is kept."""
        self._places = places

    def look(self) -> list[list[Holding]]:
        """The claims of each stage as they are now."""
        found, present = [], set()
        for place in self._places:
            read: dict[str, dict[str, int]] = {}
            mine = []
            for path, holder in _claims(place):
                if holder.beat not in read:
                    read[holder.beat] = self._read_beat(place.claims / "_beats" / holder.beat) if holder.beat else {}
                beat = place.claims / "_beats" / holder.beat if holder.beat else path
                present.add(beat)
                mine.append(self._holding(path, holder, beat, read[holder.beat]))
            found.append(sorted(mine, key=lambda holding: holding.shard_id))
        self._beats = {beat: seen for beat, seen in self._beats.items() if beat in present}
        return found

    def _holding(self, path: Path, holder: Holder, beat: Path, working: dict[str, int]) -> Holding:
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
        return Holding(path, path.name.removesuffix(".claim"), holder, life, working.get(path.stem), silent_s)

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


def _claims(place: StagePlace) -> list[tuple[Path, Holder]]:
    found: list[tuple[Path, Holder]] = []
    with contextlib.suppress(OSError), os.scandir(place.claims) as buckets:
        for bucket in sorted(entry.name for entry in buckets if not entry.name.startswith(("_", "."))):
            with contextlib.suppress(OSError):
                for name in os.listdir(place.claims / bucket):
                    path = place.claims / bucket / name
                    if len(found) < MAX_CLAIMS and name.endswith(".claim") and is_safe_id(name[:-6]):
                        holder = read_claim(path)
                        if holder is not None:
                            found.append((path, holder))
    return found
