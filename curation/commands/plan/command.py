"""``curation plan SOURCE ROOT`` estimates the cost of the whole dataset from finished shards.

Every figure comes from receipts.  With ``--sample``, stages 01 to 04 are first run on a few shards, whose outputs are
kept.  Nothing else is started or written.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson

from curation import PROGRAM, PROJECT
from curation.commands.places import find_stages, homes_below
from curation.commands.plan.cost import Estimate, ShardSizes, StageCost, evenly, sizes_of, stage_cost
from curation.commands.plan.site import JobShape, Quota, array_commands, job_shape, max_array_size, quotas
from curation.commands.plan.write import write_pipeline
from curation.errors import EXIT_OK, EXIT_SHARDS_FAILED, InfrastructureError, UsageError
from curation.jsonio import clean_text
from curation.options import LISTED, POSITIONAL, Sources, exit_code, items_in, parse_arguments
from curation.shards import Shard, as_one_text, discover, select

PLAN_FORMAT = 1
FEW = 3  # with fewer measured shards, a forecast is not reliable
DAY_H = 24.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Estimate hours, bytes, files and tokens for all shards from finished shards, and print the sbatch commands."""

    source: Annotated[Sources, POSITIONAL]
    """The source shards, all of them: a folder, a glob, braces or a list file."""
    root: Annotated[Path, POSITIONAL]
    """The folder of the dataset, with the outputs of stages that have run on some of the shards."""
    shards: Annotated[str | None, LISTED] = None
    """Forecast only for these shards: ids, ranges, files of ids."""
    sample: int = 0
    """First run stages 01 to 04 on this number of shards, distributed over all.  FLAGS_01 … FLAGS_04, PORTS and so on
    are read from the environment, as in run_pipeline.sh.  Run it on a machine with the devices of the real run."""
    tasks: str | None = None
    """Number of simultaneous workers: one number, or one for each stage, as in 01=64,03=32.  Default: as many as
    --within needs."""
    within: float = DAY_H
    """Hours in which each stage should end, if --tasks does not name it."""
    max_array_size: int | None = None
    """The site's MaxArraySize.  Default: scontrol's, else SLURM's own 1001."""
    write: Path | None = None
    """Also write this file, with which `curation run` runs stages 01 to 04 as planned."""
    json: bool = False
    """One JSON object on one line instead of text."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "plan")
    if options.sample < 0 or options.within <= 0:
        raise UsageError("--sample must not be negative, and --within must be above 0")
    tasks = parse_tasks(options.tasks)
    shards = select(discover(options.source, begun=homes_below(options.root)), options.shards)
    code = EXIT_OK
    if options.write is not None:
        write_pipeline(options.write, options.source, options.root, options.shards)
        print(f"wrote {options.write}: `{PROGRAM} run {options.write}` runs stages 01 to 04", file=sys.stderr)
        if not options.sample and not any(options.root.glob("**/_receipts")):
            print(
                f"no forecast: no stage has run in {options.root}; --sample 3 runs them on three shards",
                file=sys.stderr,
            )
            return code
    if options.sample:
        code = run_sample(options.source, options.root, [shard.id for shard in evenly(shards, options.sample)])
    result = forecast(shards, options.root, options, tasks)
    print(orjson.dumps(result).decode() if options.json else "\n".join(as_lines(result)), flush=True)
    return code


def parse_tasks(text: str | None) -> dict[str, int]:
    """``64`` → {"": 64}; ``01=64,03=8`` → by the first digits of the stage's name.  Raises UsageError."""
    found: dict[str, int] = {}
    for word in items_in(text or ""):
        stage, equals, number = word.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or bool(equals) != bool(stage) or stage in found:
            raise UsageError(f"--tasks {text}: write one number, or 01=64,03=8")
        found[stage] = int(number)
    if "" in found and len(found) > 1:
        raise UsageError(f"--tasks {text}: write one number for all stages, or one for each, as in 01=64,03=8")
    return found


def run_sample(source: Sequence[str], root: Path, ids: Sequence[str]) -> int:
    """Stages 01 to 04 on these shards, here.  Returns 0, or 1 where some of them failed."""
    script = PROJECT / "run_pipeline.sh"
    if not script.is_file():
        raise UsageError("--sample needs run_pipeline.sh: run it from a checkout of the project")
    places = {"SRC_DIR": as_one_text(source), "ROOT": str(root), "CURATION_HOME": str(PROJECT)}
    environment = {"PYTHON": sys.executable, **os.environ, **places}
    command = ["bash", str(script), "--here", "--", "--shards", ",".join(ids)]
    # what the stages print is not the forecast
    code = subprocess.run(command, env=environment, stdout=2, check=False).returncode
    if code not in (EXIT_OK, EXIT_SHARDS_FAILED):
        raise InfrastructureError(
            f"the sample did not complete (exit code {code}): see the errors above, then start again"
        )
    return code


def forecast(shards: Sequence[Shard], root: Path, options: Options, tasks: Mapping[str, int]) -> dict[str, Any]:
    """Everything that is shown, as one JSON value; docs/plan.md describes it."""
    try:
        places = find_stages(root)
    except UsageError as error:
        raise UsageError(f"{error}; run the stages on a few shards with --sample 3") from None
    sizes = sizes_of(shards)
    costs = [cost for place in places if (cost := stage_cost(place, shards, sizes)) is not None]
    if not costs:
        raise UsageError(f"{root}: no stage has finished any of these shards; run the stages on a few with --sample 3")
    limit = options.max_array_size or max_array_size()
    stages = [_stage_result(cost, options, tasks, limit) for cost in costs]
    to_come = [sum((cost.to_come[name] for cost in costs), Estimate(0.0)) for name in ("bytes", "files")]
    found = quotas(root)
    return {
        "format": PLAN_FORMAT,
        "source": as_one_text(options.source),
        "root": str(root),
        "shards": len(shards),
        "source_bytes": round(sizes.total),
        "stages": stages,
        "bytes_to_come": _as_json(to_come[0]),
        "files_to_come": _as_json(to_come[1]),
        "rooms": [{"what": room.what, "bytes_left": room.bytes_left, "files_left": room.files_left} for room in found],
        "warnings": [*_warnings(costs, sizes), *_room_warnings(found, *to_come)],
    }


def _stage_result(cost: StageCost, options: Options, tasks: Mapping[str, int], limit: int) -> dict[str, Any]:
    workers = _workers(cost, tasks, options.within)
    shape = job_shape(PROJECT / f"{cost.stage}.sh")
    per_hour = 1 / 3600
    worker_h = cost.whole("worker_s").times(per_hour)
    return {
        "stage": clean_text(cost.stage),
        "folder": str(cost.place.home),
        "measured": len(cost.shards),
        "done": cost.done,
        "left": cost.left,
        "samples": _as_json(cost.whole("samples")),
        "worker_hours": _as_json(worker_h),
        "cpu_hours": _as_json(worker_h.times(cost.cpus)),
        "gpu_hours": _as_json(worker_h.times(cost.gpus)),
        "worker_hours_to_come": _as_json(cost.to_come["worker_s"].times(per_hour)),
        "bytes": _as_json(cost.whole("bytes")),
        "files": _as_json(cost.whole("files")),
        "tokens_read": _as_json(cost.whole("tokens_read")),
        "tokens_written": _as_json(cost.whole("tokens_written")),
        "cpus_per_worker": round(cost.cpus, 2),
        "open_s": round(cost.open_s, 1),
        "tasks": workers,
        "wall_clock_s": _as_json(wall_clock(cost, workers)),
        "sbatch": _commands(cost, shape, workers, limit, options),
    }


def _workers(cost: StageCost, tasks: Mapping[str, int], within_h: float) -> int:
    """How many at once; never more than there are shards to do."""
    named = next((number for stage, number in tasks.items() if stage and cost.stage.startswith(stage)), tasks.get(""))
    most = max(1, cost.left)
    if named is not None:
        return min(named, most)
    seconds = within_h * 3600 - cost.open_s - _mean_s(cost)  # the last shard ends a little late
    needed = cost.to_come["worker_s"].value / seconds if seconds > 0 else math.inf
    return min(most, max(1, math.ceil(min(needed, most))))


def wall_clock(cost: StageCost, workers: int) -> Estimate:
    """Seconds until the last worker ends, where all begin at once: getting ready, an equal share of the work, and on
    average half a shard that the last of them is still at when the others have nothing left."""
    if not cost.left:
        return Estimate(0.0)
    share = cost.to_come["worker_s"].times(1 / workers)
    tail_s = _mean_s(cost) / 2 if workers > 1 else 0.0
    whole = Estimate(cost.open_s + tail_s) + share
    return whole if whole.value > cost.open_s + _mean_s(cost) else Estimate(cost.open_s + _mean_s(cost), whole.error)


def _mean_s(cost: StageCost) -> float:
    return sum(cost.measured["worker_s"]) / len(cost.shards)


def _commands(cost: StageCost, shape: JobShape | None, workers: int, limit: int, options: Options) -> list[str]:
    if shape is None or not cost.left:
        return []
    variables = {"ROOT": str(options.root.absolute())}
    if cost.reads_source:
        variables["SRC_DIR"] = as_one_text(
            [str(Path(source).absolute()) if Path(source).exists() else source for source in options.source]
        )
    flags = os.environ.get(f"FLAGS_{cost.stage[:2]}", "").split()
    if options.shards is not None:
        flags += ["--shards", options.shards]
    elements = math.ceil(workers / shape.tasks)
    return array_commands(shape, variables, elements, limit, flags)


def _warnings(costs: Sequence[StageCost], sizes: ShardSizes) -> Iterator[str]:
    if len(sizes.known) < sizes.count:
        yield f"{sizes.count - len(sizes.known):,} source shards are assumed to have the average size of the others"
    for cost in costs:
        name = clean_text(cost.stage)
        if len(cost.shards) < FEW:
            yield f"{name}: {len(cost.shards)} measured shards are too few; measure {FEW} or more (--sample {FEW})"
        shape = job_shape(PROJECT / f"{cost.stage}.sh")
        if shape is not None and shape.cpus and round(cost.cpus) != shape.cpus:
            yield (
                f"{name}: was measured with {cost.cpus:g} CPUs per worker, but its .sh requests {shape.cpus}: the "
                "time will differ"
            )
        if shape is not None and shape.gpus and not cost.gpus:
            yield f"{name}: was measured without a GPU, but its .sh requests GPUs: measure it on a machine with GPUs"


def _room_warnings(found: Sequence[Quota], bytes_: Estimate, files: Estimate) -> Iterator[str]:
    for room in found:
        for left, need, what in ((room.bytes_left, bytes_, "bytes"), (room.files_left, files, "files")):
            most = need.value + (need.error or 0)
            if left is not None and most > left:
                yield f"{room.what} has room for {left:,} more {what}, and up to {most:,.0f} are to come"


def _as_json(estimate: Estimate) -> dict[str, float | None]:
    value, error = float(f"{estimate.value:.9g}"), estimate.error
    return {"value": value, "error": None if error is None else float(f"{error:.9g}")}


# ---- as text


def as_lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{result['shards']:,} source shards, {_bytes(result['source_bytes'])}; every figure is for all of them, "
        "± is the 95 % interval"
    )
    for stage in result["stages"]:
        yield ""
        yield f"{stage['stage']}: {stage['done']:,} done, {stage['left']:,} to do, {stage['measured']:,} measured"
        yield f"  CPU-hours    {_plain(stage['cpu_hours'])}   ({stage['cpus_per_worker']:g} CPUs a worker)"
        if stage["gpu_hours"]["value"]:
            yield f"  GPU-hours    {_plain(stage['gpu_hours'])}"
        yield f"  writes       {_plain(stage['bytes'], _bytes)} in {_plain(stage['files'], _whole)} files"
        if stage["tokens_read"]["value"] or stage["tokens_written"]["value"]:
            read, written = (_plain(stage[f"tokens_{what}"], _whole) for what in ("read", "written"))
            yield f"  tokens       {read} read, {written} written"
        if stage["left"]:
            noun = "worker" if stage["tasks"] == 1 else "workers"
            yield f"  wall-clock   {_plain(stage['wall_clock_s'], _time)} with {stage['tasks']:,} {noun}"
        for command in stage["sbatch"]:
            yield f"  {command}"
    yield ""
    yield f"to come: {_plain(result['bytes_to_come'], _bytes)}, {_plain(result['files_to_come'], _whole)} files"
    for room in result["rooms"]:
        bytes_left = "no limit" if room["bytes_left"] is None else _bytes(room["bytes_left"])
        files_left = "no limit" if room["files_left"] is None else f"{room['files_left']:,}"
        yield f"left on {room['what']}: {bytes_left}, files: {files_left}"
    for warning in result["warnings"]:
        yield f"warning: {warning}"


def _plain(estimate: Mapping[str, float], show: Callable[[float], str] | None = None) -> str:
    show, error = show or _decimal, estimate["error"]
    return f"{show(estimate['value'])} ± {'?' if error is None else show(error)}"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _decimal(number: float) -> str:
    return f"{number:.2g}" if number < 1 else f"{number:,.2f}" if number < 100 else f"{number:,.0f}"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:,.3g} {unit}" if unit != "B" else f"{number:,.0f} B"
        number /= 1000
    return f"{number:,.3g} PB"


def _time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1.5:
        return f"{seconds:,.0f} s"
    return f"{minutes:,.0f} min" if hours < 1.5 else f"{hours:,.1f} h"
