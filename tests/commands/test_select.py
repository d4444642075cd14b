"""``select`` against the same choice made row by row in Python and NumPy, on tables with nulls, NaN and odd texts."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.__main__ import main
from curation.commands.tables import agreement
from curation.commands.tables.baselines import BASELINES
from curation.commands.tables.select import Options
from curation.language import find_model
from curation.reshard.uids import parse_uids, sort_uids, write_subset

pa = pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
pq = pytest.importorskip("pyarrow.parquet")

ROWS, SHARDS = 100_000, 8
SCORE = "oai-clip-vit-l14-score"
CAPTIONS = ["two words", "three words here", "a b c", "one\u00a0two\u3000three", "", None, "ünï cödé wörds", "x\x1fy z"]


@dataclass(frozen=True)
class Pool:
    folder: Path
    columns: dict[str, list[Any]]

    def chosen(self, fits: Callable[[dict[str, Any]], bool]) -> np.ndarray[Any, Any]:
        rows = (dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True))
        kept = [row["uid"] for row in rows if fits(row)]
        found = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in kept], np.dtype("u8,u8"))
        found.sort()
        return found


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("metadata")
    random = np.random.default_rng(7)
    halves = random.integers(0, 1 << 64, (ROWS, 2), dtype=np.uint64)
    halves[5:9] = halves[4]  # the same uid in several rows
    halves[10, 0] = 0
    score = random.normal(0.25, 0.06, ROWS).astype(np.float32)
    score[::97] = np.nan
    scores = [None if n % 89 == 0 else value for n, value in enumerate(score.tolist())]
    columns: dict[str, list[Any]] = {
        "uid": [f"{high:016x}{low:016x}" for high, low in halves.tolist()],
        "key": [f"{n:09d}" for n in range(ROWS)],
        "caption": [CAPTIONS[n] for n in random.integers(0, len(CAPTIONS), ROWS)],
        "original_width": random.integers(100, 1200, ROWS).tolist(),
        "original_height": [None if n % 101 == 0 else int(n) for n in random.integers(100, 1200, ROWS)],
        "language": random.choice(["en", "de", "xx"], ROWS).tolist(),
        SCORE: scores,
        "oai-clip-vit-b32-score": random.normal(0.25, 0.05, ROWS).astype(np.float32).tolist(),
    }
    schema = pa.schema([(SCORE, pa.float32()), ("oai-clip-vit-b32-score", pa.float32())])
    for shard in range(SHARDS):
        part = slice(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS)
        arrays = {
            name: pa.array(values[part], schema.field(name).type if name in schema.names else None)
            for name, values in columns.items()
        }
        pq.write_table(pa.table(arrays), folder / f"{shard:08d}.parquet")
    return Pool(folder, columns)


def select(pool: Pool | Path, out: Path, *flags: str) -> np.ndarray[Any, Any]:
    folder = pool.folder if isinstance(pool, Pool) else pool
    assert main(["select", str(folder), "--out", str(out), *flags]) == 0
    found: np.ndarray[Any, Any] = np.load(out, allow_pickle=False)
    assert found.dtype == np.dtype("u8,u8")
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing else is left behind"
    return found


def number(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def is_basic(row: dict[str, Any]) -> bool:
    """DataComp's apply_filter.py, row by row."""
    if row["caption"] is None or row["original_height"] is None:
        return False
    small, large = sorted((row["original_width"], row["original_height"]))
    words = row["caption"].split()
    return is_english(row) and len(words) > 2 and len(row["caption"]) > 5 and small >= 200 and large / small <= 3.0


@cache
def fasttexts_language(caption: str) -> str:
    label: str = pytest.importorskip("fasttext").load_model(str(find_model())).predict(caption)[0][0]
    return label.removeprefix("__label__")


def is_english(row: dict[str, Any]) -> bool:
    """The raw caption's language: the tables' column ``language`` is another program's."""
    return row["caption"] is not None and fasttexts_language(row["caption"]) == "en"


def is_laion2b(row: dict[str, Any]) -> bool:
    model = pytest.importorskip("gcld3").NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)
    english = row["caption"] is not None and model.FindLanguage(text=row["caption"]).language == "en"
    return bool(english and row["oai-clip-vit-b32-score"] >= np.float32(0.28))


def datacomps_threshold(values: list[float | None], fraction: float) -> float:
    plain = np.array([np.nan if value is None else value for value in values])
    return float(-np.sort(-plain)[int(len(plain) * fraction)])


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ("clip_l14_similarity_score > 0.28", lambda row: number(row[SCORE]) > 0.28),
        (f"{SCORE} > 0.28 and language = 'en'", lambda row: number(row[SCORE]) > 0.28 and row["language"] == "en"),
        ("oai_clip_vit_l14_score <= 0.2", lambda row: -math.inf < number(row[SCORE]) <= 0.2),
        (f'"{SCORE}" > 0.3 -- a comment', lambda row: number(row[SCORE]) > 0.3),
        ("original_width - original_height = 1", lambda r: r["original_width"] - (r["original_height"] or 1e9) == 1),
        (f"caption = '{SCORE}' or key = '000000012'", lambda row: row["key"] == "000000012"),
        ("true", lambda row: True),
        ("false", lambda row: False),
    ],
)  # fmt: skip
def test_a_condition_chooses_what_python_chooses(where: str, fits: Any, pool: Pool, tmp_path: Path) -> None:
    found = select(pool, tmp_path / "keep.npy", "--where", where.replace("> 0.28", "> 0.28::double"))
    assert np.array_equal(found, pool.chosen(fits))


def test_baselines_are_datacomps(pool: Pool, tmp_path: Path) -> None:
    l14 = datacomps_threshold(pool.columns[SCORE], 0.3)
    b32 = datacomps_threshold(pool.columns["oai-clip-vit-b32-score"], 0.3)
    small = np.float32(0.28)
    expected = {
        "no_filter": lambda row: True,
        "basic": is_basic,
        "clip_l14_30": lambda row: number(row[SCORE]) >= l14,
        "clip_b32_30": lambda row: row["oai-clip-vit-b32-score"] >= b32,
        "clip_l14_0.28": lambda row: number(row[SCORE]) >= small,
        "clip_b32_0.28": lambda row: row["oai-clip-vit-b32-score"] >= small,
        "laion2b": is_laion2b,
    }
    assert set(expected) <= set(BASELINES)
    for name, fits in expected.items():
        found = select(pool, tmp_path / "keep.npy", "--baseline", name)
        assert np.array_equal(found, pool.chosen(fits)), name
        assert len(found) > 1000, name


def test_a_baseline_and_a_condition_both_hold(pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--baseline", "basic", "--where", f"top({SCORE}, 0.5) or key < '000000100'", "--json"]
    found = select(pool, tmp_path / "keep.npy", *flags)
    least = datacomps_threshold(pool.columns[SCORE], 0.5)
    fits = pool.chosen(lambda row: is_basic(row) and (number(row[SCORE]) >= least or row["key"] < "000000100"))
    assert np.array_equal(found, fits)
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["kept"], told["shards"], told["bad_uids"]) == (ROWS, len(found), SHARDS, 0)
    assert list(told["thresholds"].values()) == [least]


def test_a_share_of_all_and_of_none(pool: Pool, tmp_path: Path) -> None:
    every = select(pool, tmp_path / "keep.npy", "--where", f"top({SCORE}, 1)")
    assert np.array_equal(every, pool.chosen(lambda row: number(row[SCORE]) > -math.inf))
    assert len(select(pool, tmp_path / "keep.npy", "--where", f"TOP({SCORE}, 0)")) == 1
    for share in ("1.5", "-1", "1e"):
        assert main(["select", str(pool.folder), "--out", str(tmp_path / "no"), "--where", f"top(key, {share})"]) == 2


def test_duplicates_are_kept_unless_unique(pool: Pool, tmp_path: Path) -> None:
    every = select(pool, tmp_path / "keep.npy", "--baseline", "no_filter")
    assert len(every) == ROWS
    once = select(pool, tmp_path / "keep.npy", "--baseline", "no_filter", "--unique")
    assert len(once) == ROWS - 4
    assert np.array_equal(once, np.unique(every))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("clip_l14_score > 0.3", "no column 'clip_l14_score' .the nearest: .*oai-clip-vit-l14-score.* in the tables"),
        (
            "top(aesthetic_score, 0.3) and sha256 != 'x' and \"phash\" = '' and capton = ''",
            "no columns 'aesthetic_score', 'sha256', 'phash', 'capton' .the nearest: caption. in the tables; stage 06 "
            "makes aesthetic_score, sha256, phash: python3 06_metadata.py --models oai-clip-vit-l14,aesthetic,hashes "
            "--additional_fields sha256",
        ),
        (
            "aesthetic_scor > 5 and zzz",
            "no columns 'aesthetic_scor' .the nearest: aesthetic-score., 'zzz' .there are: uid, key, .* in the tables; "
            "stage 06 makes aesthetic-score: python3 06_metadata.py --models oai-clip-vit-l14,aesthetic$",
        ),
        ("phash = ''", "no column 'phash' in the tables; stage 06 makes it: python3 06_metadata.py --models hashes$"),
        ("true; copy samples to 'x.csv'", "not one SQL condition"),
        ("true) or (true", "not one SQL condition"),
        ("true, false", "not one SQL condition"),
        ("true from samples", "not one SQL condition"),
        ("", "not one SQL condition|give a condition"),
        ("uid in (select content from read_text('/etc/hostname'))", "Cannot access file"),
        ("uid in (select uid from read_parquet('{other}'))", "Cannot access file"),
        ("uid in (select file from glob('/etc/*'))", "Cannot access file"),
        ("original_width + caption > 3", "--where: "),
        ("caption::int > 3", "cannot be queried: .*Could not convert"),
        ("nosuch(uid)", "nosuch"),
    ],
)
def test_conditions_that_are_none_or_reach_too_far(
    where: str, says: str, pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "other.parquet"
    other.parent.mkdir()
    pq.write_table(pa.table({"uid": ["0" * 32]}), other)
    out = tmp_path / "out" / "keep.npy"
    assert main(["select", str(pool.folder), "--out", str(out), "--where", where.format(other=other)]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert said.count("\n") == 1
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_rows_without_a_uid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "metadata"
    folder.mkdir()
    uids = ["0" * 31 + "2", None, "xyz", "F" * 32, "0" * 33, "g" * 32, "é" * 16]
    pq.write_table(pa.table({"uid": uids}), folder / "0.parquet")
    assert main(["select", str(folder), "--out", str(tmp_path / "keep.npy"), "--where", "true"]) == 2
    assert "--skip_bad_uids" in capsys.readouterr().err
    assert not (tmp_path / "keep.npy").exists()
    flags = ["--where", "true", "--skip_bad_uids", "--json"]
    assert main(["select", str(folder), "--out", str(tmp_path / "keep.npy"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["bad_uids"] == 5
    assert np.load(tmp_path / "keep.npy").tolist() == [(0, 2), ((1 << 64) - 1, (1 << 64) - 1)]


def test_the_page_tells_every_flag_and_every_baseline() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/select.md").read_text("utf-8")
    before, _, rest = page.partition("\n### Agreement of two judges\n")
    of_agreement, _, after = rest.partition("\n## ")
    for text, options in ((before + after, Options), (of_agreement, agreement.Options)):
        flags = {field.name for field in dataclasses.fields(options)} - {"folder"}
        cells = [re.findall(r"`--(\w+)`", cell) for cell in re.findall(r"^\| (`--.*?) \|", text, flags=re.M)]
        assert {names[0] for names in cells} - {"metadata_dir"} <= flags  # DataComp's word for the folder
        assert flags <= {name for names in cells for name in names}
    for name, baseline in BASELINES.items():
        assert f"| `{name}` |" in page
        assert baseline.condition in page
        assert all(f"`{test}`" in page for test in baseline.tests)


# ---- which tables


def receipt(folder: Path, shard: str, path: Path | None, status: str = "done") -> None:
    place = folder / "_receipts" / "06_metadata" / "0" / f"{shard}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    outputs = [] if path is None else [{"path": path.name, "size": path.stat().st_size, "digest": "", "checked": True}]
    place.write_text(json.dumps({"shard": shard, "status": status, "outputs": outputs}))


def test_only_tables_of_done_receipts_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for number in range(4):
        pq.write_table(pa.table({"uid": [f"{number:032x}"]}), folder / f"0000000{number}.parquet")
    receipt(folder, "00000000", folder / "00000000.parquet")
    receipt(folder, "00000001", folder / "00000001.parquet")
    receipt(folder, "00000002", None, "failed")
    keep = tmp_path / "new" / "keep.npy"
    assert select(folder, keep, "--where", "true").tolist() == [(0, 0), (0, 1)]
    said = capsys.readouterr().err
    assert "ignored 2 tables that no done receipt names" in said
    assert "1 shards are not done" in said
    with open(folder / "00000001.parquet", "ab") as file:
        file.write(b"more")
    assert main(["select", str(folder), "--out", str(keep), "--where", "true"]) == 2
    assert "run the stage again for this shard" in capsys.readouterr().err
    assert len(np.load(keep)) == 2, "what was there stays"


def test_folders_without_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, says in ((tmp_path / "none", "no such folder"), (tmp_path, "no *.parquet in it")):
        assert main(["select", str(folder), "--out", str(tmp_path / "k.npy"), "--where", "true"]) == 2
        assert says in capsys.readouterr().err
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table")
    assert main(["select", str(tmp_path), "--out", str(tmp_path / "k.npy"), "--where", "true"]) == 2
    assert "a.parquet" in capsys.readouterr().err
    assert main(["select", str(tmp_path), "--out", str(tmp_path / "k.npy")]) == 2
    assert main(["select", str(tmp_path), "--out", str(tmp_path / "k.npy"), "--baseline", "basix"]) == 2
    assert "choose one of no_filter, basic" in capsys.readouterr().err


# ---- the file


def test_the_subset_file_is_numpys_own(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    pairs = random.integers(0, 5, (5000, 2), dtype=np.uint64).reshape(-1).view(np.dtype("u8,u8"))
    ordered = sort_uids(pairs)
    assert np.array_equal(ordered, np.sort(pairs))
    assert write_subset(tmp_path / "keep.npy", [ordered[:100], ordered[100:]]) == 5000
    np.save(tmp_path / "numpy.npy", ordered)
    assert (tmp_path / "keep.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_uids_are_parsed_in_slices_too() -> None:
    array = pa.array([None, "00000000000000010000000000000002", "x"])
    for column, expected in ((array, [True, False, True]), (array[1:], [False, True])):
        uids, bad = parse_uids(column)
        assert bad.tolist() == expected
        assert uids[~bad].tolist() == [(1, 2)]


MEMORY = """
import re, sys
from curation.__main__ import main
from curation.commands.tables.select import Options
code = main(sys.argv[1:])
# not ru_maxrss, which begins with the parent's
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
sys.exit(code)
"""


def test_memory_stays_within_its_bound(pool: Pool, tmp_path: Path) -> None:
    """The interpreter, NumPy, Arrow and DuckDB take some 150 MB beside --memory_mb."""
    command = [sys.executable, "-c", MEMORY, "select", str(pool.folder), "--out", str(tmp_path / "k.npy")]
    command += ["--memory_mb", "100", "--threads", "1", "--baseline", "no_filter"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], check=True)
    assert int(done.stdout.splitlines()[-1]) < 400
