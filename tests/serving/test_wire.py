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
from curation.serving.wire import (
    MAX_REPLY_BYTES,
    SERVER_APIS,
    EndpointError,
    ModelMissing,
    Reply,
    Request,
    Session,
    answers,
    detect_api,
    get,
    post,
)

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
        "messages": [{"role": "user", "content": "hello"}],
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
    assert reply(b'{"response":"hi","done":true,"done_reason":"length"}') == Reply("hi", complete=False)
    streamed = b'{"message":{"content":"h"},"done":false}\n{"message":{"content":"i"},"done":true}\n'
    assert reply(streamed) == Reply("hi"), "from a server that streams all the same"
    counted = b'{"message":{"content":"hi"},"done":true,"prompt_eval_count":42,"eval_count":3}'
    assert reply(counted) == Reply("hi", tokens_read=42, tokens_written=3)
    strange = b'{"message":{"content":"hi"},"prompt_eval_count":-1,"eval_count":"many"}'
    assert reply(strange) == Reply("hi")


def test_openai_replies() -> None:
    reply = SERVER_APIS["openai"].reply
    assert reply(b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}') == Reply("hi")
    assert reply(b'{"choices":[{"text":"hi","finish_reason":"length"}]}') == Reply("hi", complete=False)
    counted = b'{"choices":[{"text":"hi"}],"usage":{"prompt_tokens":42,"completion_tokens":3}}'
    assert reply(counted) == Reply("hi", tokens_read=42, tokens_written=3)
    assert reply(b'{"choices":[{"text":"hi"}],"usage":[7]}') == Reply("hi")


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
        b'{"choices":[{"message":{"content":null}}]}',
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
        (http(302, b"", b"Location: http://127.0.0.1:1/"), False, False),
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
    for status in (400, 401, 413, 422):
        with pytest.raises(SampleError, match=f"llm_bad_request: {status}: too long"):
            call(http(status, b"too long"))


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
    with serving(http(503, b"server busy"), loaded) as url, Session() as session:
        SERVER_APIS["ollama"].load(session, url, "m", 64, 5.0)


def test_a_server_that_stays_busy_is_not() -> None:
    with (
        serving(*[http(503, b"server busy")] * 9) as url,
        Session() as session,
        pytest.raises(EndpointError, match="busy"),
    ):
        SERVER_APIS["ollama"].load(session, url, "m", 64, 0.5)
