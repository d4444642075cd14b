"""Options of stages and commands, and what their ``main`` does alike.

The options of a stage or a command are one frozen dataclass.  A field is an **option**; its **flag** is ``--`` with the
field's name; the text below the field is the flag's help.  The annotation holds the rest: bounds of a number, as in
``num_threads: Annotated[int, at_least(1)] = 20``, further names (``also``), whether the value may be a URL (``URLS``),
and whether it stands without a flag (``POSITIONAL``).  A **switch** is an option that is on or off and has no value.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from curation import PROGRAM
from curation.errors import UsageError, redact
from curation.options.advice import Advice
from curation.options.declare import (
    FINITE,
    LISTED,
    PATH,
    POSITIONAL,
    URLS,
    Explained,
    Files,
    FolderName,
    Positional,
    PublishOptions,
    RunOptions,
    Sides,
    Sources,
    also,
    at_least,
    between,
    bytes_in,
    check_bounds,
    less_than,
    more_than,
    refuse_url,
    refuse_urls,
    unless,
    url_in,
)
from curation.options.help import help_text
from curation.options.program import Main, exit_code, logger, on_terminal, say_error, set_up_logging
from curation.options.read import read_options
from curation.options.values import (
    items_in,
    numbers_in,
    plain_path,
    plain_source,
    range_in,
    unwrapped,
    with_plain_paths,
)

__all__ = [
    "FINITE",
    "LISTED",
    "PATH",
    "POSITIONAL",
    "URLS",
    "AnyOptions",
    "Explained",
    "Files",
    "FolderName",
    "Main",
    "Positional",
    "PublishOptions",
    "RunOptions",
    "Sides",
    "Sources",
    "also",
    "at_least",
    "between",
    "bytes_in",
    "check_bounds",
    "exit_code",
    "help_text",
    "items_in",
    "less_than",
    "logger",
    "more_than",
    "numbers_in",
    "on_terminal",
    "parse_arguments",
    "parse_options",
    "plain_path",
    "plain_source",
    "range_in",
    "refuse_url",
    "refuse_urls",
    "say_error",
    "set_up_logging",
    "unless",
    "unwrapped",
    "url_in",
    "with_work_dir",
]

_STORES = frozenset(("s3", "gs", "gcs", "hf"))  # outputs can be published to these

AnyOptions = TypeVar("AnyOptions", bound=RunOptions)
Arguments = TypeVar("Arguments")
Publishing = TypeVar("Publishing", bound=PublishOptions)


def parse_options(
    kind: type[Arguments], argv: Sequence[str] | None = None, prog: str | None = None, *, partial: bool = False
) -> Arguments:
    """Parse the command line of a stage, or of any program with a dataclass of options.

    ``--num_threads`` and ``--num-threads`` are the same flag.  ``--help`` prints its text and ends the process.

    Args:
        kind: The dataclass of options.
        argv: The words after the program's name; None for those of this process.
        prog: The name of the program that ``--help`` shows; None for that of this process.
        partial: What is required may be left out, such as the stage's folders.  Its value is then its own name.  Paths
            may hold variables without a value.

    Returns:
        The options, whose values are not checked yet (``RunOptions.check``).

    Raises:
        UsageError: The command line makes no sense: the message says what to type.  Or a URL stands where a path is
            wanted, or an option is given two values.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = prog or Path(sys.argv[0]).name
    if "--help" in words or "-h" in words:
        print(help_text(kind, name, partial=partial), end="", flush=True)
        sys.exit(0)
    options = kind(**read_options(kind, words, Advice(kind, name), partial=partial))
    options = with_plain_paths(options, variables=partial)
    if isinstance(options, PublishOptions):
        refuse_urls(options, besides="output")  # first: the output may have its value from another option
        options = with_work_dir(options)
    refuse_urls(options)
    return options


def with_work_dir(options: Publishing, output: str = "") -> Publishing:
    """The options with a folder of this filesystem as their output, where a URL was given.

    Args:
        options: The options of a stage, with a field ``output``.
        output: An output that stands elsewhere, such as in a file; empty for that of the options.

    Raises:
        UsageError: The output is a URL, and ``--work_dir`` is missing or another place to publish is given.
    """
    target = url_in(output or getattr(options, "output", ""))
    if target.partition("://")[0] not in _STORES:
        return options
    if options.publish_to is not None:
        raise UsageError(f"--output {redact(target)} and --publish_to are two places to publish to; give one")
    if options.work_dir is None:
        raise UsageError(
            f"--output {redact(target)} is a URL: add --work_dir FOLDER, a folder on this filesystem that all "
            "processes of the run share, for receipts and claims"
        )
    folder = Path(options.work_dir) if isinstance(getattr(options, "output", ""), Path) else options.work_dir
    output_option: dict[str, Any] = {"output": folder} if hasattr(options, "output") else {}
    return replace(options, publish_to=target, **output_option)


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None, command: str) -> Arguments:
    """Parse the command line of ``curation <command>``, as ``parse_options`` does; check the bounds of its numbers.

    Args:
        kind: The command's dataclass of options.
        argv: The words after the command's name; None for all words of this process.
        command: The command's name.

    Raises:
        UsageError: As for ``parse_options``, or a number is out of its bounds.
    """
    options = parse_options(kind, argv, f"{PROGRAM} {command}")
    check_bounds(options)
    return options
