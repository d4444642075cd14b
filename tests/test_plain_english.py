"""Plain English: no word or turn of phrase that a reader whose first language is not English would look up.

What users read (pages, help, messages) and what developers read (docstrings) go by one list.  Each entry has what is
written in its place; a new oddity that a reader reports becomes a new entry.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

# Pattern → what to write.  Lower-case letters match capitals at the start of a sentence too.
ODD = {
    r"machinery": "the library, or the part's name",
    r"lately": "in the last N seconds, recent",
    r"sound(?! (?:track|card|like)|s?\|)": "whole, valid, undamaged, or OK",
    r"mute": "does not answer",
    r"fared?\b": "lost samples at a higher rate",
    r"beyond chance": "significant difference",
    r"the last word": "check …",
    r"out of commands": "from the output of a command",
    r"bind whoever": "apply to",
    r"what became of": "what happened to",
    r"what must hold": "tests",
    r"as DataComp has (?:them|it)": "in DataComp's metadata format",
    r"a little warmer": "the temperature rises",
    r"what to do about": "fix for",
    r"(?:is|are) gone on with": "continue",
    r"those that have not": "those without",
    r"(?:hitherto|thereof|hence|wherein|whereby|thereby|thereafter|heretofore|thus far|insofar|albeit|lest|amongst|"
    r"whilst|henceforth|forthwith|notwithstanding|aforementioned|herein)": "a common word",
    r"shall": "should, must or will",
    r"upon": "on",
    r"or the like": "or a similar one",
    r"by (?:its|their) very nature": "leave it out",
    r"(?:at|in) the same breath": "at the same time",
    r"for good": "permanently",
    r"may well": "probably",
    r"tells? apart": "distinguish",
    r"at odds": "differ",
    r"behold": "see",
    r"nought|naught": "nothing, zero",
    r"go(?:es|ne)? on with": "continue",
    r"come and go": "start and stop",
    r"right behind": "directly after",
    r"one's own": "your own",
    r"anew": "again",
    r"anyhow": "too, or anyway",
    r"time after time": "repeatedly",
    r"not to be had": "not available",
    r"stood still": "stopped, or has not changed",
    r"in force": "used",
    r"all the same": "anyway",
    r"vouch(?:es)?": "record",
    r"at hand": "available",
    r"reckon(?:s|ed)?": "compute",
    r"what (?:comes out|is not there yet)": "output, or limitations",
    r"for they": "because they",
    r"in vain": "without success",
    r"thus": "therefore, or in this way",
}
LISTED = {pattern: re.compile(rf"(?<![\w/.`-])(?:{pattern})(?![\w`-])", re.IGNORECASE) for pattern in ODD}
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
SCRIPTS = sorted([*ROOT.glob("*.sh"), *(ROOT / "examples").rglob("*.sh"), *(ROOT / "examples").rglob("*.y*ml")])
MODULES = sorted([*ROOT.glob("*.py"), *(ROOT / "curation").rglob("*.py"), *(ROOT / "examples").glob("*.py")])


def prose_of_page(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a page without its code, in blocks and between backticks."""
    inside = False
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield number, re.sub(r"`[^`]*`", "`", line)


def texts_of_module(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings and texts of a module: those of more than one word."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def odd_phrases(texts: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"line {number}: {found[0]!r}; write: {ODD[pattern]}"
        for number, text in texts
        for pattern, expression in LISTED.items()
        if (found := expression.search(text))
    ]


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_and_job_scripts(page: Path) -> None:
    lines = prose_of_page(page) if page.suffix == ".md" else enumerate(page.read_text("utf-8").splitlines(), 1)
    if page.name == "CHANGELOG.md":  # what was written about older versions stays
        lines = ((number, line) for number, line in lines if number < older_version_at(page))
    assert odd_phrases(iter(lines)) == []


def older_version_at(page: Path) -> int:
    """The number of the line where the second version of a changelog begins."""
    return [n for n, line in enumerate(page.read_text("utf-8").splitlines(), 1) if line.startswith("## ")][1]


def test_help_messages_and_docstrings() -> None:
    found = {str(path.relative_to(ROOT)): odd_phrases(texts_of_module(path)) for path in MODULES}
    assert {path: phrases for path, phrases in found.items() if phrases} == {}
