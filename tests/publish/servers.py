"""Real S3 servers on this machine, behind a relay that counts the requests and breaks connections at chosen ones.

``moto`` keeps conditions and checksums.  ``rclone serve s3`` keeps no conditions; it is the second implementation.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

from curation.publish.store import Changed, Stamp, Store, Upload
from tests.processes import wait_until
from tests.servers.relay import Relay

KINDS = ("moto", "rclone")
BUCKET = "out"


@dataclass
class S3Server:
    """``client`` asks the server itself; whoever reads AWS_ENDPOINT_URL asks through the relay."""

    kind: str
    client: Any
    relay: Relay

    def objects(self) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {o["Key"]: self.client.get_object(Bucket=BUCKET, Key=o["Key"])["Body"].read() for o in found}

    def uploads(self) -> list[str]:
        return [upload["Key"] for upload in self._uploads()]

    def _uploads(self) -> list[dict[str, Any]]:
        try:
            return list(self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads") or ())
        except self.client.exceptions.NoSuchUpload:  # as rclone says that there is none
            return []

    def asked(self, method: str) -> list[str]:
        return [line for line in self.relay.asked if line.startswith(method)]

    def empty(self) -> None:
        self.relay.reset()
        for upload in self._uploads():
            self.client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
        for key in self.objects():
            self.client.delete_object(Bucket=BUCKET, Key=key)


def upload_of(data: bytes, name: str = "a/1.tar", generation: int = 1, replaces: str | None = "") -> Upload:
    stamp = Stamp(xxhash.xxh3_128_hexdigest(data), generation, f"mark-{generation}")
    return Upload(name, data, len(data), stamp, replaces)


CHANGES = ("other bytes", "longer", "shorter", "gone")  # of a file that is to be sent


def send_what_has_changed(store: Store, data: bytes, how: str, path: Path) -> None:
    """A store sends nothing of a file that is not what its receipt says."""
    wanted = upload_of(data)
    other = {"other bytes": data[:-1] + b"?", "longer": data + b"?", "shorter": data[:-1]}
    if how in other:
        path.write_bytes(other[how])
    with pytest.raises(Changed) as changed:
        store.send([Upload(wanted.name, path, wanted.size, wanted.stamp, "")])
    assert changed.value.name == "a/1.tar"


@contextlib.contextmanager
def serve_s3(kind: str, folder: Path) -> Iterator[S3Server]:
    """A server with an empty bucket ``out``; the environment names it during the block."""
    import boto3
    import s3fs

    with contextlib.ExitStack() as stack:
        s3fs.S3FileSystem.clear_instance_cache()  # those of another server: the endpoint is no part of their key
        stack.callback(s3fs.S3FileSystem.clear_instance_cache)
        port = stack.enter_context(_moto() if kind == "moto" else _rclone(folder))
        relay = Relay(port)
        stack.callback(relay.close)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        told = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}", "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "opensesame", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        for name, value in told.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        with contextlib.suppress(client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=BUCKET)
        yield S3Server(kind, client, relay)
        client.close()


@contextlib.contextmanager
def _moto() -> Iterator[int]:
    from moto.s3 import models
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1000)  # so that a small file has several parts
            yield moto.get_host_and_port()[1]
    finally:
        moto.stop()


def keep_if_match(patch: pytest.MonkeyPatch) -> None:
    """Let moto keep ``If-Match`` at the end of a multipart upload too, as S3 does; it keeps all other conditions."""
    from moto.s3.exceptions import PreconditionFailed
    from moto.s3.responses import S3Response

    before = S3Response._key_response_post

    def answer(self: Any, request: Any, body: bytes, bucket: str, query: dict[str, Any], key: str) -> Any:
        wanted = self.headers.get("If-Match")
        if "uploadId" in query and wanted:
            there = self.backend.get_object(bucket, key)
            if there is None or there.etag.strip('"') != wanted.strip('"'):
                raise PreconditionFailed("If-Match")
        return before(self, request, body, bucket, query, key)

    patch.setattr(S3Response, "_key_response_post", answer)


@contextlib.contextmanager
def _rclone(folder: Path) -> Iterator[int]:
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("rclone")
    command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", "/dev/null"]
    process = subprocess.Popen([*map(str, command), str(folder)], stderr=subprocess.DEVNULL)

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        wait_until(answers, "rclone")
        yield port
    finally:
        process.kill()
        process.wait()
