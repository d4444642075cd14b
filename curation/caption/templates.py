"""Prompts with fields: ``{caption}``, ``{url}`` or any field of a sample's json stands for the sample's own value.

A template is read once, into pieces.  A value is put between the pieces as one bounded line of text.  It is never read
as a template again, and it reaches neither ``str.format`` nor a template engine.

Processors and model servers look for marks in the whole text of a prompt: ``<image>`` stands for the picture,
``<|im_start|>`` begins a turn of the chat.  A value comes from the open web.  ``Filled.text`` breaks every such mark to
which a value contributes a character, by a space, so that it is read as plain text.  What the prompt's author wrote
stays as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import xxhash

from curation.errors import SampleError, UsageError
from curation.jsonio import clean_text, decode_text, dump_json
from curation.tar.samples import caption_of

MAX_TEMPLATE: Final = 32_000  # characters of a prompt as its author wrote it
MAX_VALUE: Final = 2_000  # characters of one value: about 500 tokens of English
MAX_VALUES: Final = 8_000  # characters of all values of one prompt
MAX_NAME: Final = 200
BUILT_IN: Final = ("caption", "original_caption", "key", "shard")
_READ: Final = 4  # so many times the bound is read of a long value, because white space is taken out of it

# Characters without a width.  They can hide words, or stand between the letters of a mark.  The joiners U+200C and
# U+200D belong to scripts and to emoji, and have no meaning beside a letter of ASCII.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<=[!-~])[\u200c\u200d]+|[\u200c\u200d]+(?=[!-~])"
)
# What tokenizers and servers read as a mark, whichever the model is: <image>, </s>, <|im_start|>, <__media__>,
# <loc0001>, [INST], [gMASK], [|endofturn|], [img-1].  ``USER:`` begins a turn in the templates of LLaVA, Vicuna and
# Idefics, ``### Instruction:`` in Alpaca's.  They are looked for in ``_plain(text)``.
_MARKS = re.compile(
    r"<[^\s<>]{1,100}>"
    r"|\[/?(?:[a-z]?[A-Z][A-Z_]{1,40}|img-\d{1,9}|\|[^\s\[\]]{1,100}\|)\]"
    r"|\b(?:USER|ASSISTANT|SYSTEM|HUMAN|User|Assistant|System|Human):"
    r"|#{2,6}[ \t]?(?:Instructions?|Input|Response):"
)


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt.

    Attributes:
        pieces: Text of the author, and names of fields: ``(text, False)`` and ``(name, True)``, in order.
    """

    pieces: tuple[tuple[str, bool], ...]

    @classmethod
    def literal(cls, text: str) -> Template:
        """A prompt that has no fields, whatever is in it."""
        return cls(((text, False),))

    @classmethod
    def parse(cls, text: str, where: str) -> Template:
        """Read a prompt.  ``{name}`` is a field; ``{{`` and ``}}`` are braces.

        Args:
            text: The prompt.
            where: What the prompt is called in messages, such as ``--prompt``.

        Raises:
            UsageError: It is longer than ``MAX_TEMPLATE``, or has a NUL character, or a brace that is neither.
        """
        if len(text) > MAX_TEMPLATE:
            raise UsageError(f"{where}: {len(text):,} characters; a prompt has at most {MAX_TEMPLATE:,}")
        if "\0" in text:
            raise UsageError(f"{where}: a NUL character, where some servers would end the prompt: take it out")
        pieces: list[tuple[str, bool]] = []
        plain: list[str] = []
        at = 0
        for match in re.finditer(r"\{\{|\}\}|\{([^{}\r\n]*)\}|[{}]", text):
            plain.append(text[at : match.start()])
            at = match.end()
            found = match[0]
            if found in ("{{", "}}"):
                plain.append(found[0])
                continue
            name = (match[1] or "").strip()
            if not name or len(name) > MAX_NAME:
                seen = clean_text(text[max(0, match.start() - 20) : match.end() + 20])
                raise UsageError(
                    f"{where}: {found[:40]!r} in {seen!r} is no field: a field is {{caption}} or the name of a field "
                    "of the samples' json in braces, and a brace itself is written twice, {{ or }}"
                )
            pieces += [("".join(plain), False), (name, True)]
            plain = []
        pieces.append(("".join([*plain, text[at:]]), False))
        return cls(tuple(piece for piece in pieces if piece[0]))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of its fields, each once."""
        return tuple(dict.fromkeys(text for text, is_field in self.pieces if is_field))

    @property
    def words(self) -> str:
        """What its author wrote, without the fields: as it is where there are none, else the longest piece first."""
        written = [text for text, is_field in self.pieces if not is_field]
        return "\n".join(sorted(written, key=len, reverse=True))

    @property
    def source(self) -> str:
        """The prompt as text, for records: two templates that ask alike have the same."""
        return "".join(
            f"{{{text}}}" if is_field else text.replace("{", "{{").replace("}", "}}") for text, is_field in self.pieces
        )

    def fill(self, sample: Values) -> Filled:
        """Put a sample's values in the place of the fields."""
        left = MAX_VALUES
        pieces: list[tuple[str, bool]] = []
        empty: list[str] = []
        cut: list[str] = []
        values = {name: sample.text(name) for name in self.fields}
        for text, is_field in self.pieces:
            if not is_field:
                pieces.append((text, False))
                continue
            value = values[text]
            bounded = value[: min(MAX_VALUE, left)].rstrip()
            if not value:
                empty.append(text)
            if len(bounded) < len(value):
                cut.append(text)
            left -= len(bounded)
            pieces.append((bounded, True))
        texts = "\0".join(text for text, _ in pieces).encode("utf-8", "surrogatepass")
        digest = xxhash.xxh3_64_hexdigest(texts)
        return Filled(tuple(pieces), tuple(dict.fromkeys(empty)), tuple(dict.fromkeys(cut)), digest)


@dataclass(frozen=True, slots=True)
class Filled:
    """A prompt for one sample.

    Attributes:
        pieces: Text of the author (``False``) and of the sample (``True``), in order.
        empty: Fields for which the sample has no value.
        cut: Fields whose value was longer than its bound.
        digest: By which one prompt is told from another.
    """

    pieces: tuple[tuple[str, bool], ...]
    empty: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    digest: str = ""

    @property
    def values(self) -> str:
        """What the sample has contributed."""
        return "\n".join(text for text, of_sample in self.pieces if of_sample)

    def without_text(self) -> Filled:
        """What is told of it when the model has been asked: the texts of a shard are not kept."""
        return replace(self, pieces=())

    def text(self, marks: Collection[str] = ()) -> str:
        """The text for the model, in which no value is, begins or ends a mark.

        Args:
            marks: Those of the model's tokenizer and processor, beside those that are known of all.
        """
        text, owned = "", bytearray()
        for piece, is_value in self.pieces:
            text += piece
            owned += bytes([is_value]) * len(piece)
        if not any(owned):
            return text
        for _ in range(8):
            plain = _plain(text)
            places = sorted({place for found in _patterns(frozenset(marks)) for place in _breaks(found, plain, owned)})
            if not places:
                break
            for place in reversed(places):
                text = f"{text[:place]} {text[place:]}"
                owned[place:place] = b"\1"
        return text


def _breaks(pattern: re.Pattern[str], text: str, owned: bytearray) -> Iterator[int]:
    """Where a space breaks each mark of a text that has a character of a value."""
    for match in pattern.finditer(text):
        start, end = match.span()
        first = owned.find(1, start, end)
        if first >= 0 and end - start > 1:
            yield end - 1 if match[0][-1] == ":" else min(max(start + 1, first), end - 1)


def _plain(text: str) -> str:
    """The text, as long as it is, with plain characters in place of their other forms: full-width, small, bold …
    (NFKC), because some tokenizers and servers take these for the plain ones."""
    return text if text.isascii() else "".join(map(_plain_character, text))


@lru_cache(4096)
def _plain_character(character: str) -> str:
    plain = unicodedata.normalize("NFKC", character)
    return plain if len(plain) == 1 else character


@lru_cache(64)
def _patterns(marks: frozenset[str]) -> tuple[re.Pattern[str], ...]:
    exact = sorted({_plain(mark) for mark in marks if len(mark.strip()) > 1}, key=lambda mark: (-len(mark), mark))
    return (_MARKS, *([re.compile("|".join(map(re.escape, exact)))] if exact else []))


class Values:
    """What the fields of a prompt stand for, for one sample.

    ``{caption}`` is the sample's caption, as all stages read it, and ``{key}`` and ``{shard}`` its key and shard.
    ``{original_caption}`` is the json's field of this name, and the caption where there is none.  Every other name is a
    field of the json; where there is none of the whole name, dots lead into objects and lists (``{exif.Make}``,
    ``{tags.0}``).
    """

    def __init__(self, key: str, shard: str, metadata: Mapping[str, Any], txt: bytes | None) -> None:
        self._own = {"key": key, "shard": shard}
        self._metadata, self._txt = metadata, txt

    def text(self, name: str) -> str:
        """The value of a field as one line; "" where the sample has none."""
        if name in self._own:
            return as_text(self._own[name])
        found = None if name == "caption" else self.find(name)
        if found is None and name in ("caption", "original_caption"):
            found = self._caption()
        return as_text(found)

    def find(self, name: str) -> Any:
        """The value in the json; None where there is none, or it is null."""
        return next(iter(self._found(name)), None)

    def has(self, name: str) -> bool:
        """Whether the json has the field, be it null."""
        return bool(self._found(name))

    def _found(self, name: str) -> list[Any]:
        """The value, or nothing where the json has no such field."""
        if name in self._metadata:
            return [self._metadata[name]]
        value: Any = self._metadata
        for step in name.split("."):
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isascii() and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                return []
        return [value]

    def _caption(self) -> str:
        try:
            return caption_of(self._metadata, self._txt)
        except SampleError as error:
            if error.reason != "caption_too_long":
                return ""
        told = self._metadata.get("caption")  # it is cut, as any long value is
        return told if isinstance(told, str) else decode_text((self._txt or b"")[: 4 * MAX_VALUES * _READ])


def as_text(value: Any) -> str:
    """A value of a json as one line of text: lists of texts and numbers with commas, anything else nested as JSON."""
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, list) and not any(isinstance(one, list | Mapping) for one in value):
        value = ", ".join(filter(None, map(as_text, value[: MAX_VALUE * _READ])))
    elif not isinstance(value, str):
        value = dump_json(value).decode("utf-8", "replace")
    # One character more than the bound, by which it is known that the value was cut.
    return clean_text(_INVISIBLE.sub("", value[: MAX_VALUE * _READ]))[: MAX_VALUES + 1]


def unknown_fields(wanted: Iterable[str], samples: Iterable[Values]) -> list[str]:
    """The names that are neither built in nor in the json of any sample.

    Args:
        wanted: Names of fields.
        samples: Are read until every name was found.
    """
    left = [name for name in dict.fromkeys(wanted) if name not in BUILT_IN]
    for sample in samples if left else ():
        left = [name for name in left if not sample.has(name)]
        if not left:
            break
    return left
