"""``curation status ROOT`` shows how far every stage below a folder is, from receipts, plans and claims.

It writes nothing, needs no SLURM, and trusts no other node's clock: a heartbeat shows whether a worker is alive.  The
result is shown as tables on a terminal and as plain lines in a log.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation.commands.places import find_stages
from curation.commands.status.live_claims import ClaimWatcher, LiveClaim, slurm_states
from curation.commands.status.scan import Memory, ReceiptScan, ScannedStage, StageCounts, job_of, speed
from curation.commands.status.watch import WatchView, is_over, limit_of, names_of
from curation.errors import EXIT_OK, UsageError
from curation.jsonio import clean_text
from curation.options import POSITIONAL, exit_code, parse_arguments
from curation.run.progress import duration

_MAX_ROWS = 40  # of running shards; the others are only counted
_LIVES = {"alive": "alive", "gone": "dead: its shard is free to take", "unknown": "not known to be alive"}


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yields the lines for a log: a line for each stage, and its details indented below it."""
    for stage in result["stages"]:
        facts = "  ".join(f"{name} {value}" for name, value in zip(_HEADINGS, _row(stage)[1:], strict=True))
        yield f"{stage['name']}  {facts}  ({stage['folder']})"
        yield from (f"  {line}" for line in _details(stage))
        yield from (f"  running: {'  '.join(filter(None, row))}" for row in _running(stage))
    for warning in result["warnings"]:
        yield f"warning: {warning}"


def print_tables(result: dict[str, Any]) -> None:
    """Prints the tables for a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
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
            running = Table(title=Text(f"{stage['name']}: running"), title_justify="left")
            for heading in ("shard", "worker", "since", "samples", "life"):
                running.add_column(heading)
            for row in rows:
                running.add_row(*(Text(cell) for cell in row))
            console.print(running)
        for line in details:
            console.print(Text(f"{stage['name']}: {line}"))
    for warning in result["warnings"]:
        console.print(Text(f"warning: {warning}"), style="yellow")


_HEADINGS = (
    "done", "running", "pending", "stale", "failed", "quarantined", "ETA",
    "samples in", "kept", "dropped", "failed samples", "samples/s", "recent rate", "GPU-seconds",
)  # fmt: skip


def _row(stage: dict[str, Any]) -> list[str]:
    samples = stage["samples"]
    return [
        stage["name"],
        f"{stage['done']:,}",
        f"{len(stage['running']):,}",
        f"{stage['pending']:,}" + ("" if stage["planned"] is not None else "+?"),
        *(f"{sum(stage[name].values()):,}" for name in ("stale", "failed", "quarantined")),
        "-" if stage["eta_s"] is None else duration(stage["eta_s"]),
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
        yield f"stale: {count:,} ({whys.get(why, why)}); the stage's next run repeats them"
    for what in ("failed", "quarantined"):
        for reason, count in stage[what].items():
            causes = stage["slurm_causes"].get(reason, {})
            told = f"; SLURM: {', '.join(f'{n:,} {state}' for state, n in causes.items())}" if causes else ""
            yield f"{what}: {count:,} {reason}{told}"
    for failure in stage["failures"]:
        states = f" [{', '.join(failure['slurm_states'])}]" if failure["slurm_states"] else ""
        yield f"{failure['shard']} {failure['reason']}{states}: {failure['message']}"
    if opt_outs := stage["samples"].get("opt_out"):
        yield f"disallowed by their sites: {', '.join(f'{count:,} {kind}' for kind, count in opt_outs.items())}"
    if captions := stage["samples"].get("captions"):
        yield f"captions: {', '.join(f'{count:,} {name}' for name, count in captions.items())}"
    for path in stage["unreadable"]:
        yield f"not a receipt, although it has the name of one: {path}"


def _running(stage: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """shard, worker, since, samples, life"""
    for claim in stage["running"][:_MAX_ROWS]:
        job = f"job {claim['job']}" if claim["job"] else ""
        pid = f"pid {claim['pid']}" if claim["pid"] else ""
        worker = " ".join(filter(None, (claim["host"] or "an unknown host", pid, job)))
        life = _LIVES[claim["life"]]
        if claim["life"] != "alive":
            life += f" (no heartbeat seen for {claim['silent_s']:,.0f} s)" if claim["silent_s"] >= 1 else ""
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


STATUS_FORMAT = 1
_MOMENT_S = 1.0  # between the two times that a heartbeat is read, at least
_WATCH_S = "10"
SHARE_OF_READING = 3.0  # --watch waits at least so many times as long as it reads: others use the filesystem too


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show how far the stages below a folder are."""

    root: Annotated[Path, POSITIONAL]
    """The folder of the dataset: stages whose receipts are in it, or in one of its subfolders, are found."""
    watch: float | None = None
    """Show it again after this number of seconds (10 if you give no number), until everything is done or Ctrl-C."""
    json: bool = False
    """One JSON object on one line instead of tables."""
    look_s: float = _MOMENT_S
    """Observe heartbeats for this number of seconds to find the workers that are alive: a worker writes four heartbeats
    per lease."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, with_seconds(sys.argv[2:] if argv is None else argv, _WATCH_S), "status")
    if options.watch is not None and options.watch <= 0:
        raise UsageError("--watch takes a positive number of seconds")
    claims = ClaimWatcher([])
    with contextlib.suppress(KeyboardInterrupt):
        if options.watch is None:
            places = find_stages(options.root)
            claims.follow(places)
            _show(_look(options.root, ReceiptScan(places), claims, options.look_s), options)
        else:
            _watch(options, claims, options.watch)
    return EXIT_OK


def _watch(options: Options, claims: ClaimWatcher, every_s: float) -> None:
    """Show it again and again, until nothing is left to do or the user ends it."""
    memory = Memory()
    look_s = options.look_s
    with contextlib.ExitStack() as stack:
        view = None
        if sys.stdout.isatty() and not options.json:
            view = stack.enter_context(WatchView())
        while True:
            began = time.monotonic()
            places = find_stages(options.root)
            claims.follow(places)
            result = _look(options.root, ReceiptScan(places, memory), claims, look_s)
            ended = is_over(result)
            if view is not None:
                view.show(result, every_s)
            else:
                _show(result, options)
            if ended:
                break
            look_s = 0.0
            time.sleep(max(every_s, SHARE_OF_READING * (time.monotonic() - began)))
    if not options.json:
        print(ended, flush=True)


def with_seconds(argv: Sequence[str], default: str) -> list[str]:
    """Returns the arguments with the default after a ``--watch`` that stands without its seconds."""
    words = list(argv)
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if word == "--watch" and not following.replace(".", "", 1).isdigit():
            return [*words[:place], "--watch", default, *words[place + 1 :]]
    return words


def _show(result: dict[str, Any], options: Options) -> None:
    if options.json:
        print(orjson.dumps(result).decode(), flush=True)
    elif sys.stdout.isatty():
        print_tables(result)
    else:
        print("\n".join(as_lines(result)), flush=True)


def _look(root: Path, scan: ReceiptScan, claims: ClaimWatcher, look_s: float) -> dict[str, Any]:
    """Returns all that is shown, as one JSON value; docs/status.md describes it."""
    began = time.monotonic()
    for stage, held in zip(scan.stages, claims.look(), strict=True):
        stage.claimed = {claim.shard_id for claim in held}
    totals = scan.read(StageCounts)
    if any(stage.claimed for stage in scan.stages):
        left_s = look_s - (time.monotonic() - began)
        if left_s > 0 and any(claim.life == "unknown" for held in claims.look() for claim in held):
            time.sleep(left_s)
    held_now = claims.look()
    jobs = {job for counts in totals for _, job in counts.jobs}
    states = slurm_states(jobs | {job_of(h.holder.slurm) for held in held_now for h in held if h.life != "alive"})
    stages = [
        stage_result(stage, counts, held, states)
        for stage, counts, held in zip(scan.stages, totals, held_now, strict=True)
    ]
    add_names_and_limits(root, scan, stages)
    return {
        "format": STATUS_FORMAT,
        "root": str(root),
        "seconds": round(time.monotonic() - began, 3),
        "slurm_answered": bool(states),
        "stages": stages,
        "warnings": [clean_text(warning) for warning in scan.warnings],
    }


def add_names_and_limits(root: Path, scan: ReceiptScan, stages: Sequence[dict[str, Any]]) -> None:
    """Add to each ``stage_result`` its ``name``, and in ``limit`` what limits it, which needs those of all stages."""
    names = names_of(root, [stage.place for stage in scan.stages])
    for told, name in zip(stages, names, strict=True):  # before the limits, which may name another stage
        told["name"] = clean_text(name)
    for number, told in enumerate(stages):
        told["limit"] = limit_of(told, [stages[before] for before in scan.waits_for(number)])


def stage_result(
    stage: ScannedStage, counts: StageCounts, held: list[LiveClaim], states: dict[str, str]
) -> dict[str, Any]:
    """Returns one stage of the JSON value."""
    fast = speed(counts.spans)
    pending = counts.again + counts.untouched
    lively = [claim for claim in held if claim.life != "gone"]
    waiting = pending + len(held)
    eta_s = waiting / fast.shards_per_s if lively and fast.shards_per_s else None
    opt_outs = {kind: count for kind, count in counts.opt_outs.most_common() if count}
    captions = {name: count for name, count in counts.captions.most_common() if count}
    causes: dict[str, Counter[str]] = {}
    for (reason, job), number in counts.jobs.items():
        if job in states:
            causes.setdefault(reason, Counter())[states[job]] += number
    return {
        "stage": clean_text(stage.place.stage),
        "folder": str(stage.place.home),
        "planned": None if stage.planned is None else sum(map(len, stage.planned.values())),
        "done": counts.done,
        "pending": pending,
        "running": [_claim_result(claim, states) for claim in held],
        "stale": dict(counts.stale),
        "failed": dict(counts.failed.most_common()),
        "quarantined": dict(counts.quarantined.most_common()),
        "failures": [
            {
                **{name: clean_text(value) if isinstance(value, str) else value for name, value in example.items()},
                "slurm_states": [states[job] for job in example["jobs"] if job in states],
            }
            for examples in counts.examples.values()
            for example in examples
        ],
        "slurm_causes": {reason: dict(found.most_common()) for reason, found in causes.items()},
        "unreadable": counts.unreadable,
        "samples": {
            "in": counts.samples_in,
            "kept": counts.kept,
            "dropped": dict(counts.dropped.most_common()),
            "failed": dict(counts.samples_failed.most_common()),
            **({"opt_out": opt_outs} if opt_outs else {}),
            **({"captions": captions} if captions else {}),
        },
        "samples_per_s": _rounded(fast.samples_per_s),
        "samples_per_s_recent": _rounded(fast.recent),
        "recent_window_s": _rounded(fast.window_s),
        "shards_per_s_recent": None if fast.shards_per_s is None else round(fast.shards_per_s, 6),
        "phase_seconds": {clean_text(name)[:100]: round(spent, 3) for name, spent in counts.spent.most_common()},
        "gpu_seconds": round(counts.gpu_seconds, 1),
        "eta_s": _rounded(eta_s),
    }


def _claim_result(claim: LiveClaim, states: dict[str, str]) -> dict[str, Any]:
    holder = claim.holder
    job = job_of(holder.slurm)
    return {
        "shard": claim.shard_id,
        "host": holder.host,
        "pid": holder.pid,
        "rank": holder.rank,
        "job": job,
        "since": holder.since,
        "samples": claim.samples,
        "life": claim.life,
        "silent_s": round(claim.silent_s, 1),
        "lease_s": holder.lease_s,
        "deaths_before": len(holder.deaths),
        "slurm_state": states.get(job, "") if claim.life != "alive" else "",
        "trouble": f"{claim.path}: {holder.trouble}" if holder.trouble else "",
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
