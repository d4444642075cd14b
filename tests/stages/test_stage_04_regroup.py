"""Stage 04 with a subset, in shards of one size, shuffled, indexed.

Every sample as often as it should be, every byte as it was, whoever writes which shard, and nothing lost of what stood
there before."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import SampleError, ShardError, UsageError
from curation.reshard.layout import ShardLayout
from curation.reshard.uids import UID_DTYPE as UID
from curation.reshard.uids import Subset
from curation.run.output_folder import refuse_foreign_shards
from curation.shards import Shard
from curation.storage.files import fast_digest
from curation.tar import random_access
from curation.tar.samples import open_sample, read_samples
from tests.processes import ended_at_last, wait_until
from tests.shards import Member, contents, member, raw_members, tar_of
from tests.stages.test_stage_04_reshard import EDIT, Stage04, sample, tar_of_edits

stage_04 = importlib.import_module("04_reshard")


class Regroup(Stage04):
    """The stage without edits, unless they are named."""

    def has_edits(self) -> bool:
        return any((self.root / "edits").iterdir())

    def keys(self) -> dict[str, list[str]]:
        """Of each output shard, in order."""
        return {path.stem: [s.key for s in read_samples(path, ())] for path in self.tars()}

    def tars(self) -> list[Path]:
        return sorted((self.root / "hybrid").glob("*.tar"))

    def files(self) -> dict[str, bytes]:
        """What a reader of the output sees."""
        return {path.name: path.read_bytes() for path in sorted((self.root / "hybrid").glob("[!_]*.*"))}

    def index_receipt(self, shard: str = "0") -> dict[str, object]:
        found: dict[str, object] = json.loads(
            (self.root / f"hybrid/_index/_receipts/04_index/{shard[:-3] or '0'}/{shard}.json").read_bytes()
        )
        return found


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Regroup:
    (tmp_path / "edits").mkdir()
    return Regroup(tmp_path, capsys)


def uid(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 & (1 << 128) - 1:032x}"


def with_uid(key: str, number: int, size: int = 700) -> list[Member]:
    parts = sample(key, ("jpg", "txt"), size)
    return [parts[0], member(f"{key}.json", json.dumps({"uid": uid(number), "key": key}).encode()), parts[1]]


def put_shards(run: Regroup, *sizes: int, names: Iterable[str] = ("0", "1", "5", "12", "13", "40")) -> None:
    """Shards with gaps in their numbering; the samples' keys count through."""
    number = 0
    for name, size in zip(names, sizes, strict=False):
        parts = [part for n in range(number, number + size) for part in with_uid(f"{n:06d}", n)]
        run.put(f"shards/{name.zfill(5)}.tar", tar_of(parts))
        number += size


def put_subset(run: Regroup, numbers: Iterable[int]) -> str:
    halves = [divmod(int(uid(number), 16), 1 << 64) for number in numbers]
    path = run.root / "keep.npy"
    np.save(path, np.sort(np.array(halves, UID)))
    return str(path)


def members_of(paths: Iterable[Path]) -> list[tuple[str, bytes]]:
    return [found for path in paths for found in raw_members(path.read_bytes())]


# ---- a subset


def test_a_subset_keeps_its_samples_byte_for_byte_and_copies_those_that_stand_there_twice(run: Regroup) -> None:
    put_shards(run, 10, 4)
    assert run("--subset", put_subset(run, [1, 3, 3, 3, 8, 11, 11]), "--verify") == 0
    copied = [f"000003-{n}" for n in range(3)]
    assert run.keys() == {"00000": ["000001", *copied, "000008"], "00001": ["000011-0", "000011-1"]}
    before, after = (dict(raw_members((run.root / f"{f}/00000.tar").read_bytes())) for f in ("shards", "hybrid"))
    for key in ("000001", "000008"):
        for suffix in ("jpg", "json", "txt"):
            assert after[f"{key}.{suffix}"] == before[f"{key}.{suffix}"]
    old, new = (contents((run.root / f"{f}/00000.tar").read_bytes()) for f in ("shards", "hybrid"))
    for key in copied:
        assert all(new[f"{key}.{suffix}"] == old[f"000003.{suffix}"] for suffix in ("jpg", "json", "txt"))
    receipt = run.receipt("00000")
    assert receipt["counts"] == {"in": 10, "kept": 3, "dropped": {"not_in_subset": 7}, "failed": {}}
    assert receipt["notes"]["copies"] == 2


def test_another_subset_makes_the_shards_again(run: Regroup) -> None:
    put_shards(run, 4)
    assert run("--subset", put_subset(run, [1])) == 0
    assert run("--subset", put_subset(run, [2, 3])) == 0
    assert run.keys() == {"00000": ["000002", "000003"]}


def test_a_sample_without_a_uid_fails_where_there_is_a_subset(run: Regroup) -> None:
    parts = [*with_uid("a", 0), *sample("b"), *with_uid("c", 2), member("d.txt", b"text"), *with_uid("e", 4)]
    parts += [member("f.json", b'{"uid": "not hexadecimal"}'), member("g.json", b'{"uid": 7}')]
    run.put("shards/0.tar", tar_of(parts))
    assert run("--subset", put_subset(run, [0, 4]), "--max_error_rate", "1") == 0
    assert run.receipt()["counts"]["kept"] == 2
    assert run.rejects() == {
        "b": "bad_json", "d": "no_uid", "f": "no_uid", "g": "no_uid"
    }  # fmt: skip


def test_an_edit_of_a_sample_that_the_subset_leaves_out_is_told_and_not_applied(run: Regroup) -> None:
    put_shards(run, 4)
    run.put("edits/00000.tar", tar_of_edits(["000001", "000002"]))
    assert run("--subset", put_subset(run, [0, 2, 2])) == 0
    assert run.keys() == {"00000": ["000000", "000002-0", "000002-1"]}
    assert "1 edits are of samples that do not go into the output" in run.log
    assert "000001" in run.log
    for key in ("000002-0", "000002-1"):
        assert contents(run.result("00000"))[f"{key}.jpg"] == EDIT["jpg"] + b"000002"
    notes = run.receipt("00000")["notes"]
    assert (notes["edited"], notes["edits_left_out"]) == (1, 1)
    run.put("edits/00000.tar", tar_of_edits(["000001", "nobody"]))  # but one of no sample at all was mixed up
    assert run("--subset", put_subset(run, [0, 2])) == 1
    assert "match no sample" in run.log


def test_what_is_no_sorted_array_of_uids_is_refused(run: Regroup) -> None:
    put_shards(run, 2)
    path = run.root / "keep.npy"
    halves = np.array([divmod(int(uid(n), 16), 1 << 64) for n in range(9)], UID)
    arrays = {
        "is not sorted": np.sort(halves)[::-1],
        "dtype u8,u8 is wanted": np.arange(9, dtype="u8"),
        "this one is [('f0', '>u8'), ('f1', '>u8')]": np.sort(halves).astype(">u8,>u8"),
        "1-dimensional": np.array([uid(n) for n in range(9)]),
        "2-dimensional": np.sort(halves).reshape(3, 3),
        "names no sample": np.zeros(0, UID),
        "not an array": np.array([{"uid": 1}], object),
    }
    for message, array in arrays.items():
        np.save(path, array, allow_pickle=True)
        assert run("--subset", str(path)) == 2
        assert message in run.log
    for data in (b"", b"\x93NUMPY", bytes(160)):
        path.write_bytes(data)
        assert run("--subset", str(path)) == 2
        assert "not an array that numpy.save wrote" in run.log and "select` writes one" in run.log
        assert "pickle" not in run.log, "numpy advises what no file from outside may get"
    assert run("--subset", f"{run.root}/nowhere.npy") == 2
    assert "cannot be read" in run.log
    assert not (run.root / "hybrid").exists()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), st.booleans())
def test_the_search_finds_what_counting_finds(
    tmp_path_factory: pytest.TempPathFactory, uids: list[tuple[int, int]], high: bool
) -> None:
    top = (1 << 64) - 4 if high else 0
    uids = [(a + top, b + top) for a, b in uids]
    path = tmp_path_factory.mktemp("subset") / "keep.npy"
    np.save(path, np.sort(np.array(uids, UID)))
    subset = Subset(path)
    subset.check_order()
    wanted = [(a + top, b + top) for a in range(4) for b in range(4)]
    assert subset.counts(wanted) == [Counter(uids)[halves] for halves in wanted]


def test_a_large_subset_is_searched_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "keep.npy"
    array = np.lib.format.open_memmap(path, "w+", UID, (4_000_000,))  # 64 MB
    array["f0"] = np.arange(4_000_000) // 2
    array.flush()
    del array
    subset = Subset(path)
    tracemalloc.start()
    found = subset.counts([(n * 10, 0) for n in range(10_000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [2] * 10_000
    assert peak < 8 << 20


def test_samples_of_one_key_do_not_become_one_when_those_between_them_go(run: Regroup) -> None:
    put = [*with_uid("a", 0), *with_uid("b", 1), *with_uid("a", 2), *with_uid("c", 3), *with_uid("a", 4)]
    run.put("shards/0.tar", tar_of(put))
    assert run("--subset", put_subset(run, [0, 2, 3, 4]), "--max_error_rate", "1", "--verify") == 0
    assert run.keys() == {"0": ["a", "c", "a"]}
    assert "duplicate_key" in run.rejects().values()


def test_a_subset_of_none_of_the_samples(run: Regroup) -> None:
    put_shards(run, 2)
    assert run("--subset", put_subset(run, [99])) == 0
    assert run.keys() == {"00000": []}
    os.rename(run.root / "hybrid", run.root / "was")
    assert run("--subset", put_subset(run, [99]), "--shard_size", "5", "--index") == 0
    assert run.keys() == {}
    assert json.loads(run.files()["wids.json"])["shardlist"] == []


# ---- shards of one size


def test_regrouping_makes_shards_of_one_size_and_changes_no_byte_of_a_sample(run: Regroup) -> None:
    put_shards(run, 10, 1, 25, 0, 7)
    assert run("--shard_size", "12", "--verify") == 0
    assert {name: len(keys) for name, keys in run.keys().items()} == {
        "00000000": 12, "00000001": 12, "00000002": 12, "00000003": 7
    }  # fmt: skip
    assert members_of(run.tars()) == members_of(sorted((run.root / "shards").glob("*.tar")))
    assert run.receipt("00000001")["counts"] == {"in": 12, "kept": 12, "dropped": {}, "failed": {}}
    assert run.index_receipt("00005")["counts"] == {"in": 25, "kept": 25, "dropped": {}, "failed": {}}


def test_regrouping_edits_selects_and_copies_as_shard_by_shard(run: Regroup) -> None:
    put_shards(run, 9, 9, 9)
    run.put("edits/00000.tar", tar_of_edits(["000004"]))
    run.put("edits/00005.tar", tar_of_edits(["000019", "000025"]))
    flags = ["--subset", put_subset(run, [0, 4, 4, 8, 9, 17, 19, 25, 25, 25]), "--verify"]
    assert run(*flags) == 0
    one_by_one = members_of(run.tars())
    subprocess.run(["rm", "-r", f"{run.root}/hybrid"], check=True)
    assert run(*flags, "--shard_size", "4") == 0
    assert members_of(run.tars()) == one_by_one
    assert [len(keys) for keys in run.keys().values()] == [4, 4, 2]
    assert run.index_receipt("00005")["notes"] == {
        "copies": 2, "edited": 2, "edits_left_out": 0, "missing_edits": 0, "samples_out": 4,
        "with_copy": [2, 1, 1],
        "bytes_out": run.index_receipt("00005")["notes"]["bytes_out"],
    }  # fmt: skip


def test_regrouping_takes_odd_headers_along_and_leaves_what_is_no_sample(run: Regroup) -> None:
    long = "f" * 60 + "/" + "n" * 120
    odd = [member("folder/", type=tarfile.DIRTYPE), *sample("a"), member("README", b"hello"), *sample(long)]
    odd += [member("link.jpg", type=tarfile.SYMTYPE, linkname="a.jpg"), *sample("é" * 70)]
    for number, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        parts = [p for p in odd if format != tarfile.USTAR_FORMAT or len(p[0].name.encode()) < 100]
        run.put(f"shards/{number}.tar", tar_of([*parts, *sample(f"z{number}")], format))
    assert run("--shard_size", "3", "--verify", "--index") == 0
    sources = [s for path in sorted((run.root / "shards").glob("*.tar")) for s in read_samples(path)]
    outputs = [s for path in run.tars() for s in read_samples(path)]
    assert [s.members for s in outputs] == [s.members for s in sources]
    assert [len(keys) for keys in run.keys().values()] == [3, 3, 3, 3, 1][: len(run.tars())]
    assert "members that belong to no sample are left out" in run.log


def test_samples_of_two_shards_with_one_key_stay_two(run: Regroup) -> None:
    for shard in ("a", "b", "c"):
        run.put(f"shards/{shard}.tar", tar_of([*sample("0"), *sample("1")]))
    assert run("--shard_size", "6", "--verify", "--index") == 0
    assert run.keys() == {"00000000": ["0", "1", "0-b", "1-b", "0-c", "1-c"]}


def test_a_damaged_shard_gives_what_is_whole_and_counts_the_rest(run: Regroup) -> None:
    put_shards(run, 6, 6)
    path = run.root / "shards/00000.tar"
    path.write_bytes(path.read_bytes()[:9_000])
    assert run("--shard_size", "5", "--max_error_rate", "1") == 0
    counts = run.index_receipt("00000")["counts"]
    assert counts["failed"] == {"damaged_tar": 1}
    assert sum(map(len, run.keys().values())) == counts["kept"] + 6
    path.write_bytes(b"no tar " * 999)
    assert run("--shard_size", "5") == 1
    assert "00000 failed" in run.log


def test_samples_larger_than_the_buffer_and_many_open_shards(run: Regroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_access, "GATHERED_BYTES", 3_000)
    monkeypatch.setattr(random_access, "_OPEN_FILES", 2)
    put_shards(run, 5, 5, 5, 5)
    run.put("shards/00041.tar", tar_of(sample("big", size=50_000)))
    assert run("--shard_size", "8", "--shuffle_buffer", "30", "--verify") == 0
    assert sorted(members_of(run.tars())) == sorted(members_of((run.root / "shards").glob("*.tar")))


# ---- order


def test_shuffling_is_a_permutation_of_each_block_that_the_seed_decides(run: Regroup) -> None:
    put_shards(run, 20, 20, 20)
    orders = {}
    for name, flags in {
        "3": ["--seed", "3"], "again": ["--seed", "3"], "4": ["--seed", "4"], "none": ["--shuffle_buffer", "0"]
    }.items():  # fmt: skip
        assert run("--shard_size", "7", "--shuffle_buffer", "25", *flags) == 0
        orders[name] = [key for keys in run.keys().values() for key in keys]
        os.rename(run.root / "hybrid", run.root / f"was-{name}")
    assert orders["none"] == [f"{n:06d}" for n in range(60)]
    assert orders["3"] == orders["again"] != orders["4"]
    for order in (orders["3"], orders["4"]):
        for begin in (0, 25, 50):
            part = order[begin : begin + 25]
            assert sorted(part) == orders["none"][begin : begin + 25] != part


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    size=st.integers(1, 40),
    shuffle=st.integers(0, 70),
    seed=st.integers(0, 5),
)
def test_a_layout_has_every_sample_once(counts: list[int], size: int, shuffle: int, seed: int) -> None:
    layout = ShardLayout([Shard(str(n), Path(str(n))) for n in range(len(counts))], counts, size, shuffle, seed)
    drawn = [layout.draw(number) for number in range(len(layout))]
    pairs = [(int(a), int(b)) for draw in drawn for a, b in zip(draw.sources, draw.samples, strict=True)]
    assert sorted(pairs) == [(source, n) for source, count in enumerate(counts) for n in range(count)]
    assert [len(draw.sources) for draw in drawn[:-1]] == [size] * max(0, len(layout) - 1)
    assert len(layout.shards) == len(layout)
    where = {pair: at for at, pair in enumerate(sorted(pairs))}
    assert all(abs(where[pair] - at) < max(1, shuffle) for at, pair in enumerate(pairs))


@settings(max_examples=60)
@given(
    copies=st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=8),
    size=st.integers(1, 40),
    shuffle=st.integers(0, 70),
)
def test_a_layout_of_spread_copies_has_every_copy_once(copies: list[list[int]], size: int, shuffle: int) -> None:
    spread = [[sum(n > copy for n in one) for copy in range(max(one, default=0))] for one in copies]
    shards = [Shard(str(n), Path(str(n))) for n in range(len(copies))]
    layout = ShardLayout(shards, map(sum, copies), size, shuffle, 0, spread)
    assert layout.total == sum(map(sum, copies)) and len(layout.shards) == len(layout)
    drawn = []
    for draw in (layout.draw(number) for number in range(len(layout))):
        assert draw.copies is not None
        drawn += list(zip(map(int, draw.sources), map(int, draw.copies), map(int, draw.samples), strict=True))
    assert sorted(drawn) == [
        (source, copy, number)
        for source, one in enumerate(spread)
        for copy, count in enumerate(one)
        for number in range(count)
    ]


def test_copies_are_spread_over_the_shards(run: Regroup) -> None:
    """Of four copies, each lies about a quarter of all samples further on; without the flag they are neighbours."""
    put_shards(run, 10, 10, 10, 10)
    subset = put_subset(run, [*range(40), *([3, 25] * 3)])
    flags = ["--subset", subset, "--shard_size", "10"]
    assert run(*flags) == 0
    together = run.keys()
    assert sum("000003-0" in keys for keys in together.values()) == 1
    shards_of = {n: {s for s, keys in together.items() if any(k.startswith(f"{n:06d}") for k in keys)} for n in (3, 25)}
    assert all(len(shards) <= 2 for shards in shards_of.values())
    assert run(*flags, "--spread_copies") == 2, "other options"
    assert run(*flags, "--spread_copies", "--index", "--verify", "--rerun", "--overwrite") == 0
    spread = run.keys()
    every = [key for keys in spread.values() for key in keys]
    assert sorted(every) == sorted(key for keys in together.values() for key in keys)
    for number in (3, 25):
        places = [every.index(f"{number:06d}-{copy}") for copy in range(4)]
        gaps = sorted((b - a) % len(every) for a, b in zip(places, [*places[1:], places[0]], strict=True))
        assert gaps[0] >= len(every) // 4 - 4, places
    pictures = {name: data for path in run.tars() for name, data in contents(path).items() if name.endswith(".jpg")}
    assert {pictures[f"000003-{copy}.jpg"] for copy in range(4)} == {pictures["000003-0.jpg"]}
    assert run("--subset", subset, "--spread_copies") == 2 and "needs --subset and --shard_size" in run.log


@pytest.mark.parametrize("more", [(), ("--shard_size", "4"), ("--shard_size", "4", "--spread_copies")])
def test_datacomps_keys(more: tuple[str, ...], run: Regroup) -> None:
    """``<uid>-<number>`` for every sample, as in DataComp's shards, and no key twice in a shard."""
    put_shards(run, 3, 3)
    again = [part for n in (0, 0, 5) for part in with_uid(f"again{n}", n)]
    run.put("shards/00077.tar", tar_of([*again[:3], *with_uid("between", 9), *again[3:]]))
    subset = put_subset(run, [0, 0, *range(1, 6), 9])
    assert run("--subset", subset, "--keys", "datacomp", "--verify", *more) == 0
    found = run.keys()
    every = [key for keys in found.values() for key in keys]
    assert all(len(set(keys)) == len(keys) for keys in found.values())
    assert {key[:34] for key in every} >= {f"{uid(n)}-0" for n in (*range(6), 9)} | {f"{uid(0)}-1"}
    for path in run.tars():
        for found_one in read_samples(path):
            assert found_one.key.startswith(json.loads(found_one.members["json"])["uid"] + "-")
    if not more:  # a uid that comes again in one shard is numbered on
        assert [key.rpartition("-")[2] for key in found["00077"] if key.startswith(uid(0))] == ["0", "1", "2", "3"]


def test_the_result_does_not_depend_on_who_writes_what(run: Regroup) -> None:
    put_shards(run, 20, 20, 20)
    flags = ["--shard_size", "7", "--shuffle_buffer", "25", "--index", "--subset", put_subset(run, [*range(50), 7, 7])]
    assert run(*flags) == 0
    alone = run.files()
    assert len(alone) == 2 * 8 + 2
    os.rename(run.root / "hybrid", run.root / "alone")
    assert run(*flags, "--shards", "00000003,00000005") == 0
    assert [path.stem for path in run.tars()] == ["00000003", "00000005"]
    assert "wids.json" not in run.files()
    with ended_at_last(run.start(*flags, "--workers", "2", "--quiet")) as process:
        assert process.wait() == 0
    assert run.files() == alone


# ---- again, and after a kill


def test_a_killed_run_is_taken_up_again(run: Regroup) -> None:
    for shard in range(2):
        parts = [p for n in range(150) for p in sample(f"{shard}-{n:03d}", size=30_000)]
        run.put(f"shards/{shard}.tar", tar_of(parts))
    flags = ["--shard_size", "4", "--shuffle_buffer", "50", "--index"]
    with ended_at_last(run.start(*flags, "--quiet")) as process:
        wait_until(lambda: len(run.tars()) >= 5, "five shards", while_runs=process)
        process.kill()
    written = len(run.tars())
    assert 5 <= written < 75
    assert run(*flags, "--lease_s", "1") == 0
    assert len(run.tars()) == 75
    assert "of 75 shards" in run.log
    assert sorted(members_of(run.tars())) == sorted(members_of((run.root / "shards").glob("*.tar")))
    assert not list((run.root / "hybrid").glob(".*"))
    done = {path: path.stat().st_mtime_ns for path in run.tars()}
    assert run(*flags) == 0
    assert {path: path.stat().st_mtime_ns for path in run.tars()} == done


def test_a_source_that_changes_makes_again_what_is_drawn_from_it(run: Regroup) -> None:
    put_shards(run, 10, 10, 10)
    assert run("--shard_size", "5") == 0
    before = {path.name: path.stat().st_mtime_ns for path in run.tars()}
    parts = [part for n in range(10, 20) for part in with_uid(f"{n:06d}", n + 1000)]
    run.put("shards/00001.tar", tar_of(parts))
    assert run("--shard_size", "5") == 0
    changed = {path.name for path in run.tars() if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"00000002.tar", "00000003.tar"}
    assert members_of(run.tars()) == members_of(sorted((run.root / "shards").glob("*.tar")))


def test_another_layout_is_refused_until_it_is_asked_for(run: Regroup) -> None:
    put_shards(run, 10, 10)
    assert run("--shard_size", "4", "--index") == 0
    before = run.files()
    assert run("--shard_size", "10", "--index") == 2
    assert "3 shards of another layout" in run.log
    assert run("--index") == 2  # nor shard by shard
    assert "shards of another layout" in run.log
    assert run("--shard_size", "3", "--index") == 2  # none would be left over
    assert "with other options" in run.log
    assert "shard_size: 4 → 3" in run.log
    assert run("--shard_size", "10", "--index", "--rerun") == 2
    assert run.files() == before
    assert run("--shard_size", "10", "--index", "--rerun", "--overwrite") == 0
    assert [len(keys) for keys in run.keys().values()] == [10, 10]
    assert sorted(run.files()) == [
        "00000000.idx",
        "00000000.tar",
        "00000001.idx",
        "00000001.tar",
        "sizes.json",
        "wids.json",
    ]
    put_shards(run, 10, 9)  # fewer samples: the last shard is another, and so is the layout
    assert run("--shard_size", "10", "--index") == 2
    assert "layout: " in run.log
    assert run("--shard_size", "10", "--index", "--rerun") == 0
    assert [len(keys) for keys in run.keys().values()] == [10, 9]


def test_shards_of_others_are_not_overwritten_unless_asked(run: Regroup) -> None:
    put_shards(run, 3, 3)
    precious = run.put("hybrid/00001.tar", b"somebody's work")
    for flags in ((), ("--shard_size", "2")):
        assert run("--index", *flags) == 2
        assert "already holds 1 shards that 04_reshard has not made: 00001" in run.log
        assert precious.read_bytes() == b"somebody's work"
        assert not [path for path in run.tars() if path != precious]
    assert run("--index", "--overwrite") == 0
    assert members_of(run.tars()) == members_of(sorted((run.root / "shards").glob("*.tar")))
    assert run("--index") == 0  # its own are no hindrance


def test_a_commit_under_way_is_no_shard_of_others(tmp_path: Path) -> None:
    (tmp_path / "7.tar").write_bytes(b"just published")
    (tmp_path / "_receipts/s/0").mkdir(parents=True)
    (tmp_path / "_receipts/s/_epoch.1.json").write_bytes(b"{}")
    with pytest.raises(UsageError, match="1 shards that s has not made: 7"):
        refuse_foreign_shards(tmp_path, "s", {"7"}, regroups=True, overwrite=False)
    (tmp_path / "_receipts/s/0/.7.1.commit").write_bytes(b"{}")
    refuse_foreign_shards(tmp_path, "s", {"7"}, regroups=True, overwrite=False)


def test_the_two_steps_one_by_one(run: Regroup) -> None:
    put_shards(run, 5, 5)
    assert run("--shard_size", "4", "--step", "write") == 75
    assert "not indexed yet" in run.log
    assert run("--shard_size", "4", "--step", "index") == 0
    assert not run.tars()
    assert run("--shard_size", "4", "--step", "write") == 0
    assert [len(keys) for keys in run.keys().values()] == [4, 4, 2]


def test_flags_that_make_no_sense_together(run: Regroup) -> None:
    put_shards(run, 2)
    for message, flags in {
        "need --shard_size": ["--edits", f"{run.root}/edits", "--shuffle_buffer", "5"],
        "must be at least 1": ["--shard_size", "0"],
        "leave --follow out": ["--shard_size", "5", "--follow", "--edits", f"{run.root}/edits"],
        "--edits is missing. Give it, or an option that changes shards: --subset": [],
        "--follow needs --edits": ["--follow", "--index"],
        "needs --prompts and --edits": ["--on_missing", "drop", "--index"],
        "nothing is known of rejected samples": ["--drop_rejected"],
    }.items():
        command = ["--input", f"{run.root}/shards", "--output", f"{run.root}/hybrid", *flags]
        run.capsys.readouterr()
        assert stage_04.main(command) == 2
        assert message in run.capsys.readouterr().err
    assert not (run.root / "hybrid").exists()


def test_a_dry_run_tells_samples_and_bytes_and_writes_nothing(run: Regroup) -> None:
    put_shards(run, 10, 10)
    flags = ["--subset", put_subset(run, [1, 2, 2, 12]), "--shard_size", "3"]
    assert run(*flags, "--dry_run") == 0
    assert not (run.root / "hybrid").exists()
    out = run.out
    assert "4 samples would be written in 2 shards" in out
    assert "17 dropped: not_in_subset" in out
    assert "1 copies" in out
    assert run(*flags) == 0
    size = sum(len(raw) for _, raw in members_of(run.tars()))
    assert f"about {size:,} bytes" in out
    assert run(*flags, "--dry_run") == 0
    assert "04_reshard into" in run.out
    assert "2 done" in run.out


# ---- what earlier stages rejected


def test_rejected_samples_are_left_out(run: Regroup) -> None:
    put_shards(run, 8)
    prompts = run.put("prompts/00000.json", json.dumps({f"00000{n}.json": "a" for n in (1, 2, 5, 6)}).encode())
    output = {"path": "00000.json", "size": prompts.stat().st_size, "digest": fast_digest(prompts)}
    receipt = json.dumps({"status": "done", "outputs": [output]}).encode()
    run.put("prompts/_receipts/02_captions_processor/00/00000.json", receipt)
    lines = [json.dumps({"key": f"00000{n}", "reason": "refused"}) for n in (2, 5)]
    run.put("prompts/_rejects/02_captions_processor/00000.jsonl", "\n".join(lines).encode())
    drops = gzip.compress(b'not_english\t"000003"\n')
    run.put("prompts/_rejects/02_captions_processor/00000.drops.tsv.gz", drops)
    run.put("edits/00000.tar", tar_of_edits(["000001", "000005"]))
    rejected_images = run.put("edits/_rejects/03_generate_images/00000.jsonl", b'{"key": "000006", "reason": "black"}')
    assert run() == 0, run.log
    assert len(run.keys()["00000"]) == 8
    assert run("--drop_rejected") == 2  # it changes the output
    assert run("--drop_rejected", "--rerun") == 0
    assert run.keys()["00000"] == ["000000", "000001", "000004", "000005", "000007"]
    assert run.receipt("00000")["counts"]["dropped"] == {
        "rejected_by_02_captions_processor": 2, "rejected_by_03_generate_images": 1
    }  # fmt: skip
    assert contents(run.result("00000"))["000005.txt"] == EDIT["txt"] + b"000005"  # it was tried again
    os.rename(run.root / "hybrid", run.root / "was")
    assert run("--drop_rejected", "--shard_size", "2", "--verify") == 0
    assert members_of(run.tars()) == members_of([run.root / "was/00000.tar"])
    rejected_images.write_bytes(b'{"key": ')
    assert run("--drop_rejected", "--shard_size", "2") == 1
    assert "03_generate_images/00000.jsonl: bad_json" in run.log


# ---- indexes


def test_a_sample_is_opened_by_its_key(run: Regroup) -> None:
    keys = ["a", 'quo"te', "tab\tnew\nline", "ünï", "folder/b", "n" * 150]
    parts = [p for key in keys for p in sample(key)]
    parts += [member(f"raw\udcff.{suffix}", suffix.encode()) for suffix in ("jpg", "txt")]
    run.put("shards/0.tar", tar_of(parts))
    run.put("edits/0.tar", tar_of_edits(["folder/b"]))
    assert run("--index") == 0
    path = run.root / "hybrid/0.tar"
    for expected in read_samples(path):
        found = open_sample(path, expected.key)
        assert (found.key, found.members, found.mtimes) == (expected.key, expected.members, expected.mtimes)
    assert open_sample(path, "folder/b").members["txt"] == EDIT["txt"] + b"folder/b"
    for line, expected in zip(path.with_suffix(".idx").read_bytes().splitlines(), read_samples(path, ()), strict=True):
        key, offset, length = line.split(b"\t")
        assert json.loads(key) == expected.key
        assert len(path.read_bytes()[int(offset) :][: int(length)]) == int(length)
    with pytest.raises(SampleError, match="no_such_key"):
        open_sample(path, "c")
    path.write_bytes(path.read_bytes()[512:])
    with pytest.raises(ShardError, match="it is not there"):
        open_sample(path, "ünï")
    path.with_suffix(".idx").write_bytes(b'"a"\tnot\tnumbers\n')
    with pytest.raises(ShardError, match="damaged"):
        open_sample(path, "a")
    path.with_suffix(".idx").unlink()
    with pytest.raises(ShardError, match="--index"):
        open_sample(path, "a")
