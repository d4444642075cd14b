"""The command ``curation``: its usage, what it says to a wrong word, and the stages as its commands."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import curation
from curation.__main__ import GROUPS, STAGES, main
from curation.commands import stages
from tests import ROOT
from tests.newcomer.records import records_of

SHARDS = ROOT / "examples" / "shards"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as pip writes it into the environment's ``bin``."""
    name = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]["curation"]
    module, function = name.split(":")
    program = tmp_path_factory.mktemp("bin") / "curation"
    lines = (f"#!{sys.executable}", "import sys", f"from {module} import {function}", f"sys.exit({function}())", "")
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    return program


def said(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_the_usage_lists_the_stages_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["help"]) == 0
    text = capsys.readouterr().out
    headings = re.findall(r"^(\w.*):$", text, flags=re.M)
    assert headings[: len(GROUPS) + 1] == ["stages", *GROUPS]
    assert re.findall(r"^  (\w+)  +stage (\d\d)", text, flags=re.M)[:7] == [
        ("download", "00"),
        ("faces", "01"),
        ("rewrite", "02"),
        ("generate", "03"),
        ("reshard", "04"),
        ("caption", "05"),
        ("extract", "06"),
    ]


def test_every_script_has_its_command() -> None:
    scripts = {path.stem for path in ROOT.glob("[0-9][0-9]_*.py")}
    assert scripts == {*stages.COMMANDS.values()}
    assert list(stages.COMMANDS) == list(STAGES)
    for command, script in stages.COMMANDS.items():
        number = script[:2]
        assert STAGES[command].startswith(f"stage {number}: ")
        for name in (command, script, f"{script}.py", number, number.lstrip("0") or "0"):
            assert stages.find_script(name).stem == script


@pytest.mark.parametrize("option", ["--version", "-V", "version"])
def test_the_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert capsys.readouterr().out == f"curation {curation.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("statsu", "status"),
        ("face", "faces"),
        ("Faces", "faces"),
        ("01", "faces"),
        ("1", "faces"),
        ("01_filter_noface.py", "faces"),
        ("filter", "faces"),
        ("recaption", "caption"),
        ("captions", "rewrite or caption"),
        ("metadata", "extract"),
        ("generate-images", "generate"),
        ("--select", "select"),
        ("near-dup", "neardup"),
        ("pub", "publish"),
        ("balance", "select"),
        ("bucket", "verify or publish"),
        ("scores", "extract or select"),
        ("clip", "extract"),
        ("hybrid", "reshard or verify"),
        ("subset", "reshard"),
        ("xyzzy", None),
        ("", None),
    ],
)
def test_a_wrong_word_names_the_nearest_command(
    typed: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed, "--input", "x"]) == 2
    output = capsys.readouterr()
    question = f" Did you mean {meant}?" if meant else ""
    assert output.out == ""
    assert (
        output.err
        == f"error: there is no command {typed!r}.{question} `python -m curation --help` lists all commands\n"
    )


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["help", "status"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m curation status ")
    assert main(["help", "statsu"]) == 2
    assert "Did you mean status?" in capsys.readouterr().err


def test_messages_call_the_program_as_the_user_did(installed: Path) -> None:
    assert said(installed).stdout.startswith("usage: curation COMMAND")
    assert said(installed, "faces", "--help").stdout.startswith("usage: curation faces --input ")
    module = (sys.executable, "-m", "curation")
    assert said(*module, "faces", "--help").stdout.startswith("usage: python -m curation faces --input ")
    usage = said(*module, "models", "fetch", "01", "--help").stdout
    assert usage.startswith("usage: python -m curation models fetch 01_filter_noface [")


def test_one_place_decides_how_messages_call_the_program() -> None:
    sources = [*(ROOT / "curation").rglob("*.*"), *ROOT.glob("0*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sources if path.suffix in (".py", ".j2")}
    naming = {name for name, text in texts.items() if re.search(r"python -m curation(?!\.)", text)}
    assert naming == {"curation/__init__.py", "curation/__main__.py"}  # the latter in its own docstring


def test_a_stage_as_a_command_leaves_what_its_script_leaves(installed: Path, tmp_path: Path) -> None:
    """With two workers, which are processes of the script: outputs, receipts and records of options are the same."""
    for folder, command in (
        ("script", (sys.executable, ROOT / "01_filter_noface.py")),
        ("command", (installed, "faces")),
    ):
        root = tmp_path / folder
        flags = ("--input", SHARDS, "--output", root / "captions", "--edits", root / "edits", "--workers", "2")
        run = said(*command, *flags, "--detector", "recorded", "--shards", "00000000..00000001", cwd=tmp_path)
        assert run.returncode == 1, run.stderr  # the photos have no recorded faces: a failed shard is 1
        assert "2 workers together" in run.stderr
    left = records_of(tmp_path / "command")
    assert left == records_of(tmp_path / "script")
    assert any("_receipts" in name for name in left)


def test_a_stage_as_a_command_ends_with_its_scripts_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["curation"])  # restored afterwards: a stage's command sets its own name
    monkeypatch.chdir(tmp_path)
    assert main(["reshard", "--input", "nowhere", "--edits", "e", "--output", "o"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["rewrite", "--nonsense"]) == 2
    assert "curation rewrite --help" in capsys.readouterr().err
