"""What to type instead: the messages for a command line that makes no sense."""

from __future__ import annotations

import ast
import difflib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields
from pathlib import Path

from curation import PROJECT
from curation.options.declare import RunOptions
from curation.options.flags import Flag, Names, flags_of, texts_of

_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"  # what looks like a hyphen, the hyphen first
_NEAR = 0.65  # of difflib's ratio, from 0 to 1
_MOST = 3  # proposals
_SOURCES = ("input", "input_dir", "input_tars", "data", "data_path", "data_dir")  # what stages read


class Advice:
    """Writes the messages for the command line of one program.

    Args:
        kind: The dataclass of its options.
        prog: What the user types to start it.
    """

    def __init__(self, kind: type, prog: str) -> None:
        self._kind = kind
        self._prog = prog
        self._flags = flags_of(kind)
        self._names = Names(self._flags)

    def is_meant_as_flag(self, head: str) -> bool:
        """Whether a word behind a flag is surely another flag, rightly written or not.

        ``--x`` is one; ``-x`` and ``–x`` (an en dash) are one if ``--x`` is.  ``-5`` and ``-- x`` are values.
        """
        bare = head.lstrip(_DASHES)
        if bare == head or not bare[:1].isalpha() or len(bare.split()) > 1:
            return False
        return head.startswith("--") or self._named(bare) is not None

    def mistaken(self, word: str, following: str | None) -> str | None:
        """The message for a word that is surely meant as a flag, and is none; None for any other word.

        Args:
            word: The word.
            following: The word behind it.
        """
        bare = word.lstrip(_DASHES)
        dashes = word[: len(word) - len(bare)]
        head, equals, value = bare.partition("=")
        if not bare:  # "- -input": only dashes, with a blank behind them
            name = self._named((following or "").lstrip(_DASHES).partition("=")[0])
            return f"there is a space too many in '{dashes} {following}': type {name}" if name else None
        name = self._named(head)
        if not dashes:
            is_flag = name and len(head) > 1 and not os.path.exists(word) and (equals or not self._places)
            return f"{word} has no dashes in front: type {name}{equals}{value}" if is_flag else None
        if not name:
            return self._unknown(dashes + head)
        if set(word) & set(_DASHES[1:]):
            return f"{dashes}{head} has a dash from a web page or word processor instead of a hyphen: type {name}"
        if dashes == "-":
            return f"-{head} has one dash in front: type {name}"
        return f"there is no option {dashes}{head}.  Did you mean {name}?"

    def too_many(self, word: str, last: tuple[Flag, str, str] | None, given: Iterable[str]) -> str:
        """The message for a word that belongs to no option.

        Args:
            word: The word.
            last: What is just before it: a flag, as the user wrote it, and its value.
            given: The fields that have a value.
        """
        word = word or repr(word)
        if last is not None:
            flag, head, value = last
            if flag.is_switch:
                return f"{word} is a word too many behind {head}, which takes no value: leave it out"
            behind = f"{word} is a word too many behind {head} {value}"
            return f"{behind}: write its flag in front of it, or put quotes around a value with blanks or *"
        places = [flag.place for flag in self._places]
        if places:
            return f"{word} is a word too many behind {' '.join(places)}; see {self._prog} --help"
        if "yml" in self._flags and word.endswith((".yml", ".yaml")):
            return f"{word} belongs to no option: type --yml {word}"
        free = [flag for flag in self._flags.values() if flag.is_required and flag.name not in set(given)]
        name = free[0].names[0] if free else "--input" if "input" in self._flags else ""
        return f"{word} belongs to no option: " + (f"type {name} {word}" if name else f"see {self._prog} --help")

    def no_value(self, flag: Flag, head: str, following: str | None) -> str:
        """The message for a flag without the value that it takes.

        Args:
            flag: The flag.
            head: As the user wrote it.
            following: The word behind it, which looks like a flag; None if there is none.
        """
        if flag.many:
            return f"{head} names nothing: perhaps a variable or a pattern of the shell was empty"
        if following is None:
            return f"{head} has no value: type {head} {flag.metavar}"
        other = f"or {head}={following} if that is the value"
        return f"{head} has no value before {following}: type {head} {flag.metavar}, {other}"

    def missing(self, flags: Sequence[Flag]) -> str:
        """The message for required options that are not given."""
        names = [flag.shown for flag in flags]
        listed = f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"
        text = texts_of(self._kind).get(flags[0].name, "").partition(". ")[0].partition(": ")[0].rstrip(".")
        what = f" ({text[:1].lower()}{text[1:]})" if text and len(flags) == 1 else ""
        return f"{listed} missing{what}.  Example: {example(self._kind, self._prog)}"

    @property
    def _places(self) -> list[Flag]:
        return [flag for flag in self._flags.values() if flag.place]

    def _named(self, bare: str) -> str | None:
        """The flag of a name without dashes, as it is to be typed."""
        if not bare:
            return None
        word = bare.translate(dict.fromkeys(map(ord, _DASHES), "_"))
        for name in (f"--{word}", f"--{word.lower()}", f"-{word}" if len(word) == 1 else ""):
            if name and self._names.find(name) is not None:
                return name
        return None

    def _unknown(self, head: str) -> str:
        word = head.lstrip(_DASHES).translate(dict.fromkeys(map(ord, _DASHES), "_")).lower()
        instead: Mapping[str, str] = getattr(self._kind, "instead", {})
        if word in instead:
            return f"there is no option {head}: type {instead[word]}"
        if (given := self._names.find(f"--{word.removeprefix('no_')}")) and word.startswith("no_"):
            return f"there is no option {head}: {given[0].names[0]} takes a value, and is left out to turn it off"
        if word in _SOURCES and self._places:
            return f"there is no option {head} here: type the value alone, as in `{example(self._kind, self._prog)}`"
        takers = [name for name, options in _other_programs(self._kind) if word.removeprefix("no_") in options]
        near = self._near(word, 0.85 if takers else _NEAR)
        meant = f".  Did you mean {' or '.join(near)}?" if near else ""
        if takers:
            others = f" and {len(takers) - _MOST} more" if len(takers) > _MOST else ""
            take = "takes" if len(takers) == 1 else "take"
            return f"there is no option {head} here; {', '.join(takers[:_MOST])}{others} {take} it{meant}"
        return f"there is no option {head}{meant or f': {self._prog} --help lists all'}"

    def _near(self, word: str, cutoff: float) -> list[str]:
        """The names of flags that are spelled nearly so, or begin so, the nearest first."""
        names = {name.lstrip("-"): name for name in self._names if name.startswith("--")}
        names |= {f"no_{flag.name}": f"--no_{flag.name}" for flag in self._flags.values() if flag.is_switch}
        close = difflib.get_close_matches(word, names, _MOST, cutoff)
        if len(word) > 2:
            parts = [n for n in names if n.startswith(word) or f"_{word}" in n or (word.startswith(f"{n}_") and n[2:])]
            close += [name for name in parts if not name.startswith("no_") or word.startswith("no_")]
        found: dict[str, str] = {}
        for name in close:
            option = self._names.find(names[name])
            if option is not None:
                found.setdefault(option[0].name, names[name])
        return list(found.values())[:_MOST]


def example(kind: type, prog: str) -> str:
    """A short command line that has all that is required."""
    words: str = getattr(kind, "example", "")
    if not words:
        required = [flag for flag in flags_of(kind).values() if flag.is_required]
        words = " ".join(flag.usage for flag in required)
    return f"{prog} {words}".rstrip()


def _other_programs(kind: type) -> Iterator[tuple[str, Set[str]]]:
    """Yields the other stages and commands with the names of their options."""
    if not issubclass(kind, RunOptions):
        yield "every stage", {field.name for field in fields(RunOptions)}
    yield from ((name, options) for name, doc, options in _programs() if doc != kind.__doc__)


@functools.cache
def _programs() -> list[tuple[str, str | None, frozenset[str]]]:
    """(name, description, names of options) of each stage and command, read from their source, without importing it."""
    found = []
    package = Path(__file__).resolve().parent.parent
    for path in (*sorted(PROJECT.glob("[0-9][0-9]_*.py")), *sorted((package / "commands").rglob("*.py"))):
        try:
            text = path.read_text("utf-8")
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError):
            continue
        command = re.search(r'parse_arguments\(Options, .*?"(\w+)"\)', text)
        name = command[1] if command else path.stem
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "Options":
                found.append((name, ast.get_docstring(node, clean=False), frozenset(_names_in(node))))
    return found


def _names_in(node: ast.ClassDef) -> Iterator[str]:
    """Yields the fields of a dataclass, and their further names."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.annotation).startswith("ClassVar"):
            yield ast.unparse(item.target)
            texts = (n.value for n in ast.walk(item.annotation) if isinstance(n, ast.Constant))
            yield from (text[2:] for text in texts if isinstance(text, str) and text.startswith("--"))
