"""When a request is sent again: after as long as the server asks for, else after waits that double.

Whoever sends requests keeps a ``RetryPolicy``.  The loops differ (one must stop at once, another counts progress or
routes to another server), so most of them call ``wait_s``; ``with_retries`` is the plain loop.  urllib3's Retry knows
neither, and tenacity would be one more package for these few lines.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

Result = TypeVar("Result")


class TransientError(Exception):
    """A request failed now and may succeed later; ``wait_s`` is what the server asked for, 0 where it did not say."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is sent, and how long to wait.

    Attributes:
        tries: Requests in a row that may fail, the first included.
        first_wait_s: Longest wait after the first failure; it doubles with each further one.
        longest_wait_s: Bound on all waits.
        connect_s: Time limit to connect, for each try.
        read_s: Time limit for the next bytes of an answer.
    """

    tries: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    connect_s: float = 15.0
    read_s: float = 60.0

    def wait_s(self, failures: int, asked_s: float = 0.0) -> float:
        """Seconds to wait after ``failures`` failures in a row, from 1.

        The wait is random between half and all of its bound, so that clients that failed together do not come back
        together.  It is at least ``asked_s``, what the server asked for, within ``longest_wait_s``.
        """
        bound = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(failures - 1, 60))
        return max(bound * random.uniform(0.5, 1.0), min(asked_s, self.longest_wait_s))


def with_retries(request: Callable[[], Result], policy: RetryPolicy) -> Result:
    """Return what ``request`` returns; call it again while it raises TransientError, at last raise that."""
    for failures in count(1):
        try:
            return request()
        except TransientError as error:
            if failures >= policy.tries:
                raise
            time.sleep(policy.wait_s(failures, error.wait_s))
    raise AssertionError("unreachable")


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks to wait, a number or a date (RFC 9110); None without a valid one."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return float(Retry().parse_retry_after(header or ""))
    except (InvalidHeader, ValueError, OverflowError):
        return None
