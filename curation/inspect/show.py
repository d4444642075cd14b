"""What ``status`` found, as tables on a terminal and as plain lines in a log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

_MAX_ROWS = 40  # of running shards, before they are counted only
_LIVES = {"alive": "alive", "gone": "dead: its shard is free to take", "unknown": "not known to be alive"}


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """For a log: a stage's line, and indented what there is to say of it."""
    for stage in result["stages"]:
        facts = "  ".join(f"{name} {value}" for name, value in zip(_HEADINGS, _row(stage)[1:], strict=True))
        yield f"{stage['stage']}  {facts}  ({stage['folder']})"
        yield from (f"  {line}" for line in _details(stage))
        yield from (f"  running: {'  '.join(filter(None, row))}" for row in _running(stage))
    for warning in result["warnings"]:
        yield f"warning: {warning}"


def print_tables(result: dict[str, Any], *, clear: bool) -> None:
    """For a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if clear:
        console.clear()
    console.print(Text(str(result["root"])))
    for title, columns in (("shards", range(7)), ("samples", range(7, len(_HEADINGS)))):
        table = Table(title=title, title_justify="left")
        table.add_column("stage", no_wrap=True)
        for column in columns:
            table.add_column(_HEADINGS[column], justify="right")
        for stage in result["stages"]:
            name, *cells = _row(stage)
            table.add_row(Text(name), *(Text(cells[column]) for column in columns))
        console.print(table)
    for stage in result["stages"]:
        details = list(_details(stage))
        rows = list(_running(stage))
        if rows:
            running = Table(title=Text(f"{stage['stage']}: running"), title_justify="left")
            for heading in ("shard", "worker", "since", "samples", "life"):
                running.add_column(heading)
            for row in rows:
                running.add_row(*(Text(cell) for cell in row))
            console.print(running)
        for line in details:
            console.print(Text(f"{stage['stage']}: {line}"))
    for warning in result["warnings"]:
        console.print(Text(f"warning: {warning}"), style="yellow")


_HEADINGS = (
    "done", "running", "pending", "stale", "failed", "quarantined", "ETA",
    "in", "kept", "dropped", "bad", "per second", "lately", "GPU-seconds",
)  # fmt: skip


def _row(stage: dict[str, Any]) -> list[str]:
    samples = stage["samples"]
    return [
        stage["stage"],
        f"{stage['done']:,}",
        f"{len(stage['running']):,}",
        f"{stage['pending']:,}" + ("" if stage["planned"] is not None else "+?"),
        *(f"{sum(stage[name].values()):,}" for name in ("stale", "failed", "quarantined")),
        "-" if stage["eta_s"] is None else str(timedelta(seconds=round(stage["eta_s"]))),
        f"{samples['in']:,}",
        f"{samples['kept']:,}",
        *(f"{sum(samples[name].values()):,}" for name in ("dropped", "failed")),
        _rate(stage["samples_per_s"]),
        _rate(stage["samples_per_s_recent"]),
        f"{stage['gpu_seconds']:,.0f}",
    ]


def _details(stage: dict[str, Any]) -> Iterator[str]:
    whys = {
        "epoch": "made with other options",
        "inputs": "their inputs changed",
        "upstream": "an input is stale itself",
    }
    for why, count in stage["stale"].items():
        yield f"stale: {count:,} ({whys.get(why, why)}); the stage's next run does them again"
    for what in ("failed", "quarantined"):
        for reason, count in stage[what].items():
            causes = stage["slurm_causes"].get(reason, {})
            told = f"; SLURM: {', '.join(f'{n:,} {state}' for state, n in causes.items())}" if causes else ""
            yield f"{what}: {count:,} {reason}{told}"
    for failure in stage["failures"]:
        states = f" [{', '.join(failure['slurm_states'])}]" if failure["slurm_states"] else ""
        yield f"{failure['shard']} {failure['reason']}{states}: {failure['message']}"
    for path in stage["unreadable"]:
        yield f"no receipt, though it is named like one: {path}"


def _running(stage: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """shard, worker, since, samples, life"""
    for claim in stage["running"][:_MAX_ROWS]:
        job = f"job {claim['job']}" if claim["job"] else ""
        pid = f"pid {claim['pid']}" if claim["pid"] else ""
        worker = " ".join(filter(None, (claim["host"] or "an unknown host", pid, job)))
        life = _LIVES[claim["life"]]
        if claim["life"] != "alive":
            life += f" (seen silent for {claim['silent_s']:,.0f} s)" if claim["silent_s"] >= 1 else ""
            life += f" [{claim['slurm_state']}]" if claim["slurm_state"] else ""
        if claim["deaths_before"]:
            life += f", {claim['deaths_before']} died on it before"
        if claim["trouble"]:
            life += f"; {claim['trouble']}"
        samples = "" if claim["samples"] is None else f"{claim['samples']:,} samples"
        yield claim["shard"], worker, _since(claim["since"]), samples, life
    more = len(stage["running"]) - _MAX_ROWS
    if more > 0:
        yield f"and {more:,} more", "", "", "", ""


def _since(unix_time: float | None) -> str:
    try:
        return "" if unix_time is None else f"since {datetime.fromtimestamp(unix_time):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, OSError, ValueError):
        return ""


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
