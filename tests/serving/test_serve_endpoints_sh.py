"""serve_endpoints.sh: real server processes that are registered, killed, started again, and taken down in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import ROOT, processes
from tests.processes import end, wait_until
from tests.stages.test_captions_processor_sh import OLLAMA, STUB

SCRIPT = ROOT / "serve_endpoints.sh"


class Servers:
    """The script under plain bash, with two GPUs in its environment and a stub for ``ollama``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "end points"
        (root / "bin").mkdir()
        (root / "bin" / "ollama").write_text(OLLAMA)
        (root / "bin" / "ollama").chmod(0o755)
        self.environment = {
            "PATH": f"{root}/bin:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "ENDPOINTS_DIR": str(self.folder),
            "CUDA_VISIBLE_DEVICES": "0,GPU-7",
            "LOG": str(root),
            "DRAIN_S": "1",
            "RESTART_PAUSE_S": "0.1",
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self, **changes: str) -> subprocess.Popen[str]:
        environment = {**self.environment, **changes}
        self.process = processes.start([SCRIPT], env=environment, cwd=self.root, stderr=subprocess.PIPE)
        return self.process

    def registered(self) -> list[dict[str, object]]:
        found = []
        for path in self.folder.glob("*.json"):
            try:
                found.append(json.loads(path.read_bytes()))
            except FileNotFoundError:
                continue
        return sorted(found, key=lambda entry: str(entry["url"]))

    def wait_for(self, count: int) -> list[dict[str, object]]:
        wait_until(lambda: len(self.registered()) == count)
        return self.registered()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.terminate()
        try:
            made.process.communicate(timeout=120)
        finally:
            end(made.process)


def listens(entry: dict[str, object]) -> bool:
    parts = urlsplit(str(entry["url"]))
    try:
        socket.create_connection((parts.hostname, parts.port)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_server_per_gpu_until_the_end(number: signal.Signals, servers: Servers) -> None:
    process = servers.start(DRAIN_S="5")
    entries = servers.wait_for(2)
    assert all(entry["model"] == "tulu3:fairclip" and entry["api"] == "ollama" for entry in entries)
    started = sorted(line.split() for line in (servers.root / "ollama").read_text().splitlines())
    assert [gpu for gpu, *_ in started] == ["0", "GPU-7"]
    assert {f"http://{host}" for _, host, *_ in started} == {entry["url"] for entry in entries}
    assert all(listens(entry) for entry in entries)
    process.send_signal(number)
    wait_until(lambda: not servers.registered())
    assert all(listens(entry) for entry in entries), "out of the folder first, so that nobody asks any more"
    assert process.wait(timeout=120) == 0
    assert not any(listens(entry) for entry in entries)
    assert not list(servers.folder.iterdir())


def test_a_request_that_is_out_is_answered_before_the_end(servers: Servers) -> None:
    process = servers.start(LATENCY_S="2", DRAIN_S="4", CUDA_VISIBLE_DEVICES="3")
    (entry,) = servers.wait_for(1)
    body = json.dumps({"model": entry["model"], "messages": [{"role": "user", "content": "x"}]}).encode()
    with socket.create_connection(("127.0.0.1", urlsplit(str(entry["url"])).port)) as connection:
        connection.sendall(b"POST /api/chat HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        process.terminate()
        assert b"A photo, x" in connection.recv(4096)
    assert process.wait(timeout=120) == 0


def test_a_server_that_is_killed_is_started_again(servers: Servers) -> None:
    servers.start()
    first, second = servers.wait_for(2)
    os.kill(int(str(first["pid"])), signal.SIGKILL)
    wait_until(lambda: first["url"] not in [entry["url"] for entry in servers.registered()])
    entries = servers.wait_for(2)
    assert second["url"] in [entry["url"] for entry in entries]
    assert all(listens(entry) for entry in entries)
    assert len((servers.root / "ollama").read_text().splitlines()) == 3


def test_a_server_that_will_not_live_is_given_up(servers: Servers) -> None:
    process = servers.start(BROKEN="1", RESTARTS="2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len((servers.root / "ollama").read_text().splitlines()) == 6, "two servers, each tried three times"
    assert "no such driver" in errors
    assert errors.splitlines()[-1] == "error: no server could be kept up"


def test_a_model_that_is_not_there_is_not_tried_again(servers: Servers) -> None:
    process = servers.start(MODEL="another", CUDA_VISIBLE_DEVICES="0")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "ollama pull another" in errors
    assert len((servers.root / "ollama").read_text().splitlines()) == 1


def test_another_kind_of_server_by_the_words_of_its_command(servers: Servers) -> None:
    """No shell looks at them, nor at the model's name; SERVERS of them where there is no GPU."""
    command = f"{sys.executable} {STUB} --port {{port}} --model {{model}} --log {servers.root}/$(touch${{IFS}}pwned);x"
    model = "a b;$(touch pwned)`touch pwned`&"
    servers.start(SERVER_COMMAND=command, MODEL=model, SERVERS="2", CUDA_VISIBLE_DEVICES="")
    entries = servers.wait_for(2)
    assert all(entry["model"] == model for entry in entries)
    assert not (servers.root / "pwned").exists()
    assert not (servers.root / "ollama").exists()


def test_ports_of_ones_choice(servers: Servers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    servers.start(FIRST_PORT=str(port), CUDA_VISIBLE_DEVICES="0", SERVER_HOST="localhost")
    (entry,) = servers.wait_for(1)
    assert entry["url"] == f"http://localhost:{port}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ENDPOINTS_DIR": ""}, "ENDPOINTS_DIR is not set"),
        ({"ENDPOINTS_DIR": "/dev/null/x"}, "cannot be made"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "no GPU was allocated"),
        ({"OLLAMA": "no-such-ollama"}, "no no-such-ollama on the PATH"),
        ({"SERVER_COMMAND": "no-such-vllm serve"}, "no no-such-vllm on the PATH"),
        ({"SERVERS": "two"}, "SERVERS is 'two'"),
    ],
)
def test_what_the_machine_lacks(changes: dict[str, str], says: str, servers: Servers) -> None:
    process = servers.start(**changes)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert says in errors


def test_servers_of_several_jobs_serve_one_stage(servers: Servers, tmp_path: Path) -> None:
    """Two jobs; one ends at its time limit in mid-run, and the stage does not notice."""
    (tmp_path / "captions").mkdir()
    captions = {f"{n:03d}.json": f"A woman walks her dog along the beach, number {n}" for n in range(300)}
    (tmp_path / "captions" / "0.json").write_text(json.dumps(captions))
    first = servers.start(LATENCY_S="0.1", DRAIN_S="6")
    second = Servers.__new__(Servers)
    second.__dict__.update(servers.__dict__)
    other = second.start(LATENCY_S="0.1", CUDA_VISIBLE_DEVICES="1")
    try:
        servers.wait_for(3)
        folders = {"SRC_DIR": f"{tmp_path}/captions", "TARGET_DIR": f"{tmp_path}/prompts"}
        stage = subprocess.Popen(
            [ROOT / "02_captions_processor.sh"],
            env={**servers.environment, **folders},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: any(p.stat().st_size for p in (tmp_path / "prompts" / "_partial").rglob("*") if p.is_file()))
        first.send_signal(signal.SIGUSR1)
        _, errors = stage.communicate(timeout=120)
        assert stage.returncode == 0
        assert len(json.loads((tmp_path / "prompts" / "0.json").read_bytes())) == 300
        assert "no requests to it for" not in errors, "no request met a server that was gone"
        assert first.wait(timeout=120) == 0
    finally:
        other.terminate()
        other.communicate(timeout=120)
