"""One URL's bytes, from a real server that sends heads which browsers take, and redirects of every spelling."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Mapping

import pytest

from curation.download.fetch import Fetcher, FetchError, FetchLimits, parse_networks
from curation.download.heads import normalised_head
from tests.servers.raw_answers import Answer, RawAnswers, moved, raw_answers, reply

IMAGE = b"\xff\xd8\xff" + bytes(range(256)) * 20 + b"\xff\xd9"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE)


def fetch(url: str, *, allowed: str = "127.0.0.0/8", times: int = 1, max_bytes: int = 1 << 20) -> bytes:
    limits = FetchLimits(timeout_s=5, allowed_networks=parse_networks(allowed), max_bytes=max_bytes)

    async def one() -> bytes:
        fetcher = Fetcher(limits)
        try:
            return [(await fetcher.fetch(url)).data for _ in range(times)][-1]
        finally:
            await fetcher.close()

    return asyncio.run(one())


def fetch_from(answers: Mapping[str, Answer], path: str = "/start") -> tuple[bytes, RawAnswers]:
    with raw_answers(answers) as server:
        return fetch(server.base + path), server


def reason(answers: Mapping[str, Answer], path: str = "/start") -> str:
    with pytest.raises(FetchError) as caught:
        fetch_from(answers, path)
    return caught.value.reason


# ---- heads


@pytest.mark.parametrize(
    "answer",
    [
        reply(IMAGE, b"Content-Security-Policy: img-src " + b"x" * 64_000),
        reply(IMAGE, *(b"X-Header-%d: " % number + b"y" * 100 for number in range(2_000))),
        reply(IMAGE, b"this line has no colon"),
        reply(IMAGE, b"Server : spaces before the colon"),
        reply(IMAGE, b"X-Folded: one", b"  two", b"\tthree"),
        reply(IMAGE, b" a fold that continues nothing"),
        reply(IMAGE, b"X-Title: caf\xe9 \xe5\xb1\xb1", b"X-\xff: y", b"X-Null: a\x00b", b": no name"),
        reply(IMAGE, b"Content-Length: %d" % len(IMAGE)),
        reply(IMAGE, b"Content-Length: %d, %d" % (len(IMAGE), len(IMAGE)), length=False),
        reply(IMAGE, b"Content-Length: unknown", length=False),
        reply(IMAGE, b"Content-Length: -1", length=False),
        reply(IMAGE, b"Content-Length:", length=False),
        reply(IMAGE, length=False),
        reply(IMAGE, status=b"HTTP/1.1 200"),
        reply(IMAGE, status=b"http/1.1 200 ok"),
        reply(IMAGE, status=b"HTTP/1.1  200  OK"),
        reply(IMAGE, status=b"HTTP/1.0 200 OK", length=False),
        reply(IMAGE, status=b"HTTP/2 200"),
        reply(IMAGE, status=b"HTTP 200 OK"),
        reply(IMAGE, status=b"\r\nHTTP/1.1 200 caf\xe9"),
        reply(IMAGE, status=b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK"),
        reply(CHUNKED, b"Transfer-Encoding: chunked", length=False),
        reply(
            CHUNKED, b"Transfer-Encoding: Chunked", b"Transfer-Encoding: chunked", b"Content-Length: 7", length=False
        ),
        reply(CHUNKED, b"Transfer-Encoding: chunked", status=b"HTTP/1.0 200 OK", length=False),
        reply(IMAGE, b"Transfer-Encoding: identity"),
        reply(IMAGE, b"Connection: Upgrade, Keep-Alive", b"Upgrade: h2,h2c", b"Keep-Alive: timeout=5"),
        reply(IMAGE, b"Set-Cookie: " + b"c" * 10_000, b"Set-Cookie: \x01=\x02;;;"),
        reply(IMAGE, b"X-Robots-Tag: all", b"Content-Type: image/jpeg; charset=\xff"),
        reply(IMAGE).replace(b"\r\n", b"\n", 4),
        reply(IMAGE, b"Content-Encoding: gzip, utf-8"),
    ],
    ids=lambda answer: answer[:60].decode("latin-1").replace("\r\n", "|"),
)
def test_a_head_that_browsers_take_costs_no_picture(answer: bytes) -> None:
    assert fetch_from({"/start": answer})[0] == IMAGE


def test_a_head_may_come_in_any_pieces_on_a_connection_that_stays_open() -> None:
    """Here every byte of the head is a packet of its own, and the second request uses the same connection."""
    import socket
    import threading

    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nno colon\r\n\r\n" % len(IMAGE)
    listener = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve() -> None:
        connection = listener.accept()[0]
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections.append(connection)
        for _ in range(2):
            connection.recv(65536)
            for byte in answer:
                connection.sendall(bytes([byte]))
            connection.sendall(IMAGE)

    threading.Thread(target=serve, daemon=True).start()
    assert fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/a", times=2) == IMAGE
    assert len(connections) == 1
    listener.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "bad_reply"),
        (b"HTTP/1.1 OK\r\n\r\n", "bad_reply"),
        (b"", "cut_off"),
        (b"HTTP/1.1 200 OK\r\nContent-Len", "cut_off"),
        (reply(IMAGE, b"Content-Length: 7"), "bad_reply"),  # two lengths that differ
        (reply(IMAGE[:100], b"Content-Length: 5000", length=False), "cut_off"),
        (b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"x" * 60_000 + b"\r\n") * 20, "bad_reply"),
        (reply(b""), "empty"),
    ],
)
def test_a_reply_that_no_browser_takes_is_refused(answer: bytes, expected: str) -> None:
    assert reason({"/start": answer}) == expected


def test_consent_is_read_from_a_broken_head() -> None:
    head = b"HTTP/1.1 200 OK\nno colon\nX-Robots-Tag : noai\nX-Robots-Tag: other: noindex,\n  nofollow\n\n"
    found = normalised_head(head)
    assert found is not None
    assert b"x-robots-tag: noai\r\nx-robots-tag: other: noindex, nofollow\r\n" in found[1]


# ---- compressions


@pytest.mark.parametrize(
    "coding",
    [
        "utf-8", "UTF-8", "none", "identity", "", "binary", "image/jpeg", "iso-8859-1", "8bit",
        "gzip", "deflate", "br", "zstd",
    ],
)  # fmt: skip
def test_a_content_encoding_that_the_bytes_do_not_have_changes_nothing(coding: str) -> None:
    assert fetch_from({"/start": reply(IMAGE, b"Content-Encoding: " + coding.encode())})[0] == IMAGE


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(IMAGE)),
        ("X-GZip", gzip.compress(IMAGE[:99]) + gzip.compress(IMAGE[99:])),
        ("deflate", zlib.compress(IMAGE)),
        ("deflate", raw_deflate(IMAGE)),
        ("utf-8, gzip", gzip.compress(IMAGE)),
        ("deflate, gzip", gzip.compress(zlib.compress(IMAGE))),
    ],
)
def test_a_compression_that_was_not_asked_for_is_undone(coding: str, body: bytes) -> None:
    assert fetch_from({"/start": reply(body, b"Content-Encoding: " + coding.encode())})[0] == IMAGE


def test_what_cannot_be_inflated_or_grows_too_large_is_refused() -> None:
    assert reason({"/start": reply(b"\x0b\x02\x80" * 9, b"Content-Encoding: br")}) == "encoded"
    assert reason({"/start": reply(b"\x1f\x8bnothing", b"Content-Encoding: gzip")}) == "encoded"
    bomb = gzip.compress(bytes(2 << 20))
    assert reason({"/start": reply(bomb, b"Content-Encoding: gzip")}) == "too_large"


# ---- redirects


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        (b"/im/t\xf3.jpg", "/im/t%F3.jpg"),
        (b"/im/t\xc3\xb3.jpg", "/im/t%C3%B3.jpg"),
        (b"/im/a b.jpg", "/im/a%20b.jpg"),
        (b"/im/a%20b.jpg", "/im/a%20b.jpg"),
        (b"/im/100%.jpg", "/im/100%.jpg"),
        (b"/im/a.jpg?x=\"{1|2}\"&sig=a%2Fb~%7E+", "/im/a.jpg?x=%22%7B1%7C2%7D%22&sig=a%2Fb~%7E+"),
        (b"/im/a.jpg#part?x", "/im/a.jpg"),
        (b"  /im/a.jpg\t ", "/im/a.jpg"),
        (b"/im/a\x01b.jpg", "/im/a%01b.jpg"),
        (b"im/a.jpg", "/folder/im/a.jpg"),
        (b"../a.jpg", "/a.jpg"),
        (b"?page=2", "/folder/start?page=2"),
        (b"//127.0.0.1:PORT/a.jpg", "/a.jpg"),
        (b"//127.0.0.1:PORT", "/"),
        (b"HTTP://127.0.0.1:PORT/a.jpg", "/a.jpg"),
        (b"http://127.0.0.1:PORT/\xe9?\xe9#\xe9", "/%E9?%E9"),
    ],
)  # fmt: skip
def test_a_location_names_the_same_path_as_in_a_browser(location: bytes, asked: str) -> None:
    def start(head: bytes) -> bytes:
        port = head.lower().partition(b"host: 127.0.0.1:")[2].partition(b"\r")[0]
        return moved(location.replace(b"PORT", port))

    with raw_answers({"/folder/start": start, asked: reply(IMAGE)}) as server:
        assert fetch(server.base + "/folder/start") == IMAGE
        assert server.asked == ["/folder/start", asked]


def test_a_url_of_the_table_is_quoted_and_nothing_else_is_changed() -> None:
    paths = {
        "/caf\u00e9 1.jpg?a=%7e&b=\u5c71": "/caf%C3%A9%201.jpg?a=%7e&b=%E5%B1%B1",
        "/a%2fb%zz?c=%C3": "/a%2fb%zz?c=%C3",
    }
    with raw_answers(dict.fromkeys(paths.values(), reply(IMAGE))) as server:
        for path in paths:
            assert fetch(server.base + path) == IMAGE
        assert server.asked == list(paths.values())


def test_a_site_that_sets_a_cookie_and_sends_the_same_url_again_is_followed() -> None:
    def start(head: bytes) -> bytes:
        cookie = head.partition(b"Cookie: ")[2].partition(b"\r")[0]
        if cookie == b"seen=yes; n=2":
            return reply(IMAGE)
        return moved(
            b"/start", b"Set-Cookie: seen=yes; Path=/; HttpOnly", b"Set-Cookie: n=%d" % (1 + (b"n=1" in cookie))
        )

    data, server = fetch_from({"/start": start})
    assert data == IMAGE
    assert server.asked == ["/start"] * 3
    with raw_answers({"/start": start}) as server:  # the cookies of one URL are not sent for the next
        assert fetch(server.base + "/start", times=2) == IMAGE
        assert len(server.asked) == 6


def test_a_cookie_goes_to_no_other_host() -> None:
    heads: list[bytes] = []

    def end(head: bytes) -> bytes:
        heads.append(head)
        return reply(IMAGE)

    def start(head: bytes) -> bytes:
        return moved(b"http://localhost:%d/end" % server.port, b"Set-Cookie: secret=1")

    with raw_answers({"/start": start, "/end": end}) as server:
        assert fetch(server.base + "/start", allowed="127.0.0.0/8,::1/128") == IMAGE
    assert len(heads) == 1
    assert b"secret" not in heads[0]


def test_a_redirect_to_itself_ends() -> None:
    with raw_answers({"/start": moved(b"/start#again")}) as server:
        with pytest.raises(FetchError, match="redirect_loop"):
            fetch(server.base + "/start")
        assert server.asked == ["/start"] * 4


@pytest.mark.parametrize("location", [b"http://169.254.169.254/", b"http://10.0.0.1/", b"//[::1]/", b"http://0xa.1/"])
def test_a_redirect_to_a_private_address_is_refused(location: bytes) -> None:
    assert reason({"/start": moved(location)}) in ("refused_address", "dns")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (b"", "bad_redirect"),
        (b"http://[x", "bad_redirect"),
        (b"ftp://127.0.0.1/", "bad_url"),
        (b"file:///etc/passwd", "bad_url"),
    ],
)
def test_a_redirect_that_leads_nowhere(location: bytes, expected: str) -> None:
    assert reason({"/start": moved(location)}) == expected
