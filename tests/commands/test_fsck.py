"""``python -m curation fsck``: what is done to a shard is found, nothing crashes, and what is whole is saved."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from curation.__main__ import main
from curation.commands.fsck.shard import REMEDIES, Task, check_shard
from curation.storage.files import fast_digest
from curation.tar.headers import make_header, padded
from curation.tar.samples import TarWriter, read_samples
from tests import EXAMPLES
from tests.pipeline import Undisturbed

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


# ---- the archive and the samples, a fault at a time


def member(name: str, data: bytes = b"x", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


PHOTO = next(iter(read_samples(EXAMPLES / "00000001.tar"))).members["jpg"]
END = bytes(1024)


def sample(key: str, caption: str = "A photo", **members: bytes) -> bytes:
    parts = {"jpg": PHOTO, "txt": caption.encode(), "json": json.dumps({"caption": caption}).encode()} | members
    return b"".join(member(f"{key}.{suffix}", data) for suffix, data in parts.items())


def fsck(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["fsck", str(folder), "--json", "--quiet", "--workers", "1", *more])
    return code, json.loads(capsys.readouterr().out)


def kinds_of(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, set[str]]:
    code, result = fsck(folder, capsys, *more)
    found: dict[str, set[str]] = {}
    for shard in result["findings"].values():
        for finding in shard["findings"]:
            assert finding["remedy"] == REMEDIES[finding["kind"]]
            found.setdefault(finding["kind"], set()).add(finding["key"])
    assert (code, result["sound"]) == ((1, False) if found else (0, True))
    return found


A, B, C, D = (sample(key) for key in "abcd")
BLOCKS = 512
FAULTS: dict[str, tuple[bytes, dict[str, set[str]], list[str]]] = {
    # what stands in the tar; what is found (kind → keys); what is saved
    "sound": (A + B + C + END, {}, []),
    "a folder is no fault": (member("./", b"", type=tarfile.DIRTYPE) + A + B + END, {}, []),
    "cut": (A + C + B[:5000], {"cut_member": {""}, "torn_sample": {"b"}, "missing_end": {""}}, ["a", "c"]),
    "cut in the padding": (A + B + C[:-100], {"missing_end": {""}}, ["a", "b", "c"]),
    "no end": (A + B + C, {"missing_end": {""}}, ["a", "b", "c"]),
    "half an end": (A + B + bytes(512), {"missing_end": {""}}, ["a", "b"]),
    "garbage between samples": (A + b"\xaa" * 1024 + B + END, {"torn_sample": {"@"}, "bad_checksum": {""}}, ["a", "b"]),
    "garbage of odd length": (A + b"\xaa" * 333 + B + END, {"torn_sample": {"@"}, "bad_checksum": {""}}, ["a", "b"]),
    "garbage behind the end": (A + B + END + b"\xaa" * 9999, {"behind_end": {""}}, ["a", "b"]),
    "members behind the end": (A + END + B + END, {"early_end": {""}}, ["a", "b"]),
    "a bad checksum": (A + b"\xff" + B[1:] + C + END, {"torn_sample": {"b"}, "bad_checksum": {""}}, ["a", "c"]),
    "the same key again": (A + B + A + END, {"duplicate_key": {"a"}}, ["a", "b"]),
    "the same member again": (
        A + B + member("b.txt", b"y") + END,
        {"duplicate_member": {"b"}},
        ["a", "b"],
    ),
    "split by another sample": (
        A + member("b.jpg", PHOTO) + C + sample("b")[len(member("b.jpg", PHOTO)) :] + END,
        {"split_sample": {"b"}, "incomplete_sample": {"b"}},
        ["a", "b", "c"],
    ),
    "split by a member without a key": (
        A + member("b.jpg", PHOTO) + member("README") + sample("b")[len(member("b.jpg", PHOTO)) :] + END,
        {"split_sample": {"b"}},
        ["a", "b"],
    ),
    "an orphan": (A + B + member("c.txt") + END, {"incomplete_sample": {"c"}}, ["a", "b"]),
    "no picture": (A + B + member("c.json", b"{}") + member("c.txt") + END, {"incomplete_sample": {"c"}}, ["a", "b"]),
    "a picture that is none": (A + sample("b", jpg=b"<html>") + END, {"undecodable": {"b"}}, ["a"]),
    "half a picture": (A + sample("b", jpg=PHOTO[: len(PHOTO) // 2]) + END, {"undecodable": {"b"}}, ["a"]),
    "an empty picture": (A + sample("b", jpg=b"") + END, {"empty_image": {"b"}}, ["a"]),
    "no JSON": (A + sample("b", json=b"{") + END, {"bad_json": {"b"}}, ["a"]),
    "deep JSON": (A + sample("b", json=b"[" * 100_000) + END, {"bad_json": {"b"}}, ["a"]),
    "json and txt disagree": (A + sample("b", txt=b"other") + END, {"caption_differs": {"b"}}, ["a"]),
    "an overlong key": (A + sample("b" * 252) + END, {"overlong_key": {"b" * 200}}, ["a"]),
    "an overlong path": (A + sample("b/" * 2200 + "b") + END, {"overlong_key": {("b/" * 2200)[:200]}}, ["a"]),
    "a longest key": (A + sample("b" * 250) + END, {}, []),
    "a way out": (A + sample("../b") + sample("/etc/b") + END, {"unsafe_name": {"../b", "/etc/b"}}, ["a"]),
    "a link": (
        A + member("b.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd") + sample("c") + END,
        {"not_a_file": {"b"}, "incomplete_sample": {"b"}},
        ["a", "c"],
    ),
    "eight gigabytes": (
        A + tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT)[:124] + b"77777777777\0" + bytes(376) + C + END,
        {"bad_checksum": {""}, "torn_sample": {"@"}},
        ["a", "c"],
    ),
    "no tar": (b"\xaa" * 5000, {"bad_checksum": {""}, "torn_sample": {"@0"}, "missing_end": {""}}, []),
    "empty": (b"", {"not_a_tar": {""}}, []),
    "zeros": (bytes(10240), {}, []),
    "one byte": (b"\xaa", {"damaged": {""}, "torn_sample": {"@0"}, "missing_end": {""}}, []),
    "a page": (b"<html>Forbidden</html>", {"not_a_tar": {""}}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_the_rest_is_saved(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, expected, saved = FAULTS[name]
    path = tmp_path / "shards" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(data)
    found = kinds_of(path.parent, capsys, "--repair", str(tmp_path / "new"))
    assert {kind: {key[:1] if key.startswith("@") and "@" in keys else key for key in mine}
            for kind, mine in found.items() for keys in [expected.get(kind, set())]} == expected  # fmt: skip
    assert path.read_bytes() == data
    repaired = tmp_path / "new" / "0.tar"
    assert repaired.exists() == bool(expected.keys() - {"not_a_tar"})  # there is nothing to save in what is no tar
    if repaired.exists():
        assert sorted({s.key for s in read_samples(repaired)}) == saved
        assert not tar_complains(repaired)
        assert kinds_of(repaired.parent, capsys) == {}
        raw = raw_samples(repaired)
        assert all(raw[key] == sample(key) for key in saved if name != "the same member again")
        report = json.loads((tmp_path / "new" / "0.salvage.json").read_bytes())
        assert report["counts"]["kept"] == len(saved)
        assert report["counts"]["in"] == len(saved) + sum(report["counts"]["failed"].values())
        assert report["outputs"][0]["digest"] == fast_digest(repaired)
        assert set(report["found"]) == set(expected)
        assert not [p for p in repaired.parent.iterdir() if p.name not in ("0.tar", "0.salvage.json")]


def test_a_sound_real_shard_of_any_format_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kinds_of(EXAMPLES, capsys) == {}
    for name, format in (("1", tarfile.USTAR_FORMAT), ("2", tarfile.GNU_FORMAT), ("3", tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=format) as tar:
            for one in read_samples(EXAMPLES / "00000003.tar"):
                for suffix, data in one.members.items():
                    info = tarfile.TarInfo(f"{'long/' * 18}{one.key}.{suffix}")
                    info.size, info.mtime = len(data), 1.5 if name == "3" else 1
                    tar.addfile(info, io.BytesIO(data))
    assert kinds_of(tmp_path, capsys) == {}


@pytest.fixture
def edited(undisturbed: Undisturbed, tmp_path: Path) -> Path:
    folder = tmp_path / "hybrid"
    shutil.copytree(undisturbed.root / "hybrid", folder)
    for path in folder.glob("*.tar"):
        if path.stem != SHARD:
            path.unlink()
    return folder / f"{SHARD}.tar"


def test_an_edited_sample_with_another_picture(edited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kinds_of(edited.parent, capsys) == {}
    shutil.rmtree(edited.parent / "_receipts")
    assert kinds_of(edited.parent, capsys) == {}
    samples = list(read_samples(edited))
    victim = next(s for s in samples if "curation" in json.loads(s.members["json"]))
    plain = next(s for s in samples if "curation" not in json.loads(s.members["json"]))
    assert "sha256" in json.loads(plain.members["json"])
    victim.members["jpg"] = plain.members["jpg"] = PHOTO  # an original's sha256 is of other bytes: never compared
    with open(edited, "wb") as file:
        writer = TarWriter(file)
        for one in samples:
            for suffix, data in one.members.items():
                writer.add(f"{one.key}.{suffix}", data)
        writer.close()
    for more in ((), ("--no_images",)):
        assert kinds_of(edited.parent, capsys, *more) == {"wrong_sha256": {victim.key}, "wrong_size": {victim.key}}


def picture_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(PHOTO)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
def test_the_picture_of_an_edited_sample_may_have_any_format(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = json.dumps({"caption": "A photo", "sha256": "0" * 64, "curation": {"prompt": "A photo"}}).encode()
    parts = {kind: picture_of(kind), "txt": b"A photo", "json": metadata}
    (tmp_path / "0.tar").write_bytes(b"".join(member(f"a.{end}", data) for end, data in parts.items()) + END)
    for more in ((), ("--no_images",)):
        assert {"wrong_sha256", "wrong_size", "no_provenance"} <= kinds_of(tmp_path, capsys, *more).keys()


def test_a_sample_whose_faces_were_blurred_was_not_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = json.dumps({"caption": "A photo", "curation": {"blur": {"boxes": "recorded"}}}).encode()
    (tmp_path / "0.tar").write_bytes(sample("a", json=metadata) + END)
    assert kinds_of(tmp_path, capsys) == {}


def test_a_receipt_that_says_otherwise(edited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(edited.read_bytes())
    with tarfile.open(edited) as tar:
        data[next(i.offset_data for i in tar if i.name.endswith(".jpg")) + 500] ^= 1
    edited.write_bytes(data)
    assert kinds_of(edited.parent, capsys, "--no_images") == {"wrong_digest": {""}}
    (receipt,) = (edited.parent / "_receipts").glob(f"*/*/{SHARD}.json")
    receipt.write_bytes(receipt.read_bytes().replace(b'"done"', b'"failed"'))
    found = kinds_of(edited.parent, capsys, "--no_images")
    assert found.keys() == {"wrong_digest", "not_done"}


def test_no_images_decodes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(A + sample("b", jpg=b"<html>") + END)
    assert kinds_of(tmp_path, capsys, "--no_images") == {}


# ---- hostile tars


def raw_header(name: bytes, size_field: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(make_header("x", 0))
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size_field.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    return raw_header(b"pax", b"%011o" % len(records), b"x") + records + bytes(-len(records) % 512)


HOSTILE = {
    "8 GB, octal": raw_header(b"b.jpg", b"77777777777"),
    "2^90 bytes": raw_header(b"b.jpg", b"\x80" + (1 << 86).to_bytes(11, "big")),
    "a negative size": raw_header(b"b.jpg", b"\xff" * 12),
    "pax size": pax(b"24 size=99999999999999\n") + raw_header(b"b.jpg", b"0"),
    "a pax header of a gigabyte": raw_header(b"pax", b"%011o" % (1 << 30), b"x"),
    "a pax bomb": pax(b"999999999 path=x\n"),
    "pax headers without end": pax(b"12 path=abc\n") * 5000 + D,
    "long names without end": (raw_header(b"long", b"%011o" % 512, b"L") + b"n" * 512) * 5000 + D,
    "a name of a megabyte": raw_header(b"l", b"%011o" % (1 << 20), b"L") + b"n" * (1 << 20) + raw_header(b"b.jpg", b""),
    "sparse": raw_header(b"b.jpg", b"%011o" % 512, b"S") + bytes(512),
    "pax sparse": pax(b"22 GNU.sparse.major=1\n") + raw_header(b"b.jpg", b"%011o" % 512) + bytes(512),
    "a hard link to itself": member("b.jpg", b"", type=tarfile.LNKTYPE, linkname="b.jpg"),
    "a device": member("b.jpg", b"", type=tarfile.CHRTYPE),
    "an absolute name": sample("/root/b"),
    "a name of dots": sample("../../b"),
    "control characters": sample("\x1b[2J\x07", jpg=b""),
    "a tar in a picture": sample("b", jpg=A + B + END),
    "magic without headers": b"ustar" * 100_000,
    "headers within headers": b"".join(raw_header(b"b%d.jpg" % n, b"%011o" % ((400 - n) * 512)) for n in range(400)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_neither_crash_nor_pass(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars" / "0.tar"
    path.write_bytes(A + HOSTILE[name] + C + END)
    began = time.process_time()
    found = kinds_of(path.parent, capsys, "--repair", str(tmp_path / "new"))
    assert found
    assert time.process_time() - began < 20
    assert not any("\x1b" in key for keys in found.values() for key in keys)
    repaired = tmp_path / "new" / "0.tar"
    raw = raw_samples(repaired)
    assert (raw["a"], raw["c"]) == (A, C)
    assert not tar_complains(repaired)
    assert kinds_of(repaired.parent, capsys) == {}
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"0.tar", "0.salvage.json"}


# ---- what is asked of every command


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tars" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(A + END)
    (tmp_path / "file").write_text("")
    assert main(["fsck", str(tmp_path / "none")]) == 2
    assert main(["fsck", str(path), "--repair", str(path.parent)]) == 2
    assert main(["fsck", str(path), "--repair", str(tmp_path / "file")]) == 2
    assert main(["fsck", str(path), "--workers", "0"]) == 2
    assert main(["fsck", str(path), "--shards", "7"]) == 2
    assert "there is no shard '7'" in capsys.readouterr().err


def test_the_text_form_and_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.tar").write_bytes(A + (B[: 700 * number] if number else B) + END)
    assert main(["fsck", str(folder), "--quiet", "--workers", "2", "--repair", str(tmp_path / "new")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("FAULTY: ")
    assert "repaired: 2 samples of 2 shards in" in out[-2]
    assert any(line.startswith("fix for torn_sample (2): --repair DIR") for line in out)
    assert main(["fsck", str(folder / "0.tar"), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("OK: 1 shards, 2 samples, ")
    (folder / "0.tar").chmod(0)
    if not os.access(folder / "0.tar", os.R_OK):
        assert kinds_of(folder / "0.tar", capsys) == {"unreadable": {""}}


def test_findings_are_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(A + b"".join(sample(f"k{n}", txt=b"?") for n in range(60)) + END)
    code, result = fsck(tmp_path, capsys)
    assert code == 1
    shard = result["findings"]["0"]
    assert shard["counts"]["caption_differs"] == 60
    assert len([f for f in shard["findings"] if f["kind"] == "caption_differs"]) == 5


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["22.05", "22.06", "Track 2.0 (Clean)"], {"cut_key": 2}),
        (["000.input", "001.input"], {"cut_key": 2}),
    ],
)
def test_pictures_that_readers_do_not_see_are_told(
    names: list[str], kinds: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key ends at the first dot: 22.05.jpg is member 05.jpg of sample 22."""
    write_plainly(tmp_path / "0.tar", [f"{name}.{suffix}" for name in names for suffix in ("jpg", "txt")])
    for images in ([], ["--no_images"]):
        assert main(["fsck", str(tmp_path), "--quiet", *images]) == 1
        out = capsys.readouterr().out
        assert f"fix for cut_key ({kinds['cut_key']}): rename its members" in out
        assert "SOUND" not in out
    assert check_shard(Task(tmp_path / "0.tar", "0", True, None)).findings.counts == kinds


@pytest.mark.parametrize("names", [["000.txt", "000.json", "001.txt"], ["000.mp4", "000.txt"], ["a", "b"]])
def test_a_shard_in_which_no_sample_has_a_picture(names: list[str], tmp_path: Path) -> None:
    write_plainly(tmp_path / "0.tar", names)
    found = check_shard(Task(tmp_path / "0.tar", "0", False, None)).findings
    assert found.counts["no_picture"] == 1
    assert names[0] in next(one.detail for one in found.kept if one.kind == "no_picture")


def test_further_pictures_of_a_sample_are_no_fault(tmp_path: Path) -> None:
    write_plainly(tmp_path / "0.tar", ["000.jpg", "000.mask.png", "000.txt", "001.jpg", "001.mask.png", "001.txt"])
    assert not check_shard(Task(tmp_path / "0.tar", "0", False, None)).findings


def write_plainly(path: Path, names: list[str]) -> None:
    picture = next(bytes(s.members["jpg"]) for s in read_samples(EXAMPLES / "00000000.tar", want=("jpg",)))
    with path.open("wb") as file:
        writer = TarWriter(file)
        for name in names:
            writer.add(name, picture if name.endswith(".jpg") else b"{}" if name.endswith(".json") else b"a dog")
        writer.close()
