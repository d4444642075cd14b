"""The documentation cannot rot: links resolve, every flag has its line, the README's commands run."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.options import RunOptions
from tests import ROOT

SCRIPTS = sorted(ROOT.glob("[0-9][0-9]_*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
SHARED = {field.name for field in dataclasses.fields(RunOptions)}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)


def code_lines(page: Path) -> Iterator[str]:
    """The commands in the page's bash blocks, continued lines joined, comments taken off."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #", 1)[0].strip()
            if line and not line.startswith("#"):
                yield line


def saved_files(text: str) -> dict[str, str]:
    """The files that a page, or a part of one, tells its reader to save: path → content."""
    return dict(re.findall(r"^Save this as `([^`]+)`:\n\n```python\n(.*?)^```", text, flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+\s+(.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_of(script: Path) -> set[str]:
    """The flags that --help lists under all their names, but for ``--help`` itself and names of one letter."""
    command = [sys.executable, str(script), "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    heads = re.findall(r"^  (--\w+)", help_text, flags=re.M)
    also = re.findall(r"\bAlso: ([^.]*)\.", " ".join(help_text.split()))
    names = {name.lstrip("-") for name in [*heads, *", ".join(also).split(", ")]} - {"", "help"}
    return {name.removeprefix("no_") for name in names}


def page_of(script: Path) -> Path:
    return ROOT / "docs" / f"stage-{script.name[:2]}.md"


def tabled_flags(page: Path) -> set[str]:
    """The flags that the page's tables describe: those in the first column."""
    rows = re.findall(r"^\|([^|]*)\|", page.read_text("utf-8"), flags=re.M)
    return {flag for row in rows for flag in re.findall(r"`--(\w+)", row)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert ROOT in file.parents, f"{page.name} links out of the project: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_machine(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in ("/work/", "shared/data", "/root/", "localhost:3"):
        assert name not in text, f"{page.name} names {name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_flag_is_documented(script: Path) -> None:
    flags = flags_of(script)
    assert flags > SHARED
    missing = flags - SHARED - tabled_flags(page_of(script))
    assert not missing, f"{page_of(script).name} has no line for {sorted(missing)}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_page_describes_a_flag_that_is_gone(script: Path) -> None:
    gone = tabled_flags(page_of(script)) - flags_of(script)
    assert not gone, f"{page_of(script).name} describes {sorted(gone)}"


def test_shared_flags_are_documented() -> None:
    assert tabled_flags(ROOT / "docs" / "running.md") == SHARED


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_flag_in_a_command_exists(script: Path) -> None:
    known = {name for flag in flags_of(script) for name in (flag, f"no_{flag}")}
    for page in PAGES:
        for line in code_lines(page):
            if script.name in line:
                used = set(re.findall(r"--(\w+)", line.partition(script.name)[2]))
                assert used <= known, f"{page.name}: {line}"


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z]+)`", page.read_text("utf-8"))}
    named |= {line.split()[1] for page in PAGES for line in code_lines(page) if line.startswith("make ")}
    assert named
    assert named <= targets


def test_every_script_and_folder_that_a_command_names_exists() -> None:
    for page in PAGES:
        saved = saved_files(page.read_text("utf-8"))
        for line in code_lines(page):
            for word in shlex.split(line, comments=True):
                if re.fullmatch(r"(?:[\w-]+/)*[\w-]+\.(?:py|sh)", word):
                    assert (ROOT / word).exists() or word in saved, f"{page.name}: {line}"


def test_the_index_lists_every_page_and_every_file() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    linked = {target.partition("#")[0] for target in LINK.findall(index)}
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name in linked or name == "README.md" or name.startswith("decisions/"), f"docs/README.md lists no {name}"
    shells = [path for path in ROOT.glob("*.sh") if not path.name[0].isdigit()]
    for path in (*shells, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt"):
        assert f"`{path.name}`" in index, f"docs/README.md does not name {path.name}"
    for folder in ("curation", "docs", "examples", "tests", "benchmarks"):
        assert f"`{folder}/`" in index, f"docs/README.md does not name {folder}/"


def test_the_picture_of_the_house_shows_every_package() -> None:
    design = (ROOT / "docs" / "design.md").read_text("utf-8")
    picture = design.partition("The package is a house")[2].partition("To follow one shard")[0]
    for path in (ROOT / "curation").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in picture, f"docs/design.md does not show {path.name}/"
        elif path.suffix == ".py" and not path.stem.startswith("__"):
            assert re.search(rf"\b{path.stem}\b", picture), f"docs/design.md does not show {path.stem}"


def test_every_decision_has_its_three_parts_and_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = (folder / "README.md").read_text("utf-8")
    records = sorted(folder.glob("[0-9]*.md"))
    assert len(records) >= 5
    for record in records:
        assert re.findall(r"^## (.*)$", record.read_text("utf-8"), flags=re.M) == [
            "The problem", "The decision", "What follows",
        ], record.name  # fmt: skip
        assert f"({record.name})" in listed, f"{record.name} is not in the list"


def test_options_have_docstrings() -> None:
    """--help shows them, so that it and the code cannot differ."""
    for script in SCRIPTS:
        module = importlib.import_module(script.stem)
        described: set[str] = set()
        for kind in module.Options.__mro__[:-1]:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(definition, ast.ClassDef)
            for field, text in itertools.pairwise([*definition.body, definition]):
                has_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and (has_text or "Explained(" in ast.unparse(field.annotation)):
                    described.add(ast.unparse(field.target))
        fields = {field.name for field in dataclasses.fields(module.Options)}
        assert not fields - SHARED - described, f"{script.name} {sorted(fields - SHARED - described)}"
