"""What the samples of some shards are like: faces, lengths, scores, and the samples that are shown.

Shards are chosen by a hash of their ids and samples by a hash of their keys, so that they are the same ones each time.
"""

from __future__ import annotations

import gzip
import html
import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import xxhash

from curation.caption.preview import all_captions
from curation.caption.rows import rows_path
from curation.commands.places import (
    EDITS,
    FACES,
    METADATA,
    PROMPTS,
    RECAPTION,
    StagePlace,
    json_lines,
    provenance,
    rejected,
)
from curation.commands.report.receipts import keep_greatest
from curation.commands.report.recipe import UsedModel, text_of
from curation.commands.report.scores import ScoreValues
from curation.errors import SampleError, ShardError
from curation.faces import RECORDED_FIELD, clipped, recorded_boxes
from curation.jsonio import KEY_SUFFIX, clean_text, parse_json, read_dictionary
from curation.shards import record_name

MAX_FILE_BYTES: Final = 256 << 20  # of a shard's provenance, rejects or drops; the rest of a larger file is not read
MAX_VALUES: Final = 1_000_000  # of one distribution
MAX_TEXT: Final = 600  # characters that are shown of a caption or a prompt
MAX_REASONS: Final = 200
EXAMPLES = 4  # samples shown for each reason
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ROUNDS = 3  # captions of the web were often escaped twice: &amp;quot;
_MAX_MODELS = 100


Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class GallerySample:
    """A sample that is shown.

    what: ``edited`` | ``rejected`` | ``recaptioned``.  before, after: the caption and the prompt, or the old and the
    new caption.  decoded: the caption has HTML entities, which are shown as the characters that they stand for.
    boxes: of the faces, as shares of the width and the height.
    """

    what: str
    stage: str
    shard: str
    key: str
    before: str = ""
    after: str = ""
    group: str = ""
    reason: str = ""
    detail: str = ""
    boxes: tuple[Box, ...] = ()
    decoded: bool = False


@dataclass(slots=True)
class SampleStats:
    """What was found in the samples of some shards.

    shards: stage → how many of its shards were read.  faces: number of faces → samples.  sides: of the faces, as a
    share of the image's side.  models: what samples name as the model that made something of them → samples.
    troubles: files that could not be read.
    """

    shards: Counter[str] = field(default_factory=Counter)
    faces: Counter[int] = field(default_factory=Counter)
    sides: array[float] = field(default_factory=lambda: array("d"))
    captions: array[float] = field(default_factory=lambda: array("d"))
    prompts: array[float] = field(default_factory=lambda: array("d"))
    recaptions: array[float] = field(default_factory=lambda: array("d"))
    models: Counter[UsedModel] = field(default_factory=Counter)
    scores: ScoreValues = field(default_factory=ScoreValues)
    edited: list[tuple[int, GallerySample]] = field(default_factory=list)
    rejected: dict[tuple[str, str], list[tuple[int, GallerySample]]] = field(default_factory=dict)
    recaptioned: list[tuple[int, GallerySample]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def use(self, stage: str, model: Any, revision: Any = None) -> None:
        """Counts a model that a sample names."""
        used = UsedModel(stage, text_of(model), text_of(revision))
        if used.name and (used in self.models or len(self.models) < _MAX_MODELS):
            self.models[used] += 1

    def trouble(self, text: object) -> None:
        if len(self.troubles) < 20:
            self.troubles.append(clean_text(str(text))[:300])


def look(places: Sequence[StagePlace], chosen: Sequence[Sequence[str]], gallery: int, close: int) -> SampleStats:
    """Reads the samples of the chosen shards.

    Args:
        places: The stages.
        chosen: For each stage its shards, in the order in which they were chosen.
        gallery: How many samples are shown at most.
        close: How many shards, the first of the chosen ones, those samples come from.
    """
    looked = SampleStats()
    by_stage = {place.stage: place for place in reversed(places)}
    for place, shards in zip(places, chosen, strict=True):
        for number, shard_id in enumerate(shards):
            looked.shards[place.stage] += 1
            wanted = gallery if number < close else 0
            try:
                _look_at(place, shard_id, by_stage, looked, wanted)
            except (OSError, ShardError, ValueError, TypeError, KeyError, AttributeError) as error:
                looked.trouble(f"{place.stage}, {shard_id}: {error}")
    return looked


def _look_at(
    place: StagePlace, shard_id: str, places: Mapping[str, StagePlace], looked: SampleStats, gallery: int
) -> None:
    if place.stage == FACES:
        _look_at_faces(place, shard_id, looked)
    elif place.stage == PROMPTS:
        _look_at_prompts(place, shard_id, looked)
    elif place.stage == EDITS:
        _look_at_edited(place, shard_id, places, looked, gallery)
    elif place.stage == RECAPTION:
        _look_at_recaptions(place, shard_id, looked, gallery)
    elif place.stage == METADATA:
        looked.scores.read(place.home / f"{shard_id}.parquet")
    if gallery:
        _choose_rejected(place, shard_id, places, looked)


def _look_at_faces(place: StagePlace, shard_id: str, looked: SampleStats) -> None:
    for boxes in _faces(place, shard_id).values():
        looked.faces[len(boxes)] += 1
        _extend(looked.sides, [math.sqrt((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in boxes])
    for line in provenance(place, shard_id, MAX_FILE_BYTES):
        looked.use(FACES, line.get("detector"), line.get("revision"))


def _faces(place: StagePlace, shard_id: str) -> dict[str, list[Box]]:
    """Returns key → faces of the samples that stage 01 kept: as it detected them, or as the metadata records them."""
    found = {}
    for folder in sorted({place.home, *place.home.parent.iterdir()}):  # one of them was --edits, and points back here
        path = folder / f"{shard_id}.json"
        if (folder / "_receipts" / place.stage / "_home.json").is_file() and path.is_file():
            metadata = read_dictionary(path, MAX_FILE_BYTES)
            found = {
                name.removesuffix(KEY_SUFFIX): _boxes(value.get("face_bboxes"))
                for name, value in metadata.items()
                if isinstance(value, dict)
            }
            break
    return found | {
        str(line.get("key")): _boxes(line.get("boxes")) for line in provenance(place, shard_id, MAX_FILE_BYTES)
    }


def _look_at_prompts(place: StagePlace, shard_id: str, looked: SampleStats) -> None:
    for line in provenance(place, shard_id, MAX_FILE_BYTES):
        _extend(looked.captions, [len(str(line.get("caption", "")))])
        _extend(looked.prompts, [len(str(line.get("prompt", "")))])
        looked.use(PROMPTS, line.get("model"))


def _look_at_edited(
    place: StagePlace, shard_id: str, places: Mapping[str, StagePlace], looked: SampleStats, gallery: int
) -> None:
    captions, faces = {}, {}
    if gallery and PROMPTS in places:
        captions = {str(line.get("key")): line for line in provenance(places[PROMPTS], shard_id, MAX_FILE_BYTES)}
    if gallery and FACES in places:
        faces = _faces(places[FACES], shard_id)
    for line in provenance(place, shard_id, MAX_FILE_BYTES):
        key = str(line.get("key"))
        models = line.get("models")
        if isinstance(models, dict):
            image = models.get("image")
            looked.use(PROMPTS, models.get("prompt"))
            looked.use(EDITS, *((image.get("name"), image.get("revision")) if isinstance(image, dict) else (image,)))
        if not gallery:
            continue
        before = _text(captions.get(key, {}).get("caption"))
        shown = GallerySample(
            "edited",
            place.stage,
            shard_id,
            key,
            before=decoded(before),
            after=_text(line.get("prompt")),
            group=_text(line.get("group"), 80),
            boxes=tuple(faces.get(key, ())[:20]),
            decoded=decoded(before) != before,
        )
        _choose(looked.edited, shown, gallery)


def _choose_rejected(place: StagePlace, shard_id: str, places: Mapping[str, StagePlace], looked: SampleStats) -> None:
    for reason, key, detail in _gone(place, shard_id):
        name = (place.stage, reason)
        if name not in looked.rejected and len(looked.rejected) >= MAX_REASONS:
            continue
        shown = GallerySample("rejected", place.stage, shard_id, key, reason=reason, detail=detail)
        _choose(looked.rejected.setdefault(name, []), shown, EXAMPLES)


def with_captions(shown: Iterable[GallerySample], places: Sequence[StagePlace]) -> dict[tuple[str, str], str]:
    """Returns (shard, key) → caption for samples that stage 01 kept and a later stage left out."""
    homes = [place.home for place in places if place.stage == FACES]
    found: dict[tuple[str, str], str] = {}
    wanted: dict[str, set[str]] = {}
    for one in shown:
        if one.stage in (PROMPTS, EDITS):
            wanted.setdefault(one.shard, set()).add(one.key)
    for shard_id, keys in wanted.items() if homes else ():
        try:
            captions = read_dictionary(homes[0] / f"{shard_id}.json", MAX_FILE_BYTES)
        except ShardError:
            continue
        found |= {(shard_id, key): _text(captions.get(key + KEY_SUFFIX)) for key in keys}
    return found


def _look_at_recaptions(place: StagePlace, shard_id: str, looked: SampleStats, gallery: int) -> None:
    for line in json_lines(rows_path(place.home, shard_id), MAX_FILE_BYTES):
        _extend(looked.recaptions, [len(str(line.get("caption", "")))])
        if gallery:
            before, after = _text(line.get("original_caption")), _text(all_captions(line).replace("\n", " · "))
            key, plain = str(line.get("key")), decoded(before)
            shown = GallerySample(
                "recaptioned", place.stage, shard_id, key, before=plain, after=after, decoded=plain != before
            )
            _choose(looked.recaptioned, shown, min(gallery, 12))


def _choose(heap: list[tuple[int, GallerySample]], shown: GallerySample, at_most: int) -> None:
    """Adds a sample to a heap of those with the lowest hashes, each once."""
    number = -xxhash.xxh3_64_intdigest(f"{shown.shard}/{shown.key}".encode("utf-8", "replace"))
    if any(number == other for other, _ in heap):
        return
    keep_greatest(heap, (number, shown), at_most)


def in_order(heap: Sequence[tuple[int, GallerySample]]) -> list[GallerySample]:
    return [shown for _, shown in sorted(heap, key=lambda pair: -pair[0])]


def _gone(place: StagePlace, shard_id: str) -> Iterator[tuple[str, str, str]]:
    """Yields (reason, key, detail) of the samples that were dropped or failed."""
    for line in rejected(place, shard_id, MAX_FILE_BYTES):
        yield _text(line.get("reason"), 80), str(line.get("key")), _text(line.get("detail"), 300)
    try:
        with gzip.open(place.rejects / f"{record_name(shard_id)}.drops.tsv.gz") as file:
            data = file.read(MAX_FILE_BYTES)
    except (FileNotFoundError, EOFError, zlib.error, gzip.BadGzipFile):
        return
    for row in data.splitlines():
        reason, _, key = row.partition(b"\t")
        try:
            yield _text(reason.decode("utf-8", "replace"), 80), str(parse_json(key, keep_surrogates=True)), ""
        except SampleError:
            continue


def _boxes(value: Any) -> list[Box]:
    """Returns faces as shares of the image, 0 to 1; [] for boxes that the stages refuse."""
    try:
        return [clipped(box) for box in recorded_boxes({RECORDED_FIELD: value}) or ()]
    except SampleError:
        return []


def _extend(values: array[float], more: Iterable[float]) -> None:
    if len(values) < MAX_VALUES:
        values.extend(more)


def _text(value: Any, at_most: int = MAX_TEXT) -> str:
    """Returns one printable line, cut where it is too long."""
    text = clean_text(value) if isinstance(value, str) else ""
    return text if len(text) <= at_most else text[: at_most - 1] + "…"


def decoded(caption: str) -> str:
    """Returns a caption with its HTML entities as the characters that they stand for, as people wrote it.

    Captions of web pages often hold ``&quot;`` and ``&#39;``, or even ``&amp;quot;``.  The result is text, not HTML.
    """
    for _ in range(_ROUNDS):
        before, caption = caption, _ENTITY.sub(lambda entity: html.unescape(entity.group()), caption)
        if caption == before:
            break
    return clean_text(caption)
