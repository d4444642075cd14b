"""What is read of real table files: rows, columns, values that cannot be used; and where outputs may lie."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.download.columns import NamedColumns
from curation.download.rows import json_of
from curation.download.tables import UrlTables
from curation.errors import UsageError
from curation.run.merge import values_of

URL = "http://h.invalid/1.jpg"


def tables(source: Path | str, out: Path, *, quotes: Any = "auto", **columns: Any) -> UrlTables:
    return UrlTables(str(source), out, 1000, NamedColumns(**columns), tsv_quotes=quotes)


def rows_of(path: Path, **options: Any) -> list[dict[str, Any]]:
    found = tables(path, path.parent / "out", **options)
    return [row for shard in found.shards() for row in found.read(shard.id).table.to_pylist()]


def text_rows(folder: Path, name: str, content: str | bytes, **options: Any) -> list[tuple[Any, ...]]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(row.values()) for row in rows_of(folder / name, **options)]


def refused(path: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        tables(path, out, **options)
    return str(caught.value)


# ---- quotation marks


@pytest.mark.parametrize(
    ("field", "auto", "none"),
    [
        ('"Hello there', '"Hello there', '"Hello there'),
        ('three cats"', 'three cats"', 'three cats"'),
        ('"Blue" dress', '"Blue" dress', '"Blue" dress'),
        ('a 5" pipe', 'a 5" pipe', 'a 5" pipe'),
        ('"whole"', "whole", '"whole"'),
        ('"a ""quoted"" word"', 'a "quoted" word', '"a ""quoted"" word"'),
        ('"one" and "two"', '"one" and "two"', '"one" and "two"'),
        ('""', "", '""'),
        ('"', '"', '"'),
        ('"""', '"""', '"""'),
        (' "x"', ' "x"', ' "x"'),
    ],
)
def test_a_quotation_mark_in_a_tsv_is_a_character_but_around_a_whole_field(
    field: str, auto: str, none: str, tmp_path: Path
) -> None:
    content = f"caption\turl\textra\r\n{field}\t{URL}\t{field}\r\nnext\t{URL}\t\n"
    assert text_rows(tmp_path, "t.tsv", content) == [(auto, URL, auto), ("next", URL, "")]
    assert text_rows(tmp_path, "t.tsv", content, quotes="none")[0] == (none, URL, none)


def test_a_tsv_can_be_read_by_the_rules_of_csv(tmp_path: Path) -> None:
    content = f'caption\turl\n"two\nlines\tand a tab"\t{URL}\n'
    assert text_rows(tmp_path, "t.tsv", content, quotes="csv") == [("two\nlines\tand a tab", URL)]
    assert "--tsv_quotes csv" in refused(tmp_path / "t.tsv", tmp_path / "other")


def test_an_open_quotation_mark_swallows_no_file(tmp_path: Path) -> None:
    content = "caption\turl\n" + "".join(f'"open {number}\t{URL}\n' for number in range(5000))
    found = text_rows(tmp_path, "t.tsv", content)
    assert len(found) == 5000
    path = tmp_path / "t.csv"
    path.write_bytes(b'caption,url\n"open,x\n' + b"x" * (33 << 20))
    assert "line 3: field larger than field limit" in refused(path, tmp_path / "csv")


# ---- values


def test_a_long_field_costs_no_table(tmp_path: Path) -> None:
    data = "data:image/png;base64," + "A" * 200_000
    expected = [(data, "long"), (URL, "ok")]
    assert text_rows(tmp_path, "a.csv", f"url,caption\n{data},long\n{URL},ok\n") == expected
    assert text_rows(tmp_path, "b.csv", f'url,caption\n"{data}",long\n{URL},ok\n') == expected
    assert text_rows(tmp_path, "c.tsv", f"url\tcaption\n{data}\tlong\n{URL}\tok\n") == expected
    assert "3 fields" in refused_content(tmp_path, f"url,caption\n{URL},a,b\n")


def refused_content(folder: Path, content: str) -> str:
    (folder / "bad.csv").write_text(content)
    return refused(folder / "bad.csv", folder / "bad")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_text_is_read_by_its_mark_and_no_value_costs_its_table(name: str, encoding: str, tmp_path: Path) -> None:
    tab = "\t" if "tsv" in name else ","
    data = f"url{tab}caption\nhttp://h/café.jpg{tab}café\n{URL}{tab}ok\n".encode(encoding)
    found = text_rows(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
    expected = ("http://h/caf%E9.jpg", "caf\ufffd") if encoding == "latin-1" else ("http://h/café.jpg", "café")
    assert found == [expected, (URL, "ok")]
    notes = tables(tmp_path / name, tmp_path / "again").notes
    assert ["2 values are no UTF-8" in note for note in notes] == [True] * (encoding == "latin-1")


def test_a_list_of_urls_keeps_raw_bytes_as_servers_know_them(tmp_path: Path) -> None:
    assert text_rows(tmp_path, "t.txt", b"\xef\xbb\xbfhttp://h/a\xe9\n\n  http://h/b\r\n") == [
        ("http://h/a%E9",),
        ("http://h/b",),
    ]


def test_a_lone_surrogate_in_json_costs_itself(tmp_path: Path) -> None:
    lines = [{"url": URL, "caption": "a\ud800b", "deep": ["\ud800"], "n": 10**30}, {"url": URL, "caption": "c"}]
    found = text_rows(tmp_path, "t.jsonl", "\n".join(map(json.dumps, lines)))
    assert [row[1] for row in found] == ["a\ufffdb", "c"]
    assert found[0][3] == str(10**30)


def invalid(kind: Any = None) -> Any:
    column = pa.array([b"caf\xe9", b"ok"], pa.binary()).view(pa.string())
    return column if kind is None else column.dictionary_encode()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (invalid(), "caf\ufffd"),
        (invalid("dictionary"), "caf\ufffd"),
        (pa.ListArray.from_arrays([0, 1, 2], invalid()), None),
        (pa.StructArray.from_arrays([invalid()], ["a"]), None),
        (pa.array([60_000 * 31_557_600 * 10**6, 0], pa.timestamp("us")), None),
        (pa.array([2**50, 0], pa.timestamp("s", "UTC")), None),
        (pa.array([10**9, 0], pa.date32()), None),
        (pa.array([2**62, 0], pa.duration("s")), None),
        (pa.array([0, 1], pa.timestamp("us", "Mars/Base")), None),
        (pa.array([float("nan"), 1.0]), None),
        (pa.array([[2**50], [0]], pa.list_(pa.timestamp("s"))), None),
        (pa.array([2**64 - 1, 0], pa.uint64()), 2**64 - 1),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_one_value_costs_itself_and_not_its_shard(column: Any, value: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [URL, URL], "caption": ["a", "b"], "x": column}), tmp_path / "t.parquet")
    found = tables(tmp_path / "t.parquet", tmp_path / "out").read("00000000")
    cells = values_of(found.table.column("x"))
    assert json.loads(json_of({"x": cells[0]}))["x"] == value
    if str(column.type) != "timestamp[us, tz=Mars/Base]":
        assert cells[1] is not None
    assert values_of(found.table.column("caption")) == ["a", "b"]


def test_bad_urls_of_a_parquet_are_quoted_and_counted(tmp_path: Path) -> None:
    column = pa.array([b"http://h/\xe9 x", URL.encode(), None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": column}), tmp_path / "t.parquet")
    found = tables(tmp_path / "t.parquet", tmp_path / "out").read("00000000")
    assert found.table.column("url").to_pylist() == ["http://h/%E9%20x", URL, None]
    assert found.mended == 1


# ---- columns


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (pa.array([b"a dog", None], pa.binary()), ["a dog", None]),
        (pa.array([b"a dog", b"\xff"], pa.large_binary()), ["a dog", "\ufffd"]),
        (pa.array([b"a dog", b"a cat"], pa.binary(5)), ["a dog", "a cat"]),
        (pa.array([b"a dog", None], pa.binary()).dictionary_encode(), ["a dog", None]),
        (pa.array(["a dog", None]).dictionary_encode(), ["a dog", None]),
        (pa.array(["a dog", None], pa.large_string()), ["a dog", None]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([7, None]), ["7", None]),
        (pa.array([0.5, None]), ["0.5", None]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_captions_of_any_type_that_is_text_are_text(captions: Any, expected: list[Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [URL, URL], "caption": captions}), tmp_path / "t.parquet")
    found = tables(tmp_path / "t.parquet", tmp_path / "out").read("00000000")
    assert found.caption == "caption"
    assert found.table.column("caption").to_pylist() == expected
    assert "binary" not in str(found.table.schema.field("caption").type)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["a dog", "b"]]),
        pa.array([{"en": "a dog"}]),
        pa.array([[("en", "a dog")]], pa.map_(pa.string(), pa.string())),
        pa.array([0], pa.timestamp("s")),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("name", ["caption", "url"])
def test_a_column_that_holds_no_text_is_refused_before_anything_is_downloaded(
    column: Any, name: str, tmp_path: Path
) -> None:
    columns = {"url": pa.array([URL]), "caption": pa.array(["a"])} | {name: column}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    told = refused(tmp_path / "t.parquet", tmp_path / "out")
    assert f"the column {name!r} holds" in told
    assert ("--caption_col" if name == "caption" else "--url_col") in told


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([URL]), pa.array(["a"]), pa.array(["b"])], ["url", "x", "x"])
    pq.write_table(twice, tmp_path / "t.parquet")
    assert "two columns have one name: x" in refused(tmp_path / "t.parquet", tmp_path / "out")
    assert "two columns have one name" in refused_content(tmp_path, f"url,x,x\n{URL},a,b\n")
    (tmp_path / "t.tsv").write_text(f"url\tx\tx\n{URL}\ta\tb\n")
    assert "two columns have one name" in refused(tmp_path / "t.tsv", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "caption", "told"),
    [
        (["url", "caption"], "caption", []),
        (["URL", "TEXT"], "TEXT", []),
        (["url", "alt_text"], "alt_text", ["captions are taken from the column 'alt_text'"]),
        (["url", "title"], "title", ["captions are taken from the column 'title'"]),
        (["url", " caption "], " caption ", []),
        (["url", "Alt Text"], "Alt Text", ["captions are taken from the column 'Alt Text'"]),
        (["url", "text", "title"], "text", ["choose another one with --caption_col: title"]),
        (
            ["url", "caption", "image_url"],
            "caption",
            ["URLs are taken from the column 'url'", "choose another one with --url_col: image_url"],
        ),
        (["url", "width"], None, ["no column of captions among url, width", "--caption_col"]),
        ([" image_url"], None, ["no column of captions"]),
    ],
)
def test_which_columns_are_taken_is_told_in_one_line(
    names: list[str], caption: str | None, told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(",".join(names) + "\n" + ",".join([URL] * len(names)) + "\n")
    found = tables(tmp_path / "t.csv", tmp_path / "out")
    assert found.read("00000000").caption == caption
    assert len(found.notes) == bool(told)
    assert all(word in found.notes[0] for word in told)


def test_a_folder_of_an_older_version_finds_the_captions_that_it_found(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"url,title\n{URL},x\n")
    assert tables(tmp_path / "t.csv", tmp_path / "out", caption_names="few").read("00000000").caption is None
    assert tables(tmp_path / "t.csv", tmp_path / "out").read("00000000").caption == "title"


def test_the_same_note_of_many_tables_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.csv").write_text(f"url,x\n{URL},y\n")
    (note,) = tables(folder, tmp_path / "out").notes
    assert "and 29 more tables: no column of captions" in note


# ---- places


@pytest.mark.parametrize(
    "kind", ["itself", "inside", "a link", "through a link", "a glob", "a deep glob", "another glob"]
)
def test_an_output_where_tables_are_looked_for_is_refused_at_the_first_start(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "in [v2]"
    folder.mkdir()
    pq.write_table(pa.table({"url": [URL]}), folder / "a.parquet")
    (tmp_path / "link").symlink_to(folder)
    source, out = {
        "itself": (folder, folder),
        "inside": (folder, folder / "deep" / "out"),
        "a link": (tmp_path / "link", folder / "out"),
        "through a link": (folder, tmp_path / "link"),
        "a glob": (folder / "*.parquet", tmp_path / "link"),
        "a deep glob": (f"{tmp_path}/**/*.parquet", tmp_path / "out" / "deep"),
        "another glob": (f"{tmp_path}/*/*.parquet", tmp_path / "out"),
    }[kind]
    assert "Use an output folder outside" in refused(Path(source), out)
    assert not (out / "_tables").exists()


def test_an_output_beside_the_tables_is_taken(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [URL]}), tmp_path / "urls.parquet")
    for source in (tmp_path / "urls.parquet", tmp_path / "urls*.parquet", f"{tmp_path}/[u]rls.parquet"):
        assert len(tables(source, tmp_path).shards()) == 1
    inside = tmp_path / "out"
    (inside / "_receipts").mkdir(parents=True)
    assert len(tables(tmp_path, inside).shards()) == 1, "one that was begun goes on"


def test_a_table_that_would_be_overwritten_is_refused(tmp_path: Path) -> None:
    for name in ("metadata.csv", "00000003.parquet"):
        pq.write_table(pa.table({"url": [URL]}), tmp_path / name)
        assert "Use an output folder outside" in refused(tmp_path / name, tmp_path)


def test_a_path_with_characters_of_a_pattern_that_exists_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "data [v2] *?"
    folder.mkdir()
    (tmp_path / "data v").mkdir()
    for name in ("a[1].parquet", "b*.parquet"):
        pq.write_table(pa.table({"url": [URL]}), folder / name)
    for source, count in (
        (folder, 2),
        (folder / "a[1].parquet", 1),
        (folder / "b*.parquet", 1),
        (folder / "*.parquet", 2),
    ):
        assert len(tables(source, tmp_path / "out").shards()) == count


def test_a_deleted_output_folder_costs_nothing(tmp_path: Path) -> None:
    import shutil

    (tmp_path / "t.csv").write_text(f"url,caption\n{URL},x\n")
    found = tables(tmp_path / "t.csv", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert found.read("00000000").table.num_rows == 1
