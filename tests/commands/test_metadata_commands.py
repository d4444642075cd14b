"""``select`` and ``neardup`` on what stage 06 itself wrote, with a tiny CLIP on real photos."""

from __future__ import annotations

import importlib
import io
import json
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.__main__ import main
from tests import ROOT

pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("duckdb")
pytest.importorskip("transformers")

CLIP = "oai-clip-vit-b32"


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if file := tar.extractfile(member):
                yield member.name, file.read()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of real photos, a shard of copies of them with uids of their own, and a broken image."""
    from tests.backends.tiny_extractors import save_clip

    base = tmp_path_factory.mktemp("metadata")
    shards, out = base / "shards", base / "out"
    shards.mkdir()
    photos: dict[str, bytes] = {}
    copies: dict[str, bytes] = {}
    number = 0
    for name, data in members(ROOT / "examples/shards/00000001.tar"):
        photos[name] = data
        if name.endswith(".jpg"):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "JPEG", quality=95)
            copies[name] = buffer.getvalue()
        elif name.endswith(".json"):
            facts = json.loads(data)
            photos[name] = json.dumps({**facts, "uid": f"{0xA0000 + number:032x}"}).encode()
            copies[name] = json.dumps({**facts, "uid": f"{0xB0000 + number:032x}"}).encode()
            number += 1
        else:
            copies[name] = data
    copies |= {"broken.jpg": b"no image", "broken.txt": b"a caption", "broken.json": b'{"uid": "%032x"}' % 0xC0000}
    write_tar(shards / "0.tar", photos)
    write_tar(shards / "1.tar", copies)
    flags = ["--models", f"{CLIP},language", "--weights", f"{CLIP}={save_clip(base / 'clip')}", "--nworkers", "1"]
    flags += ["--additional_fields", "caption,original_width,original_height", "--use_datacomp_keys", "--quiet"]
    flags += ["--postprocess_features", "all", "--device", "cpu", "--input", str(shards)]
    run_stage("06_metadata", *flags, "--output", str(out))
    return out


def run_stage(script: str, *flags: str) -> None:
    """In this process, whose handlers of signals it leaves as they were."""
    handlers = {
        name: signal.getsignal(name) for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
    }
    code = importlib.import_module(script).main([*flags])
    for name, handler in handlers.items():
        signal.signal(name, handler)
    assert code == 0


def reshard(shards: Path, subset: Path, output: Path) -> None:
    flags = ["--input", str(shards), "--subset", str(subset), "--output", str(output), "--quiet"]
    run_stage("04_reshard", *flags, "--workers", "1")


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for shard in "01" for row in pq.read_table(out / f"{shard}.parquet").to_pylist()]


def uids(path: Path) -> list[str]:
    return [f"{high:016x}{low:016x}" for high, low in np.load(path, allow_pickle=False).tolist()]


def select(out: Path, keep: Path, *flags: str) -> list[str]:
    assert main(["select", str(out), "--out", str(keep), *flags]) == 0
    return uids(keep)


def test_select(output: Path, tmp_path: Path) -> None:
    everything = rows(output)
    assert len(everything) > 30
    assert sum(row["status"] == "ok" for row in everything) == len(everything) - 1
    scores = [row["clip_b32_similarity_score"] for row in everything]
    middle = float(np.median([score for score in scores if score is not None]))
    keep = tmp_path / "keep.npy"
    expected = sorted(r["uid"] for r in everything if (r["clip_b32_similarity_score"] or -9) > middle)
    assert select(output, keep, "--where", f"clip_b32_similarity_score > {middle!r}::double") == expected
    assert select(output, keep, "--where", "status = 'ok'") == sorted(
        r["uid"] for r in everything if r["status"] == "ok"
    )
    best = sorted((score for score in scores if score is not None), reverse=True)[int(0.3 * len(scores))]
    chosen = [row["uid"] for row in everything if (row["clip_b32_similarity_score"] or -9) >= best]
    assert select(output, keep, "--baseline", "clip_b32_30") == sorted(chosen)
    basic = select(output, keep, "--baseline", "basic")
    assert len(basic) > 3
    assert set(basic) <= {row["uid"] for row in everything if row["language"] == "en"}


def test_neardup(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every photo and its copy are in one group; what is kept is the original, whose uid is lower."""
    flags = ["--feature", "b32_img", "--threshold", "0.999", "--json", "--keep", str(tmp_path / "keep.npy")]
    assert main(["neardup", str(output), "--out", str(tmp_path / "groups.parquet"), *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    found = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    groups = {row["uid"]: row["group"] for row in found}
    pairs = [uid for uid in groups if uid[-5] == "a" and groups.get(uid[:-5] + "b" + uid[-4:]) == groups[uid]]
    count = (told["samples"] - 1) // 2
    assert len(pairs) >= 0.9 * count
    assert told["without_feature"] == 1
    kept = uids(tmp_path / "keep.npy")
    assert len(kept) == told["left"]
    assert f"{0xC0000:032x}" not in kept
    assert all(row["uid"][-5] == "a" for row in found if row["keep"] and row["uid"] in pairs)


@pytest.fixture(scope="module")
def index(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("index") / "images"
    assert main(["index", str(output), "--feature", "oai-clip-vit-b32-image", "--out", str(folder)]) == 0
    return folder


def search(output: Path, index: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    weights = [] if "--like" in flags else ["--weights", str(output.parent / "clip")]
    assert main(["search", str(index), "--json", *weights, *flags]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_search_by_text_image_and_sample(
    output: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text has the vector that stage 06 computes of it, and so has a picture: scores are the products of features."""
    features = [np.load(output / f"{shard}.npz", allow_pickle=False) for shard in "01"]
    images, texts = (
        np.concatenate([one[name] for one in features]).astype(np.float64) for name in ("b32_img", "b32_txt")
    )
    everything = rows(output)
    number = next(n for n, row in enumerate(everything) if row["caption"] and len(row["caption"]) > 10)
    scores = dict(zip([row["uid"] for row in everything], images @ texts[number], strict=True))
    hits = search(output, index, capsys, "--text", everything[number]["caption"], "--count", "1000")["hits"]
    assert len(hits) == len(everything) - 1, "all but the broken image"
    assert [hit["score"] for hit in hits] == pytest.approx([scores[hit["uid"]] for hit in hits], abs=2e-3)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)

    shard, photo = next((name, data) for name, data in members(output.parent / "shards/0.tar") if name.endswith(".jpg"))
    (tmp_path / "photo.jpg").write_bytes(photo)
    flags = ["--count", "5", "--sheet", str(tmp_path / "sheet.html"), "--out", str(tmp_path / "keep.npy")]
    hits = search(output, index, capsys, "--image", str(tmp_path / "photo.jpg"), *flags)["hits"]
    assert {hit["key"] for hit in hits[:2]} == {shard.removesuffix(".jpg")}, "the photo and its copy"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-3)
    assert uids(tmp_path / "keep.npy") == sorted(hit["uid"] for hit in hits)
    page = (tmp_path / "sheet.html").read_text("utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') == 5, "the shards are where the receipts say"

    reshard(output.parent / "shards", tmp_path / "keep.npy", tmp_path / "found")
    written = [name for shard in "01" for name, _ in members(tmp_path / "found" / f"{shard}.tar")]
    assert {name.partition(".")[0] for name in written} == {hit["key"] for hit in hits}, "stage 04 reads the subset"

    weights = ["--weights", str(output.parent / "clip"), "--count", "1"]
    for text, is_cut in (("a cat", False), ("a cat on a mat " * 60, True)):
        capsys.readouterr()
        assert main(["search", str(index), "--text", text, *weights]) == 0
        warned = "does not read the end of --text" in capsys.readouterr().err
        assert warned == is_cut

    same = search(output, index, capsys, "--like", hits[0]["uid"], "--count", "4")["hits"]
    assert [hit["uid"] for hit in same] == [hit["uid"] for hit in hits[1:]]


def test_a_query_of_another_model_is_refused(
    output: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.backends.tiny_extractors import save_clip

    def refused(*flags: str) -> str:
        capsys.readouterr()
        assert main(["search", str(index), *flags]) == 2
        return capsys.readouterr().err

    assert "the vectors of two models cannot be compared" in refused("--text", "a cat", "--model", "oai-clip-vit-l14")
    other = str(save_clip(tmp_path / "other", seed=5))
    assert "the index was made with revision" in refused("--text", "a cat", "--weights", other)
    assert "no such" in refused("--text", "a cat", "--weights", str(tmp_path / "nothing"))
    weights = str(output.parent / "clip")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    assert "--image" in refused("--image", str(tmp_path / "bad.jpg"), "--weights", weights)
    assert "give 1 to 10,000 characters" in refused("--text", " ", "--weights", weights)


def test_receipts_that_changed_make_an_index_stale(
    output: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [receipt] = (output / "_receipts/06_metadata").glob("*/1.json")
    there = receipt.read_bytes()
    uid = rows(output)[0]["uid"]
    try:
        for text, stale in ((there, False), (there.replace(b'"done"', b'"retry"'), True)):
            other = receipt.with_suffix(".new")
            other.write_bytes(text)
            other.replace(receipt)
            assert bool(search(output, index, capsys, "--like", uid)["stale"]) == stale
    finally:
        receipt.write_bytes(there)


def test_queries_of_other_families(tmp_path: Path) -> None:
    """OpenCLIP's and SigLIP's models compute texts and pictures, a copy detector only pictures."""
    from curation.commands.search.query import QueryModel
    from curation.commands.search.source import FeatureModel, SourceState
    from curation.commands.search.stored import IndexRecord
    from curation.errors import UsageError
    from tests.backends.tiny_extractors import save_openclip, save_siglip2, save_sscd

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(tmp_path / "a.png")

    def model(directive: str, width: int, weights: Path | None = None) -> QueryModel:
        told = FeatureModel(directive, ""), SourceState("x", "", 1, "", {}), ""
        record = IndexRecord("0" * 32, "x", "exact", 1, width, 0, 0, "l2", 7, *told)
        return QueryModel(record, None, None if weights is None else str(weights), 1)

    for one in (
        model(f"openclip:{save_openclip(tmp_path / 'openclip', 'dfn')}", 16),
        model(f"siglip:{save_siglip2(tmp_path / 'siglip')}", 32),
    ):
        vectors = [one.of_text("a red cat"), one.of_text("a photo of the"), one.of_image(tmp_path / "a.png")]
        assert [float(np.sqrt((vector**2).sum())) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-5)
        assert not np.allclose(vectors[0], vectors[1])
    detector = model("sscd", 32, save_sscd(tmp_path / "sscd.pt"))
    assert detector.of_image(tmp_path / "a.png").any()
    with pytest.raises(UsageError, match="computes no vector of a text"):
        detector.of_text("a cat")
