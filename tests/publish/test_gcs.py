"""A folder of a bucket of Google Cloud Storage, through Google's own client and on a real server of its protocol."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from google.cloud.storage import blob as google_blob

from curation.commands.publish import main as publish
from curation.commands.tables.select import main as select
from curation.commands.verify.command import main as verify
from curation.errors import InfrastructureError
from curation.publish import gcs
from curation.publish.gcs import GoogleStore
from curation.publish.open_store import store_name
from curation.publish.publisher import Publisher, PublisherOptions
from curation.publish.store import Moved, proof_of
from curation.storage.retry import RetryPolicy
from tests.processes import PATIENCE_S, wait_until
from tests.publish.buckets import GOOGLE_PART, NAME, Place, flags_of_select, local_tars, stage_04
from tests.publish.google_server import GoogleServer, serve_google
from tests.publish.servers import BUCKET, CHANGES, send_what_has_changed, upload_of
from tests.servers.relay import Rule, What

URL = "gs://out/hybrid"
POST, BEGIN, PUT = r"^POST /\S*uploadType=multipart", r"^POST /\S*uploadType=resumable", r"^PUT /\S*upload_id="
LOOK = r"^GET /storage/v1/b/out/o/"
SMALL, LARGE = b"small", random.Random(1).randbytes(3 * GOOGLE_PART + 17)
SIZES = pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "in parts"])


@pytest.fixture(scope="module")
def served() -> Iterator[GoogleServer]:
    with serve_google() as found:
        yield found


@pytest.fixture
def server(served: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleServer]:
    """With an empty bucket ``out``; parts are small and waits short, and this process has its signal handlers back."""
    monkeypatch.setattr(gcs, "PART_BYTES", GOOGLE_PART)
    monkeypatch.setattr(google_blob, "_MAX_MULTIPART_SIZE", 1000)
    monkeypatch.setattr(gcs, "RETRIES", RetryPolicy(tries=3, first_wait_s=0.01, longest_wait_s=0.05))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)}
    served.empty()
    yield served
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def store(server: GoogleServer) -> Iterator[GoogleStore]:
    made = GoogleStore(BUCKET, "f")
    made.conditional = True  # as its check finds out
    yield made
    made.close()


# ---- the store


@pytest.mark.parametrize(("conditional", "at_the_end"), [(True, True), (True, False), (False, False)])
def test_what_the_check_finds_out(server: GoogleServer, conditional: bool, at_the_end: bool) -> None:
    server.conditional, server.at_the_end = conditional, at_the_end
    store = GoogleStore(BUCKET, "")
    store.check()
    assert store.conditional == (conditional and at_the_end)
    assert (store.url, store.guards, store.limits.files) == ("gs://out", True, 1)
    assert server.objects() == {}, "nothing of the check is left"


@pytest.mark.parametrize("data", [SMALL, b"", LARGE], ids=["small", "empty", "in parts"])
def test_a_file_is_sent_and_proved(store: GoogleStore, server: GoogleServer, data: bytes, tmp_path: Path) -> None:
    (stored,) = store.send([upload_of(data)])
    assert server.objects() == {"f/a/1.tar": data}
    assert (stored.name, stored.size, stored.stamp) == ("a/1.tar", len(data), upload_of(data).stamp)
    assert stored.version == server.described("f/a/1.tar")["generation"]
    assert store.look("a/1.tar") == stored and list(store.list()) == [stored], "a listing tells all"
    path = tmp_path / "file"
    path.write_bytes(data)
    crc = f"{google_crc32c.value(data):08x}"
    assert store.checksum_of(stored, path) == store.checksum_of(stored, data) == stored.checksum == f"crc32c:{crc}"
    assert proof_of(stored, {"crc32c": crc}) == "crc32c"
    assert (len(server.asked("POST")), len(server.asked("PUT"))) == ((1, 4) if data is LARGE else (1, 0))
    assert store.read("a/1.tar", len(data)) == data
    assert store.read("a/none", 10) is None
    if data:
        with pytest.raises(InfrastructureError, match="more than"):
            store.read("a/1.tar", len(data) - 1)


@SIZES
def test_conditions(store: GoogleStore, server: GoogleServer, data: bytes) -> None:
    (first,) = store.send([upload_of(data)])
    assert store.send([upload_of(data)]) == [first], "what was written already counts as written"
    other = data[::-1]
    for replaces in ("", "7", "an ETag of another store"):
        with pytest.raises(Moved) as refused:
            store.send([upload_of(other, generation=2, replaces=replaces)])
        assert refused.value.names == ("a/1.tar",)
    assert server.objects() == {"f/a/1.tar": data}
    (newer,) = store.send([upload_of(other, generation=2, replaces=first.version)])
    assert int(newer.version) > int(first.version)
    with pytest.raises(Moved):
        store.send([upload_of(data + b"late", replaces=first.version)])
    assert server.objects() == {"f/a/1.tar": other}
    store.remove(first)
    assert server.objects() == {"f/a/1.tar": other}, "another version stays"
    (forced,) = store.send([upload_of(data, generation=3, replaces=None)])
    assert server.objects() == {"f/a/1.tar": data}
    store.remove(forced)
    store.remove(forced)
    assert store.look("a/1.tar") is None
    with pytest.raises(Moved):
        store.send([upload_of(data, generation=4, replaces=newer.version)])
    assert server.objects() == {}


def test_a_store_without_conditions_is_asked_before_each_write(store: GoogleStore, server: GoogleServer) -> None:
    server.conditional = store.conditional = False
    (first,) = store.send([upload_of(SMALL)])
    with pytest.raises(Moved):
        store.send([upload_of(LARGE, generation=2)])
    (second,) = store.send([upload_of(LARGE, generation=2, replaces=first.version)])
    store.remove(first)
    assert server.objects() == {"f/a/1.tar": LARGE}, "another version stays"
    store.remove(second)
    assert server.objects() == {}


@pytest.mark.parametrize("what", ["before", "midway", "after"])
@pytest.mark.parametrize("which", [POST, BEGIN, PUT, "the end", LOOK], ids=["post", "begin", "part", "end", "look"])
def test_connections_that_are_cut(store: GoogleStore, server: GoogleServer, which: str, what: What) -> None:
    """A part is sent again by itself.  A lost answer to a write ends in 412, and counts as done."""
    data = SMALL if which == POST else LARGE
    passing = [Rule(PUT, times=3)] if which == "the end" else []
    server.relay.rules = [*passing, Rule(PUT if passing else which, what, times=2)]
    (stored,) = store.send([upload_of(data)])
    assert server.objects() == {"f/a/1.tar": data}
    assert stored == store.look("a/1.tar")
    if what != "midway" or which != LOOK:  # without a body there is no half of it
        assert server.relay.rules[-1].times == 0
    assert len(server.asked("PUT")) <= 4 + 2, "no part is sent again that has arrived"


def test_a_store_that_stays_away(store: GoogleStore, server: GoogleServer) -> None:
    server.relay.rules = [Rule(PUT, times=2), Rule(PUT, "midway", times=99)]
    with pytest.raises(InfrastructureError, match=r"^gs://out/f/a/1.tar: the store cannot be reached, 3 times: ") as no:
        store.send([upload_of(LARGE)])
    assert "upload_id=out" not in str(no.value), "whoever has the id of an upload can write"
    assert server.objects() == {}
    assert len(server.asked("PUT")) == 2 + 3


@pytest.mark.parametrize("how", ["the upload is gone", "half a part is kept", "nothing of a part is kept"])
def test_an_upload_in_parts_that_must_be_begun_again(store: GoogleStore, server: GoogleServer, how: str) -> None:
    def lose() -> None:
        if how == "the upload is gone":
            server.storage.resumable.clear()
        elif how == "half a part is kept":
            server.forgets = 1
        else:
            server.drops = 1

    server.relay.rules = [Rule(PUT), Rule(PUT, then=lose)]
    store.send([upload_of(LARGE)])
    assert server.objects() == {"f/a/1.tar": LARGE}
    assert len(server.asked("POST")) == 2


@pytest.mark.parametrize("compares", [True, False])
def test_bytes_that_change_on_the_way(store: GoogleStore, server: GoogleServer, compares: bool) -> None:
    server.damages, server.compares = True, compares
    with pytest.raises(InfrastructureError, match="doesn't match" if compares else "keeps other bytes than were sent"):
        store.send([upload_of(LARGE)])
    assert list(server.objects()) == ([] if compares else ["f/a/1.tar"])


@SIZES
@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changed_is_never_seen(
    store: GoogleStore, server: GoogleServer, data: bytes, how: str, tmp_path: Path
) -> None:
    send_what_has_changed(store, data, how, tmp_path / "file")
    assert server.objects() == {}


def test_a_newer_object_meanwhile(store: GoogleStore, server: GoogleServer) -> None:
    """Whoever is late is refused at the end of its upload, whatever it has sent by then."""
    other = GoogleStore(BUCKET, "f")
    other.conditional = True
    newer = upload_of(LARGE[::-1], generation=2)
    server.relay.rules = [Rule(PUT, times=3), Rule(PUT, then=lambda: other.send([newer]))]
    with pytest.raises(Moved):
        store.send([upload_of(LARGE)])
    assert server.objects() == {"f/a/1.tar": LARGE[::-1]}


def test_the_listing(store: GoogleStore, server: GoogleServer) -> None:
    """In the order of names, page by page, of the folder only; names may have any characters."""
    names = sorted(["a/1.tar", "a/10.tar", "a-b/x +&%20é.tar", "a.txt", "b/c/d.json"])
    for name in names:
        store.send([upload_of(name.encode(), name=name)])
    for key in ("other", "fa", "f/empty/"):
        server.put(key, b"")
    server.page = 2
    server.relay.rules = [Rule("pageToken=2", "after", times=2)]
    found = list(store.list())
    assert server.relay.rules[0].times == 0, "a page that is asked for again does not end the listing"
    assert [file.name for file in found] == names
    assert found == [store.look(name) for name in names]
    assert [file.name for file in store.list("a")] == ["a/1.tar", "a/10.tar"]
    assert list(store.list("nothing")) == []


def test_somebody_elses_object(store: GoogleStore, server: GoogleServer) -> None:
    server.put("f/x", b"foreign")
    server.described("f/x")
    server.storage.objects[BUCKET]["f/x"] |= {"metadata": {"curation-generation": "x"}, "crc32c": "not base64"}
    found = store.look("x")
    assert found is not None and (found.stamp, found.checksum, found.size) == (None, "", 7)


# ---- publishing


def tars(server: GoogleServer) -> dict[str, bytes]:
    return {name: data for name, data in server.objects().items() if name.endswith(".tar")}


def insist_on(place: Place, server: GoogleServer, wanted: dict[str, bytes]) -> None:
    """The bucket holds exactly these tars, and all other objects are the local files; receipts have their checksums."""
    objects = server.objects()
    assert {name: data for name, data in objects.items() if name.endswith(".tar")} == wanted
    newest = {f"{shard}.{place.receipt(shard)['generation']}.json" for shard in place.ids}
    for name, data in objects.items():
        if "/_published/" not in name or Path(name).name in newest:  # the store keeps older receipts of uploads
            assert data == wanted.get(name) or data == (place.out / name.removeprefix("hybrid/")).read_bytes(), name
    for shard in place.ids:
        receipt = place.receipt(shard)
        proof = place.proofs()[f"{shard}.{receipt['generation']}.json"]
        assert (proof["store"], proof["token"], proof["generation"]) == (URL, receipt["token"], receipt["generation"])
        for file in proof["files"]:
            there = server.described(f"hybrid/{file['name']}")
            crc = google_crc32c.value(objects[f"hybrid/{file['name']}"])
            assert (file["version"], file["checksum"]) == (there["generation"], f"crc32c:{crc:08x}")
        copy = f"hybrid/_published/{store_name(URL)}/{NAME}/00000/{shard}.{receipt['generation']}.json"
        assert json.loads(objects[copy]) == proof, "and so does a copy in the store"
    assert not [name for name in objects if "_claims" in name or "_partial" in name]


def test_a_stage_publishes_by_either_flag(tmp_path: Path, server: GoogleServer, capfd: Any) -> None:
    place = Place(tmp_path)
    assert place.run("--publish_to", URL) == 0
    insist_on(place, server, local_tars(place))
    assert f"{URL}: 2 shards published" in capfd.readouterr().out
    assert verify([URL, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["ok"] and told["proved_by"].keys() == {"crc32c"}
    server.relay.asked.clear()
    assert publish([str(place.out), "--to", URL]) == 0
    asked = [line for line in server.relay.asked if "check" not in line and "/o/" in line]
    assert asked == [] and server.asked("PUT")[1:] == [], "but for the check nothing is asked or sent again"
    there = tars(server)
    place.edit(place.ids[0], b"another text")
    assert place.run("--work_dir", place.out, out=URL) == 0
    now = tars(server)
    assert [name for name in now if now[name] != there[name]] == [f"hybrid/{place.ids[0]}.tar"]
    assert local_tars(place).keys() == {f"hybrid/{place.ids[1]}.tar"}, "an output that is a URL lies in the store alone"
    insist_on(place, server, now)


@pytest.mark.parametrize("what", ["bucket", "rights", "credentials", "key"])
def test_what_is_wrong_ends_the_run_before_the_first_shard(
    place: Place, server: GoogleServer, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "gs://nobody-has-this/x" if what == "bucket" else URL
    server.refuses = 403 if what == "rights" else 0
    if what in ("credentials", "key"):
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
        monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
        monkeypatch.setenv("NO_GCE_CHECK", "true")  # is this a machine of Google's?  Asking takes seconds
        (place.root / "key.json").write_text('{"type": "service_account", "private_key": "opensesame"}')
        if what == "key":
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(place.root / "key.json"))
    shutil.rmtree(place.out)
    for words in (place.arguments("--publish_to", url), place.arguments("--work_dir", place.out, out=url)):
        capsys.readouterr()
        assert stage_04.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {url}: ")
        said = {"bucket": "there is no such bucket", "rights": "refused: HTTP 403: "}
        assert said.get(what, "credentials come from the environment") in line
        assert "opensesame" not in line
        assert not list(place.out.rglob("*.json")), "no shard was begun"
    assert verify([url]) == 2


class Killed(BaseException):
    """The process ends here."""


def publisher(place: Place, **options: Any) -> Publisher:
    store: Any = GoogleStore(BUCKET, "hybrid")
    store.conditional = True
    return Publisher(place.out, NAME, store, store_name(URL), PublisherOptions(lease_s=1, **options))


def let_die(store: Any, at: int) -> None:
    """The process dies after its request number ``at``."""
    session = store._client._http
    ask, count = session.request, 0

    def request(method: str, url: str, **given: Any) -> Any:
        nonlocal count
        answer = ask(method, url, **given)
        if url.partition("?")[0].endswith(f"/b/{BUCKET}"):  # the client looks at the bucket in a thread of its own
            return answer
        count += 1
        if count >= at:
            raise Killed
        return answer

    session.request = request


def test_a_kill_after_each_request(tmp_path: Path, server: GoogleServer) -> None:
    """The store is then as it is before the next one."""
    place = Place(tmp_path, ("00000000",))
    assert place.run() == 0
    wanted = local_tars(place)
    at, died = 0, True
    while died:
        at += 1
        shutil.rmtree(place.out / "_published", ignore_errors=True)
        server.empty()
        first = publisher(place)
        let_die(first._store, at)
        died = False
        try:
            first.go()
        except Killed:
            died = True
        outcome = publisher(place).go()
        insist_on(place, server, wanted)
        assert outcome.changed == [] and outcome.left == 0
    assert at > 8, "requests of a shard of several parts"


def test_a_publisher_that_was_stopped_in_mid_upload_is_late(tmp_path: Path, server: GoogleServer) -> None:
    """SIGSTOP before the last part; the shard is done again and published by another; SIGCONT."""
    place = Place(tmp_path, ("00000000",))
    assert place.run() == 0
    held: list[int] = []
    process = place.start("publish", place.out, "--to", URL, "--lease_s", "1", "--quiet", script="curation")

    def stop() -> None:
        os.kill(process.pid, signal.SIGSTOP)
        held.append(process.pid)

    try:
        server.relay.rules = [Rule(PUT), Rule(PUT, then=stop)]
        wait_until(lambda: bool(held), while_runs=process)
        server.relay.rules = []
        place.edit(place.ids[0], b"another text")
        assert place.run() == 0
        wanted = local_tars(place)
        assert publish([str(place.out), "--to", URL, "--lease_s", "1"]) == 0
        assert tars(server) == wanted
        os.kill(process.pid, signal.SIGCONT)
        _, log = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, log
        insist_on(place, server, wanted)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_somebody_elses_objects_are_not_replaced(
    place: Place, server: GoogleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = f"hybrid/{place.ids[1]}.tar"
    server.put(foreign, b"somebody else's")
    assert publish([str(place.out), "--to", URL]) == 2
    assert f"gs://out/{foreign}: this file was not put there from" in capsys.readouterr().err
    assert tars(server)[foreign] == b"somebody else's"
    assert publish([str(place.out), "--to", URL, "--overwrite"]) == 0
    insist_on(place, server, local_tars(place))


def test_what_the_folder_does_not_have_any_more_goes_with_prune(place: Place, server: GoogleServer) -> None:
    assert publish([str(place.out), "--to", URL]) == 0
    server.put("hybrid/mine.txt", b"a file of the user")
    server.put(f"hybrid/{place.ids[0]}.tar", b"somebody else's by now")
    (place.out / "_receipts" / NAME / "00000" / f"{place.ids[0]}.json").unlink()
    assert publish([str(place.out), "--to", URL, "--prune"]) == 0
    left = {name: data for name, data in server.objects().items() if place.ids[0] in name or "mine" in name}
    assert left == {
        "hybrid/mine.txt": b"a file of the user", f"hybrid/{place.ids[0]}.tar": b"somebody else's by now"
    }  # fmt: skip


@pytest.mark.parametrize("conditional", [True, False])
def test_only_a_store_with_conditions_costs_a_local_file(
    place: Place, server: GoogleServer, conditional: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server.conditional = conditional
    wanted = local_tars(place)
    assert publish([str(place.out), "--to", URL, "--keep_local", "receipts"]) == 0
    assert local_tars(place) == ({} if conditional else wanted)
    assert ("keeps no conditions" in capsys.readouterr().err) == (not conditional)
    insist_on(place, server, wanted)


def test_a_subset_goes_to_a_bucket(tmp_path: Path, server: GoogleServer, capsys: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "here.npy"
    flags = [*flags_of_select(tmp_path), "--out"]
    assert select([*flags, str(here)]) == 0
    in_store = [*flags, "gs://out/subsets/keep.npy", "--work_dir", str(tmp_path / "work")]
    assert select(in_store) == 0
    assert server.objects() == {"subsets/keep.npy": here.read_bytes()}
    server.put("subsets/keep.npy", b"somebody else's")
    assert select(in_store) == 2
    assert "another file is there; give another name, or --overwrite" in capsys.readouterr().err
    assert server.objects() == {"subsets/keep.npy": b"somebody else's"}
