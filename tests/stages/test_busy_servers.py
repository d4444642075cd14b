"""Model servers that refuse requests as busy for ever, and answer control questions: a run ends in a bounded time."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from curation.errors import InfrastructureError, SampleError
from curation.serving import Waiting
from curation.serving.pool import CONTROL, EndpointPool
from curation.serving.wire import Request
from curation.storage.retry import RetryPolicy
from tests.servers.odd_server import MODEL, Answer, Asked, OddServer, odd_server
from tests.shards import noise, write_shard

ANSWERED = 3  # requests of a run before the server becomes busy
BUSY = '{"error": {"message": "too many requests"}}'
SCORES = ("image_correspondence", "formatting", "text_in_image", "aesthetics")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.serving.pool.TRIALS", RetryPolicy(first_wait_s=0.05, longest_wait_s=0.1))


def opened(server: OddServer, stall_s: float, **settings: Any) -> EndpointPool:
    pool = EndpointPool([server.url], MODEL, waiting=Waiting(stall_s), **settings)
    pool.open()
    return pool


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_takes_no_request_ends_the_run(status: int) -> None:
    with odd_server(lambda asked: Answer() if asked.text == CONTROL else Answer(BUSY, status)) as server:
        pool, began = opened(server, 0.5), time.monotonic()
        with pytest.raises(InfrastructureError, match=rf"--stall_s\).*{status}: too many requests"):
            pool.ask(Request(user="a caption"))
        assert 0.5 < time.monotonic() - began < 20


def test_it_is_left_alone_for_as_long_as_it_says() -> None:
    def busy(asked: Asked) -> Answer:
        return Answer() if asked.text == CONTROL else Answer(BUSY, 503, {"Retry-After": "1"})

    with odd_server(busy) as server:
        pool = opened(server, 0.5)
        with pytest.raises(InfrastructureError, match="--stall_s"):
            pool.ask(Request(user="a caption"))
        assert len([asked for asked in server.questions if asked.text != CONTROL]) == 2, "before the pause and after it"


def test_one_request_that_is_refused_for_ever_fails_alone() -> None:
    def behave(asked: Asked) -> Answer:
        return Answer(BUSY, 429) if "bad" in asked.text else Answer(f"re {asked.text}")

    with odd_server(behave) as server:
        pool = opened(server, 0.5)

        def others_are_answered() -> None:
            """It is called before each try of the bad one."""
            assert pool.ask(Request(user="a caption")).text == "re a caption"

        with pytest.raises(SampleError, match="too many requests") as caught:
            pool.ask(Request(user="a bad one"), others_are_answered)
        assert caught.value.reason == "llm_error"


def test_a_server_that_is_slow_or_busy_now_and_then_is_not_given_up() -> None:
    times: list[str] = []

    def behave(asked: Asked) -> Answer:
        times.append(asked.text)
        if len(times) % 3 == 1:
            return Answer(BUSY, 503)
        time.sleep(0.4)
        return Answer(f"re {asked.text}")

    with odd_server(behave) as server:
        pool = opened(server, 0.3)
        assert [pool.ask(Request(user=f"caption {n}")).text for n in range(4)] == [f"re caption {n}" for n in range(4)]


# ---- in the stages


class Tiring:
    """It answers so many requests, and then refuses all but control questions until it has ``rested``."""

    def __init__(self, said: str) -> None:
        self.said, self.answered, self.rested = said, [], False

    def __call__(self, asked: Asked) -> Answer:
        if asked.text == CONTROL:
            return Answer(self.said)
        if len(self.answered) >= ANSWERED and not self.rested:
            return Answer(BUSY, 429)
        self.answered.append(json.dumps(asked.body["messages"][-1]))
        return Answer(self.said)


def source(folder: Path) -> Path:
    """A shard of eight samples."""
    samples = {
        f"s{number}": {"jpg": noise(number), "txt": f"A woman reads newspaper number {number} in the park".encode()}
        for number in range(8)
    }
    write_shard(folder / "00000000.tar", samples)
    return folder


@pytest.mark.parametrize("name", ["02_captions_processor", "05_recaption", "06_metadata"])
def test_the_run_ends_and_what_was_answered_is_kept(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.dumps(dict.fromkeys(SCORES, 4)) if name[:2] == "06" else "A woman in a park reads a newspaper quietly."
    (tmp_path / "in").mkdir()
    folders = ["--input", str(source(tmp_path / "in")), "--output", str(tmp_path / "out"), "--stall_s", "0.7"]
    tiring, main = Tiring(said), importlib.import_module(name).main
    with odd_server(tiring) as server:
        flags = {
            "02": ["--model", MODEL, "--endpoints", server.url, "--num_threads", "1", "--groups", "none"],
            "05": ["--model", f"endpoint:{MODEL}", "--endpoints", server.url, "--batch_size", "1"],
            "06": [
                "--models",
                "judge",
                "--judge",
                json.dumps({"model": MODEL, "endpoints": server.url, "concurrency": 1}),
            ],
        }
        assert main([*folders, *flags[name[:2]]]) == 2
        [last] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "no request has been answered for 0.7 s (--stall_s)" in last
        assert len(tiring.answered) == ANSWERED
        tiring.rested = True
        assert main([*folders, *flags[name[:2]]]) == 0
    assert len(tiring.answered) == len({*tiring.answered}) == 8, "nothing was asked twice"
