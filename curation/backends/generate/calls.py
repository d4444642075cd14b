"""How a pipeline is called: which arguments it takes, what its text encoders return, and what sizes it can make.

diffusers only logs a warning about an argument that a pipeline does not know, so that a negative prompt could be
ignored for a million pictures; here that is an error before the first one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curation.backends.generate.presets import Preset, text_results
from curation.errors import InfrastructureError, UsageError

# The scales of a pipeline that is made of two: its prior reads the negative prompt too.
COMBINED_SCALES = ("guidance_scale", "prior_guidance_scale", "decoder_guidance_scale")


@dataclass(frozen=True, slots=True)
class Texts:
    """Text embeddings of some prompts, one row a prompt, under the names that the pipeline's call takes."""

    values: Mapping[str, Any]  # tensors with the prompts along dimension 0, or lists of tensors
    count: int

    def rows(self, indices: Sequence[int]) -> dict[str, Any]:
        """The arguments for a batch of these prompts, in the order of ``indices`` (one may come twice, as padding)."""
        chosen = list(indices)
        return {
            name: [value[i] for i in chosen] if isinstance(value, list) else value[chosen]
            for name, value in self.values.items()
        }

    def part(self, start: int, count: int) -> Texts:
        """The embeddings of ``count`` prompts from the ``start``-th on."""
        return Texts({name: value[start : start + count] for name, value in self.values.items()}, count)

    @staticmethod
    def join(parts: Sequence[Texts]) -> Texts:
        """The embeddings of prompts that were encoded in several calls, in order."""
        import torch

        values: dict[str, Any] = {}
        for name, first in parts[0].values.items():
            found = [part.values[name] for part in parts]
            values[name] = [row for rows in found for row in rows] if isinstance(first, list) else torch.cat(found)
        return Texts(values, sum(part.count for part in parts))


class PipelineCall:
    """A pipeline's call with every setting resolved: ``steps``, ``guidance``, ``width`` and ``height`` are numbers.

    negative_prompt: empty where it would have no effect.  true_cfg_scale: None where it has no effect.
    warnings: what the user should know and is no error.
    Raises UsageError for a setting that this pipeline has no argument for or a size that it cannot make, and
    InfrastructureError for a pipeline that is none from text to images.
    """

    def __init__(self, pipeline: Any, settings: Preset, negative_prompt: str = "") -> None:
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        self.warnings: list[str] = []
        self._parameters = inspect.signature(pipeline.__call__).parameters
        for needed in ("prompt", "height", "width", "num_inference_steps", "generator", "output_type"):
            if needed not in self._parameters:
                raise InfrastructureError(
                    f"--model {settings.model}: {self.name} is no text-to-image pipeline (its call takes no {needed})"
                )
        self.steps: int = settings.steps or self._default("num_inference_steps", 0)
        self.guidance: float | None = settings.guidance
        if self.guidance is None:
            self.guidance = self._default("guidance_scale", None)
        self.size_multiple, self.bucket_multiple = size_multiples(pipeline)
        self.height = settings.height or self._default_side("height")
        self.width = settings.width or self._default_side("width")
        self.check_size(self.width, self.height)
        self.text_tokens: int | None = settings.text_tokens or self._default("max_sequence_length", None)
        true_cfg_scale = settings.true_cfg_scale
        self._fixed = self._fixed_arguments(settings)
        self._true_cfg_asked = true_cfg_scale is not None and true_cfg_scale > 1
        scale = self._default("true_cfg_scale", None) if true_cfg_scale is None else true_cfg_scale
        self.negative_prompt = self._effective_negative(negative_prompt, scale)
        self.true_cfg_scale: float | None = scale if self.negative_prompt or self._true_cfg_asked else None
        self._warn_of_guidance(settings.guidance)

    def check_size(self, width: int, height: int) -> None:
        """Raise UsageError where the pipeline would quietly make another size."""
        step = self.size_multiple
        if width % step or height % step or min(width, height) < step:
            near = [max(step, round(side / step) * step) for side in (width, height)]
            raise UsageError(
                f"--width {width} --height {height}: {self.name} makes sides that are multiples of {step}; "
                f"the nearest are --width {near[0]} --height {near[1]}"
            )

    def arguments(self, prompts: Sequence[str] | None, count: int) -> dict[str, Any]:
        """The call's arguments for ``count`` pictures, all but size and generators.

        prompts: None where embeddings are given instead.  A fresh list each time: ZImagePipeline writes its chat
        template into the caller's.
        """
        arguments = dict(self._fixed)
        if prompts is not None:
            arguments["prompt"] = list(prompts)
        if prompts is None and "negative_prompt_embeds" in text_results()[self.name]:
            arguments["negative_prompt"] = None  # Sana's default is a text, which may not come beside its embeddings
        elif self._has_negative:
            arguments["negative_prompt"] = [self.negative_prompt] * count
        return arguments

    @property
    def _has_negative(self) -> bool:
        """Guidance by --true_cfg_scale takes place only against a negative prompt, which may be empty."""
        return bool(self.negative_prompt) or self._true_cfg_asked

    @property
    def takes_step_callback(self) -> bool:
        return "callback_on_step_end" in self._parameters

    @property
    def can_encode_ahead(self) -> bool:
        """Whether this pipeline's text embeddings can be made before its call."""
        return self.name in text_results()

    def encode(self, prompts: Sequence[str]) -> Texts:
        """The prompts' embeddings, exactly those that the call would make for this batch."""
        pairs = zip(text_results()[self.name], self.encode_prompt(prompts), strict=True)
        # an absent negative is None or, in ZImagePipeline, an empty list
        values = {name: value for name, value in pairs if name and value is not None and len(value)}
        return Texts(values, len(prompts))

    def encode_prompt(self, prompts: Sequence[str]) -> Any:
        """What the pipeline's own ``encode_prompt`` returns, called as the pipeline's call does."""
        import torch

        pipeline = self.pipeline
        pipeline._guidance_scale = self.guidance  # the call sets it before it asks do_classifier_free_guidance
        known: dict[str, Any] = {
            "prompt": list(prompts),
            "device": pipeline._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": getattr(pipeline, "do_classifier_free_guidance", False),
            **self._fixed,
        }
        if self.negative_prompt:
            known["negative_prompt"] = [self.negative_prompt] * len(prompts)
        arguments: dict[str, Any] = {}
        for name, parameter in inspect.signature(pipeline.encode_prompt).parameters.items():
            if name in known:
                arguments[name] = known[name]
            elif name in ("prompt_2", "prompt_3") and parameter.default is parameter.empty:
                arguments[name] = None  # StableDiffusion3Pipeline's; None is the first prompt again
            elif (own := self._default(name, None)) is not None:  # Sana's instruction to its text encoder
                arguments[name] = own
        with torch.no_grad():
            return pipeline.encode_prompt(**arguments)

    def _fixed_arguments(self, settings: Preset) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "num_inference_steps": self.steps or None,
            "guidance_scale": self.guidance,
            "true_cfg_scale": settings.true_cfg_scale,
            "max_sequence_length": settings.text_tokens,
            **settings.extra,
        }
        arguments = {name: value for name, value in wanted.items() if value is not None}
        unknown = [name for name in arguments if name not in self._parameters]
        if unknown:
            raise UsageError(f"--model {settings.model}: {self.name} takes no {', '.join(unknown)}")
        if "intermediate_timesteps" in self._parameters and self.steps != 2:  # SANA-Sprint's is for two steps only
            arguments["intermediate_timesteps"] = None
        return arguments

    def _effective_negative(self, negative_prompt: str, true_cfg_scale: float | None) -> str:
        """The negative prompt, empty with a warning where it would be ignored."""
        if "negative_prompt" not in self._parameters:
            if negative_prompt:
                raise UsageError(f"--negative_prompt: {self.name} takes none")
            return ""
        scales = {"guidance_scale": self.guidance, "true_cfg_scale": true_cfg_scale}
        if not negative_prompt or uses_negative_prompt(self.pipeline, scales):
            return negative_prompt
        flag, value = ("guidance", self.guidance) if true_cfg_scale is None else ("true_cfg_scale", true_cfg_scale)
        self.warnings.append(f"--negative_prompt has no effect: {self.name} ignores it at --{flag} {value}")
        return ""

    def _warn_of_guidance(self, given: float | None) -> None:
        """Tell of a guidance scale that nothing reads; 0 and 1 are the usual ways to say that there is none."""
        if given in (None, 0, 1):
            return
        pipeline = self.pipeline
        config = getattr(denoiser_of(pipeline), "config", None)
        embeds = getattr(config, "guidance_embeds", None)
        embeds = getattr(config, "time_cond_proj_dim", None) is not None if embeds is None else embeds
        guided = getattr(pipeline, "do_classifier_free_guidance", None)
        if guided is None:  # only a transformer that is meant to read it says whether it does
            guided = getattr(config, "guidance_embeds", None) is None
        if not guided and not embeds:
            self.warnings.append(f"--guidance {given} has no effect: {self.name} does not read it with this model")

    def _default(self, name: str, otherwise: Any) -> Any:
        parameter = self._parameters.get(name)
        if parameter is None or parameter.default is inspect.Parameter.empty:
            return otherwise
        return parameter.default

    def _default_side(self, name: str) -> int:
        """What the pipeline itself would make: its signature says, or its denoiser's configuration."""
        if isinstance(side := self._default(name, None), int):
            return side
        scale = getattr(self.pipeline, "vae_scale_factor", 8)
        denoiser = denoiser_of(self.pipeline)
        latent = getattr(self.pipeline, "default_sample_size", None) or getattr(denoiser.config, "sample_size", None)
        return int(latent) * scale if isinstance(latent, int) else 1024


def uses_negative_prompt(pipeline: Any, scales: Mapping[str, float | None]) -> bool:
    """Whether a pipeline whose call takes a negative prompt reads it.

    A pipeline that takes ``true_cfg_scale`` (for guidance-distilled models) does so above 1, at any ``guidance_scale``.
    One with the property ``do_classifier_free_guidance`` says so itself, unless its call has a variable of that name,
    which then counts (the property of StableDiffusionPanoramaPipeline is always false).  All others follow the
    definition of classifier-free guidance, which does nothing at a scale of 1: they do so if any of their scales is
    above 1.  Where no scale is known the negative prompt is passed on.

    Args:
        pipeline: The pipeline.
        scales: Values for the scales of its call; others have the call's defaults.
    """
    parameters = inspect.signature(pipeline.__call__).parameters

    def scale(name: str) -> Any:
        given = scales.get(name)
        return parameters[name].default if given is None else given

    if "true_cfg_scale" in parameters:
        value = scale("true_cfg_scale")
        return isinstance(value, (int, float)) and value > 1
    own = "do_classifier_free_guidance" in inspect.unwrap(type(pipeline).__call__).__code__.co_varnames
    if hasattr(type(pipeline), "do_classifier_free_guidance") and not own:
        if "guidance_scale" in parameters:
            pipeline._guidance_scale = scale("guidance_scale")  # the call sets it before it asks the property
        return bool(pipeline.do_classifier_free_guidance)
    names = COMBINED_SCALES if hasattr(pipeline, "prior_pipe") else ("guidance_scale",)
    known = [scale(name) for name in names if name in parameters]
    values = [value for value in known if isinstance(value, (int, float))]
    return not values or max(values) > 1


def denoiser_of(pipeline: Any) -> Any:
    """The network that is called once a step: a transformer or a UNet."""
    found = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    if found is None:
        raise InfrastructureError(f"{type(pipeline).__name__} has neither a transformer nor a unet")
    return found


def size_multiples(pipeline: Any) -> tuple[int, int]:
    """(what every side must be a multiple of, what it should be where the size is free to choose), in pixels.

    The first is the VAE's factor times the patch of a transformer, as the pipeline's image processor knows it.  A
    UNet also halves its latents at every level, and cuts and pads at sides that do not divide evenly.
    """
    processor = getattr(pipeline, "image_processor", None)
    known = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
    factor = int(known) if known else int(getattr(pipeline, "vae_scale_factor", 8))
    unet = getattr(pipeline, "unet", None)
    levels = len(unet.config.down_block_types) if unet is not None else 1
    return factor, factor * 2 ** (levels - 1)
