"""Finding shards, and choosing some of them."""

import os
import subprocess
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from curation import shards
from curation.errors import UsageError
from curation.shards import Shard, bucket_of, discover, expand_braces, is_safe_id, select


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "shards"
    place.mkdir()
    for name in ["00000002.tar", "00000000.tar", "00000010.tar", ".00000003.tar.0123456789abcdef.tmp", ".hidden.tar"]:
        (place / name).touch()
    (place / "00000000.parquet").touch()
    (place / "sub").mkdir()
    (place / "sub" / "00000099.tar").touch()
    return place


def ids(found: list[Shard]) -> list[str]:
    return [shard.id for shard in found]


ALL = ["00000000", "00000002", "00000010"]


def test_a_folder_is_listed_sorted_and_not_below(folder: Path) -> None:
    found = discover(str(folder))
    assert ids(found) == ALL
    assert found[1].path == folder / "00000002.tar"


def test_a_glob(folder: Path) -> None:
    assert ids(discover(f"{folder}/000000[01]?.tar")) == ["00000000", "00000002", "00000010"]
    assert ids(discover(f"{folder}/*10.tar")) == ["00000010"]


def test_braces_over_numbering_with_gaps(folder: Path) -> None:
    assert ids(discover(f"{folder}/{{00000000..00000009}}.tar")) == ["00000000", "00000002"]
    assert ids(discover(f"{folder}/0000000{{0,2}}.tar")) == ["00000000", "00000002"]
    assert ids(discover(f"{folder}/{{000000,nothing}}*.tar")) == ALL


def test_one_file(folder: Path) -> None:
    assert ids(discover(f"{folder}/00000002.tar")) == ["00000002"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    place = tmp_path / "run{1,2}[a]"
    place.mkdir()
    (place / "7.tar").touch()
    assert ids(discover(str(place / "7.tar"))) == ["7"]
    assert ids(discover(str(place))) == ["7"]


def test_a_list_is_relative_to_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "odd#1.tar").touch()
    (folder / "list.txt").write_text("\ufeff# comment\n00000010.tar\n\n  00000000.tar  # this one too\nodd=1.tar\n")
    (folder / "odd=1.tar").touch()
    monkeypatch.chdir("/")
    assert ids(discover(str(folder / "list.txt"))) == ["00000000", "00000010", "odd=1"]


def test_a_hash_inside_a_name_is_no_comment(tmp_path: Path) -> None:
    (tmp_path / "run#2").mkdir()
    (tmp_path / "run#2" / "1.tar").touch()
    (tmp_path / "list.txt").write_text("run#2/1.tar\n#run#3/1.tar\n")
    assert [shard.file for shard in discover(str(tmp_path / "list.txt"))] == [tmp_path / "run#2" / "1.tar"]


def test_a_list_that_names_a_missing_file_says_which_line(folder: Path) -> None:
    (folder / "list.txt").write_text("00000000.tar\nabsent.tar\n")
    with pytest.raises(UsageError, match=r"list\.txt, line 2: no file 'absent\.tar'"):
        discover(str(folder / "list.txt"))


def test_a_list_that_is_none(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a list in UTF-8"):
        discover(str(folder / "list.txt"))


def test_another_suffix(folder: Path) -> None:
    assert ids(discover(str(folder), ".parquet")) == ["00000000"]


@pytest.mark.parametrize("source", ["absent", "absent/*.tar", "{0..3}.tar", "list{}.tar", "{a..c}.tar"])
def test_nothing_there(folder: Path, source: str) -> None:
    with pytest.raises(UsageError):
        discover(f"{folder}/{source}")


def test_an_empty_source_is_not_the_folder_of_the_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="a source is empty"):
        discover((str(folder), ""))


def test_a_file_under_two_names_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "link.tar").symlink_to(folder / "00000000.tar")
    assert len(discover((str(folder / "00000000.tar"), str(tmp_path / "link.tar")))) == 2
    assert "its samples are processed twice" in caplog.text


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \*\.tar shards"):
        discover(str(tmp_path))


def test_two_files_for_one_id(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.tar").touch()
    with pytest.raises(UsageError, match="two files are shard 1"):
        discover([f"{tmp_path}/{place}/1.tar" for place in ("a", "b")])


ODD_NAMES = [
    "-x",
    "a b",
    "a\nb",
    "é",
    "a" * 201,
    "a;b",
    "a#b",
    "a%b",
    "a:b",
    "a,b",
    "{a,b}",
    "[ab]",
    "%",
    "a_b",
    "日本",
]


@pytest.mark.parametrize("suffix", [".tar", ".json"])
def test_names_that_are_no_ids_get_one(tmp_path: Path, suffix: str) -> None:
    """Every file becomes a shard, with one id that each stage derives from its name alone."""
    for name in ODD_NAMES:
        (tmp_path / f"{name}{suffix}").touch()
    found = {shard.path: shard.id for shard in discover(str(tmp_path), suffix)}
    assert len(found) == len(set(found.values())) == len(ODD_NAMES)
    assert all(map(is_safe_id, found.values()))
    assert found[tmp_path / f"a_b{suffix}"] == "a_b"
    assert found[tmp_path / f"a b{suffix}"] == "a_b-" + xxhash.xxh3_64_hexdigest(b"a b")
    for path, shard_id in found.items():
        assert discover([str(path)], suffix) == [Shard(shard_id, path)], "named alone"


def test_a_new_name_is_told_and_serves_to_select(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1.tar", "my shard.tar", "é.tar"):
        (tmp_path / name).touch()
    found = discover(str(tmp_path))
    assert "'my shard.tar' has characters that no shard's id has" in caplog.text
    assert "and so are 1 others" in caplog.text
    mine = found[2].id
    assert mine.startswith("my_shard-")
    for spec in ("my shard", "my shard.tar", mine):
        assert ids(select(found, spec)) == [mine]
    assert ids(select(found, f"1.tar, {mine}")) == ["1", mine]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    open(os.fsencode(tmp_path) + b"/\xff.tar", "wb").close()
    with pytest.raises(UsageError, match="not UTF-8, so it cannot name a shard; rename the file"):
        discover(str(tmp_path))


def test_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARDS", 5)
    for number in range(7):
        (tmp_path / f"{number}.tar").touch()
    with pytest.raises(UsageError, match="more than 5 shards"):
        discover(str(tmp_path))
    with pytest.raises(UsageError, match="more than 5 shards"):
        discover(f"{tmp_path}/{{0..99999999999}}.tar")


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UsageError, match="cannot be listed"):
        discover(str(tmp_path))


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["a", "b-", ".tar", "x_"]),
            st.lists(st.sampled_from(["p", "qq", "1", ""]), min_size=2, max_size=3).map(lambda c: f"{{{','.join(c)}}}"),
            st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3)).map(
                lambda t: "{" + str(t[0]).zfill(t[2]) + ".." + str(t[1]).zfill(t[2]) + "}"
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_braces_are_those_of_bash(parts: list[str]) -> None:
    pattern = "_" + "".join(parts)
    expected = _bash(pattern)
    assert list(expand_braces(pattern)) == expected


def _bash(pattern: str) -> list[str]:
    answer = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def test_select(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = discover(str(folder))
    assert ids(select(found, None)) == ALL
    assert ids(select(found, "00000010,00000000")) == ["00000000", "00000010"]
    assert ids(select(found, " 00000001..00000010 ,")) == ["00000002", "00000010"]
    assert ids(select(found, "1..2")) == ["00000002"], "numbers, not strings"
    wishes = tmp_path / "ids.txt"
    wishes.write_text("# mine\n00000000, 00000002 # two\n5..10\n")
    assert ids(select(found, f"@{wishes}")) == ALL
    assert ids(select(found, str(wishes))) == ALL
    monkeypatch.chdir(tmp_path)
    assert ids(select(found, "ids.txt,00000002")) == ALL
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert ids(select(found, "../ids.txt")) == ALL


@pytest.mark.parametrize("spec", [
    "0-2", "0..2", "00000000-00000002", "0 - 2", "0:2", "0–2", "0…2", "0,2", "0 2", "0, 2", "0; 2", "[0, 2]", "{0..2}",
    "'0,2'", "00000000.tar 00000002.tar", "2,0-0", "0-1,1-2",
])  # fmt: skip
def test_forms_of_a_selection(folder: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir("/")
    assert ids(select(discover(str(folder)), spec)) == ["00000000", "00000002"]


def test_a_name_goes_before_a_range_and_a_list_with_blanks_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("3-7", "3", "5", "0007", "007"):
        (tmp_path / f"{name}.tar").touch()
    (tmp_path / "my ids.txt").write_text("3 5\n")
    found = discover(str(tmp_path))
    assert ids(select(found, "3-7")) == ["3-7"]
    assert ids(select(found, str(tmp_path / "my ids.txt"))) == ["3", "5"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ids(select(found, "@~/my ids.txt")) == ["3", "5"]
    with pytest.raises(UsageError, match="7 may be shard 0007 or 007; write its whole id"):
        select(found, "7")


def test_an_id_goes_before_a_file_of_its_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "00000002").write_bytes(b"\xff not a list")
    assert ids(select(discover(str(folder)), "00000002")) == ["00000002"]


def test_ids_with_dots(tmp_path: Path) -> None:
    for name in ("laion.part1.tar", "laion.part2.tar", "a..b.tar"):
        (tmp_path / name).touch()
    found = discover(str(tmp_path))
    assert ids(select(found, "laion.part2,a..b")) == ["a..b", "laion.part2"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("00000001", "no shard '00000001' .there are 3: 00000000 to 00000010"),
        ("3..9", "selects none"),
        ("9..3", r"backwards; write 3\.\.9"),
        ("9-3", "backwards"),
        ("1", "no shard '1'"),
        ("a..b", "cannot read the range"),
        ("@absent.txt", "no file 'absent.txt'"),
        (",", "selects none"),
    ],
)
def test_select_refuses(folder: Path, spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        select(discover(str(folder)), spec)


def test_a_list_inside_a_list(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").write_text("00000000")
    (tmp_path / "outer").write_text(f"@{tmp_path}/inner")
    with pytest.raises(UsageError, match="named inside"):
        select(discover(str(folder)), f"@{tmp_path}/outer")


@given(st.integers(0, 10**8 - 1))
def test_a_bucket_holds_a_thousand_neighbours(number: int) -> None:
    start = number - number % 1000
    assert len({bucket_of(f"{n:08d}") for n in (start, number, start + 999)}) == 1
    assert bucket_of(f"{start:08d}") != bucket_of(f"{start + 1000:08d}")


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,20}", fullmatch=True))
def test_a_bucket_is_a_plain_folder_name(shard_id: str) -> None:
    bucket = bucket_of(shard_id)
    assert bucket
    assert "/" not in bucket
    assert not bucket.startswith((".", "_"))


def test_tars_compressed_with_gzip_are_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.b.tar.gz", "c.tgz", "d.json", "e.gz"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("a.b.tar.gz\nc.tgz\n")
    for source in (tmp_path, tmp_path / "list.txt", tmp_path / "*.t*gz"):
        assert ids(discover(str(source))) == ["a.b", "c"]
    assert ids(discover(str(tmp_path / "c.tgz"))) == ["c"]


def test_in_a_folder_of_tars_packed_ones_are_told_and_not_read(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "00000002.tar.gz").touch()  # the packed copy of a tar
    assert ids(discover(str(folder))) == ALL
    assert not caplog.records
    (folder / "backup.tar.gz").touch()
    assert ids(discover(str(folder))) == ALL
    assert "backup.tar.gz are not read" in caplog.text


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data [v2]"
    folder.mkdir()
    (tmp_path / "data v").mkdir()
    for name in ("0[1].tar", "02.tar"):
        (folder / name).touch()
    (tmp_path / "data v" / "03.tar").touch()
    (folder / "0[1].tar").rename(folder / "01.tar")
    found = {source: [s.path.stem for s in discover(str(source)) if isinstance(s.path, Path)] for source in (
        folder, folder / "*.tar", f"{folder}/0[1].tar", f"{folder}/{{01..05}}.tar", folder / "02.tar",
        f"{tmp_path}/data ?/*.tar",
    )}  # fmt: skip
    assert list(found.values()) == [["01", "02"], ["01", "02"], ["01"], ["01", "02"], ["02"], ["03"]]
    (folder / "list[1].txt").write_text("01.tar\n02.tar\n")
    assert [s.id for s in discover(str(folder / "list[1].txt"))] == ["01", "02"]
