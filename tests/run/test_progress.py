"""What a run says in a terminal and in a log: a bar with lines above it, plain timed lines, or nothing."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.options import set_up_logging
from curation.run import progress
from curation.run.progress import Pace, Progress, ReceiptsOfAll, duration, in_words
from curation.shards import bucket_of
from tests import ROOT, processes
from tests.run import toy_stage
from tests.run.toy_runs import Place

DONE = r"\d\d:\d\d:\d\d (\d{8}) done: 3 in, 2 kept, 1 not_wanted \(\d+\.\d s, [\d,]+\.\d/s\)"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.shards(3)
    return place


def on_a_terminal(place: Place, *more: str) -> str:
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, toy_stage.__file__, *place.arguments("--sample_s", "0.03", *more)]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    told = b""
    try:
        while block := os.read(mine, 65536):
            told += block
    except OSError:
        pass  # the other end is closed
    os.close(mine)
    assert process.wait(timeout=120) == 0
    return told.decode()


def screen(told: str) -> list[str]:
    """What stands on the terminal in the end: carriage return, line feed, cursor up and erase line are enough here."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", told):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token[0] == "\x1b":
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token[0] != "\x1b":
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + len(token) :]
            column += len(token)
    return [line for line in lines if line.strip()]


def test_a_bar_with_the_lines_of_finished_shards_above_it(place: Place) -> None:
    told = on_a_terminal(place)
    assert "━" in told
    assert re.search(r"\d/3.* shards · \d+ samples · \d+\.\d/s", told)
    left = screen(told)
    assert [re.fullmatch(DONE, line) is not None for line in left] == [True, True, True, False], left
    assert "toy: of 3 shards 3 done; samples: 9 in" in left[-1]
    assert not any("━" in line for line in left), "the bar goes when the work is done"


def test_plain_timed_lines_in_a_log(place: Place) -> None:
    process = place.start()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "\x1b" not in told
    assert "━" not in told
    lines = told.splitlines()
    assert sorted(match[1] for line in lines if (match := re.fullmatch(DONE, line))) == [f"{n:08d}" for n in range(3)]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)


def test_quiet_says_nothing(place: Place) -> None:
    assert on_a_terminal(place, "--quiet") == ""


# ---- how long the rest takes


def receipt(receipts: Path, shard: int) -> None:
    """A commit renames a new file into place."""
    path = receipts / bucket_of(f"{shard:08d}") / f"{shard:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    (fresh := path.with_name(f".{shard}")).write_text("{}")
    fresh.rename(path)


def pace_of(receipts: Path | None, shards: int = 100, *, again: bool = False) -> Pace:
    ids = [f"{number:08d}" for number in range(shards)]
    return Pace(ids, None if receipts is None else ReceiptsOfAll(receipts, ids), again=again, workers=1)


def work(pace: Pace, shard: int, began: float, ended: float, samples: int = 10) -> None:
    pace.begin(f"{shard:08d}", began)
    pace.samples_done(samples)
    pace.passed(f"{shard:08d}", samples, ended)
    pace.end(f"{shard:08d}")


def look(pace: Pace, now: float) -> None:
    assert pace.receipts is not None
    pace.receipts.look()
    pace.looked(now)


def test_no_time_is_told_before_there_is_a_rate() -> None:
    pace = pace_of(None)
    assert in_words(pace.estimate(1.0), 100, "this worker") == "0 of 100 shards, 0 samples"
    pace.begin("00000000", 2.0)
    pace.samples_done(5)
    told = pace.estimate(12.0)
    assert told.left_s is None, "no shard is finished, so nobody knows how large one is"
    assert told.samples_per_s == pytest.approx(0.5)


def test_the_rest_is_told_at_the_rate_since_the_first_shard_began() -> None:
    pace = pace_of(None)
    for number in range(20):  # were done before this run, and took no time
        pace.passed(f"{number:08d}", None, 1.0)
    for number in range(20, 30):
        work(pace, number, 60.0 + number, 61.0 + number)  # the model took a minute to load
    told = pace.estimate(90.0)
    assert (told.shards, told.samples) == (30, 100)
    assert told.left_s == pytest.approx(70.0)
    assert in_words(told, 100, "this worker") == "30 of 100 shards, 100 samples, 10.0 samples/s, about 70 s left"
    pace.begin("00000030", 90.0)
    pace.samples_done(5)
    assert pace.estimate(90.5).left_s == pytest.approx(69.5, rel=0.01), "half of a shard counts"


def test_only_the_recent_rate_counts() -> None:
    pace = pace_of(None, 1000)
    for number in range(100):
        work(pace, number, number, number + 1.0)
        pace.estimate(number + 1.0)
    for number in range(100, 180):  # ten times as slow from here on
        work(pace, number, 10.0 * (number - 90), 10.0 * (number - 89))
        told = pace.estimate(10.0 * (number - 89))
    assert told.left_s == pytest.approx(820 * 10.0, rel=0.02)


def test_what_others_do_is_seen_in_the_receipts(tmp_path: Path) -> None:
    receipts = tmp_path / "_receipts" / "toy"
    beats = tmp_path / "_claims" / "toy" / "_beats"
    beats.mkdir(parents=True)
    for name in ("mine", "another"):
        (beats / name).touch()
    for number in range(10):
        receipt(receipts, number)
    pace = pace_of(receipts)
    for number in (20, 22):
        work(pace, number, 0.0, 10.0)
        receipt(receipts, number)
    look(pace, 10.0)
    told = pace.estimate(10.0)
    assert told.shards == 12, "those with a receipt count as done"
    assert told.others
    assert in_words(told, 100, "this worker").endswith("about 7 min left with this worker alone")
    for number in range(30, 38):  # by the others
        receipt(receipts, number)
    work(pace, 21, 10.0, 20.0)
    receipt(receipts, 21)
    receipt(receipts, 20)  # written once more: it is still this worker's
    look(pace, 50.0)
    told = pace.estimate(50.0)
    assert told.shards == 21
    assert not told.alone
    assert told.left_s == pytest.approx(79 / (3 / 50 + 8 / 40))


def test_shards_that_are_done_again_do_not_count_as_done(tmp_path: Path) -> None:
    receipts = tmp_path / "_receipts" / "toy"
    for number in range(100):
        receipt(receipts, number)
    again, stale = pace_of(receipts, again=True), pace_of(receipts)
    look(again, 0.0)
    look(stale, 0.0)
    assert (again.estimate(0.0).shards, stale.estimate(0.0).shards) == (0, 100)
    stale.begin("00000005", 1.0)  # it has a receipt, and yet there is something to do
    assert stale.estimate(1.0).shards == 0
    receipt(receipts, 7)
    look(stale, 50.0)
    assert stale.estimate(50.0).shards == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (95, "2 min"), (5300, "88 min"), (7200, "2 h"), (12000, "3 h 20 min"),
     (200_000, "2 days 7 h"), (172_800, "2 days")],
)  # fmt: skip
def test_durations_are_as_exact_as_an_estimate(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- what the process does meanwhile


@pytest.fixture
def quick_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "SAY_WAITING_AFTER_S", 0.05)
    monkeypatch.setattr(progress, "FIRST_LINES_S", (0.3,))
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.1)
    monkeypatch.setattr(progress, "REPEAT_S", 0.2)


def log_of(capsys: pytest.CaptureFixture[str], quiet: bool, act: Callable[[Progress], None]) -> list[str]:
    set_up_logging(quiet)
    with Progress("toy", ["00000000", "00000001", "00000002"], quiet) as shown:
        act(shown)
    return [line[9:] for line in capsys.readouterr().err.splitlines()]


def waits(shown: Progress) -> None:
    shown.now("brief")
    time.sleep(0.02)
    shown.now("waiting", "waiting for \x1b[2Jstage 00")
    time.sleep(0.7)


@pytest.mark.usefixtures("quick_lines")
def test_a_wait_is_said_once_with_its_reason_and_rarely_again(capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = log_of(capsys, False, waits)
    assert first.startswith("toy: waiting for ")
    assert "\x1b" not in "".join([first, *rest])
    assert 1 <= len(rest) <= 4
    assert all(line.startswith("toy: still waiting for ") for line in rest), "nothing is done, so no line tells how far"
    assert log_of(capsys, True, waits) == []


@pytest.mark.usefixtures("quick_lines")
def test_a_log_tells_from_time_to_time_how_far_the_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    def works(shown: Progress) -> None:
        shown.begin("00000000")
        shown.begin("00000001")
        time.sleep(0.35)
        for shard in ("00000000", "00000001"):
            shown.samples_done(3)
            shown.shard_passed(shard, 3)
            shown.end(shard)
        time.sleep(0.5)

    lines = log_of(capsys, False, works)
    assert re.fullmatch(r"toy: 0 of 3 shards, 0 samples", lines[0])
    assert re.fullmatch(r"toy: 2 of 3 shards, 6 samples, \d+\.\d samples/s, about 1 s left", lines[1])
    assert len(lines) <= 5, "what has not changed is said less often"


def test_a_log_says_in_its_first_seconds_what_the_run_does(tmp_path: Path) -> None:
    """It loads a model, and waits for the last shard, which another worker has."""
    place = Place(tmp_path)
    place.shards(1)
    common = [word if word != "1" else "20" for word in place.arguments()]  # the lease
    command = [sys.executable, toy_stage.__file__, *common]
    with processes.start([*command, "--hold", "00000000"], stderr=subprocess.PIPE) as other:
        place.wait_for("begin 00000000", other)
        with processes.start([*command, "--open_s", "2.6"], stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            told = []
            for line in process.stderr:
                told.append(line[9:].strip())
                if "worker dies" in line:
                    place.let_go()
        assert (process.returncode, other.wait()) == (0, 0)
    assert told[:2] == [
        "toy: loading the toy model",
        "toy: waiting in case a worker dies: another worker has the last shard",
    ]
