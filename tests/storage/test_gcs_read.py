"""Shards in a bucket of Google's, through the client that reads gs://, as test_remote_read does for s3://.

gcsfs is in no extra, so that most installations lack it: ``pip install gcsfs`` beside the others makes these tests run.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.errors import InfrastructureError, ShardError, UsageError
from curation.shards import discover
from curation.storage import remote_read
from curation.storage.urls import Url
from tests import EXAMPLES
from tests.publish.google_server import GoogleServer, serve_google
from tests.stages import recaption_stub as stub
from tests.storage.test_remote_read import DATA, FLAGS, QUICK, SHARD, Cutter, ids, read, receipt

pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_read, "RETRIES", QUICK)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[GoogleServer, Cutter]]:
    """A bucket ``out`` behind a relay, with what the environment says about it."""
    with pytest.MonkeyPatch.context() as patch, serve_google() as server:
        # It would ask Google which kind of bucket this is: the emulator has nothing of that protocol.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        cutter = Cutter(server.relay.port)
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{cutter.port}")
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield server, cutter
        gcsfs.GCSFileSystem.clear_instance_cache()
        cutter.close()


@pytest.fixture
def bucket(served: tuple[GoogleServer, Cutter]) -> tuple[GoogleServer, Cutter]:
    server, cutter = served
    server.empty()
    cutter.cut_at, cutter.cuts = None, 0
    for path in sorted(EXAMPLES.glob("*.tar")):
        server.put(f"laion/{path.name}", path.read_bytes())
    server.put("laion/notes.txt", b"no shard")
    server.put("laion/deeper/9.tar", b"")
    return served


def test_a_bucket_is_listed(bucket: tuple[GoogleServer, Cutter]) -> None:
    everything = sorted(path.stem for path in EXAMPLES.glob("*.tar"))
    for scheme in ("gs", "gcs"):
        assert ids(f"{scheme}://out/laion/") == ids(f"{scheme}://out/laion") == everything
    bucket[0].page = 2
    assert ids("gs://out/laion") == everything, "in several pages"
    assert ids("gs://out/laion/0000000[01].tar") == ["00000000", "00000001"]
    assert ids("gs://out/laion/{00000000,00000007}.tar") == ["00000000", "00000007"]
    for key in ("14/1.tar", "15/a/2.tar", "_x/3.tar", ".y/4.tar", "1/2/3/4/5.tar", "1/2/3/4/5/6.tar"):
        bucket[0].put(f"nested/{key}", b"")
    bucket[0].page = 1000
    assert sorted(ids("gs://out/nested")) == ["1/2/3/4/5", "14/1", "15/a/2"], "as a folder of this machine"
    for missing in ("gs://out/nothing/", "gs://nobody/"):
        with pytest.raises(UsageError, match=r"not there|no \*\.tar"):
            discover(missing)


def test_a_bucket_gives_what_the_file_has(bucket: tuple[GoogleServer, Cutter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_read, "_RANGE_BYTES", 300_000)
    cutter = bucket[1]
    for cut_at, cuts in ((None, 0), (200_000, 3)):
        cutter.cut_at, cutter.cuts = cut_at, cuts
        assert read(Url("gs://out/laion/00000000.tar")) == read(SHARD)
        assert cutter.cuts == 0


def test_what_a_bucket_does_not_have(bucket: tuple[GoogleServer, Cutter]) -> None:
    with pytest.raises(ShardError, match=r"gs://out/laion/77\.tar: 404 Not Found"):
        read(Url("gs://out/laion/77.tar"))


@pytest.mark.parametrize(("status", "says"), [(403, "403 Forbidden"), (401, "401"), (400, "400")])
def test_a_bucket_that_refuses(bucket: tuple[GoogleServer, Cutter], status: int, says: str) -> None:
    """It is not asked again and again: the client has errors of its own for this."""
    bucket[0].refuses = status
    with pytest.raises(ShardError, match=rf"gs://out/laion/00000000\.tar: {says} \("):
        read(Url("gs://out/laion/00000000.tar"))
    asked = [line.partition(" ")[2] for line in bucket[0].asked("GET")]
    assert asked.count("/storage/v1/b/out/o/laion%2F00000000.tar") == 1, "the others look for a folder of that name"
    with pytest.raises(InfrastructureError, match=r"gs://out/laion/: cannot be listed"):
        discover("gs://out/laion/")


def test_an_object_that_is_replaced_while_it_is_read(
    bucket: tuple[GoogleServer, Cutter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_read, "_RANGE_BYTES", 100_000)
    file = Url("gs://out/laion/00000000.tar")
    source = remote_read.ResumingReader(file, remote_read.server_of(file, QUICK), QUICK, threading.Event())
    assert source.read() == DATA[:100_000]
    bucket[0].put("laion/00000000.tar", DATA[::-1])
    with pytest.raises(ShardError, match="changed while it was read"):
        while source.read():
            pass


def test_stages_read_the_same_as_from_this_machine(bucket: tuple[GoogleServer, Cutter], tmp_path: Path) -> None:
    """Connections break; an object that changes makes its shard pending again, and one that is gone keeps outputs."""
    server, cutter = bucket
    cutter.cut_at, cutter.cuts = 200_000, 2
    shards = ("00000000", "00000003")
    source = f"gs://out/laion/{{{','.join(shards)}}}.tar"
    folders = {"gs": source, "local": str(EXAMPLES)}
    for name, given in folders.items():
        out = tmp_path / name
        chosen = ["--shards", ",".join(shards), "--quiet", "--device", "cpu"]
        assert stub.main([given, "--output", str(out), *FLAGS, "--shards", ",".join(shards)]) == 0
        made = ["--input", given, "--output", str(out / "06"), "--models", "statistics,hashes", "--nworkers", "1"]
        assert importlib.import_module("06_metadata").main([*made, *chosen]) == 0
    for shard in shards:
        for path in (f"rows/{shard}.jsonl", f"06/{shard}.parquet"):
            assert (tmp_path / "gs" / path).read_bytes() == (tmp_path / "local" / path).read_bytes()
        [was] = receipt(tmp_path / "gs", shard)["inputs"]
        assert was["size"] == (EXAMPLES / f"{shard}.tar").stat().st_size and was["etag"]
    server.put("laion/00000003.tar", (EXAMPLES / "00000004.tar").read_bytes())
    server.remove("laion/00000000.tar")
    assert stub.main([source, "--output", str(tmp_path / "gs"), *FLAGS]) == 1, "one is blocked"
    now: dict[str, Any] = {shard: receipt(tmp_path / "gs", shard) for shard in shards}
    assert [now[shard]["generation"] for shard in shards] == [1, 2] and (tmp_path / "gs/rows/00000000.jsonl").exists()
