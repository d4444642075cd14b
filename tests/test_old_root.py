"""A root that an earlier version left half done goes on: what is done stays, and the rest is done."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT, processes
from tests.data.record_old_root import FLAGS, command, set_times
from tests.data.record_old_root import ROOT as RECORDED
from tests.servers import ollama_stub
from tests.shards import contents
from tests.stages.harness import hashes, read_json, read_jsonl

OUTPUTS = {"01_filter_noface": "captions", "02_captions_processor": "prompts", "03_generate_images": "edits"}
SHARDS = ["00000000", "00000001", "00000002"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The recorded root, with the times of its files, which git does not keep."""
    root = tmp_path / "root"
    shutil.copytree(RECORDED, root)
    set_times(root)
    return root


def receipts(root: Path, stage: str) -> dict[str, dict[str, object]]:
    folder = root / OUTPUTS.get(stage, "hybrid") / "_receipts" / stage
    return {path.stem: read_json(path) for path in sorted(folder.glob("*/*.json"))}


def run(root: Path, stage: str, port: int, *more: str) -> tuple[int, str]:
    with processes.started(command(ROOT, stage, port, *more), cwd=root, stderr=subprocess.PIPE) as process:
        _, log = process.communicate(timeout=processes.PATIENCE_S)
    return process.returncode, log


def test_a_root_of_an_earlier_version_goes_on(root: Path, tmp_path: Path) -> None:
    before = hashes(root, {"_claims", "_plan", "_partial"})
    with ollama_stub(slots=4, log=tmp_path / "requests.jsonl", system="You are a helpful assistant.") as port:
        for script in FLAGS:
            stage = script.removesuffix("_multigpu")
            done = receipts(root, stage)
            assert done, "the recorded root is half done"
            code, log = run(root, script, port)
            assert code == 0, log
            now = receipts(root, stage)
            assert list(now) == SHARDS
            assert all(receipt["status"] == "done" for receipt in now.values())
            assert {shard: now[shard] for shard in done} == done, "done shards are not done again"
            again, log = run(root, script, port)
            assert again == 0
            assert f"{stage}: of 3 shards 3 were done before" in log
            assert receipts(root, stage) == now
    after = hashes(root, {"_claims", "_plan", "_partial"})
    assert {path: after.get(path) for path in before} == before, "published files and records stay byte for byte"
    assert not list(root.rglob("_partial/*/*/*")), "the checkpoint was taken up"
    assert receipts(root, "02_captions_processor")["00000001"]["notes"]["recovered"] == 1  # type: ignore[index]
    asked = [json.loads(line["body"])["messages"][-1]["content"] for line in read_jsonl(tmp_path / "requests.jsonl")]
    assert not any("football" in question for question in asked), "a recorded reply is not asked for again"
    roles = {
        m["role"] for line in read_jsonl(tmp_path / "requests.jsonl") for m in json.loads(line["body"])["messages"]
    }
    assert roles == {"user"}, "it sent no system prompt to servers of Ollama's API, and goes on without"
    assert [len(contents(root / "hybrid" / f"{shard}.tar")) for shard in SHARDS] == [9, 9, 9]


@pytest.mark.parametrize("script", FLAGS)
def test_other_options_than_those_of_the_earlier_version_are_refused(script: str, root: Path) -> None:
    flags = {"01": ["--min_faces", "2"], "02": ["--seed", "1"], "03": ["--seed", "1"], "04": ["--on_missing", "drop"]}
    code, log = run(root, script, 1, *flags[script[:2]])
    assert code == 2
    assert "with other options" in log
