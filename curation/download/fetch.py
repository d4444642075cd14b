"""One URL's bytes over HTTP, within bounds on time, size, redirects, addresses, compression and the site's consent.

A URL from a table is hostile: its host may be, or resolve to, an address inside the cluster.  What counts is therefore
the address that a socket is about to connect to, whatever name, redirect or odd spelling led there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import ssl
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.cookies import CookieError
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from curation.download.heads import lenient_protocol, quoted_url
from curation.download.opt_out import LookupCount, Lookups, OptOutPolicy, SmallReply
from curation.download.opt_out.rules import MAX_RULES_BYTES, SiteRules, disallowed_by, reserved_by
from curation.jsonio import clean_text
from curation.storage.addresses import parse_address
from curation.storage.retry import retry_after_s
from curation.storage.urls import compressions_in, error_line, redact


class RefusedAddress(OSError):
    """The address is private, link-local, loopback, reserved or multicast."""


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address, also one inside another, is a single host of the open internet."""
    ip = parse_address(address)
    if ip is None:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.is_site_local or int(ip) >> 32 == 0):
        return False  # the latter: IPv4-compatible, long out of use
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


def parse_networks(text: str) -> Networks:
    """``10.0.0.0/8,fd00::/8`` as networks.  Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def public_sockets(allowed: Networks = ()) -> Callable[[tuple[Any, ...]], socket.socket]:
    """What makes a socket for one result of ``getaddrinfo``, and raises RefusedAddress where it is not public.

    ``allowed`` are networks that may be asked although they are not public.
    """

    def make_socket(address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, place = address
        text = str(place[0]).partition("%")[0]
        if not is_public(text) and not any(ipaddress.ip_address(text) in network for network in allowed):
            raise RefusedAddress(f"refused_address {text}")
        return socket.socket(family, kind, protocol)

    return make_socket


MAX_URL_CHARACTERS: Final = 16_384
MAX_REDIRECTS: Final = 10
_RULES_REDIRECTS: Final = 5  # of a file of rules: RFC 9309, 2.3.1.2
_NO_HEAD: Final = frozenset((400, 405, 501))  # of a server that knows no HEAD
_SMALL_BODY_BYTES: Final = 64 << 10  # of an error, read so that the connection can be used again
_VISITS_OF_ONE_URL: Final = 4  # as urllib has it: a site may send the same URL again to see whether its cookie came
_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_BUSY: Final = frozenset((429, 503))
_PASSING: Final = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524))


_MAX_FIELD_BYTES, _MAX_FIELDS = 128 << 10, 1024  # of a head that ``heads`` has normalised
_INFLATED: Final = frozenset(("gzip", "x-gzip", "deflate"))
_MAX_CODINGS: Final = 3
_IMAGE_STARTS: Final = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM")

# The network was in the way, not the site: the next run asks again.
NETWORK_REASONS: Final = frozenset(("dns", "connect", "timeout", "host_down"))


class FetchError(Exception):
    """Why there are no bytes.

    Attributes:
        reason: A short word that is counted.
        detail: More about it.
        retryable: Whether another try may help.
        busy: Whether the host has too much to do.
        wait_s: For how long the host asked to be left alone, None where it did not say.
        opt_out: The rules of the site that forbid the image, None where none was found.
    """

    opt_out: str | None = None

    def __init__(
        self, reason: str, detail: str = "", *, retryable: bool = False, busy: bool = False, wait_s: float | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = clean_text(redact(detail))[:300]
        self.retryable = retryable
        self.busy = busy
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """Bounds of requests.

    Attributes:
        timeout_s: Of one try, from the look-up of the name to the last byte.
        max_bytes: Of an image, as sent and as inflated.
        connections: At once.
        user_agent: What servers are told.
        user_agent_token: The name by which an X-Robots-Tag may speak to this downloader alone.
        disallowed: Directives of X-Robots-Tag that forbid the use.
        allowed_networks: May be asked although their addresses are not public.
        check_certificates: Whether a server needs a valid certificate.
    """

    timeout_s: float = 20.0
    max_bytes: int = 64 << 20
    connections: int = 256
    user_agent: str = "curation"
    user_agent_token: str = ""
    disallowed: frozenset[str] = field(default_factory=frozenset)
    allowed_networks: Networks = ()
    check_certificates: bool = True


class Fetched(NamedTuple):
    """The bytes of an image, and the rules of its site that forbid them where these are only recorded."""

    data: bytes
    opt_out: str | None


class _Visit:
    """One call of ``fetch``: its clock, which stands still during look-ups, and the rules that were found."""

    def __init__(self, clock: asyncio.Timeout, count: LookupCount) -> None:
        self.clock, self.count = clock, count
        self.rules: list[str] = []

    @property
    def opt_out(self) -> str | None:
        return clean_text("; ".join(dict.fromkeys(self.rules)))[:1000] or None


class Fetcher:
    """An HTTP client.  Make and use it within one event loop; ``close`` it there.

    Args:
        limits: Of one request.
        policy: How the rules of sites are treated; None: only X-Robots-Tag counts, and nothing is looked up.
    """

    def __init__(self, limits: FetchLimits, policy: OptOutPolicy | None = None) -> None:
        import aiohttp

        self._limits = limits
        self._lookups = None
        connections = limits.connections
        if policy is not None:
            import protego  # noqa: F401 - if it is missing, the caller learns of it here

            self._lookups = Lookups(policy, self._ask, limits.connections, limits.timeout_s)
            connections *= 2
        # Of the connection alone, so that a site that cannot be reached is told from one that is slow.
        self._rules_timeout = aiohttp.ClientTimeout(connect=limits.timeout_s, sock_read=limits.timeout_s)
        self._aiohttp = aiohttp
        logging.getLogger("aiohttp.internal").setLevel(logging.ERROR)  # it warns of each cookie that is malformed
        connector = aiohttp.TCPConnector(
            limit=connections,
            ttl_dns_cache=600,
            ssl=limits.check_certificates,
            socket_factory=public_sockets(limits.allowed_networks),
            enable_cleanup_closed=False,
        )
        connector._factory = functools.partial(lenient_protocol(), loop=asyncio.get_running_loop())
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy would connect in our stead, wherever it likes
            timeout=aiohttp.ClientTimeout(total=None),
            max_line_size=_MAX_FIELD_BYTES,
            max_field_size=_MAX_FIELD_BYTES,
            max_headers=_MAX_FIELDS,
            headers={"User-Agent": limits.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        if self._lookups is not None:
            await self._lookups.close()
        await self._session.close()

    def unknown_origin(self, url: str) -> str | None:
        """The origin whose rules have to be looked up before the URL is asked for; None where they are known."""
        if self._lookups is None:
            return None
        try:
            origin = _origin(self._parsed(url))
        except FetchError:
            return None  # ``fetch`` says why
        return origin if self._lookups.known(origin) is None else None

    async def look_up(self, origin: str, count: LookupCount) -> None:
        """Find out what a site says about downloads.  Raises FetchError where it cannot be reached."""
        try:
            if self._lookups is not None:
                await self._lookups.rules(origin, count)
        except FetchError:
            raise
        except Exception as error:  # noqa: BLE001 - a broken look-up costs the URLs of its site only
            raise self._as_fetch_error(error) from None

    async def fetch(self, url: str, count: LookupCount | None = None) -> Fetched:
        """The bytes of the image.  Raises FetchError and nothing else.

        count: gets the look-ups of sites that this call began.
        """
        visit = None
        try:
            async with asyncio.timeout(self._limits.timeout_s) as clock:
                visit = _Visit(clock, count or LookupCount())
                data = await self._follow(url, visit)
                return Fetched(data, visit.opt_out)
        except TimeoutError:
            failure = FetchError("timeout", f"more than {self._limits.timeout_s:g} s", retryable=True)
        except FetchError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the sample's boundary: a hostile server makes a client raise anything
            failure = self._as_fetch_error(error)
        failure.opt_out = None if visit is None else visit.opt_out
        raise failure from None

    async def _follow(self, url: str, visit: _Visit) -> bytes:
        visits: Counter[str] = Counter()
        cookies = None  # of this URL alone: made where a site sets one and sends the request elsewhere
        for _ in range(MAX_REDIRECTS + 1):
            target = self._parsed(url)
            visits[str(target)] += 1
            if visits[str(target)] > _VISITS_OF_ONE_URL:
                raise FetchError("redirect_loop", redact(url))
            reserved = await self._ask_site(target, visit)
            text = "" if cookies is None else _cookie_text(cookies, target)
            told = {"Cookie": text} if text else None
            async with self._session.get(target, allow_redirects=False, headers=told) as response:
                self._require_consent(response.headers, visit, reserved)
                if response.status not in _REDIRECTS:
                    return await self._body(response)
                location = response.headers.get("Location", "")
                if set_cookies := response.headers.getall("Set-Cookie", ()):
                    cookies = cookies or self._aiohttp.CookieJar(unsafe=True)  # unsafe: also of hosts without a name
                    with contextlib.suppress(ValueError, CookieError):
                        cookies.update_cookies_from_headers(set_cookies, target)
                response.close()  # its body is of no interest, and may be endless
            url = _redirected(url, location)
        raise FetchError("too_many_redirects", f"more than {MAX_REDIRECTS}")

    # ---- the wishes of the site

    async def _ask_site(self, target: Any, visit: _Visit) -> str | None:
        """Look the site up and obey its robots.txt.

        Returns the rule of its TDM file that reserves the rights to the URL, which a header may still take back.
        """
        if self._lookups is None:
            return None
        origin, url = _origin(target), str(target)
        rules = self._lookups.known(origin) or await self._look_up_paused(self._lookups, origin, visit)
        if rule := await self._lookups.forbidden_by(rules, url):
            self._object(visit, rule)
        reserved = await self._lookups.reserved_by(rules, url)
        if reserved is not None and self._lookups.respect:
            await self._require_release(target, visit, reserved)
        return reserved

    async def _look_up_paused(self, lookups: Lookups, origin: str, visit: _Visit) -> SiteRules:
        """Look a site up while the clock of the request stands still."""
        if visit.clock.expired():
            await asyncio.sleep(0)  # which raises what the clock has sent
        loop, ends = asyncio.get_running_loop(), visit.clock.when()
        began = loop.time()
        visit.clock.reschedule(None)
        try:
            async with asyncio.timeout(10 * self._limits.timeout_s + 20):  # two requests, here or in another process
                return await lookups.rules(origin, visit.count)
        finally:
            visit.clock.reschedule(None if ends is None else ends + loop.time() - began)

    async def _require_release(self, target: Any, visit: _Visit, reserved: str) -> None:
        """Ask whether a header takes a reservation back, without the image."""
        try:
            async with self._session.head(target, allow_redirects=False) as response:
                if response.status not in _NO_HEAD:
                    self._require_consent(response.headers, visit, reserved)
        except (self._aiohttp.ClientError, OSError, ValueError):
            return  # some servers send a body all the same: the answer to GET tells

    def _require_consent(self, headers: Any, visit: _Visit, reserved: str | None) -> None:
        found = disallowed_by(headers.getall("X-Robots-Tag", ()), self._limits.user_agent_token)
        if forbidden := sorted(found & self._limits.disallowed):
            self._object(visit, f"X-Robots-Tag: {', '.join(forbidden)}")
        if self._lookups is None:
            return
        is_reserved = reserved_by(headers.getall("tdm-reservation", ()))
        if is_reserved:
            self._object(visit, "tdmrep header: tdm-reservation: 1")
        elif is_reserved is None and reserved is not None:
            self._object(visit, reserved)

    def _object(self, visit: _Visit, rule: str) -> None:
        visit.rules.append(rule)
        if self._lookups is None or self._lookups.respect:
            raise FetchError("disallowed", rule)

    async def _ask(self, origin: str, path: str) -> SmallReply:
        """Request a file of rules, also from where the site redirects.

        Raises FetchError where the site cannot be reached.  Once it is, whatever is wrong is a reply.
        """
        first = url = origin + path
        try:
            async with asyncio.timeout(2 * self._limits.timeout_s):
                for _ in range(_RULES_REDIRECTS + 1):
                    target = self._parsed(url)
                    async with self._session.get(
                        target, allow_redirects=False, timeout=self._rules_timeout
                    ) as response:
                        if response.status not in _REDIRECTS:
                            return await self._small_body(response)
                        location = response.headers.get("Location", "")
                        response.close()
                    url = _redirected(url, location)
        except self._aiohttp.ConnectionTimeoutError:
            failure, reached = FetchError("timeout", "no connection", retryable=True), False
        except TimeoutError:
            failure, reached = FetchError("timeout", "no whole answer in time"), True
        except FetchError as error:
            failure, reached = error, True
        except Exception as error:  # noqa: BLE001 - a hostile server makes a client raise anything
            failure = self._as_fetch_error(error)
            reached = failure.reason in ("cut_off", "bad_reply")
        else:
            failure, reached = FetchError("bad_redirect", "too many"), True
        if failure.reason in ("bad_redirect", "bad_url"):
            return SmallReply(404)  # redirects that lead nowhere: there is no such file
        if reached or url != first:
            return SmallReply(0, problem=str(failure))
        raise failure

    async def _small_body(self, response: Any) -> SmallReply:
        is_there = 200 <= response.status < 300
        bound = MAX_RULES_BYTES if is_there else _SMALL_BODY_BYTES
        data, is_cut = bytearray(), False
        async for piece in response.content.iter_any():
            data += piece
            if len(data) > bound:
                is_cut = True
                response.close()
                break
        if not is_there:
            return SmallReply(int(response.status))
        body = bytes(data[:bound])
        if body[:2] == b"\x1f\x8b" or "deflate" in response.headers.get("Content-Encoding", ""):
            body = _inflate(body, bound, may_cut=True)  # nobody asked for a compression
        return SmallReply(int(response.status), body[:bound], is_cut or len(body) > bound, response.charset or "")

    def _parsed(self, url: str) -> Any:
        """The URL without its fragment, quoted where it must be and nowhere else: it may be signed."""
        from yarl import URL

        host = host_of(url)
        try:
            if not host.isascii() or "%" in host:
                url = _with_host(url, str(URL.build(scheme="http", host=unquote(host)).raw_host))
            return URL(quoted_url(urldefrag(url)[0].encode("utf-8", "replace")), encoded=True)
        except ValueError as error:
            raise FetchError("bad_url", str(error)) from None

    async def _body(self, response: Any) -> bytes:
        status, bound = int(response.status), self._limits.max_bytes
        if status != 200:
            wait_s = retry_after_s(response.headers.get("Retry-After")) if status in _BUSY else None
            busy = status in _BUSY
            response.close()
            raise FetchError(
                f"http_{status}", str(response.reason or ""), retryable=status in _PASSING, busy=busy, wait_s=wait_s
            )
        if (response.content_length or 0) > bound:
            raise FetchError("too_large", f"{response.content_length:,} bytes, the bound is {bound:,}")
        data = bytearray()
        async for piece in response.content.iter_any():
            data += piece
            if len(data) > bound:
                response.close()
                raise FetchError("too_large", f"more than {bound:,} bytes")
        if not data:
            raise FetchError("empty", "no bytes", retryable=True)
        return inflated(bytes(data), ",".join(response.headers.getall("Content-Encoding", ())), bound)

    def _as_fetch_error(self, error: Exception) -> FetchError:
        http, text = self._aiohttp, error_line(error)
        if "refused_address" in str(getattr(error, "os_error", error)):  # of several addresses one error is made
            return FetchError("refused_address", "private, link-local, loopback or reserved")
        if isinstance(error, http.ClientConnectorDNSError):
            return FetchError("dns", str(error.os_error))
        if isinstance(error, http.ClientSSLError | ssl.SSLError):
            return FetchError("tls", text)
        if isinstance(error, http.InvalidURL | http.NonHttpUrlClientError | UnicodeError):
            return FetchError("bad_url", text)
        if isinstance(error, http.ClientConnectorError):
            return FetchError("connect", str(error.os_error), retryable=True)
        if isinstance(error, http.ClientPayloadError | http.ServerDisconnectedError | http.ClientOSError | OSError):
            return FetchError("cut_off", text, retryable=True)
        return FetchError("bad_reply", text)


def inflated(data: bytes, content_encoding: str, bound: int) -> bytes:
    """The bytes without a compression that was not asked for.

    A header that names no compression (``utf-8``, ``none``), or one that the bytes do not have, changes nothing: the
    image is there.  Raises FetchError ``encoded`` or ``too_large``.
    """
    for coding in reversed(compressions_in(content_encoding)[:_MAX_CODINGS]):
        if data.startswith(_IMAGE_STARTS) or data[4:8] == b"ftyp":
            return data
        if coding not in _INFLATED:
            raise FetchError("encoded", f"Content-Encoding: {coding}")
        data = _inflate(data, bound)
    return data


def _inflate(data: bytes, bound: int, *, may_cut: bool = False) -> bytes:
    """gzip of one or more members, zlib, or deflate without a frame.

    may_cut: The first ``bound`` bytes and one more are enough.
    """
    is_gzip, is_zlib = data[:2] == b"\x1f\x8b", data[:1] and data[0] & 0x0F == 8 and not int.from_bytes(data[:2]) % 31
    found = bytearray()
    try:
        while data and len(found) <= bound:
            stream = zlib.decompressobj(zlib.MAX_WBITS | 32 if is_gzip or is_zlib else -zlib.MAX_WBITS)
            found += stream.decompress(data, bound + 1 - len(found))
            data = stream.unused_data if is_gzip and stream.unused_data[:2] == b"\x1f\x8b" else b""
    except zlib.error as error:
        raise FetchError("encoded", str(error)) from None
    if len(found) > bound and not may_cut:
        raise FetchError("too_large", f"inflates to more than {bound:,} bytes")
    return bytes(found)


def _redirected(url: str, location: str) -> str:
    if not location:
        raise FetchError("bad_redirect", "without a Location")
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError("bad_redirect", str(error)) from None


def _origin(target: Any) -> str:
    """Scheme, host and port of a URL, without a user's name."""
    return str(target.origin()).lower()


def _cookie_text(jar: Any, target: Any) -> str:
    return "; ".join(f"{name}={morsel.coded_value}" for name, morsel in jar.filter_cookies(target).items())


def _with_host(url: str, host: str) -> str:
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    port = "" if parts.port is None else f":{parts.port}"
    return urlunsplit(parts._replace(netloc=f"{user}{at}{host}{port}"))


def host_of(url: str) -> str:
    """The host that is asked first.  Raises FetchError ``bad_url`` for what is no http or https URL."""
    if len(url) > MAX_URL_CHARACTERS:
        raise FetchError("bad_url", f"{len(url):,} characters")
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise FetchError("bad_url", str(error)) from None
    if parts.scheme not in ("http", "https") or not host:
        raise FetchError("bad_url", "not http:// or https:// with a host")
    return host.lower()
