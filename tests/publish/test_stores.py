"""URLs of stores, a folder of another filesystem as a store, and what ``verify`` says of what lies in a store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from curation.commands.verify import command, stored
from curation.errors import InfrastructureError, UsageError
from curation.publish import hub_store
from curation.publish.folder import FolderStore
from curation.publish.gcs import GoogleStore
from curation.publish.open_store import address_of, open_store, refuse_own_folder, repository_in, store_name
from curation.publish.s3 import S3Store
from curation.publish.store import Changed, Moved, Stamp, Store, StoredFile, Upload
from curation.storage.retry import RetryPolicy
from tests.publish.google_server import serve_google
from tests.publish.servers import BUCKET, serve_s3, upload_of
from tests.servers.hub import Hub, serve
from tests.servers.hub_datasets import Fault

# ---- URLs


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://me:secret@host/x", "nothing can be published there"),
        ("ftp://host/x", "nothing can be published there"),
        ("s3://", "give a bucket"),
        ("s3://me:secret@bucket/x", "give a bucket"),
        ("s3://bucket/a/../b", "no empty part and no .."),
        ("s3://bucket//b", "no empty part and no .."),
        ("s3://bucket/a*", "no empty part and no .."),
        ("gs://bucket/a\nb", "no empty part and no .."),
        ("s3://bucket/x?X-Amz-Signature=secret", "no empty part and no .."),
        ("s3://bucket?secret", "give a bucket"),
        ("hf://me/it", "give a dataset repository"),
        ("hf://datasets/me", "give a dataset repository"),
        ("hf://datasets/me/..", "is not the name of a repository"),
        ("hf://datasets/me/it/../x", "no empty part and no .."),
        ("file://host/x", "give a path of this machine"),
        ("file:///x?secret", "give a path of this machine"),
        ("file:///x/%2e%2e/y", "without .."),
        ("", "give a folder"),
        ("s3:/bucket/x", "Type s3://bucket/x"),
        ("S3:/bucket/x", "Type S3://bucket/x"),
        ("a\0b", "give a folder"),
        ("/a/../b", "without .."),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    for ask in (address_of, open_store, store_name):
        with pytest.raises(UsageError) as error:
            ask(url)
        assert said in str(error.value)
        assert "secret" not in str(error.value)


def test_urls_and_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    urls = ["s3://b/f", "s3://b/f/g", "s3://b-f", "gs://b/f", "hf://datasets/me/it", "hf://datasets/me/it/f", "/b/f"]
    assert [address_of(url).url for url in urls] == urls
    assert address_of("S3://b/f//").url == "s3://b/f" and address_of("gcs://b").url == "gs://b"
    assert address_of("file:///b%20c/f").url == "/b c/f"
    assert address_of("~/f").url == os.path.expanduser("~/f"), "which a shell leaves in --publish_to=~/f"
    names = [store_name(url) for url in urls]
    assert len(set(names)) == len(urls)
    assert all(name.rpartition("-")[0] and len(name) < 100 for name in names)
    assert names[0].startswith("s3-b-f-") and len(names[0]) == len("s3-b-f-") + 8
    assert store_name("s3://b/f/") == names[0], "the same store has the same name"
    assert "/" not in store_name("s3://b/" + "ü /"[:2] * 300)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@127.0.0.1:9")
    assert store_name("s3://b/f") != names[0], "on another server it is another store"
    assert repository_in("hf://datasets/me/it") == "me/it"
    assert repository_in("hf://datasets/me/it/f") is repository_in("s3://b") is None
    assert isinstance(open_store(str(tmp_path)), FolderStore)


# ---- another filesystem


def test_a_folder(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.check()
    assert list((tmp_path / "store").iterdir()) == [] and not store.conditional
    (first,) = store.send([upload_of(b"one")])
    path = tmp_path / "store" / "a" / "1.tar"
    assert path.read_bytes() == b"one" == store.read("a/1.tar", 3)
    assert first == store.look("a/1.tar") and first.checksum == store.checksum_of(first, b"one")
    assert first.stamp == upload_of(b"one").stamp
    assert store.send([upload_of(b"one")]) == [first], "what was written already counts as written"
    for late in (upload_of(b"two", generation=2), upload_of(b"two", generation=2, replaces="7-7")):
        with pytest.raises(Moved):
            store.send([late])
    (second,) = store.send([upload_of(b"two", generation=2, replaces=first.version)])
    (tmp_path / "file").write_bytes(b"twO")
    changed = Upload("a/2.tar", tmp_path / "file", 3, second.stamp or Stamp("", 0, ""), "")
    with pytest.raises(Changed):
        store.send([changed])
    store.remove(first)
    assert path.read_bytes() == b"two"
    assert [file.name for file in store.list()] == ["a/1.tar"] and list(store.list("b")) == []
    path.write_bytes(b"TWO")
    foreign = store.look("a/1.tar")
    assert foreign is not None and foreign.stamp is None and foreign.checksum != second.checksum
    (third,) = store.send([upload_of(b"three", generation=3, replaces=None)])
    with pytest.raises(InfrastructureError, match="more than"):
        store.read("a/1.tar", 4)
    store.remove(third)
    assert store.look("a/1.tar") is None is store.read("a/1.tar", 1)
    left = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert [path.parent.name for path in left] == ["a"], "of the file that somebody else overwrote, the stamp is left"
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(InfrastructureError, match="cannot be the name"):
            store.look(name)


def test_a_folder_lists_in_the_order_of_names_and_follows_no_links(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    names = sorted(["a/1", "a-b/2", "a.txt", "a/0/x", "b"])
    for name in names:
        store.send([upload_of(b"x", name)])
    os.symlink(tmp_path / "store" / "b", tmp_path / "store" / "link")
    os.symlink(tmp_path, tmp_path / "store" / "loop")
    assert [file.name for file in store.list()] == names
    assert [file.name for file in store.list("a")] == ["a/0/x", "a/1"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the filesystem mounted"):
        FolderStore(tmp_path / "nothing" / "store").check()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        FolderStore(tmp_path / "file").check()


# ---- the hub


REPO, TOKEN = "somebody/it", "hf_" + "s3cr3tT0ken" * 3


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        server.datasets.token = TOKEN
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_store, "RETRIES", RetryPolicy(tries=3, first_wait_s=0.01))
        monkeypatch.setattr(hub_store, "_CONFLICTS", RetryPolicy(tries=3, first_wait_s=0.01))
        yield server


def test_the_hub(hub: Hub) -> None:
    with contextlib.closing(open_store(f"hf://datasets/{REPO}/f")) as store:
        store.check()
        assert (store.conditional, store.guards, store.limits.files) == (True, False, 200)
        first, text = store.send([upload_of(b"one"), upload_of(b"{}", "a.jsonl")])
        files = hub.datasets.repos[REPO].files
        assert (files["f/a/1.tar"], files["f/a.jsonl"]) == (b"one", b"{}")
        assert first.checksum.startswith("sha256:") and text.checksum.startswith("git:")
        assert store.checksum_of(first, b"one") == first.checksum and store.checksum_of(text, b"{}") == text.checksum
        assert list(store.list()) == [text, first] and list(store.list("a")) == [first]
        assert store.read("a.jsonl", 2) == b"{}" and store.read("b", 1) is None
        commits = len(hub.datasets.repos[REPO].commits)
        assert store.send([upload_of(b"one")]) == [first]
        assert len(hub.datasets.repos[REPO].commits) == commits, "what is there is not committed again"
        with pytest.raises(Moved) as moved:
            store.send([upload_of(b"two"), upload_of(b"x", "b.tar")])
        assert moved.value.names == ("a/1.tar",) and "f/b.tar" not in hub.datasets.repos[REPO].files
        (second,) = store.send([upload_of(b"two", replaces=first.version)])
        store.remove(first)
        assert store.look("a/1.tar") == second
        store.remove(second)
        assert store.look("a/1.tar") is None
        with pytest.raises(InfrastructureError, match="make it shorter"):
            store.read("a.jsonl", 1)


def test_somebody_else_commits_to_the_hub_meanwhile(hub: Hub) -> None:
    with contextlib.closing(open_store(f"hf://datasets/{REPO}")) as store:
        store.check()
        held = hub.datasets

        def other(path: str, data: bytes) -> Any:
            held.large[hashlib.sha256(data).hexdigest()] = data
            return lambda: held.repos[REPO].commit("other", {path: data})

        held.faults.append(Fault("POST .*/commit/", before=other("b.tar", b"b")))
        store.send([upload_of(b"one")])
        assert held.repos[REPO].files["a/1.tar"] == b"one" and held.repos[REPO].files["b.tar"] == b"b"
        held.faults.append(Fault("POST .*/commit/", before=other("c.tar", b"newer")))
        with pytest.raises(Moved):
            store.send([upload_of(b"late", "c.tar")])
        assert held.repos[REPO].files["c.tar"] == b"newer"
        held.faults.append(Fault("POST .*/commit/", times=9, status=503))
        with pytest.raises(InfrastructureError, match="publish again later") as error:
            store.send([upload_of(b"d", "d.tar")])
        assert TOKEN not in str(error.value)


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 30)
    with contextlib.closing(open_store(f"hf://datasets/{REPO}")) as store, pytest.raises(InfrastructureError):
        store.check()


# ---- verify


def publish(store: Store, shard: str, generation: int, files: dict[str, bytes], *, obsolete: Any = ()) -> None:
    """What a publisher does for one shard."""
    receipt = json.dumps({"shard": shard, "generation": generation}).encode()
    place = f"_receipts/04_reshard/b/{shard}.json"
    done = [
        store.send([upload_of(data, name, generation, None)])[0] for name, data in {**files, place: receipt}.items()
    ]
    named = [
        {"name": one.name, "size": one.size, "version": one.version, "checksum": one.checksum, "digest": ""}
        for one in done
    ]
    record = {
        "store": store.url, "stage": "04_reshard", "shard": shard, "generation": generation, "token": "t",
        "files": named, "obsolete": list(obsolete),
    }  # fmt: skip
    name = f"_published/{store_name(store.url)}/04_reshard/b/{shard}.{generation}.json"
    store.send([upload_of(json.dumps(record).encode(), name, generation, None)])


@pytest.fixture(params=["moto", "rclone", "gs", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        yield FolderStore(tmp_path / "store")
        return
    if request.param == "gs":
        with serve_google():
            yield GoogleStore(BUCKET, "f")
        return
    with serve_s3(request.param, tmp_path):
        yield S3Store(BUCKET, "f")


def test_verify(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    url = store.url if "://" in store.url else f"file://{store.url}"
    assert command.main([url]) == 2
    assert "has no receipt of an upload to this store" in capsys.readouterr().err
    for number in range(3):
        publish(store, f"{number}", 1, {f"shards/{number}.tar": b"tar %d" % number})
    store.send(
        [
            upload_of(b"{}", "_receipts/04_reshard/_epoch.1.json"),
        ][:1]
    )
    store.send([upload_of(b"", "captions.jsonl")])
    assert command.main([url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and (told["shards"], told["files"], told["beside"]) == (3, 6, 2)
    assert sum(told["proved_by"].values()) == 6 and "size only" not in told["proved_by"]
    assert command.main([url]) == 0
    assert capsys.readouterr().out.startswith("OK: 3 shards, 6 files (6 by ")
    # Now everything that can be wrong.
    first = store.look("shards/0.tar")
    assert first is not None
    store.remove(first)
    store.send([upload_of(b"TAR 1", "shards/1.tar", 1, None)])
    newer = json.dumps({"shard": "2", "generation": 2}).encode()
    store.send([upload_of(newer, "_receipts/04_reshard/b/2.json", 2, None)])
    store.send([upload_of(b"whose?", "shards/9.tar")])
    old = {"name": "shards/3.idx", "size": 3, "version": ""}
    store.send([upload_of(b"idx", "shards/3.idx")])
    publish(store, "3", 2, {"shards/3.tar": b"tar 3"}, obsolete=[old])
    assert command.main([url, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert [told[kind] for kind in ("missing", "wrong", "outdated", "foreign")] == [1, 1, 2, 1]
    kinds = {one["key"]: one["kind"] for shard in told["findings"].values() for one in shard["findings"]}
    assert kinds == {
        "shards/0.tar": "missing", "shards/1.tar": "wrong", "_receipts/04_reshard/b/2.json": "outdated",
        "shards/3.idx": "outdated", "shards/9.tar": "foreign",
    }  # fmt: skip
    assert command.main([url]) == 1
    assert "FAULTY: 1 missing, 1 wrong, 2 outdated, 1 foreign; " in capsys.readouterr().out


def test_verify_by_records_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where only the work folder has the receipts of uploads."""
    store = FolderStore(tmp_path / "store")
    publish(store, "0", 1, {"0.tar": b"tar"})
    os.rename(tmp_path / "store" / "_published", tmp_path / "_published")
    assert command.main([f"file://{store.url}"]) == 2
    assert "--records DIR" in capsys.readouterr().err
    assert command.main([f"file://{store.url}", "--records", str(tmp_path)]) == 0


def test_which_arguments_mean_a_store() -> None:
    assert stored.is_of_a_store(["s3://b/f"]) and stored.is_of_a_store(
        ["--json", "hf://datasets/a/b", "--records", "x"]
    )
    assert not stored.is_of_a_store(["/a"]) and not stored.is_of_a_store(["/a", "/hybrid", "--quiet"])
    assert not stored.is_of_a_store(["/source", "--edits", "s3://b/f", "/hybrid"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["s3://b/f", "hybrid"], "verify s3://b/f, and --records FOLDER"),
        (["hybrid", "--json", "s3://b/f"], "verify s3://b/f, and --records FOLDER"),
        (["s3://b/f", "--record", "hybrid"], "Did you mean --records?"),
        (["s3://b/f", "--workers", "2"], "there is no option --workers here"),
    ],
)
def test_wrong_arguments_of_a_store(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    assert said in capsys.readouterr().err


def test_the_help_of_verify_tells_of_stores(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "verify s3://bucket/folder" in " ".join(capsys.readouterr().out.split())


def test_a_store_in_the_folder_to_be_published(tmp_path: Path) -> None:
    home = tmp_path / "hybrid"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    for inside in (home, home / "copy", tmp_path / "link" / "copy"):
        for url in (str(inside), f"file://{inside}"):
            with pytest.raises(UsageError, match="or lies inside it or around it"):
                refuse_own_folder(url, home)
    for elsewhere in (f"{home}2", "s3://bucket/hybrid"):
        refuse_own_folder(elsewhere, home)


class Endless(FolderStore):
    """So many objects that no list of them should be kept; each has a receipt of its upload."""

    def __init__(self, count: int) -> None:
        super().__init__(Path("/store"))
        self.count = count

    def list(self, below: str = "") -> Iterator[StoredFile]:
        for number in range(self.count):
            if below:
                yield StoredFile(f"_published/s/04_reshard/b/{number:08d}.1.json", 1)
            else:
                yield StoredFile(f"{number:08d}.tar", 1, "v")

    def look(self, name: str) -> StoredFile | None:
        return StoredFile(name, 1, "v", f"xxh3:{name}")

    def read(self, name: str, at_most: int) -> bytes | None:
        shard = name.rpartition("/")[2].partition(".")[0]
        file = {"name": f"{shard}.tar", "size": 1, "version": "v", "checksum": f"xxh3:{shard}.tar"}
        record = {"store": self.url, "stage": "04_reshard", "shard": shard, "generation": 1, "files": [file]}
        return json.dumps(record).encode()


def test_memory_is_flat_in_objects() -> None:
    peaks = []
    for count in (300, 2000):
        tracemalloc.start()
        try:
            store = Endless(count)
            found = stored.verify_store(store, store)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert (found.files, found.shards, found.findings) == (count, count, {})
    assert peaks[1] - peaks[0] < 100_000
