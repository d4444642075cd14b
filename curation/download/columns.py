"""The columns of a table: which hold URLs and captions, and what is done about values that cannot be used as they are.

A value that is no UTF-8, or a time that Python has no date for, costs itself and not the shard that it stands in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from curation.download.heads import quoted_url
from curation.errors import UsageError
from curation.jsonio import clean_text
from curation.run.merge import values_of

CaptionNames = Literal["few", "many"]
_CAPTIONS: Final = ("caption", "text")
_MORE_CAPTIONS: Final = (
    "caption", "text", "alt_text", "alttext", "alt", "captions", "texts", "image_caption", "image_text", "img_caption",
    "img_alt", "image_alt", "description", "image_description", "caption_text", "caption_alt_text_description",
    "caption_reference_description", "caption_title_and_reference_description", "short_caption", "long_caption",
    "sentence", "raw_caption", "original_caption", "title", "label_text", "prompt", "txt",
)  # fmt: skip
_URLS: Final = ("url", "image_url", "img_url", "image_link", "link", "src")
_MORE_URLS: Final = (*_URLS, "imageurl", "imgurl", "image_src", "img_src", "image_uri", "uri", "original_url")


@dataclass(frozen=True, slots=True)
class NamedColumns:
    """The columns that the user named; None for the one that is usually called so, or for no hash.

    caption_names: which names are usual for captions; ``few`` are those of versions before 0.3.0.  kept: of the other
    columns those to write; None for all.
    """

    url: str | None = None
    caption: str | None = None
    hash: str | None = None
    caption_names: CaptionNames = "many"
    kept: tuple[str, ...] | None = None


def check_columns(source: str, schema: Any, wanted: NamedColumns) -> list[str]:
    """What a user should know of the columns of a table, before anything is downloaded.

    Raises UsageError where one that is needed is missing or holds no text, and where two columns have one name.
    """
    names = schema.names
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"{source}: two columns have one name: {_listed(twice)}; rename one of them")
    if wanted.hash is not None:
        _column(source, names, wanted.hash, "--verify_hash")
    for name in wanted.kept or ():
        _column(source, names, name, "--save_additional_columns")
    url, caption = url_column_of(source, names, wanted.url), caption_column_of(source, schema, wanted)
    if not _is_text(schema.field(url).type):
        _refuse_kind(source, schema, url, "--url_col")
    notes = []
    others = [name for name in names if name != url and _plain(name) in _MORE_URLS]
    if wanted.url is None and others:
        notes.append(f"URLs are taken from the column {url!r}; choose another one with --url_col: {_listed(others)}")
    if caption is None:
        notes.append(
            f"no column of captions among {_listed(names)}, so no .txt is written; give one with --caption_col"
        )
        return notes
    if not (_is_text(schema.field(caption).type) or _is_number(schema.field(caption).type)):
        _refuse_kind(source, schema, caption, "--caption_col")
    others = [name for name in names if name != caption and _plain(name) in _MORE_CAPTIONS]
    if wanted.caption is None and (others or _plain(caption) not in _CAPTIONS):
        more = f"; choose another one with --caption_col: {_listed(others)}" if others else ""
        notes.append(f"captions are taken from the column {caption!r}{more}")
    return notes


def caption_column_of(source: str, schema: Any, wanted: NamedColumns) -> str | None:
    """The column of captions, None for a table without one.  Raises UsageError where the named one is missing."""
    names = schema.names
    if wanted.caption is not None:
        return _column(source, names, wanted.caption, "--caption_col")
    found = _first(names, _CAPTIONS, str.lower)
    if found is None and wanted.caption_names == "many":
        found = _first([name for name in names if _is_text(schema.field(name).type)], _MORE_CAPTIONS, _plain)
    return found


def url_column_of(source: str, names: Sequence[str], wanted: str | None) -> str:
    """The column of URLs.  Raises UsageError that lists the columns and names the nearest."""
    if wanted is None:
        wanted = _first(names, _URLS, str.lower) or _first(names, _MORE_URLS, _plain) or "url"
    return _column(source, names, wanted, "--url_col")


def _first(names: Sequence[str], known: Sequence[str], form: Any) -> str | None:
    return next((name for usual in known for name in names if form(name) == usual), None)


def _plain(name: str) -> str:
    """``" Alt-Text"`` and ``alt text`` are ``alt_text``."""
    return re.sub(r"[\s_-]+", "_", clean_text(name).lower()).strip("_")


def _column(source: str, names: Sequence[str], wanted: str, flag: str) -> str:
    if wanted in names:
        return wanted
    near = difflib.get_close_matches(wanted.lower(), [name.lower() for name in names], 1, 0.5)
    nearest = next((name for name in names if near and name.lower() == near[0]), None)
    hint = f"did you mean {flag} {nearest}?" if nearest else f"name it with {flag}"
    raise UsageError(f"{source}: no column {wanted!r} among {_listed(names)}; {hint}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(clean_text(name)[:60] for name in names[:50]) or "none"


def _refuse_kind(source: str, schema: Any, name: str, flag: str) -> None:
    kind = str(schema.field(name).type)[:200]
    raise UsageError(f"{source}: the column {name!r} holds {kind}, not text; name another one with {flag}")


# ---- values


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_text(kind: Any) -> bool:
    """Whether a column can be read as text: also bytes, a dictionary of texts, and a column without any value."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(_is_string(kind) or _is_binary(kind) or types.is_null(kind))


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def sound_text(raw: bytes) -> str:
    """Bytes as text.  What is no UTF-8 becomes U+FFFD; in a URL it is percent-encoded, as browsers ask for it."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        if raw.lstrip()[:8].lower().startswith((b"http://", b"https://")):
            return quoted_url(raw.strip())
        return raw.decode("utf-8", "replace")


def sound_table(table: Any, texts: Sequence[str]) -> tuple[Any, int]:
    """A pyarrow Table whose texts are UTF-8, and how many values had to be changed for it.

    texts: columns that are read as text, whatever their type (``_is_text``) is.
    """
    import pyarrow

    changed = 0
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        wants_text = name in texts and not _is_string(column.type)
        try:
            column.validate(full=True)
            if not wants_text:
                continue
        except pyarrow.ArrowInvalid:
            pass
        found, bad = _sound_column(column, as_text=wants_text)
        changed += bad
        table = table.set_column(number, pyarrow.field(name, found.type), found)
    return table, changed


def _sound_column(column: Any, *, as_text: bool) -> tuple[Any, int]:
    import pyarrow
    from pyarrow import types

    kind = column.type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if not (_is_string(inner) or (as_text and _is_binary(inner))):
        values = values_of(column)
        if as_text:
            return pyarrow.array([None if value is None else str(value) for value in values], pyarrow.string()), 0
        found = pyarrow.array(values, kind)
        return found, found.null_count - column.null_count
    wide = pyarrow.large_binary() if types.is_large_string(inner) or types.is_large_binary(inner) else pyarrow.binary()
    flat = column.cast(inner) if types.is_dictionary(kind) else column
    raw = flat.cast(wide).to_pylist()
    texts = [None if value is None else sound_text(value) for value in raw]
    bad = sum(text is not None and text.encode() != value for text, value in zip(texts, raw, strict=True))
    target = pyarrow.large_string() if types.is_large_binary(wide) else pyarrow.string()
    return pyarrow.array(texts, target), bad
