"""Stage 00 takes over a folder that img2dataset 1.47 has made, and runs img2dataset's command lines.

The folder is real: see ``tests/download/img2dataset.py``.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.download.img2dataset import listed, named_hash
from tests import EXAMPLES, ROOT, processes, replaced
from tests.download.img2dataset import REAL, copy_of, url_table
from tests.processes import wait_until
from tests.servers import photo_server
from tests.shards import contents, samples_of
from tests.stages.harness import Records

NAME = "00_download"
stage = importlib.import_module(NAME)
FLAGS = ["--allow_private", "127.0.0.0/8", "--retries", "0", "--lease_s", "2", "--quiet", "--opt_out", "ignore"]
LOST = {"00000": {0, 4, 7}, "00001": {8, 12, 14}}  # rows that img2dataset got no image of
records = Records(NAME)
pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with photo_server(EXAMPLES) as number:
        yield number


def asked(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/_seen") as reply:
        return dict(json.load(reply)["seen"])


@pytest.fixture
def made(port: int, tmp_path: Path) -> Path:
    return copy_of(tmp_path / "made", port)


def adopt(folder: Path, *flags: object) -> int:
    return stage.main(["--adopt", str(folder), *replaced(FLAGS, flags)])


def rows(folder: Path, shard: str) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / f"{shard}.parquet").to_pylist())


def numbers(folder: Path, shards: str = "*") -> dict[str, list[int]]:
    """Shard → the rows of which there is a whole sample."""
    found = {}
    for path in sorted(folder.glob(f"{shards}.tar")):
        samples = samples_of(path)
        assert all({"json", "txt"} < set(parts) for parts in samples.values())
        found[path.stem] = sorted(int(json.loads(parts["json"])["uid"], 16) for parts in samples.values())
    return found


def test_a_folder_is_taken_over_where_it_lies(made: Path, port: int) -> None:
    before = {path.stem: contents(path) for path in made.glob("0000[01].tar")}
    schema = pq.read_schema(made / "00000.parquet")
    known = asked(port)
    assert adopt(made) == 0
    # The folder's names, keys and columns; every row once, in the order of the keys.
    assert {path.name for path in made.glob("*.tar")} == {"00000.tar", "00001.tar", "00002.tar"}
    assert pq.read_schema(made / "00000.parquet").names == schema.names
    assert [field.type for field in pq.read_schema(made / "00000.parquet")] == [field.type for field in schema]
    assert [row["key"] for row in rows(made, "00001")] == [f"00001{i}" for i in range(8)]
    assert [int(row["uid"], 16) for row in rows(made, "00002")] == list(range(16, 24))
    # What was whole is as it was, to the byte, and was not asked for; all else was.
    for shard, members in before.items():
        after = contents(made / f"{shard}.tar")
        assert {name: after[name] for name in members} == members
        assert list(after)[: len(members)] == list(members)
    assert numbers(made) == {
        "00000": [0, 1, 2, 3, 5, 6, 7], "00001": list(range(8, 16)), "00002": list(range(16, 24)),
    }  # fmt: skip
    new = {path for path, count in asked(port).items() if count > known.get(path, 0)}
    assert {f"/photo/{i}" for i in (0, 7, 8, 12, 14, 16, 20)} | {"/empty/4"} <= new
    assert (
        not {f"/photo/{i}" for shard in (range(8), range(8, 16)) for i in shard}
        - {f"/photo/{i}" for i in (0, 4, 7, 8, 12, 14)}
        & new
    )
    [bad] = [row for row in rows(made, "00000") if row["status"] != "success"]
    assert (bad["key"], bad["error_message"]) == ("000004", "empty: no bytes")
    receipts = records.receipts(made)
    assert {shard: receipt["notes"].get("copied") for shard, receipt in receipts.items()}["00000"] == 5
    assert receipts["00001"]["counts"]["kept"] == 8
    assert pq.read_table(made / "full_metadata.parquet").num_rows == 24


def test_what_is_taken_over_is_a_root_like_any_other(made: Path, port: int) -> None:
    """A second run has nothing to do; failed rows can be asked for once more; a rerun takes over what is there."""
    assert adopt(made) == 0
    files = {path.name: path.read_bytes() for path in made.glob("*.*")}
    before = asked(port)
    assert adopt(made) == 0
    assert asked(port) == before
    assert adopt(made, "--retry_failed_urls") == 0
    assert asked(port)["/empty/4"] == before["/empty/4"] + 1
    assert adopt(made, "--verify") == 0
    assert adopt(made, "--rerun") == 0
    assert {path: count for path, count in asked(port).items() if path != "/empty/4"} == {
        path: count for path, count in before.items() if path != "/empty/4"
    }
    assert {path.name: path.read_bytes() for path in made.glob("*.*")} == files
    checked = subprocess.run(
        [sys.executable, "-m", "curation", "fsck", made], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert stage.main(["--input", str(url_table(made.parent / "t.parquet", port)), "--output", str(made), *FLAGS]) == 2


def test_the_wishes_of_sites_are_a_column_of_a_folder_that_is_taken_over(made: Path) -> None:
    for flags in ((), ("--rerun",), ("--retry_failed_urls",)):
        assert adopt(made, "--opt_out", "respect", *flags) == 0
        names = pq.read_schema(made / "00000.parquet").names
        assert names[-1] == "opt_out" and "original_opt_out" not in names


@pytest.mark.parametrize("cut", [700, 9_000, 20_001])
def test_a_tar_that_is_cut_off(cut: int, made: Path) -> None:
    path = made / "00001.tar"
    whole = samples_of(path)
    with tarfile.open(path) as tar:
        ends = {info.name.partition(".")[0]: info.offset_data + info.size for info in tar}  # of the last member
    path.write_bytes(path.read_bytes()[:cut])
    assert adopt(made, "--shards", "00001") == 0
    assert numbers(made, "00001")["00001"] == list(range(8, 16))
    after = samples_of(path)
    sound = [key for key, end in ends.items() if end <= cut]
    assert {key: after[key] for key in sound} == {key: whole[key] for key in sound}
    assert records.receipt(made, "00001")["notes"].get("copied", 0) == len(sound) < len(whole)


def test_rows_of_a_torn_shard_come_from_the_tables(made: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Without img2dataset's _tmp nothing says which rows a torn shard has, until the tables are given."""
    shutil.rmtree(made / "_tmp")
    torn = (made / "00002.tar").read_bytes()
    assert adopt(made) == 1
    assert "--input" in json.dumps(records.receipt(made, "00002")["error"])
    assert (made / "00002.tar").read_bytes() == torn
    table = url_table(made.parent / "t.parquet", port)
    flags = ["--input", table, "--number_sample_per_shard", 8, "--retry_failed"]
    assert adopt(made, *flags) == 0
    assert numbers(made)["00002"] == list(range(16, 24))
    there = {json.loads(parts["json"])["uid"]: parts for parts in samples_of(made / "00002.tar").values()}
    real = samples_of(REAL / "00000.tar")  # only to know the form of a json
    assert set(json.loads(next(iter(real.values()))["json"])) >= set(json.loads(next(iter(there.values()))["json"])) - {
        "text"
    }


def test_shards_that_img2dataset_had_not_begun(made: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (*made.glob("00002*"), *made.glob("_tmp/*")):
        path.unlink()
    table = url_table(made.parent / "t.parquet", port)
    for wrong in (["--number_sample_per_shard", 12], ["--number_sample_per_shard", 24]):
        assert adopt(made, "--input", table, *wrong) == 2
        assert "--number_sample_per_shard" in capsys.readouterr().err
    assert adopt(made, "--input", table, "--number_sample_per_shard", 8) == 0
    assert numbers(made)["00002"] == list(range(16, 24))


def test_killed_half_way_and_started_again(made: Path, port: int) -> None:
    """A shard waits for a slow URL while another one is done; nothing of it is asked for again."""
    table = pq.read_table(made / "00001.parquet")
    urls = [url.replace("photo/12", "slow/12") for url in table["url"].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index("url"), "url", pa.array(urls)), made / "00001.parquet")
    command = [sys.executable, ROOT / "00_download.py", "--adopt", made, *FLAGS, "--timeout", "30"]
    with processes.started(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(records.receipts(made)) == 2, "two shards done")
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = asked(port)
    assert adopt(made, "--timeout", "1") == 0
    new = {path for path, count in asked(port).items() if count > before.get(path, 0)}
    assert new <= {f"/photo/{i}" for i in (8, 14)} | {"/slow/12"}
    assert numbers(made)["00001"] == [8, 9, 10, 11, 13, 14, 15]


def test_the_job_script_takes_a_folder_over(made: Path) -> None:
    told = {"ADOPT": str(made), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    command = ["bash", ROOT / "00_download.sh", *FLAGS]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False, cwd=made)
    assert done.returncode == 0, done.stderr
    assert numbers(made)["00002"] == list(range(16, 24))


def loose(made: Path, folder: Path) -> Path:
    """The same folder as img2dataset's layout ``files``."""
    folder.mkdir()
    for path in made.glob("0000[01].tar"):
        (folder / path.stem).mkdir()
        for name, data in contents(path).items():
            (folder / path.stem / name).write_bytes(data)
        for end in (".parquet", "_stats.json"):
            shutil.copy(made / f"{path.stem}{end}", folder)
    return folder


def test_loose_files_and_another_folder(
    made: Path, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = loose(made, tmp_path / "loose")
    (folder / "00000" / "000001.jpg").write_bytes(b"\xff\xd8 cut off")
    assert adopt(folder) == 2
    assert "--output_format files" in capsys.readouterr().err
    whole = (folder / "00000" / "000002.json").read_bytes()
    assert adopt(folder, "--output_format", "files", "--save_additional_columns", '["uid"]') == 0
    assert {path.suffix for path in (folder / "00000").iterdir()} >= {".jpg", ".txt", ".json"}
    assert len(list((folder / "00000").glob("*.txt"))) == 7
    assert (folder / "00000" / "000002.json").read_bytes() == whole
    assert "punsafe" not in rows(folder, "00000")[0]
    # Elsewhere: the folder stays as it is.
    there = {path: path.read_bytes() for path in made.rglob("*.*")}
    assert adopt(made, "-o", tmp_path / "new", "--extract_exif", "False", "--compute_hash", "md5") == 0
    assert {path: path.read_bytes() for path in made.rglob("*.*")} == there
    assert numbers(tmp_path / "new")["00000"] == [0, 1, 2, 3, 5, 6, 7]
    assert "exif" not in rows(tmp_path / "new", "00000")[0]
    fresh = next(row for row in rows(tmp_path / "new", "00000") if row["key"] == "000000")
    assert len(fresh["md5"]) == 32
    assert records.receipt(tmp_path / "new", "00000")["inputs"][0]["path"] == "00000.tar"


def test_hashes_and_rows_without_a_look_into_images(made: Path, tmp_path: Path) -> None:
    """What --compute_hash md5, --extract_exif False and --disable_all_reencoding left, and rows that are lost."""
    path = made / "00000.parquet"
    table = pq.read_table(path).drop_columns(["exif", "sha256"])
    md5 = ["0" * 32 if status == "success" else None for status in table["status"].to_pylist()]
    none = pa.nulls(table.num_rows, pa.int32())
    for name in ("width", "height", "original_width", "original_height"):
        table = table.set_column(table.column_names.index(name), name, none)
    pq.write_table(table.append_column("md5", pa.array(md5)).slice(0, 7), path)
    assert adopt(made, "--shards", "00000") == 0
    found = {row["key"]: row for row in rows(made, "00000")}
    assert len(found) == 7
    assert found["000001"]["md5"] == "0" * 32 if "000001" in found else True
    assert sum(row["md5"] == "0" * 32 for row in found.values()) == records.receipt(made, "00000")["notes"]["copied"]
    assert all(len(row["md5"]) == 32 for row in found.values() if row["status"] == "success")
    assert any("1 rows that img2dataset counted" in line for line in records.receipt(made, "00000")["warnings"])


def test_folders_that_cannot_be_taken_over(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert adopt(tmp_path / "empty") == 2
    assert "no shards such as 00000.tar" in capsys.readouterr().err
    assert adopt(tmp_path / "nowhere") == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert stage.main(["--adopt", "s3://bucket/made", *FLAGS]) == 2
    assert "--adopt s3://…: a URL, but this option needs a path" in capsys.readouterr().err
    (tmp_path / "nested" / "14").mkdir(parents=True)
    (tmp_path / "nested" / "14" / "00000744.tar").touch()
    assert adopt(tmp_path / "nested") == 2
    assert "in the folders below it: give one of them, such as " in capsys.readouterr().err
    assert adopt(made, "--verify_hash", "sha256") == 2
    assert "needs --input" in capsys.readouterr().err
    (made / "00003.tfrecord").touch()
    assert adopt(made) == 2
    assert "tfrecord" in capsys.readouterr().err


def test_images_in_tables(made: Path, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """img2dataset's ``--output_format parquet``: the same samples as in its tars, byte for byte, in another folder."""
    tables, out = tmp_path / "tables", tmp_path / "out"
    tables.mkdir()
    in_tars = {}
    for shard in LOST:
        table, samples = pq.read_table(made / f"{shard}.parquet"), samples_of(made / f"{shard}.tar")
        images = pa.array([samples.get(key, {}).get("jpg") for key in table["key"].to_pylist()], pa.binary())
        pq.write_table(table.append_column("jpg", images), tables / f"{shard}.parquet")
        in_tars[shard] = samples
    before = {path.name: path.read_bytes() for path in tables.iterdir()}
    assert adopt(tables) == 2
    assert "give another folder as --output" in capsys.readouterr().err
    seen = asked(port)
    assert adopt(tables, "--output", str(out)) == 0
    assert sum(asked(port).values()) - sum(seen.values()) <= sum(map(len, LOST.values())), (
        "only lost rows were asked for"
    )
    for shard, samples in in_tars.items():
        found = samples_of(out / f"{shard}.tar")
        assert {key: found[key] for key in samples} == samples
        assert len(found) == len([row for row in rows(out, shard) if row["status"] == "success"]) > len(samples)
        assert "jpg" not in pq.read_schema(out / f"{shard}.parquet").names
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before


@pytest.mark.parametrize("key", ["../../outside", "/etc/passwd", "00001", ""])
def test_a_hostile_table_leads_nowhere(key: str, made: Path) -> None:
    table = pq.read_table(made / "00000.parquet")
    keys = [key, *table["key"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("key"), "key", pa.array(keys)), made / "00000.parquet")
    before = contents(made / "00000.tar")
    assert adopt(made, "--shards", "00000") == 1
    assert contents(made / "00000.tar") == before


# ---- img2dataset's command line


def test_lists_and_hashes_as_img2dataset_spells_them() -> None:
    for text in ('["uid","NSFW x"]', "['uid', 'NSFW']", "[uid,NSFW]", "uid,NSFW"):
        assert [item[:4] for item in listed(text)] == ["uid", "NSFW"]
    assert listed("[]") == []
    assert named_hash('["md5col","md5"]') == named_hash("[md5col,md5]") == named_hash("md5=md5col") == ("md5", "md5col")
    assert named_hash("sha256") == ("sha256", "sha256")
    assert named_hash(None) is None


IMG2DATASET = {
    "image_size": "32", "processes_count": "2", "resize_mode": "keep_ratio", "resize_only_if_bigger": "False",
    "upscale_interpolation": "cubic", "downscale_interpolation": "area", "encode_quality": "90", "encode_format": "jpg",
    "skip_reencode": "True", "output_format": "webdataset", "input_format": "parquet", "url_col": "url",
    "caption_col": "text", "thread_count": "8", "number_sample_per_shard": "8", "extract_exif": "True",
    "save_additional_columns": '["uid"]', "timeout": "10", "enable_wandb": "False", "wandb_project": "mine",
    "oom_shard_count": "5", "compute_hash": "sha256", "distributor": "pyspark", "subjob_size": "1000", "retries": "0",
    "disable_all_reencoding": "False", "min_image_size": "5", "max_image_area": "inf", "max_aspect_ratio": "inf",
    "incremental_mode": "incremental", "max_shard_retry": "1", "user_agent_token": "mine",
    "disallowed_header_directives": '["noai", "noindex"]', "ignore_ssl_certificate": "False",
}  # fmt: skip


@pytest.mark.parametrize("joined", [False, True])
def test_a_command_line_of_img2dataset_runs_as_it_is(
    joined: bool, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option of its ``download``, with both spellings of python-fire; the shards come out as its own do."""
    given = {
        "url_list": str(url_table(tmp_path / "t.parquet", port)),
        "output_folder": str(tmp_path / "out"),
        **IMG2DATASET,
    }
    if not joined:
        del given["processes_count"]  # one process is faster
    words = [f"--{k}={v}" for k, v in given.items()] if joined else [w for k, v in given.items() for w in (f"--{k}", v)]
    if joined:
        assert stage.main([*words, *FLAGS[:2], "--opt_out", "ignore", "--dry_run"]) == 0
        return
    assert stage.main([*words, *FLAGS[:2], *FLAGS[4:]]) == 0
    said = capsys.readouterr().err
    for name in ("distributor", "subjob_size", "wandb_project", "max_shard_retry"):
        assert f"--{name} has no effect here" in said
    assert "enable_wandb" not in said
    real = pq.read_schema(REAL / "00000.parquet")
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {f"0000{i}.tar" for i in range(3)}
    mine = pq.read_schema(tmp_path / "out" / "00000.parquet")
    assert set(mine.names) == set(real.names) - {"punsafe", "face_bboxes"}
    assert all(mine.field(name).type == real.field(name).type for name in mine.names)
    sample = rows(tmp_path / "out", "00000")[1]
    assert min(sample["width"], sample["height"]) == 32


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--incremental_mode", "extend"], ["extend", "--output"]),
        (["--bbox_col", "face_bboxes"], ["--blur_faces recorded", "stage 04"]),
        (["--resize_mode", "keep_ratio"], ["--image_size", "256"]),
        (["--encode_format", "png"], ["--encode_quality", "0 and 9"]),
        (["--input_format", "csv"], ["no table of --input"]),
        (["--output_format", "tfrecord"], ["webdataset or files"]),
        (["--encode", "keep", "--image_size", "9"], ["--encode jpg"]),
        (["--save_additional_columns", '["uid","punsaf"]'], ["no column 'punsaf'", "url, text, uid"]),
        (["--verify_hash", '["sha","crc"]'], ["hashes are sha256"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    flags: list[str], words: list[str], port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = url_table(tmp_path / "t.parquet", port)
    assert stage.main(["--url_list", str(table), "--output_folder", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_image_options_with_a_meaning(port: int, tmp_path: Path) -> None:
    table = url_table(tmp_path / "t.parquet", port)

    def stored(name: str, *flags: str) -> dict[str, dict[str, Any]]:
        folder = tmp_path / name
        assert stage.main(["-i", str(table), "-o", str(folder), *FLAGS, "--caption_col", "text", *flags]) == 0
        return {row["url"]: row for row in rows(folder, "00000000")}, samples_of(folder / "00000000.tar")

    kept, originals = stored("keep", "--disable_all_reencoding", "True", "--image_size", "7")
    good = [url for url, row in kept.items() if row["status"] == "success"]
    area = sorted(kept[url]["width"] * kept[url]["height"] for url in good)[len(good) // 2]
    png, pictures = stored("png", "--encode_format", "png", "--encode_quality", "9", "--max_image_area", str(area))
    failed = {row["error_message"].partition(":")[0] for row in png.values() if row["status"] == "failed_to_resize"}
    assert failed == {"image_too_large"}
    assert all(parts["png"][:4] == b"\x89PNG" for parts in pictures.values())
    same, skipped = stored("skip", "--encode_format", "jpg", "--skip_reencode", "True", "--image_size", "100000",
                           "--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True")  # fmt: skip
    assert all(same[url]["width"] == kept[url]["width"] for url in good)
    assert sum(parts["jpg"] == originals[key].get("jpg") for key, parts in skipped.items()) == sum(
        "jpg" in p for p in originals.values()
    )
    webp, _ = stored("webp", "--encode_format", "webp", "--image_size", "16")
    assert {(row["width"], row["height"]) for row in webp.values() if row["status"] == "success"} == {(16, 16)}
