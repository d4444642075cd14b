"""Checkpoints that reason before they answer: how that is turned off, and how it is known where it cannot be."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from curation.replies import is_reasoning_mark, open_reasoning

THOUGHT_TOKENS = 2048  # for the reasoning before a caption, where it cannot be turned off

# Variables by which chat templates are told not to let the model reason.
_SWITCHES = ("enable_thinking", "thinking")
_NAMES = re.compile(r"thinking|(?<![a-z])think(?![a-z])|reason(?:er|ing)", re.IGNORECASE)


def switched_off(template: str) -> dict[str, bool]:
    """What to give a chat template so that the model does not reason; empty where the template knows nothing of it."""
    code = " ".join(re.findall(r"\{[{%].*?[}%]\}", template, re.DOTALL))
    code = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "''", code)  # text is no variable
    return {name: False for name in _SWITCHES if re.search(rf"(?<![\w.]){name}\b", code)}


def is_thinking_checkpoint(name: str) -> bool:
    """Whether a model's name says that it always reasons, as ``Qwen3-VL-8B-Thinking`` does."""
    return _NAMES.search(name.rpartition("/")[2]) is not None


def begun_by(prompt: str, asked: str) -> str:
    """The mark of reasoning that a chat template opened behind the question, so that the reply begins within it.

    Args:
        prompt: The whole text for the model.
        asked: The question in it, whose own marks do not count.
    """
    return open_reasoning(prompt.rpartition(asked)[2])


def special_marks(tokenizer: Any) -> frozenset[int]:
    """The special tokens of a tokenizer that begin or end reasoning.  Decoding would take them off, and leave what
    stands between them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(number for number, token in added.items() if token.special and is_reasoning_mark(token.content))


def decoded(tokenizer: Any, rows: Sequence[Sequence[int]], marks: frozenset[int]) -> list[str]:
    """Texts without special tokens, but with those that are ``marks``."""
    if not marks:
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
    return [
        "".join(
            tokenizer.decode(list(part), skip_special_tokens=not is_mark)
            for is_mark, part in itertools.groupby(row, key=marks.__contains__)
        )
        for row in rows
    ]
