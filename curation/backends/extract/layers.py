"""Networks as functions of named tensors: layers of torch found by the names that a published file gives their weights.

For architectures that are a hundred lines by themselves and come in packages that this project cannot have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from curation.errors import InfrastructureError

_COUNTERS = ".num_batches_tracked"  # of training, in every batch normalisation


Network = TypeVar("Network")


def built(network: Callable[[Any], Network], tensors: Any, directive: str, path: Path) -> Network:
    """Make a network of a file's tensors.

    Args:
        network: Its class.
        tensors: What the file holds.
        directive: The directive that it is for, for the message.
        path: The file.

    Raises:
        InfrastructureError: The tensors are of another network.
    """
    try:
        return network(tensors)
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())[:300]
        raise InfrastructureError(f"{directive}: {path} holds another network's weights: {line}") from error


def has_16_bits(dtype: Any) -> bool:
    """Whether a dtype of torch is a floating-point one of 16 bits."""
    return bool(dtype.itemsize == 2)


def channels_last(tensor: Any) -> Any:
    """The same samples × channels × height × width, with the channels of a place side by side in memory."""
    import torch

    return tensor.contiguous(memory_format=torch.channels_last)


class NamedTensors:
    """The tensors of a file, and each kind of layer as a function of the name of one and its input.

    A name that the file does not have is a KeyError; which names were used is remembered for ``unused``.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        from torch.nn import functional

        self._functional = functional
        self._tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTERS)}
        self._used: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        self._used.add(name)
        return self._tensors[name]

    def _optional(self, name: str) -> Any | None:
        return self[name] if name in self._tensors else None

    def names(self) -> list[str]:
        return list(self._tensors)

    def unused(self) -> list[str]:
        """Names that no layer has asked for yet."""
        return sorted(self._tensors.keys() - self._used)

    def move(self, device: str, dtype: Any) -> None:
        """To where and in what they are computed: in 16 bits with the channels last in memory, which tensor cores want;
        float32 is the reference and stays as it is."""
        self._tensors = {name: tensor.to(device, dtype) for name, tensor in self._tensors.items()}
        if has_16_bits(dtype):
            for name, tensor in self._tensors.items():
                if tensor.ndim == 4:
                    self._tensors[name] = channels_last(tensor)

    def convolution(self, name: str, x: Any, stride: int = 1, *, same: bool = False, is_depthwise: bool = False) -> Any:
        """Padded by half the kernel; same: as TensorFlow does it, with stride 2 one more below and right."""
        weight = self[f"{name}.weight"]
        bias = self._optional(f"{name}.bias")
        groups = weight.shape[0] if is_depthwise else 1
        kernel = weight.shape[2]
        if not same:
            return self._functional.conv2d(x, weight, bias, stride, kernel // 2, groups=groups)
        pads: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if any(pads):
            x = self._functional.pad(x, pads)
        return self._functional.conv2d(x, weight, bias, stride, groups=groups)

    def batch_norm(self, name: str, x: Any, epsilon: float = 1e-5) -> Any:
        mean, variance, weight, bias = (
            self[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return self._functional.batch_norm(x, mean, variance, weight, bias, eps=epsilon)

    def group_norm(self, name: str, x: Any, groups: int) -> Any:
        return self._functional.group_norm(x, groups, self[f"{name}.weight"], self[f"{name}.bias"])

    def linear(self, name: str, x: Any) -> Any:
        return self._functional.linear(x, self[f"{name}.weight"])
