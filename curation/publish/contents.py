"""What a file holds, read once: its bytes block by block, with its digest and its checksums computed on the way."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import xxhash

from curation.errors import InfrastructureError
from curation.publish.store import Changed, Upload

BLOCK_BYTES: Final = 4 << 20
_CRC_BYTES: Final = {"crc32": 4, "crc32c": 4, "crc64nvme": 8}

Crc = Callable[[bytes, int], int]
"""Of some bytes that come after others, of which it is the checksum so far (0 for none)."""


def crc_function(kind: str) -> Crc | None:
    """The function of a CRC; None where no package here computes it fast enough."""
    if kind == "crc32":
        return zlib.crc32
    try:
        if kind == "crc64nvme":
            from awscrt.checksums import crc64nvme

            return _plain(crc64nvme)
        if kind == "crc32c":
            from google_crc32c import extend

            return lambda data, before: int(extend(before, data))
    except ImportError:
        pass
    return None


def _plain(function: Any) -> Crc:
    return lambda data, before: int(function(data, before))


def crc_hex(kind: str, value: int) -> str:
    """A CRC as ``StoredFile.checksum`` has it."""
    return f"{value:0{2 * _CRC_BYTES[kind]}x}"


def crc_base64(kind: str, value: int) -> str:
    """A CRC as stores want it in their headers."""
    return base64.b64encode(value.to_bytes(_CRC_BYTES[kind], "big")).decode()


class Contents:
    """The bytes of an upload, in order.  They are hashed before they are handed out.

    Args:
        upload: What is sent.
        kind: Of the CRC of all bytes, which is ``crc`` after the last one; "" for none.
    """

    def __init__(self, upload: Upload, kind: str = "") -> None:
        self._upload = upload
        self._digest = xxhash.xxh3_128()
        self._kind, self._add = kind, crc_function(kind) if kind else None
        self.wanted = upload.size
        self.size = 0
        self.crc = 0

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Blocks of that size, the last one smaller; never more bytes than the upload says.  Raises Changed."""
        with _readable(self._upload.source), self._opened() as file:
            while block := _filled(file, min(block_bytes, self._upload.size - self.size)):
                self._digest.update(block)
                self.crc = self._add(block, self.crc) if self._add else 0
                self.size += len(block)
                yield block
            if file.read(1):
                raise self._changed("it is longer than its receipt says")

    @property
    def checksum(self) -> str:
        """The CRC of all bytes as ``StoredFile.checksum`` has it, "" until they were handed out."""
        return f"{self._kind}:{crc_hex(self._kind, self.crc)}" if self._add and self.size == self.wanted else ""

    def insist(self) -> None:
        """Raise Changed unless all bytes that were handed out are those that the receipt names."""
        wanted = self._upload.stamp.digest
        if self.size != self._upload.size:
            raise self._changed(f"it has {self.size:,} bytes, its receipt says {self._upload.size:,}")
        if wanted and self._digest.hexdigest() != wanted:
            raise self._changed("its content is not what its receipt says")

    def _opened(self) -> BinaryIO:
        source = self._upload.source
        if isinstance(source, bytes):
            return io.BytesIO(source)
        try:
            return open(source, "rb", buffering=0)
        except FileNotFoundError:
            raise self._changed("it is not there any more") from None

    def _changed(self, why: str) -> Changed:
        name = self._upload.name if isinstance(self._upload.source, bytes) else str(self._upload.source)
        return Changed(f"{name}: {why}", self._upload.name)


@contextlib.contextmanager
def _readable(source: Path | bytes) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InfrastructureError(f"{source!s}: cannot be read ({error.strerror})") from error


def _filled(file: BinaryIO, count: int) -> bytes:
    """As many bytes; fewer at the end of the file only."""
    data = file.read(count) if count else b""
    if len(data) == count or not data:
        return data
    pieces = [data]
    missing = count - len(data)
    while missing and (data := file.read(missing)):
        pieces.append(data)
        missing -= len(data)
    return b"".join(pieces)


def checksum_of(source: Path | bytes, kind: str, part_bytes: int = 0) -> str:
    """A checksum of a whole content, hex; "" where nothing here computes that kind.

    Args:
        source: A file, or bytes.
        kind: ``crc32``, ``crc32c``, ``crc64nvme``, ``sha256``, ``md5``, ``xxh3`` or ``git``.
        part_bytes: If it is above 0, the checksum of the checksums of the parts of that size, as S3 says it.

    Raises:
        OSError: The file cannot be read.
    """
    add = crc_function(kind)
    if add is None and kind not in ("sha256", "md5", "xxh3", "git"):
        return ""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    whole, parts = _Hash(kind, add, size), 0
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0) as file:
        if not part_bytes:
            while block := file.read(BLOCK_BYTES):
                whole.update(block)
            return whole.digest().hex()
        while block := file.read(min(BLOCK_BYTES, part_bytes)):
            part, left = _Hash(kind, add, size), part_bytes
            while block:
                part.update(block)
                left -= len(block)
                block = file.read(min(BLOCK_BYTES, left)) if left else b""
            whole.update(part.digest())
            parts += 1
    return f"{whole.digest().hex()}-{parts}"


def hashes_of(read: Contents, kinds: Sequence[str]) -> dict[str, str]:
    """Several checksums of an upload, hex, by reading it once.  Raises Changed if it is not what its receipt says."""
    hashes = {kind: _Hash(kind, crc_function(kind), read.wanted) for kind in kinds}
    for block in read.blocks():
        for one in hashes.values():
            one.update(block)
    read.insist()
    return {kind: one.digest().hex() for kind, one in hashes.items()}


class _Hash:
    """A CRC or a hash, with one way to ask it."""

    def __init__(self, kind: str, add: Crc | None, size: int) -> None:
        self._kind, self._add, self._crc = kind, add, 0
        self._hash: Any = None
        if kind == "xxh3":
            self._hash = xxhash.xxh3_128()
        elif kind == "git":
            self._hash = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        elif add is None:
            self._hash = hashlib.new(kind, usedforsecurity=False)

    def update(self, data: bytes) -> None:
        if self._add is not None:
            self._crc = self._add(data, self._crc)
        else:
            self._hash.update(data)

    def digest(self) -> bytes:
        if self._add is not None:
            return self._crc.to_bytes(_CRC_BYTES[self._kind], "big")
        return bytes(self._hash.digest())
