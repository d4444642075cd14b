"""Real language model servers: the embedded one, and an independent server with Ollama's wire format in front of it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from curation.backends import load
from curation.backends.llm.embedded import Backend, model_file
from curation.errors import InfrastructureError
from curation.replies import PROMPT, judge
from curation.rewrite.groups import read_groups
from curation.rewrite.prompts import completion_request, opening
from curation.serving.pool import EndpointPool
from curation.serving.session import Session
from curation.serving.wire import SERVER_APIS, Request, detect_api
from tests import EXAMPLES, ROOT, processes
from tests.processes import started, wait_until

pytestmark = pytest.mark.slow
PROXY = ROOT / ".venv-ollama" / "bin" / "ollama-proxy"
STAGE = "02_captions_processor"
CAPTION = "Official portrait of the mayor in his office, December 2012"


@pytest.fixture(scope="module")
def server() -> Iterator[Backend]:
    backend = load("llm", "embedded")(threads=2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def pool(server: Backend) -> EndpointPool:
    pool = EndpointPool([server.url], server.model, timeout_s=120.0)
    pool.open()
    return pool


def listens(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as attempt:
        return attempt.connect_ex((host, int(port))) == 0


# ---- the embedded server


def test_it_is_one_more_endpoint(server: Backend) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    with Session() as session:
        assert detect_api(session, server.url, 10.0) == "openai"


def test_every_group_is_in_its_prompt(pool: EndpointPool) -> None:
    for group in read_groups("default")[::5]:
        for attempt in range(4):
            reply = pool.ask(completion_request(CAPTION, group, 0, "key", attempt, 0.3))
            prompt, reason, _ = judge(reply, PROMPT, begun=opening(group))
            if prompt:
                break
        assert prompt is not None, reason
        assert prompt.startswith(opening(group).strip())
        assert len(prompt) > len(opening(group)) + 5


def test_the_same_question_has_the_same_answer_when_cold(pool: EndpointPool) -> None:
    request = completion_request(CAPTION, None, 0, "key", 0, 0.0)
    assert pool.ask(request).text == pool.ask(request).text


def test_a_question_that_is_too_long_fails_alone(pool: EndpointPool) -> None:
    from curation.errors import SampleError

    with pytest.raises(SampleError, match="llm_bad_request"):
        pool.ask(Request(prompt="word " * 5000, max_tokens=4))


def test_it_ends_when_it_is_closed() -> None:
    backend = Backend()
    assert listens(backend.url)
    backend.close()
    wait_until(lambda: not listens(backend.url), "its end")
    backend.close()


def test_it_ends_with_a_process_that_is_killed() -> None:
    program = "import time; from curation.backends.llm.embedded import Backend; print(Backend().url, flush=True)"
    process = processes.start([sys.executable, "-c", f"{program}; time.sleep(3600)"], stdout=subprocess.PIPE)
    try:
        url = str(process.stdout and process.stdout.readline()).strip()
        assert listens(url)
    finally:
        process.kill()  # it alone: what it started has to notice
        process.communicate()
    wait_until(lambda: not listens(url), "its end")


def test_a_damaged_model_is_put_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = model_file()
    assert file.is_relative_to(tmp_path)
    size = file.stat().st_size
    file.write_bytes(b"half")
    assert model_file().stat().st_size == size
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no temporary file is left"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match=r"pip install '?\S*\[llm\]'?$"):
        Backend()


def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"not a model")
    monkeypatch.setattr("curation.backends.llm.embedded.model_file", lambda: tmp_path / "no.gguf")
    with pytest.raises(InfrastructureError, match="did not start"):
        Backend()


# ---- the stage with it


def stage(root: Path, *flags: str) -> list[str]:
    folders = ["--input", str(root / "shards"), "--output", str(root / "prompts")]
    return [sys.executable, f"{STAGE}.py", *folders, "--lease_s", "2", *flags]


def test_a_killed_run_keeps_the_replies_that_it_had(tmp_path: Path) -> None:
    """Keys, conservation, and the recorded replies reappear: a real model's replies are not reproduced."""
    (tmp_path / "shards").mkdir()
    os.link(EXAMPLES / "00000007.tar", tmp_path / "shards" / "00000007.tar")

    def in_the_log() -> list[str]:
        logs = [path for path in (tmp_path / "prompts" / "_partial").rglob("*") if path.is_file()]
        return [prompt for path in logs for prompt in re.findall(r'"prompt":"(.*?)"', path.read_text("latin-1"))]

    with started(stage(tmp_path, "--embedded")) as process:  # SIGKILL
        recorded = wait_until(in_the_log, "a reply on disk", while_runs=process)
    assert subprocess.run(stage(tmp_path, "--embedded", "--max_error_rate", "1"), cwd=ROOT, check=False).returncode == 0
    prompts = json.loads((tmp_path / "prompts" / "00000007.json").read_bytes())
    assert set(recorded) <= set(prompts.values())
    (receipt,) = (tmp_path / "prompts" / "_receipts" / STAGE).glob("*/00000007.json")
    counts = json.loads(receipt.read_bytes())["counts"]
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["failed"].values()) == 16
    assert len(prompts) == counts["kept"] >= 4


# ---- an independent server with Ollama's wire format


@contextmanager
def ollama_proxy(server: Backend, folder: Path) -> Iterator[str]:
    if not PROXY.exists():
        pytest.skip("needs .venv-ollama: ./install.sh ollama")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "PROVIDERS_OPENAI_API_KEY": "none",
        "PROVIDERS_OPENAI_BASE_URL": f"{server.url}/v1",
        "EXTRA_MODELS": "tulu3:fairclip",
    }
    command = [str(PROXY), "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        log = stack.enter_context(open(folder / "proxy.log", "wb"))
        process = stack.enter_context(started(command, env=environment, cwd=folder, stdout=log, stderr=log))
        wait_until(lambda: listens(url), (folder / "proxy.log").read_text, while_runs=process)
        yield url


def test_an_independent_ollama_server(server: Backend, tmp_path: Path) -> None:
    """The formats fit: it is recognised, loads, answers, and its replies are read.

    The model was never taught to chat, so what it says is rejected.
    """
    with ollama_proxy(server, tmp_path) as url:
        with Session() as session:
            assert detect_api(session, url, 10.0) == "ollama"
            SERVER_APIS["ollama"].load(session, url, "tulu3:fairclip", 4096, 120.0)
        pool = EndpointPool([url], "tulu3:fairclip", timeout_s=120.0)
        pool.open()
        reply = pool.ask(Request(user="Say hello.", max_tokens=8, temperature=0.0))
        assert isinstance(reply.text, str)
        (tmp_path / "shards").mkdir()
        captions = {
            "a.json": CAPTION,
            "b.json": "Ein Hund läuft am Strand entlang",
            "c.json": "A dog runs along the beach",
        }
        (tmp_path / "shards" / "00000000.json").write_text(json.dumps(captions))
        flags = ["--endpoints", url, "--timeout", "120", "--retries", "0", "--max_error_rate", "1"]
        assert subprocess.run(stage(tmp_path, *flags), cwd=ROOT, check=False).returncode == 0
    (receipt,) = (tmp_path / "prompts" / "_receipts" / STAGE).glob("*/00000000.json")
    counts = json.loads(receipt.read_bytes())["counts"]
    assert counts["in"] == 3
    assert counts["dropped"] == {"not_english": 1}
    assert counts["kept"] + sum(counts["failed"].values()) == 2
    assert all(reason.startswith("reply_") for reason in counts["failed"]), "nothing failed but for what was said"
