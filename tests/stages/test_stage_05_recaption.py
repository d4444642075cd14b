"""Stage 05 through its real script and runner, on real photos: a captioner of hashes, and a tiny Florence-2."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from curation.caption.rows import MORE_COLUMNS, PARQUET_COLUMNS
from curation.cluster import visible_gpus
from curation.tar.samples import read_samples
from curation.tar.scan import IMAGE_SUFFIXES
from tests import EXAMPLES, processes, replaced
from tests.processes import end, ended_at_last, wait_until
from tests.shards import contents, noise, plain, write_shard
from tests.stages import recaption_stub as stub
from tests.stages.harness import Records, hashes, read_jsonl

NAME = "05_recaption"
SEED = int(os.environ.get("CURATION_KILL_SEED", "20261121"))
README_KEYS = ["key", "caption", "original_caption", "tar_file", "uid", "url", "width", "height"]
README_COLUMNS = [
    "key", "original_key", "url", "original_caption", "vlm_caption", "width", "height", "original_width",
    "original_height", "sha256", "md5", "tags", "merged_tags",
]  # fmt: skip
FLAGS = ["--batch_size", "4", "--device", "cpu", "--quiet", "--lease_s", "2", "--dataloader_num_workers", "2"]
records = Records(NAME)


pytestmark = pytest.mark.usefixtures("stage_in_process")


def run(source: Path | str, out: Path, *flags: object) -> int:
    return stub.main([str(source), "--output-dir", str(out), *replaced(FLAGS, flags)])


def start(source: Path, out: Path, *flags: object, pause_s: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, stub.__file__, source, "-o", out, *replaced(FLAGS, flags)]
    return processes.start(command, more={"CURATION_STUB_S": str(pause_s)})


def images(source: Path) -> list[tuple[str, str]]:
    """(tar, key) of every image, in shard and then sample order."""
    return [
        (path.name, sample.key)
        for path in sorted(source.glob("*.tar"))
        for sample in read_samples(path)
        if sample.image_suffix
    ]


def order(out: Path) -> list[tuple[str, str]]:
    return [(row["tar_file"], row["key"]) for row in read_jsonl(out / "captions.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    all_end(start(EXAMPLES, out, "--format", "all"))
    return out


# ---- rows


def test_one_row_for_each_image_in_order_with_the_readmes_keys(undisturbed: Path) -> None:
    rows = read_jsonl(undisturbed / "captions.jsonl")
    assert order(undisturbed) == images(EXAMPLES)
    assert all(list(row) == README_KEYS for row in rows)
    assert "\\u" not in (undisturbed / "captions.jsonl").read_text("utf-8"), "text as it is, not escaped"
    for row in rows:
        (sample,) = (s for s in read_samples(EXAMPLES / row["tar_file"]) if s.key == row["key"])
        told = json.loads(sample.members["json"])
        assert row["original_caption"] == told["caption"] and row["uid"] == told["uid"] and row["url"] == told["url"]
        assert (row["width"], row["height"]) == (told["width"], told["height"])
        assert row["caption"].startswith("A photo of ")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(workers: int, undisturbed: Path, tmp_path: Path) -> None:
    all_end(*(start(EXAMPLES, tmp_path, "--format", "all", pause_s=0.02) for _ in range(workers)))
    assert hashes(tmp_path) == hashes(undisturbed)


def all_end(*runs: subprocess.Popen[str]) -> None:
    """In order, having done what there was to do."""
    with ended_at_last(*runs):
        assert {process.wait(timeout=120) for process in runs} == {0}


def has_begun(out: Path) -> bool:
    return any(out.glob(f"_partial/{NAME}/*/*"))


def kill_and_go_on(moments: int, undisturbed: Path, root: Path) -> None:
    rng = random.Random(f"{SEED}:{moments}")
    for number in range(moments):
        out = root / str(number)
        victims = [start(EXAMPLES, out, "--format", "all", pause_s=0.05) for _ in range(1 + number % 3)]
        with ended_at_last(*victims):  # SIGKILL
            wait_until(partial(has_begun, out), "work in hand", while_runs=victims[0])
            time.sleep(rng.uniform(0.0, 1.5))  # any moment is a good one
        all_end(*(start(EXAMPLES, out, "--format", "all") for _ in range(1 + (number + 1) % 3)))
        assert hashes(out) == hashes(undisturbed)
        assert not [path for path in out.rglob("_partial/**/*") if path.is_file()]
        shutil.rmtree(out)


def test_killed_and_resumed_by_another_number_of_workers_gives_the_same_bytes(
    undisturbed: Path, tmp_path: Path
) -> None:
    kill_and_go_on(3, undisturbed, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_killed_at_twenty_moments(undisturbed: Path, tmp_path: Path) -> None:
    kill_and_go_on(20, undisturbed, tmp_path)


def test_the_first_signal_finishes_the_batch_and_the_captions_are_not_made_twice(
    undisturbed: Path, tmp_path: Path
) -> None:
    with ended_at_last(start(EXAMPLES, tmp_path, "--format", "all", pause_s=0.3)) as process:
        wait_until(lambda: has_begun(tmp_path), "work in hand", while_runs=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    all_end(start(EXAMPLES, tmp_path, "--format", "all", "--resume"))
    assert hashes(tmp_path) == hashes(undisturbed)
    assert sum(records.receipt(tmp_path, path.stem)["notes"].get("recovered", 0) for path in EXAMPLES.glob("*.tar")) > 0


def test_a_dead_worker_is_noticed_and_its_shard_taken_up(undisturbed: Path, tmp_path: Path) -> None:
    runs = [start(EXAMPLES, tmp_path, "--format", "all", pause_s=0.1) for _ in range(2)]
    with ended_at_last(*runs):
        wait_until(lambda: len(list(tmp_path.glob(f"_claims/{NAME}/*/*.claim"))) > 1, "both at work")
        end(runs[0])
        assert runs[1].wait(timeout=120) == 0
    assert hashes(tmp_path) == hashes(undisturbed)


def test_the_jsonl_can_be_read_while_it_grows(tmp_path: Path) -> None:
    expected = images(EXAMPLES)
    seen: set[int] = set()
    with ended_at_last(start(EXAMPLES, tmp_path, pause_s=0.15)) as process:
        while process.poll() is None:
            if (tmp_path / "captions.jsonl").exists():
                found = read_jsonl(tmp_path / "captions.jsonl")
                assert [(row["tar_file"], row["key"]) for row in found] == expected[: len(found)]
                seen.add(len(found))
            time.sleep(0.02)
    assert process.returncode == 0
    assert len({count for count in seen if 0 < count < 76}) >= 1, seen


# ---- samples that cost their row


def odd_samples() -> dict[str, dict[str, bytes]]:
    good = {f"{i:03d}": {"png": noise(i), "txt": b"old", "json": b'{"uid": "u%d"}' % i} for i in range(30)}
    good["005"]["png"] = b"not an image"
    good["011"]["png"] = plain(stub.REFUSED)
    good["017"]["png"] = plain(stub.OVERFLOWS, 64)
    good["019"]["png"] = plain(stub.SILENT)
    good["023"] = {"txt": b"no image here", "json": b"{}"}
    good["024"]["json"] = b"{broken"
    return good


def test_bad_images_cost_exactly_their_rows(tmp_path: Path) -> None:
    write_shard(tmp_path / "in/0.tar", odd_samples())
    assert run(tmp_path / "in", tmp_path / "out") == 0
    bad = {
        "005": "undecodable",
        "011": "processor_refused",
        "017": "out_of_memory",
        "019": "empty_caption",
        "023": "no_image",
    }
    assert records.rejects(tmp_path / "out", "0") == bad
    assert [key for _, key in order(tmp_path / "out")] == [key for key in odd_samples() if key not in bad]
    assert records.receipt(tmp_path / "out", "0")["counts"] == {
        "in": 30, "kept": 25, "dropped": {}, "failed": dict.fromkeys(sorted(bad.values()), 1)
    }  # fmt: skip
    (broken,) = (row for row in read_jsonl(tmp_path / "out/captions.jsonl") if row["key"] == "024")
    assert broken["original_caption"] == "old" and broken["uid"] is None, "captioned without its metadata"
    assert (broken["width"], broken["height"]) == (48, 32), "the image's own size"


def test_a_batch_that_does_not_fit_is_halved_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub.Backend, "fits", 3)
    assert run(EXAMPLES, tmp_path, "--batch_size", "16") == 0
    assert order(tmp_path) == images(EXAMPLES)
    assert records.receipt(tmp_path, "00000000")["notes"]["batch_shrunk_to"] <= 3


def test_a_tar_that_is_cut_off_gives_its_whole_samples_and_the_rest_is_done(tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(EXAMPLES, source)
    path = source / "00000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    assert run(source, tmp_path / "out", "--format", "all") == 0
    assert list(records.rejects(tmp_path / "out", "00000001").values()) == ["damaged_tar"]
    whole = [(p.name, s.key) for p in sorted(source.glob("*.tar")) for s in read_samples(p) if s.problem is None]
    assert order(tmp_path / "out") == whole
    assert any("00000001" in warning for warning in records.receipt(tmp_path / "out", "00000001")["warnings"])


def test_a_failed_shard_holds_nothing_up_and_comes_in_when_it_is_mended(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(EXAMPLES, source)
    sound = (source / "00000001.tar").read_bytes()
    (source / "00000001.tar").write_bytes(b"x" * 4096)
    assert run(source, out) == 1
    assert order(out) == [pair for pair in images(EXAMPLES) if pair[0] != "00000001.tar"]
    (source / "00000001.tar").write_bytes(sound)
    assert run(source, out) == 0
    assert order(out) == images(EXAMPLES)
    assert os.listdir(out / "_merged/captions.jsonl") == ["2"], "the first log is gone"


def test_bytes_that_a_killed_process_did_not_write_are_written_by_the_next(undisturbed: Path, tmp_path: Path) -> None:
    """An entry of the log is there before its bytes are."""
    out = tmp_path / "out"
    assert run(EXAMPLES, out) == 0
    whole = (out / "captions.jsonl").read_bytes()
    (log,) = out.glob("_merged/captions.jsonl/1")
    last = json.loads(max(log.glob("*.json"), key=lambda path: int(path.stem)).read_bytes())
    os.truncate(log / "data", last["start"] + 100)
    assert run(EXAMPLES, out) == 0
    assert (out / "captions.jsonl").read_bytes() == whole == (undisturbed / "captions.jsonl").read_bytes()
    (out / "captions.jsonl").unlink()
    assert run(EXAMPLES, out) == 0
    assert (out / "captions.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("form", "part", "whole"),
    [
        ("jsonl", "rows/00000003.jsonl", "captions.jsonl"),
        ("parquet", "parquet/00000003.parquet", "all_captions.parquet"),
    ],
)
def test_a_part_that_was_changed_ends_the_run_that_would_merge_it(
    form: str, part: str, whole: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(EXAMPLES, out, "--shards", "00000003", "--format", form) == 0
    (out / part).write_bytes(bytes((out / part).stat().st_size))  # of another size its shard would be done again
    (out / whole).unlink()
    shutil.rmtree(out / "_merged", ignore_errors=True)
    for _ in range(2):
        assert run(EXAMPLES, out, "--format", form) == 2
        assert (
            f"{part}: it was changed; make this shard again with --rerun --shards 00000003" in capsys.readouterr().err
        )
    assert run(EXAMPLES, out, "--format", form, "--rerun", "--shards", "00000003") == 0
    assert (out / whole).exists()


def test_shards_that_are_done_again_take_the_place_of_what_was_merged(tmp_path: Path) -> None:
    assert run(EXAMPLES, tmp_path) == 0
    assert run(EXAMPLES, tmp_path, "--rerun", "--shards", "00000001,00000003", "--prompt", "A picture of") == 0
    assert order(tmp_path) == images(EXAMPLES)
    for row in read_jsonl(tmp_path / "captions.jsonl"):
        again = row["tar_file"] in ("00000001.tar", "00000003.tar")
        assert row["caption"].startswith("A picture of " if again else "A photo of ")


def test_shards_that_are_added_later_are_merged_in_their_place(undisturbed: Path, tmp_path: Path) -> None:
    for shards in ("00000003", "00000000,00000007", "00000001..00000004"):
        assert run(EXAMPLES, tmp_path, "--shards", shards) == 0
    assert (tmp_path / "captions.jsonl").read_bytes() == (undisturbed / "captions.jsonl").read_bytes()


# ---- formats


def test_parquet_has_the_thirteen_columns_and_all_captions_holds_every_part(undisturbed: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert list(PARQUET_COLUMNS) == README_COLUMNS
    table = parquet.read_table(undisturbed / "all_captions.parquet")
    assert table.column_names == [*README_COLUMNS, *MORE_COLUMNS]
    rows = read_jsonl(undisturbed / "captions.jsonl")
    assert table["key"].to_pylist() == [row["key"] for row in rows]
    assert table["vlm_caption"].to_pylist() == [row["caption"] for row in rows]
    parts = [parquet.read_table(path) for path in sorted((undisturbed / "parquet").glob("*.parquet"))]
    assert sum(part.num_rows for part in parts) == table.num_rows == len(rows)


def test_parquet_carries_every_column_of_the_source(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    told = {
        "key": "000000001", "original_key": "ck", "url": "https://example.org/1", "caption": "old", "width": None,
        "height": None, "original_width": 900, "original_height": 600, "sha256": "ab", "md5": "cd", "tags": ["x", "ü"],
        "merged_tags": "x, y", "aesthetic": 5.5,
    }  # fmt: skip
    write_shard(tmp_path / "in/0.tar", {"000000001": {"png": noise(1), "json": json.dumps(told).encode()}})
    assert run(tmp_path / "in", tmp_path / "out", "--format", "parquet") == 0
    (row,) = parquet.read_table(tmp_path / "out/parquet/0.parquet").to_pylist()
    assert {name: row[name] for name in README_COLUMNS} == {
        **{name: told[name] for name in README_COLUMNS if name in told},
        "original_caption": "old",
        "vlm_caption": row["vlm_caption"],
        "width": 48,
        "height": 32,
        "tags": '["x","ü"]',
    }
    assert json.loads(row["extra"]) == {"key": "000000001", "aesthetic": 5.5}


def test_the_tar_has_the_new_captions_and_the_images_byte_for_byte(undisturbed: Path) -> None:
    captions = {(row["tar_file"], row["key"]): row["caption"] for row in read_jsonl(undisturbed / "captions.jsonl")}
    for path in EXAMPLES.glob("*.tar"):
        before, after = contents(path), contents(undisturbed / "shards" / path.name)
        assert list(before) == list(after)
        for name, data in after.items():
            key, _, suffix = name.partition(".")
            caption = captions[path.name, key]
            if suffix == "txt":
                assert data.decode() == caption
            elif suffix == "json":
                old, new = json.loads(before[name]), json.loads(data)
                assert new["caption"] == caption and new["curation"]["original_caption"] == old["caption"]
                assert {**new, "caption": old["caption"]} == {**old, "curation": new["curation"]}
            else:
                assert data == before[name]


def test_a_sample_without_a_new_caption_is_not_in_the_tar(tmp_path: Path) -> None:
    write_shard(tmp_path / "in/0.tar", odd_samples())
    assert run(tmp_path / "in", tmp_path / "out", "--format", "tar,jsonl") == 0
    kept = {name.partition(".")[0] for name in contents(tmp_path / "out/shards/0.tar")}
    assert kept == {key for _, key in order(tmp_path / "out")}
    broken = json.loads(contents(tmp_path / "out/shards/0.tar")["024.json"])
    assert broken["caption"] == contents(tmp_path / "out/shards/0.tar")["024.txt"].decode(), "never the old one"


def test_files_are_named_by_the_images_hash_with_both_captions_beside_them(undisturbed: Path) -> None:
    found = 0
    for row in read_jsonl(undisturbed / "captions.jsonl"):
        folder = undisturbed / "files" / row["tar_file"].removesuffix(".tar")
        (sample,) = (s for s in read_samples(EXAMPLES / row["tar_file"]) if s.key == row["key"])
        data = sample.members[sample.image_suffix or ""]
        digest = hashlib.sha256(data).hexdigest()
        assert (folder / f"{digest}.{sample.image_suffix}").read_bytes() == data
        told = json.loads((folder / f"{digest}.json").read_bytes())
        assert (told["original"], told["predicted"]) == (row["original_caption"], row["caption"])
        found += 1
    assert found == len([path for path in (undisturbed / "files").rglob("*") if path.suffix[1:] in IMAGE_SUFFIXES])


def test_equal_images_in_a_shard_are_two_files(tmp_path: Path) -> None:
    write_shard(tmp_path / "in/0.tar", {key: {"png": noise(1), "txt": b"x"} for key in ("a", "b")})
    assert run(tmp_path / "in", tmp_path / "out", "--format", "files") == 0
    assert len(list((tmp_path / "out/files/0").glob("*.png"))) == 2


def test_a_damaged_sample_is_not_taken_for_a_whole_one_of_its_key(tmp_path: Path) -> None:
    """The files and the page of a comparison read the shard once more, and find samples by their keys."""
    samples = [{key: {"png": noise(number), "txt": b"x"}} for number, key in enumerate(("a", "b", "a"))]
    parts = []
    for number, sample in enumerate(samples):
        write_shard(tmp_path / f"{number}.tar", sample)
        parts.append((tmp_path / f"{number}.tar").read_bytes().rstrip(b"\0"))
    parts = [part + bytes(-len(part) % 512) for part in parts]
    parts[0] = parts[0][:1024] + parts[0][1536:]  # bytes of the first picture are lost
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(b"".join(parts) + bytes(1024))
    flags = ["--format", "files,jsonl", "--max_error_rate", "1"]
    assert run(tmp_path / "in", tmp_path / "out", *flags) == 0
    assert run(tmp_path / "in", tmp_path / "out", *flags, "--compare", tmp_path / "out/captions.jsonl") == 0
    assert (tmp_path / "out/compare.html").read_text().count("base64,") == 2
    rows = {row["key"]: row for row in read_jsonl(tmp_path / "out/captions.jsonl")}
    assert rows.keys() == {"a", "b"}
    pictures = {path.read_bytes() for path in (tmp_path / "out/files/0").glob("*.png")}
    assert pictures == {noise(1), noise(2)}


def test_another_format_later_costs_no_caption_twice(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(EXAMPLES, tmp_path, "--format", "jsonl") == 0
    assert run(EXAMPLES, tmp_path, "--format", "all") == 2
    said = capsys.readouterr().err
    assert "format: [" in said and "or --rerun" in said
    assert "settings are taken over, not made again" in said
    monkeypatch.setattr(stub.Backend, "caption", lambda *_: pytest.fail("captioned again"))
    assert run(EXAMPLES, tmp_path, "--format", "all", "--rerun") == 0
    assert hashes(tmp_path) == hashes(undisturbed)
    assert records.receipt(tmp_path, "00000000")["notes"]["reused"] == 15


def test_more_images_later_cost_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captioned: list[int] = []
    caption = stub.Backend.caption
    monkeypatch.setattr(stub.Backend, "caption", lambda *given: (captioned.append(len(given[1])), caption(*given))[1])
    assert run(EXAMPLES, tmp_path, "--max_images", "20") == 0
    assert run(EXAMPLES, tmp_path, "--max_images", "33") == 2
    assert "max_images: 20 → 33" in (said := capsys.readouterr().err) and "or --rerun" in said
    assert sum(captioned) == 20
    assert run(EXAMPLES, tmp_path, "--max_images", "33", "--rerun") == 0
    assert sum(captioned) == 33 and order(tmp_path) == images(EXAMPLES)[:33]


# ---- flags


def test_max_images_are_the_first_ones_whoever_works_on_them(tmp_path: Path) -> None:
    assert run(EXAMPLES, tmp_path, "--max-images", "20") == 0
    assert order(tmp_path) == images(EXAMPLES)[:20]


def test_a_smoke_trial_prints_three_captions_and_leaves_the_output_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert run(EXAMPLES, tmp_path, "--smoke", "3") == 0
        assert capsys.readouterr().out.count("A photo of ") == 3
    assert order(tmp_path / "_smoke-3") == images(EXAMPLES)[:3]
    assert [path.name for path in tmp_path.iterdir()] == ["_smoke-3"]


def test_the_models_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert stub.main(["--list-models"]) == 0
    assert "florence2-base" in capsys.readouterr().out


def test_other_options_are_named_and_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(EXAMPLES, tmp_path) == 0
    assert run(EXAMPLES, tmp_path, "--detail", "brief") == 2
    assert "detail" in capsys.readouterr().err


def test_the_comparison_shows_both_captions_as_text(tmp_path: Path) -> None:
    source = tmp_path / "in"
    script = b"<script>alert(1)</script>"
    write_shard(source / "0.tar", {f"{i}": {"png": noise(i), "txt": script} for i in range(3)})
    assert run(source, tmp_path / "one") == 0
    other = tmp_path / "other.jsonl"
    rows = [{**row, "caption": "<b>bold & brash</b>"} for row in read_jsonl(tmp_path / "one/captions.jsonl")]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(source, tmp_path / "one", "--compare", other) == 0
    page = (tmp_path / "one/compare.html").read_text("utf-8")
    assert "<script>" not in page and "<b>" not in page
    assert page.count("&lt;b&gt;bold &amp; brash&lt;/b&gt;") == 3
    assert page.count("data:image/jpeg;base64,") == 3 and page.count("A photo of ") == 3


# ---- watermarks


def classifier(path: Path) -> str:
    """Two logits of an image: 0, and its mean red channel after normalisation, times 4."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    weights = np.zeros((2, 3), np.float32)
    weights[1, 0] = 4
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights"], ["logits"], transB=1),
        ],
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 256, 256])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_watermarks_are_scored_recorded_and_dropped_only_when_asked(tmp_path: Path) -> None:
    sha256 = classifier(tmp_path / "w.onnx")
    shades = {f"{red:03d}": {"png": plain((red, 7, 7)), "txt": b"x"} for red in (0, 60, 120, 180, 250)}
    write_shard(tmp_path / "in/0.tar", shades)
    flags = ["--detect_watermarks", "--watermark_model", tmp_path / "w.onnx", "--watermark_sha256", sha256]
    assert run(tmp_path / "in", tmp_path / "all", *flags) == 0
    rows = read_jsonl(tmp_path / "all/rows/0.jsonl")
    for row in rows:
        mean = (int(row["key"]) / 255 - 0.485) / 0.229
        assert row["watermark_score"] == pytest.approx(1 / (1 + np.exp(-4 * mean)), abs=1e-5)
    assert len(rows) == 5, "scores alone drop nothing"
    assert run(tmp_path / "in", tmp_path / "some", *flags, "--max_watermark", "0.5", "--format", "jsonl,tar") == 0
    assert [row["key"] for row in read_jsonl(tmp_path / "some/captions.jsonl")] == ["000", "060", "120"]
    drops = gzip.decompress((tmp_path / f"some/_rejects/{NAME}/0.drops.tsv.gz").read_bytes()).decode()
    assert drops == 'watermark\t"180"\nwatermark\t"250"\n'
    assert records.receipt(tmp_path / "some", "0")["counts"]["dropped"] == {"watermark": 2}


def test_weights_with_another_digest_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier(tmp_path / "w.onnx")
    flags = ["--detect_watermarks", "--watermark_model", tmp_path / "w.onnx", "--watermark_sha256", "0" * 64]
    assert run(EXAMPLES, tmp_path / "out", *flags) == 2
    assert "sha256" in capsys.readouterr().err


# ---- with a model


@pytest.mark.slow
def test_with_the_real_code_of_florence_2(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.backends.tiny_captioners import save

    model = tmp_path / "model"
    save("florence2", model, ends_after=2)
    stage = importlib.import_module("05_recaption")
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        flags = ["--model", str(model), "--max_tokens", "8", "--format", "jsonl,tar", "--max_error_rate", "1"]
        assert stage.main([str(EXAMPLES / "00000003.tar"), "-o", str(out), *replaced(FLAGS, flags)]) == 0
    assert hashes(outs[0]) == hashes(outs[1])
    rows = read_jsonl(outs[0] / "rows/00000003.jsonl")
    counts = records.receipt(outs[0], "00000003")["counts"]
    assert counts["in"] == 8 == len(rows) + counts["failed"].get("empty_caption", 0)
    assert all(row["revision"].startswith("local-") and row["caption"] for row in rows)


def test_a_device_that_fails_blames_no_shard(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stub.Backend, "works", 0)
    assert run(EXAMPLES, tmp_path / "out", "--format", "all") == 2, "it never worked"
    monkeypatch.setattr(stub.Backend, "works", 6)
    assert run(EXAMPLES, tmp_path / "out", "--format", "all") == 69
    assert "HIP error: an illegal memory access was encountered; this process gives" in capsys.readouterr().err
    assert {receipt["status"] for receipt in records.receipts(tmp_path / "out").values()} <= {"done"}
    monkeypatch.setattr(stub.Backend, "works", 1 << 30)
    assert run(EXAMPLES, tmp_path / "out", "--format", "all") == 0
    assert hashes(tmp_path / "out") == hashes(undisturbed)


def test_a_job_with_gpus_does_not_caption_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if visible_gpus():
        pytest.skip("this machine has GPUs")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    flags = [str(EXAMPLES), "-o", str(tmp_path), "--batch_size", "4", "--quiet"]
    assert stub.main(flags) == 2
    assert "with --device cpu it computes on the CPU" in capsys.readouterr().err
    assert stub.main([*flags, "--num_gpus", "3"]) == 2
    assert stub.main([*flags, "--device", "cpu"]) == 0
