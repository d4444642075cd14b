"""Folders made durable through descriptors that stay open: bounded, shared by threads, never of a dead folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from curation.errors import InfrastructureError
from curation.storage import files
from curation.storage.files import AtomicFile, fsync_folder


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were fsynced, as the kernel names them."""
    seen: list[str] = []
    fsync = os.fsync

    def told(descriptor: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    return seen


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = os.open

    def told(path: str, *rest: int) -> int:
        seen.append(str(path))
        return real(path, *rest)

    monkeypatch.setattr(os, "open", told)
    return seen


def test_a_folder_is_opened_once_and_synced_each_time(
    tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = opened(monkeypatch)
    for _ in range(5):
        fsync_folder(tmp_path)
    assert seen == [str(tmp_path)]
    assert synced == [str(tmp_path)] * 5


def test_descriptors_are_bounded_even_among_threads(tmp_path: Path) -> None:
    places = [tmp_path / str(number) for number in range(200)]
    for place in places:
        place.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fsync_folder, places * 3))
    assert len(os.listdir("/proc/self/fd")) <= before + files._MAX_OPEN_FOLDERS


def test_a_folder_that_is_gone_is_nobodys_trouble(tmp_path: Path) -> None:
    fsync_folder(tmp_path / "never")


def test_a_stale_handle_is_opened_again(tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fsync_folder(tmp_path)
    fsync, stale = os.fsync, [True]

    def first_stale(descriptor: int) -> None:
        if stale.pop() if stale else False:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", first_stale)
    seen = opened(monkeypatch)
    fsync_folder(tmp_path)
    assert seen == [str(tmp_path)]
    assert synced == [str(tmp_path)] * 2


def test_a_folder_made_anew_is_the_one_that_is_synced(tmp_path: Path, synced: list[str]) -> None:
    place = tmp_path / "out"
    place.mkdir()
    fsync_folder(place)
    shutil.rmtree(place)
    with AtomicFile(place / "a", "t") as file:
        file.write(b"x")
    synced.clear()
    fsync_folder(place)
    assert synced == [str(place)], "and not the one that was removed"


def test_other_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        fsync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EINVAL, "none here")))
    fsync_folder(tmp_path)  # a filesystem that has no fsync of folders


@pytest.mark.parametrize("durable", [True, False])
def test_a_whole_file_appears_at_the_end_of_its_block(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(b"before")
    with files.whole_file(path, durable=durable) as file:
        file.write(b"aft")
        assert path.read_bytes() == b"before"
        file.write(b"er")
    assert path.read_bytes() == b"after"
    with pytest.raises(RuntimeError, match="half"), files.whole_file(path, durable=durable) as file:
        file.write(b"half")
        raise RuntimeError("half")
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_durable_file_is_synced_with_its_folder(tmp_path: Path, synced: list[str]) -> None:
    files.write_whole(tmp_path / "beat.json", b"1", durable=False)
    assert synced == []
    files.write_whole(tmp_path / "record.json", b"1")
    assert [Path(name).suffix for name in synced] == [".tmp", ""]
    assert synced[1] == str(tmp_path)


def test_a_long_name_and_a_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / ("k" * 250 + ".json")
    files.write_whole(path, b"1")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        files.write_whole(tmp_path / "none" / "a", b"1")
    assert files.link_exclusively(tmp_path / "made" / "a", b"1")
    with pytest.raises(InfrastructureError, match="cannot be written"), files.storage_errors(path):
        files.write_whole(path / "a", b"1")


def test_a_filesystem_that_takes_less_than_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(descriptor: int, pieces: Sequence[bytes]) -> int:
        return os.write(descriptor, b"".join(pieces)[:1000])

    monkeypatch.setattr(os, "writev", some)
    pieces = [bytes([number % 251]) * (number % 7) for number in range(3000)]
    with AtomicFile(tmp_path / "a", "t") as file:
        file.write_pieces(pieces)
    assert file.temporary.read_bytes() == b"".join(pieces)
    assert file.size == sum(map(len, pieces))
    assert file.digest == xxhash.xxh3_128_hexdigest(b"".join(pieces))
