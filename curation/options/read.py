"""From the words of a command line to the values of options."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from curation.errors import UsageError
from curation.options.advice import Advice
from curation.options.flags import Flag, Names, flags_of, spelled
from curation.options.values import goes_on, size_in

_TRUTHS = {"true": True, "false": False}


class Words:
    """Reads one command line.

    A flag takes the word behind it.  ``--flag=word`` gives it any word, also one that looks like a flag.  A switch may
    have True or False behind it, because the tools that the stages replace take it so.  A flag of several values takes
    all words up to the next flag, and may be given again.

    Args:
        kind: The dataclass of the options.
        words: The words of the command line.
        advice: Writes what to type where a word makes no sense.
    """

    def __init__(self, kind: type, words: Sequence[str], advice: Advice) -> None:
        self._flags = flags_of(kind)
        self._names = Names(self._flags)
        self._places = [flag for flag in self._flags.values() if flag.place]
        self._rest = deque(words)
        self._advice = advice
        self._given: dict[str, tuple[str, Any]] = {}  # field → the flag as it was written, and its value
        self._several: dict[str, dict[str, list[Any]]] = {}  # field → each of its names that is given → the values
        self._loose: list[str] = []  # words without a flag
        self._last: tuple[Flag, str, str] | None = None  # what is just before: a flag, as it was written, and its value

    def read(self) -> dict[str, Any]:
        """The values that are given, by field.

        Raises:
            UsageError: A word is no flag, no value, or too many; or one option is given two values.
        """
        while self._rest:
            word = self._rest.popleft()
            head, equals, value = word.partition("=")
            found = self._names.find(head) if word.startswith("-") else None
            if found is None:
                self._loose_word(word)
            elif found[0].is_switch:
                self._switch(*found, head, value if equals else None)
            else:
                self._value(found[0], head, value if equals else None)
        self._fill_places()
        for name, by_head in self._several.items():
            for head, values in by_head.items():
                self._set(self._flags[name], head, tuple(dict.fromkeys(values)), " ".join(map(str, values[:3])))
        return {name: value for name, (_, value) in self._given.items()}

    def _switch(self, flag: Flag, is_off: bool, head: str, value: str | None) -> None:
        if value is None and not is_off and self._rest and self._rest[0].lower() in _TRUTHS:
            value = self._rest.popleft()
        if value is not None and value.lower() not in _TRUTHS:
            raise UsageError(f"{head}: needs True or False, not {value!r}")
        on = _TRUTHS["true" if value is None else value.lower()] is not is_off
        self._last = (flag, head, "")
        self._set(flag, head, on, str(on))

    def _value(self, flag: Flag, head: str, value: str | None) -> None:
        words = [] if value is None else [value]
        if value is None and self._rest and not self._looks_like_a_flag(self._rest[0]):
            words.append(self._rest.popleft())
        if flag.many:
            while (words or value is None) and self._rest and not self._rest[0].startswith("-"):
                words.append(self._rest.popleft())
        elif flag.is_list:
            while words and self._rest and goes_on(words[-1], self._rest[0]):
                words.append(self._rest.popleft())
        if not words or (flag.many and not any(word.strip() for word in words)):
            raise UsageError(self._advice.no_value(flag, head, self._rest[0] if self._rest else None))
        self._last = (flag, head, words[-1])
        if flag.many:
            self._add(flag, spelled(head), words)
        elif flag.sides and (size := size_in(words[0])):
            for name, side in zip((flag.sides.width, flag.sides.height), size, strict=True):
                self._set(self._flags[name], head, side, str(side))
        else:
            word = ",".join(words)
            self._set(flag, head, flag.value_of(head, word), word)

    def _looks_like_a_flag(self, word: str) -> bool:
        """Whether a word behind a flag is the next flag, so that the first has no value."""
        head = word.partition("=")[0]
        return self._advice.is_meant_as_flag(head) or (word.startswith("-") and self._names.find(head) is not None)

    def _loose_word(self, word: str) -> None:
        """A word where a flag could stand: it is the value of an option without a flag, or a mistake."""
        if mistake := self._advice.mistaken(word, self._rest[0] if self._rest else None):
            raise UsageError(mistake)
        if word == "--":  # what follows are no flags
            self._loose += self._rest
            self._rest.clear()
        else:
            self._loose.append(word)
        if len(self._loose) > len(self._places) and not any(flag.many for flag in self._places):
            raise UsageError(self._advice.too_many(self._loose[len(self._places)], self._last, self._given))
        self._last = None

    def _fill_places(self) -> None:
        """Give each place its words.  Those of a place of several values are all that the places behind it leave."""
        words = self._loose
        free = [flag for flag in self._places if flag.name not in {*self._given, *self._several}] or self._places
        for number, flag in enumerate(free):
            count = max(1, len(words) - len(free) + number + 1) if flag.many else 1
            mine, words = words[:count], words[count:]
            if mine and flag.many:
                self._add(flag, flag.place, mine)
            elif mine:
                self._set(flag, flag.place, flag.value_of(flag.place, mine[0]), mine[0])
        if words:
            raise UsageError(self._advice.too_many(words[0], None, self._given))

    def _add(self, flag: Flag, head: str, words: Sequence[str]) -> None:
        paths = [f"./{word}" if word.startswith("-") else word for word in words]  # a file, and no flag for anyone else
        values = [flag.value_of(head, word) for word in paths]
        self._several.setdefault(flag.name, {}).setdefault(head, []).extend(values)

    def _set(self, flag: Flag, head: str, value: Any, word: str) -> None:
        other, before = self._given.setdefault(flag.name, (head, value))
        if value is not before and value != before:
            both = f"{other} and {head}" if other != head else f"{head} twice"
            first = " ".join(map(str, before[:3])) if isinstance(before, tuple) else before
            raise UsageError(f"{both} with two values ({first} and {word}): give one of them")


def read_options(kind: type, words: Sequence[str], advice: Advice, *, partial: bool) -> dict[str, Any]:
    """The values of a dataclass of options that a command line gives, by field.

    Args:
        kind: The dataclass.
        words: The words of the command line.
        advice: Writes what to type where a word makes no sense.
        partial: What is required may be left out.  Its value is then its own name.

    Raises:
        UsageError: The command line makes no sense, or lacks a required option.
    """
    values = Words(kind, words, advice).read()
    flags = flags_of(kind).values()
    values |= {f.name: () if f.many else values[f.unless] for f in flags if f.unless in values and f.name not in values}
    missing = [flag for flag in flags if flag.is_required and flag.name not in values]
    if missing and not partial:
        raise UsageError(advice.missing(missing))
    return {flag.name: (flag.name,) if flag.many else flag.name for flag in missing} | values
