"""What the ``main`` of every script and command does alike: exit codes, the line of an error, tracebacks, the log."""

from __future__ import annotations

import functools
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from curation.errors import (
    EXIT_DEVICE_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    EXIT_WORK_LEFT,
    InfrastructureError,
    StoppedAtOnce,
    lack_of,
    redact,
)
from curation.jsonio import clean_text

logger = logging.getLogger("curation")


class _CleanFormatter(logging.Formatter):
    """Removes secrets, and control characters, because names and captions from the web reach the log.

    Each further line of a message is indented, so that it cannot look like a message.
    """

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = redact(super().format(record)).splitlines() or [""]
        indents = [len(line) - len(line.lstrip(" ")) for line in rest]
        return "\n".join(
            [clean_text(first), *(" " * (4 + n) + clean_text(x) for n, x in zip(indents, rest, strict=True))]
        )


def set_up_logging(quiet: bool, name: str = "") -> None:
    """Log to stderr: a line has the time, the name of the worker where there are several, and the message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_CleanFormatter(f"%(asctime)s {name + ' ' if name else ''}%(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class Main(Protocol):
    """A script's or a command's ``main``.  argv: None for this process's own arguments."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exit_code(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Decorate a ``main(argv)``: an infrastructure error becomes one clear line on stderr and exit code 2, and so does
    an error that says that this machine lacks a package, or memory, threads or room."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        _hide_secrets_of_tracebacks()
        try:
            code = main(argv)
            sys.stdout.flush()
        except StoppedAtOnce as stopped:
            if not logger.handlers:
                set_up_logging(quiet=False)
            logger.warning(f"stopped ({stopped}) before the first shard: run the same command again")
            return EXIT_WORK_LEFT
        except InfrastructureError as error:
            lack = lack_of(error)
            say_error(error if lack is None or "pip install" in str(error) else f"{error}: {lack}")
            return EXIT_USAGE
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            return EXIT_OK
        except (ImportError, MemoryError, RuntimeError, OSError) as error:
            if (lack := lack_of(error)) is None:
                raise
            say_error(lack)
            return EXIT_USAGE
        if code == EXIT_DEVICE_FAILED:
            _leave_device()
        return code

    return guarded


def _leave_device() -> None:
    """End this process at once where it has begun to use a device, which has failed: what the libraries do at their end
    would fail too, and end it with a signal in place of the exit code."""
    torch = sys.modules.get("torch")
    modules = filter(None, (getattr(torch, kind, None) for kind in ("cuda", "xpu")))
    if any(module.is_initialized() for module in modules):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_DEVICE_FAILED)


def _hide_secrets_of_tracebacks() -> None:
    """Unless somebody else, such as a debugger, prints them."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say_traceback
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda caught: _say_traceback(
            caught.exc_type, caught.exc_value or caught.exc_type(), caught.exc_traceback
        )


def _say_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """What Python says of an error that nobody expected, without secrets.  It ends the process as Python would."""
    if error is not None and not issubclass(kind, SystemExit):
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _reader_is_gone() -> bool:
    """Whether stdout's reader is gone, as ``head`` is after its lines; further output is then thrown away."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def say_error(text: Any) -> None:
    """The one clear line that an infrastructure error ends with."""
    print(f"error: {clean_text(redact(str(text)))}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal that bars may be drawn on."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
