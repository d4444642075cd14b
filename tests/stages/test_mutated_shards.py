"""Mutated shards through every stage that reads tars: no sound sample is lost, and readers see what receipts say.

A sample is **sound** if its bytes, from the first header to the last byte of data (of the last sample: padding), stand
somewhere in the mutated shard, and no member of its key stands before them.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from curation.__main__ import main as command
from tests.stages import recaption_stub
from tests.stages.test_damaged_shards import in_a_thread, photo, script

SAMPLES = 8
LARGEST_BATCH = 100
FLAGS = ("--max_error_rate", "1", "--quiet", "--workers", "1")


# ---- shards in the dialects that tars are written in


@dataclass(frozen=True)
class Dialect:
    format: int
    folder: str = ""
    mtime: float = 1_700_000_000

    def header(self, name: str, size: int) -> bytes:
        info = tarfile.TarInfo(self.folder + name)
        info.size, info.mtime = size, self.mtime
        return info.tobuf(self.format)


DIALECTS = {
    "ustar": Dialect(tarfile.USTAR_FORMAT),
    "ustar with prefixes": Dialect(tarfile.USTAR_FORMAT, "a/folder/" * 15),
    "gnu": Dialect(tarfile.GNU_FORMAT),
    "gnu with long names": Dialect(tarfile.GNU_FORMAT, "a/folder/" * 15),
    "pax": Dialect(tarfile.PAX_FORMAT),
    "webdataset's writer": Dialect(tarfile.PAX_FORMAT, mtime=1_700_000_000.5),
    "pax with long names": Dialect(tarfile.PAX_FORMAT, "ä/" * 70),
}


@dataclass
class Shard:
    """A shard before it is mutated: ``members`` are (name, header, data with padding), in order."""

    members: list[tuple[str, bytes, bytes]]
    samples: dict[str, dict[str, bytes]] = field(default_factory=dict)  # key → suffix → data
    raw: dict[str, bytes] = field(default_factory=dict)  # key → all bytes, up to the last one of data
    renamed: set[str] = field(default_factory=set)  # keys of which a member got another name

    @property
    def data(self) -> bytes:
        whole = b"".join(header + data for _, header, data in self.members)
        return whole + bytes(1024 + -(len(whole) + 1024) % 10240)

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """The offsets of each member's header, of its data and of its end."""
        at, found = 0, []
        for _, header, data in self.members:
            found.append((at, at + len(header), at + len(header) + len(data)))
            at += len(header) + len(data)
        return found


picture = lru_cache(photo)


def sound_shard(name: str, number: int) -> Shard:
    dialect, shard = DIALECTS[name], Shard([])
    for n in range(SAMPLES):
        key, caption = f"{number:02d}{n:03d}", f"A woman walks her dog along the beach, number {n} of {number}"
        uid = f"{number * SAMPLES + n:032x}"
        metadata = {"uid": uid, "caption": caption, "face_bboxes": [[0.1, 0.1, 0.5, 0.5]], "exif": "x" * 500}
        texts = {"json": json.dumps(metadata).encode(), "txt": caption.encode()}
        members = {"jpg": picture(number * SAMPLES + n)} | texts
        raw = b""
        for suffix, data in members.items():
            header = dialect.header(f"{key}.{suffix}", len(data))
            shard.members.append((f"{dialect.folder}{key}.{suffix}", header, data + bytes(-len(data) % 512)))
            raw += header + shard.members[-1][2]
        shard.samples[dialect.folder + key] = members
        shard.raw[dialect.folder + key] = raw[: len(raw) - -len(texts["txt"]) % 512 if n < SAMPLES - 1 else None]
    return shard


# ---- mutations


def place(shard: Shard, dice: random.Random) -> int:
    """The start of a header or of data, a whole block, or any byte."""
    begin, data, end = dice.choice(shard.places)
    return dice.choice((begin, data, dice.randrange(begin, end), dice.randrange(begin, end) // 512 * 512))


def amount(shard: Shard, dice: random.Random) -> int:
    """Some blocks, some bytes, or as many as a few members have."""
    first = dice.randrange(len(shard.places))
    begin, end = shard.places[first][0], shard.places[min(len(shard.places) - 1, first + dice.randrange(4))][2]
    return dice.choice((512 * dice.randrange(1, 8), dice.randrange(1, 5000), end - begin))


def flip(shard: Shard, dice: random.Random) -> bytes:
    data = bytearray(shard.data)
    for _ in range(dice.choice((1, 1, 3, 20))):
        data[place(shard, dice)] ^= 1 << dice.randrange(8)
    return bytes(data)


def lose(shard: Shard, dice: random.Random) -> bytes:
    at = place(shard, dice)
    return shard.data[:at] + shard.data[at + amount(shard, dice) :]


def insert(shard: Shard, dice: random.Random) -> bytes:
    at, size = place(shard, dice), amount(shard, dice)
    return shard.data[:at] + dice.choice((bytes(size), dice.randbytes(size))) + shard.data[at:]


def zero(shard: Shard, dice: random.Random) -> bytes:
    at, size = place(shard, dice), amount(shard, dice)
    return (shard.data[:at] + bytes(size) + shard.data[at + size :])[: len(shard.data)]


def overwrite(shard: Shard, dice: random.Random) -> bytes:
    at, size = place(shard, dice), amount(shard, dice)
    return (shard.data[:at] + dice.randbytes(size) + shard.data[at + size :])[: len(shard.data)]


def cut(shard: Shard, dice: random.Random) -> bytes:
    at = place(shard, dice)
    return shard.data[at:] if dice.random() < 0.2 else shard.data[: max(at, 512)]  # no byte at all fails every stage


def repeat(shard: Shard, dice: random.Random) -> bytes:
    """A part of the shard comes again: right behind itself, or anywhere."""
    at, size = place(shard, dice), amount(shard, dice)
    to = at + size if dice.random() < 0.5 else place(shard, dice)
    return shard.data[:to] + shard.data[at : at + size] + shard.data[to:]


def repeat_samples(shard: Shard, dice: random.Random) -> bytes:
    """Whole samples come several times in a row."""
    parts = []
    for number in range(SAMPLES):
        sample = shard.members[3 * number : 3 * number + 3]
        parts += sample * dice.choice((1, 1, 2, 3))
    return Shard(parts).data


def swap(shard: Shard, dice: random.Random) -> bytes:
    members = list(shard.members)
    for _ in range(dice.choice((1, 2, 4))):
        one, other = dice.randrange(len(members)), dice.randrange(len(members))
        members[one], members[other] = members[other], members[one]
    return Shard(members).data


def checksummed(header: bytes) -> bytes:
    block = bytearray(header[-512:])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return header[:-512] + bytes(block)


def pax_header(record: bytes) -> bytes:
    length = len(record) + 3
    while len(b"%d %s\n" % (length, record)) != length:
        length += 1
    body = b"%d %s\n" % (length, record)
    info = tarfile.TarInfo("PaxHeader")
    info.size, info.type = len(body), tarfile.XHDTYPE
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


FIELDS = {"mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1),
          "magic": (257, 8), "devmajor": (329, 8), "devminor": (337, 8), "prefix": (345, 155)}  # fmt: skip
VALUES = (b"\x03garbage", b"-1", b"0o17", b"\x80", b"\xff" * 12, b"\x81\0\0\1", b"1 2", b"\t7", b"9", b"ustar  ")
RECORDS = (b"size=-5", b"size=1e3", b"size=99999999999999999999", b"size=", b"size=\xef\xbc\x95", b"path=",
           b"path=a\0b.jpg", b"path=x/", b"mtime=never", b"uid=-1", b"GNU.sparse.major=1", b"GNU.sparse.map=1,x",
           b"GNU.sparse.realsize=-1", b"hdrcharset=BINARY", b"comment=hello", b"SCHILY.xattr.user=x")  # fmt: skip


def change_headers(shard: Shard, dice: random.Random) -> bytes:
    """A field of a header, with a checksum that fits."""
    members = list(shard.members)
    for _ in range(dice.choice((1, 1, 3))):
        number = dice.randrange(len(members))
        name, header, data = members[number]
        at, size = FIELDS[dice.choice([*FIELDS])]
        value = dice.choice((*VALUES, dice.randbytes(size), b"%0*o" % (size - 1, dice.randrange(4000))))
        last = bytearray(header[-512:])
        last[at : at + size] = value[:size].ljust(size, b"\0")
        members[number] = name, checksummed(header[:-512] + bytes(last)), data
    return Shard(members).data


def add_pax(shard: Shard, dice: random.Random) -> bytes:
    """An extended header in front of a member, or a global one."""
    members = list(shard.members)
    for _ in range(dice.choice((1, 1, 3))):
        number = dice.randrange(len(members))
        name, header, data = members[number]
        more = pax_header(record := dice.choice(RECORDS))
        if record.startswith(b"path"):
            shard.renamed.add(name.rpartition(".")[0])
        if dice.random() < 0.3:
            more = checksummed(more[:156] + b"g" + more[157:512]) + more[512:]
        members[number] = name, more + header, data
    return Shard(members).data


def store_a_tar(shard: Shard, dice: random.Random) -> bytes:
    """A tar is stored uncompressed as a sample's fourth member, and something is done to what is around it."""
    number = 3 * dice.randrange(1, SAMPLES)
    name, _, _ = shard.members[number - 1]
    stored = sound_shard("gnu", 90 + dice.randrange(3)).data
    info = tarfile.TarInfo(name.rpartition(".")[0] + dice.choice((".tar", ".notes")))
    info.size = len(stored)
    member = (info.name, info.tobuf(tarfile.PAX_FORMAT), stored + bytes(-len(stored) % 512))
    whole = Shard([*shard.members[:number], member, *shard.members[number:]])
    at = sum(len(header) + len(data) for _, header, data in whole.members[: number + 1])
    data = whole.data
    return dice.choice((data, data[:at] + dice.randbytes(512) + data[at + 512 :], data[:at] + bytes(1024) + data[at:]))


MUTATIONS: tuple[Callable[[Shard, random.Random], bytes], ...] = (
    flip, lose, lose, insert, zero, overwrite, cut, repeat, repeat_samples, swap, change_headers, add_pax, store_a_tar,
)  # fmt: skip


@dataclass
class Mutated:
    """What is known of one mutated shard."""

    about: str
    data: bytes
    shard: Shard

    @property
    def sound(self) -> dict[str, dict[str, bytes]]:
        """The sound samples: key → suffix → data."""
        found = {}
        for key, raw in self.shard.raw.items():
            headers = [header for name, header, _ in self.shard.members if name.startswith(f"{key}.")]
            begin = self.data.find(raw)
            if begin >= 0 and min(map(self.data.find, headers)) >= begin and key not in self.shard.renamed:
                found[key] = self.shard.samples[key]
        return found


def mutated(seed: int) -> Mutated:
    dice = random.Random(seed)
    dialect, mutation = [*DIALECTS][seed % len(DIALECTS)], MUTATIONS[seed % len(MUTATIONS)]
    shard = sound_shard(dialect, seed % 4)
    return Mutated(f"seed {seed}, {dialect}, {mutation.__name__}", mutation(shard, dice), shard)


# ---- the stages


@dataclass
class Run:
    """One batch of mutated shards: shard → what is known of it, and what was found to be wrong."""

    root: Path
    shards: dict[str, Mutated]
    wrong: list[str] = field(default_factory=list)

    @property
    def source(self) -> Path:
        return self.root / "shards"

    def stage(self, name: str, *argv: object) -> None:
        code = in_a_thread(script(name), *argv, *FLAGS)
        if code:
            self.wrong.append(f"{name} {argv[-3:]}: exit code {code}")

    def receipts(self, folder: str, stage: str) -> dict[str, dict[str, Any]]:
        paths = (self.root / folder / "_receipts" / stage).glob("*/*.json")
        return {path.stem: json.loads(path.read_bytes()) for path in paths}

    def compare(self, what: str, shard: str, found: dict[str, dict[str, bytes]] | set[str]) -> None:
        """Each sound sample is there, with its bytes."""
        one = self.shards[shard]
        for key, members in one.sound.items():
            if key not in found:
                self.wrong.append(f"{what}, {one.about}: {key[-5:]} is sound and was lost")
            elif isinstance(found, dict) and any(found[key].get(suffix) != data for suffix, data in members.items()):
                self.wrong.append(f"{what}, {one.about}: {key[-5:]} is sound and has other bytes")

    def read(self, what: str, path: Path, kept: int) -> dict[str, dict[str, bytes]]:
        """What readers see of a tar: all of them the same, and as many samples as the receipt says."""
        about = f"{what}, {self.shards[path.stem].about if path.stem in self.shards else path.name}"
        try:
            groups = [as_tarfile_reads(path, mode) for mode in ("r:", "r|*")]
            with open(path, "rb") as file:
                files = ({**one, "__url__": ""} for one in tar_file_iterator(file))
                theirs = [sample["__key__"] for sample in group_by_keys(files)]
        except (tarfile.TarError, ValueError, OSError) as error:
            self.wrong.append(f"{about}: {type(error).__name__}: {error}")
            return {}
        keys = [key for key, _ in groups[0]]
        if groups[0] != groups[1]:
            self.wrong.append(f"{about}: tarfile's modes differ")
        only_links = sum(not members for _, members in groups[0])
        if not len(keys) == kept == len(theirs) + only_links:
            self.wrong.append(f"{about}: the receipt says {kept}, tarfile {len(keys)}, webdataset {len(theirs)}")
        return dict(reversed(groups[0]))


def as_tarfile_reads(path: Path, mode: Any) -> list[tuple[str, dict[str, bytes]]]:
    """(key, suffix → data of plain files) of each sample."""
    found: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(path, mode) as tar:
        for info in tar:
            folder, slash, base = info.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not stem or not dot:
                continue
            key = folder + slash + stem
            if not found or found[-1][0] != key:
                found.append((key, {}))
            if info.isreg():
                file = tar.extractfile(info)
                assert file is not None
                found[-1][1][suffix] = file.read()
    return found


def stage_01(run: Run) -> None:
    folders = ("--input", run.source, "--output", run.root / "01", "--edits", run.root / "01e")
    run.stage("01_filter_noface", *folders, "--detector", "recorded")
    for shard in run.shards:
        path = run.root / "01" / f"{shard}.json"
        names = json.loads(path.read_bytes()) if path.exists() else {}
        run.compare("01", shard, {name.removesuffix(".json") for name in names})


def stage_04(run: Run) -> None:
    run.stage("04_reshard", "--input", run.source, "--index", "--output", run.root / "04", "--verify")
    receipts = run.receipts("04", "04_reshard")
    for shard in run.shards:
        kept = receipts[shard]["counts"]["kept"]
        run.compare("04", shard, run.read("04", run.root / "04" / f"{shard}.tar", kept))
    (run.root / "none").mkdir()
    folders = (str(run.source), str(run.root / "04"), "--edits", str(run.root / "none"))
    if command(["verify", *folders, "--quiet", "--workers", "1"]) != 0:
        run.wrong.append("verify finds faults in what stage 04 made")


def stage_04_regrouped(run: Run) -> None:
    run.stage("04_reshard", "--input", run.source, "--output", run.root / "04r", "--shard_size", 1000, "--verify")
    found: dict[str, dict[str, bytes]] = {}
    for shard, receipt in run.receipts("04r", "04_reshard").items():
        found |= run.read("04 --shard_size", run.root / "04r" / f"{shard}.tar", receipt["counts"]["kept"])
    listed = {key.partition("-")[0]: [] for key in found}  # type: dict[str, list[dict[str, bytes]]]
    for key, members in found.items():
        listed[key.partition("-")[0]].append(members)
    for one in run.shards.values():
        for key, members in one.sound.items():
            if members not in [{s: m.get(s) for s in members} for m in listed.get(key, [])]:
                run.wrong.append(f"04 --shard_size, {one.about}: {key[-5:]} is sound and was lost")


def stage_04_subset(run: Run) -> None:
    uids = [divmod(number, 2**64) for number in range(100 * SAMPLES)]
    np.save(run.root / "keep.npy", np.array(uids, "u8,u8"))
    flags = ("--output", run.root / "04s", "--subset", run.root / "keep.npy", "--verify")
    run.stage("04_reshard", "--input", run.source, *flags)
    receipts = run.receipts("04s", "04_reshard")
    for shard in run.shards:
        if receipts[shard]["status"] == "failed":  # nothing is left of it
            run.compare("04 --subset", shard, {})
            continue
        kept = receipts[shard]["counts"]["kept"] + receipts[shard]["notes"]["copies"]
        run.compare("04 --subset", shard, run.read("04 --subset", run.root / "04s" / f"{shard}.tar", kept))


def stage_05(run: Run) -> None:
    flags = ("--format", "tar", "--batch_size", "32", "--device", "cpu", "--dataloader_num_workers", "1")
    code = in_a_thread(recaption_stub.main, run.source, "-o", run.root / "05", *flags, *FLAGS[:3])
    if code:
        run.wrong.append(f"05: exit code {code}")
    receipts = run.receipts("05", "05_recaption")
    for shard, one in run.shards.items():
        kept = receipts[shard]["counts"]["kept"]
        found = run.read("05", run.root / "05/shards" / f"{shard}.tar", kept) if kept else {}
        for key in one.sound.keys() - found.keys():
            run.wrong.append(f"05, {one.about}: {key[-5:]} is sound and was lost")
        for key, members in one.sound.items():
            if key in found and found[key].get("jpg") != members["jpg"]:
                run.wrong.append(f"05, {one.about}: {key[-5:]} is sound and has another picture")


def stage_06(run: Run) -> None:
    import pyarrow.parquet

    folders = ("--input", run.source, "--output", run.root / "06")
    flags = ("--models", "statistics", "--batch_size", "64", "--nworkers", "1", "--device", "cpu", *FLAGS[:3])
    if code := in_a_thread(script("06_metadata"), *folders, *flags):
        run.wrong.append(f"06: exit code {code}")
    for shard in run.shards:
        path = run.root / "06" / f"{shard}.parquet"
        rows = pyarrow.parquet.read_table(path).to_pylist() if path.exists() else []
        run.compare("06", shard, {row["key"] for row in rows if row.get("status") in (None, "ok", "success")})


def fsck(run: Run) -> None:
    for folder, repaired in ((run.source, run.root / "saved"), (run.root / "saved", None)):
        command(["fsck", str(folder), "--quiet", "--workers", "1", *(("--repair", str(repaired)) if repaired else ())])
    for shard in run.shards:
        path = run.root / "saved" / f"{shard}.tar"
        if path.exists():
            kept = json.loads(path.with_name(f"{shard}.salvage.json").read_bytes())["counts"]["kept"]
            run.compare("fsck", shard, run.read("fsck", path, kept))
        else:  # nothing is wrong with it, or nothing is left of it
            source = run.source / f"{shard}.tar"
            run.compare("fsck, sound", shard, dict(as_tarfile_reads(source, "r:")) if source.stat().st_size else {})


STAGES = (stage_01, stage_04, stage_04_regrouped, stage_04_subset, stage_05, stage_06, fsck)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CURATION_STUB_LOG", str(tmp_path / "stub.log"))
    stub = recaption_stub
    for module, name in ((stub.backends, "load"), (stub.hub_cache, "resolve"), (stub.stage, "Recaption")):
        monkeypatch.setattr(module, name, getattr(module, name))


def through_every_stage(root: Path, seeds: Sequence[int]) -> tuple[list[str], Counter[str]]:
    run = Run(root, {f"{seed:08d}": mutated(seed) for seed in seeds})
    run.source.mkdir(parents=True)
    for shard, one in run.shards.items():
        (run.source / f"{shard}.tar").write_bytes(one.data)
    for stage in STAGES:
        stage(run)
    sound = sum(len(one.sound) for one in run.shards.values())
    return run.wrong, Counter(shards=len(run.shards), samples=len(run.shards) * SAMPLES, sound=sound)


def test_mutated_shards(tmp_path: Path) -> None:
    wrong, tally = through_every_stage(tmp_path, range(39))
    assert not wrong, "\n".join(wrong)
    assert tally["sound"] > 200


@pytest.mark.soak
def test_a_thousand_mutated_shards(tmp_path: Path) -> None:
    wrong, tally = [], Counter[str]()
    for begin in range(10_000, 11_000, LARGEST_BATCH):
        more, counted = through_every_stage(tmp_path / str(begin), range(begin, begin + LARGEST_BATCH))
        wrong += more
        tally += counted
    print(f"seeds 10000 to 10999: {dict(tally)}, {len(wrong)} faults")
    assert not wrong, "\n".join(wrong[:100])
