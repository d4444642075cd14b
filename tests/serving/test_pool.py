"""The pool of model servers against servers that are slow, busy, cold, mute, broken or gone."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from curation.errors import InfrastructureError, SampleError, Stopped, UsageError
from curation.serving.pool import CONTROL, EndpointPool, endpoint_urls
from curation.serving.service import Service
from curation.serving.wire import Request
from curation.storage.retry import RetryPolicy
from tests.processes import wait_until
from tests.servers import ollama_stub

MODEL = "tulu3:fairclip"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken server is tried again sooner, and one is thought mute sooner, so that the tests are quick."""
    monkeypatch.setattr("curation.serving.pool.TRIALS", RetryPolicy(first_wait_s=0.2))
    monkeypatch.setattr("curation.serving.pool.MUTE_S", 1.0)


@contextmanager
def pool_of(*servers: dict[str, object], threads: int = 20, **settings: float) -> Iterator[Callable[..., list[str]]]:
    """An open pool over stubs with these settings, as a function: texts → replies, asked by ``threads`` threads."""
    with ExitStack() as stack:
        ports = [stack.enter_context(ollama_stub(**server)) for server in servers]
        pool = EndpointPool([f"http://127.0.0.1:{port}" for port in ports], MODEL, **settings)  # type: ignore[arg-type]
        pool.open()
        executor = stack.enter_context(ThreadPoolExecutor(threads))

        def ask(texts: Sequence[str]) -> list[str]:
            return list(executor.map(lambda text: pool.ask(Request(user=text)).text, texts))

        ask.pool = pool  # type: ignore[attr-defined]
        yield ask


def facts(ask: Callable[..., list[str]]) -> list[dict[str, object]]:
    return list(ask.pool.facts().values())  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


TEXTS = [f'sentence: "caption {number}" group:"asian male"' for number in range(200)]
REPLIES = [f"A photo of a asian male person, caption {number}" for number in range(200)]


# ---- which servers


def test_ports_as_the_published_pipeline_has_them() -> None:
    assert endpoint_urls("11434,11435") == ["http://localhost:11434", "http://localhost:11435"]
    assert endpoint_urls(" 11434 ,,11434 ", "gpu1") == ["http://gpu1:11434"]
    four = [f"http://localhost:{port}" for port in range(11434, 11438)]
    for ports in (
        "11434-11437", "11434..11437", "11434:11437", "11434 - 11437", "11434–11437", "11434-11435,11435-11437",
        "11434 11435\t11436,11437", "[11434-11437]", "11434; 11435-11437", "'11434-11437'",
    ):  # fmt: skip
        assert endpoint_urls(ports) == four, ports


def test_whole_urls() -> None:
    urls = endpoint_urls("1", "h", "http://a:1/, https://b/v1 ,http://c:2/v1/")
    assert urls == ["http://a:1", "https://b", "http://c:2"]
    for path in (
        "/v1",
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/models",
        "/api/chat",
        "/api/generate",
        "//",
    ):
        assert endpoint_urls("1", endpoints=f"http://a:1{path}") == ["http://a:1"]
    assert endpoint_urls("1", endpoints="https://router/api/v1") == ["https://router/api"]
    assert endpoint_urls("1", endpoints="http://a/tenant") == ["http://a/tenant"]


def test_endpoints_with_braces_and_blanks() -> None:
    assert endpoint_urls("1", endpoints="http://n{1..2}:8000 http://m:1") == [
        "http://n1:8000",
        "http://n2:8000",
        "http://m:1",
    ]
    assert endpoint_urls("1", endpoints="http://{a,b}:8") == ["http://a:8", "http://b:8"]


@pytest.mark.parametrize(
    "ports", ["", "x", "0", "65536", "-1", "11437-11434", "1-70000", "1-5000", "0-3", "a-b", "1-", "²", "[]"]
)
def test_bad_ports(ports: str) -> None:
    with pytest.raises(UsageError, match="port"):
        endpoint_urls(ports)


@pytest.mark.parametrize("endpoints", ["localhost:11434", "ftp://x", ","])
def test_bad_urls(endpoints: str) -> None:
    with pytest.raises(UsageError, match="endpoint"):
        endpoint_urls("1", endpoints=endpoints)


# ---- opening


def test_no_server_answers() -> None:
    first, second = free_port(), free_port()
    pool = EndpointPool(endpoint_urls(f"{first},{second}", "127.0.0.1"), MODEL)
    with pytest.raises(InfrastructureError, match=f"no endpoint answers.*{first}: connection refused.*{second}"):
        pool.open()


def test_the_password_of_an_endpoint_is_not_shown() -> None:
    pool = EndpointPool(endpoint_urls("", endpoints=f"http://user:s3cr3t@127.0.0.1:{free_port()}"), MODEL)
    with pytest.raises(InfrastructureError, match=r"http://127\.0\.0\.1:\d+: connection refused") as error:
        pool.open()
    assert "s3cr3t" not in str(error.value)


def test_one_server_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    with ollama_stub() as port:
        gone = free_port()
        pool = EndpointPool(endpoint_urls(f"{gone},{port}", "127.0.0.1"), MODEL)
        pool.open()
        assert pool.ask(Request(user=TEXTS[0])).text == REPLIES[0]
        assert list(pool.facts()) == [f"http://127.0.0.1:{port}"]


def test_a_model_that_is_not_there_is_named_with_the_command_that_makes_it() -> None:
    with ollama_stub(model="llama3") as port:
        pool = EndpointPool(endpoint_urls(str(port), "127.0.0.1"), MODEL)
        with pytest.raises(InfrastructureError, match=rf"{port} has no model '{MODEL}'.*ollama create {MODEL} -f"):
            pool.open()


def test_a_cold_model_is_loaded_before_the_first_request() -> None:
    """Loading takes longer than an answer may."""
    with pool_of({"load_s": 1.0, "latency_s": 0.01}, timeout_s=0.5) as ask:
        assert ask(TEXTS[:8]) == REPLIES[:8]
        assert "timeouts" not in facts(ask)[0]


def test_a_model_that_takes_too_long_to_load() -> None:
    with (
        ollama_stub(load_s=30.0) as port,
        pytest.raises(InfrastructureError, match=r"no endpoint answers.*no answer within 0\.3 s"),
    ):
        EndpointPool([f"http://127.0.0.1:{port}"], MODEL, timeout_s=0.2, load_timeout_s=0.3).open()


# ---- who gets what


def test_requests_in_flight_start_at_one_and_grow(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with pool_of({"latency_s": 0.3, "slots": 8, "log": log}) as ask:
        assert ask(TEXTS[:30]) == REPLIES[:30]
    times = [json.loads(line)["at"] for line in log.read_text().splitlines()]
    assert times[1] - times[0] > 0.28, "the second waits for the first reply"
    assert times[3] - times[1] > 0.28, "two are in flight then, and the next waits for a reply"
    assert max(sum(at <= other < at + 0.28 for other in times) for at in times) > 2


def test_every_body_is_the_same_on_every_run(tmp_path: Path) -> None:
    bodies = []
    for name in ("a", "b"):
        with pool_of({"log": tmp_path / name}, {"log": tmp_path / name}) as ask:
            ask(TEXTS[:50])
        bodies.append(sorted(json.loads(line)["body"] for line in (tmp_path / name).read_text().splitlines()))
    assert bodies[0] == bodies[1]


@pytest.mark.parametrize("field", ["chat_template_kwargs", "reasoning_effort", "think"])
def test_a_field_that_a_server_refuses_is_left_out_from_then_on(
    field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each server is told not to reason; one that does not know how it is told is asked without."""
    api = {"thinks": True} if field == "think" else {"api": "openai"}
    with caplog.at_level("INFO"), pool_of({**api, "refuses": field, "log": tmp_path / "log"}) as ask:
        assert ask(TEXTS[:30]) == REPLIES[:30]
    bodies = [json.loads(json.loads(line)["body"]) for line in (tmp_path / "log").read_text().splitlines()]
    assert [field in body for body in bodies] == [True] + [False] * 30
    others = {"chat_template_kwargs", "reasoning_effort"} - {field} if field != "think" else set()
    assert all(others <= body.keys() for body in bodies), "what it knows is still sent"
    assert sum(f"gets a changed one: no {field}" in record.message for record in caplog.records) == 1


def test_a_request_at_fault_does_not_change_how_a_server_is_asked(tmp_path: Path) -> None:
    with pool_of({"api": "openai", "log": tmp_path / "log"}) as ask:
        for text in ("E400", TEXTS[0], "E400", TEXTS[1]):
            try:
                ask([text])
            except SampleError as error:
                assert error.reason == "llm_bad_request"
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if CONTROL not in line]
    bodies = [json.loads(json.loads(line)["body"]) for line in lines]
    assert ["reasoning_effort" in body for body in bodies] == [True, False, True, True, True]


def test_a_context_that_cannot_hold_the_prompt_is_refused() -> None:
    with (
        pytest.raises(InfrastructureError, match=r"holds 4,096 tokens.*about 5,000: shorten"),
        pool_of({}, needs_tokens=5000),
    ):
        pass
    with pool_of({"api": "openai"}, needs_tokens=5000) as ask:
        assert ask(TEXTS[:1]) == REPLIES[:1], "a server that does not tell has a context of its own"


def test_a_slower_server_gets_fewer() -> None:
    with pool_of({"latency_s": 0.05}, {"latency_s": 0.2}) as ask:
        assert ask(TEXTS) == REPLIES
        fast, slow = (int(str(fact["answered"])) for fact in facts(ask))
    assert 1.5 < fast / slow < 10


def test_a_server_with_one_slot_does_not_hoard_requests() -> None:
    with pool_of({"latency_s": 0.03, "slots": 16}, {"latency_s": 0.03, "slots": 1}) as ask:
        ask(TEXTS * 4)
        many, few = (int(str(fact["answered"])) for fact in facts(ask))
    assert many > 5 * few


def test_a_short_queue_that_refuses() -> None:
    with pool_of({"latency_s": 0.02, "queue": 0}, {"latency_s": 0.02, "queue": 0}) as ask:
        assert ask(TEXTS) == REPLIES
        assert all(fact["limit"] in (4, 5) for fact in facts(ask))
        assert sum(int(str(fact.get("busy", 0))) for fact in facts(ask)) < 60


def test_what_a_server_did_is_told_in_words() -> None:
    with ollama_stub(latency_s=0.02) as port:
        pool = EndpointPool([f"http://127.0.0.1:{port}"], MODEL)
        pool.open()
        assert pool.summary() == [], "it was asked nothing"
        for text in TEXTS[:3]:
            pool.ask(Request(user=text))
        [line] = pool.summary()
    assert re.fullmatch(
        rf"server http://127\.0\.0\.1:{port}: 3 requests, \d+\.\d requests/s, up to 1 at once, "
        r"typically 0\.\d+ s each \(slowest 1 in 20: 0\.\d+ s or more\)",
        line,
    ), line


def test_failures_are_told_by_their_kind() -> None:
    service = Service()
    for number in range(1234):
        service.began(1, 0.05 * number)
        service.ended(0, 0.05 * number + 0.04)
    for text, timed_out in (("500: boom", False), ("no answer within 10 s", True), ("no answer within 9 s", True)):
        service.failed(text, timed_out=timed_out)
    service.failed("connection broken (ConnectionResetError)")
    service.failed("no reply in b''")
    assert service.in_words() == (
        "1,234 requests, 5 failed (2 timeouts, 1 HTTP 500, 1 broken connection, 1 unusable reply)"
    )
    for number in range(1000):
        service.answered(0.8 if number < 940 else 2.1)
    service.busy = 2
    assert service.in_words().endswith(
        ", 2 sent again because it was busy, 20.3 requests/s, up to 1 at once, typically 0.8 s each "
        "(slowest 1 in 20: 2.1 s or more)"
    )


def test_the_pool_says_what_requests_wait_for() -> None:
    with ollama_stub(latency_s=0.01, die_after=3) as port, ThreadPoolExecutor(1) as threads:
        pool = EndpointPool([f"http://127.0.0.1:{port}"], MODEL, patience_s=2.0)
        pool.open()
        assert pool.waiting() == ""
        asked = threads.submit(lambda: [pool.ask(Request(user=text)) for text in TEXTS])
        wait_until(lambda: pool.waiting() or asked.done())
        assert re.match(rf"waiting for a model server: http://127\.0\.0\.1:{port}: .", pool.waiting())
        with pytest.raises(InfrastructureError, match="no endpoint has answered"):
            asked.result()
        assert pool.waiting() == "", "nobody asks any more"


def test_retry_after_is_honoured() -> None:
    with pool_of({"latency_s": 0.3, "slots": 1, "queue": 0, "retry_after": 1}, threads=2) as ask:
        began = time.monotonic()
        assert ask(TEXTS[:3]) == REPLIES[:3]
        assert time.monotonic() - began > 1.0


# ---- failures


def test_a_server_that_dies_half_way_loses_nothing() -> None:
    with pool_of({"latency_s": 0.01}, {"latency_s": 0.01, "die_after": 30}) as ask:
        assert ask(TEXTS) == REPLIES
        assert facts(ask)[1]["errors"]


def test_a_server_that_falls_mute_is_left_long_before_the_time_out() -> None:
    with pool_of({"latency_s": 0.01}, {"latency_s": 0.01, "hang_after": 40}, timeout_s=3600.0) as ask:
        assert ask(TEXTS) == REPLIES
        assert facts(ask)[1]["timeouts"]


@pytest.mark.parametrize("word", ["E500", "BREAK", "MIDSTREAM", "NOTJSON"])
def test_what_breaks_once_is_asked_again(word: str) -> None:
    texts = [f"{text} ONCE-{word}" for text in TEXTS[:20]]
    with pool_of({}, {}) as ask:
        assert ask(texts) == REPLIES[:20]


@pytest.mark.parametrize(
    ("word", "reason"),
    [("E500", "llm_error"), ("HANG", "llm_timeout"), ("E400", "llm_bad_request")],
)
def test_a_caption_that_no_server_survives_fails_alone(word: str, reason: str) -> None:
    """Alone at the end of a run too, when nothing else shows that the server is well."""
    with pool_of({}, timeout_s=0.2) as ask:
        assert ask(TEXTS[:5]) == REPLIES[:5]
        with pytest.raises(SampleError) as caught:
            ask([f'sentence: "{word}"'])
        assert caught.value.reason == reason
        assert ask(TEXTS[:5]) == REPLIES[:5]


def test_all_servers_gone_ends_the_run_in_bounded_time() -> None:
    dying = {"die_after": 20, "latency_s": 0.01}
    says = pytest.raises(InfrastructureError, match=r"no endpoint has answered for 1 s.*start again")
    with pool_of(dying, dying, patience_s=1.0) as ask, says:
        ask(TEXTS)


def test_a_server_that_comes_back_is_used_again() -> None:
    port = free_port()
    with ExitStack() as stack, ollama_stub(latency_s=0.01) as other:
        stack.enter_context(ollama_stub(port=port, latency_s=0.01, die_after=10))
        pool = EndpointPool(endpoint_urls(f"{port},{other}", "127.0.0.1"), MODEL)
        pool.open()
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda text: pool.ask(Request(user=text)), TEXTS))
            assert pool.facts()[f"http://127.0.0.1:{port}"]["limit"] == 1
            stack.enter_context(ollama_stub(port=port, latency_s=0.01))
            time.sleep(1.0)  # the pause after the last trial
            list(threads.map(lambda text: pool.ask(Request(user=text)), TEXTS))
        assert int(str(pool.facts()[f"http://127.0.0.1:{port}"]["answered"])) > 30


def test_a_model_that_vanishes_is_asked_elsewhere() -> None:
    port = free_port()
    with ExitStack() as stack, ollama_stub() as other:
        with ollama_stub(port=port):
            pool = EndpointPool(endpoint_urls(f"{port},{other}", "127.0.0.1"), MODEL)
            pool.open()
        stack.enter_context(ollama_stub(port=port, model="another"))
        assert [pool.ask(Request(user=text)).text for text in TEXTS[:20]] == REPLIES[:20]


# ---- stopping


def test_waiting_for_a_server_can_be_stopped() -> None:
    halt = threading.Event()

    def check_stop() -> None:
        if halt.is_set():
            raise Stopped("enough")

    with ollama_stub(die_after=1) as port:
        pool = EndpointPool([f"http://127.0.0.1:{port}"], MODEL, patience_s=60.0)
        pool.open()
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(pool.ask, Request(user="x"), check_stop)
            time.sleep(0.5)
            halt.set()
            with pytest.raises(Stopped):
                waiting.result(timeout=120)
