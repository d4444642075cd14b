"""``--help`` of every stage and command."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from curation.__main__ import COMMANDS
from curation.options import POSITIONAL, PublishOptions, RunOptions, also, at_least, help_text
from curation.options.flags import flags_of, texts_of
from curation.publish.background import HubOptions
from tests import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))
PUBLISH = [field.name for field in fields(PublishOptions)]
SHARED = [field.name for field in fields(RunOptions) if field.name not in PUBLISH]


@dataclass(frozen=True, kw_only=True)
class Toy(HubOptions, RunOptions):
    """Options of a toy."""

    help_groups = {"share": "measure", "kind": "other"}  # noqa: RUF012
    example = "--source here"

    source: Annotated[str, also("-s", "--from_here")]
    """Where from."""
    count: Annotated[int, at_least(1)] = 1
    """How many"""
    share: float | None = None
    """How much.  Default: all of it."""
    seconds: float = 20.0
    """How long."""
    kind: Literal["big", "small"] | int = "big"
    """Of what size."""
    many: tuple[str, ...] = ()
    """Several words."""
    loud: bool = False
    """Make noise."""
    tidy: bool = True
    """--no_tidy: leave things lying about."""
    maybe: bool | None = None
    """Another source decides."""
    max_error_rate: float = 1.0
    """Another default than that of other stages."""


def programs() -> Iterator[Any]:
    """The options of every stage and command."""
    for name in [*SCRIPTS, *sorted({f"curation.{module}" for module in COMMANDS.values()})]:
        kind = getattr(importlib.import_module(name), "Options", None)
        if kind is not None and is_dataclass(kind):
            yield pytest.param(kind, id=name)


def groups(text: str) -> dict[str, list[str]]:
    """Heading → the first word of each entry below it."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"([a-z ]+) options:", line):
            found[match[1]] = []
        elif match := re.match(r"  ([-\w]+)", line):
            found[list(found)[-1]].append(match[1])
    return found


def test_a_help_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = help_text(Toy, "toy.py")
    assert text == help_text(Toy, "toy.py")
    assert text.startswith("usage: toy.py --source STR [options]\n\nOptions of a toy.\n\nrequired options:\n")
    assert text.endswith("\n\nexample: toy.py --source here\n")
    found = groups(text)
    assert list(found) == ["required", "other", "measure", "hub", "publish", "run"]
    assert found["required"] == ["--source"]
    assert found["other"] == ["--count", "--kind", "--many", "--loud", "--no_tidy", "--maybe"]
    assert found["measure"] == ["--share", "--seconds"]
    assert found["run"] == [*(f"--{name}" for name in SHARED), "--help"]
    lines = [" ".join(line.split()) for line in re.sub(r"\n {20,}", " ", text).splitlines()]
    for line in [
        "--source, -s STR Where from. Also: --from_here.",
        "--count INT How many. Default: 1.",
        "--share FLOAT How much. Default: all of it.",
        "--seconds FLOAT How long. Default: 20.",
        "--kind INT|{big,small} Of what size. Default: big.",
        "--many STR ... Several words.",
        "--loud Make noise.",
        "--no_tidy --no_tidy: leave things lying about.",
        "--maybe Another source decides.",
        "--max_error_rate FLOAT Another default than that of other stages.",
    ]:
        assert any(found.startswith(line) for found in lines), (line, lines)


def test_a_value_that_stands_without_a_flag_is_shown_by_its_place() -> None:
    @dataclass
    class Command:
        root: Annotated[Path, POSITIONAL]
        """The folder."""

    text = help_text(Command, "toy")
    assert "usage: toy ROOT [options]" in text
    assert re.search(r"^  ROOT +The folder\.$", text, flags=re.M)


@pytest.mark.parametrize("kind", programs())
def test_the_help_of_every_stage_and_command(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("50", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        text = help_text(kind, "x")
        lines = [line for line in text.splitlines() if " " in line.strip() and not line.startswith(("example", "  --"))]
        assert all(len(line) <= max(60, min(100, int(columns))) for line in lines), text
    for noise in (
        "{None}",
        "None)",
        "no_no_",
        "|None",
        "None|",
        "(default",
        "Default: None",
        "Default: False",
        "Default: .",
        "inf.",
    ):
        assert noise not in text
    found = groups(text)
    names = [name for members in found.values() for name in members]
    assert len(names) == len(set(names))
    flags = flags_of(kind)
    required = [flag.shown for flag in flags.values() if flag.is_required]
    assert next(iter(found)) == "required" or not required
    assert found.get("required", [])[: len(required)] == required
    shown = {name.removeprefix("--").removeprefix("no_").lower() for name in names} - {"help"}
    assert shown == {flag.name.removeprefix("no_") if flag.has_flag else flag.place.lower() for flag in flags.values()}
    for flag in flags.values():
        assert set(flag.names) - {f"--{flag.name}"} <= set(re.findall(r"--?\w+", text)), "each further name is shown"
    texts = texts_of(kind)
    assert all(flag.explained or texts.get(flag.name) for flag in flags.values()), "each option has a text"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_stage(script: str) -> None:
    kind = importlib.import_module(script).Options
    found = groups(help_text(kind, f"{script}.py"))
    order = list(found)
    assert order[0] == "required" and order[-1] == "run", "the stage's own options come first"
    firsts = [name for members in found.values() for name in members]
    assert firsts[:2] == ["--input", "--output"]
    assert len(order) >= 5, "and in groups"
    assert "other" not in order
    own = [field.name for field in fields(kind) if field.name not in SHARED]
    assert set(kind.help_groups) <= set(own)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_of_a_stage_is_a_command_line(script: str) -> None:
    module = importlib.import_module(script)
    options = module.parse_options(module.Options, module.Options.example.split())
    assert all(getattr(options, field.name) for field in fields(options) if field.default is MISSING)
