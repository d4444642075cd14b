"""A folder of a bucket of Google Cloud Storage, through its own client.

Every object has a generation, which the store counts up with each write: writes name the one that they replace.  The
listing tells size, generation, CRC32C and metadata, so nothing is asked for by itself.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from curation.errors import InfrastructureError, UsageError, install
from curation.jsonio import clean_text
from curation.publish.contents import Contents, checksum_of
from curation.publish.store import BucketStore, Refused, Stamp, StoredFile, Upload, is_final, stamp_of, words_of
from curation.storage.retry import RetryPolicy, TransientError, retry_after_s
from curation.storage.urls import error_line, redact

PART_BYTES = 16 << 20  # of one request of an upload, a multiple of 256 KiB; up to 8 MiB the client sends by one
RETRIES = RetryPolicy()
_TRIAL: Final = b"curation"
_LONGEST_REASON: Final = 300


class GoogleStore(BucketStore):
    """See ``BucketStore``."""

    def __init__(self, bucket: str, folder: str) -> None:
        super().__init__("gs", bucket, folder)
        self._client = _client(self.url)
        self._bucket = self._client.bucket(bucket)
        # The waiting is done here, as for every other store.
        self._once = {"retry": None, "timeout": (RETRIES.connect_s, RETRIES.read_s)}

    # ---- asking

    def look(self, name: str) -> StoredFile | None:
        blob = self._asked(name, lambda: self._bucket.get_blob(self._prefix + name, **self._once))
        return None if blob is None else self._described(blob)

    def list(self, below: str = "") -> Iterator[StoredFile]:
        prefix, token = self._prefix + (f"{below}/" if below else ""), None
        while True:
            blobs, token = self._asked(below, partial(self._page, prefix, token))
            yield from (self._described(blob) for blob in blobs if not blob.name.endswith("/"))
            if token is None:
                return

    def _page(self, prefix: str, token: str | None, at_most: int | None = None) -> tuple[Sequence[Any], str | None]:
        """Some objects, and what the next request for more of them names."""
        found = self._client.list_blobs(
            self._bucket, prefix=prefix, page_token=token, max_results=at_most, **self._once
        )
        return [*next(found.pages, ())], found.next_page_token

    def _read(self, name: str, at_most: int) -> bytes:
        blob = self._bucket.blob(self._prefix + name)
        ask = partial(blob.download_as_bytes, start=0, end=at_most, checksum=None, **self._once)
        try:
            return bytes(self._asked(name, ask))
        except Refused as error:
            if error.status != 416:  # an empty object has no first byte
                raise
            return b""

    def checksum_of(self, file: StoredFile, source: Path | bytes) -> str:
        kind = file.checksum.partition(":")[0]
        found = checksum_of(source, kind)
        return f"{kind}:{found}" if found else ""

    def close(self) -> None:
        self._client.close()

    # ---- the check at the start

    def _try_out(self, name: str) -> None:
        try:
            self._asked("", partial(self._page, self._prefix, None, 1))
        except Refused as error:
            raise Refused(self.url, str(error), error.status, "NoSuchBucket") if error.is_missing else error from None
        trial = partial(io.BytesIO, _TRIAL)
        overtaken = _Overtaken(_TRIAL, lambda: self._put(name, trial(), len(_TRIAL), None))
        at_the_end = self._refuses(name, overtaken, None)
        try:
            self.conditional = at_the_end and self._refuses(name, trial(), len(_TRIAL))
        finally:
            self._delete(name, "")

    def _refuses(self, name: str, source: io.BytesIO, size: int | None) -> bool:
        """Whether the store does not replace what is there by the time when the upload ends."""
        try:
            self._put(name, source, size, None, if_generation_match=0)
        except Refused as error:
            if error.status != 412:
                raise
            return True
        return False

    # ---- writing

    def _write(self, upload: Upload) -> str:
        contents = Contents(upload, "crc32c")
        guarded = self.conditional and upload.replaces is not None
        condition = {"if_generation_match": _generation(upload.replaces or "")} if guarded else {}
        self._put(upload.name, _Source(contents), upload.size, upload.stamp, **condition)
        return contents.checksum

    def _put(self, name: str, source: Any, size: int | None, stamp: Stamp | None, **condition: int) -> None:
        """Send an object by one request, or in parts if it is larger or if ``size`` is None.

        Each request is tried again by itself.  Raises TransientError where the upload must be begun again.
        """
        blob = self._bucket.blob(self._prefix + name, chunk_size=PART_BYTES)
        blob.metadata = words_of(stamp) if stamp else None
        again = partial(partial, self._asked, name)  # makes a request into one that is tried again, as Retry does
        given = {"content_type": "application/octet-stream", "checksum": "crc32c", **self._once, "retry": again}
        try:
            blob.upload_from_file(source, size=size, **given, **condition)
        except ValueError as error:  # the store has fewer bytes of a part than were sent
            raise TransientError(error_line(error)) from error

    def _delete(self, name: str, version: str) -> None:
        condition = {"if_generation_match": _generation(version)} if version else {}
        self._asked(name, partial(self._bucket.blob(self._prefix + name).delete, **condition, **self._once))

    # ---- requests

    def _described(self, blob: Any) -> StoredFile:
        try:
            crc = base64.b64decode(blob.crc32c or "", validate=True).hex()
        except ValueError:
            crc = ""
        stamp = stamp_of({str(word): str(value) for word, value in (blob.metadata or {}).items()})
        version = "" if blob.generation is None else str(blob.generation)
        checksum = f"crc32c:{crc}" if crc else ""
        return StoredFile(blob.name[len(self._prefix) :], int(blob.size or 0), version, checksum, stamp)

    def _policy(self) -> RetryPolicy:
        return RETRIES

    @contextlib.contextmanager
    def _translated(self, shown: str) -> Iterator[None]:
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError, TransportError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        from requests import RequestException

        try:
            yield
        except DataCorruption as error:
            why = f"the store keeps other bytes than were sent ({error_line(error)})"
            raise InfrastructureError(f"{shown}: {why}; remove the object and publish again") from None
        except (GoogleAPICallError, InvalidResponse) as error:
            response: Any = error.response
            status = int(response.status_code)
            line = _reason(response)
            if is_final(status) and status != 308:  # by which it says that nothing of a part has arrived
                lost = status in (404, 410) and response.request.method == "PUT"  # the session of an upload in parts
                raise Refused(shown, line, status, "NoSuchUpload" if lost else "") from None
            raise TransientError(line, retry_after_s(response.headers.get("Retry-After")) or 0.0) from error
        except (RequestException, TransportError, ConnectionError) as error:
            raise TransientError(error_line(error)) from error
        except GoogleAuthError as error:
            raise Refused(shown, error_line(error), 0) from None


class _Source:
    """The bytes of an upload as the client reads them.  The last ones only if all are those of the receipt."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._blocks: Iterator[bytes] | None = None

    def tell(self) -> int:
        return self._contents.size

    def read(self, size: int) -> bytes:
        """The next bytes; the client asks for as many each time, and for fewer at the end.  Raises Changed."""
        if self._blocks is None:
            self._blocks = self._contents.blocks(size)
        block = next(self._blocks, b"")
        if len(block) < size or self._contents.size == self._contents.wanted:
            next(self._blocks, None)
            self._contents.insist()
        return block


class _Overtaken(io.BytesIO):
    """The bytes of an upload during which somebody else writes the object."""

    def __init__(self, data: bytes, other: Callable[[], None]) -> None:
        super().__init__(data)
        self._other = other

    def read(self, size: int | None = -1) -> bytes:
        self._other()
        return super().read(size)


def _generation(version: str) -> int:
    """For a condition; 0 is that of an object that is not there."""
    return int(version) if version.isdecimal() else 0


def _client(url: str) -> Any:
    try:
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ImportError as error:
        raise UsageError(f"{url} needs google-cloud-storage ({error}): {install('google-cloud-storage')}") from None
    try:
        return storage.Client(project=None)  # objects need none, and not all credentials have one
    except (GoogleAuthError, OSError, ValueError) as error:
        raise UsageError(f"{url}: {error_line(error)} (credentials come from the environment)") from None


def _reason(response: Any) -> str:
    """What the store answers, on one line."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = str(response.reason or "")
    return f"HTTP {response.status_code}: {clean_text(redact(said))[:_LONGEST_REASON]}"
