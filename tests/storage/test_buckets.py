"""Outputs in a bucket of a real S3 server: whole or not at all, whatever breaks and whoever is killed."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from fsspec.implementations.local import LocalFileSystem

from curation.errors import InfrastructureError, LostClaim, UsageError
from curation.run.commit import Commit, has_obsolete_outputs, remove_obsolete
from curation.shards import bucket_of, discover
from curation.storage import buckets, remote_read
from curation.storage.buckets import RemoteOutput, remote_folder
from curation.storage.files import fast_digest
from curation.storage.retry import RetryPolicy
from curation.storage.urls import Url
from curation.tar.samples import TarWriter, read_samples
from tests import ROOT, processes
from tests.processes import wait_until
from tests.servers import photo_server
from tests.servers.relay import Relay, Rule

stage_04 = importlib.import_module("04_reshard")
NAME = "04_reshard"
PART = 64 << 10
KEYS = 6
COMPLETE, PUT, BEGIN = r"^POST /\S*\?uploadId=", r"^PUT /\S*partNumber=", r"^POST /\S*\?uploads"


# ---- the bucket


@dataclass
class Store:
    client: Any
    relay: Relay

    def objects(self) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket="out").get("Contents", [])
        return {o["Key"]: self.client.get_object(Bucket="out", Key=o["Key"])["Body"].read() for o in found}

    def uploads(self) -> list[str]:
        return [u["Key"] for u in self.client.list_multipart_uploads(Bucket="out").get("Uploads", [])]


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    import boto3
    import s3fs
    from moto.s3 import models
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    relay = Relay(port)
    told = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}", "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "opensesame", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        patch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1000)  # so that a small shard has several parts
        s3fs.S3FileSystem.clear_instance_cache()  # those of another server
        yield Store(boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}"), relay)
    s3fs.S3FileSystem.clear_instance_cache()
    relay.close()
    moto.stop()


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty bucket ``out``; parts are small and waits short, and this process has its signal handlers back."""
    import s3fs

    monkeypatch.setattr(buckets, "PART_BYTES", PART)
    monkeypatch.setattr(remote_read, "RETRIES", RetryPolicy(tries=3, first_wait_s=0.01, longest_wait_s=0.05))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)}
    server.client.create_bucket(Bucket="out")
    server.relay.reset()
    yield server
    server.relay.reset()
    for upload in server.client.list_multipart_uploads(Bucket="out").get("Uploads", []):
        server.client.abort_multipart_upload(Bucket="out", Key=upload["Key"], UploadId=upload["UploadId"])
    for key in server.objects():
        server.client.delete_object(Bucket="out", Key=key)
    server.client.delete_bucket(Bucket="out")
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- shards and runs


def tar_of(keys: list[str], size: int, text: bytes = b"a caption") -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    for key in keys:
        for suffix, data in (
            ("jpg", b"\xff\xd8\xff" + random.Random(key).randbytes(size)),
            ("txt", text),
            ("json", b"{}"),
        ):
            writer.add(f"{key}.{suffix}", data)
    writer.close()
    return file.getvalue()


class Place:
    """Two source shards of about five parts each, an edit for every second sample, and the output folder."""

    def __init__(self, root: Path, ids: tuple[str, ...] = ("00000000", "00000001")) -> None:
        self.root, self.out, self.ids = root, root / "out", ids
        self.source, self.edits = root / "shards", root / "edits"
        self.source.mkdir(parents=True)
        self.edits.mkdir()
        for shard in ids:
            keys = [f"{shard}{number}" for number in range(KEYS)]
            (self.source / f"{shard}.tar").write_bytes(tar_of(keys, 50_000))
            self.edit(shard, b"rewritten")

    def edit(self, shard: str, text: bytes) -> None:
        keys = [f"{shard}{number}" for number in range(0, KEYS, 2)]
        (self.edits / f"{shard}.tar").write_bytes(tar_of(keys, 40_000, text))

    def arguments(self, *more: object, out: Path | None = None) -> list[str]:
        folders = ["--input", self.source, "--edits", self.edits, "--output", out or self.out]
        return [str(word) for word in (*folders, "--quiet", "--lease_s", "1", *more)]

    def run(self, *more: object) -> int:
        return int(stage_04.main(self.arguments("--publish_to", "s3://out/hybrid", *more)))

    def wanted(self) -> dict[str, bytes]:
        """What a run on this machine alone makes."""
        local = self.root / "local"
        assert stage_04.main(self.arguments("--rerun", out=local)) == 0
        return {f"hybrid/{shard}.tar": (local / f"{shard}.tar").read_bytes() for shard in self.ids}

    def receipt(self, shard: str) -> dict[str, Any]:
        text = (self.out / "_receipts" / NAME / bucket_of(shard) / f"{shard}.json").read_text()
        return dict(json.loads(text))

    def files(self) -> list[str]:
        """Everything in --output that is not a record of the runs'."""
        return sorted(
            str(path.relative_to(self.out))
            for path in self.out.rglob("*")
            if path.is_file() and path.relative_to(self.out).parts[0] not in ("_receipts", "_plan", "_claims")
        )

    def start(self, *more: object) -> subprocess.Popen[str]:
        """In a process of its own, which can be killed."""
        code = (
            "import sys, importlib; from curation.storage import buckets; "
            f"buckets.PART_BYTES = {PART}; sys.exit(importlib.import_module('04_reshard').main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, *self.arguments("--publish_to", "s3://out/hybrid", *more)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return processes.start(command, env=environment, stderr=subprocess.PIPE)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def insist_on(place: Place, store: Store) -> None:
    """The bucket holds what a run on this machine makes, the receipts say so, and nothing lies about."""
    assert store.objects() == place.wanted()
    assert store.uploads() == []
    assert place.files() == []
    for shard in place.ids:
        (output,) = place.receipt(shard)["outputs"]
        assert output["path"] == f"s3://out/hybrid/{shard}.tar"
        back = place.root / "back.tar"
        store.client.download_file("out", f"hybrid/{shard}.tar", str(back))
        assert (output["size"], output["digest"]) == (back.stat().st_size, fast_digest(back))
    hidden = [path.name for path in (place.out / "_receipts").rglob(".*")]
    assert not hidden, "a record or a prepared receipt is left"


# ---- runs


def test_a_bucket_gets_the_bytes_of_a_local_run_and_no_disk_does(place: Place, store: Store) -> None:
    assert place.run() == 0
    insist_on(place, store)
    assert sum(bool(line.startswith("PUT")) for line in store.relay.asked) >= 10, "in several parts"
    before = len(store.relay.asked)
    assert place.run() == 0  # nothing to do
    asked = store.relay.asked[before:]
    assert len(asked) == 2, asked  # of the folder: whose shards lie there, and that every object does
    found = discover("s3://out/hybrid/")
    assert [shard.id for shard in found] == list(place.ids)
    assert [s.key for s in read_samples(found[0].path)] == [f"{place.ids[0]}{n}" for n in range(KEYS)]


@pytest.mark.parametrize(
    ("which", "what"),
    [
        (BEGIN, "before"),
        (BEGIN, "after"),
        (PUT + "2", "before"),
        (PUT + "2", "midway"),
        (PUT + "2", "after"),
        (COMPLETE, "before"),
        (COMPLETE, "midway"),
        (COMPLETE, "after"),
    ],
    ids=lambda text: {BEGIN: "begin", COMPLETE: "completion"}.get(text, text.replace(PUT, "part ")),
)
def test_connections_that_are_cut_are_taken_up(tmp_path: Path, store: Store, which: str, what: Any) -> None:
    place = Place(tmp_path, ("00000000",))
    store.relay.rules = [Rule(which, what, times=2)]
    assert place.run() == 0
    insist_on(place, store)
    assert store.relay.rules[0].times == 0


def test_a_store_that_stays_away_ends_the_run_and_the_next_one_goes_on(place: Place, store: Store, capsys: Any) -> None:
    store.relay.rules = [Rule(PUT + "3", "midway", times=99)]
    assert place.run() == 2
    assert "s3://out/hybrid/00000000.tar: the store cannot be reached, 3 times: " in capsys.readouterr().err
    assert store.objects() == {}
    assert store.uploads() == [], "the attempt took its upload back"
    store.relay.reset()
    assert place.run() == 0
    insist_on(place, store)


@pytest.mark.parametrize("when", ["before the commit", "in the commit"])
def test_a_run_that_is_killed(place: Place, store: Store, when: str) -> None:
    """Nothing is seen before the commit.  After it, whoever comes next completes the upload of the dead."""
    killed: list[int] = []

    def kill() -> None:
        if when == "in the commit":
            assert list((place.out / "_receipts").rglob(".*.commit")), "the commit is recorded before the completion"
        process.send_signal(signal.SIGKILL)
        killed.append(process.wait())

    which = COMPLETE if when == "in the commit" else PUT + "4"
    store.relay.rules = [Rule(which, "before", then=kill)]
    process = place.start()
    process.communicate()
    assert killed == [-signal.SIGKILL]
    assert store.objects() == {}
    assert store.uploads() == ["hybrid/00000000.tar"]
    store.relay.reset()
    assert place.run() == 0
    insist_on(place, store)
    begun = [line for line in store.relay.asked if line.startswith("POST /out/hybrid/00000000.tar?uploads")]
    assert len(begun) == (0 if when == "in the commit" else 1), "what was committed is not made again"


def test_an_answer_that_is_lost_with_the_process(place: Place, store: Store) -> None:
    """The store has completed the upload, and nobody has been told: the commit is finished all the same."""
    store.relay.rules = [Rule(COMPLETE, "after", then=lambda: None)]
    process = place.start()
    wait_until(store.objects, "the object", while_runs=process)
    process.kill()
    process.communicate()
    store.relay.reset()
    assert place.run() == 0
    insist_on(place, store)


@pytest.mark.soak
def test_two_workers_that_are_killed_again_and_again(tmp_path: Path, store: Store) -> None:
    """At any moment.  The one that lives to the end leaves what a quiet run leaves."""
    place, dice = Place(tmp_path, tuple(f"{number:08d}" for number in range(12))), random.Random(7)
    for number in range(25):
        for shard in dice.sample(place.ids, 8):
            place.edit(shard, b"rewritten %d" % number)
        processes = [place.start() for _ in range(2)]
        time.sleep(dice.uniform(0.4, 1.4))
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
        there = store.objects()
        assert all(len(data) % 512 == 0 and data[-1024:] == bytes(1024) for data in there.values()), "whole tars"
    assert place.run() == 0
    insist_on(place, store)


def test_two_workers_at_once(tmp_path: Path, store: Store) -> None:
    place = Place(tmp_path, tuple(f"{number:08d}" for number in range(6)))
    processes = [place.start() for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 2
    insist_on(place, store)


def test_a_changed_edit_replaces_the_object_in_one_step(place: Place, store: Store) -> None:
    assert place.run() == 0
    first = store.objects()
    place.edit("00000000", b"rewritten again")
    during: list[dict[str, bytes]] = []
    store.relay.rules = [Rule(COMPLETE, then=lambda: during.append(store.objects()))]
    assert place.run() == 0
    assert during == [first], "until then the old one is there"
    insist_on(place, store)
    assert {key for key, data in store.objects().items() if data != first[key]} == {"hybrid/00000000.tar"}
    assert place.receipt("00000000")["generation"] == 2


def test_objects_that_are_gone_or_are_others_are_made_again(place: Place, store: Store) -> None:
    assert place.run() == 0
    store.client.delete_object(Bucket="out", Key="hybrid/00000000.tar")
    store.client.put_object(Bucket="out", Key="hybrid/00000001.tar", Body=b"somebody else's")
    assert place.run() == 0
    insist_on(place, store)


def test_another_place_needs_a_rerun_which_clears_the_old_one(place: Place, store: Store, capsys: Any) -> None:
    assert place.run() == 0
    wanted = place.wanted()
    elsewhere = ("--publish_to", "s3://out/elsewhere")
    assert stage_04.main(place.arguments(*elsewhere)) == 2
    assert "publish_to" in capsys.readouterr().err
    assert stage_04.main(place.arguments(*elsewhere, "--rerun")) == 0
    assert store.objects() == {key.replace("hybrid", "elsewhere"): data for key, data in wanted.items()}
    assert stage_04.main(place.arguments("--rerun")) == 0  # and back to the disk
    assert store.objects() == {}
    assert place.files() == [f"{shard}.tar" for shard in place.ids]
    assert place.run("--rerun") == 0
    insist_on(place, store)


# ---- the protocol


URL = "s3://out/hybrid/7.tar"


def commit_of(root: Path) -> Commit:
    return Commit(root, root / "_receipts", "7")


def write(token: str, data: bytes) -> RemoteOutput:
    with RemoteOutput(Url(URL), token) as output:
        output.write(data)
    return output


def receipt_of(root: Path, output: RemoteOutput, token: str, generation: int, *superseded: str) -> dict[str, Any]:
    outputs = [output.published(root, checked=True).record()]
    return {
        "token": token, "generation": generation, "status": "done", "outputs": outputs, "superseded": [*superseded],
    }  # fmt: skip


def test_a_finisher_that_wakes_up_late_changes_nothing(tmp_path: Path, store: Store) -> None:
    """It had read the record of a commit that others have finished, and that a newer one has followed."""
    first = receipt_of(tmp_path, write("a", b"first"), "a", 1)
    commit_of(tmp_path).write(first)
    second = receipt_of(tmp_path, write("b", b"second"), "b", 2)
    commit_of(tmp_path).write(second)
    for late in (first, second, first):
        buckets.complete_upload(late["outputs"][0])
        assert store.objects() == {"hybrid/7.tar": b"second"}
    assert commit_of(tmp_path).read_receipt() == second


def test_of_two_attempts_one_wins_and_nothing_is_left_of_the_other(tmp_path: Path, store: Store) -> None:
    winner, loser = write("a", b"winner"), write("b", b"loser")
    assert store.objects() == {}
    commit_of(tmp_path).write(receipt_of(tmp_path, winner, "a", 1))
    with pytest.raises(LostClaim):
        commit_of(tmp_path).write(receipt_of(tmp_path, loser, "b", 1))
    loser.discard()
    assert store.objects() == {"hybrid/7.tar": b"winner"}
    assert store.uploads() == []


def test_an_upload_that_a_successor_aborted_is_a_lost_claim(store: Store) -> None:
    with pytest.raises(LostClaim, match="another worker"), RemoteOutput(Url(URL), "a") as output:
        output.write(bytes(PART))
        thing = buckets.object_at(Url(URL))
        for upload in thing.under_way():
            thing.abort(upload)
        output.write(bytes(5 * PART))
    assert store.uploads() == []


def test_what_is_superseded_goes_unless_a_newer_commit_names_it(tmp_path: Path, store: Store) -> None:
    commit = commit_of(tmp_path)
    commit.write(receipt_of(tmp_path, write("a", b"first"), "a", 1))
    mine = {"token": "b", "generation": 2, "status": "done", "outputs": [], "superseded": [URL]}
    commit.write(mine)
    newer = receipt_of(tmp_path, write("c", b"newer"), "c", 3)
    commit.write(newer)
    remove_obsolete(tmp_path, commit, mine, "b")
    assert store.objects() == {"hybrid/7.tar": b"newer"}, "mine is not the newest receipt"
    last = {"token": "d", "generation": 4, "status": "done", "outputs": [], "superseded": [URL]}
    commit.write(last)
    assert has_obsolete_outputs(tmp_path, last)
    remove_obsolete(tmp_path, commit, last, "d")
    assert store.objects() == {}
    assert not has_obsolete_outputs(tmp_path, last)


def test_an_output_is_sent_while_it_is_written_within_bounds(store: Store, tmp_path: Path) -> None:
    """Parts of one size, none of them larger, and never more in memory than those under way."""
    data = random.Random(0).randbytes(20 * PART + 1)
    output = RemoteOutput(Url(URL), "a")
    most = 0
    for begin in range(0, len(data), 10_000):
        output.write_pieces([memoryview(data)[begin : begin + 10_000]])
        most = max(most, begin - PART * len(output._parts))
    output.close()
    assert most <= 5 * PART
    sizes = [int(p["Size"]) for p in parts_of(store)]
    assert sizes == [PART] * 20 + [1]
    receipt = receipt_of(tmp_path, output, "a", 1)
    commit_of(tmp_path).write(receipt)
    assert store.objects() == {"hybrid/7.tar": data}
    assert store.client.head_object(Bucket="out", Key="hybrid/7.tar")["Metadata"] == {"curation-token": "a"}


def parts_of(store: Store) -> list[dict[str, Any]]:
    (upload,) = store.client.list_multipart_uploads(Bucket="out")["Uploads"]
    return list(store.client.list_parts(Bucket="out", Key=upload["Key"], UploadId=upload["UploadId"])["Parts"])


class Elsewhere(LocalFileSystem):
    """A filesystem of fsspec's that shows no multipart uploads."""


def test_a_store_without_uploads_gets_a_hidden_file_that_is_moved(tmp_path: Path) -> None:
    """As gs:// does, here in a folder: nothing under the name before the completion, which may be repeated."""
    file = Url(f"file://{tmp_path}/7.tar")
    thing = buckets.MovedObject(file, Elsewhere())
    dead, mine = buckets.MovedObject(file, Elsewhere()), buckets.MovedObject(file, Elsewhere())
    left = dead.begin("dead")
    dead.put(left, 1, b"half")
    dead.end(left)
    upload = mine.begin("mine")
    for number, part in enumerate((b"whole ", b"file"), 1):
        mine.put(upload, number, part)
    mine.end(upload)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == []
    assert sorted(map(os.path.basename, thing.under_way())) == [".7.tar.dead.tmp", ".7.tar.mine.tmp"]
    for _ in range(2):
        thing.complete(upload, [])
        assert (tmp_path / "7.tar").read_bytes() == b"whole file"
    assert thing.info() == buckets.StoredObject(10)
    thing.abort(left)
    thing.abort(left)
    assert [path.name for path in tmp_path.iterdir()] == ["7.tar"]
    thing.remove(buckets.StoredObject(10))
    assert thing.info() is None


# ---- what is refused


def test_a_bucket_that_is_not_there(place: Place, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    advice = "there is no such bucket; fix this and start again, nothing published is lost"
    assert stage_04.main(place.arguments("--publish_to", "s3://nobody/hybrid")) == 2
    assert capsys.readouterr().err.strip() == f"error: s3://nobody/hybrid: {advice}"
    with pytest.raises(InfrastructureError, match=f"^s3://nobody/0.tar: {advice}$"):
        RemoteOutput(Url("s3://nobody/0.tar"), "a")


@pytest.fixture
def other_credentials(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Sets the key of the environment; the server asks who comes from then on."""
    import s3fs

    def ask(first: str) -> None:
        url = f"http://127.0.0.1:{server.relay.target}/moto-api/reset-auth"
        assert requests.post(url, data=first, timeout=10).ok

    def become(key: str | None) -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            if key is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, key)
        ask("0")

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nowhere")
    yield become
    ask("inf")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("key", "said"), [(None, "Unable to locate credentials"), ("opensesame", "InvalidAccessKeyId: ")], ids=str
)
def test_wrong_credentials(
    place: Place,
    store: Store,
    other_credentials: Callable[[str | None], None],
    capsys: pytest.CaptureFixture[str],
    key: str | None,
    said: str,
) -> None:
    other_credentials(key)
    assert place.run() == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: s3://out/hybrid: refused: ") and "\n" not in line
    assert said in line and "(credentials come from the environment)" in line
    assert "opensesame" not in line


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://datasets/me/it", "python -m curation publish"),
        ("https://me:secret@host/x", "written to s3:// and gs://"),
        ("/some/folder", "written to s3:// and gs://"),
        ("s3://", "give a bucket"),
        ("s3://me:secret@bucket/x", "give a bucket"),
        ("s3://bucket/a/../b", "no empty part and no .."),
        ("s3://bucket/a*", "no empty part and no .."),
    ],
)
def test_places_that_cannot_be_written_to(url: str, said: str) -> None:
    with pytest.raises(UsageError, match="--publish_to") as error:
        remote_folder(url)
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_nothing_is_written_over_that_was_not_made_here(place: Place, store: Store, capsys: Any) -> None:
    store.client.put_object(Bucket="out", Key="hybrid/00000001.tar", Body=b"somebody else's")
    assert place.run() == 2
    assert "s3://out/hybrid already holds 1 shards that 04_reshard has not made: 00000001." in capsys.readouterr().err
    assert place.run("--verify") == 2
    assert "--verify" in capsys.readouterr().err
    assert store.objects() == {"hybrid/00000001.tar": b"somebody else's"}
    arguments = place.arguments("--publish_to", "s3://out/hybrid/")
    arguments[arguments.index("--input") + 1] = "s3://out/hybrid/"
    assert stage_04.main(arguments) == 2
    assert "--publish_to must not be the folder of the source shards" in capsys.readouterr().err
    assert place.run("--overwrite") == 0
    insist_on(place, store)


def test_shards_of_one_size_and_their_list(place: Place, store: Store) -> None:
    """Indexes stay on the disk; another layout takes the objects of the earlier one away."""
    assert place.run("--shard_size", "4", "--index") == 0
    assert sorted(store.objects()) == [f"hybrid/0000000{number}.tar" for number in range(3)]
    assert [name for name in place.files() if name[0] != "_"] == [
        "00000000.idx", "00000001.idx", "00000002.idx", "wids.json",
    ]  # fmt: skip
    listed = json.loads((place.out / "wids.json").read_text())["shardlist"]
    assert [(entry["url"], entry["nsamples"]) for entry in listed] == [
        (f"s3://out/hybrid/0000000{number}.tar", 4) for number in range(3)
    ]
    assert place.run("--shard_size", "10", "--rerun") == 2
    assert place.run("--shard_size", "10", "--rerun", "--overwrite") == 0
    objects = store.objects()
    assert sorted(objects) == ["hybrid/00000000.tar", "hybrid/00000001.tar"]
    assert store.uploads() == []


# ---- stage 00


def test_downloaded_shards_go_to_the_bucket_and_their_tables_stay(store: Store, tmp_path: Path) -> None:
    """Also when their failed URLs are asked once more: the good samples are copied out of the object."""
    stage_00, out = importlib.import_module("00_download"), tmp_path / "out"
    table = tmp_path / "urls.csv"
    with photo_server(ROOT / "examples" / "shards") as port:
        kinds = ["photo", "photo", "404", "photo"]
        rows = [f"http://127.0.0.1:{port}/{kind}/{number}" for number, kind in enumerate(kinds)]
        table.write_text("\n".join(["url", *rows]) + "\n")
        flags = ["--allow_private", "127.0.0.0/8", "--retries", "0", "--lease_s", "2", "--quiet"]
        arguments = ["--input", str(table), "--output", str(out), "--publish_to", "s3://out/photos", *flags]
        assert stage_00.main(arguments) == 0
        (before,) = store.objects().values()
        assert stage_00.main([*arguments, "--retry_failed_urls"]) == 0
        assert stage_00.main([*arguments, "--verify"]) == 0
    assert store.objects() == {"photos/00000000.tar": before}
    assert store.uploads() == []
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "00000000.parquet", "00000000_stats.json", "full_metadata.parquet", "metadata.csv",
    ]  # fmt: skip
    (shard,) = discover("s3://out/photos/")
    assert len([sample for sample in read_samples(shard.path) if "jpg" in sample.members]) == 3
    text = next((out / "_receipts" / "00_download").rglob("00000000.json")).read_text()
    assert [o["path"] for o in json.loads(text)["outputs"] if "upload" in o] == ["s3://out/photos/00000000.tar"]
    assert "unsound" not in json.loads(text)["notes"]
    with pytest.raises(UsageError, match="an object of every file"):
        stage_00.Options(input=str(table), output=out, publish_to="s3://out/x", output_format="files").check()
