"""The head of an HTTP response, read as browsers read it and told to aiohttp in the strict form that it wants.

aiohttp refuses a response for one long header line, a line without a colon or a second Content-Length, although the
picture behind it is good.  So each head is rewritten before aiohttp's parser sees it: only the fields that a
downloader looks at are passed on, each in its plain form.  What makes a response ambiguous (two lengths that differ)
is passed on as it came, and the parser refuses it.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final
from urllib.parse import quote_from_bytes

MAX_HEAD_BYTES: Final = 1 << 20  # a browser takes 256 kB, and http.client 100 lines of 64 kB
_MAX_VALUE_BYTES: Final = 64 << 10
_MAX_COOKIES, _MAX_COOKIE_BYTES = 50, 4096  # as browsers have it
_END: Final = re.compile(rb"\n\r?\n")
_STATUS: Final = re.compile(rb"(?i)HTTP(?:/(\d+(?:\.\d+)?))?[ \t]+(\d{3})(?!\d)[ \t]*([^\r\n]*)")
_CONTROLS: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_FIRST: Final = (b"content-type", b"location", b"retry-after")  # of which the first one counts
_LISTS: Final = (b"content-encoding", b"x-robots-tag", b"tdm-reservation")  # of which each one counts
_KEPT: Final = {*_FIRST, *_LISTS, b"content-length", b"transfer-encoding", b"connection", b"set-cookie"}
# Every printable character but those that no URL may hold.  "%" stays: what is quoted already is quoted once.
_SAFE_IN_URL: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"<>\\^`{|}')


def quoted_url(raw: bytes) -> str:
    """A URL in ASCII: each byte that no URL may hold is percent-encoded, and every other one stays as it is."""
    return quote_from_bytes(raw, safe=_SAFE_IN_URL)


def normalised_head(head: bytes) -> tuple[int, bytes] | None:
    """The status and the head in its strict form; None where this is no HTTP at all.

    Taken without a word are: bare line feeds, lines without a colon, white space around a name, folded lines, bytes
    that are not ASCII, controls, a status line without a reason, lower-case ``http``, repeated equal lengths, a
    length beside ``chunked`` (which counts) and one that is no number (then the body ends with the connection).
    """
    lines = [line.rstrip(b"\r") for line in head.split(b"\n")]
    match = _STATUS.match(lines[0].strip())
    if match is None:
        return None
    fields = _fields(lines[1:])
    found = [name + b": " + fields[name][0] for name in _FIRST if name in fields]
    found += [name + b": " + value for name in _LISTS for value in fields.get(name, ())]
    cookies = [value for value in fields.get(b"set-cookie", ()) if len(value) <= _MAX_COOKIE_BYTES]
    found += [b"set-cookie: " + value for value in cookies[:_MAX_COOKIES]]
    connection = b",".join(fields.get(b"connection", ())).lower()
    is_old = match[1] is not None and float(match[1]) < 1.1
    closes = b"close" in connection or (is_old and b"keep-alive" not in connection)
    lengths = {word.strip() for value in fields.get(b"content-length", ()) for word in value.split(b",")}
    sizes = {int(word) for word in lengths if word.isdigit() and len(word) < 19}
    if b"chunked" in b",".join(fields.get(b"transfer-encoding", ())).lower():
        found.append(b"transfer-encoding: chunked")
    elif sizes:
        found += [b"content-length: %d" % size for size in sizes]
    else:
        closes = True
    found.append(b"connection: " + (b"close" if closes else b"keep-alive"))
    reason = _CONTROLS.sub(b"", match[3])[:200]
    return int(match[2]), b"\r\n".join((b"HTTP/1.1 " + match[2] + b" " + reason, *found, b"", b""))


def _fields(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    """Lower-case name → values, of the fields that a downloader looks at."""
    found: dict[bytes, list[bytes]] = {}
    name, pieces = b"", list[bytes]()

    def keep() -> None:
        if name not in _KEPT:
            return
        value = b" ".join(pieces).strip()
        if name == b"location":
            value = quoted_url(value.replace(b"\t", b"")).encode()
        value = _CONTROLS.sub(b"", value)
        if len(value) <= _MAX_VALUE_BYTES:
            found.setdefault(name, []).append(value)

    for line in lines:
        if line[:1] in (b" ", b"\t"):
            pieces.append(line.strip())
            continue
        before, colon, after = line.partition(b":")
        if colon:
            keep()
            name, pieces = _CONTROLS.sub(b"", before).strip().lower(), [after.strip()]
    keep()
    return found


@functools.cache
def lenient_protocol() -> Any:
    """A class for aiohttp's connections, whose parser sees normalised heads."""
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.http_exceptions import HttpProcessingError

    class LenientProtocol(ResponseHandler):
        _head: bytearray | None = None  # what has come of a head; None while a body comes, or nothing is expected

        def set_response_params(self, **params: Any) -> None:
            self._head = bytearray()
            super().set_response_params(**params)

        def data_received(self, data: bytes) -> None:
            if self._head is None or not data:
                super().data_received(data)
                return
            seen = max(0, len(self._head) - 2)
            self._head += data
            if not seen:
                self._head = self._head.lstrip(b"\r\n")
            while (end := _END.search(self._head, seen)) is not None:
                head, rest = bytes(self._head[: end.end()]), bytes(self._head[end.end() :])
                found = normalised_head(head)
                if found is None:
                    break
                if 100 <= found[0] < 200 and found[0] != 101:  # another head follows
                    self._head, seen = bytearray(rest), 0
                    continue
                self._head = None
                super().data_received(found[1] + rest)
                return
            if end is not None or (len(self._head) >= 5 and self._head[:4].upper() != b"HTTP"):
                raw, self._head = bytes(self._head), None
                super().data_received(raw)  # which says what is wrong with it
            elif len(self._head) > MAX_HEAD_BYTES:
                self._head = None
                if self.transport is not None:
                    self.transport.close()
                self.set_exception(HttpProcessingError(message=f"a head of more than {MAX_HEAD_BYTES:,} bytes"))

    return LenientProtocol
