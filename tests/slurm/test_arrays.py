"""Stages as job arrays over several nodes, and as tasks with a GPU each."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.jobs import Jobs, published

NODES = {"node1", "node2", "node3"}
# Nobody begins before there are elements on all three nodes; each says on which node it is.
TOGETHER = """#!/bin/bash
hostname >"$TOGETHER/$SLURM_JOB_NAME.$SLURM_ARRAY_TASK_ID"
while [ "$(sort -u "$TOGETHER/$SLURM_JOB_NAME".* | wc -l)" -lt 3 ]; do sleep 0.05; done
exec "$@"
"""


def test_an_array_over_three_nodes_does_every_shard_once(jobs: Jobs, tmp_path: Path, llm_port: int) -> None:
    array = {"sbatch": ("--array=0-7",)}
    wrap, places = tmp_path / "wrap.sh", tmp_path / "places"
    wrap.write_text(TOGETHER)
    places.mkdir()
    together = {"CURATION_WRAP": f"bash {wrap}", "TOGETHER": str(places)}
    recorded, asks = ["--detector", "recorded"], {"PORTS": str(llm_port)}
    alone = tmp_path / "alone"
    for script, flags, variables in (
        ("01_filter_noface.sh", recorded, {}),
        ("02_captions_processor.sh", ["--api", "ollama"], asks),
        ("04_reshard.sh", ["--index"], {"EDITS_DIR": "none", "PROMPTS_DIR": "none"}),
    ):
        jobs.run(script, *flags, **array, variables={**variables, **together})
        jobs.alone(alone, script, *flags, variables=variables)
    for folder, stage in (
        ("captions", "01_filter_noface"), ("prompts", "02_captions_processor"), ("shards", "04_reshard"),
    ):  # fmt: skip
        receipts = jobs.receipts(folder, stage)
        assert len(receipts) == 40
        assert {receipt["generation"] for receipt in receipts.values()} == {1}, "each was committed once"
        assert {receipt["host"] for receipt in receipts.values()} <= NODES
        assert {path.read_text().strip() for path in places.glob(f"{stage}*")} == NODES
        elements = {receipt["slurm"]["array_task_id"] for receipt in receipts.values()}
        assert len(elements) > 1, "the elements share the shards"
    assert published(jobs.root, "captions", "edits", "prompts", "shards") == published(
        alone, "captions", "edits", "prompts", "shards"
    )
    assert not jobs.litter()
