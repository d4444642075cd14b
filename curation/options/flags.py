"""What a dataclass of options says about its flags: names, kinds of values, defaults, texts."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from curation.errors import UsageError
from curation.options.declare import LISTED, PATH, Also, Explained, Positional, Sides, Unless
from curation.options.values import whole_number

_SHOWN = {str: "STR", Path: "PATH", int: "INT", float: "FLOAT"}
_WANTED = {int: "a whole number", float: "a number", NoneType: ""}


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of a dataclass.

    Attributes:
        name: The field.
        names: The flag under all its names, the field's own first, with dashes and underscores: ``--batch_size``.
        kinds: The types that a value may have.
        choices: The words that a value may be, beside the types.
        default: The field's default; MISSING if the option is required.
        place: What ``--help`` calls a value that stands without a flag; empty for all other options.
        many: Whether it takes several values.
        is_path: Whether its value is a path of this machine, so that an empty one would be the folder of the process.
        is_list: Whether its value is a list, of which the shell may have made several words.
        explained: What it does, where the field's docstring does not say it.
        sides: The two options that a size as its value stands for.
        told: What ``--help`` shows in the place of a value, where the type does not say it.
        unless: The option with which this one may be left out, although it is required; empty for none.
    """

    name: str
    names: tuple[str, ...]
    kinds: tuple[type, ...]
    choices: tuple[Any, ...]
    default: Any
    place: str
    many: bool = False
    is_path: bool = False
    is_list: bool = False
    sides: Sides | None = None
    explained: str = ""
    told: str = ""
    unless: str = ""

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def is_switch(self) -> bool:
        """Whether it stands without a value."""
        return bool in self.kinds

    @property
    def metavar(self) -> str:
        """What ``--help`` shows in the place of a value."""
        if self.told:
            return self.told
        words = [f"{{{','.join(map(str, self.choices))}}}"] if self.choices else []
        return "|".join([*(_SHOWN[kind] for kind in self.kinds if kind in _SHOWN), *words])

    @property
    def has_flag(self) -> bool:
        """Whether the flag is what users are told of, and not only the place of the value."""
        return not self.place or len(self.names) > 1

    @property
    def shown(self) -> str:
        """The option in a message: its flag, or what its place is called."""
        return self.names[0] if self.has_flag else self.place

    @property
    def usage(self) -> str:
        """The option with its value, as a command line has it."""
        return f"{self.names[0]} {self.metavar}" if self.has_flag else self.place

    def value_of(self, spelled: str, word: str) -> Any:
        """A word of the command line as a value of the option.

        Args:
            spelled: The flag as the user wrote it, for the message.
            word: The word.

        Raises:
            UsageError: It is no such value; the message says what is wanted.
        """
        if not word.strip() and (self.is_path or self.is_required or self.many):
            raise UsageError(f"{spelled} names nothing: perhaps a variable or a pattern of the shell was empty")
        for choice in self.choices:
            if word == str(choice):
                return choice
        left_out = self.default is None and str not in self.kinds and word.lower() in ("auto", "default")
        if NoneType in self.kinds and (word == "None" or left_out):
            return None
        for kind in (int, float, Path, str):
            if kind in self.kinds:
                try:
                    return whole_number(word) if kind is int else kind(word)
                except ValueError:
                    continue
        wanted = [_WANTED[kind] for kind in self.kinds if _WANTED.get(kind)]
        choices = list(map(str, self.choices))
        wanted += [f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]] if choices else []
        near = difflib.get_close_matches(word.lower(), choices, 1, 0.5)
        meant = f".  Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{spelled} {word or repr(word)}: it takes {' or '.join(wanted)}{meant}")


@functools.cache
def flags_of(kind: type) -> Mapping[str, Flag]:
    """The flags of a dataclass of options by their field, in the order of its fields.

    Their texts are empty: ``texts_of`` reads those from the source, and only messages and ``--help`` need them.
    """
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _flag(field.name, hints[field.name], field.default) for field in fields(kind)}


def _flag(name: str, hint: Any, default: Any) -> Flag:
    notes, hint = (hint.__metadata__, hint.__origin__) if get_origin(hint) is Annotated else ((), hint)
    aliases = [spelled(alias) for note in notes if isinstance(note, Also) for alias in note.names]
    places = [note.shown or name.upper() for note in notes if isinstance(note, Positional)]
    kinds, choices, many = _parts(hint)
    return Flag(
        name=name,
        names=(f"--{name}", *aliases),
        kinds=kinds,
        choices=choices,
        default=default,
        place=places[0] if places else "",
        many=many,
        is_path=PATH in notes or Path in kinds,
        is_list=LISTED in notes,
        sides=next((note for note in notes if isinstance(note, Sides)), None),
        unless="".join(note.name for note in notes if isinstance(note, Unless)),
        told="".join(note.metavar for note in notes if isinstance(note, Explained)),
        explained="".join(note.text for note in notes if isinstance(note, Explained)),
    )


def _parts(hint: Any) -> tuple[tuple[type, ...], tuple[Any, ...], bool]:
    """(types, words, whether there may be several) of an annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _parts(arguments[0])
    if origin is Literal:
        return (), arguments, False
    if origin is tuple:
        kinds, choices, _ = _parts(arguments[0])
        return kinds, choices, True
    if origin in (Union, UnionType):
        parts = [_parts(argument) for argument in arguments]
        return (
            tuple(kind for kinds, _, _ in parts for kind in kinds),
            tuple(dict.fromkeys(choice for _, choices, _ in parts for choice in choices)),
            any(many for _, _, many in parts),
        )
    return (hint,), (), False


def texts_of(kind: type) -> dict[str, str]:
    """What the docstrings below the fields of a dataclass say, by field; a class stands before its bases.

    Python does not keep these docstrings, so they are read from the source.
    """
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        try:
            [definition] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError):  # there is no source
            continue
        for field, text in itertools.pairwise(getattr(definition, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    explained = {name: flag.explained for name, flag in flags_of(kind).items() if flag.explained}
    return texts | explained


def spelled(word: str) -> str:
    """A flag as ``Flag.names`` has it: ``--batch-size`` → ``--batch_size``.  Single dashes stay."""
    return f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word


class Names:
    """Finds the flag that a word means.

    Args:
        flags: The flags of a dataclass.
    """

    def __init__(self, flags: Mapping[str, Flag]) -> None:
        self._flags = {name: flag for flag in flags.values() for name in flag.names}

    def __iter__(self) -> Iterator[str]:
        """Yields every name of every flag."""
        return iter(self._flags)

    def find(self, name: str) -> tuple[Flag, bool] | None:
        """The flag, and whether it is turned off by this name, as ``--no_push`` turns ``--push`` off.

        Args:
            name: With its dashes, without ``=`` and what is behind it.
        """
        name = spelled(name)
        if name in self._flags:
            return self._flags[name], False
        switch = self._flags.get(f"--{name.removeprefix('--no_')}") if name.startswith("--no_") else None
        return (switch, True) if switch is not None and switch.is_switch else None
