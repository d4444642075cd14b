"""``curation report ROOT``: one static page about the folders of a dataset.

It needs no server and no other file: it opens from a filesystem, and prints.  Nothing else is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import orjson
import tyro

from curation.errors import EXIT_OK, InfrastructureError, UsageError, install
from curation.options import exit_code, parse_arguments
from curation.storage.files import write_whole

MAX_PAGE_BYTES = 5_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one page about the folders of a dataset: what became of samples and shards, how fast, how they look."""

    root: Annotated[Path, tyro.conf.Positional]
    """The folder of the dataset: stages whose receipts lie in it or in a folder in it are found."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page.  Its links to receipts are relative to it: a page beside the dataset can be moved together with it."""
    source: Path | None = None
    """The source shards, for the original images.  Default: the folders that the receipts name; if the shards are not
    there, ROOT/shards, where that is not the hybrid dataset."""
    shards_page: int = 2000
    """Show so many shards of a stage one by one, and more than that as cells of neighbours."""
    gallery: int = 48
    """Samples shown with their images, at most."""
    sample_shards: int = 200
    """Look at the samples of so many shards for faces, lengths and scores.  StageCounts come from all shards."""
    no_audit: bool = False
    """Leave out what became of each group: it reads the provenance of every shard."""
    json: bool = False
    """Write no page: print the page's numbers as one JSON object on one line."""
    quiet: bool = False
    """Say nothing but what went wrong."""

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


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "report")
    options.check()
    began = time.monotonic()
    from curation.commands.report.facts import gather

    try:
        from curation.commands.report.page import render
    except ImportError as error:
        raise InfrastructureError(f"report needs jinja2 ({error}): {install('jinja2')}") from None
    facts = gather(options.root, options.source, options.shards_page, options.sample_shards, audit=not options.no_audit)
    if options.json:
        print(orjson.dumps(facts.told, option=orjson.OPT_NON_STR_KEYS).decode(), flush=True)
        return EXIT_OK
    page = render(facts, options.output, options.gallery, MAX_PAGE_BYTES)
    _write(options.output, page)
    stages, shards = len(facts.told["stages"]), max((stage["shards"] for stage in facts.told["stages"]), default=0)
    for trouble in facts.looked.troubles:
        print(f"warning: {trouble}", file=sys.stderr)
    if options.quiet:
        return EXIT_OK
    took_s = time.monotonic() - began
    print(f"{options.output}: {len(page) / 1e6:.2f} MB, {stages} stages, {shards:,} shards ({took_s:.1f} s)")
    return EXIT_OK


def _write(path: Path, page: bytes) -> None:
    """Whole or not at all."""
    try:
        write_whole(path, page)
    except OSError as error:
        raise InfrastructureError(f"{path}: cannot be written ({error.strerror})") from None
