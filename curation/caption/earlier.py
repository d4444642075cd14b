"""What an earlier run has left: captions that are taken over, and whether they pass the checks of this run.

A caption is what its recipe says: model, prompt, settings and seed.  Checks are no part of it, because they only choose
among the captions that the recipe gives.  So where nothing but checks has changed, the captions that are there are
judged, and only those that fail are asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import orjson
import xxhash

from curation.caption.checks import CaptionChecks, FailedCaption, Looked
from curation.caption.rows import Row, parse_rows, rows_name, rows_path, sha256_of
from curation.check import still_holds
from curation.errors import SampleError, ShardError
from curation.jsonio import dump_json
from curation.run import ShardContext
from curation.run.checkpoints import PartialLog
from curation.tar.samples import Parts, image_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES

RETRIES: Final = 2  # of an image whose reply is no caption, where nothing is checked
_JUDGED_AT_ONCE: Final = 32  # captions: enough for a device, and few enough for memory
_ONLY_TRY: Final = {"round": 0, "failed_captions": 0, "failed_checks": {}}

_Image: TypeAlias = tuple[str, str]  # key and sha256 of the picture


@dataclass(frozen=True, slots=True)
class EarlierCaption:
    """A caption of an earlier run.

    Attributes:
        asked: The digest of the filled prompt; "" where that had no fields.
        image_size, image_sha256, watermark_score, answer, checks, tried: See ``Row``.
        holds: Whether ``checks`` and ``failed`` are what the checks of this run say.
        failed: The checks that it fails.
    """

    text: str
    asked: str
    image_size: tuple[int, int]
    image_sha256: str
    watermark_score: float | None
    answer: Mapping[str, Any] | None = None
    checks: Mapping[str, Any] | None = None
    tried: Mapping[str, Any] | None = None
    holds: bool = True
    failed: tuple[str, ...] = ()

    @property
    def round(self) -> int:
        """See ``Answer``; a caption of a run without checks is taken for the first."""
        return _whole((self.tried or {}).get("round"))

    @property
    def is_first(self) -> bool:
        """Whether it is the one that is kept where nothing is checked."""
        others = _whole((self.tried or {}).get("failed_captions"))
        return not self.round or (self.round <= RETRIES and not others)

    def as_failed(self) -> FailedCaption:
        return FailedCaption(self.text, self.round, Looked(self.failed, self.checks or {}))


Earlier: TypeAlias = Mapping[_Image, Mapping[str, EarlierCaption]]
"""Key and ``image_sha256`` → name → caption."""


def reusable_captions(
    output: Path,
    receipt: Mapping[str, Any] | None,
    recipes: Mapping[str, str],
    mine: tuple[str, str],
    judges: Mapping[str, Any] = MappingProxyType({}),
) -> Earlier:
    """The captions of an earlier run, so that a new format, new samples in a shard or other checks make no caption
    twice.

    Args:
        output: The output folder.
        receipt: Of the earlier run over the shard; None: there was none.
        recipes: For the name of each caption ("" where there is one) a digest of everything that decides it.
        mine: Model and revision; captions that were taken over from another tool have others.
        judges: What each check of this run records of itself; empty where nothing is checked, so that only captions
            that no check has chosen are taken over.

    Returns:
        The captions.  Empty where the earlier run had other recipes, or where the file of rows is not the one that the
        receipt names.
    """
    if receipt is None or receipt.get("status") != "done":
        return {}
    notes = receipt.get("notes", {})
    theirs = {"": notes["recipe"]} if "recipe" in notes else notes.get("recipes", {})
    names = {
        name: next((old for old, digest in theirs.items() if digest == mark), None) for name, mark in recipes.items()
    }
    if not any(old is not None for old in names.values()):
        return {}
    path = rows_path(output, str(receipt["shard"]))
    try:
        data = path.read_bytes()
        rows = [*parse_rows(data, path)]
    except (OSError, ShardError):
        return {}
    named = {out["path"]: out["size"] for out in receipt.get("outputs", [])}
    if named.get(rows_name(str(receipt["shard"]))) != len(data):
        return {}
    found: dict[_Image, dict[str, EarlierCaption]] = {}
    for row in rows:
        captions = {name: _earlier(row, old, mine) for name, old in names.items() if old is not None}
        kept = {name: _as_judged(one, notes.get("checked_by"), judges) for name, one in captions.items() if one}
        found[row["key"], row["image_sha256"]] = {name: one for name, one in kept.items() if one is not None}
    return found


def _earlier(row: Row, name: str, mine: tuple[str, str]) -> EarlierCaption | None:
    """A caption of a row; None where there is none, or another tool made it."""
    text = row["captions"].get(name) if name else row["caption"]
    by = row.get("captions_from", {}).get(name) if name else row
    if text is None or (by is not None and (by["model"], by["revision"]) != mine):
        return None
    width, height = row["image_size"]
    checks, tried = (
        row.get(f"captions_{field}", {}).get(name) if name else row.get(field) for field in ("checks", "tried")
    )
    return EarlierCaption(
        text=text,
        asked=row.get("asked", {}).get(name, ""),
        image_size=(width, height),
        image_sha256=row["image_sha256"],
        watermark_score=row["watermark_score"],
        answer=row.get("answer"),
        checks=checks,
        tried=tried,
    )


def _as_judged(one: EarlierCaption, judged_by: object, judges: Mapping[str, Any]) -> EarlierCaption | None:
    """A caption with what is known of it for the checks of this run; None where it is to be made again."""
    if not judges:
        return replace(one, checks=None, tried=None) if one.is_first else None
    return replace(one, tried=one.tried or _ONLY_TRY, holds=still_holds(judged_by, judges, one.checks))


def _whole(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def judge_earlier(
    earlier: Earlier,
    checks: CaptionChecks,
    work: ShardContext,
    log: PartialLog,
    prepared: Callable[[Iterable[tuple[_Image, bytes]]], Iterator[tuple[_Image, Any]]],
    parts: Parts,
) -> Earlier:
    """Judge the captions that are there and that the checks of this run have not seen.

    Verdicts are logged, and what an interrupted attempt has logged is not computed again.  Pictures are read from the
    shard, and only if a check looks at them.

    Args:
        earlier: From ``reusable_captions``.
        checks: Those of this run.
        work: The shard.
        log: Of the shard.
        prepared: Makes of pictures what the checks take, and leaves out those that cannot be read.
        parts: Which member of a sample is its picture.

    Returns:
        The same captions with their verdicts, without those whose picture cannot be read.

    Raises:
        Stopped: A stop was requested; the verdicts are in the log.
    """
    found = {image: {name: one for name, one in of.items() if one.holds} for image, of in earlier.items()}
    wanted: dict[_Image, dict[str, EarlierCaption]] = {}
    for image, captions in earlier.items():
        for name, one in captions.items():
            if one.holds:
                continue
            if (record := log.get(image[0], _mark(image, one))) is not None:
                found[image][name] = _with_verdict(one, Looked(*orjson.loads(record)))
            else:
                wanted.setdefault(image, {})[name] = one
    pictures = (
        prepared(_pictures(work, parts, wanted))
        if checks.looks_at_pictures and wanted
        else ((image, None) for image in wanted)
    )
    waiting = ((image, name, one, seen) for image, seen in pictures for name, one in wanted[image].items())
    while chunk := [*islice(waiting, _JUDGED_AT_ONCE)]:
        with work.phase("check"):
            looked = checks.judge([seen for *_, seen in chunk], [one.text for _, _, one, _ in chunk])
        told = [*zip(chunk, looked, strict=True)]
        log.append(
            (image[0], _mark(image, one), dump_json([said.failed, said.scores])) for (image, _, one, _), said in told
        )
        for (image, name, one, _), said in told:
            found[image][name] = _with_verdict(one, said)
        work.progress()
        work.check_stop()
    return found


def _with_verdict(one: EarlierCaption, said: Looked) -> EarlierCaption:
    return replace(one, checks=said.scores, failed=tuple(said.failed), holds=True)


def _mark(image: _Image, one: EarlierCaption) -> str:
    """By which the verdict on a caption is found in the log, which is that of the options of this run."""
    judged = f"{image[1]}\0{one.text}".encode("utf-8", "surrogatepass")
    return f"earlier-{xxhash.xxh3_64_hexdigest(judged)}"


def _pictures(work: ShardContext, parts: Parts, wanted: Mapping[_Image, object]) -> Iterator[tuple[_Image, bytes]]:
    """The pictures of the shard whose captions are to be judged, each once."""
    keys, seen = {key for key, _ in wanted}, set[_Image]()
    for sample in read_samples(work.shard.path, IMAGE_SUFFIXES.__contains__, parts=parts):
        if sample.key not in keys:
            continue
        try:
            picture = image_of(sample)
        except SampleError:
            continue
        image = (sample.key, sha256_of(picture))
        if image in wanted and image not in seen:
            seen.add(image)
            yield image, picture
