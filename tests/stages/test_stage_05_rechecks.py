"""Stage 05 with --rerun that changes only checks: captions that are there are judged, and the failing ones made again.

The stub's captions of a third of the images repeat themselves once, and those of another third always.  With batches of
one image a caption depends on the image alone, so that folders can be compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.caption import checks, earlier
from curation.captioned.rows import RowFile
from curation.errors import DeviceError
from curation.jsonio import MAX_DEPTH, MAX_SAMPLE_JSON_BYTES, dump_json
from tests.shards import noise, tar_of
from tests.stages import test_stage_05_recaption as plain
from tests.stages.harness import Records, hashes, read_jsonl
from tests.stages.recaption_stub import Backend
from tests.stages.test_stage_05_checks import NAME, SHARD

STRICT, LOOSE, OFF = ["--check", "repeats"], ["--check", "repeats", "--max_repeats", 0.5], list[object]()
ALL_PARTS = ["--format", "jsonl,parquet,tar", "--batch_size", 1, "--max_images", 8]
records = Records(NAME)

pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture(autouse=True)
def repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURATION_STUB_REPEATS", "0,1,9")


def caption(out: Path, *flags: object) -> int:
    """Run the stage; returns how many captions the model has made."""
    before = Backend.works
    assert plain.run(SHARD, out, *ALL_PARTS, *flags) == 0
    return before - Backend.works


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in read_jsonl(out / "rows" / f"{SHARD.stem}.jsonl")}


def note(out: Path) -> dict[str, Any]:
    """What the receipt says of checks; tries = kept + failed."""
    receipt = records.receipt(out, SHARD.stem)
    told: dict[str, Any] = receipt["notes"]["checks"]
    assert told["tries"] == told["kept"] + told["failed_tries"]
    assert told["rejected"] == sum(receipt["counts"]["dropped"].values()) or "recipes" in receipt["notes"]
    return told


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders that were made without checks, with loose ones, and with strict ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURATION_STUB_REPEATS", "0,1,9")
        folders = {name: tmp_path_factory.mktemp(name) for name in ("off", "loose", "strict")}
        for name, flags in (("off", OFF), ("loose", LOOSE), ("strict", STRICT)):
            caption(folders[name], *flags)
        yield folders


def test_checks_that_are_turned_on_ask_again_for_what_fails_and_nothing_else(
    fresh: dict[str, Path], tmp_path: Path
) -> None:
    assert caption(tmp_path, *OFF) == 8
    told = note(fresh["strict"])
    first = {key: row["caption"] for key, row in rows(tmp_path).items()}
    failing = [key for key, text in first.items() if text.startswith("a red car")]
    assert 3 <= len(failing) < 8 and 1 <= told["rejected"] < len(failing)
    made = caption(tmp_path, *STRICT, "--rerun")
    assert made == told["tries"] - 8, "the caption that is there counts as the first"
    assert hashes(tmp_path) == hashes(fresh["strict"]) and note(tmp_path) == told
    assert {key: row["caption"] for key, row in rows(tmp_path).items() if key not in failing} == {
        key: text for key, text in first.items() if key not in failing
    }
    notes = records.receipt(tmp_path, SHARD.stem)["notes"]
    assert notes["reused"] == 8 - len(failing)
    assert caption(tmp_path, *STRICT, "--rerun") == 3 * told["rejected"], "what is not there is asked for again"
    assert hashes(tmp_path) == hashes(fresh["strict"]) and note(tmp_path) == told


def test_a_higher_bar_judges_what_is_there(fresh: dict[str, Path], tmp_path: Path) -> None:
    assert caption(tmp_path, *LOOSE) == 8 and hashes(tmp_path) == hashes(fresh["loose"])
    assert caption(tmp_path, *STRICT, "--rerun") == note(fresh["strict"])["tries"] - 8
    assert hashes(tmp_path) == hashes(fresh["strict"]) and note(tmp_path) == note(fresh["strict"])


def test_a_lower_bar_keeps_what_is_there_and_asks_for_what_was_rejected(fresh: dict[str, Path], tmp_path: Path) -> None:
    caption(tmp_path, *STRICT)
    before, rejected = rows(tmp_path), note(tmp_path)["rejected"]
    assert caption(tmp_path, *LOOSE, "--rerun") == rejected, "each passes with its first caption now"
    after = rows(tmp_path)
    assert {key: dump_json(row) for key, row in after.items() if key in before} == {
        key: dump_json(row) for key, row in before.items()
    }
    new = {key: row["caption"] for key, row in after.items() if key not in before}
    assert len(new) == rejected and new == {key: rows(fresh["loose"])[key]["caption"] for key in new}
    told = note(tmp_path)
    assert (
        told["rejected"] == 0
        and told["kept"] == 8
        and told["failed_tries"] == sum(row["tried"]["failed_captions"] for row in after.values())
    )


def test_checks_that_are_turned_off_leave_what_a_run_without_checks_makes(
    fresh: dict[str, Path], tmp_path: Path
) -> None:
    caption(tmp_path, *STRICT)
    told = note(tmp_path)
    mended = sum(row["tried"]["round"] > 0 for row in rows(tmp_path).values())
    assert mended and caption(tmp_path, *OFF, "--rerun") == mended + told["rejected"]
    assert hashes(tmp_path) == hashes(fresh["off"])
    assert "checks" not in (notes := records.receipt(tmp_path, SHARD.stem)["notes"]) and "checked_by" not in notes


def test_more_tries_ask_for_what_was_rejected_alone(tmp_path: Path) -> None:
    caption(tmp_path, *STRICT)
    before, rejected = rows(tmp_path), note(tmp_path)["rejected"]
    assert caption(tmp_path, *STRICT, "--tries", 4, "--rerun") == 4 * rejected
    assert rows(tmp_path) == before


def test_a_caption_that_failed_is_not_tried_beyond_the_tries(fresh: dict[str, Path], tmp_path: Path) -> None:
    caption(tmp_path, *OFF)
    assert caption(tmp_path, *STRICT, "--tries", 1, "--rerun") == 0, "each has had its only try"
    told = note(tmp_path)
    assert told["tries"] == 8 and told["kept"] == len(rows(tmp_path)) and told["failed_tries"] == told["rejected"] > 0
    lines = records.reject_lines(tmp_path, SHARD.stem)
    assert {(line["reason"], line["tries"]) for line in lines} == {("check_repeats", 1)}
    off = rows(fresh["off"])
    assert [line["caption"] for line in lines] == [off[line["key"]]["caption"] for line in lines]


def test_each_of_several_captions_is_judged_by_itself(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("short: What is it?\nlong: Of {key} tell all.\n")
    flags = ["--prompt_file", prompts]
    made, out = tmp_path / "fresh", tmp_path / "out"
    caption(made, *flags, *STRICT)
    assert caption(out, *flags, *OFF) == 16
    assert caption(out, *flags, *STRICT, "--rerun") == note(made)["tries"] - 16
    assert hashes(out) == hashes(made) and note(out) == note(made) and note(out)["rejected"] > 0
    row = next(row for row in rows(out).values() if any(one["round"] for one in row["captions_tried"].values()))
    assert [*row["captions_tried"]] == [name for name, text in row["captions"].items() if text]
    caption(out, *flags, *OFF, "--rerun")
    caption(off := tmp_path / "off", *flags, *OFF)
    assert hashes(out) == hashes(off)


@pytest.mark.parametrize("calls", [0, 3])
def test_a_rerun_that_was_cut_off_judges_and_makes_nothing_twice(
    fresh: dict[str, Path], calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """calls: captions that are made before the device fails; 0: it fails while captions are judged."""
    monkeypatch.setattr(earlier, "_JUDGED_AT_ONCE", 2)
    caption(tmp_path, *OFF)
    judged: list[str] = []
    judge = checks.CaptionChecks.judge

    def counted(self: Any, seen: Any, captions: Any) -> Any:
        if not calls and len(judged) >= 4:
            raise DeviceError("the device has failed")
        judged.extend(captions)
        return judge(self, seen, captions)

    with monkeypatch.context() as patch:
        patch.setattr(checks.CaptionChecks, "judge", counted)
        if calls:
            patch.setattr(Backend, "works", calls)
        assert plain.run(SHARD, tmp_path, *ALL_PARTS, *STRICT, "--rerun") == 69
    before = len(judged)
    monkeypatch.setattr(checks.CaptionChecks, "judge", lambda *given: judged.extend(given[2]) or judge(*given))
    made, all_made = caption(tmp_path, *STRICT), note(fresh["strict"])["tries"] - 8
    assert (all_made - calls <= made < all_made) if calls else made == all_made
    assert hashes(tmp_path) == hashes(fresh["strict"]) and note(tmp_path) == note(fresh["strict"])
    if not calls:
        assert before == 4 and len(judged) == note(tmp_path)["tries"], "each once"


def test_a_key_with_half_a_character_does_not_have_its_shard_captioned_again(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(tar_of([("a\udcff.jpg", noise(0)), ("b.jpg", noise(1))]))
    assert plain.run(shard, tmp_path / "out", "--batch_size", 1) == 0
    before = Backend.works
    assert plain.run(shard, tmp_path / "out", "--batch_size", 1, "--format", "jsonl,parquet", "--rerun") == 0
    assert Backend.works == before and "\udcff" in read_jsonl(tmp_path / "out" / "captions.jsonl")[0]["key"]


def test_a_row_holds_whatever_json_a_sample_may_have(tmp_path: Path) -> None:
    """The largest and the deepest that is read; with half a character in its key, each other one is escaped."""
    deep: object = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    large = dump_json({"title": "é" * (MAX_SAMPLE_JSON_BYTES // 2 - 9)})
    shard = tmp_path / "0.tar"
    members = [("a.jpg", noise(0)), ("a.json", dump_json({"deep": deep}))]
    shard.write_bytes(tar_of([*members, ("b\udcff.jpg", noise(1)), ("b\udcff.json", large)]))
    assert plain.run(shard, tmp_path / "out") == 0
    assert [line["key"] for line in read_jsonl(tmp_path / "out" / "captions.jsonl")] == ["a", "b\udcff"]
    rows = RowFile(tmp_path / "out" / "rows" / "0.jsonl", ["synthetic"])
    assert rows.count == 2 and rows.find("b\udcff", {}) is not None
    rows.close()
