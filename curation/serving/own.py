"""Model servers that a stage starts, watches and ends itself (``--served``), for itself alone.

Each process starts a server for each GPU that is its own, or for each ``--tensor_parallel`` of them, with a key that
nobody else knows, on free ports of the loopback address.  The servers run in an environment of their own, because
vLLM pins its own torch.  They are endpoints of the stage's pool like any others.  They end with the stage, also where
that is killed: ``keeper.py`` sees to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from curation.cluster import (
    WORKER_VARIABLE,
    Allocation,
    do_without_gpus,
    gpu_name,
    host_identity,
    own_gpus,
    showing,
    visible_gpus,
)
from curation.errors import InfrastructureError, UsageError
from curation.jsonio import clean_text
from curation.options import PATH, at_least, more_than
from curation.serving import keeper
from curation.serving.connection import answers
from curation.serving.pool import Endpoint, EndpointPool
from curation.storage.files import make_folder

RESTARTS = 3  # of one server that dies while it serves
FORGIVEN_AFTER_S = 600.0  # a server that has served for so long is sound
LOG_BYTES = 4 << 20
LOOK_S = 0.3
PROBE_S = 5.0
_END_BYTES = 16 << 10  # of a log, in which its last words are looked for
_WORDS = 300  # characters of each line of them
_TELLS = re.compile(r"error|exception|out of memory|cannot|failed|not found|unrecogni[sz]ed", re.I)
_RAISED = re.compile(r"^[\w.]+(?:Error|Exception): ")
_ONLY_POINTS = re.compile(
    r"see (?:the )?(?:root cause|stack ?trace|log)|check the logs|further information|^Traceback|^File \"|^\^|WARNING",
    re.I,
)
# Of vLLM, in front of each line: (EngineCore pid=12) ERROR 11-29 03:07:53 [registry.py:1120]
_PREFIX = re.compile(r"^\(\w+ pid=\d+\)\s*|^(?:ERROR|INFO)\s+[\d-]+ [\d:]+ \[[^\]]*\]\s*")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TAKEN = re.compile(r"address already in use|couldn't bind|could not bind", re.I)

Kind = Literal["vllm", "llama"]
logger = logging.getLogger("curation")


@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    """Whether and how a stage starts the model's servers itself."""

    help_group: ClassVar[str] = "own servers"

    served: Kind | None = None
    """Start the model's servers on this machine, one for each GPU, and end them with the run: vllm, or llama (the
    llama-server of llama.cpp, with a GGUF file)."""
    served_python: Annotated[str | None, PATH] = None
    """The Python of the environment in which the server is installed, or the environment's folder.  Default: vLLM or
    llama-server beside this Python or on the PATH."""
    served_args: str | None = None
    """More arguments for the server's command, as one word in quotes: "--max-model-len 8192"."""
    served_wait: Annotated[float, more_than(0)] = 1200.0
    """Seconds for a server to start and load the model."""
    tensor_parallel: Annotated[int, at_least(1)] = 1
    """GPUs over which one server divides the model."""

    def check_served(self, *, named: bool) -> None:
        """Raise UsageError for flags that do not fit.  named: servers that run already are named too."""
        if self.served is None:
            given = [name for name in ("served_python", "served_args") if getattr(self, name) is not None] + [
                "tensor_parallel"
            ] * (self.tensor_parallel > 1)
            if given:
                raise UsageError(f"--{given[0]} needs --served")
            return
        if named:
            raise UsageError("--served starts its own servers: leave --endpoints and --endpoints_dir out")
        try:
            shlex.split(self.served_args or "")
        except ValueError as error:
            raise UsageError(f"--served_args: {error}") from None


@dataclass(frozen=True, slots=True)
class Launch:
    """What one server is to be.

    Attributes:
        program: Its Python, or its own program.
        model: A hub id, a folder or a file.
        name: The model's name in requests.
        port: Of the loopback address.
        slots: Requests that it computes at once.
        tensor_parallel: GPUs over which it divides the model.
        sees: Whether it is asked about pictures.
        more: Further arguments, which win.
    """

    program: str
    model: str
    name: str
    port: int
    slots: int
    tensor_parallel: int
    sees: bool
    more: Sequence[str] = ()


def vllm_command(launch: Launch) -> list[str]:
    command = [launch.program, "-m", "vllm.entrypoints.openai.api_server", "--model", launch.model]
    command += ["--served-model-name", launch.name, "--host", "127.0.0.1", "--port", str(launch.port)]
    command += ["--tensor-parallel-size", str(launch.tensor_parallel), "--max-num-seqs", str(launch.slots)]
    command += ["--max-model-len", "auto"]  # the longest context for which the GPU's memory is enough
    command += ["--disable-uvicorn-access-log"]
    command += ["--limit-mm-per-prompt", '{"image": 1}'] if launch.sees else []
    return [*command, *launch.more]


def llama_command(launch: Launch) -> list[str]:
    command = [launch.program, "-m", launch.model, "--alias", launch.name, "--host", "127.0.0.1"]
    command += ["--port", str(launch.port), "-np", str(launch.slots), "-c", str(launch.slots * _LLAMA_SLOT_TOKENS)]
    encoders = sorted(Path(launch.model).parent.glob("*mmproj*.gguf"))
    command += ["--mmproj", str(encoders[0])] if launch.sees and len(encoders) == 1 else []
    return [*command, *launch.more]


_LLAMA_SLOT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class _Server:
    """A kind of server.

    Attributes:
        command: Its command line.
        program: Its program in its environment; "" for a module of Python.
        key: The variable of the environment from which it takes the key: others on the machine read command lines.
        slots: Requests that it computes at once where nobody says how many.
        environment: Further variables.
    """

    command: Callable[[Launch], list[str]]
    program: str
    key: str
    slots: int
    environment: Mapping[str, str]


KINDS: Mapping[Kind, _Server] = {
    "vllm": _Server(vllm_command, "", "VLLM_API_KEY", 256, {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}),
    "llama": _Server(llama_command, "llama-server", "LLAMA_API_KEY", 8, {}),
}


def program_of(kind: Kind, place: str | None) -> str:
    """The program that starts a server of a kind.

    Args:
        kind: Of the server.
        place: The Python of its environment, or the environment's folder; None: what can be found.

    Raises:
        UsageError: It is not there.
    """
    own = KINDS[kind].program
    if place is not None:
        path = Path(place).expanduser()
        folder = path / "bin" if path.is_dir() else path.parent
        found = folder / own if own else (folder / "python" if path.is_dir() else path)
        if not os.access(found, os.X_OK) or found.is_dir():
            raise UsageError(f"--served_python {place}: there is no program {found}")
        return str(found.absolute())
    beside = Path(sys.executable).parent / (own or "vllm")
    if (on_path := str(beside) if os.access(beside, os.X_OK) else shutil.which(own or "vllm")) is None:
        raise UsageError(
            f"--served {kind}: {own or 'vllm'} is not in this environment nor on the PATH; name the Python of its "
            "environment with --served_python (docs/stage-05.md, Servers of the stage)"
        )
    if own:
        return on_path
    python = Path(on_path).resolve().parent / "python"  # vllm's own script stands beside its Python
    return str(python) if os.access(python, os.X_OK) else sys.executable


def require_own_server(options: ServedOptions, model: str) -> None:
    """Look whether what starts the stage's own servers is on this machine: the program, and llama-server's model.

    Args:
        options: The stage's flags, with ``--served``.
        model: What ``--model`` names.

    Raises:
        UsageError: The program is not there.
        InfrastructureError: llama-server has to be given a GGUF file, and there is none.
    """
    assert options.served is not None
    program_of(options.served, options.served_python)
    if options.served == "llama" and not Path(model).expanduser().is_file():
        raise InfrastructureError(f"--model {model}: --served llama takes a GGUF file, and there is none")


def gpu_groups(tensor_parallel: int, local_rank: int, environ: Mapping[str, str] = os.environ) -> list[list[int]]:
    """The GPUs of each server that this process starts, by their numbers among the visible ones; one server without any
    where this process sees none.

    Raises:
        UsageError: There are too few for one server.
    """
    visible = visible_gpus(environ)
    if not visible:
        return [[]]
    mine = own_gpus(local_rank, environ)
    if len(mine) < tensor_parallel:
        raise UsageError(
            f"--tensor_parallel {tensor_parallel}: of {visible} visible GPUs {len(mine)} are this process's own; start "
            "fewer processes on a node, with more GPUs for each (--workers 1; sbatch --ntasks-per-node=1 "
            "--gpus-per-task=4)"
        )
    servers = len(mine) // tensor_parallel
    return [mine[number * tensor_parallel : (number + 1) * tensor_parallel] for number in range(servers)]


class OwnServers:
    """The servers of one process, from ``start`` to ``close``.

    Attributes:
        key: What the pool sends to them.
        slots: Requests that each computes at once.
    """

    def __init__(
        self,
        options: ServedOptions,
        *,
        model: str,
        name: str,
        sees: bool,
        folder: Path,
        allocation: Allocation,
        slots: int | None = None,
        device: str | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            options: The stage's flags.
            model: A hub id, a folder or a file.
            name: The model's name in requests.
            sees: Whether it is asked about pictures.
            folder: For what the servers say.
            allocation: Of this process.
            slots: Requests of all servers together; None: as many as the kind of server takes.
            device: ``cpu``: no GPU is used.
            stopping: Whether the servers are waited for no longer.

        Raises:
            UsageError: There is no such server, or there are too few GPUs.
            InfrastructureError: GPUs were promised to this process, and it sees none.
        """
        assert options.served is not None
        self._options, self._model, self._name, self._sees = options, model, name, sees
        self._kind = KINDS[options.served]
        self._program = program_of(options.served, options.served_python)
        self._groups = [[]] if device == "cpu" else gpu_groups(options.tensor_parallel, allocation.local_rank)
        self._hides_gpus = device == "cpu"
        if device != "cpu" and not self._groups[0]:
            do_without_gpus("no GPU can be seen here", f"--served {options.served} computes on the CPU")
        self.slots = self._kind.slots if slots is None else max(1, -(-slots // len(self._groups)))
        self.key = secrets.token_urlsafe(24)
        self._folder, self._stopping = folder, stopping
        self._rank = allocation.local_rank
        self._ended = threading.Event()
        self._changed = threading.Condition()
        self._starting = len(self._groups)
        self._trouble: list[str] = []  # of servers that are given up
        self._threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return len(self._groups)

    def start(self, pool: EndpointPool) -> None:
        """Start all servers, and return when the first of them answers; the pool gets each as soon as it does.

        It also returns when a stop was requested: there is no server then.

        Raises InfrastructureError where none of them comes up.
        """
        make_folder(self._folder)
        pool.expects = lambda: self._starting > 0
        for number in range(len(self._groups)):
            thread = threading.Thread(target=self._keep_up, args=(pool, number), name="server", daemon=True)
            self._threads.append(thread)
            thread.start()
        with self._changed:
            while not (pool.members() or len(self._trouble) == len(self._groups) or self._stopping()):
                self._changed.wait(LOOK_S)
            if not pool.members() and self._trouble:
                raise InfrastructureError(self._trouble[0])

    def close(self) -> None:
        """End all servers."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * keeper.GRACE_S)

    # ---- in the thread of one server

    def _keep_up(self, pool: EndpointPool, number: int) -> None:
        failures, serves = 0, False
        while True:
            try:
                process, url, log, since = self._launch(number)
            except OSError as error:
                return self._give_up(pool, f"--served {self._options.served}: the server cannot be started: {error}")
            try:
                why = self._until_it_answers(process, pool, url)
                served_since = time.monotonic()
                if not why:
                    serves = True
                    self._count(-1)
                    why = self._while_it_runs(process)
                    pool.leave(url)
                    failures = 0 if time.monotonic() - served_since > FORGIVEN_AFTER_S else failures
                    self._count(+1)
            except InfrastructureError as error:
                why, serves = str(error), False
            finally:
                _end(process)
            if self._ended.is_set():
                return self._count(-1)
            said = last_words(log, since)
            trouble = f"--served {self._options.served}: the server {why}; {log} ends with: {said}"
            failures += 1
            if failures > RESTARTS or not (serves or _TAKEN.search(said)):
                return self._give_up(pool, trouble)
            logger.warning(f"{trouble}; it is started again ({failures} of {RESTARTS} times)")
            self._ended.wait(min(30.0, float(2 ** (failures - 1))))

    def _launch(self, number: int) -> tuple[subprocess.Popen[bytes], str, Path, int]:
        """The keeper of a server, its URL, its log, and where in that its words begin."""
        o, devices = self._options, self._groups[number]
        port = _free_port()
        launch = Launch(
            self._program,
            self._model,
            self._name,
            port,
            self.slots,
            o.tensor_parallel,
            self._sees,
            shlex.split(o.served_args or ""),
        )
        where = "gpu" + "+".join(str(gpu_name(device)) for device in devices) if devices else f"cpu{self._rank}"
        log = self._folder / re.sub(r"[^\w.+-]", "_", f"{host_identity()[0]}-{where}.log")
        command = self._kind.command(launch)
        with open(log, "ab") as file:
            file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
            since = file.tell()
        keep = [sys.executable, "-I", str(Path(keeper.__file__)), str(log), str(LOG_BYTES), *command]
        process = subprocess.Popen(
            keep,
            stdin=subprocess.PIPE,  # where it ends, the keeper knows that this process is gone
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment(devices),
            start_new_session=True,  # Ctrl-C in a terminal reaches the stage alone
        )
        return process, f"http://127.0.0.1:{port}", log, since

    def _environment(self, devices: Sequence[int]) -> dict[str, str]:
        """Of a server: without what belongs to this Python, with its own programs first, its key and its GPUs."""
        gone = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", WORKER_VARIABLE)
        kept = {name: value for name, value in os.environ.items() if name not in gone}
        programs = os.pathsep.join(filter(None, (str(Path(self._program).parent), os.environ.get("PATH"))))
        added = {**self._kind.environment, "PATH": programs, self._kind.key: self.key}
        if devices or self._hides_gpus:
            added |= showing(devices, kept)
        return {**kept, **added}

    def _until_it_answers(self, process: subprocess.Popen[bytes], pool: EndpointPool, url: str) -> str:
        """Add a server to the pool once it has loaded its model.  Returns why that did not happen, else "".

        Raises InfrastructureError where it does not have the model.
        """
        ends = time.monotonic() + self._options.served_wait
        why = ""
        from curation.serving.session import Session

        with Session(self.key) as session:
            while not self._ended.wait(LOOK_S):
                if process.poll() is not None:
                    return f"ended with exit code {process.returncode} before it answered"
                if time.monotonic() > ends:
                    return f"did not answer within {self._options.served_wait:g} s (--served_wait{why})"
                if answers(session, url, PROBE_S):
                    found = pool.try_to_open(url, "openai", slots=self.slots)
                    if isinstance(found, Endpoint):
                        pool.add(found)
                        logger.info(f"{url}: the server of {clean_text(self._name)} is ready")
                        return ""
                    why = f"; {found}"
        return "was not needed any more"

    def _while_it_runs(self, process: subprocess.Popen[bytes]) -> str:
        while not self._ended.wait(LOOK_S):
            if process.poll() is not None:
                return f"ended with exit code {process.returncode}"
        return "was not needed any more"

    def _count(self, change: int) -> None:
        with self._changed:
            self._starting += change
            self._changed.notify_all()

    def _give_up(self, pool: EndpointPool, trouble: str) -> None:
        with self._changed:
            self._trouble.append(trouble)
            self._starting -= 1
            alone = len(self._trouble) == len(self._groups)
            self._changed.notify_all()
        if alone:
            pool.doom(trouble)
        else:
            logger.error(f"{trouble}; the run continues with the other servers")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server: its keeper does it when its standard input ends."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    try:
        process.wait(2 * keeper.GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_words(log: Path, since: int = 0) -> str:
    """What a server said at last, in one line: the first error that it raised, and the last lines that tell of one.

    since: Where in the file its words begin.
    """
    try:
        with open(log, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _END_BYTES, since if since <= size else 0))  # or a new file was begun
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"nothing that can be read ({error.strerror})"
    lines = [_PREFIX.sub("", _PREFIX.sub("", _COLOURS.sub("", line))).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if _TELLS.search(line) and not _ONLY_POINTS.search(line)]
    raised = [line for line in telling if _RAISED.match(line)][:1]
    shown = dict.fromkeys([*raised, *(telling[-2:] or lines[-3:])])
    return clean_text(" | ".join(line[:_WORDS] for line in shown)) or "nothing"
