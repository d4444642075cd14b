#!/usr/bin/env python3
"""Stage 06: scores and features for every sample, in DataComp's metadata format; reads dataset2metadata's YAML."""

import curation  # first: it refuses an old Python, and names packages that are missing

# isort: split

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from curation.backends.extract import families
from curation.cluster import Allocation
from curation.errors import InfrastructureError, ShardError, UsageError
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
from curation.extract.judging import NO_ANSWER, NOT_ASKED, columns_of
from curation.jsonio import some
from curation.models.listing import asks_for_models, list_models
from curation.models.needs import WeightsNeed
from curation.options import (
    LISTED,
    PATH,
    URLS,
    Sources,
    also,
    at_least,
    logger,
    parse_options,
    refuse_url,
    set_up_logging,
    with_work_dir,
)
from curation.publish.running import published
from curation.run import Later, RunOptions, ShardContext, Stage, run_stage, stage_main
from curation.run.ledger import recorded_options
from curation.run.work import LATER_PARTS
from curation.run.workers import is_worker
from curation.serving import Waiting
from curation.shards import Shard, folders_of, local_folders
from curation.tar.beside import with_columns
from curation.tar.samples import read_samples
from curation.tar.scan import TarReport

WHY = "not_judged."  # in front of a reason, in the sums of a run
SHARDS_AT_SERVERS = 3  # while a judge's last answers for one arrive, the next one's samples are asked
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
    judge: Annotated[str | None, URLS] = None
    """Settings of a judge, as in --yml: "{model: NAME, endpoints: http://localhost:8000}"."""
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
    table_columns: Literal["read", "ignore"] | None = None
    """read, the default: what a table <shard>.parquet beside a shard says of a sample, and its json does not, counts as
    part of the json.  ignore: as in output folders from versions before 0.6.0."""
    caption_column: Literal["sample", "json"] | None = None
    """The field caption among --additional_fields where the json lacks it.  sample: the sample's caption, as models
    get it.  json: null.  Default: sample; json in an output folder from an older version."""
    hash_type: Literal["int64", "float64"] | None = None
    """Type of the field hash among --additional_fields.  Default: int64; float64 in an output folder from an older
    version, which loses the last digits of LAION's numbers."""
    image_member: str | None = None
    """Which of several pictures of a sample is read: auto (key.jpg, else the first, such as key.0.jpg), plain (key.jpg
    alone), or a name: 0, 0.jpg.  Default: auto; plain in an output folder from an older version."""
    caption_field: str | None = None
    """Field of the json with the caption: auto (caption, or text where that is absent), or a name.  Without it the
    member txt or txt.gz is read.  Default: auto; caption in an output folder from an older version."""
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
        if find_spec("pyarrow") is None:  # to import it takes longer than all else where nothing is to be done
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
        "table_columns": Later(before="ignore", now="read"),
        "caption_column": Later(before="json", now="sample"),
        **LATER_PARTS,
    }
    shards_in_flight = 2  # the next one is read and prepared ahead while this one is computed and written

    def __init__(self, options: Options, config: ExtractConfig) -> None:
        super().__init__(options, config.output_metadata_dir)
        self.catalogue = _catalogue(config)
        self.config = self.catalogue.config
        self.catalogue.check_outputs_early()
        self._extraction: Extraction | None = None
        if self.config.judges:
            self.shards_in_flight = SHARDS_AT_SERVERS

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        config = read_config(options.yml, options.given, folders=False)
        return _catalogue(config).weights()

    @classmethod
    def require(cls, options: Options) -> None:
        catalogue = _catalogue(read_config(options.yml, options.given, folders=False))
        catalogue.require()
        if options.dry_run:
            catalogue.try_judges()

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
            "table_columns": self.options.table_columns,
            "caption_column": self.options.caption_column,
            "weights": self._exact_weights,
            **{name: getattr(self.options, name) for name in LATER_PARTS},
            "plugin": plugin,
            **({"judges": {name: judge.record() for name, judge in c.judges.items()}} if c.judges else {}),
        }

    @cached_property
    def _exact_weights(self) -> dict[str, list[str]]:
        return self.catalogue.identify(self._remember if self.options.dry_run else None)

    def _remember(self, trouble: InfrastructureError) -> None:
        self.trouble = trouble

    def open(self, allocation: Allocation) -> None:
        import_arrow()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.catalogue.waiting = Waiting(self.options.stall_s, self.stopping)
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

    def doing(self) -> str:
        return self._extraction.doing() if self._extraction is not None else ""

    def close(self) -> None:
        if self._extraction is not None:
            self._extraction.close()

    def sums(self, notes: Mapping[str, Any]) -> dict[str, int]:
        found = Counter(super().sums(notes))
        for directive, judge in self.config.judges.items():
            words = notes.get(columns_of(directive, judge.axes)[-1])
            found.update({f"{WHY}{word}": count for word, count in words.items()} if isinstance(words, dict) else {})
        return found

    def result(self, counts: Mapping[str, int]) -> str:
        scored = f"{counts['kept']:,} scored"
        if counts["not_judged"]:
            words = sorted(
                (-count, name.removeprefix(WHY)) for name, count in counts.items() if name.startswith(WHY) and count
            )
            why = ", ".join(f"{-count:,} {word}" for count, word in words[:5])
            scored += f", {counts['not_judged']:,} judgements without all scores{f' ({why})' if why else ''}"
        device, cpu = counts["decoded_by_device"], counts["decoded_by_cpu"]  # noted with --decode gpu
        return f"{scored}, images decoded by the device {device:,}, by the CPU {cpu:,}" if device or cpu else scored

    def process(self, work: ShardContext) -> None:
        assert self._extraction is not None
        report = TarReport()
        spooled = self._extraction.compute(work, self._samples(work, report))
        for line in report.warnings():
            work.warn(line)
        self._check_judges(work, spooled)
        with work.phase("write"):
            self._write(work, spooled, self._extraction.table)

    def _samples(self, work: ShardContext, report: TarReport) -> Iterator[ExtractSample]:
        """Every sample becomes a row; damage that belongs to no sample is counted alone."""
        samples = read_samples(work.shard.path, WANTED.__contains__, report, parts=work.sample_parts)
        if self.options.table_columns == "read":
            samples = with_columns(samples, work.shard.path, work.warn)
        for sample in samples:
            work.sample_in()
            if not sample.suffixes and sample.problem is not None:
                work.fail(sample.key, *sample.problem)
                continue
            found = extract_sample(sample, work.sample_parts)
            if self.options.caption_column == "sample" and found.caption and not found.metadata.get("caption"):
                found.metadata["caption"] = found.caption
            yield found

    def _write(self, work: ShardContext, spooled: SpooledShard, table: MetadataTable) -> None:
        shard, tar = work.shard.id, f"{folders_of(work.shard.id)}{work.shard.path.name}"
        with work.output(self.output / f"{shard}.parquet") as file:
            mistyped = write_parquet(file, spooled.spool, spooled.batches, tar, table)
        if table.features:
            with work.output(self.output / f"{shard}.npz") as file:
                write_npz(file, spooled.spool, spooled.batches, spooled.rows, table)
        lacking = [name for name in self.config.carried_fields if spooled.missing[name] == spooled.rows > 0]
        if lacking:
            work.warn(f"no sample has the field {some(lacking)}: its column is empty")
        work.note("rows", spooled.rows)
        self._note_judges(work, spooled)
        for name, counts in (("missing_fields", spooled.missing), ("mistyped_fields", mistyped)):
            found = +counts
            if found:
                work.note(name, dict(sorted(found.items())))

    def _check_judges(self, work: ShardContext, spooled: SpooledShard) -> None:
        """Raise ShardError where a judge gave no answer for too many samples: a model that takes no pictures, perhaps.

        A score that is missing in an answer, or that is none of the scale, is null and no reason to fail.
        """
        for column, words in spooled.words.items():
            asked = spooled.rows - sum(words[why] for why in NOT_ASKED)
            lost = Counter({why: count for why, count in words.items() if why.startswith(NO_ANSWER)})
            if lost.total() > self.options.max_error_rate * asked:
                spooled.spool.forget(spooled.batches)  # its nulls are no result
                reasons = ", ".join(f"{count:,} {why}" for why, count in lost.most_common(5))
                raise ShardError(
                    f"{column}: {lost.total():,} of {asked:,} samples have no answer of the judge ({reasons}), more "
                    f"than --max_error_rate {self.options.max_error_rate:g}: look whether its model takes pictures and "
                    "answers within max_tokens",
                    "too_many_errors",
                )

    def _note_judges(self, work: ShardContext, spooled: SpooledShard) -> None:
        """Why scores of judges are missing, and how servers were asked that refused the usual request."""
        assert self._extraction is not None
        for column, words in spooled.words.items():
            if words:
                work.note(column, dict(sorted(words.items())))
        if spooled.words:
            work.note("not_judged", sum(words.total() for words in spooled.words.values()))
        adapted = self._extraction.adaptations()
        if adapted:
            work.note("servers_asked_otherwise", adapted)


def _catalogue(config: ExtractConfig) -> Catalogue:
    """The directives.  Only a plugin may name dataset2metadata's parts, whose module needs numpy and Pillow."""
    if config.custom_pypath is None:
        return Catalogue(families(), config)
    from curation.backends.extract.upstream import BuiltIns

    return Catalogue(families(), config, BuiltIns(tuple(config.weights.items())))


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


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    if asks_for_models(argv):
        known = known_models(families())
        print(list_models("06", known, MORE_MODELS, partial(here, families()), "--models NAME"))
        return 0
    options = parse_options(Options, argv)
    options.check()
    set_up_logging(options.quiet)
    config = read_config(options.yml, options.given)
    options = with_work_dir(options, config.output_metadata_dir)
    if options.work_dir is not None:
        config = replace(config, output_metadata_dir=options.work_dir)
    refuse_url("output_metadata_dir", config.output_metadata_dir)
    config = as_begun(config, options)
    if config.device is None and len(config.judges) == len(config.models):
        config = replace(config, device="cpu")  # servers compute, not this process
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
    return published(options, stage, lambda: run_stage(stage, options, shards))


if __name__ == "__main__":
    sys.exit(main())
