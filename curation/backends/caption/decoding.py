"""How the next token is chosen and where keys and values are kept, where ``generate`` itself is too slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SeededSampling:
    """A logits processor that draws the tokens of each image from the image's own seed, whatever batch it is in.

    ``generate`` would draw a whole batch from one generator.  Here the uniform numbers of a row are drawn beforehand,
    from its seed and on the host, and pick from the distribution that the row's logits give at ``temperature``.
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
    """A logits processor that lets no row repeat ``size`` tokens, in one operation for all rows.

    It bans the same tokens as the one of ``generate``, which copies every row to the host at every step and goes
    through it in Python: its time grows with the batch and with the square of the length, while the device waits.
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
    """Keys and values of an encoder-decoder, in buffers of fixed size that keep their place from call to call, because
    a captured CUDA graph needs that."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._caches: dict[tuple[int, int, int], Any] = {}

    def get(self, rows: int, encoder_length: int, max_tokens: int) -> Any:
        """An empty cache for a batch of ``rows`` and answers of ``max_tokens``.

        Only the last two sizes are kept, as each may have gigabytes.
        """
        from transformers import EncoderDecoderCache, StaticCache

        key = rows, encoder_length, max_tokens
        cache = self._caches.pop(key, None)
        if cache is None:
            if len(self._caches) >= 2:
                del self._caches[next(iter(self._caches))]
            lengths = (max_tokens + 1, encoder_length)  # with the token that starts the decoder
            cache = EncoderDecoderCache(*(StaticCache(config=self._config, max_cache_len=most) for most in lengths))
        else:
            cache.reset()
        self._caches[key] = cache
        return cache

    def clear(self) -> None:
        """Release the memory."""
        self._caches.clear()


def padded_rows(rows: int) -> int:
    """The next power of two, or one and a half of it.  The last batches of shards have any size, and the step is
    compiled again for each size."""
    size = 1
    while size < rows:
        if size >= 2 and size * 3 // 2 >= rows:
            return size * 3 // 2
        size *= 2
    return size
