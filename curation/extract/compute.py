"""Samples through the models: a batch is transferred to the device once for all of them, and halved where memory runs
out; what is computed of a shard is kept in its spool.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from curation.errors import ShardError, Stopped, UsageError
from curation.extract.answers import Answers
from curation.extract.api import Asker, Column, Extractor, Feature, Preparation, dependents, order
from curation.extract.catalogue import Catalogue
from curation.extract.config import ALL, ExtractConfig, check_outputs
from curation.extract.device_jpeg import DeviceDecoder, open_decoder
from curation.extract.feed import ExtractBatch, ExtractLoader, ExtractSample
from curation.extract.outputs import MetadataRow, MetadataTable, Spool
from curation.extract.staging import Stager, without_device
from curation.extract.worker import REPLY_S
from curation.jsonio import dump_json
from curation.libraries import np
from curation.models.batch_size import FittingBatchSize, Shortage, free_memory, shortage_of, use_device
from curation.run import ShardContext

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger("curation")

MOST_AT_ONCE_ON_CPU = 64  # samples: there memory does not run out with an error that could be caught
WAIT_S = 0.5  # how often signals are checked while answers are awaited


@dataclass(frozen=True, slots=True)
class SpooledShard:
    """All samples of a shard, computed and in its spool.

    Attributes:
        spool: Where the batches are.
        batches: How many.
        rows: How many samples.
        missing: How many samples lack each carried field.
        words: Of each column whose texts are counted, how often each word is there.
    """

    spool: Spool
    batches: int
    rows: int
    missing: Counter[str]
    words: Mapping[str, Counter[str]]


class Extraction:
    """The models of a process, loaded, with the loader that prepares samples for them.

    Attributes:
        table: What the files of a shard look like.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        config: ExtractConfig,
        device: str,
        threads: int,
        *,
        made_by: Mapping[str, Any],
        remember_in: Path,
    ) -> None:
        """Load every model and start the loader.

        Args:
            catalogue: Has the configuration's extractors.
            config: What the user asks for.
            device: torch's name of it.
            threads: CPU threads of this process.
            made_by: The stage's name and version, for the files' own metadata.
            remember_in: A folder for batch sizes that were found to fit.

        Raises:
            InfrastructureError: A model cannot be loaded.
            UsageError: A column or feature that is asked for is computed by no model.
        """
        c = self._config = config
        self._closing: list[Any] = []
        try:
            extractors = self._load(catalogue, device, threads)
            columns = {column.name: column for extractor in extractors for column in extractor.columns}
            features = {feature.name: feature for extractor in extractors for feature in extractor.features}
            ordered = order(extractors, c.models)
            asked_columns = _asked(c.postprocess_columns, "postprocess_columns", [*columns])
            asked_features = _asked(c.postprocess_features, "postprocess_features", [*features])
            models = {d: _identity(e) for d, e in zip(c.models, extractors, strict=True)}
            self._askers = [extractor for extractor in extractors if isinstance(extractor, Asker)]
            beside = _counted_beside(columns, asked_columns)
            computed = [columns[name] for name in (*asked_columns, *beside)]
            self._counted = {c.public_name(column.name): at for at, column in enumerate(computed) if column.counted}
            self.table = MetadataTable(
                c.carried_fields,
                {c.public_name(name): columns[name].kind for name in asked_columns},
                {c.public_name(name): features[name].width for name in asked_features},
                c.feature_dtype,
                doubles=c.use_datacomp_keys,
                compress=c.compress,
                metadata={**made_by, "models": models},
            )
            processes = max(1, threads if c.nworkers is None else c.nworkers)
            is_staged = device != "cpu" or c.decode == "gpu"
            self.decoder = _decoder(c, extractors, device)
            self._loader = ExtractLoader(
                distinct(ordered),
                c.batch_size,
                processes,
                catalogue.plugin_file,
                least_slots=3 if is_staged else 2,  # one is computed, one staged, and one filled
                for_device=self.decoder is not None,
            )
            self._closing.insert(0, self._loader)
            self._stager = Stager(self._loader, device, self.decoder) if is_staged else None
            vectors = [features[name] for name in asked_features]
            self._computer = Computer(ordered, self._loader, computed, vectors, c.feature_dtype, device, self._stager)
        except BaseException:
            self.close()
            raise
        self._patience_s = max([REPLY_S, *(extractor.patience_s for extractor in self._askers)])
        at_once = c.batch_size if device != "cpu" else min(c.batch_size, MOST_AT_ONCE_ON_CPU)
        kind_of_device = "\0".join([use_device(device), _text(c.precision), dump_json(models).decode()])
        self._memory = FittingBatchSize(at_once, kind_of_device, remember_in)
        self._models_mark = xxhash.xxh3_64_hexdigest(dump_json([models, beside] if beside else models))

    def _most_awaited(self) -> int:
        """Samples of a shard that are awaited at most: so many that servers have enough to do while a few are slow."""
        most = self._config.batch_size
        return 2 * (most + max(extractor.asks for extractor in self._askers)) if self._askers else most

    def _load(self, catalogue: Catalogue, device: str, threads: int) -> list[Extractor]:
        extractors = []
        for directive in self._config.models:
            extractor = catalogue.make(directive, device, threads)
            self._closing.append(extractor)
            extractors.append(extractor)
        return extractors

    def close(self) -> None:
        """End the loader's processes and let go of the models."""
        while self._closing:
            self._closing.pop(0).close()

    def compute(self, work: ShardContext, samples: Iterable[ExtractSample]) -> SpooledShard:
        """Compute all samples of a shard, but those that an earlier attempt has computed; count each of them.

        Raises:
            ShardError: A model does not give what it promises.
            Stopped: Between two batches; what is computed is kept.
        """
        mark = xxhash.xxh3_64_hexdigest(dump_json([list(work.inputs), self._models_mark]))
        log = work.partial(mark)
        spool, answers = Spool(log, list(self.table.features)), Answers(log)
        awaited = _Awaited(self._most_awaited(), answers)
        batches = rows = recovered = 0
        tally = _Tally()
        decoding: Counter[str] = Counter()
        stage = None if self._stager is None else self._stager.stage
        try:
            with self._loader.batches(samples, spool.has, stage) as take:
                while True:
                    with work.phase("wait"):
                        taken = take()
                    if taken is None:
                        break
                    batch, seconds = taken
                    work.add_seconds("read", batch.seconds_read)
                    work.add_seconds("decode", seconds)
                    batches, rows = batches + 1, rows + len(batch.samples)
                    if batch.done:
                        recovered += len(batch.samples)
                        self._count(work, batch, spool, tally)
                        continue
                    awaited.add(self._begin(work, batch, answers))
                    decoding += _decoding(batch)
                    self._loader.release(batch)
                    for begun in awaited.ready(work):
                        self._finish(work, begun, spool, tally)
                    work.check_stop()
            for begun in awaited.rest(work):  # the next shard is computed meanwhile
                self._finish(work, begun, spool, tally)
        except Stopped:
            for begun in awaited.left(work, self._patience_s):
                self._finish(work, begun, spool, tally)
            raise
        finally:
            answers.close()
        if recovered:
            work.note("recovered", recovered)
        if self.decoder is not None:
            self._note_decoding(work, decoding)
        return SpooledShard(spool, batches, rows, tally.missing, tally.words)

    def _begin(self, work: ShardContext, batch: ExtractBatch, answers: Answers) -> Begun:
        with work.phase("infer"):
            begun = self._computer.begin(batch, self._memory, answers)
        if (limit := self._memory.limit(0)) < self._memory.planned:
            work.note("batch_shrunk_to", limit)
        return begun

    def _note_decoding(self, work: ShardContext, decoding: Counter[str]) -> None:
        assert self.decoder is not None
        by_device = decoding.pop("", 0)
        work.note("decoder", self.decoder.name)
        work.note("decoded_by_device", by_device)
        work.note("decoded_by_cpu", decoding.total())
        if decoding:
            work.note("decoded_by_cpu_for", dict(sorted(decoding.items())))

    def _finish(self, work: ShardContext, begun: Begun, spool: Spool, tally: _Tally) -> None:
        """Keep the values of a batch, and count its samples."""
        batch = begun.batch
        with work.phase("infer"):
            computed = self._computer.finish(begun)
        rows, missing = self._rows(batch, computed)
        named = {self._config.public_name(name): array for name, array in computed.features.items()}
        with work.phase("write"):
            spool.put(batch.number, rows, missing, named)
        self._count(work, batch, spool, tally)

    def _count(self, work: ShardContext, batch: ExtractBatch, spool: Spool, tally: _Tally) -> None:
        """Count every sample of a batch once, also where an earlier attempt computed it."""
        rows, missing = spool.rows(batch.number)
        tally.missing += missing
        for row in rows:
            if row.failed is None:
                work.keep()
            else:
                work.fail(row.key, *row.failed)
        for name, number in self._counted.items():
            texts = [row.values[number] for row in rows if row.values[number] is not None]
            tally.words.setdefault(name, Counter()).update(text.partition(":")[0] for text in texts)

    def adaptations(self) -> dict[str, list[str]]:
        """How model servers are asked that refused the usual request, by name, for receipts."""
        return {name: changes for extractor in self._askers for name, changes in extractor.adaptations().items()}

    def doing(self) -> str:
        """What requests to model servers wait for; empty for nothing."""
        return "; ".join(filter(None, (extractor.doing() for extractor in self._askers)))

    def _rows(self, batch: ExtractBatch, computed: Computed) -> tuple[list[MetadataRow], Counter[str]]:
        """The rows of a batch, and how many of its samples lack each carried field."""
        fields = list(self._config.carried_fields)
        missing: Counter[str] = Counter()
        rows = []
        for number, sample in enumerate(batch.samples):
            uid = sample.metadata.get("uid")
            rows.append(
                MetadataRow(
                    sample.key,
                    uid if isinstance(uid, str) else None,
                    [sample.metadata.get(name) for name in fields],
                    [cells[number] for cells in computed.columns.values()],
                    computed.statuses[number],
                    computed.failed[number],
                )
            )
            missing.update(name for name in {"uid", *fields} if name not in sample.metadata)
        return rows, missing


def _counted_beside(columns: Mapping[str, Column], asked: Sequence[str]) -> list[str]:
    """The columns that are computed only to be counted: without them, a table of nulls would look like a result.

    They are a part of what a shard's checkpoint is of: one that an older version has left lacks them.
    """
    return [name for name, column in columns.items() if column.counted and name not in asked]


@dataclass(frozen=True, slots=True)
class Computed:
    """One value per sample of a batch for each column and feature that was asked for.

    statuses: ``ok``, or why a sample lacks values; failed: the same with a detail, where it counts as failed.
    """

    columns: Mapping[str, list[Any]]
    features: Mapping[str, NDArray[Any]]
    statuses: Sequence[str]
    failed: Sequence[tuple[str, str] | None]


@dataclass(slots=True)
class Begun:
    """A batch that the device has computed.  columns: parts of each column, one behind the other; a part is a list, or
    a Future of one that a worker process computes.  lost: what did not fit on the device alone, by row."""

    batch: ExtractBatch
    columns: dict[str, list[Any]]
    features: dict[str, NDArray[Any]]
    lost: dict[int, tuple[str, str]]

    @property
    def futures(self) -> list[Future[Any]]:
        """Of what worker processes or model servers still work for."""
        return [part for parts in self.columns.values() for part in parts if isinstance(part, Future)]


@dataclass(slots=True)
class _Tally:
    """What is counted of a shard's rows: samples that lack a carried field, and the first words of columns' texts."""

    missing: Counter[str] = field(default_factory=Counter)
    words: dict[str, Counter[str]] = field(default_factory=dict)


class _Awaited:
    """The batches of a shard that the device has computed, and that worker processes or servers still work for.

    They end in any order, so that one slow answer keeps nothing but its own batch waiting.

    Args:
        most: Samples that may be in them before the device computes further ones.
        answers: Of the servers.
    """

    def __init__(self, most: int, answers: Answers) -> None:
        self._most = most
        self._answers = answers
        self._begun: list[Begun] = []

    def add(self, begun: Begun) -> None:
        self._begun.append(begun)

    def ready(self, work: ShardContext) -> Iterator[Begun]:
        """Those that are complete; where there are too many, it waits until some are.  Raises Stopped."""
        while True:
            yield from self._complete()
            if sum(len(begun.batch.samples) for begun in self._begun) <= self._most:
                return
            self._wait(work)
            work.check_stop()

    def rest(self, work: ShardContext) -> Iterator[Begun]:
        """All of them, as they become complete.  Raises Stopped."""
        while self._begun:
            yield from self._complete()
            if self._begun:
                self._wait(work)
                work.check_stop()

    def left(self, work: ShardContext, patience_s: float) -> Iterator[Begun]:
        """Those that become complete after a stop was requested; answers to other requests are recorded.

        patience_s: How long it waits for them.
        """
        self._answers.halt()
        ends = time.monotonic() + patience_s
        while True:
            for begun in self._complete():
                if not any(future.exception() for future in begun.futures):
                    yield begun
            if not (self._begun or self._answers.in_flight) or time.monotonic() > ends:
                return
            work.check_stop(urgent_only=True)
            self._wait(work)

    def _complete(self) -> list[Begun]:
        found = [begun for begun in self._begun if all(future.done() for future in begun.futures)]
        self._begun = [begun for begun in self._begun if begun not in found]
        return found

    def _wait(self, work: ShardContext) -> None:
        """Until something has come, or for ``WAIT_S``."""
        due = [future for begun in self._begun for future in begun.futures if not future.done()]
        with work.phase("wait"):
            if due:
                wait(due, WAIT_S, FIRST_COMPLETED)
            elif self._answers.in_flight:
                time.sleep(WAIT_S / 10)
        self._answers.write()


class Computer:
    """The extractors of a process, in their order, with the feed that prepares for them.

    columns, features: those that are asked for.  device: torch's name.  stager: makes batches ready there ahead.
    """

    def __init__(
        self,
        extractors: Sequence[Extractor],
        feed: ExtractLoader,
        columns: Sequence[Column],
        features: Sequence[Feature],
        feature_dtype: str,
        device: str,
        stager: Stager | None = None,
    ) -> None:
        self._extractors = extractors
        self._stager = stager
        self._feed = feed
        self._columns, self._features = columns, features
        self._feature_dtype = np.dtype(feature_dtype)
        self._device = device
        self._need_image, self._need_text = dependents(extractors, "image"), dependents(extractors, "text")
        if device.startswith("cuda"):
            _pin(feed.shared_memory, device)

    def begin(self, batch: ExtractBatch, memory: FittingBatchSize, answers: Answers) -> Begun:
        """All of a batch but what processes and servers do beside.

        What does not fit on the device alone is ``out_of_memory``.
        """
        count = len(batch.samples)
        columns: dict[str, list[Any]] = {column.name: [] for column in self._columns}
        features = {f.name: np.empty((count, f.width), self._feature_dtype) for f in self._features}
        lost: dict[int, tuple[str, str]] = {}

        def run(start: int, end: int) -> dict[str, Any] | Shortage:
            try:
                return self._run(batch, start, end, answers)
            except Exception as error:  # onnxruntime's are no RuntimeError
                if (shortage := shortage_of(error)) is None:
                    raise
            free_memory(self._device)
            return shortage

        for start, end, outputs in memory.split(count, (0,), run):
            if isinstance(outputs, Shortage):
                lost[start] = "out_of_memory", outputs.text
                outputs = {name: [None] for name in columns} | dict.fromkeys(features, math.nan)
            for name, parts in columns.items():
                parts.append(outputs[name])
            for name, array in features.items():
                array[start:end] = outputs[name]
        return Begun(batch, columns, features, lost)

    def finish(self, begun: Begun) -> Computed:
        """All values of the batch, once the processes have done their part.

        Raises:
            ShardError: A model does not give what it promises.
        """
        columns: dict[str, list[Any]] = {}
        for name, parts in begun.columns.items():
            columns[name] = [cell for part in parts for cell in _resolved(part)]
            if len(columns[name]) != len(begun.batch.samples):
                raise ShardError(f"{name}: {len(columns[name])} values for {len(begun.batch.samples)} samples")
        return self._judge(begun.batch, columns, begun.features, begun.lost)

    def _run(self, batch: ExtractBatch, start: int, end: int, answers: Answers) -> dict[str, Any]:
        """The columns as lists and the features as arrays in memory, of a part of a batch."""
        view = _View(self._feed, batch, start, end, self._device, self._stager)
        outputs: dict[str, Any] = {}
        for extractor in self._extractors:
            if isinstance(extractor, Asker):
                found: Mapping[str, Any] = extractor.ask(view, view.keys, answers)
            else:
                found = extractor.compute(view)
            named: list[Column | Feature] = [*extractor.columns, *extractor.features]
            for output in named:
                value = found.get(output.name)
                is_due = isinstance(value, Future) and isinstance(output, Column)
                if value is None or not (is_due or len(value) == end - start):
                    raise ShardError(f"{extractor.name}: it gives no {output.name!r} for each of {end - start} samples")
                outputs[output.name] = value
            view.features.update({feature.name: found[feature.name] for feature in extractor.features})
        given = {column.name: outputs[column.name] for column in self._columns}
        cells = {name: value if isinstance(value, Future) else _cells(value) for name, value in given.items()}
        features = {feature.name: _array(outputs[feature.name], feature) for feature in self._features}
        if self._device != "cpu":  # nothing reads the shared memory any more, asked for or not
            sys.modules["torch"].get_device_module(self._device).synchronize(self._device)
        return cells | features

    def _judge(
        self,
        batch: ExtractBatch,
        columns: dict[str, list[Any]],
        features: dict[str, NDArray[Any]],
        lost: Mapping[int, tuple[str, str]],
    ) -> Computed:
        """Nothing stays where a sample had nothing to compute it from."""
        statuses: list[str] = []
        failed: list[tuple[str, str] | None] = []
        names = {*columns, *features}
        for row, sample in enumerate(batch.samples):
            outcome = sample.outcome
            empty: set[str] = set()
            problem = outcome.broken or lost.get(row)
            if problem is not None:
                empty = names
            else:
                problem = outcome.unreadable
                empty |= names & self._need_image if problem is not None else set()
                empty |= names & self._need_text if sample.caption is None else set()
            for name in empty:
                if name in columns:
                    columns[name][row] = None
                else:
                    features[name][row] = np.nan
            no_caption = sample.caption is None and bool(self._need_text)
            statuses.append(problem[0] if problem is not None else "no_caption" if no_caption else "ok")
            failed.append(problem)
        return Computed(columns, features, statuses, failed)


class _View:
    """A part of a batch, as extractors see it."""

    def __init__(
        self, feed: ExtractLoader, batch: ExtractBatch, start: int, end: int, device: str, stager: Stager | None
    ) -> None:
        self._feed, self._batch, self._device, self._stager = feed, batch, device, stager
        self._start, self._end = start, end
        self._tensors: dict[Preparation, Any] = {}
        self.features: dict[str, Any] = {}
        self.keys = [sample.key for sample in batch.samples[start:end]]
        outcomes = [sample.outcome for sample in batch.samples[start:end]]
        self.readable = np.array([o.unreadable is None and o.broken is None for o in outcomes], np.bool_)

    def __len__(self) -> int:
        return self._end - self._start

    def prepared(self, preparation: Preparation) -> Any:
        number = self._feed.preparations.index(preparation)
        if self._stager is not None:
            self._stager.bring_back(self._batch, number)
        array = self._feed.array(self._batch, number)
        if array is not None:
            return array[self._start : self._end]
        samples = self._batch.samples[self._start : self._end]
        return [sample.outcome.values.get(number, {}) for sample in samples]

    def device_tensor(self, preparation: Preparation) -> Any:
        if preparation not in self._tensors:
            import torch

            staged = None
            if self._stager is not None:
                staged = self._stager.tensor(self._batch, self._feed.preparations.index(preparation))
            if staged is not None:
                self._tensors[preparation] = staged[self._start : self._end]
            else:
                host = torch.from_numpy(self.prepared(preparation))
                self._tensors[preparation] = host.to(self._device, non_blocking=True)
        return self._tensors[preparation]

    def beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._feed.beside(function, *arguments)


def _identity(extractor: Extractor) -> dict[str, Any]:
    """Which model it is, for the tables and for what depends on it."""
    facts = extractor.facts if isinstance(extractor, Asker) else {}
    return {"name": extractor.name, "revision": extractor.revision, **facts}


def _text(precision: str | dict[str, str]) -> str:
    return precision if isinstance(precision, str) else dump_json(precision).decode()


def _asked(names: Sequence[str], key: str, computed: Sequence[str]) -> list[str]:
    """The columns or features that go into the files.  key: of the configuration, for messages."""
    asked = [*computed] if tuple(names) == ALL else [*names]
    check_outputs(asked, key, computed)
    return asked


def distinct(extractors: Sequence[Extractor]) -> tuple[Preparation, ...]:
    """The preparations of all, equal ones once."""
    return tuple(dict.fromkeys(preparation for extractor in extractors for preparation in extractor.preparations))


def _decoder(config: ExtractConfig, extractors: Sequence[Extractor], device: str) -> DeviceDecoder | None:
    """What decodes JPEGs on the device, where that is asked for and a model wants pictures.

    Raises:
        UsageError: A model prepares its pictures in a way that only the CPU knows.
    """
    pictures = [e for e in extractors if any(p.takes == "image" for p in e.preparations)]
    if config.decode != "gpu" or not pictures:
        return None
    models = zip(config.models, extractors, strict=True)
    only_cpu = [directive for directive, extractor in models if without_device(extractor.preparations)]
    if only_cpu:
        hint = " (--resize fast is the CPU's)" if config.resize == "fast" else ""
        raise UsageError(
            f"--decode gpu: {', '.join(only_cpu)} can prepare pictures on the CPU only{hint}; leave it out, compute it "
            "in another run, or use --decode cpu"
        )
    return open_decoder(device)


def _decoding(batch: ExtractBatch) -> Counter[str]:
    """How many images the device decoded (""), and the CPU for each reason."""
    outcomes = [sample.outcome for sample in batch.samples if sample.outcome.size is not None]
    return Counter("" if o.on_device else o.off_device or "bytes" for o in outcomes)


def _resolved(part: Any) -> list[Any]:
    return _cells(part.result()) if isinstance(part, Future) else part


def _cells(values: Any) -> list[Any]:
    """Plain values, None for NaN and infinity, which JSON has not."""
    if callable(getattr(values, "detach", None)):
        values = values.detach().float().cpu()
    found = values.tolist() if callable(getattr(values, "tolist", None)) else list(values)
    return [None if isinstance(cell, float) and not math.isfinite(cell) else _plain(cell) for cell in found]


def _plain(cell: Any) -> Any:
    if isinstance(cell, np.generic | np.ndarray):
        return cell.tolist()
    return cell


def _array(values: Any, feature: Feature) -> NDArray[Any]:
    if callable(getattr(values, "detach", None)):
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != feature.width:
        raise ShardError(f"feature {feature.name!r}: {array.shape} where rows of {feature.width} are due")
    return array


def _pin(memory: NDArray[np.uint8], device: str) -> None:
    """Have the device read the memory by itself; where that is refused, transfers are slower."""
    import torch

    code = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if code:
        logger.warning(
            f"{device}: CUDA does not lock {memory.nbytes:,} bytes of memory (error {code}); copies are slower"
        )
        with contextlib.suppress(RuntimeError):  # CUDA keeps the error for the next call that looks: this one
            torch.zeros(1, device=device).add_(1)
            torch.cuda.synchronize(device)
