"""Look-ups of the rules of sites: against real servers, in memory, and in the files that processes share."""

from __future__ import annotations

import asyncio
import gzip
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from curation.download.fetch import Fetched, Fetcher, FetchError, FetchLimits, parse_networks
from curation.download.opt_out import LookupCount, Lookups, OptOutPolicy, SmallReply, kinds_of
from curation.download.opt_out.cache import DAY_S, Kept, SiteCache
from curation.download.opt_out.rules import MAX_RULES_BYTES
from tests.servers.raw_answers import Answer, RawAnswers, moved, raw_answers, reply

IMAGE = b"\xff\xd8\xff" + bytes(range(256)) * 20 + b"\xff\xd9"
FORBIDDEN = reply(b"User-agent: *\nDisallow: /im")
ROBOTS, TDM, PICTURE = "/robots.txt", "/.well-known/tdmrep.json", "/im/a.jpg"
RESERVED = reply(b'[{"location": "/im/", "tdm-reservation": 1}]')


def fetch(
    url: str,
    *,
    respect: bool = True,
    folder: Path | None = None,
    timeout_s: float = 5,
    count: LookupCount | None = None,
) -> Fetched:
    directives = frozenset(("noai", "noml"))
    networks = parse_networks("127.0.0.0/8")
    limits = FetchLimits(
        timeout_s=timeout_s, allowed_networks=networks, disallowed=directives, user_agent_token="curation"
    )

    async def one() -> Fetched:
        fetcher = Fetcher(limits, OptOutPolicy(respect, "curation", folder))
        try:
            return await fetcher.fetch(url, count)
        finally:
            await fetcher.close()

    return asyncio.run(one())


def refused(url: str, **options: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch(url, **options)
    return caught.value


def asked_for(answers: Mapping[str, Answer], *, respect: bool = True) -> tuple[Fetched | FetchError, RawAnswers]:
    """What comes of ``/im/a.jpg``, and the server."""
    with raw_answers({PICTURE: reply(IMAGE), **answers}) as server:
        try:
            return fetch(server.base + PICTURE, respect=respect), server
        except FetchError as error:
            return error, server


# ---- robots.txt


def test_an_image_that_is_disallowed_is_not_asked_for() -> None:
    found, server = asked_for({ROBOTS: FORBIDDEN})
    assert isinstance(found, FetchError)
    assert (found.reason, found.detail) == ("disallowed", "robots.txt line 2: Disallow: /im")
    assert found.opt_out == found.detail
    assert not found.retryable
    assert server.asked == [ROBOTS, TDM]


def test_a_rule_may_only_be_recorded() -> None:
    found, server = asked_for({ROBOTS: FORBIDDEN, TDM: RESERVED}, respect=False)
    assert found == (IMAGE, "robots.txt line 2: Disallow: /im; tdmrep.json rule 1: /im/")
    assert kinds_of(found.opt_out or "") == {"robots", "tdmrep"}
    assert server.asked == [ROBOTS, TDM, PICTURE]


@pytest.mark.parametrize("status", [b"400", b"401", b"403", b"404", b"410", b"429", b"451"])
def test_without_a_robots_txt_everything_is_allowed(status: bytes) -> None:
    answer = reply(b"User-agent: *\nDisallow: /", status=b"HTTP/1.1 " + status + b" X")
    assert asked_for({ROBOTS: answer})[0] == (IMAGE, None)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (reply(b"", status=b"HTTP/1.1 500 X"), "http_500"),
        (reply(b"", status=b"HTTP/1.1 503 X"), "http_503"),
        (b"", "cut_off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nUser-agent: *", "cut_off"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "bad_reply"),
        (reply(b"\x1f\x8bnothing", b"Content-Encoding: gzip"), "encoded"),
        (moved(b"http://127.0.0.1:9/robots.txt"), "connect"),
        (moved(b"http://10.0.0.1/robots.txt"), "refused_address"),
    ],
)
def test_where_robots_txt_cannot_be_read_everything_is_forbidden(answer: bytes, why: str) -> None:
    found, server = asked_for({ROBOTS: answer})
    assert isinstance(found, FetchError)
    assert found.reason == "disallowed"
    assert found.detail.startswith(f"robots.txt cannot be read: {why}")
    assert set(server.asked) == {ROBOTS}
    found, _ = asked_for({ROBOTS: answer}, respect=False)
    assert isinstance(found, Fetched)
    assert (found.opt_out or "").startswith(f"robots.txt cannot be read: {why}")


def test_a_site_that_never_answers_forbids_and_holds_nobody_up() -> None:
    def never(head: bytes) -> bytes:
        time.sleep(20)
        return b""

    with raw_answers({ROBOTS: never, PICTURE: reply(IMAGE)}) as server:
        began = time.monotonic()
        error = refused(server.base + PICTURE, timeout_s=0.5)
        assert time.monotonic() - began < 15
        assert error.detail.startswith("robots.txt cannot be read: timeout")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/im/a.jpg", "connect"),
        ("http://10.0.0.1/im/a.jpg", "refused_address"),
        ("http://nowhere.invalid/im/a.jpg", "dns"),
        ("http://x.%zz/im/a.jpg", "bad_url"),
    ],
)
def test_a_site_that_cannot_be_reached_is_told_as_such(url: str, reason: str) -> None:
    """And not as one that forbids anything: the next run asks again."""
    assert (error := refused(url)).reason == reason
    assert error.opt_out is None


def test_a_site_that_accepts_no_connection_is_told_as_such() -> None:
    with socket.socket() as listener:  # with a full queue: the kernel drops what comes
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        time.sleep(0.05)
        error = refused(f"http://127.0.0.1:{port}/im/a.jpg", timeout_s=0.5)
        assert (error.reason, error.retryable) == ("timeout", True)
        for client in clients:
            client.close()


def test_five_redirects_of_robots_txt_are_followed_also_to_another_site() -> None:
    with raw_answers({"/end": FORBIDDEN}) as other:
        chain = {ROBOTS: moved(b"/1"), **{f"/{i}": moved(b"/%d" % (i + 1)) for i in range(1, 5)}}
        chain["/4"] = moved(b"http://127.0.0.1:%d/end" % other.port)
        assert getattr(asked_for(chain)[0], "reason", None) == "disallowed"
        chain["/4"], chain["/5"] = moved(b"/5"), moved(b"http://127.0.0.1:%d/end" % other.port)
        found, server = asked_for(chain)
        assert found == (IMAGE, None), "a sixth redirect is not followed: there is no such file"
        assert server.asked[:6] == [ROBOTS, "/1", "/2", "/3", "/4", "/5"]


@pytest.mark.parametrize("location", [b"", b"http://[x", b"ftp://127.0.0.1/robots.txt"])
def test_a_redirect_of_robots_txt_that_leads_nowhere(location: bytes) -> None:
    assert asked_for({ROBOTS: moved(location)})[0] == (IMAGE, None)


def test_of_robots_txt_500_kib_are_read_and_not_more() -> None:
    sent: list[int] = []
    start = b"User-agent: *\nDisallow: /im/first\n"
    filler = b"Disallow: /x/%s\n" % (b"y" * 80)
    body = start + filler * ((MAX_RULES_BYTES - len(start)) // len(filler))
    body += b"Disallow: /im"  # so that the bound is inside of this line
    body += b"z" * (MAX_RULES_BYTES - len(body)) + b"\nDisallow: /\n" + filler * 200_000
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection = listener.accept()[0]
        connection.recv(65536)
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            for at in range(0, len(body), 1 << 16):
                connection.sendall(body[at : at + (1 << 16)])
                sent.append(1 << 16)
        except OSError:
            pass
        connection.close()
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            connection.recv(65536)
            connection.sendall(reply(IMAGE))
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert fetch(base + "/im/second.jpg") == (IMAGE, None)
    listener.close()
    assert sum(sent) < 12 << 20, "the rest of 18 MB was not taken"
    found, _ = asked_for({ROBOTS: reply(gzip.compress(body), b"Content-Encoding: gzip")})
    assert found == (IMAGE, None), "inflated it has the same bound"
    found, _ = asked_for({ROBOTS: reply(body[: MAX_RULES_BYTES - 200] + b"\nDisallow: /im/a\n")})
    assert getattr(found, "reason", None) == "disallowed"


def test_an_image_on_another_site_asks_that_site_too() -> None:
    with raw_answers({ROBOTS: FORBIDDEN, PICTURE: reply(IMAGE)}) as other:
        found, server = asked_for({PICTURE: moved(b"%s/im/a.jpg" % other.base.encode())})
        assert isinstance(found, FetchError)
        assert found.detail == "robots.txt line 2: Disallow: /im"
        assert other.asked == [ROBOTS, TDM]
        assert server.asked == [ROBOTS, TDM, PICTURE]


def test_a_site_is_asked_once_for_scheme_host_and_port_however_its_name_is_written() -> None:
    with raw_answers({"/a": reply(IMAGE), "/b": reply(IMAGE)}) as server:
        limits = FetchLimits(timeout_s=5, allowed_networks=parse_networks("127.0.0.0/8,::1/128"))

        async def many() -> LookupCount:
            count = LookupCount()
            fetcher = Fetcher(limits, OptOutPolicy(True, "curation"))
            hosts = ("localhost", "LOCALHOST", "user:secret@localhost", "127.0.0.1")
            urls = [f"http://{host}:{server.port}/{path}" for host in hosts for path in "ab"]
            await asyncio.gather(*(fetcher.fetch(url, count) for url in urls))
            await fetcher.close()
            return count

        count = asyncio.run(many())
        assert server.asked.count(ROBOTS) == server.asked.count(TDM) == 2
        assert (count.sites, count.requests) == (2, 4)


# ---- TDMRep


def test_a_tdm_file_reserves_and_no_image_is_sent() -> None:
    heads: list[bytes] = []

    def picture(head: bytes) -> bytes:
        heads.append(head)
        return reply(b"", b"Content-Type: image/jpeg")

    found, _ = asked_for({TDM: RESERVED, PICTURE: picture})
    assert isinstance(found, FetchError)
    assert (found.reason, found.detail) == ("disallowed", "tdmrep.json rule 1: /im/")
    assert [head.split()[0] for head in heads] == [b"HEAD"]
    with raw_answers({TDM: RESERVED, "/other.jpg": reply(IMAGE)}) as server:
        assert fetch(server.base + "/other.jpg") == (IMAGE, None)


@pytest.mark.parametrize("header", [b"tdm-reservation: 0", b"TDM-Reservation:0"])
@pytest.mark.parametrize("knows_head", [True, False])
def test_the_header_takes_a_reservation_of_the_file_back(header: bytes, knows_head: bool) -> None:
    def picture(head: bytes) -> bytes:
        if head.startswith(b"HEAD"):
            return reply(b"", header, status=b"HTTP/1.1 200 OK" if knows_head else b"HTTP/1.1 501 X")
        return reply(IMAGE, header)

    assert asked_for({TDM: RESERVED, PICTURE: picture})[0] == (IMAGE, None)
    assert asked_for({TDM: RESERVED, PICTURE: picture}, respect=False)[0] == (IMAGE, None)


@pytest.mark.parametrize("file", [RESERVED, reply(b'[{"location": "/", "tdm-reservation": 0}]'), reply(b"no JSON")])
def test_the_header_reserves_whatever_the_file_says(file: bytes) -> None:
    found, _ = asked_for({TDM: file, PICTURE: reply(IMAGE, b"tdm-reservation: 1")})
    assert isinstance(found, FetchError)
    assert (found.reason, found.detail) == ("disallowed", "tdmrep header: tdm-reservation: 1")
    found, _ = asked_for({TDM: file, PICTURE: reply(IMAGE, b"tdm-reservation: 1")}, respect=False)
    assert found == (IMAGE, "tdmrep header: tdm-reservation: 1")


@pytest.mark.parametrize(
    "answer", [reply(b"", status=b"HTTP/1.1 500 X"), b"", b"SSH\r\n", moved(b"http://10.0.0.1/"), reply(b"[" * 99_999)]
)
def test_a_tdm_file_that_cannot_be_read_reserves_nothing(answer: bytes) -> None:
    assert asked_for({TDM: answer})[0] == (IMAGE, None)


def test_headers_of_several_kinds_are_recorded_together() -> None:
    picture = reply(IMAGE, b"X-Robots-Tag: Curation: NoML", b"x-robots-tag: other: noai", b"tdm-reservation: 1")
    found, _ = asked_for({PICTURE: picture}, respect=False)
    assert found == (IMAGE, "X-Robots-Tag: noml; tdmrep header: tdm-reservation: 1")
    assert kinds_of(found.opt_out or "") == {"x_robots_tag", "tdmrep"}
    error, _ = asked_for({PICTURE: picture})
    assert getattr(error, "detail", None) == "X-Robots-Tag: noml"


# ---- look-ups in one process


def lookups(ask: Callable[[str, str], Awaitable[SmallReply]], folder: Path | None = None, **more: Any) -> Lookups:
    return Lookups(OptOutPolicy(True, "curation", folder), ask, **{"at_once": 8, "timeout_s": 2.0, **more})


def test_look_ups_are_bounded_and_each_site_is_asked_once(tmp_path: Path) -> None:
    active = most = 0
    asked: list[str] = []

    async def ask(origin: str, path: str) -> SmallReply:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.01)
        active -= 1
        asked.append(origin + path)
        return SmallReply(404)

    async def main() -> None:
        found = lookups(ask, tmp_path)
        await asyncio.gather(*(found.rules(f"http://h{i % 40}", LookupCount()) for i in range(400)))
        await found.close()

    asyncio.run(main())
    assert len(asked) == len(set(asked)) == 80
    assert most <= 8


def test_memory_is_bounded_and_what_was_forgotten_is_on_disk(tmp_path: Path) -> None:
    asked = 0

    async def ask(origin: str, path: str) -> SmallReply:
        nonlocal asked
        asked += 1
        return SmallReply(200, b"User-agent: *\n" + b"Disallow: /a\n" * 50)

    async def main() -> None:
        found = lookups(ask, tmp_path, memory_bytes=1 << 20)
        for number in range(100):
            await found.rules(f"http://h{number}", LookupCount())
        assert sum(found.known(f"http://h{number}") is not None for number in range(100)) < 50
        assert found._memory_bytes <= 1 << 20
        assert (await found.rules("http://h0", LookupCount())).forbidden_by("http://h0/a") is not None
        await found.close()

    asyncio.run(main())
    assert asked == 200


def test_a_site_that_was_not_reached_is_asked_again_and_one_with_an_error_later() -> None:
    async def main() -> None:
        asked = 0

        async def ask(origin: str, path: str) -> SmallReply:
            nonlocal asked
            asked += 1
            if origin == "http://away":
                raise FetchError("connect", "", retryable=True)
            return SmallReply(503)

        found = lookups(ask)
        for _ in range(2):
            with pytest.raises(FetchError):
                await found.rules("http://away", LookupCount())
        assert asked == 2
        for _ in range(2):
            rules = await found.rules("http://busy", LookupCount())
            assert rules.forbidden_by("http://busy/a") == "robots.txt cannot be read: http_503"
        assert asked == 3
        left_s = found._memory["http://busy"][0] - time.monotonic()
        assert 0 < left_s <= 600
        await found.close()

    asyncio.run(main())


def test_a_look_up_goes_on_when_who_began_it_is_cancelled() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def ask(origin: str, path: str) -> SmallReply:
            begun.set()
            await asyncio.sleep(0.02)
            return SmallReply(404)

        found = lookups(ask)
        first = asyncio.ensure_future(found.rules("http://h", LookupCount()))
        await begun.wait()
        second = asyncio.ensure_future(found.rules("http://h", LookupCount()))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).forbidden_by("http://h/a") is None
        await found.close()

    asyncio.run(main())


def test_where_the_files_cannot_be_used_the_site_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with raw_answers({PICTURE: reply(IMAGE)}) as server:
        assert fetch(server.base + PICTURE, folder=tmp_path / "file") == (IMAGE, None)
        assert fetch(server.base + PICTURE, folder=tmp_path / "file" / "deeper") == (IMAGE, None)


# ---- the files that processes share

SITE = "http://example.org:8080"


def cache(folder: Path, at: float | None = None) -> SiteCache:
    return SiteCache(folder, "curation", 2.0, time.time if at is None else lambda: at)


def log_of(folder: Path) -> Path:
    return next(folder.rglob("*.log"))


def test_what_one_process_found_out_the_others_know(tmp_path: Path) -> None:
    one, two = cache(tmp_path), cache(tmp_path)
    assert one.claim(SITE) == ""
    assert one.claim(SITE) == "", "a claim is one's own as often as one looks"
    whose = two.claim(SITE)
    assert isinstance(whose, str)
    assert whose
    one.put(SITE, kept := Kept({"robots": [[1, "disallow", "/"]]}, time.time(), DAY_S))
    assert two.claim(SITE) == cache(tmp_path).claim(SITE) == kept
    assert SiteCache(tmp_path, "other", 2.0).claim(SITE) == "", "for another name other rules may be meant"


def test_a_claim_that_is_given_up_is_the_next_ones(tmp_path: Path) -> None:
    one, two, three = (cache(tmp_path) for _ in range(3))
    one.claim(SITE)
    whose = two.claim(SITE)
    three.claim(SITE)
    one.give_up(SITE)
    assert two.claim(SITE) == ""
    assert three.claim(SITE) not in ("", whose)
    three.give_up(SITE, whose)  # late, of who is gone already: it settles nobody else's claim
    assert two.claim(SITE) == ""


def _claim_and_die(folder: Path) -> None:
    cache(folder).claim(SITE)
    os._exit(0)


def test_the_claim_of_a_process_that_has_ended_holds_nobody_up(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert cache(tmp_path).claim(SITE) == ""


def test_a_claim_on_another_node_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    gone = cache(tmp_path)
    gone._process = ["elsewhere", "boot", "ns", 1, "1"]
    gone.claim(SITE)

    async def ask(origin: str, path: str) -> SmallReply:
        return SmallReply(404)

    async def main() -> float:
        found = lookups(ask, tmp_path, timeout_s=0.05)
        found._claim_s = 0.3
        began = time.monotonic()
        await found.rules(SITE, LookupCount())
        await found.close()
        return time.monotonic() - began

    assert 0.3 <= asyncio.run(main()) < 15


def test_a_result_counts_for_a_day(tmp_path: Path) -> None:
    now = float(20_000 * DAY_S + 1000)
    cache(tmp_path, now).put(SITE, Kept({}, now, DAY_S))
    assert cache(tmp_path, now + DAY_S - 1).claim(SITE) == Kept({}, now, DAY_S)
    assert cache(tmp_path, now + DAY_S + 1).claim(SITE) == ""
    assert cache(tmp_path, now - 60).claim(SITE) == Kept({}, now, DAY_S), "clocks of nodes differ"
    assert len(list(tmp_path.rglob("20000"))) == 1
    cache(tmp_path, now + 2 * DAY_S)
    assert not list(tmp_path.rglob("20000")), "older days are removed"


def test_a_record_that_is_torn_costs_one_look_up(tmp_path: Path) -> None:
    one = cache(tmp_path)
    one.put(SITE, Kept({"problem": "x"}, time.time(), DAY_S))
    log = log_of(tmp_path)
    whole = log.read_bytes()
    for data in (
        whole[:-1],
        whole[:20],
        whole[:5],
        whole[:-9] + b"!" + whole[-8:],
        os.urandom(5000),
        whole[:30] + whole,
    ):
        log.write_bytes(data)
        assert isinstance(cache(tmp_path).claim(SITE), Kept) == (data.endswith(whole))


def test_names_of_sites_are_no_names_of_files_and_files_are_few(tmp_path: Path) -> None:
    one = cache(tmp_path)
    names = ["http://../../x", "http://" + "a" * 9000, "http://\ud800", *(f"http://h{i}.example" for i in range(1500))]
    for name in names:
        one.put(name, Kept({}, time.time(), DAY_S))
    assert all(isinstance(one.claim(name), Kept) for name in names[:20])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 256
    assert {path.suffix for path in files} == {".log"}


def _ask_all(folder: Path, number: int) -> None:
    async def ask(origin: str, path: str) -> SmallReply:
        (folder / f"{number}.asked").open("a").write(f"{origin}\n")
        await asyncio.sleep(0.002)
        return SmallReply(200, f"User-agent: *\nDisallow: /{origin[7:]}\n".encode())

    async def main() -> None:
        found = lookups(ask, folder / "_opt_out")
        for at in range(0, 120, 20):
            origins = [f"http://h{i}" for i in range(at, at + 20)]
            for origin, rules in zip(
                origins, await asyncio.gather(*(found.rules(o, LookupCount()) for o in origins)), strict=True
            ):
                assert rules.forbidden_by(f"{origin}/{origin[7:]}") is not None
        await found.close()

    asyncio.run(main())


def test_processes_that_ask_for_the_same_sites_at_once_ask_each_once(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=_ask_all, args=(tmp_path, number)) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    asked = [line for path in tmp_path.glob("*.asked") for line in path.read_text().splitlines()]
    assert len(asked) == 240
    assert len(set(asked)) == 120
