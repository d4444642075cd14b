"""``curation run``: a pipeline's file is checked whole, its stages run one after another, the exit code is theirs."""

# ruff: noqa: UP031
from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from curation.commands.pipeline.check import NOT_SHARED
from curation.commands.pipeline.command import Options, main
from curation.options import RunOptions
from tests import EXAMPLES, ROOT, processes

EXAMPLE, WITH_MODELS = ROOT / "examples" / "pipeline.yaml", ROOT / "examples" / "pipeline-hybrid.yaml"
SHORT = """
vars:
  SOURCE: {source}
  ROOT: {root}
stages:
  faces:
    input: ${{SOURCE}}
    output: ${{ROOT}}/captions
    edits: ${{ROOT}}/edits
    detector: recorded
  "04/copies":
    input: ${{SOURCE}}
    output: ${{ROOT}}/copies
    index: yes
"""


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """Two stages that take a second each, on shards of which 00000001 and 00000003 have recorded faces."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(SHORT.format(source=EXAMPLES, root=tmp_path / "root"))
    return file


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "curation", "run", *map(str, arguments)]
    kept = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=240, check=False)


def commands_in(text: str) -> list[list[str]]:
    """The commands that a run or a dry run shows, as words."""
    lines = [line.removeprefix("$ ") for line in text.splitlines()]
    return [shlex.split(line) for line in lines if ".py " in line and not line.startswith("#")]


def dry(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
    assert main([*map(str, arguments), "--dry_run"]) == 0, capsys.readouterr().err
    return commands_in(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a file or a command line is refused."""
    assert main([*map(str, arguments), "--dry_run"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


# ---- runs


@pytest.mark.slow
def test_the_example_runs_from_end_to_end(tmp_path: Path) -> None:
    small = ["--set", "03.height=64", "03.width=64", f"ROOT={tmp_path}", "--shards", "00000003"]
    done = run(EXAMPLE, *small)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shards" / "00000003.tar").is_file()
    receipt = json.loads(next(tmp_path.glob("shards/_receipts/*/*/00000003.json")).read_bytes())
    assert receipt["notes"]["edited"] == 1
    shown = commands_in(done.stdout)
    assert [Path(words[1]).name[:2] for words in shown] == ["01", "02", "03", "04"]
    assert done.stdout.splitlines()[-1].startswith(f"{EXAMPLE}: 4 stages done in ")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    again = run(EXAMPLE, *small)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == before, "nothing is done twice"


def test_each_stage_is_run_by_a_command_that_a_user_can_type(short: Path, tmp_path: Path) -> None:
    done = run(short, "--shards", "00000001", "--workers", "2", "--quiet", "--set", f"ROOT={tmp_path}/with blank")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "with blank" / "copies" / "00000001.idx").is_file()
    first, second = commands_in(done.stdout)
    assert first[0] in ("python", sys.executable)
    assert first[1:4] == ["01_filter_noface.py", "--input", str(EXAMPLES)]
    assert second[-5:] == ["--shards", "00000001", "--workers", "2", "--quiet"]
    typed = subprocess.run([sys.executable, *second[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert typed.returncode == 0, "the same command finds everything done"


def test_a_stage_that_does_not_end_well_is_the_last_one(short: Path, tmp_path: Path) -> None:
    failed = run(short)  # some shards have no recorded faces
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith(f"error: {short}: stage faces ended with exit code 1: some shards failed or are blocked; ")
    assert f"status {tmp_path}/root/captions` names the shards" in last
    assert "not started: 04/copies" in last
    assert "--stages 04/copies continues without them" in last
    assert not (tmp_path / "root" / "copies").exists()
    late = run(short, "--deadline", "0s", "--set", f"ROOT={tmp_path}/late")
    assert late.returncode == 75
    assert "run the same command again to continue" in late.stderr.splitlines()[-1]
    rest = run(short, "--stages", "4", "--shards", "00000001")
    assert (rest.returncode, rest.stdout.count("$ ")) == (0, 1), rest.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signals_are_passed_on(number: signal.Signals, tmp_path: Path) -> None:
    """Stage 02 waits for servers that never come."""
    file, servers = tmp_path / "p.yaml", tmp_path / "servers"
    servers.mkdir()
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "0.json").write_text(json.dumps({"a.json": "A man in a park"}))
    stage = {"input": f"{tmp_path}/captions", "output": f"{tmp_path}/prompts", "endpoints_dir": str(servers)}
    later = {"input": f"{tmp_path}/prompts", "output": f"{tmp_path}/edits", "embedded": "true"}
    file.write_text(json.dumps({"stages": {"02": stage, "03": later}}))
    command = [sys.executable, "-m", "curation", "run", str(file)]
    with processes.started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        line = ""
        while "server" not in line:
            line = process.stderr.readline()
            assert line, "it ended by itself"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "stage 02 ended with exit code 75" in said
    assert "not started: 03" in said


def test_a_stage_that_is_killed(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is a shell's: 128 and the signal."""
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr("curation.commands.pipeline.check.StageCommand.command", kill)
    handlers = {number: signal.getsignal(number) for number in signal.Signals if number not in (9, 19, 32, 33)}
    try:
        assert main([str(short)]) == 137
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
    assert "killed by signal 9" in capsys.readouterr().err


# ---- what the file and the command line mean


def test_a_value_is_the_text_that_stands_there(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML alone would read these as 1, False and 8."""
    short.write_text(
        f"all: {{quiet: true, workers: 0o3}}\nstages:\n  02:\n    input: {tmp_path}\n    output: x\n"
        "    model_name: 010\n    lang: no\n    system_prompt: ~\n    temperature: 1e0\n    groups: none\n"
    )
    assert "0o3" in refused(capsys, short)
    [words] = dry(capsys, short, "all.workers=3", "--set", "02.groups=null", "rewrite.seed=-1")
    assert words[2:] == [
        *["--input", str(tmp_path), "--output", "x", "--model_name", "010", "--lang", "no", "--temperature", "1e0"],
        *["--quiet", "--workers", "3", "--seed=-1"],
    ]  # fmt: skip


def test_what_goes_before_what(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """all < the stage < the command line < --set."""
    text = short.read_text() + "\nall:\n  workers: 2\n  max_error_rate: 0.5\n"
    short.write_text(text.replace("detector: recorded", "detector: recorded\n    workers: 3"))

    def workers(*arguments: str) -> list[str]:
        return [words[words.index("--workers") + 1] for words in dry(capsys, short, *arguments)]

    assert workers() == ["3", "2"]
    assert workers("--workers", "4") == ["4", "4"]
    assert workers("--workers", "4", "--set", "01.workers=5") == ["5", "4"]
    assert workers("--set", "all.workers=6") == ["3", "6"]
    assert workers("--set=01_filter_noface.workers=5", "04/copies.workers=7") == ["5", "7"]


def test_lists_mappings_and_other_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "stages:\n- extract:\n    input_tars: examples/shards\n    output: out\n    batch-size: 4\n"
        "    models: [language, hashes]\n    weights: {language: own.ftz}\n    use_datacomp_keys: on\n"
    )
    [words] = dry(capsys, file)
    assert words[1:] == [
        *["06_metadata.py", "--input_tars", "examples/shards", "--output", "out", "--batch_size", "4"],
        *["--models", "language,hashes", "--weights", "language=own.ftz", "--use_datacomp_keys"],
    ]  # fmt: skip


def test_variables(short: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DATASET", "from-env")
    short.write_text(SHORT.format(source=EXAMPLES, root="~/${NAME}-$${NAME}-$HOME\n  NAME: ${DATASET}"))
    first, _ = dry(capsys, short)
    assert first[5] == "/home/somebody/from-env-${NAME}-$HOME/captions"
    first, _ = dry(capsys, short, "NAME=given")
    assert first[5] == "/home/somebody/given-${NAME}-$HOME/captions"
    monkeypatch.setenv("NAME", "another")
    assert main([str(short), "--dry_run"]) == 0
    assert "note: NAME: " in capsys.readouterr().err
    assert "does not use ${NMAE}: did you mean 'NAME'?" in refused(capsys, short, "NMAE=x")
    monkeypatch.setenv("DATASET", "")
    assert "no value for ${DATASET}: give --set DATASET=…" in refused(capsys, short), "an empty one is as good as none"
    monkeypatch.delenv("DATASET")
    assert "no value for ${DATASET}: give --set DATASET=…" in refused(capsys, short)


def test_stages_of_the_file(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def numbers(stages: str) -> list[str]:
        return [words[1][:2] for words in dry(capsys, short, "--stages", stages)]

    assert numbers("01-04") == ["01", "04"]
    assert numbers("1") == numbers("faces") == numbers("00-03") == ["01"]
    assert numbers("reshard, 01") == ["01", "04"]
    assert numbers("04/copies") == ["04"]
    [words] = dry(capsys, short, "--stages=01", "--workers=2")
    assert words[-2:] == ["--workers", "2"], "--flag=value is no setting"
    for stages, words in {
        "02": "the file has no stage 02; it has faces, 04/copies",
        "4-1": "is in descending order",
        "05-06": "has no stage from 05 to 06",
        "09": "there is no stage '09'",
        ",": "names no stage",
    }.items():
        assert words in refused(capsys, short, "--stages", stages)


def test_every_shared_option_can_be_given() -> None:
    shared = {field.name for field in fields(RunOptions)} - set(NOT_SHARED)
    assert shared <= {field.name for field in fields(Options)}


def test_the_deadline_is_that_of_the_whole_pipeline(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time()
    for arguments in (["--deadline", "2h"], ["--set", "all.deadline=2h"]):
        times = {words[words.index("--deadline") + 1] for words in dry(capsys, short, *arguments)}
        assert len(times) == 1
        end = time.mktime(time.strptime(times.pop(), "%Y-%m-%dT%H:%M:%S"))
        assert 7190 < end - began < 7260


def test_the_example_with_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no value for ${SOURCE}, ${ROOT}" in refused(capsys, WITH_MODELS)
    shown = dry(capsys, WITH_MODELS, f"SOURCE={EXAMPLES}", "--set", f"ROOT={tmp_path}", "03.steps=2")
    assert [words[1][:2] for words in shown] == ["01", "02", "03", "04", "06", "06"]
    assert shown[2][-2:] == ["--steps", "2"]


def test_captions_that_an_earlier_stage_will_write_can_be_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pipeline.yaml"
    for mix in ("0.3:web,0.7:synthetic", "[0.3:web, 0.7:synthetic]"):
        file.write_text(
            f"vars: {{ROOT: {tmp_path}}}\nstages:\n"
            f"  05:\n    input: {EXAMPLES}\n    output: ${{ROOT}}/recaptions\n"
            f"  04:\n    input: {EXAMPLES}\n    output: ${{ROOT}}/mixed\n"
            f"    captions: ${{ROOT}}/recaptions\n    mix: {mix}\n"
        )
        shown = dry(capsys, file)
        assert [words[1][:2] for words in shown] == ["05", "04"]
        assert shown[1][-4:] == ["--captions", f"{tmp_path}/recaptions", "--mix", "0.3:web,0.7:synthetic"]


# ---- what is refused before the first stage starts

STAGE_01 = "01: {input: examples/shards, output: c, edits: e"
BAD = {
    "stages: {%s, outptu: x}}" % STAGE_01: "stage 01: there is no option 'outptu': did you mean 'output'?",
    "stages: {%s, embedded: maybe}}" % STAGE_01: "embedded: write true or false, not 'maybe'",
    "stages: {%s, min_faces: two}}" % STAGE_01: "two",
    "stages: {%s, min_faces: 0}}" % STAGE_01: "stage 01: --min_faces must be at least 1",
    "stages: {%s, device: gpu}}" % STAGE_01: "gpu",
    "stages: {%s, det_size: 33}}" % STAGE_01: "--det_size must be a multiple of 32",
    "stages: {%s, detector: {a: [1]}}}" % STAGE_01: "01: detector: write one value, or a list of values",
    "stages: {%s, dry_run: true}}" % STAGE_01: "dry_run: `curation run … --dry_run`",
    "stages: {%s, workers: 1, WORKERS: 2}}" % STAGE_01: "there is no option 'WORKERS'",
    "stages: {%s, det_size: 64, det-size: 32}}" % STAGE_01: "det_size and det-size are the same option",
    "stages: {01: {input: examples/shards, output: c}}": "edits",
    "stages: {01: {input: nowhere, output: c, edits: e}}": "there is no such file or folder, and no stage before it",
    "stages: {%s}, 02: {input: captions, output: p}}" % STAGE_01: "stage 02: input",
    "stages: {%s}, 01_filter_noface: {}}" % STAGE_01: "01 and 01_filter_noface are the same stage",
    "stages: {%s}, '01': {}}" % STAGE_01: "the key '01' is there twice",
    "stages: {01_filter: {}}": "there is no stage '01_filter'",
    "stages: {07: {}}": "there is no stage '07'",
    "stages: {[1]: {}}": "not YAML",
    "stages: [[1]]": "a stage is named by its number or name",
    "stages: all of them": "write a line `01:` for each stage",
    "stages: {01: text}": "write lines such as `name: value`",
    "stages:": "the key `stages` is missing or empty",
    "stages: {}": "the key `stages` is missing or empty",
    "stage: {%s}}" % STAGE_01: "unknown key 'stage': did you mean 'stages'?",
    "%s}" % STAGE_01: "stage 01 must be below the key `stages`",
    "models: [language]": "a configuration of stage 06",
    "": "not a pipeline",
    "- 1": "not a pipeline",
    "all: {model: x}\nstages: {%s}}" % STAGE_01: "'model' is no option that all stages have",
    "all: {wokers: 2}\nstages: {%s}}" % STAGE_01: "did you mean 'workers'?",
    "all: {follow: true}\nstages: {%s}}" % STAGE_01: "run_pipeline.sh --follow",
    "stages: {04: {input: examples/shards, output: o, captions: no, mix: '1:synthetic'}}": "captions",
    "stages: {04: {input: examples/shards, output: o, captions: docs, mix: '0.5:web,0.4:synthetic'}}": "add up to 1",
    "stages: {04: {input: examples/shards, output: o, captions: docs}}": "--captions needs --mix",
    "stages: {05: {input: examples/shards, format: pdf}}": "format",
    "stages: {05: {output: x}}": "stage 05: --input is missing",
    "stages: {06: {input: examples/shards, output: x}}": "stage 06: give --models",
    "stages: {06: {input: examples/shards, models: language}}": "stage 06: output is missing",
    "stages: {06: {input: examples/shards, output: x, models: langauge}}": "did you mean 'language'?",
    "stages: {03: {input: examples, output: x, model: no-such-folder}}": "no such folder",
    # hostile
    "a: &a [x, x]\nb: &b [*a, *a]\nstages: &c [*b, *c]": "aliases stand for more than",
    "stages: !!python/object/apply:os.system [echo]": "not YAML",
    "stages: {%s, min_faces: !!int 2}}" % STAGE_01: "write one value",
    "stages: " + "[" * 5000: "nested too deep",
    "vars: {A: '${B}', B: '${A}'}\nstages: {%s, model: '${A}'}}" % STAGE_01: "A stands for itself (A → B → A)",
    "vars: {A: '%s', B: '%s'}\nstages: {%s, model: '${B}'}}" % ("x" * 9999, "${A}" * 99, STAGE_01): "longer than",
    "vars: {A-B: x}\nstages: {%s}}" % STAGE_01: "'A-B' cannot be a name",
    "vars: {A: [x]}\nstages: {%s}}" % STAGE_01: "vars: A: write one value",
    "stages: {%s, model: '${A:-x}'}}" % STAGE_01: "is not a variable: write ${NAME}",
    "stages: {%s, model: '${A'}}" % STAGE_01: "is not a variable",
    "stages: {%s, model: '${}'}}" % STAGE_01: "is not a variable",
    "stages: {%s, \"mo\\e[31mdel\": x}}" % STAGE_01: "there is no option",
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), BAD.items(), ids=range(len(BAD)))
def test_what_is_wrong_is_said_before_anything_starts(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    said = refused(capsys, file)
    assert words in said
    assert str(file) in said, "the message names the file"
    assert "\x1b" not in said


def test_a_missing_package_of_a_later_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = tmp_path / "pipeline.yaml"
    third = "03: {input: p, output: e, embedded: true, check: face}"
    file.write_text("stages: {%s}, 02: {input: c, output: p, embedded: true}, %s}" % (STAGE_01, third))
    assert "stage 03: onnxruntime cannot be imported" in refused(capsys, file)


def test_many_empty_variables_are_no_bomb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"N{number}" for number in range(60)]
    lines = [f"  {name}: ${{{other}}}${{{other}}}" for name, other in itertools.pairwise(names)]
    file = tmp_path / "p.yaml"
    file.write_text("\n".join(["vars:", *lines, "  N59: ''", "stages:", f"  {STAGE_01}, model: '${{N0}}'}}"]))
    began = time.monotonic()
    main([str(file), "--dry_run"])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("ROOT", "write ROOT=value for a variable, or 03.model=value"),
        ("02.model=x", "the file has no stage 02"),
        ("07.model=x", "there is no stage '07'"),
        ("01.modle=x", "there is no option 'modle': did you mean 'model'?"),
        ("all.modle=x", "no option that all stages have"),
        ("01.dry_run=true", "dry_run"),
        ("01.list_models=true", "list_models: it only prints a list"),
        ("ROOT=", "--set ROOT= is empty: perhaps a variable of the shell was empty"),
    ],
)
def test_settings_that_make_no_sense(setting: str, words: str, short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, short, "--set", setting)


def test_a_setting_with_two_values(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--set gives ROOT two values (ROOT=a and ROOT=b)" in refused(capsys, short, "ROOT=a", "--set", "ROOT=b")
    assert "--set gives 01.min_faces two values" in refused(capsys, short, "01.min_faces=2", "01.min_faces=3")
    assert dry(capsys, short, "01.min_faces=2", "--set", "01.min_faces=2")


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in refused(capsys, tmp_path / "nothing.yaml")
    assert "cannot be read" in refused(capsys, tmp_path)
    large = tmp_path / "large.yaml"
    large.write_text("#" * (2 << 20))
    assert "more than 1,048,576 bytes" in refused(capsys, large)
