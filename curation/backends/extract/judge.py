"""Judges: vision-language models behind servers, which rate pairs of a picture and its caption (``extract/judging``).

Each sample is a request of its own, and many are in flight: of a batch, of the next one, and of the next shard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from curation.errors import InfrastructureError, SampleError
from curation.extract.answers import Answers
from curation.extract.api import Asker, Batch, Column, Directive, Preparation, SampleFacts, Takes
from curation.extract.judging import AXES, DIRECTIVE, Judged, Rubric, asked_about, columns_of
from curation.extract.settings import ModelSettings
from curation.images import encode_jpeg
from curation.jsonio import dump_json, parse_json_object
from curation.libraries import np
from curation.replies import Attempt
from curation.serving import NamedServers, Request
from curation.serving.wire import estimated_tokens
from curation.threads import DaemonPool

LONGEST_SIDE = 1024  # pixels; vision models look at little more
QUALITIES, MOST_BYTES = (90, 70, 50), 512 << 10  # the first quality that gives no more, so that batches stay small
PICTURE_TOKENS = 1024  # about, of a picture
SEED_BITS = 31  # servers keep a seed in 32 bits, some of them signed


@dataclass(frozen=True)
class SentPicture:
    """The picture as a server gets it: what our decoder saw, upright and without metadata."""

    takes: ClassVar[Takes] = "image"

    def __call__(self, pixels: Any) -> dict[str, Any]:
        if max(pixels.shape[:2]) > LONGEST_SIDE:
            from PIL import Image

            small = Image.fromarray(pixels)
            small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            pixels = np.asarray(small)
        for quality in QUALITIES:
            if len(jpeg := encode_jpeg(pixels, quality)) <= MOST_BYTES:
                break
        return {"jpeg": jpeg}


@dataclass(frozen=True)
class JudgedTexts:
    """The caption, and the question where the sample has one."""

    question_field: str
    takes: ClassVar[Takes] = "sample"

    def __call__(self, facts: SampleFacts) -> dict[str, Any]:
        question = facts.metadata.get(self.question_field)
        return {
            "caption": facts.caption or "",
            "question": question if isinstance(question, str) and question.strip() else "",
        }


class Backend(Asker):
    """One judge, with its servers."""

    directives = (
        Directive(DIRECTIVE, columns_of(DIRECTIVE, AXES), source="a model server", licence="the model's"),
        Directive(f"{DIRECTIVE}:"),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        s = settings.judge
        if s is None:
            raise InfrastructureError(f"{directive}: it has no settings; this is a bug")
        self.name, self.revision = s.model, s.revision
        self.facts = {"axes": dict(s.axes), "scale": [*s.scale]}
        self.asks, self.patience_s = s.concurrency, s.timeout
        self._directive, self._settings = directive, s
        self._digest = xxhash.xxh3_64_hexdigest(dump_json(s.record()))
        *scores, self._reason = columns_of(directive, s.axes)
        self._axes = dict(zip(s.axes, scores, strict=True))
        self.columns = (
            *(Column(name, "int64", needs_image=True, needs_text=True) for name in scores),
            Column(self._reason, "string", needs_image=False, needs_text=False, counted=True),
        )
        self._picture, self._texts = SentPicture(), JudgedTexts(s.question_field)
        self.preparations: tuple[Preparation, ...] = (self._picture, self._texts)
        self._rubrics = {asked: Rubric(s, with_question=asked) for asked in (False, True)}
        longest = max(estimated_tokens(rubric.system) for rubric in self._rubrics.values())
        self._servers = NamedServers(
            s.model,
            ports=s.ports,
            endpoints=s.endpoints,
            endpoints_dir=Path(s.endpoints_dir).expanduser() if s.endpoints_dir else None,
            api_key_env=s.api_key_env,
            timeout_s=s.timeout,
            load_timeout_s=s.load_timeout,
            waiting=settings.waiting,
            needs_tokens=longest + PICTURE_TOKENS + s.max_tokens,
        )
        self._threads = DaemonPool(s.concurrency, "judge")

    def ask(self, batch: Batch, keys: Sequence[str], answers: Answers) -> Mapping[str, Future[list[Any]]]:
        """See ``Asker``."""
        pictures, texts = batch.prepared(self._picture), batch.prepared(self._texts)
        due = _Due([*self._axes.values(), self._reason], len(batch), self._cells)
        for row, (picture, told) in enumerate(zip(pictures, texts, strict=True)):
            if why := self._why_not(picture, told):
                due.came(row, Judged({}, why))
            else:
                self._begin(due, row, keys[row], picture["jpeg"], told, answers)
        return due.columns

    def _why_not(self, picture: Mapping[str, Any], told: Mapping[str, Any]) -> str:
        """Why a sample is not judged; "" where it is."""
        if not picture:
            return "no_image"
        if not told.get("caption"):
            return "no_caption"
        return "" if self._rubrics[bool(told["question"])].axes else "no_question"

    def _begin(self, due: _Due, row: int, key: str, jpeg: bytes, told: Mapping[str, str], answers: Answers) -> None:
        """Have a thread ask about one sample, unless its answer is recorded."""
        user = asked_about(told["caption"], told["question"])
        rubric = self._rubrics[bool(told["question"])]
        name = f"{self._directive}\0{key}"
        digest = xxhash.xxh3_64_hexdigest(dump_json([self._digest, user, xxhash.xxh3_128_hexdigest(jpeg)]))
        if (recorded := answers.find(name, digest)) is not None:
            said = parse_json_object(recorded)
            due.came(row, Judged(said["scores"], said["reason"]))
            return

        def answer() -> None:
            try:
                with answers.asking():
                    found, durable = self._ask(rubric, user, jpeg, key, answers.check)
                    if durable:
                        answers.keep(name, digest, dump_json({"scores": found.scores, "reason": found.reason}))
                due.came(row, found)
            except BaseException as error:  # noqa: BLE001 - the shard's thread raises it
                due.failed(error)

        self._threads.submit(answer)

    def _ask(self, rubric: Rubric, user: str, jpeg: bytes, key: str, check: Callable[[], None]) -> tuple[Judged, bool]:
        """Ask until all scores are there; the answer with most of them, and whether it is worth a record."""
        s = self._settings
        seed = xxhash.xxh3_64_intdigest(f"{s.seed}\0{key}".encode("utf-8", "surrogatepass"))
        best: Judged | None = None
        longer = False
        for number in range(s.tries):
            attempt = Attempt(longer=longer, warmer=number)
            request = Request(
                system=rubric.system,
                user=user,
                jpeg=jpeg,
                temperature=attempt.temperature(s.temperature),
                seed=attempt.seeds([seed])[0] & ((1 << SEED_BITS) - 1),
                max_tokens=attempt.tokens(s.max_tokens),
                schema=rubric.schema,
                schema_needed=False,  # every answer is looked at anyway
            )
            try:
                found = rubric.read(self._servers.pool.ask(request, check))
            except SampleError as error:  # of the servers, which may answer the next time
                return best or Judged({}, error.reason), False
            if not found.reason:
                return found, True
            if best is None or len(found.scores) > len(best.scores):
                best = found
            longer = longer or found.cut
        assert best is not None
        return best, True

    def _cells(self, judged: Judged) -> Mapping[str, Any]:
        """A sample's value in each column."""
        return {name: judged.scores.get(axis) for axis, name in self._axes.items()} | {
            self._reason: judged.reason or None
        }

    def adaptations(self) -> dict[str, list[str]]:
        """See ``Asker``."""
        return self._servers.pool.adaptations()

    def doing(self) -> str:
        """See ``Asker``."""
        return self._servers.pool.waiting()

    def close(self) -> None:
        """See ``Extractor``.  Answers that are still to come are thrown away."""
        self._threads.shutdown()
        self._servers.close()


class _Due:
    """The values of a part of a batch in each column, which come in many threads and in any order.

    Args:
        names: Of the columns.
        count: Of the samples.
        cells: A sample's value in each column.
    """

    def __init__(self, names: Sequence[str], count: int, cells: Callable[[Judged], Mapping[str, Any]]) -> None:
        self.columns: dict[str, Future[list[Any]]] = {name: Future() for name in names}
        self._cells = cells
        self._rows: list[Mapping[str, Any]] = [{}] * count
        self._left = count
        self._lock = threading.Lock()

    def came(self, row: int, judged: Judged) -> None:
        """What is said of one sample."""
        with self._lock:
            self._rows[row] = self._cells(judged)
            self._left -= 1
            if self._left == 0:  # none has failed
                for name, future in self.columns.items():
                    future.set_result([cells[name] for cells in self._rows])

    def failed(self, error: BaseException) -> None:
        """Nothing is said of one sample, so that the part is never complete."""
        with self._lock:
            for future in self.columns.values():
                if not future.done():
                    future.set_exception(error)
