"""The APIs of model servers: Ollama's and OpenAI's, told apart by a request.  A prompt may come with a picture.

This module knows the paths, the bodies and where the reply stands.  It neither retries nor routes requests.
"""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import orjson

from curation.errors import InfrastructureError, SampleError
from curation.replies import CUT, WHOLE, Reply, ended_by
from curation.serving.connection import EndpointError, ModelMissing, Refused, get, post
from curation.serving.ollama import commands
from curation.storage.urls import redact

if TYPE_CHECKING:
    from curation.serving.session import Session  # it needs requests

Api = Literal["ollama", "openai"]
Result = TypeVar("Result")
KEEP_ALIVE = "30m"  # Ollama's: of the model's memory, after each request; a pause of the stage before takes time
CONTEXT_TOKENS = 4096  # the same for every request, because Ollama loads the model again when it changes
_MOST_TOKENS = 1 << 40
_SHOW_TIMEOUT_S = 5.0
# What gateways write while the model computes: blanks, and comments of server-sent events, also before a plain JSON.
_KEPT_ALIVE = re.compile(rb"\A(?:\xef\xbb\xbf)?(?:\s*:[^\n]*\n)*\s*")
_EVENTS = (b"data:", b"event:", b"id:", b"retry:")
_BYTES_PER_TOKEN, _MOST_BYTES_PER_TOKEN = 4, 8  # of English: about, and no tokeniser reaches more


@dataclass(frozen=True, slots=True)
class Request:
    """One request: a raw completion of ``prompt``, or a chat of ``system`` (if any) and ``user``.

    Attributes:
        user: The user's message.
        system: The system prompt.
        default_system: The system prompt for models that have no instruction for the task of their own.
        prompt: For a raw completion, in place of a chat.
        temperature, seed: Of sampling.
        max_tokens: Bound on the reply.
        context_tokens: The same for every request of a run, because Ollama loads the model again when it changes.
        stop: Texts at which the reply ends.
        jpeg: A picture that ``user`` asks about.
        schema: A JSON schema by which the server decodes the reply.
        schema_needed: A server that does not know schemas is of no use; else it is asked without.
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
    schema: Mapping[str, Any] | None = None
    schema_needed: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, system: str, user: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The chat; ``user`` is the user's message in the format of the API."""
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", **user}]


@dataclass(frozen=True, slots=True)
class Served:
    """What a server tells of its model, as far as it tells anything.

    Attributes:
        told: It was asked and answered.
        system: The system prompt that the model has of its own.
        texts: Everything else that the model is given with each chat: its template and its example messages.
        thinks: It writes its reasoning first, and can be told not to.
        levels: Its reasoning cannot be turned off, only turned down.
        context_tokens: The longest context; 0 where it is not told.
    """

    told: bool = False
    system: str = ""
    texts: str = ""
    thinks: bool = False
    levels: bool = False
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Manner:
    """How one server is asked, beside what its API says.

    Attributes:
        instructed: Its model has the instruction for the task of its own, so ``default_system`` is not sent.
        own_system: The system prompt that its model has of its own, for the record.
        fields: Further fields of a chat, which turn the model's reasoning off.
        context_tokens: The longest context of its model; 0 where it is not known.
        omits: Options that every request has, which this server refuses.
        tokens_field: What it calls the bound on the reply, in OpenAI's API.
        folds_system: It refuses the system role: the system prompt is the beginning of the user's message.
        changes: What of this is so because it refused the usual request, in words for the log and the receipts.
    """

    instructed: bool = False
    own_system: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    context_tokens: int = 0
    omits: frozenset[str] = frozenset()
    tokens_field: str = "max_tokens"
    folds_system: bool = False
    changes: tuple[str, ...] = ()

    def system(self, request: Request) -> str:
        """The system prompt that is sent; "" where the model's own is used."""
        return request.system or ("" if self.instructed else request.default_system)

    def texts(self, request: Request) -> tuple[str, str]:
        """The texts of the system's and of the user's message."""
        system = self.system(request)
        if system and self.folds_system:
            return "", f"{system}\n\n{request.user}"
        return system, request.user

    def options(self, usual: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a request under the names that the server takes, without those that it refuses."""
        names = {"max_tokens": self.tokens_field}
        return {names.get(name, name): value for name, value in usual.items() if name not in self.omits}


PLAIN, USUAL = Manner(), Request()


class ServerApi(Protocol):
    """One API of model servers."""

    api: Api

    def body(self, model: str, request: Request, manner: Manner = PLAIN) -> tuple[str, bytes]:
        """Path and body of a request.  The same request gives the same bytes."""

    def reply(self, payload: bytes, request: Request = USUAL, manner: Manner = PLAIN) -> Reply:
        """The reply in the body of a 200.

        Raises:
            EndpointError: The body holds an error or something else.
            SampleError: The server has cut the request (``llm_context_too_short``).
        """

    def load(self, session: Session, url: str, model: str, context_tokens: int, timeout_s: float) -> Served:
        """Return once the model is ready, with what the server tells of it.

        Raises InfrastructureError where the server does not have it.
        """

    def quiet_fields(self, served: Served) -> Mapping[str, Any]:
        """The fields of a chat that turn this model's reasoning off."""


class Ollama:
    """https://docs.ollama.com/api: /api/chat, /api/generate, /api/show."""

    api: Api = "ollama"
    schema_field = "format"

    def body(self, model: str, request: Request, manner: Manner = PLAIN) -> tuple[str, bytes]:
        options: dict[str, Any] = {
            "temperature": request.temperature,
            "seed": request.seed,
            "num_ctx": request.context_tokens,
            "num_predict": request.max_tokens,
            **request.extra,
        }
        if request.stop:
            options["stop"] = list(request.stop)
        common = {"model": model, "stream": False, "keep_alive": KEEP_ALIVE, "options": manner.options(options)}
        if request.schema is not None and self.schema_field not in manner.omits:
            common["format"] = request.schema
        if request.prompt:
            return "/api/generate", orjson.dumps({**common, "prompt": request.prompt, "raw": True})
        system, text = manner.texts(request)
        user: dict[str, Any] = {"content": text}
        if request.jpeg:
            user["images"] = [b64encode(request.jpeg).decode()]
        messages = request.messages(system, user)
        return "/api/chat", orjson.dumps({**common, **manner.fields, "messages": messages})

    def reply(self, payload: bytes, request: Request = USUAL, manner: Manner = PLAIN) -> Reply:
        parts: list[str] = []
        answered = reasoned = False
        value: dict[str, Any] = {}
        for line in payload.splitlines():  # one object; one per line from servers that stream
            if not line.strip():
                continue
            value = _object(line)
            if value.get("error"):
                raise EndpointError(f"error in the reply: {str(value['error'])[:200]}")
            message = value.get("message")
            holder = message if isinstance(message, dict) else value if "response" in value else {"content": 0}
            text = _text_of(holder.get("content", holder.get("response")))
            answered = answered or text is not None
            parts.append(text or "")
            reasoned = reasoned or _reasons(holder)
        if not answered:
            raise EndpointError(f"no reply in {payload[:100]!r}")
        read, written = _count(value.get("prompt_eval_count")), _count(value.get("eval_count"))
        _check_context(read, request, manner)
        # Without a line that says ``done`` the stream has ended too early.  Old servers say no reason, even where the
        # bound on tokens has ended the reply.
        reason = value.get("done_reason") or (CUT if written >= request.max_tokens else WHOLE)
        ended = ended_by(reason) if value.get("done") is True else ""
        return Reply("".join(parts), ended, reasoned=reasoned, tokens_read=read, tokens_written=written)

    def load(self, session: Session, url: str, model: str, context_tokens: int, timeout_s: float) -> Served:
        # With the context of the requests, or the first of them would load it again.  Kept until that comes, however
        # long the other servers take to load; after it by the server's own rule.
        load = {"model": model, "keep_alive": -1, "stream": False, "options": {"num_ctx": context_tokens}}
        try:
            while_busy(lambda left_s: post(session, f"{url}/api/generate", orjson.dumps(load), left_s), timeout_s)
        except ModelMissing as error:
            others, get_it = _other_models(session, url), " && ".join(commands(model, url))
            raise InfrastructureError(
                f"{redact(url)} has no model {model!r} ({error}){others}.  To get it there: {get_it}"
            ) from None
        except Refused as error:  # a server behind this API that needs a prompt: it answers, and that is enough
            if error.access:
                raise
        return _shown(session, url, model, min(timeout_s, _SHOW_TIMEOUT_S))

    def quiet_fields(self, served: Served) -> Mapping[str, Any]:
        """Only for models that reason: the others may refuse the field."""
        if not served.thinks:
            return {}
        return {"think": "low" if served.levels else False}


def _other_models(session: Session, url: str) -> str:
    """The models that an Ollama has, for a message; "" where it does not tell."""
    try:
        listed = _object(get(session, f"{url}/api/tags", _SHOW_TIMEOUT_S)).get("models")
    except (EndpointError, ModelMissing, SampleError):
        return ""
    names = [str(entry.get("name")) for entry in listed or [] if isinstance(entry, dict)]
    return f", but {', '.join(names[:5])}" if names else ""


def _shown(session: Session, url: str, model: str, timeout_s: float) -> Served:
    """What Ollama tells of a model.  Servers behind its API that do not know the question tell nothing."""
    try:
        shown = _object(post(session, f"{url}/api/show", orjson.dumps({"model": model}), timeout_s))
    except (EndpointError, ModelMissing, SampleError):
        return Served()
    details, facts = shown.get("details"), shown.get("model_info")
    family = str(details.get("family", "")) if isinstance(details, dict) else ""
    capabilities = shown.get("capabilities")
    messages = shown.get("messages")
    examples = (
        [str(m.get("content", "")) for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    )
    lengths = [v for k, v in facts.items() if str(k).endswith(".context_length")] if isinstance(facts, dict) else []
    return Served(
        told=True,
        system=str(shown.get("system") or ""),
        texts="\n".join([str(shown.get("template") or ""), *examples]),
        thinks=isinstance(capabilities, list) and "thinking" in capabilities,
        levels="gptoss" in family.replace("-", "").lower(),
        context_tokens=_count(lengths[0]) if lengths else 0,
    )


def _check_context(read: int, request: Request, manner: Manner) -> None:
    """Ollama answers a request that is longer than the context as well, after it has thrown a part of it away.

    Raises:
        SampleError: ``llm_context_too_short``: it says that it has read as many tokens as the context holds; or far
            fewer than so long a text can have.
    """
    holds = min(request.context_tokens, manner.context_tokens or request.context_tokens)
    sent = len((manner.system(request) + request.user + request.prompt).encode("utf-8", "replace"))
    if read >= holds or (0 < read < sent / _MOST_BYTES_PER_TOKEN and estimated_tokens(sent) > holds):
        raise SampleError(
            "llm_context_too_short",
            f"the server has read {read:,} tokens of a request that is longer than the context of {holds:,} tokens",
        )


def estimated_tokens(text: str | int) -> int:
    """About how many tokens a text, or a number of bytes, is: four bytes each, as in English."""
    size = text if isinstance(text, int) else len(text.encode("utf-8", "replace"))
    return -(-size // _BYTES_PER_TOKEN)


class OpenAI:
    """The API that vLLM, SGLang and llama-server share: /v1/chat/completions, /v1/completions."""

    api: Api = "openai"
    schema_field = "response_format"

    def body(self, model: str, request: Request, manner: Manner = PLAIN) -> tuple[str, bytes]:
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
        common = manner.options(common)
        if request.schema is not None and self.schema_field not in manner.omits:
            form = {"name": "answer", "strict": True, "schema": request.schema}
            common["response_format"] = {"type": "json_schema", "json_schema": form}
        if request.prompt:
            return "/v1/completions", orjson.dumps({**common, "prompt": request.prompt})
        system, text = manner.texts(request)
        content: Any = text
        if request.jpeg:  # the picture itself, not a URL that a server would fetch
            url = "data:image/jpeg;base64," + b64encode(request.jpeg).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        messages = request.messages(system, {"content": content})
        return "/v1/chat/completions", orjson.dumps({**common, **manner.fields, "messages": messages})

    def reply(self, payload: bytes, request: Request = USUAL, manner: Manner = PLAIN) -> Reply:
        payload = _KEPT_ALIVE.sub(b"", payload, count=1)
        if payload.startswith(_EVENTS):
            return _streamed(payload)
        value = _object(payload)
        choices = value.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        if error := value.get("error") or first.get("error"):  # routers tell of the server behind them in this way
            raise EndpointError(f"error in the reply: {str(error)[:200]}")
        message = first.get("message")
        text = _text_of(message.get("content")) if isinstance(message, dict) else first.get("text")
        if not isinstance(text, str):
            raise EndpointError(f"no reply in {payload[:100]!r}")
        message = message if isinstance(message, dict) else {}
        usage = value.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Reply(
            text,
            ended_by(first.get("finish_reason")),
            refused=_refuses(message, text),
            reasoned=_reasons(message),
            tokens_read=_count(usage.get("prompt_tokens")),
            tokens_written=_count(usage.get("completion_tokens")),
        )

    def load(self, session: Session, url: str, model: str, context_tokens: int, timeout_s: float) -> Served:
        try:
            value = _object(while_busy(lambda left_s: get(session, f"{url}/v1/models", left_s), timeout_s))
        except ModelMissing:  # a gateway that has no list of models: the first request shows whether it has this one
            return Served()
        entries = value.get("data") if isinstance(value.get("data"), list) else []
        found = {str(entry.get("id")): entry for entry in entries or [] if isinstance(entry, dict)}
        if found and model not in found:
            served = ", ".join([*found][:5])
            raise InfrastructureError(f"{redact(url)} serves {served}, not {model!r}: name one that it has")
        return Served(context_tokens=_count(found.get(model, {}).get("max_model_len")))

    def quiet_fields(self, served: Served) -> Mapping[str, Any]:
        """What vLLM, SGLang and llama-server hand to the chat template, and what OpenAI's API itself has."""
        return {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}, "reasoning_effort": "low"}


def _text_of(content: Any) -> str | None:
    """The text of a message's content: a text, a list of parts, or nothing at all; None where it is something else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [part.get("text") if isinstance(part, dict) else part for part in content if not _is_reasoning(part)]
    return "".join(text for text in texts if isinstance(text, str))


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("thinking", "reasoning", "redacted_thinking")


def _reasons(message: Mapping[str, Any]) -> bool:
    """Whether a message holds reasoning apart from its text."""
    content = message.get("content")
    return any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking", "reasoning_details")) or (
        isinstance(content, list) and any(map(_is_reasoning, content))
    )


def _refuses(message: Mapping[str, Any], text: str) -> bool:
    """Whether a message says that it is a refusal, or holds a call of some function in place of a text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    refusals = [message.get("refusal"), *(part.get("refusal") for part in parts if isinstance(part, dict))]
    calls = message.get("tool_calls") or message.get("function_call")
    return any(isinstance(refusal, str) and refusal.strip() for refusal in refusals) or (
        bool(calls) and not text.strip()
    )


def _streamed(payload: bytes) -> Reply:
    """The reply of a server that streams anyway, as server-sent events; it is whole where an event says so."""
    parts: list[str] = []
    ended = ""
    reasoned = refused = False
    for line in payload.splitlines():
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data or data == b"[DONE]":
            continue
        value = _object(data)
        if value.get("error"):
            raise EndpointError(f"error in the reply: {str(value['error'])[:200]}")
        choices = value.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        delta = first.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        text = first.get("text")
        parts.append(text if isinstance(text, str) else _text_of(delta.get("content")) or "")
        reasoned = reasoned or _reasons(delta)
        refused = refused or _refuses(delta, "x")
        ended = ended_by(first.get("finish_reason")) or ended
    return Reply("".join(parts), ended, refused=refused, reasoned=reasoned)


SERVER_APIS: Mapping[Api, ServerApi] = {"ollama": Ollama(), "openai": OpenAI()}


def detect_api(session: Session, url: str, timeout_s: float) -> Api:
    """Which API the server at ``url`` has.

    Raises:
        EndpointError: It does not answer, or has neither.
        Refused: It answers, but does not let us in.
    """
    denied: Refused | None = None
    words = ""
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
            words = str(error)
        except Refused as error:
            denied = error if error.access else denied
            words = error.detail
        except ModelMissing:
            continue
    if denied is not None:
        raise denied
    raise EndpointError("answers neither /v1/models nor /api/tags" + (f" ({words})" if words else ""))


def while_busy(attempt: Callable[[float], Result], timeout_s: float) -> Result:
    """What ``attempt(seconds left)`` returns; called again while the server is busy, because it loads its model."""
    ends = time.monotonic() + timeout_s
    while True:
        try:
            return attempt(max(0.1, ends - time.monotonic()))
        except EndpointError as error:
            if not error.busy or time.monotonic() > ends:
                raise
            time.sleep(0.2)


def _object(payload: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(payload.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError:
        raise EndpointError(f"a reply that is not JSON: {payload[:100]!r}") from None
    if not isinstance(value, dict):
        raise EndpointError(f"a reply that is not an object: {payload[:100]!r}")
    return value


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else 0
