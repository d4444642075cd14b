"""The three levels of errors: a sample's, a shard's, and the infrastructure's.

A sample's error is recorded with its reason and the shard goes on; a shard's error makes a failed receipt and the
run goes on; an infrastructure error stops the run with one clear line and exit code 2.

``redact`` is the one place that takes secrets out of what is said of an error.  The log, the terminal, receipts and
rejects put every text through it, whichever library it comes from.
"""

from __future__ import annotations

import errno
import re
from typing import Final

EXIT_OK = 0
EXIT_SHARDS_FAILED = 1
EXIT_USAGE = 2  # usage or infrastructure
EXIT_WORK_LEFT = 75  # EX_TEMPFAIL: stopped by a signal or the deadline with work left

# A "…" is what stands here for a query already.
_SECRETS: Final = (
    (re.compile(r"(:/?/)[^/\s'\"]*@"), r"\1"),  # user and password
    (re.compile(r"(://[^\s'\"?#]*)[?#](?!…)[^\s'\"]*"), r"\1?…"),  # a query may be a signature
    (re.compile(r"(with url: [^\s'\"?]*)\?(?!…)\S*"), r"\1?…"),  # as urllib3 says it, without the host
    (re.compile(r"(/[^\s'\"?]*)\?(?!…)[^\s'\"=?]*=[^\s'\"]*"), r"\1?…"),  # as http.client says it
    (
        re.compile(
            r"(?i)((?:x-(?:amz|goog|oss|ms)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid"
            r"|googleaccessid|access_token|auth_token|api_?key|password|passwd|secret)=)(?!\*\*\*)[^&\s'\"]+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(bearer|authorization: basic)\s+[\w.~+/=*-]+"), r"\1 ***"),
    (re.compile(r"(?i)\b((?:proxy-)?authorization|x-api-key|api-key)(['\"]?\s*[:=]\s*b?['\"])[^'\"]+"), r"\1\2***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_***"),  # the hub's tokens
)


def redact(text: str, *secrets: str) -> str:
    """The text without users, passwords and queries of URLs, without credentials, and without these ``secrets``."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class SampleError(Exception):
    """One sample cannot be used.  ``reason`` is a short snake_case word that is counted; ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class ShardError(Exception):
    """One shard cannot be processed (truncated tar, too many bad samples): a failed receipt, and the run goes on.

    The message names the file, and the sample where there is one.  ``reason`` is a short snake_case word by which
    ``status`` counts failures and ``retry`` finds them.
    """

    def __init__(self, message: str = "", reason: str = "shard_error") -> None:
        super().__init__(message)
        self.reason = reason


class InfrastructureError(Exception):
    """The run cannot go on (no model, no endpoint, disk full, wrong options): one clear line and exit code 2."""


class UsageError(InfrastructureError):
    """An option's value makes no sense: exit code 2, before any work is done."""


_MORE = "use fewer --workers, smaller batches or fewer threads, or give the job more"
_ROOM = "make room, or use another folder"
_LACKS = {
    errno.ENOMEM: ("memory", _MORE),
    errno.EAGAIN: ("room for processes (ulimit -u, or the memory of this job)", _MORE),  # of fork
    errno.EMFILE: ("room for open files (ulimit -n)", _MORE),
    errno.ENFILE: ("room for open files of all processes", _MORE),
    errno.ENOSPC: ("room on the disk", _ROOM),
    errno.EDQUOT: ("room in the quota", _ROOM),
}


def lack_of(error: BaseException) -> InfrastructureError | None:
    """What to tell the user if ``error`` was raised because this machine has too little memory, threads or room.

    The next shard would meet it as well, so it is no shard's fault.

    Returns:
        The error to raise instead: one line that says what is missing and what to do.  None if the cause is another.
    """
    if isinstance(error, MemoryError):
        what, advice = "memory", _MORE
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        what, advice = "room for threads (ulimit -u, or the memory of this job)", _MORE
    elif isinstance(error, OSError) and error.errno in _LACKS:
        what, advice = _LACKS[error.errno]
    else:
        return None
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    return InfrastructureError(
        f"this machine has too little {what} ({said}); {advice}, and run the same command again: "
        "nothing published is lost"
    )


class LostClaim(Exception):
    """Another worker has taken or committed this shard: drop the attempt quietly and go on."""


class Stopped(Exception):
    """A signal or the deadline asked to stop and everything durable has been saved: exit code 75."""
