"""Stage 04 as a user starts it: what is replaced, what is kept, and what it makes of bad input."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from curation.tar import TarWriter
from tests.test_stage_01_filter_noface import unprivileged

ROOT = Path(__file__).resolve().parent.parent
STAGE = "04_reshard"
Entry = tuple[str, bytes]


def source_entries(keys: Sequence[str], image: str = "jpg") -> list[Entry]:
    return [
        (f"{key}.{suffix}", data)
        for key in keys
        for suffix, data in ((image, key.encode() * 700), ("json", b'{"uid": "%s"}' % key.encode()), ("txt", b"old"))
    ]


def write_tar(path: Path, entries: Sequence[Entry], mtime: int = 1_600_000_000) -> bytes:
    """By Python's tarfile, so that our own writer is not its own judge."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime
            archive.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def read_tar(path: Path) -> list[Entry]:
    with tarfile.open(path) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive if m.isfile()]  # type: ignore[union-attr]


def write_edits(root: Path, shard: str, keys: Sequence[str]) -> None:
    path = root / "edits" / f"{shard}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for key in keys:
            for suffix in ("jpg", "txt", "json"):
                writer.add(f"{key}.{suffix}", f"new {suffix} of {key}".encode())
        writer.close()


def write_prompts(root: Path, shard: str, keys: Sequence[str]) -> None:
    (root / "prompts").mkdir(exist_ok=True)
    (root / "prompts" / f"{shard}.json").write_text(json.dumps({f"{key}.json": "a prompt" for key in keys}))


def reshard(
    root: Path, *flags: str, prompts: bool = True, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "04_reshard.py", "--input", f"{root}/shards", "--edits", f"{root}/edits"]
    command += ["--output", f"{root}/hybrid", *(["--prompts", f"{root}/prompts"] if prompts else []), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def receipt(root: Path, shard: str = "00000000") -> dict:
    return json.loads((root / f"hybrid/_receipts/{STAGE}/00000/{shard}.json").read_bytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four samples a, b, c, d; b and d have prompts and edits."""
    write_tar(tmp_path / "shards/00000000.tar", source_entries("abcd"))
    write_edits(tmp_path, "00000000", "bd")
    write_prompts(tmp_path, "00000000", "bd")
    return tmp_path


def hybrid(root: Path) -> list[Entry]:
    return read_tar(root / "hybrid/00000000.tar")


def edited(key: str) -> list[Entry]:
    return [(f"{key}.{suffix}", f"new {suffix} of {key}".encode()) for suffix in ("jpg", "json", "txt")]


@pytest.mark.parametrize("flags", [[], ["--verify"]])
def test_edited_samples_are_replaced_in_place_and_the_others_copied(root: Path, flags: list[str]) -> None:
    done = reshard(root, *flags)
    assert done.returncode == 0, done.stderr
    expected = source_entries("a") + edited("b") + source_entries("c") + edited("d")
    assert hybrid(root) == expected
    counts = receipt(root)["counts"]
    assert counts["in"] == counts["kept"] == 4
    assert receipt(root)["notes"]["edited"] == 2
    with tarfile.open(root / "hybrid/00000000.tar") as archive:
        assert {member.mtime for member in archive} == {1_600_000_000}, "new members take the source's time"


def test_without_an_edit_the_output_is_the_source_byte_for_byte(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "shards/00000000.tar", source_entries([f"{n:05d}" for n in range(200)]))
    (tmp_path / "edits").mkdir()
    assert reshard(tmp_path, prompts=False).returncode == 0
    assert (tmp_path / "hybrid/00000000.tar").read_bytes() == source


@pytest.mark.parametrize("image", ["webp", "png", "jpeg"])
def test_a_generated_jpg_replaces_an_image_of_any_type(root: Path, image: str) -> None:
    write_tar(root / "shards/00000000.tar", source_entries("abcd", image))
    assert reshard(root, "--verify").returncode == 0
    assert hybrid(root)[3:6] == edited("b")


def test_what_the_source_sample_lacks_is_added_behind_it(root: Path) -> None:
    write_tar(root / "shards/00000000.tar", [e for e in source_entries("abcd") if e[0] != "b.txt"])
    assert reshard(root, "--verify").returncode == 0
    assert [name for name, _ in hybrid(root)][3:6] == ["b.jpg", "b.json", "b.txt"]


def test_a_missing_edit_is_kept_or_dropped(root: Path) -> None:
    write_prompts(root, "00000000", "bcd")
    assert reshard(root).returncode == 0
    assert hybrid(root)[6:9] == source_entries("c")
    assert receipt(root)["notes"]["missing_edits"] == 1
    done = reshard(root, "--on_missing", "drop")
    assert done.returncode == 2 and "on_missing" in done.stderr, "other options need --rerun"
    assert reshard(root, "--on_missing", "drop", "--rerun", "--verify").returncode == 0
    assert [name[0] for name, _ in hybrid(root)] == list("aaabbbddd")
    assert receipt(root)["counts"]["dropped"] == {"no_edit": 1}


def test_a_lone_json_is_no_edit(root: Path) -> None:
    (root / "edits/00000000.tar").unlink()
    folder = root / "edits/00000000"
    folder.mkdir()
    for suffix in ("jpg", "txt", "json"):
        (folder / f"d.{suffix}").write_text(f"new {suffix} of d")
    (folder / "b.json").write_text("{}")
    assert reshard(root, "--edits_layout", "files", "--verify").returncode == 0
    assert hybrid(root) == source_entries("abc") + edited("d")


def test_edits_that_match_no_sample_are_an_error_by_name(root: Path) -> None:
    write_edits(root, "00000000", ["b", "stranger"])
    done = reshard(root)
    assert done.returncode == 1
    assert "stranger" in done.stderr and "00000000" in done.stderr
    assert not (root / "hybrid/00000000.tar").exists()
    assert receipt(root)["status"] == "failed"


def test_foreign_members_long_names_pax_and_sparse_files_survive(root: Path) -> None:
    long = "d" * 90 + "/" + "n" * 150
    parts = []
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
            for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link"), (tarfile.CHRTYPE, "device")):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
                archive.addfile(member)
            for name in (f"{long}{format_}.jpg", f"é{format_}.json", "../evil.jpg", "/absolute.jpg"):
                member = tarfile.TarInfo(name)
                member.size = 5
                archive.addfile(member, io.BytesIO(b"bytes"))
            end = archive.offset
        parts.append(buffer.getvalue()[:end])
    plain = write_tar(root / "shards/00000000.tar", source_entries("abcd"))
    (root / "shards/00000000.tar").write_bytes(b"".join(parts) + plain)
    assert reshard(root, "--verify").returncode == 0
    assert (root / "hybrid/00000000.tar").read_bytes().startswith(b"".join(parts)), "every byte, headers included"
    assert hybrid(root)[-3:] == edited("d")
    assert not Path("/absolute.jpg").exists()


@pytest.mark.parametrize("cut", ["end", "member"])
def test_a_truncated_source_is_read_to_its_last_whole_sample_and_reported(root: Path, cut: str) -> None:
    path = root / "shards/00000000.tar"
    with tarfile.open(path) as archive:
        last = archive.getmember("d.json")
        end = archive.offset
    data = path.read_bytes()
    path.write_bytes(data[:end] if cut == "end" else data[: last.offset_data + 3])
    if cut == "member":
        write_edits(root, "00000000", "b")
        write_prompts(root, "00000000", "b")
    done = reshard(root, "--max_error_rate", "0.5")
    assert done.returncode == 0, done.stderr
    assert "00000000.tar" in done.stderr
    assert hybrid(root)[:9] == source_entries("a") + edited("b") + source_entries("c")
    counts = receipt(root)["counts"]
    assert counts["in"] == 4 == counts["kept"] + sum(counts["failed"].values())
    assert bool(counts["failed"]) == (cut == "member")


def test_garbage_in_the_middle_costs_only_what_it_hit(root: Path) -> None:
    path = root / "shards/00000000.tar"
    with tarfile.open(path) as archive:
        start = archive.getmember("c.jpg").offset
    data = path.read_bytes()
    path.write_bytes(data[:start] + b"\xa5" * 1536 + data[start:])
    done = reshard(root, "--max_error_rate", "0.5")
    assert done.returncode == 0, done.stderr
    kept = hybrid(root)
    assert kept[:6] == source_entries("a") + edited("b") and kept[-3:] == edited("d")
    assert "00000000.tar" in done.stderr
    counts = receipt(root)["counts"]
    assert counts["in"] == counts["kept"] + sum(counts["failed"].values())


def test_of_two_samples_with_one_key_the_first_is_edited(root: Path) -> None:
    write_tar(root / "shards/00000000.tar", source_entries("abcdb"))
    assert reshard(root).returncode == 0
    assert hybrid(root) == (
        source_entries("a") + edited("b") + source_entries("c") + edited("d") + source_entries("b")
    )


def test_an_empty_shard_is_done_with_a_warning(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/00000000.tar", [])
    (tmp_path / "edits").mkdir()
    done = reshard(tmp_path, prompts=False)
    assert done.returncode == 0
    assert "no samples" in done.stderr
    assert read_tar(tmp_path / "hybrid/00000000.tar") == []


def test_an_edits_tar_that_is_not_what_its_receipt_says_is_not_used(root: Path) -> None:
    stage = root / "edits/_receipts/03_generate_images/00000"
    stage.mkdir(parents=True)
    output = {"path": "00000000.tar", "temporary": "x", "size": 10, "digest": "0" * 32, "checked": True}
    (stage / "00000000.json").write_text(json.dumps({"status": "done", "outputs": [output], "generation": 1}))
    done = reshard(root)
    assert done.returncode == 1
    assert "00000000" in done.stderr
    assert not (root / "hybrid/00000000.tar").exists()


def test_an_edits_tar_that_no_receipt_names_is_left_alone(root: Path) -> None:
    stage = root / "edits/_receipts/03_generate_images/00000"
    stage.mkdir(parents=True)
    (stage / "00000000.json").write_text(json.dumps({"status": "done", "outputs": [], "generation": 1}))
    assert reshard(root).returncode == 0
    assert hybrid(root) == source_entries("abcd"), "the tar that lies there is a leftover"


def test_verify_finds_an_output_that_differs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk gives back another byte than was written."""
    script = importlib.import_module(STAGE)
    real = script.verify_splice

    def corrupted(*arguments: object, **named: object) -> object:
        (output,) = (root / "hybrid").glob(".00000000.tar.*.tmp")
        data = bytearray(output.read_bytes())
        data[700] ^= 1
        output.write_bytes(data)
        return real(*arguments, **named)

    monkeypatch.setattr(script, "verify_splice", corrupted)
    flags = ["--input", f"{root}/shards", "--edits", f"{root}/edits", "--output", f"{root}/hybrid", "--verify"]
    assert script.main([*flags, "--prompts", f"{root}/prompts"]) == 1
    assert not (root / "hybrid/00000000.tar").exists()
    assert receipt(root)["status"] == "failed"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--edits", "/nowhere"], "/nowhere"),
        (["--on_missing", "drop"], "--prompts"),
        (["--shards", "00000099"], "00000099"),
        (["--on_misssing", "keep"], "on_missing"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(root: Path, flags: list[str], word: str) -> None:
    done = reshard(root, *flags, prompts=False)
    assert done.returncode == 2
    assert word in done.stderr and "Traceback" not in done.stderr


def test_a_read_only_output_folder_ends_the_run_with_one_line(root: Path) -> None:
    (root / "hybrid").mkdir()
    (root / "hybrid").chmod(0o555)
    try:
        done = reshard(root, before=unprivileged())
    finally:
        (root / "hybrid").chmod(0o755)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{root}/hybrid" in line
