"""A trial of stage 05 on a few images: which ones they are, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from curation.caption_rows import parse_rows, rows_path
from curation.errors import ShardError
from curation.jsonio import clean_text
from curation.shards import Shard
from curation.storage.urls import Source
from curation.tar.samples import IMAGE_SUFFIXES, TarPass, problem_of


def first_images(shards: Sequence[Shard], count: int) -> dict[str, int]:
    """Shard → how many images of it belong to the first ``count`` of all, of those shards that have any.

    A function of the shards alone, so that any number of workers agree.  One that cannot be read has none.
    """
    limits: dict[str, int] = {}
    for shard in shards:
        if count <= 0:
            break
        found = min(count, _images(shard.path, count))
        if found:
            limits[shard.id] = found
            count -= found
    return limits


def _images(path: Source, enough: int) -> int:
    found = 0
    try:
        for window in TarPass(path).windows():
            for span in window.spans:
                has_image = any(member.suffix in IMAGE_SUFFIXES for member in span.members)
                found += bool(span.key) and has_image and problem_of(span) is None
            if found >= enough:
                break
    except ShardError:
        return 0
    return found


def show_trial(output: Path, shard_ids: Sequence[str]) -> None:
    """Print the captions of a trial."""
    for shard_id in shard_ids:
        path = rows_path(output, shard_id)
        if path.is_file():
            for row in parse_rows(path.read_bytes(), path):
                print(f"{shard_id}/{clean_text(row['key'])} ({row['width']}×{row['height']}): {row['caption']}")
    print(f"everything of the trial is in {output}")
