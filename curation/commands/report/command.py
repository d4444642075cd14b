"""``curation report ROOT``: one static page about the folders of a dataset.

It needs no server and no other file: it opens from a filesystem, and prints.  Nothing else is written.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson

from curation.commands.status.command import with_seconds
from curation.errors import EXIT_OK, InfrastructureError, UsageError, install
from curation.options import POSITIONAL, also, exit_code, parse_arguments
from curation.storage.files import write_whole

if TYPE_CHECKING:  # they need numpy, and --help does without
    from curation.commands.report.facts import ReportFacts
    from curation.commands.report.pictures import Known
    from curation.commands.status.live_claims import ClaimWatcher

MAX_PAGE_BYTES = 5_000_000
_WATCH_S = "30"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one page about the folders of a dataset: what happened to samples and shards, how fast, how they look."""

    root: Annotated[Path, POSITIONAL]
    """The folder of the dataset: stages whose receipts are in it or in one of its subfolders are found."""
    output: Annotated[Path, also("-o")] = Path("report.html")
    """The page.  Its links to receipts are relative to it: a page beside the dataset can be moved together with it."""
    source: Path | None = None
    """The source shards, for the original images.  Default: the folders in the receipts; if the shards are not there,
    ROOT/shards, unless that is the hybrid dataset."""
    hybrid: Path | None = None
    """Stage 04's output folder, if the stage ran on several folders in ROOT, or on one elsewhere.  Without it, folders
    that were written without edits do not count."""
    shards_page: int = 2000
    """Largest number of shards of a stage that are shown one by one; if there are more, neighbouring shards share a
    cell."""
    gallery: int = 48
    """Largest number of samples that are shown with their images."""
    sample_shards: int = 200
    """Number of shards whose samples are read for faces, lengths and scores.  Counts come from all shards."""
    no_audit: bool = False
    """Leave out the losses of each group: counting them reads the provenance of every shard."""
    watch: float | None = None
    """Write the page again after this number of seconds (30 if you give no number), until Ctrl-C.  Its top shows the
    running stages, and a browser reloads it automatically."""
    json: bool = False
    """Write no page: print the page's numbers as one JSON object on one line."""
    quiet: bool = False
    """Print only warnings and errors."""

    def check(self) -> None:
        """Raise UsageError for values that make no sense."""
        if not 1 <= self.shards_page <= 4000:
            raise UsageError("--shards_page must be between 1 and 4000")
        if not 0 <= self.gallery <= 500:
            raise UsageError("--gallery must be between 0 and 500")
        if self.sample_shards < 0:
            raise UsageError("--sample_shards must not be negative")
        if self.source is not None and not self.source.is_dir():
            raise UsageError(f"--source {self.source}: no such folder")
        if self.output.is_dir():
            raise UsageError(f"-o {self.output}: it is a folder; name the file")
        if self.watch is not None and not (math.isfinite(self.watch) and self.watch > 0):
            raise UsageError("--watch takes a positive number of seconds")
        if self.watch is not None and self.json:
            raise UsageError("--watch writes the page repeatedly, but --json writes no page; leave one of them out")


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[2:] if argv is None else argv
    options = parse_arguments(Options, with_seconds(arguments, _WATCH_S), "report")
    options.check()
    try:
        import jinja2  # noqa: F401 - before the folders are read, which may take minutes
    except ImportError as error:
        raise InfrastructureError(f"report needs jinja2 ({error}): {install('jinja2')}") from None
    if options.json:
        print(orjson.dumps(_facts(options).told, option=orjson.OPT_NON_STR_KEYS).decode(), flush=True)
    elif options.watch is None:
        facts, told = _make_page(options)
        _warn(facts)
        _say(options, told)
    else:
        _watch(options, options.watch)
    return EXIT_OK


def _facts(options: Options, claims: ClaimWatcher | None = None) -> ReportFacts:
    from curation.commands.report.facts import gather

    return gather(
        options.root,
        options.source,
        options.shards_page,
        options.sample_shards,
        audit=not options.no_audit,
        hybrid=options.hybrid,
        claims=claims,
    )


def _make_page(
    options: Options, claims: ClaimWatcher | None = None, known: Known | None = None, again_s: float | None = None
) -> tuple[ReportFacts, str]:
    """Writes the page.  Returns what it shows, and a line about it."""
    from curation.commands.report.page import render

    began = time.monotonic()
    facts = _facts(options, claims)
    page = render(facts, options.output, options.gallery, MAX_PAGE_BYTES, again_s=again_s, known=known)
    _write(options.output, page)
    stages, shards = len(facts.told["stages"]), max((stage["shards"] for stage in facts.told["stages"]), default=0)
    took_s = time.monotonic() - began
    return facts, f"{options.output}: {len(page) / 1e6:.2f} MB, {stages} stages, {shards:,} shards ({took_s:.1f} s)"


def _watch(options: Options, seconds: float) -> None:
    """Writes the page until the user ends it.  The stages may begin later than this."""
    from curation.commands.report.watch import write_again_and_again
    from curation.commands.status.live_claims import ClaimWatcher

    claims, said = ClaimWatcher([]), set[str]()
    known: Known = {}

    def say_once(kind: str, text: str) -> None:
        if kind not in said:
            said.add(kind)
            _say(options, text)

    def write(again: bool) -> bool:
        try:
            _, told = _make_page(options, claims, known, seconds if again else None)
        except UsageError as error:
            if not options.root.is_dir() or "page" in said:
                raise
            say_once("nothing", f"{error}; trying again every {seconds:g} s until Ctrl-C")
            return False
        say_once("page", f"{told}; written again every {seconds:g} s until Ctrl-C")
        return True

    times = write_again_and_again(write, seconds)
    _say(options, f"{options.output}: written {times:,} times; it is no longer updated")


def _warn(facts: ReportFacts) -> None:
    for trouble in facts.looked.troubles:
        print(f"warning: {trouble}", file=sys.stderr)


def _say(options: Options, text: str) -> None:
    if not options.quiet:
        print(text, flush=True)


def _write(path: Path, page: bytes) -> None:
    """Whole or not at all."""
    try:
        write_whole(path, page)
    except OSError as error:
        raise InfrastructureError(f"{path}: cannot be written ({error.strerror})") from None
