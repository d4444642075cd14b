"""Which files the sources name that a user types: the forms that are taken, and what is said of the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from curation.errors import UsageError
from curation.shards import Shard, discover
from curation.storage.search import as_one_text, is_loose, separate


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What the log says."""
    monkeypatch.delenv("CURATION_WORKER", raising=False)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a/1.tar, a/2.tar, b/3.tar and a list of 3.tar."""
    for name in ("a/1.tar", "a/2.tar", "b/3.tar"):
        touch(tmp_path / name)
    (tmp_path / "b" / "list.txt").write_text("3.tar\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def ids(found: list[Shard]) -> list[str]:
    return [shard.id for shard in found]


# ---- several sources


@pytest.mark.parametrize("sources", [
    ["a/1.tar", "a/2.tar", "b/3.tar"],
    ["a", "b"],
    ["a/*.tar", "b"],
    ["a", "b/list.txt"],
    ["a/{1..5}.tar", "b/3.tar", "./b/3.tar", "a/../b/3.tar"],  # a file that is named again is no second shard
    ["b", "a"],
    "a b",
    "a/1.tar a/2.tar\tb/3.tar",
    "a, b",
    "a,b",
    "a\nb\n",
    "a/1.tar,a/2.tar b",
])  # fmt: skip
def test_several_sources_are_taken_together(place: Path, sources: str | list[str]) -> None:
    assert ids(discover(sources)) == ["1", "2", "3"]


def test_thousands_of_files(tmp_path: Path) -> None:
    names = [str(touch(tmp_path / f"{number:05d}.tar")) for number in range(3000)]
    assert len(discover(names)) == 3000


def test_urls_and_files_together(place: Path) -> None:
    found = discover(["a", "https://host/7.tar?key=a,b", "https://host/{8..9}.tar"])
    assert ids(found) == ["1", "2", "7", "8", "9"]
    assert ids(discover("https://host/7.tar,https://host/8.tar a/1.tar")) == ["1", "7", "8"]
    assert ids(discover("https://host/7.tar, a/1.tar")) == ["1", "7"]
    assert ids(discover("https://host/a,b.tar?x=1,2")) == ["a_b-" + xxhash.xxh3_64_hexdigest(b"a,b")]


def test_a_name_that_exists_is_never_taken_apart(place: Path) -> None:
    touch(place / "a b" / "9.tar")
    touch(place / "a,b" / "8.tar")
    assert ids(discover("a b")) == ["9"]
    assert ids(discover("a,b")) == ["8"]
    assert separate("pipe: cat a b") == ["pipe: cat a b"]


@pytest.mark.parametrize("sources", [["a", "b c"], ["x,y/1.tar"], ["a/1.tar", "https://host/8.tar"], ["x"]])
def test_several_sources_in_one_text(place: Path, sources: list[str]) -> None:
    for source in sources:
        if "://" not in source:
            touch(place / source / "0.tar") if not source.endswith(".tar") else touch(place / source)
    assert separate(as_one_text(sources)) == sources


@pytest.mark.parametrize(("sources", "says"), [
    (["a", "absent"], r"'absent' does not exist"),
    (["a", "b/*.jpg"], r"no \*\.tar shards found in 'b/\*\.jpg'"),
    (["a/1.tr"], r"did you mean a/1\.tar\?"),
    (["“a", "x”"], r"typographic quotation marks"),
    (["a", "c"], r"two files are shard 1: a/1\.tar and c/1\.tar; rename one of them, or give them to two runs"),
])  # fmt: skip
def test_a_source_that_names_nothing_or_a_second_shard_is_told(place: Path, sources: list[str], says: str) -> None:
    touch(place / "c" / "1.tar")
    with pytest.raises(UsageError, match=says):
        discover(sources)


def test_everything_in_a_folder_as_the_shell_names_it(place: Path, told: Callable[[], str]) -> None:
    """``--input a/*``: the tables beside the tars are no shards, and a line says so."""
    for name in ("a/1.parquet", "a/1_stats.json", "a/_receipts/x"):
        touch(place / name)
    assert ids(discover(sorted(map(str, Path("a").iterdir())))) == ["1", "2"]
    assert "2 files such as a/1.parquet are not read" in told()
    assert ids(discover("a/*")) == ["1", "2"]


# ---- paths that no shell has read


@pytest.mark.parametrize("text", [
    "~/a", "~/a/", "~/a/*.tar", " ~/a\n", "'~/a'", "“~/a”", "\"'~/a'\"", "file://{}/a", "file:{}/a",
    "file://localhost{}/a", "~/a/1.tar/, ~/a/2.tar",
])  # fmt: skip
def test_forms_of_a_path(place: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir("/")
    assert ids(discover(text.replace("{}", str(place)))) == ["1", "2"]


def test_a_list_may_hold_them_as_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    (place / "all.txt").write_text("~/a/1.tar\n'a/2.tar'\n  b\nhttps://host/7.tar\n")
    assert ids(discover("all.txt")) == ["1", "3", "7", "a/2"]
    (place / "all.txt").write_text("a/*.tar\n")
    assert ids(discover("all.txt")) == ["a/1", "a/2"]


def test_names_that_are_meant_as_they_stand(place: Path) -> None:
    for name in ("~", "$HOME", "'x'"):
        touch(place / name / "5.tar")
        assert ids(discover(name)) == ["5"]


@pytest.mark.parametrize(("source", "says"), [
    ("$HOME/x", r"\$HOME/x: the shell did not put a value in place of \$HOME"),
    ("/data/${RUN}/x", r"in place of \$\{RUN\}"),
    ("~no_such_user/x", "there is no user 'no_such_user'"),
    ("file://server/x", "three slashes"),
])  # fmt: skip
def test_paths_that_cannot_be_meant(place: Path, source: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        discover(source)


# ---- folders


@pytest.mark.parametrize("names", [
    ["000/00000.tar", "001/00001.tar", "001/00001.parquet"],
    ["part1/00000.tar", "part2/deeper/00001.tar"],
    ["x/00000.tar", "shards.d/00001.tar", "_receipts/0.tar", ".hidden/9.tar", "edits/8.tar"],
    ["shards/00000.tar", "shards/00001.tar", "edits/00000.tar", "hybrid/00000.tar", "captions/00000.json"],
    ["shards/000/00000.tar", "shards/001/00001.tar", "captions/00000.json"],
    ["out/_receipts/03_generate_images/x", "out/7.tar", "in/00000.tar", "in/00001.tar"],
])  # fmt: skip
def test_tars_in_subfolders(tmp_path: Path, told: Callable[[], str], names: list[str]) -> None:
    for name in names:
        touch(tmp_path / name)
    assert sorted(shard.file.stem for shard in discover(str(tmp_path))) == ["00000", "00001"]
    assert f"{tmp_path} has no " in told()


def test_subfolders_with_one_id(tmp_path: Path) -> None:
    for name in ("train/0.tar", "val/0.tar"):
        touch(tmp_path / name)
    assert ids(discover(str(tmp_path))) == ["train/0", "val/0"]


def test_loose_files_are_no_subfolders_of_tars(tmp_path: Path) -> None:
    for name in ("00000/1.jpg", "00000/1.txt", "00001/1.json", "00001/1.jpg", "00002.parquet"):
        touch(tmp_path / name)
    (tmp_path / "00002").mkdir()  # all its images have failed
    assert ids(discover(str(tmp_path))) == ["00000", "00001", "00002"]
    assert not is_loose(touch(tmp_path / "7" / "8" / "9.tar").parent.parent)


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``.``, ``..`` and ``/`` have no name, by which a shard of loose files is known."""
    touch(tmp_path / "00000" / "1.jpg")
    touch(tmp_path / "tars" / "7.tar")
    monkeypatch.chdir(tmp_path / "00000")
    assert is_loose(Path()) and not is_loose(Path("..")) and not is_loose(Path("/"))
    monkeypatch.chdir(tmp_path)
    assert not is_loose(Path())
    assert ids(discover(".")) == ["00000"]
    monkeypatch.chdir(tmp_path / "tars")
    assert ids(discover(".")) == ["7"]


def test_the_folder_of_a_dataset_in_place_of_its_dictionaries(tmp_path: Path, told: Callable[[], str]) -> None:
    for name in ("captions/0.json", "edits/0.json"):
        touch(tmp_path / name)
    assert ids(discover(str(tmp_path), ".json", inside="captions")) == ["0"]
    assert f"those in {tmp_path}/captions are read" in told()
    with pytest.raises(UsageError, match=rf"did you mean {tmp_path}/captions or {tmp_path}/edits\?"):
        discover(str(tmp_path), ".json", inside="prompts")


@pytest.mark.parametrize(("names", "source", "suffix", "says"), [
    (["0.json", "_receipts/01_filter_noface/x"], "", ".tar", r"1 \*\.json; .* was written by 01_filter_noface"),
    (["0.parquet"], "", ".tar", r"if these are tables of URLs, let stage 00"),
    (["0.tar"], "", ".json", r"it holds 1 \*\.tar"),
    (["0.tar"], "0.tar", ".json", r"0\.tar: \*\.json files are wanted here"),
    (["0.json"], "0.json", ".tar", r"0\.json: \*\.tar files are wanted here"),
    (["0.parquet"], "0.parquet", ".tar", r"\*\.tar files are wanted here"),
    (["0.tar.zst"], "0.tar.zst", ".tar", r"unpack it first"),
    (["edits/0.tar"], "", ".tar", r"did you mean .*/edits\?"),
    ([], "", ".tar", r"no \*\.tar shards found in"),
])  # fmt: skip
def test_files_of_another_kind(tmp_path: Path, names: list[str], source: str, suffix: str, says: str) -> None:
    for name in names:
        touch(tmp_path / name)
    with pytest.raises(UsageError, match=says):
        discover(os.path.join(tmp_path, source), suffix)


# ---- single files


def test_what_is_no_shard_in_a_folder_of_tars(tmp_path: Path, told: Callable[[], str]) -> None:
    for name in ("1.tar", "._1.tar", ".2.tar", "3.tar.part", "4.tar.tmp", "5.tar/x"):
        touch(tmp_path / name)
    for name in ("6.tar", "7.tar"):
        (tmp_path / name).symlink_to(name if name == "6.tar" else "absent")
    assert ids(discover(str(tmp_path))) == ["1", "6", "7"]  # the links fail as shards, so that the run ends with 1
    assert "2 incomplete files such as 3.tar.part are not read" in told()
    assert "1 folders such as 5.tar are named like shards and are not read" in told()
    assert ids(discover([f"{tmp_path}/1.tar", f"{tmp_path}/7.tar"])) == ["1", "7"]
