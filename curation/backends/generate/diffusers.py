"""Text to images with any diffusers pipeline: batches that the device never waits for, and that shrink to what fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curation.backends.generate.calls import PipelineCall, Texts, denoiser_of
from curation.backends.generate.cost import tflop_a_picture
from curation.backends.generate.loading import load_pipeline, pipeline_weights
from curation.backends.generate.parts import Parts, check_fp8, put_in, quantize_fp8
from curation.backends.generate.presets import Preset, known_models
from curation.backends.generate.reading import Reading, TextWindow, text_window
from curation.backends.generate.single_file import config_weights, find_single_file, is_single_file
from curation.backends.generate.text_lengths import pad_texts
from curation.edits import with_suffix
from curation.errors import DeviceError, InfrastructureError, SampleError, UsageError, device_failure
from curation.libraries import np
from curation.models import compiling
from curation.models.batch_size import FittingBatchSize, Shortage, free_memory, shortage_of, use_device
from curation.models.hub_cache import ModelSource, resolve
from curation.models.needs import WeightsNeed

if TYPE_CHECKING:
    import numpy.typing as npt

Compile = Literal["none", "blocks", "full", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedUps:
    """What makes a GPU faster at the same pictures, to within rounding.  All off is diffusers as it comes.

    compile: ``blocks`` compiles a transformer's repeated blocks (a UNet, whose blocks differ, as a whole) and the VAE's
    decoder: a minute; ``full`` the whole denoiser; ``max`` that with autotuning: many minutes.  Batches are padded to
    one size, so that one graph serves.
    channels_last: convolutions (UNet, VAE) in the layout that tensor cores read.
    fuse_qkv: one projection for query, key and value.
    code_beside: the output folder beside whose files compiled code is kept for all workers; None: torch's own place.
    """

    compile: Compile = "none"
    channels_last: bool = False
    fuse_qkv: bool = False
    code_beside: Path | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One picture: what to draw, and the seed of its own noise."""

    prompt: str
    seed: int


class Images:
    """Pictures on their way from the device.  ``image`` waits for them; any thread may ask."""

    def __init__(self, chunks: Sequence[_Chunk]) -> None:
        self._rows = [(chunk, row) for chunk in chunks for row in range(chunk.count)]

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Picture ``index``, height × width × 3.

        Raises SampleError ``blank_image`` (not a number anywhere, or one colour everywhere: numbers overflowed) and
        ``flagged_by_safety_checker`` (the pipeline has one, and it blackened the picture).
        """
        chunk, row = self._rows[index]
        return chunk.image(row)


@dataclass(slots=True)
class _Chunk:
    """One call's pictures.  ``ready`` is an event of the device, None where the pixels are there at once."""

    pixels: Any  # uint8 tensor, count × height × width × 3, on the host
    broken: Any  # int8 tensor, count: 1 not a number, 2 one colour
    flagged: Sequence[bool]
    count: int
    ready: Any = None

    def image(self, row: int) -> npt.NDArray[np.uint8]:
        if self.ready is not None:
            self.ready.synchronize()
        if self.flagged and self.flagged[row]:
            raise SampleError("flagged_by_safety_checker", "the pipeline's safety checker blackened the picture")
        pixels: npt.NDArray[np.uint8] = self.pixels[row].numpy()
        match int(self.broken[row]):
            case 1:
                raise SampleError("blank_image", "the model's output is not a number")
            case 2:
                red, green, blue = (int(value) for value in pixels[0, 0])
                raise SampleError("blank_image", f"every pixel is ({red}, {green}, {blue})")
        return pixels


class Backend:
    """One pipeline on one device.  Any thread may call it, and fetch the pictures.

    One thread of its own does the work, because each thread has a current CUDA device of its own, and because OpenMP
    keeps a team of threads for each thread that computes.

    Attributes:
        presets: How the family's models are meant to be called, by name.
        text_results: What ``encode_prompt`` of the family's pipelines returns, by the name of the pipeline's class: in
            order, the names under which the pipeline's call takes the results back; None where the call makes one
            again.
        is_stand_in: Whether it only runs a model of its own, for trying out.
        packages: Modules that it imports when it is loaded.
        call: The pipeline's call, with every setting resolved.
        deterministic: With ``compile``, whether the kernels are chosen without trials on the device.
        window: How much of a prompt the pipeline reads; None where it does not show that.
        tflop: 1e12 floating-point operations of one picture; None where they were not counted.
    """

    deterministic = True
    presets: ClassVar[Mapping[str, Preset]] = {}
    text_results: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    is_stand_in: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "safetensors")

    def __init__(
        self,
        source: ModelSource,
        settings: Preset,
        *,
        negative_prompt: str = "",
        prompt_suffix: str = "",
        speed_ups: SpeedUps | None = None,
        parts: Parts | None = None,
        device: str = "cpu",
        threads: int = 1,
        remember_in: Path | None = None,
        pipeline: Any = None,
        counts_operations: bool = False,
    ) -> None:
        """Load the pipeline.

        Args:
            source: The exact model.
            settings: The model's preset with the user's flags in it.
            negative_prompt: What the pictures should not show.
            prompt_suffix: What ``read`` puts behind every prompt.
            speed_ups: Default: none.
            parts: What is put into the pipeline.  Default: nothing.
            device: ``cpu``, ``cuda:<n>`` or ``xpu:<n>``.
            threads: CPU threads for torch.
            remember_in: A folder for batch sizes that were found to fit.
            pipeline: One that is on the device already; None loads it from ``source``.
            counts_operations: Make one picture to count ``tflop``.

        Raises:
            InfrastructureError: The model cannot be loaded.
            UsageError: It cannot do what the settings ask.
        """
        self.source = source
        self.device = device
        self.speed_ups = speed_ups or SpeedUps()
        self.parts = parts or Parts()
        self.prompt_suffix = prompt_suffix
        self.tflop: float | None = None
        self._thread = ThreadPoolExecutor(1, "device")
        try:
            opening = (settings, negative_prompt, threads, remember_in, pipeline, counts_operations)
            self._thread.submit(self._open, *opening).result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def find(cls, model: str, revision: str | None, variant: str | None, config: str | None = None) -> ModelSource:
        """The exact model, found without loading it; see ``hub_cache.resolve`` and ``find_single_file``."""
        if is_single_file(model):
            return find_single_file(model, config, revision, variant)
        if config:
            raise UsageError(f"--config {config}: is for a --model that is one file; leave it out")
        return resolve(model, revision, variant, known=known_models())

    @classmethod
    def weights(cls, model: str, revision: str | None, variant: str | None, config: str | None = None) -> WeightsNeed:
        """What has to be on this machine before the model can be loaded."""
        if is_single_file(model):
            return config_weights(model, config)
        return pipeline_weights(model, revision, variant)

    def close(self) -> None:
        """End the thread.  Pictures that were made can still be fetched."""
        self._thread.shutdown(cancel_futures=True)

    def _open(
        self,
        settings: Preset,
        negative_prompt: str,
        threads: int,
        remember_in: Path | None,
        pipeline: Any,
        counts_operations: bool,
    ) -> None:
        import torch

        self._torch = torch
        source, device = self.source, self.device
        torch.set_num_threads(threads)
        self.device_kind = use_device(device)
        if self.parts.quantize:
            check_fp8(settings.dtype, device)
        if self.speed_ups.compile != "none":
            self._set_up_compiler()
        self.pipeline = load_pipeline(source, settings.dtype, device) if pipeline is None else pipeline
        put_in(self.pipeline, self.parts, device)
        self.call = PipelineCall(self.pipeline, settings, negative_prompt)
        self.window: TextWindow | None = text_window(self.pipeline, self.call.encode_prompt, self.call.text_tokens)
        self._check_texts()
        self._warn_of_upcasting(settings.dtype)
        kind = f"{self.device_kind}\0{source.name}\0{source.revision}\0{settings.dtype}"
        if record := self.parts.record():  # another VAE needs other memory
            kind += f"\0{record}"
        self.batch = FittingBatchSize(settings.batch_size, kind, remember_in)
        if counts_operations:
            self.tflop = tflop_a_picture(self.call, on_cpu=not device.startswith("cuda"))
        self._apply(self.speed_ups)

    def _set_up_compiler(self) -> None:
        by_timing = self.speed_ups.compile == "max"
        self.deterministic = compiling.set_up(self.speed_ups.code_beside, self.device_kind, by_timing=by_timing)
        try:
            compiling.try_out(self.device, self.source.name)
        except RuntimeError as error:
            raise self._explain(error) from error

    def _warn_of_upcasting(self, dtype: str) -> None:
        config = getattr(getattr(self.pipeline, "vae", None), "config", None)
        if dtype == "float16" and hasattr(self.pipeline, "upcast_vae") and getattr(config, "force_upcast", False):
            self.call.warnings.append(
                "--dtype float16: the VAE of this model overflows in it and decodes every batch in float32, which is "
                "several times slower; --dtype bfloat16 avoids that"
            )

    def _check_texts(self) -> None:
        call, window = self.call, self.window
        if window is None:
            call.warnings.append(f"{call.name} does not show how many tokens of a prompt it reads; prompts may be cut")
            return
        window.check_suffix(self.prompt_suffix, call.name)
        [negative] = window.count([call.negative_prompt])
        if negative > window.room:
            call.warnings.append(f"--negative_prompt has {negative} tokens; {call.name} reads the first {window.room}")

    def read(self, prompts: Sequence[str]) -> list[Reading]:
        """What the model reads of each prompt, with the suffix that it is given."""
        if self.window is None:
            return [Reading(with_suffix(prompt, self.prompt_suffix)) for prompt in prompts]
        return self._thread.submit(self.window.read, prompts, self.prompt_suffix).result()

    def generate(
        self,
        requests: Sequence[Request],
        width: int,
        height: int,
        texts: Texts | None = None,
        check_stop: Callable[[], None] | None = None,
    ) -> Images:
        """Pictures for the requests, all of one size (pixels), queued on the device; returns before a GPU has finished.

        texts: the prompts' embeddings from ``encode``, row by row.
        check_stop: called between steps; what it raises comes out of here.
        Where memory runs out the batch is halved, the size that fits is remembered, and nothing is lost; a single
        picture that does not fit raises InfrastructureError.
        """
        return self._thread.submit(self._generate, requests, width, height, texts, check_stop).result()

    def encode(self, prompts: Sequence[str], at_once: int) -> Texts | None:
        """Text embeddings, ``at_once`` prompts a call; None where this pipeline only encodes inside its own call.

        at_once is fixed by the caller's plan, since the rounding depends on it; it is halved where memory runs out.
        """
        if not self.call.can_encode_ahead:
            return None
        return self._thread.submit(self._encode_all, prompts, at_once).result()

    def _generate(
        self,
        requests: Sequence[Request],
        width: int,
        height: int,
        texts: Texts | None,
        check_stop: Callable[[], None] | None,
    ) -> Images:
        padded = self.speed_ups.compile != "none"  # one graph: the last batch is as long as the others

        def run(start: int, end: int) -> _Chunk | Shortage:
            rows = list(range(start, end))
            if padded:
                rows += rows[-1:] * (self.batch.limit(width, height) - len(rows))
            chunk = self._run(requests, rows, end - start, width, height, texts, check_stop)
            if isinstance(chunk, Shortage):
                free_memory(self.device)
            return chunk

        chunks: list[_Chunk] = []
        for _, _, chunk in self.batch.split(len(requests), (width, height), run, padded=padded):
            if isinstance(chunk, Shortage):
                raise InfrastructureError(
                    f"{self.source.name}: one picture of {width}×{height} does not fit into memory ({self.device_kind})"
                )
            chunks.append(chunk)
        return Images(chunks)

    def _encode_all(self, prompts: Sequence[str], at_once: int) -> Texts:
        def encode(start: int, end: int) -> Texts | Shortage:
            try:
                return self.call.encode(prompts[start:end])
            except (RuntimeError, MemoryError) as error:
                if (shortage := shortage_of(error)) is None:
                    raise self._explain(error) from error
            free_memory(self.device)
            return shortage

        parts: list[Texts] = []
        for _, _, part in FittingBatchSize(at_once, "texts").split(len(prompts), (), encode):
            if isinstance(part, Shortage):
                raise InfrastructureError(f"{self.source.name}: one prompt's text does not fit on {self.device}")
            parts.append(part)
        return Texts.join(parts)

    def _run(
        self,
        requests: Sequence[Request],
        rows: Sequence[int],
        count: int,
        width: int,
        height: int,
        texts: Texts | None,
        check_stop: Callable[[], None] | None,
    ) -> _Chunk | Shortage:
        """One call of the pipeline; a Shortage when memory ran out (the caller goes on outside the handler, whose
        traceback would keep the tensors alive)."""
        batch = [requests[row] for row in rows]
        arguments = self.call.arguments(None if texts else [request.prompt for request in batch], len(batch))
        if texts:
            arguments |= texts.rows(rows)
        if check_stop and self.call.takes_step_callback:
            arguments["callback_on_step_end"] = _between_steps(check_stop)
        # on the host, so that a sample's noise does not depend on the kind of GPU
        generators = [self._torch.Generator("cpu").manual_seed(request.seed) for request in batch]
        try:
            output = self.pipeline(width=width, height=height, generator=generators, output_type="pt", **arguments)
            return self._to_host(output, count, width, height)
        except (RuntimeError, MemoryError, UnboundLocalError, AssertionError) as error:
            if (shortage := shortage_of(error)) is None:
                raise self._explain(error) from error
        return shortage

    def _to_host(self, output: Any, count: int, width: int, height: int) -> _Chunk:
        """The first ``count`` pictures as bytes: rounded on the device exactly as diffusers rounds them on the host."""
        torch = self._torch
        images = output.images[:count]
        if tuple(images.shape[1:]) != (3, height, width):
            raise InfrastructureError(
                f"{self.call.name} made {tuple(images.shape)} where {count} pictures of {width}×{height} were asked for"
            )
        finite = images.isfinite().flatten(1).all(1)
        pixels = images.float().nan_to_num_().mul_(255).round_().to(torch.uint8)
        flat = pixels.flatten(2)
        one_colour = (flat.amax(2) == flat.amin(2)).all(1)
        broken = torch.where(finite, one_colour.to(torch.int8) * 2, 1)
        pixels = pixels.permute(0, 2, 3, 1).contiguous()
        flagged = [bool(flag) for flag in getattr(output, "nsfw_content_detected", None) or []]
        if self.device == "cpu":
            return _Chunk(pixels, broken, flagged, count)
        host_pixels = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True).copy_(pixels, non_blocking=True)
        host_broken = torch.empty(broken.shape, dtype=broken.dtype, pin_memory=True).copy_(broken, non_blocking=True)
        module = torch.get_device_module(self.device)
        ready = module.Event(blocking=True) if self.device.startswith("cuda") else module.Event()
        ready.record(module.current_stream(self.device))
        return _Chunk(host_pixels, host_broken, flagged, count, ready)

    def _explain(self, error: BaseException) -> BaseException:
        """A failing GPU or compiler ends the run in one line; anything else is a bug and keeps its traceback."""
        if broken := device_failure(error):
            return DeviceError(f"{self.device} ({self.device_kind}) failed: {broken}")
        compiled = self.speed_ups.compile != "none"
        if compiled and (refusal := compiling.compiler_error(error, self.source.name)) is not None:
            return refusal
        return error

    def _apply(self, speed_ups: SpeedUps) -> None:
        """Change the pipeline's modules in place; each is left alone where the model has nothing to change."""
        torch = self._torch
        denoiser, vae = denoiser_of(self.pipeline), getattr(self.pipeline, "vae", None)
        if speed_ups.fuse_qkv:
            for module in (denoiser, vae):
                if fuse := getattr(module, "fuse_qkv_projections", None):
                    with contextlib.suppress(ValueError):  # of a UNet with projections that cannot be put together
                        fuse()
        if speed_ups.channels_last:
            for module in (getattr(self.pipeline, "unet", None), vae):
                # the layout is for images; convolutions over time, as in Qwen-Image's VAE, have one more dimension
                if module is not None and not any(parameter.ndim == 5 for parameter in module.parameters()):
                    module.to(memory_format=torch.channels_last)
        if self.parts.quantize:
            quantize_fp8(self.pipeline)
        if speed_ups.compile == "none":
            return
        mode = "max-autotune-no-cudagraphs" if speed_ups.compile == "max" else None
        is_transformer = getattr(self.pipeline, "transformer", None) is not None
        # A whole denoiser would still be compiled for each length, because it is what pads the texts for its blocks.
        by_blocks = (is_transformer and pad_texts(denoiser)) or speed_ups.compile == "blocks"
        if by_blocks and is_transformer and getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks(dynamic=False, mode=mode)
        else:
            denoiser.compile(dynamic=False, mode=mode)
        if decoder := getattr(vae, "decoder", None):
            decoder.compile(dynamic=False, mode=mode)


def _between_steps(check_stop: Callable[[], None]) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        check_stop()
        return {}

    return on_step_end
