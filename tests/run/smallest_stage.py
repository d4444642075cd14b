#!/usr/bin/env python3
"""Counts the words of captions: a stage as small as one can be."""

import curation  # noqa: F401 - first: it refuses an old Python, and names packages that are missing

# isort: split

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from curation.errors import SampleError
from curation.jsonio import KEY_SUFFIX, write_dictionary
from curation.options import parse_options
from curation.run import RunOptions, ShardContext, Stage, run_stage, stage_main
from curation.shards import discover
from curation.tar.samples import caption_of, metadata_of


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Count the words of each sample's caption."""

    input: str
    """Source shards: a folder, a glob, braces, a list file or one tar."""
    output: str
    """Folder for the counts, one <shard>.json each."""


class CountWords(Stage[Options]):
    """One shard: shards/<shard>.tar → <shard>.json."""

    name = "count_words"

    def fingerprint(self) -> dict[str, object]:
        return {}  # no option changes the output

    def process(self, work: ShardContext) -> None:
        counts = []
        for sample in work.samples(("json", "txt")):
            try:
                caption = caption_of(metadata_of(sample), sample.members.get("txt"))
            except SampleError as error:
                work.fail(sample.key, error.reason, error.detail)
            else:
                counts.append((sample.key + KEY_SUFFIX, len(caption.split())))
                work.keep()
        with work.output(self.output / f"{work.shard.id}.json") as file:
            write_dictionary(file, counts)


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    return run_stage(CountWords(options), options, discover(options.input))


if __name__ == "__main__":
    sys.exit(main())
