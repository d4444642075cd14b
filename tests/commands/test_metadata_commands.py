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
    handlers = {
        name: signal.getsignal(name) for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
    }
    code = importlib.import_module("06_metadata").main([*flags, "--output", str(out)])
    for name, handler in handlers.items():
        signal.signal(name, handler)
    assert code == 0
    return out


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
