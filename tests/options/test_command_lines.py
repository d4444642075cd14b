"""Command lines as people type them: each means what it says, or one line says what to type."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from curation.__main__ import main as command
from curation.errors import UsageError
from curation.options import POSITIONAL, RunOptions, also, at_least, parse_arguments, parse_options
from curation.options.flags import flags_of
from curation.run.workers import to_argv
from tests.options.test_help import SCRIPTS, programs

Detector = Literal["auto", "scrfd", "centerface"]


@dataclass(frozen=True, kw_only=True)
class Toy(RunOptions):
    """Options of a toy."""

    instead = {"apply_blur": "--blur recorded"}  # noqa: RUF012
    example = "--input shards --output out"

    input: Annotated[str, also("-i", "--data_path")]
    """Source shards: a folder."""
    output: Annotated[Path, also("-o")]
    """Folder for the output."""
    batch_size: Annotated[int | Literal["auto"], also("-b"), at_least(1)] = "auto"
    find: Detector | None = None
    share: float | None = None
    text: str = ""
    only: tuple[str, ...] = ()
    embedded: bool = False
    push: bool = True
    maybe: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command."""

    root: Annotated[Path, POSITIONAL]
    """The folder."""
    json: bool = False


REQUIRED = ["--input", "in", "--output", "out"]


def toy(*words: str) -> Toy:
    return parse_options(Toy, [*REQUIRED, *words], prog="toy.py")


def message(kind: type[Any], *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_options(kind, words, prog="toy.py")
    assert "\n" not in str(caught.value)
    return " ".join(str(caught.value).split())


# ---- what works


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--batch_size", "4"], {"batch_size": 4}),
        (["--batch-size=4"], {"batch_size": 4}),
        (["-b", "4"], {"batch_size": 4}),
        (["-b=auto"], {"batch_size": "auto"}),
        (["--find", "scrfd"], {"find": "scrfd"}),
        (["--find", "None"], {"find": None}),
        (["--share", "-0.5"], {"share": -0.5}),
        (["--share=1e-3"], {"share": 0.001}),
        (["--text", "-5"], {"text": "-5"}),
        (["--text", "-- well"], {"text": "-- well"}),
        (["--text", "– so"], {"text": "– so"}),
        (["--text", "-blurry"], {"text": "-blurry"}),
        (["--text=--embedded"], {"text": "--embedded"}),
        (["--text", "a=b"], {"text": "a=b"}),
        (["--text", "True"], {"text": "True"}),
        (["--text", ""], {"text": ""}),
        (["--only", "a", "b", "--embedded"], {"only": ("a", "b"), "embedded": True}),
        (["--only", "a", "--only=b"], {"only": ("a", "b")}),
        (["--embedded", "True"], {"embedded": True}),
        (["--embedded=false"], {"embedded": False}),
        (["--no_embedded"], {"embedded": False}),
        (["--no-push"], {"push": False}),
        (["--push", "False"], {"push": False}),
        (["--push"], {"push": True}),
        (["--maybe"], {"maybe": True}),
        (["--no_maybe"], {"maybe": False}),
        (["--no_maybe=False"], {"maybe": True}),
        (["--data-path", "in", "-i", "in"], {}),
    ],
)
def test_what_a_command_line_means(words: list[str], meant: dict[str, Any]) -> None:
    assert toy(*words) == replace(toy(), **meant)
    argv = to_argv(toy(*words))
    assert parse_options(Toy, argv) == toy(*words), "a worker is given the same options"


def test_a_value_without_its_flag() -> None:
    assert parse_arguments(Command, ["x", "--json"], "toy") == Command(root=Path("x"), json=True)
    assert parse_arguments(Command, ["--json", "--", "-x"], "toy") == Command(root=Path("-x"), json=True)
    assert parse_arguments(Command, ["--root", "x"], "toy") == Command(root=Path("x"))
    stage = importlib.import_module("05_recaption").Options
    for words in (["x"], ["--data_path=x"], ["x", "--input", "x"]):
        assert parse_options(stage, words).input == ("x",)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--inptu", "x", "--help"]])
def test_help_ends_the_process_with_0(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(Toy, words, prog="toy.py")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("usage: toy.py --input STR --output PATH [options]")


# ---- what does not


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--inptu x", "there is no option --inptu. Did you mean --input?"),
        ("--inptu=x", "there is no option --inptu. Did you mean --input?"),
        ("--INPUT x", "there is no option --INPUT. Did you mean --input?"),
        ("--data_pth x", "there is no option --data_pth. Did you mean --data_path?"),
        ("--batch-sze 4", "there is no option --batch-sze. Did you mean --batch_size?"),
        ("--batch 4", "there is no option --batch. Did you mean --batch_size?"),
        ("--input_folder x", "there is no option --input_folder. Did you mean --input?"),
        ("--no_psuh", "there is no option --no_psuh. Did you mean --no_push?"),
        ("--zzzzz", "there is no option --zzzzz: toy.py --help lists all"),
        ("--apply-blur", "there is no option --apply-blur: type --blur recorded"),
        ("-input x", "-input has one dash in front: type --input"),
        ("-x 4", "there is no option -x: toy.py --help lists all"),
        ("–input x", "–input has a dash from a web page or word processor instead of a hyphen: type --input"),
        (
            "—data‑path x",
            "—data‑path has a dash from a web page or word processor instead of a hyphen: type --data_path",
        ),
        ("–inptu x", "there is no option –inptu. Did you mean --input?"),
        ("- -input x", "there is a space too many in '- -input': type --input"),
        ("-- input x", "there is a space too many in '-- input': type --input"),
        ("input=x", "input=x has no dashes in front: type --input=x"),
        ("batch-size=4", "batch-size=4 has no dashes in front: type --batch_size=4"),
        ("input x", "input has no dashes in front: type --input"),
        ("folder/a.tar", "folder/a.tar belongs to no option: type --input folder/a.tar"),
        ("--input a b --output c",
         "b is a word too many behind --input a: write its flag in front of it, or put quotes around a value with "
         "blanks or *"),
        ("--embedded yes --input a", "yes is a word too many behind --embedded, which takes no value: leave it out"),
        ("--embedded=yes", "--embedded: needs True or False, not 'yes'"),
        ("--input --output x", "--input has no value before --output: type --input STR, or --input=--output if that is "
         "the value"),
        ("--input –output x", "--input has no value before –output: type --input STR, or --input=–output if that is "
         "the value"),
        ("--input -output x", "--input has no value before -output: type --input STR, or --input=-output if that is "
         "the value"),
        ("--output x --input", "--input has no value: type --input STR"),
        ("--output= --input x", "--output names nothing: perhaps a variable or a pattern of the shell was empty"),
        ("--input= --output x", "--input names nothing: perhaps a variable or a pattern of the shell was empty"),
        ("--batch_size=", "--batch_size '': it takes a whole number or auto"),
        ("--only", "--only names nothing: perhaps a variable or a pattern of the shell was empty"),
        ("--only --input a", "--only names nothing: perhaps a variable or a pattern of the shell was empty"),
        ("--input a --output b --only x --only=",
         "--only names nothing: perhaps a variable or a pattern of the shell was empty"),
        ("--no_output", "there is no option --no_output: --output takes a value, and is left out to turn it off"),
        ("--find scrdf", "--find scrdf: it takes auto, scrfd or centerface. Did you mean scrfd?"),
        ("--find SCRFD", "--find SCRFD: it takes auto, scrfd or centerface. Did you mean scrfd?"),
        ("--find nothing", "--find nothing: it takes auto, scrfd or centerface"),
        ("--batch_size auot", "--batch_size auot: it takes a whole number or auto. Did you mean auto?"),
        ("--batch_size 4.5", "--batch_size 4.5: it takes a whole number or auto"),
        ("-b many", "-b many: it takes a whole number or auto"),
        ("--workers two", "--workers two: it takes a whole number"),
        ("--share half", "--share half: it takes a number"),
        ("--input a --input b", "--input twice with two values (a and b): give one of them"),
        ("-i a --data_path b", "-i and --data_path with two values (a and b): give one of them"),
        ("--embedded --no_embedded", "--embedded and --no_embedded with two values (True and False): give one of them"),
        ("", "--input and --output are missing. Example: toy.py --input shards --output out"),
        ("-i x", "--output is missing (folder for the output). Example: toy.py --input shards --output out"),
        ("-o x", "--input is missing (source shards). Example: toy.py --input shards --output out"),
    ],
)  # fmt: skip
def test_a_command_line_that_makes_no_sense_says_what_to_type(words: str, told: str) -> None:
    assert message(Toy, *words.split()) == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["status"], "ROOT is missing (the folder of the dataset). Example: .* status ROOT"),
        (["status", "x", "y"], "y is a word too many behind ROOT; see .* status --help"),
        (["status", "x", "--jsno"], "there is no option --jsno. Did you mean --json?"),
        (["status", "x", "--threshold", "1"], "there is no option --threshold here; 01_filter_noface, neardup take it"),
        (["status", "x", "--rerun"], "there is no option --rerun here; every stage"),
        (["fsck", "x", "--no_imges"], "there is no option --no_imges. Did you mean --no_images?"),
        (["fsck", "--input", "x"], "there is no option --input here: type the value alone, as in `.* fsck TARS`"),
        (["select", "x"], "--out is missing"),
        (["status", "x", "--json", ""], "'' is a word too many behind --json"),
        (["--quiet", "fsck", "x"], "'--quiet' stands in front of the command; type .* fsck --quiet x"),
        (["register", "--dri", "x"], "there is no option --dri. Did you mean --dir?"),
        (["faces", "--inptu", "x"], "there is no option --inptu. Did you mean --input?"),
        (["rewrite", "--input", "x"], "--output is missing .*Example: .* rewrite --input captions --output prompts"),
        (["models", "fetch", "03", "--modle", "x"], "there is no option --modle. Did you mean --model?"),
    ],
)
def test_commands_say_what_to_type(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(words) == 2
    err = capsys.readouterr().err
    assert re.match("error: " + re.sub(r"[?()]", r"\\\g<0>", told), err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "flag", "takers"),
    [
        ("02_captions_processor", "--detector", "01_filter_noface takes it"),
        ("01_filter_noface", "--ports", "02_captions_processor, 05_recaption take it"),
        ("03_generate_images_multigpu", "--lang_threshold", "02_captions_processor takes it"),
        ("04_reshard", "--url_list", "00_download takes it"),
        ("06_metadata", "--data_path", "05_recaption takes it"),
    ],
)
def test_an_option_of_another_stage_names_the_stage(script: str, flag: str, takers: str) -> None:
    kind = importlib.import_module(script).Options
    assert message(kind, flag, "x").startswith(f"there is no option {flag} here; {takers}")


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("03_generate_images_multigpu", "--num_inference_steps 4", "type --steps"),  # of diffusers
        ("03_generate_images_multigpu", "--guidance-scale 1", "type --guidance"),
        ("04_reshard", "-n 100", "type --shards 0-99"),  # of DataComp's resharder
        ("06_metadata", "examples/basic.yml", "type --yml examples/basic.yml"),  # of dataset2metadata
    ],
)
def test_a_word_of_another_tool_is_told_in_the_words_of_this_one(script: str, words: str, told: str) -> None:
    assert told in message(importlib.import_module(script).Options, *words.split())


def test_a_model_may_be_named_in_every_stage_that_takes_one() -> None:
    for script, field in {
        "02_captions_processor": "model_name",
        "05_recaption": "model",
        "06_metadata": "models",
    }.items():
        kind = importlib.import_module(script).Options
        assert getattr(parse_options(kind, [*REQUIRED, "--model", "x"], prog="toy.py"), field) == "x"


@pytest.mark.parametrize("kind", programs())
def test_a_slip_in_any_flag_finds_the_flag(kind: Any) -> None:
    """Two letters swapped in every flag of every stage and command, and one left out."""
    known = {name for flag in flags_of(kind).values() for name in flag.names}
    for flag in flags_of(kind).values():
        if len(flag.name) < 5:
            continue
        name = flag.names[0]
        middle = len(name) // 2
        for slip in (name[:middle] + name[middle + 1] + name[middle] + name[middle + 2 :], name[:-1]):
            if slip in known or slip == name:
                continue
            told = message(kind, slip)
            assert name in told and "Did you mean" in told, (slip, told)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_choice_of_a_stage_tells_its_words(script: str) -> None:
    kind = importlib.import_module(script).Options
    for flag in flags_of(kind).values():
        if flag.choices and str not in flag.kinds:
            told = message(kind, f"{flag.names[0]}=nothing-of-the-kind")
            assert all(str(choice) in told for choice in flag.choices)


def test_words_that_look_like_secrets_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--host", "https://user:secret@host/a", "--host", "https://user:secret@host/b"]
    assert importlib.import_module("02_captions_processor").main([*words, "--input", "x", "--output", "x"]) == 2
    assert "secret" not in capsys.readouterr().err


@dataclass(frozen=True)
class Sizes:
    """Sizes."""

    sizes: tuple[int, ...] = (64, 128)
    """Several numbers."""


def test_a_default_of_several_numbers_is_no_path() -> None:
    assert parse_arguments(Sizes, [], "sizes") == Sizes()
