"""Claims and heartbeats as others left them: of this version, of another, cut short, or made by hand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.run.claims import (
    MAX_SHOWN,
    ClaimRecord,
    Claims,
    LostAttempt,
    beat_content,
    parse_beat,
    parse_claim,
    read_claim,
)

GOOD: dict[str, Any] = {
    "format": 1, "token": "a1", "beat": "b2", "host": "node7", "boot": "boot", "pid_namespace": "pid:[1]", "pid": 77,
    "pid_start": "123", "slurm": {"job_id": "9"}, "rank": 3, "since": 1.5, "lease_s": 60.0, "predecessors": ["c3"],
    "deaths": [{"token": "c3", "host": "node6", "pid": 5, "slurm": {}, "alone": False}],
}  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 60) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=3),
    max_leaves=8,
)


def test_a_claim_says_who_and_since_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "41"), ("ARRAY_JOB_ID", "40"), ("ARRAY_TASK_ID", "2"), ("ARRAY_TASK_COUNT", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = time.time()
    claim = Claims(tmp_path, lease_s=7).acquire("0", "1")
    assert claim is not None
    record = json.loads(claim.path.read_bytes())
    assert record["format"] == 1
    holder = read_claim(claim.path)
    assert holder is not None
    assert (holder.token, holder.pid, holder.lease_s, holder.trouble) == (claim.token, os.getpid(), 7, "")
    assert holder.slurm == {"job_id": "41", "array_job_id": "40", "array_task_id": "2"}
    assert holder.rank == 2
    assert holder.since is not None
    assert before - 1 <= holder.since <= time.time() + 1


@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        ({"format": 2}, "format is '2'"),
        ({"format": None}, "format is 'None'"),
        ({"pid": "many"}, "no usable pid"),
        ({"token": "../../etc/passwd", "beat": "/dev/zero"}, "no usable token and beat"),
        ({"token": "x" * 65}, "no usable token"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], trouble: str) -> None:
    holder = parse_claim(json.dumps({**GOOD, **change}).encode())
    assert trouble in holder.trouble
    assert holder.host == "node7", "what can be used is"
    assert "/" not in holder.token + holder.beat


def test_a_good_one_is_not_found_fault_with() -> None:
    holder = parse_claim(json.dumps(GOOD).encode())
    assert holder.trouble == ""
    assert holder.predecessors == ("c3",)
    assert holder.died(alone=True) == (
        LostAttempt("c3", "node6", 5, {}),
        LostAttempt("a1", "node7", 77, {"job_id": "9"}, True),
    )


def test_one_that_is_not_written_yet_is_no_trouble() -> None:
    assert parse_claim(b"") == ClaimRecord()


@given(st.dictionaries(st.sampled_from([*GOOD, "x"]), json_values) | json_values)
def test_no_json_can_hurt(value: Any) -> None:
    holder = parse_claim(json.dumps({**GOOD, **value} if isinstance(value, dict) else value).encode())
    for name in (holder.token, holder.beat, *holder.predecessors, *(death.token for death in holder.deaths)):
        assert name == "" or name.isalnum()
    assert len(holder.died(alone=False)) <= 16


@given(st.binary(max_size=60))
def test_no_bytes_can_hurt(data: bytes) -> None:
    assert parse_claim(data).trouble or not data
    counter, working = parse_beat(data)
    assert data.startswith(counter)
    assert isinstance(working, dict)


def test_a_heartbeat_tells_how_far_each_shard_is() -> None:
    content = beat_content(12, {"00000001": 77, "00000002": 0})
    assert content.startswith(b"00000000000000000012 {")
    assert parse_beat(content) == (b"00000000000000000012", {"00000001": 77, "00000002": 0})
    longer = beat_content(11, {f"{number:08d}": number for number in range(10)})
    assert parse_beat(content + longer[len(content) :]) == parse_beat(content), "what stood there before is not read"


def test_a_heartbeat_is_bounded() -> None:
    content = beat_content(1, {f"{number:0200d}": 1 << 50 for number in range(5000)})
    assert len(content) < 32 << 10
    assert len(parse_beat(content)[1]) == MAX_SHOWN


def test_the_file_follows_the_work(tmp_path: Path) -> None:
    claims = Claims(tmp_path, lease_s=60)
    heart = claims.heartbeat
    path = tmp_path / "_beats" / heart.name

    def told() -> dict[str, int]:
        heart._beat()
        return parse_beat(path.read_bytes())[1]

    assert told() == {}
    claim = claims.acquire("0", "00000001")
    assert claim is not None
    heart.progress("00000001", 5)
    heart.progress("00000001", 2)
    heart.progress("00000009", 2)
    heart.progress()
    assert told() == {"00000001": 7}
    claims.release(claim)
    assert told() == {}
