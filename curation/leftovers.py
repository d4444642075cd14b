"""Temporary files that attempts left behind when they were killed, found with one listing a folder and process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from curation.publish import temporary_name


class Leftovers:
    """What lay about under temporary names when this process first looked into a folder.

    It is cleared per shard, and only after one's own commit of that shard: an attempt that had written a temporary
    file before then had read an older receipt, so that its own commit, should it still live, is void.
    """

    def __init__(self) -> None:
        self._found: dict[Path, dict[str, list[str]]] = {}  # folder → the name without token → names

    def look(self, places: Iterable[Path]) -> None:
        """List the folders of ``places`` that are not listed yet.  Before the commit."""
        for folder in {place.parent for place in places} - self._found.keys():
            found: dict[str, list[str]] = {}
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith((".tmp", ".old")):
                        found.setdefault(_without_token(entry.name), []).append(entry.name)
            self._found[folder] = found

    def clear(self, places: Iterable[Path], own_token: str, dead_tokens: Iterable[str] = ()) -> None:
        """Remove what other attempts left beside ``places``; ``dead_tokens`` are of those that died since the look.

        Raises OSError.
        """
        dead_tokens = list(dead_tokens)
        for place in places:
            own = temporary_name(place.name, own_token)
            names = self._found.get(place.parent, {}).pop(_without_token(own), [])
            for name in {*names, *(temporary_name(place.name, token) for token in dead_tokens)} - {own}:
                place.with_name(name).unlink(missing_ok=True)


def _without_token(name: str) -> str:
    return name.rsplit(".", 2)[0]
