"""A folder of a bucket on S3, or on a server that speaks S3's protocol, through boto3.

Credentials, endpoint, region and proxies come from boto3's own variables and files.  An object appears whole or not at
all: a small one by one request, a larger one when its multipart upload is completed, and both on the condition of what
was there before.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from curation.errors import InfrastructureError, UsageError, install
from curation.publish.contents import Contents, checksum_of, crc_base64, crc_function
from curation.publish.store import BucketStore, Refused, Stamp, StoredFile, Upload, is_final, stamp_of, words_of
from curation.storage.retry import RetryPolicy, TransientError, retry_after_s
from curation.storage.urls import error_line

PART_BYTES = 16 << 20  # of every part but the last, because some stores want equal ones; S3 takes 10,000 of 5 MiB
MAX_PARTS: Final = 10_000
PARTS_AT_ONCE: Final = 3
RETRIES = RetryPolicy()
_CHECKSUMS: Final = {"crc64nvme": "ChecksumCRC64NVME", "crc32c": "ChecksumCRC32C", "crc32": "ChecksumCRC32",
                     "sha256": "ChecksumSHA256"}  # fmt: skip
_NO_ETAG: Final = '"00000000000000000000000000000000"'
_TRANSIENT: Final = frozenset(
    ("RequestTimeout", "OperationAborted", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
     "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
)  # fmt: skip
_UNKNOWN: Final = (400, 405, 501)  # what stores answer to a header that they do not know


class S3Store(BucketStore):
    """See ``BucketStore``."""

    def __init__(self, bucket: str, folder: str) -> None:
        super().__init__("s3", bucket, folder)
        self._bucket = bucket
        self._kind = "crc64nvme" if crc_function("crc64nvme") else "crc32"
        self._whole_checksums = True  # until the store says that it knows only those of parts
        self._with_md5 = False
        self._client = _client(self.url)

    # ---- asking

    def look(self, name: str) -> StoredFile | None:
        head = self._or_none(name, "head_object", ChecksumMode="ENABLED")
        return None if head is None else _described(name, head)

    def list(self, below: str = "") -> Iterator[StoredFile]:
        more: dict[str, str] = {}
        prefix = self._prefix + (f"{below}/" if below else "")
        while True:
            page = self._ask(below, "list_objects_v2", Prefix=prefix, **more)
            for entry in page.get("Contents") or ():
                if not entry["Key"].endswith("/"):  # what some tools write for a folder
                    name = entry["Key"][len(self._prefix) :]
                    yield StoredFile(name, int(entry["Size"]), _version(entry))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _read(self, name: str, at_most: int) -> bytes:
        def request() -> bytes:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
            with contextlib.closing(answer["Body"]) as body:
                wanted = min(int(answer["ContentLength"]), at_most + 1)
                data = bytes(body.read(wanted))
            if len(data) < wanted:
                raise TransientError("the answer ended early")
            return data

        return self._asked(name, request)

    def checksum_of(self, file: StoredFile, source: Path | bytes) -> str:
        kind, _, value = file.checksum.partition(":")
        if not value:
            return ""
        if not kind.endswith("-parts"):
            found = checksum_of(source, kind)
        else:
            head = self._or_none(file.name, "head_object", PartNumber=1)
            found = checksum_of(source, kind.removesuffix("-parts"), int(head["ContentLength"])) if head else ""
        return f"{kind}:{found}" if found else ""

    def close(self) -> None:
        self._client.close()

    # ---- the check at the start

    def _try_out(self, name: str) -> None:
        self._ask("", "list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        self._ask(name, "put_object", Body=b"curation", **self._checked(b"curation"))
        try:
            self.conditional = self._keeps_conditions(name)
            wrong = {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": crc_base64("crc32", 1)}
            self._with_md5 = self._answer_to(name, "put_object", Body=b"curation", **wrong) != 400
        finally:
            self._ask(name, "delete_object")

    def _keeps_conditions(self, name: str) -> bool:
        """Whether the store refuses to replace this object under conditions that do not hold."""
        conditions = ({"IfNoneMatch": "*"}, {"IfMatch": _NO_ETAG})
        if not all(self._answer_to(name, "put_object", Body=b"other", **one) == 412 for one in conditions):
            return False
        upload = self._ask(name, "create_multipart_upload")["UploadId"]
        try:
            tag = self._ask(name, "upload_part", UploadId=upload, PartNumber=1, Body=b"other")["ETag"]
            end = {"UploadId": upload, "MultipartUpload": {"Parts": [{"PartNumber": 1, "ETag": tag}]}}
            return all(self._answer_to(name, "complete_multipart_upload", **end, **one) == 412 for one in conditions)
        finally:
            self._abort(name, upload)

    def _answer_to(self, name: str, method: str, **arguments: Any) -> int:
        """The status of the answer: 200, or that of the refusal."""
        try:
            self._request(name, method, arguments, tries=2)
        except Refused as error:
            return error.status
        except InfrastructureError:  # 500 and the like, for a header that it does not know
            return 500
        return 200

    # ---- writing

    def _write(self, upload: Upload) -> str:
        contents = Contents(upload, self._kind)
        if upload.size <= PART_BYTES:
            self._send_whole(upload, contents)
        else:
            self._send_parts(upload, contents)
        return contents.checksum

    def _send_whole(self, upload: Upload, contents: Contents) -> None:
        data = b"".join(contents.blocks(PART_BYTES))
        contents.insist()
        checks = self._checked(data)
        self._ask(upload.name, "put_object", Body=data, Metadata=words_of(upload.stamp), **checks, **self._if(upload))

    def _send_parts(self, upload: Upload, contents: Contents) -> None:
        part_bytes = max(PART_BYTES, -(-upload.size // MAX_PARTS))
        begun = self._begin(upload)
        try:
            parts = self._sent(upload.name, begun, contents.blocks(part_bytes))
            contents.insist()
            whole = self._whole(contents, upload.size)
            end = {"UploadId": begun, "MultipartUpload": {"Parts": parts}, **whole, **self._if(upload)}
            self._ask(upload.name, "complete_multipart_upload", **end)
        except BaseException:
            with contextlib.suppress(InfrastructureError):  # the bucket's lifecycle rule removes what is left
                self._abort(upload.name, begun)
            raise

    def _begin(self, upload: Upload) -> str:
        ask = partial(self._ask, upload.name, "create_multipart_upload", Metadata=words_of(upload.stamp))
        if self._whole_checksums:
            try:
                return str(ask(ChecksumAlgorithm=self._kind.upper(), ChecksumType="FULL_OBJECT")["UploadId"])
            except Refused as error:
                if error.status not in _UNKNOWN:
                    raise
                self._whole_checksums = False
        return str(ask()["UploadId"])

    def _sent(self, name: str, upload: str, blocks: Iterator[bytes]) -> Sequence[dict[str, Any]]:
        """Send the parts, a few at once, and return what completing the upload needs."""
        under_way: deque[Future[dict[str, Any]]] = deque()
        parts: list[dict[str, Any]] = []
        senders = ThreadPoolExecutor(PARTS_AT_ONCE, "upload")
        try:
            for number, block in enumerate(blocks, 1):
                if len(under_way) >= PARTS_AT_ONCE:
                    parts.append(under_way.popleft().result())
                under_way.append(senders.submit(self._send_part, name, upload, number, block))
            parts += [one.result() for one in under_way]
        finally:
            senders.shutdown(cancel_futures=True)  # a part that arrives after the abort might stay
        return parts

    def _send_part(self, name: str, upload: str, number: int, data: bytes) -> dict[str, Any]:
        checks = self._checked(data)
        answer = self._ask(name, "upload_part", UploadId=upload, PartNumber=number, Body=data, **checks)
        said = _CHECKSUMS[self._kind]
        known = {said: checks[said]} if self._whole_checksums else {}
        return {"PartNumber": number, "ETag": answer["ETag"], **known}

    def _whole(self, contents: Contents, size: int) -> dict[str, Any]:
        if not self._whole_checksums:
            return {}
        crc = crc_base64(self._kind, contents.crc)
        return {_CHECKSUMS[self._kind]: crc, "ChecksumType": "FULL_OBJECT", "MpuObjectSize": size}

    def _checked(self, data: bytes) -> dict[str, str]:
        """By which the store recognises that the bytes arrived whole."""
        add = crc_function(self._kind)
        assert add is not None
        found = {"ChecksumAlgorithm": self._kind.upper(), _CHECKSUMS[self._kind]: crc_base64(self._kind, add(data, 0))}
        if self._with_md5:
            found["ContentMD5"] = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return found

    def _if(self, upload: Upload) -> dict[str, str]:
        if not self.conditional or upload.replaces is None:
            return {}
        return {"IfMatch": f'"{upload.replaces}"'} if upload.replaces else {"IfNoneMatch": "*"}

    def _abort(self, name: str, upload: str) -> None:
        try:
            self._ask(name, "abort_multipart_upload", UploadId=upload)
        except Refused as error:
            if not error.is_missing:
                raise

    def _delete(self, name: str, version: str) -> None:
        try:
            self._ask(name, "delete_object", **({"IfMatch": f'"{version}"'} if version else {}))
        except Refused as error:
            if not version or error.status not in _UNKNOWN:
                raise
            self._ask(name, "delete_object")  # it keeps conditions of writes only

    # ---- requests

    def _or_none(self, name: str, method: str, **arguments: Any) -> Any:
        try:
            return self._ask(name, method, **arguments)
        except Refused as error:
            if error.is_missing:
                return None
            raise

    def _ask(self, name: str, method: str, **arguments: Any) -> Any:
        """The store's answer; it is asked again where the connection broke or the store was busy.

        Raises Refused, and InfrastructureError where it does not answer.
        """
        return self._request(name, method, arguments)

    def _request(self, name: str, method: str, arguments: Mapping[str, Any], tries: int = 0) -> Any:
        key = {} if method.startswith("list_") else {"Key": self._prefix + name}

        return self._asked(name, lambda: getattr(self._client, method)(Bucket=self._bucket, **key, **arguments), tries)

    def _policy(self) -> RetryPolicy:
        return RETRIES

    @contextlib.contextmanager
    def _translated(self, shown: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except ClientError as error:
            told = error.response.get("ResponseMetadata", {})
            code, status = str(error.response.get("Error", {}).get("Code", "")), int(told.get("HTTPStatusCode", 0))
            line = error_line(error)
            if code not in _TRANSIENT and (is_final(status) or code == "NotImplemented"):
                raise Refused(shown, line, status, code) from None
            raise TransientError(line, retry_after_s(told.get("HTTPHeaders", {}).get("retry-after")) or 0.0) from error
        except (HTTPClientError, ResponseParserError, OSError) as error:
            raise TransientError(error_line(error)) from error
        except BotoCoreError as error:
            raise Refused(shown, error_line(error), 0) from None


def _client(url: str) -> Any:
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UsageError(f"{url} needs boto3 ({error}): {install('boto3')}") from None
    public = os.environ.get("FSSPEC_S3_ANON", "").lower() in ("1", "true", "yes")  # as for reading, which s3fs does
    config = Config(
        connect_timeout=RETRIES.connect_s,
        read_timeout=RETRIES.read_s,
        max_pool_connections=64,
        retries={"total_max_attempts": 1},  # the waiting is done here
        request_checksum_calculation="when_required",  # they are given with each request
        response_checksum_validation="when_required",
        **({"signature_version": UNSIGNED} if public else {}),
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # no such profile, no valid endpoint
        raise UsageError(f"{url}: {error_line(error)}; see the variables and files of boto3") from None


def _described(name: str, head: Mapping[str, Any]) -> StoredFile:
    version = _version(head)
    return StoredFile(name, int(head["ContentLength"]), version, _checksum(head, version), _stamp(head))


def _version(head: Mapping[str, Any]) -> str:
    return str(head.get("ETag") or "").strip('"')


def _checksum(head: Mapping[str, Any], version: str) -> str:
    """That of the whole object, or ``<kind>-parts:`` and the checksum of its parts' checksums with their number."""
    for kind, said in _CHECKSUMS.items():
        value, dash, parts = str(head.get(said) or "").partition("-")
        try:
            found = base64.b64decode(value, validate=True).hex()
        except ValueError:
            continue
        composite = dash or head.get("ChecksumType", "COMPOSITE" if "-" in version else "") == "COMPOSITE"
        if found:
            count = parts or version.partition("-")[2]
            return f"{kind}-parts:{found}-{count}" if composite else f"{kind}:{found}"
    return ""


def _stamp(head: Mapping[str, Any]) -> Stamp | None:
    return stamp_of({str(word).lower(): str(value) for word, value in (head.get("Metadata") or {}).items()})
