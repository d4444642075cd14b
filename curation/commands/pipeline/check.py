"""Turns the entries of a pipeline into command lines, and checks them all before the first one starts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from curation import PROGRAM, PROJECT
from curation.commands.pipeline.file import ALL, Entry, Pipeline, Value
from curation.commands.stages import commands_of_scripts, load_script, stage_class
from curation.errors import InfrastructureError, UsageError
from curation.extract.config import nearest
from curation.jsonio import clean_text
from curation.options import PublishOptions, RunOptions, parse_options
from curation.options.flags import Flag, flags_of
from curation.run import Stage

# Options that every stage has but a pipeline gives in another way.
NOT_SHARED = {
    "dry_run": "`curation run … --dry_run` prints the commands",
    "follow": "the stages of a pipeline run one after the other; run_pipeline.sh --follow runs them at the same time",
    "follow_idle_s": "the stages of a pipeline run one after the other",
    **{
        field.name: f"each stage publishes to a place of its own: give it to the stage, such as 04.{field.name}"
        for field in fields(PublishOptions)
    },
}
# Options with which a stage does not run, so that the pipeline would seem to be done.
_NO_RUN = {
    "dry_run": NOT_SHARED["dry_run"],
    "list_models": "it only prints a list; give it to the stage's own command",
}
_SHARED = {field.name for field in fields(RunOptions)}
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_READ = ("input", "data", "prompts", "edits", "captions")  # options that name what a stage reads …
_WRITTEN = {"01": ("output", "edits")}  # … and what it writes, where that is not only its output
_NO_PATH = re.compile(r"[*?\[{]|://|^pipe:")


@dataclass(frozen=True, slots=True)
class StageCommand:
    """A stage of a pipeline that is ready to be run.

    Attributes:
        title: The stage as the file calls it.
        script: Its script.
        words: The words behind the script's name.
        kind: The stage.
        options: What the words mean; not checked yet where the pipeline was read for its weights.
    """

    title: str
    script: Path
    words: list[str]
    kind: type[Stage[Any]]
    options: RunOptions

    @property
    def command(self) -> list[str]:
        """The command that is run."""
        return [sys.executable, str(self.script), *self.words]

    @property
    def shown(self) -> str:
        """The same command as a user types it, in the folder in which this program was started."""
        if PROJECT.name == "project":  # an installed package, whose scripts lie where nobody types their paths
            program = [*PROGRAM.split(), commands_of_scripts()[self.script.stem]]
        else:
            found = shutil.which("python")
            python = "python" if found and os.path.samefile(found, sys.executable) else sys.executable
            inside = self.script.is_relative_to(Path.cwd())
            program = [python, str(self.script.relative_to(Path.cwd()) if inside else self.script)]
        return shlex.join([*program, *self.words])


def commands(
    pipeline: Pipeline, entries: Sequence[Entry], shared: Mapping[str, Value], *, only_weights: bool = False
) -> list[StageCommand]:
    """The command of each entry.

    Args:
        pipeline: The file.
        entries: Its stages that are to run.
        shared: Options for every stage that the command line gives.  They go before those of the file.
        only_weights: Take the options only as far as they say what weights a stage needs: folders may be missing.

    Raises:
        UsageError: An option is unknown, has a value that makes no sense, or is missing; a folder is neither there nor
            written by an earlier stage.  The message names the file and the stage.
    """
    for name in pipeline.shared:
        _check_shared(f"{pipeline.path}: {ALL}", name)
    found: list[StageCommand] = []
    for entry in entries:
        where = f"{pipeline.path}: stage {entry.title}"
        found.append(_command(where, entry, pipeline.shared, shared, partial=only_weights))
        if not only_weights:
            _check(where, found[-1], found[:-1])
    return found


def _check_shared(where: str, name: str) -> None:
    if name in NOT_SHARED:
        raise UsageError(f"{where}: {name}: {NOT_SHARED[name]}")
    if name not in _SHARED:
        raise UsageError(
            f"{where}: {clean_text(name)!r} is no option that all stages have: "
            f"{nearest(name, _SHARED - set(NOT_SHARED))}"
        )


def _command(
    where: str, entry: Entry, of_all: Mapping[str, Value], shared: Mapping[str, Value], *, partial: bool
) -> StageCommand:
    module = load_script(entry.script)
    kind: Any = module.Options
    flags = flags_of(kind)
    names = {name.lstrip("-"): flag.name for flag in flags.values() for name in flag.names if name.startswith("--")}
    values: dict[str, tuple[str, Value]] = {}
    for source in (entry.options, of_all, shared, entry.settings):
        mine: dict[str, str] = {}
        for written, value in source.items():
            name = _option(where, written, names)
            if mine.setdefault(name, written) != written:
                raise UsageError(f"{where}: {mine[name]} and {written} are the same option: give one of them")
            if source is not of_all or name not in values:
                values[name] = (written.lstrip("-").replace("-", "_"), value)
    words: list[str] = []
    for name, (written, value) in values.items():
        words += _words(f"{where}: {written}", written, value, flags[name])
    program = f"{PROGRAM} {commands_of_scripts()[entry.script.stem]}"
    try:
        options = parse_options(kind, words, prog=program, partial=partial)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return StageCommand(entry.title, entry.script, words, stage_class(module), options)


def _option(where: str, written: str, names: Mapping[str, str]) -> str:
    """The option that is written so."""
    key = written.lstrip("-").replace("-", "_")
    if key in _NO_RUN:
        raise UsageError(f"{where}: {key}: {_NO_RUN[key]}")
    if key not in names:
        raise UsageError(f"{where}: there is no option {clean_text(written)!r}: {nearest(key, names)}")
    return names[key]


def _words(where: str, written: str, value: Value, flag: Flag) -> list[str]:
    """An option as words of a command line."""
    if value is None:
        return []
    if flag.is_switch:
        truth = _TRUTHS.get(value.lower()) if isinstance(value, str) else None
        if truth is None:
            raise UsageError(f"{where}: write true or false, not {clean_text(str(value))[:80]!r}")
        return [f"--{written}" if truth else f"--no_{written}"]
    if isinstance(value, list) and flag.many:
        return [f"--{written}", *value]
    text = ",".join(value) if isinstance(value, list) else value
    return [f"--{written}={text}"] if text.startswith("-") or not text else [f"--{written}", text]


def _check(where: str, command: StageCommand, earlier: Sequence[StageCommand]) -> None:
    options = command.options
    try:
        for name, names in (("input", ("input", "data", "yml")), ("output", ("output", "yml"))):
            if all(getattr(options, one, None) is None for one in names):
                raise UsageError(f"{name} is missing")
        options.check()
        command.kind.weights(options)
        command.kind.require(options)
    except InfrastructureError as error:
        raise UsageError(f"{where}: {error}") from None
    written = [path for one in earlier for path in _paths(one, _WRITTEN.get(one.script.name[:2], ("output",)))]
    own = _WRITTEN.get(command.script.name[:2], ("output",))
    for name in _READ:
        for path in _paths(command, () if name in own else (name,)):
            if not path.exists() and not any(_belong_together(path, other) for other in written):
                raise UsageError(
                    f"{where}: {name} {path}: there is no such file or folder, and no stage before it writes there"
                )


def _paths(command: StageCommand, names: Sequence[str]) -> Iterator[Path]:
    """The paths of this machine that options of a stage name; patterns, lists and URLs are left to the stage."""
    for name in names:
        value = getattr(command.options, name, None)
        for text in value if isinstance(value, tuple | list) else [value]:
            if text is not None and not _NO_PATH.search(str(text)):
                yield Path(os.path.abspath(Path(text).expanduser()))


def _belong_together(path: Path, other: Path) -> bool:
    return path == other or path.is_relative_to(other) or other.is_relative_to(path)
