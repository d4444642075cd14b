"""The network of the image-similarity challenge's descriptor: EfficientNetV2, pooling, 256 numbers of length one.

EfficientNetV2 is Tan and Le 2021 (arXiv:2104.00298) in TensorFlow's variant ("same" padding, ε = 0.001); parameters
have the names that timm gives them, as in the published file.  Depths and widths are read from the tensors themselves,
so that the sizes S, M, L and XL load alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the stages; S has the first six
_EPSILON = 1e-3
_PREFIX = "backbone.blocks."


class SameConv(nn.Conv2d):  # type: ignore[misc]
    """A convolution padded as TensorFlow's "same": with stride 2 one more below and right than above and left."""

    def forward(self, x: Any) -> Any:
        pads: list[int] = []
        for size, kernel, stride in zip(reversed(x.shape[2:]), self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, pads) if any(pads) else x)


def _convolution(weight: Any, stride: int = 1, groups: int = 1) -> SameConv:
    out, inputs, kernel, _ = weight.shape
    return SameConv(inputs * groups, out, kernel, stride, groups=groups, bias=False)


class _Gate(nn.Module):  # type: ignore[misc]
    """Squeeze and excite."""

    def __init__(self, inputs: int, squeezed: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(inputs, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, inputs, 1)

    def forward(self, x: Any) -> Any:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(functional.silu(self.conv_reduce(pooled))).sigmoid()


class _Block(nn.Module):  # type: ignore[misc]
    """One block of any of the three kinds; which convolutions it has is which tensors there are."""

    def __init__(self, tensors: Mapping[str, Any], stride: int) -> None:
        super().__init__()
        if "conv.weight" in tensors:
            order = ["conv"]
        elif "conv_exp.weight" in tensors:
            order = ["conv_exp", "conv_pwl"]
        else:
            order = ["conv_pw", "conv_dw", "conv_pwl"]
        strided = "conv_dw" if "conv_dw" in order else order[0]
        for number, name in enumerate(order, 1):
            weight = tensors[f"{name}.weight"]
            groups = weight.shape[0] if name == "conv_dw" else 1
            self.add_module(name, _convolution(weight, stride if name == strided else 1, groups))
            self.add_module(f"bn{number}", nn.BatchNorm2d(weight.shape[0], eps=_EPSILON))
        if "se.conv_reduce.weight" in tensors:
            squeezed, inputs = tensors["se.conv_reduce.weight"].shape[:2]
            self.se = _Gate(inputs, squeezed)
        self._order = order
        inputs = tensors[f"{order[0]}.weight"].shape[1]
        self._has_shortcut = stride == 1 and inputs == tensors[f"{order[-1]}.weight"].shape[0]

    def forward(self, x: Any) -> Any:
        y = x
        for number, name in enumerate(self._order, 1):
            if name == "conv_pwl" and hasattr(self, "se"):
                y = self.se(y)
            y = getattr(self, f"bn{number}")(getattr(self, name)(y))
            if name != "conv_pwl":
                y = functional.silu(y)
        return x + y if self._has_shortcut else y


class _Backbone(nn.Module):  # type: ignore[misc]
    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        stem = tensors["backbone.conv_stem.weight"]
        self.conv_stem = _convolution(stem, stride=2)
        self.bn1 = nn.BatchNorm2d(stem.shape[0], eps=_EPSILON)
        stages: dict[int, dict[int, dict[str, Any]]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_PREFIX):
                stage, block, rest = name.removeprefix(_PREFIX).split(".", 2)
                stages.setdefault(int(stage), {}).setdefault(int(block), {})[rest] = tensor
        if not stages or max(stages) >= len(STRIDES):
            raise ValueError(f"{len(stages)} stages; EfficientNetV2 has six or seven")
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(*(_Block(blocks[j], STRIDES[i] if j == 0 else 1) for j in sorted(blocks)))
                for i, blocks in sorted(stages.items())
            )
        )

    def forward(self, x: Any) -> Any:
        return self.blocks(functional.silu(self.bn1(self.conv_stem(x))))


class IscNetwork(nn.Module):  # type: ignore[misc]
    """Pictures (samples × 3 × side × side, −1 to 1) → descriptors of length one."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self.backbone = _Backbone(tensors)
        width, channels = tensors["fc.weight"].shape
        self.fc = nn.Linear(channels, width, bias=False)
        self.bn = nn.BatchNorm1d(width)
        self.width = int(width)

    def forward(self, pictures: Any) -> Any:
        # GeM pooling with p = 1, which is what upstream's create_model takes for inference: a mean.
        pooled = self.backbone(pictures).clamp(min=1e-6).mean((2, 3))
        return functional.normalize(self.bn(self.fc(pooled)))


def build(tensors: Mapping[str, Any]) -> IscNetwork:
    """The network that the tensors are of, ready to answer.

    Raises KeyError, ValueError, IndexError or RuntimeError where they are of none.
    """
    with torch.device("meta"):  # no time for random weights that nobody sees
        network = IscNetwork(tensors)
    network.load_state_dict(tensors, assign=True)
    network.eval()
    return network


def clean_names(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Without the prefix of the wrapper that it was trained in."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
