"""Which of its captions a sample gets: the one that the web had, or one that a model has written.

The choice is a hash of the seed and the key, so it depends neither on the shard nor on what is beside it.  All captions
stay in the sample's json; the chosen one is its ``caption`` and its ``.txt``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import xxhash

from curation.captioned.rows import Captioned, CaptionsOfShard
from curation.edits import json_of, txt_of
from curation.errors import SampleError, ShardError, UsageError
from curation.jsonio import MAX_SAMPLE_JSON_BYTES, parse_json_object
from curation.options.values import items_in
from curation.reshard.fitting import Fitting
from curation.run import ShardContext
from curation.tar.samples import USUAL, caption_of, lenient_metadata, load_sample
from curation.tar.scan import SampleSpan, Window
from curation.tar.splice import UNCHANGED, Edit

WEB: Final = "web"  # the caption that a photo has
PROMPT: Final = "prompt"  # that of a generated picture
SOURCE_FIELD, CHOICES_FIELD = "caption_source", "caption_choices"
CAPTIONS_NOTE, LACKING_NOTE = "captions", "captions_lacking"  # of a receipt: kind or name → samples
TOLERANCE: Final = 1e-3  # of the sum of the weights, so that 0.333:web,0.333:short,0.334:long and thirds can be written
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_EXAMPLE = "write it as 0.3:web,0.7:synthetic"


@dataclass(frozen=True, slots=True)
class Mix:
    """The share of each caption.

    Attributes:
        weights: Name → weight, in the order in which they were given.  Their sum is 1.
        seed: Of the choice.
    """

    weights: Mapping[str, float]
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Mix:
        """Read ``0.3:web,0.7:synthetic``.  Raises UsageError for anything else."""
        weights: dict[str, float] = {}
        for item in items_in(text):
            number, colon, name = item.partition(":")
            if not colon or not _NAME.fullmatch(name):
                raise UsageError(f"--mix: {item!r} is not a weight and a name: {_EXAMPLE}")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not 0 <= weight <= 1:
                raise UsageError(f"--mix: {item!r}: {number!r} is not a weight from 0 to 1: {_EXAMPLE}")
            if name in weights:
                raise UsageError(f"--mix names {name} twice")
            if name == PROMPT:
                raise UsageError(f"--mix: {name} is the caption that a generated picture has; {WEB} stands for it")
            weights[name] = weight
        if abs(sum(weights.values()) - 1) > TOLERANCE:
            raise UsageError(f"--mix {text}: the weights must add up to 1, and these make {sum(weights.values()):.6g}")
        if not weights.keys() - {WEB}:
            raise UsageError(f"--mix {text} names no caption of --captions: {_EXAMPLE}")
        return cls(weights, seed)

    @property
    def synthetic(self) -> tuple[str, ...]:
        """The names that are looked for in ``--captions``."""
        return tuple(name for name in self.weights if name != WEB)

    @property
    def record(self) -> str:
        """The weights as text, for the recorded options."""
        return ",".join(f"{weight!r}:{name}" for name, weight in self.weights.items())

    def choose(self, key: str, there: Mapping[str, str]) -> tuple[str, str]:
        """Choose among the captions of a sample.

        Args:
            key: The sample's key in its source shard.
            there: Name → caption, of those that it has; at least one.

        Returns:
            The name that the weights choose, and the one that is taken: another one if the sample lacks the first.
        """
        wanted = _at(self._share("mix", key), self.weights)
        if wanted in there:
            return wanted, wanted
        left = {name: weight for name, weight in self.weights.items() if name in there}
        # A share of its own: the first one lies in the part of the name that is lacking, so it is not spread evenly.
        return wanted, _at(self._share("mix again", key), left) if left else next(iter(there))

    def _share(self, what: str, key: str) -> float:
        """A number from 0 to 1, spread evenly over the keys."""
        return xxhash.xxh3_64_intdigest(f"{what} {self.seed}\0{key}".encode("utf-8", "surrogatepass")) / 2**64


def _at(share: float, weights: Mapping[str, float]) -> str:
    """The name in whose part of the whole ``share`` lies.  Where all weights are 0, the first one."""
    rest = share * sum(weights.values())
    last = next(iter(weights))
    for name, weight in weights.items():
        if weight:
            last = name
            if rest < weight:
                return name
            rest -= weight
    return last


def own_caption(metadata: Mapping[str, Any], txt: bytes | None, *, edited: bool) -> tuple[str, str]:
    """The caption that a sample has without a mix, and what kind it is: ``web``, or ``prompt`` of a generated picture.

    The web's caption of an edited sample describes the photo that is not there any more, so it is never this one.

    Args:
        metadata: Its json.
        txt: Its ``.txt``.
        edited: Its picture is an edit of this run; what the json says of an earlier mix is about the photo then.

    Returns:
        The kind, and the caption as one line; empty if it has none.

    Raises:
        SampleError: ``caption_too_long``.
    """
    if edited:
        return PROMPT, _told(metadata, txt)
    choices, curation = metadata.get(CHOICES_FIELD), metadata.get("curation")
    curation = curation if isinstance(curation, dict) else {}
    if isinstance(choices, dict) and isinstance(metadata.get(SOURCE_FIELD), str):  # of an earlier mix
        for kind in (PROMPT, WEB):
            if isinstance(choices.get(kind), str) and choices[kind]:
                return kind, _told({"caption": choices[kind]}, None)
        return WEB, ""
    before = curation.get("previous")
    generated = isinstance((before if isinstance(before, dict) else curation).get("prompt"), str)
    kind = PROMPT if generated or isinstance(curation.get("prompt"), str) else WEB
    if isinstance(curation.get("recaptioned_by"), dict):  # a tar of stage 05, whose caption is a model's
        return kind, _told({"caption": curation.get("original_caption")}, None)
    return kind, _told(metadata, txt)


def _told(metadata: Mapping[str, Any], txt: bytes | None) -> str:
    try:
        return caption_of(USUAL.told(dict(metadata)), txt)
    except SampleError as error:
        if error.reason == "no_caption":
            return ""
        raise


class Mixer:
    """Gives the samples of one output shard their captions, and counts them.

    Args:
        mix: The weights.
        fitting: Says how the source calls its members, and which picture of a sample counts.

    Attributes:
        taken: Kind or name → how many samples have this caption now.
        lacking: Name → samples that it was chosen for and that have no such caption.
        other_picture: Samples whose captions are of another picture than the one they have.
        untouched: Samples that stay as they were: their json or caption cannot be read, or they have no caption at all.
    """

    def __init__(self, mix: Mix, fitting: Fitting) -> None:
        self._mix, self._fitting = mix, fitting
        self.taken: Counter[str] = Counter()
        self.lacking: Counter[str] = Counter()
        self.other_picture = 0
        self.untouched = 0

    def mix(
        self, window: Window, span: SampleSpan, edit: Edit | None, captions: CaptionsOfShard, *, edited: bool
    ) -> Edit | None:
        """Give a sample its caption.

        Args:
            window: The window that contains the sample.
            span: The sample.
            edit: What changes of it anyway; None for nothing.
            captions: Those of its source shard.
            edited: Whether ``edit`` is one of stage 03, so that the sample has another picture now.

        Returns:
            The edit with the caption; ``edit`` itself if the sample stays as it was.

        Raises:
            ShardError: The captions cannot be read.
        """
        try:
            before, txt = _texts(window, span, edit, edited=edited)
            kind, own = own_caption(before, txt, edited=edited)
        except SampleError:
            self.untouched += 1
            return edit
        theirs = None if span.repeated else captions.find(span.key, before)
        generated = edit if edited else None
        is_other = theirs is not None and not self._is_of(theirs, kind, before, window, span, generated)
        texts = {} if theirs is None or is_other else theirs.texts
        there = {name: text for name in self._mix.weights if (text := own if name == WEB else texts.get(name, ""))}
        if own:
            there.setdefault(WEB, own)
        wanted, name = self._mix.choose(span.key, there) if there else ("", "")
        new = self._json(before, there, kind, name) if there else None
        if new is None:
            self.untouched += 1
            return edit
        self.taken[kind if name == WEB else name] += 1
        if is_other:
            self.other_picture += 1
        elif name != wanted:
            self.lacking[wanted] += 1
        packed: dict[str, bytes | None] = {"txt.gz": None} if "txt.gz" in span.suffixes else {}  # it is the old caption
        names = self._fitting.text_suffixes(span)
        return replace(edit or UNCHANGED, txt=txt_of(there[name]), json=new, more=packed, **names)

    def report(self, work: ShardContext) -> None:
        """Write the counts into the receipt."""
        work.note(CAPTIONS_NOTE, dict(sorted(self.taken.items())))
        more = {
            LACKING_NOTE: dict(sorted(self.lacking.items())),
            "captions_of_other_pictures": self.other_picture,
            "captions_untouched": self.untouched,
        }
        for name, counts in more.items():
            if counts:
                work.note(name, counts)

    def _is_of(
        self,
        theirs: Captioned,
        kind: str,
        metadata: Mapping[str, Any],
        window: Window,
        span: SampleSpan,
        edit: Edit | None,
    ) -> bool:
        """Whether captions are of the picture that the sample has now.  Without digests, they are those of photos.

        edit: the edit that the sample is replaced with, whose json may say another sha256 if another program made it;
        None if the picture stays.
        """
        named = {theirs.sha256, theirs.image_sha256} - {None}
        if not named:
            return kind == WEB
        curation = metadata.get("curation")
        told = [metadata.get("sha256") if edit is None else None]
        for name, before in (("blur", "original_sha256"), ("encoded", "edit_sha256")):
            story = curation.get(name) if isinstance(curation, dict) else None
            told.append(story.get(before) if isinstance(story, dict) else None)
        if any(one in named for one in told if isinstance(one, str)):
            return True
        image = self._fitting.read_picture(window, span) if edit is None else edit.image
        return image is not None and hashlib.sha256(image).hexdigest() in named

    def _json(self, before: Mapping[str, Any], there: Mapping[str, str], kind: str, name: str) -> bytes | None:
        """The json with all captions by name, and the chosen one; None if it would be larger than readers take."""
        choices = {WEB: "", PROMPT: "", **dict.fromkeys(self._mix.synthetic, "")}
        choices |= {kind if one == WEB else one: text for one, text in there.items()}
        told = {SOURCE_FIELD: kind if name == WEB else name, CHOICES_FIELD: choices}
        new = json_of({**before, "caption": there[name], **told})
        return new if len(new) <= MAX_SAMPLE_JSON_BYTES else None


def _texts(window: Window, span: SampleSpan, edit: Edit | None, *, edited: bool) -> tuple[dict[str, Any], bytes | None]:
    """The json and the txt that a sample would have without a mix.  Raises SampleError if they cannot be read."""
    if edited and edit is not None:
        json, txt = edit.json or b"{}", None if edit.txt is None else bytes(edit.txt)
    else:
        sample = load_sample(window, span, ("json", "txt"), MAX_SAMPLE_JSON_BYTES)
        if not span.repeated:
            sample.check()
        json, txt = sample.members.get("json", b"{}"), sample.members.get("txt")
        if edit is not None and edit.json is not None:
            json = edit.json
    return parse_json_object(json), txt


class Acquaintance:
    """Whether the captions of a shard are of its samples: captions of another dataset would change nothing, silently.

    Args:
        captions: Those of the shard; None if none are mixed.
        where: Where they come from, for messages.
    """

    def __init__(self, captions: CaptionsOfShard | None, where: str) -> None:
        self._captions, self._where = captions, where
        self._samples, self._met = 0, captions is None

    def meet(self, window: Window) -> None:
        """Look at the samples of a window.  Once a caption is of one of them, no other is looked at."""
        if self._met or self._captions is None:
            return
        for span in window.spans:
            if span.key and not span.torn:
                self._samples += 1
                json = load_sample(window, span, ("json",), MAX_SAMPLE_JSON_BYTES).members.get("json")
                self._met = self._captions.find(span.key, lenient_metadata(json)) is not None
                if self._met:
                    return

    def check(self) -> None:
        """Raise ShardError if there are samples, and no caption is of any of them."""
        if self._samples and not self._met:
            raise ShardError(
                f"{self._where}: no caption there is of a sample of this shard: none has the key or the uid of one; "
                "give the captions of these shards as --captions, or leave the shard out with --shards"
            )
