#!/usr/bin/env python3
"""Stage 03: generate one image for each prompt, and write jpg, txt and json of every edited sample."""

import curation  # noqa: F401 - first: it refuses an old Python, and names packages that are missing

# isort: split

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import xxhash

from curation.backends import check as checks
from curation.backends.generate.calls import Texts
from curation.backends.generate.diffusers import Backend, Images, Request, SpeedUps
from curation.backends.generate.loading import pipeline_files
from curation.backends.generate.parts import Parts, Quantize, few_steps_warnings, find_parts, lora_parts, parts_weights
from curation.backends.generate.presets import (
    Preset,
    families,
    family_for,
    known_models,
    model_named,
    preset_for,
    presets,
    says_few_steps,
)
from curation.backends.generate.reading import Reading
from curation.check import Asked
from curation.check.counts import TryCounts, as_sums, in_words
from curation.cluster import Allocation, parse_deadline, stopped_at_once, torch_devices, visible_gpus, workers_for_gpus
from curation.edits import (
    GENERATED_XMP,
    EditWriter,
    OriginalMetadata,
    PreviousEdits,
    checked_prompt,
    edited_metadata,
    json_of,
    read_provenance,
    recipe,
    txt_of,
)
from curation.errors import InfrastructureError, SampleError, ShardError, UsageError, require
from curation.generate.batches import Batch, Job, bucket_sizes, nearest_size, seed_of, shrunk_batches
from curation.generate.checking import DEFAULT, NONE, Checking, CheckOptions
from curation.generate.encode import Encoding, TryLog
from curation.generate.judging import Judge
from curation.generate.rounds import (
    RoundPlan,
    as_curation,
    failed_tries,
    group_of,
    make_in_rounds,
    rejection,
    sort_earlier,
)
from curation.generate.tries import Outcome, Try
from curation.jsonio import KEY_SUFFIX, dump_json, read_dictionary
from curation.models import compiling
from curation.models.batch_size import use_device
from curation.models.hub_cache import PIPELINE, ModelSource, public_name
from curation.models.listing import asks_for_models, list_models, on_this_machine
from curation.models.needs import WeightsNeed
from curation.options import (
    FINITE,
    Files,
    FolderName,
    Sides,
    also,
    at_least,
    between,
    logger,
    parse_options,
    set_up_logging,
)
from curation.publish.running import published
from curation.rewrite.groups import Groups, read_groups
from curation.run import Follows, Input, RunOptions, ShardContext, Stage, run_stage, stage_main
from curation.run.follow import followed_folder
from curation.run.inputs import check_made_by, stage_version
from curation.run.ledger import recorded_options
from curation.run.work import Later
from curation.run.workers import is_worker
from curation.shards import Shard, discover, local_folders, record_name
from curation.tar.samples import metadata_of, read_samples

DEFAULT_MODEL = "black-forest-labs/FLUX.1-schnell"
ENCODERS = 4  # JPEG threads; one core encodes more pictures than any GPU makes
MORE_MODELS = "--model also takes the folder or the hub id of any other text-to-image pipeline of diffusers."
METADATA_STAGE, PROMPTS_STAGE = "01_filter_noface", "02_captions_processor"
TEXT_BATCHES = 4  # the default in new folders
PROMPTS_FOLDER = "prompts"  # in the folder of a whole dataset
_LOOK_S = 1.0  # between two looks whether stage 02 has begun
PRESET_FLAGS = ("steps", "guidance", "height", "width", "text_tokens", "dtype", "batch_size", "true_cfg_scale")


@dataclass(frozen=True, kw_only=True)
class Options(CheckOptions, RunOptions):
    """Generate one image per prompt with a diffusers pipeline; one process per GPU."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "model": "model",
            "steps": "picture",
            "batch_size": "speed",
            "seed": "picture",
            "quality": "output",
            "num_gpus": "speed",
            "edits_layout": "output",
            "compile": "speed",
        }
    )
    instead: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "num_inference_steps": "--steps",
            "guidance_scale": "--guidance",
        }
    )
    example: ClassVar[str] = "--input prompts --output edits"

    input: Annotated[Files, also("-i", "--prompts", "--input_files")]
    """Prompts: folder of <shard>.json as stage 02 writes it, a glob, braces, a list file or one file; also several."""
    output: Annotated[FolderName, also("-o", "--edits", "--output_dir")]
    """Folder with the samples' metadata as stage 01 writes it; the generated samples are written there too."""
    model: str = DEFAULT_MODEL
    """A diffusers pipeline: a short name (--list_models), a hub id, a local folder, or one file of safetensors.  The
    default, FLUX.1-schnell, is gated: accept its licence on the hub and give a token, or use z-image-turbo."""
    config: str | None = None
    """Folder or hub id with the configuration of a --model that is one file.  Default: that of the model that diffusers
    finds in the file, from the hub."""
    list_models: bool = False
    """Print the models that have short names, with licence, memory and whether they are on this machine, and end."""
    revision: str | None = None
    """Branch, tag or commit of a hub model.  Default: main, at its state when the run starts."""
    variant: str | None = None
    """Which weight files of the model to read, such as fp16."""
    lora: tuple[str, ...] = ()
    """LoRAs that are added to the model: files, folders or hub ids, each with :scale behind it if it is not 1."""
    vae: str | None = None
    """Another autoencoder: taesd, taesdxl, taesd3 or taef1, which are small and fast, a folder or a hub id."""
    quantize: Quantize | None = None
    """fp8: compute the denoiser in 8 bits, on GPUs that can; use it with --compile.  It needs torchao."""
    embedded: bool = False
    """A tiny pipeline with random weights, built on this machine, for tests without a model.  Its pictures are noise
    with the prompt as text."""
    steps: Annotated[int | None, at_least(1)] = None
    """Denoising steps.  Default: the model's preset."""
    guidance: Annotated[float | None, at_least(0), FINITE] = None
    """Guidance scale.  Default: the model's preset."""
    height: Annotated[int | None, at_least(1)] = None
    """Height in pixels.  Default: the model's preset."""
    width: Annotated[int | None, at_least(1)] = None
    """Width in pixels.  Default: the model's preset."""
    size: Annotated[Literal["fixed", "original"], Sides("width", "height")] = "fixed"
    """fixed: every picture has --width and --height; 1024x768 sets both.  original: the aspect ratio of the original,
    the same area."""
    text_tokens: Annotated[int | None, at_least(1)] = None
    """Length to which prompts are padded or cut, if the model allows a choice.  Default: the model's preset."""
    batch_size: Annotated[int | None, at_least(1)] = None
    """Pictures that are generated at once; halved if memory runs out.  Default: the model's preset."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Precision of the weights.  Default: the model's preset."""
    seed: int = 0
    """Seed; each sample's noise comes from a hash of it and the sample's key."""
    negative_prompt: str = ""
    """Content that the pictures should not show, if the model and its guidance use a negative prompt."""
    true_cfg_scale: Annotated[float | None, at_least(0), FINITE, also("--true_cfg")] = None
    """Scale of the guidance by the negative prompt, for models such as Flux and Qwen-Image.  Default: the preset's or
    the pipeline's."""
    prompt_suffix: str = ""
    """Text that is appended to every prompt, only for the model, such as ', high quality photo'.  Long prompts are
    shortened so that it fits."""
    quality: Annotated[int, between(1, 100)] = 90
    """JPEG quality, 1 to 100."""
    num_gpus: Annotated[int | None, at_least(1)] = None
    """Processes on this machine, one per GPU.  Default: every visible GPU; one if srun starts a task per GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the visible GPUs, of NVIDIA, AMD or Intel.  cpu: compute on the CPU, even if there are GPUs."""
    edits_layout: Literal["tar", "files"] = "tar"
    """tar: one <shard>.tar.  files: <shard>/<key>.{jpg,txt,json}, three files a sample."""
    compile: Literal["none", "blocks", "full", "max"] = "none"
    """torch.compile with fixed sizes: transformer blocks, the whole denoiser, or that with autotuning."""
    channels_last: bool | None = None
    """Use the memory layout for convolutions that is fastest on tensor cores.  Default: yes, in new folders."""
    fuse_qkv: bool | None = None
    """Use one projection for query, key and value.  Default: yes, in new folders."""
    text_batches: Annotated[int | None, at_least(0)] = None
    """Encode the prompts of this number of batches at once, before their pictures; 0: encode them within each batch's
    call.  Default: 4, in new folders."""

    def check(self) -> None:
        super().check()
        if self.embedded and (self.model != DEFAULT_MODEL or self.revision or self.variant or self.config):
            raise UsageError("--embedded brings its own model: leave --model, --config, --revision and --variant out")
        for value in self.lora:
            lora_parts(value)
        _ = self.named
        if self.checks is not None:
            _ = self.checking

    @property
    def checking(self) -> Checking:
        """What pictures are checked for; without --check, what they are in a new folder."""
        return Checking.of(self, default=checks_of_new_folders(self))

    @cached_property
    def named(self) -> tuple[str, str]:
        """The hub id or folder that --model means, and a line for the log where it could mean two things."""
        return model_named(self.model)

    @property
    def family(self) -> type[Backend]:
        """The backend that runs the model."""
        family: type[Backend] = families()["tiny"] if self.embedded else family_for(self.named[0])
        return family


def checks_of_new_folders(options: Options) -> str:
    """--check where it is not given: noise shows no faces."""
    return NONE if options.embedded else DEFAULT


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample to be edited: the picture to make, what it is made of, and the metadata it replaces."""

    job: Job
    curation: Mapping[str, Any]
    original: Mapping[str, Any]


class GenerateImages(Stage[Options]):
    """One shard: prompts/<shard>.json and the samples' metadata → edits/<shard>.tar."""

    name = "03_generate_images"
    opening = "loading the image model"
    uses_device = True
    shards_in_flight = 2  # while the last pictures of one are encoded and written, the device works for the next
    overlaps_at_ends = True
    later = MappingProxyType(
        {
            **dict.fromkeys(("true_cfg_scale", "config", "lora", "vae", "quantize"), Later(before=None, now=None)),
            "channels_last": Later(before=False, now=True, kept=True),
            "fuse_qkv": Later(before=False, now=True, kept=True),
            "text_batches": Later(before=0, now=TEXT_BATCHES, kept=True),
            "checks": Later(before=NONE, now=checks_of_new_folders),
            **dict.fromkeys(("tries", "on_check_failure"), Later(before=None, now=None)),
        }
    )

    def __init__(self, options: Options, groups: Groups = ()) -> None:
        """groups: All groups of people that the prompts ask for."""
        super().__init__(options)
        self.checking, self._groups = options.checking, groups
        self._judge: Judge | None = None
        self._encoders = ThreadPoolExecutor(ENCODERS, "jpeg")
        self._turn = threading.Lock()  # held by the shard for which the device works
        self._compiled = self._compiling = False  # the first pictures compile the model

    @cached_property
    def source(self) -> ModelSource:
        """The exact model, found without loading it."""
        o = self.options
        return o.family.find(o.named[0], o.revision, o.variant, o.config)

    @cached_property
    def parts(self) -> Parts:
        """What is put into the model, found without loading it."""
        o = self.options
        return find_parts(o.lora, o.vae, o.quantize)

    @cached_property
    def preset(self) -> tuple[str | None, Preset]:
        """The name of the model's preset, and the preset; None for a model without one, or a folder begun without."""
        o, model = self.options, self.options.named[0]
        if o.embedded:
            [item] = o.family.presets.items()
            return item
        bare = Preset(model=model)
        try:
            name, preset = preset_for(model, pipeline_files(self.source))
        except InfrastructureError:  # the model is not there, as the fingerprint says
            name, preset = preset_for(model)
        preset = replace(preset, model=model)
        recorded = None if o.rerun else recorded_options(self.output, self.name, o.shards)
        if name is None or recorded is None or recorded.get("model") != public_name(model):
            return name, preset
        has_none = {flag: getattr(self._with_flags(bare), flag) for flag in PRESET_FLAGS}
        began_without = all(recorded.get(flag) == value for flag, value in has_none.items())
        return (None, bare) if began_without else (name, preset)

    @cached_property
    def settings(self) -> Preset:
        """The model's preset, overridden by the flags."""
        return self._with_flags(self.preset[1])

    def _with_flags(self, preset: Preset) -> Preset:
        given = {flag: getattr(self.options, flag) for flag in PRESET_FLAGS}
        return replace(preset, **{flag: value for flag, value in given.items() if value is not None})

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        o = options
        needs = [o.family.weights(o.named[0], o.revision, o.variant, o.config), *parts_weights(o.lora, o.vae)]
        return [*needs, *checks.weights(o.checking.names, o.checking.settings(()))]

    @classmethod
    def require(cls, options: Options) -> None:
        o = options
        checks.require(o.checking.names, o.checking.settings(()))
        more = ["peft"] if o.lora else []
        if o.quantize == "fp8" and not o.embedded and o.dtype in (None, "bfloat16"):  # others are refused for that
            more.append("torchao")
        require(*o.family.packages, *more)

    @cached_property
    def check_record(self) -> Mapping[str, Mapping[str, Any]]:
        """What each check records of itself, found without loading it."""
        try:
            return checks.identify(self.checking.names, self.checking.settings(self._groups))
        except InfrastructureError as error:  # new folders are checked though nobody has asked for it
            raise InfrastructureError(f"{error}; or generate without checks: --check none") from error

    def fingerprint(self) -> dict[str, object]:
        o, s = self.options, self.settings
        model: dict[str, object] = {"model": s.model}
        try:
            model = {"model": self.source.name, "revision": self.source.revision, "variant": self.source.variant}
            model |= {
                "config": self._config_record(),
                **dict.fromkeys(("lora", "vae", "quantize")),
                **self.parts.record(),
                **self.checking.as_options(self.check_record),
            }
        except InfrastructureError as error:
            if not o.dry_run:
                raise
            self.trouble = error
        preset = {name: getattr(s, name) for name in PRESET_FLAGS}
        names = ("size", "seed", "negative_prompt", "prompt_suffix", "quality", "edits_layout")
        speed = ("compile", "channels_last", "fuse_qkv", "text_batches")
        mine = {name: getattr(o, name) for name in (*names, *speed)}
        return {**model, **preset, **mine}

    def _config_record(self) -> dict[str, str] | None:
        config = self.source.config
        return {"name": config.name, "revision": config.revision} if config else None

    def inputs(self, shard: Shard) -> list[Input]:
        return [
            Input(shard.path, PROMPTS_STAGE),
            Input(self.output / f"{shard.id}.json", METADATA_STAGE, optional=True),  # absent where the files are loose
            Input(provenance_path(shard), PROMPTS_STAGE, optional=True),
        ]

    def open(self, allocation: Allocation) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        given = os.environ.get("OMP_NUM_THREADS", "")
        self.threads = int(given) if given.isdigit() and int(given) else allocation.threads
        if self.checking.names:  # small models of checks look at pictures in these threads: each core counts
            self._encoders = ThreadPoolExecutor(max(ENCODERS, self.threads), "jpeg")
        o = self.options
        if o.embedded:
            logger.warning("--embedded: the pictures are noise from random weights with their prompts written over it")
            has_gpu = allocation.gpu is not None and torch_devices()[0] == "cuda"
            device = f"cuda:{allocation.gpu}" if has_gpu else "cpu"
        else:
            slow = f"{self.source.name} on the CPU takes seconds to many minutes a picture"
            device = allocation.device(o.device, slow)
        if self.checking.names:
            use_device(device)  # before the first model takes memory there
            settings = self.checking.settings(self._groups, device=device, threads=self.threads)
            self._judge = Judge(checks.load_checks(self.checking.names, settings), device)
        self.backend = o.family(
            self.source,
            self.settings,
            negative_prompt=o.negative_prompt,
            prompt_suffix=o.prompt_suffix,
            parts=self.parts,
            speed_ups=SpeedUps(
                compile=o.compile,
                channels_last=bool(o.channels_last),
                fuse_qkv=bool(o.fuse_qkv),
                code_beside=self.output,
            ),
            device=device,
            threads=self.threads,
            remember_in=self.output / "_batch_sizes" / self.name,
            counts_operations=self.preset[0] not in presets() and allocation.rank == 0,
        )
        call = self.backend.call
        if self.preset[0] not in presets() and allocation.rank == 0:
            logger.info(self._cost())
        of_loras = few_steps_warnings(o.lora, call.steps) if o.steps is None else []
        for warning in (*call.warnings, *of_loras):
            logger.warning(warning)
        if o.text_batches not in (None, 0, TEXT_BATCHES) and not call.can_encode_ahead:
            logger.warning(f"--text_batches has no effect: {call.name} encodes prompts within its call")
        self.fixed_size = (call.width, call.height)
        self.sizes = bucket_sizes(*self.fixed_size, call.bucket_multiple) if o.size == "original" else [self.fixed_size]

    def _cost(self) -> str:
        """What a picture of a model without a preset is made with, so that nobody pays for fifty steps unknowingly."""
        o, call, name = self.options, self.backend.call, self.preset[0]
        known = f"it is called {name}" if name else "no preset is known for it"
        guidance = "" if call.guidance is None else f", guidance {call.guidance:g}"
        cost = "" if self.backend.tflop is None else f": about {self.backend.tflop:.3g} TFLOP a picture"
        few = "" if name or o.steps or not says_few_steps(o.model) else "; by its name it needs few steps"
        made = f"{call.steps} steps{guidance}, {call.width}×{call.height}, batches of {self.settings.batch_size}{cost}"
        return (
            f"--model {public_name(o.model)}: {known}: {made}{few}; its card says which --steps and --guidance it needs"
        )

    def doing(self) -> str:
        return "compiling the model, while it makes the first pictures" if self._compiling else ""

    def close(self) -> None:
        if hasattr(self, "backend"):
            self.backend.close()
        self._encoders.shutdown(cancel_futures=True)
        if self._judge is not None:
            self._judge.close()

    def sums(self, notes: Mapping[str, Any]) -> dict[str, int]:
        return super().sums(notes) | (as_sums(notes["checks"]) if "checks" in notes else {})

    def result(self, counts: Mapping[str, int]) -> str:
        reused = f", {counts['reused']:,} kept from before" if counts["reused"] else ""
        cut = f", {counts['prompts_cut']:,} prompts longer than what the model reads" if counts["prompts_cut"] else ""
        short = f", {counts['prompts_shortened']:,} shortened for the suffix" if counts["prompts_shortened"] else ""
        tried = in_words(counts)
        if counts["without_group"]:
            tried += f"; {counts['without_group']:,} samples without a group, which --check group did not judge"
        made = counts["generated"] if tried else counts["kept"] - counts["reused"]
        return f"{made:,} images generated{reused}{cut}{short}{'; ' if tried else ''}{tried}"

    def process(self, work: ShardContext) -> None:
        o, checking, judge = self.options, self.checking, self._judge
        with work.phase("read"):
            samples = self._read(work)
            earlier = PreviousEdits(self.output, work.shard.id)
            wanted = {sample.job.key: recipe(sample.curation, self.name) for sample in samples}
            found = earlier.matching(wanted, self.name, any_round=judge is not None)
        asked = {s.job.key: Asked(s.job.key, s.curation["prompt"], group_of(s.curation)) for s in samples}
        self._check_groups(work, asked)
        encoding = Encoding(self._encoders, o.quality, GENERATED_XMP)
        log = TryLog(work, encoding, judge, asked if judge else {}, keeps=checking.keeps_failed)
        if judge is None:
            settled = {key: Outcome(Try(0, sha256=edit.sha256)) for key, edit in found.items()}
        else:
            provenance = self.output / "_provenance" / self.name / f"{record_name(work.shard.id)}.jsonl"
            settled = sort_earlier(log, earlier, found, provenance, self.check_record, asked, checking.tries)
        work.keep(sum(outcome.kept is not None and outcome.kept.passed for outcome in settled.values()))
        jobs = [sample.job for sample in samples if sample.job.key not in settled]
        plan = RoundPlan(checking.tries, self.settings.batch_size, o.text_batches or 0)
        make, encode_texts = partial(self._make, work), partial(self._encode_texts, work)
        batches = make_in_rounds(work, jobs, log, plan, self._turn, make, encode_texts)
        earlier.keep({key for key, outcome in settled.items() if outcome.kept is not None} | log.keeps_earlier())
        work.note("generated", sum(len(batch.jobs) for batch in batches))
        work.note("device", self.backend.device_kind)
        work.note("threads", self.threads)
        if o.compile != "none":
            work.note("compiled", compiling.note_of(o.compile, self.backend.deterministic))
        self._note_shrunk_batches(work, batches)
        with work.phase("write"):
            self._write(work, samples, earlier, settled, log)

    # ---- what comes in

    def _check_groups(self, work: ShardContext, asked: Mapping[str, Asked]) -> None:
        """Raise ShardError if a sample is of a group that the check does not know, or if none has a group, before a
        picture is made."""
        if "group" not in self.checking.names:
            return
        without = sum(one.group is None for one in asked.values())
        if without:
            if without == len(asked):
                raise ShardError(
                    f"{provenance_path(work.shard)}: no sample has a group, so that --check group has nothing to "
                    "judge: let stage 02 assign groups, or leave group out of --check"
                )
            work.note("without_group", without)
            work.warn(f"{without:,} of {len(asked):,} samples have no group: --check group does not judge them")
        known = {None, *self._groups}
        for key, one in asked.items():
            if one.group not in known:
                raise ShardError(
                    f"{provenance_path(work.shard)}: {key} is of the group {one.group!r}, and --check group decides "
                    "between the groups that stage 02 has recorded as its options: name all of them with --groups"
                )

    def _read(self, work: ShardContext) -> list[Sample]:
        """The samples to edit, in the order of the prompts; those that cannot be edited are recorded."""
        shard = work.shard
        prompts = read_dictionary(shard.file)
        work.sample_in(len(prompts))
        if not prompts:
            return []
        originals = OriginalMetadata(self.output, shard.id, self.name)
        made = read_provenance(provenance_path(shard))
        versions = {
            METADATA_STAGE: stage_version(self.output, METADATA_STAGE, shard.id),
            PROMPTS_STAGE: stage_version(shard.home, PROMPTS_STAGE, shard.id),
            self.name: self.version,
        }
        stages = {stage: version for stage, version in versions.items() if version is not None}
        wanted: list[tuple[str, str, Mapping[str, Any]]] = []
        for name, prompt in prompts.items():
            key = name.removesuffix(KEY_SUFFIX)
            try:
                wanted.append((key, checked_prompt(key, prompt), originals.find(key)))
            except SampleError as error:
                work.fail(key, error.reason, error.detail)
        readings = self.backend.read([prompt for _, prompt, _ in wanted])
        samples = []
        for (key, prompt, original), reading in zip(wanted, readings, strict=True):
            if reading.text:
                samples.append(self._sample(key, prompt, reading, original, made.get(key, {}), stages))
            else:
                work.fail(key, "no_room_for_prompt", "--prompt_suffix leaves no room for a word of the prompt")
        self._note_cut_prompts(work, [reading for reading in readings if reading.text])
        return samples

    def _note_cut_prompts(self, work: ShardContext, readings: Sequence[Reading]) -> None:
        """The model did not read the ends of some prompts: the receipt says how many."""
        cut = sum(reading.is_cut for reading in readings)
        if not cut or self.backend.window is None:
            return
        work.note("prompts_cut", cut)
        end = "their ends were not read"
        shortened = sum(reading.shortened is not None for reading in readings)
        if shortened:
            work.note("prompts_shortened", shortened)
            end = f"{shortened} were shortened so that --prompt_suffix is read whole"
        room = self.backend.window.room
        work.warn(f"{cut} of {len(readings)} prompts are longer than the {room} tokens that the model reads; {end}")

    def _sample(
        self,
        key: str,
        prompt: str,
        reading: Reading,
        original: Mapping[str, Any],
        made: Mapping[str, Any],
        stages: Mapping[str, int],
    ) -> Sample:
        width, height = nearest_size(self.sizes, original, self.fixed_size)
        o, call, source = self.options, self.backend.call, self.source
        image_model: dict[str, Any] = {"name": source.name, "revision": source.revision, "dtype": self.settings.dtype}
        if source.variant:
            image_model["variant"] = source.variant
        config = self._config_record()
        if config:
            image_model["config"] = config
        image_model |= self.parts.record()
        prompt_model = {"prompt": made["model"]} if "model" in made else {}
        check_models = {"checks": self.check_record} if self.checking.names else {}
        record = {
            "prompt": prompt,
            "prompt_suffix": o.prompt_suffix,
            "negative_prompt": call.negative_prompt,
            "group": made.get("group"),
            "models": {**prompt_model, "image": image_model, **check_models},
            "seed": o.seed,
            "steps": call.steps,
            "guidance": call.guidance,
            "text_tokens": self.settings.text_tokens,
            "size": [width, height],
            "quality": o.quality,
            "stages": dict(stages),
        }
        if call.true_cfg_scale is not None:
            record["true_cfg_scale"] = call.true_cfg_scale
        if o.compile != "none":
            record["compile"] = o.compile
        if reading.is_cut or reading.given is None:
            record["tokens"] = {"given": reading.given, "read": reading.read}
        if reading.shortened is not None:
            record["prompt_shortened"] = reading.shortened
        judged_by = [record["group"]] if "group" in self.checking.names else []
        digest = xxhash.xxh3_64_hexdigest(dump_json([key, recipe(record, self.name), *judged_by]))
        return Sample(Job(key, reading.text, width, height, digest), record, original)

    # ---- pictures

    def _encode_texts(self, work: ShardContext, prompts: Sequence[str]) -> Texts | None:
        if not self.options.text_batches:
            return None
        with work.phase("infer"):
            return self.backend.encode(prompts, at_once=len(prompts))

    def _make(self, work: ShardContext, round_number: int, batch: Batch, texts: Texts | None) -> Images:
        requests = [Request(job.prompt, seed_of(self.options.seed, job.key, round_number)) for job in batch.jobs]

        def check_stop() -> None:
            work.check_stop(urgent_only=True)

        self._compiling = self.options.compile != "none" and not self._compiled
        with work.phase("infer"):
            images = self.backend.generate(requests, batch.width, batch.height, texts, check_stop)
        self._compiled, self._compiling = True, False
        return images

    def _note_shrunk_batches(self, work: ShardContext, batches: Sequence[Batch]) -> None:
        """A shard whose batches did not fit is exempt from the promise of identical bytes, and its receipt says so."""
        shrunk = shrunk_batches(batches, self.backend.batch.limit)
        if shrunk:
            work.note("batch_shrunk_to", shrunk)
            work.warn(f"memory ran out: batches of {self.settings.batch_size} were halved ({shrunk})")

    # ---- what goes out

    def _write(
        self,
        work: ShardContext,
        samples: Sequence[Sample],
        earlier: PreviousEdits,
        settled: Mapping[str, Outcome],
        log: TryLog,
    ) -> None:
        """Write every edited sample, in the shard's order; no file where no sample was edited."""
        counts, reused = TryCounts(), 0
        writer: EditWriter | None = None
        with contextlib.ExitStack() as opened:
            for sample in samples:
                key = sample.job.key
                outcome = settled.get(key) or log.outcome(key)
                if self._judge is not None:
                    self._count(work, sample, outcome, counts)
                if outcome.kept is None:
                    continue
                if writer is None:
                    writer = EditWriter(self.output, work.shard.id, self.options.edits_layout, work.output)
                    opened.enter_context(writer)
                reused += not outcome.kept.jpg
                self._write_one(work, writer, sample, outcome, outcome.kept.jpg or earlier.jpg(key))
        work.note("reused", reused)
        if self._judge is not None:
            work.note("checks", counts.note())

    def _write_one(self, work: ShardContext, writer: EditWriter, sample: Sample, outcome: Outcome, jpg: bytes) -> None:
        kept, job, record, line = outcome.kept, sample.job, dict(sample.curation), {}
        assert kept is not None
        if self._judge is not None:
            record |= as_curation(outcome)
            line["failed_tries"] = failed_tries(outcome, self.options.seed, job.key)
        metadata = edited_metadata(sample.original, record, kept.sha256, job.width, job.height, kept.boxes)
        writer.add(job.key, jpg, txt_of(record["prompt"]), json_of(metadata))
        work.provenance({"key": job.key, "sha256": kept.sha256, **record, **line})

    def _count(self, work: ShardContext, sample: Sample, outcome: Outcome, counts: TryCounts) -> None:
        """Count what came of a sample's tries.  One that passed is counted as kept already."""
        key, kept, group = sample.job.key, outcome.kept, group_of(sample.curation)
        failed = [one.failures for one in outcome.failed]
        if kept is not None:
            if not kept.passed:
                work.keep()
            counts.add(group, kept.failures, failed)
        elif all(one.refused for one in outcome.failed):
            work.fail(key, *(outcome.failed[0].refused or ()))
            counts.add(group, None, failed)
        else:
            reason, facts = rejection(outcome, self.checking.names)
            work.reject(key, reason, group=group, **facts)
            counts.add(group, None, failed, rejected=True)


def provenance_path(shard: Shard) -> Path:
    """What stage 02 recorded about each prompt of a shard."""
    return shard.home / "_provenance" / PROMPTS_STAGE / f"{record_name(shard.id)}.jsonl"


def groups_of(options: Options, shards: Sequence[Shard], followed: Path | None = None) -> Groups:
    """All groups that the prompts ask for, where a check is to decide between them.

    followed: The folder of the stage that is followed, which may not have begun.

    Raises:
        UsageError: --groups is not given, and stage 02 has not recorded groups where the prompts are.
    """
    if "group" not in options.checking.names:
        return ()
    if options.groups is not None:
        groups = read_groups(options.groups)
    else:
        folders = local_folders(shards) if followed is None else {followed}
        recorded = [_options_of_prompts(folder, options if followed else None) or {} for folder in folders]
        groups = tuple(dict.fromkeys(str(group) for options in recorded for group in options.get("groups") or ()))
    if len(groups) < 2:
        raise UsageError(
            "--check group: decides between two groups or more, and stage 02 has recorded "
            f"{len(groups) or 'none'} beside the prompts; name them with --groups"
        )
    return groups


def _options_of_prompts(folder: Path, follows: Options | None) -> Mapping[str, Any] | None:
    """What stage 02 has recorded of its options; a run that follows it waits until it has, or until it is to end."""
    end = time.monotonic() + follows.follow_idle_s if follows and not follows.dry_run else 0.0
    found = recorded_options(folder, PROMPTS_STAGE)
    if found is not None or follows is None:
        return found
    with stopped_at_once(parse_deadline(follows.deadline)):
        while found is None and time.monotonic() < end:
            time.sleep(_LOOK_S)
            found = recorded_options(folder, PROMPTS_STAGE)
    return found


def one_process_per_gpu(options: Options) -> Options:
    """``--num_gpus`` as ``--workers``, which starts the processes.  Under srun with several tasks each is one."""
    device = "cpu" if options.embedded and not visible_gpus() else options.device
    return replace(options, workers=workers_for_gpus(options.workers, options.num_gpus, device=device))


def refuse_other_shards(edits: Path, shards: Sequence[Shard]) -> None:
    """Raise UsageError if a tar that would be replaced is no tar of edits, but perhaps a source shard.

    Once the stage has begun in the folder, its own tars are there.
    """
    if (edits / "_receipts" / GenerateImages.name).exists():
        return
    for path in (edits / f"{shard.id}.tar" for shard in shards):
        if path.is_file() and not _may_be_edits(path):
            raise UsageError(
                f"--output: {path} holds samples that were not edited, and would be replaced: give another folder, and "
                "not that of the source shards"
            )


def _may_be_edits(path: Path) -> bool:
    """Whether a tar's first sample is an edit, or it has none that can be read."""
    try:
        sample = next(read_samples(path, ("json",)), None)
    except ShardError:
        return True
    try:
        return sample is None or isinstance(metadata_of(sample).get("curation"), dict)
    except SampleError:
        return False


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    if asks_for_models(argv):
        print(list_models("03", known_models(), MORE_MODELS, on_this_machine(PIPELINE[0])))
        from curation.backends.check.listing import list_checks  # it imports much that no other run needs

        print(f"\n{list_checks('03')}")
        return 0
    options = parse_options(Options, argv)
    options.check()
    if options.named[1] and not is_worker():
        set_up_logging(options.quiet)
        logger.info(options.named[1])
    folder = followed_folder("--input", options.input, PROMPTS_FOLDER, waits=options.follow)
    follows = Follows(PROMPTS_STAGE, folder, ".json")
    shards = follows.discover() if options.follow else discover(options.input, ".json", inside=PROMPTS_FOLDER)
    for folder in local_folders(shards):
        check_made_by("--input", folder, PROMPTS_STAGE)
    check_made_by("--output", Path(options.output), GenerateImages.name, beside=(METADATA_STAGE,))
    if not (options.follow or Path(options.output).exists()):
        raise UsageError(f"--output: there is no {options.output}: give the folder that stage 01 wrote as --edits")
    if options.edits_layout == "tar" and not is_worker():
        refuse_other_shards(Path(options.output), shards)
    options = GenerateImages.settled(options)
    groups = groups_of(options, shards, follows.folder if options.follow else None)
    stage, of_all = GenerateImages(options, groups), one_process_per_gpu(options)
    needed = "stage 04 reads the edits on this filesystem"
    return published(of_all, stage, lambda: run_stage(stage, of_all, shards, follows), needed_by=needed)


if __name__ == "__main__":
    sys.exit(main())
