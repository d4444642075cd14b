"""Options of a stage: the order of ``--help``, and the bounds of numbers."""

import importlib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest

from curation.errors import UsageError
from curation.hub.background import HubOptions
from curation.options import FINITE, RunOptions, at_least, between, less_than, more_than, parse_arguments, parse_options

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.parent.glob("[0-9][0-9]_*.py"))


@dataclass(frozen=True, kw_only=True)
class Options(HubOptions, RunOptions):
    """Options of a toy."""

    source: str
    """Where from."""
    count: Annotated[int, at_least(1)] = 1
    share: Annotated[float | None, between(0, 1)] = None
    seconds: Annotated[float, more_than(0), FINITE] = 1.0
    score: Annotated[float | str, less_than(2)] = "auto"
    max_error_rate: Annotated[float, between(0, 1)] = 1.0
    """Another default than that of other stages."""


def help_of(kind: type[RunOptions], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse_options(kind, ["--help"], prog="toy.py")
    return capsys.readouterr().out


def flags_in(text: str, names: set[str]) -> list[str]:
    """The fields among ``names``, in the order in which the help lists their flags."""
    found = [word for line in re.findall(r"^\W (-.*)$", text, flags=re.M) for word in re.findall(r"--(\w+)", line)]
    return [name for name in dict.fromkeys(found) if name in names]


def test_help_lists_the_options_of_the_stage_first_and_run_control_last(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(Options, capsys)
    assert "Options of a toy." in text
    own, hub, run = re.split(r"^\W+(?:hub|run) options\W+$", text, flags=re.M)
    assert flags_in(own, {field.name for field in fields(Options)}) == ["source", "count", "share", "seconds", "score"]
    assert flags_in(hub, {"push_every", "shards"}) == ["push_every"]
    shared = [field.name for field in fields(RunOptions)]
    assert flags_in(run, set(shared)) == shared
    assert "Another default than that of other stages." in " ".join(re.findall(r"[\w.]+", run))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_stage_begins_with_its_input_and_output(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = importlib.import_module(script).Options
    own = help_of(kind, capsys).partition("run options")[0]
    shared = {field.name for field in fields(RunOptions)}
    assert not flags_in(own, shared)
    begins = {"03_generate_images_multigpu": ["prompts", "edits"], "06_metadata": ["input_tars", "output_metadata_dir"]}
    first = begins.get(script, ["data_path" if script == "05_recaption" else "input", "output"])
    assert flags_in(own, {*first, "model", "embedded"})[: len(first)] == first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--share", "1.5"], "--share must be between 0 and 1"),
        (["--seconds", "0"], "--seconds must be more than 0"),
        (["--seconds", "inf"], "--seconds must be a finite number"),
        (["--seconds", "nan"], "--seconds must be more than 0"),
        (["--score", "2"], "--score must be less than 2"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--max_error_rate", "nan"], "--max_error_rate must be between 0 and 1"),
        (["--push_every", "0"], "--push_every must be at least 1"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        parse_options(Options, ["--source", "x", *flags]).check()


def test_values_within_their_bounds() -> None:
    parse_options(Options, ["--source", "x", "--share", "0", "--score", "auto"]).check()
    parse_options(Options, ["--source", "x", "--share", "1", "--score", "1.9"]).check()


def test_the_bounds_of_a_command_are_checked_when_its_options_are_parsed() -> None:
    @dataclass(frozen=True)
    class Command:
        workers: Annotated[int, at_least(1)] = 1

    with pytest.raises(UsageError, match="--workers must be at least 1"):
        parse_arguments(Command, ["--workers", "0"], "toy")
