"""Which rules of robots.txt, tdmrep.json and of headers are meant for us, and what they forbid."""

from __future__ import annotations

import json
from typing import Any

import pytest

from curation.download.opt_out.rules import (
    MAX_RULES_BYTES,
    SiteRules,
    disallowed_by,
    read_robots,
    read_tdm,
    reserved_by,
)

SITE = "http://example.org"
TWO_GROUPS = "User-agent: curation\nDisallow: /a\nUser-agent: x\nDisallow: /\nUser-agent: curation\nDisallow: /b"


def rule(robots: bytes | str, path: str, *, token: str = "curation", charset: str = "", is_cut: bool = False) -> Any:
    """The rule that forbids the path, None where none does."""
    data = robots.encode() if isinstance(robots, str) else robots
    rules = SiteRules({"robots": read_robots(data, token, charset, is_cut=is_cut)})
    return rules.forbidden_by(SITE + path)


@pytest.mark.parametrize(
    ("robots", "path", "line"),
    [
        ("", "/a", None),
        ("User-agent: *\nDisallow: /a", "/a/b.jpg", 2),
        ("User-agent: *\nDisallow: /a", "/b", None),
        ("User-agent: *\nDisallow:", "/a", None),
        ("Disallow: /", "/a", None),  # of no group
        ("# Disallow: /\nuser-AGENT : *  # all\n\n  disALLOW:/a# comment", "/a", 4),
        ("User-agent: *\nDisallow: /\n\nUser-agent: curation\nDisallow: /x", "/a", None),  # its own group alone counts
        ("User-agent: CURATION\nDisallow: /\nUser-agent: *\nAllow: /", "/a", 2),
        ("User-agent: curation/1.0\nDisallow: /", "/a", 2),
        (TWO_GROUPS, "/b", 6),
        (TWO_GROUPS, "/c", None),
        ("User-agent: cura\nDisallow: /", "/a", None),  # no name of ours, although ours begins so
        ("User-agent: curation-images\nDisallow: /", "/a", None),
        ("User-agent: a\nUser-agent: *\nUser-agent: b\nDisallow: /", "/a", 4),
        ("User-agent: *\nCrawl-delay: 3\nUser-agent: b\nDisallow: /", "/a", 4),  # no rule of the RFC: one group
        ("User-agent: curation\nCrawl-delay: 3\nSitemap: x\nNoindex: /\nDisallow: /a", "/a", 5),
        ("User-agent: *\nSitemap: http://example.org/s.xml\nDisallow: /", "/a", 3),
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b.jpg", None),  # the longest match counts
        ("User-agent: *\nAllow: /a\nDisallow: /a/b", "/a/b.jpg", 3),
        ("User-agent: *\nDisallow: /a\nAllow: /a", "/a", None),  # of equal ones, Allow
        ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg", 2),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg?w=1", None),
        ("User-agent: *\nDisallow: /*?*w=", "/x/y.jpg?w=1", 2),
        ("User-agent: *\nDisallow: /a\nDisallow: /a/b/c\nDisallow: /a/b", "/a/b/c", 3),
        ("User-agent: *\nDisallow: /caf\u00e9", "/caf%C3%A9.jpg", 2),
        ("User-agent: *\nDisallow: /%63afe", "/cafe", 2),
        ("User-agent: *\nDisallow: /cafe", "/%63afe", 2),
        ("User-agent: *\nDisallow: /a b", "/a%20b", 2),
        ("User-agent: *\nDisallow /a", "/a", 2),
        ("User agent: *\nDissallow: /a", "/a", 2),
        ("User-agent: *\r\n\r\nDisallow: /a\r\n", "/a", 3),
        ("User-agent: *\r\rDisallow: /a", "/a", 3),
        ("User-agent: *\nDisallow: /", "/robots.txt", None),
        ("User-agent:\nDisallow: /", "/a", None),
        ("<html><body>not found</body></html>", "/a", None),
    ],
)  # fmt: skip
def test_robots_txt(robots: str, path: str, line: int | None) -> None:
    found = rule(robots, path)
    assert found is None if line is None else found.startswith(f"robots.txt line {line}: Disallow: /"), found


def test_a_token_that_the_rfc_does_not_know_is_found_as_tools_write_it() -> None:
    robots = "User-agent: img2dataset\nDisallow: /\nUser-agent: img\nAllow: /"
    assert rule(robots, "/a", token="img2dataset") == "robots.txt line 2: Disallow: /"
    assert rule(robots, "/a", token="img2") is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(encoding: str) -> None:
    assert rule("User-agent: *\r\nDisallow: /\u5c71".encode(encoding), "/%E5%B1%B1") is not None


def test_a_charset_counts_for_what_is_no_utf_8() -> None:
    robots = "User-agent: *\nDisallow: /caf\u00e9"
    for path in ("/caf%E9", "/caf%C3%A9"):
        assert rule(robots.encode("latin-1"), path, charset="ISO-8859-1") is not None
    assert rule(robots.encode("utf-16-le"), "/caf%C3%A9", charset="utf-16-le") is not None
    for charset in ("rot13", "zlib", "unicode_escape", "utf-99", "latin-\u0661", "gb" + "2" * 9999):
        assert rule(b"User-agent: *\nDisallow: /a\xe9", "/a%E9", charset=charset) is not None


def test_of_a_file_that_is_cut_the_last_line_does_not_count() -> None:
    """``Disallow: /images/x`` would become ``Disallow: /``."""
    assert rule("User-agent: *\nDisallow: /a\nDisallow: /", "/b", is_cut=True) is None
    assert rule("User-agent: *\nDisallow: /a\nDisallow: /", "/a", is_cut=True) is not None
    assert rule("User-agent: *", "/a", is_cut=True) is None


def test_the_largest_file_of_rules_is_read_and_asked_in_seconds() -> None:
    lines = [f"Disallow: /*{number}*{number}*x$" for number in range(MAX_RULES_BYTES // 25)]
    rules = SiteRules({"robots": read_robots("\n".join(["User-agent: *", *lines]).encode(), "curation")})
    assert rules.is_large
    assert rules.cost > 10 << 20, "and it counts as what it takes"
    assert rules.forbidden_by(SITE + "/77 77 x" + "a" * 100) is None
    assert rules.forbidden_by(SITE + "/7777x") is not None


def test_controls_in_a_rule_make_no_second_rule() -> None:
    assert rule(
        "User-agent: *\nDisallow: /a\x0bAllow: /\x85\u2028Allow: /a", "/a%0BAllow:%20/%C2%85%E2%80%A8Allow:%20/a"
    )
    assert rule("User-agent: *\nDisallow: /\nDisallow: /a\x1cUser-agent: x", "/b") is not None


# ---- TDMRep

RESERVED, FREE = {"tdm-reservation": 1}, {"tdm-reservation": 0}


@pytest.mark.parametrize(
    ("rules", "path", "number"),
    [
        ([{"location": "/", **RESERVED}], "/a", 1),
        ([{"location": "/a/", **RESERVED}], "/b", None),
        ([{"location": "/a/b", **FREE}, {"location": "/a", **RESERVED}], "/a/b.jpg", None),  # the first match counts
        ([{"location": "/a", **RESERVED}, {"location": "/a/b", **FREE}], "/a/b.jpg", 1),
        ([{"location": "/a", **FREE}, {"location": "/", **RESERVED}], "/b", 2),
        ([{"location": "/im/*.jpg", **RESERVED}], "/im/x/y.jpg?w=1", 1),
        ([{"location": "/im/*.jpg$", **RESERVED}], "/im/x/y.jpg?w=1", None),
        ([{"location": "/this/path/exactly$", **RESERVED}], "/this/path/exactly/not", None),
        ([{"location": "/path/foo-%24", **RESERVED}], "/path/foo-$", 1),
        ([{"location": "/A", **RESERVED}], "/a", None),
        ([{"location": "/caf\u00e9", **RESERVED}], "/caf%c3%a9", 1),
        ([{"location": "*", "tdm-reservation": "1", "tdm-policy": "https://p.example/"}], "/a", 1),
        ([{"location": "a/", "tdm-reservation": True}], "/a/b", 1),
        ({"location": "/", **RESERVED}, "/a", 1),
        ([{"location": "/", "tdm-reservation": 2}, {"location": "/", **RESERVED}], "/a", 2),  # an error is unset
        ([{"location": "/", "tdm-reservation": "yes"}], "/a", None),
        ([{"location": "/"}, RESERVED, {"location": 5, **RESERVED}, {"location": " ", **RESERVED}], "/", None),
        ([[{"location": "/", **RESERVED}], None, "x", 1], "/", None),
    ],
)  # fmt: skip
def test_tdmrep_json(rules: Any, path: str, number: int | None) -> None:
    found = SiteRules({"tdm": read_tdm(json.dumps(rules).encode())}).reserved_by(SITE + path)
    assert found is None if number is None else (found or "").startswith(f"tdmrep.json rule {number}: "), found


@pytest.mark.parametrize("data", [b"", b"<html>", b"[" * 100_000, b'"x"', b"null", b"1", b"\xff\xfe\x00", b"NaN"])
def test_what_is_no_tdmrep_json_reserves_nothing(data: bytes) -> None:
    assert read_tdm(data) == []
    assert read_tdm(b'[{"location": "/", "tdm-reservation": 1}]', is_cut=True) == []


@pytest.mark.parametrize(
    ("values", "found"),
    [([], None), (["1"], True), (["0"], False), (["0", "1"], True), ([' "1" '], True), (["0, 1"], True), (["2"], None),
     (["yes"], None), ([""], None)],
)  # fmt: skip
def test_the_header_of_tdmrep(values: list[str], found: bool | None) -> None:
    assert reserved_by(values) is found


# ---- X-Robots-Tag


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["noai, noimageai"], {"noai", "noimageai"}),
        (["noarchive", "NoML"], {"noarchive", "noml"}),
        (["otherbot: noai", "noml"], {"noml"}),
        (["otherbot: noai, noml"], set()),
        (["otherbot: noindex, Curation: NoAI"], {"noai"}),
        (["curation:noai"], {"noai"}),
        (["*: noai"], {"noai"}),
        (["unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noai"], {"noai"}),
        (["max-image-preview: large, noml"], {"noml"}),
        (["noai noimageai"], {"noai", "noimageai"}),
        (["none"], {"noindex"}),
        ([""], set()),
        ([":,:,,::"], set()),
        (["noai; noimageai;noml"], {"noai", "noimageai", "noml"}),
    ],
)
def test_x_robots_tag(values: list[str], found: set[str]) -> None:
    told = disallowed_by(values, "curation")
    assert told & {"noai", "noimageai", "noindex", "noimageindex", "noml", "noarchive"} == found
