"""Captions by a pool of vision servers: OpenAI's API (vLLM, SGLang, llama-server) or Ollama's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from curation.backends.caption.base import filled_for, words_of
from curation.caption.captioner import CaptionSettings, Family, Inquiry, Question
from curation.caption.templates import MAX_VALUE, MAX_VALUES, Filled
from curation.errors import SampleError, UsageError
from curation.images import encode_jpeg
from curation.libraries import np
from curation.models.needs import NothingToFetch, WeightsNeed
from curation.replies import FIRST, Attempt, Reply
from curation.serving import NamedServers, Request
from curation.serving.wire import estimated_tokens

LONGEST_SIDE = 1536  # pixels; vision models look at no more
QUALITY = 95
ANSWER_TOKENS = 512  # of an answer as JSON
SEED_BITS = 31  # servers keep a seed in 32 bits, some of them signed


@dataclass(frozen=True, slots=True)
class SentImage:
    """An image as it is sent, with the question where that varies.  All have one shape, because the server decides
    which images it computes together."""

    jpeg: bytes
    said: str | None = None
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.jpeg)


class Backend:
    """Servers that have the model ``source``.  They load it, and choose its precision and device, themselves."""

    family = Family(name="endpoint", batch_size=256, max_tokens=120, served=True, packages=())

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
        self.name, self.revision, self.device_kind = source, s.revision or "served", "endpoint"
        self._questions, self._schema, self._last = s.asked, s.schema, threading.local()
        self._asked = [words_of(one, s, one.max_tokens or self.family.max_tokens) for one in s.asked]
        if s.schema is not None:
            self._asked = [f"{asked}\n\n{s.schema.request}" for asked in self._asked]
        self.asked = self._asked[0]
        self._servers = NamedServers(
            source,
            ports=s.ports,
            endpoints=s.endpoints,
            endpoints_dir=s.endpoints_dir,
            own=s.own,
            api_key_env=s.api_key_env,
            timeout_s=s.timeout_s,
            load_timeout_s=s.load_timeout_s,
            waiting=s.waiting,
            needs_tokens=max(map(self._needed, range(len(self._asked)))),
        )
        self._pool = self._servers.pool

    @classmethod
    def weights(cls, source: str, revision: str | None) -> WeightsNeed:
        """See CaptionBackend."""
        return NothingToFetch(f"{source}: its server loads it, nothing to fetch")

    def asked_of(self, number: int) -> str:
        """See CaptionBackend."""
        return self._asked[number]

    def _tokens(self, question: Question) -> int:
        return question.max_tokens or (self.family.max_tokens if self._schema is None else ANSWER_TOKENS)

    def _needed(self, number: int) -> int:
        """About how many tokens a question takes with its answer, and with values as long as they may be."""
        question = self._questions[number]
        values = 0 if question.template is None else min(MAX_VALUES, MAX_VALUE * len(question.template.fields))
        return estimated_tokens(self._asked[number]) + estimated_tokens(values) + self._tokens(question)

    def prepare(self, image: Any, inquiry: Inquiry | None = None) -> SentImage:
        """See CaptionBackend."""
        filled = filled_for(self._questions[inquiry.number if inquiry else 0], inquiry)
        try:
            return SentImage(self._jpeg(image), None if filled is None else self._said(filled))
        except MemoryError:
            raise SampleError("out_of_memory", f"preparing {image.width}×{image.height}") from None
        except (ValueError, OSError) as error:
            raise SampleError("processor_refused", f"{image.width}×{image.height}: {error}") from error

    def _said(self, filled: Filled) -> str:
        return filled.text() if self._schema is None else f"{filled.text()}\n\n{self._schema.request}"

    def _jpeg(self, image: Any) -> bytes:
        """The image as it is sent, encoded once for all questions: a thread prepares them one after another."""
        if getattr(self._last, "image", None) is not image:
            small = image if image.mode == "RGB" else image.convert("RGB")
            if max(small.size) > LONGEST_SIDE:
                small = small.copy()
                small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            jpeg = encode_jpeg(np.asarray(small), QUALITY)
            if len(self._questions) == 1:
                return jpeg
            self._last.image, self._last.jpeg = image, jpeg
        return bytes(self._last.jpeg)

    def caption(
        self, batch: Sequence[SentImage], seeds: Sequence[int], attempt: Attempt = FIRST, number: int = 0
    ) -> list[Reply | SampleError]:
        """See CaptionBackend.  An image for which the servers have no answer fails alone."""
        return [self._ask(image, seed, attempt, number) for image, seed in zip(batch, seeds, strict=True)]

    def _ask(self, image: SentImage, seed: int, attempt: Attempt, number: int) -> Reply | SampleError:
        question = self._questions[number]
        request = Request(
            user=self._asked[number] if image.said is None else image.said,
            jpeg=image.jpeg,
            temperature=attempt.temperature(question.temperature),
            seed=seed & ((1 << SEED_BITS) - 1),
            max_tokens=attempt.tokens(self._tokens(question)),
            schema=self._schema.sent if self._schema is not None else None,
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
        self._servers.close()
