"""Stage 05 takes finished outputs of datacomp-caption and ContraStyles as done work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.captioned.adopted import AdoptedCaptions
from curation.errors import InfrastructureError
from curation.tar.samples import read_samples
from tests import EXAMPLES
from tests.stages import recaption_stub as stub
from tests.stages.harness import Records, read_jsonl

SHARDS = ("00000000", "00000003")
records = Records("05_recaption")
pytestmark = pytest.mark.usefixtures("stage_in_process")

# The output columns of ContraStyles' README, in its order.
CONTRASTYLES = (
    "key", "original_key", "url", "original_caption", "vlm_caption", "width", "height", "original_width",
    "original_height", "sha256", "md5", "tags", "merged_tags",
)  # fmt: skip


def samples(shard: str) -> dict[str, dict[str, Any]]:
    """Key → json of the samples with an image."""
    found = read_samples(EXAMPLES / f"{shard}.tar")
    return {sample.key: json.loads(sample.members["json"]) for sample in found if sample.image_suffix}


def run(out: Path, *flags: object) -> int:
    shards = [str(EXAMPLES / f"{shard}.tar") for shard in SHARDS]
    words = ["--input", *shards, "--output", out, "--batch_size", 4, "--device", "cpu", "--quiet", *flags]
    return stub.main(list(map(str, words)))


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for shard in SHARDS for row in read_jsonl(out / "rows" / f"{shard}.jsonl")}


def line(shard: str, key: str, metadata: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A line as datacomp-caption writes it: its eight keys, in its order."""
    told = {
        "key": key, "caption": f"theirs {key}", "original_caption": metadata["caption"], "tar_file": f"{shard}.tar",
        "uid": metadata["uid"], "url": metadata["url"], "width": 1, "height": 1,
    }  # fmt: skip
    return told | changed


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An output of datacomp-caption that was stopped: every other sample, a line that is cut off, and rows that name no
    sample here."""
    folder = tmp_path / "datacomp"
    folder.mkdir()
    lines = []
    for shard in SHARDS:
        for number, (key, metadata) in enumerate(samples(shard).items()):
            changes: list[dict[str, Any]] = [
                {},
                {"tar_file": "9.tar", "uid": "f" * 32},
            ]  # the second: of another sample
            changes[0] |= {"uid": None, "url": None} if number % 4 == 0 else {}  # as for shards without uids
            if number % 2 == 0:
                lines += [json.dumps(line(shard, key, metadata, **change), ensure_ascii=False) for change in changes]
    (folder / "captions.jsonl").write_text("\n".join([*lines, '{"key": "cut of']), "utf-8")
    (folder / "progress.json").write_text("{}")
    (folder / "00000000.jsonl").write_text("no rows: the merged file counts")
    return folder


def test_captions_of_datacomp_caption_are_taken_over(theirs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "--adopt", theirs, "--format", "jsonl,parquet") == 0
    found, own = rows(out), 0
    for shard in SHARDS:
        there = samples(shard)
        adopted = [key for number, key in enumerate(there) if number % 2 == 0]
        for key in there:
            if key in adopted:
                assert found[key]["caption"] == f"theirs {key}"
                assert found[key]["model"] == "adopted from captions.jsonl"
            else:
                assert found[key]["caption"].startswith("A photo of ")
                own += 1
        receipt = records.receipt(out, shard)
        assert receipt["notes"]["adopted"] == len(adopted)
        assert receipt["counts"]["kept"] == len(there)
    assert own > 5
    table = pq.read_table(out / "all_captions.parquet").to_pylist()
    assert {row["key"]: row["vlm_caption"] for row in table} == {key: row["caption"] for key, row in found.items()}
    # A second run has nothing to do; without the flag the options are others; a rerun without it makes its own.
    assert run(out, "--adopt", theirs, "--format", "jsonl,parquet") == 0
    assert run(out, "--format", "jsonl,parquet") == 2
    assert run(out, "--format", "jsonl,parquet", "--rerun") == 0
    assert all(row["caption"].startswith("A photo of ") for row in rows(out).values())
    assert "adopted" not in records.receipt(out, SHARDS[0])["notes"]


def contrastyles(folder: Path) -> dict[str, str]:
    """Parts below ``data/`` as ContraStyles pushes them, of samples known by key and URL; and img2dataset's own table,
    whose captions are the original ones.  Returns key → caption of what may be taken over."""
    told, expected = [], {}
    for shard in SHARDS:
        for number, (key, metadata) in enumerate(samples(shard).items()):
            row: dict[str, Any] = dict.fromkeys(CONTRASTYLES) | {
                "key": key, "url": metadata["url"], "vlm_caption": f"gemma\x07  said\n{key}", "width": 5, "md5": "0",
                "original_caption": metadata["caption"], "tags": "a,b",
            }  # fmt: skip
            if number % 3 == 1:
                row["url"] = "https://elsewhere.example/"  # the same key of another data set
            elif number % 3 == 2:
                row["key"] = "000000001"  # downloaded again under another key
            if number % 3 != 1:
                expected[key] = f"gemma said {key}"
            told.append(row)
    data = folder / "data"
    data.mkdir(parents=True)
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(told[part::2] + told[:1]), data / f"train-{part:05d}.parquet")
    original = [{"key": key, "caption": "the original", "url": m["url"]} for key, m in samples(SHARDS[0]).items()]
    pq.write_table(pa.Table.from_pylist(original), folder / "00000.parquet")
    return expected


def test_captions_of_contrastyles_are_taken_over(tmp_path: Path) -> None:
    expected = contrastyles(tmp_path / "hub")
    assert run(tmp_path / "out", "--adopt", tmp_path / "hub") == 0
    found = rows(tmp_path / "out")
    assert {key: row["caption"] for key, row in found.items() if "photo of" not in row["caption"]} == expected
    assert len(found) > len(expected)
    assert {row["model"] for key, row in found.items() if key in expected} <= {
        "adopted from train-00000.parquet", "adopted from train-00001.parquet",
    }  # fmt: skip


def test_what_this_stage_made_elsewhere_is_taken_over_too(tmp_path: Path) -> None:
    assert run(tmp_path / "first", "--format", "parquet") == 0
    first = rows(tmp_path / "first")
    assert run(tmp_path / "second", "--adopt", tmp_path / "first" / "all_captions.parquet") == 0
    second = rows(tmp_path / "second")
    assert {key: (row["caption"], row["model"]) for key, row in second.items()} == {
        key: (row["caption"], row["model"]) for key, row in first.items()
    }
    assert sum(receipt["notes"]["adopted"] for receipt in records.receipts(tmp_path / "second").values()) == len(first)


def test_what_holds_no_captions_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contrastyles(tmp_path / "hub")
    (tmp_path / "bad.jsonl").write_text('{"key": "1", "caption": "c", "original_caption": "o"}\nnot a row\n{}\n')
    (tmp_path / "none.jsonl").write_text('{"key": "1", "caption": "the original"}\n')
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    wanted = {
        tmp_path / "hub" / "00000.parquet": "a vlm_caption, or a caption beside an original_caption",
        tmp_path / "bad.jsonl": "line 2: not a row",
        tmp_path / "none.jsonl": "no row has a vlm_caption",
        tmp_path / "torn.parquet": "cannot be read as parquet",
        tmp_path / "missing": "no captions there",
    }
    for path, words in wanted.items():
        assert run(tmp_path / "out", "--adopt", path) == 2
        assert words in capsys.readouterr().err
    flags = ["--detect_watermarks", "--watermark_model", "x.onnx"]
    assert run(tmp_path / "out", "--adopt", tmp_path / "hub", *flags) == 2
    assert "no watermark score" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "_adopted").glob("*"))


def test_names_that_are_no_utf_8_neither_end_the_run_nor_lead_to_another_sample(tmp_path: Path) -> None:
    told = [{"key": key, "caption": f"of {key!a}", "original_caption": "o"} for key in ("a\udcff", "a?", "b")]
    told[2] |= {"uid": "\ud800", "model": "\ud800", "caption_s\ud800": "named"}
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, told)))
    captions = AdoptedCaptions([str(tmp_path / "c.jsonl")], tmp_path / "out")
    captions.prepare()
    found = captions.of_shard("0")
    for key in ("a\udcff", "a?"):
        one = found.find(key, {})
        assert one is not None and one.text == f"of {key!a}"
    assert (
        found.find("c", {"uid": "\ud800"}) is not None and found.find("a\udc00", {"uid": "\0", "url": "\udc00"}) is None
    )
    found.close()


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.captioned.adopted.MOST_LINE", 1000)
    (tmp_path / "c.jsonl").write_text('{"key": "' + "x" * 100_000)
    with pytest.raises(InfrastructureError, match="line 1: not a row"):
        AdoptedCaptions([str(tmp_path / "c.jsonl")], tmp_path / "out").prepare()


def test_the_index_holds_what_memory_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go through a file: reading them takes no more memory for more of them."""
    import tracemalloc

    monkeypatch.setattr("curation.captioned.adopted._BATCH", 200)
    peaks = []
    for count in (400, 4_000):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            for number in range(count):
                told = {"caption": f"c {number}", "uid": f"{number:032x}"}
                file.write(json.dumps(line("0", str(number), told | {"url": f"https://x.example/{number}"})) + "\n")
        captions = AdoptedCaptions([str(path)], tmp_path / str(count))
        tracemalloc.start()
        captions.prepare()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        found = captions.of_shard("0").find(str(count - 1), {})
        assert found is not None and found.text == f"theirs {count - 1}"
    assert peaks[1] < 1.5 * peaks[0]
