"""Flags of the commands, from a dataclass each, as the stages have theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

Arguments = TypeVar("Arguments")


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None, command: str) -> Arguments:
    """The command's options.  Ends the process with exit code 2 on an unknown flag or a value of the wrong type."""
    return tyro.cli(
        kind,
        args=None if argv is None else list(argv),
        prog=f"python -m curation {command}",
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
        compact_help=False,
    )
