"""Model servers for tests, each a process of its own on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STUB = Path(__file__).with_name("ollama_stub.py")


@contextlib.contextmanager
def ollama_stub(**settings: object) -> Iterator[int]:
    """A server with Ollama's wire format whose replies are a function of the request; gives its port.

    settings: the flags of ``ollama_stub.py`` (``slots=4, latency_s=0.05, …``).
    """
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, str(STUB), *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def deterministic_llm_server(delay_s: float = 0.0) -> contextlib.AbstractContextManager[int]:
    """The stub as a plain, sound server."""
    return ollama_stub(latency_s=delay_s, slots=8)
