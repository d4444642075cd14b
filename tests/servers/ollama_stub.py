"""A small server with Ollama's wire format, for what a real one will not do on demand: answer in a fixed time, the same
to the same question, be busy, load slowly, break in mid-stream, die.

Prints its port.  Words in the caption choose the reply: REFUSE, PREAMBLE, TWOLINES, EMPTY, ECHO, HANG, BREAK, E500,
NOTJSON.  Everything else is answered with one line made from the caption and the group.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import time


class Server:
    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.slots = asyncio.Semaphore(flags.slots)
        self.waiting = 0
        self.served = 0
        self.loaded = flags.load_s == 0
        self.log = open(flags.log, "a", buffering=1) if flags.log else None  # noqa: SIM115 - lives as long as we do

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.split(b" ", 2)
                match = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(match[1])) if match else b""
                status, content = await self.answer(method.decode(), path.decode(), body)
                if status == 0:  # break off in mid-reply
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + content)
                    await writer.drain()
                    break
                retry = b"Retry-After: 1\r\n" if status == 503 and self.flags.retry_after else b""
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n" % (status, len(content), retry) + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if method == "GET":
            return self.listing(path)
        request = json.loads(body)
        if request.get("model") != self.flags.model:
            return 404, json.dumps({"error": f"model '{request.get('model')}' not found"}).encode()
        if path == "/api/generate" and not request.get("prompt"):
            await asyncio.sleep(self.flags.load_s)
            self.loaded = True
            return 200, json.dumps({"model": self.flags.model, "done": True, "done_reason": "load"}).encode()
        if self.waiting >= self.flags.slots + self.flags.queue:
            return 503, b'{"error":"server busy, please try again.  maximum pending requests exceeded"}'
        self.waiting += 1
        try:
            async with self.slots:
                return await self.generate(request, body)
        finally:
            self.waiting -= 1

    def listing(self, path: str) -> tuple[int, bytes]:
        if path == "/":
            return 200, b"Ollama is running"
        if path == "/api/tags":
            return 200, json.dumps({"models": [{"name": self.flags.model}]}).encode()
        return 404, b"404 page not found"

    async def generate(self, request: dict, body: bytes) -> tuple[int, bytes]:
        if not self.loaded:  # as Ollama does it: the first request waits for the model
            await asyncio.sleep(self.flags.load_s)
            self.loaded = True
        text = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
        if self.log:
            self.log.write(json.dumps({"at": time.time(), "body": body.decode()}) + "\n")
        await asyncio.sleep(3600 if "HANG" in text else self.flags.latency_s)
        self.served += 1
        if self.flags.die_after and self.served >= self.flags.die_after:
            os._exit(1)
        if "E500" in text:
            return 500, b'{"error":"llama runner process has terminated"}'
        if "BREAK" in text:
            return 0, b'{"message":'
        if "NOTJSON" in text:
            return 200, b"<html>"
        reply = {
            "model": self.flags.model,
            "message": {"role": "assistant", "content": reply_to(text)},
            "done": True,
            "done_reason": "stop",
            "total_duration": int(self.flags.latency_s * 1e9),
        }
        return 200, json.dumps(reply).encode()


def reply_to(text: str) -> str:
    """A prompt that is a function of the question."""
    fixed = {
        "REFUSE": "I'm sorry, but I can't help with that request.",
        "PREAMBLE": "Sure! Here is the modified sentence: a person in a garden.",
        "TWOLINES": "A person in a garden.\nI hope this helps!",
        "EMPTY": "",
        "ECHO": text,
    }
    for word, reply in fixed.items():
        if word in text:
            return reply
    sentence = re.search(r'sentence: "(.*)"', text, re.DOTALL)
    group = re.search(r'group: ?"([^"]*)"', text)
    caption = (sentence[1] if sentence else text).replace('\\"', "'").replace('"', "'").replace("\n", " ")
    return f"A photo of a {group[1]} person, {caption[:300]}" if group else f"A photo, {caption[:300]}"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="tulu3:fairclip")
    parser.add_argument("--slots", type=int, default=4, help="requests worked on at once")
    parser.add_argument("--queue", type=int, default=512, help="requests that may wait; beyond: 503")
    parser.add_argument("--latency_s", type=float, default=0.0)
    parser.add_argument("--load_s", type=float, default=0.0, help="a cold model takes so long to load")
    parser.add_argument("--die_after", type=int, default=0, help="exit on this request")
    parser.add_argument("--retry_after", type=int, default=0, help="send Retry-After with a 503")
    parser.add_argument("--log", default="", help="append every generating request's body to this file")
    flags = parser.parse_args()
    server = await asyncio.start_server(Server(flags).connected, "127.0.0.1", flags.port)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
