"""Stage 03 with the real checks on planted pictures: what shows the wrong group or another prompt is made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from curation.images import Pixels
from tests.backends.planted import GROUPS, Planted, make_planted, prompt_of
from tests.stages.harness import read_jsonl
from tests.stages.test_stage_03_checks import Plan, curation_of, receipt
from tests.stages.test_stage_03_checks import Planted as PlantedPictures
from tests.stages.test_stage_03_generate_images import NAME, SHARD, make_input, run

# Sample → what its pictures show, round by round.  The groups of the samples are the first six.
SHOWN = {
    0: [GROUPS[0]],
    1: [GROUPS[4], GROUPS[1]],
    2: [GROUPS[3], GROUPS[10], GROUPS[2]],
    3: [GROUPS[3]],
    4: [GROUPS[5], GROUPS[5], GROUPS[5]],
    5: [GROUPS[4], GROUPS[5]],
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    torch.set_num_threads(1)
    return make_planted(tmp_path_factory.mktemp("planted") / "clip", side=256)


def test_wrong_groups_and_prompts_are_made_again(planted: Planted, tmp_path: Path) -> None:
    root = make_input(tmp_path / "data", len(SHOWN))
    prompts = root / f"prompts/{SHARD}.json"
    names = list(json.loads(prompts.read_bytes()))
    prompts.write_text(json.dumps({name: prompt_of(GROUPS[i]) for i, name in enumerate(names)}))
    told = root / f"prompts/_provenance/02_captions_processor/{SHARD}.jsonl"
    told.parent.mkdir(parents=True)
    lines = [json.dumps({"key": name.removesuffix(".json"), "group": GROUPS[i]}) for i, name in enumerate(names)]
    told.write_text("\n".join(lines) + "\n")

    class Pictures(PlantedPictures):
        def image(self, index: int) -> Pixels:
            number, round_number = self._levels[index]
            return planted.made[SHOWN[number][round_number]]

    model = f"clip:{planted.folder}"
    flags = ["--check", "prompt,group,safety", "--prompt_model", model, "--min_prompt_score", "0.5", "--tries", "3"]
    flags += ["--group_model", model, "--groups", "default", "--width", "256", "--height", "256"]
    with Plan({}).applied(picture=Pictures, with_real_checks=True):
        assert run(root, *flags) == 0
    said = curation_of(root)
    assert [(one["check"], one["round"], one["tries"]) for one in said] == [
        ("passed", 0, 1), ("passed", 1, 2), ("passed", 2, 3), ("passed", 0, 1), ("failed", 0, 3), ("passed", 1, 2)
    ]  # fmt: skip
    for number, one in enumerate(said):
        kept = SHOWN[number][one["round"]]
        assert one["checks"]["group"]["seen"] == kept
        assert one["checks"]["group"]["passed"] == (kept == GROUPS[number]) == one["checks"]["prompt"]["passed"]
        assert one["checks"]["safety"]["passed"] and 0 <= one["checks"]["safety"]["nsfw"] < 0.5
    lines_of_tries = {line["key"]: line["failed_tries"] for line in read_jsonl(
        root / f"edits/_provenance/{NAME}/{SHARD}.jsonl") if "failed_tries" in line}  # fmt: skip
    seen = [one["checks"]["group"]["seen"] for one in lines_of_tries[names[2].removesuffix(".json")]]
    assert seen == SHOWN[2][:2]
    counts = receipt(root)["notes"]["checks"]
    assert (counts["tries"], counts["kept"], counts["failed_tries"]) == (12, 6, 6)
    assert counts["by_check"] == {"prompt": 7, "group": 7}
    assert counts["groups"][GROUPS[4]]["kept_though_failed"] == 1
    assert str(planted.folder) not in json.dumps(said), "no path of this machine"
