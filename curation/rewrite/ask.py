"""Sends all questions of one shard, many at a time; each reply is durable before it counts."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from curation.errors import SampleError, Stopped
from curation.jsonio import dump_json, parse_json_object
from curation.run import ShardContext
from curation.run.checkpoints import PartialLog
from curation.threads import DaemonPool

BATCH = 256  # at most so many replies are recorded in one write
GATHER_S = 0.01  # a reply waits so long for others, so that several share one write
WAIT_S = 0.5  # how often signals are checked while no reply arrives


@dataclass(frozen=True, slots=True)
class Question:
    """The question about one sample.

    Attributes:
        caption: The caption to rewrite.
        group: The group that the prompt should portray; None without groups.
        digest: The digest of everything besides the stage's options on which the reply depends.
    """

    caption: str
    group: str | None
    digest: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a question.

    Attributes:
        prompt: The prompt; None if no reply was usable.
        asked: How many replies were requested.
        reason: Why there is no prompt, as a word that is counted; ``detail`` explains it.
        tokens_read: The tokens of all questions, as the servers count them.
        tokens_written: The tokens of all replies.
        cut: The prompt ends with the last whole sentence of a reply that was cut.
        system: The digest of the system prompt that is used; "" where it is not known, or there is none.
        adapted: How the last request differed from the usual one, because its server had refused that.
    """

    prompt: str | None
    asked: int
    reason: str = ""
    detail: str = ""
    tokens_read: int = 0
    tokens_written: int = 0
    cut: bool = False
    system: str = ""
    adapted: Sequence[str] = ()


# key, question, and a function to call before each try and while waiting → outcome
Ask = Callable[[str, Question, Callable[[], None]], Outcome]


def request_all(
    questions: Mapping[str, Question],
    ask: Ask,
    *,
    work: ShardContext,
    pool: DaemonPool,
    on_result: Callable[[str, Outcome], None],
    patience_s: float,
) -> dict[str, Outcome]:
    """Ask all questions of one shard.  A question whose outcome is in the shard's checkpoint is not asked again.

    Args:
        questions: key → question.
        ask: Called in the pool's threads.  A SampleError that it raises becomes an outcome that is not recorded,
            because the server failed, and may succeed next time.
        work: The shard's context, with the checkpoint and ``check_stop``.
        pool: The threads.
        on_result: Called in the calling thread with each key and outcome, once the outcome is recorded.
        patience_s: How many seconds to wait for outstanding replies after a stop was requested.

    Returns:
        key → outcome, for every question.

    Raises:
        Stopped: A stop was requested; every reply that arrived is recorded.
        Exception: Whatever else ``ask`` raises.
    """
    log = work.partial()
    outcomes = {}
    for key, question in questions.items():
        recorded = log.get(key, question.digest)
        if recorded is not None:
            outcomes[key] = Outcome(**parse_json_object(recorded))
            on_result(key, outcomes[key])
    shard = _Pending(questions, ask)
    for key in questions:
        if key not in outcomes:
            shard.submit(pool, key)
    try:
        while shard.awaited:
            _take(shard, log, outcomes, on_result)
            work.check_stop()
    except Stopped:
        shard.halt.set()  # no further question is begun
        ends = time.monotonic() + patience_s
        while shard.awaited and time.monotonic() < ends:
            work.check_stop(urgent_only=True)
            _take(shard, log, outcomes, on_result)
        raise
    finally:
        shard.halt.set()
    return outcomes


class _Pending:
    """The questions of one shard that were given to the pool, and their outcomes."""

    def __init__(self, questions: Mapping[str, Question], ask: Ask) -> None:
        self.questions = questions
        self.halt = threading.Event()
        self.awaited = 0
        self.back: queue.SimpleQueue[tuple[str, Outcome | BaseException]] = queue.SimpleQueue()
        self._ask = ask

    def submit(self, pool: DaemonPool, key: str) -> None:
        self.awaited += 1
        pool.submit(lambda: self._answer(key))

    def _answer(self, key: str) -> None:
        """In a thread of the pool."""
        try:
            self._check()
            outcome: Outcome | BaseException = self._ask(key, self.questions[key], self._check)
        except BaseException as error:  # noqa: BLE001 - the shard's thread raises it
            outcome = error
        self.back.put((key, outcome))

    def _check(self) -> None:
        if self.halt.is_set():
            raise Stopped("the shard is given up")


def _take(
    shard: _Pending, log: PartialLog, outcomes: dict[str, Outcome], on_result: Callable[[str, Outcome], None]
) -> None:
    """Record the outcomes that have arrived, then return them."""
    came: dict[str, Outcome] = {}
    records = []
    problem: BaseException | None = None
    try:
        key, result = shard.back.get(timeout=WAIT_S)
        if shard.awaited > 1:
            time.sleep(GATHER_S)
        while True:
            shard.awaited -= 1
            if isinstance(result, Outcome):
                came[key] = result
                records.append((key, shard.questions[key].digest, dump_json(asdict(result))))
            elif isinstance(result, SampleError):
                came[key] = Outcome(None, 0, result.reason, result.detail)
            elif not isinstance(result, Stopped):
                problem = problem or result
            if len(came) >= BATCH:
                break
            key, result = shard.back.get_nowait()
    except queue.Empty:
        pass
    if records:
        log.append(records)
    outcomes |= came
    for key, outcome in came.items():
        on_result(key, outcome)
    if problem is not None:
        raise problem
