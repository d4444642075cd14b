"""What a zero-shot CLIP or SigLIP model sees in generated pictures, and in the photos that they replace."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.backends.check.features import ClipFeatures
from curation.backends.check.zero_shot import Questions, values_of
from curation.commands.audit.groups import shards_tried
from curation.commands.audit.variety import PictureFeatures
from curation.commands.places import EDITS, PROMPTS, StagePlace, provenance
from curation.commands.plan.cost import evenly
from curation.commands.report.originals import Originals
from curation.edits import LooseEditReader, TarEditReader
from curation.errors import InfrastructureError, SampleError, ShardError
from curation.extract.settings import ModelSettings
from curation.images import decode_rgb
from curation.rewrite.groups import attributes_of, hash_of
from curation.tar.samples import AUTO, Parts, image_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES

IMAGES_A_SHARD = 20  # so that few tars are read through
_BATCH = 32


@dataclass(slots=True)
class Seen:
    """What a model saw.

    Attributes:
        model: With its revision.
        images, originals: How many generated pictures, and how many of the photos that they replace, were classified.
        unreadable: How many could not be read, of both.
        shown: (attribute, value) → [pictures of that value, those in which the model finds that value most likely].
        found: (attribute, value, whether in the photos) → pictures in which the model finds that value most likely.
        variety: What is known of the pictures' features; None where nobody asked.
    """

    model: str
    images: int = 0
    originals: int = 0
    unreadable: int = 0
    shown: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    found: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    variety: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture that is classified.  original: whether it is the photo of the sample, not the generated picture."""

    group: str
    image: bytes
    shard: str
    key: str
    original: bool = False


def look_at_images(
    places: Mapping[str, StagePlace],
    groups: Sequence[str],
    directive: str,
    settings: ModelSettings,
    count: int,
    originals: Originals | None = None,
    near: float | None = None,
) -> Seen:
    """Let the model choose for each image and attribute among the values that ``groups`` have.

    Args:
        places: The stages.
        groups: Those that samples were assigned to.
        directive: As in stage 06's ``models``: ``oai-clip-vit-b32``, ``clip:<model>``, ``siglip:<model>``.
        settings: How the model is loaded.
        count: Images, spread over the shards and chosen by a hash of their keys.
        originals: Where the photos are that were replaced; None: they are not looked at.
        near: The least cosine of near copies, for ``Seen.variety``; None: that is not measured.
    """
    model = ClipFeatures(directive, settings)
    with tempfile.TemporaryDirectory(prefix=".audit.") as scratch:
        look = _Look(model, f"{directive} ({model.revision})", groups, Path(scratch))
        for picture in _chosen(places, count, originals):
            look.add(picture)
        return look.result(directive, near)


class _Look:
    """Classifies pictures in batches, and keeps their features in a scratch file."""

    def __init__(self, model: ClipFeatures, described: str, groups: Sequence[str], scratch: Path) -> None:
        self._model = model
        self.seen = Seen(described)
        self._questions = Questions(model, values_of(groups))
        self._pending: list[tuple[_Picture, NDArray[np.uint8]]] = []
        self._tally: Counter[tuple[str, str, bool]] = Counter()
        self._features = {original: PictureFeatures(scratch / str(original)) for original in (False, True)}
        self._keys: dict[bool, list[str]] = {False: [], True: []}

    def add(self, picture: _Picture) -> None:
        try:
            self._pending.append((picture, decode_rgb(picture.image)))
        except SampleError:
            self.seen.unreadable += 1
            return
        if picture.original:
            self.seen.originals += 1
        else:
            self.seen.images += 1
        if len(self._pending) == _BATCH:
            self._look()

    def _look(self) -> None:
        features = self._model.pictures([self._model.prepare(pixels) for _, pixels in self._pending])
        for (picture, _), row in zip(self._pending, features, strict=True):
            answers = self._questions.answers(row)
            for attribute, best in answers.items():
                self.seen.found[attribute, best, picture.original] += 1
            for attribute, value in attributes_of(picture.group):
                if attribute in answers and not picture.original:
                    self._tally[attribute, value, answers[attribute] == value] += 1
            keys = self._keys[picture.original]
            self._features[picture.original].add(picture.shard, [len(keys)], [picture.group], row[None])
            keys.append(picture.key)
        self._pending.clear()

    def result(self, directive: str, near: float | None) -> Seen:
        if self._pending:
            self._look()
        pairs = sorted({(attribute, value) for attribute, value, _ in self._tally})
        tally = self._tally
        self.seen.shown = {(a, v): (tally[a, v, True] + tally[a, v, False], tally[a, v, True]) for a, v in pairs}
        if near is not None:
            measured = {original: self._measure(original, near) for original in (False, True)}
            source = measured[True] if self.seen.originals else None
            self.seen.variety = {"feature": directive, "near": near, "generated": measured[False], "source": source}
        for features in self._features.values():
            features.close()
        return self.seen

    def _measure(self, original: bool, near: float) -> dict[str, Any]:
        keys = self._keys[original]
        return self._features[original].measure(near, lambda places: [keys[row] for _, row in places])


def _chosen(places: Mapping[str, StagePlace], count: int, originals: Originals | None = None) -> Iterator[_Picture]:
    """Generated images, at most ``IMAGES_A_SHARD`` of a shard, unless there are few shards, and then their photos."""
    shards = evenly(sorted(shards_tried(places[EDITS])), max(1, count // IMAGES_A_SHARD))
    each = -(-count // max(1, len(shards)))
    left = count
    for shard_id in shards:
        groups = {
            str(line.get("key")): group
            for line in provenance(places[PROMPTS], shard_id)
            if isinstance(group := line.get("group"), str) and group
        }
        tar = places[EDITS].home / f"{shard_id}.tar"
        chosen: dict[str, str] = {}
        try:
            with TarEditReader(tar) if tar.exists() else LooseEditReader(tar.with_suffix(""), None) as edits:
                keys = sorted(edits.keys() & groups.keys(), key=lambda key: hash_of(0, key))
                for key in keys[: min(each, left)]:
                    group, jpeg = groups[key], edits.read(key).image
                    if jpeg is not None:
                        left -= 1
                        chosen[key] = group
                        yield _Picture(group, bytes(jpeg), shard_id, key)
        except (ShardError, OSError) as error:
            raise InfrastructureError(f"{tar}: {error}") from error
        if originals is not None and chosen:
            yield from _originals_of(originals, shard_id, chosen)


def _originals_of(originals: Originals, shard_id: str, chosen: Mapping[str, str]) -> Iterator[_Picture]:
    """The photos of a shard's chosen samples; none where the source shard is not there any more."""
    path, left = originals.source(EDITS, shard_id), set(chosen)
    if path is None:
        return
    try:
        for sample in read_samples(path, IMAGE_SUFFIXES.__contains__, parts=Parts(AUTO)):
            if sample.key in left and sample.problem is None:
                left.discard(sample.key)
                yield _Picture(chosen[sample.key], image_of(sample), shard_id, sample.key, original=True)
            if not left:
                return
    except (ShardError, SampleError, OSError) as error:
        raise InfrastructureError(f"{path}: {error}") from error
