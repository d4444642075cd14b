"""One request to a model server over HTTP: its key, its certificate, its address, and what each kind of answer means.

A key is sent to the server that was named and to nobody else: no redirect is followed, and nothing is taken from
proxies, ``.netrc`` or cookies.  What a server says of an error is bounded and cleaned before anyone reads it.
"""

from __future__ import annotations

import os
import re
import time
from typing import Final, Protocol

import orjson

from curation.errors import InfrastructureError, SampleError, UsageError
from curation.jsonio import clean_text
from curation.libraries import requests, urllib3
from curation.storage.addresses import parse_address
from curation.storage.retry import retry_after_s
from curation.storage.urls import error_line, redact

MAX_REPLY_BYTES = 4 << 20
CHUNK_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 5.0
KEY_VARIABLE = "CURATION_API_KEY"
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
_LONGEST_ASKED_S = 60.0  # a model server that asks to be left alone for longer is tried anyway
JSON_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}
_MAX_WORDS = 300  # characters of what a server says
_MAX_READ = 64 << 10  # bytes in which its words are looked for
# LM Studio answers 400 to what was waiting while it exchanged one model for another.
_LOADS_AGAIN = re.compile(
    r"\bmodel (?:is |was |has been )?(?:unloaded|being loaded|loading)\b|\bloading model\b", re.I
).search


class EndpointError(Exception):
    """The server is at fault or too busy: the same request may succeed elsewhere or later.

    Attributes:
        busy: The server said that it is busy (503, 429).
        timed_out: The server did not answer in time.
        refused: The server was never reached.
        retry_after_s: How long the server asked to be left alone, 0 where it did not say.
    """

    def __init__(
        self,
        text: str,
        *,
        busy: bool = False,
        timed_out: bool = False,
        refused: bool = False,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(text)
        self.busy = busy
        self.timed_out = timed_out
        self.refused = refused
        self.retry_after_s = retry_after_s


class ModelMissing(Exception):
    """The server does not have the model (404)."""


class Refused(SampleError):
    """The server does not take this request (4xx), or sends it elsewhere (3xx): the request or a setting is at fault.

    Attributes:
        status: The HTTP status.
        access: It is about who asks and where (401, 403, a redirect …), hardly about what is asked.
    """

    def __init__(self, status: int, words: str, *, access: bool) -> None:
        super().__init__("llm_bad_request", f"{status}: {words}")
        self.status = status
        self.access = access


# ---- which servers


# Where clouds tell their machines secrets, and what no server of models has for an address.
_METADATA: Final = frozenset(
    {
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23"),  # AWS and most others
        *("fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),  # Google, Alibaba, Oracle, Azure
        *("169.254.42.42", "fd00:42::42", "169.254.0.23", "fe80::a9fe:a9fe"),  # Scaleway, Tencent, OpenStack
    }
)
_METADATA_NAMES: Final = frozenset(
    {
        *("metadata", "metadata.google.internal", "metadata.goog", "metadata.azure.internal"),
        *("instance-data", "instance-data.ec2.internal", "metadata.tencentyun.com"),
    }
)


def is_no_server(host: str, *, registered: bool) -> str:
    """Why no model server can be at a host name or an address; "" where one can.

    Args:
        host: A name, or an address in its usual form; a name is not resolved.
        registered: It comes from a file that others may write: link-local addresses are not asked either, which a user
            may name for two machines with a cable between them.
    """
    if host.lower().rstrip(".") in _METADATA_NAMES:
        return f"{host} is the metadata service of a cloud"
    ip = parse_address(host)
    if ip is None:
        return ""
    if str(ip) in _METADATA:
        return f"{host} is the metadata service of a cloud"
    if ip.is_multicast or (ip.is_reserved and not ip.is_loopback):
        return f"{host} is not the address of a single machine"
    if registered and (ip.is_link_local or ip.is_unspecified):
        return f"{host} is a link-local or unspecified address, and means another machine on each node"
    return ""


def read_key(name: str | None, *, registered: bool) -> str:
    """The key for model servers, "" where there is none.

    Args:
        name: The environment variable that ``--api_key_env`` names; None: it was not given.
        registered: The servers are those that register in a folder.  They get a key only where the flag was given,
            because whoever can write into the folder can name a server.

    Raises:
        UsageError: The variable is named and holds nothing, or it holds what can be no key.
    """
    if name is None and registered:
        return ""
    if name is not None and not re.fullmatch(r"[A-Za-z_]\w{0,99}", name, re.ASCII):  # perhaps the key itself
        raise UsageError(f"--api_key_env names an environment variable, such as {KEY_VARIABLE}, and is not the key")
    key = os.environ.get(name or KEY_VARIABLE, "").strip()
    if name is not None and not key:
        raise UsageError("--api_key_env: the environment variable that it names is not set or empty")
    if not re.fullmatch(r"[!-~]*", key):
        raise UsageError("the key for the model servers holds spaces or characters that no HTTP header may hold")
    return key


# ---- requests


class AnySession(Protocol):
    """What is needed of a ``Session``."""

    key: str

    def prepared(self, method: str, url: str, body: bytes | None) -> requests.PreparedRequest: ...

    def exchange(self, request: requests.PreparedRequest, timeout_s: float) -> requests.Response: ...


def answers(session: AnySession, url: str, timeout_s: float) -> bool:
    """Whether the server at ``url`` shows any sign of life within ``timeout_s``."""
    try:
        get(session, f"{url}/", timeout_s)
    except EndpointError as error:
        return error.busy
    except (ModelMissing, SampleError):
        return True
    return True


def post(session: AnySession, url: str, body: bytes, timeout_s: float) -> bytes:
    """Send a request and return the body of a 200.

    Raises:
        EndpointError: No connection, no answer in time, 5xx or 429.
        ModelMissing: 404.
        Refused: Any other 4xx, or a redirect.
    """
    return _call(session, "POST", url, body, timeout_s)


def get(session: AnySession, url: str, timeout_s: float) -> bytes:
    """Like ``post``."""
    return _call(session, "GET", url, None, timeout_s)


def _call(session: AnySession, method: str, url: str, body: bytes | None, timeout_s: float) -> bytes:
    ends = time.monotonic() + timeout_s
    payload = bytearray()
    try:
        with session.exchange(session.prepared(method, url, body), timeout_s) as response:
            while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
                payload += chunk
                if len(payload) > MAX_REPLY_BYTES:
                    raise EndpointError(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
                if time.monotonic() > ends:  # requests' own time-out starts again with every packet
                    raise EndpointError(f"no whole answer within {timeout_s:.3g} s", timed_out=True)
    except requests.exceptions.InvalidURL as error:
        raise InfrastructureError(f"{redact(url)}: {error_line(error)}") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _connection_error(error, timeout_s) from None
    status = response.status_code
    if status == 200:
        return bytes(payload)
    words = servers_words(bytes(payload), session.key)
    if status in (400, 500) and _LOADS_AGAIN(words):
        raise EndpointError(f"{status}: {words}", busy=True)
    if status == 429 and "insufficient_quota" in bytes(payload[:_MAX_READ]).decode("utf-8", "replace"):
        raise Refused(status, words, access=True)  # nothing is left to pay with, also later
    if status in (429, 503):
        asked_s = min(_LONGEST_ASKED_S, retry_after_s(response.headers.get("Retry-After")) or 0.0)
        raise EndpointError(f"{status}: {words}", busy=True, retry_after_s=asked_s)
    if status >= 500 or status in (408, 425, 499) or status < 300:
        raise EndpointError(f"{status}: {words}", timed_out=status == 408)
    if status < 400:
        place = redact(clean_text(response.headers.get("Location", "")), session.key)[:_MAX_WORDS]
        raise Refused(status, f"it redirects to {place or 'nowhere'}, which is not followed", access=True)
    if status == 404:
        raise ModelMissing(words)
    raise Refused(status, words, access=status in (401, 402, 403, 405, 407, 410, 426, 451))


def servers_words(payload: bytes, key: str = "") -> str:
    """What a server says of an error: one bounded line without markup, control characters and ``key``."""
    text = payload[:_MAX_READ].decode("utf-8", "replace")
    try:
        value = orjson.loads(payload[:_MAX_READ])
    except orjson.JSONDecodeError:
        value = None
    for name in ("error", "message", "detail", "msg"):  # {"error": {"message": …}}, {"detail": …}
        if isinstance(value, dict) and value.get(name):
            value = value[name]
            text = value if isinstance(value, str) else orjson.dumps(value).decode()
    text = re.sub(r"<(script|style)\b.*?(?:</\1\s*>|\Z)", " ", text, flags=re.IGNORECASE | re.DOTALL)
    text = re.sub(r"<[^<>]{0,500}>", " ", text)
    return redact(" ".join(clean_text(text).split()), key)[:_MAX_WORDS]


def _connection_error(error: Exception, timeout_s: float) -> EndpointError:
    text = str(error)
    if isinstance(error, requests.exceptions.SSLError) or "TLS CA certificate" in text:
        return EndpointError(_why_no_tls(text), refused=True)
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return EndpointError("no connection", timed_out=True, refused=True)
    if isinstance(error, requests.exceptions.Timeout | urllib3.exceptions.TimeoutError):
        return EndpointError(f"no answer within {timeout_s:.3g} s", timed_out=True)
    if "NewConnectionError" in text or "NameResolutionError" in text:
        why = "connection refused" if "refused" in text else "cannot be reached"
        return EndpointError(why, refused=True)
    if "Read timed out" in text:  # requests turns urllib3's into a ConnectionError while a body is read
        return EndpointError(f"no whole answer within {timeout_s:.3g} s", timed_out=True)
    return EndpointError(f"connection broken ({type(error).__name__})")


def _why_no_tls(text: str) -> str:
    if "TLS CA certificate" in text:
        return f"the certificates that {' or '.join(CA_VARIABLES)} names are not there"
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return "it does not speak TLS: write http:// in place of https://"
    found = re.search(r"certificate verify failed: ([^(]{1,200})|(Hostname mismatch[^(]{1,200})", text)
    if found or "CERTIFICATE" in text:
        why = clean_text((found[1] or found[2]) if found else "certificate verify failed").strip()
        return (
            f"its certificate is not trusted ({why}); REQUESTS_CA_BUNDLE or SSL_CERT_FILE names a file with the site's "
            "certificates"
        )
    return f"no TLS connection ({clean_text(redact(text))[-100:]})"
