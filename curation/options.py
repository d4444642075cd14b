"""The options that every stage shares, how the options of a stage or command are parsed and checked, and logging.

The options of a stage or a command are one frozen dataclass.  A field is a flag; the text below it is the flag's help;
bounds of a number stand in the field's annotation, as in ``num_threads: Annotated[int, at_least(1)] = 20``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import select
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints
from urllib.parse import unquote

from curation import PROGRAM
from curation.errors import EXIT_OK, EXIT_USAGE, InfrastructureError, UsageError, lack_of, redact
from curation.jsonio import clean_text

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

logger = logging.getLogger("curation")

_TRUTHS = {"true": True, "false": False}


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


@dataclass(frozen=True, slots=True)
class MayBeUrl:
    """In the annotation of an option's field: its value may be a URL.  All other options take paths of this machine."""


URLS = MayBeUrl()


@dataclass(frozen=True, slots=True)
class NamesPath:
    """In the annotation of an option's field of type ``str``: its value is a path (``plain_path``)."""


@dataclass(frozen=True, slots=True)
class IsList:
    """In the annotation of an option's field of type ``str``: its value is a list (``items_in``).

    So ``--ports 11434 11435`` and ``--models a, b``, which the shell makes several words of, are one value.
    """


PATH, LISTED = NamesPath(), IsList()
FolderName = Annotated[str, PATH]
Files = tuple[str, ...]
"""Folders, files, globs, braces or lists: one or several, as the shell makes of ``shards/*.tar``."""
Sources = Annotated[Files, URLS]
"""The same, and URLs or commands as well."""

_MAX_RANGE = 1000
_QUOTES = frozenset(('""', "''", "``", "“”", "„“", "‘’", "‚‘", "«»"))
_VARIABLE = re.compile(r"(?:^|/)\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
_URL = re.compile(r"\s*([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_URL_AS_PATH = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # a Path of s3://bucket is s3:/bucket


def refuse_url(flag: str, value: object) -> None:
    """Raise UsageError if the value is a URL: written as a path, it would make a folder ``./s3:/…`` on this machine."""
    match = (_URL_AS_PATH if isinstance(value, Path) else _URL).match(str(value))
    if isinstance(value, str | Path) and match:
        raise UsageError(f"{flag} {match[1]}://…: a URL, where a path on this machine's filesystem is wanted")


def refuse_urls(options: object) -> None:
    """Raise UsageError if an option of a dataclass is a URL, unless its annotation has ``URLS``."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if URLS not in getattr(hint, "__metadata__", ()):
            value = getattr(options, name, None)
            for one in value if isinstance(value, tuple) else (value,):
                refuse_url(f"--{name}", one)


_RANGE_SIGN = r"\s*(?:\.\.\.?|…|[-\u2013\u2014:])\s*"  # 3-7, 3..7, 3:7, 3–7
_BRACKETS = frozenset(("[]", "()", "{}"))


def unwrapped(text: str) -> str:
    """A list without brackets or quotation marks around the whole."""
    text = text.strip()
    while len(text) > 1 and text[0] + text[-1] in _QUOTES | _BRACKETS:
        text = text[1:-1].strip()
    return text


def items_in(text: str) -> list[str]:
    """The items of a list in an option's value: commas, semicolons or white space between them, outside of braces.

    Brackets and quotation marks around the whole are left out, and so are blanks around the sign of a range.
    """
    text = re.sub(rf"(\d){_RANGE_SIGN}(?=\d)", lambda found: "".join(found[0].split()), unwrapped(text))
    return [item for item in re.split(r"[\s,;]+(?![^{}]*\})", text) if item]


def range_in(item: str) -> tuple[str, str] | None:
    """The two ends of a range of numbers, both of which belong to it: ``3-7``, ``3..7``, ``3:7``; None for no range."""
    found = re.fullmatch(rf"(\d+){_RANGE_SIGN}(\d+)", item, re.ASCII)
    return (found[1], found[2]) if found else None


def numbers_in(flag: str, text: str, *, low: int, high: int, what: str, example: str) -> list[int]:
    """The different numbers of a list of numbers and ranges, in its order.

    Args:
        flag: The option, for the message.
        text: Its value.
        low: The smallest number that is allowed.
        high: The largest.
        what: What such a number is, for the message.
        example: What to write instead.

    Raises:
        UsageError: An item is no number or range, lies outside of the bounds, or a range runs backwards.
    """
    found: dict[int, None] = {}
    for item in items_in(text):
        ends = range_in(item) or (item, item)
        if not all(end.isascii() and end.isdigit() and low <= int(end[:20]) <= high for end in ends):
            raise UsageError(f"{flag}: {item!r} is not {what} ({low} to {high}); write {example}")
        first, last = map(int, ends)
        if first > last:
            raise UsageError(f"{flag}: the range {item!r} runs backwards; write {last}-{first}")
        if last - first >= _MAX_RANGE:
            raise UsageError(f"{flag}: the range {item!r} is longer than {_MAX_RANGE:,} numbers")
        found |= dict.fromkeys(range(first, last + 1))
    return list(found)


def plain_path(flag: str, text: str) -> str:
    """The path that was meant by a text that no shell has read: from quotes, a list, a YAML file or an environment.

    A file of exactly that name goes first.  Otherwise white space and quotation marks around the text are left out,
    ``~`` and ``~user`` become a home folder, and ``file:///a%20b`` becomes ``/a b``.

    Args:
        flag: Where the text comes from, for the message.
        text: A path, or a pattern of paths.

    Raises:
        UsageError: The shell did not expand a ``$VARIABLE``, there is no such user, or the file is on another machine.
    """
    if os.path.lexists(text):
        return text
    path = text.strip()
    while len(path) > 1 and path[0] + path[-1] in _QUOTES:
        path = path[1:-1].strip()
    if path.lower().startswith("file:/"):
        path = _of_file_url(flag, path)
    path = os.path.expanduser(path)
    if os.path.lexists(path):
        return path
    if len(path) > 1 and os.path.lexists(path.rstrip("/")):  # a file, and no folder
        return path.rstrip("/")
    if variable := _VARIABLE.search(path):
        raise UsageError(
            f"{flag} {path}: the shell did not put a value in place of {variable[0].lstrip('/')}, because it stands "
            'between single quotes or in a file; write the whole path, or use double quotes ("…")'
        )
    if path.startswith("~"):
        user = path[1:].partition("/")[0]
        raise UsageError(f"{flag} {path}: there is no user {user!r} here; write ./{path} if the name itself begins so")
    return path


def _of_file_url(flag: str, url: str) -> str:
    path, host = url[len("file:") :], ""
    if path.startswith("//"):
        host, _, path = path[2:].partition("/")
        path = f"/{path}"
    if host not in ("", "localhost"):
        raise UsageError(f"{flag} {url}: a file URL begins with file:/// (three slashes), or give the path alone")
    return path if os.path.lexists(path) else unquote(path)


def _with_plain_paths(options: Arguments) -> Arguments:
    """The options with the paths that were meant (``plain_path``).

    Values of type ``str`` without ``PATH`` or ``URLS`` may be no paths: only a ``~`` in front of a path is expanded.
    """
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value, marks, flag = getattr(options, name, None), getattr(hint, "__metadata__", ()), f"--{name}"
        if isinstance(value, tuple):
            found[name] = tuple(plain_source(flag, one) for one in value)
        elif isinstance(value, Path):
            found[name] = Path(plain_path(flag, str(value)))
        elif isinstance(value, str) and PATH in marks:
            found[name] = plain_path(flag, value)
        elif isinstance(value, str) and URLS not in marks and value.startswith("~") and "/" in value:
            found[name] = os.path.expanduser(value)
    return replace(options, **{name: value for name, value in found.items() if value != getattr(options, name)})  # type: ignore[type-var]


def plain_source(flag: str, text: str) -> str:
    """``plain_path`` of a text that may also be a command (``pipe:``) or a URL of another machine, which stay."""
    source = text.strip()
    if source.startswith("pipe:") or (_URL.match(source) and not source.lower().startswith("file:")):
        return source
    return plain_path(flag, text)


def _several(kind: type) -> tuple[dict[str, str], set[str]]:
    """The spellings of the options of a dataclass that take several values → the option's first spelling; and the first
    spellings of those whose value is a list."""
    found, listed = dict[str, str](), set[str]()
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        several = (get_args(hint)[0] if marks else hint) == tuple[str, ...] and not _is_positional(marks)
        if several or LISTED in marks:
            aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
            found |= dict.fromkeys((f"--{name}", *aliases), f"--{name}")
            listed |= set() if several else {f"--{name}"}
    return found, listed


_NUMBERS = re.compile(r"\d[\d.,:…\u2013-]*")


def _goes_on(value: str, word: str) -> bool:
    """Whether the next word belongs to a list: after a comma, or one more number that is no file's name."""
    if word.startswith("-"):
        return False
    both = _NUMBERS.fullmatch(value) and _NUMBERS.fullmatch(word) and not os.path.lexists(word)
    return bool(value.rstrip().endswith(",") or word.startswith(",") or both)


def _is_positional(marks: Sequence[object]) -> bool:
    import tyro

    return any(mark in marks for mark in get_args(tyro.conf.Positional[str])[1:])


def _positional_last(kind: type, words: Sequence[str]) -> list[str]:
    """Move the words in front of the first flag to the end, where a command takes several of them and then others.

    tyro gives all words in front of a flag to the first of the positional options: ``verify *.tar HYBRID --json``.
    """
    hints = get_type_hints(kind, include_extras=True).values()
    positional = [hint for hint in hints if _is_positional(getattr(hint, "__metadata__", ()))]
    if len(positional) < 2 or get_args(positional[0])[0] != tuple[str, ...]:
        return list(words)
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    return [*words[first:], *words[:first]]


def _gathered(kind: type, words: Sequence[str]) -> list[str]:
    """Put all values of an option that takes several behind its name, also where the option is given repeatedly.

    Raises:
        UsageError: Such an option has no value, or other values under another of its names.
    """
    spellings, listed = _several(kind)
    rest, gathered, others = deque(words), dict[str, dict[str, list[str]]](), list[str]()
    while rest:
        word = rest.popleft()
        flag, equals, value = word.partition("=")
        name = spellings.get(f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag)
        if name is None:
            others.append(word)
            continue
        values = [value] if equals else []
        if name in listed:
            if not equals and rest and not rest[0].startswith("--"):
                values.append(rest.popleft())
            while values and rest and _goes_on(values[-1], rest[0]):
                values.append(rest.popleft())
            others.append(f"{flag}={','.join(values)}" if values else word)
            continue
        while rest and not rest[0].startswith("-"):
            values.append(rest.popleft())
        if not any(one.strip() for one in values):
            raise UsageError(f"{flag} names nothing: perhaps a variable or a pattern of the shell was empty")
        if value.startswith("-"):
            values[0] = f"./{value}"  # a word of its own would be taken for a flag
        gathered.setdefault(name, {}).setdefault(flag, []).extend(values)
    for name, by_flag in gathered.items():
        (first, values), *more = by_flag.items()
        for flag, other in more:
            if other != values:
                raise UsageError(
                    f"{first} and {flag} with two values ({' '.join(values[:3])} and {' '.join(other[:3])}): give one "
                    "of them"
                )
        others += [name, *dict.fromkeys(values)]
    return others


def also(*names: str) -> Any:
    """Further spellings of a flag, such as those of a tool that the stage takes the place of; for ``Annotated``."""
    import tyro

    return tyro.conf.arg(aliases=names)


def _names(kind: type) -> dict[str, str]:
    """Every spelling of a dataclass's flags, written with underscores → the option's name."""
    names: dict[str, str] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
        names |= dict.fromkeys(aliases, name)
        names[f"--{name}"] = name
    return names


def given_options(kind: type, words: Sequence[str]) -> set[str]:
    """The options of a dataclass that a command line names, under whichever of their names.

    Raises:
        UsageError: An option is given two values.
    """
    names, given = _names(kind), dict[str, tuple[str, str]]()
    for word, behind in zip(words, [*words[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        name = names.get(f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag)
        if name is None:
            continue
        value = value if equals else behind
        other, before = given.setdefault(name, (flag, value))
        if value != before:
            both = f"{other} and {flag}" if other != flag else f"{flag} twice"
            raise UsageError(f"{both} with two values ({before} and {value}): give one of them")
    return set(given)


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
class RunOptions:
    """Which shards are worked on, by how many workers, and until when."""

    help_group: ClassVar[str] = "run"  # the heading under which --help lists the options of this class

    shards: Annotated[str | None, LISTED] = None
    """Only these shards: ids and inclusive ranges (00000003,00000010..00000019), or a file of them."""
    rerun: bool = False
    """Do the selected shards again, also with other options, and replace their outputs."""
    retry_failed: bool = False
    """Try shards again that failed before (up to three times; a shard named by --shards always)."""
    workers: Annotated[int, at_least(1)] = 1
    """Worker processes on this machine; they share the shards by claims."""
    deadline: str | None = None
    """Finish and save before this time: 30m, 1.5h, 01:30:00 from now, a date and time, or none.  Default: the end of
    the SLURM job."""
    max_error_rate: Annotated[float, between(0, 1)] = 0.2
    """A shard of whose samples a greater share fails is failed, not done."""
    quiet: bool = False
    """Only warnings and errors."""
    dry_run: bool = False
    """Only count what would be done, and check what the real run would: options, models, servers, folders."""
    lease_s: Annotated[float, at_least(1)] = 120.0
    """A worker whose heartbeat stops for so many seconds loses its shard to another worker."""
    stall_s: float = 1800.0
    """A worker that finishes no sample for so many seconds counts as hung."""
    allow_pipe: bool = False
    """Run the commands of pipe: sources.  Without it they are refused."""
    follow: bool = False
    """Process shards as soon as the previous stage has published them, and end when that stage is complete."""
    follow_idle_s: Annotated[float, at_least(1)] = 900.0
    """With --follow: end with exit code 1 when the previous stage has been inactive for so many seconds."""

    def check(self) -> None:
        """Check the values of the options and that they fit together; a stage adds its own checks.

        Raises:
            UsageError: A number is out of its bounds, or two options exclude each other.
        """
        check_bounds(self)
        if self.follow and self.follow_idle_s < self.lease_s:  # heartbeats come every quarter of a lease
            raise UsageError("--follow_idle_s must not be shorter than --lease_s: a live stage would seem dead")
        if self.follow and self.rerun and self.shards is not None:
            raise UsageError("--rerun --shards begins with a list of shards that is fixed: leave --follow out")


AnyOptions = TypeVar("AnyOptions", bound=RunOptions)
Arguments = TypeVar("Arguments")


def parse_options(
    kind: type[AnyOptions], argv: Sequence[str] | None = None, prog: str | None = None, *, partial: bool = False
) -> AnyOptions:
    """Parse the command line of a stage.

    ``--num_threads`` and ``--num-threads`` are the same flag.  An unknown flag or a value of the wrong type ends the
    process with exit code 2 and a message that names the nearest flags.

    Args:
        kind: The stage's dataclass of options.
        argv: The words after the program's name; None for those of this process.
        prog: The name of the program that ``--help`` shows; None for that of this process.
        partial: What is required may be left out, such as the stage's folders.  Its value is then its own name.

    Returns:
        The options, whose values are not checked yet (``RunOptions.check``).

    Raises:
        UsageError: A URL stands where a path is wanted, or an option is given two values.
    """
    words = _gathered(kind, sys.argv[1:] if argv is None else argv)
    given = given_options(kind, words)
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    left_out = [name for name in required if name not in given] if partial else []
    words = [word for name in left_out for word in (f"--{name}", name)] + words
    options = _with_plain_paths(_parse(kind, _spelled_out(kind, words), prog, _help_groups(kind)))
    refuse_urls(options)
    return options


def _parse(
    kind: type[Arguments], words: Sequence[str] | None, prog: str | None, registry: ConstructorRegistry | None = None
) -> Arguments:
    import tyro

    with registry or contextlib.nullcontext():
        return tyro.cli(
            kind,
            args=words,
            prog=prog,
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes,),
            compact_help=False,
        )


def _help_groups(kind: type[AnyOptions]) -> ConstructorRegistry:
    """Have ``--help`` list the stage's own options first, and then those of each base class as a group of their own.

    tyro puts all fields of a dataclass into one list, those of the base classes first, and makes a group only of a
    nested structure.  So the rule below presents the fields of each base with a ``help_group`` as a nested structure.
    """
    from tyro.constructors import MISSING as NO_DEFAULT
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec

    bases: list[Any] = [base for base in kind.__mro__[1:] if "help_group" in vars(base)]
    groups = [type(base.help_group, (), {"__doc__": base.__doc__}) for base in bases]
    group_of = {field.name: group for group, base in zip(groups, bases, strict=True) for field in fields(base)}
    members: dict[type, list[StructFieldSpec]] = {}
    asking = False

    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if info.type in members:
            return StructConstructorSpec(dict, tuple(members[info.type]))
        if info.type is not kind or asking:
            return None
        asking = True  # what would tyro make of it without this rule?
        whole = ConstructorRegistry.get_struct_spec(info)
        asking = False
        assert isinstance(whole, StructConstructorSpec)
        members.update({group: [] for group in groups})
        own: list[StructFieldSpec] = []
        for field in whole.fields:
            (members[group_of[field.name]] if field.name in group_of else own).append(field)
        nested = [StructFieldSpec(group.__name__, group, NO_DEFAULT) for group in groups]
        return StructConstructorSpec(build, (*own, *nested))

    def build(**values: Any) -> AnyOptions:
        shared = [values.pop(group.__name__) for group in groups]
        return kind(**values, **{name: value for members_of in shared for name, value in members_of.items()})

    build.__doc__ = kind.__doc__  # the description in --help
    registry = ConstructorRegistry()
    registry.struct_rule(rule)
    return registry


def _spelled_out(kind: type[AnyOptions], words: Sequence[str]) -> list[str]:
    """Spell every switch as tyro parses it, because the tools that the stages replace take different spellings.

    ``--switch``, ``--switch=True`` and ``--switch True`` mean the same, and so do ``--no_switch``, ``--switch=False``
    and ``--switch False``.  tyro takes a word alone for ``bool``, and a value for ``bool | None`` (None: the flag is
    not given, and another source decides).
    """
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
    """Removes secrets, and control characters, because names and captions from the web reach the log.

    Each further line of a message is indented, so that it cannot look like a message.
    """

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = redact(super().format(record)).splitlines() or [""]
        indents = [len(line) - len(line.lstrip(" ")) for line in rest]
        return "\n".join(
            [clean_text(first), *(" " * (4 + n) + clean_text(x) for n, x in zip(indents, rest, strict=True))]
        )


def set_up_logging(quiet: bool, name: str = "") -> None:
    """Log to stderr: a line has the time, the name of the worker where there are several, and the message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_CleanFormatter(f"%(asctime)s {name + ' ' if name else ''}%(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class Main(Protocol):
    """A script's or a command's ``main``.  argv: None for this process's own arguments."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exit_code(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Decorate a ``main(argv)``: an infrastructure error becomes one clear line on stderr and exit code 2, and so does
    an error that says that this machine lacks a package, or memory, threads or room."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        _hide_secrets_of_tracebacks()
        try:
            code = main(argv)
            sys.stdout.flush()
        except InfrastructureError as error:
            lack = lack_of(error)
            say_error(error if lack is None or "pip install" in str(error) else f"{error}: {lack}")
            return EXIT_USAGE
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            return EXIT_OK
        except (ImportError, MemoryError, RuntimeError, OSError) as error:
            if (lack := lack_of(error)) is None:
                raise
            say_error(lack)
            return EXIT_USAGE
        return code

    return guarded


def _hide_secrets_of_tracebacks() -> None:
    """Unless somebody else, such as a debugger, prints them."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say_traceback
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda caught: _say_traceback(
            caught.exc_type, caught.exc_value or caught.exc_type(), caught.exc_traceback
        )


def _say_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """What Python says of an error that nobody expected, without secrets.  It ends the process as Python would."""
    if error is not None and not issubclass(kind, SystemExit):
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _reader_is_gone() -> bool:
    """Whether stdout's reader is gone, as ``head`` is after its lines; further output is then thrown away."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def say_error(text: Any) -> None:
    """The one clear line that an infrastructure error ends with."""
    print(f"error: {clean_text(redact(str(text)))}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal that bars may be drawn on."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None, command: str) -> Arguments:
    """Parse the command line of ``curation <command>``; check the bounds of its numbers, and its paths.

    An unknown flag or a value of the wrong type ends the process with exit code 2.

    Args:
        kind: The command's dataclass of options.
        argv: The words after the command's name; None for all words of this process.
        command: The command's name.

    Raises:
        UsageError: A number is out of its bounds, or a URL stands where a path is wanted.
    """
    words = _gathered(kind, _positional_last(kind, sys.argv[1:] if argv is None else argv))
    options = _with_plain_paths(_parse(kind, words, f"{PROGRAM} {command}"))
    check_bounds(options)
    refuse_urls(options)
    return options
