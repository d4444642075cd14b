"""Stage 00 through its real script and runner, against a real web server of real photos and of bad answers."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.__main__ import main as status
from curation.download.downloader import HostScheduler
from curation.download.fetch import is_public
from curation.download.images import ImagePolicy, make_stored
from curation.download.opt_out.rules import disallowed_by
from curation.download.rows import OWN_COLUMNS, renamed_columns
from curation.images import decode_rgb, image_facts, image_size
from curation.tar.samples import read_samples
from curation.tar.scan import IMAGE_SUFFIXES
from tests import EXAMPLES, ROOT, processes, replaced
from tests.processes import ended_at_last, wait_until
from tests.servers import photo_server
from tests.shards import contents, samples_of
from tests.stages import recaption_stub
from tests.stages.harness import Records, hashes

NAME = "00_download"
stage = importlib.import_module(NAME)
FLAGS = ["--allow_private", "127.0.0.0/8", "--timeout", "4", "--retries", "1", "--lease_s", "2", "--quiet"]
FLAGS += ["--max_image_bytes", "1000000"]
records = Records(NAME)

# What becomes of each kind of answer: the status, and how the message begins; None for a photo.
BAD = {
    "404": "http_404", "closed": "http_503", "slow": "timeout", "drip": "timeout", "endless": "too_large",
    "large": "too_large", "cut": "cut_off", "empty": "empty", "loop": "redirect_loop",
    "chain": "too_many_redirects", "inside": "refused_address", "file": "bad_url", "bomb": "too_large",
    "noai": "disallowed",
}  # fmt: skip
NO_IMAGE = {"torn": "undecodable", "html": "undecodable"}
GOOD = ("busy", "broken", "moved", "zipped", "otherbot", "photo")
KINDS = [*BAD, *NO_IMAGE, *GOOD]


@dataclass
class Web:
    """The server.  Each kind of answer has a host of its own."""

    port: int

    def url(self, kind: str, number: int, host: int | None = None) -> str:
        place = KINDS.index(kind) + 1 if kind in KINDS and host is None else host or 99
        return f"http://127.0.0.{place}:{self.port}/{kind}/{number}"

    def told(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/_seen") as reply:
            return dict(json.load(reply))

    def seen(self, path: str = "/") -> int:
        return sum(count for asked, count in self.told()["seen"].items() if asked.startswith(path))


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with photo_server(EXAMPLES) as port:
        yield Web(port)


pytestmark = pytest.mark.usefixtures("stage_in_process")


def run(table: Path | str, out: Path, *flags: object) -> int:
    return stage.main(["--input", str(table), "--output", str(out), *replaced(FLAGS, flags)])


def write_table(path: Path, urls: list[str | None], **columns: Any) -> Path:
    pq.write_table(pa.table({"url": pa.array(urls, pa.string()), **columns}), path)
    return path


def rows(out: Path, shard: str = "00000000") -> list[dict[str, Any]]:
    return list(pq.read_table(out / f"{shard}.parquet").to_pylist())


def photos() -> list[bytes]:
    return [
        data for path in sorted(EXAMPLES.glob("*.tar")) for sample in read_samples(path, IMAGE_SUFFIXES)
        for data in sample.members.values()
    ]  # fmt: skip


# ---- a thousand URLs


@dataclass
class Thousand:
    out: Path
    kinds: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def thousand(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Thousand:
    """1,000 URLs of every kind, in two shards, by two workers."""
    folder = tmp_path_factory.mktemp("thousand")
    scarce = dict.fromkeys(KINDS, 4) | {"404": 60, "html": 60, "noai": 40, "moved": 40}
    kinds = [name for name, count in scarce.items() if name != "photo" for _ in range(count)]
    kinds += ["photo"] * (1000 - len(kinds))
    random.Random(1).shuffle(kinds)
    write_table(
        folder / "urls.parquet",
        [web.url(kind, number, None if kind != "photo" else 30 + number % 200) for number, kind in enumerate(kinds)],
        text=[f"=SUM({i})" if i % 100 == 0 else f"photo {i}" for i in range(1000)],
        uid=[f"{i:032x}" for i in range(1000)],
        width=pa.array(range(1000), pa.int16()),
        face_bboxes=pa.array([[[0.1, 0.1, 0.5, 0.5]] if i % 3 == 0 else [] for i in range(1000)]),
        seen_at=pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * 1000),
        md5=pa.array([None] * 1000, pa.string()),
    )
    out = folder / "shards"
    assert run(folder / "urls.parquet", out, "--rows_per_shard", 500, "--threads", 64) == 0
    return Thousand(out, kinds, rows(out) + rows(out, "00000001"))


def test_every_row_is_one_row_with_what_became_of_it(thousand: Thousand) -> None:
    assert len(thousand.rows) == 1000
    for number, (kind, row) in enumerate(zip(thousand.kinds, thousand.rows, strict=True)):
        assert row["uid"] == f"{number:032x}"
        assert row["key"] == f"{number // 500:08d}{number % 500:03d}"
        told = f"{row['url']}: {row['status']}, {row['error_message']}"
        if kind in BAD:
            assert row["status"] == "failed_to_download", told
            assert row["error_message"].startswith(BAD[kind]), told
        elif kind in NO_IMAGE:
            assert row["status"] == "failed_to_resize", told
            assert row["error_message"].startswith(NO_IMAGE[kind]), told
        else:
            assert (row["status"], row["error_message"]) == ("success", None), told


def test_images_are_stored_byte_for_byte(thousand: Thousand) -> None:
    images = photos()
    stored = contents(thousand.out / "00000000.tar") | contents(thousand.out / "00000001.tar")
    good = [row for row in thousand.rows if row["status"] == "success"]
    assert len(stored) == 3 * len(good)
    for row in good:
        image = images[int(row["url"].rpartition("/")[2]) % len(images)]
        assert stored[f"{row['key']}.{image_facts(image).suffix}"] == image
        assert row["sha256"] == hashlib.sha256(image).hexdigest()
        assert (row["width"], row["height"]) == image_size(image) == (row["original_width"], row["original_height"])


def test_every_column_keeps_its_name_and_type(thousand: Thousand) -> None:
    schema = pq.read_schema(thousand.out / "00000000.parquet")
    names = ["url", "caption", "uid", "table_width", "face_bboxes", "seen_at", "md5", *OWN_COLUMNS, "opt_out"]
    assert schema.names == names
    assert schema.field("table_width").type == pa.int16()
    assert schema.field("width").type == pa.int32()
    assert pa.types.is_timestamp(schema.field("seen_at").type)
    assert [row["table_width"] for row in thousand.rows] == list(range(1000))
    key = next(row["key"] for row in thousand.rows if row["status"] == "success")
    sample = json.loads(contents(thousand.out / "00000000.tar")[f"{key}.json"])
    assert list(sample) == names
    assert sample["seen_at"] == "2026-01-01T00:00:00+00:00"


def test_receipts_rejects_and_stats_add_up(thousand: Thousand) -> None:
    for shard in ("00000000", "00000001"):
        counts = records.receipt(thousand.out, shard)["counts"]
        here = rows(thousand.out, shard)
        bad = [row for row in here if row["status"] != "success"]
        assert counts["in"] == 500 == counts["kept"] + sum(counts["failed"].values())
        assert counts["kept"] == len(here) - len(bad)
        lines = (thousand.out / "_rejects" / NAME / f"{shard}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["key"] for line in lines) == sorted(row["key"] for row in bad)
        stats = json.loads((thousand.out / f"{shard}_stats.json").read_text())
        assert stats["count"] == 500
        assert stats["successes"] == counts["kept"]
        assert stats["failed_to_download"] + stats["failed_to_resize"] == len(bad)
        assert sum(stats["status_dict"].values()) == 500


def test_the_tables_of_all_shards_are_one(thousand: Thousand) -> None:
    assert pq.read_table(thousand.out / "full_metadata.parquet").to_pylist() == thousand.rows
    sizes = json.loads((thousand.out / "sizes.json").read_bytes())
    assert sizes == {path.name: len(samples_of(path)) for path in sorted(thousand.out.glob("*.tar"))}
    with open(thousand.out / "metadata.csv", newline="") as file:
        told = list(csv.DictReader(file))
    good = [row for row in thousand.rows if row["status"] == "success"]
    assert [row["key"] for row in told] == [row["key"] for row in good]
    assert told[0]["caption"] == "'=SUM(0)"
    assert not [row for row in told if row["caption"][:1] in "=+-@"]


def test_webdataset_and_the_other_stages_read_the_shards(thousand: Thousand, tmp_path: Path) -> None:
    import webdataset

    loader = webdataset.WebDataset(
        [str(thousand.out / "00000000.tar"), str(thousand.out / "00000001.tar")], shardshuffle=False
    ).decode("pil").to_tuple("__key__", "jpg;png;webp;gif", "txt", "json")  # fmt: skip
    good = [row for row in thousand.rows if row["status"] == "success"]
    found = list(loader)
    assert [key for key, *_ in found] == [row["key"] for row in good]
    assert all(image.size == (row["width"], row["height"]) for (_, image, *_), row in zip(found, good, strict=True))
    assert [text for _, _, text, _ in found] == [row["caption"] for row in good]

    faces = importlib.import_module("01_filter_noface")
    folders = ["--output", str(tmp_path / "captions"), "--edits", str(tmp_path / "edits")]
    assert faces.main(["--input", str(thousand.out), *folders, "--quiet"]) == 0
    captions = json.loads((tmp_path / "captions" / "00000000.json").read_text())
    assert list(captions) == [f"{row['key']}.json" for row in good if row["face_bboxes"] and row["key"] < "00000001"]


def test_stage_05_reads_the_shards(thousand: Thousand, tmp_path: Path) -> None:
    arguments = [str(thousand.out), "-o", str(tmp_path), "--max_images", "5", "--device", "cpu", "--quiet"]
    assert recaption_stub.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    good = [row for row in thousand.rows if row["status"] == "success"]
    assert [line["url"] for line in lines] == [row["url"] for row in good[:5]]


def test_a_second_run_asks_for_nothing(thousand: Thousand, web: Web) -> None:
    before, asked = hashes(thousand.out), web.seen()
    table = thousand.out.parent / "urls.parquet"
    assert run(table, thousand.out, "--rows_per_shard", 500, "--threads", 64) == 0
    assert hashes(thousand.out) == before
    assert web.seen() == asked


# ---- politeness and safety


def test_a_host_is_asked_for_no_more_at_once_than_allowed(tmp_path: Path) -> None:
    with photo_server(EXAMPLES, latency_s=0.05) as port:
        web = Web(port)
        table = write_table(tmp_path / "t.parquet", [web.url("photo", i) for i in range(40)])
        assert run(table, tmp_path / "out", "--per_host", 3, "--threads", 32) == 0
        assert web.told()["most"] == 3


def test_retry_after_is_honoured(web: Web, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [web.url("busy", 1000 + i) for i in range(3)])
    began = time.monotonic()
    assert run(table, tmp_path / "out") == 0
    assert time.monotonic() - began >= 1
    assert [row["status"] for row in rows(tmp_path / "out")] == ["success"] * 3
    table = write_table(tmp_path / "t.parquet", [web.url("busy", 2000)])
    assert run(table, tmp_path / "hasty", "--max_wait", 0.5) == 0
    assert rows(tmp_path / "hasty")[0]["error_message"].startswith("http_429")


@pytest.mark.parametrize(
    ("value", "token", "found"),
    [
        ("noai, noimageai", "curation", {"noai", "noimageai"}),
        ("otherbot: noai", "curation", set()),
        ("Curation: NoAI, noindex", "curation", {"noai", "noindex"}),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST", "x", {"unavailable_after: 25 jun 2010 15:00:00 pst"}),
        ("none", "x", {"noindex"}),
    ],
)
def test_robots_directives(value: str, token: str, found: set[str]) -> None:
    assert {name.partition(":")[0] for name in disallowed_by([value], token)} == {n.partition(":")[0] for n in found}


def test_robots_headers_can_be_disregarded(web: Web, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [web.url("noai", 1), web.url("otherbot", 1)])
    assert run(table, tmp_path / "a", "--user_agent_token", "otherbot") == 0
    assert {row["error_message"].partition(":")[0] for row in rows(tmp_path / "a")} == {"disallowed"}
    assert run(table, tmp_path / "b", "--disallowed_header_directives", "") == 0
    assert [row["status"] for row in rows(tmp_path / "b")] == ["success"] * 2


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:10.0.0.1",
        "::127.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "here",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(address: str) -> None:
    assert not is_public(address)


def test_public_addresses() -> None:
    assert all(map(is_public, ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8")))


def test_private_addresses_are_refused_however_they_are_written(web: Web, tmp_path: Path) -> None:
    asked = web.seen()
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "10.0.0.1"]
    urls = [f"http://{host}:{web.port}/photo/1" for host in hosts]
    table = write_table(tmp_path / "t.parquet", [*urls, "gopher://x/", "file:///etc/passwd", "http://", None, "  "])
    assert run(table, tmp_path / "out", "--allow_private", "") == 0
    told = [row["error_message"].partition(":")[0] for row in rows(tmp_path / "out")]
    assert {*told[: len(hosts)]} <= {"refused_address", "bad_url"}
    assert told[0] == told[1] == told[4] == told[5] == told[7] == "refused_address"
    assert told[len(hosts) :] == ["bad_url"] * 3 + ["no_url"] * 2
    assert web.seen() == asked


def test_a_host_that_fails_is_given_up_and_holds_up_nobody() -> None:
    turns: HostScheduler[int] = HostScheduler(2)
    for number in range(30):
        turns.add("dead", number)
    turns.add("alive", 99)
    order = []
    for now in range(40):
        if (found := turns.next(float(now))) is None:
            break
        host, job = found
        order.append(job)
        given_up = turns.is_given_up(host, float(now))
        assert given_up == (host == "dead" and len(order) > 21)
        turns.done(host, float(now), failed=host == "dead")
    assert order[1] == 99
    assert len(order) == 31


def test_a_busy_host_is_left_alone_and_then_asked_for_less() -> None:
    turns: HostScheduler[int] = HostScheduler(8)
    for number in range(40):
        turns.add("a", number)
    for _ in range(8):
        assert turns.next(0.0)
    assert turns.next(0.0) is None
    for _ in range(3):
        turns.done("a", 0.0, busy=True, wait_s=5.0)
    for _ in range(5):
        turns.done("a", 0.0)
    assert turns.next(4.9) is None
    assert turns.next_at() == 5.0
    assert turns.next(5.0) is not None
    assert turns.next(5.0) is None


def test_without_a_network_the_run_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is recorded as failed that was only never asked."""
    table = write_table(tmp_path / "t.parquet", [f"http://127.0.1.{i}:9/x.jpg" for i in range(60)])
    assert run(table, tmp_path / "out", "--retries", 0) == 2
    assert "does this machine have internet access" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))


# ---- the wishes of sites

RULED = {  # host → how the message of a row begins; None for an image that may be downloaded
    "127.200.2.1": "disallowed: robots.txt line 2: Disallow: /",
    "127.200.2.2": "disallowed: robots.txt cannot be read: http_503",
    "127.200.2.3": "disallowed: tdmrep.json rule 1: /photo/*",
    "127.200.2.4": "disallowed: robots.txt cannot be read: timeout",
    "127.200.2.5": None,
}


def ruled_table(web: Web, path: Path) -> Path:
    """Four URLs on each host, of which the first one of 127.0.2.1 is allowed there."""
    urls = [f"http://{host}:{web.port}/photo/{number}" for number in (1, 2, 3, 4) for host in RULED]
    urls += [f"http://127.200.2.6:{web.port}/{kind}/1" for kind in ("noai", "reserved")]
    return write_table(path, urls, opt_out=["of the table"] * len(urls))


def test_what_sites_forbid_is_not_downloaded(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes ask each site once."""
    before = web.told()["seen"]
    table, out = ruled_table(web, tmp_path / "t.parquet"), tmp_path / "out"
    flags = ("--timeout", 0.5, "--rows_per_shard", 11, "--workers", 2)
    assert run(table, out, *flags) == 0
    told = rows(out) + rows(out, "00000001")
    for row in told[:20]:
        host = row["url"].split("/")[2].partition(":")[0]
        expected = None if host == "127.200.2.1" and row["url"].endswith("/1") else RULED[host]
        assert (row["status"] == "success") == (expected is None)
        assert (row["error_message"] or "").startswith(expected or "")
    assert [row["opt_out"] for row in told] == [
        row["error_message"] and row["error_message"].removeprefix("disallowed: ") for row in told
    ]
    assert [row["opt_out"] for row in told[20:]] == ["X-Robots-Tag: noai", "tdmrep header: tdm-reservation: 1"]
    assert pq.read_schema(out / "00000000.parquet").names[-1] == "opt_out"
    assert {row["original_opt_out"] for row in told} == {"of the table"}

    stats = [json.loads((out / f"0000000{number}_stats.json").read_text())["opt_out"] for number in (0, 1)]
    sums = {kind: sum(of_one[kind] for of_one in stats) for kind in stats[0]}
    assert sums == {"robots": 11, "tdmrep": 5, "x_robots_tag": 1}
    notes = [records.receipt(out, f"0000000{number}")["notes"] for number in (0, 1)]
    assert sum(note["sites_looked_up"] for note in notes) == 6
    assert sum(note["requests_for_rules"] for note in notes) == 10, "two a site, but one where the first forbids all"
    assert sum(note["opt_out_robots"] for note in notes) == 11
    seen = {path: count - before.get(path, 0) for path, count in web.told()["seen"].items()}
    for host in (*RULED, "127.200.2.6"):
        assert seen[f"{host}/robots.txt"] == 1
        assert seen.get(f"{host}/.well-known/tdmrep.json", 0) == (host not in ("127.200.2.2", "127.200.2.4"))
    assert len(list((out / "_opt_out").rglob("*.log"))) <= 6

    capsys.readouterr()
    assert status(["status", str(out)]) == 0
    assert "disallowed by their sites: 11 robots, 5 tdmrep, 1 x_robots_tag" in capsys.readouterr().out
    options = stage.Options(input=[str(table)], output=out, opt_out="respect")
    result = stage.Download(options, None).result(Counter(kept=5, opt_out_robots=11))
    assert result == "5 pictures stored, 0 not available; disallowed: 11 by robots.txt"


def test_what_sites_forbid_may_be_recorded(web: Web, tmp_path: Path) -> None:
    table, out = ruled_table(web, tmp_path / "t.parquet"), tmp_path / "out"
    assert run(table, out, "--timeout", 1, "--opt_out", "record") == 0
    told = rows(out)
    assert {row["status"] for row in told} == {"success"}
    for row in told[:20]:
        host = row["url"].split("/")[2].partition(":")[0]
        expected = None if host == "127.200.2.1" and row["url"].endswith("/1") else RULED[host]
        assert (row["opt_out"] is None) == (expected is None)
        assert (row["opt_out"] or "").startswith((expected or "").removeprefix("disallowed: "))
    sample = json.loads(contents(out / "00000000.tar")[f"{told[1]['key']}.json"])
    assert sample["opt_out"] == told[1]["opt_out"]
    assert run(table, out, "--opt_out", "respect") == 2


def test_sites_may_be_not_asked_at_all(web: Web, tmp_path: Path) -> None:
    asked = web.told()["seen"].get("/robots.txt", 0)
    table, out = ruled_table(web, tmp_path / "t.parquet"), tmp_path / "out"
    assert run(table, out, "--opt_out", "ignore") == 0
    assert [row["status"] for row in rows(out)] == ["success"] * 20 + ["failed_to_download", "success"]
    assert web.told()["seen"].get("/robots.txt", 0) == asked
    assert pq.read_schema(out / "00000000.parquet").names[-1] == "sha256"
    assert {row["opt_out"] for row in rows(out)} == {"of the table"}
    assert not (out / "_opt_out").exists()


def test_a_name_that_no_site_can_use_is_refused(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t.parquet", [web.url("photo", 1)])
    assert run(table, tmp_path / "out", "--user_agent_token", "my bot: *") == 2
    assert "--user_agent_token must be a name" in capsys.readouterr().err
    assert run(table, tmp_path / "out", "--user_agent_token", "my bot: *", "--opt_out", "ignore") == 0
    assert run(table, tmp_path / "named", "--user_agent_token", "mybot", "--user_agent", "another") == 0
    assert "does not hold mybot" in capsys.readouterr().err
    assert run(table, tmp_path / "told", "--user_agent_token", "mybot") == 0
    assert "mybot" not in capsys.readouterr().err
    options = stage.Options(input=("t",), output=Path("o"), user_agent_token="mybot").as_meant()
    assert options.user_agent.startswith("Mozilla/5.0 (compatible; mybot; curation/"), "as img2dataset names it"
    assert options.as_meant() == options


# ---- going on, and doing again


def test_killed_and_started_again_nothing_is_lost_doubled_or_fetched_twice(tmp_path: Path) -> None:
    with photo_server(EXAMPLES, latency_s=0.015) as port:
        web = Web(port)
        urls = [web.url("photo", i, 30 + i % 50) if i % 10 else web.url("404", i) for i in range(400)]
        table = write_table(tmp_path / "t.parquet", urls, caption=[f"c{i}" for i in range(400)])
        flags = ["--rows_per_shard", "200", "--threads", "4"]
        assert run(table, tmp_path / "calm", *flags) == 0
        asked = web.seen()
        command = [sys.executable, f"{NAME}.py", "--input", str(table), "--output", str(tmp_path / "out")]
        for number, name in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
            with ended_at_last(processes.start([*command, *replaced(FLAGS, flags)])) as victim:
                wait_until(lambda asked=asked + 100 * number: web.seen() >= asked, "requests", while_runs=victim)
                os.killpg(victim.pid, name)
                assert victim.wait() in (-signal.SIGKILL, 75)
        assert run(table, tmp_path / "out", *flags) == 0
        assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")
        assert web.seen() - asked < 400 + 2 * (4 + 64)  # what was under way, and what one write had not logged yet
    assert not [path for path in (tmp_path / "out" / "_partial").rglob("*") if path.is_file()]


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_failed_urls_alone_are_asked_again(web: Web, tmp_path: Path, layout: str) -> None:
    start = 5000 if layout == "files" else 6000
    kinds = ["photo", "healed", "404", "photo", "healed", "html"]
    table = write_table(tmp_path / "t.parquet", [web.url(kind, start + i) for i, kind in enumerate(kinds)])
    out, flags = tmp_path / "out", ("--output_format", layout)
    assert run(table, out, *flags) == 0
    first = {row["key"]: row for row in rows(out)}
    before = {path: path.read_bytes() for path in out.glob("00000000/*")} or contents(out / "00000000.tar")
    assert [row["status"] for row in first.values()].count("success") == 2
    assert run(table, out, *flags) == 0
    assert {row["key"]: row for row in rows(out)} == first
    assert run(table, out, *flags, "--retry_failed_urls") == 0
    again = {row["key"]: row for row in rows(out)}
    assert [row["status"] for row in again.values()] == [
        "success", "success", "failed_to_download", "success", "success", "failed_to_resize"
    ]  # fmt: skip
    after = {path: path.read_bytes() for path in out.glob("00000000/*")} or contents(out / "00000000.tar")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 4
    assert web.seen(f"/photo/{start}") == 1
    assert web.seen(f"/healed/{start + 1}") == 2
    assert records.receipt(out)["notes"]["copied"] == 2
    assert pq.read_table(out / "full_metadata.parquet").to_pylist() == rows(out)


def test_verify_finds_and_mends_what_is_not_sound(web: Web, tmp_path: Path) -> None:
    urls = [web.url("photo", 7000), web.url("404", 7001), web.url("healed", 7002), web.url("photo", 7003)]
    table, out = write_table(tmp_path / "t.parquet", urls), tmp_path / "out"
    assert run(table, out, "--retries", 0) == 0
    assert run(table, out, "--retries", 0, "--retry_failed_urls") == 0
    sound = hashes(out)
    tar = out / "00000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.find(photos()[7003 % len(photos())]) + 5000
    data[at : at + 2000] = bytes(2000)
    tar.write_bytes(data)
    assert run(table, out, "--retries", 0, "--verify") == 0
    assert hashes(out) == sound
    assert records.receipt(out)["notes"]["unsound"] == 1
    assert web.seen("/photo/7003") == 2
    assert web.seen("/photo/7000") == 1
    assert web.seen("/404/7001") == 2  # --verify asks no failed row again


def test_verify_says_so_where_the_image_is_gone_for_good(tmp_path: Path) -> None:
    with photo_server(EXAMPLES) as port:
        table = write_table(tmp_path / "t.parquet", [Web(port).url("photo", i) for i in range(3)])
        out = tmp_path / "out"
        assert run(table, out) == 0
    kept = contents(out / "00000000.tar")
    tar = out / "00000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.find(photos()[1]) + 3000
    data[at : at + 2000] = bytes(2000)
    tar.write_bytes(data)
    assert run(table, out, "--verify", "--retries", 0) == 0
    assert [row["status"] for row in rows(out)] == ["success", "failed_to_download", "success"]
    assert contents(tar) == {name: data for name, data in kept.items() if not name.startswith("000000000001")}


def test_a_retry_that_cannot_read_its_table_costs_nothing(web: Web, tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text(f"url\n{web.url('photo', 1)}\n{web.url('404', 1)}\n")
    assert run(table, out) == 0
    before = hashes(out)
    for path in (out / "_tables").glob("*.parquet"):
        path.write_bytes(b"PAR1 no more")
    assert run(table, out, "--retry_failed_urls") == 2
    assert hashes(out) == before


# ---- tables


def test_rows_of_one_url_are_one_question(web: Web, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [web.url("photo", 8000)] * 3 + [web.url("photo", 8001)])
    assert run(table, tmp_path / "out") == 0
    assert [row["status"] for row in rows(tmp_path / "out")] == ["success"] * 4
    assert len(contents(tmp_path / "out" / "00000000.tar")) == 8
    assert web.seen("/photo/8000") == 1


def test_tables_of_text_keep_what_they_say(web: Web, tmp_path: Path) -> None:
    urls = [web.url("photo", i) for i in range(3)]
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.csv").write_text(
        "id,url,text\n" + "".join(f'000{i},{url},"two\nlines"\n' for i, url in enumerate(urls))
    )
    lines = [{"url": url, "n": i, "odd": [1, "x"] if i else 5, "deep": {"a": i}} for i, url in enumerate(urls)]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(line).encode() for line in lines)))
    (folder / "c.txt").write_text("\n".join(urls) + "\n\n")
    (folder / "d.tsv").write_text("URL\tcaption\n" + "".join(f"{url}\tc\n" for url in urls))
    (folder / "e.csv").write_text("url\n")
    assert run(folder, tmp_path / "out", "--rows_per_shard", 2) == 0
    shards = sorted(path.stem for path in (tmp_path / "out").glob("*.tar"))
    assert shards == [f"{number:08d}" for number in range(8)]
    assert [row["id"] for row in rows(tmp_path / "out")] == ["0000", "0001"]
    assert rows(tmp_path / "out")[0]["caption"] == "two\nlines"
    told = rows(tmp_path / "out", "00000002") + rows(tmp_path / "out", "00000003")
    assert [(row["n"], row["odd"], row["deep"]) for row in told] == [
        (0, "5", {"a": 0}), (1, '[1,"x"]', {"a": 1}), (2, '[1,"x"]', {"a": 2})
    ]  # fmt: skip
    assert all(row["status"] == "success" for number in range(8) for row in rows(tmp_path / "out", f"{number:08d}"))
    merged = pq.read_table(tmp_path / "out" / "full_metadata.parquet")
    assert merged.num_rows == 12


def test_a_table_on_a_web_server_with_a_signature(web: Web, tmp_path: Path) -> None:
    """Of which no message and no file tells, and which may change from run to run."""
    lines = [f"http://127.0.0.1:{web.port}/table/{name}?sig=secret" for name in ("t.csv", "t.csv?sig=tomorrow")]
    assert run(lines[0], tmp_path / "out") == 0
    assert [row["status"] for row in rows(tmp_path / "out")] == ["success"] * 3
    asked = web.seen("/photo/")
    assert run(lines[1], tmp_path / "out") == 0
    assert web.seen("/photo/") == asked
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*.json")]
    assert texts
    assert not any(b"secret" in text for text in texts)


def test_tables_in_a_bucket(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real S3 server."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    s3fs.S3FileSystem.clear_instance_cache()  # those of another server
    told = {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    told["ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in told.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    table = write_table(tmp_path / "a.parquet", [web.url("photo", 1), web.url("404", 2)])
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="urls")
        client.put_object(Bucket="urls", Key="tables/a.parquet", Body=table.read_bytes())
        client.put_object(Bucket="urls", Key="tables/b.csv", Body=f"url\n{web.url('photo', 3)}\n".encode())
        assert run("s3://urls/tables", tmp_path / "out") == 0
        assert run("s3://urls/tables/*.parquet", tmp_path / "glob") == 0
        assert run("s3://urls/nothing", tmp_path / "none") == 2
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
    found = [row["status"] for shard in ("00000000", "00000001") for row in rows(tmp_path / "out", shard)]
    assert found == ["success", "failed_to_download", "success"]
    assert rows(tmp_path / "glob") == rows(tmp_path / "out")


def test_the_job_script_runs_without_slurm(web: Web, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [web.url("photo", i) for i in range(4)])
    told = {"URLS": str(table), "ROOT": str(tmp_path), "PYTHON": sys.executable, "WORKERS": "2"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | told
    command = ["bash", "00_download.sh", *FLAGS, "--rows_per_shard", "2"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=60)
    assert [len(rows(tmp_path / "shards", f"{number:08d}")) for number in range(2)] == [2, 2]
    environment.pop("URLS")
    refused = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "URLS is not set" in refused.stderr


def test_shards_of_large_row_groups_are_cut_out_of_them(web: Web, tmp_path: Path) -> None:
    urls = [web.url("photo", i) for i in range(25)]
    pq.write_table(pa.table({"url": urls}), tmp_path / "t.parquet", row_group_size=7)
    assert run(tmp_path / "t.parquet", tmp_path / "out", "--rows_per_shard", 10) == 0
    told = [row["url"] for number in range(3) for row in rows(tmp_path / "out", f"{number:08d}")]
    assert told == urls


def test_hashes_of_the_table_are_verified(web: Web, tmp_path: Path) -> None:
    images = photos()
    hashes = [hashlib.md5(images[i]).hexdigest() for i in range(3)]
    columns = {"md5": [hashes[0].upper(), hashes[0], None]}
    table = write_table(tmp_path / "t.parquet", [web.url("photo", i) for i in range(3)], **columns)
    assert run(table, tmp_path / "out", "--verify_hash", "md5") == 0
    found = rows(tmp_path / "out")
    assert [row["status"] for row in found] == ["success", "failed_to_download", "success"]
    assert found[1]["error_message"].startswith("hash_mismatch")
    assert [row["md5"] for row in found] == columns["md5"]


def test_columns_that_clash_are_renamed_and_none_is_lost() -> None:
    names = ["URL", "url", "key", "original_key", "width", "original_width", "sha256", "caption", "TEXT"]
    found = renamed_columns(names, "URL", "TEXT")
    assert found[0] == "url"
    assert found[-1] == "caption"
    assert len({*found}) == len(names)
    assert not {*found[1:-1]} & {*OWN_COLUMNS, "url", "caption"}
    assert found[3] == "original_key"


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("t.csv", "link_url,text\nx,y\n", [], ["no column 'url'", "link_url, text", "--url_col link_url"]),
        ("t.csv", "url\n", [], ["no rows"]),
        ("t.csv", "", [], ["no rows"]),
        ("t.csv", "url,a\nhttp://x/,1,2\n", [], ["line 2", "3 fields"]),
        ("t.csv", "url,url\nx,y\n", [], ["two columns have one name"]),
        ("t.jsonl", '{"url": "x"}\n[1]\n', [], ["line 2", "json_not_an_object"]),
        ("t.jsonl", '{"url": 5}\n', [], ["holds int64, not text"]),
        ("t.parquet", "no parquet", [], ["cannot be read as a table"]),
        ("t.xlsx", "x", [], ["no tables; they end in .parquet"]),
        ("t.csv", "url,x\na,b\n", ["--caption_col", "caption"], ["no column 'caption'"]),
        ("t.csv", "url,x\na,b\n", ["--verify_hash", "sha256"], ["no column 'sha256'"]),
        ("t.csv", "url,x\na,b\n", ["--verify_hash", "crc=x"], ["hashes are sha256"]),
        ("t.csv", "url\na\n", ["--resize_mode", "border"], ["--image_size"]),
        ("t.csv", "url\na\n", ["--image_size", "256", "--encode", "keep"], ["--encode jpg"]),
        ("t.csv", "url\na\n", ["--allow_private", "everything"], ["--allow_private"]),
        ("t.csv", "url\na\n", ["--rerun", "--verify"], ["--rerun downloads everything again"]),
    ],
)
def test_bad_input_is_told_in_one_line(
    name: str, content: str, flags: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert run(tmp_path / name, tmp_path / "out", *flags) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert all(word in told[0] for word in words), told


def test_a_table_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.parquet", tmp_path / "out") == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_folder_with_other_shards_is_left_alone(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = write_table(tmp_path / "t.parquet", [web.url("photo", 1)]), tmp_path / "out"
    out.mkdir()
    (out / "00000000.tar").write_bytes(b"precious")
    assert run(table, out) == 2
    assert "holds 1 shards that 00_download has not made: 00000000" in capsys.readouterr().err
    assert (out / "00000000.tar").read_bytes() == b"precious"
    assert run(table, out, "--rerun") == 0
    assert rows(out)[0]["status"] == "success"
    other = write_table(tmp_path / "u.parquet", [web.url("photo", 1)] * 2)
    assert run(other, out) == 2
    assert "ran on" in capsys.readouterr().err
    assert len(rows(out)) == 1


def test_dry_run_writes_nothing(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("url\n" + "http://example.org/\n" * 25)
    assert run(tmp_path / "t.csv", tmp_path / "out", "--dry_run", "--rows_per_shard", 10) == 0
    assert "3 pending" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ---- images


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("no", 0, (512, 347)), ("keep_ratio", 100, (148, 100)), ("keep_ratio_largest", 100, (100, 68)),
        ("center_crop", 100, (100, 100)), ("border", 100, (100, 100)),
    ],
)  # fmt: skip
def test_resize_modes(mode: Any, size: int, expected: tuple[int, int]) -> None:
    image = next(data for data in photos() if image_size(data) == (512, 347))
    stored = make_stored(image, ImagePolicy("jpg", size, mode))
    assert (stored.width, stored.height) == image_size(stored.data) == expected
    assert (stored.facts.width, stored.facts.height) == (512, 347)
    pixels = decode_rgb(stored.data)
    assert (pixels[0].min() > 240) == (mode == "border")


def test_only_larger_images_are_resized() -> None:
    stored = make_stored(photos()[0], ImagePolicy("jpg", 4000, "keep_ratio", True))
    assert (stored.width, stored.height) == (512, 512)


def test_other_formats_keep_their_bytes_and_suffix() -> None:
    for suffix, name in (("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF")):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (200, 10, 10)).save(buffer, name)
        stored = make_stored(buffer.getvalue(), ImagePolicy())
        assert (stored.suffix, stored.data) == (suffix, buffer.getvalue())


def test_what_a_camera_wrote_is_in_the_row() -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A camera\x00\x1b[31m"
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    stored = make_stored(buffer.getvalue(), ImagePolicy())
    assert (stored.width, stored.height) == (30, 40)
    assert stored.facts.exif == {"Image Orientation": "6", "Image Make": "A camera[31m"}


def test_small_and_long_images_can_be_refused(web: Web, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [web.url("photo", i) for i in range(3)])
    assert run(table, tmp_path / "out", "--min_image_size", 400, "--max_aspect_ratio", 1.1) == 0
    told = [row["error_message"] and row["error_message"].partition(":")[0] for row in rows(tmp_path / "out")]
    assert told == [None, "image_too_small", "image_too_small"]


def test_a_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table([["http://h.invalid/1"], ["a"], ["b"]], names=["url", "caption", "caption"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert run(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "two columns have one name" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


# ---- a folder that an older version began


def test_an_older_folder_goes_on_as_it_was_begun(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the filter, the names of captions and the quotation marks of then; a new folder has those of now."""
    table = tmp_path / "t.tsv"
    table.write_text("title\turl\n" + "".join(f'"two\nlines"\t{web.url("photo", 9000 + i)}\n' for i in range(2)))
    now = ["--encode", "jpg", "--image_size", "64", "--resize_mode", "keep_ratio", "--rows_per_shard", "1"]
    then = ["--resize_filter", "box", "--caption_names", "few", "--tsv_quotes", "csv", "--opt_out", "ignore"]
    assert run(table, tmp_path / "then", *now, *then) == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "then").glob("*.tar")}
    out = tmp_path / "out"
    assert run(table, out, *now, *then, "--shards", "00000000") == 0
    record = out / "_receipts" / NAME / "_epoch.1.json"
    older = json.loads(record.read_bytes())
    for name in ("resize_filter", "caption_names", "tsv_quotes", "opt_out"):
        assert older["options"].pop(name)
    assert older["options"]["disallowed_header_directives"] == "noai,noimageai,noindex,noimageindex"
    record.write_text(json.dumps(older))
    asked = web.seen("/robots.txt")
    capsys.readouterr()
    loud = [flag for flag in replaced(FLAGS, now) if flag != "--quiet"]
    assert stage.main(["--input", str(table), "--output", str(out), *loud]) == 0
    assert "--opt_out ignore: an older version has begun" in capsys.readouterr().err
    assert web.seen("/robots.txt") == asked
    assert pq.read_schema(out / "00000001.parquet").names == pq.read_schema(out / "00000000.parquet").names
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == expected
    assert run(table, tmp_path / "new", *now) == 2, "two lines are two rows, of which the second has one field"


def test_a_folder_of_img2dataset_is_left_alone(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t.parquet", [web.url("photo", 1)])
    for number, name in enumerate(("00000.tar", "00001_stats.json", "000002.parquet", "00003/")):
        out = tmp_path / str(number)
        out.mkdir()
        if name.endswith("/"):
            (out / name).mkdir()
        else:
            (out / name).write_bytes(b"precious")
        for flags in ((), ("--rerun",), ("--dry_run",)):
            assert run(table, out, *flags) == 2
            assert "that 00_download has not made: 0000" in capsys.readouterr().err
        assert [path.name for path in out.iterdir() if path.name[0] != "_"] == [name.strip("/")]


def test_no_cell_of_metadata_csv_is_a_formula(web: Web, tmp_path: Path) -> None:
    starts = ["", "\t", " ", "\r", "\n", "\x0b", "\xa0", "\u200b", "\ufeff", "\u3000", "\u2060", " \n\u200f"]
    captions = [start + sign + "1+1" for start in starts for sign in "=+-@\uff1d\uff0b\uff0d\uff20"]
    plain = ["a=1", "1-1", "'=1", "plain", "|x", "a\n=1"]
    table = write_table(
        tmp_path / "t.parquet", [web.url("photo", i) for i in range(len(captions + plain))], caption=captions + plain
    )
    assert run(table, tmp_path / "out") == 0
    with open(tmp_path / "out" / "metadata.csv", newline="", encoding="utf-8") as file:
        told = [row["caption"] for row in csv.DictReader(file)]
    assert told == [f"'{caption}" for caption in captions] + plain
