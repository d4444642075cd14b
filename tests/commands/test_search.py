"""``index`` and ``search`` on vectors, against NumPy over all rows at once; test_metadata_commands.py has a model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.__main__ import main
from curation.commands.search import build as build_module
from curation.commands.search.nearest import OpenIndex
from tests import ROOT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("faiss")

FEATURE = "grey-image"
HOSTILE = 'a <script>alert(1)</script> "quoted" \x1b[31m red\tcell'


def uid(number: int) -> str:
    return f"{number:032x}"


def write_tables(folder: Path, rows: np.ndarray[Any, Any], shards: int = 3) -> None:
    """``rows`` in some shards, the first of them with NaN in its row 1."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.array_split(np.arange(len(rows)), shards)
    for shard, part in enumerate(numbers):
        table = {
            "uid": [uid(n) for n in part],
            "key": [f"{n:05d}" for n in part],
            "tar": [f"{shard}.tar"] * len(part),
            "caption": [HOSTILE if n == 5 else f"caption {n}" for n in part],
            "url": ["javascript:alert(1)" if n == 5 else f"https://example.org/{n}?a=1&b=2" for n in part],
        }
        pq.write_table(pa.table(table), folder / f"{shard}.parquet", row_group_size=300)
        np.savez(folder / f"{shard}.npz", **{FEATURE: rows[part]})


def clustered(count: int, width: int, seed: int = 3) -> np.ndarray[Any, Any]:
    """Vectors around a few hundred centres, as embeddings of real pictures are."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(200, width))
    rows: np.ndarray[Any, Any] = centres[random.integers(0, 200, count)] + 0.7 * random.normal(size=(count, width))
    return rows.astype(np.float16)


def made(folder: Path, out: Path, *flags: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["index", str(folder), "--feature", FEATURE, "--out", str(out), "--json", *flags]) == 0
    told: dict[str, Any] = json.loads(said.getvalue())
    return told


def like(index: Path, number: int, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["search", str(index), "--like", uid(number), "--json", *flags]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def expected(rows: np.ndarray[Any, Any], number: int, count: int) -> list[tuple[str, float]]:
    """The nearest by all cosines, in double precision."""
    wide = rows.astype(np.float64)
    unit = wide / np.sqrt((wide**2).sum(axis=1, keepdims=True))
    scores = (unit * unit[number]).sum(axis=1)
    scores[number] = -9
    scores[np.isnan(scores)] = -9
    order = np.lexsort((np.arange(len(rows)), -scores))[:count]
    return [(uid(int(n)), float(scores[n])) for n in order]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray[Any, Any]]:
    """Tables of 1,000 samples with an exact index beside them; sample 1 has no feature, sample 40 is a copy of 5."""
    base = tmp_path_factory.mktemp("small")
    rows = clustered(1000, 30)
    rows[1], rows[40] = np.nan, rows[5]
    write_tables(base / "tables", rows)
    told = made(base / "tables", base / "index")
    assert (told["kind"], told["rows"], told["width"], told["without_feature"]) == ("exact", 999, 30, 1)
    assert told["model"] is None and told["made"]
    return base, rows


def test_an_exact_index_finds_what_numpy_finds(
    small: tuple[Path, np.ndarray[Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, rows = small
    for number in (0, 5, 40, 333, 999):
        hits = like(base / "index", number, capsys)["hits"]
        wanted = expected(rows, number, 20)
        assert [hit["uid"] for hit in hits] == [one for one, _ in wanted]
        assert [hit["score"] for hit in hits] == pytest.approx([score for _, score in wanted], abs=1e-12)
    first = like(base / "index", 5, capsys)["hits"][0]
    assert first["uid"] == uid(40) and first["score"] == pytest.approx(1), "a copy is found, the sample itself is not"
    assert (first["key"], first["tar"], first["shard"]) == ("00040", "0.tar", "0")
    least = expected(rows, 5, 7)[6][1]
    assert len(like(base / "index", 5, capsys, "--min_score", repr(least))["hits"]) == 7


def test_a_large_index_finds_nearly_all_and_its_scores_are_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = clustered(6000, 30)
    write_tables(tmp_path / "tables", rows)
    command = [sys.executable, "-m", "curation", "index", str(tmp_path / "tables"), "--feature", FEATURE]
    command += ["--out", str(tmp_path / "index"), "--kind", "ivfpq", "--threads", "1", "--json"]
    one = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert (one["kind"], one["rows"]) == ("ivfpq", 6000) and one["lists"] > 50
    found = total = 0
    for number in range(0, 6000, 300):
        hits, wanted = like(tmp_path / "index", number, capsys)["hits"], dict(expected(rows, number, 20))
        found, total = found + sum(hit["uid"] in wanted for hit in hits), total + 20
        for hit in hits:
            assert hit["uid"] not in wanted or hit["score"] == pytest.approx(wanted[hit["uid"]], abs=1e-12)
    assert found > 0.97 * total, f"{found} of {total}"

    def files(index: Path) -> dict[str, bytes]:
        [build] = [path for path in index.iterdir() if path.is_dir()]
        return {path.name: path.read_bytes() for path in build.iterdir()}

    shutil.copytree(tmp_path / "index", tmp_path / "moved")
    assert like(tmp_path / "moved", 0, capsys)["hits"] == like(tmp_path / "index", 0, capsys)["hits"]
    [data] = (tmp_path / "moved").glob("*/lists.ivfdata")
    for damage in (lambda: os.truncate(data, data.stat().st_size // 2), data.unlink):
        damage()
        assert main(["search", str(tmp_path / "moved"), "--like", uid(0)]) == 2
        assert "lists.faiss: cannot be read" in capsys.readouterr().err

    assert len(like(tmp_path / "index", 0, capsys, "--count", "5000")["hits"]) == 5000, "as many lists as it takes"
    assert main(["search", str(tmp_path / "index"), "--like", uid(0), "--count", "5000", "--probes", "1"]) == 0
    assert "samples are in the lists that were looked into" in capsys.readouterr().err

    # The same files for any number of threads and blocks, and for a build that was killed and went on.
    monkeypatch.setattr(build_module, "_ENCODED_ROWS", 1000)
    flags = ["--feature", FEATURE, "--kind", "ivfpq", "--threads", "3"]
    asked: list[int] = []
    encode = build_module._encode

    def killed_in_the_third(vectors: Any, into: Path, faiss: Any, start: int) -> Path:
        asked.append(start)
        if start == 2000 and len(asked) < 8:
            raise KeyboardInterrupt
        return encode(vectors, into, faiss, start)

    monkeypatch.setattr(build_module, "_encode", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_module.build(*_plan_of(tmp_path / "tables", tmp_path / "again"), 3, lambda step: None)
    assert not (tmp_path / "again" / "index.json").exists(), "a search never sees a part of an index"
    [half] = [path for path in (tmp_path / "again").iterdir() if path.is_dir()]
    kept = {path: path.stat().st_mtime_ns for path in half.iterdir() if path.name != "codes-000002.faiss"}
    assert {"vectors.npy", "samples.arrow", "trained.faiss"} <= {path.name for path in kept}
    said: list[str] = []
    monkeypatch.setattr(build_module, "_encode", encode)
    plan, tables, out = _plan_of(tmp_path / "tables", tmp_path / "again")
    build_module.build(plan, tables, out, 2, said.append)
    assert said == ["encoding 6,000 vectors", "merging"], "what was done is not done again"
    assert main(["index", str(tmp_path / "tables"), "--out", str(out), *flags]) == 0
    assert files(tmp_path / "again") == files(tmp_path / "index")


def _plan_of(tables: Path, out: Path) -> Any:
    from curation.commands.search.index import Options, _plan
    from curation.commands.tables.tables import find_tables

    found = find_tables(tables)
    out.mkdir(exist_ok=True)
    return _plan(Options(folder=tables, feature=FEATURE, out=out, kind="ivfpq"), found), found, out


def test_an_index_is_made_again_only_where_the_tables_changed(
    small: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, rows = small
    shutil.copytree(base / "tables", tmp_path / "tables")
    made(tmp_path / "tables", tmp_path / "index")
    assert not made(tmp_path / "tables", tmp_path / "index")["made"]
    assert like(tmp_path / "index", 5, capsys)["stale"] == ""
    write_tables(tmp_path / "tables", rows[::-1].copy())
    assert main(["search", str(tmp_path / "index"), "--like", uid(5)]) == 0
    assert "has changed since the index was made (6 shards then, 6 now)" in capsys.readouterr().err
    assert made(tmp_path / "tables", tmp_path / "index")["made"]
    assert like(tmp_path / "index", 5, capsys)["stale"] == ""
    assert len([path for path in (tmp_path / "index").iterdir() if path.is_dir()]) == 1, "the old build is gone"
    shutil.rmtree(tmp_path / "tables")
    assert "is not there" in like(tmp_path / "index", 5, capsys)["stale"]


def test_two_processes_do_not_make_one_index(
    small: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    (tmp_path / "index").mkdir()
    with FileLock(tmp_path / "index" / ".lock"):
        arguments = ["index", str(small[0] / "tables"), "--feature", FEATURE, "--out", str(tmp_path / "index")]
        assert main(arguments) == 2
    assert "another process makes this index now" in capsys.readouterr().err


def test_the_subset_is_one_that_stage_04_reads(
    small: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from curation.reshard.uids import Subset

    base, rows = small
    like(base / "index", 5, capsys, "--count", "9", "--out", str(tmp_path / "keep.npy"))
    subset = Subset(tmp_path / "keep.npy")
    subset.check_order()
    wanted = [(0, int(one, 16)) for one, _ in expected(rows, 5, 9)]
    assert len(subset) == 9 and subset.counts(wanted) == [1] * 9


def test_the_table_and_the_sheet_hold_no_hostile_text(
    small: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    base, _ = small
    flags = ["--like", uid(40), "--count", "3", "--sheet", str(tmp_path / "sheet.html")]
    assert main(["search", str(base / "index"), *flags]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out and "\t" not in said.out
    assert [line.split()[:4] for line in said.out.splitlines()[:2]] == [
        ["score", "uid", "key", "shard"],
        ["1.0000", uid(5), "00005", "0"],
    ]
    assert "3 of 3 pictures are not on the sheet; name the folder of the shards with --source" in said.err
    page = (tmp_path / "sheet.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "javascript:" not in page
    assert page.count("https://example.org/") == 2 and "a=1&amp;b=2" in page
    assert "default-src 'none'" in page


def test_what_cannot_be_searched_is_told(
    small: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = small
    index = str(base / "index")

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert "give one of --text, --image and --like" in refused("search", index)
    assert "give one of" in refused("search", index, "--text", "a", "--like", uid(1))
    assert "has no sample with this uid" in refused("search", index, "--like", uid(1))
    assert "search it with --like" in refused("search", index, "--text", "a cat")
    assert "is no index" in refused("search", str(base / "tables"), "--like", uid(1))
    assert "--min_score must be between -1 and 1" in refused("search", index, "--like", uid(5), "--min_score", "30")
    assert "--like needs no model" in refused("search", index, "--like", uid(5), "--model", "oai-clip-vit-b32")
    assert "--image /nowhere.jpg: no such file" in refused("search", index, "--image", "/nowhere.jpg")
    tables = str(base / "tables")
    assert "a folder of its own" in refused("index", tables, "--feature", FEATURE, "--out", tables)
    table = str(base / "tables" / "0.parquet")
    assert "a file; give its folder" in refused("index", table, "--feature", FEATURE, "--out", str(tmp_path / "x"))
    made_again = ["index", str(base / "tables"), "--out", str(tmp_path / "x"), "--feature"]
    assert "there is no feature 'nothing'" in refused(*made_again, "nothing")
    assert "at least 2,560 vectors, and there are 999" in refused(*made_again, FEATURE, "--kind", "ivfpq")
    shutil.copytree(base / "index", tmp_path / "broken")
    record = tmp_path / "broken" / "index.json"
    told = json.loads(record.read_text("utf-8"))
    record.write_text(json.dumps({**told, "build": "../../etc"}), "utf-8")
    assert "its build is no digest" in refused("search", str(tmp_path / "broken"), "--like", uid(5))
    record.write_text(json.dumps({**told, "rows": 5}), "utf-8")
    assert "do not belong together" in refused("search", str(tmp_path / "broken"), "--like", uid(5))
    record.write_text('{"an index": "of something else"}', "utf-8")
    elsewhere = ["index", str(base / "tables"), "--feature", FEATURE, "--out", str(tmp_path / "broken")]
    assert "is no index of this project; choose another folder" in refused(*elsewhere)
    record.write_text(json.dumps(told), "utf-8")
    flat = tmp_path / "broken" / told["build"] / "flat.faiss"
    os.truncate(flat, flat.stat().st_size // 2)
    assert "flat.faiss: cannot be read" in refused("search", str(tmp_path / "broken"), "--like", uid(5))


def test_features_of_two_kinds_make_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tables(tmp_path / "tables", clustered(30, 8))
    np.savez(tmp_path / "tables" / "2.npz", **{FEATURE: np.ones((10, 9), np.float16)})
    assert main(["index", str(tmp_path / "tables"), "--feature", FEATURE, "--out", str(tmp_path / "index")]) == 2
    assert "2.npz: grey-image has 9 numbers of float16, and in the tables before 8" in capsys.readouterr().err
    np.savez(tmp_path / "tables" / "2.npz", **{FEATURE: np.ones((9, 8), np.float16)})
    assert main(["index", str(tmp_path / "tables"), "--feature", FEATURE, "--out", str(tmp_path / "index")]) == 2
    assert "2.npz: has 9 rows, 2.parquet has 10" in capsys.readouterr().err
    with pytest.raises(Exception, match="is no index"):
        OpenIndex(tmp_path / "index")
