"""The network of the image-similarity challenge's descriptor: EfficientNetV2, pooling, 256 numbers of length one.

EfficientNetV2 is Tan and Le 2021 (arXiv:2104.00298) in TensorFlow's variant ("same" padding, ε = 0.001); tensors have
the names that timm gives them, as in the published file.  Depths and widths are the tensors' own, so that the sizes S,
M, L and XL load alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from curation.backends.named_tensors import NamedTensors

STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the stages; S has the first six
_EPSILON = 1e-3
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.(\d+)\.")
_TRIAL_SIDE = 64


class IscNetwork:
    """Pictures (samples × 3 × side × side, −1 to 1) → descriptors of length one."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """tensors: under the published names, or those of the wrapper that it was trained in.

        Raises KeyError, ValueError or RuntimeError where they are of no such network.
        """
        import torch

        self._functional = torch.nn.functional
        self._layers = NamedTensors({name.removeprefix("module."): tensor for name, tensor in tensors.items()})
        found = {(int(m[1]), int(m[2])) for name in self._layers.names() if (m := _BLOCK.match(name))}
        self._blocks = sorted(found)
        if not found or max(found)[0] >= len(STRIDES):
            raise ValueError("no blocks of EfficientNetV2, which has six or seven stages")
        self.width = int(self._layers["fc.weight"].shape[0])
        with torch.inference_mode():
            self(torch.zeros(1, 3, _TRIAL_SIDE, _TRIAL_SIDE))  # tensors of another shape are told now
        if unused := self._layers.unused():
            raise ValueError(f"tensors that it has no place for: {', '.join(unused[:3])}")

    def move(self, device: str, dtype: Any) -> None:
        self._layers.move(device, dtype)

    def __call__(self, pictures: Any) -> Any:
        layers = self._layers
        x = layers.convolution("backbone.conv_stem", pictures, 2, same=True)
        x = self._functional.silu(layers.batch_norm("backbone.bn1", x, _EPSILON))
        for stage, block in self._blocks:
            x = self._block(f"backbone.blocks.{stage}.{block}", x, STRIDES[stage] if block == 0 else 1)
        # GeM pooling with p = 1, which is what upstream's create_model takes for inference: a mean.
        pooled = x.clamp(min=1e-6).mean((2, 3))
        return self._functional.normalize(layers.batch_norm("bn", layers.linear("fc", pooled)))

    def _block(self, name: str, x: Any, stride: int) -> Any:
        """Any of the three kinds; which convolutions it has is which tensors there are."""
        if f"{name}.conv.weight" in self._layers:
            order = ["conv"]
        elif f"{name}.conv_exp.weight" in self._layers:
            order = ["conv_exp", "conv_pwl"]
        else:
            order = ["conv_pw", "conv_dw", "conv_pwl"]
        strided = "conv_dw" if "conv_dw" in order else order[0]
        y = x
        for number, part in enumerate(order, 1):
            if part == "conv_pwl" and f"{name}.se.conv_reduce.weight" in self._layers:
                y = self._gated(f"{name}.se", y)
            own = stride if part == strided else 1
            y = self._layers.convolution(f"{name}.{part}", y, own, same=True, is_depthwise=part == "conv_dw")
            y = self._layers.batch_norm(f"{name}.bn{number}", y, _EPSILON)
            if part != "conv_pwl":
                y = self._functional.silu(y)
        return x + y if stride == 1 and x.shape[1] == y.shape[1] else y

    def _gated(self, name: str, x: Any) -> Any:
        """Squeeze and excite."""
        squeezed = self._layers.convolution(f"{name}.conv_reduce", x.mean((2, 3), keepdim=True))
        return x * self._layers.convolution(f"{name}.conv_expand", self._functional.silu(squeezed)).sigmoid()
