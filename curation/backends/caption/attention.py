"""Attention of image encoders over many short rows: one call for all rows of one length.

The encoders of Qwen look at each image apart from the rest, and those of Qwen2.5-VL in most layers at each window of
8×8 patches.  transformers calls its attention once for each of them (without flash-attn), which is thousands of calls a
layer for a batch of large images.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

# transformers gives all rows at once, with their ends, to implementations that have "flash" in their name.
ALL_ROWS = "flash_free_rows"


def attend_by_length(model: Any) -> int:
    """Let the image encoder of a model that uses torch's attention call it once for each length of its rows.

    The numbers are the same up to rounding, since other kernels may be chosen for more rows.

    Returns:
        How many modules do that from now on.
    """
    from transformers import AttentionInterface

    rows = Rows()
    AttentionInterface.register(ALL_ROWS, rows)
    changed = [
        module
        for module in model.modules()
        if "cu_seqlens" in inspect.signature(type(module).forward).parameters
        and getattr(getattr(module, "config", None), "_attn_implementation", None) in ("sdpa", ALL_ROWS)
    ]
    for module in changed:
        module.config._attn_implementation = ALL_ROWS
    return len(changed)


class Rows:
    """What transformers calls in the place of flash attention: 1 × heads × places × width, and where the rows end."""

    def __init__(self) -> None:
        self._plans: list[tuple[Any, list[Any]]] = []

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, *, scaling: float, cu_seq_lens_q: Any, **_: Any
    ) -> tuple[Any, None]:
        """Attend within each row.  Returns 1 × places × heads × width."""
        import torch

        joined = torch.empty_like(query[0].transpose(0, 1))
        for places in self._plan(cu_seq_lens_q):
            rows, length = places.shape
            parts = [
                part[0].index_select(1, places.view(-1)).unflatten(1, (rows, length)).transpose(0, 1)
                for part in (query, key, value)
            ]
            attended = torch.nn.functional.scaled_dot_product_attention(*parts, scale=scaling)
            joined[places.view(-1)] = attended.transpose(1, 2).flatten(0, 1)
        return joined[None], None

    def _plan(self, ends: Any) -> list[Any]:
        """For each length the places of its rows, rows × length.  All layers share the last two tensors of ends."""
        import torch

        for known, plan in self._plans:
            if known is ends:
                return plan
        borders = ends.tolist()
        starts: dict[int, list[int]] = {}
        for start, end in itertools.pairwise(borders):
            if end > start:
                starts.setdefault(end - start, []).append(start)
        plan = [
            torch.tensor(first, device=ends.device)[:, None] + torch.arange(length, device=ends.device)
            for length, first in starts.items()
        ]
        self._plans = [*self._plans[-1:], (ends, plan)]
        return plan
