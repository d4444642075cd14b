"""``report --watch``: the page is written again and again while stages run, until the user ends it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from curation.commands.status.command import SHARE_OF_READING


def write_again_and_again(write: Callable[[bool], bool], seconds: float) -> int:
    """Calls ``write(True)`` every so many seconds, until SIGINT or SIGTERM; then ``write(False)``, once.

    Args:
        write: Writes the page; its argument says whether it will be written again.  Returns whether it wrote one.
        seconds: From the end of one call to the beginning of the next, at least.

    Returns:
        How many times the page was written.
    """
    times = 0
    with _ended_by_signals() as end, contextlib.suppress(KeyboardInterrupt):
        while not end.is_set():
            began = time.monotonic()
            times += write(True)
            end.wait(max(seconds, SHARE_OF_READING * (time.monotonic() - began)))
        times += write(False)
    return times


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[threading.Event]:
    """Yields an event that the first signal sets: the present page is finished.  The second signal interrupts it."""
    end = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if end.is_set():
            raise KeyboardInterrupt
        end.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
