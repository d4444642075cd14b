#!/usr/bin/env python3
"""Stage 05: a new caption for each image of the shards, by a vision-language model."""

import curation  # noqa: F401 - first: it refuses an old Python, and names packages that are missing

# isort: split

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from curation import backends
from curation.caption import (
    AdoptedCaptions,
    AnswerSchema,
    Attention,
    CaptionChecks,
    CaptionLoader,
    CaptionSample,
    CaptionSettings,
    Compile,
    Detail,
    Family,
    Format,
    Gather,
    Quantize,
    Question,
    ShardCaptioner,
    check_each_caption,
    check_fields,
    finish_parquet,
    first_images,
    import_arrow,
    jsonl_lines,
    known_models,
    named,
    parse_formats,
    read_questions,
    resolve,
    reusable_captions,
    rows_name,
    show_trial,
    write_comparison,
    write_format,
    write_rows,
)
from curation.caption.checks import NAMES as CHECKS
from curation.caption.prompts import REALIGN
from curation.caption.rows import TAR_FOLDER
from curation.check.settings import CheckSettings
from curation.cluster import Allocation, cores, workers_for_gpus
from curation.errors import InfrastructureError, UsageError, require
from curation.generate.batches import seed_of
from curation.images import Pixels
from curation.jsonio import dump_json
from curation.models import hub_cache
from curation.models.listing import asks_for_models, list_models, on_this_machine
from curation.models.needs import WeightsBySource, WeightsNeed
from curation.models.weights import CACHE, fetch_weights
from curation.options import (
    FINITE,
    LISTED,
    PATH,
    URLS,
    Files,
    FolderName,
    Positional,
    Sources,
    also,
    at_least,
    items_in,
    logger,
    more_than,
    parse_options,
    set_up_logging,
)
from curation.publish.background import HubOptions, Pushing
from curation.publish.running import published
from curation.run import RunOptions, ShardContext, Stage, run_stage, stage_main
from curation.run.ledger import Ledger
from curation.run.merge import JsonlMerge
from curation.run.work import LATER_PARTS, Later
from curation.run.workers import is_worker
from curation.serving import OwnServers, ServedOptions, Waiting, read_key
from curation.serving.own import require_own_server
from curation.shards import discover, local_folders, select
from curation.tar.samples import AUTO, Parts

MORE_MODELS = (
    "--model also takes a folder, another hub id of these families, or endpoint:<model> for a model of vision servers."
)
SERVED = "endpoint"  # the family of models that servers load
JSONL_NAME = "captions.jsonl"
PUSHED = {"jsonl": "rows/*", "parquet": "parquet/*", "files": "files/*", "tar": "shards/*"}
TRIES, MAX_REPEATS = 3, 0.2
SHARDS_AT_SERVERS = 3  # while the last answers for one arrive, the next one's images are asked
NO_PART_OF_A_CAPTION = ("format", "max_images", "max_watermark", "gather", "table_columns", "adopt", "checks")


@dataclass(frozen=True, kw_only=True)
class Options(ServedOptions, HubOptions, RunOptions):
    """Write a new caption for each image of tar shards with a vision-language model; one process per GPU."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "output": "output",
            "model": "model",
            "format": "output",
            "detail": "caption",
            "batch_size": "speed",
            "ports": "server",
            "num_gpus": "speed",
            "resume": "output",
            "checks": "check",
            "detect_watermarks": "watermark",
            "compare": "output",
        }
    )
    example: ClassVar[str] = "--input shards --output recaptions"

    input: Annotated[Sources, Positional("DATA_PATH"), also("-i", "--data_path", "--data_dir")]
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands; also
    several."""
    output: Annotated[FolderName, also("-o", "--output_dir", "--checkpoint_dir")] = "recaptions"
    """Folder for the captions."""
    model: Annotated[str, also("--model_name")] = "florence2-base"
    """A short name (--list_models), a hub id, a local folder, or endpoint:<the server's model>.  Gemma's are gated:
    accept their licence on the hub and give a token."""
    revision: str | None = None
    """Branch, tag or commit of a hub model.  Default: main, as it is when the run starts."""
    list_models: bool = False
    """Print the models that have short names, with licence, memory, suitable use and whether they are on this machine,
    and end."""
    format: Annotated[str, LISTED] = "jsonl"
    """jsonl, parquet, files, tar, several separated by commas, or all."""
    image_member: str | None = None
    """Which of several pictures of a sample is read: auto (key.jpg, else the first, such as key.0.jpg), plain (key.jpg
    alone), or a name: 0, 0.jpg.  Default: auto; plain in an output folder from an older version."""
    caption_field: str | None = None
    """Field of the json with the caption: auto (caption, or text where that is absent), or a name.  Without it the
    member txt or txt.gz is read.  Default: auto; caption in an output folder from an older version."""
    detail: Literal[Detail, "realign"] = "more_detailed"
    """Length of the caption: Florence-2's own tasks, or a similar prompt for the other families.  realign: the sample's
    own caption, rewritten so that it agrees with the image; for chat models."""
    prompt: Annotated[str | None, URLS] = None
    """The question to the model, instead of --detail's words.  {caption}, {url} and any other field of the json in
    braces stand for the sample's own; a brace is written twice."""
    prompt_file: Annotated[str | None, PATH] = None
    """A file with the prompt; or a .yaml file with several, by the names of the captions that each image gets."""
    prompt_fields: Literal["filled", "literal"] | None = None
    """filled, the default: names in braces are fields of the sample.  literal: the prompt is sent as it is, with its
    braces, as in output folders from versions before 0.7.0."""
    schema: Annotated[str | None, PATH] = None
    """A file with a JSON schema: model servers answer with an object of it, which becomes columns."""
    schema_caption: str | None = None
    """The property of --schema that is the caption.  Default: caption, or description where there is none."""
    max_tokens: Annotated[int | None, at_least(1)] = None
    """Length of a caption in tokens.  Default: the model family's; a longer reply is requested once more with twice as
    many tokens."""
    max_words: Annotated[int | Literal["auto"] | None, at_least(0)] = None
    """Largest number of words that --detail's prompt asks for.  auto, the default: the number that fits in
    --max_tokens; 0: the prompt gives no limit, as in output folders from versions before 0.3.0."""
    temperature: Annotated[float, at_least(0), FINITE] = 0.0
    """0: the most probable words; above 0: sampling, with a seed for each key."""
    seed: int = 0
    """Seed of the sampling; each image's seed is a hash of this seed and the key."""
    batch_size: Annotated[int | Literal["auto"], also("-b"), at_least(1)] = "auto"
    """Images that are captioned at once; halved if memory runs out.  auto: determined by trials on a GPU, otherwise the
    family's default."""
    table_columns: Literal["read", "ignore"] | None = None
    """read, the default: what a table <shard>.parquet beside a shard says of a sample, and its json does not, counts as
    part of the json.  ignore: as in output folders from versions before 0.6.0."""
    gather: Gather | None = None
    """What waits until a batch of one shape is complete.  images, the default: the images as they are in the shard, so
    that batches of models with many shapes are full; tensors: at most 1 GiB with what the model takes, as in output
    folders from versions before 0.5.0."""
    dataloader_num_workers: Annotated[int | None, at_least(1)] = None
    """Threads that decode and prepare images ahead of the model.  Default: the cores that this process was given."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the weights.  auto: bfloat16 on a GPU, float32 on the CPU."""
    quantize: Quantize | None = None
    """Quantise the weights, if the family allows it."""
    offload: bool = False
    """Keep on the CPU the part of the model that does not fit on the GPU.  For small GPUs; slower."""
    compile: Compile = "none"
    """Florence-2 on a GPU: each step as one CUDA graph; or also the image encoder.  The first batches take minutes."""
    attention: Attention | None = None
    """How attention is computed.  auto, the default: by torch, and for Qwen in one call for all windows of one length;
    sdpa: as transformers calls torch, as in output folders from versions before 0.5.0; flash: by the package
    flash-attn, on a GPU."""
    ports: Annotated[str, LISTED] = "8000"
    """Ports of the vision servers on this machine, with --model endpoint:<the server's model>."""
    endpoints: Annotated[str | None, URLS, LISTED] = None
    """Complete URLs of the vision servers, separated by commas, instead of --ports."""
    endpoints_dir: Annotated[str | None, PATH] = None
    """A folder in which vision servers register (serve_endpoints.sh), instead of --ports; servers may start and stop
    during the run."""
    timeout: float = 120.0
    """Seconds to wait for one caption from a vision server."""
    load_timeout: Annotated[float, more_than(0)] = 300.0
    """Seconds for a vision server to load the model, at the start and whenever it has to load it again."""
    api_key_env: str | None = None
    """The environment variable with the vision servers' key.  Default: CURATION_API_KEY; servers of --endpoints_dir get
    a key only if you give this flag."""
    num_gpus: Annotated[int | None, at_least(1)] = None
    """Processes on this machine, one per GPU.  Default: every visible GPU; one if srun starts a task per GPU."""
    gpus: Annotated[str | None, LISTED] = None
    """Only these GPUs of the machine, such as 0,2,3; one process each."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the visible GPUs, of NVIDIA, AMD or Intel.  cpu: compute on the CPU, even if there are GPUs."""
    adopt: Files = ()
    """Captions that another tool has made, as done work: jsonl or parquet files of datacomp-caption, ContraStyles or
    this stage, folders of them, or globs.  Only images without one are captioned."""
    resume: bool = False
    """Accepted and without effect: every run continues where the last one ended."""
    max_images: Annotated[int | None, at_least(1)] = None
    """Only this number of images, from the start, in the shards' order."""
    smoke: Annotated[int | None, at_least(1)] = None
    """A quick, complete trial with this number of images, written to a separate folder; prints the captions."""
    checks: Annotated[str | None, LISTED, also("--check")] = None
    """What each caption is checked for: caption (whether it fits its picture, by --check_model), repeats (whether it
    repeats itself), or both with a comma between them.  Default: nothing."""
    check_model: Annotated[str | None, URLS] = None
    """The CLIP or SigLIP model of --check caption, as stage 06 names it.  Default: oai-clip-vit-l14."""
    min_caption_score: Annotated[float | None, FINITE] = None
    """The lowest cosine of picture and caption that passes --check caption.  Default: the model's own, where one is
    known."""
    max_repeats: Annotated[float | None, at_least(0), FINITE] = None
    """The largest share of a caption's runs of four words that may have been in it before, for --check repeats.
    Default: 0.2."""
    tries: Annotated[int | None, at_least(1)] = None
    """With --check, how many captions of an image are made at most, each from another seed.  Default: 3."""
    detect_watermarks: bool = False
    """Score each image with --watermark_model and record the score."""
    watermark_model: Annotated[str | None, URLS] = None
    """ONNX classifier (256×256, two classes): a path, or a URL with --watermark_sha256."""
    watermark_sha256: str | None = None
    """sha256 that the classifier's file must have."""
    max_watermark: float | None = None
    """Leave out images whose watermark score is above this; they are listed as dropped.  Default: no image is left
    out."""
    compare: Annotated[str | None, PATH] = None
    """Another run's captions.jsonl: write compare.html with the images and the captions of both, side by side."""

    def check(self) -> None:
        _ = self.captioner
        super().check()
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("give only one of --prompt and --prompt_file")
        self.check_schema()
        self.check_checks()
        if self.detect_watermarks != (self.watermark_model is not None):
            raise UsageError("--detect_watermarks and --watermark_model need each other")
        if self.max_watermark is not None and not self.detect_watermarks:
            raise UsageError("--max_watermark needs --detect_watermarks")
        if self.adopt and self.detect_watermarks:
            raise UsageError("--adopt: captions of another tool have no watermark score: leave out --detect_watermarks")
        if self.follow:
            raise UsageError("--follow: there is no stage before 05_recaption that it could follow")
        read_key(self.api_key_env, registered=self.endpoints_dir is not None)
        self.check_served(named=self.endpoints is not None or self.endpoints_dir is not None)
        self.check_hub()
        if "parquet" in self.formats and find_spec("pyarrow") is None:  # to import it takes long
            import_arrow()
        if self.compare is not None:
            require("jinja2")

    def check_schema(self) -> None:
        if self.schema_caption is not None and self.schema is None:
            raise UsageError("--schema_caption needs --schema")
        if self.schema is None:
            return
        if not self.captioner[0].served:
            raise UsageError(
                "--schema: only model servers decode by a schema: give --model endpoint:<the server's model>, or "
                "--served vllm or llama"
            )
        if self.adopt:
            raise UsageError("--adopt: captions of another tool are no answers of --schema: leave one of them out")
        AnswerSchema.read(self.schema, self.schema_caption)

    def check_checks(self) -> None:
        names = self.check_names
        for flag, given, of in (
            ("min_caption_score", self.min_caption_score is not None, "caption"),
            ("check_model", self.check_model is not None, "caption"),
            ("max_repeats", self.max_repeats is not None, "repeats"),
        ):
            if given and of not in names:
                raise UsageError(f"--{flag} needs --check {of}")
        if self.tries is not None and not names:
            raise UsageError("--tries needs --check")

    @property
    def check_names(self) -> tuple[str, ...]:
        """The names in --check, in their fixed order."""
        words = {*items_in(self.checks or "")}
        unknown = sorted(words - {*CHECKS})
        if unknown:
            raise UsageError(f"--check {unknown[0]}: checks of captions are {', '.join(CHECKS)}")
        return tuple(name for name in CHECKS if name in words)

    @property
    def formats(self) -> tuple[Format, ...]:
        try:
            return parse_formats(self.format)
        except ValueError as error:
            raise UsageError(f"--format {error}") from None

    @property
    def captioner(self) -> tuple[Family, str]:
        """The family of --model, and its hub id, folder, or name on the model servers."""
        families = backends.families("caption")
        if self.served is None:
            return resolve(self.model, families, self.revision)
        if self.model.startswith(f"{SERVED}:"):
            raise UsageError(f"--served starts the model's servers: name the model itself, without {SERVED}:")
        source = named(self.model, families)[0] if self.served == "vllm" else str(Path(self.model).expanduser())
        if self.served == "vllm" and "florence-2" in source.lower():
            raise UsageError(
                "--served vllm: vLLM does not know Florence-2; leave --served out, or name another --model"
            )
        return families[SERVED], source

    def of_the_run(self) -> "Options":
        """The same options as the workers get them: a trial is a run into a folder of its own, and there is a process
        for each GPU."""
        run = replace(self, compare=None)
        if self.smoke is not None:
            folder = str(Path(self.output) / f"_smoke-{self.smoke}")
            run = replace(run, output=folder, max_images=self.smoke, rerun=True, push=False, workers=1, num_gpus=None)
            run = replace(run, publish_to=None, work_dir=None, keep_local=None, local_budget=None)
        if is_worker() or self.smoke is not None:
            return run
        device = "cpu" if self.captioner[0].served else run.device
        return replace(run, workers=workers_for_gpus(run.workers, run.num_gpus, run.gpus, device=device))


def check_settings(options: Options) -> CheckSettings:
    """What --check caption is constructed with, apart from where it computes."""
    usual = CheckSettings()
    model = options.check_model or usual.prompt_model
    return replace(usual, prompt_model=model, min_prompt_score=options.min_caption_score, cache=CACHE)


class Recaption(Stage[Options]):
    """One shard: shards/<shard>.tar → rows/<shard>.jsonl and the formats that were asked for."""

    name = "05_recaption"
    opening = "loading the captioning model"
    later: ClassVar[Mapping[str, Later]] = {
        "max_words": Later(before=0, now="auto"),
        "attention": Later(before="sdpa", now="auto"),
        "gather": Later(before="tensors", now="images"),
        "table_columns": Later(before="ignore", now="read"),
        "prompt_fields": Later(before="literal", now="filled"),
        **LATER_PARTS,
    }
    kept_by_rerun = (
        "Captions of the same model, prompt and settings are taken over, not made again; with other checks they are "
        "judged, and only those that fail are made again."
    )

    def __init__(self, options: Options, limits: dict[str, int]) -> None:
        """limits: by shard, how many of its images are read at most.  All images of the other shards are read."""
        super().__init__(options)
        self._limits = limits
        self._adopted = AdoptedCaptions(options.adopt, self.output) if options.adopt else None
        self._merge: JsonlMerge | None = None
        self._merging = threading.Lock()
        self.pushing = Pushing(options, self.output, self.name, [PUSHED[name] for name in options.formats])
        served = options.captioner[0].served
        self.opens_quickly, self.uses_device = served and options.served is None, not served
        self._own: OwnServers | None = None
        self._checks: CaptionChecks | None = None
        if options.served is not None:
            self.opening = "starting the model's servers"
        if served:
            self.shards_in_flight = SHARDS_AT_SERVERS

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        needs: list[WeightsNeed] = []
        if options.watermark_model is not None:
            needs.append(WeightsBySource("--watermark_model", options.watermark_model, options.watermark_sha256))
        if "caption" in options.check_names:
            needs += backends.load("check", "caption").weights(check_settings(options))
        family, source = options.captioner
        if options.served == "vllm":  # the files that transformers loads
            from curation.backends.caption.base import VisionLanguageModel

            return [*needs, VisionLanguageModel.weights(source, options.revision)]
        return [*needs, backends.load("caption", family.name).weights(source, options.revision)]

    @classmethod
    def require(cls, options: Options) -> None:
        o = options
        family, source = o.captioner
        if o.served is not None:
            require_own_server(o, source)
        quantizes = ("bitsandbytes", "accelerate") if o.quantize else ()
        require(*family.packages, *quantizes, *(["onnxruntime"] if o.watermark_model is not None else []))
        if "caption" in o.check_names:
            backends.load("check", "caption").require(check_settings(o))

    @cached_property
    def questions(self) -> "tuple[Question, ...]":
        """What is asked about each image, in the order of the captions."""
        o = self.options
        default = Question(max_tokens=o.max_tokens, temperature=o.temperature)
        default = default if o.detail == REALIGN else replace(default, detail=o.detail)
        literal = o.prompt_fields == "literal"
        questions = read_questions(o.prompt, o.prompt_file, default, detail=o.detail, literal=literal)
        if not o.captioner[0].chats and any(question.otherwise is not None for question in questions):
            raise UsageError(
                f"--detail {REALIGN}: {o.captioner[0].name} follows no instructions: name a chat model with --model"
            )
        if o.schema is not None and questions[0].name:
            raise UsageError(
                f"--schema and --prompt_file {o.prompt_file}, which has several prompts: an image gets one answer. "
                "Give one prompt, and a property of the schema for each caption"
            )
        return questions

    @property
    def names(self) -> "list[str]":
        """Of the captions, where an image gets several."""
        return [question.name for question in self.questions if question.name]

    @cached_property
    def _schema(self) -> AnswerSchema | None:
        o = self.options
        return AnswerSchema.read(o.schema, o.schema_caption) if o.schema is not None else None

    @cached_property
    def _watermark_file(self) -> Path | None:
        o = self.options
        if o.watermark_model is None:
            return None
        return fetch_weights(o.watermark_model, o.watermark_sha256, CACHE, name="--watermark_model")

    @cached_property
    def _found(self) -> hub_cache.ModelSource:
        """Which model exactly it is, found without loading it."""
        o = self.options
        family, source = o.captioner
        if o.served == "llama":
            require_own_server(o, source)
            return hub_cache.ModelSource(name=Path(source).name, location=source, revision=o.revision or "served")
        if family.served and o.served is None:
            return hub_cache.ModelSource(name=source, location=source, revision=o.revision or "served")
        known = known_models(backends.families("caption"))
        return hub_cache.resolve(source, o.revision, kind=hub_cache.TRANSFORMER, known=known)

    @property
    def _model(self) -> dict[str, str]:
        return {"model": self._found.name, "revision": self._found.revision}

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        names = (
            "detail",
            "max_tokens",
            "max_words",
            "temperature",
            "seed",
            "batch_size",
            "gather",
            "dtype",
            "quantize",
            "compile",
            "attention",
            "table_columns",
            "prompt_fields",
            *LATER_PARTS,
        )
        watermarks = hashlib.sha256(self._watermark_file.read_bytes()).hexdigest() if self._watermark_file else None
        model: dict[str, str] = {}
        checks: dict[str, object] = {}
        try:
            model, checks = self._model, self._checks_record
        except InfrastructureError as error:
            if not o.dry_run:
                raise
            self.trouble = error
        return {
            **model,
            **{name: getattr(o, name) for name in (*names, "max_watermark", "max_images")},
            "prompt": None if self.names else _asked(self.questions[0])["prompt"],
            "watermarks": watermarks,
            "format": list(o.formats),
            **({"prompts": [_asked(question) for question in self.questions]} if self.names else {}),
            **({} if self._adopted is None else {"adopt": self._adopted.digest}),
            **({} if self._schema is None else self._schema.record),
            **({"checks": {"tries": o.tries or TRIES, **checks}} if o.check_names else {}),
        }

    @cached_property
    def _checks_record(self) -> dict[str, object]:
        """What each check records of itself: all that decides what it says, found without loading a model."""
        o = self.options
        record: dict[str, object] = {}
        if "caption" in o.check_names:
            record["caption"] = dict(backends.load("check", "caption").identify(check_settings(o)))
        if "repeats" in o.check_names:
            record["repeats"] = {"max_share": self._max_repeats}
        return record

    @property
    def _max_repeats(self) -> float | None:
        o = self.options
        if "repeats" not in o.check_names:
            return None
        return MAX_REPEATS if o.max_repeats is None else o.max_repeats

    def _open_checks(self, device: str) -> CaptionChecks | None:
        o = self.options
        if not o.check_names:
            return None
        settings = replace(check_settings(o), device=device, threads=self._threads)
        fits = backends.load("check", "caption")(settings) if "caption" in o.check_names else None
        return CaptionChecks(fits=fits, max_repeats=self._max_repeats, tries=o.tries or TRIES)

    def prepare(self) -> None:
        """Write what the workers of --adopt look up, before any of them starts."""
        if self._adopted is not None and not self.options.dry_run:
            self._adopted.prepare()

    def open(self, allocation: Allocation) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        o = self.options
        if "parquet" in o.formats:
            import_arrow()
        family, source = o.captioner
        device = allocation.device("cpu" if family.served else o.device)
        given = os.environ.get("OMP_NUM_THREADS", "")
        self._threads = int(given) if given.isdecimal() and int(given) else allocation.threads
        settings = CaptionSettings(
            revision=o.revision,
            schema=self._schema,
            questions=self.questions,
            max_words=o.max_words if isinstance(o.max_words, int) else None,
            quantize=o.quantize,
            offload=o.offload,
            device=device,
            threads=self._threads,
            dtype=o.dtype,
            compile=o.compile,
            code_beside=self.output,
            attention=o.attention or "auto",
            gather=o.gather or "images",
            ports=o.ports,
            endpoints=o.endpoints,
            endpoints_dir=Path(o.endpoints_dir) if o.endpoints_dir else None,
            timeout_s=o.timeout,
            load_timeout_s=o.load_timeout,
            api_key_env=o.api_key_env,
            waiting=Waiting(o.stall_s, self.stopping),
        )
        if o.served is not None:
            self._own = self._own_servers(allocation)
            settings = replace(settings, own=self._own, revision=self._found.revision)
            source = self._found.name
        backend = self.backend = backends.load("caption", family.name)(source, settings)
        score: Callable[[Pixels], float] | None = None
        if self._watermark_file is not None:
            score = backends.load("watermark", "onnx")(self._watermark_file).score
        threads = o.dataloader_num_workers or cores(allocation.threads)
        columns = o.table_columns == "read"
        self._checks = self._open_checks(device)
        self.loader = CaptionLoader(
            backend,
            threads,
            score,
            o.max_watermark,
            settings.gather,
            table_columns=columns,
            questions=self.questions,
            checks=self._checks,
        )
        what = [backend.device_kind, backend.name, backend.revision, o.dtype, o.quantize, o.compile, o.max_tokens]
        if self.names or self.questions[0].varies:  # prompts of other lengths may need other batches
            what.append(hashlib.sha256(dump_json([*map(_asked, self.questions)])).hexdigest()[:16])
        self.captioner = ShardCaptioner(
            backend,
            self.loader,
            batch_size=self._batch_size(device, family),
            seed_of=partial(seed_of, o.seed),
            sizes=self.output / "_batch_sizes" / self.name,
            what="\0".join(map(str, what)),
            questions=self.questions,
            patience_s=o.timeout,
            parts=self.sample_parts,
            schema=self._schema,
            checks=self._checks,
            first_tried=1 if o.compile == "none" else family.batch_size,  # each size takes a minute to compile
        )
        self.pushing.begin(allocation)

    def _own_servers(self, allocation: Allocation) -> OwnServers:
        from curation.backends.caption.base import local_folder

        o, found = self.options, self._found
        return OwnServers(
            o,
            model=str(local_folder(found)) if o.served == "vllm" else found.location,
            name=found.name,
            sees=True,
            folder=self.output / "_servers" / self.name,
            allocation=allocation,
            slots=o.batch_size if isinstance(o.batch_size, int) else None,
            device=o.device,
            stopping=self.stopping,
        )

    def _batch_size(self, device: str, family: Family) -> int | None:
        """The batch size; None where it is to be found by trying."""
        if self.options.batch_size != "auto":
            return self.options.batch_size
        if self._own is not None:
            return self._own.slots * len(self._own)
        return family.batch_size if device == "cpu" else None

    def doing(self) -> str:
        return str(self.backend.doing()) if self.options.captioner[0].served and hasattr(self, "backend") else ""

    def close(self) -> None:
        self.pushing.end()
        if hasattr(self, "captioner"):
            self.captioner.close()
        if hasattr(self, "loader"):
            self.loader.close()
        if hasattr(self, "backend"):
            self.backend.close()
        if self._checks is not None:
            self._checks.close()
        if self._own is not None:
            self._own.close()
        self._finish_formats()

    # ---- one shard

    def result(self, counts: Mapping[str, int]) -> str:
        captioned = f"{counts['kept'] - counts['adopted']:,} captioned"
        told = {
            "reused": "of them kept from before",
            "adopted": "taken over",
            "asked_again_by_checks": "of them after a check had failed another caption",
            "rejected_by_checks": "rejected by checks",
            "captions_missing": "captions of images that have others failed",
            "with_empty_fields": "without a value for a field of the prompt",
            "with_cut_fields": "with a value that was cut",
        }
        return ", ".join([captioned, *(f"{counts[name]:,} {words}" for name, words in told.items() if counts[name])])

    def process(self, work: ShardContext) -> None:
        if "jsonl" in self.options.formats and self._merging.acquire(blocking=False):  # else another shard does it now
            try:
                self._merger().grow()
            finally:
                self._merging.release()
        recipes = self._recipes()
        mine = (self.backend.name, self.backend.revision)
        earlier = reusable_captions(self.output, work.previous, recipes, mine, self._checks_record)
        size = self.captioner.batch_size(work.shard.path)
        with contextlib.ExitStack() as stack:
            adopted = None
            if self._adopted is not None:
                adopted = stack.enter_context(contextlib.closing(self._adopted.of_shard(work.shard.id)))
            samples = self.captioner.caption(work, size, earlier, self._limits.get(work.shard.id), adopted)
        check_each_caption(samples, work.samples_in, self.options.max_error_rate)
        with work.phase("write"):
            self._write(work, samples)
        self.pushing.saw(len(samples))
        notes: dict[str, object] = {"recipes": recipes} if self.names else {"recipe": recipes[""]}
        notes |= {"checked_by": self._checks_record} if self._checks_record else {}
        notes |= {"batch_size": size, "device": self.backend.device_kind, "threads": self._threads}
        for name, value in notes.items():
            work.note(name, value)
        if getattr(self.backend, "compiled", None):
            work.note("compiled", self.backend.compiled)
        adapted = self.backend.adaptations() if self.options.captioner[0].served else None
        if adapted:
            work.note("servers_asked_otherwise", adapted)

    def _write(self, work: ShardContext, samples: Sequence[CaptionSample]) -> None:
        """Write the shard's rows, and each format that was asked for, which depends on the rows and the shard alone."""
        model = {"model": self.backend.name, "revision": self.backend.revision}
        found = (sample.row(work.shard.id, model) for sample in samples if sample.together[0] is sample)
        rows = [row for row in found if row is not None]
        with work.output(self.output / rows_name(work.shard.id)) as file:
            write_rows(file, rows)
        for name in self.options.formats:
            write_format(
                name,
                self.output,
                work.shard.path,
                work.shard.id,
                rows,
                work,
                schema=self._schema,
                names=self.names,
                checks=self.options.check_names,
            )

    def _recipes(self) -> "dict[str, str]":
        """For the name of each caption a digest of all that decides it.  A run with the same one takes it over."""
        fields = {name: value for name, value in self.fingerprint().items() if name not in NO_PART_OF_A_CAPTION}
        # An option as it was before it existed does not count, so that captions of an older version are taken over.
        fields = {n: v for n, v in fields.items() if n not in self.later or v != self.later[n].before}
        return {question.name: self._recipe(question, dict(fields)) for question in self.questions}

    def _recipe(self, question: "Question", fields: "dict[str, object]") -> str:
        """fields: what decides all captions, where the question says nothing else."""
        if question.name:
            fields.pop("prompts")
            fields.update((name, value) for name, value in _asked(question).items() if name != "name")
        if not question.varies:  # the same caption as of a version without fields
            fields.pop("prompt_fields", None)
        return hashlib.sha256(dump_json([fields, self.backend.name, self.backend.revision])).hexdigest()[:32]

    # ---- what is made of all shards

    def _ledger(self) -> Ledger:
        return self.ledger(read_only=True)

    def _merger(self) -> JsonlMerge:
        if self._merge is None:
            lines = partial(jsonl_lines, schema=self._schema)
            self._merge = JsonlMerge(self._ledger(), self.output / JSONL_NAME, rows_name, lines)
        return self._merge

    def _finish_formats(self) -> None:
        if "jsonl" in self.options.formats:
            self._merger().finish()
        if "parquet" in self.options.formats:
            finish_parquet(self._ledger())


def _asked(question: Question) -> "dict[str, object]":
    """A question for records."""
    template, otherwise = question.template, question.otherwise
    text = None if template is None else template.source if template.fields else template.words
    return {
        "name": question.name,
        "prompt": text,
        "detail": question.detail,
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        **({} if otherwise is None else {"otherwise": otherwise.words}),
    }


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    families = backends.families("caption")
    if asks_for_models(argv):
        print(list_models("05", known_models(families), MORE_MODELS, on_this_machine(hub_cache.TRANSFORMER[0])))
        return 0
    options = parse_options(Options, argv)
    options.check()
    could_mean_two = named(options.model, families)[1] if options.served != "llama" else ""
    if could_mean_two and not is_worker():
        set_up_logging(options.quiet)
        logger.info(could_mean_two)
    run = options.of_the_run()
    run = Recaption.settled(run)
    shards = select(discover(run.input, allow_pipe=run.allow_pipe, begun=(Path(run.output),)), run.shards)
    if "tar" in run.formats and (Path(run.output) / TAR_FOLDER).resolve() in local_folders(shards):
        raise UsageError(
            f"--output {run.output}: the source shards are in its folder {TAR_FOLDER}/, where --format tar "
            "writes shards of the same names; use another folder"
        )
    limits: dict[str, int] = {}
    if run.max_images is not None:
        limits = first_images(shards, run.max_images, Parts(run.image_member or AUTO))
        shards = [shard for shard in shards if shard.id in limits]
    stage = Recaption(run, limits)
    if not is_worker():
        check_fields(stage.questions, shards, stage.sample_parts, table_columns=run.table_columns == "read")
    stage.prepare()
    loose = "--format files writes a file for each sample" if "files" in run.formats else ""
    code = published(run, stage, lambda: run_stage(stage, run, shards), kept=("rows/*", "parquet/*"), needed_by=loose)
    if not run.dry_run:
        stage.pushing.finish(code)
        if run.smoke is not None:
            show_trial(stage.output, list(limits))
        if options.compare is not None:
            page = write_comparison(stage.output, shards, Path(options.compare), stage.sample_parts)
            logger.info(f"{page}: captions side by side")
    return code


if __name__ == "__main__":
    sys.exit(main())
