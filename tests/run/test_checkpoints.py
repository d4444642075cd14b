"""Checkpoints inside a shard: whatever a kill, a full disk or another worker does to the files."""

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import InfrastructureError, LostClaim
from curation.run import checkpoints
from curation.run.checkpoints import PartialLog, Partials

SHARD, BUCKET = "00000001", "00000"
RECORDS = [("a", "d1", b"first"), ("b/ü", "d2", b""), ("c\ud800", "", b"\x00" * 40), ("", "d4", b"last")]


def log(
    folder: Path, token: str, fingerprint: str = "f", shard: str = SHARD, names: list[str] | None = None
) -> PartialLog:
    return PartialLog(folder, shard, fingerprint, token, names)


def written(folder: Path, token: str, records: list[tuple[str, str, bytes]]) -> Path:
    writer = log(folder, token)
    for record in records:
        writer.append([record])
    writer.close()
    return folder / f"{SHARD}.f.{token}"


def found(folder: Path, records: list[tuple[str, str, bytes]] = RECORDS) -> list[bytes | None]:
    reader = log(folder, "reader")
    try:
        return [reader.get(key, digest) for key, digest, _ in records]
    finally:
        reader.close()


def test_a_successor_finds_what_was_appended_and_nobody_writes_for_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "bucket"
    first = log(folder, "1")
    assert not folder.exists(), "a shard without checkpoints makes no folder"
    first.append(RECORDS[:2])
    first.append(RECORDS[2:])
    assert [first.get(key, digest) for key, digest, _ in RECORDS] == [payload for _, _, payload in RECORDS]
    assert first.recovered == 0
    second = log(folder, "2")
    assert second.recovered == len(second) == len(RECORDS)
    assert [second.get(key, digest) for key, digest, _ in RECORDS] == [payload for _, _, payload in RECORDS]
    assert second.get("a", "other input") is None
    assert second.get("absent", "d1") is None
    assert [p.name for p in folder.iterdir()] == [f"{SHARD}.f.1"]
    first.close()
    second.close()


def test_other_shards_and_other_fingerprints_are_not_taken_up(tmp_path: Path) -> None:
    written(tmp_path, "1", RECORDS)
    assert log(tmp_path, "2", fingerprint="g").recovered == 0
    assert log(tmp_path, "2", shard="00000002").recovered == 0
    assert log(tmp_path, "2", shard="0000000").recovered == 0


def test_a_kill_at_every_byte(tmp_path: Path) -> None:
    """Whole records before the cut count, nothing after it does."""
    path = written(tmp_path, "1", RECORDS)
    data = path.read_bytes()
    ends = []
    for count in range(1, len(RECORDS) + 1):
        ends.append(written(tmp_path / str(count), "1", RECORDS[:count]).stat().st_size)
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        expected = [payload if i < whole else None for i, (_, _, payload) in enumerate(RECORDS)]
        assert found(tmp_path) == expected, f"cut at byte {cut}"


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path, "1", RECORDS)
    data = path.read_bytes()
    first_end = written(tmp_path / "one", "1", RECORDS[:1]).stat().st_size
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        answers = found(tmp_path)
        assert all(answer in (None, payload) for answer, (_, _, payload) in zip(answers, RECORDS, strict=True))
        assert answers[-1] is None, f"byte {position}: a bad record, or one after it, was used"
        assert (answers[0] is None) == (position < first_end)


def test_a_file_that_ends_in_zeros_after_a_power_cut(tmp_path: Path) -> None:
    path = written(tmp_path, "1", RECORDS)
    with open(path, "ab") as file:
        file.write(bytes(10_000))
    assert found(tmp_path) == [payload for _, _, payload in RECORDS]


@settings(max_examples=50)
@given(junk=st.binary(max_size=200))
def test_any_junk_is_survived(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("junk")
    path = written(folder, "1", RECORDS[:1])
    with open(path, "ab") as file:
        file.write(junk)
    (folder / f"{SHARD}.f.0").write_bytes(junk)
    assert found(folder, RECORDS[:1]) == [b"first"]


def test_of_two_predecessors_the_lowest_token_counts(tmp_path: Path) -> None:
    """Two successors that find the same files must agree, whoever wrote last."""
    written(tmp_path, "bbb", [("a", "d", b"from bbb"), ("b", "d", b"only bbb")])
    written(tmp_path, "aaa", [("a", "d", b"from aaa"), ("c", "old input", b"stale")])
    written(tmp_path, "ccc", [("a", "d", b"from ccc"), ("c", "d", b"fresh")])
    asked = [("a", "d", b""), ("b", "d", b""), ("c", "d", b""), ("c", "old input", b"")]
    assert found(tmp_path, asked) == [b"from aaa", b"only bbb", b"fresh", b"stale"]


def test_a_predecessor_that_lives_cannot_disturb(tmp_path: Path) -> None:
    first = log(tmp_path, "1")
    first.append([("a", "d", b"1")])
    second = log(tmp_path, "2")
    first.append([("b", "d", b"late")])
    second.append([("b", "d", b"mine")])
    assert second.get("a", "d") == b"1"
    assert second.get("b", "d") == b"mine"
    assert first.get("b", "d") == b"late"


def test_ones_own_file_gone_is_a_lost_claim(tmp_path: Path) -> None:
    mine = log(tmp_path / BUCKET, "1")
    mine.append(RECORDS[:1])
    Partials(tmp_path).remove(SHARD)
    with pytest.raises(LostClaim, match="another worker has finished"):
        mine.append(RECORDS[1:])
    assert not list((tmp_path / BUCKET).iterdir())


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_a_stale_handle_is_a_lost_claim(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = log(tmp_path, "1")
    mine.append(RECORDS[:1])

    def stale(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", stale)
    with pytest.raises(LostClaim):
        mine.flush()


def test_a_predecessor_cut_short_while_it_is_read_is_a_lost_claim(tmp_path: Path) -> None:
    path = written(tmp_path, "1", [("a", "d", b"x" * 100)])
    second = log(tmp_path, "2")
    os.truncate(path, 50)
    with pytest.raises(LostClaim):
        second.get("a", "d")


def test_a_full_disk_stops_the_run_and_spoils_nothing(tmp_path: Path) -> None:
    mine = log(tmp_path, "1")
    mine.append(RECORDS[:1])
    assert mine._writer is not None
    os.dup2(os.open("/dev/full", os.O_RDWR), mine._writer.fileno())
    with pytest.raises(InfrastructureError, match="the disk is full"):
        mine.append([("z", "d", b"z")])
    assert mine.get("z", "d") is None
    mine.close()
    assert found(tmp_path, RECORDS[:1]) == [b"first"]


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = log(tmp_path, "1")
    mine.append(RECORDS[:1])
    assert mine._writer is not None

    class Slow:
        """Takes three bytes at a time, as a raw file may."""

        def __init__(self, file: object) -> None:
            self._file = file

        def write(self, data: memoryview) -> int:
            return self._file.write(data[:3])  # type: ignore[attr-defined, no-any-return]

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

    mine._writer = Slow(mine._writer)  # type: ignore[assignment]
    mine.append(RECORDS[1:])
    mine.close()
    assert found(tmp_path) == [payload for _, _, payload in RECORDS]


def test_many_threads_may_append(tmp_path: Path) -> None:
    mine = log(tmp_path, "1")

    def work(thread: int) -> None:
        for n in range(50):
            mine.append([(f"{thread}-{n}", "d", f"{thread}-{n}".encode() * (n + 1))])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mine.close()
    keys = [f"{thread}-{n}" for thread in range(4) for n in range(50)]
    again = log(tmp_path, "2")
    assert [again.get(key, "d") for key in keys] == [key.encode() * (int(key[2:]) + 1) for key in keys]


def test_a_batch_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose records count only together must not be torn by a kill between two writes."""
    mine = log(tmp_path, "1")
    mine.append(RECORDS[:1])
    before = (tmp_path / f"{SHARD}.f.1").stat().st_size
    sizes = []
    assert mine._writer is not None
    write = mine._writer.write
    monkeypatch.setattr(mine, "_writer", _Spy(mine._writer, lambda data: sizes.append(len(data)) or write(data)))
    mine.append(RECORDS[1:])
    assert len(sizes) == 1
    assert (tmp_path / f"{SHARD}.f.1").stat().st_size == before + sizes[0]


class _Spy:
    def __init__(self, file: object, write: object) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_records_are_made_durable_every_thirty_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    now = 1000.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    mine = log(tmp_path, "1")
    mine.append(RECORDS[:1])
    now += 29
    mine.append(RECORDS[1:2])
    assert not synced
    now += 2
    mine.append(RECORDS[2:3])
    mine.append(RECORDS[3:])
    assert len(synced) == 1
    mine.flush()
    assert len(synced) == 2


def test_a_payload_beyond_the_bound_is_refused_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hide every record after it from the successor."""
    monkeypatch.setattr(checkpoints, "MAX_PAYLOAD_BYTES", 10)
    with pytest.raises(ValueError, match="11 bytes"):
        log(tmp_path, "1").append([("a", "d", b"x" * 11)])


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    for token in ("1", "2", "3"):
        written(tmp_path, token, RECORDS)
    before = len(os.listdir("/proc/self/fd"))
    last = log(tmp_path, "4")
    last.append(RECORDS)
    last.close()
    last.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_removing_spares_other_shards(tmp_path: Path) -> None:
    folder = tmp_path / BUCKET
    written(folder, "1", RECORDS)
    for fingerprint, shard in (("g-x", SHARD), ("f", f"{SHARD}.b"), ("f", "00000010"), ("f", "0000000")):
        other = log(folder, "2", fingerprint, shard)
        other.append(RECORDS[:1])
        other.close()
    Partials(tmp_path).remove(SHARD)
    assert sorted(p.name for p in folder.iterdir()) == ["0000000.f.2", "00000001.b.f.2", "00000010.f.2"]
    Partials(tmp_path / "absent").remove(SHARD)


def test_a_bucket_is_listed_once_and_not_for_each_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, partials = tmp_path / BUCKET, Partials(tmp_path)
    path = written(folder, "1", RECORDS)
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: listed.append(place) or listdir(place))  # type: ignore[func-returns-value]
    assert partials.names(SHARD) == [path.name]
    for number in range(2, 100):
        assert partials.names(f"{number:08d}") == []
        partials.remove(f"{number:08d}", [f"{number:08d}.f.own"])
    assert listed == [folder]
    late = written(folder, "2", RECORDS)  # by one that began after the listing
    monkeypatch.undo()
    assert sorted(partials.names(SHARD, fresh=True)) == [path.name, late.name]
    assert log(folder, "3", names=[path.name, f"{SHARD}.f.never-written"]).recovered == len(RECORDS)
    monkeypatch.setattr(checkpoints, "LIST_EVERY_S", -1.0)
    newest = written(folder, "4", RECORDS)
    assert newest.name in partials.names(SHARD), "the listing was due"
    partials.remove(SHARD)
    assert not list(folder.iterdir())
