"""``llama-server`` for tests, with the arguments and variables of llama.cpp's own.

It is the real server (xllamacpp), or, if the model's file says so, the stub, a sleeper or nothing at all.

``llama_environment`` in ``tests/servers/__init__.py`` makes a folder with this program as ``bin/llama-server``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="model")
    parser.add_argument("--mmproj", default="")
    parser.add_argument("--alias")
    parser.add_argument("--host")
    parser.add_argument("--port")
    parser.add_argument("-np", dest="slots", type=int)
    parser.add_argument("-c", dest="context", type=int)
    given, more = parser.parse_known_args()
    head = Path(given.model).read_bytes()[:16] if os.path.exists(given.model) else b""
    if head == b"sleep":
        time.sleep(600)
    if head == b"stub":
        stub = [
            sys.executable,
            str(Path(__file__).with_name("ollama_stub.py")),
            "--api",
            "openai",
            "--port",
            given.port,
        ]
        os.execv(sys.executable, [*stub, "--model", given.alias, "--slots", str(given.slots), *more])
    if head[:4] != b"GGUF":
        sys.exit(f"main: error: the model {given.model} cannot be loaded")
    serve(given)


def serve(given: argparse.Namespace) -> None:
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path = given.model
    params.mmproj.path = given.mmproj
    params.model_alias = {given.alias}
    params.hostnames = [given.host]
    params.port = int(given.port)
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_parallel = given.slots
    params.n_ctx = given.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.swa_full = True
    params.ui = False
    params.warmup = False
    params.verbosity = 0
    server = Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
