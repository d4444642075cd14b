"""Model servers for tests, each a process of its own on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.processes import started

STUB = Path(__file__).with_name("ollama_stub.py")
PHOTO_SERVER = Path(__file__).with_name("photo_server.py")
VISION_SERVER = Path(__file__).with_name("vision_server.py")


@contextlib.contextmanager
def ollama_stub(**settings: object) -> Iterator[int]:
    """A server with Ollama's wire format whose replies are a function of the request; gives its port.

    settings: the flags of ``ollama_stub.py`` (``slots=4, latency_s=0.05, …``).
    """
    flags = [
        part for name, value in settings.items() for part in (f"--{name}", str(value))[: 1 if value is True else 2]
    ]
    with started([sys.executable, STUB, *flags], stdout=subprocess.PIPE) as process:
        yield int(str(process.stdout and process.stdout.readline()))


def deterministic_llm_server(delay_s: float = 0.0) -> contextlib.AbstractContextManager[int]:
    """The stub as a plain, sound server."""
    return ollama_stub(latency_s=delay_s, slots=8)


@contextlib.contextmanager
def vision_server(folder: Path, name: str = "tiny-vision") -> Iterator[int]:
    """llama.cpp's server with a real language model and a tiny vision encoder, which is written to ``folder``."""
    from curation.backends.llm.embedded import model_file
    from tests.backends.tiny_gguf import GEMMA_WIDTH, save_vision_encoder

    encoder = folder / "encoder.gguf"
    save_vision_encoder(encoder, GEMMA_WIDTH)
    command = [sys.executable, VISION_SERVER, model_file(), encoder, name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with started(command, more={"OMP_WAIT_POLICY": "passive"}, **pipes) as process:
        yield int(str(process.stdout and process.stdout.readline()))


@contextlib.contextmanager
def photo_server(folder: Path, latency_s: float = 0.0) -> Iterator[int]:
    """A web server of the photos in the shards of ``folder``, and of every kind of bad answer; gives its port."""
    command = [sys.executable, PHOTO_SERVER, folder, "--latency_s", latency_s]
    with started(command, stdout=subprocess.PIPE) as process:
        yield int(str(process.stdout and process.stdout.readline()))


def llama_environment(folder: Path) -> Path:
    """An environment with the program ``llama-server`` of ``llama_server.py``."""
    program = folder / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("llama_server.py")} "$@"\n')
    program.chmod(0o755)
    return folder
