"""Stage 05 uploads while it captions: whatever the hub does, the captions are whole and the exit code is theirs."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from curation.cluster import Allocation
from curation.errors import EXIT_WORK_LEFT, UsageError
from curation.publish.background import HubOptions, Pushing
from tests import EXAMPLES
from tests.backends.tiny_captioners import save_florence2
from tests.processes import started, wait_until
from tests.servers.hub import Hub, serve
from tests.servers.hub_datasets import Fault
from tests.stages import recaption_stub as stub

IDS = [path.stem for path in sorted(EXAMPLES.glob("*.tar"))]
REPO = "somebody/captions"
TOKEN = "hf_" + "s3cr3tT0ken" * 3
FLAGS = ["--batch_size", "4", "--dataloader_num_workers", "2", "--lease_s", "2", "--hf_repo", REPO]
DOWN = Fault("", times=10**6, status=503, headers={"Retry-After": "0"})


pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        hub.datasets.token = TOKEN
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield hub


def captions(out: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (out / "captions.jsonl").read_text("utf-8").splitlines()]


def test_parts_are_uploaded_while_the_stage_runs_and_the_rest_at_the_end(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURATION_STUB_S", "0.15")
    flags = [*FLAGS, "--push_every", "1", "--format", "parquet,tar", "--device", "cpu"]
    assert stub.main([str(EXAMPLES), "-o", str(tmp_path), *flags]) == 0
    repo = server.datasets.repos[REPO]
    assert repo.private
    first, *_ = (path for path in repo.commits[1].added if path.startswith("data/"))
    assert len([path for path in repo.commits[1].added if path.startswith("data/")]) < len(IDS), "before the end"
    for shard in IDS:
        assert repo.files[f"data/{shard}.parquet"] == (tmp_path / "parquet" / f"{shard}.parquet").read_bytes()
        assert repo.files[f"shards/{shard}.tar"] == (tmp_path / "shards" / f"{shard}.tar").read_bytes()
    assert not [path for path in repo.files if path.startswith("rows/")], "only the formats that were asked for"
    assert len(server.datasets.stored) == len(set(server.datasets.stored)) == 2 * len(IDS)
    assert first.startswith("data/")


def test_a_hub_that_is_down_costs_a_warning(
    server: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, any_text: None
) -> None:
    """With a tiny Florence-2 that the real code loads."""
    save_florence2(tmp_path / "model")
    server.datasets.faults = [DOWN]
    flags = [*FLAGS, "--push_every", "1", "--max_tokens", "4", "--device", "cpu"]
    stage = importlib.import_module("05_recaption")
    code = stage.main([str(EXAMPLES), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "model"), *flags])
    told = "".join(capfd.readouterr()) + caplog.text
    assert code == 0
    assert len(captions(tmp_path / "out")) == 76
    assert "not all is uploaded, captions are not concerned: somebody/captions: the hub answers HTTP 503" in told
    assert not server.datasets.repos
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in told
    assert TOKEN.encode() not in kept
    server.datasets.faults = []
    assert stage.main([str(EXAMPLES), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "model"), *flags]) == 0
    assert {f"rows/{shard}.jsonl" for shard in IDS} < server.datasets.repos[REPO].files.keys(), "by the next start"


def test_several_workers_leave_the_last_push_to_the_one_that_started_them(server: Hub, tmp_path: Path) -> None:
    command = [sys.executable, stub.__file__, EXAMPLES, "-o", tmp_path, *FLAGS, "--workers", "2"]
    with started(command) as process:
        assert process.wait() == 0
    repo = server.datasets.repos[REPO]
    assert {f"rows/{shard}.jsonl" for shard in IDS} < repo.files.keys()
    assert len(repo.commits) == 2


def test_a_hub_that_hangs_does_not_hold_the_stage(server: Hub, tmp_path: Path) -> None:
    """A signal ends the last push; what was captioned stays and the exit code is the stage's."""
    server.datasets.faults = [Fault("", times=99, delay_s=3600)]
    command = [sys.executable, stub.__file__, EXAMPLES, "-o", tmp_path, *FLAGS, "--device", "cpu"]
    with started(command, stderr=subprocess.PIPE) as running:
        wait_until(lambda: server.datasets.asked, "a request", while_runs=running)
        running.send_signal(signal.SIGTERM)
        _, told = running.communicate()
    assert running.returncode == 0
    assert "SIGTERM: not all is uploaded" in told
    assert len(captions(tmp_path)) == 76


def test_what_is_being_uploaded_is_broken_off_at_the_end(server: Hub, tmp_path: Path) -> None:
    server.datasets.faults = [Fault("", times=99, delay_s=3600)]
    assert stub.main([str(EXAMPLES), "-o", str(tmp_path), *FLAGS[:-2], "--device", "cpu", "--quiet"]) == 0
    pushing = Pushing(HubOptions(hf_repo=REPO, push_every=10), tmp_path, "05_recaption")
    pushing.begin(Allocation(rank=0, world=2))
    pushing.saw(4)
    time.sleep(0.2)  # time for it to begin, if it were to: a busy machine cannot make this fail
    assert not server.datasets.asked
    pushing.saw(1)  # five of this process's, as many of the other's
    wait_until(lambda: server.datasets.asked, "a request")
    pushing.end()  # and not after the hour that the hub takes for its answer
    pushing.finish(EXIT_WORK_LEFT)
    assert len(server.datasets.asked) == 1


def test_one_process_of_a_run_uploads_meanwhile(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Pushing(HubOptions(hf_repo=REPO, push_every=1), tmp_path, "05_recaption")
    second.begin(Allocation(rank=1, world=2))
    second.saw(1000)
    second.end()
    monkeypatch.setenv("CURATION_WORKER", "1/2")
    second.finish(0)
    assert not server.datasets.asked


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--hf_repo", "a/b/c"], "not the name of a repository"),
        (["--hf_repo", "a/b", "--hf_username", "c"], "not of --hf_username"),
        (["--push_every", "0"], "--push_every must be at least 1"),
    ],
)
def test_flags_that_make_no_sense(
    server: Hub, tmp_path: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stub.main([str(EXAMPLES), "-o", str(tmp_path), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_it_goes(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HubOptions(hf_repo="Recap", hf_username="me").repository == "me/Recap"
    assert HubOptions(hf_repo="me/Recap", hf_username="me").repository == "me/Recap"
    assert HubOptions(hf_repo="Recap").repository == "Recap"
    assert HubOptions(hf_username="me").repository is None
    assert HubOptions(hf_repo="x/y", push=False).repository is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    HubOptions(hf_repo="x/y", push=False).check_hub()
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        HubOptions(hf_repo="x/y").check_hub()


def test_nothing_is_uploaded_by_a_trial_or_a_dry_run(server: Hub, tmp_path: Path) -> None:
    for flags in (["--smoke", "1"], ["--dry_run"], ["--no_push"]):
        assert stub.main([str(EXAMPLES), "-o", str(tmp_path), *FLAGS, "--device", "cpu", "--quiet", *flags]) == 0
    assert not server.datasets.asked
    assert os.environ["HF_TOKEN"] == TOKEN
