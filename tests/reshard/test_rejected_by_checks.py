"""Stage 04 knows the samples whose picture a check of stage 03 rejected: they stay photos or go, and are counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.__main__ import main
from curation.images import encode_jpeg
from curation.reshard.select import read_rejected, read_rejected_by_checks
from tests.shards import raw_members, write_shard
from tests.stages.test_stage_03_checks import Plan, passing, run_planted
from tests.stages.test_stage_03_generate_images import SHARD, make_input
from tests.stages.test_stage_04_regroup import Regroup

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("stage_in_process")
STAGE = "03_generate_images"
GROUPS = ("asian female", "black male")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Regroup:
    """A shard of ten samples: stage 03 made four pictures, and rejected six, of which one has no group."""
    root = make_input(tmp_path)
    metadata = json.loads((root / f"edits/{SHARD}.json").read_bytes())
    keys = [name[:-5] for name in metadata]
    provenance = root / "prompts/_provenance/02_captions_processor"
    provenance.mkdir(parents=True)
    lines = [{"key": key, "group": GROUPS[n % 2], "model": "m"} for n, key in enumerate(keys)]
    del lines[9]["group"]
    (provenance / f"{SHARD}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    jpg = encode_jpeg(np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8), 90)
    samples = {}
    for key in keys:
        told = metadata[f"{key}.json"]
        samples[key] = {"jpg": jpg, "json": json.dumps(told).encode(), "txt": told["caption"].encode()}
    write_shard(root / f"shards/{SHARD}.tar", samples | {"other": {"jpg": jpg, "txt": b"without a face"}})
    plan = Plan({"face": passing(dict.fromkeys(range(4), 0))})
    assert run_planted(root, plan, "--on_check_failure", "reject", "--tries", "2", "--max_error_rate", "0") == 0
    run = Regroup(tmp_path, capsys)
    run.first_shard = SHARD
    return run


def counts_of(run: Regroup) -> tuple[dict[str, Any], dict[str, Any]]:
    receipt = run.receipt()
    return receipt["counts"], receipt["notes"]


def verified(run: Regroup) -> str:
    run.capsys.readouterr()
    code = main(["verify", f"{run.root}/shards", f"{run.root}/hybrid", "--quiet", "--workers", "1"])
    out = run.capsys.readouterr().out
    assert code == 0, out
    return str(out)


def test_they_stay_the_photos_that_they_were(run: Regroup) -> None:
    source = raw_members((run.root / f"shards/{SHARD}.tar").read_bytes())
    for flags in ([], ["--on_missing", "drop", "--rerun"]):  # it is known why there is no edit: none is missing
        assert run("--verify", *flags) == 0, run.log
        counts, notes = counts_of(run)
        assert counts == {"in": 11, "kept": 11, "dropped": {}, "failed": {}}
        assert (notes["edited"], notes["missing_edits"]) == (4, 0)
        assert notes["check_rejected"] == {"original": {"": 1, "asian female": 3, "black male": 2}}
        same = [new == old for old, new in zip(source, raw_members(run.result(SHARD)), strict=True)]
        assert Counter(same)[False] == 3 * 4
        assert "4 replaced, 7 copied" in run.log and "have a prompt and no edit" not in run.log
        assert (
            "6 whose picture a check rejected stay the original photo (asian female: 3, black male: 2, no group: 1)"
            in run.log
        )
        verified(run)
    names = [one["path"] for one in run.receipt()["inputs"]]
    assert names[-1] == f"{SHARD}.jsonl", "what was rejected decides what --on_missing drop drops"


def test_they_are_left_out_on_demand(run: Regroup) -> None:
    assert run("--drop_rejected", "--verify") == 0, run.log
    counts, notes = counts_of(run)
    assert counts == {"in": 11, "kept": 5, "dropped": {"rejected_by_check": 6}, "failed": {}}
    assert notes["missing_edits"] == 0
    assert notes["check_rejected"] == {"dropped": {"": 1, "asian female": 3, "black male": 2}}
    assert "6 whose picture a check rejected are left out (asian female: 3, black male: 2, no group: 1)" in run.log
    assert len(run.keys()[SHARD]) == 5
    verified(run)


def test_regrouped_shards_count_them_once(run: Regroup) -> None:
    assert run("--shard_size", "4") == 0, run.log
    receipt = run.index_receipt(SHARD)
    assert receipt["notes"]["check_rejected"] == {"original": {"": 1, "asian female": 3, "black male": 2}}  # type: ignore[index]
    assert run.log.count("6 whose picture a check rejected stay the original photo") == 1
    assert run("--shard_size", "4", "--drop_rejected", "--rerun", "--overwrite") == 0, run.log
    assert sum(map(len, run.keys().values())) == 5


def test_what_the_rejects_say_is_bounded(tmp_path: Path) -> None:
    place = tmp_path / "_rejects" / STAGE
    place.mkdir(parents=True)
    lines = [
        {"key": "a", "reason": "check_face", "group": "x\n\u202e" + "y" * 5000},
        {"key": "b", "reason": "check_face", "group": 7},
        {"key": "c", "reason": "bad_metadata", "detail": "of check_face"},
        {"key": "a", "reason": "check_group", "group": "the second line of a key"},
    ]
    (place / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_rejected_by_checks(tmp_path, STAGE, "0")
    assert found.keys() == {"a", "b"}
    assert found["a"].group == "x" + " " + "y" * 98 and found["b"].group == ""
    every = read_rejected([(tmp_path, STAGE)], "0")
    assert {key: one.by_check for key, one in every.items()} == {"a": True, "b": True, "c": False}
