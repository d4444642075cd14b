"""Uploading to the hub, by the hub's real client, against a server that speaks its routes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import DatasetCard, metadata_load

from curation.__main__ import main as curation
from curation.errors import EXIT_OK, EXIT_SHARDS_FAILED, EXIT_USAGE, EXIT_WORK_LEFT, InfrastructureError, UsageError
from curation.publish import parts
from curation.publish import push as push_module
from curation.publish.card import write_card
from curation.publish.parts import Collection, collect
from curation.publish.push import GaveUp, Pushed, PushOptions, push
from curation.publish.repository import check_name
from tests import EXAMPLES, ROOT, processes
from tests.processes import ended_at_last, started, wait_until
from tests.servers.hub import Hub, serve
from tests.servers.hub_datasets import Fault
from tests.stages import recaption_stub as stub

IDS = [path.stem for path in sorted(EXAMPLES.glob("*.tar"))]
STAGE, REPO = "05_recaption", "somebody/captions"
TOKEN = "hf_" + "s3cr3tT0ken" * 3
PARQUET = [f"data/{shard}.parquet" for shard in IDS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage 05 makes of the examples, with a captioner of hashes."""
    out = tmp_path_factory.mktemp("made") / "captions"
    flags = ["-o", out, "--format", "jsonl,parquet,tar", "--batch_size", "4", "--device", "cpu", "--quiet"]
    command = [sys.executable, stub.__file__, EXAMPLES, *flags]
    subprocess.run(
        list(map(str, command)), check=True, cwd=ROOT, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "captions"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub_server:
        hub_server.datasets.token = TOKEN
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub_server


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def upload(folder: Path, waits: list[float]) -> Callable[..., Pushed]:
    """A push that notes how long it would have waited."""

    def go(**options: Any) -> Pushed:
        return push(folder, STAGE, REPO, PushOptions(**options), sleep=waits.append)

    return go


def everything_once(server: Hub, folder: Path) -> None:
    """Each part is in the repository as it is here, and no content was stored twice."""
    files = server.datasets.repos[REPO].files
    for shard in IDS:
        assert files[f"data/{shard}.parquet"] == (folder / "parquet" / f"{shard}.parquet").read_bytes()
        assert files[f"rows/{shard}.jsonl"] == (folder / "rows" / f"{shard}.jsonl").read_bytes()
        assert files[f"shards/{shard}.tar"] == (folder / "shards" / f"{shard}.tar").read_bytes()
    assert len(server.datasets.stored) == len(set(server.datasets.stored)) == 10
    assert len(files) == 15 + 2  # the card and .gitattributes


# ---- what is uploaded


def test_each_part_once_in_one_commit_under_its_shards_name(server: Hub, folder: Path, upload: Any) -> None:
    done = upload()
    everything_once(server, folder)
    assert (len(done.uploaded), done.unchanged, done.commits, done.card, done.created) == (15, 0, 1, True, True)
    assert done.bytes == sum(len(data) for path, data in server.datasets.repos[REPO].files.items() if "/" in path)
    assert server.datasets.repos[REPO].private


def test_again_makes_no_commit_and_sends_nothing(server: Hub, folder: Path, upload: Any) -> None:
    upload()
    commits = len(server.datasets.repos[REPO].commits)
    asked = len(server.datasets.asked)
    assert upload() == Pushed(REPO, f"{server.url}/datasets/{REPO}", unchanged=15)
    assert len(server.datasets.repos[REPO].commits) == commits
    assert not [line for line in server.datasets.asked[asked:] if not line.startswith(("GET", "HEAD"))]


def test_what_was_read_once_is_not_read_again(
    server: Hub, folder: Path, upload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload()
    read: list[str] = []
    real = parts._blocks
    monkeypatch.setattr(parts, "_blocks", lambda path: read.append(path.name) or real(path))
    log = folder / "_hub" / f"{STAGE}.contents.jsonl"
    upload()
    assert not read
    log.write_bytes(b"\x00garbage\n" + log.read_bytes()[:-20] + b"\n[1]\n[1, 2, 3, 4]\n")  # a dying writer, a full disk
    assert upload().unchanged == 15
    assert len(read) == 1


def test_only_what_receipts_of_done_shards_name(server: Hub, folder: Path, upload: Any) -> None:
    (folder / "parquet" / "99999999.parquet").write_bytes(b"in work")
    (folder / "parquet" / ".00000001.parquet.abc.tmp").write_bytes(b"in work")
    (receipt,) = folder.glob(f"_receipts/{STAGE}/*/{IDS[2]}.json")
    value = json.loads(receipt.read_bytes())
    receipt.write_text(json.dumps({**value, "status": "failed"}))
    upload()
    files = server.datasets.repos[REPO].files
    assert "data/99999999.parquet" not in files
    assert f"data/{IDS[2]}.parquet" not in files
    assert f"data/{IDS[1]}.parquet" in files
    assert not [path for path in files if path.startswith("_") or "tmp" in path]


def test_only_some(server: Hub, folder: Path, upload: Any) -> None:
    assert upload(only=("parquet/*",)).uploaded == tuple(PARQUET)
    assert upload(only=("rows/*",)).commits == 1
    card = server.datasets.repos[REPO].files["README.md"].decode()
    assert "data/&#42;.parquet" in card, "it tells of all that is there"
    assert "shards/" not in card
    assert [upload(only=(pattern,)).commits for pattern in ("parquet/*", "rows/*")] == [0, 0]


def test_a_file_that_is_not_what_its_receipt_says_is_left(server: Hub, folder: Path, upload: Any) -> None:
    victim = folder / "parquet" / f"{IDS[0]}.parquet"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (folder / "rows" / f"{IDS[1]}.jsonl").unlink()
    target = folder / "shards" / f"{IDS[2]}.tar"
    target.rename(folder / "elsewhere")
    target.symlink_to(folder / "elsewhere")
    done = upload()
    assert set(done.changed) == {PARQUET[0], f"rows/{IDS[1]}.jsonl", f"shards/{IDS[2]}.tar"}
    assert not set(done.changed) & server.datasets.repos[REPO].files.keys()
    assert curation(["publish", str(folder), "--repo", REPO, "--quiet"]) == EXIT_SHARDS_FAILED


def test_outputs_that_lead_out_of_the_folder_are_none(folder: Path) -> None:
    (receipt,) = folder.glob(f"_receipts/{STAGE}/*/{IDS[2]}.json")
    value = json.loads(receipt.read_bytes())
    names = ["../secrets.json", "/etc/passwd", "a/../../b", "x/.git/config", "x/a\nb.txt", "x//y", "_rejects/x.jsonl"]
    outputs = [{"path": name, "size": 1, "digest": "0"} for name in names]
    receipt.write_text(json.dumps({**value, "outputs": outputs}))
    found = collect(folder, STAGE)
    assert (found.elsewhere, found.unnamed) == (3, 3)
    assert not [part for part in found.parts.values() if part.shard_id == IDS[2]]


def test_a_part_that_was_made_anew_replaces_the_old_one(server: Hub, folder: Path, upload: Any) -> None:
    upload()
    remake(folder, IDS[0], b"another table")
    done = upload()
    assert (done.uploaded, done.commits, done.unchanged) == ((PARQUET[0],), 1, 14)
    assert server.datasets.repos[REPO].files[PARQUET[0]] == b"another table"


def remake(folder: Path, shard: str, data: bytes) -> None:
    (folder / "parquet" / f"{shard}.parquet").write_bytes(data)
    (path,) = folder.glob(f"_receipts/{STAGE}/*/{shard}.json")
    receipt = json.loads(path.read_bytes())
    for output in receipt["outputs"]:
        if output["path"].endswith(".parquet"):
            output.update(size=len(data), digest=parts.xxhash.xxh3_128_hexdigest(data))
    path.write_text(json.dumps(receipt))


def test_parts_of_shards_that_are_gone_stay_unless_pruned(server: Hub, folder: Path, upload: Any) -> None:
    upload()
    (receipt,) = folder.glob(f"_receipts/{STAGE}/*/{IDS[4]}.json")
    receipt.unlink()
    repo = server.datasets.repos[REPO]
    repo.commit("by hand", {"notes.parquet": b"1", "data/read me.parquet": b"2", "extra/1.parquet": b"3"})
    assert upload().removed == ()
    assert PARQUET[4] in repo.files
    would = upload(prune=True, dry_run=True)
    assert would.removed == (PARQUET[4], f"rows/{IDS[4]}.jsonl", f"shards/{IDS[4]}.tar")
    assert upload(prune=True).removed == would.removed
    assert {"notes.parquet", "data/read me.parquet", "extra/1.parquet", *PARQUET[:4]} <= repo.files.keys()
    assert not set(would.removed) & repo.files.keys()
    assert upload(prune=True).commits == 0


def test_commits_are_bounded(server: Hub, folder: Path, upload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module, "MAX_COMMIT_FILES", 4)
    server.datasets.page = 3  # the listing comes in pages too
    assert upload().commits == 4
    assert [len(commit.added) for commit in server.datasets.repos[REPO].commits] == [1, 4, 4, 4, 4]
    everything_once(server, folder)
    assert server.datasets.count("GET .*/tree/") == 1, "listed once"
    assert upload().commits == 0


def test_a_dry_run_lists_and_changes_nothing(server: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curation(["publish", str(folder), "--repo", REPO, "--dry_run", "--quiet"]) == EXIT_OK
    told = capsys.readouterr().out
    assert all(path in told for path in PARQUET)
    assert "15 files" in told
    assert "would be created" in told
    assert not server.datasets.repos
    assert not [line for line in server.datasets.asked if not line.startswith(("GET", "HEAD"))]


# ---- the repository


def test_public_only_when_asked_and_what_is_there_stays(server: Hub, folder: Path, upload: Any) -> None:
    upload(public=True)
    assert not server.datasets.repos[REPO].private
    upload()
    assert not server.datasets.repos[REPO].private


def test_a_name_without_owner_is_ones_own(server: Hub, folder: Path) -> None:
    assert push(folder, STAGE, "captions", PushOptions(only=("parquet/*",))).repo == "somebody/captions"
    assert REPO in server.datasets.repos


@pytest.mark.parametrize(
    "name", ["", "/", "a/b/c", "a/", "../x", "a/..", "a/b--c", "a/b.git", "a b/c", "https://x/y", "-a/b"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a repository"):
        check_name(name)


def test_offline_and_without_a_token(
    folder: Path, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", str(folder), "--repo", REPO]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert curation(command) == EXIT_USAGE
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert curation(command) == EXIT_USAGE
    assert "hf auth login" in capsys.readouterr().err
    assert curation([*command, "--dry_run", "--quiet"]) == EXIT_OK  # a dry run lists what the folder has
    told = capsys.readouterr()
    assert all(path in told.out for path in PARQUET)
    assert "15 files" in told.out
    assert "the repository's present files are not checked" in told.err
    assert curation([*command, "--dry_run", "--only", "nothing/*"]) == EXIT_USAGE
    assert not server.datasets.asked


def test_a_dry_run_where_the_hub_does_not_answer(
    folder: Path, server: Hub, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.datasets.faults = [Fault("GET ", status=503) for _ in range(9)]
    assert curation(["publish", str(folder), "--repo", REPO, "--dry_run", "--quiet"]) == EXIT_OK
    assert "15 files" in capsys.readouterr().out
    assert not waits


def test_a_folder_without_a_stage_or_with_several(
    folder: Path, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curation(["publish", str(folder / "parquet"), "--repo", REPO]) == EXIT_USAGE
    assert "no stage has run here" in capsys.readouterr().err
    shutil.copytree(folder / "_receipts" / STAGE, folder / "_receipts" / "06_other")
    assert curation(["publish", str(folder), "--repo", REPO]) == EXIT_USAGE
    assert "--stage" in capsys.readouterr().err
    assert curation(["publish", str(folder.parent), "--repo", REPO, "--stage", STAGE, "--json", "--quiet"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["commits"] == 1


# ---- what goes wrong on the way


def test_a_busy_hub_is_left_for_as_long_as_it_asks(server: Hub, folder: Path, upload: Any, waits: list[float]) -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    server.datasets.faults = [
        Fault("GET .*/revision/", status=429, headers={"Retry-After": "7"}),
        Fault("POST .*/repos/create", status=503, headers={"Retry-After": soon}),
        Fault("POST .*/preupload/", status=429, headers={"RateLimit": '"api";r=0;t=55'}),
        Fault("PUT /lfs/", status=500),
    ]
    upload()
    everything_once(server, folder)
    assert [7 < waits[0] <= 8, 97 < waits[1] <= 101, 55 < waits[2] <= 56] == [True] * 3
    assert len(waits) == 4
    assert 0 < waits[3] <= 16


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /lfs/", times=2, cut_after=100),
        Fault("POST .*/commit/", status=500),
        Fault("POST .*/commit/", cut_after=50),
        Fault("POST .*/batch", status=502),
        Fault("POST .*/commit/", status=409),
        Fault("GET .*/tree/", status=504),
        Fault("POST .*/batch", status=200, body={"objects": "none"}),
        Fault("POST .*/commit/", status=200, body={"what": "else"}),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.status or fault.cut_after}",
)
def test_whatever_breaks_off_is_taken_up(server: Hub, folder: Path, upload: Any, fault: Fault) -> None:
    server.datasets.faults = [fault]
    upload()
    everything_once(server, folder)
    assert not fault.times
    assert len(server.datasets.repos[REPO].commits) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_again(server: Hub, folder: Path, upload: Any) -> None:
    server.datasets.faults = [Fault("POST .*/commit/", unheard=True)]
    upload()
    everything_once(server, folder)
    assert len(server.datasets.repos[REPO].commits) == 2


def test_somebody_else_commits_in_between(server: Hub, folder: Path, upload: Any, waits: list[float]) -> None:
    def other() -> None:
        server.datasets.repos[REPO].commit("another", {"notes.txt": b"mine", PARQUET[0]: b"something else"})

    server.datasets.faults = [Fault("POST .*/commit/", before=other)]
    upload()
    repo = server.datasets.repos[REPO]
    assert repo.files["notes.txt"] == b"mine"
    assert repo.files[PARQUET[0]] == (folder / "parquet" / f"{IDS[0]}.parquet").read_bytes()
    assert len(repo.commits) == 3
    assert len(waits) == 1


def test_several_at_once(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of as many nodes: each part is there once and as it is here."""
    server.datasets.faults = [Fault("POST .*/(commit|preupload)/", times=99, delay_s=0.05)]
    command = [sys.executable, "-m", "curation", "publish", str(folder), "--repo", REPO, "--json", "--quiet"]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1"}
    pushers = [processes.start(command, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    with ended_at_last(*pushers):
        results = [json.loads(pusher.communicate(timeout=120)[0]) for pusher in pushers]
    repo = server.datasets.repos[REPO]
    assert len(repo.commits) == 2
    assert {path for result in results for path in result["uploaded"]} == {path for path in repo.files if "/" in path}
    for path in PARQUET:
        assert repo.files[path] == (folder / "parquet" / path.partition("/")[2]).read_bytes()


def test_killed_in_the_middle_and_started_again(server: Hub, folder: Path) -> None:
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "curation", "publish", str(folder), "--repo", REPO, "--json", "--quiet"]
    server.datasets.faults = [Fault("PUT /lfs/", times=99, delay_s=0.5)]
    with started(command, env=environment) as first:  # SIGKILL
        wait_until(lambda: len(server.datasets.stored) >= 4, "four of ten files", while_runs=first)
    time.sleep(1)  # those in the server's hands
    before = len(server.datasets.stored)
    assert 4 <= before < 10
    server.datasets.faults = []
    push(folder, STAGE, REPO)
    everything_once(server, folder)
    assert len(server.datasets.repos[REPO].commits) == 2


def test_it_gives_up_and_the_next_goes_on(
    server: Hub, folder: Path, upload: Any, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.datasets.faults = [Fault("POST .*/commit/", times=99, status=503)]
    with pytest.raises(GaveUp, match="tried 6 times"):
        upload()
    assert len(waits) == 5
    assert waits[4] > waits[0]
    with pytest.raises(GaveUp, match="asks to wait 3,600 s"):
        server.datasets.faults = [Fault("GET ", status=429, headers={"Retry-After": "3600"})]
        upload()
    server.datasets.faults = [Fault("POST .*/commit/", status=503)]
    assert curation(["publish", str(folder), "--repo", REPO, "--tries", "1"]) == EXIT_WORK_LEFT
    assert "run the same command again" in capsys.readouterr().err
    upload()
    everything_once(server, folder)


@pytest.mark.parametrize("kind", ["wrong token", "read only", "read only, new"])
def test_a_token_without_rights_is_refused_at_once(
    server: Hub, folder: Path, kind: str, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    if kind == "wrong token":
        server.datasets.token = "hf_another"
    else:
        server.datasets.read_only = True
        if kind == "read only":
            server.datasets.read_only = False
            push(folder, STAGE, REPO, PushOptions(only=("rows/*",)))
            server.datasets.read_only = True
    assert curation(["publish", str(folder), "--repo", REPO]) == EXIT_USAGE
    told = "".join(capfd.readouterr())
    assert "token" in told
    assert "s3cr3t" not in told
    assert TOKEN not in told


# ---- secrets


def test_no_secret_is_told_or_kept(
    server: Hub, folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "curation")
    server.datasets.faults = [
        Fault("PUT /lfs/", cut_after=10),
        Fault("POST .*/commit/", status=422, body={"error": f"Bearer {TOKEN} and {TOKEN}"}),
    ]
    command = ["publish", str(folder), "--repo", REPO]
    assert curation(command) == EXIT_USAGE
    assert curation(command) == EXIT_OK
    told = "".join(capfd.readouterr()) + caplog.text
    assert "refuses this" in told
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    held = b"".join(server.datasets.repos[REPO].files.values())
    for secret in (TOKEN, "s3cr3t"):
        assert secret not in told
        assert secret.encode() not in kept + held


# ---- the card


def test_the_card_is_read_by_the_hubs_own_reader(server: Hub, folder: Path, upload: Any, tmp_path: Path) -> None:
    upload(licence="cc-by-4.0")
    card = tmp_path / "README.md"
    card.write_bytes(server.datasets.repos[REPO].files["README.md"])
    loaded = DatasetCard.load(card)
    rows = sum(len((folder / "rows" / f"{shard}.jsonl").read_bytes().splitlines()) for shard in IDS)
    assert metadata_load(card) == {
        "license": "cc-by-4.0",
        "size_categories": ["n<1K"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    assert f"**{rows}** samples in 5 shards" in loaded.text
    for word in (
        "data/&#42;.parquet",
        "vlm&#95;caption",
        "<code>model</code> | florence-community/Florence-2-base",
        "revision",
    ):
        assert word in loaded.text, word
    assert upload().commits == 0, "the licence is remembered"


def test_what_others_wrote_into_the_card_stays(server: Hub, folder: Path, upload: Any) -> None:
    upload()
    repo = server.datasets.repos[REPO]
    text = repo.files["README.md"].decode()
    text = text.replace("---\n# curation", "---\nlicense: mit\ntags:\n- mine  # a remark\n# curation", 1)
    text = text.replace("# captions\n", "# My captions\n\nWritten by hand.\r\n") + "\n## Below\n"
    repo.commit("by hand", {"README.md": text.encode()})
    (receipt,) = folder.glob(f"_receipts/{STAGE}/*/{IDS[4]}.json")
    receipt.unlink()
    assert upload(licence="cc0-1.0").card
    now = repo.files["README.md"].decode()
    assert "in 4 shards" in now
    assert now.startswith("---\nlicense: mit\ntags:\n- mine  # a remark\n# curation:begin")
    assert "# My captions\n\nWritten by hand.\r\n" in now
    assert now.endswith("\n\n## Below\n")
    assert now.count("license:") == 1
    assert now.count("curation:begin") == 2
    assert upload().commits == 0


def test_a_card_without_blocks_gets_them(made: Path) -> None:
    found = collect(made, STAGE)
    for before in (
        "# Mine\n",
        "---\nlanguage: en\n---\n# Mine\n",
        "---\n---\n# Mine\n",
        "---\r\nlanguage: en\r\n---\r\n# Mine\r\n",
    ):
        once = write_card(before, found, made, STAGE)
        assert once == write_card(once, found, made, STAGE)
        assert "# Mine" in once
        metadata = yaml.safe_load(once.split("---")[1])
        assert metadata["license"] == "unknown"
        assert metadata.get("language") == ("en" if "language" in before else None)
    for bad in ("---\na: [\n---\n", "---\n- a\n---\n", "---\n" + "[" * 5000 + "\n---\n"):
        with pytest.raises(InfrastructureError, match="metadata of the card"):
            write_card(bad, found, made, STAGE)


def test_data_cannot_write_into_the_card(tmp_path: Path) -> None:
    hostile = "a|b`<script>](http://x) <!-- curation:end -->\n---\nlicense: mit\x1b[31m"
    home = tmp_path / "out"
    (home / "rows").mkdir(parents=True)
    (home / "rows" / "x.jsonl").write_text(json.dumps({hostile: 1}) + "\n")
    epoch = home / "_receipts" / "stage" / "_epoch.1.json"
    epoch.parent.mkdir(parents=True)
    epoch.write_text(json.dumps({"options": {hostile: hostile, "where": "/home/me/model", "none": None}}))
    part = parts.Part("rows/x.jsonl", "rows/x.jsonl", home / "rows" / "x.jsonl", 1, None, "x")
    text = write_card("", Collection(parts={part.path: part}, epochs={1}), home, "stage")
    assert text.count("curation:end -->") == 1
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "/home/me" not in text
    assert list(yaml.safe_load(text.split("---")[1])) == ["license", "size_categories", "configs"]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {3, 5}
    assert write_card(text, Collection(parts={part.path: part}, epochs={1}), home, "stage") == text


@pytest.mark.parametrize(
    ("samples", "category"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**13, "n>1T")]
)
def test_size_categories(made: Path, samples: int, category: str) -> None:
    found = collect(made, STAGE)
    found.counts["kept"] = samples
    assert f"- {category}\n" in write_card("", found, made, STAGE)


def test_a_card_that_the_hub_refuses(server: Hub, upload: Any) -> None:
    with pytest.raises(InfrastructureError, match="Invalid metadata"):
        upload(licence="Some Licence!")
