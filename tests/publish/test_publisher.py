"""What a stage has finished goes to a bucket, once and whole, whoever is stopped, killed or late."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.cluster import StopSignal
from curation.commands.fsck.command import main as fsck
from curation.commands.publish import main as publish
from curation.commands.verify.command import main as verify
from curation.errors import InfrastructureError, UsageError
from curation.options import PublishOptions
from curation.publish import running, s3
from curation.publish.backlog import outputs_to_send
from curation.publish.open_store import open_store, refuse_folders_of, store_name
from curation.publish.publisher import Publisher, PublisherOptions
from curation.run.ledger import Ledger
from curation.run.records import is_there, place_of
from curation.shards import discover
from curation.storage.files import fast_digest
from curation.storage.retry import RetryPolicy
from curation.tar.samples import read_samples
from tests import EXAMPLES, ROOT
from tests.processes import PATIENCE_S, wait_until
from tests.publish.buckets import NAME, PART, Bucket, Place, flags_of_select, local_tars, s3_server, stage_04
from tests.servers.hub import Hub, serve
from tests.servers.relay import Rule
from tests.stages import recaption_stub

URL = "s3://out/hybrid"
COMPLETE = r"^POST /\S*\.tar\?uploadId="


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket; parts are small and waits short, and this process has its signal handlers back."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr(s3, "RETRIES", RetryPolicy(tries=3, first_wait_s=0.01, longest_wait_s=0.05))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)}
    server.relay.reset()
    yield server
    server.relay.reset()
    server.empty()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def insist_on(place: Place, bucket: Bucket, wanted: dict[str, bytes], *, uploads: int = 0) -> None:
    """The bucket holds exactly these tars, and its receipts and those of this folder say so.

    uploads: how many are under way.
    """
    assert bucket.tars() == wanted
    assert len(bucket.uploads()) == uploads
    objects = bucket.objects()
    for shard in place.ids:
        receipt = place.receipt(shard)
        stored = json.loads(objects[f"hybrid/_receipts/{NAME}/00000/{shard}.json"])
        assert stored == receipt
        proof = place.proofs()[f"{shard}.{receipt['generation']}.json"]
        assert (proof["store"], proof["token"], proof["generation"]) == (URL, receipt["token"], receipt["generation"])
        (output,) = receipt["outputs"]
        named = {file["name"]: file for file in proof["files"]}
        assert (named[output["path"]]["size"], named[output["path"]]["digest"]) == (output["size"], output["digest"])
        head = bucket.client.head_object(Bucket="out", Key=f"hybrid/{shard}.tar")
        assert head["ETag"].strip('"') == named[output["path"]]["version"]
        copy = f"hybrid/_published/{store_name(URL)}/{NAME}/00000/{shard}.{receipt['generation']}.json"
        assert json.loads(objects[copy]) == proof, "and so does a copy in the store"
        assert "opensesame" not in json.dumps(proof)
    assert not [name for name in objects if "_claims" in name or "_partial" in name]


def publisher(place: Place, **options: Any) -> Publisher:
    store: Any = open_store(URL)
    store.conditional = True  # as its check finds out
    return Publisher(place.out, NAME, store, store_name(URL), PublisherOptions(lease_s=1, **options))


# ---- stages


def test_a_stage_publishes_while_it_runs(tmp_path: Path, bucket: Bucket, capfd: Any) -> None:
    place = Place(tmp_path)
    assert place.run("--publish_to", URL) == 0
    insist_on(place, bucket, local_tars(place))
    assert f"{URL}: 2 shards published" in capfd.readouterr().out
    before = len(bucket.relay.asked)
    assert place.run("--publish_to", URL) == 0
    asked = [line for line in bucket.relay.asked[before:] if ".check" not in line and "max-keys=1" not in line]
    assert asked == [], "nothing is sent or asked again"


def test_an_output_that_is_a_url(tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    assert place.run(out=URL) == 2
    assert "is a URL: add --work_dir FOLDER" in capsys.readouterr().err
    assert place.run("--work_dir", place.out, "--publish_to", "s3://out/elsewhere", out=URL) == 2
    assert place.run("--work_dir", place.out, out=URL) == 0
    assert local_tars(place) == {}, "the tars lie in the store alone"
    there = bucket.tars()
    insist_on(place, bucket, there)
    assert place.run(out=tmp_path / "local") == 0
    assert there == {f"hybrid/{path.name}": path.read_bytes() for path in (tmp_path / "local").glob("*.tar")}
    assert place.run("--work_dir", place.out, out=URL) == 0
    assert local_tars(place) == {}, "what is in the store is done"
    place.edit(place.ids[0], b"another text")
    assert place.run("--work_dir", place.out, out=URL) == 0
    now = bucket.tars()
    assert [name for name in now if now[name] != there[name]] == [f"hybrid/{place.ids[0]}.tar"]
    insist_on(place, bucket, now)


@pytest.mark.parametrize("url", ["s3://nobody-has-this/x", "s3://out/hybrid"])
def test_a_wrong_bucket_or_key_ends_the_run_before_the_first_shard(
    tmp_path: Path, bucket: Bucket, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    if url == URL:
        bucket.relay.rules = [Rule("^PUT ", "before", times=100)]
    assert place.run("--publish_to", url) == 2
    assert url in capsys.readouterr().err
    assert not list(place.out.rglob("*.json")), "no shard was begun"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("01_filter_noface", ["--input", "{s}", "--output", "{o}", "--edits", "{e}"]),
        ("02_captions_processor", ["--input", "{s}", "--output", "{o}"]),
        ("05_recaption", ["-i", "{s}", "-o", "{o}", "--format", "files"]),
        ("00_download", ["-i", "{t}", "-o", "{o}", "--output_format", "files"]),
    ],
)
def test_files_that_are_read_here_are_not_removed(
    script: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    table = tmp_path / "urls.txt"
    table.write_text("http://127.0.0.1:9/a.jpg\n")
    found = {"s": place.source, "o": tmp_path / "o", "e": tmp_path / "e", "t": table}
    argv = [word.format(**found) for word in words] + ["--publish_to", URL, "--keep_local", "receipts"]
    assert importlib.import_module(script).main(argv) == 2
    assert "use --keep_local all" in capsys.readouterr().err


def test_room_on_the_disk_is_bounded(tmp_path: Path, bucket: Bucket) -> None:
    ids = tuple(f"{number:08d}" for number in range(4))
    place = Place(tmp_path, ids)
    assert place.run("--publish_to", URL, "--local_budget", "100k", "--keep_local", "receipts") == 0
    assert len(bucket.tars()) == 4 and local_tars(place) == {}
    for before, after in itertools.pairwise(ids):
        proved = next(place.out.glob(f"_published/*/{NAME}/*/{before}.1.json")).stat().st_mtime
        assert place.receipt(after)["started"] > proved - 0.1, "a shard begins when the one before it is in the store"


def test_a_store_that_hangs_with_a_full_disk_ends_the_run(
    tmp_path: Path, bucket: Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    bucket.relay.rules = [Rule(r"^PUT /\S*\.tar", "before", times=10_000), Rule(r"^POST /\S*\.tar", "before", 10_000)]
    words = ("--publish_to", URL, "--local_budget", "1k", "--stall_s", "1")
    assert place.run(*words) == 2
    assert "no upload has finished for 1 s" in capfd.readouterr().err
    assert len(list(place.out.glob(f"_receipts/{NAME}/*/*.json"))) == 1, "the second shard was not begun"
    bucket.relay.reset()
    assert place.run("--publish_to", URL) == 0
    insist_on(place, bucket, local_tars(place))


def test_the_deadline_ends_the_last_uploads_too(tmp_path: Path, bucket: Bucket) -> None:
    place = Place(tmp_path)
    bucket.relay.rules = [Rule(r"^\S+ /\S*\.tar", then=lambda: time.sleep(20), times=10_000)]
    assert place.run("--publish_to", URL, "--deadline", "2s") == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_last_uploads_go_on_ends_the_run_at_once(
    tmp_path: Path, bucket: Bucket, number: signal.Signals
) -> None:
    place = Place(tmp_path)
    bucket.relay.rules = [Rule(r"^\S+ /\S*\.tar", then=lambda: time.sleep(20), times=10_000)]
    process = place.start(*place.arguments("--publish_to", URL))
    wait_until(lambda: len(list(place.out.glob(f"_receipts/{NAME}/*/*.json"))) == 2)
    process.send_signal(number)
    began = time.monotonic()
    _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, log
    assert time.monotonic() - began < 15
    assert "the rest" in log or "not all is uploaded" in log
    bucket.relay.reset()
    assert place.run("--publish_to", URL) == 0
    insist_on(place, bucket, local_tars(place))


def test_a_publisher_that_was_killed_is_started_again(
    place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_AGAIN_S", 0.0)
    options = stage_04.Options(input=(str(place.source),), output=str(place.out), publish_to=URL)
    helper = running._Helper(options, NAME, place.out, removes=False, kept=())
    helper.start()
    first = helper._process
    assert first is not None
    first.kill()
    first.wait()
    assert helper.check() == "" and helper._process is not first
    assert helper.finish(StopSignal(), wait=True) == 0
    insist_on(place, bucket, local_tars(place))


def test_a_fault_of_the_program_is_not_told_as_changed_files(
    place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Publisher, *, is_last: bool) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(Publisher, "go", fail)
    monkeypatch.setattr(os, "read", lambda number, size: b"")
    assert publish([str(place.out), "--to", URL, "--until_eof"]) == 2
    assert "ZeroDivisionError: a fault" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        server.datasets.token = TOKEN
        for name, value in {"HF_TOKEN": TOKEN, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        yield server


TOKEN = "hf_" + "s3cr3tT0ken" * 3
REPO = "hf://datasets/somebody/hybrid"


def test_an_output_that_is_a_whole_repository(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    words = ("--work_dir", place.out)
    for more in (("--keep_local", "receipts"), ("--local_budget", "1G")):
        assert place.run(*words, *more, out=REPO) == 2
        assert f"--{more[0][2:]}" in capsys.readouterr().err
    assert place.run(*words, "--dry_run", out=REPO) == 0
    assert not hub.datasets.repos, "a dry run creates no repository"
    assert place.run(*words, "--overwrite", out=REPO) == 0
    files = hub.datasets.repos["somebody/hybrid"].files
    for shard in place.ids:
        path = next(name for name in files if name.endswith(f"{shard}.tar"))
        assert files[path] == (place.out / f"{shard}.tar").read_bytes(), "and it stays here"


def test_a_repository_for_a_run_of_which_no_shard_is_done(tmp_path: Path, hub: Hub) -> None:
    place = Place(tmp_path)
    for shard in place.ids:
        (place.source / f"{shard}.tar").write_bytes(b"no tar any more" * 1000)
    assert place.run("--publish_to", REPO) == 1


# ---- kills and latecomers


class Killed(BaseException):
    """The process ends here."""


def dying(client: Any, at: int, when: str) -> Any:
    """A client of S3 whose process dies before or after its request number ``at``."""

    class Client:
        count = 0

        def __getattr__(self, name: str) -> Any:
            ask = getattr(client, name)
            if not callable(ask) or name == "close":
                return ask

            def request(**arguments: Any) -> Any:
                Client.count += 1
                if Client.count == at and when == "before":
                    raise Killed
                answer = ask(**arguments)
                if Client.count >= at:
                    raise Killed
                return answer

            return request

    return Client()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_before_and_after_each_request(tmp_path: Path, bucket: Bucket, when: str) -> None:
    place = Place(tmp_path, ("00000000",))
    assert place.run() == 0
    wanted = local_tars(place)
    at, died = 0, True
    while died:
        at += 1
        shutil.rmtree(place.out / "_published", ignore_errors=True)
        bucket.empty()
        first = publisher(place)
        store: Any = first._store
        store._client = dying(store._client, at, when)
        died = False
        try:
            first.go()
        except Killed:
            died = True
        outcome = publisher(place).go()
        for upload in bucket.client.list_multipart_uploads(Bucket="out").get("Uploads", []):
            # the bucket's own rule removes what a killed process has begun
            bucket.client.abort_multipart_upload(Bucket="out", Key=upload["Key"], UploadId=upload["UploadId"])
        insist_on(place, bucket, wanted)
        assert outcome.changed == [] and outcome.left == 0
    assert at > 12, "requests of a shard of several parts"


def test_a_publisher_that_was_stopped_in_mid_upload_is_late(place: Place, bucket: Bucket) -> None:
    """SIGSTOP; the shard is done again and published by another; SIGCONT."""
    held: list[int] = []
    process = place.start("publish", place.out, "--to", URL, "--lease_s", "1", "--quiet", script="curation")

    def stop() -> None:
        os.kill(process.pid, signal.SIGSTOP)
        held.append(process.pid)

    try:
        bucket.relay.rules = [Rule(COMPLETE, then=stop)]
        wait_until(lambda: bool(held))
        bucket.relay.rules = []
        place.edit(place.ids[0], b"another text")
        place.edit(place.ids[1], b"another text")
        assert place.run() == 0
        wanted = local_tars(place)
        assert publish([str(place.out), "--to", URL, "--lease_s", "1"]) == 0
        assert bucket.tars() == wanted
        os.kill(process.pid, signal.SIGCONT)
        _, log = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, log
        insist_on(place, bucket, wanted)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_two_publishers_share_the_shards(place: Place, bucket: Bucket) -> None:
    words = ("publish", place.out, "--to", URL, "--quiet", "--json")
    first, second = (place.start(*words, script="curation", stdout=-1) for _ in range(2))
    told = [json.loads(process.communicate(timeout=PATIENCE_S)[0]) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sum(one["shards"] for one in told) == 2
    insist_on(place, bucket, local_tars(place))


# ---- whose files they are


def test_somebody_elses_objects_are_not_replaced(
    place: Place, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.client.put_object(Bucket="out", Key=f"hybrid/{place.ids[1]}.tar", Body=b"somebody else's")
    assert publish([str(place.out), "--to", URL]) == 2
    assert f"{URL}/{place.ids[1]}.tar: this file was not put there from" in capsys.readouterr().err
    assert bucket.tars()[f"hybrid/{place.ids[1]}.tar"] == b"somebody else's"
    assert publish([str(place.out), "--to", URL, "--overwrite"]) == 0
    insist_on(place, bucket, local_tars(place))


def test_another_folder_does_not_replace_the_objects_of_this_one(place: Place, bucket: Bucket, tmp_path: Path) -> None:
    assert publish([str(place.out), "--to", URL]) == 0
    other = Place(tmp_path / "other")
    other.edit(other.ids[0], b"a third text")
    assert other.run("--publish_to", URL) == 2
    insist_on(place, bucket, local_tars(place))


def test_two_stores_for_one_folder(place: Place, bucket: Bucket) -> None:
    assert publish([str(place.out), "--to", URL]) == 0
    assert publish([str(place.out), "--to", "s3://out/second"]) == 0
    tars = local_tars(place)
    assert bucket.tars() == tars | {name.replace("hybrid/", "second/"): data for name, data in tars.items()}


def test_what_an_earlier_version_had_goes_with_prune(place: Place, bucket: Bucket) -> None:
    assert place.run("--index", "--rerun") == 0
    assert publish([str(place.out), "--to", URL]) == 0
    assert f"hybrid/{place.ids[0]}.idx" in bucket.objects()
    assert place.run("--rerun") == 0
    assert publish([str(place.out), "--to", URL]) == 0
    assert f"hybrid/{place.ids[0]}.idx" in bucket.objects(), "only --prune removes objects"
    bucket.client.put_object(Bucket="out", Key="hybrid/mine.txt", Body=b"a file of the user")
    assert publish([str(place.out), "--to", URL, "--prune"]) == 0
    assert not [name for name in bucket.objects() if name.endswith(".idx")]
    assert not [name for name in bucket.objects() if name.endswith("0.2.json")], "receipts of older uploads go too"
    assert "hybrid/mine.txt" in bucket.objects()
    insist_on(place, bucket, local_tars(place))
    bucket.client.delete_object(Bucket="out", Key="hybrid/mine.txt")
    assert verify([URL]) == 0
    (place.out / "_receipts" / NAME / "00000" / f"{place.ids[0]}.json").unlink()
    assert publish([str(place.out), "--to", URL, "--prune"]) == 0
    assert [name for name in bucket.objects() if place.ids[0] in name] == []
    assert verify([URL]) == 0


def test_a_newer_upload_is_judged_by_its_own_receipt(place: Place, bucket: Bucket) -> None:
    """What only an older generation had may be gone: its receipt does not count any more."""
    assert place.run("--index", "--rerun") == 0
    assert publish([str(place.out), "--to", URL]) == 0
    assert place.run("--rerun") == 0
    assert publish([str(place.out), "--to", URL]) == 0
    assert verify([URL]) == 1, "outdated"
    for shard in place.ids:
        bucket.client.delete_object(Bucket="out", Key=f"hybrid/{shard}.idx")
    assert verify([URL]) == 0


def test_a_failed_attempt_leaves_the_old_object(place: Place, bucket: Bucket) -> None:
    assert publish([str(place.out), "--to", URL]) == 0
    before = bucket.tars()
    (place.source / f"{place.ids[0]}.tar").write_bytes(b"no tar any more" * 1000)
    assert place.run() == 1
    assert publish([str(place.out), "--to", URL]) == 0
    assert bucket.tars() == before
    proof = place.proofs()[f"{place.ids[0]}.2.json"]
    assert [file["name"] for file in proof["obsolete"]] == [f"{place.ids[0]}.tar"]
    stored = json.loads(bucket.objects()[f"hybrid/_receipts/{NAME}/00000/{place.ids[0]}.json"])
    assert stored["status"] == "failed"


def test_a_file_that_is_not_what_its_receipt_says_is_told(place: Place, bucket: Bucket, capsys: Any) -> None:
    tar = place.out / f"{place.ids[0]}.tar"
    data = bytearray(tar.read_bytes())
    data[-2000] ^= 1
    tar.write_bytes(data)
    assert publish([str(place.out), "--to", URL]) == 1
    assert f"{place.ids[0]}.tar" in capsys.readouterr().out
    assert sorted(bucket.tars()) == [f"hybrid/{place.ids[1]}.tar"]


# ---- files that are gone from here


def test_a_shard_in_the_store_alone_is_done(place: Place, bucket: Bucket, capsys: Any) -> None:
    words = [str(place.out), "--to", URL, "--keep_local", "receipts"]
    assert publish(words) == 0
    assert local_tars(place) == {}
    receipt = place.receipt(place.ids[0])
    (output,) = receipt["outputs"]
    assert is_there(place.out, NAME, receipt, output)
    assert str(place_of(place.out, NAME, receipt, output)) == f"{URL}/{place.ids[0]}.tar"
    tar = place.out / f"{place.ids[0]}.tar"
    tar.write_bytes(b"cut by a full disk")
    assert is_there(place.out, NAME, receipt, output)
    assert str(place_of(place.out, NAME, receipt, output)) == f"{URL}/{tar.name}", "and not the damaged file"
    tar.unlink()
    assert not is_there(place.out, NAME, {**receipt, "generation": 2}, output)
    assert not is_there(place.out, NAME, {**receipt, "token": "another"}, output)
    assert not is_there(place.out, NAME, receipt, {**output, "digest": "0" * 32})
    assert place.run() == 0
    assert local_tars(place) == {}, "nothing was done again"
    capsys.readouterr()
    assert verify([str(place.source), str(place.out), "--no_provenance"]) in (0, 1)
    told = f"2 shards lie only in a store, and were not read: python -m curation verify {URL}\n"
    assert told in capsys.readouterr().out
    assert fsck([str(place.out), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith(told + "OK: 0 shards")
    with pytest.raises(UsageError, match=f"was written by {NAME}, and published to {URL}: give the folder or URL"):
        discover(str(place.out))
    (place.out / f"{place.ids[1]}.tar").write_bytes(bucket.tars()[f"hybrid/{place.ids[1]}.tar"])
    with pytest.raises(UsageError, match=f"{place.ids[0]}.tar lies only in {URL}: give this as --input"):
        discover(str(place.out))
    assert fsck([str(place.out), "--quiet", "--no_images"]) == 0, "which tells how many it has not read"


def test_shards_in_folders_that_are_in_the_store_alone(
    place: Place, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (place.source, place.edits):
        (folder / "14").mkdir()
        for tar in folder.glob("*.tar"):
            tar.rename(folder / "14" / tar.name)
    shutil.rmtree(place.out)
    for _ in range(2):
        assert place.run("--publish_to", URL, "--keep_local", "receipts") == 0
        assert list(place.out.rglob("*.tar")) == []
    assert sorted(bucket.tars()) == [f"hybrid/14/{shard}.tar" for shard in place.ids]
    assert verify([URL]) == 0
    capsys.readouterr()
    for command, words in ((fsck, [place.out, "--quiet"]), (verify, [place.source, place.out, "--no_provenance"])):
        command([str(word) for word in words])
        assert f"2 shards lie only in a store, and were not read: python -m curation verify {URL}\n" in (
            capsys.readouterr().out
        )


def test_a_store_without_conditions_never_costs_a_local_file(
    place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3.S3Store, "_keeps_conditions", lambda self, name: False)
    wanted = local_tars(place)
    assert publish([str(place.out), "--to", URL, "--keep_local", "receipts"]) == 0
    assert local_tars(place) == wanted
    insist_on(place, bucket, wanted)


def test_an_output_that_a_newer_commit_publishes_is_not_removed(place: Place, bucket: Bucket) -> None:
    """While the upload is proved, the shard is done again: its new file stays."""
    late = publisher(place, remove_local=True)
    remove: Callable[[Any], None] = late._remove_local
    done: list[str] = []

    def after_a_rerun(due: Any) -> None:
        if not done:
            done.append(due.shard_id)
            assert place.run("--rerun") == 0
        remove(due)

    late._remove_local = after_a_rerun  # type: ignore[method-assign]
    late.go(is_last=False)
    for shard in place.ids:
        receipt = place.receipt(shard)
        if receipt["generation"] == 2 and f"{shard}.2.json" not in place.proofs():
            (output,) = receipt["outputs"]
            assert fast_digest(place.out / output["path"]) == output["digest"]
    state = Ledger(place.out, NAME, 0, {}, read_only=True)
    assert all(state.receipt(shard)["status"] == "done" for shard in place.ids)  # type: ignore[index]


def as_an_older_version_wrote_it(place: Place, shard: str) -> dict[str, Any]:
    receipt = place.receipt(shard)
    (output,) = receipt["outputs"]
    output |= {"path": f"s3://out/old/{shard}.tar", "temporary": ""}
    output["upload"] = {"id": "x", "token": "y", "parts": []}
    return receipt


def test_objects_of_versions_that_wrote_them_in_the_commit_count_as_published(place: Place) -> None:
    """A folder of an older version goes on: its options held publish_to, and its receipts name objects."""
    for shard in place.ids:
        path = place.out / "_receipts" / NAME / "00000" / f"{shard}.json"
        receipt = json.loads(path.read_text())
        (output,) = receipt["outputs"]
        output |= {
            "path": f"s3://out/old/{shard}.tar",
            "temporary": "",
            "upload": {"id": "x", "token": "y", "parts": []},
        }
        path.write_text(json.dumps(receipt))
        (place.out / f"{shard}.tar").unlink()
    epoch = place.out / "_receipts" / NAME / "_epoch.1.json"
    record = json.loads(epoch.read_text())
    record["options"]["publish_to"] = "s3://out/old"
    epoch.write_text(json.dumps(record))
    assert place.run() == 0
    assert local_tars(place) == {}
    place.edit(place.ids[0], b"another text")
    assert place.run() == 0
    assert sorted(local_tars(place)) == [f"hybrid/{place.ids[0]}.tar"]
    assert place.receipt(place.ids[0])["superseded"] == [f"s3://out/old/{place.ids[0]}.tar"]


def test_an_upload_that_an_older_version_left_in_its_commit_is_done_again(place: Place) -> None:
    shard = place.ids[0]
    path = place.out / "_receipts" / NAME / "00000" / f"{shard}.json"
    path.with_name(f".{shard}.1.commit").write_text(json.dumps(as_an_older_version_wrote_it(place, shard)))
    path.unlink()
    (place.out / f"{shard}.tar").unlink()
    assert place.run() == 0
    assert sorted(local_tars(place)) == [f"hybrid/{one}.tar" for one in place.ids]
    assert not list(path.parent.glob(".*.commit"))


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_a_folder_is_not_published_into_itself(place: Place, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.out.rglob("*"))
    target = os.path.realpath(place.out / where)
    assert publish([str(place.out), "--to", target]) == 2
    assert place.run("--publish_to", target) == 2
    assert "publish to another folder" in capsys.readouterr().err
    assert sorted(place.out.rglob("*")) == before


@pytest.mark.parametrize("option", ["input", "edits"])
def test_outputs_are_not_published_among_the_inputs(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Least of all with --overwrite, which would replace the sources."""
    place = Place(tmp_path)
    folder = {"input": place.source, "edits": place.edits}[option]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for given in (folder, folder / "*.tar", folder / f"{place.ids[0]}.tar") if option == "input" else (folder,):
        words = place.arguments("--publish_to", folder, "--overwrite")
        words[words.index(f"--{option}") + 1] = str(given)
        assert stage_04.main(words) == 2
        assert f"--{option} names this folder; publish to another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for given in ("s3://out/x/{00000000..00000001}.tar", "s3://out/x/", "s3://out/x/0.tar"):
        with pytest.raises(UsageError, match="--input names this folder"):
            refuse_folders_of("s3://out/x", "input", [given])
    refuse_folders_of("s3://out/x", "input", ["s3://out/y", "s3://out/x/below/*.tar", "s3://x", str(place.source)])


def test_a_stage_that_begins_with_an_index_is_published(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its publisher waits for the first receipt, however long the index takes."""
    place, there = Place(tmp_path), tmp_path / "there"
    words = ("--shard_size", "4", "--publish_to", there)
    assert place.run(*words, "--step", "index") == 0
    assert not list(there.rglob("*.tar"))
    assert place.run(*words) == 0
    assert {path.name: path.read_bytes() for path in there.glob("*.tar")} == {
        path.name: path.read_bytes() for path in place.out.glob("*.tar")
    }
    assert len(list(there.glob("*.tar"))) == 3
    assert f"{there}: 3 shards published" in capfd.readouterr().out


def test_overwrite_without_a_store_is_no_rerun(tmp_path: Path) -> None:
    """It would do nothing, and stage 04 alone has such a flag of its own."""
    with pytest.raises(UsageError, match="--overwrite is about a store"):
        PublishOptions(overwrite=True).check_publishing()
    assert Place(tmp_path).run("--overwrite") == 0


def test_two_outputs_of_one_name_are_not_published_as_one() -> None:
    outputs = [{"path": path, "size": 1, "digest": "0"} for path in ("0.json", "../0.json")]
    with pytest.raises(InfrastructureError, match="would have the same name"):
        outputs_to_send({"outputs": outputs})


def test_files_of_the_whole_run_are_made_from_all_shards(tmp_path: Path, bucket: Bucket) -> None:
    """Stage 05 in two runs, whose shards' own files are in the store alone after each."""
    import pyarrow
    import pyarrow.parquet

    words = [str(EXAMPLES / "{00000001,00000003}.tar"), "-o", "s3://out/captions", "--work_dir", str(tmp_path / "w")]
    words += ["--format", "parquet,tar", "--dataloader_num_workers", "1", "--device", "cpu", "--quiet"]
    assert recaption_stub.main([*words, "--smoke", "1"]) == 0, "a trial is not published"
    assert bucket.objects() == {}
    for more in (["--shards", "00000001"], []):
        assert recaption_stub.main([*words, *more]) == 0
    assert not list((tmp_path / "w").glob("shards/*.tar"))
    data = bucket.objects()["captions/all_captions.parquet"]
    assert data == (tmp_path / "w" / "all_captions.parquet").read_bytes()
    rows = [path.read_text("utf-8").splitlines() for path in (tmp_path / "w" / "rows").iterdir()]
    assert len(rows) == 2
    assert pyarrow.parquet.read_table(pyarrow.BufferReader(data)).num_rows == len(rows[0]) + len(rows[1])
    assert verify(["s3://out/captions"]) == 0


# ---- what others wrote


D2M_S3 = """\
models:
  - statistics
postprocess_columns:
  - image-width
additional_fields:
  - uid
nworkers: 1
batch_size: 512
device: cpu
input_tars: "pipe:aws s3 cp s3://s-laion/datanet_1B_pool_part_2/00001308.tar -" # brace expand suported
output_metadata_dir: "s3://s-laion/sy_dbg" # can be arbitrary path
custom_pypath: null # if model not known, look in this python file for implementation
"""


def test_a_file_of_dataset2metadata_whose_folders_are_in_a_bucket(
    tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tests/ymls/test_s3.yml with a model that needs no weights: one flag is added."""
    import pyarrow.parquet

    stage = importlib.import_module("06_metadata")
    yml = tmp_path / "test_s3.yml"
    yml.write_text(D2M_S3)
    (source,) = sorted((ROOT / "examples" / "shards").glob("*.tar"))[:1]
    bucket.client.create_bucket(Bucket="s-laion")
    try:
        bucket.client.upload_file(str(source), "s-laion", "datanet_1B_pool_part_2/00001308.tar")
        assert stage.main(["--yml", str(yml)]) == 2
        assert "--output s3://s-laion/sy_dbg is a URL: add --work_dir FOLDER" in capsys.readouterr().err
        assert stage.main(["--yml", str(yml), "--work_dir", str(tmp_path / "work")]) == 0
        listed = bucket.client.list_objects_v2(Bucket="s-laion", Prefix="sy_dbg/")["Contents"]
        (key,) = [entry["Key"] for entry in listed if entry["Key"].endswith(".parquet")]
        back = tmp_path / "back.parquet"
        bucket.client.download_file("s-laion", key, str(back))
        assert pyarrow.parquet.read_table(back).num_rows == len(list(read_samples(source)))
        assert not list((tmp_path / "work").glob("*.parquet")), "it lies in the store alone"
    finally:
        for entry in bucket.client.list_objects_v2(Bucket="s-laion").get("Contents", []):
            bucket.client.delete_object(Bucket="s-laion", Key=entry["Key"])
        bucket.client.delete_bucket(Bucket="s-laion")


def test_a_stage_does_not_follow_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = importlib.import_module("02_captions_processor")
    assert stage.main(["--input", "s3://out/captions", "--output", str(tmp_path / "p"), "--follow"]) == 2
    assert "give the folder that the previous stage got as --work_dir" in capsys.readouterr().err


def test_a_subset_goes_to_a_bucket(tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    from curation.commands.tables.select import main as select

    here = tmp_path / "here.npy"
    flags = [*flags_of_select(tmp_path), "--out"]
    assert select([*flags, str(here)]) == 0
    in_store = [*flags, "s3://out/subsets/keep.npy", "--work_dir", str(tmp_path / "work")]
    for _ in range(2):  # what such a command has put there, it may replace
        assert select(in_store) == 0
        assert bucket.objects() == {"subsets/keep.npy": here.read_bytes()}
    assert "s3://out/subsets/keep.npy: 4 of 9 rows" in capsys.readouterr().out
    bucket.client.put_object(Bucket="out", Key="subsets/keep.npy", Body=b"somebody else's")
    assert select(in_store) == 2
    assert "another file is there; give another name, or --overwrite" in capsys.readouterr().err
    assert bucket.objects() == {"subsets/keep.npy": b"somebody else's"}
    assert select([*in_store, "--overwrite"]) == 0
    assert bucket.objects() == {"subsets/keep.npy": here.read_bytes()}
    assert select([*flags, "s3://nobody-has-this/keep.npy", "--work_dir", str(tmp_path / "work")]) == 2
