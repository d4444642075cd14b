"""What a site says about automatic downloads: robots.txt (RFC 9309), TDMRep, and headers of its answers.

protego decides whether a path matches a rule, and which of several rules counts.  Whose group of rules is ours is
decided here: protego also takes groups for us whose name only occurs in ours, lets lines that are not part of the RFC
end a group, and cannot say in which line a rule stands.  https://www.rfc-editor.org/rfc/rfc9309,
https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from curation.download.heads import quoted_url
from curation.errors import SampleError
from curation.jsonio import decode_text, parse_json

MAX_RULES_BYTES: Final = 500 << 10  # of a file of rules: RFC 9309, 2.5, asks for at least so much
_LINES: Final = re.compile(rb"\r\n|\r|\n")
_DIRECTIVES: Final = {
    **dict.fromkeys((b"user-agent", b"useragent", b"user agent"), "user-agent"),
    b"allow": "allow",
    **dict.fromkeys((b"disallow", b"dissallow", b"dissalow", b"disalow", b"diasllow", b"disallaw"), "disallow"),
}
_TOKEN: Final = re.compile(rb"[a-z_-]*")  # a product token of the RFC
_WORD: Final = re.compile(rb"[^\s/;,()]*")  # one as sites and tools write it, such as img2dataset
_CHARSET: Final = re.compile(r"(?i)(?:iso-?8859|latin|l1\b|us-ascii|windows-|cp|koi8|gb|big5|shift|euc|utf)[\w-]*")
_PLAIN: Final = re.compile(r"[A-Za-z0-9/_.-]*")  # what has one spelling only, in patterns and in URLs
_MANY_RULES: Final = 500
_BYTES_PER_RULE: Final = 800  # of memory, of a rule with its pattern
# of X-Robots-Tag: rules with a value, whose colon is not that of a user agent
_RULES_WITH_VALUES: Final = frozenset(("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"))
_AGENT: Final = re.compile(r"\S*[^\s\d]\S*")  # and no part of a date

SiteRecord = dict[str, Any]
"""The rules of one site as JSON: ``robots``: lists of line, ``allow`` or ``disallow``, and pattern; ``tdm``: lists of
the rule's number, its pattern and whether the rights are reserved; ``problem``: why robots.txt could not be read
although the site answers, which forbids everything."""


def read_robots(data: bytes, token: str, charset: str = "", *, is_cut: bool = False) -> list[list[Any]]:
    """The rules of robots.txt that are meant for ``token``: those of its own groups, else those for everybody.

    Patterns are percent-encoded as in URLs.  A group begins with the first ``User-agent`` line after a rule; lines
    that are not part of the RFC (``Crawl-delay``, ``Sitemap``) change nothing.

    Args:
        data: The file, or its beginning.
        token: Our product token.
        charset: As the server named it; it counts for what is no UTF-8.
        is_cut: The file is longer; its last line, of which the end is missing, is left out.

    Returns:
        Lists of line, ``allow`` or ``disallow``, and pattern.
    """
    data, legacy = _as_utf8(data, charset)
    if is_cut:
        data = data[: max(data.rfind(b"\n"), data.rfind(b"\r")) + 1]
    ours, everybody = list[list[Any]](), list[list[Any]]()
    named = is_ours = is_everybodys = begun = False
    for number, line in enumerate(_LINES.split(data), 1):
        directive, value = _directive(line.partition(b"#")[0].strip())
        if directive == "user-agent":
            if not begun:
                begun, is_ours, is_everybodys = True, False, False
            if value[:1] == b"*" and not value[1:2].strip():
                is_everybodys = True
            elif _is_named(value.lower(), token.lower().encode()):
                named = is_ours = True
        elif directive:
            begun = False
            for pattern in _patterns(value, legacy):
                rule = [number, directive, pattern]
                ours += [rule] * is_ours
                everybody += [rule] * is_everybodys
    return ours if named else everybody


def _as_utf8(data: bytes, charset: str) -> tuple[bytes, str]:
    """The text, and the charset of its bytes that are no UTF-8 (empty for none)."""
    wide = charset.lower().startswith(("utf-16", "utf-32"))
    if data[:3] == b"\xef\xbb\xbf" or data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:4] == b"\x00\x00\xfe\xff":
        return decode_text(data).encode("utf-8", "replace"), ""
    try:
        codecs.lookup(charset if _CHARSET.fullmatch(charset) else "utf-8")
    except LookupError:
        return data, ""
    if wide:
        return data.decode(charset, "replace").encode("utf-8", "replace"), ""
    return data, charset if _CHARSET.fullmatch(charset) and not charset.lower().startswith("utf") else ""


def _directive(line: bytes) -> tuple[str, bytes]:
    for separator in (b":", None):  # some sites forget the colon
        name, *rest = line.split(separator, 1) or [b""]
        if found := _DIRECTIVES.get(b" ".join(name.lower().split())):
            return found, rest[0].strip() if rest else b""
    return "", b""


def _is_named(value: bytes, token: bytes) -> bool:
    found = [pattern.match(value) for pattern in (_TOKEN, _WORD)]
    return bool(token) and any(match is not None and match[0] == token for match in found)


def _patterns(value: bytes, legacy: str) -> list[str]:
    """The pattern as its bytes are, and as its characters would be written in UTF-8."""
    found = [quoted_url(value)] if value else []
    if legacy and not value.isascii():
        found.append(quoted_url(value.decode(legacy, "replace").encode("utf-8", "replace")))
    return list(dict.fromkeys(found))


def read_tdm(data: bytes, *, is_cut: bool = False) -> list[list[Any]]:
    """The rules of ``/.well-known/tdmrep.json``, without those that the protocol calls errors.

    Returns:
        Lists of the rule's number, its pattern, and whether the rights are reserved.  Empty for what is no such file.
    """
    try:
        rules = [] if is_cut else parse_json(data, MAX_RULES_BYTES)
    except SampleError:
        return []
    found = []
    for number, rule in enumerate(rules if isinstance(rules, list) else [rules], 1):
        location = rule.get("location") if isinstance(rule, dict) else None
        reserved = _reservation(rule.get("tdm-reservation")) if isinstance(rule, dict) else None
        if isinstance(location, str) and location.strip() and reserved is not None:
            path = location.strip()
            path = path if path.startswith(("/", "*")) else f"/{path}"
            found.append([number, quoted_url(path.encode("utf-8", "replace")).replace("#", "%23"), reserved])
    return found


def _reservation(value: object) -> bool | None:
    """None for what the protocol calls an error, which counts as unset."""
    text = value.strip() if isinstance(value, str) else value
    return True if text in (1, "1") else False if text in (0, "0") else None


def reserved_by(values: Iterable[str]) -> bool | None:
    """What the header fields ``tdm-reservation`` of an answer say; None where they say nothing."""
    words = {word.strip(' \t"') for value in values for word in value.split(",")}
    return True if "1" in words else False if "0" in words else None


def disallowed_by(values: Iterable[str], token: str) -> set[str]:
    """The directives of X-Robots-Tag headers that are meant for everybody or for the user agent ``token``."""
    found: set[str] = set()
    for value in values:
        is_for_us = True
        for part in value.lower().split(","):
            name, colon, rest = (text.strip() for text in part.partition(":"))
            if colon and name not in _RULES_WITH_VALUES and _AGENT.fullmatch(name):
                is_for_us = name in ("*", token.lower())
                name = rest
            if is_for_us:
                found.update("noindex" if word == "none" else word for word in name.replace(";", " ").split())
    return found


class SiteRules:
    """The rules of one site, and what they say of its URLs.

    Attributes:
        cost: About how many bytes of memory it takes.
        is_large: Whether to ask it takes so long that an event loop should not.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._problem = str(record.get("problem") or "")
        self._lines = [(int(line), str(directive), str(text)) for line, directive, text in record.get("robots") or ()]
        self._robots = _matcher((directive, text) for _, directive, text in self._lines) if self._lines else None
        self._tdm = [
            (int(number), str(text), bool(reserved), _matcher([("disallow", str(text))]))
            for number, text, reserved in record.get("tdm") or ()
        ]
        count = len(self._lines) + 3 * len(self._tdm)
        self.cost = 500 + _BYTES_PER_RULE * count + sum(len(text) for _, _, text in self._lines)
        self.is_large = count > _MANY_RULES

    def forbidden_by(self, url: str) -> str | None:
        """The rule of robots.txt that forbids the URL, None where none does."""
        if self._problem:
            return f"robots.txt cannot be read: {self._problem}"
        if self._robots is None or self._robots.can_fetch(url, "*"):
            return None
        disallowed = [rule for rule in self._lines if rule[1] == "disallow" and _may_match(rule[2], url)]
        for line, _, text in sorted(disallowed, key=lambda rule: -len(rule[2])):
            if not _matcher([("disallow", text)]).can_fetch(url, "*"):
                return f"robots.txt line {line}: Disallow: {text}"
        return "robots.txt"

    def reserved_by(self, url: str) -> str | None:
        """The rule of tdmrep.json that reserves the rights to the URL: the first one that matches it counts."""
        for number, text, reserved, matcher in self._tdm:
            if not matcher.can_fetch(url, "*"):
                return f"tdmrep.json rule {number}: {text}" if reserved else None
        return None


def _may_match(pattern: str, url: str) -> bool:
    """False only for a pattern that does not match; to make a matcher of each pattern takes longer."""
    plain = _PLAIN.match(pattern)
    return "%" in url or plain is None or plain[0] in url


def _matcher(rules: Iterable[tuple[str, str]]) -> Any:
    from protego import Protego

    return Protego.parse("user-agent: *\n" + "\n".join(f"{directive}: {text}" for directive, text in rules))
