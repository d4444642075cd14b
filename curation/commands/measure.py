"""``curation measure FOLDER --check …`` finds how often checks are wrong, on pictures whose truth is known.

A picture's truth stands in the name of its subfolder or in a table.  Nothing but counts is kept of a picture.
"""

from __future__ import annotations

import csv
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import orjson

from curation.backends.check import ORDER, identify, in_order, load_checks
from curation.check import Asked, Check, CheckSettings, Verdict
from curation.cluster import Allocation
from curation.commands.audit.intervals import CONFIDENCE, wilson
from curation.commands.audit.words import cell
from curation.errors import EXIT_OK, SampleError, UsageError
from curation.images import Pixels, decode_rgb
from curation.jsonio import clean_text, parse_json_object
from curation.options import (
    FINITE,
    LISTED,
    POSITIONAL,
    at_least,
    between,
    exit_code,
    items_in,
    logger,
    parse_arguments,
    set_up_logging,
)
from curation.rewrite.groups import attributes_of, read_groups
from curation.storage.files import storage_errors, whole_file
from curation.tar.scan import IMAGE_SUFFIXES

FORMAT: Final = 1
_AT_ONCE = 32  # pictures in memory
_MAX_LINE, _MAX_FILE = 1 << 20, 256 << 20  # bytes of a line of labels, and of a picture's file
_FOLDERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "face": {"face": True}, "noface": {"face": False}, "safe": {"nsfw": False}, "nsfw": {"nsfw": True},
}  # fmt: skip
_WORDS: Final[Mapping[str, bool]] = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}
_NEEDS: Final[Mapping[str, str]] = {
    "face": "subfolders `face` and `noface`, or the column `face`",
    "prompt": "the column `prompt`",
    "group": "subfolders with the names of groups, or the column `group`",
    "safety": "subfolders `safe` and `nsfw`, or the column `nsfw`",
}
_SHARES = ("precision", "recall", "wrongly_failed", "wrongly_passed")
_UNREADABLE_TOLD = 5  # pictures that are named
_PERCENTS = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure how often checks are wrong, on a folder of pictures with labels."""

    folder: Annotated[Path, POSITIONAL]
    """The pictures.  Without --labels the names of their subfolders are their labels: face or noface, safe or nsfw, or
    a group such as asian_female; also several, as in asian_female/noface."""
    check: Annotated[str, LISTED] = "face"
    """What is measured: any of face, prompt, group and safety."""
    labels: Path | None = None
    """A table of labels, .csv, .tsv or .jsonl: file (below the folder), and any of face, nsfw (yes or no), group,
    prompt and match (no: the prompt is of another picture)."""
    groups: str | None = None
    """The groups to decide between: default, or a YAML file as for stage 02.  Default: those of the labels."""
    min_faces: Annotated[int, at_least(1)] = 1
    """face: number of faces that a picture must show."""
    min_face: Annotated[float, between(0, 1)] = 0.05
    """face: the shorter side of a face's box as a share of the picture's shorter side; smaller faces do not count."""
    face_detector: str = "centerface"
    """face: the detector: centerface, scrfd or yunet."""
    min_prompt_score: Annotated[float | None, FINITE] = None
    """prompt: the lowest score of picture and prompt that passes.  Default: known for OpenAI's models only."""
    prompt_model: str = "oai-clip-vit-l14"
    """prompt: a CLIP or SigLIP model, written as for stage 06's --models."""
    group_model: str = "oai-clip-vit-l14"
    """group: a CLIP or SigLIP model, written as for stage 06's --models."""
    max_nsfw: Annotated[float, between(0, 1)] = 0.5
    """safety: the highest probability of a picture that is not safe for work that passes."""
    nsfw_model: str = "open-nsfw"
    """safety: open-nsfw, or nsfw-image-oai-clip-vit-l-14."""
    device: str = "cpu"
    """The models' device: cpu, cuda, cuda:1."""
    out: Path | None = None
    """The JSON file to write."""
    json: bool = False
    """One JSON object on one line instead of tables in Markdown."""

    @property
    def checks(self) -> list[str]:
        """The names of the checks, in their order.

        Raises:
            UsageError: One of them is none.
        """
        names = items_in(self.check)
        for name in names:
            if name not in ORDER:
                raise UsageError(f"--check {name}: there are {', '.join(ORDER)}")
        if not names:
            raise UsageError(f"--check is empty: there are {', '.join(ORDER)}")
        return in_order(names)

    def settings(self, groups: Sequence[str]) -> CheckSettings:
        """What the checks are constructed with.  groups: those to decide between."""
        own = {name: getattr(self, name) for name in CheckSettings.__dataclass_fields__ if hasattr(self, name)}
        return CheckSettings(**own | {"groups": tuple(groups), "threads": Allocation.detect().threads})


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture and what is known of it; None: it is not known.

    again: an earlier row has told its group.
    """

    path: Path
    face: bool | None = None
    nsfw: bool | None = None
    group: str | None = None
    prompt: str | None = None
    match: bool = True
    again: bool = False

    def should_pass(self, check: str) -> bool | None:
        """Whether a check that is never wrong would let it pass; None: the labels do not say."""
        if check == "face":
            return self.face
        if check == "safety":
            return None if self.nsfw is None else not self.nsfw
        if check == "prompt":
            return None if self.prompt is None else self.match
        return None if self.group is None or self.again else True

    def knows(self, check: str) -> bool:
        """Whether the labels say what a check should say of it."""
        return self.should_pass(check) is not None


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "measure")
    set_up_logging(options.json)
    result = measure(options)
    data = orjson.dumps(result)
    if options.out is not None:
        with storage_errors(options.out), whole_file(options.out) as file:
            file.write(data + b"\n")
        logger.info(f"written: {options.out}")
    print(data.decode() if options.json else "\n".join(as_markdown(result)), flush=True)
    return EXIT_OK


def measure(options: Options) -> dict[str, Any]:
    """Judge every picture of the folder; ``docs/checks.md`` describes the result.

    Raises:
        UsageError: There is no picture, or none has a label that a check needs.
        InfrastructureError: A model is not on this machine.
    """
    if not options.folder.is_dir():
        raise UsageError(f"{options.folder}: there is no such folder")
    labelled, unlabelled = _labelled(options)
    checks = options.checks
    for name in checks:
        if all(one.should_pass(name) is None for one in labelled):
            raise UsageError(f"{options.folder}: --check {name} needs labels: {_NEEDS[name]}")
    groups = _groups_to_decide_between(options, labelled) if "group" in checks else ()
    settings = options.settings(groups)
    record = identify(checks, settings)
    tallies: dict[str, _Tally] = {name: _GroupTally() if name == "group" else _Tally() for name in checks}
    loaded = load_checks(checks, settings)
    unreadable: dict[Path, str] = {}
    with ThreadPoolExecutor(settings.threads, "checks") as pool:
        pairs = _with_other_prompts(labelled)
        while chunk := list(islice(pairs, _AT_ONCE)):
            pictures = list(pool.map(_read, [one.path for one in chunk]))
            both = list(zip(chunk, pictures, strict=True))
            unreadable |= {one.path: picture.detail for one, picture in both if isinstance(picture, SampleError)}
            readable = [(one, picture) for one, picture in both if not isinstance(picture, SampleError)]
            for check in loaded:
                _judge(check, readable, tallies[check.name], pool.map)
    for check in loaded:
        check.close()
    labelled_pictures = len({one.path for one in labelled})
    for path, why in islice(unreadable.items(), _UNREADABLE_TOLD):
        logger.warning(f"{clean_text(str(path))}: cannot be read, and does not count ({clean_text(why)[:200]})")
    if len(unreadable) == labelled_pictures:
        raise UsageError(f"{options.folder}: none of {labelled_pictures:,} pictures with labels can be read")
    counted = {"pictures": labelled_pictures, "unlabelled": unlabelled, "unreadable": len(unreadable)}
    found = {
        name: {
            "record": record[name],
            "without_label": labelled_pictures - len({one.path for one in labelled if one.knows(name)}),
            **tallies[name].result(),
        }
        for name in checks
    }
    return {"format": FORMAT, "folder": str(options.folder), "confidence": CONFIDENCE, **counted, "checks": found}


def _judge(
    check: Check, readable: Sequence[tuple[Labelled, Pixels]], tally: _Tally, all_at_once: Callable[..., Iterator[Any]]
) -> None:
    known = [(one, picture) for one, picture in readable if one.should_pass(check.name) is not None]
    prepared = list(all_at_once(check.prepare, [picture for _, picture in known]))
    asked = [Asked(str(one.path), one.prompt or "", one.group) for one, _ in known]
    for (one, _), verdict in zip(known, check.judge(prepared, asked), strict=True):
        tally.add(one, bool(one.should_pass(check.name)), verdict)


def _read(path: Path) -> Pixels | SampleError:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            return SampleError("unreadable", "no file")
        with open(path, "rb") as file:
            return decode_rgb(file.read(_MAX_FILE))
    except (OSError, ValueError) as error:  # names that no file can have
        return SampleError("unreadable", str(error))
    except SampleError as error:
        return error


# ---- labels


def _labelled(options: Options) -> tuple[list[Labelled], int]:
    """The pictures with a label, and how many have none."""
    if options.labels is not None:
        rows = (_row(options.folder, options.labels, row) for row in _rows(options.labels))
        return [*_each_label_once(options.labels, rows)], 0
    found, unlabelled = [], 0
    for folder, folders, files in os.walk(options.folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(files):
            if name.rpartition(".")[2].lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            known = _labels_of(options.folder, Path(folder).relative_to(options.folder))
            unlabelled += not known
            if known:
                found.append(Labelled(Path(folder) / name, **known))
    if not found:
        raise UsageError(f"{options.folder}: no picture in a subfolder whose name is its label, and no --labels")
    return found, unlabelled


def _labels_of(root: Path, folder: Path) -> dict[str, Any]:
    """What the names of the folders in a path say of the pictures in it.

    Raises:
        UsageError: They contradict each other, such as two groups.
    """
    found: dict[str, Any] = {}
    for name in folder.parts:
        known = _FOLDERS.get("".join(character for character in name.lower() if character not in "_- "))
        for label, value in (known or {"group": _group_in(name)}).items():
            if found.setdefault(label, value) != value:
                raise UsageError(
                    f"{root}: {clean_text(str(folder))[-100:]}: its folders give a picture two values of `{label}`: "
                    "each folder of a path is a label, and any name but face, no_face, safe and nsfw is a group"
                )
    return found


def _group_in(text: str) -> str | None:
    return " ".join(text.replace("_", " ").split()) or None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix.lower() == ".jsonl":
            with open(path, "rb") as lines:
                for line in lines:
                    if line.strip():
                        yield parse_json_object(line, _MAX_LINE)
            return
        if path.suffix.lower() not in (".csv", ".tsv"):
            raise UsageError(f"--labels {path}: give a .csv, .tsv or .jsonl")
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    except (OSError, UnicodeDecodeError, csv.Error, SampleError) as error:
        raise UsageError(f"--labels {path}: cannot be read ({clean_text(str(error))[:200]})") from error


def _row(folder: Path, table: Path, row: Mapping[str, Any]) -> Labelled:
    name = row.get("file")
    if not isinstance(name, str) or not name:
        raise UsageError(f"--labels {table}: a row has no `file`: {clean_text(str(dict(row)))[:100]}")
    where = f"--labels {table}: {clean_text(name)[:100]}"
    path = Path(os.path.normpath(name))
    if path.is_absolute() or path.parts[:1] == ("..",) or "\0" in name:
        raise UsageError(f"{where}: lies outside of the folder")
    texts = {key: row.get(key) for key in ("group", "prompt")}
    for key, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{where}: `{key}` is no text")
    match = _yes_or_no(where, "match", row)
    return Labelled(
        folder / path,
        _yes_or_no(where, "face", row),
        _yes_or_no(where, "nsfw", row),
        _group_in(texts["group"] or ""),
        texts["prompt"] or None,
        True if match is None else match,
    )


def _each_label_once(table: Path, rows: Iterable[Labelled]) -> Iterator[Labelled]:
    """Several rows may tell different things of one picture, such as several prompts; each counts once.

    Raises:
        UsageError: Two rows contradict each other.
    """
    told: dict[tuple[Path, str], object] = {}
    for one in rows:
        labels = {"face": one.face, "nsfw": one.nsfw, "group": one.group}
        if one.prompt is not None:
            labels[f"match of the prompt {one.prompt}"] = one.match
        known = {name for name, value in labels.items() if value is not None and (one.path, name) in told}
        for name, value in labels.items():
            if value is not None and told.setdefault((one.path, name), value) != value:
                raise UsageError(
                    f"--labels {table}: rows about {clean_text(str(one.path))[-100:]} contradict each other: "
                    f"`{clean_text(name)[:100]}`"
                )
        yield replace(
            one,
            face=None if "face" in known else one.face,
            nsfw=None if "nsfw" in known else one.nsfw,
            prompt=None if known - {"face", "nsfw", "group"} else one.prompt,
            again="group" in known,
        )


def _yes_or_no(where: str, key: str, row: Mapping[str, Any]) -> bool | None:
    value = row.get(key)
    word = str(value).strip().lower()
    if value is None or not word:
        return None
    if word not in _WORDS:
        raise UsageError(f"{where}: `{key}` is {clean_text(word)[:40]!r}; write yes or no")
    return _WORDS[word]


def _groups_to_decide_between(options: Options, labelled: Sequence[Labelled]) -> Sequence[str]:
    there = sorted({one.group for one in labelled if one.group is not None})
    if options.groups is None:
        return there
    groups = read_groups(options.groups)
    if unknown := sorted(set(there) - set(groups)):
        raise UsageError(f"--groups {options.groups}: labels name {clean_text(unknown[0])!r}, which is none of them")
    return groups


def _with_other_prompts(labelled: Sequence[Labelled]) -> Iterator[Labelled]:
    """Every picture; where no label says that a prompt is of another picture, also with the prompt of the next one."""
    yield from labelled
    with_prompts = [one for one in labelled if one.prompt is not None]
    if all(one.match for one in with_prompts):
        for one, other in zip(with_prompts, [*with_prompts[1:], *with_prompts[:1]], strict=True):
            if one.prompt != other.prompt:
                yield Labelled(one.path, prompt=other.prompt, match=False)


# ---- counting


@dataclass(slots=True)
class _Tally:
    """How often a check that says yes or no was right.

    counts: (group, should pass, passed) → pictures.  scores: (should pass, score in thousandths) → pictures.
    """

    counts: Counter[tuple[str | None, bool, bool]] = field(default_factory=Counter)
    scores: Counter[tuple[bool, int]] = field(default_factory=Counter)

    def add(self, one: Labelled, should: bool, verdict: Verdict) -> None:
        self.counts[one.group, should, bool(verdict.passed)] += 1
        score = next((value for value in verdict.scores.values() if isinstance(value, float)), None)
        if score is not None:
            self.scores[should, round(score * 1000)] += 1

    def result(self) -> dict[str, Any]:
        groups = sorted({group for group, _, _ in self.counts if group is not None})
        scores = {word: self._percentiles(should) for word, should in (("should_pass", True), ("should_fail", False))}
        rows = [{"group": name, **self._row(name)} for name in groups]
        return {**self._row(None), "scores": scores, "groups": rows}

    def _row(self, wanted: str | None) -> dict[str, Any]:
        """wanted: the group; None: all pictures."""

        def count(should: bool, passed: bool) -> int:
            of = {group: n for (group, s, p), n in self.counts.items() if (s, p) == (should, passed)}
            return sum(of.values()) if wanted is None else of.get(wanted, 0)

        right, lost, wrong, caught = count(True, True), count(True, False), count(False, True), count(False, False)
        return {
            "pictures": right + lost + wrong + caught,
            "confusion": {
                "should_pass": {"passed": right, "failed": lost},
                "should_fail": {"passed": wrong, "failed": caught},
            },
            "precision": _share(right, right + wrong),
            "recall": _share(right, right + lost),
            "wrongly_failed": _share(lost, right + lost),
            "wrongly_passed": _share(wrong, wrong + caught),
        }

    def _percentiles(self, should: bool) -> dict[str, float] | None:
        counted = sorted((score, n) for (s, score), n in self.scores.items() if s == should)
        if not counted:
            return None
        values, numbers = np.array(counted).T
        places = np.searchsorted(np.cumsum(numbers), np.array(_PERCENTS) / 100 * numbers.sum())
        found = values[np.minimum(places, len(values) - 1)] / 1000
        return {f"p{percent}": float(value) for percent, value in zip(_PERCENTS, found, strict=True)}


class _GroupTally(_Tally):
    """Which groups were seen in the pictures of each group.  seen: (group, group that was seen) → pictures."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str]] = Counter()

    def add(self, one: Labelled, should: bool, verdict: Verdict) -> None:
        assert one.group is not None
        self.seen[one.group, str(verdict.scores["seen"])] += 1

    def result(self) -> dict[str, Any]:
        return {
            "pictures": self.seen.total(),
            "right": _share(sum(n for (group, seen), n in self.seen.items() if group == seen), self.seen.total()),
            "groups": [{"group": name, **row} for name, row in _one_against_others(self.seen)],
            "attributes": self._attributes(),
        }

    def _attributes(self) -> list[dict[str, Any]]:
        """The same for each value of each attribute that groups have in common, such as a gender in every ethnicity."""
        by_attribute: dict[str, Counter[tuple[str, str]]] = {}
        for (group, seen), number in self.seen.items():
            found = dict(attributes_of(seen))
            for attribute, value in attributes_of(group):
                if attribute in found:
                    by_attribute.setdefault(attribute, Counter())[value, found[attribute]] += number
        return [
            {"attribute": attribute, "value": value, **row}
            for attribute, pairs in sorted(by_attribute.items())
            for value, row in _one_against_others(pairs)
        ]


def _one_against_others(pairs: Mapping[tuple[str, str], int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each name that is true or was seen: its pictures, what was seen in them, precision and recall."""
    for name in sorted({name for pair in pairs for name in pair}):
        seen = {other: n for (true, other), n in sorted(pairs.items(), key=lambda p: -p[1]) if true == name}
        right, true, said = seen.get(name, 0), sum(seen.values()), sum(n for (_, s), n in pairs.items() if s == name)
        others = sum(pairs.values()) - true
        yield (
            name,
            {
                "pictures": true,
                "seen": seen,
                "precision": _share(right, said),
                "recall": _share(right, true),
                "wrongly_failed": _share(true - right, true),
                "wrongly_passed": _share(said - right, others),
            },
        )


def _share(part: int, count: int) -> dict[str, Any]:
    """With its interval after Wilson; None where nothing was counted."""
    low, high = wilson(part, count)
    if not count:
        return {"count": part, "of": count, "share": None, "low": None, "high": None}
    return {"count": part, "of": count, "share": part / count, "low": low, "high": high}


# ---- as Markdown


def as_markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """Tables that can be put into a data card."""
    yield f"{result['pictures']:,} pictures with labels in {cell(str(result['folder']))}."
    for what in ("unlabelled", "unreadable"):
        if result[what]:
            yield f"{result[what]:,} more are {what}." if what == "unlabelled" else f"{result[what]:,} are {what}."
    for name, found in result["checks"].items():
        plain = {key: value for key, value in found["record"].items() if key not in ("groups", "features")}
        record = ", ".join(f"{key} {value}" for key, value in plain.items())
        yield ""
        yield f"## {name}"
        yield ""
        yield f"{cell(record)}."
        yield ""
        if found["without_label"]:
            yield f"{found['without_label']:,} of the pictures have no label for this check, and do not count here."
            yield ""
        yield from _group_tables(found) if name == "group" else _tables(found)
    yield ""
    yield f"Shares with their {result['confidence']:.0%} intervals (Wilson)."


def _tables(found: Mapping[str, Any]) -> Iterator[str]:
    counted = "should pass: passed | failed | should fail: passed | failed"
    yield f"| pictures of | {counted} | precision | recall | wrongly failed | wrongly passed |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in [{"group": "all", **found}, *found["groups"]]:
        counts = [n for of in row["confusion"].values() for n in of.values()]
        shares = [_told(row[name]) for name in _SHARES]
        yield f"| {cell(row['group'])} | {' | '.join(f'{n:,}' for n in counts)} | {' | '.join(shares)} |"
    for word, scores in found["scores"].items():
        if scores is not None:
            yield ""
            percentiles = ", ".join(f"{name[1:]} %: {value:g}" for name, value in scores.items())
            yield f"Scores of pictures that {word.replace('_', ' ')} (percentiles): {percentiles}."


def _group_tables(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"The group that was seen is the right one in {_told(found['right'])} of {found['pictures']:,} pictures."
    for kind, rows in (("group", found["groups"]), ("value", found["attributes"])):
        if not rows:
            continue
        yield ""
        yield f"| {kind} | pictures | precision | recall | wrongly failed | wrongly passed | seen as |"
        yield "|---|---:|---:|---:|---:|---:|---|"
        for row in rows:
            shares = " | ".join(_told(row[name]) for name in _SHARES)
            seen = ", ".join(f"{cell(name)} {number:,}" for name, number in row["seen"].items())
            yield f"| {cell(row[kind])} | {row['pictures']:,} | {shares} | {seen} |"


def _told(share: Mapping[str, Any]) -> str:
    if share["share"] is None:
        return "-"
    return f"{share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
