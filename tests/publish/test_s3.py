"""A folder of a bucket as a store, on two real servers: conditions, checksums, and connections that are cut."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.errors import InfrastructureError, UsageError
from curation.publish import s3
from curation.publish.s3 import S3Store
from curation.publish.store import Moved, Stamp, StoredFile, Upload, proof_of
from curation.storage.retry import RetryPolicy
from tests.publish.servers import (
    BUCKET,
    CHANGES,
    KINDS,
    S3Server,
    keep_if_match,
    send_what_has_changed,
    serve_s3,
    upload_of,
)
from tests.servers.relay import Rule, What

PART = 64 << 10
COMPLETE, PUT_PART, BEGIN = r"^POST /\S*\?uploadId=", r"^PUT /\S*partNumber=", r"^POST /\S*\?uploads"
PUT = r"^PUT /out/f/\S*$"


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(request.param, tmp_path_factory.mktemp("buckets")) as found, pytest.MonkeyPatch.context() as patch:
        if found.kind == "moto":
            keep_if_match(patch)
        yield found


@pytest.fixture
def server(served: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """With an empty bucket ``out``; parts are small and waits short."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr(s3, "RETRIES", RetryPolicy(tries=3, first_wait_s=0.01, longest_wait_s=0.05))
    served.relay.reset()
    yield served
    served.empty()


@pytest.fixture(scope="module")
def opened(served: S3Server) -> Iterator[S3Store]:
    made = S3Store(BUCKET, "f")  # once, because boto3 needs a moment for each client
    made.conditional, made._with_md5 = served.kind == "moto", served.kind == "rclone"  # as ``check`` finds out
    yield made
    made.close()


@pytest.fixture
def store(server: S3Server, opened: S3Store) -> S3Store:
    return opened


SMALL, LARGE = b"small", random.Random(1).randbytes(5 * PART + 17)


def test_what_the_servers_know(server: S3Server) -> None:
    store = S3Store(BUCKET, "")
    store.check()
    assert store.conditional == (server.kind == "moto")
    assert store.url == "s3://out"
    assert server.objects() == {} and server.uploads() == [], "nothing of the check is left"


def test_a_store_that_keeps_conditions_of_small_files_only(tmp_path: Path) -> None:
    """moto as it is does not read If-Match at the end of a multipart upload."""
    with serve_s3("moto", tmp_path):
        store = S3Store(BUCKET, "f")
        store.check()
        assert not store.conditional


@pytest.mark.parametrize("data", [SMALL, b"", LARGE], ids=["small", "empty", "in parts"])
def test_a_file_is_sent_and_proved(store: S3Store, server: S3Server, data: bytes, tmp_path: Path) -> None:
    (stored,) = store.send([upload_of(data)])
    assert server.objects() == {"f/a/1.tar": data}
    assert (stored.name, stored.size, stored.stamp) == ("a/1.tar", len(data), upload_of(data).stamp)
    assert store.look("a/1.tar") == stored
    assert stored.version
    path = tmp_path / "file"
    path.write_bytes(data)
    if server.kind == "moto" or data is not LARGE:
        kind = stored.checksum.partition(":")[0]
        assert kind in ("crc32", "crc64nvme")
        assert store.checksum_of(stored, path) == store.checksum_of(stored, data) == stored.checksum
        assert proof_of(stored, {kind: stored.checksum.partition(":")[2]}) == kind
    assert len(server.asked("PUT")) == (6 if data is LARGE else 1)
    assert store.read("a/1.tar", len(data)) == data
    assert store.read("a/none", 10) is None
    if data:
        with pytest.raises(InfrastructureError, match="more than"):
            store.read("a/1.tar", len(data) - 1)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "in parts"])
def test_conditions(store: S3Store, server: S3Server, data: bytes) -> None:
    (first,) = store.send([upload_of(data)])
    assert store.send([upload_of(data)]) == [first], "what was written already counts as written"
    second = upload_of(data[::-1], generation=2)
    with pytest.raises(Moved) as refused:
        store.send([second])
    assert refused.value.names == ("a/1.tar",)
    with pytest.raises(Moved):
        store.send([upload_of(data[::-1], generation=2, replaces="0" * 32)])
    assert server.objects() == {"f/a/1.tar": data}
    (newer,) = store.send([upload_of(data[::-1], generation=2, replaces=first.version)])
    with pytest.raises(Moved):
        store.send([upload_of(data + b"late", generation=1, replaces=first.version)])
    assert server.objects() == {"f/a/1.tar": data[::-1]}
    store.remove(first)
    assert server.objects() == {"f/a/1.tar": data[::-1]}, "another version stays"
    (forced,) = store.send([upload_of(data, generation=3, replaces=None)])
    assert server.objects() == {"f/a/1.tar": data}
    store.remove(forced)
    store.remove(forced)
    assert store.look("a/1.tar") is None
    with pytest.raises(Moved):
        store.send([upload_of(data, generation=4, replaces=newer.version)])
    assert server.objects() == {} and server.uploads() == []


@pytest.mark.parametrize("what", ["before", "midway", "after"])
@pytest.mark.parametrize(
    "which", [PUT, BEGIN, PUT_PART, COMPLETE, "^HEAD"], ids=["put", "begin", "part", "end", "head"]
)
def test_connections_that_are_cut(store: S3Store, server: S3Server, which: str, what: What) -> None:
    """A lost answer to a request that the store has carried out ends in 412 or NoSuchUpload, and counts as done."""
    data = SMALL if which == PUT else LARGE
    server.relay.rules = [Rule(which, what, times=2)]
    (stored,) = store.send([upload_of(data)])
    assert server.objects() == {"f/a/1.tar": data}
    assert stored == store.look("a/1.tar")
    if what != "midway" or which not in (BEGIN, "^HEAD"):  # without a body there is no half of it
        assert server.relay.rules[0].times == 0
    if not (which == BEGIN and what == "after"):  # whose id nobody knows: for the bucket's lifecycle rule
        assert server.uploads() == []


def test_a_store_that_stays_away(store: S3Store, server: S3Server) -> None:
    server.relay.rules = [Rule(PUT_PART + "3", "midway", times=99)]
    with pytest.raises(InfrastructureError, match=r"^s3://out/f/a/1.tar: the store cannot be reached, 3 times: ") as no:
        store.send([upload_of(LARGE)])
    assert "opensesame" not in str(no.value)
    assert server.objects() == {} and server.uploads() == []


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "in parts"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changed_is_never_seen(
    store: S3Store, server: S3Server, data: bytes, how: str, tmp_path: Path
) -> None:
    send_what_has_changed(store, data, how, tmp_path / "file")
    assert server.objects() == {} and server.uploads() == []


def test_a_newer_object_meanwhile(store: S3Store, server: S3Server) -> None:
    """Whoever is late is refused at the end of its upload, whatever it has sent by then."""
    late, newer = upload_of(LARGE), upload_of(LARGE[::-1], generation=2)
    other = S3Store(BUCKET, "f")
    other.conditional = store.conditional
    server.relay.rules = [Rule(COMPLETE, then=lambda: other.send([newer]))]
    if server.kind == "rclone":
        pytest.skip("it keeps no conditions; the publisher sends again what is not there")
    with pytest.raises(Moved):
        store.send([late])
    assert server.objects() == {"f/a/1.tar": LARGE[::-1]} and server.uploads() == []


def test_the_listing(store: S3Store, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of names, page by page, of the folder only; names may have any characters."""
    names = sorted(["a/1.tar", "a/10.tar", "a-b/x +&%20é.tar", "a.txt", "b/c/d.json"])
    for name in names:
        store.send([upload_of(name.encode(), name=name)])
    for key in ("other", "fa", *(["f/empty/"] if server.kind == "moto" else [])):
        server.client.put_object(Bucket=BUCKET, Key=key, Body=b"")
    ask = store._request

    def small_pages(name: str, method: str, arguments: Any, tries: int = 0) -> Any:
        return ask(name, method, {"MaxKeys": 2, **arguments} if method.startswith("list") else arguments, tries)

    monkeypatch.setattr(store, "_request", small_pages)
    found = list(store.list())
    assert [file.name for file in found] == names
    assert [file.size for file in found] == [len(name.encode()) for name in names]
    assert [file.version for file in found] == [(store.look(name) or found[0]).version for name in names]
    assert [file.name for file in store.list("a")] == ["a/1.tar", "a/10.tar"]
    assert list(store.list("nothing")) == []


def test_memory_is_bounded_by_parts(store: S3Store, server: S3Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 256 << 10)
    path, size = tmp_path / "file", 24 << 20
    path.write_bytes(os.urandom(size))
    monkeypatch.setattr(store, "_ask", lambda name, method, **given: {"UploadId": "u", "ETag": "e"})
    upload = Upload("a", path, size, Stamp("", 1, "t"))
    tracemalloc.start()
    try:
        store._send_parts(upload, s3.Contents(upload, store._kind))
        assert tracemalloc.get_traced_memory()[1] < 8 * (256 << 10)
    finally:
        tracemalloc.stop()


def test_a_bucket_that_is_not_there(server: S3Server) -> None:
    with pytest.raises(UsageError, match=r"^s3://nobody/f: there is no such bucket; "):
        S3Store("nobody", "f").check()


def test_no_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(UsageError, match=r"Unable to locate credentials.*come from the environment"):
        S3Store(BUCKET, "f").check()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match=r"^s3://out/f: ProfileNotFound: "):
        S3Store(BUCKET, "f")


def test_foreign_checksums() -> None:
    """What other tools write: checksums of parts, of other kinds, or none."""
    head = {"ContentLength": 7, "ETag": '"abc-2"', "ChecksumSHA256": "q80=-2", "ChecksumType": "COMPOSITE"}
    assert s3._described("x", head) == StoredFile("x", 7, "abc-2", "sha256-parts:abcd-2")
    assert (
        s3._described("x", {**head, "ChecksumType": "FULL_OBJECT", "ChecksumSHA256": "q80="}).checksum == "sha256:abcd"
    )
    assert s3._described("x", {"ContentLength": 7, "ETag": '"abc"', "ChecksumCRC32": "not base64"}).checksum == ""
    assert s3._described("x", {"ContentLength": 7, "Metadata": {"Curation-Generation": "x"}}).stamp is None


def test_a_checksum_of_parts(server: S3Server, tmp_path: Path) -> None:
    """It is computed again from the file by the size of the first part."""
    store, client = S3Store(BUCKET, "f"), server.client
    place = {"Bucket": BUCKET, "Key": "f/x"}
    made = client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
    parts = []
    for number, data in enumerate((LARGE[:PART], LARGE[PART : 2 * PART], b"end"), 1):
        one = {"UploadId": made["UploadId"], "PartNumber": number, "ChecksumAlgorithm": "SHA256"}
        answer = client.upload_part(**place, **one, Body=data)
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(**place, UploadId=made["UploadId"], MultipartUpload={"Parts": parts})
    found = store.look("x")
    assert found is not None
    if server.kind == "rclone":
        assert found.checksum == "", "it says none for uploads in parts"
        return
    assert found.checksum.startswith("sha256-parts:") and found.checksum.endswith("-3")
    assert store.checksum_of(found, LARGE[: 2 * PART] + b"end") == found.checksum
    assert store.checksum_of(found, LARGE[: 2 * PART] + b"END") != found.checksum
