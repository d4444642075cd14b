"""The caption of a sample: one rule for all stages, whatever the encoding of its .txt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curation.caption.rows import original_caption, parse_formats, write_tar
from curation.errors import SampleError
from curation.extract import extract_sample
from curation.jsonio import decode_text
from curation.storage.files import AtomicFile
from curation.tar.samples import Sample, caption_of, read_samples
from curation.tar.scan import TarReport
from tests.shards import contents, write_shard

TEXT = "ein kleiner Hund, 小さな犬, dog 👩"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str, tmp_path: Path) -> None:
    """For all stages: 01, 02 and 05 use caption_of, 06 extract_sample."""
    data = TEXT.encode(encoding)
    assert decode_text(data) == caption_of({}, data) == original_caption({}, data) == TEXT
    report = TarReport()
    (sample,) = read_samples(write_shard(tmp_path / "0.tar", {"a": {"txt": data}}), report=report)
    assert extract_sample(sample).caption == extract_sample(sample).clean_caption == TEXT
    assert not report.odd_texts


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-be"])
def test_big_and_little_endian(encoding: str) -> None:
    assert decode_text(("\ufeff" + TEXT).encode(encoding)) == TEXT


@pytest.mark.parametrize("data", ["café".encode("latin-1"), b"\xff\xfea", "\ufeff犬".encode("utf-16-le")[:-1], b"\x80"])
def test_what_is_no_text_is_counted(data: bytes, tmp_path: Path) -> None:
    report = TarReport()
    path = write_shard(tmp_path / "0.tar", {"a": {"txt": data}, "b": {"txt": "é".encode()}})
    assert "\ufffd" in caption_of({}, next(read_samples(path)).members["txt"])
    list(read_samples(path, ("txt",), report))
    assert [line for line in report.warnings() if "1 .txt members contain bytes that are not UTF-8" in line]


@pytest.mark.parametrize(
    ("told", "txt", "caption"),
    [
        ("the json's", b"the txt's", "the json's"),
        ("", b"the txt's", "the txt's"),
        (" \u200b\n\ufeff ".replace("\u200b", ""), b"the txt's", "the txt's"),
        (None, b"the txt's", "the txt's"),
        (["a"], b"the txt's", "the txt's"),
        ("the json's", None, "the json's"),
        ("the json's", b"", "the json's"),
        ("", b"", ""),
        ("", None, ""),
        (None, b" ", ""),
    ],
)
def test_an_empty_caption_does_not_beat_a_good_one(told: object, txt: bytes | None, caption: str) -> None:
    metadata = {"caption": told}
    assert caption_of(metadata, txt) == original_caption(metadata, txt) == caption
    members = {"json": json.dumps(metadata).encode()} | ({} if txt is None else {"txt": txt})
    assert extract_sample(Sample("k", members, {}, tuple(members))).clean_caption == caption
    assert (extract_sample(Sample("k", members, {}, tuple(members))).caption or "").strip() in (caption, "the txt's")


def test_no_caption_at_all() -> None:
    with pytest.raises(SampleError, match="no_caption"):
        caption_of({"caption": None}, None)
    assert extract_sample(Sample("k", {}, {}, ())).clean_caption is None


OLD = "the old caption"
ODD_JSONS = {
    "nan": b'{"caption": "the old caption", "similarity": NaN, "uid": "u"}',
    "bom": b'\xef\xbb\xbf{"caption": "the old caption", "uid": "u"}',
    "utf-16": '{"caption": "the old caption", "uid": "u"}'.encode("utf-16"),
    "cut": b'{"caption": "the old caption", "uid',
    "list": b'["the old caption"]',
    "empty object": b"{}",
    "deep": b'{"caption": "the old caption", "x": ' + b"[" * 500 + b"]" * 500 + b"}",
    "large": b'{"caption": "the old caption", "x": "' + b"x" * (5 << 20) + b'"}',
}


def test_a_recaptioned_tar_never_holds_the_old_caption_as_the_caption(tmp_path: Path) -> None:
    assert parse_formats("tar") == ("tar",)
    shard = {name: {"jpg": b"x", "txt": OLD.encode(), "json": data} for name, data in ODD_JSONS.items()}
    source = write_shard(tmp_path / "0.tar", shard)
    row = {"caption": "new", "original_caption": OLD, "model": "m", "revision": "r"}
    with AtomicFile(tmp_path / "out.tar", "t") as file:
        assert write_tar(file, source, [{"key": name, **row} for name in shard]) == 4
    file.move_into_place()
    found = contents(tmp_path / "out.tar")
    for name in ODD_JSONS:
        metadata = json.loads(found[f"{name}.json"])
        assert found[f"{name}.txt"] == b"new"
        assert metadata["caption"] == "new"
        assert metadata["curation"]["original_caption"] == OLD
        assert name not in ("nan", "bom", "utf-16") or metadata["uid"] == "u"
