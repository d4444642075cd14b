"""The columns of img2dataset's table beside a shard, through stages 05 and 06."""

from __future__ import annotations

import importlib
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.tar.beside import table_beside, with_columns
from curation.tar.samples import read_samples
from tests.download.img2dataset import REAL
from tests.shards import contents
from tests.stages import recaption_stub
from tests.stages.harness import read_jsonl

pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A real shard of img2dataset, to whose table somebody has added columns."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copy(REAL / "00001.tar", folder)
    table = pq.read_table(REAL / "00001.parquet")
    keys = table["key"].to_pylist()
    added: dict[str, pa.Array] = {
        "aesthetic": pa.array([int(key) / 4 for key in keys]),
        "seen": pa.array([datetime(2026, 1, 1)] * len(keys)),
        "punsafe": pa.array([9.0] * len(keys)),  # the json says otherwise
        "thumbnail": pa.array([b"\xff"] * len(keys)),
    }
    for name, values in added.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, values)
    pq.write_table(table, folder / "00001.parquet")
    return folder


def scored(shards: Path, out: Path, *flags: str) -> list[dict[str, Any]]:
    stage = importlib.import_module("06_metadata")
    words = ["--input", str(shards), "--output", str(out), "--models", "statistics", "--quiet", "--nworkers", "1"]
    assert stage.main([*words, "--additional_fields", "aesthetic,seen,punsafe,uid", "--device", "cpu", *flags]) == 0
    return list(pq.read_table(out / "00001.parquet").to_pylist())


def captioned(shards: Path, out: Path, *flags: str) -> list[dict[str, Any]]:
    words = [str(shards), "-o", str(out), "--device", "cpu", "--batch_size", "4", "--quiet"]
    assert recaption_stub.main([*words, *flags]) == 0
    return read_jsonl(out / "rows" / "00001.jsonl")


def test_columns_of_the_table_reach_stages_05_and_06(shards: Path, tmp_path: Path) -> None:
    of_json = {key[:6]: json.loads(data) for key, data in contents(shards / "00001.tar").items() if "json" in key}
    rows = scored(shards, tmp_path / "scores")
    assert [row["aesthetic"] for row in rows] == [int(row["key"]) / 4 for row in rows]
    assert {row["seen"] for row in rows} == {"2026-01-01T00:00:00"}
    assert all(row["punsafe"] == of_json[row["key"]]["punsafe"] != 9.0 for row in rows)
    captions = captioned(shards, tmp_path / "captions")
    assert [row["extra"]["aesthetic"] for row in captions] == [int(row["key"]) / 4 for row in captions]
    assert all("thumbnail" not in row["extra"] for row in captions)
    # As before, in a folder that ignores the table.
    old = captioned(shards, tmp_path / "old captions", "--table_columns", "ignore")
    assert [row["caption"] for row in old] == [row["caption"] for row in captions]
    assert all("aesthetic" not in row["extra"] for row in old)


def test_a_folder_of_an_older_version_goes_on_without(shards: Path, tmp_path: Path) -> None:
    """Its record does not have the option."""
    out = tmp_path / "out"
    captioned(shards, out, "--table_columns", "ignore")
    [record] = out.glob("_receipts/05_recaption/_epoch.1.json")
    told = json.loads(record.read_bytes())
    del told["options"]["table_columns"]
    record.write_text(json.dumps(told))
    for end in (".tar", ".parquet"):
        shutil.copy(shards / f"00001{end}", shards / f"00002{end}")
    captioned(shards, out)
    rows = read_jsonl(out / "rows" / "00002.jsonl")
    assert rows and all("aesthetic" not in row["extra"] for row in rows)


def test_tables_of_other_kinds_say_nothing(shards: Path, tmp_path: Path) -> None:
    tar, table = shards / "00001.tar", shards / "00001.parquet"
    assert table_beside(tar) == table
    rows = pq.read_table(table)
    pq.write_table(rows.replace_schema_metadata({"curation": "{}"}), table)  # stage 06's own
    assert table_beside(tar) is None
    pq.write_table(rows.drop_columns(["status"]), table)
    assert table_beside(tar) is None
    table.write_bytes(b"PAR1 cut off")
    assert table_beside(tar) is None
    assert [sample.members for sample in with_columns(read_samples(tar), tar, pytest.fail)] == [
        sample.members for sample in read_samples(tar)
    ]


def test_a_sample_without_a_json_has_its_row(shards: Path, tmp_path: Path) -> None:
    from curation.tar.samples import TarWriter

    with open(tmp_path / "00001.tar", "wb") as file:
        tar = TarWriter(file)
        for name, data in contents(shards / "00001.tar").items():
            if not name.endswith("json"):
                tar.add(name, data)
        tar.close()
    shutil.copy(shards / "00001.parquet", tmp_path)
    path = tmp_path / "00001.tar"
    found = list(with_columns(read_samples(path), path, pytest.fail))
    assert all(json.loads(sample.members["json"])["uid"] for sample in found)
