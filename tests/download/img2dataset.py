"""A folder that img2dataset 1.47 has made, for tests.

``tests/data/img2dataset`` is its real output: 24 rows in three shards.  Every fourth URL answered 404 and every seventh
gave no image; img2dataset was killed (SIGKILL) in the third shard.  It was started with ``--output_format webdataset
--image_size 32 --number_sample_per_shard 8 --caption_col text`` and ``--save_additional_columns
'["uid","punsafe","face_bboxes"]'``.  A test's copy asks the test's own server in the place of the one of then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from tests import ROOT

REAL = ROOT / "tests" / "data" / "img2dataset"
_PORT = 48213


def moved(table: pa.Table, port: int) -> pa.Table:
    """A table whose URLs lead to the test's server; that of row 4 still gives no image."""
    urls = [url.replace(str(_PORT), str(port)).replace("photo/4", "empty/4") for url in table["url"].to_pylist()]
    return table.set_column(table.column_names.index("url"), "url", pa.array(urls))


def copy_of(folder: Path, port: int) -> Path:
    """The folder with URLs of the test's server.  Ports of five digits leave all sizes as they are."""
    assert 10_000 <= port < 100_000
    shutil.copytree(REAL, folder)
    for path in folder.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(f":{_PORT}/".encode(), f":{port}/".encode()))
    for path in folder.glob("*.parquet"):
        if path.stat().st_size:
            pq.write_table(moved(pq.read_table(path), port), path)
    [path] = folder.glob("_tmp/*.feather")
    with pa.ipc.open_file(path) as file:
        table = moved(file.read_all(), port)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return folder


def url_table(path: Path, port: int) -> Path:
    """The table that the folder was made from."""
    rows = [
        {
            "url": f"http://127.0.0.1:{port}/{'empty' if i == 4 else 'photo'}/{i}",
            "text": f"photo {i} é",
            "uid": f"{i:032x}",
        }
        for i in range(24)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
