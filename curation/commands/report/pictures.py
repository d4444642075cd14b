"""Thumbnails for the page, within a budget of bytes."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from curation.edits import loose_path
from curation.errors import SampleError, ShardError
from curation.images import decode_rgb, encode_jpeg
from curation.tar.samples import AUTO, Parts, Sample, image_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES

SIDE: Final = 176  # pixels of the longer side, shown at up to 160
QUALITY: Final = 74
MAX_IMAGE_BYTES: Final = 64 << 20


Known = dict[tuple[Path, int, int, str, str], str]
"""(tar, its size, its time, which picture, key) → data URI; empty for a sample without a picture.

Pages after the first use it.
"""


@dataclass(slots=True)
class Thumbnails:
    """Data URIs of thumbnails.

    left: bytes of the budget that are left.  known: what earlier pages have made.  omitted: pictures that did not fit.
    """

    left: int
    known: Known = field(default_factory=dict)
    omitted: int = 0
    found: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        find: Callable[[str, str], Path | None],
        wanted: Iterable[tuple[str, str, str]],
        member_of: Callable[[str], str] = lambda stage: AUTO,
    ) -> list[str]:
        """Makes thumbnails of samples.

        Args:
            kind: The name under which ``get`` finds them.
            find: Returns the tar or the folder of loose files with the samples of (stage, shard); None for none.
            wanted: (stage, shard, key) of each sample.
            member_of: Returns which of several pictures of a sample a stage read: ``Parts.image``.

        Returns:
            What could not be read.
        """
        troubles = []
        keys: dict[tuple[Path, str, str], set[str]] = {}
        found: dict[tuple[str, str], Path | None] = {}
        for stage, shard_id, key in wanted:
            if (stage, shard_id) not in found:
                found[stage, shard_id] = find(stage, shard_id)
            if (path := found[stage, shard_id]) is not None:
                keys.setdefault((path, shard_id, member_of(stage)), set()).add(key)
        for (path, shard_id, member), of_shard in keys.items():
            try:
                self._add_from(kind, path, shard_id, of_shard, Parts(member))
            except ShardError as error:
                troubles.append(str(error))
        return troubles

    def get(self, kind: str, shard_id: str, key: str) -> str:
        """Returns the data URI; empty where there is none."""
        return self.found.get((kind, shard_id, key), "")

    def _add_from(self, kind: str, path: Path, shard_id: str, keys: set[str], parts: Parts) -> None:
        try:
            there = path.stat()
        except OSError:  # it was there a moment ago
            return
        made = {key: (path, there.st_size, there.st_mtime_ns, parts.image, key) for key in sorted(keys)}
        missing = {key for key, name in made.items() if name not in self.known}
        if kind == "new" and path.is_dir():  # of any name, with keys that may lead into folders of it
            for key in missing:
                self.known[made[key]] = _loose_thumbnail(path, key)
            missing.clear()
        read = partial(read_samples, path, IMAGE_SUFFIXES.__contains__, max_member_bytes=MAX_IMAGE_BYTES, parts=parts)
        for sample in read() if missing else ():
            if sample.key in missing:
                missing.discard(sample.key)
                self.known[made[sample.key]] = thumbnail(sample) if sample.problem is None else ""
            if not missing:
                break
        self.known |= {made[key]: "" for key in missing}
        for key, name in made.items():
            uri = self.known[name]
            if len(uri) > self.left:
                self.omitted += 1
            elif uri:
                self.left -= len(uri)
                self.found[kind, shard_id, key] = uri


def _loose_thumbnail(folder: Path, key: str) -> str:
    """That of an edit in a folder of loose files."""
    try:
        with open(loose_path(folder, f"{key}.jpg"), "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError, SampleError):
        return ""
    return _data_uri(data) if len(data) <= MAX_IMAGE_BYTES else ""


def thumbnail(sample: Sample) -> str:
    """Returns the sample's image as a small JPEG, encoded again, in a data URI; empty where it cannot be decoded."""
    try:
        return _data_uri(image_of(sample))
    except SampleError:
        return ""


def _data_uri(data: bytes) -> str:
    try:
        image = Image.fromarray(decode_rgb(data, at_least=SIDE))
    except SampleError:
        return ""
    image.thumbnail((SIDE, SIDE))
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(np.asarray(image), QUALITY)).decode("ascii")
