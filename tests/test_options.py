"""Options of stages and commands: their names, the bounds of numbers, and which may be URLs."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest

from curation.__main__ import COMMANDS
from curation.__main__ import main as command
from curation.errors import UsageError
from curation.options import (
    FINITE,
    LISTED,
    URLS,
    FolderName,
    RunOptions,
    Sides,
    Sources,
    also,
    at_least,
    between,
    less_than,
    more_than,
    parse_arguments,
    parse_options,
    refuse_urls,
)
from curation.publish.background import HubOptions
from curation.run.workers import to_argv
from tests import EXAMPLES, ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))


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


# ---- names

NAMES = {  # of a stage's two folders: today's, earlier ones and those of the tools that the stage takes the place of
    "00_download": (["input", "url_list"], ["output", "output_folder"]),
    "01_filter_noface": (["input"], ["output"]),
    "02_captions_processor": (["input"], ["output"]),
    "03_generate_images_multigpu": (["input", "prompts", "input_files"], ["output", "edits", "output_dir"]),
    "04_reshard": (["input", "input_dir"], ["output", "output_dir"]),
    "05_recaption": (["input", "data_path", "data_dir"], ["output", "output_dir", "checkpoint_dir"]),
    "06_metadata": (["input", "input_tars"], ["output", "output_metadata_dir"]),
}
NEEDED = {"01_filter_noface": ["--edits", "e"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_stage_takes_input_and_output_under_all_their_names(script: str) -> None:
    kind, more = importlib.import_module(script).Options, NEEDED.get(script, [])
    usual = parse_options(kind, ["--input", "in", "--output", "out", *more])
    inputs, outputs = ([f"--{name}" for name in names] for names in NAMES[script])
    for name in [*inputs, "-i"]:
        for spelled in {name, f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name}:
            assert parse_options(kind, [spelled, "in", "--output=out", *more]) == usual
    for name in [*outputs, "-o"]:
        for spelled in {name, f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name}:
            assert parse_options(kind, ["--input=in", spelled, "out", *more]) == usual


def test_one_value_under_two_names_is_fine_and_two_values_are_not() -> None:
    kind = importlib.import_module("03_generate_images_multigpu").Options
    usual = parse_options(kind, ["--input", "in", "--output", "out", "--seed", "1"])
    assert parse_options(kind, ["--prompts", "in", "--input=in", "-o", "out", "--seed", "1", "--seed=1"]) == usual
    for words, names in [
        (["--prompts", "in", "--input=other", "--output", "out"], "--prompts and --input"),
        (["--input", "in", "--edits", "out", "--output-dir", "other"], "--edits and --output-dir"),
        (["--input", "in", "--output", "out", "--seed", "1", "--seed", "2"], "--seed twice"),
    ]:
        with pytest.raises(UsageError, match=f"^{names} with two values"):
            parse_options(kind, words)


UPSTREAM = [  # command lines of the tools that a stage takes the place of; for stage 05 see its own test
    ("02_captions_processor", "--input captions/ --output prompts --num_threads 20 --ports 11434,11435", "captions/"),
    ("02_captions_processor", "--input c --output p --model_name tulu3:fairclip --timeout 10", "c"),
    ("03_generate_images_multigpu", "--input_files prompts --output_dir edits", "prompts"),
    ("04_reshard", "-i shards -o out -s keep.npy --shard-size 10000 --shuffle-bufsize 100 --dry-run", "shards"),
    ("04_reshard", "--input-dir shards --output-dir out --subset-file keep.npy --overwrite", "shards"),
    ("06_metadata", "--yml datacomp.yml", None),
]


@pytest.mark.parametrize(("script", "line", "source"), UPSTREAM)
def test_a_command_line_of_upstream(script: str, line: str, source: str | None) -> None:
    assert parse_options(importlib.import_module(script).Options, line.split()).input == ((source,) if source else ())


# ---- bounds


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
        (["--workers", "11434"], "--workers must be less than 1000"),
        (["--lease_s", "inf"], "--lease_s must be less than 1e+06"),
        (["--stall_s", "nan"], "--stall_s must be more than 0"),
        (["--stall_s", "-5"], "--stall_s must be more than 0"),
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


# ---- URLs

TAKE_URLS = {
    *{(script, "publish_to") for script in SCRIPTS},
    ("00_download", "input"),
    ("01_filter_noface", "input"),
    *{("02_captions_processor", name) for name in ("input", "endpoints")},
    ("04_reshard", "input"),
    *{("05_recaption", name) for name in ("input", "endpoints", "watermark_model", "check_model", "prompt", "hf_repo")},
    *{("06_metadata", name) for name in ("input", "weights", "embeddings", "judge")},
    ("curation.commands.plan.command", "source"),
    *{("curation.commands.publish", name) for name in ("repo", "to")},
    *{("curation.commands.search.command", name) for name in ("text", "weights")},
    ("curation.commands.tables.select", "out"),
    *{("curation.commands.tables.neardup", name) for name in ("out", "keep")},
    ("curation.serving.registry", "url"),
}


def options_that_hold_text() -> list[tuple[str, str, type]]:
    """(module, option, the option's dataclass) of every stage and command, for values of type str or Path."""
    modules = [*SCRIPTS, *(f"curation.{module}" for module in sorted({*COMMANDS.values()}))]
    found = []
    for name in modules:
        kind = getattr(importlib.import_module(name), "Options", None)
        if kind is None or not is_dataclass(kind):
            continue
        for field, hint in get_type_hints(kind).items():
            if {str, Path} & {hint, *get_args(hint)}:
                found.append((name, field, kind))
    return found


@pytest.mark.parametrize(
    ("module", "option", "kind"), options_that_hold_text(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_url_is_no_local_path(module: str, option: str, kind: Any) -> None:
    """Whatever option a stage or a command gets: it refuses URLs, unless it is listed above and says so itself."""
    options = object.__new__(kind)
    for url in ("s3://bucket/folder", "gs://bucket", "hf://datasets/a/b", "https://host/x", "file:///tmp/x"):
        for value in {str: [url, f" {url}"], Path: [Path(url)]}[
            Path if "Path" in str(get_type_hints(kind)[option]) else str
        ]:
            object.__setattr__(options, option, value)
            if (module, option) in TAKE_URLS:
                refuse_urls(options)
            else:
                with pytest.raises(
                    UsageError, match=rf"(?:--{option}|[A-Z]+) \w+://…: a URL, but this option needs a path"
                ):
                    refuse_urls(options)


def test_what_looks_a_little_like_a_url_is_a_path() -> None:
    @dataclass
    class Paths:
        text: str = "x"
        path: Path = Path("x")

    for name in ("endpoint:/models/llava", "a:b/c", "./s3:/x", "C:/x", "/data/http://x", "it says http://x"):
        refuse_urls(Paths(name))
        refuse_urls(Paths(path=Path("folder", name)))
    refuse_urls(Paths(path=Path("C:/x")))


@pytest.mark.parametrize("words", [
    ["status", "s3://bucket"],
    ["report", "s3://bucket"],
    ["select", "s3://bucket", "--where", "x > 1", "--out", "y.npy"],
    ["index", "s3://bucket", "--feature", "f", "--out", "x"],
    ["index", ".", "--feature", "f", "--out", "s3://bucket/index"],
    ["search", ".", "--text", "a cat", "--sheet", "s3://bucket/sheet.html"],
    ["search", ".", "--image", "https://example.org/a.jpg"],
    ["fsck", ".", "--repair", "s3://bucket/fixed"],
    ["register", "--dir", "s3://bucket/servers", "--url", "http://h:1", "--model", "m"],
])  # fmt: skip
def test_commands_make_no_folder_named_like_a_url(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(words) == 2
    assert "a URL, but this option needs a path on this machine's filesystem" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ["04_reshard", "--input", "x", "--output", "https://host/x", "--edits", "e"],
    ["05_recaption", "x", "-o", "https://host/x", "--work_dir", "w"],
    ["06_metadata", "--yml", "c.yml"],
])  # fmt: skip
def test_an_output_on_a_web_server_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text("models: [statistics]\ninput_tars: x\noutput_metadata_dir: https://host/x\n")
    assert importlib.import_module(words[0]).main(words[1:]) == 2
    assert "a URL, but this option needs a path on this machine's filesystem" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.yml"]


@pytest.mark.parametrize("words", [
    ["select", ".", "--where", "x > 1", "--out", "s3://bucket/y.npy"],
    ["neardup", ".", "--feature", "f", "--threshold", "0.9", "--out", "s3://bucket/y.parquet"],
    ["neardup", ".", "--feature", "f", "--threshold", "0.9", "--out", "x.parquet", "--keep", "gs://bucket/y.npy"],
])  # fmt: skip
def test_a_result_that_is_a_url_is_made_in_a_folder_that_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(words) == 2
    assert "is a URL: add --work_dir FOLDER" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ["00_download", "--input", "t.parquet", "--output", "s3://bucket/x"],
    ["01_filter_noface", "--input", "x", "--output", "s3://bucket/x", "--edits", "e"],
    ["02_captions_processor", "--input", "x", "--output", "s3://bucket/x"],
    ["03_generate_images_multigpu", "--input", "x", "--output", "s3://bucket/x"],
    ["04_reshard", "--input", "x", "--output", "s3://bucket/x", "--edits", "e"],
    ["05_recaption", "x", "-o", "s3://bucket/x"],
    ["06_metadata", "--input", "x", "--models", "statistics", "--output", "s3://bucket/x"],
    ["06_metadata", "--yml", "c.yml"],
])  # fmt: skip
def test_stages_make_no_folder_named_like_a_url(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text("models: [statistics]\ninput_tars: x\noutput_metadata_dir: s3://bucket/x\n")
    assert importlib.import_module(words[0]).main(words[1:]) == 2
    assert "--output s3://bucket/x is a URL: add --work_dir FOLDER" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.yml"]


def test_a_flag_behind_a_script_takes_the_place_of_the_scripts_own(tmp_path: Path) -> None:
    """``.sh`` scripts give --workers and --edits themselves, unless the user does."""
    script = ROOT / "01_filter_noface.sh"
    flags = ["--workers=1", "--edits", str(tmp_path / "e"), "--dry_run", "--embedded"]
    shards = {"SRC_DIR": str(EXAMPLES), "TARGET_DIR": str(tmp_path / "c"), "WORKERS": "2", "PYTHON": sys.executable}
    for more, code in ((), 0), (("--output", str(tmp_path / "other")), 2):
        command = ["bash", str(script), *flags, *more]
        run = subprocess.run(
            command, env={**os.environ, **shards}, capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == code, run.stderr
    assert "--output twice with two values" in run.stderr


# ---- several values, lists, and paths that no shell has read


@dataclass(frozen=True, kw_only=True)
class Sourced(RunOptions):
    """Options of a toy that reads several sources."""

    source: Annotated[Sources, also("--from", "-f")]
    """Where from."""
    output: FolderName = "out"
    ports: Annotated[str, LISTED] = "1"
    note: str = ""
    far: Annotated[str | None, URLS] = None
    place: Path = Path("here")


@pytest.mark.parametrize(("words", "source"), [
    (["--source", "a", "b", "c"], ("a", "b", "c")),
    (["--from=a", "b", "--from", "c"], ("a", "b", "c")),
    (["--source", "a", "--ports", "3", "--source", "b", "a", "--workers", "2"], ("a", "b")),
    (["-f", "a", "b", "--source", "a", "b"], ("a", "b")),
    (["--from=a"], ("a",)),
    (["--source", "--from=-b.tar"], None),
    (["--source=-b.tar", "x"], ("./-b.tar", "x")),
    (["--source"], None),
    (["--source", ""], None),
    (["--source", "--output", "x"], None),
])  # fmt: skip
def test_an_option_with_several_values(words: list[str], source: tuple[str, ...] | None) -> None:
    if source is None:
        with pytest.raises(UsageError, match="--source names nothing: perhaps a variable or a pattern of the shell"):
            parse_options(Sourced, words)
        return
    options = parse_options(Sourced, words)
    assert options.source == source
    assert parse_options(Sourced, to_argv(options)) == options, "what a worker is given"


def test_sources_under_two_names_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^--source and -f with two values \(a b and a c\)"):
        parse_options(Sourced, ["--source", "a", "b", "-f", "a", "c"])


def test_thousands_of_values() -> None:
    names = [f"shards/{number:08d}.tar" for number in range(20_000)]
    assert parse_options(Sourced, ["--source", *names, "--workers", "2"]).source == tuple(names)


@pytest.mark.parametrize(("words", "ports", "source"), [
    (["--ports", "11434", "11435", "-f", "a"], "11434,11435", ("a",)),
    (["--ports", "a,", "b", ",c", "-f", "a"], "a,,b,,c", ("a",)),
    (["--ports=1-3", "5", "-f", "a"], "1-3,5", ("a",)),
    (["-f", "a", "--ports", "7"], "7", ("a",)),
])  # fmt: skip
def test_a_list_of_which_the_shell_makes_several_words(words: list[str], ports: str, source: tuple[str, ...]) -> None:
    options = parse_options(Sourced, words)
    assert (options.ports, options.source) == (ports, source)


def test_paths_in_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["--source", "~/a", "“b”", f"file://{tmp_path}/c%20d", "https://host/~/x", "pipe:cat ~/x"]
    options = parse_options(Sourced, [*words, "--output=“~/out”", "--place", "~/x", "--note", "~/note", "--far=~/$X"])
    home = str(tmp_path)
    assert options.source == (f"{home}/a", "b", f"{home}/c d", "https://host/~/x", "pipe:cat ~/x")
    assert (options.output, options.place) == (f"{home}/out", tmp_path / "x")
    assert (options.note, options.far) == (f"{home}/note", "~/$X"), "what may be no path at all stays"
    assert parse_options(Sourced, ["-f", "x", "--note", " 'it' "]).note == " 'it' "
    (tmp_path / "~").mkdir()
    assert parse_options(Sourced, ["-f", "x", "--output", "~"]).output == "~", "an older run's folder"
    for words in (["--output", "$HOME/x"], ["--place", "/a/${B}"], ["--source", "$X"]):
        with pytest.raises(UsageError, match=rf"{words[0]} .* the shell did not put a value in place of \$"):
            parse_options(Sourced, ["-f", "x", *words] if words[0] != "--source" else words)


COMMANDS_WITH_SEVERAL = {"plan": "source", "verify": "source", "fsck": "tars"}


@dataclass(frozen=True, kw_only=True)
class Sized(RunOptions):
    """Options of a toy with numbers."""

    width: int | None = None
    height: Annotated[int | None, at_least(1)] = None
    size: Annotated[Literal["fixed", "free"], Sides("width", "height")] = "fixed"
    batch: Annotated[int | Literal["auto"], also("-b")] = 1
    text: str = ""


@pytest.mark.parametrize(("words", "expected"), [
    (["--size", "1024x768"], {"width": 1024, "height": 768}),
    (["--size=1024 × 768"], {"width": 1024, "height": 768}),
    (["--size", "512"], {"width": 512, "height": 512}),
    (["--size", "free", "--width", "1e3"], {"size": "free", "width": 1000}),
    (["--width=640x640", "--height", "auto", "--workers", "1.2e1"], {"width": 640, "workers": 12}),
    (["--lease_s", "1e3", "-b", "auto", "--text", "1e3"], {"lease_s": 1000.0, "batch": "auto", "text": "1e3"}),
    (["--batch", " 8 ", "--width", "1_000"], {"batch": 8, "width": 1000}),
])  # fmt: skip
def test_forms_of_a_number(words: list[str], expected: dict[str, object]) -> None:
    assert parse_options(Sized, words) == Sized(**expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words", [["--width", "640x480"], ["--width", "1e-3"], ["--workers", "auto"], ["--size", "x9"]]
)
def test_what_is_no_number(words: list[str]) -> None:
    with pytest.raises(UsageError, match=f"{words[0]} {words[1]}: it takes "):
        parse_options(Sized, words)


def test_a_size_and_a_width_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match="--size and --width with two values"):
        parse_options(Sized, ["--size", "512x512", "--width", "256"])


def test_a_stage_takes_them() -> None:
    kind = importlib.import_module("03_generate_images_multigpu").Options
    words = ["--input", "p", "--output", "e", "--size", "1024x768", "--batch_size", "auto"]
    assert parse_options(kind, words) == kind(input=("p",), output="e", width=1024, height=768)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_stage_takes_several_sources_and_paths_as_people_type_them(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    kind, name = importlib.import_module(script).Options, "input"
    folders = [folder for folder in ("output", "edits") if folder in get_type_hints(kind)]
    words = [word for folder in folders for word in (f"--{folder}", f"'~/{folder}'")]
    options = parse_options(kind, [f"--{name}", "a.tar", "~/b", *words, f"--{name}=c", "--shards", "3", "4-5"])
    assert getattr(options, name) == ("a.tar", f"{tmp_path}/b", "c")
    assert [str(getattr(options, folder)) for folder in folders] == [f"{tmp_path}/{folder}" for folder in folders]
    assert options.shards == "3,4-5"


@pytest.mark.parametrize("name", COMMANDS_WITH_SEVERAL)
def test_each_command_takes_several_sources(name: str) -> None:
    kind = importlib.import_module(f"curation.{COMMANDS[name]}").Options
    last = [] if name == "fsck" else ["root"]
    for words in (["a", "b", *last, "--shards", "3"], ["--shards", "3", "a", "b", *last]):
        assert getattr(parse_arguments(kind, words, name), COMMANDS_WITH_SEVERAL[name]) == ("a", "b")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("0*.sh")))
def test_variables_of_the_job_scripts_as_people_write_them(script: str, tmp_path: Path) -> None:
    """~ between quotes becomes the home folder before a folder is made; the user's --input takes SRC_DIR's place."""
    sources = dict.fromkeys(("SRC_DIR", "URLS"), "~/a.tar b.tar")
    given = {**sources, "TARGET_DIR": "“~/out”", "EDITS_DIR": " ~/edits\n", "PROMPTS_DIR": "none", "PORTS": "1-2"}
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHON": "/bin/echo", **given}

    def run(*flags: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", ROOT / script, *flags], env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True
        )

    printed = run().stdout
    assert " --input ~/a.tar b.tar" in printed, "the stage takes it apart"
    assert f" --output {tmp_path}/out" in printed
    assert "edits" not in printed or f" --edits {tmp_path}/edits" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run("--input=other").stdout.count("--input") == 1
    for value, says in (("$HOME/out", "did not put a value in place"), ("~nobody_here/x", "no user 'nobody_here'")):
        refused = run(TARGET_DIR=value)
        assert (refused.returncode, says in refused.stderr) == (2, True)


@pytest.mark.parametrize("near", ["SRCDIR", "src_dir", "SRC", "SRC_DIRS"])
def test_a_misspelt_variable_of_a_script_is_named(near: str, tmp_path: Path) -> None:
    environment = {**os.environ, near: str(EXAMPLES), "TARGET_DIR": str(tmp_path / "c"), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "01_filter_noface.sh")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert f"SRC_DIR is not set: the source shards.  {near} is set: was SRC_DIR meant?" in run.stderr
