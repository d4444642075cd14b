"""Who gets the key, whose certificate is trusted, and which addresses are asked at all."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.errors import InfrastructureError, UsageError
from curation.serving.connection import EndpointError, get, is_no_server, post, read_key, servers_words
from curation.serving.pool import EndpointPool, endpoint_urls
from curation.serving.session import Session
from curation.serving.wire import Request
from tests.servers.odd_server import MODEL, Answer, Asked, odd_server

KEY = "sk-s3cr3t"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CURATION_API_KEY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def wants_key(asked: Asked) -> Answer:
    if asked.headers.get("Authorization") == f"Bearer {KEY}":
        return Answer()
    given = asked.headers.get("Authorization", "nothing")
    return Answer(json.dumps({"error": {"message": f"Incorrect API key provided: {given}"}}), 401)


# ---- the key


def test_the_key_is_sent_with_every_request() -> None:
    with odd_server(wants_key) as server:
        pool = EndpointPool([server.url], MODEL, key=KEY)
        pool.open()
        assert pool.ask(Request(user="x")).text
        assert {asked.headers.get("Authorization") for asked in server.asked} == {f"Bearer {KEY}"}


def test_a_server_that_repeats_the_key_does_not_bring_it_into_the_log() -> None:
    with odd_server(wants_key) as server:
        pool = EndpointPool([server.url], MODEL, key=f"{KEY}-old")
        pool.open()
        with pytest.raises(InfrastructureError, match="Incorrect API key provided") as caught:
            pool.ask(Request(user="x"))
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_neither_the_key_nor_the_question_elsewhere(status: int) -> None:
    with odd_server() as other, odd_server() as server:
        server.behaviour = lambda asked: Answer("", status, {"Location": other.url + asked.path})
        pool = EndpointPool([server.url], MODEL, key=KEY)
        pool.open()
        with pytest.raises(InfrastructureError, match=f"{status}: it redirects to {other.url}/v1/chat"):
            pool.ask(Request(user="x"))
        assert other.asked == []


def test_neither_netrc_nor_cookies_say_who_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cr3t\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with odd_server() as server, Session() as session:
        server.other = lambda asked: Answer("{}", 200, {"Set-Cookie": "a=b"})
        get(session, f"{server.url}/v1/models", 5.0)
        get(session, f"{server.url}/v1/models", 5.0)
        for asked in server.asked:
            assert "Authorization" not in asked.headers and "Cookie" not in asked.headers


def test_a_user_and_password_in_the_url_are_sent_in_place_of_the_key() -> None:
    with odd_server() as server, Session(KEY) as session:
        post(
            session, server.url.replace("http://", "http://user:pass@") + "/v1/chat/completions", b'{"prompt":"x"}', 5.0
        )
        assert server.asked[0].headers["Authorization"].startswith("Basic ")


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_key(None, registered=False) == ""
    monkeypatch.setenv("CURATION_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OTHER", "other")
    assert read_key(None, registered=False) == KEY
    assert read_key("OTHER", registered=False) == "other"
    assert read_key(None, registered=True) == "", "whoever can write into the folder could ask for it"
    assert read_key("CURATION_API_KEY", registered=True) == KEY


@pytest.mark.parametrize("name", ["NOT_SET", "sk-proj-s3cr3t", "s3cr3t s3cr3t", ""])
def test_a_variable_without_a_key_is_an_error_that_repeats_nothing(name: str) -> None:
    """Perhaps the user wrote the key itself."""
    with pytest.raises(UsageError, match="--api_key_env") as caught:
        read_key(name, registered=False)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("key", ["two words", "a\nHost: b", "ключ"])
def test_what_can_be_no_key_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURATION_API_KEY", key)
    with pytest.raises(UsageError, match="key") as caught:
        read_key(None, registered=False)
    assert key not in str(caught.value)


@pytest.mark.parametrize("endpoints", ["ftp://user:s3cr3t@h:1", "user:s3cr3t@h:1", "htp:/user:s3cr3t@h"])
def test_a_url_that_is_refused_shows_no_password(endpoints: str) -> None:
    with pytest.raises(UsageError, match="is not a URL") as caught:
        endpoint_urls("1", endpoints=endpoints)
    assert "s3cr3t" not in str(caught.value)


# ---- certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the site's own, for 127.0.0.1."""
    file = tmp_path_factory.mktemp("ca") / "server.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=site"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(file.with_suffix(".key")), "-out", str(file)]
    subprocess.run([*request, *names, *files], check=True, capture_output=True)
    return file


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_the_sites_own_certificates_are_trusted(
    variable: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(certificate))
    with odd_server(certificate=certificate) as server:
        pool = EndpointPool([server.url], MODEL)
        pool.open()
        assert pool.ask(Request(user="x")).text


def test_a_certificate_that_is_not_trusted_is_told(certificate: Path) -> None:
    with odd_server(certificate=certificate) as server:
        with pytest.raises(InfrastructureError, match=r"certificate is not trusted \(self.signed.*SSL_CERT_FILE"):
            EndpointPool([server.url], MODEL).open()
        assert server.asked == []


def test_certificates_that_are_not_there_are_told(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with odd_server(certificate=certificate) as server, pytest.raises(InfrastructureError, match="SSL_CERT_FILE"):
        EndpointPool([server.url], MODEL).open()


def test_a_certificate_for_another_name_is_told(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with odd_server(certificate=certificate) as server:
        elsewhere = server.url.replace("127.0.0.1", "localhost")
        with pytest.raises(InfrastructureError, match=r"certificate is not trusted.*localhost"):
            EndpointPool([elsewhere], MODEL).open()


def test_tls_to_a_server_without_it_is_told() -> None:
    with odd_server() as server, pytest.raises(InfrastructureError, match="does not speak TLS: write http://"):
        EndpointPool([server.url.replace("http:", "https:")], MODEL).open()


# ---- addresses


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "10.1.2.3", "fd12::1", "gpu-1", "192.168.0.7", "8.8.8.8", "100.64.0.1"]
)
def test_what_model_servers_have_for_addresses(host: str) -> None:
    assert is_no_server(host, registered=True) == ""


def test_a_link_local_server_is_asked_where_the_user_names_it() -> None:
    """Two machines with a cable between them have no other addresses."""
    assert is_no_server("169.254.7.7", registered=False) == ""
    assert "link-local" in is_no_server("169.254.7.7", registered=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://0251.0376.0251.0376",
        "http://[::ffff:169.254.169.254]",
        "http://100.100.100.200",
        "http://[fd00:ec2::254]",
    ],
)
@pytest.mark.parametrize("registered", [False, True])
def test_no_connection_leads_to_a_metadata_service(url: str, registered: bool) -> None:
    with Session(registered=registered) as session, pytest.raises(EndpointError, match="not a model server") as caught:
        post(session, f"{url}/api/chat", b"{}", 5.0)
    assert caught.value.refused


def test_the_address_behind_a_name_counts_also_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has one address for the check and another for the connection."""
    real, turns = socket.getaddrinfo, iter(["8.8.8.8"])

    def rebinding(host: str, *args: object, **kwargs: object) -> object:
        return real(next(turns, "127.0.0.1"), *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("curation.serving.connection._METADATA", frozenset({"127.0.0.1"}))
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with odd_server() as server, Session() as session:
        with pytest.raises(EndpointError, match="not a model server"):
            get(session, server.url.replace("127.0.0.1", "name.test") + "/v1/models", 5.0)
        assert server.asked == []


# ---- what servers say


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b'{"error": {"code": 401, "message": "Invalid API Key"}}', "Invalid API Key"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"detail": [{"loc": ["body"], "msg": "no"}]}', '[{"loc":["body"],"msg":"no"}]'),
        (b"<html><b>403</b> Forbidden\x1b[2J</html>", "403 Forbidden[2J"),
        (b"<html><style>b {color: red}</style><script>var x=1;</script><b>403</b></html>", "403"),
        (b"", ""),
        (b"\xff\xfe", "��"),
        (b"see https://user:pw@host/?key=1 sk-s3cr3t", "see https://host/?… ***"),
    ],
)
def test_the_words_of_a_server(payload: bytes, words: str) -> None:
    assert servers_words(payload, KEY) == words


# ---- the stages


@pytest.fixture
def captions(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "captions").mkdir()
    names = {f"{number:03d}.json": "A woman walks her dog along the beach" for number in range(5)}
    (tmp_path / "captions/00000000.json").write_text(json.dumps(names))
    yield tmp_path


def test_stage_02_blames_no_shard_for_a_missing_key_and_goes_on_with_it(
    captions: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("02_captions_processor").main
    with odd_server(wants_key) as server:
        folders = ["--input", f"{captions}/captions", "--output", f"{captions}/prompts"]
        arguments = [*folders, "--endpoints", server.url]
        assert main(arguments) == 2
        assert "401: Incorrect API key provided: nothing" in capfd.readouterr().err
        assert not list((captions / "prompts").rglob("00000000.json"))
        monkeypatch.setenv("MY_KEY", KEY)
        assert main([*arguments, "--api_key_env", "MY_KEY", "--lang_threshold", "0.1"]) == 0
    said = capfd.readouterr()
    assert KEY not in said.out + said.err
    for file in (captions / "prompts").rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


def test_receipts_and_provenance_name_how_a_server_was_asked_otherwise(captions: Path) -> None:
    main = importlib.import_module("02_captions_processor").main

    def behaviour(asked: Asked) -> Answer:
        return Answer("seed: unknown field", 400) if "seed" in asked.body else Answer()

    with odd_server(behaviour) as server:
        folders = ["--input", f"{captions}/captions", "--output", f"{captions}/prompts"]
        assert main([*folders, "--endpoints", server.url]) == 0
    (receipt,) = (captions / "prompts/_receipts").rglob("00000000.json")
    assert json.loads(receipt.read_text())["notes"]["servers_asked_otherwise"] == {"no seed": 5}
    (lines,) = (captions / "prompts/_provenance").rglob("00000000.jsonl")
    assert all(json.loads(line)["asked_otherwise"] == ["no seed"] for line in lines.read_text().splitlines())
