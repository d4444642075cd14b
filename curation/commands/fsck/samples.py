"""What is wrong with a sample taken by itself, and which kinds of members the samples of a shard have."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from curation.commands.findings import SHOWN_OF_A_KIND, Findings
from curation.commands.verify.edited_samples import is_edited, self_problems
from curation.errors import SampleError
from curation.images import decode_rgb
from curation.jsonio import clean_text, decode_text, parse_json_object
from curation.tar.headers import MAX_NAME_BYTES, Member
from curation.tar.samples import MAX_MEMBER_BYTES, problem_of
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan

MAX_NAME_PART: Final = 255  # of a file name, on every filesystem that clusters use


_LONGEST_SUFFIX = len(".json")


_DATACOMP_KINDS = frozenset(("image", "txt", "json"))

Read = Callable[[Member], bytes]


class Pictures:
    """Whether readers find the pictures of a shard: a member counts as one by its suffix alone."""

    def __init__(self) -> None:
        self._found = self._cut = False
        self._names: dict[str, None] = {}  # a few members of samples without a picture

    def add(self, span: SampleSpan, findings: Findings) -> None:
        """Look at the names of a sample's members.  If a picture is there and its suffix is not one, that is told."""
        if "image" in span.kinds:
            self._found = True
            return
        pictures = [m for m in span.members if m.suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
        if span.key and pictures:
            self._cut = True
            name, suffix = pictures[0].text_name, pictures[0].suffix
            findings.add("cut_key", span.key, f"readers take {name} for .{suffix} of this key, which is no picture")
        for member in span.members or span.foreign:
            if member.regular and len(self._names) < SHOWN_OF_A_KIND:
                self._names[member.text_name] = None

    def tell(self, findings: Findings) -> None:
        """Tell of a shard without any picture, unless it is known where they are."""
        if self._names and not self._found and not self._cut:
            some = ", ".join(self._names)
            findings.add("no_picture", "", f"no sample has a picture ({', '.join(sorted(IMAGE_SUFFIXES))}): {some} …")


class Kinds:
    """Which kinds of members the samples of a shard usually have, and which of them lack one."""

    def __init__(self) -> None:
        self._samples = 0
        self._having: Counter[str] = Counter()
        self._sets: Counter[frozenset[str]] = Counter()
        self._examples: dict[frozenset[str], list[str]] = {}

    def add(self, key: str, kinds: frozenset[str]) -> None:
        self._samples += 1
        self._having.update(kinds)
        self._sets[kinds] += 1
        examples = self._examples.setdefault(kinds, [])
        if len(examples) < SHOWN_OF_A_KIND:
            examples.append(key)

    def usual(self) -> frozenset[str]:
        """What more than half of the samples have, each should have; an image, a txt and a json where a tenth has them:
        of a badly damaged shard few may be whole, or none."""
        if not self._samples:
            return _DATACOMP_KINDS

        def share(kind: str) -> float:
            return 0.1 if kind in _DATACOMP_KINDS else 0.5

        return frozenset(kind for kind, count in self._having.items() if count > share(kind) * self._samples)

    def tell(self, findings: Findings) -> None:
        usual = self.usual()
        for kinds, count in self._sets.items():
            if lacking := usual - kinds:
                examples = self._examples[kinds]
                for key in examples:
                    findings.add("incomplete_sample", key, f"it has no {', '.join(sorted(lacking))}")
                findings.counts["incomplete_sample"] += count - len(examples)


def sample_problems(span: SampleSpan, read: Read, *, images: bool) -> list[tuple[str, str]]:
    """What is wrong with a sample taken by itself: (kind, detail).  images: decode its pictures."""
    found: list[tuple[str, str]] = []
    problem = problem_of(span)
    if problem is not None and problem[0] not in ("damaged_tar", "duplicate_key"):
        found.append(problem)
    longest = max(len(part) for part in os.fsencode(span.key).split(b"/"))
    if longest + _LONGEST_SUFFIX > MAX_NAME_PART or len(os.fsencode(span.key)) + _LONGEST_SUFFIX > MAX_NAME_BYTES:
        found = [one for one in found if one[0] != "unsafe_name"]
        found.append(("overlong_key", f"a part of {longest:,} bytes; file names have at most {MAX_NAME_PART}"))
    if any(member.size > MAX_MEMBER_BYTES for member in span.members):
        return [*found, ("member_too_large", f"a member of more than {MAX_MEMBER_BYTES:,} bytes")]
    members: dict[str, bytes] = {}
    for member in span.members:
        if member.regular and member.suffix not in members and (images or member.suffix in ("json", "txt")):
            members[member.suffix] = read(member)
    metadata: dict[str, Any] = {}
    if (json := members.get("json")) is not None:
        try:
            metadata = parse_json_object(json)
        except SampleError as error:
            found.append(("bad_json", str(error)))
    if images:
        found += _picture_problems(members)
    txt = members.get("txt")
    if is_edited(metadata):
        picture = _picture(span, read)
        if picture is not None and txt is not None and json is not None:
            found += self_problems(picture, txt, json)
    elif txt is not None and isinstance(caption := metadata.get("caption"), str):
        text = clean_text(decode_text(txt))
        if clean_text(caption) not in ("", text):  # an empty caption does not count: the txt is the caption
            found.append(("caption_differs", f"the json says {caption[:100]!r}, the txt {text[:100]!r}"))
    first: dict[str, str] = {}
    for kind, detail in found:  # one of a kind: a broken picture is not told of twice
        first.setdefault(kind, detail)
    return [*first.items()]


def _picture_problems(members: Mapping[str, bytes]) -> list[tuple[str, str]]:
    found = []
    for suffix, data in members.items():
        if suffix in IMAGE_SUFFIXES:
            try:
                decode_rgb(data)
            except SampleError as error:
                found.append((error.reason, f".{suffix}: {error.detail}"))
    return found


def _picture(span: SampleSpan, read: Read) -> bytes | None:
    """The sample's first picture, which is the one that stage 04 replaces."""
    return next((read(member) for member in span.members if member.suffix in IMAGE_SUFFIXES and member.regular), None)
