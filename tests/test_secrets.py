"""What libraries of the network say of a signed URL reaches no log, no receipt, no reject and no terminal.

The errors are real ones: of requests, urllib3, http.client, aiohttp, fsspec and botocore, against servers that are not
there or break off.  The places are all through which an error's text leaves a process.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.errors import redact
from curation.options import say_error, set_up_logging
from curation.storage.urls import error_line
from tests import EXAMPLES, ROOT
from tests.servers.raw_answers import raw_answers

SECRETS = ("s3cr3tPw", "s3cr3tSig", "s3cr3tKey", "s3cr3tTok")
QUERY = "X-Amz-Signature=s3cr3tSig&X-Amz-Credential=s3cr3tKey%2F2026&X-Amz-Security-Token=s3cr3tTok"
URL = f"http://me:s3cr3tPw@127.0.0.1:9/a.tar?{QUERY}"


def of_requests() -> None:
    import requests

    requests.get(URL, timeout=5)


def of_requests_for_a_bad_url() -> None:
    import requests

    requests.get(f"nothing:/a.tar?{QUERY}", timeout=5)


def of_requests_for_a_status() -> None:
    import requests

    with raw_answers({}) as server:
        requests.get(f"{server.base}/x?{QUERY}", timeout=5).raise_for_status()


def of_urllib3() -> None:
    import urllib3

    urllib3.PoolManager(retries=1).request("GET", URL)


def of_http_client() -> None:
    import http.client

    http.client.HTTPConnection("127.0.0.1", 9).request("GET", f"/a b.tar?{QUERY}")


def of_aiohttp() -> None:
    import aiohttp

    async def ask() -> None:
        with raw_answers({}) as server:
            async with aiohttp.ClientSession(raise_for_status=True) as session, session.get(f"{server.base}/x?{QUERY}"):
                pass

    asyncio.run(ask())


def of_aiohttp_for_a_bad_url() -> None:
    import aiohttp

    async def ask() -> None:
        async with aiohttp.ClientSession() as session, session.get(f"http:///a?{QUERY}"):
            pass

    asyncio.run(ask())


def of_fsspec() -> None:
    import fsspec

    with raw_answers({}) as server, fsspec.open(f"{server.base}/x.csv?{QUERY}") as file:
        file.read()


def of_botocore() -> None:
    from botocore.exceptions import EndpointConnectionError

    raise EndpointConnectionError(endpoint_url=f"https://bucket.s3.example/a.tar?{QUERY}", error="")


def of_botocore_for_a_proxy() -> None:
    from botocore.exceptions import ProxyConnectionError

    raise ProxyConnectionError(proxy_url="http://me:s3cr3tPw@proxy:3128", error="")


ERRORS = [value for name, value in list(globals().items()) if name.startswith("of_")]


def chain(raiser: Callable[[], None]) -> Exception:
    """The error inside one of the project's, as sources are wrapped."""
    try:
        try:
            raiser()
        except Exception as error:
            raise RuntimeError(f"reading failed: {error}") from error
    except RuntimeError as error:
        return error
    raise AssertionError("nothing was raised")


def leaks(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize("raiser", ERRORS)
def test_the_log_and_the_terminal_hold_no_secret(
    raiser: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    error = chain(raiser)
    assert leaks(f"{error} {error.__cause__!r} {error.__cause__}"), "the library no longer says it; is the rule needed?"
    set_up_logging(quiet=False)
    logging.getLogger("curation").error(f"failed: {error}", exc_info=error)
    say_error(error)
    told = capsys.readouterr().err
    assert "reading failed" in told
    assert leaks(told) == leaks(error_line(error)) == leaks(redact(str(error.__cause__))) == []


@pytest.mark.parametrize("raiser", ERRORS)
def test_hiding_twice_is_hiding_once(raiser: Callable[[], None]) -> None:
    once = redact(str(chain(raiser)))
    assert redact(once) == once


def test_a_bug_that_nobody_expected_tells_none(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import threading\nfrom curation.options import exit_code\n"
        f"def fail(): raise RuntimeError({URL!r})\n"
        "@exit_code\ndef main(argv=None):\n    t = threading.Thread(target=fail); t.start(); t.join(); fail()\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: http://127.0.0.1:9/a.tar?…") == 2
    assert leaks(done.stdout + done.stderr) == []


def test_a_server_that_goes_away_leaves_none_in_any_file(tmp_path: Path) -> None:
    """Stage 01 on a signed URL: the whole log, and every file that it writes."""
    data = (EXAMPLES / "00000000.tar").read_bytes()
    begun = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (2 * len(data)) + data[:90_000]
    with raw_answers({f"/00000000.tar?{QUERY}": begun}) as server:
        url = f"{server.base}/00000000.tar?{QUERY}".replace("//", "//me:s3cr3tPw@")
        command = [sys.executable, "01_filter_noface.py", "--input", url, "--detector", "recorded"]
        command += ["--output", str(tmp_path / "captions"), "--edits", str(tmp_path / "edits")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"/00000000.tar?" in files
    assert leaks(done.stdout + done.stderr + files.decode("utf-8", "replace")) == []
