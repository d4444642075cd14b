"""A stage small enough to be killed, filled up, stalled and raced by the hundred; run as a script.

Each line of a shard is a sample: ``keep``, ``drop``, ``fail``, or what shall go wrong.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from curation.cluster import WORKER_VARIABLE, Allocation
from curation.errors import InfrastructureError, ShardError
from curation.options import RunOptions, parse_options
from curation.run.follow import Follows
from curation.run.inputs import Input
from curation.run.runner import run_stage, stage_main
from curation.run.work import Later, ShardContext, Stage
from curation.shards import Shard, discover


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """A stage for tests."""

    input: str
    """Shards: text files named *.tar."""
    output: Path
    """Where the kept lines go."""
    more: Path | None = None
    """A second folder that is published into."""
    mark: str = "x"
    """An option that changes the output."""
    flavour: str | None = None
    """An option that older versions of the stage did not have: salty, which they wrote, or plain."""
    sample_s: float = 0.0
    """Seconds that each sample takes."""
    open_s: float = 0.0
    """Seconds that the opening takes."""
    hold: str = ""
    """Shards of which no sample but the first is done before ``Place.let_go``."""
    in_flight: int = 1
    """Shards in flight."""
    checkpoint: bool = False
    """Log every sample in the partial log."""
    upstream: str | None = None
    """The stage whose receipts vouch for the input."""
    suffix: str = ".tar"
    """What shards end in."""
    journal: Path | None = None
    """A file that tells what was done: a line for each opening and each sample."""
    as_stage: str = "toy"
    """The stage's name."""


class Toy(Stage[Options]):
    name = "toy"
    opening = "loading the toy model"
    uses_device = True
    later: ClassVar[Mapping[str, Later]] = {"flavour": Later(before="salty", now="plain")}

    def __init__(self, options: Options) -> None:
        super().__init__(options, options.output)
        self.name = options.as_stage
        self.other_outputs = () if options.more is None else (options.more,)
        self.shards_in_flight = options.in_flight
        self._running = 0
        self._device_failed = False
        self._lock = threading.Lock()

    def fingerprint(self) -> dict[str, object]:
        return {"mark": self.options.mark, "flavour": self.options.flavour}

    def inputs(self, shard: Shard) -> list[Input]:
        return [Input(shard.path, self.options.upstream)]

    def open(self, allocation: Allocation) -> None:
        self._write_journal("open")
        time.sleep(self.options.open_s)
        if self.options.mark == "no model":
            raise InfrastructureError("models/absent: there is no such model")

    def close(self) -> None:
        self._write_journal("close")
        if self._device_failed:
            raise RuntimeError("CUDA error: what frees memory fails too")

    def process(self, work: ShardContext) -> None:
        with self._lock:
            self._running += 1
            self._write_journal(f"begin {work.shard.id} running {self._running}")
        try:
            self._process(work)
        finally:
            with self._lock:
                self._running -= 1

    def _process(self, work: ShardContext) -> None:
        kept: list[bytes] = []
        log = work.partial() if self.options.checkpoint else None
        for number, line in enumerate(work.shard.path.read_text().splitlines()):
            key = f"{number:04d}"
            work.sample_in()
            if log is not None and (earlier := log.get(key, line)) is not None:
                kept.append(earlier)
                work.keep()
                work.provenance({"key": key, "mark": self.options.mark})
                continue
            time.sleep(self.options.sample_s)
            if number > 0 and work.shard.id in self.options.hold.split(","):
                self._wait_for_leave(work)
            self._write_journal(f"sample {work.shard.id} {key}")
            if line == "keep" or line[:1].isdigit():  # the toy's own output is good input too
                salt = " salt" if self.options.flavour == "salty" else ""
                kept.append(f"{key} {self.options.mark}{salt}\n".encode())
                if log is not None:
                    log.append([(key, line, kept[-1])])
                work.keep()
                work.provenance({"key": key, "mark": self.options.mark})
            elif line == "drop":
                work.drop(key, "not_wanted")
            elif line == "fail":
                work.fail(key, "broken", "a detail\nwith \x1b[31m colour")
            else:
                self._go_wrong(line, work)
            work.check_stop()
        if kept:
            with work.output(self.output / f"{work.shard.id}.txt") as file:
                for item in kept:
                    file.write(item)
            if self.options.more is not None:
                with work.output(self.options.more / f"{work.shard.id}.more") as file:
                    file.write(b"".join(kept))

    def _wait_for_leave(self, work: ShardContext) -> None:
        assert self.options.journal is not None
        while not self.options.journal.with_name("go").exists():
            time.sleep(0.01)
            work.check_stop()

    def _go_wrong(self, line: str, work: ShardContext) -> None:
        if line.startswith("device"):  # that of every worker, or only of this one
            _, only, said = line.split(":", 2)
            if only and not os.environ.get(WORKER_VARIABLE, "").startswith(f"{only}/"):
                work.keep()
                return
            self._device_failed = True
            raise RuntimeError(said.strip())
        if line == "lose":
            return  # counted as in, and never again
        if line == "shard error":
            raise ShardError(f"{work.shard.path}: is truncated")
        if line == "bug":
            raise KeyError(f"caption \ud800 {work.shard.id}")
        if line == "infrastructure":
            raise InfrastructureError("no endpoint answers")
        if line == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.output / "x"))
        if line == "too little memory":
            limit_memory()
            bytearray(4 << 30)
        if line == "too few threads":
            limit_memory()
            threading.stack_size(1 << 30)
            threading.Thread(target=time.sleep, args=(0,)).start()
        if line == "too few files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3,) * 2)
            _held = [open(os.devnull) for _ in range(16)]  # noqa: SIM115 - none of them is closed
        if line == "too little memory for the sample":
            work.fail("a", "out_of_memory", "decoding it")
        if line == "half":
            with work.output(self.output / f"{work.shard.id}.half") as file:
                file.write(b"half")
                raise ShardError("in the middle of an output")
        if line == "big":
            with work.output(self.output / f"{work.shard.id}.big") as file:
                for _ in range(64):
                    file.write(b"x" * (1 << 20))
            work.keep()
        if line == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if line == "kill once":
            work.keep()
            once = self.output / f"killed-{work.shard.id}"
            if not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def _write_journal(self, line: str) -> None:
        if self.options.journal is not None:
            with open(self.options.journal, "a") as file:
                file.write(f"{os.getpid()} {line}\n")


def limit_memory() -> None:
    """Let this process take no more than 256 MB beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20),) * 2)


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    options = Toy.settled(parse_options(Options, argv))
    follows = Follows(options.upstream, Path(options.input), options.suffix) if options.upstream else None
    shards = follows.discover() if follows and options.follow else discover(options.input, options.suffix)
    return run_stage(Toy(options), options, shards, follows)


if __name__ == "__main__":
    sys.exit(main())
