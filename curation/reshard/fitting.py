"""Fits new images into a hybrid shard: under the name, and in the format, of the image whose place they take.

Readers that take the columns of a dataset from its first samples, as Hugging Face ``datasets`` does, see no ``.jpg``
among ``.webp``; they would lose exactly the samples that were edited.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final, Literal

from curation.edits import json_of
from curation.errors import SampleError
from curation.images import Pixels, encode_as, encode_jpeg, encoders, image_size, written_format
from curation.jsonio import parse_json_object
from curation.run import Later
from curation.tar.headers import split_name
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan
from curation.tar.splice import Edit

ImageSuffix = Literal["source", "jpg", "png", "webp", "keep"]
LATER: Final = {"image_suffix": Later(before="keep", now="source")}  # the stages' ``later``
QUALITY: Final = 95  # of DataComp's shards
_FORMATS: Final = {"jpg": "jpg", "jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "png": "png", "webp": "webp"}


class Fitting:
    """Fits the new images of one shard, and counts what it did.

    Args:
        wanted: ``source``: as the source's image; jpg, png or webp; ``keep``: as the edit's own, byte for byte.

    Attributes:
        encoded: Format → how many images were encoded again in it.
        unwritten: Suffix of a source image → how many stay .jpg because that format is not written here.
        sources: Suffix → how many images of the source have it.
    """

    def __init__(self, wanted: ImageSuffix) -> None:
        self._wanted = wanted
        self.encoded: Counter[str] = Counter()
        self.unwritten: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()

    def look(self, spans: Iterable[SampleSpan]) -> None:
        """Count the image suffixes of the source."""
        if self._wanted == "source":
            members = (member for span in spans for member in span.members)
            self.sources.update(member.suffix for member in members if member.suffix in IMAGE_SUFFIXES)

    def fit(self, span: SampleSpan, edit: Edit) -> Edit:
        """The edit as it goes into the shard in place of the sample.

        Raises:
            SampleError: Its image has to be encoded again and cannot be decoded.
        """
        if self._wanted == "keep" or edit.image is None:
            return edit
        own = written_format(edit.image)
        suffix, kind = self._place(span, own)
        names = self._names(span)
        if kind == own or not kind:
            return replace(edit, image_suffix=suffix, **names)
        image = encode_as(kind, edit.image, QUALITY)
        self.encoded[kind] += 1
        json = edit.json if edit.json is None else _brought_up_to_date(bytes(edit.json), edit.image, image, kind)
        return replace(edit, image=image, json=json, image_suffix=suffix, **names)

    def encode(self, span: SampleSpan, pixels: Pixels) -> tuple[bytes, bytes]:
        """Encode a changed image of the sample itself: (its bytes, what it is called behind the key and a dot)."""
        suffix, kind = (b"jpg", "jpg") if self._wanted == "keep" else self._place(span, "jpg")
        if kind == "jpg":
            return encode_jpeg(pixels, QUALITY), suffix
        self.encoded[kind] += 1
        return encode_as(kind, pixels, QUALITY), suffix

    def notes(self) -> dict[str, Any]:
        """What the receipt says; empty where every image went in as it was."""
        notes: dict[str, Any] = {} if self._wanted == "keep" else {"image_suffix": self._wanted}
        if self.encoded:
            notes["encoded"] = {**dict(sorted(self.encoded.items())), "by": encoders()}
        if self.unwritten:
            notes["kept_jpg"] = dict(sorted(self.unwritten.items()))
        return notes

    def warnings(self) -> list[str]:
        """One line for each thing of which readers should know."""
        lines = []
        if self.unwritten:
            what = ", ".join(f"{count:,} over .{suffix}" for suffix, count in sorted(self.unwritten.items()))
            lines.append(f"new images stay .jpg where the format of the source is not written here: {what}")
        if len(self.sources) > 1:
            what = ", ".join(f"{count:,} .{suffix}" for suffix, count in self.sources.most_common())
            lines.append(
                f"the source has images of several suffixes ({what}): readers that take their columns from the first "
                "samples miss those of another suffix"
            )
        return lines

    def _place(self, span: SampleSpan, own: str) -> tuple[bytes, str]:
        """The suffix of the new image, and the format that belongs to it."""
        if self._wanted != "source":
            return self._wanted.encode(), _FORMATS[self._wanted]
        member = next((member for member in span.members if member.suffix in IMAGE_SUFFIXES), None)
        if member is None:
            return (own or "jpg").encode(), own or "jpg"
        if member.suffix in _FORMATS:
            return _raw_suffix(member.name), _FORMATS[member.suffix]
        self.unwritten[member.suffix] += 1
        return (own or "jpg").encode(), own or "jpg"

    def _names(self, span: SampleSpan) -> dict[str, Any]:
        """The suffixes of txt and json, which a source may write in capitals."""
        if self._wanted != "source":
            return {}
        raw = {member.suffix: _raw_suffix(member.name) for member in reversed(span.members)}
        return {f"{part}_suffix": raw[part] for part in ("txt", "json") if part in raw}


def _raw_suffix(name: bytes) -> bytes:
    split = split_name(name)
    return split[1] if split is not None else b""


def _brought_up_to_date(json: bytes, old: bytes | memoryview, new: bytes, kind: str) -> bytes:
    """The edit's json with the new image's sha256 and size, if it has these, and how it was encoded.

    A json that cannot be read stays as it is.
    """
    try:
        metadata = dict(parse_json_object(json))
    except SampleError:
        return json
    width, height = image_size(new)
    now = {"sha256": hashlib.sha256(new).hexdigest(), "width": width, "height": height}
    metadata |= {name: value for name, value in now.items() if name in metadata}
    curation = metadata.get("curation")
    if isinstance(curation, dict):
        quality = {} if kind == "png" else {"quality": QUALITY}
        story = {"format": kind, **quality, "by": encoders(), "edit_sha256": hashlib.sha256(old).hexdigest()}
        metadata["curation"] = {**curation, "encoded": story}
    return json_of(metadata)
