"""How much of a prompt a pipeline reads: its text encoders take so many tokens, and the pipeline cuts off the rest.

The pipeline itself is asked, once: it encodes a short probe while its tokenizers are watched.  That shows the length to
which each of them cuts, and what the pipeline writes around a prompt (a chat template, an instruction).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curation.edits import with_suffix
from curation.errors import UsageError
from curation.options import logger

PROBE = "Photo Xylophone"  # with capitals, because some pipelines read small letters only
NO_LIMIT = 1 << 20  # tokens; tokenizers without a limit say 10**30


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model reads of one prompt.

    Attributes:
        text: What the pipeline is given: the prompt, shortened if its suffix would not fit otherwise, and the suffix.
        given: The tokens of the whole prompt and its suffix; None where it is not known what the pipeline reads.
        read: How many tokens of prompt and suffix the model reads; None likewise.
        shortened: The part of the prompt that is left, where it was shortened for its suffix; None otherwise.
    """

    text: str
    given: int | None = None
    read: int | None = None
    shortened: str | None = None

    @property
    def is_cut(self) -> bool:
        return self.given is not None and self.read is not None and self.read < self.given


@dataclass(frozen=True, slots=True)
class TextWindow:
    """The text encoder of a pipeline that reads most, and how the pipeline calls its tokenizer.

    A text that this encoder reads whole counts as read, also where another one (CLIP beside T5) reads its beginning.

    Attributes:
        tokenizer: The encoder's tokenizer.
        room: The tokens that are left for a prompt and its suffix.
        before: What the pipeline writes before a prompt.
        after: What it writes behind one.
        lower: Whether it turns prompts into small letters.
        frame: The tokens of ``before``, ``after`` and the tokenizer's own marks.
    """

    tokenizer: Any
    room: int
    before: str
    after: str
    lower: bool
    frame: int

    def count(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text."""
        if not texts:
            return []
        framed = [f"{self.before}{text.lower() if self.lower else text}{self.after}" for text in texts]
        return [length - self.frame for length in _lengths(self.tokenizer, framed)]

    def check_suffix(self, suffix: str, pipeline: str) -> None:
        """Raise UsageError if no prompt at all leaves room for the suffix."""
        if suffix and self.count([with_suffix("a", suffix)])[0] > self.room:
            raise UsageError(
                f"--prompt_suffix: it has {self.count([suffix])[0]} tokens, and {pipeline} reads {self.room} tokens of "
                "prompt and suffix together, so that it would not arrive behind any prompt; use a shorter one"
            )

    def read(self, prompts: Sequence[str], suffix: str) -> list[Reading]:
        """What is read of each prompt.  A prompt that leaves no room for its suffix is shortened at its end.

        A ``Reading`` without text: no word of the prompt would be left beside the suffix.
        """
        texts = [with_suffix(prompt, suffix) for prompt in prompts]
        given = self.count(texts)
        readings = [Reading(text, n, min(n, self.room)) for text, n in zip(texts, given, strict=True)]
        if not suffix:
            return readings
        long = [i for i, reading in enumerate(readings) if reading.is_cut]
        for i, short in zip(long, self._shortened([prompts[i] for i in long], suffix), strict=True):
            text = with_suffix(short, suffix) if short else ""
            readings[i] = Reading(text, given[i], self.count([text])[0] if short else 0, short)
        return readings

    def _shortened(self, prompts: Sequence[str], suffix: str) -> list[str]:
        """The longest beginning of each prompt that fits together with the suffix; all are searched at once."""
        low, high = [0] * len(prompts), [len(prompt) for prompt in prompts]
        while open_ := [i for i in range(len(prompts)) if high[i] - low[i] > 1]:
            middle = [(low[i] + high[i]) // 2 for i in open_]
            tried = [with_suffix(beginning(prompts[i], n), suffix) for i, n in zip(open_, middle, strict=True)]
            for i, n, tokens in zip(open_, middle, self.count(tried), strict=True):
                if tokens <= self.room:
                    low[i] = n
                else:
                    high[i] = n
        return [beginning(prompt, n) for prompt, n in zip(prompts, low, strict=True)]


def beginning(text: str, length: int) -> str:
    """At most ``length`` characters, cut between words where there are spaces."""
    part = text[:length]
    if length < len(text) and text[length].isalnum() and " " in part:
        part = part.rpartition(" ")[0]
    return part.rstrip(" ,;:-")


def text_window(pipeline: Any, encode: Callable[[Sequence[str]], object], most: int | None) -> TextWindow | None:
    """Find out what a pipeline reads of a prompt.

    Args:
        pipeline: The pipeline.
        encode: Encodes prompts in the way that the pipeline's call does.
        most: The call's ``max_sequence_length``, if it takes one.

    Returns:
        The window of the encoder that reads most; None where the pipeline does not show it.
    """
    calls: list[tuple[Any, str, int | None]] = []
    tokenizers = _tokenizers(pipeline)
    with _watched(tokenizers, calls):
        try:
            encode([PROBE])
        except Exception as error:  # noqa: BLE001  # a pipeline that cannot be asked may still make pictures
            logger.debug(f"{type(pipeline).__name__}: its text encoders cannot be asked: {error!r}")
    windows = []
    for tokenizer in tokenizers:
        seen = [(text, length) for owner, text, length in calls if owner is tokenizer]
        cut = [(text, length) for text, length in seen if length is not None]
        for text, length in (cut or seen)[:1]:  # a second call without a limit is Stable Diffusion's own check
            windows.append(_window(tokenizer, text, length, most))
    return max(windows, key=lambda window: window.room, default=None)


def _window(tokenizer: Any, text: str, length: int | None, most: int | None) -> TextWindow:
    start = text.lower().index(PROBE.lower())
    before, probe, after = text[:start], text[start : start + len(PROBE)], text[start + len(PROBE) :]
    head, frame = _lengths(tokenizer, [before, before + after])
    limit = NO_LIMIT if length is None else length
    if most is not None and limit > most:  # an instruction comes on top of max_sequence_length, and is taken off later
        limit = min(limit, most + (head if before else 0))
    return TextWindow(tokenizer, max(0, limit - frame), before, after, probe != PROBE, frame)


def _tokenizers(pipeline: Any) -> list[Any]:
    """The pipeline's tokenizers, also those inside of processors, each once."""
    found: list[Any] = []
    for name, part in getattr(pipeline, "components", {}).items():
        if part is not None and ("tokenizer" in name or "processor" in name):
            tokenizer = getattr(part, "tokenizer", part)
            if hasattr(tokenizer, "model_max_length") and not any(tokenizer is other for other in found):
                found.append(tokenizer)
    return found


@contextlib.contextmanager
def _watched(tokenizers: Sequence[Any], calls: list[tuple[Any, str, int | None]]) -> Iterator[None]:
    """Note each call that has the probe in its text: (tokenizer, text, the length that it cuts to or None)."""

    def watching(kind: type) -> type:
        def call(self: Any, text: Any = None, *args: Any, **more: Any) -> Any:
            first = text[0] if isinstance(text, (list, tuple)) and text else text
            if isinstance(first, str) and PROBE.lower() in first.lower():
                length = more.get("max_length") or self.model_max_length
                calls.append((self, first, length if more.get("truncation") and length < NO_LIMIT else None))
            return kind.__call__(self, text, *args, **more)

        return type(kind.__name__, (kind,), {"__call__": call})

    kinds = [type(tokenizer) for tokenizer in tokenizers]
    try:
        for tokenizer, kind in zip(tokenizers, kinds, strict=True):
            tokenizer.__class__ = watching(kind)
        yield
    finally:
        for tokenizer, kind in zip(tokenizers, kinds, strict=True):
            tokenizer.__class__ = kind


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    found = tokenizer(list(texts), truncation=False, padding=False, return_attention_mask=False, verbose=False)
    return [len(ids) for ids in found["input_ids"]]
