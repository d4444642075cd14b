"""How an option is declared: bounds, further names and other notes in the annotation of its field; and what all stages
share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, get_type_hints

from curation.errors import UsageError


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound of a number that an option takes, in the annotation of the option's field.

    Attributes:
        must_be: What the number must be, for the error message.
        holds: Whether it is.
    """

    must_be: str
    holds: Callable[[float], bool]


def at_least(low: float) -> Bound:
    """The number is ``low`` or more."""
    return Bound(f"at least {low:g}", lambda value: value >= low)


def more_than(low: float) -> Bound:
    """The number is larger than ``low``."""
    return Bound(f"more than {low:g}", lambda value: value > low)


def less_than(high: float) -> Bound:
    """The number is smaller than ``high``."""
    return Bound(f"less than {high:g}", lambda value: value < high)


def between(low: float, high: float) -> Bound:
    """The number lies from ``low`` to ``high``; both are allowed."""
    return Bound(f"between {low:g} and {high:g}", lambda value: low <= value <= high)


FINITE = Bound("a finite number", math.isfinite)


class Mark(Enum):
    """In the annotation of an option's field: what its value is.

    Attributes:
        URLS: It may be a URL.  The values of all other options are no URLs.
        PATH: Of a ``str``: a path (``plain_path``).
        LISTED: Of a ``str``: a list (``items_in``).  So ``--ports 11434 11435`` and ``--models a, b``, which the shell
            makes several words of, are one value.
    """

    URLS = auto()
    PATH = auto()
    LISTED = auto()


URLS, PATH, LISTED = Mark.URLS, Mark.PATH, Mark.LISTED


@dataclass(frozen=True, slots=True)
class Sides:
    """In the annotation of an option's field: 1024x768 as its value stands for the values of two other options."""

    width: str
    height: str


FolderName = Annotated[str, PATH]
Files = tuple[str, ...]
"""Folders, files, globs, braces or lists: one or several, as the shell makes of ``shards/*.tar``."""
Sources = Annotated[Files, URLS]
"""The same, and URLs or commands as well."""


@dataclass(frozen=True, slots=True)
class Also:
    """In the annotation of an option's field: further names of the flag, each with its dashes."""

    names: tuple[str, ...]


def also(*names: str) -> Also:
    """Further names of a flag, such as those of a tool that the stage takes the place of."""
    return Also(names)


@dataclass(frozen=True, slots=True)
class Unless:
    """In the annotation of a required option's field: it may be left out where another option is given.

    Its value is then that of the other option; nothing, where it takes several values.
    """

    name: str


def unless(name: str) -> Unless:
    """The option may be left out where the option ``name`` is given."""
    return Unless(name)


@dataclass(frozen=True, slots=True)
class Positional:
    """In the annotation of an option's field: the value may stand without a flag, where its turn is.

    ``--help`` does not tell of the flag unless the field also has further names.

    Attributes:
        shown: What ``--help`` calls it; empty for the field's name in capitals.
    """

    shown: str = ""


POSITIONAL = Positional()


@dataclass(frozen=True, slots=True)
class Explained:
    """In the annotation of an option's field: what ``--help`` shows, where it is only known at run time.

    Attributes:
        text: What the option does; empty where the docstring says it.
        metavar: What stands in the place of a value; empty for what the type says.
    """

    text: str = ""
    metavar: str = ""


URL = re.compile(r"\s*([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_URL_AS_PATH = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # a Path of s3://bucket is s3:/bucket
_ANY_URL = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]+):/+(.*)")


def url_in(value: object) -> str:
    """The URL that an option's value is, also where it was made a Path; empty for a path of this filesystem."""
    found = _ANY_URL.fullmatch(str(value or ""))
    return "" if found is None or found[1].lower() == "file" else f"{found[1].lower()}://{found[2].strip()}"


def refuse_url(flag: str, value: object) -> None:
    """Raise UsageError if the value is a URL: written as a path, it would make a folder ``./s3:/…`` on this machine."""
    match = (_URL_AS_PATH if isinstance(value, Path) else URL).match(str(value))
    if isinstance(value, str | Path) and match:
        hint = (
            ": if a stage wrote it there, the folder that it got as --work_dir"
            if match[1] in ("s3", "gs", "hf")
            else ""
        )
        raise UsageError(
            f"{flag} {match[1]}://…: a URL, but this option needs a path on this machine's filesystem{hint}"
        )


def refuse_urls(options: object, *, besides: str = "") -> None:
    """Raise UsageError if an option is a URL, unless its annotation has ``URLS`` or its name is ``besides``."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        extras = getattr(hint, "__metadata__", ())
        if URLS not in extras and name != besides:
            value = getattr(options, name, None)
            shown = next((one.shown or name.upper() for one in extras if isinstance(one, Positional)), f"--{name}")
            for one in value if isinstance(value, tuple) else (value,):
                refuse_url(shown, one)


def check_bounds(options: object) -> None:
    """Check the numbers of a dataclass of options against the bounds in its annotations.

    A value that is no number (None, "auto") has no bounds.

    Raises:
        UsageError: Names the flag and says what its value must be.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        for bound in getattr(hint, "__metadata__", ()):
            value = getattr(options, name) if isinstance(bound, Bound) else None
            if isinstance(value, int | float) and not bound.holds(value):
                raise UsageError(f"--{name} must be {bound.must_be}")


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """Whether and where a stage's finished outputs are published, while it runs and at its end."""

    help_group: ClassVar[str] = "publish"
    overwrites_here: ClassVar[bool] = False  # whether --overwrite is about the stage's output folder too

    publish_to: Annotated[str | None, URLS] = None
    """Upload every finished shard to this folder in a store: s3://bucket/folder, gs://bucket/folder,
    hf://datasets/user/name, or a path on another filesystem.  An --output that is a URL means the same."""
    work_dir: Annotated[str | None, PATH] = None
    """With a URL as --output: the folder on this filesystem for receipts, claims and files that are not uploaded yet.
    All processes of the run must share it."""
    keep_local: Literal["all", "receipts"] | None = None
    """With --publish_to: what stays on this filesystem when an upload is proved.  Default: all; receipts where --output
    is a URL, if the stage allows that."""
    local_budget: str | None = None
    """With --publish_to: begin no shard while more than this lies here and is not uploaded, such as 500G."""
    overwrite: bool = False
    """With --publish_to: replace files in the store that were not put there from this folder."""

    def check_publishing(self, *, needed_by: str = "") -> None:
        """Check the options that are about publishing.

        needed_by: which later stages read the outputs on this filesystem, for the message; empty for none.

        Raises:
            UsageError: They do not fit together.
        """
        if self.publish_to is None:
            given = [name for name in ("work_dir", "keep_local", "local_budget") if getattr(self, name) is not None]
            if given:
                raise UsageError(f"--{given[0]} needs --publish_to, or a URL as --output")
            if self.overwrite and not self.overwrites_here:
                raise UsageError(
                    "--overwrite is about a store: it needs --publish_to, or a URL as --output; --rerun repeats shards"
                )
        if self.work_dir is not None and str(getattr(self, "output", self.work_dir)) != self.work_dir:
            raise UsageError("--work_dir is for an --output that is a URL: leave one of the two out")
        if self.keep_local == "receipts" and needed_by:
            raise UsageError(f"--keep_local receipts: {needed_by}; use --keep_local all")
        if self.local_budget is not None:
            bytes_in("--local_budget", self.local_budget)


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtTpP]?)(?:i?[bB])?\s*")


def bytes_in(flag: str, text: str) -> int:
    """The number of bytes of a size such as ``500G`` (thousands, so 500,000,000,000).

    Raises:
        UsageError: It is no size.
    """
    found = _SIZE.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{flag} {text}: write a number of bytes such as 500G, 1.5T or 20000000")
    return int(float(found[1]) * 1000 ** " kmgtp".index(found[2].lower() or " "))


@dataclass(frozen=True, kw_only=True)
class RunOptions(PublishOptions):
    """Which shards are worked on, by how many workers, and until when."""

    help_group: ClassVar[str] = "run"  # the heading under which --help lists the options of this class
    # Headings of a stage's own options in --help: an option → the heading for it and the options that follow.
    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # Flags of other tools that are spelled otherwise here: name → what to type.
    instead: ClassVar[Mapping[str, str]] = MappingProxyType({})
    example: ClassVar[str] = ""  # the words of a short command line

    shards: Annotated[str | None, LISTED] = None
    """Only these shards: ids and inclusive ranges (00000003,00000010..00000019), or a file of them."""
    rerun: bool = False
    """Repeat the selected shards, also with other options, and replace their outputs."""
    retry_failed: bool = False
    """Retry shards that failed before, up to three times.  A shard that --shards names is always tried."""
    workers: Annotated[int, at_least(1), less_than(1000)] = 1
    """Worker processes on this machine; they share the shards by claims."""
    deadline: str | None = None
    """Finish and save before this time: 30m, 1.5h, 01:30:00 from now, a date and time, or none.  Default: the end of
    the SLURM job."""
    max_error_rate: Annotated[float, between(0, 1)] = 0.2
    """A shard fails if a greater share of its samples fails."""
    quiet: bool = False
    """Only warnings and errors."""
    dry_run: bool = False
    """Only count the pending work, and check the options, models, servers and folders as the real run would."""
    lease_s: Annotated[float, at_least(1), less_than(1e6)] = 120.0
    """If a worker's heartbeat stops for this number of seconds, another worker takes its shard."""
    stall_s: Annotated[float, more_than(0)] = 1800.0
    """A worker that finishes no sample for this number of seconds counts as hung."""
    allow_pipe: bool = False
    """Run the commands of pipe: sources.  Without it they are refused."""
    follow: bool = False
    """Process shards as soon as the previous stage has published them, and end when that stage is complete."""
    follow_idle_s: Annotated[float, at_least(1)] = 900.0
    """With --follow: end with exit code 1 when the previous stage has been inactive for this number of seconds."""

    def check(self) -> None:
        """Check the values of the options and that they fit together; a stage adds its own checks.

        Raises:
            UsageError: A number is out of its bounds, or two options exclude each other.
        """
        check_bounds(self)
        if self.follow and self.follow_idle_s < self.lease_s:  # heartbeats come every quarter of a lease
            raise UsageError("--follow_idle_s must not be shorter than --lease_s: a live stage would seem dead")
        if self.follow and self.rerun and self.shards is not None:
            raise UsageError("--rerun --shards starts with a fixed list of shards: leave --follow out")
