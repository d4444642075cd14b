"""The APIs of model servers: Ollama's and OpenAI's, told apart by a request.  A prompt may come with a picture.

This module knows the paths, the bodies, where the reply stands and what each error means.  It neither retries nor
routes requests.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import orjson
import requests
import urllib3

from curation.errors import InfrastructureError, SampleError
from curation.storage.retry import retry_after_s
from curation.storage.urls import error_line, redact

Api = Literal["ollama", "openai"]
MAX_REPLY_BYTES = 4 << 20
CHUNK_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 5.0
CONTEXT_TOKENS = 4096  # the same for every request, because Ollama loads the model anew when it changes
_MOST_TOKENS = 1 << 40
_LONGEST_ASKED_S = 60.0  # a model server that asks to be left alone for longer is tried all the same
_JSON = {"Content-Type": "application/json", "Accept": "application/json"}


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


@dataclass(frozen=True, slots=True)
class Request:
    """One request: a raw completion of ``prompt``, or a chat of ``system`` (if any) and ``user``.

    Attributes:
        user: The user's message.
        system: The system prompt.
        default_system: The system prompt for APIs whose models have none of their own; Ollama's have one in their
            Modelfile.
        prompt: For a raw completion, in place of a chat.
        temperature, seed: Of sampling.
        max_tokens: Bound on the reply.
        context_tokens: The same for every request of a run, because Ollama loads the model anew when it changes.
        stop: Texts at which the reply ends.
        jpeg: A picture that ``user`` asks about.
        extra: Further sampling options, for servers that know them.
    """

    user: str = ""
    system: str = ""
    default_system: str = ""
    prompt: str = ""
    temperature: float = 0.8
    seed: int = 0
    max_tokens: int = 256
    context_tokens: int = CONTEXT_TOKENS
    stop: tuple[str, ...] = ()
    jpeg: bytes = b""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, system: str, user: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The chat; ``user`` is the user's message in the format of the API."""
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", **user}]


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply.

    Attributes:
        text: What the model wrote.
        complete: False where ``max_tokens`` cut it short.
        tokens_read, tokens_written: Of the request and of the reply, as the server counts; 0 where it does not say.
    """

    text: str
    complete: bool = True
    tokens_read: int = 0
    tokens_written: int = 0


class ServerApi(Protocol):
    """One API of model servers."""

    api: Api

    def body(self, model: str, request: Request) -> tuple[str, bytes]:
        """Path and body of a request.  The same request gives the same bytes."""

    def reply(self, payload: bytes) -> Reply:
        """The reply in the body of a 200.  Raises EndpointError where it holds an error or something else."""

    def load(self, session: Session, url: str, model: str, context_tokens: int, timeout_s: float) -> None:
        """Return once the model is ready.  Raises InfrastructureError where the server does not have it."""


class Ollama:
    """https://docs.ollama.com/api: /api/chat, /api/generate."""

    api: Api = "ollama"

    def body(self, model: str, request: Request) -> tuple[str, bytes]:
        options: dict[str, Any] = {
            "temperature": request.temperature,
            "seed": request.seed,
            "num_ctx": request.context_tokens,
            "num_predict": request.max_tokens,
            **request.extra,
        }
        if request.stop:
            options["stop"] = list(request.stop)
        common = {"model": model, "stream": False, "options": options}  # stream defaults to true
        if request.prompt:
            return "/api/generate", orjson.dumps({**common, "prompt": request.prompt, "raw": True})
        user: dict[str, Any] = {"content": request.user}
        if request.jpeg:
            user["images"] = [b64encode(request.jpeg).decode()]
        return "/api/chat", orjson.dumps({**common, "messages": request.messages(request.system, user)})

    def reply(self, payload: bytes) -> Reply:
        parts, reason = [], "stop"
        value: dict[str, Any] = {}
        for line in payload.splitlines():  # one object; one per line from servers that stream
            if not line.strip():
                continue
            value = _object(line)
            if value.get("error"):
                raise EndpointError(f"error in the reply: {str(value['error'])[:200]}")
            message = value.get("message")
            text = message.get("content") if isinstance(message, dict) else value.get("response")
            if isinstance(text, str):
                parts.append(text)
            reason = value.get("done_reason") or reason
        if not parts:
            raise EndpointError(f"no reply in {payload[:100]!r}")
        return Reply(
            "".join(parts), reason != "length", _count(value.get("prompt_eval_count")), _count(value.get("eval_count"))
        )

    def load(self, session: Session, url: str, model: str, context_tokens: int, timeout_s: float) -> None:
        # With the context of the requests, or the first of them would load it anew.  Kept until that comes, however
        # long the other servers take to load; after it by the server's own rule.
        load = {"model": model, "keep_alive": -1, "stream": False, "options": {"num_ctx": context_tokens}}
        try:
            _while_busy(lambda left_s: post(session, f"{url}/api/generate", orjson.dumps(load), left_s), timeout_s)
        except ModelMissing as error:
            raise InfrastructureError(
                f"{redact(url)} has no model {model!r} ({error}); make it with `ollama create {model} -f "
                "examples/ollama/Modelfile`, or name another with --model_name"
            ) from None
        except SampleError:  # a server behind this API that needs a prompt: it answers, and that is enough
            return


class OpenAI:
    """The API that vLLM, SGLang and llama-server share: /v1/chat/completions, /v1/completions."""

    api: Api = "openai"

    def body(self, model: str, request: Request) -> tuple[str, bytes]:
        common: dict[str, Any] = {
            "model": model,
            "temperature": request.temperature,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "stream": False,
            **request.extra,
        }
        if request.stop:
            common["stop"] = list(request.stop)
        if request.prompt:
            return "/v1/completions", orjson.dumps({**common, "prompt": request.prompt})
        content: Any = request.user
        if request.jpeg:  # the picture itself, not a URL that a server would fetch
            url = "data:image/jpeg;base64," + b64encode(request.jpeg).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.user}]
        messages = request.messages(request.system or request.default_system, {"content": content})
        return "/v1/chat/completions", orjson.dumps({**common, "messages": messages})

    def reply(self, payload: bytes) -> Reply:
        value = _object(payload)
        choices = value.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        message = first.get("message")
        text = message.get("content") if isinstance(message, dict) else first.get("text")
        if not isinstance(text, str):
            raise EndpointError(f"no reply in {payload[:100]!r}")
        usage = value.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Reply(
            text,
            first.get("finish_reason") != "length",
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
        )

    def load(self, session: Session, url: str, model: str, context_tokens: int, timeout_s: float) -> None:
        value = _object(_while_busy(lambda left_s: get(session, f"{url}/v1/models", left_s), timeout_s))
        entries = value.get("data") if isinstance(value.get("data"), list) else []
        names = [str(entry.get("id")) for entry in entries or [] if isinstance(entry, dict)]
        if names and model not in names:
            served = ", ".join(names[:5])
            raise InfrastructureError(f"{redact(url)} serves {served}, not {model!r}: name it with --model_name")


class Session(requests.Session):
    """A requests session for one thread, without proxies or passwords from the environment.

    Preparing a request costs more time than sending it, and all requests to a URL differ only in their body: each is
    prepared once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False
        self._prepared: dict[tuple[str, str], requests.PreparedRequest] = {}

    def prepared(self, method: str, url: str, body: bytes | None) -> requests.PreparedRequest:
        """A request that is valid until the next one to the same URL.  Raises requests' errors for a malformed URL."""
        request = self._prepared.get((method, url))
        if request is None:
            request = self.prepare_request(requests.Request(method, url, headers=_JSON))
            self._prepared[method, url] = request
        if body is not None:
            request.body = body
            request.headers["Content-Length"] = str(len(body))
        return request


SERVER_APIS: Mapping[Api, ServerApi] = {"ollama": Ollama(), "openai": OpenAI()}


def detect_api(session: Session, url: str, timeout_s: float) -> Api:
    """Which API the server at ``url`` has.  Raises EndpointError where it does not answer or has neither."""
    probes: tuple[tuple[str, bytes, Api], ...] = (
        ("/", b"ollama", "ollama"),
        ("/v1/models", b"", "openai"),
        ("/api/tags", b"", "ollama"),
    )
    for path, says, api in probes:
        try:
            if says in get(session, f"{url}{path}", timeout_s).lower():
                return api
        except EndpointError as error:
            if error.refused or error.timed_out:
                raise
            if error.busy and not says:
                return api  # it is loading its model
        except (ModelMissing, SampleError):
            continue
    raise EndpointError("answers neither /v1/models nor /api/tags")


def answers(session: Session, url: str, timeout_s: float) -> bool:
    """Whether the server at ``url`` shows any sign of life within ``timeout_s``."""
    try:
        get(session, f"{url}/", timeout_s)
    except EndpointError as error:
        return error.busy
    except (ModelMissing, SampleError):
        return True
    return True


def post(session: Session, url: str, body: bytes, timeout_s: float) -> bytes:
    """Send a request and return the body of a 200.

    Raises:
        EndpointError: No connection, no answer in time, 5xx or 429.
        ModelMissing: 404.
        SampleError: Any other 4xx (``llm_bad_request``): the request itself is at fault, on every server.
    """
    return _call(session, "POST", url, body, timeout_s)


def get(session: Session, url: str, timeout_s: float) -> bytes:
    """Like ``post``."""
    return _call(session, "GET", url, None, timeout_s)


def _call(session: Session, method: str, url: str, body: bytes | None, timeout_s: float) -> bytes:
    ends = time.monotonic() + timeout_s
    payload = bytearray()
    timeouts = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
    try:
        with session.send(
            session.prepared(method, url, body), stream=True, timeout=timeouts, allow_redirects=False
        ) as response:
            while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
                payload += chunk
                if len(payload) > MAX_REPLY_BYTES:
                    raise EndpointError(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
                if time.monotonic() > ends:  # requests' own time-out starts anew with every packet
                    raise EndpointError(f"no whole answer within {timeout_s:.3g} s", timed_out=True)
    except requests.exceptions.InvalidURL as error:
        raise InfrastructureError(f"{redact(url)}: {error_line(error)}") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _connection_error(error, timeout_s) from None
    status, text = response.status_code, bytes(payload[:200]).decode("utf-8", "replace")
    if status == 200:
        return bytes(payload)
    if status in (429, 503):
        asked_s = min(_LONGEST_ASKED_S, retry_after_s(response.headers.get("Retry-After")) or 0.0)
        raise EndpointError(f"{status}: {text}", busy=True, retry_after_s=asked_s)
    if status >= 500 or status in (408, 499) or 300 <= status < 400:
        raise EndpointError(f"{status}: {text}", timed_out=status == 408)
    if status == 404:
        raise ModelMissing(text)
    raise SampleError("llm_bad_request", f"{status}: {text}")


def _while_busy(attempt: Callable[[float], bytes], timeout_s: float) -> bytes:
    """What ``attempt(seconds left)`` returns; called again while the server is busy, because it loads its model."""
    ends = time.monotonic() + timeout_s
    while True:
        try:
            return attempt(max(0.1, ends - time.monotonic()))
        except EndpointError as error:
            if not error.busy or time.monotonic() > ends:
                raise
            time.sleep(0.2)


def _connection_error(error: Exception, timeout_s: float) -> EndpointError:
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return EndpointError("no connection", timed_out=True, refused=True)
    if isinstance(error, requests.exceptions.Timeout | urllib3.exceptions.TimeoutError):
        return EndpointError(f"no answer within {timeout_s:.3g} s", timed_out=True)
    text = str(error)
    if "NewConnectionError" in text or "NameResolutionError" in text:
        why = "connection refused" if "refused" in text else "cannot be reached"
        return EndpointError(why, refused=True)
    if "Read timed out" in text:  # requests turns urllib3's into a ConnectionError while a body is read
        return EndpointError(f"no whole answer within {timeout_s:.3g} s", timed_out=True)
    return EndpointError(f"connection broken ({type(error).__name__})")


def _object(payload: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise EndpointError(f"a reply that is not JSON: {payload[:100]!r}") from None
    if not isinstance(value, dict):
        raise EndpointError(f"a reply that is not an object: {payload[:100]!r}")
    return value


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else 0
