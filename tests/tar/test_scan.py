"""Tar: the same members as Python's tarfile and GNU tar see, every damaged shard read for what is left of it."""

from __future__ import annotations

import gc
import io
import os
import random
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curation.errors import SampleError, ShardError
from curation.storage.files import AtomicFile
from curation.tar import blocks
from curation.tar.blocks import Block
from curation.tar.headers import (
    BLOCK,
    RECORD,
    BadHeader,
    make_header,
    parse_header,
    parse_member,
    parse_pax,
    split_name,
)
from curation.tar.prove import prove_splice, verify_splice
from curation.tar.samples import Sample, TarWriter, is_safe_name, read_samples
from curation.tar.scan import TOGETHER, SampleSpan, TarReport, TarScan, Window
from curation.tar.splice import Action, decided, splice
from tests import EXAMPLES

QUICK = settings(max_examples=60)
TRIPLE = ("jpg", "json", "txt")


@pytest.fixture(params=[None, 16 << 10], ids=["as it is", "small windows"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, and once with windows so small that everything happens at their edges."""
    if request.param:
        monkeypatch.setattr(blocks, "READ_BYTES", 4096)
        monkeypatch.setattr(blocks, "MAX_KEPT_BYTES", request.param)
        monkeypatch.setattr(blocks, "_REREAD_BYTES", 3000)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "READ_BYTES", 4096)
    monkeypatch.setattr(blocks, "MAX_KEPT_BYTES", 16 << 10)
    monkeypatch.setattr(blocks, "_REREAD_BYTES", 3000)


def tar_of(
    members: Iterable[tuple[str, bytes]],
    format: int = tarfile.GNU_FORMAT,
) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def triples(count: int, size: int = 900, seed: int = 0) -> bytes:
    """A shard of samples with jpg, json and txt."""
    dice = random.Random(seed)
    return tar_of(
        (f"{n:06d}.{suffix}", dice.randbytes(dice.randrange(size))) for n in range(count) for suffix in TRIPLE
    )


def read(data: bytes, tmp_path: Path, **options: object) -> tuple[list[Sample], TarReport]:
    path, report = tmp_path / "shard.tar", TarReport()
    path.write_bytes(data)
    return list(read_samples(path, report=report, **options)), report  # type: ignore[arg-type]


def spans_of(path: Path) -> list[SampleSpan]:
    return [span for window in TarScan(path).windows() for span in window.spans]


def members_of(path: Path) -> list[tuple[str, bytes]]:
    """Every member of a pass in the file's order, by name and bytes."""
    found = []
    for window in TarScan(path).windows():
        for span in window.spans:
            for member in sorted((*span.members, *span.foreign), key=lambda member: member.start):
                found.append((member.text_name, window.read(member.data, member.size)))
    return found


def as_tarfile_sees(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read() if m.isreg() and m.size else b"") for m in tar]  # type: ignore[union-attr]


# ---- the same as tarfile


part = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
names = st.lists(part.filter(lambda p: p not in (".", "..")), min_size=1, max_size=8).map("/".join)


@QUICK
@given(
    members=st.lists(st.tuples(names, st.binary(max_size=3000)), max_size=12, unique_by=lambda member: member[0]),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@example(members=[("a" * 250 + "/" + "b" * 250 + ".jpg", b"x")], format=tarfile.GNU_FORMAT)
@example(members=[("ü" * 120 + ".jpg", b"x")], format=tarfile.PAX_FORMAT)
def test_members_are_those_of_tarfile(
    windows: None, tmp_path: Path, members: list[tuple[str, bytes]], format: int
) -> None:
    if format == tarfile.USTAR_FORMAT:
        members = [(name, data) for name, data in members if len(name.encode()) <= 100]
    path = tmp_path / "shard.tar"
    path.write_bytes(tar_of(members, format))
    assert members_of(path) == as_tarfile_sees(path) == members


@pytest.mark.parametrize("tar", sorted(EXAMPLES.glob("*.tar")), ids=lambda path: path.name)
def test_example_shards_read_as_tarfile_reads_them(windows: None, tar: Path) -> None:
    report = TarReport()
    ours = [(s.key, suffix, data) for s in read_samples(tar, report=report) for suffix, data in s.members.items()]
    assert ours == [(*name.split(".", 1), data) for name, data in as_tarfile_sees(tar)]
    assert report.warnings() == []


@QUICK
@given(members=st.lists(st.tuples(names, st.binary(max_size=2000), st.integers(-5, 1 << 40)), max_size=10))
@example(members=[("a" * 100, b"", 0), ("a" * 101, b"", 0), ("b" * 155 + "/" + "c" * 100, b"1", 1)])
def test_tarfile_reads_what_is_written(members: list[tuple[str, bytes, int]]) -> None:
    file = io.BytesIO()
    writer = TarWriter(file)
    for name, data, mtime in members:
        writer.add(name, data, mtime)
    writer.close()
    assert len(file.getvalue()) % RECORD == 0
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        for (name, data, mtime), info in zip(members, tar, strict=True):
            assert (info.name, info.size, info.mode, info.uid) == (name, len(data), 0o644, 0)
            assert info.mtime == min(max(mtime, 0), 0o77777777777)
            assert not data or tar.extractfile(info).read() == data  # type: ignore[union-attr]


def test_gnu_tar_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    expected = ["a.txt", "ü/b.txt", "c" * 90 + "/" + "d" * 90 + ".jpg", "long" * 60 + ".json"]
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for name in expected:
            writer.add(name, b"data of it")
        writer.close()
    command = ["tar", "--list", "--quoting-style=literal", "--file", str(path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode().splitlines() == expected


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000])
def test_impossible_names_are_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        make_header(name, 1)


def test_sizes_beyond_the_octal_field_are_written_and_read() -> None:
    header = make_header("big.jpg", 9 << 30)
    info = tarfile.TarInfo.frombuf(header[2 * BLOCK :], "utf-8", "strict")
    assert (info.name, info.size) == ("big.jpg", 0)  # the size stands in the pax header in front
    assert parse_pax(header[BLOCK : BLOCK + 20])["size"] == b"%d" % (9 << 30)


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_files_links_folders_and_devices_of_gnu_tar(windows: None, tmp_path: Path, format: str) -> None:
    """Foreign members are passed over at their true length, whatever comes behind them is found."""
    tree = tmp_path / "tree"
    tree.mkdir()
    with open(tree / "a.bin", "wb") as file:
        for offset in range(0, 40 << 16, 1 << 16):  # more holes than fit into one header
            file.seek(offset)
            file.write(b"island")
        file.truncate(5 << 20)
    (tree / "b.jpg").write_bytes(b"picture")
    os.symlink("b.jpg", tree / "c.jpg")
    os.link(tree / "b.jpg", tree / "d.jpg")
    os.mkfifo(tree / "e.jpg")
    (tree / "f.dir").mkdir()
    (tree / "g.txt").write_bytes(b"end")
    path = tmp_path / "shard.tar"
    command = [
        "tar",
        f"--format={format}",
        "--sparse",
        "--sort=name",
        "--create",
        "--file",
        str(path),
        "-C",
        str(tree),
        ".",
    ]
    subprocess.run(command, check=True, capture_output=True)
    report = TarReport()
    samples = {sample.key: sample for sample in read_samples(path, report=report)}
    assert list(samples) == ["./a", "./b", "./c", "./d", "./e", "./g"]
    assert report.warnings() == []
    assert samples["./b"].members == {"jpg": b"picture"}
    assert samples["./g"].members == {"txt": b"end"}
    for key in ("./a", "./c", "./d", "./e"):
        with pytest.raises(SampleError, match="not_a_file"):
            samples[key].check()


def test_global_pax_headers_belong_to_no_sample(tmp_path: Path) -> None:
    """As git archive begins its tars."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "abc"}) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    path = tmp_path / "shard.tar"
    path.write_bytes(file.getvalue())
    (lead, sample) = spans_of(path)
    assert (lead.key, len(lead.foreign), sample.key, sample.start) == ("", 1, "a", lead.end)


# ---- headers of other kinds


def checksummed(header: bytearray, signed: bool = False) -> bytes:
    header[148:156] = b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in header)
    header[148:156] = b"%06o\0 " % total
    return bytes(header)


def test_old_and_odd_headers_are_read() -> None:
    plain = bytearray(make_header("a.txt", 10, 99))
    v7 = plain.copy()
    v7[156:157], v7[257:265] = b"\0", bytes(8)
    spaces = plain.copy()
    spaces[124:136] = b"         12 "
    base_256 = plain.copy()
    base_256[124:136] = b"\x80" + (10).to_bytes(11, "big")
    twelve_digits = plain.copy()
    twelve_digits[124:136] = b"000000000012"
    for header in (plain, v7, spaces, base_256, twelve_digits):
        name, size, _, _ = parse_header(bytearray(checksummed(header)), 0)
        assert (name, size) == (b"a.txt", 10)
    signed = plain.copy()
    signed[0:6] = "ü.txt".encode()
    for flag in (False, True):
        assert parse_header(bytearray(checksummed(signed, flag)), 0)[0] == "ü.txt".encode()


@pytest.mark.parametrize("size", [b"\xff" + b"\xff" * 11, b"-0000000012\0", b"12345678xyz\0"])
def test_sizes_that_make_no_sense_are_no_headers(size: bytes) -> None:
    header = bytearray(make_header("a.txt", 10))
    header[124:136] = size
    with pytest.raises(BadHeader):
        parse_header(bytearray(checksummed(header)), 0)


@pytest.mark.parametrize("at", [0, 99, 100, 130, 140, 156, 200, 345, 511])
def test_a_changed_byte_is_noticed(at: int) -> None:
    header = bytearray(make_header("some/name.jpg", 12345, 1_700_000_000))
    header[at] ^= 0x10
    with pytest.raises(BadHeader):
        parse_header(header, 0)


@pytest.mark.parametrize(
    "data", [b"12 a=b", b"x a=b\n", b"0 \n", b"7 abc\n\n", b"999 a=b\n", b"5 =\n", b" 6 a=b\n", b"99999999999 a=b\n"]
)
def test_malformed_pax_headers_are_refused(data: bytes) -> None:
    with pytest.raises(BadHeader):
        parse_pax(data)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("000.jpg", ("000", "jpg")),
        ("a.b/000.seg.PNG", ("a.b/000", "seg.PNG")),
        ("./000.jpg", ("./000", "jpg")),
        ("000.", ("000", "")),
        ("noext", None),
        ("folder/", None),
        ("", None),
    ],
)
def test_keys_are_cut_as_webdataset_cuts_them(name: str, split: tuple[str, str] | None) -> None:
    from webdataset.tariterators import base_plus_ext

    found = split_name(name.encode())
    assert (tuple(text.decode() for text in found) if found else None) == split
    theirs = base_plus_ext(name)
    assert theirs == (split or (None, None))


def test_hidden_files_are_no_samples() -> None:
    """WebDataset gives them the key of their folder; they are leftovers of somebody's desktop."""
    assert split_name(b"a/.DS_Store") is split_name(b"a/._000.jpg") is split_name(b".jpg") is None


# ---- what is asked for


def test_only_wanted_members_are_loaded(tmp_path: Path) -> None:
    data = tar_of([("1.JPG", b"j"), ("1.txt", b"t"), ("1.json", b"{}")])
    for want in ({"json", "txt"}, ["json", "txt"], lambda suffix: suffix != "jpg"):
        ((sample,), _) = read(data, tmp_path, want=want)
        assert sample.members == {"txt": b"t", "json": b"{}"}
        assert sample.suffixes == ("jpg", "txt", "json")
        assert sample.image_suffix == "jpg"
        assert sample.mtimes == {"txt": 1_700_000_000, "json": 1_700_000_000}


def test_members_beyond_the_bound_are_not_loaded(tmp_path: Path) -> None:
    ((large, small), _) = read(tar_of([("1.jpg", b"x" * 2000), ("2.jpg", b"x")]), tmp_path, max_member_bytes=1000)
    assert large.members == {}
    with pytest.raises(SampleError, match=r"member_too_large: 1\.jpg: 2,000 bytes"):
        large.check()
    small.check()


def test_members_far_larger_than_the_window(small_windows: None, tmp_path: Path) -> None:
    """Skipped when nobody wants them, read again when somebody does."""
    dice = random.Random(1)
    members = [(f"{n}.{s}", dice.randbytes(size)) for n in range(3) for s, size in (("jpg", 100_000), ("txt", 10))]
    data = tar_of(members)
    samples, _ = read(data, tmp_path)
    assert [(f"{s.key}.{suffix}", d) for s in samples for suffix, d in s.members.items()] == members
    samples, _ = read(data, tmp_path, want={"txt"})
    assert [s.members for s in samples] == [{"txt": members[i][1]} for i in (1, 3, 5)]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        (["../x.jpg"], "unsafe_name"),
        (["a/../../x.jpg"], "unsafe_name"),
        (["/etc/x.jpg"], "unsafe_name"),
        (["k.jpg", "k.txt", "k.jpg"], "duplicate_member"),
        (["k.jpg", "k.JPG"], "duplicate_member"),
        (["a" * 300 + ".jpg"], "unsafe_name"),
    ],
)
def test_samples_that_must_not_be_used(tmp_path: Path, members: list[str], problem: str) -> None:
    ((sample,), _) = read(tar_of((name, b"x") for name in members), tmp_path)
    assert sample.problem is not None
    assert sample.problem[0] == problem


def test_a_nul_in_a_pax_name_is_unsafe(tmp_path: Path) -> None:
    body = b"15 path=a\0b.jpg\n"
    body = b"%d%s" % (len(body), body[2:])
    header = bytearray(make_header("x", len(body)))
    header[156:157] = b"x"
    data = checksummed(header) + body + bytes(-len(body) % BLOCK) + make_header("x.jpg", 0) + bytes(2 * BLOCK)
    ((sample,), _) = read(data, tmp_path)
    assert (sample.key, sample.problem and sample.problem[0]) == ("a\0b", "unsafe_name")


def test_repeated_keys_are_told(tmp_path: Path) -> None:
    samples, report = read(tar_of((f"{key}.txt", b"x") for key in "abcab"), tmp_path)
    assert [sample.problem is None for sample in samples] == [True, True, True, False, False]
    assert samples[3].problem == ("duplicate_key", f"an earlier sample of the shard has the same key; {TOGETHER}")
    assert report.repeated_keys == 2
    assert report.warnings() == [f"{tmp_path}/shard.tar: 2 samples have the key of an earlier one; {TOGETHER}"]
    assert "fsck TARS --repair" in TOGETHER


def test_safe_names() -> None:
    assert all(map(is_safe_name, ["a", "a/b", "./a", "a..b", "..a", "ü" * 90]))
    assert not any(map(is_safe_name, ["", "/a", "../a", "a/..", "a\0", "x" * 300, "a/" * 3000]))


# ---- damage


def sound(samples: list[Sample]) -> dict[str, dict[str, bytes]]:
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample.members for sample in samples if sample.problem is None}


def test_every_cut_leaves_what_is_whole(windows: None, tmp_path: Path) -> None:
    data = triples(4)
    path = tmp_path / "whole.tar"
    path.write_bytes(data)
    spans = spans_of(path)
    whole, _ = read(data, tmp_path)
    members = [member for span in spans for member in span.members]
    for cut in [
        *range(37, spans[-1].end + 3 * BLOCK, 37),  # no byte, or a few letters of a name, are no tar
        *(m.start for m in members[1:]),
        *(m.data + m.size for m in members),
    ]:
        samples, report = read(data[:cut], tmp_path)
        complete = [span.key for span in spans if span.members[-1].data + span.members[-1].size <= cut]
        assert sound(samples) == {s.key: s.members for s in whole if s.key in complete}, cut
        begun = [span for span in spans if span.start + BLOCK <= cut and span.key not in complete]
        assert len(samples) - len(complete) >= len(begun), cut
        assert report.missing_end == (cut < spans[-1].end + BLOCK), cut
        report.odd_texts = 0  # the members are random bytes
        assert bool(report.warnings()) == report.missing_end


def test_a_cut_names_the_member_and_what_is_missing(tmp_path: Path) -> None:
    data = tar_of([("1.jpg", b"x" * 600), ("1.txt", b"y" * 600)])
    ((sample,), report) = read(data[:2100], tmp_path)
    assert sample.problem == ("damaged_tar", "'1.txt' is cut: 548 of its bytes are missing")
    assert report.warnings() == [
        f"{tmp_path}/shard.tar: damage at byte 1,536 (564 bytes): '1.txt' is cut: 548 of its bytes are missing",
        f"{tmp_path}/shard.tar: no end-of-archive blocks; read to its last whole member",
    ]


def test_without_end_of_archive_all_members_are_there(tmp_path: Path) -> None:
    data = triples(3)
    end = len(data.rstrip(b"\0")) + -len(data.rstrip(b"\0")) % BLOCK
    samples, report = read(data[:end], tmp_path)
    assert len(sound(samples)) == 3
    assert report.missing_end
    assert not report.damages


@pytest.mark.parametrize("kind", ["overwritten", "zeroed", "inserted", "deleted"])
def test_garbage_in_the_middle_costs_what_it_hits(windows: None, tmp_path: Path, kind: str) -> None:
    data = triples(12, 2000)
    path = tmp_path / "whole.tar"
    path.write_bytes(data)
    spans = spans_of(path)
    whole, _ = read(data, tmp_path)
    dice = random.Random(kind)
    for _ in range(60):
        begin = dice.randrange(spans[-1].start)
        length = dice.randrange(1, 6000)
        changed, end = damaged(data, kind, begin, length, dice)
        samples, report = read(changed, tmp_path)
        untouched = {span.key for span in spans if span.end <= begin or span.start >= end}
        found = sound(samples)
        for sample in whole:
            if sample.key in untouched:
                assert found.get(sample.key) == sample.members, (kind, begin, length, sample.key)
        assert report.samples == len(samples)
        if any(sample.problem for sample in samples):
            assert report.damages or report.gaps


def damaged(data: bytes, kind: str, begin: int, length: int, dice: random.Random) -> tuple[bytes, int]:
    """The damaged tar, and the offset in the old one behind which its samples are as they were."""
    after = begin + length
    if kind == "overwritten":
        return data[:begin] + dice.randbytes(len(data[begin:after])) + data[after:], after
    if kind == "zeroed":
        return data[:begin] + bytes(len(data[begin:after])) + data[after:], after
    if kind == "inserted":
        return data[:begin] + dice.randbytes(length) + data[begin:], begin
    return data[:begin] + data[after:], after


def test_a_lost_header_is_a_lost_sample(tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    path.write_bytes(triples(3, 300))
    member = spans_of(path)[1].members[0]
    data = bytearray(path.read_bytes())
    data[member.start + 20] ^= 1
    samples, report = read(bytes(data), tmp_path)
    assert [(s.key, s.problem and s.problem[0]) for s in samples] == [
        ("000000", None),
        ("000001", "damaged_tar"),
        ("000002", None),
    ]
    assert [(damage.offset, damage.length) for damage in report.damages] == [(member.start, member.end - member.start)]


def test_damage_between_whole_samples_is_counted_as_one(tmp_path: Path) -> None:
    data = triples(3, 300)
    path = tmp_path / "whole.tar"
    path.write_bytes(data)
    cut = spans_of(path)[1].start
    samples, report = read(data[:cut] + b"\xaa" * 700 + data[cut:], tmp_path)
    assert [s.key for s in samples if s.problem is None] == ["000000", "000001", "000002"]
    assert [(s.key, s.problem) for s in samples if s.problem] == [
        (f"@{cut}", ("damaged_tar", "no header where one is due: its checksum does not fit"))
    ]
    assert report.samples == 4


def test_two_archives_in_one_file_are_read_on(tmp_path: Path) -> None:
    """As `cat a.tar b.tar` makes them: their keys differ here."""
    first, second = tar_of([("1.txt", b"x")]), tar_of([("2.txt", b"y")])
    samples, report = read(first + second, tmp_path)
    assert list(sound(samples)) == ["1", "2"]
    assert report.gaps == [1024]
    assert "members behind it" in report.warnings()[0]


def test_junk_behind_the_end_is_no_sample(tmp_path: Path) -> None:
    samples, report = read(tar_of([("1.txt", b"x")]) + b"junk" * 1000, tmp_path)
    assert list(sound(samples)) == ["1"]
    assert report.samples == 1
    assert not report.missing_end
    assert "behind the end of the archive" in report.warnings()[0]


def test_a_long_end_is_suspicious(tmp_path: Path) -> None:
    _, report = read(tar_of([("1.txt", b"x")]) + bytes(100_000), tmp_path)
    assert "were there members once?" in report.warnings()[0]


@pytest.mark.parametrize("data", [bytes(BLOCK), bytes(RECORD)], ids=["a block", "a record"])
def test_empty_tars_have_no_samples(tmp_path: Path, data: bytes) -> None:
    samples, report = read(data, tmp_path)
    assert samples == []
    assert report.samples == 0
    assert not report.missing_end


@pytest.mark.parametrize("data", [b"\xaa", b"\x1f\x8c" + b"compressed" * 200, random.Random(0).randbytes(50_000)])
def test_what_could_be_a_damaged_tar_is_one_damaged_sample(tmp_path: Path, data: bytes) -> None:
    ((sample,), report) = read(data, tmp_path)
    assert (sample.key, sample.problem and sample.problem[0]) == ("@0", "damaged_tar")
    assert report.damages[0].length == len(data)


@QUICK
@given(data=st.data())
def test_nothing_crashes_a_pass_or_holds_it(small_windows: None, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed, with checksums mended half of the time, so that hostile fields get through."""
    members = [("a.jpg", b"1" * 700), ("n" * 150 + ".txt", b"2"), ("ü" * 80 + ".json", b"{}"), ("b.jpg", b"3")]
    shard = bytearray(tar_of(members, data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(shard) - 1))
        new = data.draw(
            st.sampled_from([b"\0", b"\xff", b"\x80", b"7", b"L", b"x", b"S", b"g"]) | st.binary(max_size=20)
        )
        shard[at : at + len(new)] = new
        block = at - at % BLOCK
        if data.draw(st.booleans()) and len(shard) >= block + BLOCK:
            shard[block : block + BLOCK] = checksummed(shard[block : block + BLOCK])
    samples, report = read(bytes(shard), tmp_path)
    assert len(samples) == report.samples < 50
    report.warnings()


def test_endless_extensions_are_refused(tmp_path: Path) -> None:
    """Headers for headers for headers: no more than a megabyte of them for a member."""
    link = bytearray(make_header("x", 3))
    link[156:157] = b"L"
    data = (checksummed(link) + b"abc".ljust(BLOCK, b"\0")) * 3000 + make_header("a.txt", 0) + bytes(1024)
    samples, report = read(data, tmp_path)
    assert report.damages
    assert samples


def test_a_huge_extension_is_refused(tmp_path: Path) -> None:
    link = bytearray(make_header("x", 5 << 20))
    link[156:157] = b"x"
    data = checksummed(link) + b"1" * (5 << 20) + triples(2)
    samples, report = read(data, tmp_path)
    assert list(sound(samples)) == ["000000", "000001"]
    assert "extended header" in report.damages[0].detail


# ---- the file


@pytest.mark.parametrize("path", ["absent.tar", "."])
def test_files_that_cannot_be_read(tmp_path: Path, path: str) -> None:
    with pytest.raises(ShardError, match=r"cannot be read"):
        list(read_samples(tmp_path / path))


def test_a_file_that_shrinks_under_the_reader(tmp_path: Path, small_windows: None) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(triples(200))
    report = TarReport()
    samples = read_samples(path, report=report)
    keys = [next(samples).key]
    os.truncate(path, 20_000)
    keys += [sample.key for sample in samples if sample.problem is None]
    assert 1 < len(keys) < 200
    assert report.missing_end


def test_a_pass_that_is_given_up_leaves_no_thread(tmp_path: Path, small_windows: None) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(triples(200))
    before = threading.active_count()
    samples = read_samples(path)
    next(samples)
    assert threading.active_count() == before + 1
    samples.close()  # type: ignore[attr-defined]
    gc.collect()
    assert threading.active_count() == before


def test_a_process_that_ends_in_mid_pass_ends(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(triples(3000, 3000))
    code = "import sys; from curation.tar.scan import TarScan; w = TarScan(sys.argv[1]).windows(); next(w); sys.exit(3)"
    command = [sys.executable, "-c", code, str(path)]
    assert subprocess.run(command, cwd=EXAMPLES.parent.parent, timeout=30, check=False).returncode == 3


def test_a_pass_leaves_no_memory_to_the_collector() -> None:
    """Else each shard would leave its buffers behind until the collector of cycles happens to run."""
    shard = Path(__file__).resolve().parents[2] / "examples" / "shards" / "00000000.tar"
    gc.collect()
    gc.disable()
    try:
        assert sum(1 for _ in read_samples(shard)) > 0
        assert not [found for found in gc.get_objects() if isinstance(found, blocks.Blocks)]
    finally:
        gc.enable()


# ---- what readers read


def altered(name: str, size: int, at: int, value: bytes) -> bytes:
    """A plain header with other bytes in one field, and a checksum that fits."""
    header = bytearray(make_header(name, size, 1_700_000_000))
    header[at : at + len(value)] = value
    return checksummed(header)


def pax_record(record: bytes, kind: bytes = b"x") -> bytes:
    length = len(record) + 3
    while len(b"%d %s\n" % (length, record)) != length:
        length += 1
    body = b"%d %s\n" % (length, record)
    header = bytearray(make_header("PaxHeader", len(body)))
    header[156:157] = kind
    return checksummed(header) + body + bytes(-len(body) % BLOCK)


def plain_member(name: str, data: bytes) -> bytes:
    return make_header(name, len(data), 1_700_000_000) + data + bytes(-len(data) % BLOCK)


def a_sample(key: str) -> bytes:
    return b"".join(plain_member(f"{key}.{suffix}", f"{key} {suffix} ".encode() * 90) for suffix in TRIPLE)


END = bytes(10240)
BODY = b"001 json " * 90
ODD = {
    "a group that is no number": altered("001.json", len(BODY), 116, b"\x03garbage"),
    "a mode in an unknown base": altered("001.json", len(BODY), 100, b"\x81\0\0\0\0\0\0\1"),
    "a time that is no number": altered("001.json", len(BODY), 136, b"never\0\0\0\0\0\0\0"),
    "a device that is no number": altered("001.json", len(BODY), 329, b"99999999"),
    "times where ustar has a prefix": altered("001.json", len(BODY), 257, b"ustar  \0" + bytes(80) + b"14000000000\0"),
    "a negative pax size": pax_record(b"size=-5") + make_header("001.json", len(BODY)),
    "a pax size with an exponent": pax_record(b"size=1e3") + make_header("001.json", len(BODY)),
    "a pax size in other digits": pax_record("size=５".encode()) + make_header("001.json", len(BODY)),
    "an empty pax size": pax_record(b"size=") + make_header("001.json", len(BODY)),
    "a global size": pax_record(b"size=3", b"g") + make_header("001.json", len(BODY)),
    "a global name": pax_record(b"path=all.jpg", b"g") + make_header("001.json", len(BODY)),
    "a sparse file without a map": pax_record(b"GNU.sparse.major=1") + make_header("001.json", len(BODY)),
    "a sparse file with a bad map": pax_record(b"GNU.sparse.map=1,x") + make_header("001.json", len(BODY)),
    "a sparse file of a negative size": pax_record(b"GNU.sparse.realsize=-1") + make_header("001.json", len(BODY)),
}


def copied(path: Path) -> tuple[Path, TarReport]:
    report, target = TarReport(), path.with_name("copy.tar")
    with AtomicFile(target, "token") as file:
        splice(decided(TarScan(path, report), lambda span: Action.DROP if span.torn else Action.KEEP), file)
    file.move_into_place()
    verify_splice(decided(TarScan(path), lambda span: Action.DROP if span.torn else Action.KEEP), target, "source")
    return target, report


@pytest.mark.parametrize("what", ODD)
def test_a_header_that_readers_take_differently_is_written_anew(what: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    json = ODD[what] + BODY + bytes(-len(BODY) % BLOCK)
    rest = [plain_member(f"001.{suffix}", f"001 {suffix} ".encode() * 90) for suffix in ("jpg", "txt")]
    path.write_bytes(a_sample("000") + rest[0] + json + rest[1] + a_sample("002") + END)
    target, report = copied(path)
    expected = {f"00{n}.{suffix}": f"00{n} {suffix} ".encode() * 90 for n in range(3) for suffix in TRIPLE}
    assert dict(as_tarfile_sees(target)) == expected
    assert report.odd_headers or report.damages
    assert report.warnings()
    data = target.read_bytes()
    assert data.startswith(a_sample("000")), "sound samples stay byte for byte"
    assert a_sample("002") in data


@QUICK
@given(
    at=st.sampled_from([100, 108, 116, 124, 136, 148, 156, 257, 329, 337, 345]),
    value=st.binary(min_size=1, max_size=12) | st.from_regex(rb"[-+ 0-9_ox\x00\t]{1,12}", fullmatch=True),
)
@example(at=116, value=b" 12 34\0\0")
@example(at=108, value=b"1_0\0\0\0\0\0")
@example(at=345, value=b"a")
def test_what_is_not_odd_is_read_by_tarfile_alike(at: int, value: bytes) -> None:
    header = altered("001.json", 10, at, value)
    try:
        member = parse_member(header + bytes(BLOCK), 0, 2 * BLOCK)
    except BadHeader:
        return
    if member is not None and not member.odd:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        regular = found.isreg() and not found.issparse()
        assert (found.name.encode("utf-8", "surrogateescape"), regular) == (member.name, member.regular)
        assert not member.regular or found.size == member.size


def test_a_checksum_beyond_its_modulus_is_noticed() -> None:
    header = bytearray(make_header("a.txt", 10))
    header[148:156] = b"%06o\0 " % (int(header[148:154], 8) + 65521)
    with pytest.raises(BadHeader):
        parse_header(header, 0)


def test_the_same_sample_several_times_in_a_row_is_one(tmp_path: Path) -> None:
    data = a_sample("000") + 3 * a_sample("001") + a_sample("002") + END
    samples, report = read(data, tmp_path)
    assert [(sample.key, sample.problem, [*sample.members]) for sample in samples] == [
        (key, None, [*TRIPLE]) for key in ("000", "001", "002")
    ]
    assert report.samples == 3
    (line,) = report.warnings()
    assert "1 samples come several times in a row; the first one counts" in line
    target, _ = copied(tmp_path / "shard.tar")
    assert target.read_bytes().rstrip(b"\0") == (a_sample("000") + a_sample("001") + a_sample("002")).rstrip(b"\0")


def test_the_first_copy_counts(tmp_path: Path) -> None:
    other = a_sample("000").replace(b"000 txt", b"XXX txt")
    ((sample,), _) = read(a_sample("000") + other + END, tmp_path)
    assert sample.members["txt"].startswith(b"000 txt")
    stray = plain_member("001.txt", b"of another sample")
    for data in (a_sample("001") + stray, stray + a_sample("001")):
        samples, _ = read(a_sample("000") + data + END, tmp_path)
        assert samples[1].problem is None
        assert samples[1].members["txt"].startswith(b"001 txt")


SWALLOWED = {"the next sample": 3, "the next member": 1}  # members that are as long as what was lost


@pytest.mark.parametrize("members", SWALLOWED.values(), ids=SWALLOWED)
@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "at the end"])
def test_a_member_that_lost_as_many_bytes_as_are_behind_it(members: int, last: bool, tmp_path: Path) -> None:
    """The next header is where it should be, so that nothing but the headers inside the member shows the loss."""
    length = len(b"".join(plain_member(f"002.{s}", f"002 {s} ".encode() * 90) for s in TRIPLE[:members]))
    txt = b"a long text " * 2000
    whole = a_sample("000") + a_sample("001")[: -len(plain_member("001.txt", b"001 txt " * 90))]
    at = len(whole) + BLOCK + 700
    data = whole + plain_member("001.txt", txt) + a_sample("002") + (b"" if last else a_sample("003")) + END
    samples, report = read(data[:at] + data[at + length :], tmp_path)
    problems = {sample.key: sample.problem and sample.problem[0] for sample in samples}
    assert problems == {"000": None, "001": "damaged_tar", "002": None} | ({} if last else {"003": None})
    assert any("reaches over the header" in line for line in report.warnings())


@pytest.mark.parametrize("suffix", ["tar", "notes"])
@pytest.mark.parametrize(
    "around", ["nothing", "garbage behind it", "zeros behind it", "it is last", "the end is missing"]
)
def test_a_stored_tar_is_no_damage(suffix: str, around: str, tmp_path: Path) -> None:
    stored = a_sample("inner-a") + a_sample("inner-b") + END
    sample = a_sample("001") + plain_member(f"001.{suffix}", stored)
    behind = a_sample("002") + END
    data = a_sample("000") + sample + {
        "nothing": behind, "garbage behind it": b"\xaa" * 1024 + behind, "zeros behind it": bytes(1024) + behind,
        "it is last": END, "the end is missing": b"",
    }[around]  # fmt: skip
    samples, _ = read(data, tmp_path)
    keys = [sample.key for sample in samples if sample.problem is None]
    assert keys == ["000", "001"] + (["002"] if behind in data else [])
    assert samples[1].members[suffix] == stored


def test_a_tar_cut_inside_a_stored_tar_gives_none_of_its_samples(tmp_path: Path) -> None:
    stored = a_sample("inner-a") + a_sample("inner-b") + END
    data = a_sample("000") + a_sample("001") + plain_member("001.tar", stored)
    samples, _ = read(data[:-9000], tmp_path)
    assert {sample.key for sample in samples} == {"000", "001"}


def test_text_that_looks_like_a_header_is_text(tmp_path: Path) -> None:
    text = bytes(512) + make_header("002.jpg", 100) + b"x" * 5000
    text += bytearray(make_header("003.jpg", 100)).replace(b"003", b"004")
    data = a_sample("000") + a_sample("001") + plain_member("001.md", text) + a_sample("002") + END
    samples, report = read(data, tmp_path)
    assert [(sample.key, sample.problem) for sample in samples] == [("000", None), ("001", None), ("002", None)]
    assert report.warnings() == []


def test_an_end_of_archive_inside_a_sample_is_not_copied(tmp_path: Path) -> None:
    members = [plain_member(f"001.{suffix}", f"001 {suffix} ".encode() * 90) for suffix in TRIPLE]
    data = a_sample("000") + members[0] + bytes(1024) + members[1] + members[2] + a_sample("002") + END
    (tmp_path / "shard.tar").write_bytes(data)
    target, report = copied(tmp_path / "shard.tar")
    assert len(as_tarfile_sees(target)) == 9
    assert report.gaps


def test_a_proof_reads_as_readers_do(tmp_path: Path) -> None:
    """The source's bytes and the copy's are equal, and tarfile reads only the half of them."""
    path = tmp_path / "shard.tar"
    path.write_bytes(a_sample("000") + bytes(1024) + a_sample("001") + END)
    spans = [SampleSpan("000", 0, path.stat().st_size - len(END))]
    windows = list(TarScan(path).windows())
    spans[0].members = [member for one in windows for span in one.spans for member in span.members]
    window = Window(spans, Block(None, bytearray(path.read_bytes()), 0, 0, path.stat().st_size))
    proof = prove_splice([(window, [(spans[0], Action.KEEP)])], path)
    assert proof.readers == "Python's tarfile reads 1 of its 2 samples"


GLOBAL_HEADER = pax_record(b"comment=abcdefgh", b"g")
SAMPLES = [a_sample(key) for key in ("000", "001", "002")]


@pytest.mark.parametrize(
    ("parts", "dropped", "begins"),
    [
        ([*SAMPLES, GLOBAL_HEADER], set(), SAMPLES[0]),
        ([*SAMPLES, GLOBAL_HEADER, GLOBAL_HEADER], {"001"}, SAMPLES[0]),
        ([SAMPLES[0], GLOBAL_HEADER, SAMPLES[1], SAMPLES[2]], {"001", "002"}, SAMPLES[0]),
        ([SAMPLES[0], GLOBAL_HEADER, SAMPLES[1], SAMPLES[2]], {"001"}, SAMPLES[0] + GLOBAL_HEADER + SAMPLES[2]),
        ([GLOBAL_HEADER, *SAMPLES, GLOBAL_HEADER], {"000"}, GLOBAL_HEADER + SAMPLES[1]),
        ([GLOBAL_HEADER, *SAMPLES], {"000", "001", "002"}, b""),
    ],
)
def test_no_global_header_ends_a_copy(parts: list[bytes], dropped: set[str], begins: bytes, tmp_path: Path) -> None:
    """Python's tarfile, and so webdataset and ``datasets``, raise an error where no member follows a global header."""
    path, target = tmp_path / "shard.tar", tmp_path / "copy.tar"
    path.write_bytes(b"".join(parts) + END)

    def decide(span: SampleSpan) -> Action:
        return Action.DROP if span.key in dropped else Action.KEEP

    with AtomicFile(target, "token") as file:
        splice(decided(TarScan(path), decide), file)
    file.move_into_place()
    verify_splice(decided(TarScan(path), decide), target, "source")
    expected = {f"00{n}.{suffix}" for n in range(3) if f"00{n}" not in dropped for suffix in TRIPLE}
    for mode in ("r:", "r|"):
        with target.open("rb") as file_again, tarfile.open(fileobj=file_again, mode=mode) as tar:
            assert {member.name for member in tar} == expected
    assert target.read_bytes().startswith(begins)


NUMBERS = {"mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12), "dev": (329, 8)}
FORMS = [
    *(
        b" ",
        b"",
        b"+05\0",
        b"-05\0",
        b"0o5\0",
        b"0_5\0",
        b"5 x\0",
        b"5\0xx",
        b"5      ",
        b"\0" + b"5",
        b"\t5\0",
        b"5\n\0",
    ),
    *(
        b"\x80\0\0\0\0\0\0\5",
        b"\x80\xff\xff\xff\xff\xff\xff\xff",
        b"\xff" * 12,
        b"\xfe" + b"\xff" * 11,
        b"\x81\0\0\0\0\0\0\5",
    ),
    *(b"58\0", b"\xb2\0", b"A" * 12, b"7" * 12, " ٣".encode()),
]
PAX_KEYWORDS = ("size", "uid", "gid", "mtime", "atime", "ctime", "path", "linkpath", "comment")
PAX_VALUES = (b"10", b"-5", b"1e3", b"", b" 5", b"5 ", b"1_0", b"10.5", b".5", b"9" * 23, b"nan", b"0x10", b"a\0b")


def _numbers() -> dict[str, bytes]:
    fields = {
        f"{what} {form!r}": altered("001.json", 10, at, form[:length].ljust(length, b" " if form == b" " else b"\0"))
        for what, (at, length) in NUMBERS.items()
        for form in FORMS
    }
    pax = {
        f"pax {keyword} {value!r}": pax_record(keyword.encode() + b"=" + value) + make_header("001.json", 10)
        for keyword in PAX_KEYWORDS
        for value in PAX_VALUES
    }
    return fields | pax


def test_what_is_not_odd_is_read_alike_by_tarfile_and_gnu_tar(tmp_path: Path) -> None:
    """A header that GNU tar stops at, or tarfile takes for another member, never goes into an output as it is."""
    behind = plain_member("002.json", b"abcdefghij") + END
    path = tmp_path / "one.tar"
    plain = 0
    for what, header in _numbers().items():
        try:
            member = parse_member(header + bytes(BLOCK), 0, len(header) + BLOCK)
        except BadHeader:
            continue
        if member is None or member.odd or member.size > 10 * BLOCK:
            continue
        plain += 1
        path.write_bytes(header + b"x" * member.size + bytes(-member.size % BLOCK) + behind)
        listed = subprocess.run(["tar", "-tf", path], capture_output=True, check=False)
        with tarfile.open(path) as tar:
            found = [(m.name.encode(), m.size) for m in tar]
        assert found == [(member.name, member.size), (b"002.json", 10)], what
        assert (listed.returncode, listed.stdout.splitlines()) == (0, [name for name, _ in found]), what
    assert plain > 40


def test_samples_without_a_caption_are_not_taken_for_torn(tmp_path: Path) -> None:
    """Beside damage a sample counts as torn if it lacks what all its whole neighbours have, not what one has."""
    without_txt = b"".join(plain_member(f"001.{suffix}", f"001 {suffix} ".encode() * 90) for suffix in ("jpg", "json"))
    path = tmp_path / "shard.tar"
    others = b"".join(
        plain_member(f"{key}.{suffix}", b"x" * 700) for key in ("003", "004", "005") for suffix in ("jpg", "json")
    )
    path.write_bytes(others + a_sample("000") + without_txt + b"\x55" * BLOCK + a_sample("002") + END)
    report = TarReport()
    torn = {span.key for window in TarScan(path, report).windows() for span in window.spans if span.torn}
    assert "001" not in torn
    assert report.damages
