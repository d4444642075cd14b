"""Stage 03 as tasks of a job: a GPU each."""

from __future__ import annotations

from tests.slurm.jobs import Jobs, published

# slow enough that all four have a part
SMALL = ("--embedded", "--height", "64", "--width", "64", "--steps", "40", "--batch_size", "2")


def test_four_tasks_have_four_devices_and_every_sample_is_made_once(ready_to_generate: Jobs) -> None:
    jobs = ready_to_generate
    before = set(published(jobs.root, "edits"))
    slow = [word if word != "40" else "150" for word in SMALL]  # else the tasks that start first do the work of all
    jobs.run("03_generate_images.sh", *slow, tasks=4, sbatch=("--gpus-per-task=1",))
    receipts = jobs.receipts("edits", "03_generate_images")
    assert len(receipts) == 12
    devices = {receipt["rank"]: receipt["gpu"] for receipt in receipts.values()}
    assert sorted(devices.values()) == ["0", "1", "2", "3"], devices
    for receipt in receipts.values():
        assert receipt["generation"] == 1
        assert receipt["notes"]["generated"] == receipt["counts"]["kept"] == receipt["counts"]["in"]
        assert "recovered" not in receipt["notes"]
    generated = {shard: receipt["notes"]["generated"] for shard, receipt in receipts.items()}
    assert sum(generated.values()) >= 8
    made = set(published(jobs.root, "edits")) - before
    with_edits = {f"edits/{shard}.tar" for shard, count in generated.items() if count}
    assert {name for name in made if name.endswith(".tar")} == with_edits
    assert not jobs.litter()
