"""Picture sizes and the batch plan."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.generate.batches import MIN_AREA, Job, bucket_sizes, nearest_size, plan_batches, seed_of


def job(number: int, size: tuple[int, int] = (64, 64)) -> Job:
    return Job(f"key{number}", "a prompt", *size, f"{number:016x}")


def test_sizes_at_the_published_area() -> None:
    assert bucket_sizes(384, 384, 16) == [
        (272, 528), (288, 512), (304, 464), (336, 432), (384, 384), (432, 336), (464, 304), (512, 288), (528, 272),
    ]  # fmt: skip


@given(
    side=st.integers(4, 128),
    other=st.integers(4, 128),
    multiple=st.sampled_from([8, 16, 32, 64]),
)
def test_sizes_keep_within_the_area_and_the_multiple(side: int, other: int, multiple: int) -> None:
    sizes = bucket_sizes(side * multiple, other * multiple, multiple)
    budget = side * other * multiple**2
    assert 1 <= len(sizes) <= 9
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert MIN_AREA * budget <= width * height <= budget
        assert (height, width) in sizes
    assert sizes == sorted(set(sizes), key=lambda size: size[0] / size[1])


def test_an_area_smaller_than_one_multiple_has_one_size() -> None:
    assert bucket_sizes(16, 16, 32) == [(16, 16)]


@given(width=st.integers(1, 10_000), height=st.integers(1, 10_000))
def test_the_nearest_size_is_the_nearest_in_ratio(width: int, height: int) -> None:
    sizes = bucket_sizes(512, 512, 64)
    chosen = nearest_size(sizes, {"width": width, "height": height}, (1, 1))

    def error(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    assert error(chosen) == min(error(size) for size in sizes)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"width": 5}, {"width": None, "height": 5}, {"width": -1, "height": 5}, {"width": 1.5, "height": 5},
     {"width": True, "height": True}, {"width": 1 << 40, "height": 1}, {"width": "640", "height": "480"}],
)  # fmt: skip
def test_an_unknown_size_is_the_fixed_one(metadata: dict[str, object]) -> None:
    assert nearest_size([(64, 64)], metadata, (7, 9)) == (7, 9)


@given(
    sizes=st.lists(st.sampled_from([(64, 64), (48, 80), (80, 48)]), max_size=60),
    batch_size=st.integers(1, 9),
)
def test_a_plan_has_every_job_once_in_order_and_full_batches_of_one_size(
    sizes: list[tuple[int, int]], batch_size: int
) -> None:
    jobs = [job(number, size) for number, size in enumerate(sizes)]
    plan = plan_batches(jobs, batch_size)
    for size in set(sizes):
        mine = [batch for batch in plan if (batch.width, batch.height) == size]
        assert [each for batch in mine for each in batch.jobs] == [j for j in jobs if (j.width, j.height) == size]
        assert all(len(batch.jobs) == batch_size for batch in mine[:-1]) and 1 <= len(mine[-1].jobs) <= batch_size
    assert sum(len(batch.jobs) for batch in plan) == len(jobs)
    firsts = [jobs.index(batch.jobs[0]) for batch in plan]
    assert firsts == sorted(firsts)


def test_a_batchs_digest_covers_all_its_jobs_and_nothing_else() -> None:
    rng = random.Random(1)
    jobs = [job(number) for number in range(8)]
    plan = plan_batches(jobs, 4)
    assert plan == plan_batches(jobs, 4)
    assert len({batch.digest for batch in plan}) == 2
    for number in range(8):
        changed = [*jobs[:number], job(100 + rng.randrange(9)), *jobs[number + 1 :]]
        same = [a.digest == b.digest for a, b in zip(plan, plan_batches(changed, 4), strict=True)]
        assert same == [number >= 4, number < 4]


def test_a_round_has_its_own_digests_and_seeds_and_round_0_those_of_a_run_without_rounds() -> None:
    jobs = [job(number) for number in range(6)]
    plans = [plan_batches(jobs, 4, number) for number in range(3)]
    assert plans[0] == plan_batches(jobs, 4)
    assert [batch.jobs for batch in plans[1]] == [batch.jobs for batch in plans[0]]
    assert len({batch.digest for plan in plans for batch in plan}) == 6
    assert [batch.digest for batch in plans[0]] == ["d7ec0f2519a7827f", "af5645c54da0ed4d"]
    assert seed_of(5, "key") == seed_of(5, "key", 0) == 6261027139101277784
    assert len({seed_of(5, key, number) for key in ("key", "key1") for number in range(12)}) == 24
