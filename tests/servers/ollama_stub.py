"""A small server with Ollama's wire format, or OpenAI's (``--api openai``), for what a real one will not do on demand:
answer in a fixed time, the same to the same question, be busy, load slowly, break in mid-stream, hang, die.

Prints its port.  Words in the question choose the reply: REFUSE, PREAMBLE, TWOLINES, EMPTY, ECHO, LENGTH, SENTENCES,
HANG, BREAK, MIDSTREAM, E500, E400, NOTJSON; behind ONCE- they do so the first time only.  Everything else is answered
with one line made from the caption and the group; a question about a picture with one made from the picture's bytes.
A question with a JSON schema is answered with an object of it, whose texts are that line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import heapq
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

BUSY = b'{"error":"server busy, please try again.  maximum pending requests exceeded"}'
WORDS = (
    *("REFUSE", "PREAMBLE", "TWOLINES", "EMPTY", "ECHO", "LENGTH", "SENTENCES"),
    *("HANG", "BREAK", "MIDSTREAM", "E500", "E400", "NOTJSON"),
)


class Model:
    """The slots: a request takes the one that is free first, for a fixed time, and waits for it where none is."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.free_at = [0.0] * flags.slots
        self.pending = 0
        self.served = 0
        self.loaded_at = 0.0 if flags.load_s == 0 else float("inf")
        self.seen: set[str] = set()
        self.says: list[str] = json.loads(flags.says)
        self.times: Counter[str] = Counter()
        self.asked = 0
        self.held: Callable[[], None] | None = None
        self.lengths = random.Random(0)
        self.log = open(flags.log, "a", buffering=1) if flags.log else None  # noqa: SIM115 - lives as long as we do

    def finish_at(self, now: float) -> tuple[float, float]:
        """A slot turns to the next request the moment it is done with one, however late the loop notices.

        Gives the time of the answer, and how long the slot had nothing to do before.
        """
        free_at = heapq.heappop(self.free_at)
        start = max(now, free_at, self.load(now))
        latency_s = self.flags.latency_s
        if self.flags.uneven:  # 0.6 to 1.4 of it, and three times as long for one in a hundred
            latency_s *= self.lengths.uniform(0.6, 1.4) if self.lengths.random() > 0.01 else 3
        heapq.heappush(self.free_at, start + latency_s)
        return float(start + latency_s), max(0.0, now - free_at) if free_at else 0.0

    def load(self, now: float) -> float:
        """When the model is there; a cold one is loaded for the first request, as Ollama does it."""
        self.loaded_at = min(self.loaded_at, now + self.flags.load_s)
        return self.loaded_at

    def word(self, text: str) -> str:
        for word in WORDS:
            if f"ONCE-{word}" in text:
                new = text not in self.seen
                self.seen.add(text)
                return word if new else ""
            if word in text:
                return word
        return ""

    def reply(self, text: str, word: str, schema: dict[str, object] | None) -> bytes:
        flags = self.flags
        self.times[text] += 1
        content = FIXED.get(word, "") if word != "ECHO" else text
        if word not in ("REFUSE", "PREAMBLE", "TWOLINES", "EMPTY", "ECHO", "LENGTH", "SENTENCES"):
            content = prompt_for(text)
            content = content if schema is None else json.dumps(answer_for(schema, content))
            content = self.says[self.times[text] - 1] if self.times[text] <= len(self.says) else content
        if flags.api == "openai":
            message = {"role": "assistant", "content": content}
            reason = "length" if word in ("LENGTH", "SENTENCES") else "stop"
            usage = {"prompt_tokens": len(text.split()), "completion_tokens": len(content.split())}
            return json.dumps({"choices": [{"message": message, "finish_reason": reason}], "usage": usage}).encode()
        final = {
            "model": flags.model,
            "message": {"role": "assistant", "content": content},
            "done": True,
            "done_reason": "length" if word in ("LENGTH", "SENTENCES") else "stop",
            "prompt_eval_count": len(text.split()),
            "eval_count": len(content.split()),
            "total_duration": int(flags.latency_s * 1e9),
        }
        return json.dumps(final).encode()


class Connection(asyncio.Protocol):
    def __init__(self, model: Model) -> None:
        self.model = model
        self.buffer = b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        size = int(length[1]) if length else 0
        if found and len(rest) >= size:
            self.buffer = rest[size:]
            method, path, _ = head.split(b" ", 2)
            self.handle(method, path.decode(), rest[:size])

    def handle(self, method: bytes, path: str, body: bytes) -> None:
        flags = self.model.flags
        if method == b"GET":
            found = {"/": b"Ollama is running", "/api/tags": json.dumps({"models": [{"name": flags.model}]}).encode()}
            if flags.api == "openai":
                found = {"/v1/models": json.dumps({"data": [{"id": flags.model}]}).encode()}
            return self.send(200 if path in found else 404, found.get(path, b"404 page not found"))
        request = json.loads(body)
        if request.get("model") != flags.model:
            return self.send(404, json.dumps({"error": f"model '{request.get('model')}' not found"}).encode())
        now = self.loop.time()
        if path == "/api/show":
            capabilities = ["completion", "thinking"] if flags.thinks else ["completion"]
            return self.send(200, json.dumps({"system": flags.system, "capabilities": capabilities}).encode())
        if path == "/api/generate" and not request.get("prompt"):
            loaded = json.dumps({"model": flags.model, "response": "", "done": True, "done_reason": "load"}).encode()
            return self.later(self.model.load(now), self.send, 200, loaded)
        if self.model.pending >= flags.slots + flags.queue:
            return self.send(503, BUSY)
        refused = flags.refuses and flags.refuses in request
        at, idle_s = (now, 0.0) if refused else self.model.finish_at(now)
        if self.model.log:
            self.model.log.write(json.dumps({"at": time.time(), "idle_s": idle_s, "body": body.decode()}) + "\n")
        if refused:
            return self.send(400, json.dumps({"error": f"Unknown argument: {flags.refuses}"}).encode())
        text = question(request["messages"][-1]) if "messages" in request else request["prompt"]
        schema = request.get("format") or request.get("response_format", {}).get("json_schema", {}).get("schema")
        self.model.pending += 1
        self.model.asked += 1
        if self.model.asked == flags.holds:
            self.model.held = partial(self.finish, text, schema)
            return None
        return self.later(at, self.finish, text, schema)

    def later(self, at: float, call: object, *arguments: object) -> None:
        self.loop.call_at(at, call, *arguments)  # type: ignore[arg-type]

    def finish(self, text: str, schema: dict[str, object] | None = None) -> None:
        model = self.model
        model.pending -= 1
        model.served += 1
        if model.held is not None and model.served >= model.flags.holds_until:
            held, model.held = model.held, None
            held()
        if model.flags.die_after and model.served >= model.flags.die_after:
            os._exit(1)
        word = model.word(text)
        if word == "HANG" or (model.flags.hang_after and model.served >= model.flags.hang_after):
            return
        if word == "E500":
            self.send(500, b'{"error":"llama runner process has terminated"}')
        elif word == "E400":
            self.send(400, b'{"error":"the prompt is too long"}')
        elif word == "NOTJSON":
            self.send(200, b"<html>")
        elif word == "MIDSTREAM":
            self.send(200, b'{"message":{"content":"A photo"},"done":false}\n{"error":"an error was encountered"}\n')
        elif word == "BREAK":
            self.transport.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"message":')
            self.transport.close()
        else:
            self.send(200, model.reply(text, word, schema))

    def send(self, status: int, content: bytes) -> None:
        retry = b"Retry-After: %d\r\n" % self.model.flags.retry_after if status == 503 else b""
        retry = retry if self.model.flags.retry_after else b""
        self.transport.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n" % (status, len(content), retry) + content)


FIXED = {
    "REFUSE": "I'm sorry, but I can't help with that request.",
    "PREAMBLE": "Sure! Here is the modified sentence: a person in a garden.",
    "TWOLINES": "A person in a garden.\nI hope this helps!",
    "EMPTY": " \n",
    "LENGTH": "A person in a garden with a",
    "SENTENCES": "A person in a garden. The person holds a",
}


def question(message: dict[str, object]) -> str:
    """What is asked; behind it, where there is a picture, ``PICTURE`` and a hash of it."""
    content, pictures = message["content"], message.get("images") or []
    if isinstance(content, list):
        pictures = [part["image_url"]["url"].partition(",")[2] for part in content if part["type"] == "image_url"]
        content = "".join(part["text"] for part in content if part["type"] == "text")
    assert isinstance(pictures, list)
    hashes = [hashlib.sha256(base64.b64decode(picture)).hexdigest()[:16] for picture in pictures]
    return " PICTURE ".join([str(content), *hashes])


def answer_for(schema: dict[str, Any], text: str) -> Any:
    """What a server that decodes by a schema could answer; each text of it is ``text``."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema["type"] == "object":
        return {name: answer_for(inner, text) for name, inner in schema["properties"].items()}
    if schema["type"] == "array":
        return [answer_for(schema["items"], text)] * 2
    return {"string": text, "integer": 3, "number": 0.5, "boolean": True}[schema["type"]]


def prompt_for(text: str) -> str:
    """A prompt that is a function of the question."""
    if picture := re.search(r" PICTURE (\w+)$", text):
        return f"A picture, {picture[1]}"
    sentence = re.search(r'sentence: "(.*?)"', text, re.DOTALL)
    group = re.search(r'group: ?"([^"]*)"', text)
    caption = (sentence[1] if sentence else text).replace("\n", " ")
    return f"A photo of a {group[1]} person, {caption[:300]}" if group else f"A photo, {caption[:300]}"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="tulu3:fairclip")
    parser.add_argument("--api", default="ollama", choices=("ollama", "openai"))
    parser.add_argument("--slots", type=int, default=4, help="requests worked on at once")
    parser.add_argument("--queue", type=int, default=512, help="requests that may wait; beyond: 503")
    parser.add_argument("--latency_s", type=float, default=0.0)
    parser.add_argument("--load_s", type=float, default=0.0, help="a cold model takes so long to load")
    parser.add_argument("--die_after", type=int, default=0, help="exit on this request")
    parser.add_argument("--hang_after", type=int, default=0, help="answer nothing from this request on")
    parser.add_argument("--retry_after", type=int, default=0, help="send Retry-After with a 503")
    parser.add_argument("--thinks", action="store_true", help="say that the model can reason")
    parser.add_argument("--refuses", default="", help="a field of a request that is refused with a 400")
    parser.add_argument("--system", default="You rewrite the sentence for the group.", help="the model's own")
    parser.add_argument("--uneven", action="store_true", help="answers differ in length; one in 100 takes 3 × as long")
    parser.add_argument("--holds", type=int, default=0, help="the answer to this request waits for others …")
    parser.add_argument("--holds_until", type=int, default=0, help="… until so many are answered")
    parser.add_argument("--says", default="[]", help="a JSON list: the first replies to each question, word by word")
    parser.add_argument("--log", default="", help="append every generating request's body to this file")
    flags = parser.parse_args()
    model = Model(flags)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(model), "127.0.0.1", flags.port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
