"""``curation run pipeline.yaml`` runs the stages of a pipeline's file, one after the other.

The whole file is checked before the first stage starts.  Each stage is a process of its own: the numbered script, run
by this interpreter.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

from curation import PROGRAM
from curation.cluster import parse_deadline
from curation.commands.pipeline.check import NOT_SHARED, StageCommand, commands
from curation.commands.pipeline.file import Value, choose, read_pipeline
from curation.errors import EXIT_DEVICE_FAILED, EXIT_OK, EXIT_SHARDS_FAILED, EXIT_USAGE, EXIT_WORK_LEFT
from curation.options import (
    LISTED,
    POSITIONAL,
    RunOptions,
    at_least,
    between,
    exit_code,
    less_than,
    more_than,
    parse_arguments,
    say_error,
)

_SETTING = re.compile(r"(?!-)[A-Za-z0-9_/ -]*[A-Za-z0-9_]+(\.[A-Za-z_][\w-]*)?=", re.ASCII)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_MEANS = {
    EXIT_SHARDS_FAILED: "some shards failed or are blocked",
    EXIT_USAGE: "the error above says why",
    EXIT_DEVICE_FAILED: "its device has failed, and work is left",
    EXIT_WORK_LEFT: "it was asked to stop, and work is left",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the stages of a pipeline's file, one after the other.  Run it again to go on where it stopped."""

    file: Annotated[Path, POSITIONAL]
    """The pipeline, such as examples/pipeline.yaml.  ROOT=/path and 03.model=name after it mean the same as --set."""
    set: tuple[str, ...] = ()
    """Values that replace those of the file: ROOT=/path for a variable, 03.model=name for a stage's option."""
    stages: str | None = None
    """Run only these stages of the file, such as 01-03 or 01,03."""
    dry_run: bool = False
    """Check the whole file and print the commands; start nothing."""
    shards: Annotated[str | None, LISTED] = None
    """For every stage: only these shards."""
    workers: Annotated[int | None, at_least(1), less_than(1000)] = None
    """For every stage: worker processes on this machine."""
    deadline: str | None = None
    """For all stages together: finish and save before this time, such as 30m from now."""
    rerun: bool = False
    """For every stage: repeat the selected shards, also with other options."""
    retry_failed: bool = False
    """For every stage: retry shards that failed before."""
    max_error_rate: Annotated[float | None, between(0, 1)] = None
    """For every stage: a shard fails if a greater share of its samples fails."""
    lease_s: Annotated[float | None, at_least(1), less_than(1e6)] = None
    """For every stage: if a worker's heartbeat stops for this number of seconds, another worker takes its shard."""
    stall_s: Annotated[float | None, more_than(0)] = None
    """For every stage: a worker that finishes no sample for this number of seconds counts as hung."""
    allow_pipe: bool = False
    """For every stage: run the commands of pipe: sources."""
    quiet: bool = False
    """For every stage: only warnings and errors."""

    def shared(self) -> dict[str, Value]:
        """The options that every stage gets, where they are given."""
        shared: dict[str, Value] = {}
        for item in fields(RunOptions):
            value = None if item.name in NOT_SHARED else getattr(self, item.name)
            if value is not None and value is not False:
                shared[item.name] = "true" if value is True else str(value)
        if self.deadline is not None:  # it counts from now, and not from the start of each stage
            shared["deadline"] = _fixed(self.deadline)
        return shared


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    words = gathered(sys.argv[1:] if argv is None else argv)
    options = parse_arguments(Options, words, "run")
    pipeline = read_pipeline(options.file, options.set)
    if pipeline.shared.get("deadline") is not None:
        pipeline.shared["deadline"] = _fixed(str(pipeline.shared["deadline"]))
    found = commands(pipeline, choose(pipeline, options.stages), options.shared())
    for note in pipeline.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.dry_run:
        for command in found:
            print(f"# {command.script.stem}\n{command.shown}")
        print(f"{options.file}: {_stages(len(found))} checked; nothing was started", flush=True)
        return EXIT_OK
    return _Run(options.file, found).go()


def gathered(words: Sequence[str]) -> list[str]:
    """The command line with all settings behind one ``--set``.

    ``--set A=1 --set B=2``, ``--set A=1 B=2`` and ``A=1 B=2`` mean the same.
    """
    settings: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--set" and rest:
            settings.append(rest.pop(0))
        elif word.startswith("--set="):
            settings.append(word.removeprefix("--set="))
        elif _SETTING.match(word) and not Path(word).is_file():
            settings.append(word)
        else:
            others.append(word)
    return [*others, "--set", *settings] if settings else others


def _fixed(deadline: str) -> str:
    """A deadline that does not move when another process reads it."""
    end = parse_deadline(deadline)
    return "none" if end is None else datetime.fromtimestamp(end).isoformat(timespec="seconds")


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"


class _Run:
    """Runs the stages, and passes signals on to the one that runs."""

    def __init__(self, file: Path, stages: Sequence[StageCommand]) -> None:
        self._file = file
        self._stages = stages
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None  # the last signal

    def go(self) -> int:
        """Returns 0, or the exit code of the first stage that did not end with 0."""
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)
        began = time.monotonic()
        for index, stage in enumerate(self._stages):
            if self._asked is not None:
                return self._stopped(EXIT_WORK_LEFT, self._stages[index - 1], "it was asked to stop", index)
            print(f"\n[{index + 1}/{len(self._stages)}] {stage.script.stem}\n$ {stage.shown}", flush=True)
            code = self._run(stage)
            if code != EXIT_OK:
                why = _MEANS.get(code, f"killed by signal {code - 128}" if code > 128 else "it did not end well")
                why = f"stage {stage.title} ended with exit code {code}: {why}"
                return self._stopped(code, stage, why, index + 1)
        print(f"\n{self._file}: {_stages(len(self._stages))} done in {time.monotonic() - began:,.0f} s", flush=True)
        return EXIT_OK

    def _run(self, stage: StageCommand) -> int:
        # In a session of its own, so that a terminal's Ctrl-C reaches it only once, through this process.
        self._process = subprocess.Popen(stage.command, start_new_session=True)
        if self._asked is not None:  # a signal came meanwhile
            self._process.send_signal(self._asked)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code  # killed by a signal, as a shell says it

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _stopped(self, code: int, last: StageCommand, why: str, done: int) -> int:
        """Say why the run ends here.  last: the stage that ran last.  done: how many were started."""
        left = ",".join(stage.title for stage in self._stages[done:])
        advice = "run the same command again to continue: finished work is not repeated"
        if code == EXIT_SHARDS_FAILED:
            advice = f"`{PROGRAM} status {getattr(last.options, 'output', '')}` names the shards; --retry_failed tries "
            advice += f"them again, and --stages {left} continues without them" if left else "them again"
        say_error(f"{self._file}: {why}{f'; not started: {left}' if left else ''}; {advice}")
        return code
