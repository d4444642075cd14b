"""How often generated images show the group that they were made for, by a zero-shot CLIP or SigLIP model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation import backends
from curation.commands.audit.groups import attributes_of, shards_tried
from curation.commands.places import EDITS, PROMPTS, StagePlace, provenance
from curation.commands.plan.cost import evenly
from curation.edits import LooseEditReader, TarEditReader
from curation.errors import InfrastructureError, SampleError, ShardError
from curation.extract.api import Preparation, short_name
from curation.extract.settings import ModelSettings
from curation.images import decode_rgb
from curation.rewrite.groups import hash_of

IMAGES_A_SHARD = 20  # so that few tars are read through
_BATCH = 32


# What is asked of the model about a value of an attribute.
_QUESTIONS: Mapping[str, str] = {
    "male": "a photo of a man",
    "female": "a photo of a woman",
    "asian": "a photo of an asian person",
    "indian": "a photo of an indian person",
    "middle east": "a photo of a middle eastern person",
}


def question(value: str) -> str:
    return _QUESTIONS.get(value, f"a photo of a {value} person")


@dataclass(frozen=True, slots=True)
class Seen:
    """model: with its revision.  images: how many were classified.  unreadable: how many could not be read.
    shown: (attribute, value) → [images of that value, those for which the model finds that value most likely]."""

    model: str
    images: int
    unreadable: int
    shown: Mapping[tuple[str, str], tuple[int, int]]


def look_at_images(
    places: Mapping[str, StagePlace], groups: Sequence[str], directive: str, settings: ModelSettings, count: int
) -> Seen:
    """Let the model choose for each image and attribute among the values that ``groups`` have.

    directive: as in stage 06's ``models``: ``oai-clip-vit-b32``, ``clip:<model>``, ``siglip:<model>``.
    count: images, spread over the shards and chosen by a hash of their keys.
    """
    model = _Model(directive, settings)
    values: dict[str, list[str]] = {}
    for attribute, value in {pair for group in groups for pair in attributes_of(group)}:
        values.setdefault(attribute, []).append(value)
    classes = {attribute: sorted(found) for attribute, found in values.items() if len(found) > 1}
    features = {attribute: model.texts([question(value) for value in found]) for attribute, found in classes.items()}
    tally: Counter[tuple[str, str, bool]] = Counter()
    images = unreadable = 0
    pending: list[tuple[str, NDArray[np.uint8]]] = []

    def look() -> None:
        pictures = model.images([picture for _, picture in pending])
        for (group, _), picture in zip(pending, pictures, strict=True):
            for attribute, value in attributes_of(group):
                if attribute in classes:
                    best = classes[attribute][int(np.argmax(features[attribute] @ picture))]
                    tally[attribute, value, best == value] += 1
        pending.clear()

    try:
        for group, jpeg in _chosen(places, count):
            try:
                pending.append((group, decode_rgb(jpeg)))
                images += 1
            except SampleError:
                unreadable += 1
            if len(pending) == _BATCH:
                look()
        if pending:
            look()
    finally:
        model.close()
    pairs = sorted({(attribute, value) for attribute, value, _ in tally})
    shown = {(a, v): (tally[a, v, True] + tally[a, v, False], tally[a, v, True]) for a, v in pairs}
    return Seen(model.described, images, unreadable, shown)


def _chosen(places: Mapping[str, StagePlace], count: int) -> Iterator[tuple[str, bytes]]:
    """(group, JPEG) of generated images: at most ``IMAGES_A_SHARD`` of a shard, unless there are few shards."""
    shards = evenly(sorted(shards_tried(places[EDITS])), max(1, count // IMAGES_A_SHARD))
    each = -(-count // max(1, len(shards)))
    left = count
    for shard_id in shards:
        groups = {str(line.get("key")): line.get("group") for line in provenance(places[PROMPTS], shard_id)}
        tar = places[EDITS].home / f"{shard_id}.tar"
        try:
            with TarEditReader(tar) if tar.exists() else LooseEditReader(tar.with_suffix(""), None) as edits:
                keys = sorted(edits.keys() & groups.keys(), key=lambda key: hash_of(0, key))
                for key in keys[: min(each, left)]:
                    group, jpeg = groups[key], edits.read(key).image
                    if isinstance(group, str) and jpeg is not None:
                        left -= 1
                        yield group, bytes(jpeg)
        except (ShardError, OSError) as error:
            raise InfrastructureError(f"{tar}: {error}") from error


class _Model:
    """Features of length one from stage 06's extractor."""

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        self._backend = backends.load("extract", "clip")(directive, settings)
        self._pictures, self._texts = self._backend.preparations
        self._name = short_name(directive)
        self.described = f"{directive} ({self._backend.revision})"
        side = self._pictures.side
        self._no_picture = np.zeros((side, side, 3), np.uint8)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """texts × width."""
        return self._features([self._no_picture] * len(texts), texts, "text")

    def images(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """images × width, of RGB pictures of any size."""
        crops = [self._pictures(picture) for picture in pictures]
        return self._features(crops, [""] * len(crops), "image")

    def _features(self, crops: Sequence[Any], texts: Sequence[str], which: str) -> NDArray[np.float32]:
        tokens = np.stack([self._texts(text) for text in texts])
        batch = _Batch({self._pictures: np.stack(crops), self._texts: tokens})
        found = self._backend.compute(batch)[f"{self._name}-{which}"]
        return np.asarray(found.cpu().numpy() if hasattr(found, "cpu") else found, np.float32)

    def close(self) -> None:
        self._backend.close()


class _Batch:
    """Prepared inputs that are all there, as an extractor takes them."""

    def __init__(self, arrays: Mapping[Preparation, NDArray[Any]]) -> None:
        self._arrays = arrays
        self.features: Mapping[str, Any] = {}

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    @property
    def readable(self) -> NDArray[np.bool_]:
        return np.ones(len(self), np.bool_)

    def prepared(self, preparation: Preparation) -> Any:
        return self._arrays[preparation]

    def device_tensor(self, preparation: Preparation) -> Any:
        import torch

        return torch.from_numpy(self._arrays[preparation])
