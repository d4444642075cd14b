"""Asks all questions of one shard, many at once; each reply is durable before it counts."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from curation.errors import SampleError, Stopped
from curation.jsonio import dump_json, parse_json_object
from curation.run import ShardContext
from curation.run.checkpoints import PartialLog
from curation.threads import DaemonPool

BATCH = 256  # replies that are recorded in one write, at most
GATHER_S = 0.01  # a reply waits so long for others, so that one write is not made for each
WAIT_S = 0.5  # how often a signal is looked for while nothing comes


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one sample.

    Attributes:
        caption: The caption to rewrite.
        group: The group that the prompt is to portray; None without groups.
        digest: Of all that the reply depends on beyond the stage's options.
    """

    caption: str
    group: str | None
    digest: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a question.

    Attributes:
        prompt: The prompt; None where no reply was one.
        asked: How many replies it took.
        reason: Why there is no prompt, as a word that is counted; ``detail`` says more.
        tokens_read: Of all questions, as the servers count them.
        tokens_written: Of all replies.
    """

    prompt: str | None
    asked: int
    reason: str = ""
    detail: str = ""
    tokens_read: int = 0
    tokens_written: int = 0


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
        ask: Called in the pool's threads.  A SampleError that it raises becomes an outcome that is not recorded: the
            server was at fault, and may not be next time.
        work: The shard's context; it gives the checkpoint, and the time to stop.
        pool: The threads.
        on_result: Called in the calling thread with each key and outcome, once the outcome is recorded.
        patience_s: Seconds to wait for replies that are on their way when it is time to stop.

    Returns:
        key → outcome, of every question.

    Raises:
        Stopped: It was time to stop; every reply that came is recorded.
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
        shard.halt.set()  # nothing more is begun
        ends = time.monotonic() + patience_s
        while shard.awaited and time.monotonic() < ends:
            work.check_stop(urgent_only=True)
            _take(shard, log, outcomes, on_result)
        raise
    finally:
        shard.halt.set()
    return outcomes


class _Pending:
    """The questions of one shard that are with the pool, and what came back."""

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
    """Record the outcomes that have come back, then hand them on."""
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
