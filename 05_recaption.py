#!/usr/bin/env python3
"""Stage 05: a new caption for each image of the shards, by a vision-language model."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from curation import backends
from curation.backends.caption.base import captioner_weights
from curation.caption import captioner
from curation.caption.batching import caption_batch
from curation.caption.feed import Batch, CaptionLoader, Picture, beside, recalling, row_of
from curation.caption.preview import first_images, show_trial, write_comparison
from curation.caption.rows import (
    Format,
    finish_parquet,
    import_arrow,
    jsonl_lines,
    parse_formats,
    reusable_captions,
    rows_name,
    write_format,
    write_rows,
)
from curation.cluster import Allocation, workers_for_gpus
from curation.errors import InfrastructureError, UsageError
from curation.generate.batches import seed_of
from curation.hub.background import HubOptions, Pushing
from curation.images import Pixels
from curation.jsonio import dump_json
from curation.models.batch_size import FittingBatchSize
from curation.models.needs import NothingToFetch, WeightsBySource, WeightsNeed
from curation.models.weights import CACHE, fetch_weights
from curation.options import also, exit_code, logger, parse_options
from curation.run import RunOptions, ShardContext, Stage, run_stage
from curation.run.checkpoints import PartialLog
from curation.run.ledger import Ledger
from curation.run.merge import JsonlMerge
from curation.run.workers import is_worker
from curation.serving.pool import endpoint_urls
from curation.shards import Shard, discover, select
from curation.tar.scan import TarReport

JSONL_NAME = "captions.jsonl"
PUSHED = {"jsonl": "rows/*", "parquet": "parquet/*", "files": "files/*", "tar": "shards/*"}
NO_PART_OF_A_CAPTION = ("format", "max_images", "max_watermark")


@dataclass(frozen=True, kw_only=True)
class Options(HubOptions, RunOptions):
    """Write a new caption for each image of tar shards with a vision-language model; one process per GPU."""

    data: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(name="DATA_PATH", metavar="DATA_PATH")] = None
    """Source shards, as --data_path."""
    data_path: Annotated[str | None, also("--data_dir", "--input")] = None
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands."""
    output_dir: Annotated[str, also("-o", "--output", "--checkpoint_dir")] = "recaptions"
    """Folder for the captions."""
    format: str = "jsonl"
    """jsonl, parquet, files, tar, several with commas between them, or all."""
    model: Annotated[str, also("--model_name")] = "florence2-base"
    """A short name (--list_models), a hub id, a local folder, or endpoint:<the server's model>."""
    revision: str | None = None
    """Branch, tag or commit of a hub model.  Default: main, as it is when the run starts."""
    list_models: bool = False
    """Print the models by their short names, with memory and what they suit, and end."""
    detail: Literal["brief", "detailed", "more_detailed"] = "more_detailed"
    """How much the caption says: Florence-2's own tasks, a prompt of that kind for the other families."""
    prompt: str | None = None
    """What the model is asked, instead of --detail's words."""
    prompt_file: str | None = None
    """A file with the prompt."""
    max_tokens: int | None = None
    """Length of a caption in tokens.  Default: the model family's."""
    temperature: float = 0.0
    """0: the likeliest words; above: sampled, with a seed for each key."""
    seed: int = 0
    """Seed of the sampling; each image's is a hash of it and its key."""
    batch_size: Annotated[int | Literal["auto"], also("-b")] = "auto"
    """Images captioned at once; halved where memory runs out.  auto: found by trying on a GPU, else the family's."""
    dataloader_num_workers: int | None = None
    """Threads that decode and prepare images ahead of the model.  Default: the cores that this process was given."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the weights.  auto: bfloat16 on a GPU, float32 on the CPU."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Quantise the weights, where the family allows it."""
    offload: bool = False
    """Keep on the CPU what does not fit on the GPU: for small cards, slower."""
    compile: captioner.Compile = "none"
    """Florence-2 on a GPU: each step as one CUDA graph; or the images' encoder too.  The first batches take minutes."""
    ports: str = "8000"
    """Ports of the vision servers on this machine, with --model endpoint:<the server's model>."""
    endpoints: str | None = None
    """Whole URLs of the vision servers, separated by commas, in place of --ports."""
    endpoints_dir: str | None = None
    """A folder in which vision servers register (serve_endpoints.sh), in place of --ports; they may come and go."""
    timeout: float = 120.0
    """Seconds that a vision server has for one caption."""
    num_gpus: int | None = None
    """Processes on this machine, one per GPU.  Default: every visible GPU; one where srun starts a task per GPU."""
    gpus: str | None = None
    """Only these GPUs of the machine, such as 0,2,3; one process each."""
    resume: bool = False
    """Accepted and without effect: every run goes on where the last one ended."""
    max_images: int | None = None
    """Only so many images, the first ones of the shards in order."""
    smoke: int | None = None
    """A quick trial on so many images, from start to end, into a folder of its own; prints the captions."""
    detect_watermarks: bool = False
    """Score each image by --watermark_model and record the score."""
    watermark_model: str | None = None
    """ONNX classifier (256×256, two classes): a path, or a URL with --watermark_sha256."""
    watermark_sha256: str | None = None
    """sha256 that the classifier's file must have."""
    max_watermark: float | None = None
    """Leave out images whose watermark score is above this; they are listed as dropped.  Default: none is."""
    compare: str | None = None
    """Another run's captions.jsonl: write compare.html with the images and the captions of both, side by side."""

    def check(self) -> None:
        super().check()
        for name in ("max_tokens", "batch_size", "dataloader_num_workers", "num_gpus", "max_images", "smoke"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UsageError(f"--{name} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError("--temperature must not be negative")
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("--prompt and --prompt_file are one too many")
        if self.detect_watermarks != (self.watermark_model is not None):
            raise UsageError("--detect_watermarks and --watermark_model need each other")
        if self.max_watermark is not None and not self.detect_watermarks:
            raise UsageError("--max_watermark needs --detect_watermarks")
        if self.follow:
            raise UsageError("--follow: there is no stage before 05_recaption that it could follow")
        self.check_hub()
        if "parquet" in self.formats:
            import_arrow()

    @property
    def source(self) -> str:
        given = self.data or self.data_path
        if given is None or (self.data and self.data_path):
            raise UsageError("give the source shards once: DATA_PATH or --data_path")
        return given

    @property
    def formats(self) -> tuple[Format, ...]:
        try:
            return parse_formats(self.format)
        except ValueError as error:
            raise UsageError(f"--format {error}") from None


class Recaption(Stage[Options]):
    """One shard: shards/<shard>.tar → rows/<shard>.jsonl and the formats that were asked for.

    limits: of some shards, how many images are read at most; all of them of the others.
    """

    name = "05_recaption"
    kept_by_rerun = "Captions of the same model, prompt and settings are taken over, not made again."

    def __init__(self, options: Options, limits: dict[str, int]) -> None:
        super().__init__(options, options.output_dir)
        self._limits = limits
        self._merge: JsonlMerge | None = None
        self.pushing = Pushing(options, self.output, self.name, [PUSHED[name] for name in options.formats])

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        needs: list[WeightsNeed] = []
        if options.watermark_model is not None:
            needs.append(WeightsBySource("--watermark_model", options.watermark_model, options.watermark_sha256))
        family, source = captioner.resolve(options.model)
        if family == "endpoint":
            return [*needs, NothingToFetch(f"{source}: its server loads it, nothing to fetch")]
        return [*needs, captioner_weights(source, options.revision)]

    @cached_property
    def _prompt(self) -> str | None:
        o = self.options
        if o.prompt_file is None:
            return o.prompt
        try:
            return Path(o.prompt_file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompt_file {o.prompt_file}: cannot be read ({error})") from None

    @cached_property
    def _watermark_file(self) -> Path | None:
        o = self.options
        if o.watermark_model is None:
            return None
        return fetch_weights(o.watermark_model, o.watermark_sha256, CACHE, name="--watermark_model")

    @cached_property
    def _model(self) -> dict[str, str]:
        """The exact model, found without loading it."""
        family, source = captioner.resolve(self.options.model)
        if family == "endpoint":
            return {"model": source, "revision": self.options.revision or "served"}
        from curation.models.hub_cache import TRANSFORMER, resolve

        found = resolve(source, self.options.revision, kind=TRANSFORMER)
        return {"model": found.name, "revision": found.revision}

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        names = ("detail", "max_tokens", "temperature", "seed", "batch_size", "dtype", "quantize", "compile")
        watermarks = hashlib.sha256(self._watermark_file.read_bytes()).hexdigest() if self._watermark_file else None
        model: dict[str, str] = {}
        try:
            model = self._model
        except InfrastructureError as error:
            if not o.dry_run:
                raise
            logger.warning(f"{error}")
        return {
            **model,
            **{name: getattr(o, name) for name in (*names, "max_watermark", "max_images")},
            "prompt": self._prompt,
            "watermarks": watermarks,
            "format": list(o.formats),
        }

    def open(self, allocation: Allocation) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        o = self.options
        family, source = captioner.resolve(o.model)
        self._family = captioner.FAMILIES[family]
        given = os.environ.get("OMP_NUM_THREADS", "")
        self._threads = int(given) if given.isdecimal() and int(given) else allocation.threads
        device = "cpu" if allocation.gpu is None else f"cuda:{allocation.gpu}"
        more: dict[str, Any] = {}
        if family == "endpoint":
            urls = [] if o.endpoints_dir and not o.endpoints else endpoint_urls(o.ports, "localhost", o.endpoints)
            more = {"urls": urls, "folder": o.endpoints_dir and Path(o.endpoints_dir), "timeout_s": o.timeout}
        self.backend: captioner.CaptionBackend = backends.load("caption", family)(
            source,
            revision=o.revision,
            prompt=self._prompt,
            detail=o.detail,
            max_tokens=o.max_tokens or self._family.max_tokens,
            temperature=o.temperature,
            quantize=o.quantize,
            offload=o.offload,
            device=device,
            threads=self._threads,
            dtype=o.dtype,
            compile=o.compile,
            **more,
        )
        score: Callable[[Pixels], float] | None = None
        if self._watermark_file is not None:
            score = backends.load("watermark", "onnx")(self._watermark_file).score
        threads = o.dataloader_num_workers or allocation.threads
        self.feed = CaptionLoader(self.backend, threads, score, o.max_watermark)
        self._on_gpu = allocation.gpu is not None
        self.pushing.begin(allocation)

    def close(self) -> None:
        self.pushing.end()
        if hasattr(self, "feed"):
            self.feed.close()
        if hasattr(self, "backend"):
            self.backend.close()
        self._finish_formats()

    # ---- one shard

    def process(self, work: ShardContext) -> None:
        if "jsonl" in self.options.formats:
            self._merger().grow()
        pictures: list[Picture] = []
        report = TarReport()
        recipe = self._recipe()
        log = work.partial()
        begin = recalling(log, reusable_captions(self.output, work.previous, recipe))
        size = self._batch_size(work.shard)
        memory = FittingBatchSize(size, self._device(), self.output / "_batch_sizes" / self.name)
        limit = self._limits.get(work.shard.id)
        read = self.feed.pictures(work.shard.path, work, report, limit, begin, size)
        with beside(self.feed.batches(read, size, pictures)) as take:
            while True:
                with work.phase("wait"):
                    batch = take()
                if batch is None:
                    break
                self._caption(work, batch, log, memory)
        for line in report.warnings():
            work.warn(line)
        with work.phase("write"):
            self._write(work, pictures)
        self.pushing.saw(len(pictures))
        notes = {"recipe": recipe, "batch_size": size, "device": self.backend.device_kind, "threads": self._threads}
        for name, value in notes.items():
            work.note(name, value)

    def _caption(self, work: ShardContext, batch: Batch, log: PartialLog, memory: FittingBatchSize) -> None:
        """A batch that is not in the log yet is captioned and logged; its pictures are counted."""
        if not batch.done:
            images = [picture.prepared for picture in batch.pictures]
            seeds = [seed_of(self.options.seed, picture.key) for picture in batch.pictures]
            with work.phase("infer"):
                captions = caption_batch(self.backend, memory, images, seeds)
            if (limit := memory.limit(*images[0].shape)) < len(images):
                work.note("batch_shrunk_to", limit)
            pairs = zip(batch.pictures, captions, strict=True)
            log.append((p.key, p.digest, p.outcome(caption, batch.mark)) for p, caption in pairs)
        for picture in batch.pictures:
            picture.cancel()
            if (failed := picture.record.get("failed")) is not None:
                work.fail(picture.key, *failed)
            else:
                work.keep()
        if not batch.done:
            work.check_stop()

    def _write(self, work: ShardContext, pictures: Sequence[Picture]) -> None:
        """The shard's rows, and each format that is a function of them."""
        reused = sum(picture.caption is not None for picture in pictures)
        work.keep(reused)
        if reused:
            work.note("reused", reused)
        model = {"model": self.backend.name, "revision": self.backend.revision}
        rows = [row for picture in pictures if (row := row_of(picture, work.shard.id, model)) is not None]
        with work.output(self.output / rows_name(work.shard.id)) as file:
            write_rows(file, rows)
        for name in self.options.formats:
            write_format(name, self.output, work.shard.path, work.shard.id, rows, work)

    # ---- batches

    def _device(self) -> str:
        b, o = self.backend, self.options
        return "\0".join(map(str, (b.device_kind, b.name, b.revision, o.dtype, o.quantize, o.compile, o.max_tokens)))

    def _batch_size(self, shard: Shard) -> int:
        asked = self.options.batch_size
        if asked != "auto":
            return int(asked)
        if not self._on_gpu:
            return self._family.batch_size
        return self.feed.found_batch_size(self.output / "_batch_sizes" / self.name, self._device(), shard.path)

    def _recipe(self) -> str:
        """What decides a caption: rows with the same one are taken over by a run with other formats."""
        fields = {name: value for name, value in self.fingerprint().items() if name not in NO_PART_OF_A_CAPTION}
        return hashlib.sha256(dump_json([fields, self.backend.name, self.backend.revision])).hexdigest()[:32]

    # ---- what is made of all shards

    def _ledger(self) -> Ledger:
        return Ledger(self.output, self.name, self.version, self.fingerprint(), read_only=True)

    def _merger(self) -> JsonlMerge:
        if self._merge is None:
            self._merge = JsonlMerge(self._ledger(), self.output / JSONL_NAME, rows_name, jsonl_lines)
        return self._merge

    def _finish_formats(self) -> None:
        if "jsonl" in self.options.formats:
            self._merger().finish()
        if "parquet" in self.options.formats:
            finish_parquet(self._ledger())


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    if options.list_models:
        print(captioner.list_models())
        return 0
    options.check()
    compare = None if options.compare is None or options.dry_run else Path(options.compare)
    options = replace(options, data=None, data_path=options.source, compare=None)  # as the workers are told
    shards = select(discover(options.source, allow_pipe=options.allow_pipe), options.shards)
    if options.smoke is not None:
        folder = Path(options.output_dir) / f"_smoke-{options.smoke}"
        options = replace(options, output_dir=str(folder), max_images=options.smoke, rerun=True, push=False)
        options = replace(options, workers=1, num_gpus=1)
    limits: dict[str, int] = {}
    if options.max_images is not None:
        limits = first_images(shards, options.max_images)
        shards = [shard for shard in shards if shard.id in limits]
    if not is_worker():
        options = replace(options, workers=workers_for_gpus(options.workers, options.num_gpus, options.gpus))
    stage = Recaption(options, limits)
    code = run_stage(stage, options, shards)
    if not options.dry_run:
        stage.pushing.finish(code)
    if options.smoke is not None and not options.dry_run:
        show_trial(Path(options.output_dir), list(limits))
    if compare is not None:
        logger.info(f"{write_comparison(Path(options.output_dir), shards, compare)}: captions side by side")
    return code


if __name__ == "__main__":
    sys.exit(main())
