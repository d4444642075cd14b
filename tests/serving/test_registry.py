"""Servers that register in a shared folder, come and go; the pool, the registering process and stage 02 beside them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from curation.errors import InfrastructureError
from curation.serving.pool import EndpointPool
from curation.serving.registry import OwnRegistration, Registration, Registry, RegistryWatcher, parse_registration
from curation.serving.wire import Request
from curation.storage.retry import RetryPolicy
from tests import processes, replaced
from tests.processes import started, wait_until
from tests.servers import ollama_stub
from tests.servers.odd_server import Answer, odd_server
from tests.serving.test_pool import MODEL, REPLIES, TEXTS, free_port, short_pauses  # noqa: F401 - a fixture for all


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that are logged."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("curation")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def registrar(folder: Path, port: int, model: str = MODEL) -> OwnRegistration:
    made = OwnRegistration(folder, Registration(f"http://127.0.0.1:{port}", model, "ollama", "node1", 7))
    made.beat()
    return made


@contextmanager
def pool_on(folder: Path, **settings: float) -> Iterator[EndpointPool]:
    pool = EndpointPool([], MODEL, **settings)  # type: ignore[arg-type]
    watch = RegistryWatcher(pool, Registry(folder)).start()
    yield pool
    watch.close()


@pytest.fixture
def quick_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.serving.registry.RESCAN_S", 0.1)
    monkeypatch.setattr("curation.serving.registry.REOPENING", RetryPolicy(first_wait_s=0.1))


# ---- the files

GOOD: dict[str, object] = {"url": "http://gpu-1:11434", "model": MODEL, "api": "ollama", "beat": 3}


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("http://gpu-1.cluster:8000", "http://gpu-1.cluster:8000"),
        ("https://10.0.0.1:1/", "https://10.0.0.1:1"),
        ("http://GPU1:80", "http://gpu1:80"),
        ("http://[fd12::1]:8000", "http://[fd12::1]:8000"),
    ],
)
def test_urls_of_servers(url: str, plain: str) -> None:
    assert parse_registration(json.dumps({**GOOD, "url": url}).encode()).url == plain


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "http://h", "http://:80", "h:80", "http://h:0", "http://h:65536", "http://h:x"),
        *(
            "http://h:80/v1",
            "http://h:80?x",
            "http://h:80#x",
            "http://user:secret@h:80",
            "http://h:80\n",
            "http://ä:80",
        ),
        *("http://h h:80", "http://h\\x:80", "http://" + "h" * 600 + ":80", "", 5, None, ["http://h:80"]),
    ],
)
def test_what_is_no_url_of_a_server(url: object) -> None:
    with pytest.raises(ValueError, match=r"http://host:port|not a host name|no url|[Pp]ort"):
        parse_registration(json.dumps({**GOOD, "url": url}).encode())


@pytest.mark.parametrize(
    "host",
    [
        *("169.254.169.254", "[fd00:ec2::254]", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "100.100.100.200"),
        *("metadata.google.internal", "METADATA", "instance-data", "192.0.0.192", "168.63.129.16", "[fd20:ce::254]"),
        *("169.254.7.7", "[fe80::1]", "224.0.0.1", "[ff02::1]", "255.255.255.255", "0.0.0.0", "[::]"),
    ],
)
def test_what_no_model_server_is_gets_no_request(host: str, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**GOOD, "url": f"http://{host}:80"}))
    assert list(Registry(tmp_path).read()) == []
    assert len(said) == 1 and "no model server" in said[0]


def test_a_name_that_leads_to_the_metadata_service_gets_no_request(tmp_path: Path, said: list[str]) -> None:
    """2852039166 is a spelling of 169.254.169.254, which the system resolves as it does a name."""
    (tmp_path / "bad.json").write_text(json.dumps({**GOOD, "url": "http://2852039166:80"}))
    pool = EndpointPool([], MODEL)
    watch = RegistryWatcher(pool, Registry(tmp_path))
    watch.sync()
    deadline = time.monotonic() + 5
    while not any("metadata" in line for line in said) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pool.members() == {}
    assert any("169.254.169.254 is the metadata service of a cloud, not a model server" in line for line in said)


def test_servers_that_let_nobody_in_end_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after ``--endpoint_wait``."""
    monkeypatch.setattr("curation.serving.pool.GRACE_S", 1.0)
    with odd_server() as server, pool_on(tmp_path, wait_s=600.0) as pool:
        server.other = lambda asked: Answer('{"error": "Unauthorized"}', 401)
        registrar(tmp_path, int(server.url.rpartition(":")[2]))
        began = time.monotonic()
        with pytest.raises(
            InfrastructureError, match=r"refuse every request.*401: Unauthorized.*only where --api_key_env"
        ):
            pool.ask(Request(user="x"))
        assert time.monotonic() - began < 30


def test_a_password_in_a_registration_is_not_logged(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**GOOD, "url": "http://user:s3cr3t@gpu-1:11434"}))
    assert list(Registry(tmp_path).read()) == []
    assert said and not any("s3cr3t" in line for line in said)


def test_damaged_and_hostile_files_are_ignored_with_one_line_each(tmp_path: Path, said: list[str]) -> None:
    bad = {
        "empty": b"",
        "cut": json.dumps(GOOD).encode()[:-9],
        "binary": b"\xff\x00\x93",
        "list": b"[1]",
        "deep": b'{"url":' + b"[" * 5000 + b"]" * 5000 + b"}",
        "large": json.dumps({**GOOD, "slurm": {"x": "y" * 50_000}}).encode(),
        "beat": json.dumps({**GOOD, "beat": True}).encode(),
        "later": json.dumps({**GOOD, "beat": 1 << 70}).encode(),
        "api": json.dumps({**GOOD, "api": "\x1b[2Jx"}).encode(),
        "model": json.dumps({**GOOD, "model": "m" * 1000}).encode(),
        "\x1b[31m": b"{}",
    }
    for name, data in bad.items():
        (tmp_path / f"{name}.json").write_bytes(data)
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "good.json")
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    (tmp_path / ".good.json").write_text(json.dumps({**GOOD, "url": "http://hidden:1"}))
    (tmp_path / "notes.txt").write_text("x")
    folder = Registry(tmp_path)
    assert list(folder.read()) == ["http://gpu-1:11434"]
    assert list(folder.read()) == ["http://gpu-1:11434"]
    assert len(said) == len(bad) + 3
    for name in [*bad, "fifo", "folder", "link"]:
        shown = name.replace("\x1b", "")
        assert sum(f"{shown}.json: ignored: " in line for line in said) == 1, name
    assert not any("\x1b" in line for line in said)


def test_more_files_than_a_folder_may_have(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.serving.registry.MAX_SERVERS", 5)
    for number in range(9):
        (tmp_path / f"{number}.json").write_text(json.dumps({**GOOD, "url": f"http://h:{number + 1}"}))
    folder = Registry(tmp_path)
    assert len(folder.read()) == len(folder.read()) == 5
    assert len(said) == 1


def test_a_counter_that_stands_still_is_told_by_the_readers_own_clock(tmp_path: Path) -> None:
    """File times are set to the past and to the future: they mean nothing."""
    live, dead = registrar(tmp_path, 1), registrar(tmp_path, 2)
    folder = Registry(tmp_path)
    folder.read()
    for _ in range(4):
        time.sleep(0.1)
        live.beat()
        os.utime(live.path, (0, 0))
        os.utime(dead.path, (4e9, 4e9))
        listed = folder.read()
    assert not listed["http://127.0.0.1:1"].silent(0.3)
    assert listed["http://127.0.0.1:2"].silent(0.3)
    dead.remove()
    live.remove()
    assert not list(tmp_path.iterdir())


# ---- the pool


@pytest.mark.usefixtures("quick_scans")
def test_servers_come_and_go_in_mid_run(tmp_path: Path) -> None:
    with (
        ollama_stub(latency_s=0.02) as first,
        ollama_stub(latency_s=0.02) as second,
        pool_on(tmp_path) as pool,
        ThreadPoolExecutor(8) as threads,
    ):
        mine = registrar(tmp_path, first)
        replies = [threads.submit(pool.ask, Request(user=text)) for text in TEXTS]
        wait_until(lambda: sum(reply.done() for reply in replies) > 40)
        registrar(tmp_path, second)
        wait_until(lambda: len(pool.members()) == 2)
        mine.remove()
        wait_until(lambda: list(pool.members()) == [f"http://127.0.0.1:{second}"])
        assert [reply.result(timeout=120).text for reply in replies] == REPLIES
        facts = pool.facts()
    assert sum(int(str(fact["answered"])) for fact in facts.values()) == len(TEXTS), "not one was asked twice"
    assert all(set(fact) <= {"answered", "limit", "latency_s"} for fact in facts.values()), "nor did one fail"


@pytest.mark.usefixtures("quick_scans")
def test_a_server_that_leaves_finishes_what_it_was_asked(tmp_path: Path) -> None:
    log = tmp_path.with_name("asked")
    with (
        ollama_stub(latency_s=3.0, log=log) as port,
        pool_on(tmp_path) as pool,
        ThreadPoolExecutor(1) as threads,
    ):
        mine = registrar(tmp_path, port)
        wait_until(pool.members)
        reply = threads.submit(pool.ask, Request(user=TEXTS[0]))
        wait_until(lambda: log.exists() and log.stat().st_size, "the request")
        mine.remove()
        wait_until(lambda: not pool.members())
        assert not reply.done()
        assert reply.result(timeout=120).text == REPLIES[0]


@pytest.mark.usefixtures("quick_scans")
def test_a_dead_jobs_file_is_left_where_its_server_is_silent_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a server that answers is asked, however long its counter has stood still."""
    monkeypatch.setattr("curation.serving.registry.Listed.silent", lambda self: time.monotonic() - self.since > 0.5)
    with ollama_stub() as port, pool_on(tmp_path) as pool:
        registrar(tmp_path, port)
        registrar(tmp_path, free_port())  # what a killed job left: it never answers
        wait_until(pool.members)
        time.sleep(1.0)
        assert pool.ask(Request(user=TEXTS[0])).text == REPLIES[0]
        with ollama_stub(die_after=1) as dying:
            registrar(tmp_path, dying)
            wait_until(lambda: len(pool.members()) == 2)
            with ThreadPoolExecutor(4) as threads:
                assert [r.text for r in threads.map(pool.ask, [Request(user=t) for t in TEXTS])] == REPLIES
            wait_until(lambda: list(pool.members()) == [f"http://127.0.0.1:{port}"])


@pytest.mark.usefixtures("quick_scans")
def test_servers_of_another_model_are_not_asked(tmp_path: Path, said: list[str]) -> None:
    with ollama_stub(model="another") as port, pool_on(tmp_path, wait_s=0.5) as pool:
        registrar(tmp_path, port, "another")
        with pytest.raises(
            InfrastructureError, match=rf"no model server registered within 0\.5 s .*{MODEL}.*of another only"
        ):
            pool.ask(Request(user=TEXTS[0]))
    assert sum("other models get no requests: another" in line for line in said) == 1


@pytest.mark.usefixtures("quick_scans")
def test_a_server_that_lies_about_its_model_does_not_end_the_run(tmp_path: Path) -> None:
    with ollama_stub(model="another") as liar, ollama_stub() as port, pool_on(tmp_path) as pool:
        registrar(tmp_path, liar)
        registrar(tmp_path, port)
        assert pool.ask(Request(user=TEXTS[0])).text == REPLIES[0]
        assert list(pool.members()) == [f"http://127.0.0.1:{port}"]


@pytest.mark.usefixtures("quick_scans")
def test_when_all_have_gone_the_run_waits_and_then_ends(tmp_path: Path) -> None:
    with ollama_stub() as port, pool_on(tmp_path, patience_s=1.0) as pool, ThreadPoolExecutor(1) as threads:
        mine = registrar(tmp_path, port)
        assert pool.ask(Request(user=TEXTS[0])).text == REPLIES[0]
        time.sleep(1.2)  # idle for longer than its patience, which is nobody's fault
        mine.remove()
        wait_until(lambda: not pool.members())
        waiting = threads.submit(pool.ask, Request(user=TEXTS[1]))
        time.sleep(0.4)
        again = registrar(tmp_path, port)
        assert waiting.result(timeout=120).text == REPLIES[1]
        again.remove()
        wait_until(lambda: not pool.members())
        began = time.monotonic()
        with pytest.raises(InfrastructureError, match=r"no endpoint has answered for 1 s.*nothing is registered"):
            pool.ask(Request(user=TEXTS[2]))
        assert time.monotonic() - began > 0.5


@pytest.mark.usefixtures("quick_scans")
def test_a_folder_that_cannot_be_read_for_a_while(tmp_path: Path) -> None:
    with ollama_stub() as port, pool_on(tmp_path / "shared") as pool:
        (tmp_path / "shared").mkdir()
        registrar(tmp_path / "shared", port)
        assert pool.ask(Request(user=TEXTS[0])).text == REPLIES[0]
        (tmp_path / "shared").rename(tmp_path / "gone")
        time.sleep(0.5)
        assert pool.ask(Request(user=TEXTS[1])).text == REPLIES[1]


# ---- the process that registers a server


@contextmanager
def registering(folder: Path, port: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "curation", "register"]
    usual = [f"--dir={folder}", f"--url={url}", f"--model={MODEL}"]
    with started([*command, *replaced(usual, more)], stderr=subprocess.PIPE) as process:
        yield process


def test_a_server_is_registered_once_it_has_loaded_and_until_the_end(tmp_path: Path) -> None:
    folder, port = tmp_path / "new" / "folder", free_port()
    with registering(folder, port, "--pid=77") as process:
        time.sleep(0.5)
        with ollama_stub(port=port, load_s=1.5):
            began = time.monotonic()
            wait_until(lambda: list(folder.glob("*.json")))
            assert time.monotonic() - began > 1.0
            (path,) = folder.iterdir()
            first = json.loads(path.read_bytes())
            assert (first["url"], first["model"], first["api"]) == (f"http://127.0.0.1:{port}", MODEL, "ollama")
            assert (first["pid"], first["host"]) == (77, os.uname().nodename)
            path.unlink()  # by mistake
            wait_until(path.exists)
            assert json.loads(path.read_bytes())["beat"] > first["beat"]
            process.terminate()
            assert process.wait(timeout=120) == 0
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_waiting_for_a_server_to_load_ends_at_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    with ollama_stub(load_s=60.0) as port, registering(tmp_path, port) as process:
        time.sleep(1.0)
        process.send_signal(number)
        assert process.wait(timeout=120) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "flags", "code", "says"),
    [
        ({"model": "another"}, [], 2, "has no model 'tulu3:fairclip'"),
        ({"load_s": 60.0}, ["--load_timeout=0.5"], 3, "no answer within 0.5 s"),
        (None, ["--start_timeout=0.5"], 3, "connection refused"),
        (None, ["--url=http://h:1/path"], 2, "more than http://host:port"),
        ({}, ["--dir=/dev/null/x"], 2, "cannot be written"),
    ],
)
def test_what_a_server_lacks(
    settings: dict[str, object] | None, flags: list[str], code: int, says: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        port = free_port() if settings is None else stack.enter_context(ollama_stub(**settings))
        process = stack.enter_context(registering(tmp_path, port, *flags))
        _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert says in errors
    assert not list(tmp_path.iterdir())


# ---- the stage


def start_stage(tmp_path: Path, output: str, *flags: str) -> subprocess.Popen[str]:
    folders = [f"--input={tmp_path}/captions", f"--output={tmp_path / output}"]
    command = [sys.executable, "02_captions_processor.py", *folders, *flags]
    return processes.start(command, stderr=subprocess.PIPE)


def published(folder: Path) -> dict[str, bytes]:
    """All that a stage publishes, but for the receipts, which hold times."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.split("/")[0] in ("_provenance", path.name)}


def test_stage_02_goes_on_while_servers_are_killed_and_others_come(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    for shard in range(3):
        captions = {f"{n:03d}.json": f"A woman walks her dog along the beach, number {n}" for n in range(200)}
        (tmp_path / "captions" / f"{shard:08d}.json").write_text(json.dumps(captions))
    with ollama_stub() as port:
        assert start_stage(tmp_path, "undisturbed", f"--ports={port}", "--host=127.0.0.1").wait(timeout=120) == 0
    folder = tmp_path / "endpoints"
    with ExitStack() as stack:
        deaths, logs = [ExitStack(), ExitStack()], [tmp_path / "first", tmp_path / "second", tmp_path / "third"]
        for death, log in zip(deaths, logs, strict=False):
            port = stack.enter_context(death).enter_context(ollama_stub(latency_s=0.1, log=log))
            stack.enter_context(registering(folder, port))
        wait_until(lambda: len(list(folder.glob("*.json"))) == 2)
        stage = start_stage(tmp_path, "prompts", f"--endpoints_dir={folder}")
        wait_until(lambda: all(log.exists() and log.stat().st_size for log in logs[:2]))
        time.sleep(0.5)
        deaths[0].close()  # SIGKILL
        time.sleep(0.5)
        port = stack.enter_context(ollama_stub(latency_s=0.02, log=logs[2]))
        stack.enter_context(registering(folder, port))
        deaths[1].close()
        _, errors = stage.communicate(timeout=120)
        assert stage.returncode == 0, errors
    assert logs[2].stat().st_size, "the one that came was asked"
    assert published(tmp_path / "prompts") == published(tmp_path / "undisturbed")
    assert all(len(json.loads(path.read_bytes())) == 200 for path in (tmp_path / "prompts").glob("*.json"))
    assert len(list((tmp_path / "prompts").glob("*.json"))) == 3


def test_a_stage_that_starts_first_waits_for_the_first_server(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "0.json").write_text(json.dumps({"a.json": "A woman walks her dog along the beach"}))
    flags = [f"--endpoints_dir={tmp_path}/endpoints", "--groups=none"]
    stage = start_stage(tmp_path, "prompts", *flags, "--endpoint_wait=1")
    _, errors = stage.communicate(timeout=120)
    assert stage.returncode == 2
    assert errors.splitlines()[-1].startswith("error: no model server registered within 1 s")
    stage = start_stage(tmp_path, "prompts", *flags)
    time.sleep(2.0)
    assert stage.poll() is None
    stage.send_signal(signal.SIGUSR1)
    assert stage.wait(timeout=120) == 75
    stage = start_stage(tmp_path, "prompts", *flags)
    time.sleep(1.0)
    with ollama_stub() as port, registering(tmp_path / "endpoints", port):
        assert stage.wait(timeout=120) == 0
    assert json.loads((tmp_path / "prompts" / "0.json").read_bytes()) == {
        "a.json": "A photo, A woman walks her dog along the beach"
    }


@pytest.mark.parametrize("other", ["--endpoints=http://h:1", "--embedded"])
def test_a_folder_and_other_servers_exclude_each_other(other: str, tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    stage = start_stage(tmp_path, "prompts", f"--endpoints_dir={tmp_path}", other)
    _, errors = stage.communicate(timeout=120)
    assert stage.returncode == 2
    assert "--endpoints_dir names the servers" in errors
