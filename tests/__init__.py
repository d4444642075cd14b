"""The tests, in folders as the package has them; ``stages`` and ``slurm`` start whole stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "shards"


def replaced(usual: Sequence[object], flags: Sequence[object]) -> list[str]:
    """The words of both lists, with only the last value of a flag that is there several times.

    A stage refuses two values for one option; the tests of a stage have usual values that some of them replace.
    """
    last: dict[str, list[str]] = {}
    name = ""
    for word in map(str, (*usual, *flags)):
        if word.startswith("-"):
            name = word.partition("=")[0]
            last.pop(name, None)
        last.setdefault(name, []).append(word)
    return [word for words in last.values() for word in words]
