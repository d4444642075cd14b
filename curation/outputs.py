"""What every output does while it is written: small writes are gathered, everything is hashed on its way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash

_BUFFER_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Published:
    """One output as a receipt names it: its path relative to the stage's output folder, or its URL; size, digest.

    temporary: the file's name until the commit.  checked: whether readers may insist on the digest; a loose copy that a
    later stage replaces is not.  upload: what completes an object's upload.
    """

    path: str
    temporary: str
    size: int
    digest: str
    checked: bool = True
    upload: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        said = {"path": self.path, "temporary": self.temporary, "size": self.size, "digest": self.digest}
        return {**said, "checked": self.checked, **({"upload": self.upload} if self.upload else {})}


class Output(ABC):
    """Bytes that nobody sees before the commit."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = xxhash.xxh3_128()
        self._pending = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if len(data) + len(self._pending) < _BUFFER_BYTES:
            self._pending += data
        else:
            self._drain()
            self._write(data)
        return len(data)

    def write_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        """``write`` of each, in one go."""
        self._drain()
        for piece in pieces:
            self._digest.update(piece)
        self._put(pieces)

    def tell(self) -> int:
        return self.size + len(self._pending)

    @property
    def digest(self) -> str:
        """xxh3-128, hex."""
        return self._digest.hexdigest()

    @abstractmethod
    def close(self) -> None:
        """Flush and make durable.  The digest and size are final after this."""

    @abstractmethod
    def discard(self) -> None:
        """Close without keeping anything."""

    @abstractmethod
    def published(self, root: Path, *, checked: bool) -> Published:
        """For the receipt, after ``close``.  root: the stage's output folder."""

    @abstractmethod
    def _put(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Take bytes that are hashed already, and count them in ``size``; they are the caller's again afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        try:
            if exc_type is None:
                self.close()
        except BaseException:
            self.discard()
            raise
        if exc_type is not None:
            self.discard()

    def _drain(self) -> None:
        if self._pending:
            self._write(self._pending)
            self._pending = bytearray()

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self._digest.update(data)
        self._put([data])
