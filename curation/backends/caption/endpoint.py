"""Captions by a pool of vision servers: OpenAI's API (vLLM, SGLang, llama-server) or Ollama's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.backends.caption.base import question
from curation.caption.captioner import FIRST, Attempt, CaptionSettings, Family
from curation.errors import SampleError, UsageError
from curation.images import encode_jpeg
from curation.models.needs import NothingToFetch, WeightsNeed
from curation.options import logger
from curation.replies import Reply
from curation.serving import EndpointPool, Registry, RegistryWatcher, Request, endpoint_urls, read_key
from curation.serving.wire import estimated_tokens

LONGEST_SIDE = 1536  # pixels; vision models look at no more
QUALITY = 95
SEED_BITS = 31  # servers keep a seed in 32 bits, some of them signed


@dataclass(frozen=True, slots=True)
class SentImage:
    """An image as it is sent.  All have one shape, because the server decides which images it computes together."""

    jpeg: bytes
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.jpeg)


class Backend:
    """Servers that have the model ``source``.  They load it, and choose its precision and device, themselves."""

    family = Family(name="endpoint", batch_size=256, max_tokens=120, served=True)

    def __init__(self, source: str, settings: CaptionSettings) -> None:
        """Find the servers.

        Args:
            source: The servers' name for the model.
            settings: Where the servers are, what to ask, and how long to wait.

        Raises:
            InfrastructureError: No server answers, or one does not have the model.
            UsageError: The settings ask for what the servers decide themselves.
        """
        s = settings
        if s.quantize or s.offload or s.dtype != "auto" or s.compile != "none" or s.attention == "flash":
            raise UsageError(
                "--quantize, --offload, --dtype, --compile and --attention: with an endpoint the server's own options"
            )
        if s.timeout_s <= 0:
            raise UsageError("--timeout is more than 0 seconds")
        if s.endpoints and s.endpoints_dir is not None:
            raise UsageError("--endpoints_dir names the servers: leave --endpoints out")
        self.name, self.revision, self.device_kind = source, s.revision or "served", "endpoint"
        self._temperature = s.temperature
        self._max_tokens = s.max_tokens or self.family.max_tokens
        self.asked = question(s, self._max_tokens)
        needs_tokens = estimated_tokens(self.asked) + self._max_tokens
        self._watch: RegistryWatcher | None = None
        found = s.endpoints_dir is not None or s.own is not None
        urls = [] if found else endpoint_urls(s.ports, endpoints=s.endpoints)
        key = s.own.key if s.own else read_key(s.api_key_env, registered=s.endpoints_dir is not None)
        self._pool = EndpointPool(
            urls,
            source,
            timeout_s=s.timeout_s,
            load_timeout_s=s.load_timeout_s,
            key=key,
            needs_tokens=needs_tokens,
        )
        if s.own is not None:
            s.own.start(self._pool)
        elif s.endpoints_dir is not None:
            self._watch = RegistryWatcher(self._pool, Registry(s.endpoints_dir)).start()
        else:
            self._pool.open()

    @classmethod
    def weights(cls, source: str, revision: str | None) -> WeightsNeed:
        """See CaptionBackend."""
        return NothingToFetch(f"{source}: its server loads it, nothing to fetch")

    def prepare(self, image: Any) -> SentImage:
        """See CaptionBackend."""
        try:
            small = image if image.mode == "RGB" else image.convert("RGB")
            if max(small.size) > LONGEST_SIDE:
                small = small.copy()
                small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            return SentImage(encode_jpeg(np.asarray(small), QUALITY))
        except MemoryError:
            raise SampleError("out_of_memory", f"preparing {image.width}×{image.height}") from None
        except (ValueError, OSError) as error:
            raise SampleError("processor_refused", f"{image.width}×{image.height}: {error}") from error

    def caption(
        self, batch: Sequence[SentImage], seeds: Sequence[int], attempt: Attempt = FIRST
    ) -> list[Reply | SampleError]:
        """See CaptionBackend.  An image for which the servers have no answer fails alone."""
        return [self._ask(image, seed, attempt) for image, seed in zip(batch, seeds, strict=True)]

    def _ask(self, image: SentImage, seed: int, attempt: Attempt) -> Reply | SampleError:
        request = Request(
            user=self.asked,
            jpeg=image.jpeg,
            temperature=attempt.temperature(self._temperature),
            seed=seed & ((1 << SEED_BITS) - 1),
            max_tokens=attempt.tokens(self._max_tokens),
        )
        try:
            return self._pool.ask(request)
        except SampleError as error:
            return error

    def adaptations(self) -> dict[str, list[str]]:
        """How servers are asked that refused the usual request, by name, for receipts."""
        return self._pool.adaptations()

    def doing(self) -> str:
        """What requests wait for; empty for nothing (``Stage.doing``)."""
        return self._pool.waiting()

    def close(self) -> None:
        """See CaptionBackend.  Answers that are still to come are thrown away."""
        if self._watch is not None:
            self._watch.close()
        for line in self._pool.summary():
            logger.info(line)
