"""The text of ``--help``."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from curation.options.advice import example
from curation.options.flags import Flag, flags_of, texts_of

_INDENT, _COLUMN = 2, 28  # where flags and their texts begin
_WIDEST = 100
_REQUIRED, _OWN = "required", "other"


def help_text(kind: type, prog: str, *, partial: bool = False) -> str:
    """What ``--help`` shows: what the program does, and its options in groups, the required ones first.

    partial: What is required may be left out, so that nothing is.
    """
    width = max(60, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 0)).columns))
    flags = flags_of(kind)
    if partial:
        flags = {name: replace(flag, default=None) if flag.is_required else flag for name, flag in flags.items()}
    texts = texts_of(kind)
    required = [flag.usage for flag in flags.values() if flag.is_required]
    lines = textwrap.wrap(f"usage: {' '.join([prog, *required, '[options]'])}", width, subsequent_indent=" " * 7)
    lines += ["", *textwrap.wrap(" ".join((kind.__doc__ or "").split()), width)]
    for title, members in _groups(kind, flags).items():
        lines += ["", f"{title} options:"]
        for flag in members:
            lines += _entry(_head(flag), _text(flag, texts.get(flag.name, "")), width)
    lines += [] if partial else ["", f"example: {example(kind, prog)}"]
    return "\n".join(lines) + "\n"


def _groups(kind: type, flags: Mapping[str, Flag]) -> dict[str, list[Flag]]:
    """The flags under their headings.

    A base class with a ``help_group`` has a group of its own, behind those of the stage.  ``help_groups``
    of the stage say where among its fields a heading begins to hold.
    """
    bases: list[Any] = [base for base in kind.__mro__[1:] if "help_group" in vars(base)]
    group_of = {field.name: base.help_group for base in bases for field in fields(base)}
    begins: Mapping[str, str] = getattr(kind, "help_groups", {})
    found: dict[str, list[Flag]] = {_REQUIRED: []}
    title = _OWN
    for flag in flags.values():
        title = begins.get(flag.name, title)
        if flag.name not in group_of:
            found.setdefault(_REQUIRED if flag.is_required else title, []).append(flag)
    for name, group in group_of.items():
        found.setdefault(group, []).append(flags[name])
    found[list(found)[-1]].append(_HELP)
    return {title: members for title, members in found.items() if members}


_HELP = Flag("help", ("--help", "-h"), (bool,), (), default=False, place="", explained="Show this text.")


def _head(flag: Flag) -> str:
    if not flag.has_flag:
        return flag.place
    if flag.is_switch:
        name = f"--no_{flag.name}" if flag.default is True else flag.names[0]
        return ", ".join([name, *(short for short in flag.names if not short.startswith("--"))])
    names = [flag.names[0], *(short for short in flag.names if not short.startswith("--"))]
    return f"{', '.join(names)} {flag.metavar}{' ...' * flag.many}"


def _text(flag: Flag, text: str) -> str:
    """What the option does, its default, and its further names."""
    text = flag.explained or text
    parts = [text if text.endswith((".", "?", ":")) or not text else f"{text}."]
    default = flag.default
    if not (default is MISSING or default is None or isinstance(default, bool) or default in ("", (), float("inf"))):
        shown = f"{default:g}" if isinstance(default, float) else _joined(default)
        parts += [] if re.search(r"\bdefault\b", text, re.IGNORECASE) else [f"Default: {shown}."]
    parts += ["You may give the value without the flag."] if flag.place and flag.has_flag else []
    also = [name for name in flag.names[1:] if name.startswith("--")]
    parts += [f"Also: {', '.join(also)}."] if also else []
    return " ".join(filter(None, parts))


def _joined(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _entry(head: str, text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width - _COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
    lines = [" " * _COLUMN + line for line in lines]
    first = " " * _INDENT + head
    if len(first) > _COLUMN - 2:
        return [first, *lines]
    return [first.ljust(_COLUMN) + lines[0].strip(), *lines[1:]]
