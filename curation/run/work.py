"""Defines a stage, and the context in which it processes a shard: counts, outputs, checkpoints, times and stopping."""

from __future__ import annotations

import contextlib
import gzip
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Generic

from curation.cluster import Allocation, StopSignal
from curation.errors import InfrastructureError, LostClaim, ShardError, redact
from curation.jsonio import clean_text, dump_json
from curation.models.needs import WeightsNeed
from curation.options import AnyOptions, logger, set_up_logging
from curation.run.checkpoints import PartialLog, Partials
from curation.run.claims import Claim
from curation.run.inputs import Input, source_inputs
from curation.run.ledger import Ledger, recorded_options
from curation.run.records import is_object
from curation.shards import Shard, record_name
from curation.storage.files import AtomicFile, Published
from curation.tar.samples import AUTO, CAPTION, PLAIN, USUAL, Parts, Sample, read_samples
from curation.tar.scan import TarReport

MAX_DETAIL = 500  # characters of a reject's detail


@dataclass(frozen=True, slots=True)
class Later:
    """An option that older versions of a stage did not have.  The field of the option has the default None.

    Attributes:
        before: The value that gives the bytes that older versions wrote.
        now: The value for a new folder, where the user gives none; a function gets the options and returns it.
        kept: Where the user gives none, a folder that records a value keeps it, whoever chose it.  It is for
            options whose value of now changed after versions had recorded another.
    """

    before: Any
    now: Any
    kept: bool = False


# Of stages that read pictures and captions of samples: ``Parts`` of older versions, and of now.
LATER_PARTS: Final = MappingProxyType(
    {"image_member": Later(before=PLAIN, now=AUTO), "caption_field": Later(before=CAPTION, now=AUTO)}
)


class Stage(ABC, Generic[AnyOptions]):
    """One stage of the pipeline: what it reads and writes, and the work on one shard.

    A stage must define ``name``, ``fingerprint`` and ``process``; everything else has a default.

    Attributes:
        name: Used in folder names such as ``_receipts/<name>/``.
        version: Increase it when the same options produce other bytes than before.
        output: The folder below which receipts, rejects, provenance and claims are.
        other_outputs: Further folders into which it publishes.
        shards_in_flight: How many shards one process works on at the same time.
        overlaps_at_ends: The next shard is claimed only once ``ShardContext.ends_soon`` says so, and not from the
            start: a worker holds no shard that another could begin meanwhile.
        kept_by_rerun: A sentence on what ``--rerun`` does not do again, if the stage keeps something.
        later: Options that ``fingerprint`` records and that older versions of the stage did not have.
        gone: Options that older versions recorded and that do not change the output any more.
        opening: What ``open`` does, in words for the log.
        opens_quickly: Whether ``open`` takes seconds at most, so that a dry run can try it.
        uses_device: Whether this process computes on a device, which may fail.  A stage whose models are served by
            other processes does not.
        full: Why no other shard may begin now, such as a local disk that is waiting for uploads; empty where one may.
            It is asked before a shard is claimed, and may raise InfrastructureError.
        stopping: Whether a stop was requested, for an ``open`` that takes long: it may return at once then, because
            no shard follows.
        sample_parts: Which member of a sample is its picture, and what its caption is, as the options say.
        trouble: What a dry run found when it looked for the models, with which the real run would end.
    """

    name: str
    version: int = 1
    output: Path
    other_outputs: tuple[Path, ...] = ()
    shards_in_flight: int = 1
    overlaps_at_ends: bool = False
    kept_by_rerun: str = ""
    opening: str = "getting ready"
    opens_quickly: bool = False
    uses_device: bool = False
    trouble: InfrastructureError | None = None
    sample_parts: Parts = USUAL
    later: ClassVar[Mapping[str, Later]] = MappingProxyType({})
    gone: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: AnyOptions, output: str | Path | None = None) -> None:
        """output: defaults to the option ``output``."""
        self.options = options
        self.output = Path(vars(options)["output"] if output is None else output)
        self.stopping: Callable[[], bool] = lambda: False
        self.full: Callable[[], str] = lambda: ""
        given = vars(options)
        self.sample_parts = Parts(given.get("image_member") or AUTO, given.get("caption_field") or AUTO)

    @abstractmethod
    def fingerprint(self) -> dict[str, object]:
        """The options that change the output, as JSON values."""

    @classmethod
    def settled(cls, options: AnyOptions, output: str | Path | None = None) -> AnyOptions:
        """The options with a value for each of ``later`` that the user left open (None).

        A folder that an older version has begun goes on as it was begun, so that its shards are all made alike; a new
        folder, and ``--rerun``, take the value of now.

        output: the folder of the receipts; defaults to the option ``output``.
        """
        root = Path(vars(options)["output"] if output is None else output)
        recorded = None if options.rerun else recorded_options(root, cls.name, options.shards)
        values, kept = {}, {}
        now = {name: o.now(options) if callable(o.now) else o.now for name, o in cls.later.items()}
        for name, option in cls.later.items():
            if getattr(options, name) is None:
                values[name] = now[name]
                if recorded is not None and (option.kept or name not in recorded):
                    values[name] = recorded.get(name, option.before)
                if values[name] != now[name]:
                    kept[name] = option
        if kept:
            set_up_logging(options.quiet)
        if old := ", ".join(f"--{name} {values[name]}" for name, option in kept.items() if not option.kept):
            new = ", ".join(str(now[name]) for name, option in kept.items() if not option.kept)
            logger.info(f"{old}: an older version has begun {root}; new folders and --rerun use {new}")
        if begun := ", ".join(f"--{name} {values[name]}" for name, option in kept.items() if option.kept):
            new = ", ".join(str(now[name]) for name, option in kept.items() if option.kept)
            logger.info(f"{begun}: {root} was begun so and goes on so; new folders and --rerun use {new}")
        return replace(options, **values)

    def ledger(self, *, read_only: bool = False) -> Ledger:
        """The receipts of this stage.  read_only: nothing is written, and no half-done commit is finished."""
        return Ledger(
            self.output,
            self.name,
            self.version,
            dict(self.fingerprint()),
            kept_by_rerun=self.kept_by_rerun,
            before={name: option.before for name, option in self.later.items()},
            gone=self.gone,
            read_only=read_only,
        )

    @classmethod
    def weights(cls, options: AnyOptions) -> Sequence[WeightsNeed]:
        """The weights that a run with these options loads, so that they can be downloaded before.  Default: none.

        It is called before ``options.check``, and also on machines where the stage's folders do not exist.
        """
        return []

    @classmethod
    def require(cls, options: AnyOptions) -> None:
        """Look whether the packages, programs and packaged files that ``open`` needs are on this machine.

        It loads no model, takes a few seconds at most, and changes nothing.  It is called before ``open``, by a dry run
        in the place of ``open``, and by ``curation run`` for all stages before the first one starts; for that also
        where the stage's folders do not exist.

        Raises:
            InfrastructureError: Something is missing; the message has the command that installs it.
        """

    def inputs(self, shard: Shard) -> list[Input]:
        """The files that the shard is made from.  Default: only the shard itself, as a file made elsewhere."""
        return source_inputs(shard)

    def open(self, allocation: Allocation) -> None:
        """Load models and find servers; called once per process, before the first shard.

        Raises:
            InfrastructureError: Ends the run with exit code 2.
            DeviceError: The device has failed, and this process ends.  With ``uses_device``, what torch or onnxruntime
                raises counts as well where it says so.
        """

    @abstractmethod
    def process(self, work: ShardContext) -> None:
        """Process one shard.

        Raises:
            ShardError: Fails the shard; the run goes on.
            InfrastructureError: Ends the run with exit code 2.
            DeviceError: As for ``open``.  The shard is another worker's then.
            Stopped: From ``work.check_stop``: a signal or the deadline asks to end.
        """

    def doing(self) -> str:
        """What the stage does now apart from working on samples, such as ``waiting for a model server: …``.

        Another thread asks it about once a second, at any time, also while ``open`` runs.

        Returns:
            A few words for the log; empty for nothing.  It is said once for each text before the first colon.
        """
        return ""

    def close(self) -> None:
        """Free resources; called once per process, after the last shard, even if ``open`` was never called."""

    def sums(self, notes: Mapping[str, Any]) -> dict[str, int]:
        """The numbers in a receipt's notes (``ShardContext.note``) that a run adds up over its shards for ``result``.

        Returns:
            Each note that is a whole number.  A stage may add others, under names of their own.
        """
        return {name: value for name, value in notes.items() if type(value) is int}

    def result(self, counts: Mapping[str, int]) -> str:
        """What came of a run, in the stage's own words, for the last line of the run.

        Args:
            counts: The sums over the shards that the run has done: ``in``, ``kept``, ``dropped`` and ``failed``
                samples, and those of ``sums``.  What is not counted is 0.

        Returns:
            A few words such as ``5 replaced, 65 copied``.  Default: the number of samples that were kept.
        """
        return f"{counts['kept']:,} kept"


class ShardContext:
    """One attempt at one shard.  Counts, rejects, provenance and phases are thread-safe.

    For every sample that is counted with ``sample_in``, exactly one of ``keep``, ``drop`` and ``fail`` must be called.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        ledger: Ledger,
        claim: Claim,
        partials: Partials,
        allocation: Allocation,
        stop: StopSignal,
        inputs: tuple[dict[str, Any], ...],
        previous: dict[str, Any] | None,
        sample_parts: Parts,
        on_progress: Callable[[int], None],
        on_warning: Callable[[str], None],
        on_ends_soon: Callable[[], None],
    ) -> None:
        self.shard = shard
        self.root = ledger.root
        self.allocation = allocation
        self.previous = previous  # the shard's last receipt, for a stage that keeps unchanged outputs
        self.inputs = inputs
        self.sample_parts = sample_parts
        self.samples_in = 0
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.notes: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.outputs: list[tuple[AtomicFile, bool]] = []
        self._finals: set[Path] = set()  # the outputs for this receipt
        self._touched: set[Path] = set()  # all outputs that this attempt began
        self._ledger = ledger
        self._claim = claim
        self._partials = partials
        self._stop = stop
        self._on_progress = on_progress
        self._on_warning = on_warning
        self._on_ends_soon = on_ends_soon
        self._lock = threading.Lock()
        self._drops: list[tuple[str, str]] = []
        self._rejects: list[dict[str, Any]] = []
        self._provenance: list[bytes] = []
        self._logs: list[PartialLog] = []

    # ---- every sample exactly once

    def samples(self, suffixes: Collection[str]) -> Iterator[Sample]:
        """Read the samples of the shard's tar, and count each with ``sample_in``.

        The time for reading is added to the phase ``read``.  Other things that are found in the tar become warnings;
        the runner warns about a shard without samples.

        Args:
            suffixes: Which members to read, such as ``("json", "txt")``; others are skipped.

        Raises:
            ShardError: The tar cannot be read to its end.
        """
        report = TarReport()
        samples = read_samples(self.shard.path, suffixes, report, parts=self.sample_parts)
        seconds = 0.0
        try:
            while True:
                began = time.perf_counter()
                sample = next(samples, None)
                seconds += time.perf_counter() - began
                if sample is None:
                    break
                self.sample_in()
                yield sample
        finally:
            self.add_seconds("read", seconds)
        if report.samples:
            for line in report.warnings():
                self.warn(line)

    def sample_in(self, count: int = 1) -> None:
        """Count samples that were read."""
        with self._lock:
            self.samples_in += count

    def keep(self, count: int = 1) -> None:
        """Count samples that go into the output."""
        with self._lock:
            self.kept += count
        self._on_progress(count)

    def drop(self, key: str, reason: str) -> None:
        """Record a routine drop (no face, another language): the key is added to the shard's compressed list."""
        with self._lock:
            self.dropped[reason] += 1
            self._drops.append((reason, key))
        self._on_progress(1)

    def fail(self, key: str, reason: str, detail: str = "") -> None:
        """Record a sample that could not be used: a line in ``_rejects/`` with its reason."""
        line = {"key": key, "reason": reason}
        if detail:
            line["detail"] = clean_text(redact(detail))[:MAX_DETAIL]
        with self._lock:
            self.failed[reason] += 1
            self._rejects.append(line)
        self._on_progress(1)

    def reject(self, key: str, reason: str, **facts: Any) -> None:
        """Record a sample that is left out although nothing is wrong with it: a drop with a line in ``_rejects/``.

        It does not count towards ``--max_error_rate``.

        facts: What is told of it, as JSON values.
        """
        line = {"key": key, "reason": reason, **facts}
        dump_json(line)
        with self._lock:
            self._rejects.append(line)
        self.drop(key, reason)

    def assert_conservation(self) -> None:
        """Raise ShardError unless in = kept + dropped + failed."""
        out = self.kept + self.dropped.total() + self.failed.total()
        if out != self.samples_in:
            raise ShardError(
                f"shard {self.shard.id}: {self.samples_in} samples came in, but {self.kept} kept + "
                f"{self.dropped.total()} dropped + {self.failed.total()} failed = {out} came out; this is a bug"
            )

    # ---- what is written

    @contextlib.contextmanager
    def output(self, path: Path, *, checked: bool = True) -> Iterator[AtomicFile]:
        """Open a binary file that appears under ``path`` when the shard is committed.

        checked: whether readers compare its digest; False for a copy that another stage may replace.
        """
        with self._lock:
            if path in self._finals:
                raise ShardError(f"{path}: the stage writes it twice; this is a bug")
            self._finals.add(path)
            self._touched.add(path)
        try:
            with AtomicFile(path, self._claim.token) as file:
                yield file
        except BaseException:  # an output that an error cut short is discarded and not listed
            with self._lock:
                self._finals.discard(path)
            raise
        with self._lock:
            self.outputs.append((file, checked))

    def provenance(self, record: dict[str, Any]) -> None:
        """Add a line to ``_provenance/<stage>/<shard>.jsonl``."""
        line = dump_json(record)
        with self._lock:
            self._provenance.append(line)

    def note(self, name: str, value: Any) -> None:
        """Add a JSON value to the receipt.  Raises TypeError for anything else."""
        dump_json(value)
        with self._lock:
            self.notes[name] = value

    def warn(self, text: str) -> None:
        """Add a warning to the log and to the receipt."""
        text = clean_text(redact(text))
        with self._lock:
            self.warnings.append(text)
        self._on_warning(f"{self.shard.id}: {text}")

    # ---- time

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of the ``with`` block to the receipt's phase (read, decode, infer, write)."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - began)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add seconds to a phase that was timed elsewhere."""
        with self._lock:
            self.seconds[name] += seconds  # type: ignore[assignment]  # a Counter of floats

    def progress(self, count: int = 0) -> None:
        """Report progress, also before a sample is finished, so that the process does not count as stalled."""
        self._on_progress(count)

    def ends_soon(self) -> None:
        """Let the next shard begin, in a stage that ``overlaps_at_ends``.  It may be called again and again."""
        self._on_ends_soon()

    def check_stop(self, *, urgent_only: bool = False) -> None:
        """Raise Stopped if a signal or the deadline asks to end; call it after each batch saved in the partial log.

        urgent_only: ignore a stop that leaves time to finish, for a shard that takes seconds and has no partial log.
        """
        self._stop.check(urgent_only=urgent_only)

    # ---- checkpoints

    def partial(self, fingerprint: str = "") -> PartialLog:
        """The checkpoint of this shard, which contains the samples that earlier, interrupted attempts finished.

        fingerprint: anything besides the stage's options on which a record depends; short and valid in a file name.
        """
        mark = f"{self._ledger.fingerprint}{'-' + fingerprint if fingerprint else ''}"
        # A fresh listing, because an attempt that was asked to end a moment ago left nothing but its file.  The folder
        # is small: it holds only the checkpoints of shards in progress.
        names = self._partials.names(self.shard.id, fresh=True)
        names += [f"{record_name(self.shard.id)}.{mark}.{token}" for token in self._claim.predecessors]
        log = PartialLog(self._partials.folder(self.shard.id), self.shard.id, mark, self._claim.token, names)
        with self._lock:
            self._logs.append(log)
        if log.recovered:
            self.note("recovered", log.recovered)
        return log

    # ---- for the runner

    def close_outputs(self) -> list[Published]:
        """Write the rejects, drops and provenance, make all outputs durable, and list them for the receipt.

        Lines are sorted, so that their bytes depend neither on the order of threads nor on a resumed attempt.
        """
        self._write_lines("rejects", ".jsonl", [dump_json(line) for line in self._rejects])
        self._write_lines("provenance", ".jsonl", self._provenance)
        if self._drops:
            drops = sorted((reason.encode(), dump_json(key)) for reason, key in self._drops)
            lines = b"".join(reason + b"\t" + key + b"\n" for reason, key in drops)
            with self.output(self._ledger.place("rejects", self.shard.id, ".drops.tsv.gz")) as list_of_drops:
                list_of_drops.write(gzip.compress(lines, mtime=0))
        published = []
        for file, checked in self.outputs:
            file.close()
            published.append(file.published(self._ledger.root, checked=checked))
        return published

    def places(self) -> list[Path]:
        """Every path for which an attempt at this shard may have left a temporary file."""
        own = [self._ledger.place("rejects", self.shard.id, end) for end in (".jsonl", ".drops.tsv.gz")]
        own.append(self._ledger.place("provenance", self.shard.id, ".jsonl"))
        previous = self.previous or {}
        paths = [*(output["path"] for output in previous.get("outputs", [])), *previous.get("superseded", [])]
        return [*{*self._touched, *own, *(self._ledger.root / path for path in paths if not is_object(path))}]

    def discard(self) -> None:
        """Remove every temporary file of this attempt; the partial log is made durable and stays."""
        for file, _ in self.outputs:
            file.discard()
        self.hand_over()

    def hand_over(self) -> None:
        """Give up the temporary files: a commit names them now, so this attempt must not remove them."""
        self.outputs.clear()
        self._finals.clear()

    def close(self) -> None:
        """Write nothing more; the partial log is made durable and stays."""
        for log in self._logs:
            with contextlib.suppress(LostClaim):
                log.flush()
            log.close()

    @property
    def checkpointed(self) -> bool:
        """Whether this attempt has written a partial file."""
        return any(log.name is not None for log in self._logs)

    def finish(self, *, alone: bool = True) -> None:
        """Remove the partial files, which are not needed after the commit.

        alone: no other process is known to have worked on the shard since this one listed its checkpoints.
        """
        own = [log.name for log in self._logs if log.name is not None]
        self.close()
        alone = alone and not self._claim.predecessors and not self._claim.was_released
        self._partials.remove(self.shard.id, own, fresh=not alone)

    def _write_lines(self, kind: str, suffix: str, lines: list[bytes]) -> None:
        if lines:
            with self.output(self._ledger.place(kind, self.shard.id, suffix)) as file:
                for line in sorted(lines):
                    file.write(line + b"\n")
