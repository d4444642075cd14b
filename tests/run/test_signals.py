"""A signal or the deadline before the first shard, while something is waited for: exit code 75 and a line."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from curation.cluster import StopSignal, stopped_at_once
from curation.errors import StoppedAtOnce
from tests import EXAMPLES, ROOT, processes
from tests.run.toy_runs import Place

SIGNALS = [signal.SIGUSR1, signal.SIGTERM]
AGAIN = "run the same command again"


def handles(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the process has a handler for a signal."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@contextlib.contextmanager
def silent_server() -> Iterator[tuple[int, threading.Event]]:
    """A server that takes connections and says nothing; the event is set by the first of them."""
    came = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    came.set()

        threading.Thread(target=listen, daemon=True).start()
        yield server.getsockname()[1], came
        for one in held:
            one.close()


def ends_with_75(
    command: Sequence[object], number: int, waits: threading.Event | None = None, **more: str
) -> list[str]:
    """Send the signal when the process waits; returns what it said.  waits: set when it does."""
    with processes.started([sys.executable, *command], stderr=subprocess.PIPE, more=more) as process:
        processes.wait_until(lambda: handles(process, number), "its handler", while_runs=process)
        if waits is not None:
            processes.wait_until(waits.is_set, "the wait", while_runs=process)
        process.send_signal(number)
        said = process.communicate(timeout=processes.PATIENCE_S)[1]
    assert process.returncode == 75, said
    return said.splitlines()


def captions(folder: Path) -> Path:
    folder.mkdir()
    (folder / "0.json").write_text('{"a.json": "A woman reads a newspaper in the park"}')
    return folder


@pytest.mark.parametrize("number", SIGNALS)
def test_stage_03_waits_for_the_groups_of_the_stage_that_it_follows(tmp_path: Path, number: int) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "edits").mkdir()
    folders = ["--input", tmp_path / "prompts", "--output", tmp_path / "edits"]
    command = [ROOT / "03_generate_images_multigpu.py", *folders, "--embedded", "--check", "group", "--follow"]
    said = ends_with_75(command, number)
    assert said[-1].endswith(f"stopped ({signal.Signals(number).name}) before the first shard: {AGAIN}")


def test_the_deadline_ends_that_wait_too(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "edits").mkdir()
    folders = ["--input", tmp_path / "prompts", "--output", tmp_path / "edits"]
    command = [ROOT / "03_generate_images_multigpu.py", *folders, "--embedded", "--check", "group", "--follow"]
    with processes.started([sys.executable, *map(str, command), "--deadline", "1s"], stderr=subprocess.PIPE) as process:
        said = process.communicate(timeout=processes.PATIENCE_S)[1]
    assert process.returncode == 75, said
    assert said.splitlines()[-1].endswith(f"stopped (deadline) before the first shard: {AGAIN}")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("02_captions_processor", signal.SIGUSR1),
        ("05_recaption", signal.SIGTERM),
        ("06_metadata", signal.SIGUSR1),
    ],
)
def test_a_server_that_says_nothing(tmp_path: Path, name: str, number: int) -> None:
    source, shards = captions(tmp_path / "captions"), EXAMPLES / "00000000.tar"
    with silent_server() as (port, waits):
        url = f"http://127.0.0.1:{port}"
        flags = {
            "02": ["--input", source, "--load_timeout", "600", "--timeout", "600", "--endpoints", url],
            "05": ["--input", shards, "--model", "endpoint:m", "--timeout", "600", "--endpoints", url],
            "06": [
                "--input",
                shards,
                "--models",
                "judge",
                "--judge",
                f"{{model: m, timeout: 600, endpoints: '{url}'}}",
            ],
        }
        said = ends_with_75([ROOT / f"{name}.py", "--output", tmp_path / "out", *flags[name[:2]]], number, waits)
    assert any(f"stopped ({signal.Signals(number).name}) with work left: {AGAIN}" in line for line in said[-5:])
    assert f"{name}: of 1 shards" in said[-1] and "1 left" in said[-1], said


def test_a_store_that_says_nothing_is_tried(tmp_path: Path) -> None:
    pytest.importorskip("boto3")
    with silent_server() as (port, waits):
        command = [
            ROOT / "04_reshard.py",
            "--input",
            EXAMPLES / "00000000.tar",
            "--output",
            tmp_path / "out",
            "--index",
        ]
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        keys |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        said = ends_with_75([*command, "--publish_to", "s3://bucket/x"], signal.SIGTERM, waits, **keys)
    assert said[-1].endswith(f"stopped (SIGTERM) before the first shard: {AGAIN}")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_model_that_is_being_loaded(tmp_path: Path, number: int) -> None:
    place = Place(tmp_path)
    place.shards(2)
    with processes.ended_at_last(place.start("--open_s", "600")) as process:
        processes.wait_until(lambda: place.lines("open"), "the loading", while_runs=process)
        process.send_signal(number)
        said = process.communicate(timeout=processes.PATIENCE_S)[1]
    assert process.returncode == 75, said
    assert f"stopped ({signal.Signals(number).name}) with work left: {AGAIN}" in said
    assert place.lines("close") == ["close"], "what was loaded is let go"
    assert place.litter() == []


def test_handlers_are_those_of_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(StoppedAtOnce, match="SIGUSR1"), stopped_at_once():
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is before
    own = StopSignal()
    with stopped_at_once():
        own.install()
    assert signal.getsignal(signal.SIGUSR1) == own._received, "whoever replaced them keeps the signals"
    signal.raise_signal(signal.SIGUSR1)
    assert own.draining, "outside of at_once it is only noted"
    signal.signal(signal.SIGUSR1, before)


def test_the_deadline_is_an_alarm() -> None:
    began = time.monotonic()
    with pytest.raises(StoppedAtOnce, match="deadline"), stopped_at_once(time.time() + 0.1):
        time.sleep(30)
    assert time.monotonic() - began < 20


def test_a_signal_that_comes_in_a_finalizer_is_not_lost() -> None:
    """Python ignores what is raised in one, as where an import gives its lock back: the wait would go on for ever."""
    program = """
import signal, time
from curation.cluster import stopped_at_once
from curation.errors import StoppedAtOnce

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

try:
    with stopped_at_once():
        del [Dying()][0]
        time.sleep(60)
except StoppedAtOnce as stopped:
    print("stopped by", stopped)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped by SIGTERM\n", "", 0)
