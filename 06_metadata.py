#!/usr/bin/env python3
"""Stage 06: scores and features for every sample, as DataComp has them; dataset2metadata's YAML is read as it is."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash

from curation import backends
from curation.cluster import Allocation, visible_gpus, workers_for_gpus
from curation.errors import InfrastructureError, UsageError
from curation.extract.api import Extractor, order
from curation.extract.compute import Computed, Computer, distinct
from curation.extract.config import (
    ALL,
    KEYS,
    ExtractConfig,
    check_directives,
    check_names_early,
    check_outputs,
    family_of,
    model_settings,
    read_config,
)
from curation.extract.feed import WANTED, ExtractLoader, FeedBatch, FeedSample, feed_sample
from curation.extract.outputs import Row, Spool, Table, import_arrow, write_npz, write_parquet
from curation.extract.plugins import extractors_of, load_plugin, make_extractor
from curation.jsonio import dump_json
from curation.models.batch_size import FittingBatchSize, use_device
from curation.options import at_least, exit_code, logger, parse_options, set_up_logging
from curation.run import RunOptions, ShardContext, Stage, run_stage
from curation.run.ledger import Ledger
from curation.run.workers import is_worker
from curation.shards import Shard, discover
from curation.tar.samples import read_samples
from curation.tar.scan import TarReport

MOST_AT_ONCE_ON_CPU = 64  # samples: there memory does not run out with an error that could be caught


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Compute scores and features of the samples of tar shards: a parquet and an npz for each; one process per GPU."""

    yml: str | None = None
    """A file with the keys below, as dataset2metadata has them; a flag goes before its key in the file."""
    models: str | None = None
    """Directives with commas between them, such as oai-clip-vit-b32,nsfw-detoxify."""
    postprocess_columns: str | None = None
    """Columns of the parquet, with commas.  Default: all that the models give."""
    postprocess_features: str | None = None
    """Features for the npz, with commas, or all.  Default: none."""
    additional_fields: str | None = None
    """Fields of the samples' json to carry over, with commas; name:type where the values do not tell their type."""
    nworkers: int | None = None
    """Processes that prepare samples ahead of the models.  Default: the cores that this process was given."""
    batch_size: int | None = None
    """Samples computed together; halved where memory runs out.  Default: 512."""
    device: str | None = None
    """cpu, or the number of the GPU of a lone process.  Default: a process for each GPU that can be seen."""
    input_tars: str | None = None
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands."""
    output_metadata_dir: str | None = None
    """Folder for the parquets and npzs."""
    custom_pypath: str | None = None
    """A Python file with extractors of your own.  It is run."""
    reprocess: bool | None = None
    """Do shards again that were done with other options, as --rerun; with the same options the work goes on."""
    use_datacomp_keys: bool | None = None
    """DataComp's names and types: clip_l14_similarity_score, face_bboxes, l14_img and so on."""
    tars_per_wds: int | None = None
    """Accepted and without effect: each shard is taken by itself."""
    logging: bool | None = None
    """Accepted with a warning: nothing is sent anywhere."""
    warn_and_continue: bool | None = None
    """Accepted and without effect: a bad sample is always a row with its reason."""
    weights: str | None = None
    """In place of a directive's own weights: directive=path, with commas; or a hub id, or a URL with #sha256=."""
    embeddings: str | None = None
    """Embeddings of the images that dedup-isc-ft-v107 looks for: a path, or a URL with #sha256=."""
    feature_dtype: Literal["float16", "float32"] | None = None
    """Of the npz.  Default: float16."""
    compress: bool | None = None
    """Deflate the npz; it shrinks little, and cannot be mapped into memory then."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None
    """Precision that the models compute in.  auto: float16 on a GPU, float32 on the CPU."""
    resize: Literal["exact", "fast"] | None = None
    """exact: pictures as OpenAI's preprocessing has them, to the last bit.  fast: cheaper, and not quite equal."""
    num_gpus: Annotated[int | None, at_least(1)] = None
    """Processes on this machine, one per GPU."""
    gpus: str | None = None
    """Only these GPUs of the machine, such as 0,2,3; one process each."""

    def check(self) -> None:
        super().check()
        if self.follow:
            raise UsageError("--follow: there is no stage before 06_metadata that it could follow")
        import_arrow()

    @property
    def given(self) -> dict[str, Any]:
        """The keys that were given as flags."""
        given = {name: getattr(self, name) for name in KEYS}
        if self.device is not None and self.device.isdecimal():
            given["device"] = int(self.device)
        return given


class Metadata(Stage[Options]):
    """One shard: shards/<shard>.tar → <shard>.parquet, and <shard>.npz where features are asked for."""

    name = "06_metadata"
    shards_in_flight = 2  # the next one is read and prepared ahead while this one is computed and written

    def __init__(self, options: Options, config: ExtractConfig) -> None:
        super().__init__(options, config.output_metadata_dir)
        self.config = config
        self._plugin: Mapping[str, Any] = {}
        if config.custom_pypath is not None:
            self._plugin = extractors_of(load_plugin(config.custom_pypath), config.custom_pypath)
        check_directives(config, self._plugin)
        if not self._plugin:
            check_names_early(config)
        self._extractors: list[Extractor] = []
        self._closing: list[Any] = []

    def fingerprint(self) -> dict[str, object]:
        c = self.config
        names = ("models", "postprocess_columns", "postprocess_features", "batch_size", "use_datacomp_keys")
        plugin = c.custom_pypath and hashlib.sha256(Path(c.custom_pypath).expanduser().read_bytes()).hexdigest()
        return {
            **{name: getattr(c, name) for name in (*names, "feature_dtype", "compress", "dtype", "resize")},
            "additional_fields": [[name, kind] for name, kind in c.additional_fields.items()],
            "weights": self._weights,
            "plugin": plugin,
        }

    @cached_property
    def _weights(self) -> dict[str, list[str]]:
        """Which exact weights each directive loads, found without loading them."""
        from curation.backends.extract.identity import identify, weight_sources

        found = {}
        for directive in self.config.models:
            family = family_of(directive)
            if directive in self._plugin or family is None:
                continue
            try:
                wanted = weight_sources(family, directive, model_settings(self.config, directive))
                found[directive] = identify(directive, wanted)
            except InfrastructureError as error:
                if not self.options.dry_run:
                    raise
                logger.warning(f"{error}")
        return found

    @property
    def _carried(self) -> dict[str, str | None]:
        """uid and key are the first columns, whether they are asked for or not."""
        return {name: kind for name, kind in self.config.additional_fields.items() if name not in ("uid", "key")}

    # ---- models

    def _device(self, allocation: Allocation) -> str:
        """``device`` counts for a lone process; among several each has its own GPU."""
        if self.config.device == "cpu" or allocation.gpu is None:
            return "cpu"
        lone = allocation.world == 1 and isinstance(self.config.device, int)
        return f"cuda:{self.config.device if lone else allocation.gpu}"

    def open(self, allocation: Allocation) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        c = self.config
        device = self._device(allocation)
        for directive in c.models:
            settings = model_settings(c, directive, device, allocation.threads)
            if directive in self._plugin:
                extractor = make_extractor(self._plugin[directive], directive, settings)
            else:
                extractor = backends.load("extract", str(family_of(directive)))(directive, settings)
            self._closing.append(extractor)
            self._extractors.append(extractor)
        columns = {column.name: column for extractor in self._extractors for column in extractor.columns}
        features = {feature.name: feature for extractor in self._extractors for feature in extractor.features}
        ordered = order(self._extractors)
        asked_columns = [*columns] if c.postprocess_columns == ALL else [*c.postprocess_columns]
        asked_features = [*features] if c.postprocess_features == ALL else [*c.postprocess_features]
        check_outputs(asked_columns, "postprocess_columns", [*columns])
        check_outputs(asked_features, "postprocess_features", [*features])
        models = {d: {"name": e.name, "revision": e.revision} for d, e in zip(c.models, self._extractors, strict=True)}
        self.table = Table(
            self._carried,
            {c.public_name(name): columns[name].kind for name in asked_columns},
            {c.public_name(name): features[name].width for name in asked_features},
            c.feature_dtype,
            doubles=c.use_datacomp_keys,
            compress=c.compress,
            metadata={"stage": self.name, "version": self.version, "models": models},
        )
        plugin = c.custom_pypath and str(Path(c.custom_pypath).expanduser().absolute())
        processes = max(1, allocation.threads if c.nworkers is None else c.nworkers)
        self.feed = ExtractLoader(distinct(ordered), c.batch_size, processes, plugin)
        self._closing.insert(0, self.feed)
        chosen = [columns[name] for name in asked_columns], [features[name] for name in asked_features]
        self.computer = Computer(ordered, self.feed, *chosen, c.feature_dtype, device)
        at_once = c.batch_size if device != "cpu" else min(c.batch_size, MOST_AT_ONCE_ON_CPU)
        kind_of_device = "\0".join([use_device(device), c.dtype, dump_json(models).decode()])
        self._memory = FittingBatchSize(at_once, kind_of_device, self.output / "_batch_sizes" / self.name)
        self._models_mark = xxhash.xxh3_64_hexdigest(dump_json(models))

    def close(self) -> None:
        while self._closing:
            self._closing.pop(0).close()

    # ---- one shard

    def process(self, work: ShardContext) -> None:
        mark = xxhash.xxh3_64_hexdigest(dump_json([list(work.inputs), self._models_mark]))
        spool = Spool(work.partial(mark), list(self.table.features))
        report = TarReport()
        batches = rows = recovered = 0
        missing: Counter[str] = Counter()
        with self.feed.batches(self._samples(work, report), spool.has) as take:
            while True:
                with work.phase("wait"):
                    taken = take()
                if taken is None:
                    break
                batch, seconds = taken
                work.add_seconds("read", batch.seconds_read)
                work.add_seconds("decode", seconds)
                if not batch.done:
                    self._compute(work, batch, spool)
                missing += self._count(work, batch, spool)
                batches, rows = batches + 1, rows + len(batch.samples)
                if batch.done:
                    recovered += len(batch.samples)
                else:
                    work.check_stop()
        if recovered:
            work.note("recovered", recovered)
        for line in report.warnings():
            work.warn(line)
        with work.phase("write"):
            self._write(work, spool, batches, rows, missing)

    def _samples(self, work: ShardContext, report: TarReport) -> Iterator[FeedSample]:
        """Every sample becomes a row; damage that belongs to no sample is counted alone."""
        for sample in read_samples(work.shard.path, WANTED.__contains__, report):
            work.sample_in()
            if not sample.suffixes and sample.problem is not None:
                work.fail(sample.key, *sample.problem)
            else:
                yield feed_sample(sample)

    def _compute(self, work: ShardContext, batch: FeedBatch, spool: Spool) -> None:
        with work.phase("infer"):
            computed = self.computer.compute(batch, self._memory)
        self.feed.release(batch)
        if (limit := self._memory.limit(0)) < self._memory.planned:
            work.note("batch_shrunk_to", limit)
        rows, missing = self._rows(batch, computed)
        named = {self.config.public_name(name): array for name, array in computed.features.items()}
        with work.phase("write"):
            spool.put(batch.number, rows, missing, named)

    def _rows(self, batch: FeedBatch, computed: Computed) -> tuple[list[Row], Counter[str]]:
        fields = list(self._carried)
        missing: Counter[str] = Counter()
        rows = []
        for number, sample in enumerate(batch.samples):
            uid = sample.metadata.get("uid")
            rows.append(
                Row(
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

    def _count(self, work: ShardContext, batch: FeedBatch, spool: Spool) -> Counter[str]:
        """Every sample of a batch once, of an earlier attempt's too."""
        rows, missing = spool.rows(batch.number)
        for row in rows:
            if row.failed is None:
                work.keep()
            else:
                work.fail(row.key, *row.failed)
        return missing

    def _write(self, work: ShardContext, spool: Spool, batches: int, rows: int, missing: Counter[str]) -> None:
        shard = work.shard.id
        with work.output(self.output / f"{shard}.parquet") as file:
            mistyped = write_parquet(file, spool, batches, work.shard.path.name, self.table)
        if self.table.features:
            with work.output(self.output / f"{shard}.npz") as file:
                write_npz(file, spool, batches, rows, self.table)
        work.note("rows", rows)
        for name, counts in (("missing_fields", missing), ("mistyped_fields", mistyped)):
            if counts := +counts:
                work.note(name, dict(sorted(counts.items())))


def _shards(config: ExtractConfig, allow_pipe: bool) -> list[Shard]:
    """Of every entry of ``input_tars``."""
    found: dict[str, Shard] = {}
    for entry in config.input_tars:
        for shard in discover(entry, allow_pipe=allow_pipe):
            if found.setdefault(shard.id, shard).path != shard.path:
                raise UsageError(f"input_tars: two files are shard {shard.id}: {found[shard.id].path} and {shard.path}")
    return sorted(found.values(), key=lambda shard: shard.id)


def _processes(options: Options, config: ExtractConfig) -> int:
    """How many to start here: one for each GPU, unless ``device`` says which."""
    if options.num_gpus is not None or options.gpus is not None or config.device is None:
        return workers_for_gpus(options.workers, options.num_gpus, options.gpus)
    if isinstance(config.device, int) and config.device >= (count := visible_gpus()):
        if count or options.device is not None:
            raise UsageError(f"device {config.device}: {count} GPUs can be seen here; --device cpu does without")
        logger.warning(f"device: {config.device} in {options.yml}, but no GPU can be seen here: on the CPU")
    return options.workers


def _begins_anew(stage: Metadata, shards: Sequence[Shard]) -> bool:
    """Whether shards were done with other options: what ``reprocess`` is for."""
    ledger = Ledger(stage.output, stage.name, stage.version, stage.fingerprint(), read_only=True)
    ledger.load_options_versions()
    return not all(ledger.governing(shard.id).same_options(ledger.options, stage.version) for shard in shards)


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    options.check()
    set_up_logging(options.quiet)
    config = read_config(options.yml, options.given)
    stage = Metadata(options, config)
    shards = _shards(config, options.allow_pipe)
    if not is_worker():
        if config.logging:
            logger.warning(
                "logging: nothing is sent to Weights & Biases; receipts and `python -m curation status` tell"
            )
        options = replace(options, workers=_processes(options, config))
        if config.reprocess and not options.rerun:
            options = replace(options, rerun=_begins_anew(stage, shards))
    stage.options = options
    return run_stage(stage, options, shards)


if __name__ == "__main__":
    sys.exit(main())
