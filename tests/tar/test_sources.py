"""What is no tar says what it is, and a tar compressed with gzip is read like the tar inside, from any source."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import pytest

from curation.commands.fsck.command import main as fsck
from curation.errors import ShardError
from curation.storage.urls import Source, Url
from curation.tar import blocks, sources
from curation.tar.samples import read_samples
from curation.tar.scan import TarReport
from tests.servers.files import file_server
from tests.shards import contents, tar_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456789\n"
S3_ERROR = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SignatureDoesNotMatch</Code>'
    b"<AWSAccessKeyId>AKIASECRET</AWSAccessKeyId></Error>"
)


def small_tar(count: int = 4, size: int = 700) -> bytes:
    members = []
    for number in range(count):
        data = bytes((number * 7 + at * at) % 251 for at in range(size))
        members += [(f"{number:03d}.jpg", data), (f"{number:03d}.txt", b"a dog"), (f"{number:03d}.json", b"{}")]
    return tar_of(members)


def zip_of(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.jpg", data)
    return file.getvalue()


NOT_TARS = {
    "zero bytes": b"",
    "Git LFS pointer": POINTER,
    "git-annex": b"/annex/objects/SHA256E-s123--abc.tar\n",
    "HTML page": b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>403</body></html>",
    "with the error SignatureDoesNotMatch": S3_ERROR,
    "JSON": b'{"message": "Not Found"}',
    "'Too many requests'": b"Too many requests",
    "'Accès refusé'": "Accès refusé\n".encode(),
    "zip archive": zip_of(b"x"),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(range(100)),
    "xz": lzma.compress(small_tar()),
    "bzip2": bz2.compress(small_tar()),
    "parquet": b"PAR1" + bytes(range(200)),
    "a JPEG": b"\xff\xd8\xff\xe0" + bytes(1000),
}


def keys(source: Source, report: TarReport | None = None) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, sample.members) for sample in read_samples(source, report=report) if sample.problem is None]


@pytest.mark.parametrize("said", NOT_TARS)
@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "in gzip"])
def test_what_is_no_tar_says_what_it_is(tmp_path: Path, said: str, packed: bool) -> None:
    path = tmp_path / "00000000.tar"
    path.write_bytes(gzip.compress(NOT_TARS[said]) if packed else NOT_TARS[said])
    for source in (path, Url(f"pipe:cat {path}")):
        with pytest.raises(ShardError, match=said) as caught:
            keys(source)
        assert caught.value.reason == "not_a_tar"
        assert "AKIASECRET" not in str(caught.value)


def test_a_tar_without_members_is_one(tmp_path: Path) -> None:
    for number, data in enumerate((bytes(1024), bytes(10240), tar_of([]))):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        assert keys(path) == []


def test_a_tar_whose_first_member_is_named_like_another_format_is_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    for name in ("BZh.jpg", "PK\x03\x04.jpg", "PAR1.jpg", "<html>.jpg", "{1}.jpg", "version.txt"):
        path.write_bytes(tar_of([(name, b"x")]))
        assert len(keys(path)) == 1, name


def test_damage_in_the_first_header_is_searched_for_members(tmp_path: Path) -> None:
    data = bytearray(small_tar())
    data[:512] = bytes(range(1, 129)) * 4
    (tmp_path / "0.tar").write_bytes(data)
    assert [key for key, _ in keys(tmp_path / "0.tar")] == ["001", "002", "003"]


@pytest.mark.parametrize("lost", [b"", b"\xff\xd8\xff\xe0", b"<html>", b'{"a": 1}'])
@pytest.mark.parametrize("shift", [0, 100])
def test_a_tar_that_lost_its_first_header_is_damaged_and_gives_the_rest(
    tmp_path: Path, lost: bytes, shift: int
) -> None:
    """It begins with the data of its first member, which looks like a file of another kind."""
    first = tar_of([("a.jpg", lost + b"x" * 900)])
    rest = tar_of([("b.jpg", b"y"), ("b.json", b"{}"), ("b.txt", b"z")])
    (tmp_path / "0.tar").write_bytes(first[512 : 512 + 1024 - shift] + rest)
    for source in (tmp_path / "0.tar", Url(f"pipe:cat {tmp_path}/0.tar")):
        found = {sample.key: sample for sample in read_samples(source) if not sample.problem}
        assert set(found) == {"b"}
        assert set(found["b"].members) == {"jpg", "json", "txt"}


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.tgz"])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("small", [False, True], ids=["as it is", "small windows"])
def test_gzip_is_read_like_the_tar_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, members: int, small: bool
) -> None:
    """Also where a sample is larger than what stays in memory, so that bytes are read a second time."""
    if small:
        for constant, value in (("READ_BYTES", 4096), ("MAX_KEPT_BYTES", 16 << 10), ("_REREAD_BYTES", 3000)):
            monkeypatch.setattr(blocks, constant, value)
        monkeypatch.setattr(sources, "_PIPE_BYTES", 1000)
    tar = small_tar(5, 40_000)
    (tmp_path / "plain.tar").write_bytes(tar)
    expected = keys(tmp_path / "plain.tar")
    third = len(tar) // 3
    parts = [tar] if members == 1 else [tar[:third], tar[third : 2 * third], tar[2 * third :]]
    packed = b"".join(map(gzip.compress, parts)) + bytes(512)  # tapes and some tools pad with zeros
    (tmp_path / name).write_bytes(packed)
    report = TarReport()
    with file_server() as server:
        for source in (tmp_path / name, Url(f"pipe:cat {tmp_path / name}"), Url(server.add(name, packed))):
            assert keys(source, report) == expected
            assert not report.warnings()
    assert len(expected) == 5


def test_a_gzip_that_was_cut_gives_the_samples_before_the_cut(tmp_path: Path) -> None:
    packed = gzip.compress(small_tar(20, 5000))
    (tmp_path / "0.tar.gz").write_bytes(packed[: len(packed) // 2])
    report = TarReport()
    found = keys(tmp_path / "0.tar.gz", report)
    assert 0 < len(found) < 20
    assert report.missing_end


def test_a_gzip_with_damage_is_a_failed_shard(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(small_tar()))
    packed[-6] ^= 1  # of the checksum
    (tmp_path / "0.tar").write_bytes(packed)
    with pytest.raises(ShardError, match="gzip data is damaged") as caught:
        keys(tmp_path / "0.tar")
    assert caught.value.reason == "damaged_gzip"


def test_a_gzip_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_ANY_RATIO_BYTES", 1 << 20)
    (tmp_path / "0.tar").write_bytes(gzip.compress(tar_of([("0.jpg", bytes(8 << 20))])))
    with pytest.raises(ShardError, match="gzip unpack to more than"):
        keys(tmp_path / "0.tar")


def test_fsck_reads_and_repairs_what_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    whole = tar_of([(f"{key}.{suffix}", b"x") for key in ("0", "1") for suffix in ("txt", "json")])
    (source / "0.tar.gz").write_bytes(gzip.compress(whole))
    assert fsck([str(source), "--no-images", "--repair", str(tmp_path / "fixed"), "--workers", "1"]) in (0, 1)
    capsys.readouterr()
    doubled = tar_of([(name, b"{}") for name in ("0.txt", "0.json", "0.json", "1.txt", "1.json")])
    (source / "0.tar.gz").write_bytes(gzip.compress(doubled))
    assert fsck([str(source), "--no-images", "--repair", str(tmp_path / "fixed"), "--workers", "1"]) == 1
    assert "duplicate_member" in capsys.readouterr().out
    assert "1.txt" in contents(tmp_path / "fixed/0.tar")


def test_fsck_says_what_is_no_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(POINTER)
    assert fsck([str(tmp_path), "--workers", "1"]) == 1
    assert "Git LFS pointer" in capsys.readouterr().out
