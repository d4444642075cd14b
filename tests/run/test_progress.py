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
from pathlib import Path

import pytest

from tests import ROOT
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
