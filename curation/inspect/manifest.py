"""A list of digests as coreutils' ``sha256sum -c`` reads it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def manifest_line(name: str, sha256: str) -> bytes:
    """``<digest>  <name>``; a name with a backslash or a line break is escaped, and the line says so by a backslash."""
    escaped = "".join(_ESCAPES.get(char, char) for char in name)
    return os.fsencode(f"{chr(92) if escaped != name else ''}{sha256}  {escaped}\n")


def write_manifest(path: Path, rows: Iterable[tuple[Path, str]]) -> None:
    """Write (file, SHA-256) rows, the files named from the manifest's own folder: ``sha256sum -c`` is run there.

    The file appears whole or not at all.  Raises OSError.
    """
    folder = path.parent.resolve()
    lines = [manifest_line(os.path.relpath(file.resolve(), folder), sha256) for file, sha256 in rows]
    write_whole(path, b"".join(lines))


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears whole or not at all.  Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
