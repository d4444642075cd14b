"""Shards that lie on no filesystem: real web and S3 servers that go wrong, real commands, folders of loose files."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import _registry as loaded_clients

from curation.errors import InfrastructureError, ShardError, UsageError
from curation.shards import discover
from curation.storage import remote_read
from curation.storage.retry import RetryPolicy
from curation.storage.urls import Source, Url
from curation.tar import blocks, scan
from curation.tar.samples import TarWriter, read_samples
from curation.tar.scan import TarReport
from tests import EXAMPLES, ROOT, replaced
from tests.processes import started, wait_until
from tests.servers.files import FileServer, file_server
from tests.servers.hub import Model, serve
from tests.stages import recaption_stub as stub

SHARD = EXAMPLES / "00000000.tar"
DATA = SHARD.read_bytes()
QUICK = RetryPolicy(tries=3, first_wait_s=0.01, longest_wait_s=0.05, connect_s=5, read_s=5)
FLAGS = ["--batch_size", "4", "--device", "cpu", "--quiet", "--lease_s", "2", "--dataloader_num_workers", "2"]


pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_read, "RETRIES", QUICK)


@pytest.fixture(scope="module")
def web() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of many blocks, with samples too large to be kept."""
    monkeypatch.setattr(blocks, "READ_BYTES", 64 << 10)
    monkeypatch.setattr(blocks, "MAX_KEPT_BYTES", 32 << 10)


def read(source: Source) -> tuple[list[Any], list[str]]:
    """Every sample with its bytes and its problem, and what the pass warned of, without the file's name."""
    report = TarReport()
    samples = [(s.key, s.members, s.mtimes, s.problem) for s in read_samples(source, report=report)]
    return samples, [line.removeprefix(report.path) for line in report.warnings()]


# ---- web servers


@pytest.mark.parametrize(
    ("how", "requests"),
    [
        ({}, 1),
        ({"ranges": False}, 1),
        ({"length": False}, 1),
        ({"cut_at": 400_000, "cuts": 1}, 2),
        ({"cut_at": 400_000, "cuts": 1, "ranges": False}, 2),
        ({"cut_at": 400_000}, 4),  # always, and yet each connection brings it further
        ({"refusals": [500, 503, 429]}, 4),
        ({"pause_s": 0.01}, 1),
        ({"etags": []}, 1),
    ],
    ids=str,
)
def test_a_web_server_gives_what_the_file_has(web: FileServer, how: dict[str, Any], requests: int) -> None:
    remote_read.RETRIES = RetryPolicy(tries=4, first_wait_s=0.01, longest_wait_s=0.05, connect_s=5, read_s=5)
    url = web.add("any.tar", DATA, **how)
    assert read(Url(url)) == read(SHARD)
    assert len(web.asked("any.tar")) == requests


def test_a_cut_connection_goes_on_where_it_was_cut(web: FileServer) -> None:
    read(Url(web.add("cut.tar", DATA, cut_at=400_000, cuts=1)))
    assert web.asked("cut.tar") == [("GET", None), ("GET", "bytes=400000-")]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ranges", [True, False])
def test_samples_too_large_to_be_kept_are_fetched_again(web: FileServer, ranges: bool) -> None:
    assert read(Url(web.add("large.tar", DATA, ranges=ranges))) == read(SHARD)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"refusals": [404] * 9}, "404 Not Found"),
        ({"refusals": [403] * 9}, "403 Forbidden"),
        ({"refusals": [500] * 9}, "cannot be read, 3 times: 500"),
        ({"cut_at": 5_000}, "broke off at byte 1"),
        ({"cut_at": 400_000, "ranges": False}, "broke off at byte 400,000 of 1,331,200, 3 times"),
        ({"longer_by": 1000}, "shorter than its server announced"),
        ({"cut_at": 400_000, "cuts": 1, "etags": ['"1"', '"2"']}, "changed while it was read"),
    ],
    ids=str,
)
def test_what_cannot_be_read_says_why(web: FileServer, how: dict[str, Any], said: str) -> None:
    url = web.add("bad.tar", DATA, **how).replace("//", "//user:secret@") + "?signature=secret"
    with pytest.raises(ShardError, match=r"bad\.tar") as error:
        read(Url(url))
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there_is_asked_a_few_times() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ShardError, match="3 times"):
        read(Url(f"http://127.0.0.1:{port}/0.tar"))


@pytest.mark.usefixtures("small_blocks")
def test_a_server_that_stalls(web: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has read enough, as with --max_images, waits for nothing more; who wants more waits only so long."""
    monkeypatch.setattr(remote_read, "RETRIES", RetryPolicy(tries=2, first_wait_s=0.01, read_s=3600))
    url = web.add("stalls.tar", DATA, stall_at=400_000, ranges=False)
    samples = read_samples(Url(url))
    next(samples)
    samples.close()  # type: ignore[attr-defined]
    monkeypatch.setattr(remote_read, "RETRIES", RetryPolicy(tries=2, first_wait_s=0.01, read_s=0.2))
    with pytest.raises(ShardError, match=r"2 times: .*timed out"):
        read(Url(url))


@pytest.mark.parametrize("how", [{}, {"head": False}], ids=["HEAD", "GET alone"])
def test_what_is_known_without_reading(web: FileServer, how: dict[str, Any]) -> None:
    url = web.add("known.tar", DATA, etags=['"abc"'], **how)
    assert remote_read.fetch_info(Url(url)).record() == {"size": len(DATA), "etag": '"abc"'}


# ---- commands


def pipe(command: str) -> Url:
    return Url(f"pipe:{command}")


def test_a_command_gives_what_the_file_has(tmp_path: Path) -> None:
    assert read(pipe(f"cat {SHARD}")) == read(SHARD)
    assert read(pipe(f"gzip -c {SHARD} | gunzip")) == read(SHARD)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [700, 100_000, 190_900, 500_000, len(DATA) - 10_240, len(DATA) - 600])
def test_a_tar_that_is_cut_is_read_as_the_cut_file_would_be(web: FileServer, tmp_path: Path, size: int) -> None:
    """Also where nobody knows how long it is until it ends."""
    cut = tmp_path / "cut.tar"
    cut.write_bytes(DATA[:size])
    wanted = read(cut)
    assert read(pipe(f"cat {cut}")) == wanted
    assert read(Url(web.add("cut.tar", DATA[:size]))) == wanted
    assert read(Url(web.add("cut.tar", DATA[:size], length=False))) == wanted


@pytest.mark.parametrize("size", [0, 100])
def test_what_is_too_short_for_a_tar_is_none_from_anywhere(web: FileServer, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(DATA[:size])
    served = [web.add("1.tar", DATA[:size]), web.add("2.tar", DATA[:size], length=False)]
    for source in (cut, pipe(f"cat {cut}"), *map(Url, served)):
        if size == 0:
            with pytest.raises(ShardError, match="zero bytes"):
                read(source)
        else:
            assert all(sample.problem for sample in read_samples(source))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat /nowhere/7.tar", "exit status 1: cat: /nowhere/7.tar: No such file"),
        (f"cat {SHARD}; echo https://me:secret@host/?key=secret >&2; exit 3", "exit status 3: https://host/?…"),
        (f"cat {SHARD} 7.tar | cat", "exit status 1"),  # in the midst of a pipeline
        (f"cat {SHARD}; kill -9 $$", "exit status -9"),
    ],
)
def test_a_command_that_fails_is_believed_nothing(command: str, said: str) -> None:
    with pytest.raises(ShardError, match=r"^pipe:cat … ") as error:
        read(pipe(command))
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_a_command_is_ended_when_nobody_reads_on(tmp_path: Path) -> None:
    samples = read_samples(pipe(f"echo $$ > {tmp_path}/pid; cat {SHARD} {SHARD} {SHARD}; sleep 600 & wait # 0.tar"))
    next(samples)
    samples.close()  # type: ignore[attr-defined]
    leader = int((tmp_path / "pid").read_text())
    wait_until(lambda: not group_lives(leader), "its end")  # killed, it is gone as soon as somebody has reaped it


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_command_that_writes_to_stderr_without_end_does_not_hang() -> None:
    assert read(pipe(f"yes no | head -c 300000 >&2; cat {SHARD}")) == read(SHARD)


# ---- finding


def ids(source: str, **more: Any) -> list[str]:
    return [shard.id for shard in discover(source, **more)]


def test_braces_lists_and_commands(tmp_path: Path) -> None:
    assert ids("https://host/a/{00..02}.tar?key={x}".replace("{x}", "x")) == ["00", "01", "02"]
    listed = tmp_path / "shards.txt"
    listed.write_text(f"https://host/7.tar\n{SHARD}\n# https://host/8.tar\npipe:curl -s 'https://host/9.tar?x' | cat\n")
    assert ids(str(listed), allow_pipe=True) == ["00000000", "7", "9"]
    command = "pipe:aws s3 cp s3://bucket/{00000..00002}.tar - | awk '{print $1}'"
    assert ids(command, allow_pipe=True) == ["00000", "00001", "00002"]
    assert discover(command, allow_pipe=True)[1].path == Url(command.replace("{00000..00002}", "00001"))
    for refused in (command, str(listed)):
        with pytest.raises(UsageError, match="--allow_pipe"):
            discover(refused)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pipe:curl https://host/no-name", "contains no \\*.tar"),
        ("https://host/folder/", "list no folders"),
        ("ftp://host/0.tar", "no such source"),
    ],
)
def test_sources_that_name_no_shard(source: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        discover(source, allow_pipe=True)


def test_tars_alone_are_read_from_there() -> None:
    with pytest.raises(UsageError, match="only tars"):
        discover("https://host/0.json", ".json")


# ---- s3


class Cutter:
    """A TCP relay to a server that breaks connections after so many bytes."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut_at: int | None = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._relay, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._relay, args=(server, client, True), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        count = 0
        try:
            while data := source.recv(1 << 16):
                count += len(data)
                if answers and self.cuts > 0 and self.cut_at is not None and count > self.cut_at:
                    self.cuts -= 1
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[Any, Cutter]]:
    """A bucket ``shards`` of a real S3 server, behind a relay, with what the environment says about it."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    cutter = Cutter(server.get_host_and_port()[1])
    told = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{cutter.port}", "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in sorted(EXAMPLES.glob("*.tar")):
            client.put_object(Bucket="shards", Key=f"laion/{path.name}", Body=path.read_bytes())
        client.put_object(Bucket="shards", Key="laion/notes.txt", Body=b"no shard")
        client.put_object(Bucket="shards", Key="laion/deeper/9.tar", Body=b"")
        s3fs.S3FileSystem.clear_instance_cache()  # those of another module's server
        yield client, cutter
    s3fs.S3FileSystem.clear_instance_cache()
    cutter.close()
    server.stop()


def test_a_bucket_is_listed(bucket: tuple[Any, Cutter]) -> None:
    everything = sorted(path.stem for path in EXAMPLES.glob("*.tar"))
    assert ids("s3://shards/laion/") == ids("s3://shards/laion") == everything
    assert ids("s3://shards/laion/0000000[01].tar") == ["00000000", "00000001"]
    assert ids("s3://shards/laion/{00000000,00000007}.tar") == ["00000000", "00000007"]
    client, _ = bucket
    for key in ("14/1.tar", "15/a/2.tar", "_x/3.tar", ".y/4.tar", "1/2/3/4/5.tar", "1/2/3/4/5/6.tar", "1/"):
        client.put_object(Bucket="shards", Key=f"nested/{key}", Body=b"")
    assert sorted(ids("s3://shards/nested")) == ["1/2/3/4/5", "14/1", "15/a/2"], "as a folder of this machine"
    assert ids("s3://shards/nested/") == ids("s3://shards/nested") and ids("s3://shards/nested/14") == ["1"]
    for missing in ("s3://shards/nothing/", "s3://nobody/"):
        with pytest.raises(UsageError, match=r"not there|no \*\.tar"):
            discover(missing)


def test_a_bucket_gives_what_the_file_has(bucket: tuple[Any, Cutter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_read, "_RANGE_BYTES", 300_000)
    cutter = bucket[1]
    for cut_at, cuts in ((None, 0), (200_000, 3)):
        cutter.cut_at, cutter.cuts = cut_at, cuts
        assert read(Url("s3://shards/laion/00000000.tar")) == read(SHARD)
        assert cutter.cuts == 0


def test_what_a_bucket_does_not_have(bucket: tuple[Any, Cutter]) -> None:
    with pytest.raises(ShardError, match=r"s3://shards/laion/7\.tar: 404 Not Found"):
        read(Url("s3://shards/laion/7.tar"))


def test_an_object_that_is_replaced_while_it_is_read(
    bucket: tuple[Any, Cutter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_read, "_RANGE_BYTES", 100_000)
    client, _ = bucket
    client.put_object(Bucket="shards", Key="x/0.tar", Body=DATA)
    file = Url("s3://shards/x/0.tar")
    source = remote_read.ResumingReader(file, remote_read.server_of(file, QUICK), QUICK, threading.Event())
    assert source.read() == DATA[:100_000]
    client.put_object(Bucket="shards", Key="x/0.tar", Body=DATA[::-1])
    with pytest.raises(ShardError, match="changed while it was read"):
        while source.read():
            pass


def test_the_hub_gives_what_the_file_has(tmp_path: Path) -> None:
    """In a process of its own: its client reads the environment when it is imported."""
    (tmp_path / "shards").mkdir()
    shutil.copy(SHARD, tmp_path / "shards")
    code = (
        "import sys; from curation.shards import discover; from tests.storage import test_remote_read as t\n"
        "t.remote_read._RANGE_BYTES, t.remote_read.RETRIES = 400_000, t.QUICK\n"
        "(shard,) = discover('hf://me/model/shards/')\n"
        "sys.exit(t.read(shard.path) != t.read(t.SHARD))"
    )
    with serve({"me/model": Model(tmp_path, breaks_off={f"shards/{SHARD.name}": 100_000})}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=60)
        ranges = [asked for _, path, asked in hub.requests if path.endswith(".tar") and asked]
    assert set(ranges) == {f"bytes={at}-{min(at + 400_000, len(DATA)) - 1}" for at in range(0, len(DATA), 400_000)}


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed, which is usual
    monkeypatch.delitem(loaded_clients, "gs", raising=False)
    with pytest.raises(InfrastructureError, match=r"pip install gcsfs$"):
        discover("gs://bucket/0.tar")


# ---- loose files


def unpack(tar: Path, folder: Path, *leave_out: str) -> list[dict[str, Any]]:
    """A tar as loose files; the metadata of its samples."""
    folder.mkdir(parents=True)
    rows = []
    for sample in read_samples(tar):
        for suffix, data in sample.members.items():
            if suffix == "json":
                rows.append({**json.loads(data), "key": sample.key})
            if suffix not in leave_out:
                path = folder / f"{sample.key}.{suffix}"
                path.write_bytes(data)
                os.utime(path, (sample.mtimes[suffix],) * 2)
    return rows


def test_a_loose_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(SHARD, tmp_path / "00000000")
    opened: list[str] = []
    really_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (opened.append(str(path)), really_open(path, *a, **k))[1])
    read(tmp_path / "00000000")
    assert sorted(opened) == sorted(map(str, (tmp_path / "00000000").iterdir()))


@pytest.mark.usefixtures("small_blocks")
def test_loose_files_are_the_samples_of_the_tar(tmp_path: Path) -> None:
    unpack(SHARD, tmp_path / "00000000")
    (tmp_path / "00000000" / ".hidden.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "00000000" / "fifo.jpg")
    wanted = [(key, dict(sorted(members.items())), problem) for key, members, _, problem in read(SHARD)[0]]
    samples, warnings = read(tmp_path / "00000000")
    assert [(key, members, problem) for key, members, _, problem in samples] == sorted(wanted)
    assert warnings == []


def test_the_table_beside_fills_in_what_is_missing(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = unpack(SHARD, tmp_path / "00000000", "json")
    kept = tmp_path / "00000000" / f"{rows[0]['key']}.json"
    kept.write_bytes(b'{"caption": "its own"}')
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in ("key", "url", "caption", "uid")})
    pyarrow.parquet.write_table(table, tmp_path / "00000000.parquet")
    told = [json.loads(members["json"]) for _, members, _, _ in read(tmp_path / "00000000")[0]]
    assert told[0] == {"caption": "its own"}
    assert [(t["key"], t["caption"], t["uid"]) for t in told[1:]] == [
        (r["key"], r["caption"], r["uid"]) for r in sorted(rows, key=lambda row: row["key"])[1:]
    ]


def test_which_folders_are_shards(tmp_path: Path) -> None:
    for name in ("00000", "00001", "_receipts", "notes", "named"):
        (tmp_path / name).mkdir()
    (tmp_path / "named.parquet").touch()
    (tmp_path / "00000_stats.json").touch()
    assert ids(str(tmp_path)) == ["00000", "00001", "named"]
    assert ids(str(tmp_path / "00001")) == ["00001"]
    assert ids(f"{tmp_path}/{{00000..00009}}") == ["00000", "00001"]
    shutil.copy(SHARD, tmp_path)
    assert ids(str(tmp_path)) == ["00000000"]  # tars win


# ---- the stages


def run(source: object, out: Path, *flags: object) -> int:
    return stub.main([str(source), "--output", str(out), *replaced(FLAGS, flags)])


def receipt(out: Path, shard: str) -> dict[str, Any]:
    (path,) = out.glob(f"_receipts/05_recaption/*/{shard}.json")
    return dict(json.loads(path.read_bytes()))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    assert run(EXAMPLES, out, "--format", "jsonl,tar,files") == 0
    return out


def same_as(local: Path, out: Path, shard: str, *folders: str) -> None:
    for folder in folders:
        for path in sorted(local.glob(f"{folder}/{shard}*")):
            theirs = out / path.relative_to(local)
            pairs = [(path, theirs)] if path.is_file() else [(p, theirs / p.name) for p in sorted(path.iterdir())]
            assert pairs
            for mine, other in pairs:
                assert mine.read_bytes() == other.read_bytes(), other


def test_stage_05_reads_the_same_from_everywhere(
    web: FileServer, bucket: tuple[Any, Cutter], local: Path, tmp_path: Path
) -> None:
    bucket[1].cut_at, bucket[1].cuts = 200_000, 2
    data = {path.stem: path.read_bytes() for path in EXAMPLES.glob("*.tar")}
    web.add("00000001.tar", data["00000001"], cut_at=300_000, cuts=2)
    listed = tmp_path / "shards.txt"
    listed.write_text(
        f"{SHARD}\n{web.url}/0000000{{1,2}}.tar?token=secret\ns3://shards/laion/00000003.tar\n"
        f"pipe:cat {EXAMPLES}/00000004.tar | cat\npipe:echo sorry >&2; cat {EXAMPLES}/00000007.tar; exit 9\n"
    )
    out = tmp_path / "out"
    assert run(listed, out) == 2  # commands without leave: nothing is begun
    assert not out.exists()
    assert run(listed, out, "--allow_pipe", "--format", "jsonl,tar,files") == 1
    for shard in ("00000000", "00000001", "00000003", "00000004"):
        same_as(local, out, shard, "rows", "shards", "files")
    missing, failed = receipt(out, "00000002"), receipt(out, "00000007")
    assert missing["error"]["message"] == f"{web.url}/00000002.tar?…: 404 Not Found"
    assert missing["inputs"] == [{"path": "00000002.tar", "unavailable": "404 Not Found"}]
    assert failed["error"]["message"].endswith("exit status 9: sorry")
    everything = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl"))
    assert b"token=" not in everything

    first = {path: path.stat().st_mtime_ns for path in out.glob("_receipts/*/*/*.json")}
    assert run(listed, out, "--allow_pipe", "--format", "jsonl,tar,files") == 1
    assert {path: path.stat().st_mtime_ns for path in first} == first  # nothing to do, and the failed stay failed

    web.add("00000002.tar", data["00000007"])  # it comes, one changes, and one goes
    web.add("00000001.tar", data["00000003"], etags=['"2"'])
    bucket[0].delete_object(Bucket="shards", Key="laion/00000003.tar")
    assert run(listed, out, "--allow_pipe", "--format", "jsonl,tar,files") == 1
    assert receipt(out, "00000002")["status"] == receipt(out, "00000003")["status"] == "done"
    assert receipt(out, "00000001")["generation"] == 2
    rows = [line["key"] for line in map(json.loads, (out / "rows/00000001.jsonl").read_bytes().splitlines())]
    assert rows == [sample.key for sample in read_samples(EXAMPLES / "00000003.tar")]
    bucket[0].put_object(Bucket="shards", Key="laion/00000003.tar", Body=data["00000003"])


def test_stage_06_reads_the_same_from_everywhere(
    web: FileServer, bucket: tuple[Any, Cutter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyarrow.parquet import read_table

    data = {path.stem: path.read_bytes() for path in EXAMPLES.glob("*.tar")}
    web.add("00000001.tar", data["00000001"], cut_at=300_000, cuts=2)
    unpack(EXAMPLES / "00000007.tar", tmp_path / "00000007")
    listed = tmp_path / "shards.txt"
    listed.write_text(
        f"{SHARD}\n{web.url}/0000000{{1,5}}.tar?token=secret\ns3://shards/laion/00000003.tar\n"
        f"pipe:cat {EXAMPLES}/00000004.tar\n00000007\n"
    )
    flags = ["--models", "statistics,hashes", "--postprocess_features", "all", "--nworkers", "1", "--quiet"]

    def metadata(source: object, out: Path, *more: str) -> int:
        where = ["--input", str(source), "--output", str(out)]
        return int(importlib.import_module("06_metadata").main([*where, *flags, *more]))

    assert metadata(listed, tmp_path / "out") == 2
    assert "only with --allow_pipe" in capsys.readouterr().err
    assert metadata(listed, tmp_path / "out", "--allow_pipe") == 1  # of 00000005, which is not there
    assert metadata(EXAMPLES, tmp_path / "local") == 0
    for shard in ("00000000", "00000001", "00000003", "00000004"):
        same_as(tmp_path / "local", tmp_path / "out", f"{shard}.parquet", ".")
    loose, packed = (
        {row["key"]: row | {"tar": None} for row in read_table(folder / "00000007.parquet").to_pylist()}
        for folder in (tmp_path / "out", tmp_path / "local")
    )
    assert loose == packed and len(loose) == len({sample.key for sample in read_samples(EXAMPLES / "00000007.tar")})
    (failed,) = (tmp_path / "out").glob("_receipts/06_metadata/*/00000005.json")
    message = json.loads(failed.read_bytes())["error"]["message"]
    assert message == f"{web.url}/00000005.tar?…: 404 Not Found"


def test_stage_05_reads_loose_files(local: Path, tmp_path: Path) -> None:
    for path in EXAMPLES.glob("*.tar"):
        unpack(path, tmp_path / "in" / path.stem)
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, "--format", "jsonl,tar,files") == 0
    for path in sorted((local / "rows").glob("*.jsonl")):
        mine, theirs = (
            sorted((row["key"], row["image_sha256"]) for row in map(json.loads, file.read_bytes().splitlines()))
            for file in (path, out / "rows" / path.name)
        )
        assert mine == theirs
    with tarfile.open(out / "shards" / SHARD.name) as archive:
        assert len(archive.getnames()) == 3 * len(read(SHARD)[0])
    written = {path: path.stat().st_mtime_ns for path in out.glob("_receipts/*/*/*.json")}
    assert run(tmp_path / "in", out, "--format", "jsonl,tar,files") == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (tmp_path / "in" / "00000000" / "zzz.jpg").write_bytes(b"no image")  # the folder is another one now
    assert run(tmp_path / "in", out, "--format", "jsonl,tar,files") == 0
    assert receipt(out, "00000000")["generation"] == 2


def test_a_run_that_is_killed_goes_on_over_the_web(web: FileServer, local: Path, tmp_path: Path) -> None:
    for path in EXAMPLES.glob("*.tar"):
        web.add(path.name, path.read_bytes(), pause_s=0.002)
    urls, out = f"{web.url}/0000000{{0,1,3,4,7}}.tar", tmp_path / "out"
    command = [sys.executable, stub.__file__, urls, "-o", str(out), *FLAGS]
    with started(command, more={"CURATION_STUB_S": "0.1"}) as process:  # and killed
        wait_until(lambda: list(out.glob("_receipts/05_recaption/*/*.json")), "a first shard", while_runs=process)
    assert run(urls, out) == 0
    same_as(local, out, "0", "rows")
    assert (out / "captions.jsonl").read_bytes() == (local / "captions.jsonl").read_bytes()


def test_a_trial_with_the_first_images_of_commands(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"pipe:cat {EXAMPLES}/0000000{{0,1}}.tar; sleep 0"
    assert run(source, tmp_path / "out", "--allow_pipe", "--smoke", "3") == 0
    assert capsys.readouterr().out.count("00000000/") == 3


def test_two_workers_over_the_web(web: FileServer, local: Path, tmp_path: Path) -> None:
    for path in EXAMPLES.glob("*.tar"):
        web.add(path.name, path.read_bytes())
    flags = ["--batch_size", "4", "--workers", "2", "--quiet", "--dataloader_num_workers", "2"]
    command = [sys.executable, stub.__file__, f"{web.url}/0000000{{0,1,3,4,7}}.tar", "-o", str(tmp_path), *flags]
    with started(command) as process:
        assert process.wait() == 0
    assert (tmp_path / "captions.jsonl").read_bytes() == (local / "captions.jsonl").read_bytes()


def test_a_file_that_changes_between_two_passes(
    web: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions of one version and images of another are not published together."""
    url = web.add("5.tar", DATA)
    write: Callable[..., None] = stub.stage.write_format

    def change_and_write(*args: Any, **named: Any) -> None:
        web.add("5.tar", DATA, etags=['"2"'])
        write(*args, **named)

    monkeypatch.setattr(stub.stage, "write_format", change_and_write)
    assert run(url, tmp_path / "out", "--format", "tar") == 1
    assert "changed while it was processed" in receipt(tmp_path / "out", "5")["error"]["message"]
    monkeypatch.setattr(stub.stage, "write_format", write)
    assert run(url, tmp_path / "out", "--format", "tar") == 0  # it is another file now: no flag is needed


def test_stages_01_and_04_read_the_web(web: FileServer, tmp_path: Path) -> None:
    url = web.add(SHARD.name, DATA, cut_at=400_000, cuts=2)
    first, fourth = importlib.import_module("01_filter_noface"), importlib.import_module("04_reshard")
    flags = ["--quiet", "--lease_s", "2"]
    folders = ["--output", f"{tmp_path}/captions", "--edits", f"{tmp_path}/edits"]
    assert first.main(["--input", url, *folders, "--detector", "recorded", "--max_error_rate", "1", *flags]) == 0
    assert (tmp_path / "captions" / f"{SHARD.stem}.json").exists()
    (tmp_path / "edits" / SHARD.name).unlink(missing_ok=True)
    folders = ["--index", "--output", f"{tmp_path}/hybrid"]
    assert fourth.main(["--input", f"pipe:curl -s {url}", *folders, *flags]) == 2
    more = ["--verify", "--allow_pipe", *flags]
    assert fourth.main(["--input", f"pipe:cat {SHARD}", *folders, *more]) == 0
    assert read(tmp_path / "hybrid" / SHARD.name) == read(SHARD)


def test_a_local_shard_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    """It gives no sample that is not wholly there."""
    path = tmp_path / "0.tar"
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for number in range(3):
            writer.add(f"{number}.jpg", bytes(5_000_000))
        writer.close()
    windows = scan.TarScan(path).windows()
    next(windows)
    os.truncate(path, 12_000_000)
    spans = [span for window in windows for span in window.spans]
    assert [span.key for span in spans if span.torn] == ["2"]
