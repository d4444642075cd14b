"""SCRFD-10GF as a torch network (Guo et al. 2021, arXiv:2105.04714), for the weights that DataComp detects faces with.

A residual network, a path-aggregation neck and one head for the strides 8, 16 and 32 with two anchors a cell;
parameters have the names of the published file.  Widths and depths are read from the tensors themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

STRIDES = (8, 16, 32)
_GROUPS = 16  # of the head's group normalisation
_IGNORED = re.compile(r"bbox_head\.integral\.project")  # of another kind of head


class _Residual(nn.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, width: int, stride: int, shrinks: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: Any = None
        if shrinks:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(pool, nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Backbone(nn.Module):  # type: ignore[misc]
    """Features at the strides 4, 8, 16 and 32."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        stem: list[Any] = []
        for number, stride in ((0, 2), (3, 1), (6, 1)):
            out, inputs = tensors[f"backbone.stem.{number}.weight"].shape[:2]
            stem += [nn.Conv2d(inputs, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        for stage in range(1, 5):
            blocks: list[Any] = []
            while (key := f"backbone.layer{stage}.{len(blocks)}.conv1.weight") in tensors:
                width, inputs = tensors[key].shape[:2]
                shrinks = key.replace("conv1", "downsample.1") in tensors
                blocks.append(_Residual(inputs, width, 2 if stage > 1 and not blocks else 1, shrinks))
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x: Any) -> list[Any]:
        x = functional.max_pool2d(self.stem(x), 2, 2)
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found


def _plain(tensor: Any, stride: int = 1) -> Any:
    """A convolution with a bias, under the name ``conv``."""
    out, inputs, kernel, _ = tensor.shape
    return nn.ModuleDict({"conv": nn.Conv2d(inputs, out, kernel, stride, kernel // 2)})


class _Neck(nn.Module):  # type: ignore[misc]
    """Down the pyramid, and up again (Liu et al. 2018, arXiv:1803.01534), over the strides 8, 16 and 32."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        for name, count, stride in (
            ("lateral_convs", 3, 1),
            ("fpn_convs", 3, 1),
            ("downsample_convs", 2, 2),
            ("pafpn_convs", 2, 1),
        ):
            parts = [_plain(tensors[f"neck.{name}.{i}.conv.weight"], stride) for i in range(count)]
            self.add_module(name, nn.ModuleList(parts))

    def forward(self, features: list[Any]) -> list[Any]:
        found = [part["conv"](x) for part, x in zip(self.lateral_convs, features[1:], strict=True)]
        for i in (1, 0):
            found[i] = found[i] + functional.interpolate(found[i + 1], size=found[i].shape[2:], mode="nearest")
        found = [part["conv"](x) for part, x in zip(self.fpn_convs, found, strict=True)]
        for i in (0, 1):
            found[i + 1] = found[i + 1] + self.downsample_convs[i]["conv"](found[i])
        return [found[0], *(self.pafpn_convs[i]["conv"](found[i + 1]) for i in (0, 1))]


class _Scale(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class _Head(nn.Module):  # type: ignore[misc]
    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        layers: list[Any] = []
        while (key := f"bbox_head.cls_stride_convs.0.{len(layers)}.conv.weight") in tensors:
            out, inputs = tensors[key].shape[:2]
            convolution = nn.Conv2d(inputs, out, 3, padding=1, bias=False)
            layers.append(nn.ModuleDict({"conv": convolution, "gn": nn.GroupNorm(_GROUPS, out)}))
        self.cls_stride_convs = nn.ModuleDict({"0": nn.ModuleList(layers)})
        for name in ("stride_cls", "stride_reg"):
            out, inputs = tensors[f"bbox_head.{name}.0.weight"].shape[:2]
            self.add_module(name, nn.ModuleDict({"0": nn.Conv2d(inputs, out, 3, padding=1)}))
        self.scales = nn.ModuleList(_Scale() for _ in STRIDES)

    def forward(self, features: list[Any]) -> tuple[list[Any], list[Any]]:
        scores, distances = [], []
        for x, scale in zip(features, self.scales, strict=True):
            for layer in self.cls_stride_convs["0"]:
                x = functional.relu(layer["gn"](layer["conv"](x)))
            score = self.stride_cls["0"](x).sigmoid()
            reach = self.stride_reg["0"](x) * scale.scale
            scores.append(score.permute(0, 2, 3, 1).flatten(1))
            distances.append(reach.permute(0, 2, 3, 1).reshape(len(reach), -1, 4))
        return scores, distances


class ScrfdNetwork(nn.Module):  # type: ignore[misc]
    """samples × 3 × side × side, −1 to 1 → for each stride the scores (samples × anchors) and, in steps of the stride,
    the distances of the four sides from the anchor (samples × anchors × 4)."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self.backbone, self.neck, self.bbox_head = _Backbone(tensors), _Neck(tensors), _Head(tensors)

    def forward(self, pictures: Any) -> tuple[list[Any], list[Any]]:
        found: tuple[list[Any], list[Any]] = self.bbox_head(self.neck(self.backbone(pictures)))
        return found


def build(tensors: Mapping[str, Any]) -> ScrfdNetwork:
    """The network that the tensors are of, ready to answer.

    Raises KeyError, ValueError or RuntimeError where they are of none.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _IGNORED.match(name)}
    with torch.device("meta"):
        network = ScrfdNetwork(tensors)
    network.load_state_dict(tensors, assign=True)
    network.eval()
    return network
