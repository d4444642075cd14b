"""How the next token is chosen and where keys and values are kept: what ``generate`` does too slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SeededSampling:
    """A logits processor that draws each image's tokens from its own seed, whatever batch it is in.

    ``generate`` would draw a whole batch from one generator.  Here the draw is made beforehand: a row's uniform numbers
    come from its seed, on the host, and pick from the distribution that its logits give at ``temperature``.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], most_tokens: int) -> None:
        import torch

        draws = [torch.rand(most_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._torch = torch
        self._uniform = torch.stack(draws, 1).double()  # step × row
        self._temperature = temperature
        self._step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        torch = self._torch
        self._uniform = self._uniform.to(scores.device)
        cumulated = (scores.double() / self._temperature).softmax(-1).cumsum(-1)
        target = self._uniform[self._step, :, None] * cumulated[:, -1:]
        self._step += 1
        chosen = torch.searchsorted(cumulated, target, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class NoRepeatedNgrams:
    """A logits processor that lets no row say the same ``size`` tokens twice, in one operation for all rows.

    ``generate``'s own copies every row to the host and walks it in Python, at every step: its time grows with the batch
    and with the square of the length, while the device waits.  What it bans is the same.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        size, length = self._size, input_ids.shape[1]
        if length < size:
            return scores
        said = input_ids.unfold(1, size, 1)  # row × place × size
        repeats = (said[..., :-1] == input_ids[:, None, length + 1 - size :]).all(-1)
        bound = torch.full((), torch.inf, dtype=scores.dtype, device=scores.device)
        return scores.scatter_reduce(1, said[..., -1], torch.where(repeats, -bound, bound), "amin")


class StaticCaches:
    """Keys and values of an encoder-decoder in buffers of fixed size that stay where they are from call to call, as a
    captured CUDA graph needs them.

    max_tokens: of an answer.
    """

    def __init__(self, config: Any, max_tokens: int) -> None:
        self._config, self._length = config, max_tokens + 1  # the token that starts the decoder
        self._caches: dict[tuple[int, int], Any] = {}

    def get(self, rows: int, encoder_length: int) -> Any:
        """The cache for a batch of ``rows``, empty.  Only the last few sizes are kept: each may be gigabytes."""
        from transformers import EncoderDecoderCache, StaticCache

        key = rows, encoder_length
        cache = self._caches.pop(key, None)
        if cache is None:
            if len(self._caches) >= 2:
                del self._caches[next(iter(self._caches))]
            lengths = (self._length, encoder_length)
            cache = EncoderDecoderCache(*(StaticCache(config=self._config, max_cache_len=most) for most in lengths))
        else:
            cache.reset()
        self._caches[key] = cache
        return cache

    def clear(self) -> None:
        """Give the memory back."""
        self._caches.clear()


def padded_rows(rows: int) -> int:
    """A power of two, or one and a half: the last batches of shards have every size, and each would be compiled."""
    size = 1
    while size < rows:
        if size >= 2 and size * 3 // 2 >= rows:
            return size * 3 // 2
        size *= 2
    return size
