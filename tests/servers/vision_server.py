"""llama.cpp's server with a vision encoder: an OpenAI-compatible vision server on a CPU.

Prints its port.  ``python vision_server.py MODEL.gguf ENCODER.gguf NAME``
"""

from __future__ import annotations

import os
import sys
import time


def main(model: str, encoder: str, name: str) -> None:
    from xllamacpp import CommonParams, Server

    port_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the error stream
    params = CommonParams()
    params.model.path = model
    params.mmproj.path = encoder
    params.model_alias = {name}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = 2
    params.n_ctx = 2 * 1024
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.swa_full = True
    params.ui = False
    params.warmup = False
    params.verbosity = 0
    server = Server(params)
    print(server.listening_address.rpartition(":")[2], file=port_to, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:4])
