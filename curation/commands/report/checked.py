"""What the page shows of the checks of stage 03: rows of pictures with their verdicts, and the prompt scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from curation.commands.audit.checks import BINS_A_UNIT, instead
from curation.commands.places import EDITS
from curation.commands.report.charts import Chart, counted
from curation.commands.report.samples import decoded
from curation.jsonio import clean_text

MAX_ROWS: Final = 24  # groups whose pictures are shown
_MAX_PROMPT: Final = 200


@dataclass(frozen=True, slots=True)
class CheckedPicture:
    """A generated picture of a row.

    verdicts: a few words about each check, with whether the picture failed it.  told: all of it, for those who do not
    see the picture.
    """

    shard: str
    key: str
    prompt: str = ""
    tries: int = 0
    failed: bool = False
    verdicts: tuple[tuple[str, bool], ...] = ()
    group: str = ""

    @property
    def name(self) -> str:
        """The key as one clean line."""
        return clean_text(self.key)

    @property
    def told(self) -> str:
        failed = ", ".join(text for text, bad in self.verdicts if bad)
        verdict = f"failed: {failed}" if failed else "failed a check" if self.failed else "passed"
        return f"generated image of {self.name}, {verdict}. Prompt: {self.prompt or '–'}"


@dataclass(frozen=True, slots=True)
class PictureRow:
    """name: of the group; or what else these pictures have in common."""

    name: str
    note: str
    pictures: list[CheckedPicture]


def worst_rows(audit: Mapping[str, Any] | None, most: int) -> list[PictureRow]:
    """Returns a row for each group with its worst pictures, the worst first.

    Args:
        audit: What ``audit`` found; None where it was left out.
        most: Pictures of a row.
    """
    checks = audit["checks"] if audit else None
    rows = []
    for group in (checks["groups"] if checks else ())[:MAX_ROWS]:
        pictures = [
            CheckedPicture(
                one["shard"],
                one["key"],
                prompt=_cut(decoded(one["prompt"])),
                tries=one["tries"],
                failed=not one["passed"],
                verdicts=tuple(_verdicts(one["checks"], group["group"])),
                group=group["group"],
            )
            for one in group["worst"][:most]
        ]
        if pictures:
            rows.append(PictureRow(group["group"], "", pictures))
    return rows


def copy_rows(audit: Mapping[str, Any] | None, most: int) -> list[PictureRow]:
    """Returns a row for each of the largest clusters of near copies."""
    variety = audit["variety"] if audit else None
    rows = []
    for number, cluster in enumerate(variety["generated"]["largest"] if variety else (), 1):
        pictures = [CheckedPicture(one["shard"], one["key"], group=one["group"]) for one in cluster["first"][:most]]
        if pictures:
            rows.append(PictureRow(f"Cluster {number}", f"{cluster['pictures']:,} pictures", pictures))
    return rows


def places_of(rows: Sequence[PictureRow]) -> list[tuple[str, str, str]]:
    """The (stage, shard, key) of each picture."""
    return [(EDITS, one.shard, one.key) for row in rows for one in row.pictures]


def seen_instead(group: Mapping[str, Any]) -> str:
    """The groups that the check sees most often in place of the one that was asked for."""
    return ", ".join(f"{name} {number:,}" for name, number in instead(group, 3)) or "–"


def prompt_scores(audit: Mapping[str, Any] | None) -> Chart | None:
    """The histogram of the prompt scores of all kept pictures; None where there are none."""
    checks = audit["checks"] if audit else None
    if not checks or not checks["prompt_scores"]:
        return None
    counts = {round(float(score) * BINS_A_UNIT): number for score, number in checks["prompt_scores"].items()}
    return counted("Scores of picture and prompt", counts, 1 / BINS_A_UNIT, "score")


def _verdicts(checks: Mapping[str, Mapping[str, Any]], asked: str) -> Iterator[tuple[str, bool]]:
    for name, said in checks.items():
        words = [name]
        if name == "face" and "faces" in said:
            words.append(f"{said['faces']:,.0f}")
        elif (value := _first(said)) is not None:
            words.append(f"{value:.3f}" if name == "prompt" else f"{value:.2f}")
        if said.get("seen", asked) != asked:
            words.append(f"({said['seen']})")
        yield " ".join(words), said["passed"] is False


def _first(said: Mapping[str, Any]) -> float | None:
    return next((value for value in said.values() if type(value) is float), None)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_PROMPT else text[: _MAX_PROMPT - 1] + "…"
