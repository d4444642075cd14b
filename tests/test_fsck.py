"""``python -m curation fsck``: what is done to a shard is found, nothing crashes, and what is whole is saved."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from curation.__main__ import main
from curation.inspect.fsck_shard import REMEDIES, Task, check_shard
from curation.publish import fast_digest
from curation.tar import TarWriter, read_samples
from curation.tar_headers import make_header, padded
from tests.pipeline import EXAMPLES, Undisturbed

SHARD = "00000004"  # of the hybrid shards of a real run: 20 samples, three of them edited
Extents = list[tuple[str, int, int]]  # key, first byte, last byte + 1 of each member, in order


def extents_of(path: Path) -> Extents:
    """As Python's tarfile reads them."""
    with tarfile.open(path) as tar:
        return [(i.name.partition(".")[0], i.offset, i.offset_data + padded(i.size)) for i in tar]


def raw_samples(path: Path) -> dict[str, bytes]:
    """key → all bytes of its members: headers, data, padding."""
    data = path.read_bytes()
    found: dict[str, bytes] = {}
    for key, start, end in extents_of(path):
        found[key] = found.get(key, b"") + data[start:end]
    return found


def tar_complains(path: Path) -> bool:
    """Whether GNU tar has anything to say but the names."""
    done = subprocess.run(["tar", "-tf", path], capture_output=True, check=False)
    return done.returncode != 0 or bool(done.stderr)


Touched = list[tuple[int, int]]  # ranges of the original that are not what or where they were; (x, x) is put in at x


def cut(data: bytes, dice: random.Random) -> tuple[bytes, Touched]:
    if dice.random() < 0.3:
        begin = dice.randrange(1, len(data) // 2)
        return data[begin:], [(0, begin)]
    end = dice.randrange(len(data))
    return data[:end], [(end, len(data))]


def flip_bits(data: bytes, dice: random.Random) -> tuple[bytes, Touched]:
    changed, touched = bytearray(data), []
    for _ in range(dice.choice((1, 1, 3, 20))):
        at = dice.randrange(len(data))
        if dice.random() < 0.5:  # headers are few: meet them as well
            at = dice.choice(HEADERS) + dice.randrange(512)
        changed[at] ^= 1 << dice.randrange(8)
        touched.append((at, at + 1))
    return bytes(changed), touched


HEADERS: list[int] = []


def filling(data: bytes, size: int, dice: random.Random) -> bytes:
    """Noise, zeros, or another part of the same tar, with headers in it."""
    kind = dice.randrange(3)
    if kind == 0:
        return dice.randbytes(size)
    begin = dice.choice(HEADERS) if dice.random() < 0.5 else dice.randrange(len(data))
    return (bytes(size) if kind == 1 else data[begin : begin + size]).ljust(size, b"\0")


def some_bytes(dice: random.Random) -> int:
    blocks = 512 * dice.choice((1, 1, 2, 3, 20, 100))
    return blocks if dice.random() < 0.7 else dice.randrange(1, 5000)


def some_place(data: bytes, dice: random.Random) -> int:
    kind = dice.randrange(3)
    if kind == 0:
        return dice.choice(HEADERS)
    return dice.randrange(len(data) // 512) * 512 if kind == 1 else dice.randrange(len(data))


def insert(data: bytes, dice: random.Random) -> tuple[bytes, Touched]:
    at = some_place(data, dice)
    return data[:at] + filling(data, some_bytes(dice), dice) + data[at:], [(at, at)]


def delete(data: bytes, dice: random.Random) -> tuple[bytes, Touched]:
    at = some_place(data, dice)
    size = some_bytes(dice)
    return data[:at] + data[at + size :], [(at, min(len(data), at + size))]


def overwrite(data: bytes, dice: random.Random) -> tuple[bytes, Touched]:
    at = some_place(data, dice)
    size = min(some_bytes(dice), len(data) - at)
    return data[:at] + filling(data, size, dice) + data[at + size :], [(at, at + size)]


MUTATIONS = (cut, flip_bits, insert, delete, overwrite)


def untouched(extents: Extents, touched: Touched) -> set[str]:
    hit = set()
    for key, start, end in extents:
        for begin, stop in touched:
            if (begin < stop and begin < end and stop > start) or (begin == stop and start < begin < end):
                hit.add(key)
    return {key for key, _, _ in extents} - hit


@pytest.fixture(scope="module")
def shard(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of a real hybrid shard, edited samples among them."""
    samples = list(read_samples(undisturbed.root / "hybrid" / f"{SHARD}.tar"))
    edited = [s for s in samples if "curation" in json.loads(s.members["json"])]
    others = [s for s in samples if s not in edited][:7]
    path = tmp_path_factory.mktemp("fsck") / f"{SHARD}.tar"
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for sample in (*others[:2], edited[0], *others[2:], *edited[1:]):
            for suffix, data in sample.members.items():
                writer.add(f"{sample.key}.{suffix}", data, sample.mtimes[suffix])
        writer.close()
    HEADERS[:] = [start for _, start, _ in extents_of(path)]
    return path


def put_receipt(folder: Path, shard: Path) -> None:
    receipts = folder / "_receipts" / "04_reshard" / "00000"
    receipts.mkdir(parents=True)
    output = {"path": shard.name, "size": shard.stat().st_size, "digest": fast_digest(shard), "checked": True}
    receipt = {"shard": shard.stem, "stage": "04_reshard", "status": "done", "outputs": [output]}
    (receipts / f"{shard.stem}.json").write_text(json.dumps(receipt))


def try_mutations(shard: Path, folder: Path, seeds: Sequence[int]) -> dict[str, int]:
    """What is asked of every one of them; how often what came about."""
    data, extents, raw = shard.read_bytes(), extents_of(shard), raw_samples(shard)
    put_receipt(folder, shard)
    victim, repaired = folder / shard.name, folder / "repaired" / shard.name
    tally = {"structural": 0, "by digest alone": 0, "unchanged": 0, "saved": 0, "untouched": 0}
    for seed in seeds:
        dice = random.Random(seed)
        mutation = MUTATIONS[seed % len(MUTATIONS)]
        mutated, touched = mutation(data, dice)
        victim.write_bytes(mutated)
        repaired.unlink(missing_ok=True)
        verdict = check_shard(Task(victim, shard.stem, True, folder / "repaired"))
        kinds = set(verdict.findings.counts)
        about = f"seed {seed}, {mutation.__name__} {touched}: {dict(verdict.findings.counts)}"
        assert kinds <= REMEDIES.keys(), about
        if mutated == data:
            assert not kinds, about
            tally["unchanged"] += 1
            continue
        assert "wrong_digest" in kinds, about
        if kinds == {"wrong_digest"}:
            assert not tar_complains(victim), about
            tally["by digest alone"] += 1
        else:
            tally["structural"] += 1
        whole = untouched(extents, touched)
        saved = raw_samples(repaired)
        for key in whole:
            assert saved.get(key) == raw[key], f"{about}: {key} was whole"
        assert [sample.problem for sample in read_samples(repaired)] == [None] * len(saved), about
        assert not tar_complains(repaired), about
        assert not check_shard(Task(repaired, shard.stem, True, None)).findings, about
        tally["saved"] += len(saved)
        tally["untouched"] += len(whole)
    return tally


@pytest.mark.parametrize("start", [0, 20, 40])
def test_mutations(shard: Path, tmp_path: Path, start: int) -> None:
    tally = try_mutations(shard, tmp_path, range(start, start + 20))
    assert tally["structural"] > 8
    assert tally["untouched"] > 100


@pytest.mark.soak
def test_a_thousand_mutations(shard: Path, tmp_path: Path) -> None:
    tally = try_mutations(shard, tmp_path, range(1000, 2000))
    print(tally)
    assert tally["structural"] > 500
