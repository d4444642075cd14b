"""Starting the toy stage in this process or in others, and looking at what it left."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import processes, replaced
from tests.processes import SIGNALS
from tests.run import toy_stage

NO_OUTPUTS = {"_receipts", "_claims", "_plan"}


class Place:
    """Folders of one toy run: ``in`` with shards, ``out``, and ``more`` where it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source, self.out, self.more = root / "in", root / "out", root / "more"
        self.journal = root / "journal"
        self.source.mkdir(parents=True)

    def shard(self, shard_id: str, *lines: str) -> Path:
        path = self.source / f"{shard_id}.tar"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def shards(self, count: int, *lines: str) -> list[str]:
        ids = [f"{number:08d}" for number in range(count)]
        for shard_id in ids:
            self.shard(shard_id, *(lines or ("keep", "drop", "keep")))
        return ids

    def arguments(self, *more: object) -> list[str]:
        fixed = ["--input", self.source, "--output", self.out, "--journal", self.journal, "--lease_s", "1"]
        return replaced(fixed, more)

    def run(self, *more: object) -> int:
        """In this process, whose signal handlers it gives back."""
        handlers = {name: signal.getsignal(name) for name in SIGNALS}
        try:
            return toy_stage.main(self.arguments(*more))
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)

    def start(self, *more: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """In a process of its own."""
        command = [sys.executable, toy_stage.__file__, *self.arguments(*more)]
        return processes.start(command, more=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def wait_for(self, line: str, process: subprocess.Popen[str] | None = None, count: int = 1) -> None:
        """Until the journal has so many such lines."""
        processes.wait_until(lambda: len(self.lines(line)) >= count, f"{line!r} in the journal", while_runs=process)

    def let_go(self) -> None:
        """Those that hold a shard finish it."""
        self.journal.with_name("go").touch()

    def receipt(self, shard_id: str, stage: str = "toy") -> dict[str, Any]:
        (path,) = (self.out / "_receipts" / stage).glob(f"*/{shard_id}.json")
        return dict(json.loads(path.read_bytes()))

    def receipts(self) -> dict[str, dict[str, Any]]:
        return {path.stem: json.loads(path.read_bytes()) for path in self.out.glob("_receipts/toy/*/*.json")}

    def lines(self, pattern: str = "") -> list[str]:
        """The journal's lines with ``pattern``, without the process ids."""
        if not self.journal.exists():
            return []
        lines = [line.partition(" ")[2] for line in self.journal.read_text().splitlines()]
        return [line for line in lines if line.startswith(pattern)]

    def forget_journal(self) -> None:
        self.journal.unlink(missing_ok=True)

    def published(self) -> dict[str, bytes]:
        """Everything but the records of the runs: those that have times in them, and plans."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for folder in (self.out, self.more)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not NO_OUTPUTS & set(path.relative_to(self.root).parts)
        }

    def litter(self) -> list[str]:
        """What may lie about only while somebody works: temporary files, records, claims, heartbeats, checkpoints."""
        return [
            str(path.relative_to(self.root))
            for folder in (self.out, self.more)
            for path in folder.rglob("*")
            if path.is_file() and (path.name.startswith(".") or {"_claims", "_partial"} & set(path.parts))
        ]


def rejects(place: Place, shard_id: str) -> list[dict[str, str]]:
    path = place.out / "_rejects" / "toy" / f"{shard_id}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def drops(place: Place, shard_id: str) -> list[tuple[str, str]]:
    text = gzip.decompress((place.out / "_rejects" / "toy" / f"{shard_id}.drops.tsv.gz").read_bytes()).decode()
    return [(reason, json.loads(key)) for reason, key in (line.split("\t") for line in text.splitlines())]
