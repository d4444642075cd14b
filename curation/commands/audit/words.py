"""Shares, differences and names from the data as text for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from curation.edits import unsafe_key
from curation.jsonio import clean_text


def cell(text: str) -> str:
    """Escape a text from the data for a Markdown table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|`*_[]" else c for c in text)


def key_told(key: str) -> str:
    """A sample's key as it is, because readers look for the sample; as one clean line where no edit can have it."""
    return clean_text(key) if unsafe_key(key) or any("\x7f" <= character < "\xa0" for character in key) else key


def share_text(loss: Mapping[str, Any]) -> str:
    """A share with its interval; a dash where nothing was counted."""
    if loss["share"] is None:
        return "-"
    return f"{loss['share']:.1%} ({loss['low']:.1%} to {loss['high']:.1%})"


def percent_text(number: int, count: int) -> str:
    return f"{number / count:.1%}" if count else "-"


def points(loss: Mapping[str, Any], words: str) -> str:
    """A sentence about a group's share that differs significantly from the others'.

    words: for a lost sample, such as "got no image".
    """
    more = "more" if loss["difference"] > 0 else "less"
    low, high = sorted((abs(loss["difference_low"]), abs(loss["difference_high"])))
    share = f"{loss['share']:.1%} of its samples {words}, {loss['others']:.1%} of the others'"
    far = f"{abs(loss['difference']) * 100:.1f} points {more} ({low * 100:.1f} to {high * 100:.1f})"
    return f"{share}: {far}, a significant difference."


def reservations(variety: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about pictures that were not compared, or not as they are now.  variety: as ``audit`` returns it."""
    if variety["sampled"]:
        yield "Only a part of the pictures was compared, so that the true share of near copies is higher."
    if variety["missing"]:
        yield (
            f"{variety['missing']:,} generated pictures are not in these tables: run stage 06 on the folder of the "
            "edits to compare all of them."
        )
    if older := variety["older_shards"]:
        yield (
            f"Stage 03 made the pictures of {older:,} shards again after these features were computed: run stage 06 "
            "again with --rerun."
        )
