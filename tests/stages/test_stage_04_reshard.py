"""Stage 04: edited samples replaced in place, every other byte as it was, whatever the shard holds."""

from __future__ import annotations

import importlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import ShardError
from curation.images import encode_jpeg
from curation.options import RunOptions
from curation.run.runner import run_stage
from curation.run.work import ShardContext, Stage
from curation.shards import Shard
from curation.storage.files import AtomicFile
from curation.tar import blocks
from curation.tar.headers import BLOCK, RECORD
from curation.tar.prove import verify_splice
from curation.tar.samples import TarWriter
from curation.tar.scan import SampleSpan, TarScan
from curation.tar.splice import Action, Edit, decided, splice
from tests import EXAMPLES
from tests.shards import Member, contents, member, raw_members, tar_of
from tests.stages.harness import Run

stage_04 = importlib.import_module("04_reshard")
NAME = "04_reshard"
TRIPLE = ("jpg", "json", "txt")
JPEG = encode_jpeg(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8), 90)
EDIT = {"jpg": JPEG, "txt": b"a portrait", "json": b'{"caption": "a portrait"}'}


# ---- shards, edits, runs


def sample(key: str, suffixes: Iterable[str] = TRIPLE, size: int = 700) -> list[Member]:
    dice = random.Random(key)
    return [member(f"{key}.{suffix}", dice.randbytes(dice.randrange(size))) for suffix in suffixes]


def triples(keys: Iterable[str]) -> bytes:
    return tar_of(part for key in keys for part in sample(key))


def tar_of_edits(keys: Iterable[str], parts: Sequence[str] = ("jpg", "txt", "json")) -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    for key in keys:
        for part in parts:
            writer.add(f"{key}.{part}", EDIT[part] + key.encode())
    writer.close()
    return file.getvalue()


class Stage04(Run):
    """``root/shards``, ``root/edits`` and ``root/prompts`` → ``root/hybrid``."""

    stage, script, output, first_shard = NAME, stage_04, "hybrid", "0"

    def arguments(self) -> list[str]:
        flags = ["--input", f"{self.root}/shards", "--output", f"{self.root}/hybrid"]
        if self.has_edits():
            flags += ["--edits", f"{self.root}/edits"]
        return flags + (["--prompts", f"{self.root}/prompts"] if (self.root / "prompts").exists() else [])

    def has_edits(self) -> bool:
        return True

    def prompts(self, *keys: str) -> None:
        self.put("prompts/0.json", json.dumps({f"{key}.json": "a portrait" for key in keys}))

    def result(self, shard: str = "0") -> bytes:
        return (self.root / f"hybrid/{shard}.tar").read_bytes()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Stage04:
    run = Stage04(tmp_path, capsys)
    run.put("edits/of-another-run.tar", tar_of_edits(["nobody"]))  # an empty folder would be refused
    return run


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens at the edges of windows."""
    monkeypatch.setattr(blocks, "READ_BYTES", 4096)
    monkeypatch.setattr(blocks, "MAX_KEPT_BYTES", 16 << 10)
    monkeypatch.setattr(blocks, "_REREAD_BYTES", 3000)


# ---- what is replaced and what stays


def test_edited_samples_are_replaced_and_the_rest_stays_byte_for_byte(run: Stage04) -> None:
    keys = [f"{n:04d}" for n in range(20)]
    source = run.put("shards/0.tar", triples(keys)).read_bytes()
    run.put("edits/0.tar", tar_of_edits(keys[3::5]))
    assert run("--verify") == 0, run.log
    before, after = raw_members(source), raw_members(run.result())
    assert [name for name, _ in after] == [name for name, _ in before]
    edited = set(keys[3::5])
    for (name, old), (_, new) in zip(before, after, strict=True):
        if name[:4] not in edited:
            assert new == old
        else:
            assert new[BLOCK:].rstrip(b"\0") == EDIT[name[5:]] + name[:4].encode()
            info = tarfile.TarInfo.frombuf(new[:BLOCK], "utf-8", "strict")
            assert (info.mtime, info.mode, info.uid, info.uname) == (1_700_000_000, 0o644, 0, "")
    receipt = run.receipt()
    assert receipt["counts"] == {"in": 20, "kept": 20, "dropped": {}, "failed": {}}
    assert receipt["notes"] == {"edited": 4, "image_suffix": "source", "missing_edits": 0, "verified": True}
    assert receipt["warnings"] == []


def test_a_shard_without_edits_is_the_same_file(run: Stage04) -> None:
    for tar in EXAMPLES.glob("*.tar"):
        run.put(f"shards/{tar.name}", tar.read_bytes())
    assert run("--verify") == 0
    for tar in EXAMPLES.glob("*.tar"):
        assert run.result(tar.stem) == tar.read_bytes()


def test_again_there_is_nothing_to_do(run: Stage04) -> None:
    run.put("shards/0.tar", triples("ab"))
    run.put("edits/0.tar", tar_of_edits("a"))
    assert run() == 0
    written = (run.root / "hybrid/0.tar").stat().st_mtime_ns
    assert run() == 0
    assert (run.root / "hybrid/0.tar").stat().st_mtime_ns == written
    run.put("edits/0.tar", tar_of_edits("ab"))  # other edits make it pending again
    assert run() == 0
    assert run.receipt()["notes"]["edited"] == 2


@pytest.mark.parametrize("image", ["webp", "png", "JPEG", "gif", "bmp", "tiff"])
def test_the_edit_replaces_an_image_of_any_type(run: Stage04, image: str) -> None:
    run.put("shards/0.tar", tar_of([*sample("a", ["json", image, "txt"]), *sample("b", ["json", image, "txt"])]))
    run.put("edits/0.tar", tar_of_edits("a"))
    assert run("--verify") == 0, run.log
    names = [name for name, _ in raw_members(run.result())]
    suffix = image if image.lower() in ("jpeg", "png", "webp") else "jpg"
    assert names == ["a.json", f"a.{suffix}", "a.txt", "b.json", f"b.{image}", "b.txt"]
    assert run.receipt()["notes"].get("kept_jpg") == (None if suffix == image else {image: 1})
    assert run("--verify", "--rerun", "--image_suffix", "keep") == 0, run.log
    names = [name for name, _ in raw_members(run.result())]
    assert names == ["a.json", "a.jpg", "a.txt", "b.json", f"b.{image}", "b.txt"]


def test_further_images_go_other_members_stay_and_lacking_ones_come_last(run: Stage04) -> None:
    suffixes = ["cls", "png", "seg.png", "jpg", "npy"]
    source = run.put("shards/0.tar", tar_of([*sample("a", suffixes), *sample("b")])).read_bytes()
    run.put("edits/0.tar", tar_of_edits("a"))
    assert run("--verify") == 0, run.log
    old, new = dict(raw_members(source)), raw_members(run.result())
    names = ["a.cls", "a.png", "a.seg.png", "a.npy", "a.txt", "a.json", "b.jpg", "b.json", "b.txt"]
    assert [name for name, _ in new] == names
    for name, raw in new:
        if name in ("a.cls", "a.seg.png", "a.npy") or name.startswith("b"):
            assert raw == old[name]


def test_new_members_take_the_time_of_those_they_replace(run: Stage04) -> None:
    run.put("shards/0.tar", tar_of([member("a.webp", b"1", 111), member("a.json", b"{}", 222)]))
    run.put("edits/0.tar", tar_of_edits("a"))
    assert run() == 0
    with tarfile.open(fileobj=io.BytesIO(run.result())) as tar:
        assert {info.name: info.mtime for info in tar} == {"a.webp": 111, "a.json": 222, "a.txt": 111}


@pytest.mark.parametrize("parts", [["json"], ["jpg", "txt"], ["jpg", "json"], ["txt", "json"]])
@pytest.mark.parametrize("layout", ["tar", "files"])
def test_less_than_all_three_is_no_edit(run: Stage04, parts: list[str], layout: str) -> None:
    source = run.put("shards/0.tar", triples("abcd")).read_bytes()
    if layout == "tar":
        run.put("edits/0.tar", tar_of_edits("b", parts))
    for part in parts if layout == "files" else []:
        run.put(f"edits/0/b.{part}", EDIT[part])
    assert run() == 0
    assert run.result() == source
    assert bool(run.receipt()["warnings"]) == ("jpg" in parts)


# ---- where edits and prompts come from


def loose(run: Stage04, *keys: str) -> None:
    for key in keys:
        for part, data in EDIT.items():
            run.put(f"edits/0/{key}.{part}", data + key.encode())


def test_loose_files_give_the_same_bytes_as_a_tar(run: Stage04) -> None:
    run.put("shards/0.tar", tar_of([*sample("a"), *sample("sub/b"), *sample("c")]))
    run.put("edits/0.tar", tar_of_edits(["a", "sub/b"]))
    assert run() == 0
    from_tar = run.result()
    (run.root / "edits/0.tar").unlink()
    loose(run, "a", "sub/b")
    run.put("edits/0/c.json", b"{}")  # as stage 01 leaves them
    shutil.rmtree(run.root / "hybrid")
    assert run("--verify") == 0
    assert run.result() == from_tar
    assert run.receipt()["notes"]["edited"] == 2


@pytest.mark.parametrize(("layout", "edited"), [("auto", "a"), ("tar", "a"), ("files", "b")])
def test_edits_layout_says_which_counts(run: Stage04, layout: str, edited: str) -> None:
    run.put("shards/0.tar", triples("ab"))
    run.put("edits/0.tar", tar_of_edits("a"))
    loose(run, "b")
    assert run("--edits_layout", layout) == 0
    new = contents(run.result())
    assert {name for name in new if new[name].startswith(JPEG)} == {f"{edited}.jpg"}


@pytest.mark.parametrize("on_missing", ["keep", "drop"])
def test_samples_whose_edit_is_missing(run: Stage04, on_missing: str) -> None:
    source = run.put("shards/0.tar", triples("abcd")).read_bytes()
    run.put("edits/0.tar", tar_of_edits("a"))
    run.prompts("a", "b", "d")
    assert run("--verify", "--on_missing", on_missing) == 0, run.log
    names = {name[0] for name in contents(run.result())}
    counts = run.receipt()["counts"]
    if on_missing == "keep":
        assert names == {*"abcd"}
        assert counts == {"in": 4, "kept": 4, "dropped": {}, "failed": {}}
        assert dict(raw_members(run.result()))["b.jpg"] == dict(raw_members(source))["b.jpg"]
    else:
        assert names == {*"ac"}
        assert counts == {"in": 4, "kept": 2, "dropped": {"no_edit": 2}, "failed": {}}
    assert run.receipt()["notes"]["missing_edits"] == 2
    assert "2 samples with a prompt have no edit" in run.log
    assert "b, d" in run.log


def test_edits_without_a_prompt_are_not_applied(run: Stage04) -> None:
    run.put("shards/0.tar", triples("ab"))
    run.put("edits/0.tar", tar_of_edits("ab"))
    run.prompts("a")
    assert run() == 0
    assert run.receipt()["notes"]["edited"] == 1
    assert not contents(run.result())["b.jpg"].startswith(b"generated")
    assert "1 edits have no prompt: not applied" in run.log


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_edits_that_match_no_sample_are_an_error_by_name(run: Stage04, layout: str) -> None:
    run.put("shards/0.tar", triples("ab"))
    run.put("shards/1.tar", triples("cd"))
    if layout == "tar":
        run.put("edits/0.tar", tar_of_edits(["a", "y", "z"]))
    else:
        loose(run, "a", "y", "z")
    assert run() == 1
    assert f"{run.root}/edits: edits of shard 0 match no sample of {run.root}/shards/0.tar: y, z" in run.log
    assert not (run.root / "hybrid/0.tar").exists()
    assert run.receipt()["status"] == "failed"
    assert (run.root / "hybrid/1.tar").exists()


def test_many_unmatched_edits_are_counted(run: Stage04) -> None:
    run.put("shards/0.tar", triples("a"))
    run.put("edits/0.tar", tar_of_edits(f"{n:03d}" for n in range(500)))
    assert run() == 1
    assert "000, 001, 002, 003, 004 and 495 more" in run.log


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """Of a stand-in for stage 03."""

    keys: str = ""
    layout: str = "tar"


class Generate(Stage[GenerateOptions]):
    """Publishes edits as stage 03 does, with receipts."""

    name = "03_generate_images"

    def __init__(self, root: Path, options: GenerateOptions) -> None:
        super().__init__(options, root / "edits")

    def fingerprint(self) -> dict[str, object]:
        return {"keys": self.options.keys, "layout": self.options.layout}

    def process(self, work: ShardContext) -> None:
        work.sample_in(len(self.options.keys))
        work.keep(len(self.options.keys))
        if self.options.layout == "tar":
            with work.output(self.output / f"{work.shard.id}.tar") as file:
                file.write(tar_of_edits(self.options.keys))
            return
        for key in self.options.keys:
            for part, data in EDIT.items():
                with work.output(self.output / work.shard.id / f"{key}.{part}") as file:
                    file.write(data + key.encode())


def generate(run: Stage04, keys: str, layout: str = "tar") -> None:
    options = GenerateOptions(keys=keys, layout=layout, quiet=True, rerun=True)
    shards = [Shard("0", run.root / "shards/0.tar")]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run_stage, Generate(run.root, options), options, shards).result() == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_only_what_stage_03s_receipt_names_counts(run: Stage04, layout: str) -> None:
    run.put("shards/0.tar", triples("abcd"))
    loose(run, "c")  # left over from whatever was here before
    if layout == "files":
        run.put("edits/0.tar", tar_of_edits("d"))
    generate(run, "ab", layout)
    assert run() == 0, run.log
    new = contents(run.result())
    assert {name for name in new if new[name].startswith(JPEG)} == {"a.jpg", "b.jpg"}
    generate(run, "b", layout)  # another run of stage 03 makes the shard pending
    assert run() == 0, run.log
    new = contents(run.result())
    assert {name for name in new if new[name].startswith(JPEG)} == {"b.jpg"}


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_edits_that_were_changed_since_are_refused(run: Stage04, layout: str) -> None:
    run.put("shards/0.tar", triples("ab"))
    generate(run, "a", layout)
    path = run.root / ("edits/0.tar" if layout == "tar" else "edits/0/a.jpg")
    data = path.read_bytes()
    path.write_bytes(data[:600] + b"X" + data[601:])
    assert run() == 1
    assert str(path) in run.log
    assert "differs from the file" in run.log or "is not what its receipt" in run.log


def test_a_shard_that_stage_03_has_not_done_is_blocked(run: Stage04) -> None:
    for shard in "01":
        run.put(f"shards/{shard}.tar", triples("ab"))
    generate(run, "a")
    assert run() == 1
    assert "1 blocked: stage 03 first: 03_generate_images has no receipt for it yet" in run.log
    assert run.receipt("0")["status"] == "done"
    assert not (run.root / "hybrid/1.tar").exists()


@pytest.mark.parametrize(
    ("edits", "what"),
    [
        (tar_of_edits("ab")[: tar_of_edits("ab").index(b"b.jpg") + 700], "is cut"),
        (tar_of_edits("a")[: 512 + len(JPEG + b"a") + -len(JPEG + b"a") % 512 + 2 * 1024], "no end-of-archive"),
        (tar_of_edits("aba"), "two edits of one key"),
        (tar_of([member("a.jpg", type=tarfile.SYMTYPE), member("a.txt", b"x"), member("a.json", b"{}")]), "not_a_file"),
        (b"no tar at all" * 99, "text, not a tar"),
    ],
)
def test_damaged_edits_fail_the_shard(run: Stage04, edits: bytes, what: str) -> None:
    """An edit that got lost unnoticed would leave the original in its place."""
    run.put("shards/0.tar", triples("ab"))
    path = run.put("edits/0.tar", edits)
    assert run() == 1
    assert str(path) in run.log
    assert what in run.log


def test_loose_edits_behind_links_are_refused(run: Stage04, tmp_path_factory: pytest.TempPathFactory) -> None:
    run.put("shards/0.tar", triples("ab"))
    loose(run, "a")
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_bytes(b"secret")
    (run.root / "edits/0/a.txt").unlink()
    (run.root / "edits/0/a.txt").symlink_to(outside)
    assert run() == 1
    assert "a link leads out of the folder" in run.log


# ---- shards as they come


def test_a_source_without_its_end_is_read_to_its_last_whole_member(run: Stage04) -> None:
    source = triples("abcd")
    end = sum(len(raw) for _, raw in raw_members(source))
    run.put("shards/0.tar", source[:end])
    run.put("edits/0.tar", tar_of_edits("d"))
    assert run("--verify") == 0, run.log
    assert "no end-of-archive blocks; read to its last whole member" in run.log
    assert len(contents(run.result())) == 12
    assert run.receipt()["counts"]["kept"] == 4
    assert run.result().endswith(bytes(2 * BLOCK))


def test_a_cut_source_gives_every_sample_that_is_whole(run: Stage04) -> None:
    keys = [f"{n:02d}" for n in range(10)]
    source = triples(keys)
    members = raw_members(source)
    offsets = {name: sum(len(raw) for _, raw in members[:i]) for i, (name, _) in enumerate(members)}
    run.put("shards/0.tar", source[: offsets["09.json"] + 600])
    run.put("edits/0.tar", tar_of_edits(keys[:2]))
    assert run("--verify") == 0, run.log
    assert {name[:2] for name in contents(run.result())} == {*keys[:9]}
    assert run.receipt()["counts"] == {"in": 10, "kept": 9, "dropped": {}, "failed": {"damaged_tar": 1}}
    (line,) = run.reject_lines()
    assert (line["key"], line["reason"]) == ("09", "damaged_tar")
    assert f"{run.root}/shards/0.tar: damage at byte" in run.log


def test_garbage_in_the_middle_costs_one_sample(run: Stage04) -> None:
    keys = [f"{n:02d}" for n in range(10)]
    source = bytearray(triples(keys))
    raw = raw_members(bytes(source))
    begin = sum(len(data) for name, data in raw if name < "04")
    source[begin + 10 : begin + 900] = random.Random(0).randbytes(890)
    run.put("shards/0.tar", bytes(source))
    run.put("edits/0.tar", tar_of_edits(["03", "05"]))
    assert run("--verify") == 0, run.log
    new = contents(run.result())
    assert {name[:2] for name in new} == {*keys} - {"04"}
    assert new["05.jpg"] == EDIT["jpg"] + b"05"
    assert run.receipt()["counts"] == {"in": 10, "kept": 9, "dropped": {}, "failed": {"damaged_tar": 1}}


@pytest.mark.parametrize("data", [bytes(RECORD), tar_of([])], ids=["zeros", "no member"])
def test_an_empty_shard_is_done(run: Stage04, data: bytes) -> None:
    run.put("shards/0.tar", data)
    assert run("--verify") == 0, run.log
    assert run.result() == bytes(RECORD)
    assert run.receipt()["counts"] == {"in": 0, "kept": 0, "dropped": {}, "failed": {}}
    assert f"{run.root}/shards/0.tar: no samples" in run.log


def test_what_is_no_tar_fails_and_the_others_are_done(run: Stage04) -> None:
    run.put("shards/0.tar", b"<html>not found</html>" * 100)
    run.put("shards/1.tar", triples("ab"))
    run.put("shards/2.tar", b"")
    assert run() == 1
    assert "shards/2.tar: zero bytes" in run.log
    assert "shards/0.tar: an HTML page, not a tar" in run.log
    assert not (run.root / "hybrid/0.tar").exists()
    assert (run.root / "hybrid/1.tar").exists()


def test_duplicate_keys(run: Stage04) -> None:
    """Of two samples with one key the first is edited, the other is left as it was; none gets lost."""
    source = triples("abacb")
    run.put("shards/0.tar", source)
    run.put("edits/0.tar", tar_of_edits("a"))
    assert run("--verify") == 0, run.log
    old, new = raw_members(source), raw_members(run.result())
    assert [name for name, _ in new] == [name for name, _ in old]
    assert [raw for _, raw in new[3:]] == [raw for _, raw in old[3:]]
    assert new[0][1] != old[0][1]
    assert "2 samples have the key of an earlier one" in run.log


def test_duplicate_members_of_an_edited_sample_go(run: Stage04) -> None:
    run.put("shards/0.tar", tar_of([*sample("a"), *sample("a"), *sample("b")]))
    run.put("edits/0.tar", tar_of_edits("a"))
    assert run("--verify") == 0, run.log
    assert [name for name, _ in raw_members(run.result())] == [f"{key}.{s}" for key in "ab" for s in TRIPLE]


def test_hostile_and_foreign_members_survive_as_they_are(run: Stage04) -> None:
    """They are copied, never unpacked, and what stands between samples is no sample."""
    odd = [
        member("folder", type=tarfile.DIRTYPE),
        *sample("../../outside"),
        *sample("/etc/passwd"),
        member("noext", b"no key"),
        member("k.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("k.txt", b"a link beside me"),
        member("dev.null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("pipe.x", type=tarfile.FIFOTYPE),
        *sample("long/" * 60 + "name"),
        *sample("ünï/😀"),
    ]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        source = run.put("shards/0.tar", tar_of([*sample("a"), *odd, *sample("b")], format)).read_bytes()
        run.put("edits/0.tar", tar_of_edits(["b"]))
        assert run("--verify", "--rerun") == 0, run.log
        old, new = raw_members(source), raw_members(run.result())
        assert new[:-3] == old[:-3]
        assert run.receipt()["counts"]["in"] == 9
    assert {path.name for path in run.root.iterdir()} == {"shards", "edits", "hybrid"}


def test_sparse_files_survive(run: Stage04, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with open(tree / "m.bin", "wb") as file:
        for offset in range(0, 40 << 16, 1 << 16):
            file.seek(offset)
            file.write(b"island")
        file.truncate(3 << 20)
    for name in ("a.jpg", "a.txt", "z.jpg", "z.txt"):
        (tree / name).write_bytes(name.encode())
    (tmp_path / "shards").mkdir()
    run.put("edits/0.tar", tar_of_edits(["z"]))
    for format in ("gnu", "posix"):
        names = sorted(path.name for path in tree.iterdir())
        options = [f"--format={format}", "--sparse", "-C", str(tree), "-cf", f"{tmp_path}/shards/0.tar"]
        subprocess.run(["tar", *options, *names], check=True)
        assert run("--verify", "--rerun") == 0, run.log
        for where in ("one", "other"):
            (tmp_path / where).mkdir()
        subprocess.run(["tar", "-C", f"{tmp_path}/one", "-xf", f"{tmp_path}/hybrid/0.tar"], check=True)
        assert (tmp_path / "one/m.bin").read_bytes() == (tree / "m.bin").read_bytes()
        assert (tmp_path / "one/z.jpg").read_bytes() == EDIT["jpg"] + b"z"
        shutil.rmtree(tmp_path / "one")
        shutil.rmtree(tmp_path / "other")


def test_long_names_of_edited_samples(run: Stage04) -> None:
    key = "folder/" * 40 + "x" * 120
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        run.put("shards/0.tar", tar_of([*sample(key), *sample("b")], format))
        run.put("edits/0.tar", tar_of_edits([key]))
        assert run("--verify", "--rerun") == 0, run.log
        assert contents(run.result())[f"{key}.jpg"] == EDIT["jpg"] + key.encode()
        with tarfile.open(fileobj=io.BytesIO(run.result())) as tar:
            assert {info.mtime for info in tar} == {1_700_000_000}


def test_samples_far_larger_than_the_window(run: Stage04, small_windows: None) -> None:
    """Members beyond what is kept in memory are read again, and edited and unedited neighbours are not mixed up."""
    keys = [f"{n:02d}" for n in range(12)]
    parts = [part for n, key in enumerate(keys) for part in sample(key, size=100_000 if n % 3 else 500)]
    source = run.put("shards/0.tar", tar_of(parts)).read_bytes()
    run.put("edits/0.tar", tar_of_edits(keys[::4]))
    assert run("--verify") == 0, run.log
    old, new = raw_members(source), raw_members(run.result())
    for (name, before), (_, after) in zip(old, new, strict=True):
        assert (before == after) == (name[:2] not in keys[::4])


# ---- the splice against a plain model of it


class Pieces(io.BytesIO):
    def write_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        self.writelines(pieces)


shards = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"),
        st.lists(st.sampled_from(["jpg", "webp", "txt", "json", "npy", "a.png"]), min_size=1, max_size=4, unique=True),
    ),
    max_size=8,
    unique_by=lambda pair: pair[0],
)


@settings(max_examples=80)
@given(shard=shards, edited=st.sets(st.sampled_from("abcdefgh")), left_out=st.sets(st.sampled_from("abcdefgh")))
def test_splice_is_what_a_plain_loop_would_make(
    small_windows: None,
    tmp_path: Path,
    shard: list[tuple[str, list[str]]],
    edited: set[str],
    left_out: set[str],
) -> None:
    source, result = tmp_path / "source.tar", tmp_path / "result.tar"
    source.write_bytes(tar_of(part for key, suffixes in shard for part in sample(key, suffixes, 3000)))
    edit = Edit(EDIT["jpg"], EDIT["txt"], EDIT["json"])

    def decide(span: SampleSpan) -> Edit | Action:
        return edit if span.key in edited else Action.DROP if span.key in left_out else Action.KEEP

    file = Pieces()
    windows = list(decided(TarScan(source), decide))
    assert [span.key for _, decisions in windows for span, _ in decisions] == [key for key, _ in shard]
    splice(decided(TarScan(source), decide), file)
    result.write_bytes(file.getvalue())
    verify_splice(decided(TarScan(source), decide), result, "source.tar")
    old = contents(source.read_bytes())
    expected: dict[str, bytes] = {}
    for key, suffixes in shard:
        if key in edited:
            replaced = ["jpg" if suffix == "webp" else suffix for suffix in suffixes]
            for suffix in dict.fromkeys([*replaced, "jpg", "txt", "json"]):
                expected[f"{key}.{suffix}"] = EDIT[suffix] if suffix in EDIT else old[f"{key}.{suffix}"]
        elif key not in left_out:
            expected.update({f"{key}.{suffix}": old[f"{key}.{suffix}"] for suffix in suffixes})
    assert list(contents(file.getvalue()).items()) == list(expected.items())


# ---- --verify


def test_verify_notices_every_changed_byte(tmp_path: Path) -> None:
    source, result = tmp_path / "source.tar", tmp_path / "result.tar"
    source.write_bytes(triples("abc"))
    edit = Edit(EDIT["jpg"], EDIT["txt"], EDIT["json"])

    def decide(span: SampleSpan) -> Edit | Action:
        return edit if span.key == "b" else Action.KEEP

    file = Pieces()
    splice(decided(TarScan(source), decide), file)
    whole = file.getvalue()
    members = sum(len(raw) for _, raw in raw_members(whole))
    dice = random.Random(0)
    unnoticed = []
    for at in sorted({0, members - 1, *(dice.randrange(members) for _ in range(300))}):
        result.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            verify_splice(decided(TarScan(source), decide), result, "source.tar")
            unnoticed.append(at)
        except ShardError as error:
            assert str(result) in str(error)
    assert unnoticed == []


@pytest.mark.parametrize("how", ["lost", "swapped", "doubled", "cut"])
def test_verify_notices_samples_that_are_not_where_they_should_be(tmp_path: Path, how: str) -> None:
    source, result = tmp_path / "source.tar", tmp_path / "result.tar"
    keys = "abcd"
    source.write_bytes(triples(keys))
    wrong = {"lost": "abd", "swapped": "acbd", "doubled": "abbcd", "cut": "abcd"}[how]
    data = triples(wrong)
    result.write_bytes(data[:-RECORD] if how == "cut" else data)
    with pytest.raises(ShardError, match="not what"):
        verify_splice(decided(TarScan(source), lambda span: Action.KEEP), result, "source.tar")


def test_what_verify_refuses_is_not_published(run: Stage04, monkeypatch: pytest.MonkeyPatch) -> None:
    run.put("shards/0.tar", triples("ab"))
    put = AtomicFile.write_pieces

    def write_wrongly(self: AtomicFile, pieces: Sequence[bytes | memoryview]) -> None:
        put(self, [bytes(piece).replace(b"a.jpg", b"A.jpg") for piece in pieces])

    monkeypatch.setattr(AtomicFile, "write_pieces", write_wrongly)
    assert run("--verify") == 1
    assert "not what 0.tar and its edits should give" in run.log
    assert not (run.root / "hybrid/0.tar").exists()
    assert not list(run.root.glob("hybrid/.*"))


# ---- usage


def test_folders_that_would_be_overwritten(run: Stage04) -> None:
    run.put("shards/0.tar", triples("a"))
    for folder in ("shards", "edits"):
        assert run("--output", f"{run.root}/{folder}") == 2
        assert "--output" in run.log
    assert run("--edits", f"{run.root}/absent") == 2
    assert f"--edits: there is no folder {run.root}/absent" in run.log
    assert run("--on_missing", "drop") == 2
    assert "--on_missing drop needs --prompts" in run.log


def test_unknown_flags(run: Stage04) -> None:
    assert run("--on_mising", "drop") == 2
    assert "Did you mean --on_missing?" in run.log
