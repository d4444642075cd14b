"""Captions by a pool of vision servers: OpenAI's API (vLLM, SGLang, llama-server) or Ollama's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from curation.backends.caption.base import PROMPTS
from curation.caption.captioner import FAMILIES, Compile, Detail
from curation.errors import SampleError, UsageError
from curation.images import encode_jpeg
from curation.serving import EndpointPool, Registry, RegistryWatcher, Request

LONGEST_SIDE = 1536  # what vision models look at, or more


QUALITY = 95


SEED_BITS = 31  # servers keep a seed in 32 bits, some of them signed


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as it is sent.  The server, not the batch, decides what is computed together: one shape for all."""

    jpeg: bytes
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.jpeg)


class Backend:
    """Servers that have the model ``source``.  They load it and choose its precision and device themselves.

    urls: the servers, ``http://host:port``; or ``folder``, in which servers register while they come and go; or
    ``pool``, which is open already, and stays open.
    timeout_s: for one answer.  extra: further sampling options that all the servers know.
    Raises InfrastructureError when no server answers or one does not have the model, and UsageError for options that
    are the servers' own affair.
    """

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        prompt: str | None = None,
        detail: Detail = "more_detailed",
        max_tokens: int | None = None,
        temperature: float = 0.0,
        quantize: str | None = None,
        offload: bool = False,
        device: str = "cpu",
        threads: int = 1,
        dtype: str = "auto",
        compile: Compile = "none",
        urls: Sequence[str] = (),
        folder: Path | None = None,
        pool: EndpointPool | None = None,
        api: Literal["ollama", "openai", "auto"] = "auto",
        timeout_s: float = 120.0,
        in_flight: int = FAMILIES["endpoint"].batch_size,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if quantize or offload or dtype != "auto" or compile != "none":
            raise UsageError("--quantize, --offload, --dtype and --compile: with an endpoint the server's own options")
        if timeout_s <= 0:
            raise UsageError("--timeout is more than 0 seconds")
        if urls and folder is not None:
            raise UsageError("--endpoints_dir names the servers: leave --endpoints out")
        if not urls and pool is None and folder is None:
            raise UsageError("no endpoint is named: give --ports, --endpoints or --endpoints_dir")
        self.name, self.revision, self.device_kind = source, revision or "served", "endpoint"
        self._prompt = prompt or PROMPTS[detail]
        self._temperature = temperature
        self._max_tokens = max_tokens or FAMILIES["endpoint"].max_tokens
        self._extra = extra or {}
        self._pool = pool or EndpointPool(urls, source, api=api, timeout_s=timeout_s)
        self._watch = None if folder is None else RegistryWatcher(self._pool, Registry(folder)).start()
        if pool is None and folder is None:
            self._pool.open()
        self._threads = ThreadPoolExecutor(in_flight, "caption")

    def prepare(self, image: Any) -> Picture:
        """See CaptionBackend."""
        try:
            small = image if image.mode == "RGB" else image.convert("RGB")
            if max(small.size) > LONGEST_SIDE:
                small = small.copy()
                small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            return Picture(encode_jpeg(np.asarray(small), QUALITY))
        except MemoryError:
            raise SampleError("out_of_memory", f"preparing {image.width}×{image.height}") from None
        except (ValueError, OSError) as error:
            raise SampleError("processor_refused", f"{image.width}×{image.height}: {error}") from error

    def caption(self, batch: Sequence[Picture], seeds: Sequence[int]) -> list[str | SampleError]:
        """See CaptionBackend.  A picture that the servers cannot answer for costs its own row."""
        return list(self._threads.map(self._ask, batch, seeds))

    def _ask(self, picture: Picture, seed: int) -> str | SampleError:
        request = Request(
            user=self._prompt,
            jpeg=picture.jpeg,
            temperature=self._temperature,
            seed=seed & ((1 << SEED_BITS) - 1),
            max_tokens=self._max_tokens,
            extra=self._extra,
        )
        try:
            return self._pool.ask(request).text
        except SampleError as error:
            return error

    def close(self) -> None:
        """Questions that are out are answered to nobody."""
        if self._watch is not None:
            self._watch.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
