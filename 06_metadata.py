#!/usr/bin/env python3
"""Stage 06: scores and features for every sample, in DataComp's metadata format; reads dataset2metadata's YAML."""

import curation  # first: it refuses an old Python, and names packages that are missing

# isort: split

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from curation.backends.extract import families
from curation.cluster import Allocation
from curation.errors import InfrastructureError, UsageError
from curation.extract import (
    FLAGS,
    INTEGER,
    KEYS,
    WANTED,
    Catalogue,
    ExtractConfig,
    Extraction,
    ExtractSample,
    MetadataTable,
    Precision,
    SpooledShard,
    extract_sample,
    import_arrow,
    read_config,
    write_npz,
    write_parquet,
)
from curation.extract.catalogue import here, known_models
from curation.models.listing import asks_for_models, list_models
from curation.models.needs import WeightsNeed
from curation.options import (
    LISTED,
    PATH,
    URLS,
    Sources,
    also,
    at_least,
    exit_code,
    logger,
    parse_options,
    set_up_logging,
)
from curation.run import Later, RunOptions, ShardContext, Stage, run_stage
from curation.run.ledger import recorded_options
from curation.run.workers import is_worker
from curation.shards import Shard, local_folders
from curation.tar.samples import read_samples
from curation.tar.scan import TarReport

MORE_MODELS = "--models also takes clip:, siglip: or openclip: with a hub id or a folder behind it."


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Compute scores and features of the samples of tar shards: a parquet and an npz for each; one process per GPU."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "input": "required",
            "yml": "configuration",
            "postprocess_columns": "column and feature",
            "nworkers": "speed",
            "custom_pypath": "configuration",
            "use_datacomp_keys": "column and feature",
            "weights": "model",
            "feature_dtype": "column and feature",
            "dtype": "speed",
            "warn_and_continue": "ignored",
        }
    )
    example: ClassVar[str] = "--input shards --output metadata --models oai-clip-vit-b32"

    input: Annotated[Sources, also("-i", "--input_tars")] = ()
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands; also
    several.  This and the next two may be in --yml instead."""
    output: Annotated[str | None, also("-o", "--output_metadata_dir"), PATH] = None
    """Folder for the parquets and npzs."""
    models: Annotated[str | None, LISTED, also("--model")] = None
    """Directives (--list_models), separated by commas, such as oai-clip-vit-b32,nsfw-detoxify."""
    list_models: bool = False
    """Print the directives with licence, memory, outputs and whether their weights are on this machine, and end."""
    yml: Annotated[str | None, PATH] = None
    """A file with these flags as its keys, in dataset2metadata's format; a flag overrides its key in the file."""
    postprocess_columns: Annotated[str | None, LISTED] = None
    """Columns of the parquet, separated by commas.  Default: all columns of the models."""
    postprocess_features: Annotated[str | None, LISTED] = None
    """Features for the npz, separated by commas, or all.  Default: none."""
    additional_fields: Annotated[str | None, LISTED] = None
    """Fields of the samples' json to copy, separated by commas; name:type if the values do not show their type."""
    nworkers: int | None = None
    """Processes that prepare samples ahead of the models.  Default: the cores that this process was given."""
    batch_size: int | None = None
    """Samples that are computed together; halved if memory runs out.  Default: 512."""
    device: str | None = None
    """auto: one process for each visible GPU.  cpu, or the number of the GPU for a single process.  Default: auto."""
    custom_pypath: Annotated[str | None, PATH] = None
    """A Python file with extractors of your own.  Its code is executed."""
    reprocess: bool | None = None
    """Repeat shards that were done with other options, like --rerun; with the same options the run continues."""
    use_datacomp_keys: bool | None = None
    """DataComp's names and types: clip_l14_similarity_score, face_bboxes, l14_img and so on."""
    hash_type: Literal["int64", "float64"] | None = None
    """Type of the field hash among --additional_fields.  Default: int64; float64 in an output folder from an older
    version, which loses the last digits of LAION's numbers."""
    weights: Annotated[str | None, URLS] = None
    """Other weights for a directive: directive=path, separated by commas; or a hub id, or a URL with #sha256=."""
    embeddings: Annotated[str | None, URLS] = None
    """Reference embeddings for dedup-isc-ft-v107: a path, or a URL with #sha256=."""
    feature_dtype: Literal["float16", "float32"] | None = None
    """Type of the features in the npz.  Default: float16."""
    compress: bool | None = None
    """Compress the npz (deflate); it becomes only a little smaller, and cannot be memory-mapped."""
    dtype: Precision | None = None
    """Precision of the models' computation.  auto: as upstream, float16 for CLIP on a GPU and float32 for all else.
    half: float16 on a GPU, float32 on the CPU.  A directive's own dtype in --yml goes before it."""
    resize: Literal["exact", "fast"] | None = None
    """exact: the same as OpenAI's preprocessing, to the last bit.  fast: faster, with slightly different results."""
    decode: Literal["cpu", "gpu"] | None = None
    """Where JPEGs are decoded and resized.  gpu: on the device, which takes this work from the cores; the decoder's
    pixels differ a little, and what it cannot read goes to the CPU, counted in the receipts.  Default: cpu."""
    num_gpus: Annotated[int | None, at_least(1)] = None
    """Processes on this machine, one per GPU."""
    gpus: Annotated[str | None, LISTED] = None
    """Only these GPUs of the machine, such as 0,2,3; one process each."""
    warn_and_continue: bool | None = None
    """Accepted and without effect: a bad sample is always a row with its reason."""
    tars_per_wds: int | None = None
    """Accepted and without effect: each shard is processed separately."""
    logging: bool | None = None
    """Accepted with a warning: nothing is sent anywhere."""

    def check(self) -> None:
        super().check()
        if self.follow:
            raise UsageError("--follow: there is no stage before 06_metadata that it could follow")
        import_arrow()

    @property
    def given(self) -> dict[str, Any]:
        """The keys that were given as flags."""
        given = {key: getattr(self, FLAGS.get(key, key)) for key in KEYS} | {"input_tars": self.input or None}
        if self.device is not None and self.device.isdecimal():
            given["device"] = int(self.device)
        return given


class Metadata(Stage[Options]):
    """One shard: shards/<shard>.tar → <shard>.parquet, and <shard>.npz where features are asked for."""

    name = "06_metadata"
    opening = "loading the models"
    uses_device = True
    later: ClassVar[Mapping[str, Later]] = {
        "hash_type": Later(before="float64", now="int64"),
        "decode": Later(before="cpu", now="cpu"),
    }
    shards_in_flight = 2  # the next one is read and prepared ahead while this one is computed and written

    def __init__(self, options: Options, config: ExtractConfig) -> None:
        super().__init__(options, config.output_metadata_dir)
        self.catalogue = Catalogue(families(), config)
        self.config = self.catalogue.config
        self.catalogue.check_outputs_early()
        self._extraction: Extraction | None = None

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        return Catalogue(families(), read_config(options.yml, options.given, folders=False)).weights()

    def fingerprint(self) -> dict[str, object]:
        c = self.config
        names = ("models", "postprocess_columns", "postprocess_features", "batch_size", "use_datacomp_keys")
        more = ("feature_dtype", "compress", "resize", "decode")
        plugin = c.custom_pypath and hashlib.sha256(Path(c.custom_pypath).expanduser().read_bytes()).hexdigest()
        return {
            **{name: getattr(c, name) for name in (*names, *more)},
            "dtype": c.precision,
            "additional_fields": [[name, kind] for name, kind in c.additional_fields.items()],
            "hash_type": self.options.hash_type,
            "weights": self._exact_weights,
            "plugin": plugin,
        }

    @cached_property
    def _exact_weights(self) -> dict[str, list[str]]:
        return self.catalogue.identify(self._remember if self.options.dry_run else None)

    def _remember(self, trouble: InfrastructureError) -> None:
        self.trouble = trouble

    def open(self, allocation: Allocation) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._extraction = Extraction(
            self.catalogue,
            self._typed(self.config),
            self.config.torch_device(allocation),
            allocation.threads,
            made_by={"stage": self.name, "version": self.version},
            remember_in=self.output / "_batch_sizes" / self.name,
        )

    def _typed(self, config: ExtractConfig) -> ExtractConfig:
        """The configuration with the type of the field ``hash``, where it is carried and no type is given."""
        fields = config.additional_fields
        if self.options.hash_type == "float64" or fields.get("hash", "") is not None:
            return config
        return replace(config, additional_fields={**fields, "hash": INTEGER})

    def close(self) -> None:
        if self._extraction is not None:
            self._extraction.close()

    def result(self, counts: Mapping[str, int]) -> str:
        scored = f"{counts['kept']:,} scored"
        device, cpu = counts["decoded_by_device"], counts["decoded_by_cpu"]  # noted with --decode gpu
        return f"{scored}, images decoded by the device {device:,}, by the CPU {cpu:,}" if device or cpu else scored

    def process(self, work: ShardContext) -> None:
        assert self._extraction is not None
        report = TarReport()
        spooled = self._extraction.compute(work, self._samples(work, report))
        for line in report.warnings():
            work.warn(line)
        with work.phase("write"):
            self._write(work, spooled, self._extraction.table)

    def _samples(self, work: ShardContext, report: TarReport) -> Iterator[ExtractSample]:
        """Every sample becomes a row; damage that belongs to no sample is counted alone."""
        for sample in read_samples(work.shard.path, WANTED.__contains__, report):
            work.sample_in()
            if not sample.suffixes and sample.problem is not None:
                work.fail(sample.key, *sample.problem)
            else:
                yield extract_sample(sample)

    def _write(self, work: ShardContext, spooled: SpooledShard, table: MetadataTable) -> None:
        shard = work.shard.id
        with work.output(self.output / f"{shard}.parquet") as file:
            mistyped = write_parquet(file, spooled.spool, spooled.batches, work.shard.path.name, table)
        if table.features:
            with work.output(self.output / f"{shard}.npz") as file:
                write_npz(file, spooled.spool, spooled.batches, spooled.rows, table)
        work.note("rows", spooled.rows)
        for name, counts in (("missing_fields", spooled.missing), ("mistyped_fields", mistyped)):
            found = +counts
            if found:
                work.note(name, dict(sorted(found.items())))


def begins_anew(stage: Metadata, shards: Sequence[Shard]) -> bool:
    """Whether shards were done with other options: what ``reprocess`` is for."""
    ledger = stage.ledger(read_only=True)
    ledger.load_options_versions()
    return not all(ledger.governing(shard.id).same_options(ledger.options, stage.version) for shard in shards)


def refuse_tables_of_the_source(stage: Metadata, shards: Sequence[Shard]) -> None:
    """Refuse to begin beside the source shards where their own tables, as img2dataset and DataComp have, are."""
    if stage.output.resolve() not in local_folders(shards) or (stage.output / "_receipts" / stage.name).exists():
        return
    tables = (stage.output / f"{shard.id}{suffix}" for shard in shards for suffix in (".parquet", ".npz"))
    table = next(filter(Path.exists, tables), None)
    if table is not None:
        raise UsageError(f"{table} belongs to the source shards and would be replaced: use another folder")


def as_begun(config: ExtractConfig, options: Options) -> ExtractConfig:
    """The configuration without the directives' ``dtype: half``, where the folder was begun without any.

    ``half`` is the recommended way, and a file such as examples/datacomp.yml gets it with a new version: a folder goes
    on as it was begun, and new folders have it.  A precision that is named otherwise counts as a changed option.
    """
    if options.rerun or config.reprocess or not config.dtypes or set(config.dtypes.values()) != {"half"}:
        return config
    recorded = recorded_options(Path(config.output_metadata_dir), Metadata.name, options.shards)
    if recorded is None or not isinstance(recorded.get("dtype"), str):
        return config
    logger.info(
        f"dtype: half of {', '.join(config.dtypes)}: {config.output_metadata_dir} was begun without it and goes on so; "
        "new folders and --rerun use it"
    )
    return replace(config, dtypes={})


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    if asks_for_models(argv):
        known = known_models(families())
        print(list_models("06", known, MORE_MODELS, partial(here, families()), "--models NAME"))
        return 0
    options = parse_options(Options, argv)
    options.check()
    set_up_logging(options.quiet)
    config = read_config(options.yml, options.given)
    config = as_begun(config, options)
    options = Metadata.settled(options, config.output_metadata_dir)
    stage = Metadata(options, config)
    shards = config.input_shards(allow_pipe=options.allow_pipe)
    if not is_worker():
        if config.logging:
            logger.warning(
                f"logging: nothing is sent to Weights & Biases; see the receipts and `{curation.PROGRAM} status`"
            )
        by_flag = options.device is not None
        workers = config.processes(options.workers, options.num_gpus, options.gpus, device_is_flag=by_flag)
        rerun = options.rerun or (config.reprocess and begins_anew(stage, shards))
        options = replace(options, workers=workers, rerun=rerun)
    stage.options = options
    refuse_tables_of_the_source(stage, shards)
    return run_stage(stage, options, shards)


if __name__ == "__main__":
    sys.exit(main())
