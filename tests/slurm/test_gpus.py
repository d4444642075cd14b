"""Stage 03 as tasks of a job: a GPU each."""

from __future__ import annotations

from tests.slurm.jobs import Jobs, published

SMALL = ("--embedded", "--height", "64", "--width", "64", "--steps", "1", "--batch_size", "2")


def test_four_tasks_have_four_devices_and_every_sample_is_made_once(ready_to_generate: Jobs) -> None:
    jobs = ready_to_generate
    before = set(published(jobs.root, "edits"))
    jobs.run("03_generate_images.sh", *SMALL, tasks=4, sbatch=("--gpus-per-task=1",))
    receipts = jobs.receipts("edits", "03_generate_images")
    assert len(receipts) == 12
    devices = {receipt["rank"]: receipt["gpu"] for receipt in receipts.values()}
    assert len(set(devices.values())) == len(devices) > 1, devices
    assert set(devices.values()) <= {"0", "1", "2", "3"}
    for receipt in receipts.values():
        assert receipt["generation"] == 1
        assert receipt["notes"]["generated"] == receipt["counts"]["kept"] > 0
        assert "recovered" not in receipt["notes"]
    made = set(published(jobs.root, "edits")) - before
    assert {name for name in made if name.endswith(".tar")} == {f"edits/{shard}.tar" for shard in receipts}
    assert not jobs.litter()
