"""Stage 06 through its real script and runner, on real photos: a plugin of the tests, and tiny models."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.cluster import visible_gpus
from curation.extract.plugins import load_plugin
from curation.images import image_size
from curation.tar.samples import read_samples
from tests import EXAMPLES, ROOT, processes, replaced
from tests.extract.test_config import BASIC, DATACOMP
from tests.processes import cpu_time_of, ended_at_last, wait_until
from tests.shards import noise, plain, write_shard
from tests.stages.harness import Records, hashes
from tests.test_architecture import UNUSED

parquet = pytest.importorskip("pyarrow.parquet")
PLUGIN = ROOT / "tests/extract/stub.py"
NAME = "06_metadata"
SEED = int(os.environ.get("CURATION_KILL_SEED", "20261121"))
FLAGS = ["--batch_size", "4", "--nworkers", "1", "--quiet", "--lease_s", "2", "--device", "cpu"]
STUB = [
    "--custom_pypath", str(PLUGIN), "--models", "stub,head,statistics,hashes", "--postprocess_features", "all",
    "--additional_fields", "uid,url,caption,original_width,sha256",
]  # fmt: skip
records = Records(NAME)
DESCRIPTOR_WIDTH = 256

stage = importlib.import_module(NAME)


pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture(autouse=True)
def stub_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What the stub was asked for."""
    monkeypatch.setenv("CURATION_STUB_LOG", str(tmp_path / "stub.log"))
    return tmp_path / "stub.log"


def run(source: Path | str, out: Path, *flags: object) -> int:
    where = ["--input", str(source), "--output", str(out)]
    return int(stage.main([*where, *replaced(FLAGS, flags)]))


def start(source: Path, out: Path, *flags: object, pause_s: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, f"{NAME}.py", "--input", source, "--output", out, *replaced(FLAGS, flags)]
    return processes.start(command, more={"CURATION_STUB_S": str(pause_s), "PYTHONPATH": str(ROOT)})


def rows(out: Path, shard: str) -> list[dict[str, Any]]:
    return list(parquet.read_table(out / f"{shard}.parquet").to_pylist())


def is_conserved(out: Path) -> bool:
    """Some shards are done; that their counts add up is asserted where receipts are read."""
    return any(receipt["status"] == "done" for receipt in records.receipts(out).values())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with ended_at_last(start(EXAMPLES, out, *STUB)) as process:
        assert process.wait(timeout=120) == 0
    return out


# ---- the files


def test_a_row_for_each_sample_in_the_shards_order(undisturbed: Path) -> None:
    for path in sorted(EXAMPLES.glob("*.tar")):
        samples = list(read_samples(path))
        found = rows(undisturbed, path.stem)
        assert [row["key"] for row in found] == [sample.key for sample in samples]
        for row, sample in zip(found, samples, strict=True):
            told = json.loads(sample.members["json"])
            width, height = image_size(sample.members[str(sample.image_suffix)])
            carried = {name: told[name] for name in ("uid", "url", "caption", "original_width", "sha256")}
            assert {name: row[name] for name in carried} == carried
            assert (row["tar"], row["status"]) == (path.name, "ok")
            assert (row["image-width"], row["image-height"]) == (width, height)
            assert row["caption-words"] == len(sample.members["txt"].decode().split())
            assert len(row["phash"]) == 16


def test_columns_are_uid_key_tar_then_what_was_asked_for_and_the_status(undisturbed: Path) -> None:
    schema = parquet.read_schema(undisturbed / "00000000.parquet")
    assert schema.names == [
        "uid", "key", "tar", "url", "caption", "original_width", "sha256",
        "stub-score", "stub-words", "stub-boxes", "stub-url", "stub-size", "head-score",
        "image-width", "image-height", "image-aspect", "image-bytes", "caption-words", "caption-characters",
        "phash", "dhash", "status",
    ]  # fmt: skip
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    assert kinds["uid"] == kinds["caption"] == kinds["phash"] == "string"
    assert kinds["original_width"] == kinds["stub-words"] == "int64"
    assert kinds["stub-score"] == "float"
    assert kinds["stub-boxes"] == "list<element: list<element: float>>"
    told = json.loads(schema.metadata[b"curation"])
    assert told["models"]["stub"] == {"name": "stub", "revision": "1"} and told["stage"] == NAME


def test_the_npz_has_the_rows_of_the_parquet_without_pickle_and_stored(undisturbed: Path) -> None:
    for path in sorted(undisturbed.glob("*.parquet")):
        found = rows(undisturbed, path.stem)
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            assert arrays.files == ["stub-image", "stub-text"]
            image, text = arrays["stub-image"], arrays["stub-text"]
        assert image.dtype == np.float16 and image.shape == (len(found), 192) and text.shape == (len(found), 8)
        scores = (image[:, :8].astype(np.float32) * text).sum(1)
        assert np.allclose(scores, [row["stub-score"] for row in found], atol=1e-2)
        assert np.allclose(image.mean(1, dtype=np.float32), [row["head-score"] for row in found], atol=1e-3)
        with zipfile.ZipFile(path.with_suffix(".npz")) as archive:
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
            assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_stored_array_can_be_mapped(undisturbed: Path) -> None:
    """As docs/formats.md says."""
    path = undisturbed / "00000000.npz"
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        file.seek(archive.getinfo("stub-image.npy").header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        mapped = np.memmap(path, dtype, "r", file.tell(), shape)
    with np.load(path, allow_pickle=False) as arrays:
        assert np.array_equal(mapped, arrays["stub-image"])


def test_other_programs_open_the_parquet(undisturbed: Path) -> None:
    keys = sorted(row["key"] for path in undisturbed.glob("*.parquet") for row in rows(undisturbed, path.stem))
    duckdb = pytest.importorskip("duckdb")
    query = f"select key, \"stub-boxes\"[1][2] from '{undisturbed}/*.parquet' where status = 'ok' order by key"
    found = duckdb.sql(query).fetchall()
    assert [key for key, _ in found] == keys and {box for _, box in found} == {0.25}


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_so_do_data_frames(undisturbed: Path, library: str) -> None:
    frames = pytest.importorskip(library)
    table = frames.read_parquet(undisturbed / "00000000.parquet")
    assert len(table) == 15 and list(table["status"]) == ["ok"] * 15


def test_datacomps_names_and_types(tmp_path: Path) -> None:
    config = stage.read_config(
        None, {"models": "x", "input_tars": "y", "output_metadata_dir": "z", "use_datacomp_keys": True}
    )
    names = [
        "oai-clip-vit-l14-score",
        "face-boxes",
        "oai-clip-vit-b32-image",
        "dedup-isc-ft-v107-score",
        "nsfw-image-score",
    ]
    assert [config.public_name(name) for name in names] == [
        "clip_l14_similarity_score", "face_bboxes", "b32_img", "dedup", "nsfw-image-score"
    ]  # fmt: skip
    source = EXAMPLES / "00000003.tar"
    flags = ["--use_datacomp_keys", "--additional_fields", "uid,face_bboxes"]
    assert run(source, tmp_path, *STUB[:4], *flags) == 0
    schema = parquet.read_schema(tmp_path / "00000003.parquet")
    assert str(schema.field("stub-score").type) == "double"
    for name in ("stub-boxes", "face_bboxes"):
        assert str(schema.field(name).type) == "list<element: list<element: double>>"


def test_features_in_float32_and_deflated(undisturbed: Path, tmp_path: Path) -> None:
    source = EXAMPLES / "00000003.tar"
    flags = ["--feature_dtype", "float32", "--compress", "--postprocess_features", "stub-text,stub-image"]
    assert run(source, tmp_path, *STUB, *flags) == 0
    with np.load(tmp_path / "00000003.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["stub-text", "stub-image"], "in the order asked for"
        with np.load(undisturbed / "00000003.npz", allow_pickle=False) as halves:
            for name in arrays.files:
                assert arrays[name].dtype == np.float32
                assert np.array_equal(arrays[name].astype(np.float16), halves[name])
    with zipfile.ZipFile(tmp_path / "00000003.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED}


def test_no_npz_where_no_feature_is_asked_for_and_a_shard_of_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "in/0.tar", {})
    write_shard(tmp_path / "in/1.tar", {"a": {"png": noise(1), "txt": b"x"}})
    assert run(tmp_path / "in", tmp_path / "out", "--models", "statistics") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == ["0.parquet", "1.parquet"]
    assert rows(tmp_path / "out", "0") == []
    assert run(tmp_path / "in", tmp_path / "two", *STUB) == 0
    with np.load(tmp_path / "two/0.npz", allow_pickle=False) as arrays:
        assert arrays["stub-image"].shape == (0, 192)


# ---- what is wrong with samples


def odd_samples() -> dict[str, dict[str, bytes]]:
    told = {"uid": "0" * 32, "url": "https://example.org", "width": 5}
    stub = importlib.import_module("tests.extract.stub")
    good = {f"{i:03d}": {"png": noise(i), "txt": b"words", "json": json.dumps(told).encode()} for i in range(100, 120)}
    return {
        **good,
        "200": {"png": b"no picture", "txt": b"its words", "json": json.dumps(told).encode()},
        "201": {"txt": b"words alone"},
        "202": {"png": noise(2)},
        "203": {"png": noise(3), "txt": b"words", "json": b"{broken"},
        "204": {"png": noise(4), "json": json.dumps({"caption": "only there", "uid": 7, "extra": [1]}).encode()},
        "205": {"png": plain(stub.CRASHES), "txt": b"words"},
        "206": {"png": b"", "txt": b"\xff\xfe"},
    }


def test_a_bad_sample_is_a_row_with_nulls_and_its_reason(tmp_path: Path) -> None:
    write_shard(tmp_path / "in/0.tar", odd_samples())
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, *STUB, "--additional_fields", "uid,url,nothing", "--max_error_rate", "0.5") == 0
    found = {row["key"]: row for row in rows(out, "0")}
    assert list(found) == list(odd_samples())
    with np.load(out / "0.npz", allow_pickle=False) as arrays:
        image, text = (dict(zip(found, arrays[name], strict=True)) for name in ("stub-image", "stub-text"))
    status = {key: row["status"] for key, row in found.items() if row["status"] != "ok"}
    assert status == {
        "200": "undecodable", "201": "no_image", "202": "no_caption", "205": "worker_died", "206": "empty_image"
    }  # fmt: skip
    assert records.rejects(out, "0") == {key: reason for key, reason in status.items() if reason != "no_caption"}
    for key in ("200", "201", "206"):
        row = found[key]
        assert row["stub-words"] is not None and row["caption-words"] is not None, "its text is scored all the same"
        assert row["stub-score"] is None and row["stub-boxes"] is None and row["phash"] is None
        assert row["image-width"] is None and row["head-score"] is None
        assert np.isnan(image[key]).all() and not np.isnan(text[key]).any()
    assert found["202"]["stub-score"] is None and found["202"]["stub-words"] is None and found["202"]["phash"]
    assert np.isnan(text["202"]).all() and not np.isnan(image["202"]).any()
    assert found["205"]["stub-words"] is None and found["205"]["uid"] is None
    assert found["204"]["stub-score"] is not None and found["204"]["caption-words"] == 2
    notes = records.receipt(out, "0")["notes"]
    assert notes["rows"] == 27
    assert notes["missing_fields"] == {"nothing": 27, "uid": 5, "url": 6}
    assert is_conserved(out)


def test_where_too_many_are_bad_the_shard_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "in/0.tar", {f"{i}": {"png": b"no"} for i in range(9)})
    assert run(tmp_path / "in", tmp_path / "out", *STUB) == 1
    assert records.receipt(tmp_path / "out", "0")["status"] == "failed"
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_fields_have_the_types_of_their_values(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [
        {"whole": 1, "part": 1, "flag": True, "mixed": 1, "text": "a", "width": 5, "status": "success", "score": 1},
        {"whole": -(1 << 40), "part": 0.5, "flag": None, "mixed": "x", "text": "\ud800", "width": "5", "tar": "t"},
        {"whole": None, "part": 2, "flag": False, "mixed": [1, {"a": None}], "text": "c", "width": 5.0, "score": "no"},
    ]
    samples = {
        f"{i}": {"png": noise(i), "txt": b"x", "json": json.dumps(value).encode()} for i, value in enumerate(values)
    }
    write_shard(tmp_path / "in/0.tar", samples)
    names = "whole,part,flag,mixed,text,width,status,tar,never,score:float64"
    assert run(tmp_path / "in", tmp_path / "out", "--models", "statistics", "--additional_fields", names) == 0
    table = parquet.read_table(tmp_path / "out/0.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names[3:13]} == {
        "whole": "int64", "part": "double", "flag": "bool", "mixed": "string", "text": "string", "width": "int64",
        "source_status": "string", "source_tar": "string", "never": "string", "score": "double",
    }  # fmt: skip
    columns = table.to_pydict()
    assert columns["whole"] == [1, -(1 << 40), None] and columns["part"] == [1.0, 0.5, 2.0]
    assert columns["mixed"] == ["1", "x", '[1,{"a":null}]'] and columns["text"] == ["a", "\ufffd", "c"]
    assert columns["width"] == [5, None, 5] and columns["score"] == [1.0, None, None]
    assert columns["source_status"][0] == "success" and columns["status"] == ["ok"] * 3
    assert records.receipt(tmp_path / "out", "0")["notes"]["mistyped_fields"] == {"score": 1, "width": 1}


def test_memory_that_runs_out_halves_the_batch_and_costs_one_sample_at_most(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = load_plugin(str(PLUGIN))
    monkeypatch.setattr(stub.Stub, "fits", 1)
    assert run(EXAMPLES / "00000003.tar", tmp_path / "out", *STUB) == 0
    names = ("00000003.parquet", "00000003.npz")
    assert {name: hashes(tmp_path / "out")[name] for name in names} == {
        name: hashes(undisturbed)[name] for name in names
    }
    assert records.receipt(tmp_path / "out", "00000003")["notes"]["batch_shrunk_to"] == 1
    monkeypatch.setattr(stub.Stub, "fits", 1 << 30)
    pictures = {f"{i}": {"png": noise(i), "txt": b"x"} for i in range(8)} | {"5": {"png": plain(stub.OVERFLOWS)}}
    write_shard(tmp_path / "in/0.tar", pictures)
    assert run(tmp_path / "in", tmp_path / "two", *STUB) == 0
    assert [row["status"] for row in rows(tmp_path / "two", "0")] == ["ok"] * 5 + ["out_of_memory"] + ["ok"] * 2
    onnxruntimes = type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})
    monkeypatch.setattr(stub.Stub, "failure", onnxruntimes)
    assert run(tmp_path / "in", tmp_path / "three", *STUB) == 0
    assert hashes(tmp_path / "three") == hashes(tmp_path / "two")


def test_a_device_that_fails_blames_no_shard(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = load_plugin(str(PLUGIN))
    monkeypatch.setattr(stub.Stub, "works", 0)
    assert run(EXAMPLES, tmp_path / "out", *STUB) == 2, "it never worked"
    assert "error: node " in capsys.readouterr().err
    monkeypatch.setattr(stub.Stub, "works", 3)
    assert run(EXAMPLES, tmp_path / "out", *STUB) == 69
    assert "CUDA error: uncorrectable ECC error encountered; this process gives its shards" in capsys.readouterr().err
    assert {receipt["status"] for receipt in records.receipts(tmp_path / "out").values()} <= {"done"}
    monkeypatch.setattr(stub.Stub, "works", 1 << 30)
    assert run(EXAMPLES, tmp_path / "out", *STUB) == 0
    assert hashes(tmp_path / "out") == hashes(undisturbed)


# ---- configuration


def yaml_of(tmp_path: Path, text: str, source: Path, out: Path, more: str = "") -> Path:
    text = text.replace("path/to/my/tars/000057{17..19}.tar", str(source)).replace(
        "path/to/my/ouput/metadata", str(out)
    )
    path = tmp_path / "config.yml"
    path.write_text(f"{text}\n{more}\n", "utf-8")
    return path


def test_the_yaml_alone_is_enough_and_flags_go_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BASIC.replace("oai-clip-vit-b32\npost", "statistics\npost").replace("oai-clip-vit-b32-score", "image-width")
    text = text.replace("  - oai-clip-vit-b32-image\n  - oai-clip-vit-b32-text\n", "")
    more = "logging: True\nuse_datacomp_keys: False\nwarn_and_continue: True\ntars_per_wds: 2\n"
    out = tmp_path / "out"
    path = yaml_of(tmp_path, text.replace("nworkers: 2", "nworkers: 1"), EXAMPLES / "0000000{0..3}.tar", out, more)
    assert stage.main(["--yml", str(path)]) == 0
    told = capsys.readouterr().err
    assert "nothing is sent to Weights & Biases" in told and "device: 0" in told
    assert sorted(p.name for p in out.glob("*.parquet")) == ["00000000.parquet", "00000001.parquet", "00000003.parquet"]
    columns = [
        "uid",
        "key",
        "tar",
        "url",
        "caption",
        "original_width",
        "original_height",
        "sha256",
        "image-width",
        "status",
    ]
    assert parquet.read_schema(out / "00000000.parquet").names == columns
    assert stage.main(["--yml", str(path), "--device", "0"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_reprocess_goes_on_with_the_same_options_and_begins_anew_with_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--models", "statistics"]
    out, source = tmp_path / "out", EXAMPLES / "00000003.tar"
    assert run(source, out, *flags, "--reprocess") == 0
    first = records.receipt(out, "00000003")
    assert run(source, out, *flags, "--reprocess") == 0
    assert records.receipt(out, "00000003") == first, "what is done is not done again"
    assert run(source, out, "--models", "hashes") == 2
    assert "models: " in capsys.readouterr().err
    assert run(source, out, "--models", "hashes", "--reprocess") == 0
    assert "phash" in rows(out, "00000003")[0]
    assert run(source, out, "--models", "hashes", "--rerun") == 0
    assert records.receipt(out, "00000003")["generation"] == 3


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ("circle,square", "circle → square → circle"),
        ("lonely", "lonely needs the feature 'nobody-gives-this'"),
        ("stub,copy", "stub and copy both give"),
        ("stub,clip-vit", "unknown directive 'clip-vit'"),
        ("stub,heed", "did you mean 'head'?"),
        ("head", "head needs the feature 'stub-image'"),
    ],
)
def test_models_that_do_not_fit_together_are_named(
    tmp_path: Path, models: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(EXAMPLES / "00000003.tar", tmp_path, *STUB[:2], "--models", models) == 2
    assert told in capsys.readouterr().err


def test_a_model_that_keeps_a_column_back_fails_the_shard_with_its_name(tmp_path: Path) -> None:
    assert run(EXAMPLES / "00000003.tar", tmp_path, *STUB[:2], "--models", "forgetful") == 1
    assert "forgetful: it gives no 'forgotten'" in records.receipt(tmp_path, "00000003")["error"]["message"]


NAMED = """
from dataclasses import dataclass
from curation.extract.api import Feature

@dataclass(frozen=True)
class Fails:
    takes = "text"
    def __call__(self, caption): return {{}}[caption]

class X:
    name = revision = "x"
    columns = needs = ()
    features = (Feature("{}", 1),)
    preparations = {}
    def __init__(self, directive, settings): pass
    def compute(self, batch): return {{}}
    def close(self): pass

EXTRACTORS = {{"x": X}}
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1", "it has no EXTRACTORS"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("model_lookup = {}\npreprocessor_lookup = {}", "postprocess_parquet_lookup, postprocess_feature_lookup"),
        ("1/0", "ZeroDivisionError"),
        ("class X:\n    def __init__(self, d, s): 1/0\nEXTRACTORS = {'x': X}", "x: cannot be made: ZeroDivisionError"),
        ("class X:\n    def __init__(self, d, s): pass\nEXTRACTORS = {'x': X}", "has no name, revision, columns"),
        (NAMED.format("../x", "()"), "'../x' cannot name a feature"),
        (NAMED.format("x", "(Fails(),)"), "the preparation Fails() fails on a trial: KeyError"),
    ],
)
def test_plugins_that_are_none(tmp_path: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(text)
    assert run(EXAMPLES, tmp_path / "out", "--custom_pypath", plugin, "--models", "x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_plugin_written_for_version_0_1_still_loads(tmp_path: Path) -> None:
    """It imports from modules that have other names now, here and in the worker processes."""
    plugin = tmp_path / "plugin.py"
    text = (ROOT / "examples" / "plugin_brightness.py").read_text("utf-8")
    imports = (
        "from curation.extracting import Batch, Column, Feature\nfrom curation.model_settings import ModelSettings\n"
    )
    now = "from curation.extract import Batch, Column, Feature, ModelSettings\n"
    assert now in text
    plugin.write_text(text.replace(now, imports), "utf-8")
    flags = ["--custom_pypath", plugin, "--models", "brightness"]
    assert run(EXAMPLES / "00000003.tar", tmp_path / "out", *flags) == 0


def test_a_plugin_is_part_of_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN.read_text())
    flags = ["--custom_pypath", plugin, "--models", "stub"]
    assert run(EXAMPLES / "00000003.tar", tmp_path / "out", *flags) == 0
    plugin.write_text(PLUGIN.read_text() + "\n# changed\n")
    assert run(EXAMPLES / "00000003.tar", tmp_path / "out", *flags) == 2
    assert "plugin" in capsys.readouterr().err


def test_the_documented_plugin(tmp_path: Path) -> None:
    flags = ["--custom_pypath", ROOT / "examples/plugin_brightness.py", "--models", "brightness"]
    assert run(EXAMPLES / "00000003.tar", tmp_path, *flags, "--postprocess_features", "all") == 0
    for row in rows(tmp_path, "00000003"):
        assert 0 < row["brightness"] < 1 and row["is-dark"] == (row["brightness"] < 0.25)


# ---- faults


def test_workers_share_the_shards_and_give_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    for workers in (2, 3):
        out = tmp_path / str(workers)
        with ended_at_last(start(EXAMPLES, out, *STUB, "--workers", workers)) as process:
            assert process.wait(timeout=120) == 0
        assert hashes(out) == hashes(undisturbed)


def has_begun(out: Path) -> bool:
    return any(out.glob("_partial/*/*/0*"))


def kill_at_random_moments(source: Path, out: Path, kills: int, flags: list[str]) -> None:
    rng = random.Random(SEED)
    done = 0
    for _ in range(kills * 10):
        with ended_at_last(start(source, out, *flags, pause_s=0.15)) as process:
            wait_until(lambda: has_begun(out) or process.poll() is not None, "work in hand")
            time.sleep(rng.random())  # any moment is a good one
            done += process.poll() is None
        if done == kills:
            return
    raise AssertionError(f"only {done} of {kills} kills met a process at work")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_kills_at_random_moments_change_no_byte(undisturbed: Path, tmp_path: Path, kills: int) -> None:
    source = tmp_path / "in"
    out = tmp_path / "out"
    copies = 1 if kills <= 3 else 4
    for path in EXAMPLES.glob("*.tar"):
        for copy in range(copies):
            source.mkdir(exist_ok=True)
            shutil.copy2(path, source / f"0{copy}{path.name}")
    kill_at_random_moments(source, out, kills, STUB)
    if run(source, out, *STUB) == 1:  # three processes in a row died on a shard before its first batch
        named = ",".join(sorted(path.stem for path in source.glob("*.tar")))
        assert run(source, out, *STUB, "--shards", named) == 0
    again = tmp_path / "again"
    assert run(source, again, *STUB) == 0
    assert hashes(out) == hashes(again)
    assert is_conserved(out)
    for path in source.glob("*.tar"):
        whole = [{**row, "tar": path.name} for row in rows(undisturbed, path.stem[2:])]
        assert rows(out, path.stem) == whole


def test_a_kill_costs_a_batch_and_not_the_shard(tmp_path: Path, stub_log: Path) -> None:
    out, source = tmp_path / "out", EXAMPLES / "00000004.tar"
    with ended_at_last(start(source, out, *STUB, pause_s=0.3)) as process:
        wait_until(
            lambda: sum(path.read_bytes().count(b'"missing"') for path in out.glob("_partial/*/*/0*")) >= 2,
            "two batches on disk",
            while_runs=process,
        )
    stub_log.write_text("")
    assert run(source, out, *STUB) == 0
    assert stub_log.read_text().count("batch ") <= 3, "of five"
    assert records.receipt(out, "00000004")["notes"]["recovered"] in (8, 12)


def test_a_signal_saves_the_batch_and_leaves_75(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "out"
    with ended_at_last(start(EXAMPLES, out, *STUB, pause_s=0.3)) as process:
        wait_until(lambda: has_begun(out), "work in hand", while_runs=process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
    assert run(EXAMPLES, out, *STUB) == 0
    assert hashes(out) == hashes(undisturbed)


def test_a_cut_tar_and_corrupt_members(tmp_path: Path) -> None:
    data = (EXAMPLES / "00000004.tar").read_bytes()
    with tarfile.open(EXAMPLES / "00000004.tar") as archive:
        members = archive.getmembers()
    pictures = [m for m in members if m.name.endswith((".jpg", ".webp", ".png"))]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cut.tar").write_bytes(data[: pictures[15].offset_data + pictures[15].size + 600])
    (tmp_path / "in/picture.tar").write_bytes(data[: pictures[15].offset_data + 100])
    noisy = bytearray(data)
    noisy[pictures[3].offset_data + 30 : pictures[3].offset_data + pictures[3].size] = bytes(pictures[3].size - 30)
    noisy[pictures[8].offset : pictures[8].offset + 512] = b"\xaa" * 512  # a header
    (tmp_path / "in/noisy.tar").write_bytes(noisy)
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, *STUB) == 0
    assert is_conserved(out)
    cut, noise_ = rows(out, "cut"), rows(out, "noisy")
    assert [row["status"] for row in cut].count("ok") >= 14 and cut[-1]["status"] != "ok"
    assert len(noise_) >= 18 and {"undecodable", "damaged_tar"} & {row["status"] for row in noise_}
    assert len(rows(out, "picture")) == 15, "nothing of a sample of which no member is whole"
    assert records.receipt(out, "picture")["counts"]["failed"] == {"damaged_tar": 1}
    for shard in ("cut", "noisy"):
        with np.load(out / f"{shard}.npz", allow_pickle=False) as arrays:
            assert len(arrays["stub-image"]) == len(rows(out, shard)) == records.receipt(out, shard)["notes"]["rows"]


def test_a_full_disk_ends_the_run_and_it_goes_on_once_it_is_mended(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no filesystem can be mounted here")
    try:
        assert run(EXAMPLES, disk / "out", *STUB) == 2
        assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert run(EXAMPLES, disk / "out", *STUB) == 0
        assert hashes(disk / "out") == hashes(undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_script_without_slurm(tmp_path: Path) -> None:
    text = f"models: [statistics]\ninput_tars: {EXAMPLES}\noutput_metadata_dir: {tmp_path}/out\nnworkers: 1\n"
    (tmp_path / "c.yml").write_text(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in ("ROOT", "SRC_DIR")}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / f"{NAME}.sh"), "--yml", str(tmp_path / "c.yml")]
    for folders, out in (
        ({}, "out"),
        ({"SRC_DIR": str(EXAMPLES / "00000003.tar"), "TARGET_DIR": f"{tmp_path}/b"}, "b"),
    ):
        result = subprocess.run(command, env=environment | folders, cwd=tmp_path, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr
        assert len(list((tmp_path / out).glob("*.parquet"))) == (1 if folders else 5)


def test_the_script_names_the_python_that_is_not_there(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "ROOT": str(tmp_path)}
    command = ["bash", str(ROOT / f"{NAME}.sh")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and f"there is no {tmp_path}/python: ./install.sh makes it" in result.stderr


def test_a_command_without_flags_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main([]) == 2
    assert "give --input, --output and --models, or a --yml that has them" in capsys.readouterr().err


def test_receipts_tell_where_the_time_went(undisturbed: Path) -> None:
    assert {"read", "decode", "infer", "wait", "write"} <= set(records.receipt(undisturbed, "00000000")["seconds"])


# ---- with models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of every model of the README, with random numbers, in the real architectures."""
    pytest.importorskip("transformers")
    from tests.backends import tiny_extractors as made

    folder = tmp_path_factory.mktemp("weights")
    return {
        "oai-clip-vit-b32": made.save_clip(folder / "b32"),
        "oai-clip-vit-l14": made.save_clip(folder / "l14", width=768, seed=9),
        "nsfw-detoxify": made.save_toxicity(folder / "toxicity"),
        "nsfw-image-oai-clip-vit-l-14": made.save_nsfw_head(folder / "nsfw.pt"),
        "faces-scrfd10g": made.save_scrfd(folder / "scrfd.pt"),
        "dedup-isc-ft-v107": made.save_isc(folder / "isc.pt"),
    }


@pytest.mark.slow
def test_the_readmes_first_example_runs(tmp_path: Path, tiny: dict[str, Path]) -> None:
    out = tmp_path / "out"
    more = f"weights:\n  oai-clip-vit-b32: {tiny['oai-clip-vit-b32']}"
    path = yaml_of(tmp_path, BASIC, EXAMPLES / "0000000{0..4}.tar", out, more)
    assert stage.main(["--yml", str(path), "--quiet"]) == 0
    for shard in ("00000000", "00000001", "00000003", "00000004"):
        found = rows(out, shard)
        with np.load(out / f"{shard}.npz", allow_pickle=False) as arrays:
            assert arrays.files == ["oai-clip-vit-b32-image", "oai-clip-vit-b32-text"]
            image, text = (arrays[name].astype(np.float32) for name in arrays.files)
        assert np.allclose((image * text).sum(1), [row["oai-clip-vit-b32-score"] for row in found], atol=2e-3)
        assert np.allclose(np.linalg.norm(image, axis=1), 1, atol=2e-3)


UPSTREAM_PLUGIN = """
from functools import partial
import torch, torch.nn as nn
from dataset2metadata.postprocessors import select, batched_dot_product_index

def shrink(x):
    return torch.tensor(list(x.resize((4, 4)).getdata())).float().flatten() / 255

class Wrapper(nn.Module):
    name = "mine"
    raw_inputs = ["image", "text"]
    preprocessors = ["shrink", "identity"]
    dependencies = []
    to_device = True
    def __init__(self, device):
        super().__init__()
        self.twice = nn.Linear(48, 48, bias=False).to(device)
        nn.init.eye_(self.twice.weight)
    def forward(self, x, t):
        return x, self.twice(x) * 2, [f"{len(s)} letters" for s in t]

preprocessor_lookup = {"shrink": shrink}
model_lookup = {"mine": Wrapper}
postprocess_parquet_lookup = {
    "mine-letters": partial(select, model="mine", index=2, to_cpu=False),
    "mine-score": partial(batched_dot_product_index, model="mine", i=0, j=1),
    "another": partial(select, model="another", index=0),
}
postprocess_feature_lookup = {"mine-image": partial(select, model="mine", index=1)}
"""


@pytest.mark.slow
def test_a_plugin_in_dataset2metadatas_style(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    plugin = tmp_path / "my_model.py"
    plugin.write_text(UPSTREAM_PLUGIN)
    flags = ["--custom_pypath", plugin, "--models", "mine,statistics", "--postprocess_features", "mine-image"]
    columns = ["--postprocess_columns", "mine-score,mine-letters,caption-characters"]
    assert run(EXAMPLES / "00000003.tar", tmp_path / "out", *flags, *columns, "--feature_dtype", "float32") == 0
    found = rows(tmp_path / "out", "00000003")
    with np.load(tmp_path / "out/00000003.npz", allow_pickle=False) as arrays:
        image = arrays["mine-image"]
    assert [row["mine-letters"] for row in found] == [f"{row['caption-characters']} letters" for row in found]
    assert np.allclose((image * image / 2).sum(1), [row["mine-score"] for row in found], rtol=1e-5)


BUILT_IN_PLUGIN = """
from functools import partial
import torch, torch.nn as nn
from clip import clip
from dataset2metadata.models import OaiClipVitL14Wrapper
from dataset2metadata.postprocessors import batched_dot_product_index, select
from dataset2metadata.preprocessors import oai_clip_image
from dataset2metadata.registry import postprocess_parquet_lookup as known

class Captioner(nn.Module):
    name = "tagger"
    raw_inputs = ["image", "image", "text", "image"]
    preprocessors = ["mine-aug", "clip-aug", "clip-tokens", "dedup-aug"]
    dependencies = []
    to_device = True
    def __init__(self, device):
        super().__init__()
        self.b32, self.preprocess = clip.load("ViT-B/32", device=device)
        self.b32.eval()
        self.l14 = OaiClipVitL14Wrapper(device)
        self.device = device
    def forward(self, mine, x, t, large):
        assert mine.equal(x), "oai_clip_image and clip-aug are one"
        assert large.shape[1:] == (3, 512, 512) and -1 <= large.min() and large.max() <= 1
        said = [f"a photo of {round(float(row.mean()), 2)}" for row in x]
        image = self.b32.encode_image(x)
        texts = [self.b32.encode_text(tokens) for tokens in (t, clip.tokenize(said).to(self.device))]
        unit = [f / f.norm(dim=1, keepdim=True) for f in (image, *texts)]
        return (*unit, *self.l14(x, t), said)

preprocessor_lookup = {"mine-aug": oai_clip_image}
model_lookup = {"tagger": Captioner}
postprocess_parquet_lookup = {
    "tag": partial(select, model="tagger", index=5, to_cpu=False),
    "b32-score": partial(batched_dot_product_index, model="tagger", i=0, j=1),
    "b32-tag-score": partial(batched_dot_product_index, model="tagger", i=0, j=2),
    "l14-score": partial(batched_dot_product_index, model="tagger", i=3, j=4),
}
postprocess_feature_lookup = {"b32-image": partial(select, model="tagger", index=0)}
assert set(known) >= {"oai-clip-vit-b32-score"}
"""


@pytest.mark.slow
def test_a_plugin_that_names_what_dataset2metadata_has(tmp_path: Path, tiny: dict[str, Path]) -> None:
    """In the form of its BLIP-2 examples: its preprocessors by name, its classes, and OpenAI's package clip.  The same
    CLIP as a directive gives the same numbers, and the same as the plugin's directive."""
    plugin = tmp_path / "tagger.py"
    plugin.write_text(BUILT_IN_PLUGIN)
    both = ("oai-clip-vit-b32", "oai-clip-vit-l14")
    flags = ["--custom_pypath", plugin, "--models", ",".join(("tagger", *both)), "--feature_dtype", "float32"]
    flags += ["--weights", ",".join(f"{name}={tiny[name]}" for name in both), "--postprocess_columns", "all"]
    assert run(EXAMPLES / "00000003.tar", tmp_path / "out", *flags, "--postprocess_features", "all") == 0
    found = rows(tmp_path / "out", "00000003")
    with np.load(tmp_path / "out/00000003.npz", allow_pickle=False) as arrays:
        assert np.allclose(arrays["b32-image"], arrays["oai-clip-vit-b32-image"], atol=1e-5)
    for row in found:
        assert row["tag"].startswith("a photo of ")
        assert row["b32-score"] == pytest.approx(row["oai-clip-vit-b32-score"], abs=1e-5)
        assert row["l14-score"] == pytest.approx(row["oai-clip-vit-l14-score"], abs=1e-5)
    assert len({row["b32-tag-score"] for row in found}) > 1


def test_names_for_plugins(tmp_path: Path, tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from curation.backends.extract.upstream import BuiltIns
    from curation.extract.settings import WeightSource

    made = BuiltIns((("oai-clip-vit-b32", WeightSource(str(tiny["oai-clip-vit-b32"]))),)).modules()
    clip: Any = made["clip"]
    assert clip.clip.tokenize is not None
    assert clip.tokenize("a cat").shape == (1, 77)
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        clip.tokenize(["word " * 100])
    assert clip.tokenize(["word " * 100], truncate=True).shape == (1, 77)
    with pytest.raises(RuntimeError, match="RN50 not found"):
        clip.load("RN50", device="cpu")
    with pytest.raises(AttributeError, match="no 'DetoxifyWrapper' here"):
        made["dataset2metadata.models"].DetoxifyWrapper  # noqa: B018
    assert [kind.name for kind in made["dataset2metadata.registry"].model_lookup.values()] == [
        "oai-clip-vit-b32", "oai-clip-vit-l14",
    ]  # fmt: skip
    plugin = tmp_path / "odd.py"
    plugin.write_text(UPSTREAM_PLUGIN.replace('["shrink", "identity"]', '["faces-aug", "identity"]'))
    flags = ["--custom_pypath", plugin, "--models", "mine"]
    assert run(EXAMPLES / "00000003.tar", tmp_path / "out", *flags) == 2
    assert "no 'faces-aug'; define it there, or name one of identity, clip-aug" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readmes_second_example_runs(tmp_path: Path, tiny: dict[str, Path]) -> None:
    out = tmp_path / "out"
    embeddings = tmp_path / "others.npy"
    weights = "".join(f"  {directive}: {path}\n" for directive, path in tiny.items())
    np.save(embeddings, np.eye(2, DESCRIPTOR_WIDTH, dtype=np.float32))
    more = f"weights:\n{weights}embeddings: {embeddings}\nuse_datacomp_keys: True\nfeature_dtype: float32"
    path = yaml_of(tmp_path, DATACOMP, EXAMPLES / "00000003.tar", out, more)
    assert stage.main(["--yml", str(path), "--quiet", "--batch_size", "4"]) == 0
    found = rows(out, "00000003")
    schema = parquet.read_schema(out / "00000003.parquet")
    assert schema.names == [
        "uid", "key", "tar", "url", "caption", "original_width", "original_height", "sha256",
        "clip_b32_similarity_score", "clip_l14_similarity_score", "nsfw-detoxify-score", "nsfw-image-score",
        "face_bboxes", "dedup", "status",
    ]  # fmt: skip
    assert str(schema.field("clip_l14_similarity_score").type) == "double"
    with np.load(out / "00000003.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["b32_img", "b32_txt", "l14_img", "l14_txt", "dedup-isc-ft-v107-image"]
        assert arrays["l14_img"].shape == (8, 768)
        for name, column in (("b32", "clip_b32_similarity_score"), ("l14", "clip_l14_similarity_score")):
            scores = (arrays[f"{name}_img"] * arrays[f"{name}_txt"]).sum(1)
            assert np.allclose(scores, [row[column] for row in found], atol=1e-6)
        nearest = arrays["dedup-isc-ft-v107-image"][:, :2].max(1)
        assert np.allclose(nearest, [row["dedup"] for row in found], atol=1e-5)
    for row in found:
        assert row["status"] == "ok" and 0 <= row["nsfw-image-score"] <= 1 and 0 <= row["nsfw-detoxify-score"] <= 1
        assert all(len(box) == 4 and all(0 <= side <= 1 for side in box) for box in row["face_bboxes"])
    told = json.loads(schema.metadata[b"curation"])
    assert set(told["models"]) == set(tiny)


def odd_pictures() -> dict[str, bytes]:
    """By the reason why a decoder on a device is not given them; "" and a number for those that it decodes."""
    rng = np.random.default_rng(15)
    found: dict[str, bytes] = {}

    def saved(mode: str = "RGB", size: tuple[int, int] = (90, 60), kind: str = "JPEG", **more: Any) -> bytes:
        small = rng.integers(0, 256, (6, 9, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small.squeeze(), mode).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **more)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    whole = saved()
    for number, sampling in enumerate(("4:4:4", "4:2:2", "4:2:0")):
        found[f"{number}"] = saved(subsampling=sampling, size=(90 + 170 * number, 260))
    found["3"] = saved("L")
    found["4"] = whole[:2] + b"\xff\xfe\x00\x08hidden" + whole[2:]  # a comment
    found["not_jpeg"] = saved(kind="PNG")
    found["not_jpeg-webp"] = saved(kind="WEBP")
    found["progressive"] = saved(progressive=True)
    found["cmyk"] = saved("CMYK")
    found["turned"] = saved(exif=exif)
    found["rgb"] = saved(keep_rgb=True)
    found["large"] = saved(size=(6, 4700))
    found["cut"] = whole[:-2]
    found["cut-undecodable"] = whole[: len(whole) // 2]
    found["unreadable-undecodable"] = b"\xff\xd8 no picture"
    return found


@pytest.fixture(scope="module")
def odd_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everyday JPEGs and others, one of which is refused only by the decoder."""
    path = tmp_path_factory.mktemp("odd") / "0.tar"
    return write_shard(path, {key: {"jpg": data, "txt": key.encode()} for key, data in odd_pictures().items()})


@pytest.mark.slow
def test_decoding_on_a_device_gives_what_the_cpu_gives(
    tmp_path: Path, tiny: dict[str, Path], odd_shard: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """With the CPU's decoder in the device's place: all else is the way that pictures go on a GPU."""
    monkeypatch.setattr("curation.extract.staging.MOST_DECODED_PIXELS", 60_000)
    models = ("oai-clip-vit-b32", "faces-scrfd10g")
    flags = ["--models", f"{','.join(models)},statistics", "--postprocess_features", "all", "--max_error_rate", "1"]
    flags += ["--weights", ",".join(f"{model}={tiny[model]}" for model in models)]
    flags += ["--feature_dtype", "float32", "--batch_size", "6"]
    assert run(odd_shard, tmp_path / "cpu", *flags) == 0
    assert run(odd_shard, tmp_path / "gpu", "--decode", "gpu", "--models", "hashes") == 2
    assert "--decode gpu: hashes can prepare pictures on the CPU only" in capfd.readouterr().err
    loud = [flag for flag in replaced(FLAGS, flags) if flag != "--quiet"]
    assert stage.main(["--input", str(odd_shard), "--output", str(tmp_path / "gpu"), "--decode", "gpu", *loud]) == 0
    told = capfd.readouterr().err
    assert "JPEGs are decoded on cpu by the CPU's decoder, for a trial without a GPU" in told
    assert "images decoded by the device 5, by the CPU 8" in told
    for folder in ("cpu", "gpu"):
        assert {row["key"]: row["status"] for row in rows(tmp_path / folder, "0")} == {
            key: "undecodable" if "undecodable" in key else "ok" for key in odd_pictures()
        }
    assert rows(tmp_path / "cpu", "0") == rows(tmp_path / "gpu", "0")
    with np.load(tmp_path / "cpu/0.npz") as expected, np.load(tmp_path / "gpu/0.npz") as found:
        for name in expected.files:
            assert np.array_equal(expected[name], found[name], equal_nan=True), name
    notes = records.receipt(tmp_path / "gpu", "0")["notes"]
    assert "decoder" in notes and notes["decoded_by_device"] == 5
    because: dict[str, int] = {}
    for key in odd_pictures():
        reason = key.partition("-")[0]
        if not reason.isdecimal() and key != "unreadable-undecodable" and key != "cut-undecodable":
            because[reason] = because.get(reason, 0) + 1
    assert notes["decoded_by_cpu_for"] == because
    assert notes["decoded_by_cpu"] == sum(because.values())
    (record,) = (tmp_path / "gpu/_receipts").rglob("_epoch.1.json")
    assert json.loads(record.read_bytes())["options"]["decode"] == "gpu"


def test_a_job_with_gpus_does_not_score_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if visible_gpus():
        pytest.skip("this machine has GPUs")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    flags = ["--input", str(EXAMPLES), "--output", str(tmp_path), "--models", "statistics", "--quiet"]
    flags += ["--nworkers", "1"]
    assert stage.main(flags) == 2
    assert "with --device cpu it computes on the CPU" in capsys.readouterr().err
    assert stage.main([*flags, "--num_gpus", "3"]) == 2
    assert stage.main([*flags, "--device", "cpu"]) == 0


def test_a_folder_goes_on_in_the_precision_that_it_was_begun_with(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The recommended ``half`` is for new folders; a precision that is named is another option."""

    def models(dtype: str) -> list[str]:
        text = f"models: [statistics: {{dtype: {dtype}}}]\n" if dtype else "models: [statistics]\n"
        path = tmp_path / "c.yml"
        path.write_text(f"{text}input_tars: {EXAMPLES}/00000003.tar\noutput_metadata_dir: {tmp_path / 'out'}\n")
        return ["--yml", str(path), *FLAGS]

    def recorded(number: int) -> object:
        (record,) = (tmp_path / "out/_receipts").rglob(f"_epoch.{number}.json")
        return json.loads(record.read_bytes())["options"]["dtype"]

    assert stage.main(models("")) == 0 and recorded(1) == "auto"
    capfd.readouterr()
    assert stage.main([flag for flag in models("half") if flag != "--quiet"]) == 0
    assert "dtype: half of statistics:" in (told := capfd.readouterr().err) and "was begun without it" in told
    assert [*(tmp_path / "out/_receipts").rglob("_epoch.2.json")] == []
    assert stage.main(models("float16")) == 2
    assert "dtype" in capfd.readouterr().err
    assert stage.main([*models("half"), "--rerun"]) == 0
    assert recorded(2) == {"": "auto", "statistics": "half"}
    assert stage.main(models("half")) == 0, "and goes on so"


def hash_shard(path: Path, *values: object) -> Path:
    samples = {
        f"{n:03d}": {"json": json.dumps({"uid": f"{n:032x}", "hash": value}).encode(), "txt": b"a dog"}
        for n, value in enumerate(values)
    }
    return write_shard(path, samples)


def test_a_hash_keeps_every_digit(tmp_path: Path) -> None:
    large = 1234567890123456789
    hash_shard(tmp_path / "in/0.tar", large, -large, None)
    hash_shard(tmp_path / "in/1.tar", large, 2**64 - 1, 2**70)
    hash_shard(tmp_path / "in/2.tar", None)
    flags = ["--input", str(tmp_path / "in"), "--models", "statistics", "--device", "cpu", "--nworkers", "1"]
    flags += ["--additional_fields", "hash", "--quiet", "--max_error_rate", "1", "--output"]
    assert stage.main([*flags, str(tmp_path / "out")]) == 0
    columns = [parquet.read_table(tmp_path / f"out/{number}.parquet")["hash"] for number in range(3)]
    assert columns[0].to_pylist() == [large, -large, None]
    assert columns[1].to_pylist() == [str(large), str(2**64 - 1), str(2**70)]
    assert [str(column.type) for column in columns] == ["int64", "string", "int64"]
    assert stage.main([*flags, str(tmp_path / "old"), "--hash_type", "float64"]) == 0
    old = parquet.read_table(tmp_path / "old/0.parquet")["hash"]
    assert str(old.type) == "double"


def test_the_column_caption_holds_what_models_see(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Else select and search would find no caption in shards whose json calls it text, or that have only a .txt."""
    picture = plain((1, 2, 3))
    samples = {
        "0": {"png": picture, "json": b'{"text": "told by DataComp"}'},
        "1": {"png": picture, "txt": b"in a member"},
        "2": {"png": picture, "txt": b"in a member", "json": b'{"caption": "in the json"}'},
        "3": {"png": picture, "txt": b"in a member", "json": b'{"caption": null}'},
        "4": {"png": picture},
    }
    write_shard(tmp_path / "in/0.tar", samples)
    flags = ["--models", "statistics", "--additional_fields", "caption,captoin", "--device", "cpu", "--nworkers", "1"]
    assert run(tmp_path / "in", tmp_path / "out", *flags) == 0
    expected = ["told by DataComp", "in a member", "in the json", "in a member", None]
    assert [row["caption"] for row in rows(tmp_path / "out", "0")] == expected
    assert "no sample has the field captoin: its column is empty" in capfd.readouterr().err
    assert records.receipt(tmp_path / "out", "0")["notes"]["missing_fields"]["caption"] == 1
    (record,) = (tmp_path / "out/_receipts").rglob("_epoch.1.json")
    told = json.loads(record.read_bytes())
    del told["options"]["caption_column"]  # as the older version wrote it
    record.write_bytes(json.dumps(told).encode())
    write_shard(tmp_path / "in/1.tar", samples)
    assert run(tmp_path / "in", tmp_path / "out", *flags) == 0
    assert [row["caption"] for row in rows(tmp_path / "out", "1")] == [None, None, "in the json", None, None]


def test_a_run_with_nothing_to_do_imports_no_large_library(tmp_path: Path) -> None:
    """Stages 06 and 00, whose outputs are parquet files; nor what captions need, though judges ask as captioners do.

    Stage 06 takes half a second of CPU time at most (0.23 s when this was written), in the best of five
    runs: it imports the modules of all extractors, which therefore import, parse and compile nothing large.
    """
    write_shard(tmp_path / "in/0.tar", {"0": {"png": plain((1, 2, 3))}})
    (tmp_path / "urls.txt").write_text("http://127.0.0.1:9/a.jpg\n")
    extract = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--models", "statistics"]
    download = ["--input", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "shards"), "--retries", "0"]
    runs = {NAME: [*extract, "--device", "cpu", "--nworkers", "1", "--quiet"], "00_download": [*download, "--quiet"]}
    assert [importlib.import_module(name).main(words) for name, words in runs.items()] == [0, 0]
    code = (
        f"import sys, importlib; print([importlib.import_module(n).main(words) for n, words in {runs!r}.items()], "
        f"{set(UNUSED) - {'fsspec'} | {'curation.caption'}!r} & {{*sys.modules}})"  # fsspec is small, and opens tables
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 0] set()\n", done.stderr
    runs_again = [cpu_time_of([sys.executable, ROOT / f"{NAME}.py", *runs[NAME]]) for _ in range(5)]
    assert {said.returncode for _, said in runs_again} == {0}
    assert min(seconds for seconds, _ in runs_again) < 0.5


def test_a_folder_of_an_older_version_keeps_its_type_of_hash(tmp_path: Path) -> None:
    hash_shard(tmp_path / "in/0.tar", 1234567890123456789)
    flags = ["--input", str(tmp_path / "in"), "--models", "statistics", "--device", "cpu", "--nworkers", "1"]
    flags += ["--additional_fields", "hash", "--quiet", "--max_error_rate", "1"]
    flags += ["--output", str(tmp_path / "out")]
    assert stage.main([*flags, "--hash_type", "float64"]) == 0
    (record,) = (tmp_path / "out/_receipts").rglob("_epoch.1.json")
    told = json.loads(record.read_bytes())
    for option in ("hash_type", "decode", "table_columns"):
        del told["options"][option]  # as the older version wrote it
    record.write_bytes(json.dumps(told).encode())
    hash_shard(tmp_path / "in/1.tar", 1234567890123456789)
    assert stage.main(flags) == 0
    assert str(parquet.read_table(tmp_path / "out/1.parquet")["hash"].type) == "double"
    assert stage.main([*flags, "--decode", "gpu"]) == 2, "the older version decoded on the CPU"
    assert stage.main([*flags, "--rerun"]) == 0
    assert str(parquet.read_table(tmp_path / "out/1.parquet")["hash"].type) == "int64"
