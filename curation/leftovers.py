"""What attempts left behind when they were killed: temporary files, found with one listing a folder and process, and
uploads, found with one question a shard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from curation.errors import InfrastructureError
from curation.storage.buckets import object_at
from curation.storage.files import temporary_name
from curation.storage.urls import RemoteFile, Source


class Leftovers:
    """What lay about under temporary names when this process first looked into a folder.

    It is cleared per shard, and only after one's own commit of that shard: an attempt that had written a temporary
    file before then had read an older receipt, so that its own commit, should it still live, is void.
    """

    def __init__(self) -> None:
        self._found: dict[Path, dict[str, list[str]]] = {}  # folder → the name without token → names
        self._uploads: dict[RemoteFile, list[str]] = {}

    def look(self, places: Collection[Source]) -> None:
        """List the folders of ``places`` that are not listed yet, and the uploads to them.  Before the commit."""
        for place in places:
            if isinstance(place, RemoteFile):  # one that may not be listed is left to the bucket's own rules
                with contextlib.suppress(InfrastructureError):
                    self._uploads[place] = object_at(place).under_way()
        for folder in {place.parent for place in places if isinstance(place, Path)} - self._found.keys():
            found: dict[str, list[str]] = {}
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith((".tmp", ".old")):
                        found.setdefault(_without_token(entry.name), []).append(entry.name)
            self._found[folder] = found

    def clear(
        self,
        places: Iterable[Source],
        own_token: str,
        dead_tokens: Iterable[str] = (),
        own_uploads: Collection[str] = (),
    ) -> None:
        """Remove what other attempts left beside ``places``; ``dead_tokens`` are of those that died since the look.

        Raises OSError, and InfrastructureError where a bucket cannot be asked.
        """
        dead_tokens = list(dead_tokens)
        for place in places:
            if isinstance(place, RemoteFile):
                for upload in self._uploads.pop(place, ()):
                    if upload not in own_uploads:
                        object_at(place).abort(upload)
                continue
            own = temporary_name(place.name, own_token)
            names = self._found.get(place.parent, {}).pop(_without_token(own), [])
            for name in {*names, *(temporary_name(place.name, token) for token in dead_tokens)} - {own}:
                place.with_name(name).unlink(missing_ok=True)


def _without_token(name: str) -> str:
    return name.rsplit(".", 2)[0]
