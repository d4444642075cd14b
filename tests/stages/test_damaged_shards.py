"""Every stage on damaged tars: no sound sample is lost, none comes twice, and what was lost is counted and reported."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.__main__ import main as command
from curation.shards import discover
from curation.storage.urls import Source
from curation.tar import TarReport, TarScan, blocks
from tests.servers import deterministic_llm_server
from tests.stages import recaption_stub
from tests.stages.test_stage_06_metadata import PLUGIN

KEYS = [f"{number:03d}" for number in range(10)]
MORE_KEYS = [f"1{key[1:]}" for key in KEYS]
HIT = "004"  # the sample that is damaged
ANY_ERROR_RATE = ("--max_error_rate", "1", "--quiet")
Extents = dict[str, tuple[int, int, int]]  # name → offset of the header, of the data, of the next header


def photo(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (40, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def members(keys: Sequence[str] = KEYS) -> Iterator[tuple[str, bytes]]:
    for number, key in enumerate(keys):
        caption = f"A woman walks her dog along the beach, number {number}"
        metadata = {
            "uid": f"{number:032x}",
            "caption": caption,
            "face_bboxes": [[0.1, 0.1, 0.5, 0.5]],
            "exif": "x" * 700,
        }
        yield f"{key}.jpg", photo(number)
        yield f"{key}.json", json.dumps(metadata).encode()
        yield f"{key}.txt", caption.encode() * 20


def sound_shard(keys: Sequence[str] = KEYS) -> tuple[bytes, Extents]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members(keys):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        extents = {i.name: (i.offset, i.offset_data, i.offset_data + i.size + -i.size % 512) for i in tar}
    return file.getvalue(), extents


Damage = Callable[[bytes, Extents], bytes]


def lost(name: str, size: Callable[[Extents], int] | int, into: int = 200) -> Damage:
    def damage(data: bytes, extents: Extents) -> bytes:
        begin = extents[name][1] + into
        return data[:begin] + data[begin + (size if isinstance(size, int) else size(extents)) :]

    return damage


def inserted(name: str, filling: bytes) -> Damage:
    return lambda data, extents: data[: (at := extents[name][1] + 200)] + filling + data[at:]


def overwritten(name: str, filling: bytes, *, whole: bool = False) -> Damage:
    def damage(data: bytes, extents: Extents) -> bytes:
        begin, start, end = extents[name]
        size = end - begin if whole else start - begin
        return data[:begin] + (filling * size)[:size] + data[begin + size :]

    return damage


def length(extents: Extents, *names: str) -> int:
    return sum(extents[name][2] - extents[name][0] for name in names)


DAMAGES: dict[str, tuple[Damage, set[str]]] = {  # what is done, and the samples that are lost by it
    "truncated": (lambda data, extents: data[: extents[f"{HIT}.jpg"][1] + 900], {*KEYS[4:]}),
    "a block lost in a picture": (lost(f"{HIT}.jpg", 512), {HIT}),
    "odd bytes lost in a picture": (lost(f"{HIT}.jpg", 333), {HIT}),
    "a block lost in the last member": (lost(f"{HIT}.txt", 512), {HIT}),
    "as many bytes lost as the json is long": (lost(f"{HIT}.jpg", lambda e: length(e, f"{HIT}.json")), {HIT}),
    "as many bytes lost as json and txt are long": (
        lost(f"{HIT}.jpg", lambda e: length(e, f"{HIT}.json", f"{HIT}.txt"), into=0),
        {HIT},
    ),
    "bytes lost over three samples": (
        lost(f"{HIT}.jpg", lambda e: e["006.jpg"][1] + 99 - e[f"{HIT}.jpg"][1]),
        {HIT, "005", "006"},
    ),
    "bytes lost up to the end of the archive": (lost("009.jpg", lambda e: length(e, "009.txt")), {"009"}),
    "blocks inserted": (inserted(f"{HIT}.jpg", b"\xaa" * 1024), {HIT}),
    "odd bytes inserted": (inserted(f"{HIT}.json", b"\xaa" * 333), {HIT}),
    "zeros inserted": (inserted(f"{HIT}.jpg", bytes(2048)), {HIT}),
    "the first header overwritten": (overwritten(f"{HIT}.jpg", b"\xaa"), {HIT}),
    "a header in the middle overwritten": (overwritten(f"{HIT}.json", b"\xaa"), {HIT}),
    "the last header overwritten": (overwritten(f"{HIT}.txt", b"\xaa"), {HIT}),
    "zeros over the first member": (overwritten(f"{HIT}.jpg", b"\0", whole=True), {HIT}),
    "zeros over a member in the middle": (overwritten(f"{HIT}.json", b"\0", whole=True), {HIT}),
    "zeros over a header": (overwritten(f"{HIT}.json", b"\0"), {HIT}),
    "zero blocks between samples": (
        lambda data, extents: data[: (at := extents[f"{HIT}.jpg"][0])] + bytes(2048) + data[at:],
        set(),
    ),
    "zero blocks between members": (
        lambda data, extents: data[: (at := extents[f"{HIT}.json"][0])] + bytes(1024) + data[at:],
        set(),
    ),
    "another archive behind it": (lambda data, extents: data + sound_shard(MORE_KEYS)[0], set()),
}  # fmt: skip


def in_a_thread(main: Callable[[list[str]], int], *argv: object) -> int:
    """Not in pytest's main thread, whose signal handlers stay as they are."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(main, [str(word) for word in argv]).result()


def script(name: str) -> Any:
    return importlib.import_module(name).main


def stage_01(root: Path, port: int) -> set[str]:
    folders = ("--input", root / "shards", "--output", root / "out", "--edits", root / "edits")
    assert in_a_thread(script("01_filter_noface"), *folders, "--detector", "recorded", *ANY_ERROR_RATE) == 0
    return {name.removesuffix(".json") for name in json.loads((root / "out/0.json").read_bytes())}


def stage_02(root: Path, port: int) -> set[str]:
    folders = ("--input", root / "shards", "--output", root / "out", "--ports", port)
    assert in_a_thread(script("02_captions_processor"), *folders, *ANY_ERROR_RATE) == 0
    return {name.removesuffix(".json") for name in json.loads((root / "out/0.json").read_bytes())}


def stage_04(root: Path, port: int) -> set[str]:
    """Copied, and regrouped: the samples' members are the sound shard's, and readers find all of them."""
    plain = ("--input", root / "shards", "--index", *ANY_ERROR_RATE)
    assert in_a_thread(script("04_reshard"), *plain, "--output", root / "out", "--verify") == 0
    regrouped = ("--output", root / "regrouped", "--shard_size", 1000, "--verify")
    assert in_a_thread(script("04_reshard"), *plain, *regrouped) == 0
    sound = dict(members())
    (root / "edits").mkdir(exist_ok=True)
    for tar in (root / "out/0.tar", root / "regrouped/00000000.tar"):
        with tarfile.open(tar) as file:
            found = {info.name: file.extractfile(info).read() for info in file}  # type: ignore[union-attr]
            assert len(file.getnames()) == len(found)
        assert all(data == sound.get(name, data) for name, data in found.items())
        keys = {name.partition(".")[0] for name in found}
        assert found.keys() == {f"{key}.{suffix}" for key in keys for suffix in ("jpg", "json", "txt")}
    assert command(["verify", str(root / "shards"), str(root / "out"), "--edits", str(root / "edits"), "--quiet"]) == 0
    return keys


def stage_05(root: Path, port: int) -> set[str]:
    flags = ("--batch_size", "4", "--device", "cpu", "--dataloader_num_workers", "2")
    assert in_a_thread(recaption_stub.main, root / "shards", "-o", root / "out", *flags, *ANY_ERROR_RATE) == 0
    rows = [json.loads(line) for line in (root / "out/captions.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"] for row in rows}


def stage_06(root: Path, port: int) -> set[str]:
    parquet = pytest.importorskip("pyarrow.parquet")
    folders = ("--input", root / "shards", "--output", root / "out")
    flags = ("--custom_pypath", PLUGIN, "--models", "stub", "--batch_size", "4", "--nworkers", "1", "--device", "cpu")
    assert in_a_thread(script("06_metadata"), *folders, *flags, *ANY_ERROR_RATE) == 0
    rows = parquet.read_table(root / "out/0.parquet").to_pylist()
    return {row["key"] for row in rows if row.get("status") in (None, "ok", "success")}


NAMES = {stage_01: "01_filter_noface", stage_02: "02_captions_processor", stage_04: "04_reshard",
         stage_05: "05_recaption", stage_06: "06_metadata"}  # fmt: skip


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with deterministic_llm_server(delay_s=0) as number:
        yield number


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CURATION_STUB_LOG", str(tmp_path / "stub.log"))
    stub = recaption_stub
    for module, name in ((stub.backends, "load"), (stub.hub_cache, "resolve"), (stub.stage, "Recaption")):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", NAMES, ids=NAMES.values())
def test_sound_samples_come_through(
    stage: Callable[[Path, int], set[str]], damage: str, tmp_path: Path, port: int
) -> None:
    change, gone = DAMAGES[damage]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(change(*sound_shard()))
    keys = {*KEYS, *(MORE_KEYS if damage == "another archive behind it" else ())}
    assert stage(tmp_path, port) == keys - gone
    (path,) = (tmp_path / "out/_receipts" / NAMES[stage]).glob("*/0.json")
    receipt = json.loads(path.read_bytes())
    counts = receipt["counts"]
    assert counts["in"] == counts["kept"] + sum(counts["failed"].values())
    assert counts["kept"] == len(keys - gone)
    assert set(counts["failed"]) <= {"damaged_tar"}
    assert any("at byte" in line for line in receipt["warnings"]), receipt
    if counts["failed"]:
        lines = (tmp_path / "out/_rejects" / NAMES[stage] / "0.jsonl").read_text().splitlines()
        assert {json.loads(line)["key"] for line in lines} <= gone


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
@pytest.mark.parametrize("stage", NAMES)
def test_tars_compressed_with_gzip_are_read(
    stage: Callable[[Path, int], set[str]], name: str, tmp_path: Path, port: int
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / name).write_bytes(gzip.compress(sound_shard()[0]))
    assert stage(tmp_path, port) == {*KEYS}
    assert stage(tmp_path, port) == {*KEYS}  # again, when it is done


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_stage_04_writes_plain_tars_from_packed_ones(name: str, tmp_path: Path) -> None:
    """The bytes are those that it writes from the tar inside, also in shards of another size."""
    for folder, file, data in (("plain", "0.tar", sound_shard()[0]), ("packed", name, gzip.compress(sound_shard()[0]))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(data)
        flags = ("--input", tmp_path / folder, "--index", "--verify", "--quiet")
        for target, more in (("same", ()), ("two", ("--shard_size", 2, "--shuffle_buffer", 8))):
            where = ("--output", tmp_path / f"{folder}-{target}")
            assert in_a_thread(script("04_reshard"), *flags, *where, *more) == 0
    for target in ("same", "two"):
        made = [
            {path.name: path.read_bytes() for path in (tmp_path / f"{folder}-{target}").glob("*.*")}
            for folder in ("plain", "packed")
        ]
        assert made[0] == made[1] and made[0]["00000000.tar" if target == "two" else "0.tar"]
        assert all(path.read_bytes()[257:262] == b"ustar" for path in (tmp_path / f"packed-{target}").glob("*.tar"))
    (tmp_path / "edits").mkdir()
    where = ("--source", tmp_path / "packed", "--edits", tmp_path / "edits")
    assert command(["verify", *map(str, (tmp_path / "packed-same", *where))]) == 0


@pytest.mark.parametrize("stage", NAMES, ids=NAMES.values())
def test_what_is_no_tar_is_a_failed_shard(
    stage: Callable[[Path, int], set[str]], tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever share of the samples may fail."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "shards/1.tar").write_bytes(b"")
    with pytest.raises(AssertionError, match="assert 1 == 0"):
        stage(tmp_path, port)
    receipts = [json.loads(path.read_bytes()) for path in (tmp_path / "out/_receipts" / NAMES[stage]).glob("*/?.json")]
    assert [receipt["status"] for receipt in receipts] == ["failed", "failed"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_streams_and_small_windows_give_the_same_samples(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream's size is known only at its end; with small windows most suspect members are no longer in memory."""

    def seen(source: Source) -> tuple[list[object], list[str]]:
        report = TarReport()
        spans = [span for window in TarScan(source, report).windows() for span in window.spans]
        found: list[object] = [(span.key, span.torn, span.repeated, [m.start for m in span.members]) for span in spans]
        return found, [line.split(": ", 1)[1] for line in report.warnings()]

    path = tmp_path / "0.tar"
    path.write_bytes(DAMAGES[damage][0](*sound_shard()))
    (stream,) = discover(f"pipe:cat {path}", allow_pipe=True)
    expected = seen(path)
    assert seen(stream.path) == expected
    monkeypatch.setattr(blocks, "READ_BYTES", 8192)
    monkeypatch.setattr(blocks, "MAX_KEPT_BYTES", 16 << 10)
    assert seen(path) == seen(stream.path) == expected
