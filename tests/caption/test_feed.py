"""Memory and batches of the images that are prepared ahead of a captioner: bounded in bytes, by the shard alone."""

from __future__ import annotations

import io
import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.backends.caption.base import padded_length
from curation.caption.captioner import Family
from curation.caption.feed import CaptionLoader, CaptionSample, ShapeGroups
from curation.replies import Verdict
from curation.tar.samples import USUAL, TarWriter
from curation.tar.scan import TarReport

IMAGES, BOUND = 240, 2_000_000


def test_no_more_bytes_wait_than_they_may_and_no_lighter_row_goes_first() -> None:
    rng = random.Random(5)
    groups: ShapeGroups[tuple[int, int, int]] = ShapeGroups(8, most_waiting=1000, most_bytes=1000)
    waiting: dict[int, int] = {}  # bytes by shape
    early = count = 0
    for number in range(2000):
        item = rng.randrange(40), rng.choice([1, 10, 90, 400]), number  # shape, bytes
        waiting[item[0]] = waiting.get(item[0], 0) + item[1]
        if batch := groups.add(item[:1], item, item[1]):
            count += len(batch)
            if len(batch) < 8:
                early += 1
                assert waiting[batch[0][0]] == max(waiting.values()), "the heaviest row makes room"
            assert waiting.pop(batch[0][0]) == sum(nbytes for _, nbytes, _ in batch)
        assert groups.bytes_waiting == sum(waiting.values()) <= 1000
    assert early > 100
    assert count + sum(map(len, groups.rest())) == 2000
    assert groups.bytes_waiting == 0


class Arrays:
    """Prepares an image as floats of its own size, and knows how many of their bytes are alive."""

    family = Family("arrays", 1, 1)
    name = revision = "arrays"
    device_kind = "cpu"

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self._lock = threading.Lock()

    def count(self, nbytes: int) -> None:
        with self._lock:
            self.alive += nbytes
            self.peak = max(self.peak, self.alive)

    def prepare(self, image: Any) -> Any:
        return Prepared(self, np.asarray(image, np.float32))

    def caption(self, batch: Any, seeds: Any) -> list[str]:
        return ["a"] * len(batch)

    def close(self) -> None: ...


class Prepared:
    def __init__(self, owner: Arrays, array: Any) -> None:
        self._owner, self._array = owner, array
        self.shape, self.nbytes = array.shape, array.nbytes
        owner.count(self.nbytes)

    def __del__(self) -> None:
        self._owner.count(-self.nbytes)


class Quiet:
    """A shard's work that nobody looks at."""

    sample_parts = USUAL

    def sample_in(self, count: int = 1) -> None: ...

    def keep(self, count: int = 1) -> None: ...

    def drop(self, key: str, reason: str) -> None: ...

    def fail(self, key: str, reason: str, detail: str = "") -> None:
        raise AssertionError(f"{key}: {reason} {detail}")

    def add_seconds(self, name: str, seconds: float) -> None: ...


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 120 shapes, 30 to 150 KB each as the captioner takes them."""
    path = tmp_path_factory.mktemp("feed") / "0.tar"
    rng = random.Random(1)
    sizes = [(rng.randrange(60, 120), rng.randrange(40, 110)) for _ in range(IMAGES // 2)]
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for number in range(IMAGES):
            buffer = io.BytesIO()
            Image.new("RGB", rng.choice(sizes), (number, 7, 7)).save(buffer, "png")
            writer.add(f"{number:04d}.png", buffer.getvalue())
        writer.close()
    return path


Plan = list[list[str]]


def gather(
    shard: Path, backend: Arrays, threads: int, restore: Callable[[CaptionSample], None] = lambda _: None, **bounds: Any
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """Keys of each batch, and the record of each sample.  A batch is released before the next is asked for."""
    loader = CaptionLoader(backend, threads, **bounds)
    plan, records = [], {}
    samples = loader.samples(shard, Quiet(), TarReport(), None, restore, 16)  # type: ignore[arg-type]
    for batch in loader.batches(samples, 16, []):
        plan.append([sample.key for sample in batch.samples])
        for sample in batch.samples:
            records[sample.key] = json.loads(sample.outcome(Verdict("a"), batch.mark))
            sample.release()
    loader.close()
    return plan, records


@pytest.mark.parametrize("gathers", ["tensors", "images"])
def test_many_shapes_stay_within_bounds_and_the_plan_is_the_shards(
    gathers: str, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever works on it, with as many threads as there are, and whatever an earlier attempt has done of it."""
    everything = Arrays()
    whole_plan = gather(shard, everything, 2, gather="images", most_held=1 << 30)[0]
    assert everything.peak > 5 * BOUND, "unbounded, nearly all of it waits"
    monkeypatch.setattr("curation.caption.feed.MAX_BYTES_AHEAD", BOUND // 2)
    bounds = {"gather": gathers, "most_bytes" if gathers == "tensors" else "most_held": BOUND}
    most = 2 * BOUND if gathers == "tensors" else 3 * BOUND  # a whole batch is prepared beside what waits
    backend = Arrays()
    plan, records = gather(shard, backend, 2, **bounds)
    assert backend.peak < most, "what waits, and what is prepared meanwhile"
    assert backend.alive == 0
    assert sorted(key for batch in plan for key in batch) == [f"{number:04d}" for number in range(IMAGES)]
    if gathers == "tensors":
        assert any(1 < len(batch) < 16 for batch in plan)
    else:
        assert plan == whole_plan, "memory decides no batch"
        assert gather(shard, Arrays(), 2, gather="images", most_held=0)[0] == plan
    for threads in (1, 5):
        assert gather(shard, Arrays(), threads, **bounds)[0] == plan
    done = {key for batch in plan[: len(plan) // 2] for key in batch}

    def restore(sample: CaptionSample) -> None:
        if sample.key in done:
            sample.record = records[sample.key]

    again = Arrays()
    assert gather(shard, again, 2, restore, **bounds)[0] == plan
    assert again.peak < most


def test_no_batch_takes_more_bytes_than_it_may() -> None:
    groups: ShapeGroups[int] = ShapeGroups(8, most_together=1000)
    batches = [batch for number in range(30) if (batch := groups.add((1,), number, 0, 300))]
    assert batches == [[first, first + 1, first + 2] for first in range(0, 30, 3)]


def sizes_of_the_web(count: int) -> Iterator[tuple[int, int]]:
    """Widths and heights around 1.2 megapixels."""
    rng = random.Random(1)
    for _ in range(count):
        ratio, area = math.exp(rng.gauss(0.15, 0.35)), math.exp(rng.gauss(math.log(1.2e6), 0.8))
        width = math.sqrt(min(max(area, 3e4), 2e7) * ratio)
        yield max(30, int(width)), max(30, int(width / ratio))


def test_batches_of_a_model_with_many_shapes_are_full() -> None:
    """Qwen-VL takes up to a megapixel in the image's own proportions, 14 pixels a patch and 4 patches a token."""

    def mean_batch(gathers: Any, batch: int) -> float:
        loader = CaptionLoader(Arrays(), 1, gather=gathers)  # type: ignore[arg-type]
        groups, batches = loader.groups(batch), []
        for number, (width, height) in enumerate(sizes_of_the_web(10_000)):
            scale = min(1.0, math.sqrt((1 << 20) / (width * height)))
            patches = round(width * scale / 28) * round(height * scale / 28) * 4
            jpeg, tensors = int(width * height * 0.12), patches * 1176 * 2
            shape = (padded_length(patches // 4 + 75, gathers),)
            waits = jpeg if gathers == "images" else jpeg + tensors
            batches.append(groups.add(shape, number, waits, tensors))  # type: ignore[arg-type]
        loader.close()
        found = [len(batch) for batch in (*batches, *groups.rest()) if batch]
        assert sum(found) == 10_000
        return sum(found) / len(found)

    assert mean_batch("tensors", 48) < 15
    assert mean_batch("images", 48) > 44
    assert mean_batch("images", 256) > 100, "two GiB of tensors a batch"


def test_a_step_of_length_grows_with_the_length() -> None:
    for gathers, expected in (("tensors", [64, 64, 128, 1088, 4032]), ("images", [64, 64, 128, 1152, 4096])):
        assert [padded_length(n, gathers) for n in (1, 64, 65, 1025, 3970)] == expected  # type: ignore[arg-type]
