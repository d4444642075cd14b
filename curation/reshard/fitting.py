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
from curation.tar.runs import Alike
from curation.tar.samples import AUTO, MAX_MEMBER_BYTES, PLAIN, Parts
from curation.tar.scan import IMAGE_SUFFIXES, Run, SampleSpan, Window
from curation.tar.splice import Edit

ImageSuffix = Literal["source", "jpg", "png", "webp", "keep"]
LATER: Final = {  # the stages' ``later``
    "image_suffix": Later(before="keep", now="source"),
    "image_member": Later(before=PLAIN, now=AUTO),
}
QUALITY: Final = 95  # of DataComp's shards
_FORMATS: Final = {"jpg": "jpg", "jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "png": "png", "webp": "webp"}


class Fitting:
    """Fits the new images of one shard, and counts what it did.

    Args:
        wanted: ``source``: as the source's image; jpg, png or webp; ``keep``: as the edit's own, byte for byte.
        member: Which of several pictures of a sample was read, and is replaced: ``Parts.image``.

    Attributes:
        encoded: Format → how many images were encoded again in it.
        unwritten: Suffix of a source image → how many stay .jpg because that format is not written here.
        sources: Suffix → how many images of the source have it.
    """

    def __init__(self, wanted: ImageSuffix, member: str = PLAIN) -> None:
        self._wanted = wanted
        self._member, self._parts = member, Parts(member)
        self._by_member = 0  # samples of which the option ``image_member`` decided
        self.encoded: Counter[str] = Counter()
        self.unwritten: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self._seen: tuple[Alike | None, dict[str, bytes]] = None, {}  # the suffixes of the last sample of a run

    def look(self, parts: Iterable[SampleSpan | Run]) -> None:
        """Count the image suffixes of the source.  parts: the samples, one by one or in runs."""
        if self._wanted == "source":
            found = Counter[tuple[str, ...]]()
            for part in parts:
                if isinstance(part, Run):
                    found[part.alike.suffixes] += len(part)
                else:
                    found[part.suffixes] += 1
            for suffixes, count in found.items():
                for suffix in suffixes:
                    if suffix in IMAGE_SUFFIXES:
                        self.sources[suffix] += count

    def fit(self, span: SampleSpan, edit: Edit) -> Edit:
        """The edit as it goes into the shard in place of the sample.

        Raises:
            SampleError: Its image has to be encoded again and cannot be decoded, or the sample lacks the picture that
                ``image_member`` names, or has another one of the new image's name.
        """
        if edit.image is None:
            return edit
        if self._wanted == "keep":
            picture = self.picture(span)
            return replace(edit, image_suffix=self._beside(span, edit.image_suffix, picture), replaces=picture)
        own = written_format(edit.image)
        picture = self.picture(span)
        suffix, kind = self._place(span, own, picture)
        names = self._names(span) | {"replaces": picture}
        if kind == own or not kind:
            return Edit(edit.image, edit.txt, edit.json, suffix, **names)
        image = encode_as(kind, edit.image, QUALITY)
        self.encoded[kind] += 1
        json = edit.json if edit.json is None else _brought_up_to_date(bytes(edit.json), edit.image, image, kind)
        return replace(edit, image=image, json=json, image_suffix=suffix, **names)

    def encode(self, span: SampleSpan, pixels: Pixels) -> tuple[bytes, bytes]:
        """Encode a changed image of the sample itself: (its bytes, what it is called behind the key and a dot)."""
        picture = self.picture(span)
        if self._wanted == "keep":
            suffix, kind = self._beside(span, b"jpg", picture), "jpg"
        else:
            suffix, kind = self._place(span, "jpg", picture)
        if kind == "jpg":
            return encode_jpeg(pixels, QUALITY), suffix
        self.encoded[kind] += 1
        return encode_as(kind, pixels, QUALITY), suffix

    def picture(self, span: SampleSpan) -> str:
        """``Edit.replaces`` of a new image for this sample.

        Raises:
            SampleError: ``no_image``: it lacks the picture that ``image_member`` names.
        """
        is_named = self._member not in (AUTO, PLAIN)
        chosen = self._parts.picture(span.suffixes)
        if not is_named and (chosen is None or "." not in chosen):
            return ""
        self._by_member += 1
        if chosen is None:
            raise SampleError("no_image", f"it has no picture that --image_member {self._member} names")
        return chosen

    def read_picture(self, window: Window, span: SampleSpan) -> bytes | None:
        """The bytes of the picture that counts; None if the sample has none that can be read."""
        chosen = self._parts.picture(span.suffixes)
        member = next((member for member in span.members if member.suffix == chosen), None)
        if member is None or not member.regular or member.size > MAX_MEMBER_BYTES:
            return None
        return window.read(member.data, member.size)

    def text_suffixes(self, span: SampleSpan) -> dict[str, Any]:
        """The suffixes of txt and json as the source writes them, as fields of ``Edit``."""
        raw = self._raw_suffixes(span)
        return {f"{part}_suffix": raw[part] for part in ("txt", "json") if part in raw}

    def notes(self) -> dict[str, Any]:
        """What the receipt says; empty where every image went in as it was."""
        notes: dict[str, Any] = {} if self._wanted == "keep" else {"image_suffix": self._wanted}
        if self._by_member:
            notes["image_member"] = self._member
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

    def _place(self, span: SampleSpan, own: str, picture: str) -> tuple[bytes, str]:
        """The suffix of the new image, and the format that belongs to it.  picture: ``Edit.replaces``."""
        if self._wanted != "source":
            return self._beside(span, self._wanted.encode(), picture), _FORMATS[self._wanted]
        raw = self._raw_suffixes(span)
        source = picture or next((suffix for suffix in raw if suffix in IMAGE_SUFFIXES), None)
        if source is not None:
            kind = source.rpartition(".")[2]
            if kind in _FORMATS:
                return raw[source], _FORMATS[kind]
            self.unwritten[kind] += 1
        return self._beside(span, (own or "jpg").encode(), picture), own or "jpg"

    def _beside(self, span: SampleSpan, suffix: bytes, picture: str) -> bytes:
        """The suffix of a new image of a format of its own, behind the name of the picture that it replaces."""
        if not picture:
            return suffix
        raw = self._raw_suffixes(span)
        name, dot, _ = raw[picture].rpartition(b".")
        new = name + dot + suffix
        if any(other != picture and kept.lower() == new.lower() for other, kept in raw.items()):
            shown = new.decode("utf-8", "replace")
            raise SampleError("duplicate_member", f"the new image would have the name of its other picture .{shown}")
        return new

    def _names(self, span: SampleSpan) -> dict[str, Any]:
        """The suffixes of txt and json, which a source may write in capitals."""
        return self.text_suffixes(span) if self._wanted == "source" else {}

    def _raw_suffixes(self, span: SampleSpan) -> dict[str, bytes]:
        """Suffix → the suffix as the source writes it, in the order of the members; the first one of each counts."""
        if span.alike is not None and span.alike is self._seen[0]:
            return self._seen[1]
        found: dict[str, bytes] = {}
        for member in span.members:
            found.setdefault(member.suffix, _raw_suffix(member.name))
        self._seen = span.alike, found
        return found


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
