"""The example shards are small, readable, free to pass on, and agree with their table of truth."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from curation.backends.extract import families as extractor_families
from curation.extract.config import read_config
from tests import ROOT

EXAMPLES = Path(__file__).parent.parent / "examples"
SHARDS = sorted((EXAMPLES / "shards").glob("*.tar"))
FREE = ("CC0", "CC-BY", "public domain", "Apache-2.0/BSD-3")


def truth() -> list[dict[str, str]]:
    with open(EXAMPLES / "truth.tsv", encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))


def members(shard: Path) -> dict[str, dict[str, bytes]]:
    """Sample key → suffix → bytes, with Python's tarfile, which shares no code with the project's reader."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            assert member.isreg(), member.name
            key, suffix = member.name.split(".", 1)
            data = archive.extractfile(member)
            assert data is not None
            samples.setdefault(key, {})[suffix] = data.read()
    return samples


def attribution() -> dict[tuple[str, str], list[str]]:
    rows: dict[tuple[str, str], list[str]] = {}
    for line in (EXAMPLES / "ATTRIBUTION.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0].isdigit():
            rows[cells[0], cells[1]] = cells[2:]
    return rows


def test_the_selection_is_small() -> None:
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()) <= 10_000_000


def test_shards_are_numbered_with_a_gap() -> None:
    ids = [int(shard.stem) for shard in SHARDS]
    assert len(ids) >= 3
    assert ids != list(range(ids[0], ids[0] + len(ids)))


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: shard.stem)
def test_samples_are_whole_and_match_the_truth(shard: Path) -> None:
    rows = {row["key"]: row for row in truth() if row["shard"] == shard.stem}
    samples = members(shard)
    assert list(samples) == list(rows)
    for key, sample in samples.items():
        row = rows[key]
        assert set(sample) == {row["image"], "txt", "json"}
        metadata = json.loads(sample["json"])
        assert metadata["caption"] == sample["txt"].decode("utf-8") == row["caption"]
        with Image.open(io.BytesIO(sample[row["image"]])) as image:
            assert image.size == (metadata["width"], metadata["height"])
            image.load()


def test_every_photo_is_free_to_pass_on_and_attributed() -> None:
    rows, credits = truth(), attribution()
    assert set(credits) == {(row["shard"], row["key"]) for row in rows}
    for row in rows:
        licence, author, source, path = credits[row["shard"], row["key"]]
        assert licence.startswith(FREE), (row["key"], licence)
        assert author
        assert source == row["source"]
        assert path == f"`{row['path']}`"
        granted = row["licence"].startswith(FREE) or "White House photos = US public domain" in row["licence"]
        assert granted, (row["key"], row["licence"])


def test_every_filter_has_work() -> None:
    rows = truth()
    faces = [row for row in rows if row["faces"] not in {"0", "?"}]
    assert len(faces) >= 10
    assert len(rows) > 2 * len(faces)
    languages = Counter(row["lang"] for row in rows)
    assert languages["en"] > 10
    assert languages["xx"] > 0
    assert len(languages) > 5
    assert {row["lang"] for row in faces} > {"en"}
    assert {row["image"] for row in rows} == {"jpg", "webp"}


def test_face_boxes_are_recorded_in_one_shard_null_in_one_and_absent_in_another() -> None:
    kinds = set()
    for shard in SHARDS:
        for sample in members(shard).values():
            metadata = json.loads(sample["json"])
            boxes = metadata.get("face_bboxes", "absent")
            kinds.add("recorded" if isinstance(boxes, list) else str(boxes))
    assert kinds == {"recorded", "None", "absent"}


def test_basic_yml_scores_without_any_download(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    script = [sys.executable, "06_metadata.py", "--yml", "examples/basic.yml", "--input_tars", SHARDS[0]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*script, "--output_metadata_dir", tmp_path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / f"{SHARDS[0].stem}.parquet").to_pylist()
    assert len(rows) == len(members(SHARDS[0]))
    truth_of = {row["key"]: row for row in truth()}
    english = {row["key"] for row in rows if row["language"] == "en"}
    assert english == {row["key"] for row in rows if truth_of[row["key"]]["lang"] == "en"}
    assert all(row["image-width"] > 0 and len(row["phash"]) == 16 and row["uid"] for row in rows)


def test_datacomp_yml_names_what_datacomp_has() -> None:
    arguments = [sys.executable, "-m", "curation", "models", "fetch", "examples/datacomp.yml", "--dry_run"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr  # 2 where the hub does not answer
    config = read_config(str(ROOT / "examples" / "datacomp.yml"), {})
    told = done.stdout + done.stderr
    assert all(model in told for model in config.models)
    families = {d.name: d for family in extractor_families() for d in family.directives}
    made = {name for model in config.models for names in families[model].outputs(model) for name in names}
    assert {*config.postprocess_columns, *config.postprocess_features} <= made
    assert {config.public_name(name) for name in config.postprocess_columns} >= {
        "clip_l14_similarity_score",
        "face_bboxes",
    }
