"""SCRFD-10GF as a torch network (Guo et al. 2021, arXiv:2105.04714), for the weights that DataComp detects faces with.

A residual network, a path-aggregation neck (Liu et al. 2018, arXiv:1803.01534) and one head for the strides 8, 16 and
32 with two anchors a cell.  Tensors have the names of the published file; depths and widths are their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curation.backends.named_tensors import NamedTensors

_GROUPS = 16  # of the head's group normalisation
_IGNORED = ["bbox_head.integral.project"]  # of another kind of head
_TRIAL_SIDE = 64


class ScrfdNetwork:
    """samples × 3 × side × side, −1 to 1 → for each stride the scores (samples × anchors) and, in steps of the stride,
    the distances of the four sides from the anchor (samples × anchors × 4)."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """Raises KeyError, ValueError or RuntimeError where the tensors are of no such network."""
        import torch

        self._functional = torch.nn.functional
        self._layers = NamedTensors(tensors)
        with torch.inference_mode():
            self(torch.zeros(1, 3, _TRIAL_SIDE, _TRIAL_SIDE))  # tensors of another shape are told now
        if unused := [name for name in self._layers.unused() if name not in _IGNORED]:
            raise ValueError(f"tensors that it has no place for: {', '.join(unused[:3])}")

    def move(self, device: str, dtype: Any) -> None:
        self._layers.move(device, dtype)

    def __call__(self, pictures: Any) -> tuple[list[Any], list[Any]]:
        scores, distances = [], []
        for number, features in enumerate(self._neck(self._backbone(pictures))):
            score, reach = self._head(features, number)
            scores.append(score.permute(0, 2, 3, 1).flatten(1))
            distances.append(reach.permute(0, 2, 3, 1).reshape(len(reach), -1, 4))
        return scores, distances

    def _activated(self, convolution: str, norm: str, x: Any, stride: int = 1) -> Any:
        return self._functional.relu(self._layers.batch_norm(norm, self._layers.convolution(convolution, x, stride)))

    def _backbone(self, x: Any) -> list[Any]:
        """Features at the strides 8, 16 and 32."""
        for number, stride in ((0, 2), (3, 1), (6, 1)):
            x = self._activated(f"backbone.stem.{number}", f"backbone.stem.{number + 1}", x, stride)
        x = self._functional.max_pool2d(x, 2, 2)
        found = []
        for stage in range(1, 5):
            block = 0
            while f"backbone.layer{stage}.{block}.conv1.weight" in self._layers:
                x = self._residual(f"backbone.layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
                block += 1
            found.append(x)
        return found[1:]

    def _residual(self, name: str, x: Any, stride: int) -> Any:
        y = self._activated(f"{name}.conv1", f"{name}.bn1", x, stride)
        y = self._layers.batch_norm(f"{name}.bn2", self._layers.convolution(f"{name}.conv2", y))
        if f"{name}.downsample.1.weight" in self._layers:
            x = self._functional.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
            x = self._layers.batch_norm(f"{name}.downsample.2", self._layers.convolution(f"{name}.downsample.1", x))
        return self._functional.relu(y + x)

    def _neck(self, features: list[Any]) -> list[Any]:
        """Down the pyramid, and up again."""
        layers = self._layers
        found = [layers.convolution(f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(features)]
        for i in (1, 0):
            found[i] = found[i] + self._functional.interpolate(found[i + 1], size=found[i].shape[2:], mode="nearest")
        found = [layers.convolution(f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(found)]
        for i in (0, 1):
            found[i + 1] = found[i + 1] + layers.convolution(f"neck.downsample_convs.{i}.conv", found[i], 2)
        return [found[0], *(layers.convolution(f"neck.pafpn_convs.{i}.conv", found[i + 1]) for i in (0, 1))]

    def _head(self, x: Any, number: int) -> tuple[Any, Any]:
        layer = 0
        while f"{(name := f'bbox_head.cls_stride_convs.0.{layer}')}.conv.weight" in self._layers:
            x = self._layers.group_norm(f"{name}.gn", self._layers.convolution(f"{name}.conv", x), _GROUPS)
            x = self._functional.relu(x)
            layer += 1
        reach = self._layers.convolution("bbox_head.stride_reg.0", x)
        score = self._layers.convolution("bbox_head.stride_cls.0", x).sigmoid()
        return score, reach * self._layers[f"bbox_head.scales.{number}.scale"]
