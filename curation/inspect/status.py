"""``python -m curation status ROOT``: how far every stage below a folder is, from receipts, plans and claims alone.

It writes nothing, needs no SLURM, and trusts no other node's clock: whether a worker lives is seen from its heartbeat.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import tyro

from curation.errors import EXIT_OK, UsageError
from curation.inspect.counts import Counts, job_of, speed
from curation.inspect.holdings import Holding, Holdings
from curation.inspect.places import find_stages
from curation.inspect.show import as_lines, print_tables
from curation.inspect.slurm_causes import slurm_states
from curation.inspect.survey import Stage, Survey
from curation.jsonio import clean_text
from curation.options import exit_code, parse_arguments

STATUS_FORMAT = 1
_MOMENT_S = 1.0  # between the two looks at a heartbeat, at least
_WATCH_S = "10"
_SHARE_OF_READING = 3.0  # --watch rests at least so many times as long as it reads


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show how far the stages below a folder are."""

    root: Annotated[Path, tyro.conf.Positional]
    """The folder of the dataset: stages whose receipts lie in it or in a folder in it are found."""
    watch: float | None = None
    """Show it again every so many seconds (10 where no number is given), until interrupted."""
    json: bool = False
    """One JSON object on one line instead of tables."""
    look_s: float = _MOMENT_S
    """Look at heartbeats for so many seconds before saying who is alive: a worker beats four times a lease."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, _with_seconds(sys.argv[2:] if argv is None else argv), "status")
    if options.watch is not None and options.watch <= 0:
        raise UsageError("--watch takes a positive number of seconds")
    holdings = Holdings([])
    first = True
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            began = time.monotonic()
            places = find_stages(options.root)
            holdings.follow(places)
            result = _look(options.root, Survey(places), holdings, options.look_s if first else 0.0)
            _show(result, options)
            if options.watch is None:
                break
            first = False
            time.sleep(max(options.watch, _SHARE_OF_READING * (time.monotonic() - began)))
    return EXIT_OK


def _with_seconds(argv: Sequence[str]) -> list[str]:
    """``--watch`` may stand without its seconds."""
    words = list(argv)
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if word == "--watch" and not following.replace(".", "", 1).isdigit():
            return [*words[:place], "--watch", _WATCH_S, *words[place + 1 :]]
    return words


def _show(result: dict[str, Any], options: Options) -> None:
    if options.json:
        print(orjson.dumps(result).decode(), flush=True)
    elif sys.stdout.isatty():
        print_tables(result, clear=options.watch is not None)
    else:
        print("\n".join(as_lines(result)), flush=True)


def _look(root: Path, survey: Survey, holdings: Holdings, look_s: float) -> dict[str, Any]:
    """Everything that is shown, as one JSON value; docs/status.md describes it."""
    began = time.monotonic()
    for stage, held in zip(survey.stages, holdings.look(), strict=True):
        stage.claimed = {holding.shard_id for holding in held}
    totals = survey.read(Counts)
    if any(stage.claimed for stage in survey.stages):
        left_s = look_s - (time.monotonic() - began)
        if left_s > 0 and any(holding.life == "unknown" for held in holdings.look() for holding in held):
            time.sleep(left_s)
    held_now = holdings.look()
    jobs = {job for counts in totals for _, job in counts.jobs}
    states = slurm_states(jobs | {job_of(h.holder.slurm) for held in held_now for h in held if h.life != "alive"})
    stages = [
        stage_result(stage, counts, held, states)
        for stage, counts, held in zip(survey.stages, totals, held_now, strict=True)
    ]
    return {
        "format": STATUS_FORMAT,
        "root": str(root),
        "seconds": round(time.monotonic() - began, 3),
        "slurm_answered": bool(states),
        "stages": stages,
        "warnings": [clean_text(warning) for warning in survey.warnings],
    }


def stage_result(stage: Stage, counts: Counts, held: list[Holding], states: dict[str, str]) -> dict[str, Any]:
    """One stage of the JSON value."""
    fast = speed(counts.spans)
    pending = counts.again + counts.untouched
    lively = [holding for holding in held if holding.life != "gone"]
    waiting = pending + len(held)
    eta_s = waiting / fast.shards_per_s if lively and fast.shards_per_s else None
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
        "running": [_holding_result(holding, states) for holding in held],
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
        },
        "samples_per_s": _rounded(fast.samples_per_s),
        "samples_per_s_recent": _rounded(fast.recent),
        "recent_window_s": _rounded(fast.window_s),
        "gpu_seconds": round(counts.gpu_seconds, 1),
        "eta_s": _rounded(eta_s),
    }


def _holding_result(holding: Holding, states: dict[str, str]) -> dict[str, Any]:
    holder = holding.holder
    job = job_of(holder.slurm)
    return {
        "shard": holding.shard_id,
        "host": holder.host,
        "pid": holder.pid,
        "rank": holder.rank,
        "job": job,
        "since": holder.since,
        "samples": holding.samples,
        "life": holding.life,
        "silent_s": round(holding.silent_s, 1),
        "lease_s": holder.lease_s,
        "deaths_before": len(holder.deaths),
        "slurm_state": states.get(job, "") if holding.life != "alive" else "",
        "trouble": f"{holding.path}: {holder.trouble}" if holder.trouble else "",
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
