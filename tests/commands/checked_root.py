"""A folder as stages 02 to 04 leave it where stage 03 checked its pictures: receipts, provenance, rejects and edits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from curation.commands.places import EDITS, HYBRID, PROMPTS
from curation.images import encode_jpeg
from curation.shards import record_name, record_path
from tests.shards import write_shard

SUMS = ("tries", "kept", "failed_tries", "kept_though_failed", "rejected")


@dataclass
class Made:
    """One sample and its tries.

    Attributes:
        key: Its key.
        group: Its group; "" for none.
        rounds: For each try the checks with their scores; the last one is kept, unless it is rejected.
        kept: Whether it is; False: rejected.
        prompt: Its prompt.
        colour: Of its picture.
    """

    key: str
    group: str
    rounds: Sequence[Mapping[str, Mapping[str, Any]]]
    kept: bool = True
    prompt: str = "A person."
    colour: tuple[int, int, int] = (120, 60, 30)

    @property
    def failing(self) -> list[list[str]]:
        """Of each try the checks that it failed."""
        return [[name for name, said in checks.items() if said.get("passed") is False] for checks in self.rounds]


def first_of(names: Iterable[str]) -> str:
    """The check by which a sample is rejected."""
    return min(names, key=("face", "prompt", "group", "safety").index)


def face(passed: bool = True) -> dict[str, Any]:
    return {"passed": passed, "faces": int(passed), "largest": 0.4 if passed else 0.0}


def prompt(score: float, least: float = 0.2) -> dict[str, Any]:
    return {"passed": score >= least, "score": score}


def seen(group: str, asked: str, probability: float = 0.7) -> dict[str, Any]:
    return {"passed": group == asked, "probability": probability, "seen": group}


@dataclass
class CheckedRoot:
    """root: the folder.  samples: shard → what was made in it."""

    root: Path
    samples: dict[str, list[Made]] = field(default_factory=dict)

    def add(self, shard: str, samples: Iterable[Made], *, checked: bool = True, hybrid: bool = True) -> None:
        """Writes what the stages leave of one shard.  checked: whether stage 03 ran with --check."""
        made = self.samples[shard] = list(samples)
        self._receipt("prompts", PROMPTS, shard, {"groups": self._assigned(made)})
        lines = [{"key": one.key, "group": one.group or None, "prompt": one.prompt, "caption": "x"} for one in made]
        self._lines("prompts", f"_provenance/{PROMPTS}", shard, lines)
        notes = {"checks": note_of(made)} if checked else {}
        self._receipt("edits", EDITS, shard, notes)
        kept = [one for one in made if one.kept]
        self._lines("edits", f"_provenance/{EDITS}", shard, [provenance_of(one, checked=checked) for one in kept])
        refused = [
            {"key": one.key, "reason": f"check_{first_of(one.failing[-1])}", "detail": "", "group": one.group}
            for one in made
            if not one.kept
        ]
        if refused:
            self._lines("edits", f"_rejects/{EDITS}", shard, refused)
        pictures = {one.key: encode_jpeg(np.full((64, 64, 3), one.colour, np.uint8), 90) for one in kept}
        parts = {one.key: {"jpg": pictures[one.key], "txt": one.prompt.encode(), "json": b"{}"} for one in kept}
        write_shard(self.root / "edits" / f"{shard}.tar", parts)
        if hybrid:
            photos = dict(Counter(one.group for one in made if not one.kept))
            rejects = {"check_rejected": {"original": photos}} if photos else {}
            self._receipt("hybrid", HYBRID, shard, {"edited": len(kept), **rejects})

    def _assigned(self, made: Iterable[Made]) -> dict[str, dict[str, int]]:
        counts = Counter(one.group for one in made if one.group)
        return {group: {"assigned": number, "accepted": number} for group, number in counts.items()}

    def _receipt(self, folder: str, stage: str, shard: str, notes: Mapping[str, Any]) -> None:
        place = record_path(self.root / folder / "_receipts" / stage, shard)
        place.parent.mkdir(parents=True, exist_ok=True)
        told = {"shard": shard, "stage": stage, "status": "done", "notes": notes, "outputs": [], "inputs": []}
        counts = {"counts": {"in": 1, "kept": 1, "dropped": {}, "failed": {}}, "seconds": {}, "version": 1}
        place.write_text(json.dumps(told | counts))

    def _lines(self, folder: str, below: str, shard: str, lines: Iterable[Mapping[str, Any]]) -> None:
        place = self.root / folder / below
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{record_name(shard)}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def provenance_of(one: Made, *, checked: bool = True) -> dict[str, Any]:
    """The line that stage 03 writes about a kept sample."""
    line: dict[str, Any] = {"key": one.key, "prompt": one.prompt, "group": one.group or None, "seed": 0}
    if checked:
        last = len(one.rounds) - 1
        line |= {"check": "failed" if one.failing[-1] else "passed", "tries": len(one.rounds), "round": last}
        line["checks"] = one.rounds[-1]
        line["failed_tries"] = [
            {"round": number, "seed": number, "checks": checks} for number, checks in enumerate(one.rounds[:-1])
        ]
    return line


def note_of(made: Iterable[Made]) -> dict[str, Any]:
    """The note ``checks`` of a receipt about some samples."""
    rows: dict[str, dict[str, Any]] = {}
    for one in made:
        for row in (rows.setdefault("", _row()), rows.setdefault(f"group {one.group}", _row())):
            failed = len(one.rounds) - one.kept
            row["tries"] += len(one.rounds)
            row["kept"] += one.kept
            row["failed_tries"] += failed
            row["kept_though_failed"] += one.kept and bool(one.failing[-1])
            row["rejected"] += not one.kept
            for names in one.failing:
                for name in names:
                    row["by_check"][name] = row["by_check"].get(name, 0) + 1
    total = rows.pop("", _row())
    return total | {"groups": {name.removeprefix("group "): row for name, row in rows.items()}}


def _row() -> dict[str, Any]:
    return {**dict.fromkeys(SUMS, 0), "by_check": {}}
