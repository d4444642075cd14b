"""Samples with several pictures, captions in other places: what each stage that reads samples takes of them."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.__main__ import main as command
from curation.caption.batching import ShardCaptioner
from curation.images import image_size
from curation.tar.samples import Parts, Sample, caption_of, image_of, metadata_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES
from tests import ROOT
from tests.shards import noise, write_shard
from tests.stages.harness import read_json, read_jsonl
from tests.test_nested_shards import run

FACE = {"face_bboxes": [[0.1, 0.1, 0.5, 0.5]], "uid": f"{1:032x}"}
WANTED = frozenset(IMAGE_SUFFIXES) | {"json", "txt"}


def read(path: Path, parts: Parts) -> Sample:
    (sample,) = read_samples(path, WANTED.__contains__, parts=parts)
    sample.check()
    return sample


@pytest.mark.parametrize(
    ("suffixes", "member", "taken"),
    [
        (["0.png", "1.png"], "auto", "0.png"), (["0.png", "1.png"], "1", "1.png"),
        (["0.png", "1.png"], "1.PNG", "1.png"),
        (["0.png", "png"], "auto", "png"), (["0.png", "png"], "0", "0.png"), (["png", "jpg"], "auto", "png"),
        (["png", "jpg"], "jpg", "jpg"), (["0.png", "1.png"], "plain", None), (["0.png"], "2", None),
        (["png"], "0", None), (["0.seg.png"], "auto", "0.seg.png"), (["0.npy", "npy"], "auto", None),
    ],
)  # fmt: skip
def test_which_picture(suffixes: list[str], member: str, taken: str | None, tmp_path: Path) -> None:
    pictures = {suffix: noise(number) for number, suffix in enumerate(suffixes)}
    sample = read(write_shard(tmp_path / "0.tar", {"a.b/k": {**pictures, "json": b"{}"}}), Parts(image=member))
    found = {suffix: data for suffix, data in sample.members.items() if suffix in IMAGE_SUFFIXES}
    assert found == {} if taken is None else image_of(sample) == pictures[taken]
    assert sample.suffixes == (*suffixes, "json"), "as they are in the shard"


def test_everything_is_read_as_it_is_where_all_is_wanted(tmp_path: Path) -> None:
    members = {"0.png": noise(1), "1.png": noise(2), "txt.gz": gzip.compress(b"x")}
    (sample,) = read_samples(write_shard(tmp_path / "0.tar", {"k": members}))
    assert sample.members == members


@pytest.mark.parametrize(
    ("metadata", "field", "caption"),
    [
        ({"caption": "c", "text": "t"}, "auto", "c"), ({"text": "t"}, "auto", "t"),
        ({"caption": None, "text": "t"}, "auto", "t"),
        ({"caption": "", "text": "t"}, "auto", "x"), ({"text": "t"}, "caption", "x"),
        ({"syn": "s", "caption": "c"}, "syn", "s"),
        ({"caption": "c"}, "syn", "x"), ({"text": 3}, "auto", "x"), ({"text": "t"}, "text", "t"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_which_caption(packed: bool, metadata: dict[str, object], field: str, caption: str, tmp_path: Path) -> None:
    if packed and field == "caption":
        pytest.skip("as older versions read it")
    txt = {"txt.gz": gzip.compress(b"x")} if packed else {"txt": b"x"}
    parts = Parts(caption=field)
    sample = read(write_shard(tmp_path / "0.tar", {"k": {**txt, "json": json.dumps(metadata).encode()}}), parts)
    assert caption_of(parts.told(metadata_of(sample)), sample.members.get("txt")) == caption


def test_gzip_that_is_damaged_or_too_large(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"k": {"txt.gz": b"no gzip", "json": b"{}"}})
    (sample,) = read_samples(tmp_path / "0.tar", WANTED.__contains__)
    assert sample.problem is not None and sample.problem[0] == "damaged_gzip"
    bomb = gzip.compress(bytes(1 << 26))
    (sample,) = read_samples(write_shard(tmp_path / "1.tar", {"k": {"txt.gz": bomb}}), WANTED.__contains__)
    assert len(sample.members["txt"]) < 1 << 23


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    metadata = json.dumps(FACE | {"text": "from text", "syn": "synthetic"}).encode()
    pictures = {"0.png": noise(1), "1.png": noise(2, (64, 64))}
    write_shard(tmp_path / "shards/0.tar", {"k": {**pictures, "txt.gz": gzip.compress(b"from txt"), "json": metadata}})
    return tmp_path / "shards"


def _sizes(page: str) -> set[int]:
    """The width of each thumbnail of a page."""
    data = [base64.b64decode(text) for text in re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)]
    return {image_size(one)[0] for one in data}


def test_the_batch_size_is_tried_with_the_picture_that_is_read(shards: Path, tmp_path: Path) -> None:
    seen = []
    backend = SimpleNamespace(
        family=SimpleNamespace(served=False), prepare=lambda image: seen.append(image.size) or np.zeros(1)
    )
    for name in ("0", "1"):
        given = {"batch_size": None, "seed_of": len, "sizes": tmp_path, "what": "x", "parts": Parts(name)}
        captioner: Any = ShardCaptioner(cast(Any, backend), cast(Any, None), **cast(Any, given))
        captioner._heaviest(shards / "0.tar")
    assert [width for width, _ in seen] == [48, 64]


@pytest.mark.parametrize(("flags", "caption", "width"), [
    ((), "from text", 48), (("--image_member", "1", "--caption_field", "syn"), "synthetic", 64),
    (("--caption_field", "absent", "--image_member", "0.png"), "from txt", 48),
])  # fmt: skip
def test_the_stages(flags: tuple[str, ...], caption: str, width: int, shards: Path, tmp_path: Path) -> None:
    where = ("--input", shards, "--output", tmp_path / "captions", "--edits", tmp_path / "edits")
    assert run("01_filter_noface", *where, "--detector", "recorded", "--quiet", *flags) == 0
    assert read_json(tmp_path / "captions/0.json") == {"k.json": caption}
    assert "caption" not in read_json(tmp_path / "edits/0.json")["k.json"], "the metadata are copied as they are"
    stub = ("--format", "jsonl,files", "--batch_size", 8, "--device", "cpu", "--quiet")
    assert run("05_recaption", shards, "-o", tmp_path / "recaptions", *stub, *flags) == 0
    (row,) = read_jsonl(tmp_path / "recaptions/rows/0.jsonl")
    assert (row["original_caption"], row["width"]) == (caption, width)
    (picture,) = (tmp_path / "recaptions/files/0").glob("*.png")
    page_of = (
        shards,
        "-o",
        tmp_path / "recaptions",
        *stub,
        *flags,
        "--compare",
        tmp_path / "recaptions/captions.jsonl",
    )
    assert run("05_recaption", *page_of) == 0
    assert _sizes((tmp_path / "recaptions/compare.html").read_text("utf-8")) == {width}
    assert (
        command(
            ["report", str(tmp_path / "recaptions"), "--source", str(shards), "--output", str(tmp_path / "report.html")]
        )
        == 0
    )
    assert width in _sizes((tmp_path / "report.html").read_text("utf-8"))
    assert picture.read_bytes() == (noise(1) if width == 48 else noise(2, (64, 64)))
    models = ("--custom_pypath", ROOT / "examples/plugin_brightness.py", "--models", "brightness,statistics")
    out = ("--input", shards, "--output", tmp_path / "scores", "--nworkers", 1, "--device", "cpu", "--quiet")
    assert run("06_metadata", *out, *models, *flags) == 0
    (scores,) = pq.read_table(tmp_path / "scores/0.parquet").to_pylist()
    assert scores["status"] == "ok" and width in scores.values(), scores


def test_a_root_of_an_older_version_reads_as_it_did(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record of options lacks both: taken out by hand."""
    where = ("--input", shards, "--output", tmp_path / "captions", "--edits", tmp_path / "edits")
    old = ("--image_member", "plain", "--caption_field", "caption", "--detector", "recorded")
    assert run("01_filter_noface", *where, *old) == 1, "the sample has no caption by the old rule"
    epoch = tmp_path / "captions/_receipts/01_filter_noface/_epoch.1.json"
    record = read_json(epoch)
    del record["options"]["image_member"], record["options"]["caption_field"]
    epoch.write_text(json.dumps(record))
    capsys.readouterr()
    assert run("01_filter_noface", *where, "--detector", "recorded", "--retry_failed") == 1
    log = capsys.readouterr().err
    assert "--image_member plain, --caption_field caption: an older version has begun" in log and "no_caption" in log
