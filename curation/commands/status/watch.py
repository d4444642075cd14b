"""What ``status --watch`` shows on a terminal: a table that is drawn again in its place, and what limits each stage."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from curation.commands.places import StagePlace
from curation.run.inputs import numbered
from curation.run.progress import duration

_MAX_FAILURES = 6  # lines on failures and dead workers of one stage
_MAX_HOSTS = 3
_HEADINGS = ("stage", "shards", "samples/s", "shards/min", "time left", "failed", "workers", "what limits it")
_NUMBERS = ("shards", "samples/s", "shards/min", "failed")
_WORDS = {  # phase of a receipt → what it is
    "read": "reading",
    "decode": "decoding images",
    "language": "finding the language",
    "infer": "the model",
    "encode": "encoding",
    "check": "checking what was made",
    "write": "writing",
    "commit": "committing",
    "verify": "checking what was written",
    "download": "downloading",
    "wait": "waiting",
}


def names_of(root: Path, places: Sequence[StagePlace]) -> list[str]:
    """Returns the stages' names; where a stage has several output folders, each with its folder."""
    times = Counter(place.stage for place in places)
    home = os.path.realpath(root)
    return [
        f"{place.stage} in {_below(home, str(place.home))}" if times[place.stage] > 1 else place.stage
        for place in places
    ]


def _below(root: str, folder: str) -> str:
    return os.path.relpath(folder, root) if os.path.commonpath((root, folder)) == root else folder


def limit_of(stage: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> str:
    """Returns what limits a stage, in words; empty where it is over or the receipts do not tell.

    before: the stages that make what it reads.
    """
    unfinished = [numbered(one["stage"]) or one["name"] for one in before if one["pending"] or one["running"]]
    if not stage["running"] and not stage["pending"]:
        return f"waits for {' and '.join(unfinished)}" if unfinished else ""
    if not any(claim["life"] != "gone" for claim in stage["running"]):
        return "no worker is seen"
    spent: Mapping[str, float] = stage["phase_seconds"]
    total = sum(spent.values())
    if not total:
        return ""
    phase, most = max(spent.items(), key=lambda item: item[1])
    return f"{_WORDS.get(phase, phase)} ({most / total:.0%} of the time)"


def is_over(result: Mapping[str, Any]) -> str:
    """Returns the last line where nothing is left to do; empty while there is."""
    stages = result["stages"]
    if any(stage["pending"] or stage["running"] or stage["stale"] for stage in stages):
        return ""
    failed = sum(sum(stage[what].values()) for stage in stages for what in ("failed", "quarantined"))
    if failed:
        return f"nothing is left to do, but {failed:,} shards failed: `curation retry` makes them pending again"
    return "all shards of all stages that have begun are done"


def workers_of(stage: Mapping[str, Any]) -> str:
    """``4 on node01, node02``; a worker is a process that holds a claim and is not known to have ended."""
    alive = {(claim["host"], claim["pid"]) for claim in stage["running"] if claim["life"] != "gone"}
    hosts = sorted({host or "an unknown host" for host, _ in alive})
    more = f" and {len(hosts) - _MAX_HOSTS:,} more" if len(hosts) > _MAX_HOSTS else ""
    return f"{len(alive):,} on {', '.join(hosts[:_MAX_HOSTS])}{more}" if alive else "-"


class WatchView:
    """A table in a terminal that is drawn again in its place.  The terminal shows the last one when it ends."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), auto_refresh=False, vertical_overflow="ellipsis")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show(self, result: Mapping[str, Any], every_s: float) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for heading in _HEADINGS:
            table.add_column(heading, justify="right" if heading in _NUMBERS else "left")
        for stage in result["stages"]:
            table.add_row(*map(Text, _row(stage)))
        lines = [line for stage in result["stages"] for line in _troubles(stage)]
        lines += [f"warning: {warning}" for warning in result["warnings"][:_MAX_FAILURES]]
        again = f"{time.strftime('%H:%M:%S')}, every {every_s:g} s; Ctrl-C ends"
        head = Text(f"{result['root']}  ({again})")
        self._live.update(Group(head, table, *(Text(line, style="yellow") for line in lines)), refresh=True)


def _row(stage: Mapping[str, Any]) -> tuple[str, ...]:
    left = sum(stage["stale"].values()) + stage["pending"] + len(stage["running"])
    failed = sum(sum(stage[what].values()) for what in ("failed", "quarantined"))
    total = stage["done"] + left + failed
    working = bool(stage["running"])  # a rate of the past would look like one of now
    shards, samples = stage["shards_per_s_recent"], stage["samples_per_s_recent"]
    return (
        stage["name"],
        f"{stage['done']:,}/{total:,}{'' if stage['planned'] is not None else '+?'}",
        f"{samples:,.1f}" if working and samples is not None else "-",
        f"{60 * shards:,.1f}" if working and shards is not None else "-",
        "-" if stage["eta_s"] is None else duration(stage["eta_s"]),
        f"{failed:,}",
        workers_of(stage),
        stage["limit"] or ("done" if not left else "-"),
    )


def _troubles(stage: Mapping[str, Any]) -> list[str]:
    lines = []
    for what in ("failed", "quarantined"):
        lines += [f"{stage['name']}: {count:,} {what}, {reason}" for reason, count in stage[what].items()]
    lines += [f"{stage['name']}: {one['shard']} {one['reason']}: {one['message']}" for one in stage["failures"]]
    dead = [claim["shard"] for claim in stage["running"] if claim["life"] == "gone"]
    if dead:
        lines.append(f"{stage['name']}: the workers on {len(dead):,} shards have died; others take these over")
    return lines[:_MAX_FAILURES]
