"""A model server in the test's process that does what the test says: it refuses, wants a key, sleeps, loads its model.

A test gives a function that turns each question into an answer; everything else (which API it is, that the model is
there) is answered as a sound server does.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

MODEL = "tulu3:fairclip"


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it; ``text`` is the user's message, ``body`` {} where there was none."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        messages = self.body.get("messages")
        if not messages:
            return str(self.body.get("prompt", ""))
        content = messages[-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    @property
    def is_question(self) -> bool:
        return bool(self.body.get("messages") or self.body.get("prompt"))


@dataclass
class Answer:
    """``text`` as a reply; or, with another status or ``raw``, as the body that is sent.  None: it hangs up."""

    text: str = "A photo of a person, smiling"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bool = False


Behaviour = Callable[[Asked], Answer | None]


class OddServer:
    """What the test sees of the server.  ``asked`` grows; ``behaviour`` may be replaced at any time."""

    def __init__(self, behaviour: Behaviour, api: Literal["ollama", "openai"], url: str) -> None:
        self.behaviour, self.api, self.url = behaviour, api, url
        self.asked: list[Asked] = []
        self.other: Behaviour = lambda asked: None  # for all that is no question; None: what a sound server answers
        self.lock = threading.Lock()

    @property
    def questions(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.is_question]

    def answer(self, asked: Asked) -> tuple[int, bytes, Mapping[str, str]] | None:
        with self.lock:
            self.asked.append(asked)
        if not asked.is_question:
            other = self.other(asked)
            if other is not None:
                return other.status, other.text.encode(), other.headers
            return self._sound(asked)
        answer = self.behaviour(asked)
        if answer is None or answer.status != 200 or answer.raw:
            return answer and (answer.status, answer.text.encode(), answer.headers)
        message = {"role": "assistant", "content": answer.text}
        if self.api == "ollama":
            return 200, json.dumps({"message": message, "done": True, "done_reason": "stop"}).encode(), {}
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode(), {}

    def _sound(self, asked: Asked) -> tuple[int, bytes, Mapping[str, str]]:
        sound = {"/": b"Ollama is running", "/api/generate": b'{"done": true, "done_reason": "load"}'}
        if self.api == "openai":
            sound = {"/v1/models": json.dumps({"data": [{"id": MODEL}]}).encode()}
        return (200, sound[asked.path], {}) if asked.path in sound else (404, b"not found", {})


@contextlib.contextmanager
def odd_server(
    behaviour: Behaviour = lambda asked: Answer(),
    api: Literal["ollama", "openai"] = "openai",
    certificate: Path | None = None,
) -> Iterator[OddServer]:
    """Serve on a free port of the loopback interface; over TLS with ``certificate``, a file with its key beside it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0)))))

        def _answer(self, body: dict[str, Any]) -> None:
            said = odd.answer(Asked(self.command, self.path, dict(self.headers), body))
            if said is None:
                self.close_connection = True
                return
            status, payload, headers = said
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if certificate is None else "https"
    odd = OddServer(behaviour, api, f"{scheme}://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield odd
    finally:
        server.shutdown()
        server.server_close()
