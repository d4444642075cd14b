"""The feed of stage 06: real worker processes, real pictures, pictures that kill and hang them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.errors import InfrastructureError, ShardError
from curation.extract import feed as feed_module
from curation.extract import worker
from curation.extract.feed import CHUNK, MAX_SLOTS, WANTED, ExtractLoader, ExtractSample, _most_at_once, extract_sample
from curation.extract.plugins import Plugin
from curation.extract.worker import SlotLayout
from curation.images import decode_rgb
from curation.tar.samples import TarWriter, read_samples
from tests import ROOT
from tests.processes import wait_until
from tests.stages.test_stage_05_recaption import noise, plain

SHARD = ROOT / "examples/shards/00000004.tar"
PLUGIN = Plugin(str(ROOT / "tests/extract/stub.py"))
stub = PLUGIN.load()
PREPARATIONS = (stub.Crop(), stub.Words(), stub.Facts())


@pytest.fixture(scope="module", autouse=True)
def stub_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("stub") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURATION_STUB_LOG", str(path))
        yield path


@pytest.fixture
def feed(stub_log: Path) -> Iterator[ExtractLoader]:
    """A loader whose worker processes end with the test."""
    made = ExtractLoader(PREPARATIONS, 8, 2, PLUGIN)
    yield made
    made.close()


def samples_of(path: Path) -> Iterator[ExtractSample]:
    return map(extract_sample, read_samples(path, WANTED.__contains__))


def shard_of(path: Path, pictures: dict[str, bytes]) -> Path:
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for key, data in pictures.items():
            writer.add(f"{key}.png", data)
            writer.add(f"{key}.txt", f"caption {key}".encode())
        writer.close()
    return path


def collect(feed: ExtractLoader, source: Path, done: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """One entry per sample: its batch, what it prepared, what became of it."""
    found: list[dict[str, Any]] = []
    with feed.batches(samples_of(source), lambda number: number in done) as take:
        while (taken := take()) is not None:
            batch, seconds = taken
            assert seconds > 0 or batch.done
            for row, sample in enumerate(batch.samples):
                entry: dict[str, Any] = {"batch": batch.number, "key": sample.key, "outcome": sample.outcome}
                if not batch.done:
                    entry["crop"], entry["words"] = (np.array(feed.array(batch, n)[row]) for n in (0, 1))  # type: ignore[index]
                found.append(entry)
            feed.release(batch)
    return found


def test_samples_come_in_order_with_what_was_prepared_of_each(feed: ExtractLoader) -> None:
    found = collect(feed, SHARD)
    samples = list(read_samples(SHARD))
    assert [entry["key"] for entry in found] == [sample.key for sample in samples]
    assert [entry["batch"] for entry in found] == [number // 8 for number in range(len(samples))]
    for entry, sample in zip(found, samples, strict=True):
        pixels = decode_rgb(sample.members[str(sample.image_suffix)])
        assert (entry["crop"] == stub.Crop()(pixels)).all()
        assert (entry["words"] == stub.Words()(sample.members["txt"].decode())).all()
        assert entry["outcome"].size == (pixels.shape[1], pixels.shape[0])
        assert entry["outcome"].values[2]["stub-size"] == pixels.shape[1]
        assert entry["outcome"].values[2]["stub-url"]


def test_how_many_processes_changes_nothing_but_the_batch_size_cuts(stub_log: Path) -> None:
    results = []
    for processes, batch_size in ((1, 8), (3, 8), (2, 5)):
        feed = ExtractLoader(PREPARATIONS, batch_size, processes, PLUGIN)
        results.append([(e["key"], e["crop"].tobytes(), e["words"].tobytes()) for e in collect(feed, SHARD)])
        feed.close()
    assert results[0] == results[1] == results[2]


def test_batches_that_are_done_are_not_prepared_again(feed: ExtractLoader, stub_log: Path) -> None:
    stub_log.write_text("")
    found = collect(feed, SHARD, done=(0, 1))
    assert len(found) == 20
    assert stub_log.read_text().count("crop") == 4


def test_one_feed_serves_shard_after_shard(feed: ExtractLoader) -> None:
    first = collect(feed, SHARD)
    for _ in range(3):
        again = collect(feed, SHARD)
    assert [e["crop"].tobytes() for e in first] == [e["crop"].tobytes() for e in again]


def test_a_picture_that_kills_its_process_costs_that_sample_alone(feed: ExtractLoader, tmp_path: Path) -> None:
    pictures = {f"{i:02d}": noise(i) for i in range(20)} | {"07": plain(stub.CRASHES), "13": plain(stub.CRASHES)}
    source = shard_of(tmp_path / "0.tar", dict(sorted(pictures.items())))
    found = {entry["key"]: entry for entry in collect(feed, source)}
    for key, entry in found.items():
        if key in ("07", "13"):
            reason, detail = entry["outcome"].broken
            assert reason == "worker_died" and "SIGSEGV" in detail
            assert not entry["crop"].any() and not entry["words"].any()
        else:
            assert entry["outcome"].broken is None
            assert (entry["crop"] == stub.Crop()(decode_rgb(pictures[key]))).all()


def test_a_process_that_is_killed_by_something_else_costs_nothing(feed: ExtractLoader, tmp_path: Path) -> None:
    source = shard_of(tmp_path / "0.tar", {"a": noise(1), "b": plain(stub.DIES_ONCE), "c": noise(2)})
    found = collect(feed, source)
    assert [entry["outcome"].broken for entry in found] == [None] * 3
    assert (found[1]["crop"] == stub.DIES_ONCE).all()


def test_a_picture_on_which_its_process_hangs(
    feed: ExtractLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "REPLY_S", 1.0)
    source = shard_of(tmp_path / "0.tar", {"a": noise(1), "b": plain(stub.HANGS)})
    outcomes = [entry["outcome"] for entry in collect(feed, source)]
    assert outcomes[0].broken is None and outcomes[1].broken[0] == "decode_timeout"


def test_what_preparations_raise_is_the_samples_affair(feed: ExtractLoader, tmp_path: Path) -> None:
    source = shard_of(
        tmp_path / "0.tar", {"a": noise(1), "b": plain(stub.RAISES), "c": plain(stub.REFUSED), "d": b"no picture"}
    )
    found = {entry["key"]: entry["outcome"].unreadable for entry in collect(feed, source)}
    assert found["a"] is None and found["b"][0] == "preparation_failed" and "ZeroDivisionError" in found["b"][1]
    assert found["c"] == ("refused", "nine of each") and found["d"][0] == "undecodable"


def test_an_unreadable_picture_leaves_no_trace_of_an_earlier_batch(feed: ExtractLoader, tmp_path: Path) -> None:
    collect(feed, SHARD)
    source = shard_of(tmp_path / "0.tar", {f"{i}": b"no picture" for i in range(8)})
    for entry in collect(feed, source):
        assert not entry["crop"].any()
        assert entry["words"].any(), "its caption is prepared all the same"


def test_a_shard_that_breaks_off_gives_its_memory_back(feed: ExtractLoader, tmp_path: Path) -> None:
    def broken() -> Iterator[ExtractSample]:
        yield from list(samples_of(SHARD))[:19]
        raise ShardError("the disk is gone")

    for _ in range(2 * MAX_SLOTS):
        with pytest.raises(ShardError, match="gone"), feed.batches(broken(), lambda _: False) as take:
            while (taken := take()) is not None:
                del taken  # nobody releases anything
    for _ in range(2 * MAX_SLOTS):
        with feed.batches(samples_of(SHARD), lambda _: False) as take:
            take()  # and then the stage stops
    assert len(collect(feed, SHARD)) == 20


def test_the_next_shard_is_prepared_while_this_one_is_taken_and_comes_after_it(
    feed: ExtractLoader, stub_log: Path
) -> None:
    """Even where the second has more batches than there are slots, and one of three is given up."""
    order: list[tuple[str, int]] = []
    tickets: list[int] = []
    feed._tickets = (tickets.append(number) or number for number in feed._tickets)  # type: ignore[assignment]
    other = ROOT / "examples/shards/00000001.tar"

    def consume(name: str, source: Path, most: int) -> None:
        with feed.batches(samples_of(source), lambda _: False) as take:
            while most and (taken := take()) is not None:
                most -= 1
                order.append((name, taken[0].number))
                time.sleep(0.05)
                feed.release(taken[0])

    threads = []
    for name, source, most in (("first", SHARD, 9), ("given up", other, 1), ("third", SHARD, 9)):
        thread = threading.Thread(target=consume, args=(name, source, most))
        threads.append(thread)
        thread.start()
        wait_until(lambda: len(tickets) == len(threads), "a ticket")
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert order == [("first", n) for n in range(3)] + [("given up", 0)] + [("third", n) for n in range(3)]
    assert len(collect(feed, SHARD)) == 20


def test_few_images_are_in_memory_and_a_large_one_goes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_BYTES_AHEAD", 5000)
    pictures = {f"{i}": noise(i, (48 + 30 * (i == 4), 32)) for i in range(9)}
    assert 2500 < len(pictures["0"]) < 5000 < len(pictures["4"])
    feed = ExtractLoader(PREPARATIONS, 8, 2, PLUGIN)
    assert len(collect(feed, shard_of(tmp_path / "0.tar", pictures))) == 9
    feed.close()


def test_preparations_that_cannot_be_started_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import sys\nif sys.flags.safe_path: raise ImportError('no such library')\n")
    feed = ExtractLoader(PREPARATIONS, 8, 1, Plugin(str(plugin)))
    with pytest.raises(InfrastructureError, match="no such library"):
        collect(feed, SHARD)
    feed.close()


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """A parent that is killed leaves nothing behind, neither processes nor memory."""
    code = (
        "import os, sys, signal; from tests.extract.test_feed import *\n"
        "feed = ExtractLoader(PREPARATIONS, 8, 2, PLUGIN); collect(feed, SHARD)\n"
        "print(*[p._process.pid for p in feed._processes if p._process], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    pids = list(map(int, result.stdout.split()))
    assert pids, result.stderr
    wait_until(lambda: all(_is_zombie(pid) for pid in pids), "their end")


def _is_zombie(pid: int) -> bool:
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_the_memory_of_a_batch_is_as_large_as_its_arrays() -> None:
    layout = SlotLayout.of(PREPARATIONS, 512)
    assert layout.places[2] is None
    assert layout.slot_bytes == 512 * 192 + 512 * 32


def test_a_process_is_given_few_samples_at_once_where_one_takes_seconds() -> None:
    class Slow(stub.Crop):
        at_once = 2

    assert _most_at_once([]) == _most_at_once(PREPARATIONS) == CHUNK
    assert _most_at_once([*PREPARATIONS, Slow()]) == 2
