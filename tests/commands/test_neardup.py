"""``neardup`` on real photos and on vectors with planted duplicates, against NumPy over all pairs at once."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.__main__ import main
from curation.commands.tables.neardup import Options
from curation.commands.tables.similarity import TOLERANCE, Groups, Vectors, cell_pairs, exact_pairs, normalise
from tests import ROOT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PHOTOS = sorted((ROOT / "examples/shards").glob("*.tar"))
FEATURE = "grey-image"


def descriptor(image: Image.Image) -> np.ndarray[Any, Any]:
    """16×16 grey values about their mean: enough to tell copies from other photos."""
    small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), np.float32).reshape(-1)
    centred: np.ndarray[Any, Any] = small - small.mean()
    return centred


def write_shard(
    folder: Path, shard: str, uids: Sequence[str | None], rows: Any, sizes: Sequence[tuple[int, int]] | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "uid": pa.array(uids, pa.string()),
        "key": [f"{n:05d}" for n in range(len(uids))],
        "tar": [shard] * len(uids),
    }
    if sizes is not None:
        table |= {"original_width": [w for w, _ in sizes], "original_height": [h for _, h in sizes]}
    pq.write_table(pa.table(table), folder / f"{shard}.parquet")
    np.savez_compressed(folder / f"{shard}.npz", **{FEATURE: np.asarray(rows)})


def uid(number: int) -> str:
    return f"{number:032x}"


def subset(path: Path) -> list[int]:
    """The uids as numbers, which ``uid`` made."""
    return [low for _, low in np.load(path, allow_pickle=False).tolist()]


def neardup(folder: Path, out: Path, *flags: str, threshold: float = 0.9) -> list[dict[str, Any]]:
    arguments = ["neardup", str(folder), "--feature", FEATURE, "--threshold", str(threshold)]
    assert main([*arguments, "--out", str(out / "groups.parquet"), "--keep", str(out / "keep.npy"), *flags]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["groups.parquet", "keep.npy"]
    found: list[dict[str, Any]] = pq.read_table(out / "groups.parquet").to_pylist()
    return found


# ---- real photos


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    found = []
    for path in PHOTOS:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".webp")) and (file := tar.extractfile(member)):
                    found.append(Image.open(io.BytesIO(file.read())).convert("RGB"))
    return found


def copy(image: Image.Image, scale: float, quality: int) -> Image.Image:
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    data = io.BytesIO()
    image.resize(size).save(data, "JPEG", quality=quality)
    return Image.open(data)


def test_smaller_and_reencoded_copies_of_photos_are_grouped(photos: list[Image.Image], tmp_path: Path) -> None:
    """Every third photo has a half-sized copy of bad quality in another shard, every sixth one of full size."""
    copies = [(number, copy(photos[number], 0.5, 40)) for number in range(0, len(photos), 3)]
    copies += [(number, copy(photos[number], 1, 60)) for number in range(0, len(photos), 6)]
    everything = [*enumerate(photos), *copies]
    parts = [everything[: len(photos)], everything[len(photos) :]]
    for shard, part in enumerate(parts):
        uids = [uid(1000 * (2 - shard) + 10 * place) for place, _ in enumerate(part)]
        write_shard(
            tmp_path / "in",
            str(shard),
            uids,
            [descriptor(image) for _, image in part],
            [image.size for _, image in part],
        )
    rows = neardup(tmp_path / "in", tmp_path / "out", threshold=0.98)
    members: dict[int, set[int]] = {}
    for row in rows:
        number = parts[int(row["tar"])][int(row["key"])][0]
        members.setdefault(row["group"], set()).add(number)
    originals = [next(iter(group)) for group in members.values() if len(group) == 1]
    assert len(members) - len(originals) <= 2, "photos that resemble one another by themselves"
    assert set(originals) >= set(range(0, len(photos), 3)) - {n for g in members.values() if len(g) > 1 for n in g}
    for row in rows:
        if row["keep"]:
            assert row["cosine"] == pytest.approx(1)
            number = parts[int(row["tar"])][int(row["key"])][0]
            full = [other for n, other in everything if n == number and other.size == photos[number].size]
            if len(members[row["group"]]) == 1:
                assert row["tar"] == ("1" if len(full) > 1 else "0"), "the largest, of these the lowest uid"
    assert len(subset(tmp_path / "out/keep.npy")) == len(everything) - len(rows) + len(members)


# ---- vectors


def planted(count: int, width: int, groups: int, seed: int = 5) -> tuple[np.ndarray[Any, Any], list[set[int]]]:
    """Random vectors, of which some are made slightly different copies of others."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(count, width)).astype(np.float32)
    places = random.permutation(count)[: 3 * groups].reshape(groups, 3)
    rows[places[:, 1:]] = rows[places[:, :1]] + 0.2 * random.normal(size=(groups, 2, width)).astype(np.float32)
    return rows, [set(map(int, group)) for group in places]


def components(pairs: Any, count: int) -> list[set[int]]:
    groups = Groups(count)
    for pair in pairs:
        groups.connect(pair)
    found: dict[int, set[int]] = {}
    for number, root in enumerate(groups.roots().tolist()):
        found.setdefault(root, set()).add(number)
    return sorted((group for group in found.values() if len(group) > 1), key=min)


def vectors_of(rows: np.ndarray[Any, Any], path: Path) -> Vectors:
    vectors = Vectors(path)
    vectors.append(normalise(rows)[0])
    return vectors


def test_tiles_find_what_all_pairs_at_once_find(tmp_path: Path) -> None:
    rows, _ = planted(5000, 32, 300)
    normal = normalise(rows)[0]
    cosines = normal.astype(np.float64) @ normal.T.astype(np.float64)
    for threshold in (0.6, 0.95):
        found = {
            (a, b)
            for first, second in exact_pairs(vectors_of(rows, tmp_path / "v"), threshold)
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        }
        expected = {(int(a), int(b)) for a, b in np.argwhere(np.triu(cosines >= threshold, 1))}
        assert found == expected
        assert len(found) > 300


def test_cells_find_the_planted_duplicates_among_20_000(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    rows, groups = planted(20_000, 64, 2000)
    vectors = vectors_of(rows, tmp_path / "v")
    exact = components(exact_pairs(vectors, 0.8), len(rows))
    assert exact == sorted(groups, key=min)
    cells = list(cell_pairs(vectors, 0.8, tmp_path))
    found = components(cells, len(rows))
    assert sum(group in exact for group in found) >= 0.999 * len(exact), "most of all, in a tenth of the comparisons"
    every = {frozenset(pair) for x, y in exact_pairs(vectors, 0.8) for pair in zip(x.tolist(), y.tolist(), strict=True)}
    assert {frozenset(pair) for x, y in cells for pair in zip(x.tolist(), y.tolist(), strict=True)} <= every


def test_chains_of_pairs_are_one_group_whatever_their_order() -> None:
    random = np.random.default_rng(1)
    chain = np.arange(1, 1000)
    for _ in range(3):
        groups, order = Groups(1002), random.permutation(999)
        for part in np.array_split(order, 7):
            groups.connect((chain[part], chain[part] + 1))
        assert groups.roots().tolist() == [0, *[1] * 1000, 1001]


def test_identical_rows_by_the_thousand(tmp_path: Path) -> None:
    rows = np.ones((3000, 8), np.float32)
    assert components(exact_pairs(vectors_of(rows, tmp_path / "v"), 1.0), 3000) == [set(range(3000))]


def test_a_cosine_at_the_threshold_is_decided_alike_in_every_tile_and_order(tmp_path: Path) -> None:
    """Single precision gives other last digits for other tiles; double precision decides."""
    random = np.random.default_rng(2)
    rows = normalise(normalise(random.normal(size=(3000, 100)).astype(np.float32))[0])[0]
    cosines = np.triu(rows @ rows.T, 1)
    first, second = divmod(int(np.argsort(cosines, axis=None)[-300]), 3000)
    threshold = float((rows[first].astype(np.float64) * rows[second]).sum())
    orders = [np.arange(3000), np.arange(3000)[::-1], random.permutation(3000)]
    found = []
    for number, order in enumerate(orders):
        pairs = exact_pairs(vectors_of(rows[order], tmp_path / str(number)), threshold + TOLERANCE)
        one, two = (order[np.concatenate(part)] for part in zip(*pairs, strict=True))
        found.append({*zip(np.minimum(one, two).tolist(), np.maximum(one, two).tolist(), strict=True)})
    assert found[0] == found[1] == found[2]
    assert (first, second) in found[0]
    assert len(found[0]) == 300


# ---- the command


def test_what_each_group_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    nan = [np.nan, np.nan]
    write_shard(
        tmp_path / "in", "0", [uid(n) for n in (9, 8, 7, 6)], np.array([east, east, north, nan], np.float16),
        [(10, 10), (10, 10), (5, 5), (9, 9)],
    )  # fmt: skip
    write_shard(
        tmp_path / "in", "1", [uid(n) for n in (5, 4, 3)], np.array([north, west, [0, 0]], np.float16), [(9, 9)] * 3
    )
    rows = neardup(tmp_path / "in", tmp_path / "out", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["without_feature"], told["groups"], told["in_groups"], told["left"]) == (
        7,
        2,
        2,
        4,
        3,
    )
    assert [(row["group"], row["uid"], row["tar"], row["key"], row["keep"]) for row in rows] == [
        (0, uid(8), "0", "00001", True),
        (0, uid(9), "0", "00000", False),
        (1, uid(5), "1", "00000", True),
        (1, uid(7), "0", "00002", False),
    ]
    assert subset(tmp_path / "out/keep.npy") == [4, 5, 8]


def test_the_same_bytes_for_other_threads_and_shards_written_in_another_order(tmp_path: Path) -> None:
    rows, _ = planted(3000, 16, 200)
    outs = []
    for number, (shards, threads) in enumerate((((0, 1, 2), "1"), ((2, 0, 1), "2"))):
        for shard in shards:
            part = slice(1000 * shard, 1000 * shard + 1000)
            write_shard(
                tmp_path / f"in{number}", str(shard), [uid(n) for n in range(part.start, part.stop)], rows[part]
            )
        out = tmp_path / f"out{number}"
        command = [sys.executable, "-m", "curation", "neardup", str(tmp_path / f"in{number}"), "--feature", FEATURE]
        command += ["--threshold", "0.9", "--out", str(out / "g.parquet"), "--keep", str(out / "k.npy")]
        environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PATH": "/usr/bin:/bin"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        outs.append([(out / name).read_bytes() for name in ("g.parquet", "k.npy")])
    assert outs[0] == outs[1]


def test_against_an_evaluation_set(tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    rows = random.normal(size=(500, 24)).astype(np.float16)
    rows[7] = np.nan
    others = random.normal(size=(5000, 24)).astype(np.float32)
    others[4000] = rows[3] * 2
    others[4500] = rows[3]
    np.save(tmp_path / "eval.npy", others)
    write_shard(tmp_path / "in", "0", [uid(n) for n in range(300)], rows[:300])
    write_shard(tmp_path / "in", "1", [uid(n) for n in range(300, 500)], rows[300:])
    found = neardup(tmp_path / "in", tmp_path / "out", "--against", str(tmp_path / "eval.npy"), threshold=0.99)
    assert [row["uid"] for row in found] == [uid(n) for n in range(500)]
    cosines = normalise(rows.astype(np.float32))[0] @ normalise(others)[0].T
    for number, row in enumerate(found):
        if number == 7:
            assert row["cosine"] is None
            assert row["nearest"] is None
        else:
            assert row["cosine"] == pytest.approx(cosines[number].max(), abs=1e-6)
            assert row["nearest"] == cosines[number].argmax() or number == 3
    assert found[3]["nearest"] in (4000, 4500)
    assert subset(tmp_path / "out/keep.npy") == [n for n in range(500) if n not in (3, 7)]


def test_bad_input_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*flags: str) -> str:
        arguments = ["neardup", str(tmp_path / "in"), "--out", str(tmp_path / "out/g.parquet"), *flags]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        return error

    write_shard(tmp_path / "in", "0", [uid(1), uid(2)], np.ones((2, 4), np.float16))
    assert f"no feature 'clip' (there are: {FEATURE}) in" in says("--feature", "clip", "--threshold", "0.9")
    assert f"no feature 'grey_imag' (the nearest: {FEATURE}) in" in says("--feature", "grey_imag", "--threshold", "0.9")
    command = "python3 06_metadata.py --models oai-clip-vit-l14 --postprocess_features oai-clip-vit-l14-image\n"
    for feature in ("oai-clip-vit-l14-image", "oai_clip_vit_l14_image", "l14_img"):
        assert says("--feature", feature, "--threshold", "0.9").endswith(
            f"in the npz files; stage 06 makes it: {command}"
        )
    misspelt = says("--feature", "oai-clip-l14-image", "--threshold", "0.9")
    assert misspelt.endswith(
        f"(the nearest: oai-clip-vit-l14-image) in the npz files; stage 06 makes oai-clip-vit-l14-image: {command}"
    )
    known = ("--feature", FEATURE, "--threshold")
    assert "between -1 and 1" in says(*known, "9")
    (tmp_path / "text.npy").write_bytes(b"no array")
    assert "no NumPy file" in says(*known, "0.9", "--against", str(tmp_path / "text.npy"))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "no table of numbers" in says(*known, "0.9", "--against", str(tmp_path / "objects.npy"))
    np.save(tmp_path / "wide.npy", np.ones((2, 5), np.float32))
    assert "has 5 numbers per row" in says(*known, "0.9", "--against", str(tmp_path / "wide.npy"))
    np.savez_compressed(tmp_path / "in/0.npz", **{FEATURE: np.ones((3, 4), np.float16)})
    assert "3 rows, 0.parquet has 2" in says(*known, "0.9")
    np.savez_compressed(tmp_path / "in/0.npz", **{FEATURE: np.ones((2, 5), np.float16)})
    write_shard(tmp_path / "in", "1", [uid(3)], np.ones((1, 4), np.float16))
    assert "cannot be compared" in says(*known, "0.9")
    (tmp_path / "in/1.npz").write_bytes((tmp_path / "in/0.npz").read_bytes()[:-30])
    assert "1.npz: cannot be read" in says(*known, "0.9")
    (tmp_path / "in/1.npz").unlink()
    (tmp_path / "in/0.npz").unlink()
    assert "shard 0 has no 0.npz: there is no feature 'grey-image'" in says(*known, "0.9")
    assert says("--feature", "l14_img", "--threshold", "0.9").endswith(f"stage 06 makes it: {command}")


def test_a_feature_is_found_under_both_of_its_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "in", "0", [uid(1), uid(2)], np.ones((2, 4), np.float16))
    for there in ("l14_img", "oai-clip-vit-l14-image"):
        np.savez_compressed(tmp_path / "in/0.npz", **{there: np.ones((2, 4), np.float16)})
        for asked in ("l14_img", "oai-clip-vit-l14-image"):
            flags = ["--feature", asked, "--threshold", "0.9", "--out", str(tmp_path / "g.parquet")]
            assert main(["neardup", str(tmp_path / "in"), *flags]) == 0


def test_the_page_tells_every_flag() -> None:
    page = (ROOT / "docs/neardup.md").read_text("utf-8")
    flags = {field.name for field in dataclasses.fields(Options)} - {"folder"}
    assert set(re.findall(r"^\| `--(\w+)`", page, flags=re.M)) == flags


MEMORY = """
import re, sys
from curation.__main__ import main
code = main(sys.argv[1:])
# not ru_maxrss, which begins with the parent's
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_vectors(tmp_path: Path) -> None:
    """24,000 vectors of 1,024 numbers are 98 MB as they are compared; that takes no more memory than 6,000.

    The smaller folder has several tiles as well: two tiles and their product are held at a time, and BLAS has buffers
    for each of its threads.
    """
    used = {}
    for shards, index in ((3, "exact"), (12, "exact"), (12, "cells")):
        folder = tmp_path / f"in{shards}"
        random = np.random.default_rng(4)
        for shard in range(shards if not folder.exists() else 0):
            uids = [uid(2000 * shard + n) for n in range(2000)]
            write_shard(folder, f"{shard:02d}", uids, random.normal(size=(2000, 1024)).astype(np.float16))
        command = [sys.executable, "-c", MEMORY, "neardup", str(folder), "--feature", FEATURE, "--threshold", "0.9"]
        command += ["--out", str(tmp_path / f"out{shards}{index}/g.parquet"), "--index", index]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        used[shards, index] = int(done.stdout.splitlines()[-1])
    assert used[12, "exact"] < used[3, "exact"] + 37, used  # half of what 18,000 rows more take
    assert used[12, "cells"] < used[3, "exact"] + 150, used


def test_an_array_that_is_stored_column_by_column(tmp_path: Path) -> None:
    """A pandas frame's values or a transposed tensor: the same groups as with the same array row by row."""
    rows = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)  # more than one block
    rows[4999] = rows[1]
    found = []
    for name, array in (("rows", rows), ("columns", np.asfortranarray(rows))):
        folder = tmp_path / name
        write_shard(folder, "0", [uid(number) for number in range(len(rows))], rows)
        np.savez(folder / "0.npz", **{FEATURE: array})
        np.save(folder / "others.npy", array[:100])
        flags = ["--feature", FEATURE, "--threshold", "0.999"]
        assert main(["neardup", str(folder), *flags, "--out", str(folder / "g"), "--keep", str(folder / "k.npy")]) == 0
        against = ["--against", str(folder / "others.npy"), "--out", str(folder / "n")]
        assert main(["neardup", str(folder), *flags, *against]) == 0
        found.append([(folder / file).read_bytes() for file in ("g", "k.npy", "n")])
    assert found[0] == found[1]
    assert len(subset(tmp_path / "columns/k.npy")) == 4999


def test_keep_looks_for_uids_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    write_shard(folder, "0", [uid(0)], np.ones((1, 4)))
    pq.write_table(pa.table({"key": ["0"]}), folder / "1.parquet")
    np.savez(folder / "1.npz", **{FEATURE: np.ones((1, 4))})
    flags = ["--feature", FEATURE, "--threshold", "0.9", "--out", str(tmp_path / "out/g.parquet")]
    assert main(["neardup", str(folder), *flags, "--keep", str(tmp_path / "out/k.npy")]) == 2
    assert "1.parquet: has no column uid, which --keep needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["neardup", str(folder), *flags]) == 0


@pytest.mark.parametrize("words", [
    ["neardup", "--feature", FEATURE, "--threshold", "0.9"],
    ["select", "--where", "true"],
], ids=["neardup", "select"])  # fmt: skip
def test_two_columns_of_one_name_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    write_shard(folder, "0", [uid(0)], np.ones((1, 4)))
    twice = pa.table([[uid(0)], [uid(1)]], names=["uid", "uid"])
    pq.write_table(twice, folder / "0.parquet")
    assert main([words[0], str(folder), *words[1:], "--out", str(tmp_path / "out/x.npy")]) == 2
    assert "0.parquet: two columns have the name 'uid'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
