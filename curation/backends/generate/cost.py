"""What a picture costs: the floating-point operations of one, counted by torch while the pipeline makes it."""

from __future__ import annotations

from typing import Any

from curation.backends.generate.calls import PipelineCall, denoiser_of
from curation.options import logger

_MOST_ON_CPU = 0.5e9  # parameters of a denoiser whose one step takes seconds on a CPU


def tflop_a_picture(call: PipelineCall, *, on_cpu: bool) -> float | None:
    """Count the floating-point operations of one picture (2 for a multiplication with an addition).

    One picture is made with one step, on the device.  The denoiser's share counts as many times as there are steps.

    Args:
        call: The pipeline's call with its settings.
        on_cpu: The device is a CPU, where one step of a large model would take too long.

    Returns:
        In 1e12 operations; None where this pipeline cannot be counted so.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    pipeline = call.pipeline
    denoiser = denoiser_of(pipeline)
    if on_cpu and sum(parameter.numel() for parameter in denoiser.parameters()) > _MOST_ON_CPU:
        return None
    arguments: dict[str, Any] = call.arguments(["a photo"], 1) | {"num_inference_steps": 1}
    generator = torch.Generator("cpu").manual_seed(0)
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            pipeline(width=call.width, height=call.height, generator=[generator], output_type="pt", **arguments)
    except Exception as error:  # noqa: BLE001  # the figure is for information; the first batch tells of real trouble
        logger.debug(f"{call.name}: its operations cannot be counted: {error!r}")
        return None
    of_denoiser = sum(counter.get_flop_counts().get(type(denoiser).__name__, {}).values())
    total = counter.get_total_flops() + (call.steps - 1) * of_denoiser
    return total / 1e12 if total else None
