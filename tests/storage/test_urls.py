"""Secrets are taken out of URLs and of what libraries say; paths of this machine stay as they are."""

from __future__ import annotations

import pytest
import requests

from curation.storage.urls import ObjectInfo, compressions_in, error_line, object_info, redact

TOKEN = "hf_" + "s3cr3tT0ken" * 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"GET https://me:pa55@proxy/x?X-Amz-Signature=s3 Bearer {TOKEN} token mine123 {TOKEN}",
            "GET https://proxy/x?… Bearer *** token *** hf_***",
        ),
        ("Authorization: Basic dXNlcjpwYTU1", "Authorization: Basic ***"),
        (
            "Max retries exceeded with url: /w.pt?sig=s3cr3t (Caused by …)",
            "Max retries exceeded with url: /w.pt?… (Caused by …)",
        ),
        ("s3://key:s3cr3t@bucket/a.tar#x", "s3://bucket/a.tar?…"),
        (
            "403, message='Forbidden', url='https://h/i.jpg?token=s3'",
            "403, message='Forbidden', url='https://h/i.jpg?…'",
        ),
        ("/data/hf_tables/basic set/part-?.csv", "/data/hf_tables/basic set/part-?.csv"),
    ],
)
def test_redacting(text: str, shown: str) -> None:
    assert redact(text, "mine123", "") == shown


def test_what_requests_says_of_a_url_holds_no_secret() -> None:
    with pytest.raises(requests.RequestException) as error:
        requests.get("http://user:s3cr3t@127.0.0.1:9/w.pt?signature=s3cr3t", timeout=5)
    assert "s3cr3t" in str(error.value)
    assert "s3cr3t" not in error_line(error.value)
    assert "/w.pt?…" in error_line(error.value)


def test_filesystems_have_several_names_for_one_thing() -> None:
    assert object_info({"size": 7, "ETag": '"a"', "LastModified": "now"}) == ObjectInfo(7, '"a"')
    assert object_info({"size": 7, "mtime": 1.5}) == ObjectInfo(7, modified="1.5")
    assert object_info({}) == ObjectInfo(None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", []), ("utf-8", []), ("none, identity", []), ("GZIP", ["gzip"]), ("utf-8, deflate ,br", ["deflate", "br"])],
)
def test_a_content_encoding_counts_where_it_names_a_compression(value: str, expected: list[str]) -> None:
    assert compressions_in(value) == expected
