"""What this machine lacks is no shard's fault: the run ends with 2 and one line, and no shard is failed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from curation.errors import lack_of
from tests.run.toy_runs import Place

LACKS = {
    "too little memory": "00000001: this machine has too little memory (MemoryError",
    "too few threads": "00000001: this machine has too little room for threads",
    "too few files": "this machine has too little room for open files",
    "too little memory for the sample": "00000001: this machine has too little memory (MemoryError: 1 out_of_memory",
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("line", LACKS)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_run_ends_with_one_line_and_no_shard_is_failed(line: str, workers: int, place: Place) -> None:
    place.shard("00000000", "keep")
    place.shard("00000001", "keep", line)
    process = place.start("--workers", workers)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert LACKS[line] in said
    assert "use fewer --workers" in said
    assert "Traceback" not in said
    assert "00000001" not in place.receipts()
    place.shard("00000001", "keep")
    assert place.run() == 0, "it goes on once there is more"
    assert set(place.receipts()) == {"00000000", "00000001"}


def test_few_such_samples_are_left_out_as_ever(place: Place) -> None:
    place.shard("00000000", *["keep"] * 9, "too little memory for the sample")
    assert place.run() == 0
    assert place.receipt("00000000")["counts"]["failed"] == {"out_of_memory": 1}


def test_other_failures_are_the_shards(place: Place) -> None:
    place.shard("00000000", "fail", "fail", "too little memory for the sample")
    assert place.run() == 1
    assert place.receipt("00000000")["error"]["reason"] == "too_many_errors"


@pytest.mark.parametrize("name", ["ENOMEM", "EAGAIN", "EMFILE", "ENFILE", "ENOSPC", "EDQUOT"])
def test_what_the_system_answers(name: str) -> None:
    assert "this machine has too little" in str(lack_of(OSError(getattr(errno, name), "no")))


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no"), RuntimeError("a bug"), ValueError("memory")])
def test_other_errors_are_not_the_machines(error: Exception) -> None:
    assert lack_of(error) is None
