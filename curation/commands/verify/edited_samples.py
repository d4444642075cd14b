"""Checks the json of an edited sample against its image, its text and its original."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from curation.edits import REPLACED_FIELDS
from curation.errors import SampleError
from curation.images import image_size
from curation.jsonio import parse_json_object

Problem = tuple[str, str]  # the kind of a finding, and its detail

_ABSENT = object()


_CHANGED: Final = frozenset((*REPLACED_FIELDS, "curation"))


# The fields of every `curation` object as docs/stage-03.md promises them, with their types.
_PROVENANCE: Final[Mapping[str, tuple[type, ...]]] = {
    "prompt": (str,),
    "prompt_suffix": (str,),
    "negative_prompt": (str,),
    "group": (str, type(None)),
    "models": (dict,),
    "seed": (int,),
    "steps": (int,),
    "guidance": (int, float, type(None)),
    "text_tokens": (int, type(None)),
    "size": (list,),
    "quality": (int,),
    "stages": (dict,),
}


def self_problems(jpg: bytes, txt: bytes, json: bytes, *, provenance: bool = True) -> Iterator[Problem]:
    """Find what is wrong with an edited sample on its own.

    provenance: whether it must have a complete ``curation`` object.  Kinds: ``bad_json``, ``wrong_sha256``,
    ``undecodable``, ``wrong_size``, ``caption_differs``, ``no_provenance``.
    """
    try:
        metadata = parse_json_object(json)
    except SampleError as error:
        yield "bad_json", str(error)
        return
    sha256 = hashlib.sha256(jpg).hexdigest()
    if metadata.get("sha256") != sha256:
        yield "wrong_sha256", f"the json says {_short(metadata.get('sha256'))}, its picture has {sha256}"
    try:
        width, height = image_size(jpg)
    except SampleError as error:
        yield "undecodable", str(error)
    else:
        if (metadata.get("width"), metadata.get("height")) != (width, height):
            said = f"{_short(metadata.get('width'))} x {_short(metadata.get('height'))}"
            yield "wrong_size", f"the json says {said}, its picture has {width} x {height}"
    caption = metadata.get("caption")
    if not isinstance(caption, str) or caption.encode("utf-8", "replace") != txt:
        text = txt[:200].decode("utf-8", "replace")
        yield "caption_differs", f"the json says {_short(caption)}, the txt {_short(text)}"
    if provenance and (lacking := _lacking(metadata)):
        yield "no_provenance", f"its json's curation lacks {lacking}"


def original_problems(json: bytes, original_json: bytes) -> Iterator[Problem]:
    """Find values of the source's json that the edited sample's json lacks.  Kind: ``original_lost``."""
    try:
        metadata, original = parse_json_object(json), parse_json_object(original_json)
    except SampleError:
        return  # self_problems reports the edit's bad json; a bad json of the source has nothing to keep
    lost = [name for name in original if name not in _CHANGED and metadata.get(name, _ABSENT) != original[name]]
    curation = metadata.get("curation")
    if isinstance(curation, dict):  # an edit made elsewhere need not have one
        lost += [
            f"curation.original_{name}"
            for name in REPLACED_FIELDS
            if name in original and curation.get(f"original_{name}", _ABSENT) != original[name]
        ]
        if "curation" in original and curation.get("previous", _ABSENT) != original["curation"]:
            lost.append("curation.previous")
    if lost:
        yield "original_lost", f"not as in the source: {', '.join(map(_short, lost[:10]))}"


def is_edited(metadata: Mapping[str, Any]) -> bool:
    """Whether a sample's json says that the sample was edited, and not only that its faces were blurred."""
    curation = metadata.get("curation")
    return isinstance(curation, dict) and curation.keys() != {"blur"}


def _lacking(metadata: Mapping[str, Any]) -> str:
    """What a sample's provenance lacks; empty if it is complete."""
    curation = metadata.get("curation")
    if not isinstance(curation, dict):
        return "everything: there is no such object"
    lacking = [name for name, kinds in _PROVENANCE.items() if not isinstance(curation.get(name, _ABSENT), kinds)]
    models, stages = curation.get("models"), curation.get("stages")
    image = models.get("image") if isinstance(models, dict) else None
    if "models" not in lacking and not (isinstance(image, dict) and image.get("name") and "revision" in image):
        lacking.append("models.image with name and revision")
    if "stages" not in lacking and not stages:
        lacking.append("the versions of the stages")
    if metadata.get("caption") != curation.get("prompt"):
        lacking.append("the prompt that is its caption")
    return ", ".join(lacking)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
