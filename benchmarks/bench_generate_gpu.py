#!/usr/bin/env python3
"""Images a second of SD-Turbo (512², 1 step) and FLUX.1-schnell (384², 2 steps) on a GPU, and what each step gave.

The architectures are the real ones, built here from the configurations below with random weights in bf16 (nothing is
downloaded; the speed does not depend on the weights).  The first row is the published loop: batch 32, the pipeline as
it comes, PIL images, JPEG encoding in line.  Each further row adds one thing to the row above; the last rows look for
the best batch.  Aim: the best row at least twice the first.  FLUX.1-schnell needs about 36 GB of memory at batch 32.

    python benchmarks/bench_generate_gpu.py            # both, minutes each
    python benchmarks/bench_generate_gpu.py --tiny     # on the CPU: tells whether the code runs, not a speed
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from measuring import DeviceRows, device_name, make_parser, parse

from curation.backends.generate.calls import Texts
from curation.backends.generate.diffusers import Backend, Images, Request, SpeedUps
from curation.backends.generate.loading import quiet_libraries
from curation.backends.generate.presets import Preset, presets
from curation.backends.generate.tiny import clip_tokenizer, t5_tokenizer
from curation.edits import GENERATED_XMP
from curation.errors import SampleError
from curation.images import encode_jpeg
from curation.models.hub_cache import ModelSource

UPSTREAM_BATCH, QUALITY, ENCODERS, TEXT_BATCHES = 32, 90, 4, 4
BATCHES_TO_TRY = (8, 16, 64, 128)
PROMPT = "A photo of person number {} who walks a dog along a street in the evening light, with a red umbrella"

# From the models' own configuration files.  The second of each pair: what --tiny puts in place.
SD_UNET = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "norm_num_groups": 32,
    "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True,
}  # fmt: skip
SD_UNET_TINY = {
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": (1, 1, 2, 2), "cross_attention_dim": 32,
}  # fmt: skip
SD_TEXT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 512,
}  # fmt: skip
FLUX_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FLUX_T5 = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}  # fmt: skip
FLUX_T5_TINY = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
FLUX_TRANSFORMER = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
FLUX_TRANSFORMER_TINY = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
VAE_TINY = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SD_VAE = {"latent_channels": 4, "scaling_factor": 0.18215}
FLUX_VAE = {
    "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


def build_sd_turbo(tiny: bool) -> Any:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    return StableDiffusionPipeline(
        vae=AutoencoderKL(**{**VAE, **SD_VAE, **(VAE_TINY if tiny else {})}),
        text_encoder=CLIPTextModel(CLIPTextConfig(**{**SD_TEXT, **(TEXT_TINY if tiny else {})})),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(**{**SD_UNET, **(SD_UNET_TINY if tiny else {})}),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_flux_schnell(tiny: bool) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL(**{**VAE, **FLUX_VAE, **(VAE_TINY if tiny else {})}),
        text_encoder=CLIPTextModel(CLIPTextConfig(**{**FLUX_TEXT, **(TEXT_TINY if tiny else {})})),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(**{**FLUX_T5, **(FLUX_T5_TINY if tiny else {})})),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(**{**FLUX_TRANSFORMER, **(FLUX_TRANSFORMER_TINY if tiny else {})}),
    )


MODELS: dict[str, tuple[str, Callable[[bool], Any]]] = {
    "SD-Turbo": ("sd-turbo", build_sd_turbo),
    "FLUX.1-schnell": ("flux.1-schnell", build_flux_schnell),
}


def build(name: str, device: str, tiny: bool) -> Any:
    """The pipeline with random weights, made on the device: matrices normal with deviation 1/√fan-in, norms one."""
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            pipeline = MODELS[name][1](tiny)
    finally:
        torch.set_default_dtype(torch.float32)
    pipeline.to(device, torch.bfloat16)
    with torch.no_grad():
        for module in pipeline.components.values():
            for label, parameter in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.fill_(0.0 if label.endswith("bias") else 1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class GenerateBench(DeviceRows):
    """One model on one device: the loops to be compared, each over the same prompts."""

    def __init__(self, name: str, device: str, tiny: bool, batches: int, rounds: int) -> None:
        super().__init__(device, rounds)
        self.tiny, self.batches = tiny, batches
        preset = presets()[MODELS[name][0]]
        self.settings: Preset = (
            replace(preset, height=64, width=64, text_tokens=preset.text_tokens and 32) if tiny else preset
        )
        self.source = ModelSource(name=name, location=name, revision="random weights")
        self.pipeline = build(name, device, tiny)
        self.encoders = ThreadPoolExecutor(ENCODERS)

    def add(self, what: str, batch: int, run: Callable[[int], object]) -> None:
        """Adds a row for ``run(number of batches)``."""

        def timed() -> int:
            run(self.batches)
            return batch * self.batches

        self.measure(what, batch, timed, lambda: run(1 if self.tiny else 2))

    def upstream(self, batch: int) -> Callable[[int], object]:
        """The published loop: everything one after the other in one thread."""
        import torch

        settings = self.settings
        tokens = {"max_sequence_length": settings.text_tokens} if settings.text_tokens else {}

        def run(count: int) -> None:
            generator = torch.Generator("cpu").manual_seed(0)
            for number in range(count):
                images = self.pipeline(
                    prompt=_prompts(number, batch),
                    height=settings.height,
                    width=settings.width,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    generator=generator,
                    **tokens,
                ).images
                for image in images:
                    image.save(io.BytesIO(), format="JPEG", quality=QUALITY)

        return run

    def ours(self, batch: int, speed_ups: SpeedUps, text_batches: int, encode_in_line: bool) -> Callable[[int], object]:
        """The stage's way: ``speed_ups`` are applied on top of what earlier rows did to the pipeline."""
        import torch

        settings = replace(self.settings, batch_size=batch)
        backend = Backend(
            self.source, settings, speed_ups=speed_ups, device=self.device, threads=_threads(), pipeline=self.pipeline
        )

        def run(count: int) -> None:
            running: deque[list[Future[bytes]]] = deque()
            texts: Texts | None = None
            for number in range(count):
                prompts = _prompts(number, batch)
                if text_batches and number % text_batches == 0:
                    ahead = [p for i in range(text_batches) for p in _prompts(number + i, batch)]
                    texts = backend.encode(ahead, at_once=len(ahead))
                part = texts.part(number % text_batches * batch, batch) if texts else None
                requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
                images = backend.generate(requests, backend.call.width, backend.call.height, part)
                if backend.batch.limit(backend.call.width, backend.call.height) < batch:
                    raise torch.OutOfMemoryError  # it went on with half of it: not this row's batch
                if encode_in_line:
                    for index in range(batch):
                        _encode(images, index)
                    continue
                running.append([self.encoders.submit(_encode, images, index) for index in range(batch)])
                if len(running) > 1:
                    _ = [task.result() for task in running.popleft()]
            for tasks in running:
                _ = [task.result() for task in tasks]

        return run

    def all_rows(self, compile_how: Any) -> None:
        first = UPSTREAM_BATCH if not self.tiny else 2
        plain, compiled = SpeedUps(), SpeedUps(compile=compile_how)
        self.add("upstream's loop", first, self.upstream(first))
        self.add("own noise for each sample, bytes made on the device", first, self.ours(first, plain, 0, True))
        self.add("+ encoding in threads", first, self.ours(first, plain, 0, False))
        self.add("+ text embeddings ahead", first, self.ours(first, plain, TEXT_BATCHES, False))
        self.add("+ channels_last", first, self.ours(first, SpeedUps(channels_last=True), TEXT_BATCHES, False))
        self.add("+ fused projections", first, self.ours(first, SpeedUps(fuse_qkv=True), TEXT_BATCHES, False))
        self.add(f"+ compilation ({compile_how})", first, self.ours(first, compiled, TEXT_BATCHES, False))
        padded = replace(compiled, compile="none")  # the modules are compiled already; only other batch sizes follow
        for batch in BATCHES_TO_TRY if not self.tiny else (3,):
            self.add("all of it", batch, self.ours(batch, padded, TEXT_BATCHES, False))


def _prompts(number: int, batch: int) -> list[str]:
    return [PROMPT.format(number * batch + index) for index in range(batch)]


def _encode(images: Images, index: int) -> bytes:
    try:
        return encode_jpeg(images.image(index), QUALITY, GENERATED_XMP)
    except SampleError:  # random weights may overflow; the time is the same
        return b""


def _threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else len(os.sched_getaffinity(0))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--compile", choices=["none", "blocks", "full", "max"], default="blocks")
    parser.add_argument("--batches", type=int, default=8, help="batches a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser, compile="none", batches=1, rounds=1)
    quiet_libraries()
    import torch

    if not options.tiny and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured here (--tiny runs the code on the CPU)")
        return 0
    device = "cpu" if options.tiny else "cuda:0"
    for name in options.models:
        bench = GenerateBench(name, device, options.tiny, options.batches, options.rounds)
        bench.all_rows(options.compile)
        if bench.rows:
            bench.print(f"{name} on {device_name(device)}", "upstream's loop")
            best = bench.best
            ratio = best.rate / bench.rows[0].rate
            print(f"\nbest: batch {best.batch}, {best.rate:.2f} images/s, {ratio:.2f} times upstream's loop")
        del bench
        gc.collect()
        if not options.tiny:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
