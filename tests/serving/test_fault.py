"""Who is at fault: a request, a server, or a setting; and servers that load their model again."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from curation.errors import InfrastructureError, SampleError
from curation.serving.pool import CONTROL, EndpointPool
from curation.serving.wire import Request
from curation.storage.retry import RetryPolicy
from tests.servers.odd_server import MODEL, Answer, Asked, OddServer, odd_server

TEXTS = [f"caption {number}" for number in range(40)]
INVALID_KEY = '{"error": {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}}'


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.serving.pool.TRIALS", RetryPolicy(first_wait_s=0.2, longest_wait_s=0.4))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that are logged."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("curation")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def opened(*servers: OddServer, **settings: float) -> EndpointPool:
    pool = EndpointPool([server.url for server in servers], MODEL, **settings)  # type: ignore[arg-type]
    pool.open()
    return pool


def ask_all(pool: EndpointPool, texts: list[str] = TEXTS, threads: int = 8) -> list[str]:
    """The reply to each text, or the reason of its failure."""

    def ask(text: str) -> str:
        try:
            return pool.ask(Request(user=text)).text
        except SampleError as error:
            return error.reason

    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(ask, texts))


def refusing(status: int, words: str = "not today") -> Callable[[Asked], Answer]:
    return lambda asked: Answer(words, status)


def echo(asked: Asked) -> Answer:
    return Answer(f"re {asked.text}")


ECHOES = [f"re {text}" for text in TEXTS]


# ---- a setting


@pytest.mark.parametrize("api", ["ollama", "openai"])
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 415, 422])
@pytest.mark.parametrize("servers", [1, 2])
def test_what_every_server_refuses_from_the_first_request_on_ends_the_run(api: str, status: int, servers: int) -> None:
    """At once, although servers are waited for a minute, with the servers' words; no request is blamed."""
    with odd_server(refusing(status), api) as first, odd_server(refusing(status), api) as second:  # type: ignore[arg-type]
        pool = opened(*[first, second][:servers])
        began = time.monotonic()
        with pytest.raises(InfrastructureError, match=f"refuse every request.*{status}: not today"):
            ask_all(pool)
        assert time.monotonic() - began < 10


def test_the_servers_words_are_one_bounded_clean_line() -> None:
    words = '{"error": {"message": "<b>no\\u001b[2J\\n' + "x" * 9000 + '"}}'
    with odd_server(refusing(403, words)) as server, pytest.raises(InfrastructureError) as caught:
        ask_all(opened(server))
    assert "403: no" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_one_of_two_servers_that_refuses_everything_is_set_aside(status: int, said: list[str]) -> None:
    with odd_server(refusing(status)) as bad, odd_server(echo) as good:
        assert ask_all(opened(bad, good)) == ECHOES
        assert len(bad.questions) < len(TEXTS) / 2
    assert len([line for line in said if bad.url in line]) == 1
    assert f"{status}: not today" in next(line for line in said if bad.url in line)


def test_a_key_that_expires_and_is_renewed_costs_no_request() -> None:
    expired = threading.Event()

    def behaviour(asked: Asked) -> Answer:
        if expired.is_set():
            return Answer(INVALID_KEY, 401)
        return echo(asked)

    with odd_server(behaviour) as server:
        pool = opened(server, patience_s=20.0)
        assert ask_all(pool, TEXTS[:10]) == ECHOES[:10]
        expired.set()
        threading.Timer(1.0, expired.clear).start()
        assert ask_all(pool) == ECHOES


def test_a_key_that_expires_for_good_ends_the_run_with_the_reason() -> None:
    with odd_server(echo) as server:
        pool = opened(server, patience_s=1.0)
        assert ask_all(pool, TEXTS[:10]) == ECHOES[:10]
        server.behaviour = refusing(401, INVALID_KEY)
        with pytest.raises(InfrastructureError, match=r"401: Invalid API Key.*CURATION_API_KEY"):
            ask_all(pool)


def test_a_time_limit_that_is_too_short_for_every_answer_is_a_setting() -> None:
    def slow(asked: Asked) -> Answer:
        time.sleep(0.6)
        return echo(asked)

    with odd_server(slow) as server:
        pool = opened(server, timeout_s=0.2, load_timeout_s=0.3, patience_s=1.0)
        with pytest.raises(InfrastructureError, match="no endpoint has answered"):
            ask_all(pool)


@pytest.mark.parametrize("slow_s", [0.6, 0.0])
def test_requests_that_all_take_longer_than_the_time_limit_are_not_blamed(slow_s: float) -> None:
    """Although the servers answer a harmless question: in more than that time, or at once."""

    def slow(asked: Asked) -> Answer:
        time.sleep(slow_s if asked.text == CONTROL else 0.6)
        return echo(asked)

    with odd_server(slow) as server:
        pool = opened(server, timeout_s=0.2, load_timeout_s=5.0, patience_s=1.0)
        with pytest.raises(InfrastructureError, match=r"--timeout|no endpoint has answered.*no answer within 0.2 s"):
            for text in TEXTS:
                ask_all(pool, [text])


# ---- a request


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("place", [0, 20, 39])
def test_a_request_that_every_server_refuses_fails_alone(status: int, servers: int, place: int) -> None:
    """Also as the first of all, where no server has answered anything yet, and with one thread."""

    def behaviour(asked: Asked) -> Answer:
        return Answer("too long", status) if asked.text == TEXTS[place] else echo(asked)

    wanted = [*ECHOES]
    wanted[place] = "llm_bad_request"
    with odd_server(behaviour) as first, odd_server(behaviour) as second:
        chosen = [first, second][:servers]
        assert ask_all(opened(*chosen), threads=1) == wanted
        for server in chosen:
            asked = [question for question in server.questions if question.text == TEXTS[place]]
            assert len({json.dumps(question.body) for question in asked}) == len(asked), "each server decides once"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_second_server_decides_before_a_request_is_blamed(status: int) -> None:
    def picky(asked: Asked) -> Answer:
        return Answer("no", status) if "7" in asked.text else echo(asked)

    with odd_server(picky) as first, odd_server(echo) as second:
        assert ask_all(opened(first, second)) == ECHOES


@pytest.mark.parametrize("kind", ["500", "hang up", "mute", "no json"])
@pytest.mark.parametrize("servers", [1, 2])
def test_requests_on_which_every_server_fails_are_rejected_and_the_others_are_answered(kind: str, servers: int) -> None:
    """Several of them, so that no server answers anything else while they are in flight."""
    released = threading.Event()

    def behaviour(asked: Asked) -> Answer | None:
        if asked.text not in TEXTS[-6:]:
            return echo(asked)
        if kind == "mute":
            released.wait(5)
        return Answer("boom", 500) if kind == "500" else Answer("<html>", 299) if kind == "no json" else None

    with odd_server(behaviour) as first, odd_server(behaviour) as second:
        pool = opened(*[first, second][:servers], timeout_s=0.3, load_timeout_s=2.0, patience_s=1.0)
        reason = "llm_timeout" if kind == "mute" else "llm_error"
        assert ask_all(pool) == [*ECHOES[:-6], *[reason] * 6]
        released.set()


def test_no_control_question_is_asked_while_all_goes_well() -> None:
    with odd_server(echo) as server:
        ask_all(opened(server))
        assert CONTROL not in {asked.text for asked in server.questions}
        assert len(server.questions) == len(TEXTS)


# ---- loading again


class Loading:
    """A server whose model is loaded by the first request, or by Ollama's empty one, and loses it on demand."""

    def __init__(self, load_s: float, api: str) -> None:
        self.load_s, self.api = load_s, api
        self.loaded_at = 0.0
        self.unload = threading.Event()

    def wait(self, asked: Asked) -> None:
        if self.unload.is_set():
            self.unload.clear()
            self.loaded_at = time.monotonic() + self.load_s
        time.sleep(max(0.0, self.loaded_at - time.monotonic()))

    def __call__(self, asked: Asked) -> Answer:
        self.wait(asked)
        return echo(asked)

    def other(self, asked: Asked) -> Answer | None:
        if asked.path == "/api/generate":
            self.wait(asked)
        return None


@pytest.mark.parametrize("api", ["ollama", "openai"])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_model_that_is_loaded_again_has_the_time_for_loading(api: str, when: str) -> None:
    """Longer than an answer may take, and longer than a run waits for servers that do not answer."""
    loading = Loading(2.0, api)
    with odd_server(loading, api) as server:  # type: ignore[arg-type]
        server.other = loading.other
        pool = opened(server, timeout_s=0.3, load_timeout_s=10.0, patience_s=0.5)
        if when == "later":
            assert ask_all(pool, TEXTS[:20]) == ECHOES[:20]
        loading.unload.set()
        assert ask_all(pool) == ECHOES


def test_a_server_that_says_that_it_loads_its_model_is_waited_for() -> None:
    """As text-generation-inference and llama-server do: 503."""
    ready_at = time.monotonic() + 3.0

    def behaviour(asked: Asked) -> Answer:
        if time.monotonic() < ready_at:
            return Answer('{"error": {"message": "Loading model"}}', 503)
        return echo(asked)

    with odd_server(behaviour) as server:
        assert ask_all(opened(server, timeout_s=0.3, load_timeout_s=10.0, patience_s=0.5)) == ECHOES


def test_a_pause_of_whoever_asks_is_no_silence_of_the_servers() -> None:
    """Stage 02 waits for stage 01 for longer than it would wait for servers; the model is unloaded meanwhile."""
    loading = Loading(1.0, "ollama")
    with odd_server(loading, "ollama") as server:
        server.other = loading.other
        pool = opened(server, timeout_s=0.3, load_timeout_s=10.0, patience_s=0.5)
        assert ask_all(pool, TEXTS[:10]) == ECHOES[:10]
        loading.unload.set()
        time.sleep(1.0)
        assert ask_all(pool) == ECHOES


def test_ollama_is_asked_to_keep_the_model_between_requests() -> None:
    with odd_server(echo, "ollama") as server:
        ask_all(opened(server), TEXTS[:3])
        assert {asked.body["keep_alive"] for asked in server.questions} == {"30m"}


# ---- servers that take less than others of their API


def refused(words: str, *fields: str, status: int = 400) -> Callable[[Asked], Answer]:
    """A server that refuses requests with one of these fields."""

    def behaviour(asked: Asked) -> Answer:
        return Answer(words, status) if any(name in asked.body for name in fields) else echo(asked)

    return behaviour


OPENAI_WORDS = (
    '{"error": {"message": "Unsupported parameter: \'max_tokens\' is not supported with this model. Use '
    '\'max_completion_tokens\' instead.", "param": "max_tokens"}}'
)


@pytest.mark.parametrize(
    ("behaviour", "change"),
    [
        (refused(OPENAI_WORDS, "max_tokens"), "max_completion_tokens for max_tokens"),
        (
            refused(
                '{"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}', "seed", status=422
            ),
            "no seed",
        ),
        (refused('{"message": "seed: unknown field"}', "seed"), "no seed"),
        (
            refused(
                '{"error": {"message": "Unsupported value: \'temperature\' does not support 0.8 with this model. Only '
                'the default (1) value is supported."}}',
                "temperature",
            ),
            "no temperature",
        ),
        (
            refused(
                '{"error": "Unrecognized request argument supplied: chat_template_kwargs"}', "chat_template_kwargs"
            ),
            "no chat_template_kwargs",
        ),
    ],
)
def test_a_field_that_a_server_refuses_is_left_out_from_then_on(
    behaviour: Callable[[Asked], Answer], change: str, said: list[str]
) -> None:
    with odd_server(behaviour) as server:
        pool = opened(server)
        assert change in pool.ask(Request(user="first")).adapted
        assert ask_all(pool) == ECHOES
        assert len(server.questions) <= len(TEXTS) + 4, "only the first request was refused"
        assert change in pool.adaptations()[server.url]
    assert len([line for line in said if change in line]) == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, '{"object": "error", "message": "System role not supported", "code": 400}'),
        (400, '{"message": "Conversation roles must alternate user/assistant/user/assistant/..."}'),
        (500, '{"error": {"message": "Jinja Exception: System role not supported"}}'),
        (400, '{"message": "Only user and assistant roles are supported!"}'),
        (
            422,
            '{"detail": [{"msg": "Input should be \'user\' or \'assistant\'"}]}',
        ),
        (400, "{\"error\": \"'system' is not one of ['user', 'assistant']\"}"),
        (400, '{"error": {"message": "Developer instruction is not enabled for models/gemma-3-27b-it"}}'),
    ],
)
def test_a_system_prompt_that_is_refused_stands_in_the_users_message(status: int, words: str) -> None:
    def behaviour(asked: Asked) -> Answer:
        roles = [message["role"] for message in asked.body["messages"]]
        return Answer(words, status) if "system" in roles else echo(asked)

    with odd_server(behaviour) as server:
        reply = opened(server).ask(Request(user="hello", system="Be brief."))
        assert reply.text == "re Be brief.\n\nhello"
        assert "the system prompt within the user's message" in reply.adapted


def test_several_refusals_one_after_the_other_are_all_heeded() -> None:
    def behaviour(asked: Asked) -> Answer:
        if "max_tokens" in asked.body:
            return Answer(OPENAI_WORDS, 400)
        if "seed" in asked.body:
            return Answer("seed is not supported", 400)
        return echo(asked)

    with odd_server(behaviour) as server:
        assert opened(server).ask(Request(user="x")).adapted[-2:] == (
            "max_completion_tokens for max_tokens",
            "no seed",
        )


def test_a_value_out_of_range_is_no_reason_to_leave_the_option_out() -> None:
    words = "temperature must be between 0 and 1, 1.3 is not supported"

    def behaviour(asked: Asked) -> Answer:
        return Answer(words, 400) if asked.body["temperature"] > 1 else echo(asked)

    with odd_server(behaviour) as server:
        pool = opened(server)
        pool.ask(Request(user="x"))
        with pytest.raises(SampleError):
            pool.ask(Request(user="y", temperature=1.3))
        assert "no temperature" not in pool.adaptations().get(server.url, [])


def test_a_reply_that_a_servers_parser_takes_for_reasoning_is_asked_for_with_reasoning(said: list[str]) -> None:
    """vLLM's parsers of some models call everything reasoning where the chat template has turned reasoning off."""

    def behaviour(asked: Asked) -> Answer:
        quiet = "chat_template_kwargs" in asked.body
        message = {"content": None, "reasoning_content": "re"} if quiet else {"content": "re", "reasoning": "hm"}
        return Answer(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}), raw=True)

    with odd_server(behaviour) as server:
        assert ask_all(opened(server), threads=1) == ["re"] * len(TEXTS)
        assert len(server.questions) == len(TEXTS) + 1
    assert sum("gets a changed one" in line for line in said) == 1


def test_a_model_that_only_reasons_is_asked_as_before() -> None:
    def behaviour(asked: Asked) -> Answer:
        message = {"content": "", "reasoning_content": "hm"}
        return Answer(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}), raw=True)

    with odd_server(behaviour) as server:
        pool = opened(server)
        assert ask_all(pool, TEXTS[:3], threads=1) == [""] * 3
        server.behaviour = echo
        assert pool.ask(Request(user="x")).text == "re x"
        assert "chat_template_kwargs" in server.questions[-1].body and not pool.adaptations()


def test_a_reply_that_holds_the_key_is_no_reply() -> None:
    with odd_server(lambda asked: Answer("sk-0123456789abc is the key")) as bad, odd_server(echo) as good:
        pool = EndpointPool([bad.url, good.url], MODEL, key="sk-0123456789abc")
        pool.open()
        assert ask_all(pool) == ECHOES


@pytest.mark.parametrize("words", ["Model unloaded.", "Model was unloaded while the request was still in queue.."])
def test_a_model_that_was_exchanged_for_another_is_waited_for(words: str, said: list[str]) -> None:
    """LM Studio says so with 400, which is neither the request's fault nor a setting's."""
    answers = [Answer(json.dumps({"error": words}), 400)] * 2

    def behaviour(asked: Asked) -> Answer:
        return answers.pop() if answers else echo(asked)

    with odd_server(behaviour) as server:
        assert ask_all(opened(server), threads=1) == ECHOES
        assert "chat_template_kwargs" in server.questions[-1].body
    assert not [line for line in said if "gets a changed one" in line]
