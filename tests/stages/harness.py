"""Running a stage on a folder, in this process or in one of its own, and reading what it left."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import processes, replaced

RECORDS = {"_receipts", "_claims", "_plan", "_tables", "_merged", "_batch_sizes", "_opt_out"}  # with times and hosts


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def hashes(folder: Path, records: set[str] = RECORDS) -> dict[str, str]:
    """Path → sha256 of all that a stage has published in a folder, but for the records."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not records & set(path.relative_to(folder).parts)
    }


@dataclass(frozen=True)
class Records:
    """The records that one stage keeps in its output folder."""

    stage: str

    def receipts(self, out: Path) -> dict[str, dict[str, Any]]:
        """Shard → receipt.  Every sample that went in is kept, dropped or failed."""
        found = {path.stem: read_json(path) for path in sorted(out.glob(f"_receipts/{self.stage}/*/[!.]*.json"))}
        for receipt in found.values():
            counts = receipt["counts"]
            ends = counts["kept"] + sum(counts["dropped"].values()) + sum(counts["failed"].values())
            assert receipt["status"] != "done" or counts["in"] == ends, "conservation"
        return found

    def receipt(self, out: Path, shard: str = "00000000") -> dict[str, Any]:
        return self.receipts(out)[shard]

    def reject_lines(self, out: Path, shard: str = "00000000") -> list[dict[str, str]]:
        """Samples that failed, in order: key, reason and perhaps a detail.  Without any there is no file."""
        path = out / "_rejects" / self.stage / f"{shard}.jsonl"
        return read_jsonl(path) if path.exists() else []

    def rejects(self, out: Path, shard: str = "00000000") -> dict[str, str]:
        """Key → the reason why the sample failed."""
        return {line["key"]: line["reason"] for line in self.reject_lines(out, shard)}

    def drops(self, out: Path, shard: str = "00000000") -> dict[str, str]:
        """Key → the reason why the stage left the sample out."""
        text = gzip.decompress((out / "_rejects" / self.stage / f"{shard}.drops.tsv.gz").read_bytes())
        return {json.loads(key): reason.decode() for reason, key in (line.split(b"\t") for line in text.splitlines())}

    def provenance(self, out: Path, shard: str = "00000000") -> dict[str, dict[str, Any]]:
        return {line["key"]: line for line in read_jsonl(out / "_provenance" / self.stage / f"{shard}.jsonl")}


class Run:
    """A stage on the folders below one root.  Each stage's tests say in a subclass which these are."""

    stage = ""
    script: ModuleType
    output = ""  # the folder with the receipts
    first_shard = "00000000"

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.records = Records(self.stage)
        self.out = self.log = ""  # what the last run in this process printed and logged

    def arguments(self) -> list[str]:
        """The flags that each run has."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        return self.root / self.output

    def __call__(self, *more: str) -> int:
        """Run it in this process; gives the exit code."""
        self.capsys.readouterr()
        with ThreadPoolExecutor(1) as thread:  # not pytest's main thread, whose signal handlers stay as they are
            code: int = thread.submit(self.script.main, replaced(self.arguments(), more)).result()
        self.out, self.log = self.capsys.readouterr()
        return code

    def start(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        """Start it as a process of its own, to be killed."""
        command = [sys.executable, f"{self.script.__name__}.py", *replaced(self.arguments(), more)]
        return processes.start(command, stderr=subprocess.PIPE, **options)

    def put(self, path: str, data: bytes | str) -> Path:
        """Write a file below the root."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        return file

    def json(self, path: str) -> dict[str, Any]:
        return read_json(self.root / path)

    def receipt(self, shard: str = "") -> dict[str, Any]:
        return self.records.receipt(self.folder, shard or self.first_shard)

    def rejects(self, shard: str = "") -> dict[str, str]:
        return self.records.rejects(self.folder, shard or self.first_shard)

    def reject_lines(self, shard: str = "") -> list[dict[str, str]]:
        return self.records.reject_lines(self.folder, shard or self.first_shard)

    def drops(self, shard: str = "") -> dict[str, str]:
        return self.records.drops(self.folder, shard or self.first_shard)

    def provenance(self, shard: str = "") -> dict[str, dict[str, Any]]:
        return self.records.provenance(self.folder, shard or self.first_shard)

    def published(self, *folders: str) -> dict[str, bytes]:
        """All that stands in these folders (else in the output) but for the records, which hold times."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for folder in folders or (self.output,)
            for path in sorted((self.root / folder).rglob("*"))
            if path.is_file() and not RECORDS & set(path.relative_to(self.root).parts)
        }
