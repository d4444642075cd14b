"""``audit`` counts what the checks of stage 03 said, against samples that were planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from curation.__main__ import main
from curation.commands.audit import checks as checks_of_audit
from curation.commands.audit.checks import MAX_NAMES, WORST, CheckCounts, as_result
from curation.commands.audit.command import as_markdown
from curation.commands.audit.intervals import Moments, share_result
from curation.commands.places import EDITS
from tests.commands.checked_root import CheckedRoot, Made, face, prompt, seen
from tests.commands.synthetic_root import HOSTILE

A, B = "asian female", "white male"


def audit(root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["audit", str(root), "--json", "--workers", "1", *more]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def planted(count: int = 40) -> list[Made]:
    """Half of the first group's samples need a second try, a quarter are rejected, an eighth are kept though they
    failed; every picture of the second group passes at once, and a fifth of them show the first."""
    made = []
    for number in range(count):
        good = {"face": face(), "prompt": prompt(0.3 + number / 1000), "group": seen(A, A)}
        bad = {"face": face(False), "prompt": prompt(0.1), "group": seen(B, A)}
        if number % 4 == 0:
            one = Made(f"a{number:04d}", A, [bad, bad], kept=False)
        elif number % 8 == 1:
            one = Made(f"a{number:04d}", A, [bad, bad])
        elif number % 4 == 2:
            one = Made(f"a{number:04d}", A, [bad, good])
        else:
            one = Made(f"a{number:04d}", A, [good])
        made.append(one)
        shown = A if number % 5 == 0 else B
        said = {"face": face(), "prompt": prompt(0.5), "group": {**seen(shown, B), "passed": None}}
        made.append(Made(f"b{number:04d}", B, [said]))
    return made


def planted_root(folder: Path) -> CheckedRoot:
    """Two shards of the planted samples."""
    made = CheckedRoot(folder)
    samples = planted()
    made.add("00000000", samples[:30])
    made.add("00000001", samples[30:])
    return made


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> CheckedRoot:
    return planted_root(tmp_path_factory.mktemp("checked") / "root")


def test_planted_counts(checked: CheckedRoot, capsys: pytest.CaptureFixture[str]) -> None:
    result = audit(checked.root, capsys)
    assert result["warnings"] == []
    checks = result["checks"]
    assert (checks["shards"], checks["of"]) == (2, 2)
    first, second = checks["groups"]
    assert (first["group"], second["group"]) == (A, B)
    numbers = ("samples", "tries", "kept", "failed_tries", "kept_though_failed", "rejected", "first_failed")
    assert [first[name] for name in numbers] == [40, 65, 30, 35, 5, 10, 25]
    assert [second[name] for name in numbers] == [40, 40, 40, 0, 0, 0, 0]
    assert [checks["all"][name] for name in numbers] == [80, 105, 70, 35, 5, 10, 25]
    assert [row["original"] for row in (first, second, checks["all"])] == [10, 0, 10]
    for row in (first, second, checks["all"]):
        assert row["tries"] == row["kept"] + row["failed_tries"]
    assert (first["by_check"]["face"]["count"], first["by_check"]["face"]["of"]) == (40, 65)
    assert (first["kept_pictures"]["face"]["count"], first["kept_pictures"]["face"]["of"]) == (5, 30)
    assert second["by_check"] == {} and second["kept_pictures"]["face"]["count"] == 0
    assert "group" not in second["kept_pictures"], "it had nothing to judge"


def test_groups_that_were_asked_for_and_seen(checked: CheckedRoot, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = audit(checked.root, capsys)["checks"]["groups"]
    assert first["seen"] == {A: 25, B: 5} and second["seen"] == {B: 32, A: 8}
    assert (first["asked"], first["seen_in_all"]) == (30, 33)
    assert (second["asked"], second["seen_in_all"]) == (40, 37)
    expected = stats.binomtest(32, 40).proportion_ci(method="wilson")
    assert (second["agreed"]["low"], second["agreed"]["high"]) == pytest.approx((expected.low, expected.high))


def test_what_each_group_lost(checked: CheckedRoot, capsys: pytest.CaptureFixture[str]) -> None:
    """Rejected samples are those without an image; the words name the group that lost significantly more."""
    result = audit(checked.root, capsys)
    first, second = result["groups"]
    assert (first["losses"]["check"]["lost"], first["losses"]["check"]["of"]) == (10, 40)
    assert first["losses"]["check"]["beyond_chance"] and second["losses"]["check"]["lost"] == 0
    assert first["losses"]["image"]["lost"] == 10 and first["generated"] == first["hybrid"] == 30
    expected = stats.binomtest(10, 40).proportion_ci(method="wilson")
    assert (first["losses"]["check"]["low"], first["losses"]["check"]["high"]) == pytest.approx(tuple(expected))
    lost = result["checks"]["groups"][0]["losses"]
    assert (lost["first_try"]["lost"], lost["first_try"]["of"], lost["first_try"]["others"]) == (25, 40, 0)
    assert (lost["kept_though_failed"]["lost"], lost["kept_though_failed"]["of"]) == (5, 30)
    lost = result["checks"]["groups"][1]["losses"]
    assert (lost["first_try"]["lost"], lost["first_try"]["of"], lost["first_try"]["others"]) == (0, 40, 25 / 40)
    assert lost["kept_though_failed"]["others"] == 5 / 30
    text = "\n".join(as_markdown(result))
    assert f"- **{A}**: 25.0% of its samples were rejected by a check, 0.0% of the others'" in text
    assert f"- **{A}**: 62.5% of its samples got a first picture that failed a check" in text
    assert "| asian female | 30 | 33 | 83.3% (66.4% to 92.7%) | white male 5 |" in text
    assert "| asian female | 65 | 61.5%" in text
    row = next(line for line in text.splitlines() if line.startswith("| white male | 40 | 0.0% (0.0% to"))
    judged = result["checks"]["all"]["kept_pictures"]
    assert row.count("0.0% (0.0% to") == len(judged), "also a check that failed nothing"


def test_scores_have_means_with_intervals(checked: CheckedRoot, capsys: pytest.CaptureFixture[str]) -> None:
    checks = audit(checked.root, capsys)["checks"]
    scores = [one.rounds[-1]["prompt"]["score"] for one in planted() if one.group == A and one.kept]
    found = checks["groups"][0]["scores"]["prompt.score"]
    assert found["count"] == len(scores) == 30
    assert found["mean"] == pytest.approx(np.mean(scores))
    low, high = stats.norm.interval(0.95, np.mean(scores), stats.sem(scores))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert sum(checks["prompt_scores"].values()) == 70 and checks["prompt_scores"]["0.1"] == 5
    assert set(checks["scores"]) == {"face.faces", "face.largest", "prompt.score", "group.probability"}


def test_the_worst_pictures_come_first(checked: CheckedRoot, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that failed most checks, and then those with the lowest prompt score."""
    worst = audit(checked.root, capsys)["checks"]["groups"][0]["worst"]
    assert len(worst) == WORST
    assert [one["passed"] for one in worst] == [False] * 5 + [True] * 7
    kept = [one for one in planted() if one.group == A and one.kept]
    passed = sorted((one for one in kept if not one.failing[-1]), key=lambda one: one.rounds[-1]["prompt"]["score"])
    assert [one["key"] for one in worst[5:]] == [one.key for one in passed[:7]]
    assert worst[0]["tries"] == 2 and worst[0]["checks"]["group"] == {"passed": False, "probability": 0.7, "seen": B}
    assert list(worst[0]["checks"]) == ["face", "prompt", "group"]


def test_the_worst_do_not_depend_on_the_order() -> None:
    """Also without a prompt score, by the probability of the group."""
    numbers = {f"{number:03d}": (number * 37 % 101) / 101 for number in range(101)}
    found = []
    for keys in (list(numbers), list(numbers)[::-1]):
        parts = CheckCounts(), CheckCounts()
        for key in keys:
            checks = {"group": {"passed": True, "probability": numbers[key]}}
            parts[int(key) % 2].add_picture("0", {"key": key, "check": "passed", "checks": checks}, A)
        parts[0].add(parts[1])
        found.append([one.key for one in parts[0].worst])
    assert found[0] == found[1] == sorted(numbers, key=lambda key: numbers[key])[:WORST]


def test_shards_that_were_not_checked_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = CheckedRoot(tmp_path)
    made.add("00000000", planted(8))
    made.add("00000001", [Made("c", A, [{}])], checked=False)
    made.add("00000002", [Made("d", A, [{}])], checked=False)
    result = audit(tmp_path, capsys)
    assert (result["checks"]["shards"], result["checks"]["of"]) == (1, 3)
    assert result["groups"][0]["losses"]["check"]["of"] == 8, "samples of shards that were checked"
    assert "Only 1 of 3 shards were checked." in "\n".join(as_markdown(result))
    for shard in ("00000000",):
        (receipt,) = (tmp_path / "edits" / "_receipts" / EDITS).glob(f"*/{shard}.json")
        told = json.loads(receipt.read_bytes())
        del told["notes"]["checks"]
        receipt.write_text(json.dumps(told))
    result = audit(tmp_path, capsys)
    assert result["checks"] is None and result["groups"][0]["losses"]["check"]["share"] is None
    assert "Not checked" in "\n".join(as_markdown(result))


def test_samples_without_a_group_have_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where no sample has one: stage 02 ran with --groups none."""
    CheckedRoot(tmp_path).add("00000000", [Made("a", "", [{"face": face(False)}, {"face": face()}])])
    result = audit(tmp_path, capsys)
    [row] = result["checks"]["groups"]
    assert (row["group"], row["tries"], row["first_failed"]) == ("(no group)", 2, 1)
    assert result["groups"] == [] and result["warnings"] == [] and row["agreed"]["share"] is None
    assert "| (no group) | 1 | 2 | 1 | 0 |" in "\n".join(as_markdown(result))


def test_models_and_thresholds_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As stage 03 recorded them; what else it recorded, and what makes no sense, is left out or is only text."""
    CheckedRoot(tmp_path).add("00000000", planted(8))
    record = {"face": {"model": "centerface", "min_face": 0.05}, HOSTILE: [HOSTILE]}
    options = {"model": "x", "checks": record, "tries": 4, "on_check_failure": "best"}
    told = {"epoch": 1, "stage": EDITS, "version": 1, "options": options, "shards": None, "run": "run-1"}
    (tmp_path / "edits" / "_receipts" / EDITS / "_epoch.1.json").write_text(json.dumps(told))
    result = audit(tmp_path, capsys)
    assert list(result["checks"]["options"]) == ["face", HOSTILE, "tries", "on_check_failure"]
    text = "\n".join(as_markdown(result))
    assert "face: model centerface, min\\_face 0.05; " in text and "; tries: 4; on\\_check\\_failure: best." in text
    assert "<img" not in text


def test_rejected_samples_that_stage_04_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it made of them, group by group; values that make no sense do not count."""
    CheckedRoot(tmp_path).add("00000000", planted(8))
    (receipt,) = (tmp_path / "hybrid" / "_receipts" / "04_reshard").glob("*/0*.json")
    told = json.loads(receipt.read_bytes())
    told["notes"]["check_rejected"] = {"dropped": {A: 2, B: "x"}, "original": [1]}
    receipt.write_text(json.dumps(told))
    result = audit(tmp_path, capsys)
    assert [(row["original"], row["dropped"]) for row in result["checks"]["groups"]] == [(0, 2), (0, 0)]
    assert "| asian female | 8 | 13 | 6 | 2 | 0 | 2 |" in "\n".join(as_markdown(result))


def test_sums_that_do_not_add_up_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CheckedRoot(tmp_path).add("00000000", planted(8))
    (receipt,) = (tmp_path / "edits" / "_receipts" / EDITS).glob("*/0*.json")
    told = json.loads(receipt.read_bytes())
    told["notes"]["checks"]["groups"][A]["tries"] += 1
    receipt.write_text(json.dumps(told))
    assert any("tries do not add up" in warning for warning in audit(tmp_path, capsys)["warnings"])


# ---- hostile and damaged records


def test_hostile_names_are_only_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = f"{HOSTILE} | `x` [a](javascript:1)"
    said = {"face": face(), "group": seen(evil, evil), evil: {"passed": False}}
    made = CheckedRoot(tmp_path)
    made.add("00000000", [Made(f"k{number}", evil, [said], prompt=f"{HOSTILE}\u202e\x1b[31m") for number in range(3)])
    result = audit(tmp_path, capsys, "--card", str(tmp_path / "card"))
    for text in ("\n".join(as_markdown(result)), (tmp_path / "card" / "README.md").read_text("utf-8")):
        assert "<img" not in text and "[a](" not in text and "\x1b" not in text
    assert "\x1b" not in result["checks"]["groups"][0]["worst"][0]["prompt"]


def test_half_a_surrogate_pair_is_no_reason_to_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON can hold one, UTF-8 cannot."""
    half = "\ud800x"
    said = {"face": face(), "group": seen(half, half), half: {"passed": False}}
    made = CheckedRoot(tmp_path)
    made.add("00000000", [Made("k", A, [said])])
    (lines,) = (tmp_path / "edits" / "_provenance" / EDITS).glob("*.jsonl")
    line = json.loads(lines.read_bytes())
    lines.write_text(json.dumps(line | {"key": half, "prompt": half, "group": half}))
    (receipt,) = (tmp_path / "edits" / "_receipts" / EDITS).glob("*/0*.json")
    told = json.loads(receipt.read_bytes())
    told["notes"]["checks"]["groups"][half] = {"tries": 1, "kept": 1, "by_check": {half: 1}}
    receipt.write_text(json.dumps(told))
    result = audit(tmp_path, capsys, "--card", str(tmp_path / "card"))
    [row] = [row for row in result["checks"]["groups"] if row["worst"]]
    assert row["group"] == row["worst"][0]["key"] == row["worst"][0]["prompt"] == "\ufffdx"


def test_the_croissant_file_has_the_figures(checked: CheckedRoot, tmp_path: Path) -> None:
    assert main(["audit", str(checked.root), "--card", str(tmp_path)]) == 0
    described = json.loads((tmp_path / "croissant.json").read_bytes())
    measured = {value["name"]: value for value in described["variableMeasured"]}
    lost = measured[f"{A}: samples that a check rejected"]
    assert lost["value"] == 0.25 and lost["minValue"] < 0.25 < lost["maxValue"]
    assert measured[f"{A}: tries that failed the check face"]["value"] == pytest.approx(40 / 65, abs=1e-6)
    assert measured[f"{B}: pictures in which the check sees the group"]["value"] == 0.8
    assert any(text.startswith(f"{A}: 25.0% of its samples were rejected") for text in described["rai:dataBiases"])


@pytest.mark.parametrize(
    "line",
    [
        {"check": "passed", "checks": 7},
        {"check": "passed", "checks": [1]},
        {"check": "passed"},
        {"check": "failed", "checks": {"face": "no", "prompt": {"score": "high", "passed": 1}}},
        {"check": "passed", "checks": {"prompt": {"score": True}, "group": {"seen": 5, "probability": [1]}}},
        {
            "check": "passed",
            "checks": {"prompt": {"score": 1e300}},
            "tries": -3,
            "round": "x",
            "prompt": 5,
            "key": None,
        },
    ],
)
def test_lines_that_make_no_sense(line: dict[str, Any]) -> None:
    counts = CheckCounts()
    assert counts.add_picture("0", line, A)
    assert not counts.scores and not counts.seen and not counts.bins and not counts.judged
    assert counts.worst[0].tries == 0


def test_what_data_may_bring_is_bounded() -> None:
    counts = CheckCounts()
    for number in range(3 * MAX_NAMES):
        checks = {f"{number}{'x' * 9000}": {"passed": False}, "group": {"seen": f"s{number}", "passed": True}}
        line = {"key": "k" * 5000, "prompt": "p" * 9000, "check": "failed", "checks": checks}
        counts.add_picture("0", line, A)
    assert len(counts.judged) <= MAX_NAMES + 1 and len(counts.seen) <= MAX_NAMES + 1
    assert counts.seen.total() == 3 * MAX_NAMES and len(counts.worst) == WORST
    assert max(map(len, counts.judged)) <= 80 and len(counts.worst[0].prompt) <= 400
    counts.add_noted({"tries": "many", "by_check": [1]})
    assert counts.sums["tries"] == 0


def test_moments_of_no_and_of_one_number() -> None:
    moments = Moments()
    assert moments.mean is None and moments.interval() is None
    moments.add(0.5)
    assert moments.mean == 0.5 and moments.interval() is None
    assert share_result(0, 0) == {"count": 0, "of": 0, "share": None, "low": None, "high": None}


def test_a_group_that_is_seen_late_among_many_others_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Groups with names that differ at their ends only, and more of them than names that one group may bring."""
    names = [f"{'x' * 150} {number}" for number in range(3 * MAX_NAMES)]
    shown = [*names[1:], *[names[0]] * 30]  # by the first group's pictures
    made = [Made(f"a{number}", names[0], [{"group": seen(name, names[0])}]) for number, name in enumerate(shown)]
    made += [Made(f"b{number}", name, [{"group": seen(name, name)}]) for number, name in enumerate(names[1:])]
    CheckedRoot(tmp_path).add("00000000", made)
    by_name = {row["group"]: row for row in audit(tmp_path, capsys)["checks"]["groups"]}
    first, last = by_name[names[0]], by_name[names[-1]]
    assert (first["agreed"]["count"], first["asked"], first["seen_in_all"]) == (30, len(shown), 30)
    assert first["seen"][names[0]] == 30 and sum(first["seen"].values()) == len(shown)
    assert (last["agreed"]["count"], last["asked"], last["seen_in_all"]) == (1, 1, 2)


def test_each_group_is_looked_at_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many others there are: 10,000 of them would take an hour."""
    looked: list[str] = []
    real = checks_of_audit._lost

    def counted(counts: CheckCounts, loss: str) -> tuple[int, int]:
        looked.append(loss)
        return real(counts, loss)

    monkeypatch.setattr(checks_of_audit, "_lost", counted)
    counts = {str(group): CheckCounts() for group in range(100)}
    for of_group in counts.values():
        of_group.sums.update(tries=1, kept=1)
    found = as_result(counts, {}, 1, 1, {})
    assert found is not None and len(found["groups"]) == 100
    assert len(looked) == 2 * len(checks_of_audit.LOSSES) * 100
