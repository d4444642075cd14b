"""Checkpoints whose weights are kept in few bits: AWQ, FP8 and others that transformers can load."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from curation.errors import InfrastructureError, UsageError, install

# The packages that transformers wants for a kind, as modules; what is not here needs accelerate alone.
_NEEDS = {
    "awq": ("gptqmodel",),
    "gptq": ("gptqmodel", "optimum"),
    "compressed-tensors": ("compressed_tensors",),
    "auto-round": ("auto_round",),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "quanto": ("optimum",),
    "hqq": ("hqq",),
}
_ON_GPUS = ("awq", "gptq")  # their kernels want one
_INSTEAD = "take the checkpoint that is not quantised, or a model server: --model endpoint:<its name there>"


def method_of(config: Any) -> str | None:
    """The kind of a checkpoint's quantisation, None where it has none.

    Args:
        config: Of the model.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        settings = getattr(getattr(config, "text_config", None), "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")[:40]


def check(model: str, method: str, device: str, asked: str | None) -> None:
    """Whether a quantised checkpoint can be loaded here.

    Args:
        model: What the user gave.
        method: From ``method_of``.
        device: On which it will compute.
        asked: The value of ``--quantize``.

    Raises:
        UsageError: It would be quantised twice.
        InfrastructureError: A package is missing, or the device cannot compute with such weights.
    """
    if asked:
        raise UsageError(f"--quantize {asked}: the weights of {model} are quantised already ({method}); leave it out")
    missing = [name for name in (*_NEEDS.get(method, ()), "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InfrastructureError(
            f"--model {model}: its weights are quantised ({method}), which needs the package "
            f"{missing[0].replace('_', '-')}: {install(missing[0])}; or {_INSTEAD}"
        )
    if method in _ON_GPUS and device == "cpu":
        raise InfrastructureError(
            f"--model {model}: its weights are quantised ({method}), and only a GPU computes with them; {_INSTEAD}"
        )
