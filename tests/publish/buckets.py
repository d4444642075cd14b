"""A real S3 server behind a relay that breaks what it is told to, and a stage whose outputs are published there."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from curation.shards import bucket_of
from curation.tar.samples import TarWriter
from tests import ROOT, processes
from tests.publish.servers import S3Server, keep_if_match, serve_s3

stage_04 = importlib.import_module("04_reshard")
NAME = "04_reshard"
PART = 64 << 10
GOOGLE_PART = 256 << 10  # the smallest that Google's client takes
KEYS = 6


class Bucket:
    """The bucket ``out`` of moto's server."""

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self.client, self.relay = server.client, server.relay
        self.objects, self.uploads, self.empty = server.objects, server.uploads, server.empty

    def tars(self) -> dict[str, bytes]:
        return {name: data for name, data in self.objects().items() if name.endswith(".tar")}


@contextmanager
def s3_server(folder: Path) -> Iterator[Bucket]:
    """A real server, as S3 is: it keeps the conditions of all writes."""
    with serve_s3("moto", folder) as server, pytest.MonkeyPatch.context() as patch:
        keep_if_match(patch)
        yield Bucket(server)


def tar_of(keys: list[str], size: int, text: bytes = b"a caption") -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    for key in keys:
        image = b"\xff\xd8\xff" + random.Random(key).randbytes(size)
        for suffix, data in (("jpg", image), ("txt", text), ("json", b"{}")):
            writer.add(f"{key}.{suffix}", data)
    writer.close()
    return file.getvalue()


class Place:
    """Two source shards of about five parts each, an edit for every second sample, and the output folder."""

    def __init__(self, root: Path, ids: tuple[str, ...] = ("00000000", "00000001")) -> None:
        self.root, self.out, self.ids = root, root / "out", ids
        self.source, self.edits = root / "shards", root / "edits"
        self.source.mkdir(parents=True)
        self.edits.mkdir()
        for shard in ids:
            keys = [f"{shard}{number}" for number in range(KEYS)]
            (self.source / f"{shard}.tar").write_bytes(tar_of(keys, 50_000))
            self.edit(shard, b"rewritten")

    def edit(self, shard: str, text: bytes) -> None:
        keys = [f"{shard}{number}" for number in range(0, KEYS, 2)]
        (self.edits / f"{shard}.tar").write_bytes(tar_of(keys, 40_000, text))

    def arguments(self, *more: object, out: object = None) -> list[str]:
        folders = ["--input", self.source, "--edits", self.edits, "--output", out or self.out]
        return [str(word) for word in (*folders, "--quiet", "--lease_s", "1", *more)]

    def run(self, *more: object, out: object = None) -> int:
        """Stage 04 in this process."""
        return int(stage_04.main(self.arguments(*more, out=out)))

    def start(self, *words: object, script: str = "04_reshard.py", **more: Any) -> subprocess.Popen[str]:
        """A program of the project in a process of its own, which can be killed."""
        parts = f"from curation.publish import gcs, s3; s3.PART_BYTES, gcs.PART_BYTES = {PART}, {GOOGLE_PART}; "
        if "STORAGE_EMULATOR_HOST" in os.environ:
            parts += "from google.cloud.storage import blob; blob._MAX_MULTIPART_SIZE = 1000; "
        code = parts + (
            "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
            if script.endswith(".py")
            else "import sys; from curation.__main__ import main; sys.exit(main(sys.argv[2:]))"
        )
        command = [sys.executable, "-c", code, str(ROOT / script), *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more.pop("env", {})}
        return processes.start(command, env=environment, stderr=subprocess.PIPE, **more)

    def receipt(self, shard: str) -> dict[str, Any]:
        text = (self.out / "_receipts" / NAME / bucket_of(shard) / f"{shard}.json").read_text()
        return dict(json.loads(text))

    def proofs(self) -> dict[str, dict[str, Any]]:
        """The receipts of uploads by their file names."""
        found = self.out.glob(f"_published/*/{NAME}/[!_]*/*.json")
        return {path.name: json.loads(path.read_text()) for path in found}


def flags_of_select(folder: Path) -> list[str]:
    """What ``select`` needs to choose 4 of the 9 rows of a table, which is written into the folder."""
    import pyarrow
    import pyarrow.parquet

    rows = {"uid": [f"{number:032x}" for number in range(9)], "score": [number / 10 for number in range(9)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "a.parquet")
    return [str(folder), "--where", "score > 0.45"]


def local_tars(place: Place) -> dict[str, bytes]:
    """The tars that stage 04 has written, under their names in the store."""
    return {f"hybrid/{path.name}": path.read_bytes() for path in sorted(place.out.glob("*.tar"))}
