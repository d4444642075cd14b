"""Flags that every stage shares, parsing of a stage's own, and logging.

Flags of the commands, from a dataclass each, as the stages have theirs.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Protocol, TypeVar, get_args, get_type_hints

from curation.errors import EXIT_OK, EXIT_USAGE, InfrastructureError, UsageError
from curation.jsonio import clean_text

logger = logging.getLogger("curation")

_TRUTHS = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Which shards, how many workers, until when."""

    shards: str | None = None
    """Only these shards: ids and inclusive ranges (00000003,00000010..00000019), or a file of them."""
    rerun: bool = False
    """Do the selected shards again, with other options if need be, and replace what is there."""
    retry_failed: bool = False
    """Try shards again that failed before (up to three times; a shard named by --shards always)."""
    workers: int = 1
    """Worker processes on this machine; they share the shards by claims."""
    deadline: str | None = None
    """Finish and save before this time: 30m, 1.5h, 01:30:00 from now, a date and time, or none.  Default: the end of
    the SLURM job."""
    max_error_rate: float = 0.2
    """A shard of whose samples a greater share fails is failed, not done."""
    quiet: bool = False
    """Only warnings and errors."""
    dry_run: bool = False
    """Count what would be done, and do nothing."""
    lease_s: float = 120.0
    """A worker that shows no life for so many seconds loses its shard to another."""
    stall_s: float = 1800.0
    """A worker that finishes no sample for so many seconds counts as hung."""
    allow_pipe: bool = False
    """Run the commands of pipe: sources.  Without it they are refused."""
    follow: bool = False
    """Work on shards as soon as the stage before has published them, and end when that stage is complete."""
    follow_idle_s: float = 900.0
    """With --follow: end with exit code 1 when the stage before has shown no life for so many seconds."""

    def check(self) -> None:
        """Raise UsageError for values that make no sense."""
        if self.workers < 1:
            raise UsageError("--workers must be at least 1")
        if not 0 <= self.max_error_rate <= 1:
            raise UsageError("--max_error_rate is a share between 0 and 1")
        if self.lease_s < 1:
            raise UsageError("--lease_s must be at least 1 second")
        if not self.follow_idle_s >= 1:
            raise UsageError("--follow_idle_s must be at least 1 second")
        if self.follow and self.follow_idle_s < self.lease_s:  # heartbeats come every quarter of a lease
            raise UsageError("--follow_idle_s must not be shorter than --lease_s: a live stage would seem dead")
        if self.follow and self.rerun and self.shards is not None:
            raise UsageError("--rerun --shards begins with a list of shards that is fixed: leave --follow out")


AnyOptions = TypeVar("AnyOptions", bound=RunOptions)


def parse_options(kind: type[AnyOptions], argv: Sequence[str] | None = None, prog: str | None = None) -> AnyOptions:
    """The stage's options from the command line; ``--num_threads`` and ``--num-threads`` are alike.

    Ends the process with exit code 2 on an unknown flag or a value of the wrong type, naming the nearest flags.
    """
    import tyro

    words = _spelled_out(kind, sys.argv[1:] if argv is None else argv)
    return tyro.cli(
        kind,
        args=words,
        prog=prog,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
        compact_help=False,
    )


def _spelled_out(kind: type[AnyOptions], words: Sequence[str]) -> list[str]:
    """``--switch``, ``--no_switch``, ``--switch=True`` and ``--switch True`` mean the same for every switch, as the
    tools that the stages stand for take one or the other; each becomes the one that its field is parsed from: a word
    alone for ``bool``, a value for ``bool | None``, where a switch that is not given leaves another source its say."""
    hints = get_type_hints(kind)
    optional = {name: bool in (kinds := get_args(hint)) and NoneType in kinds for name, hint in hints.items()}
    switches = {name for name, hint in hints.items() if hint is bool or optional[name]}
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        negated = name not in switches and name.startswith("no_")
        name = name.removeprefix("no_") if negated else name
        if name not in switches:
            found.append(word)
            continue
        if not equals and not negated and rest and rest[0].lower() in _TRUTHS:
            value = rest.pop(0)
        if value.lower() not in ("", *_TRUTHS):
            raise UsageError(f"{flag}: wants True or False, not {value!r}")
        on = _TRUTHS.get(value.lower(), True) is not negated
        found.append(f"--{name}={on}" if optional[name] else f"--{'' if on else 'no_'}{name}")
    return found


class _CleanFormatter(logging.Formatter):
    """Names and captions from the web reach the log: without control characters, each line after a message's first
    indented, so that none passes for a message of its own."""

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = super().format(record).splitlines() or [""]
        indents = [len(line) - len(line.lstrip(" ")) for line in rest]
        return "\n".join(
            [clean_text(first), *(" " * (4 + n) + clean_text(x) for n, x in zip(indents, rest, strict=True))]
        )


def set_up_logging(quiet: bool, name: str = "") -> None:
    """Lines on stderr with the time, the level where it is not plain information, and the worker's name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_CleanFormatter(f"%(asctime)s {name + ' ' if name else ''}%(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class Main(Protocol):
    """A script's or a command's ``main``.  argv: None for this process's own arguments."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exit_code(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Decorates a script's ``main(argv)``: an infrastructure error becomes one clear line on stderr and exit code 2."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
        except InfrastructureError as error:
            say_error(error)
            return EXIT_USAGE
        except BrokenPipeError:
            if not _nobody_reads_on():
                raise
            return EXIT_OK
        return code

    return guarded


def _nobody_reads_on() -> bool:
    """Whether stdout's reader is gone, as ``head`` is after its lines; what is still to be written goes nowhere."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def say_error(text: Any) -> None:
    """The one clear line that an infrastructure error ends with."""
    print(f"error: {clean_text(str(text))}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal that bars may be drawn on."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


Arguments = TypeVar("Arguments")


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None, command: str) -> Arguments:
    """The command's options.  Ends the process with exit code 2 on an unknown flag or a value of the wrong type."""
    import tyro

    return tyro.cli(
        kind,
        args=None if argv is None else list(argv),
        prog=f"python -m curation {command}",
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
        compact_help=False,
    )
