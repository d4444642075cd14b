"""``audit`` on features of stage 06: the diversity of each group and near copies, against all pairs at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import pdist

from curation.__main__ import main
from curation.commands.audit.command import as_markdown
from curation.commands.audit.variety import CLUSTERS, MAX_GROUPS, MEMBERS, PictureFeatures
from curation.commands.places import EDITS, METADATA
from curation.shards import bucket_of
from tests.commands.checked_root import CheckedRoot, Made, face
from tests.commands.test_audit_checks import A, B, audit
from tests.commands.test_report import report

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FEATURE = "oai-clip-vit-b32-image"
Rows = NDArray[np.float32]


def write_features(folder: Path, shard: str, keys: list[str], rows: Rows, read: Path | None = None) -> None:
    """What stage 06 leaves of a shard.  read: the folder of the shards that it read; None: there is no receipt."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": keys}), folder / f"{shard}.parquet")
    np.savez(folder / f"{shard}.npz", **{FEATURE: rows, "dedup-isc-ft-v107-image": rows})
    if read is not None:
        outputs = [
            {"path": name, "size": (folder / name).stat().st_size} for name in (f"{shard}.parquet", f"{shard}.npz")
        ]
        told = {"shard": shard, "status": "done", "outputs": outputs, "notes": {}, "inputs": [], "version": 1}
        told["sources"] = [{"folder": f"../{read.name}", "absolute": str(read)}]
        place = folder / "_receipts" / METADATA / bucket_of(shard)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{shard}.json").write_text(json.dumps(told))


def only_scores(folder: Path, shard: str) -> None:
    """Take the features of ``write_features`` away again: stage 06 ran on these shards for scores alone."""
    (folder / f"{shard}.npz").unlink()
    path = folder / "_receipts" / METADATA / bucket_of(shard) / f"{shard}.json"
    told = json.loads(path.read_bytes())
    told["outputs"].pop()
    path.write_text(json.dumps(told))


def unit(rows: Rows) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    normal: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return normal


def jackknife(rows: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean cosine distance and its interval, from every set without one row."""
    mean = float(pdist(rows, "cosine").mean())
    without = np.array([pdist(np.delete(rows, row, 0), "cosine").mean() for row in range(len(rows))])
    error = np.sqrt((len(rows) - 1) / len(rows) * np.square(without - without.mean()).sum())
    low, high = stats.norm.interval(0.95, mean, error)
    return mean, float(low), float(high)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckedRoot, dict[str, Rows]]:
    """Two groups in two shards: pictures of the first are alike, and six of them are copies; stage 06 ran on the edits
    and on the source shards, which hold other samples too."""
    made = CheckedRoot(tmp_path_factory.mktemp("variety") / "root")
    source = np.random.default_rng(3)
    features: dict[str, Rows] = {}
    for shard in ("00000000", "00000001"):
        samples = [Made(f"{shard}-{n:02d}", B if n % 3 else A, [{"face": face()}]) for n in range(45)]
        made.add(shard, samples)
        rows = source.normal(size=(45, 24)).astype(np.float32)
        rows[::3] = rows[::3] * 0.5 + 1
        rows[:9:3] = np.float32(2) * rows[0] if shard == "00000000" else features["00000000-00"]
        features |= {one.key: row for one, row in zip(samples, rows, strict=True)}
        write_features(made.root / "scores", shard, [one.key for one in samples], rows, made.root / "edits")
        keys = [f"other {n}" for n in range(5)] + [one.key for one in samples]
        photos = source.normal(size=(50, 24)).astype(np.float32)
        photos[:5] = 1
        write_features(made.root / "photos", shard, keys, photos, made.root / "shards")
        write_features(made.root / "judged", shard, keys, photos, made.root / "shards")
        only_scores(made.root / "judged", shard)
    return made, features


def test_distances_are_those_of_all_pairs(
    made: tuple[CheckedRoot, dict[str, Rows]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, features = made
    variety = audit(root.root, capsys)["variety"]
    assert (variety["feature"], variety["near"], variety["sampled"]) == (FEATURE, 0.95, False)
    rows = {row["group"]: row for row in variety["generated"]["groups"]}
    groups = {one.key: one.group for samples in root.samples.values() for one in samples}
    for name, row in (*rows.items(), ("all", variety["generated"]["all"])):
        mine = unit(np.array([value for key, value in features.items() if name in (groups[key], "all")]))
        assert row["pictures"] == len(mine)
        found = (row["distance"], row["distance_low"], row["distance_high"])
        assert found == pytest.approx(jackknife(mine), abs=1e-6)
    assert rows[A]["distance_high"] < rows[B]["distance_low"]


def test_near_copies_are_counted(made: tuple[CheckedRoot, dict[str, Rows]], capsys: pytest.CaptureFixture[str]) -> None:
    result = audit(made[0].root, capsys)
    generated = result["variety"]["generated"]
    first, second = generated["groups"]
    assert (first["near"]["lost"], first["near"]["of"], first["clusters"], first["largest"]) == (6, 30, 1, 6)
    assert (second["near"]["lost"], second["clusters"], second["largest"]) == (0, 0, 0)
    low, high = stats.binomtest(6, 30).proportion_ci(method="wilson")
    assert (first["near"]["low"], first["near"]["high"]) == pytest.approx((low, high))
    [cluster] = generated["largest"]
    assert cluster["pictures"] == 6
    assert cluster["first"][0] == {"shard": "00000000", "key": "00000000-00", "group": A}
    assert [one["key"][-2:] for one in cluster["first"]] == ["00", "03", "06"] * 2
    source = result["variety"]["source"]
    assert source["all"]["pictures"] == 90, "the photos that were replaced, not the others of the source shards"
    assert source["all"]["near"]["lost"] == 0
    text = "\n".join(as_markdown(result))
    assert "| asian female | 30 | 0." in text and "| 20.0% (9.5% to 37.3%) | 1 | 6 |" in text
    assert "originals: mean distance" in text
    loose = audit(made[0].root, capsys, "--near", "1")["variety"]["generated"]["all"]
    assert loose["near"]["lost"] == 6, "exact copies"


def test_a_part_of_the_pictures(made: tuple[CheckedRoot, dict[str, Rows]]) -> None:
    from curation.commands.audit.command import Options, variety_of
    from curation.commands.audit.command import audit as read
    from curation.commands.audit.groups import stage_places

    root = made[0].root
    places = stage_places(root)
    variety = variety_of(Options(root=root), places, read(root, places, 1), 30)
    assert variety is not None and variety["sampled"]
    assert 15 <= variety["generated"]["all"]["pictures"] == variety["source"]["all"]["pictures"] <= 45


def test_folders_that_are_named(
    made: tuple[CheckedRoot, dict[str, Rows]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features on the hybrid shards have rows of samples that were not edited; without features nothing is measured."""
    root = CheckedRoot(tmp_path / "root")
    root.add("00000000", [Made(f"k{n}", A, [{"face": face()}]) for n in range(4)])
    result = audit(root.root, capsys)
    assert result["variety"] is None and "Not measured: there are no features" in "\n".join(as_markdown(result))
    rows = np.eye(6, dtype=np.float32)
    rows[4] = np.nan
    write_features(tmp_path / "hybrid", "00000000", ["x", "k0", "k1", "k2", "k3", "y"], rows)
    found = audit(root.root, capsys, "--features", str(tmp_path / "hybrid"))["variety"]
    assert found["generated"]["all"]["pictures"] == 3 and found["generated"]["without_feature"] == 1
    assert found["generated"]["all"]["distance"] == pytest.approx(1) and found["source"] is None
    named = ("--feature", "dedup-isc-ft-v107-image")
    assert audit(root.root, capsys, "--features", str(tmp_path / "hybrid"), *named)["variety"]["feature"] == named[1]


def test_pictures_without_features_and_pictures_that_were_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = CheckedRoot(tmp_path / "root")
    for shard in ("00000000", "00000001"):
        root.add(shard, [Made(f"{shard}-{n}", A if n else "", [{"face": face()}]) for n in range(4)])
        keys = [f"{shard}-{n}" for n in range(4 if shard == "00000000" else 1)]
        write_features(root.root / "scores", shard, keys, np.eye(len(keys), 4, dtype=np.float32), root.root / "edits")
    variety = audit(root.root, capsys)["variety"]
    assert (variety["generated"]["all"]["pictures"], variety["missing"], variety["older_shards"]) == (5, 3, 0)
    for folder, stage, finished in (("scores", METADATA, 1.0), ("edits", EDITS, 2.0)):
        path = root.root / folder / "_receipts" / stage / bucket_of("00000000") / "00000000.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"finished": finished}))
    result = audit(root.root, capsys)
    assert result["variety"]["older_shards"] == 1
    text = "\n".join(as_markdown(result))
    assert "3 generated pictures are not in these tables: run stage 06 on the folder of the edits" in text
    assert "Stage 03 made the pictures of 1 shards again after these features" in text
    page = report(root.root, tmp_path / "report.html").text
    assert "3 generated pictures are not in these tables" in page and "the pictures of 1 shards again" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--near", "2"), "--near"),
        (("--source_features", "."), "need --features"),
        (("--feature", "x"), "need --features"),
        (("--scratch", "nowhere"), "no such folder"),
        (("--source", "nowhere"), "no such folder"),
        (("--features", "FEATURES", "--feature", "x-image"), "there is no feature"),
        (("--features", "OTHERS"), "no row belongs to a generated picture"),
    ],
)
def test_what_cannot_be_compared(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = CheckedRoot(tmp_path / "root")
    root.add("00000000", [Made("k", A, [{"face": face()}])])
    write_features(tmp_path / "FEATURES", "00000000", ["k"], np.ones((1, 3), np.float32))
    write_features(tmp_path / "OTHERS", "00000000", ["other"], np.ones((1, 3), np.float32))
    given = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    assert main(["audit", str(root.root), *given]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "which", "says"),
    [
        ("widths", "source", "has 4 numbers a picture, and 3 in --features"),
        ("widths of shards", "features", "has 4 numbers a picture, and 3 in the shards before"),
        ("feature", "source", "there is no feature 'oai-clip-vit-b32-image'"),
        ("feature", "features", "name the feature of the pictures with --feature"),
        ("rows", "source", "1 rows, 00000000.parquet has 2; run stage 06 again for this shard"),
        ("rows", "features", "1 rows, 00000000.parquet has 2; run stage 06 again for this shard"),
        ("strangers", "source", "no row belongs to a photo that was replaced"),
        ("no npz", "source", "shard 00000001 has no 00000001.npz"),
        ("no key", "features", "has no column key"),
        ("no table", "source", "there is no *.parquet"),
    ],
)
def test_runs_that_do_not_fit_are_told_by_their_flag(
    spoil: str, which: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of both runs can be the one that was computed otherwise; the message says which flag names it."""
    root, folder = CheckedRoot(tmp_path / "root"), tmp_path / which
    for number, shard in enumerate(("00000000", "00000001")):
        keys = [f"{number}-{n}" for n in range(2)]
        root.add(shard, [Made(key, A, [{"face": face()}]) for key in keys])
        for name in ("features", "source"):
            wide = 3 + (name == which and (spoil == "widths" or (spoil == "widths of shards" and number)))
            mine = ["x", "y"] if spoil == "strangers" and name == which else keys
            write_features(tmp_path / name, shard, mine, np.eye(2, wide, dtype=np.float32))
    if spoil == "feature":
        for path in folder.glob("*.npz"):
            np.savez(path, other=np.eye(2, 3, dtype=np.float32))
    elif spoil == "rows":
        np.savez(folder / "00000000.npz", **{FEATURE: np.eye(1, 3, dtype=np.float32)})
    elif spoil == "no npz":
        (folder / "00000001.npz").unlink()
    elif spoil == "no key":
        pq.write_table(pa.table({"uid": ["a", "b"]}), folder / "00000000.parquet")
    elif spoil == "no table":
        for path in folder.glob("*.parquet"):
            path.unlink()
    given = ("--features", str(tmp_path / "features"), "--source_features", str(tmp_path / "source"))
    assert main(["audit", str(root.root), *given]) == 2
    said = capsys.readouterr().err
    flag = "--source_features" if which == "source" else "--features"
    assert said.startswith(f"error: {flag}") and says in said and said.count("\n") == 1, said


def test_runs_that_were_found_and_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody gave a flag: the message names the one that helps.  A run on other shards costs only the comparison."""
    root = CheckedRoot(tmp_path / "root")
    root.add("00000000", [Made(key, A, [{"face": face()}]) for key in ("a", "b")])
    rows = np.eye(2, 3, dtype=np.float32)
    write_features(root.root / "scores", "00000000", ["a", "b"], rows, root.root / "edits")
    write_features(root.root / "photos", "00000000", ["a", "b"], np.eye(2, 5, dtype=np.float32), root.root / "shards")
    assert main(["audit", str(root.root)]) == 2
    said = capsys.readouterr().err
    assert "5 numbers a picture, and 3 in" in said and "--source_features" in said and "(found)" in said
    write_features(root.root / "photos", "00000000", ["x", "y"], rows, root.root / "shards")
    assert main(["audit", str(root.root), "--json"]) == 0
    told, warned = capsys.readouterr()
    variety = json.loads(told)["variety"]
    assert variety["generated"]["all"]["pictures"] == 2 and variety["source"] is None
    assert "no row belongs to a photo that was replaced" in warned and "with --source_features" in warned


def test_few_pictures_and_many_groups(tmp_path: Path) -> None:
    """One picture has no pair, two have no interval; groups beyond a bound count among all."""
    pictures = PictureFeatures(tmp_path)
    assert pictures.measure(0.9, lambda places: [])["all"]["distance"] is None
    groups = ["one", "two", "two", *(f"group {n}" for n in range(MAX_GROUPS + 5))]
    rows = np.random.default_rng(1).normal(size=(len(groups), 8)).astype(np.float32)
    pictures.add("0", list(range(len(groups))), groups, rows)
    found = pictures.measure(0.9999, lambda places: [""] * len(places))
    by_name = {row["group"]: row for row in found["groups"]}
    assert len(by_name) == MAX_GROUPS and found["all"]["pictures"] == len(groups)
    assert by_name["one"]["distance"] is None and by_name["two"]["distance_low"] is None
    assert by_name["two"]["distance"] == pytest.approx(pdist(unit(rows[1:3]), "cosine")[0], abs=1e-6)
    pictures.close()


def test_more_pictures_than_all_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared through cells, which need faiss; the message without it names the package."""
    from curation.errors import InfrastructureError

    monkeypatch.setattr("curation.commands.audit.variety.EXACT_ROWS", 80)
    pictures = PictureFeatures(tmp_path)
    rows = np.random.default_rng(2).normal(size=(100, 16)).astype(np.float32)
    rows[50:60] = rows[:10]
    pictures.add("0", list(range(100)), ["g"] * 100, rows)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(
            InfrastructureError, match="near copies among more than 80 pictures needs the package faiss"
        ):
            pictures.measure(0.99, lambda places: [""] * len(places))
    pytest.importorskip("faiss")
    found = pictures.measure(0.99, lambda places: [""] * len(places))
    assert found["index"] == "cells" and found["all"]["near"]["lost"] == 20 and found["all"]["clusters"] == 10
    pictures.close()


def test_what_is_told_of_clusters_is_bounded(tmp_path: Path) -> None:
    pictures = PictureFeatures(tmp_path)
    rows = np.repeat(np.eye(10, dtype=np.float32), 9, axis=0)
    for start in range(0, 90, 30):
        pictures.add(str(start), list(range(30)), ["g"] * 30, rows[start : start + 30])
    found = pictures.measure(0.9, lambda places: [f"{shard}/{row}" for shard, row in places])
    assert found["all"]["near"]["lost"] == 90 and found["groups"][0]["clusters"] == 10
    assert [len(one["first"]) for one in found["largest"]] == [MEMBERS] * CLUSTERS
    assert found["largest"][3]["first"][2]["key"] == "0/29" and found["largest"][3]["first"][3]["key"] == "30/0"
    pictures.close()
