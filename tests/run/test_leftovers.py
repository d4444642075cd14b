"""Temporary files that belong to no shard go after a kill; never those of a process that lives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curation.storage.files import clear_leftovers, whole_file
from tests import ROOT
from tests.processes import started, wait_until
from tests.run.toy_runs import Place

WRITER = """
import sys, time
from pathlib import Path
from curation.storage.files import whole_file
for path in sys.argv[1:]:
    stack = whole_file(Path(path)); stack.__enter__().write(b"half"); globals()[path] = stack
print("ready", flush=True)
time.sleep(600)
"""


def writing(*paths: Path) -> list[str]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WRITER}", *map(str, paths)]


def leftovers(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.tmp"))


def whole_run_files(out: Path) -> list[Path]:
    names = ("wids.json", "full_metadata.parquet", "captions.jsonl", "_receipts/toy/_epoch.2.json", "_plan/toy/plan")
    return [out / name for name in (*names, "_tables/table.csv", "_merged/toy/0.json")]


def test_the_next_run_clears_what_a_kill_left(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.shards(2)
    files = whole_run_files(place.out)
    process = subprocess.Popen(writing(*files), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(leftovers(tmp_path)) == len(files)
    assert place.run("--shards", "00000000") == 0
    assert len(leftovers(tmp_path)) == len(files), "its process lives"
    process.kill()
    process.wait()
    assert place.run("--more", place.more) == 0
    assert leftovers(tmp_path) == []


def test_those_of_another_machine_go_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.storage.files._machine", lambda: "0" * 8)
    process = whole_file(tmp_path / "wids.json")
    process.__enter__()
    monkeypatch.undo()
    (name,) = leftovers(tmp_path)
    clear_leftovers(tmp_path, time.time())
    assert leftovers(tmp_path) == [name]
    os.utime(tmp_path / name, (0, time.time() - 25 * 3600))
    clear_leftovers(tmp_path, time.time())
    assert leftovers(tmp_path) == []


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    names = [".wids.json.0123456789abcdef.tmp", ".a.tmp", "a.tmp", ".x.old"]
    for name in names:
        (tmp_path / name).touch()
    clear_leftovers(tmp_path, time.time() + 1e6)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_reused_pid_is_not_the_writer(tmp_path: Path) -> None:
    with started(writing(tmp_path / "wids.json"), stdout=subprocess.PIPE) as process:
        wait_until(lambda: bool(leftovers(tmp_path)), "the temporary file", while_runs=process)
        (name,) = leftovers(tmp_path)
        machine_pid, start, chance = name[len(".wids.json.") :][:16], name[-28:-12], name[-12:-4]
        other = tmp_path / f".wids.json.{machine_pid}{int(start, 16) - 1:016x}{chance}.tmp"
        other.touch()
        clear_leftovers(tmp_path, time.time())
        assert leftovers(tmp_path) == [name]
