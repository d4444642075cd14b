"""Reads a pipeline's file: its variables, its stages, and the settings of the command line that go before both."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.commands.stages import find_script
from curation.errors import UsageError
from curation.extract.config import nearest
from curation.jsonio import clean_text
from curation.storage.yaml_files import read_yaml

MAX_BYTES = 1 << 20
MAX_TEXT = 100_000  # characters of a value with its variables
KEYS = ("vars", "all", "stages")
ALL = "all"  # the part of the file that holds options for every stage

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_VARIABLE = re.compile(r"(\$?)\$\{([^{}]*)(\}?)")

Value = str | list[str] | None  # of an option; None: the stage's own default


@dataclass(frozen=True, slots=True)
class Entry:
    """One stage of a pipeline.

    Attributes:
        title: The stage as the file calls it.
        script: The stage's script.
        options: Option, as the file spells it → value.
        settings: The same from the command line.
    """

    title: str
    script: Path
    options: dict[str, Value]
    settings: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline's file.

    Attributes:
        path: The file.
        shared: Options for every stage: option → value.
        entries: The stages in the order in which they run.
        notes: What the user should know about the variables.
    """

    path: Path
    shared: dict[str, Value]
    entries: list[Entry]
    notes: list[str]


def is_pipeline(path: Path) -> bool:
    """Whether the file is a pipeline's, and not stage 06's configuration.  Raises UsageError if it cannot be read."""
    value = read_yaml("", path, MAX_BYTES, texts=True)
    return isinstance(value, dict) and "stages" in value


def read_pipeline(
    path: Path, settings: Sequence[str] = (), environ: Mapping[str, str] = os.environ, *, strict: bool = True
) -> Pipeline:
    """Read a pipeline's file.

    Args:
        path: The file.
        settings: ``NAME=value`` for a variable, ``03.model=value`` or ``all.workers=value`` for an option.
        environ: Where variables are looked for that neither ``settings`` nor the file defines.
        strict: Whether each variable must have a value.  Otherwise ``${NAME}`` stays as it is.

    Raises:
        UsageError: The file cannot be read, or is not a pipeline; a stage is unknown or named twice; a variable has no
            value.  The message names the file and the place in it.
    """
    value = read_yaml("", path, MAX_BYTES, texts=True)
    _check_keys(path, value)
    variables = _Variables(path, _mapping(f"{path}: vars", value.get("vars")), environ, strict=strict)
    entries = [
        Entry(title, _script(path, title), _options(f"{path}: {title}", options))
        for title, options in _stages(path, value["stages"])
    ]
    shared = _options(f"{path}: {ALL}", value.get(ALL))
    _refuse_twice(path, entries)
    for setting in settings:
        _refuse_other(setting, settings)
        _apply(setting, path, variables, shared, entries)
    shared = variables.expand_all(shared, f"{path}: {ALL}")
    expanded = [
        Entry(
            entry.title,
            entry.script,
            variables.expand_all(entry.options, f"{path}: {entry.title}"),
            variables.expand_all(entry.settings, f"--set {entry.title}"),
        )
        for entry in entries
    ]
    variables.check()
    return Pipeline(path, shared, expanded, variables.notes)


def choose(pipeline: Pipeline, stages: str | None) -> list[Entry]:
    """The entries that ``--stages`` names: stages and ranges of them with commas between, such as ``01-03,06``.

    Raises:
        UsageError: A stage is unknown, or is not in the file.
    """
    if stages is None:
        return pipeline.entries
    wanted: set[str] = set()
    for word in filter(None, (part.strip() for part in stages.split(","))):
        first, dash, last = word.partition("-")
        if not dash:
            wanted |= {entry.title for entry in _named(pipeline.entries, word, f"--stages {stages}")}
            continue
        low, high = (find_script(one.strip()).name[:2] for one in (first, last))
        if low > high:
            raise UsageError(f"--stages {stages}: {word} is in descending order")
        inside = {entry.title for entry in pipeline.entries if low <= entry.script.name[:2] <= high}
        if not inside:
            raise UsageError(f"--stages {stages}: {pipeline.path} has no stage from {low} to {high}")
        wanted |= inside
    if not wanted:
        raise UsageError("--stages names no stage: write it as 03, 01-03 or 01,03")
    return [entry for entry in pipeline.entries if entry.title in wanted]


# ---- the parts of the file


def _check_keys(path: Path, value: Any) -> None:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{path}: not a pipeline: it has no key `stages`")
    for key in value:
        if key in KEYS:
            continue
        try:
            find_script(str(key))
        except UsageError:
            if "stages" not in value and "models" in value:
                raise UsageError(
                    f"{path}: not a pipeline but a configuration of stage 06: `curation extract --yml {path}` takes it"
                ) from None
            raise UsageError(f"{path}: unknown key {clean_text(str(key))!r}: {nearest(str(key), KEYS)}") from None
        raise UsageError(f"{path}: stage {key} must be below the key `stages`")
    if not value.get("stages"):
        raise UsageError(f"{path}: the key `stages` is missing or empty")


def _stages(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    """Each stage's title and options: of a mapping, or of a list whose items are titles or mappings of one."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = []
        for item in value:
            items += item.items() if isinstance(item, dict) else [(item, None)]
    else:
        raise UsageError(f"{path}: stages: write a line `01:` for each stage, and its options below it")
    for title, options in items:
        if not isinstance(title, str):
            raise UsageError(f"{path}: stages: a stage is named by its number or name, such as 03 or generate")
        yield title, options


def _script(path: Path, title: str) -> Path:
    try:
        return find_script(title.partition("/")[0].strip())
    except UsageError as error:
        raise UsageError(f"{path}: stages: {error}") from None


def _refuse_twice(path: Path, entries: Sequence[Entry]) -> None:
    seen: dict[tuple[Path, str], str] = {}
    for entry in entries:
        other = seen.setdefault((entry.script, entry.title.partition("/")[2]), entry.title)
        if other is not entry.title:
            raise UsageError(
                f"{path}: stages: {other} and {entry.title} are the same stage; to run a stage twice, give it a second "
                f"name, such as {entry.script.name[:2]}/again"
            )


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{where}: write lines such as `name: value` below it")
    return value


def _options(where: str, value: Any) -> dict[str, Value]:
    return {name: _value(f"{where}: {name}", one) for name, one in _mapping(where, value).items()}


def _value(where: str, value: Any) -> Value:
    """An option's value.  A mapping, such as stage 06's ``weights``, becomes ``name=value`` texts."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [f"{key}={one}" if isinstance(key, str) and isinstance(one, str) else one for key, one in value.items()]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return value
    raise UsageError(f"{where}: write one value, or a list of values")


# ---- settings of the command line


def _apply(setting: str, path: Path, variables: _Variables, shared: dict[str, Value], entries: Sequence[Entry]) -> None:
    name, equals, text = setting.partition("=")
    title, dot, option = name.strip().rpartition(".")
    if not equals or not option:
        raise UsageError(
            f"--set {setting}: write ROOT=value for a variable, or 03.model=value for an option of a stage"
        )
    if not dot:
        variables.set(option, text)
        return
    value = None if text in ("null", "~") else text
    if title == ALL:
        shared[option] = value
        return
    named = _named(entries, title, f"--set {setting}")
    if len(named) > 1:
        names = ", ".join(entry.title for entry in named)
        raise UsageError(f"--set {setting}: {path} has this stage several times: name one of {names}")
    named[0].settings[option] = value


def _refuse_other(setting: str, settings: Sequence[str]) -> None:
    """Raise UsageError if the same variable or option is given another value."""
    name = setting.partition("=")[0].strip()
    other = next(one for one in settings if one.partition("=")[0].strip() == name)
    if other != setting:
        raise UsageError(f"--set gives {name} two values ({other} and {setting}): give one of them")


def _named(entries: Sequence[Entry], name: str, where: str) -> list[Entry]:
    """The entries of a stage: the one of that title, else all of that stage.  Raises UsageError if there are none."""
    if exact := [entry for entry in entries if entry.title == name]:
        return exact
    try:
        script = find_script(name)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if found := [entry for entry in entries if entry.script == script]:
        return found
    raise UsageError(f"{where}: the file has no stage {name}; it has {', '.join(entry.title for entry in entries)}")


# ---- variables


class _Variables:
    """The values of ``${NAME}``: of the command line, else of the file, else of the environment."""

    def __init__(self, path: Path, own: Mapping[str, Any], environ: Mapping[str, str], *, strict: bool) -> None:
        self._path = path
        self._own: dict[str, str] = {}
        self._given: dict[str, str] = {}
        self._environ = environ
        self._strict = strict
        self._whole_values: dict[str, str] = {}  # of the file's, with the variables in them
        self._used: set[str] = set()
        self._missing: list[str] = []
        for name, value in own.items():
            if not _NAME.fullmatch(name):
                raise UsageError(f"{path}: vars: {clean_text(name)!r} cannot be a name: use letters, digits and _")
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{path}: vars: {name}: write one value")
            if value is not None:
                self._own[name] = value
        self._names = set(own)

    def set(self, name: str, value: str) -> None:
        self._given[name] = value

    def expand_all(self, options: Mapping[str, Value], where: str) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for name, value in options.items():
            if isinstance(value, list):
                found[name] = [self._whole(one, f"{where}: {name}") for one in value]
            else:
                found[name] = None if value is None else self._whole(value, f"{where}: {name}")
        return found

    def check(self) -> None:
        """Raise UsageError for a variable without a value, and for one of the command line that nothing uses."""
        for name, value in self._given.items():
            if not value.strip():  # ${ROOT}/shards would be /shards
                raise UsageError(f"--set {name}= is empty: perhaps a variable of the shell was empty")
            if name not in self._used | self._names:
                known = sorted(self._used | self._names)
                hint = nearest(name, known) if known else "it has no variables"
                raise UsageError(f"--set {name}: {self._path} does not use ${{{name}}}: {hint}")
        if self._missing:
            names = list(dict.fromkeys(self._missing))
            shown, values = ", ".join(f"${{{name}}}" for name in names), " ".join(f"{name}=…" for name in names)
            raise UsageError(
                f"{self._path}: no value for {shown}: give --set {values}, a line under the key `vars`, or an "
                "environment variable"
            )

    @property
    def notes(self) -> list[str]:
        """Variables that the environment has with another value than the file, which goes first."""
        return [
            f"{name}: {self._path} says {clean_text(self._own[name])}, and the environment variable {name} is not "
            f"used; --set {name}=… overrides the file"
            for name in sorted(self._used & self._own.keys() - self._given.keys())
            if self._environ.get(name, self._own[name]) != self._own[name]
        ]

    def _whole(self, text: str, where: str) -> str:
        """The text with its variables, and with the home folder where it begins with ``~``, as a shell has it."""
        text = self._expand(text, where, ())
        return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text

    def _expand(self, text: str, where: str, trail: tuple[str, ...]) -> str:
        pieces, end, size = [], 0, 0
        for match in _VARIABLE.finditer(text):
            escaped, name, closed = match.groups()
            pieces.append(text[end : match.start()])
            end = match.end()
            if escaped:
                pieces.append(match[0][1:])
                continue
            if not closed or not _NAME.fullmatch(name):
                raise UsageError(
                    f"{where}: {clean_text(match[0])[:80]!r} is not a variable: write ${{NAME}}; $${{ is the text ${{"
                )
            pieces.append(self._of(name, where, trail))
            size += len(pieces[-1])
            if size > MAX_TEXT:
                raise UsageError(f"{where}: longer than {MAX_TEXT:,} characters with its variables")
        return "".join([*pieces, text[end:]])

    def _of(self, name: str, where: str, trail: tuple[str, ...]) -> str:
        if name in trail:
            raise UsageError(f"{self._path}: vars: {name} stands for itself ({' → '.join([*trail, name])})")
        self._used.add(name)
        if name in self._given:
            return self._given[name]
        if name in self._own:
            if name not in self._whole_values:
                value = self._expand(self._own[name], f"{self._path}: vars: {name}", (*trail, name))
                self._whole_values[name] = value
            return self._whole_values[name]
        if self._environ.get(name, "").strip():
            return self._environ[name]
        if self._strict:
            self._missing.append(name)
        return f"${{{name}}}"
