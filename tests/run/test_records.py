"""Receipts and commit records that are JSON and not what a stage has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from curation.errors import InfrastructureError
from curation.run.commit import Commit, remove_obsolete
from curation.run.ledger import Ledger
from curation.run.records import read_commit, read_receipt

SOUND: dict[str, Any] = {
    "shard": "00000000", "status": "done", "generation": 1, "token": "abc", "outputs": [
        {"path": "00000000.json", "temporary": ".00000000.json.abc.tmp", "size": 1, "digest": "d", "checked": True}
    ],
}  # fmt: skip


@pytest.fixture
def receipts(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / "_receipts" / "stage" / "00000"
    folder.mkdir(parents=True)
    return folder


def with_output(**fields: object) -> dict[str, Any]:
    return {**SOUND, "outputs": [{**SOUND["outputs"][0], **fields}]}


@pytest.mark.parametrize(
    "value",
    [
        None, [], [SOUND], "done", 7, {}, {**SOUND, "generation": "x"}, {**SOUND, "generation": True},
        {**SOUND, "generation": -1}, {**SOUND, "generation": 1.5}, {**SOUND, "status": "fine"},
        {**SOUND, "status": None},
        {**SOUND, "outputs": {}}, {**SOUND, "outputs": None}, {**SOUND, "outputs": ["a"]}, {**SOUND, "token": 3},
        {**SOUND, "superseded": [1]}, {**SOUND, "superseded": "a"}, {**SOUND, "epoch": "1"}, {**SOUND, "notes": []},
        with_output(path=None), with_output(path=1), with_output(size="1"), with_output(digest=None),
        with_output(temporary=[]), with_output(upload="x"),
    ],
)  # fmt: skip
def test_json_that_is_no_receipt(value: Any, receipts: Path) -> None:
    path = receipts / "00000000.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InfrastructureError, match=r"00000000\.json: this is not a receipt; move it away") as caught:
        read_receipt(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InfrastructureError, match="this is not a receipt"):
        Ledger(receipts.parents[2], "stage", 1, {}).receipt("00000000")


@pytest.mark.parametrize("data", [b"", b'{"status": "do', b"\0" * 100])
def test_a_receipt_that_a_crash_cut_counts_as_missing(data: bytes, receipts: Path) -> None:
    (receipts / "00000000.json").write_bytes(data)
    assert read_receipt(receipts / "00000000.json") is None
    assert read_receipt(receipts / "not there.json") is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({key: value for key, value in SOUND.items() if key != "token"}, "its token"),
        ({key: value for key, value in SOUND.items() if key != "generation"}, "its generation"),
        ({**SOUND, "token": "../x"}, "its token"),
        ({**SOUND, "generation": 0}, "its generation"),
        ([], "a list"),
        (with_output(path="/etc/passwd"), "outside of the output folder"),
        (with_output(path="../x.json"), "outside of the output folder"),
        (with_output(path="a/../../x.json"), "outside of the output folder"),
        (with_output(path="link/x.json"), "outside of the output folder"),
        (with_output(path=".."), "outside of the output folder"),
        (with_output(path="a\0b"), "outside of the output folder"),
        (with_output(temporary="../x"), "the temporary name"),
        (with_output(temporary="visible"), "the temporary name"),
        (with_output(temporary=""), "the temporary name"),
    ],
)
def test_commit_records_that_no_attempt_has_written(value: Any, says: str, receipts: Path, tmp_path: Path) -> None:
    out = receipts.parents[2]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / "link").symlink_to(elsewhere)
    record = receipts / ".00000000.1.commit"
    record.write_text(json.dumps(value))
    with pytest.raises(InfrastructureError, match=r"00000000\.1\.commit: this is not .*move it away") as caught:
        Commit(out, receipts, "00000000").finish_pending()
    assert says in str(caught.value)
    assert record.exists()
    assert not list(elsewhere.iterdir())


def test_the_stages_other_output_folders_are_its_own(receipts: Path, tmp_path: Path) -> None:
    out, edits = receipts.parents[2], tmp_path / "edits"
    record = receipts / ".00000000.1.commit"
    record.write_text(json.dumps(with_output(path="../edits/a/00000000.json")))
    with pytest.raises(InfrastructureError, match="outside of the output folder"):
        read_commit(record, out)
    pointer = edits / "_receipts" / "stage" / "_home.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text('{"output": "../out"}')
    assert read_commit(record, out) == with_output(path="../edits/a/00000000.json")


def test_nothing_outside_is_removed_as_obsolete(receipts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("mine")
    receipt = {**SOUND, "superseded": ["../other.json"]}
    (receipts / "00000000.json").write_text(json.dumps(receipt))
    commit = Commit(receipts.parents[2], receipts, "00000000")
    with pytest.raises(InfrastructureError, match="outside of the output folder"):
        remove_obsolete(commit.root, commit, receipt, "abc")
    assert other.read_text() == "mine"


@pytest.mark.parametrize("value", [{"version": "x"}, {"options": [1]}, {"shards": 3}, [], None, {"version": None}])
def test_json_that_is_no_record_of_options(value: Any, receipts: Path) -> None:
    (receipts.parent / "_epoch.1.json").write_text(json.dumps(value))
    with pytest.raises(InfrastructureError, match=r"_epoch\.1\.json: not a record of options"):
        Ledger(receipts.parents[2], "stage", 1, {}).load_options_versions()
