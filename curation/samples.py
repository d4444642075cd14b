"""What the members of a sample say: its metadata, its caption, its image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from curation.errors import SampleError
from curation.jsonio import clean_text, parse_json_object
from curation.tar import IMAGE_SUFFIXES, Sample

MAX_CAPTION_CHARACTERS = 1 << 20
_LOOSE_SUFFIXES = (".json", ".jpg", ".txt")


def metadata_of(sample: Sample) -> dict[str, Any]:
    """The .json as an object; SampleError ``no_json``, ``bad_json`` and its kin."""
    data = sample.members.get("json")
    if data is None:
        raise SampleError("no_json", f"it has only {', '.join(sample.suffixes)}")
    return parse_json_object(data)


def image_of(sample: Sample) -> bytes:
    """The bytes of the image, of whatever format; SampleError ``no_image``."""
    for suffix, data in sample.members.items():
        if suffix in IMAGE_SUFFIXES:
            return data
    raise SampleError("no_image", f"it has only {', '.join(sample.suffixes)}")


def caption_of(metadata: Mapping[str, Any], txt: bytes | None) -> str:
    """The metadata's caption, else the .txt, as one clean line; SampleError ``no_caption`` or ``caption_too_long``."""
    caption = metadata.get("caption")
    if not isinstance(caption, str):
        if txt is None:
            raise SampleError("no_caption", "neither in the json nor as a txt")
        caption = txt[: 4 * MAX_CAPTION_CHARACTERS + 4].decode("utf-8", "replace")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise SampleError("caption_too_long", f"more than {MAX_CAPTION_CHARACTERS:,} characters")
    return clean_text(caption)


def check_loose_name(key: str) -> None:
    """Raise SampleError ``unsafe_name`` for a key that cannot name loose files beside those of other samples.

    A folder that looks like a file (``000.json/001``) would stand in the way of the sample that has it as its file.
    """
    *folders, base = key.split("/")
    if any(name.endswith(_LOOSE_SUFFIXES) for name in folders) or len(os.fsencode(base)) > 255 - len(".json"):
        raise SampleError("unsafe_name", "no loose files can be named so; --edits_layout tar takes it")
