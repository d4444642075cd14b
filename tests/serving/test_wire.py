"""Two wire formats: the bodies that are sent, the replies that are read, and what each error means."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.errors import InfrastructureError, SampleError
from curation.replies import CUT, Reply
from curation.serving.adapt import adapted
from curation.serving.connection import (
    MAX_REPLY_BYTES,
    EndpointError,
    ModelMissing,
    Refused,
    answers,
    get,
    post,
)
from curation.serving.session import Session
from curation.serving.wire import SERVER_APIS, Manner, Request, Served, detect_api

CHAT = Request(
    user="hello", default_system="be kind", temperature=0.5, seed=7, max_tokens=9, context_tokens=64, stop=("\n",)
)
RAW = Request(prompt="once", max_tokens=9, context_tokens=64, extra={"repeat_penalty": 1.1})


@contextmanager
def serving(*responses: bytes, gap_s: float = 0.0) -> Iterator[str]:
    """A server that answers one request a connection with these bytes, whatever it is asked, and then closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for response in responses:
            connection, _ = listener.accept()
            with connection:
                read_request(connection)
                step = 1 if gap_s else max(1, len(response))
                for start in range(0, len(response), step):
                    if gap_s:
                        stopping.wait(gap_s)
                    try:
                        connection.sendall(response[start : start + step])
                    except OSError:
                        break

    stopping = threading.Event()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopping.set()
        listener.close()


def read_request(connection: socket.socket) -> None:
    """All of it: a connection that is closed with bytes unread is reset, and the answer may be lost."""
    received = b""
    while b"\r\n\r\n" not in received and (more := connection.recv(1 << 16)):
        received += more
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    missing = (int(length[1]) if length else 0) - len(body)
    while missing > 0 and (more := connection.recv(1 << 16)):
        missing -= len(more)


def http(status: int, body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# ---- what is sent


def test_ollama_bodies_always_bound_the_reply_and_never_stream() -> None:
    path, body = SERVER_APIS["ollama"].body("m", CHAT)
    value = orjson.loads(body)
    assert path == "/api/chat"
    assert value == {
        "model": "m",
        "stream": False,
        "keep_alive": "30m",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        "options": {"temperature": 0.5, "seed": 7, "num_ctx": 64, "num_predict": 9, "stop": ["\n"]},
    }
    path, body = SERVER_APIS["ollama"].body("m", RAW)
    value = orjson.loads(body)
    assert path == "/api/generate"
    assert value["raw"] is True and value["prompt"] == "once"
    assert value["options"]["repeat_penalty"] == 1.1


def test_openai_bodies() -> None:
    path, body = SERVER_APIS["openai"].body("m", CHAT)
    value = orjson.loads(body)
    assert path == "/v1/chat/completions"
    assert value["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert (value["max_tokens"], value["seed"], value["stream"], value["stop"]) == (9, 7, False, ["\n"])
    path, body = SERVER_APIS["openai"].body("m", RAW)
    assert path == "/v1/completions"
    assert orjson.loads(body)["repeat_penalty"] == 1.1


def test_a_system_prompt_of_ones_own_goes_to_either() -> None:
    own = Request(user="hello", system="be brief", default_system="be kind")
    for wire in SERVER_APIS.values():
        assert orjson.loads(wire.body("m", own)[1])["messages"][0] == {"role": "system", "content": "be brief"}


def test_a_model_that_is_instructed_is_not_instructed_again() -> None:
    for wire in SERVER_APIS.values():
        messages = orjson.loads(wire.body("m", CHAT, Manner(instructed=True))[1])["messages"]
        assert messages == [{"role": "user", "content": "hello"}]


def test_reasoning_is_turned_off_where_a_server_can() -> None:
    ollama, openai = SERVER_APIS["ollama"], SERVER_APIS["openai"]
    assert not ollama.quiet_fields(Served(told=True)), "a model that does not reason may refuse the field"
    assert ollama.quiet_fields(Served(told=True, thinks=True)) == {"think": False}
    assert ollama.quiet_fields(Served(told=True, thinks=True, levels=True)) == {"think": "low"}
    fields = openai.quiet_fields(Served())
    assert fields["chat_template_kwargs"]["enable_thinking"] is False and fields["reasoning_effort"] == "low"
    for wire, asked in ((ollama, {"think": False}), (openai, fields)):
        assert orjson.loads(wire.body("m", CHAT, Manner(fields=asked))[1]).items() >= asked.items()
        assert not orjson.loads(wire.body("m", RAW, Manner(fields=asked))[1]).keys() & asked.keys(), "no chat"


def test_a_server_is_asked_without_the_field_that_it_does_not_know() -> None:
    manner = Manner(fields={"chat_template_kwargs": {}, "reasoning_effort": "low"})

    def left(error: Exception, manner: Manner = manner) -> list[str] | None:
        found = adapted(manner, Request(user="x"), error, known=False)  # type: ignore[arg-type]
        return None if found is None else [*found.fields]

    bad = "llm_bad_request"
    assert left(SampleError(bad, "400: Unrecognized request argument supplied: chat_template_kwargs")) == [
        "reasoning_effort"
    ]
    assert left(SampleError(bad, "400: 'm' does not support thinking")) == ["chat_template_kwargs"]
    assert left(SampleError(bad, "422: Extra inputs are not permitted")) == []
    assert left(EndpointError("500: chat_template_kwargs: unknown")) == ["reasoning_effort"]
    assert left(EndpointError("500: out of memory")) is None
    assert left(SampleError(bad, "401: chat_template_kwargs")) is None
    assert left(SampleError(bad, "400: too long"), Manner()) is None
    assert left(SampleError(bad, '400: "m" does not support thinking'), Manner(fields={"think": False})) == []


def test_a_picture_is_in_the_body_itself() -> None:
    asked = Request(user="what is this?", jpeg=b"\xff\xd8\xff")
    (message,) = orjson.loads(SERVER_APIS["ollama"].body("m", asked)[1])["messages"]
    assert message == {"role": "user", "content": "what is this?", "images": ["/9j/"]}
    (message,) = orjson.loads(SERVER_APIS["openai"].body("m", asked)[1])["messages"]
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/"}},
        {"type": "text", "text": "what is this?"},
    ]


@pytest.mark.parametrize("wire", SERVER_APIS.values(), ids=SERVER_APIS)
def test_the_same_request_is_the_same_bytes(wire: object) -> None:
    assert SERVER_APIS["ollama"].body("m", CHAT) == SERVER_APIS["ollama"].body("m", CHAT)
    assert wire.body("m", CHAT) == wire.body("m", CHAT)  # type: ignore[attr-defined]


# ---- what is read


def test_ollama_replies() -> None:
    reply = SERVER_APIS["ollama"].reply
    assert reply(b'{"message":{"content":"hi"},"done":true,"done_reason":"stop"}') == Reply("hi")
    assert reply(b'{"response":"hi","done":true,"done_reason":"length"}') == Reply("hi", CUT)
    assert reply(b'{"message":{"content":"hi"},"done":true}') == Reply("hi"), "old servers give no reason"
    silent = b'{"message":{"content":"hi"},"done":true,"eval_count":9}'
    assert reply(silent, CHAT).ended == CUT, "nor do they where the bound on tokens ended it"
    streamed = b'{"message":{"content":"h"},"done":false}\n{"message":{"content":"i"},"done":true}\n'
    assert reply(streamed) == Reply("hi"), "from a server that streams all the same"
    counted = b'{"message":{"content":"hi"},"done":true,"prompt_eval_count":42,"eval_count":3}'
    assert reply(counted) == Reply("hi", tokens_read=42, tokens_written=3)
    strange = b'{"message":{"content":"hi"},"done":true,"prompt_eval_count":-1,"eval_count":"many"}'
    assert reply(strange) == Reply("hi")
    assert reply(b'{"message":{"content":"h"},"done":false}\n{"message":{"content":"i"},"done":false}').ended == ""
    assert reply(b'{"message":{"content":"hi"}}').ended == "", "no line says that it is done"
    for reason in ("load", "unload", "error"):
        assert reply(b'{"message":{"content":"hi"},"done":true,"done_reason":"%s"}' % reason.encode()).ended == reason
    thinking = b'{"message":{"content":"","thinking":"hm"},"done":true,"done_reason":"length"}'
    assert reply(thinking) == Reply("", CUT, reasoned=True)
    assert reply(b'{"message":{"content":null},"done":true}') == Reply("")


def test_openai_replies() -> None:
    reply = SERVER_APIS["openai"].reply
    assert reply(b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}') == Reply("hi")
    assert reply(b'{"choices":[{"text":"hi","finish_reason":"length"}]}') == Reply("hi", CUT)
    counted = b'{"choices":[{"text":"hi","finish_reason":"stop"}],"usage":{"prompt_tokens":42,"completion_tokens":3}}'
    assert reply(counted) == Reply("hi", tokens_read=42, tokens_written=3)
    assert reply(b'{"choices":[{"text":"hi","finish_reason":"stop"}],"usage":[7]}') == Reply("hi")
    for word, ended in (("eos_token", "stop"), ("stop_sequence", "stop"), ("abort", "abort"), (None, "")):
        choice = {"message": {"content": "hi"}, "finish_reason": word}
        assert reply(orjson.dumps({"choices": [choice]})) == Reply("hi", ended)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None}, Reply("")),
        ({}, Reply("")),
        ({"content": None, "reasoning_content": "hm"}, Reply("", reasoned=True)),
        ({"content": "hi", "reasoning": "hm"}, Reply("hi", reasoned=True)),
        ({"content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, Reply("hi")),
        ({"content": ["h", "i", 3, None]}, Reply("hi")),
        ({"content": []}, Reply("")),
        (
            {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "hi"}]},
            Reply("hi", reasoned=True),
        ),
        ({"content": None, "refusal": "I'm sorry"}, Reply("", refused=True)),
        ({"content": [{"type": "refusal", "refusal": "I'm sorry"}]}, Reply("", refused=True)),
        ({"content": None, "tool_calls": [{"id": "1"}]}, Reply("", refused=True)),
        ({"content": "hi", "refusal": None, "tool_calls": []}, Reply("hi")),
    ],
)
def test_content_that_is_no_text_is_a_reply(message: dict[str, object], expected: Reply) -> None:
    payload = orjson.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
    assert SERVER_APIS["openai"].reply(payload) == expected


def test_a_server_that_streams_all_the_same() -> None:
    def events(*choices: dict[str, object]) -> bytes:
        return b"".join(b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n" for choice in choices)

    reply = SERVER_APIS["openai"].reply
    parts = events({"delta": {"content": "h"}, "finish_reason": None}, {"delta": {"content": "i"}})
    assert reply(parts + b"data: [DONE]\n\n") == Reply("hi", "")
    kept_alive = b"\n: OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n"
    whole = events({"delta": {}, "finish_reason": "stop"})
    assert reply(kept_alive + parts + kept_alive + whole) == Reply("hi")
    assert reply(b"event: message\n" + parts + whole) == Reply("hi")
    plain = orjson.dumps({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]})
    for before in (kept_alive, b"\n\n  ", b"\xef\xbb\xbf", b"\xef\xbb\xbf" + kept_alive):
        assert reply(before + plain) == Reply("hi")
    assert reply(parts + events({"delta": {}, "finish_reason": "stop"}) + b"data: [DONE]\n\n") == Reply("hi")
    assert reply(events({"delta": {"reasoning_content": "hm"}, "finish_reason": "length"})).reasoned
    with pytest.raises(EndpointError, match="boom"):
        reply(b'data: {"error": "boom"}\n\n')


def test_a_request_that_ollama_has_cut_is_no_reply() -> None:
    """It answers all the same, and only the number of tokens that it has read tells it."""

    def reply(read: int, request: Request, **manner: int) -> Reply:
        payload = b'{"message":{"content":"hi"},"done":true,"prompt_eval_count":%d}' % read
        return SERVER_APIS["ollama"].reply(payload, request, Manner(**manner))  # type: ignore[arg-type]

    long = Request(user="a word " * 4000)
    assert reply(4095, Request()).text == "hi"
    assert reply(20, Request(user="a word " * 300)).text == "hi", "old servers do not count what their cache holds"
    for read, request, known in ((4096, Request(), 0), (5000, Request(), 0), (2050, long, 0), (512, Request(), 512)):
        with pytest.raises(SampleError, match="llm_context_too_short"):
            reply(read, request, context_tokens=known)
    assert SERVER_APIS["openai"].reply(
        b'{"choices":[{"text":"hi","finish_reason":"stop"}],"usage":{"prompt_tokens":9000}}', long
    ), "other servers have contexts of their own"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'"x"',
        b"{}",
        b'{"choices":[]}',
        b'{"choices":[null]}',
        b'{"choices":{"0":1}}',
        b'{"choices":[{"message":{"content":7}}]}',
        b'{"message":"hi"}',
        b'{"message":{"content":3}}',
        b'{"error":"boom"}',
        b'{"message":{"content":"h"},"done":false}\n{"error":"an error was encountered"}',
        b'{"message":{"content":"h"},"done":false}\n{"mess',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("wire", SERVER_APIS.values(), ids=SERVER_APIS)
def test_what_is_no_reply_is_the_servers_fault(wire: object, payload: bytes) -> None:
    with pytest.raises(EndpointError):
        wire.reply(payload)  # type: ignore[attr-defined]


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(payload: bytes) -> None:
    for wire in SERVER_APIS.values():
        try:
            wire.reply(payload)
        except EndpointError:
            pass


# ---- what errors mean


def call(response: bytes, timeout_s: float = 5.0, gap_s: float = 0.0) -> bytes:
    with serving(response, gap_s=gap_s) as url, Session() as session:
        return post(session, f"{url}/api/chat", b"{}", timeout_s)


def test_a_sound_answer() -> None:
    assert call(http(200, b"hello")) == b"hello"
    assert call(b"HTTP/1.1 200 OK\r\n\r\nuntil it closes") == b"until it closes"


@pytest.mark.parametrize(
    ("response", "busy", "timed_out"),
    [
        (http(503, b"busy"), True, False),
        (http(429, b"busy"), True, False),
        (http(500, b"boom"), False, False),
        (http(502, b"boom"), False, False),
        (http(499, b"cancelled"), False, False),
        (http(408, b"late"), False, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", False, False),
        (b"", False, False),
        (b"not http\r\n\r\n", False, False),
        (http(200, b"x" * (MAX_REPLY_BYTES + 1)), False, False),
        (http(200, b"not gzip", b"Content-Encoding: gzip"), False, False),
    ],
)
def test_a_server_at_fault(response: bytes, busy: bool, timed_out: bool) -> None:
    with pytest.raises(EndpointError) as caught:
        call(response)
    assert (caught.value.busy, caught.value.timed_out, caught.value.refused) == (busy, timed_out, False)


def test_a_request_at_fault() -> None:
    for status in (400, 401, 413, 422):  # or a setting is: the pool finds out
        with pytest.raises(SampleError, match=f"llm_bad_request: {status}: too long"):
            call(http(status, b"too long"))


def test_a_redirect_is_told_and_not_followed() -> None:
    away = b"Location: http://user:secret@127.0.0.1:1/login?next=/v1"
    with pytest.raises(Refused, match=r"302: it redirects to http://127\.0\.0\.1:1/login\?…, which is not") as caught:
        call(http(302, b"", away))
    assert caught.value.access


@pytest.mark.parametrize("where", [b"http://[", b"http://\xff\xfe/", b"javascript:alert(1)", b"", b"//" + b"x" * 9000])
def test_a_hostile_redirect_is_no_more_than_that(where: bytes) -> None:
    with pytest.raises(Refused, match="307: it redirects"):
        call(http(307, b"", b"Location: " + where))


def test_no_credit_is_no_busy_server() -> None:
    words = b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    with pytest.raises(Refused, match="429: You exceeded your current quota"):
        call(http(429, words))


def test_a_missing_model() -> None:
    with pytest.raises(ModelMissing, match="not found"):
        call(http(404, b'{"error":"model \'x\' not found"}'))


@pytest.mark.parametrize(
    ("header", "seconds"), [(b"7", 7.0), (b"3600", 60.0), (b"soon", 0.0), (b"-1", 0.0), (b"", 0.0)]
)
def test_retry_after(header: bytes, seconds: float) -> None:
    with pytest.raises(EndpointError) as caught:
        call(http(503, b"busy", b"Retry-After: " + header))
    assert caught.value.retry_after_s == seconds


def test_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Session() as session, pytest.raises(EndpointError, match="refused") as caught:
        post(session, f"http://127.0.0.1:{port}/", b"{}", 5.0)
    assert caught.value.refused


@pytest.mark.parametrize("host", ["no-such-host.invalid", "300.300.300.300"])
def test_a_host_that_does_not_exist(host: str) -> None:
    with Session() as session, pytest.raises(EndpointError) as caught:
        post(session, f"http://{host}:11434/", b"{}", 5.0)
    assert caught.value.refused


def test_a_silent_server() -> None:
    with pytest.raises(EndpointError, match=r"no answer within 0\.2 s") as caught:
        call(http(200, b"x" * 100), timeout_s=0.2, gap_s=1.0)
    assert caught.value.timed_out


def test_a_server_that_dribbles_is_timed_out_too() -> None:
    with pytest.raises(EndpointError, match=r"no (whole )?answer") as caught:
        call(http(200, b"x" * 1000), timeout_s=0.4, gap_s=0.005)
    assert caught.value.timed_out


def test_malformed_urls_end_the_run() -> None:
    with Session() as session, pytest.raises(InfrastructureError):
        get(session, "http://[::1", 1.0)


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert call(http(200, b"hello")) == b"hello"


# ---- which API it is


@pytest.mark.parametrize(
    ("responses", "api"),
    [
        ([http(200, b"Ollama is running")], "ollama"),
        ([http(404, b""), http(200, b'{"data":[]}')], "openai"),
        ([http(200, b"<html>"), http(503, b"Loading model")], "openai"),
        ([http(404, b""), http(404, b""), http(200, b'{"models":[]}')], "ollama"),
        ([http(401, b""), http(200, b'{"data":[]}')], "openai"),
        ([http(503, b"Loading model")] * 2, "openai"),
        ([http(302, b"", b"Location: /ui"), http(200, b'{"data":[]}')], "openai"),
    ],
)
def test_servers_are_told_apart(responses: list[bytes], api: str) -> None:
    with serving(*responses) as url, Session() as session:
        assert detect_api(session, url, 5.0) == api


def test_a_server_that_speaks_neither() -> None:
    with serving(*[http(404, b"")] * 3) as url, Session() as session, pytest.raises(EndpointError, match="neither"):
        detect_api(session, url, 5.0)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_to_know_who_asks_says_so(status: int) -> None:
    answers_ = [http(404, b""), http(status, b'{"error":"Unauthorized"}'), http(404, b"")]
    with serving(*answers_) as url, Session() as session, pytest.raises(Refused, match=f"{status}: Unauthorized"):
        detect_api(session, url, 5.0)


def test_the_words_of_what_is_no_model_server_are_told() -> None:
    plain = http(400, b"<html>The plain HTTP request was sent to HTTPS port</html>")
    with (
        serving(plain, plain, plain) as url,
        Session() as session,
        pytest.raises(EndpointError, match=r"answers neither .*400: The plain HTTP request was sent to HTTPS port"),
    ):
        detect_api(session, url, 5.0)


def test_signs_of_life() -> None:
    for response, alive in ((http(200, b""), True), (http(404, b""), True), (http(503, b""), True), (b"", False)):
        with serving(response) as url, Session() as session:
            assert answers(session, url, 5.0) is alive


def test_an_openai_server_without_the_model_names_those_it_has() -> None:
    listing = http(200, b'{"data":[{"id":"llama"},{"id":"tulu"}]}')
    with serving(listing) as url, Session() as session, pytest.raises(InfrastructureError, match="llama, tulu"):
        SERVER_APIS["openai"].load(session, url, "m", 64, 5.0)


def test_an_openai_server_that_is_loading_is_waited_for() -> None:
    listing = http(200, b'{"data":[{"id":"m"}]}')
    with serving(http(503, b"Loading model"), listing) as url, Session() as session:
        SERVER_APIS["openai"].load(session, url, "m", 64, 5.0)


def test_an_ollama_server_that_is_busy_is_waited_for() -> None:
    loaded = http(200, b'{"done_reason":"load"}')
    with serving(http(503, b"server busy"), loaded, http(404, b"")) as url, Session() as session:
        assert SERVER_APIS["ollama"].load(session, url, "m", 64, 5.0) == Served(), "it does not know /api/show"


def test_what_ollama_tells_of_a_model() -> None:
    shown = {
        "system": "Be kind.",
        "template": "{{ .Prompt }}",
        "messages": [{"role": "user", "content": "hello"}],
        "details": {"family": "gptoss"},
        "model_info": {"general.architecture": "gptoss", "gptoss.context_length": 2048},
        "capabilities": ["completion", "thinking"],
    }
    for told, expected in (
        (shown, Served(True, "Be kind.", "{{ .Prompt }}\nhello", True, True, 2048)),
        ({}, Served(True)),
        ({"system": None, "details": 3, "model_info": [], "capabilities": 7, "messages": "x"}, Served(True)),
    ):
        answers = [http(200, b'{"done_reason":"load"}'), http(200, orjson.dumps(told))]
        with serving(*answers) as url, Session() as session:
            found = SERVER_APIS["ollama"].load(session, url, "m", 64, 5.0)
        assert (found.told, found.system, found.texts.strip()) == (True, expected.system, expected.texts.strip())
        assert (found.thinks, found.levels, found.context_tokens) == (
            expected.thinks, expected.levels, expected.context_tokens,
        )  # fmt: skip


def test_a_server_that_stays_busy_is_not() -> None:
    with (
        serving(*[http(503, b"server busy")] * 9) as url,
        Session() as session,
        pytest.raises(EndpointError, match="busy"),
    ):
        SERVER_APIS["ollama"].load(session, url, "m", 64, 0.5)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"error": {"message": "the model has crashed"}}',
        b'{"choices": [{"error": {"code": 502, "message": "the model has crashed"}, "message": {"content": "A ma"}}]}',
    ],
)
def test_an_error_in_a_200_is_the_servers(payload: bytes) -> None:
    with pytest.raises(EndpointError, match=r"error in the reply: .*has crashed"):
        SERVER_APIS["openai"].reply(payload)
