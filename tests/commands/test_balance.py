"""``select --balance`` against the definitions of MetaCLIP and SemDeDup, written out for all rows at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.__main__ import main
from curation.commands.balance.clusters import repeated_rows
from curation.commands.balance.concepts import Entries, spaced
from curation.commands.balance.rows import draws
from curation.reshard.uids import UID_DTYPE
from tests import ROOT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("duckdb")
pytest.importorskip("faiss")

FEATURE = "grey-image"


def uid(number: int) -> str:
    """Not in the order of the numbers, as the digests of real samples are."""
    return f"{number * 0x9E3779B97F4A7C15 % (1 << 64):016x}{number:016x}"


def write_tables(folder: Path, columns: dict[str, list[Any]], rows: Any = None, shards: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))
    for shard, part in enumerate(np.array_split(np.arange(count), shards)):
        table = {name: [values[n] for n in part] for name, values in columns.items()}
        pq.write_table(pa.table(table), folder / f"{shard}.parquet", row_group_size=700)
        if rows is not None:
            np.savez(folder / f"{shard}.npz", **{FEATURE: rows[part]})
    return folder


def select(folder: Path, out: Path, *flags: str, capsys: Any = None) -> set[str]:
    assert main(["select", str(folder), "--out", str(out), "--json", *flags]) == 0
    found = [f"{high:016x}{low:016x}" for high, low in np.load(out, allow_pickle=False).tolist()]
    assert found == sorted(found)
    return set(found)


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


# ---- concepts

WORDS = ["cat", "red", "the", "new", "york", "st.", "a", "é", "cat,", "x:y", "U.S.", "", "the cat", "on", "\t", "New"]


def test_an_entry_is_found_exactly_where_metaclip_finds_it() -> None:
    """Its rule: the entry with a space at both ends lies in the spaced text."""
    chance = random.Random(3)
    names = sorted({" ".join(chance.choices(WORDS, k=chance.randint(1, 3))) for _ in range(400)} - {""})
    entries = Entries(names)
    found = 0
    for _ in range(1500):
        caption = chance.choice([" ", "", "  "]).join(chance.choices(WORDS, k=chance.randint(0, 8)))
        expected = [n for n, name in enumerate(names) if f" {name} " in spaced(caption)]
        assert entries.of(caption) == expected, caption
        found += len(expected)
    assert found > 1000
    assert spaced('A cat, in the U.S.\n"x`y;z:w?v!u"') == ' A cat ,  in the U . S .  "x ` y ; z : w ? v ! u" '


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str | None]]:
    chance = random.Random(5)
    frequent = ["photo", "cat", "dog", "red car", "New York"]
    captions: list[str | None] = []
    for number in range(6000):
        words = [chance.choice(frequent)] if chance.random() < 0.8 else []
        words += ["rare thing"] if number % 400 == 0 else []
        captions.append(None if number % 97 == 0 else f"a {chance.choice(WORDS)} {' , '.join(words)} here")
    columns: dict[str, list[Any]] = {"uid": [uid(n) for n in range(6000)], "caption": captions}
    columns["width"] = [n % 10 for n in range(6000)]
    folder = write_tables(tmp_path_factory.mktemp("captions") / "tables", columns)
    names = ["photo", "cat", "dog", "red car", "New York", "rare thing", "nowhere", "photo", ""]
    (folder.parent / "entries.txt").write_text("\n".join(names), "utf-8")
    (folder.parent / "entries.json").write_text(json.dumps(names), "utf-8")
    return folder, captions


def test_concepts_keep_what_metaclip_keeps(
    captioned: tuple[Path, list[str | None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, captions = captioned
    flags = ["--balance", "concepts", "--entries", str(folder.parent / "entries.txt"), "--max_matches", "200"]
    kept = select(folder, tmp_path / "keep.npy", *flags, "--seed", "1", "--report", str(tmp_path / "report.parquet"))
    result = told(capsys)
    names = ["photo", "cat", "dog", "red car", "New York", "rare thing", "nowhere"]
    matches = [{n for n in names if f" {n} " in spaced(caption)} if caption else set() for caption in captions]
    counts = {name: sum(name in one for one in matches) for name in names}
    uids = np.array([(int(uid(n)[:16], 16), n) for n in range(len(captions))], UID_DTYPE)
    expected, after = set(), dict.fromkeys(names, 0)
    for number, draw in enumerate(draws(uids, 1).tolist()):
        stays = 1 - float(np.prod([1 - min(1.0, 200 / counts[name]) for name in matches[number]]))
        if draw < stays:
            expected.add(uid(number))
            for name in matches[number]:
                after[name] += 1
    assert kept == expected
    report = pq.read_table(tmp_path / "report.parquet").to_pylist()
    assert {row["entry"]: (row["before"], row["after"]) for row in report} == {
        name: (counts[name], after[name]) for name in names if counts[name]
    }
    assert [row["before"] for row in report] == sorted((row["before"] for row in report), reverse=True)
    for row in report:
        assert row["probability"] == pytest.approx(min(1, 200 / row["before"]))
        assert row["before"] <= 200 or 140 < row["after"] < 330, "about t of each, and some that other entries keep"
    assert after["rare thing"] == counts["rare thing"] == 14, "what is rare stays whole"
    assert result["rows"] == 6000 and result["kept"] == result["balance"]["after"] == len(kept)
    assert result["balance"]["rows_without_match"] == sum(not one for one in matches)
    assert result["balance"]["entries"] == 7 and result["balance"]["entries_without_match"] == 1
    assert result["balance"]["largest"] == report


def test_draws_depend_on_the_seed_and_the_uid_alone(captioned: tuple[Path, list[str | None]], tmp_path: Path) -> None:
    """Not on the order of the rows, on shards, or on how the entries are written; more are kept where t is larger."""
    folder, captions = captioned
    order = np.random.default_rng(2).permutation(len(captions))
    columns: dict[str, list[Any]] = {"uid": [uid(int(n)).upper() for n in order]}
    columns["text"] = [captions[n] for n in order]
    other = write_tables(tmp_path / "other", columns, shards=7)

    def kept(tables: Path, entries: str, most: int, seed: int) -> set[str]:
        flags = ["--entries", str(folder.parent / entries), "--max_matches", str(most), "--seed", str(seed)]
        return select(tables, tmp_path / "out" / "keep.npy", "--balance", "concepts", *flags)

    one = kept(folder, "entries.txt", 100, 1)
    assert kept(other, "entries.json", 100, 1) == one
    assert kept(folder, "entries.txt", 100, 2) != one
    assert kept(folder, "entries.txt", 150, 1) > one
    assert len(kept(folder, "entries.txt", 10**9, 1)) > 4000


def test_a_condition_comes_before_the_balance(
    captioned: tuple[Path, list[str | None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = captioned
    flags = ["--balance", "concepts", "--entries", str(folder.parent / "entries.txt")]
    narrow = select(folder, tmp_path / "keep.npy", *flags, "--max_matches", "50", "--where", "width < 2")
    result = told(capsys)
    assert result["balance"]["before"] == 1200 and result["rows"] == 6000
    assert max(row["before"] for row in result["balance"]["largest"]) < 400, "matches of the chosen rows are counted"
    assert narrow < {uid(n) for n in range(6000) if n % 10 < 2}
    everything = select(folder, tmp_path / "keep.npy", *flags, "--max_matches", "100000", "--where", "width < 2")
    assert narrow < everything


def test_rows_without_a_uid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns: dict[str, list[Any]] = {"uid": [uid(1), None, "no"], "caption": ["a cat"] * 3}
    folder = write_tables(tmp_path / "tables", columns, shards=1)
    (tmp_path / "entries.txt").write_text("cat\n", "utf-8")
    flags = ["--out", str(tmp_path / "keep.npy"), "--balance", "concepts", "--entries", str(tmp_path / "entries.txt")]
    assert main(["select", str(folder), *flags]) == 2
    assert "0.parquet: rows without a uid of 32 hexadecimal digits" in capsys.readouterr().err
    assert main(["select", str(folder), *flags, "--skip_bad_uids"]) == 0
    said = capsys.readouterr().out
    assert "left out: 2 rows without a uid" in said
    assert "entry  before  probability  after" in said and "cat    1       1            1" in said


# ---- clusters


def near_copies(count: int, seed: int = 4) -> np.ndarray[Any, Any]:
    """Random vectors, of which half are slightly changed copies of others, some of them in chains."""
    chance = np.random.default_rng(seed)
    rows = chance.normal(size=(count, 24)).astype(np.float32)
    for place in range(1, count, 2):
        rows[place] = rows[chance.integers(0, place)] + chance.choice([0.0, 0.05, 0.3]) * chance.normal(size=24)
    rows[7] = np.nan
    return rows


def semdedup(rows: Any, centroid: Any, keep: str, epsilon: float, seed: int) -> set[int]:
    """All pairs of one cluster, as the paper's algorithm has it: a row goes if any before it is too near."""
    unit = rows.astype(np.float64) / np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    whole = np.flatnonzero(~np.isnan(unit[:, 0]))
    uids = np.array([(int(uid(int(n))[:16], 16), n) for n in whole], UID_DTYPE)
    nearness = unit[whole] @ centroid
    first = {"hard": nearness, "easy": -nearness, "random": draws(uids, seed)}[keep]
    order = whole[np.lexsort((uids["f1"], uids["f0"], np.round(first, 6)))]
    cosines = np.triu(unit[order] @ unit[order].T, 1)
    return {int(n) for n, most in zip(order, cosines.max(axis=0), strict=True) if most <= 1 - epsilon}


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_one_cluster_is_the_algorithm_of_the_paper(
    keep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = near_copies(3000)  # more than a tile
    folder = write_tables(tmp_path / "tables", {"uid": [uid(n) for n in range(3000)]}, rows)
    flags = ["--balance", "clusters", "--feature", FEATURE, "--epsilon", "0.03", "--clusters", "1", "--keep", keep]
    kept = select(folder, tmp_path / "keep.npy", *flags, "--seed", "9")
    unit = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
    centre = np.nanmean(unit, axis=0)
    expected = semdedup(rows, centre / np.sqrt((centre**2).sum()), keep, 0.03, 9)
    # Copies have the same nearness but for rounding, so that which of them comes first may differ: never how many.
    assert len(kept ^ {uid(n) for n in expected}) <= (0 if keep == "random" else 20)
    assert len(kept) == len(expected)
    result = told(capsys)["balance"]
    assert result["samples"] == 2999 and result["without_feature"] == 1 and result["dropped"] == 2999 - len(kept)
    assert result["largest"] == [{"cluster": 0, "before": 2999, "after": len(kept)}]
    assert 1500 <= len(kept) < 2200


def test_clusters_hold_what_is_alike_whatever_the_threads_and_shards(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    rows = np.repeat(chance.normal(size=(400, 24)), 10, axis=0) + 0.01 * chance.normal(size=(4000, 24))
    uids = [uid(n) for n in range(4000)]
    folder = write_tables(tmp_path / "tables", {"uid": uids}, rows.astype(np.float16))
    flags = ["--balance", "clusters", "--feature", FEATURE, "--epsilon", "0.05"]
    report = ["--report", str(tmp_path / "report.parquet")]
    kept = select(folder, tmp_path / "one" / "keep.npy", *flags, *report, "--threads", "1")
    assert {uids.index(one) // 10 for one in kept} == set(range(400)), "one of each ten is left"
    assert len(kept) < 440, "a few tens lie across two clusters"
    clusters = pq.read_table(tmp_path / "report.parquet")
    assert len(clusters) == 100 and sum(clusters["before"].to_pylist()) == 4000
    assert sum(clusters["after"].to_pylist()) == len(kept)
    order = chance.permutation(4000)
    again = write_tables(tmp_path / "again", {"uid": [uids[n] for n in order]}, rows[order].astype(np.float16), 11)
    assert select(again, tmp_path / "two" / "keep.npy", *flags, "--threads", "3") == kept
    small = select(folder, tmp_path / "one" / "keep.npy", *flags[:-1], "1e-7")
    assert len(small) == 4000


def test_cosines_at_the_threshold_are_decided_in_double_precision() -> None:
    """Many equal rows, at a threshold that single precision cannot tell from 1."""
    rows = np.tile(np.full((1, 48), 1 / np.sqrt(48), np.float32), (2500, 1))
    cosine = float((rows[0].astype(np.float64) ** 2).sum())
    assert repeated_rows(rows, np.arange(2500), cosine - 1e-12).tolist() == [False] + [True] * 2499
    assert not repeated_rows(rows[:100], np.arange(100), cosine).any()


def test_flags_that_do_not_belong_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns: dict[str, list[Any]] = {"uid": [uid(1)], "caption": ["a"]}
    folder = write_tables(tmp_path / "tables", columns, np.ones((1, 4), np.float32), shards=1)
    (tmp_path / "entries.txt").write_text("\n", "utf-8")
    (tmp_path / "entries.json").write_text('[["a"]]', "utf-8")

    def refused(*flags: str) -> str:
        capsys.readouterr()
        assert main(["select", str(folder), "--out", str(tmp_path / "keep.npy"), *flags]) == 2
        return capsys.readouterr().err

    assert "--balance concepts needs --entries" in refused("--balance", "concepts")
    assert "--balance clusters needs --epsilon" in refused("--balance", "clusters", "--feature", FEATURE)
    assert "--entries has an effect with --balance concepts only" in refused("--where", "true", "--entries", "x")
    for flag, value in (("--report", "x"), ("--seed", "0")):
        assert f"{flag} has an effect with --balance only" in refused("--where", "true", flag, value)
    assert "--keep has an effect with --balance clusters only" in refused("--where", "true", "--keep", "hard")
    assert "--max_matches has an effect with --balance concepts" in refused("--where", "true", "--max_matches", "5")
    for text, said in (('{"a": 1}', "a JSON list of texts is wanted"), ("no such text", "none of 1, such as")):
        (tmp_path / "other").write_text(text, "utf-8")
        assert said in refused("--balance", "concepts", "--entries", str(tmp_path / "other"))
    concepts = ["--balance", "concepts", "--entries"]
    assert "has 0 entries" in refused(*concepts, str(tmp_path / "entries.txt"))
    assert "a JSON list of texts is wanted" in refused(*concepts, str(tmp_path / "entries.json"))
    assert "cannot be read" in refused(*concepts, str(tmp_path / "nothing"))
    assert "--epsilon" in refused("--balance", "clusters", "--feature", FEATURE, "--epsilon", "5")
    clusters = ["--balance", "clusters", "--feature", FEATURE, "--epsilon", "0.1"]
    assert "--clusters 5: there are 1 samples" in refused(*clusters, "--clusters", "5")
    assert "there is no feature 'none'" in refused("--balance", "clusters", "--feature", "none", "--epsilon", "0.1")
    assert "nothing to balance" in refused(*clusters, "--where", "false")
    assert not (tmp_path / "keep.npy").exists()
    np.savez(folder / "0.npz", **{FEATURE: np.ones((2, 4), np.float32)})
    assert "0.npz: has more rows than 0.parquet" in refused(*clusters)


# ---- memory


RUN = """
import resource, sys
from curation.__main__ import main
for words in sys.stdin.read().splitlines():
    assert main(words.split()) == 0
    print("MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Seventeen times the rows: the peak grows by less than half of what the added features take."""
    (tmp_path / "entries.txt").write_text("cat\na mat\n", "utf-8")
    words = []
    for count in (2_000, 34_000):
        rows = np.random.default_rng(3).normal(size=(count, 256)).astype(np.float16)
        columns: dict[str, list[Any]] = {"uid": [uid(n) for n in range(count)], "caption": ["a cat on a mat"] * count}
        folder = write_tables(tmp_path / str(count), columns, rows, shards=4)
        for flags in (
            f"concepts --entries {tmp_path}/entries.txt --max_matches 50",
            f"clusters --feature {FEATURE} --epsilon 0.1 --clusters 100",
        ):
            words.append(f"select {folder} --out {folder}/out.npy --threads 1 --balance {flags}")
    said = subprocess.run(
        [sys.executable, "-c", RUN], input="\n".join(words), capture_output=True, text=True, check=True, cwd=ROOT
    )
    peaks = [float(line.split()[1]) for line in said.stdout.splitlines() if line.startswith("MB ")]
    assert peaks[3] - peaks[1] < 32_000 * 256 * 4 / 2**20 / 2, peaks
