"""JSON from the web: bounded, tolerant of one oddity, and written the same way every time."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import jsonio
from curation.errors import SampleError, ShardError
from curation.jsonio import (
    MAX_DEPTH,
    MAX_SAMPLE_JSON_BYTES,
    clean_text,
    dump_json,
    parse_json,
    parse_json_object,
    read_dictionary,
    write_dictionary,
)

ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=20) | st.sampled_from(
    ["\ud800", "a\udfff", "\x00", "\n", "\u2028", "\u202e", "\x85", "\ufeff", '"\\', "é" * 9]
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


def mended(value: Any) -> Any:
    """With U+FFFD for each lone surrogate."""
    if isinstance(value, dict):
        return {mended(name): mended(item) for name, item in value.items()}
    if isinstance(value, list):
        return [mended(item) for item in value]
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


@given(VALUES)
def test_whatever_is_written_can_be_read(value: Any) -> None:
    data = dump_json(value)
    assert parse_json(data, keep_surrogates=True) == value
    assert parse_json(data) == mended(value)
    assert dump_json(value) == data
    assert dump_json(parse_json(dump_json(value, indent=True), keep_surrogates=True)) == data
    assert b"\n" not in data, "one entry a line"
    data.decode("utf-8")


@given(VALUES)
def test_a_lone_surrogate_is_read_as_python_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), keep_surrogates=True) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == mended(value)


def as_python_reads_it(data: bytes) -> Any:
    """Python's json, with None for what JSON cannot hold."""
    return mended(
        json.loads(
            data,
            parse_constant=lambda name: None,
            parse_float=lambda text: float(text) if math.isfinite(float(text)) else None,
        )
    )


ODD_VALUES = st.recursive(
    SCALARS | ANY_TEXT | st.floats() | st.integers() | st.integers(-(10**40), 10**40) | st.integers(2**63, 2**65),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(ODD_VALUES, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]))
def test_everything_is_read_that_python_reads(value: Any, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=False)
    data = text.encode(encoding, "surrogatepass")
    found = parse_json(data)
    assert found == as_python_reads_it(data)
    assert repr(found) == repr(as_python_reads_it(data)), "1 is not 1.0"
    assert parse_json(dump_json(found)) == found
    assert parse_json(json.dumps(value).encode()) == as_python_reads_it(json.dumps(value).encode())


@pytest.mark.parametrize("digits", [1, 18, 19, 20, 21, 40, 4300])
@pytest.mark.parametrize("sign", ["", "-"])
def test_integers_keep_every_digit(digits: int, sign: str) -> None:
    for number in ("9" * digits, "1" + "0" * (digits - 1)):
        for text in (sign + number, f'{{"a": {sign}{number}, "b":[1,{sign}{number}]}}', f" {sign}{number}\n"):
            value = parse_json(text.encode())
            found = value["a"] if isinstance(value, dict) else value
            assert found == int(sign + number)
            assert isinstance(found, int)
            assert number.encode() in dump_json(value)


def test_digits_in_a_text_are_no_number() -> None:
    text = f'{{"uid": "{"0" * 32}", "sha256": "{"12345678" * 8}", "w": 0.{"123456789" * 4}}}'
    assert parse_json(text.encode()) == json.loads(text)


def test_what_is_not_finite_becomes_null() -> None:
    assert parse_json(b'{"a": NaN, "b": [Infinity, -Infinity, 1e999, -1E999], "c": 1}') == {
        "a": None, "b": [None] * 4, "c": 1,
    }  # fmt: skip
    assert dump_json({"a": math.nan, "b": [math.inf, 2**70], "c": "\ud800"}) == (
        b'{"a":null,"b":[null,1180591620717411303424],"c":"\\ud800"}'
    )


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_value_or_a_sample_error(data: bytes) -> None:
    try:
        dump_json(parse_json(data))
    except SampleError as error:
        assert error.reason == "bad_json"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{",
        b'{"a": nan}', b"\xff", b"{'a': 1}", b'{"a": "caf\xe9"}', "{".encode("utf-16"), b"\xff\xfe{",
        b'{"a": 1} x', b'{"a": "\\ud800", "b": ' + b"9" * 5000 + b"}",
        b'{"a": "\x00"}', b'{"a": "\\ud800\x00"}', b"null junk",
    ],
)  # fmt: skip
def test_not_json(data: bytes) -> None:
    with pytest.raises(SampleError) as caught:
        parse_json(data)
    assert caught.value.reason == "bad_json"


def nested(depth: int, inner: bytes = b"1") -> bytes:
    return b'{"a":[' * (depth // 2) + b"[" * (depth % 2) + inner + b"]" * (depth % 2) + b"]}" * (depth // 2)


@pytest.mark.parametrize("inner", [b"1", b'"\\ud800"', b'"]]]]]]]]]}}}}}"', b'"\\"]]]]]]]"'])
def test_depth_is_bounded(inner: bytes) -> None:
    parse_json(nested(MAX_DEPTH, inner))
    for depth in (MAX_DEPTH + 1, 10_000, 200_000):
        with pytest.raises(SampleError) as caught:
            parse_json(nested(depth, inner))
        assert caught.value.reason == "json_too_deep"


def test_brackets_in_texts_and_side_by_side_are_no_depth() -> None:
    assert parse_json(b'["' + b"[{" * 500 + b'"]') == ["[{" * 500]
    assert len(parse_json(b"[" + b"[],{}," * 500 + b"1]")) == 1001
    assert parse_json(b'["\\\\", "[' + b"[" * 100 + b'"]') == ["\\", "[" * 101]


def test_size_is_bounded_before_anything_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(data: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(orjson, "loads", parsed)
    with pytest.raises(SampleError) as caught:
        parse_json(b'{"caption": "' + b"x" * (50 << 20) + b'"}')
    assert caught.value.reason == "json_too_large"
    assert "52,428,815 bytes" in caught.value.detail


def test_a_large_one_within_the_bound() -> None:
    text = "x" * (MAX_SAMPLE_JSON_BYTES - 2)
    assert parse_json(f'"{text}"'.encode()) == text


@pytest.mark.parametrize("data", [b"[]", b"1", b'"a"', b"null", b"true"])
def test_not_an_object(data: bytes) -> None:
    with pytest.raises(SampleError) as caught:
        parse_json_object(data)
    assert caught.value.reason == "json_not_an_object"


def test_memoryviews_are_read_too() -> None:
    assert parse_json(memoryview(b'{"a": "\\ud800"}')) == {"a": "\ufffd"}
    assert parse_json(memoryview(nested(MAX_DEPTH)))


@given(ANY_TEXT)
def test_clean_text_is_one_printable_line(text: str) -> None:
    clean = clean_text(text)
    assert clean == clean_text(clean)
    assert clean == clean.strip()
    assert len(clean.splitlines()) <= 1
    clean.encode("utf-8")
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in clean)


def test_clean_text_by_example() -> None:
    assert clean_text(" a\nb\r\n\tc  d\u2028e\x85f ") == "a b c d e f"
    assert clean_text("a\x00b\x1b[31mc\u202ed\u2066e\ufefff") == "ab[31mcdef"
    assert clean_text("a\ud800b") == "a\ufffdb"
    assert clean_text("naïve 👩‍👩‍👧 日本語") == "naïve 👩‍👩‍👧 日本語"
    assert clean_text("x" * 100_000) == "x" * 100_000


KEYS = ANY_TEXT.map(lambda t: f"{t}.json")


@settings(max_examples=50)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_dictionaries_come_back_in_order(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("d") / "0.json"
    with open(path, "wb") as file:
        assert write_dictionary(file, iter(entries.items())) == len(entries)
    mended_entries = {name: mended(value) for name, value in entries.items()}
    assert list(read_dictionary(path).items()) == list(mended_entries.items()), "the names are samples' keys"
    again = io.BytesIO()
    write_dictionary(again, entries.items())
    assert again.getvalue() == path.read_bytes()
    json.loads(path.read_bytes())
    assert path.read_bytes().count(b"\n") == (len(entries) + 2 if entries else 1), "one entry a line"


def test_a_value_as_deep_as_a_sample_may_be_does_not_spoil_its_shard(tmp_path: Path) -> None:
    """What passes as a sample's JSON lies one level deeper in a dictionary."""
    path = tmp_path / "0.json"
    with open(path, "wb") as file:
        write_dictionary(file, [("a.json", parse_json(nested(MAX_DEPTH)))])
    assert list(read_dictionary(path)) == ["a.json"]


def test_dictionaries_made_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    path.write_text(json.dumps({"b.json": "é", "a.json": {"uid": "1"}}, indent=4))
    assert list(read_dictionary(path).items()) == [("b.json", "é"), ("a.json", {"uid": "1"})]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[1]", "json_not_an_object"),
        (b"{", "bad_json"),
        (b"", "bad_json"),
        (b'{"a": 1}', "'a' is not named"),
        (b'{"a.json": ' + nested(200) + b"}", "json_too_deep"),
    ],
)
def test_what_is_no_dictionary_is_a_shard_error_that_names_the_file(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "00000003.json"
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"00000003\.json") as caught:
        read_dictionary(path)
    assert says in str(caught.value)


def test_a_dictionary_that_is_too_large_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.json"
    path.write_bytes(b'{"a.json": "' + b"x" * 1000 + b'"}')
    with pytest.raises(ShardError, match="json_too_large"):
        read_dictionary(path, max_bytes=100)
    with pytest.raises(ShardError, match=r"absent\.json: cannot be read"):
        read_dictionary(tmp_path / "absent.json")


def test_a_number_that_cannot_be_written_is_never_read() -> None:
    """Infinity next to a lone surrogate would pass the reader and stop the writer, with it the whole shard."""
    assert jsonio.parse_json(b'{"a": "\\ud800", "b": 1e308}')["b"] == 1e308
    assert parse_json(b'{"a": "\\ud800", "b": -1e309}')["b"] is None
    assert not math.isinf(parse_json(b"1e308"))
