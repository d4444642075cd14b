"""A JSON schema for answers: what it may say, which replies are answers, and the columns that are made of them."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from curation.caption.rows import parquet_bytes
from curation.caption.schema import MAX_ANSWER_BYTES, MAX_COLUMNS, MAX_SCHEMA_BYTES, AnswerSchema
from curation.errors import UsageError
from curation.replies import Answer, Reply

pytest.importorskip("jsonschema")

TEXT = {"type": "string"}
SCENE: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Scene",
    "type": "object",
    "properties": {
        "caption": {"type": "string", "maxLength": 200, "description": "One sentence"},
        "people": {"type": "integer", "minimum": 0, "maximum": 99},
        "sharpness": {"type": "number", "minimum": 0, "maximum": 1},
        "indoors": {"type": ["boolean", "null"]},
        "light": {"enum": ["day", "night"]},
        "tags": {"type": "array", "items": TEXT, "maxItems": 5},
        "place": {"type": "object", "properties": {"kind": TEXT, "floor": {"type": "integer"}}},
        "things": {"type": "array", "items": {"$ref": "#/$defs/Thing"}},
        "mood": {"anyOf": [TEXT, {"type": "null"}], "default": None},
    },
    "required": ["caption", "people"],
    "$defs": {"Thing": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]}},
}
WHOLE = {
    "caption": "A person reads.",
    "people": 1,
    "sharpness": 1,
    "indoors": None,
    "light": "day",
    "tags": ["a", "b"],
    "place": {"kind": "park", "floor": 2.0},
    "things": [{"name": "bench"}],
    "mood": None,
}
LEAST = {"caption": "A bench.", "people": 0}


def judged(answer: Any, schema: dict[str, Any] = SCENE) -> Answer:
    return AnswerSchema(schema).judge(Reply(answer if isinstance(answer, str) else json.dumps(answer)))


def with_property(node: Any, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"caption": TEXT, "x": node},
        "required": ["caption"],
        **more,
    }


def test_an_answer_becomes_columns_of_stable_types() -> None:
    import pyarrow.parquet as pq

    schema = AnswerSchema(SCENE)
    assert judged(WHOLE).text == "A person reads." and judged(LEAST).json == LEAST
    assert schema.cells(WHOLE) == {
        "vlm_people": 1,
        "vlm_sharpness": 1.0,
        "vlm_indoors": None,
        "vlm_light": "day",
        "vlm_tags": ["a", "b"],
        "vlm_place.kind": "park",
        "vlm_place.floor": 2,
        "vlm_things": '[{"name":"bench"}]',
        "vlm_mood": None,
    }
    assert set(schema.cells(LEAST)) == set(schema.cells(None)) == set(schema.cells(WHOLE)), "whatever an answer has"

    def types(answers: list[dict[str, Any]]) -> dict[str, str]:
        row = dict.fromkeys(("key", "url", "uid", "caption", "original_caption", "width", "height", "original_width"))
        row |= dict.fromkeys(("original_height", "sha256", "model", "revision", "watermark_score"))
        table = pq.read_table(io.BytesIO(parquet_bytes([{**row, "extra": {}, "answer": a} for a in answers], schema)))
        return {field.name: str(field.type) for field in table.schema if field.name.startswith("vlm_")}

    assert types([LEAST]) == types([WHOLE, LEAST]) == types([])
    assert types([LEAST]) == {
        "vlm_caption": "string",
        "vlm_people": "int64",
        "vlm_sharpness": "double",
        "vlm_indoors": "bool",
        "vlm_light": "string",
        "vlm_tags": "list<element: string>",
        "vlm_place.kind": "string",
        "vlm_place.floor": "int64",
        "vlm_things": "string",
        "vlm_mood": "string",
    }


def test_what_servers_get_allows_nothing_that_has_no_column() -> None:
    sent = AnswerSchema(SCENE).sent
    assert sent["additionalProperties"] is False and sent["properties"]["place"]["additionalProperties"] is False
    assert sent["$defs"]["Thing"]["additionalProperties"] is False and "$schema" not in sent
    assert list(sent["properties"]) == list(SCENE["properties"]), "models answer in this order"
    odd = with_property(
        {
            "type": "object",
            "properties": {"enum": TEXT, "properties": {"type": "object", "properties": {"required": TEXT}}},
        }
    )
    assert AnswerSchema(odd).sent["properties"]["x"]["properties"]["properties"]["additionalProperties"] is False
    assert "additionalProperties" not in AnswerSchema(odd).sent["properties"]["x"]["properties"]


@pytest.mark.parametrize(
    ("schema", "at", "why"),
    [
        ({"type": "array", "items": TEXT}, "$", "an answer is an object"),
        ({}, "$", "an answer is an object"),
        (with_property({"type": "string", "pattern": "^(a+)+$"}), "$.properties.x.pattern", "not supported"),
        (with_property({"type": "string", "minimum": 1}), "$.properties.x.minimum", "not supported"),
        (with_property({"type": "string", "format": "date"}), "$.properties.x.format", "not supported"),
        (
            with_property({"type": "array", "items": TEXT, "uniqueItems": True}),
            "$.properties.x.uniqueItems",
            "not supp",
        ),
        (with_property({"oneOf": [TEXT]}), "$.properties.x.type", "is needed"),
        (with_property({"type": ["string", "integer"]}), "$.properties.x.type", "it has string, integer"),
        (with_property({"type": "array"}), "$.properties.x", "an array needs items"),
        (with_property({"type": "object"}), "$.properties.x", "an object needs properties"),
        (
            with_property({"type": "object", "properties": {"a.b": TEXT}}),
            "$.properties.x.properties",
            "'a.b' is no name",
        ),
        (
            with_property({"type": "object", "properties": {"a": TEXT}, "additionalProperties": TEXT}),
            "$.properties.x.add",
            "only",
        ),
        (with_property({"anyOf": [TEXT, {"type": "integer"}]}), "$.properties.x.anyOf", "a column has one type"),
        (with_property({"$ref": "https://example.org/a.json"}), "$.properties.x.$ref", "of the same file"),
        (with_property({"$ref": "A"}, **{"$defs": {"A": TEXT}}), "$.properties.x.$ref", "of the same file"),
        (with_property({"$ref": "#/$defs/a/b"}, **{"$defs": {"a/b": TEXT}}), "$.$defs", "'a/b' is no name"),
        (
            with_property({"$ref": "#/$defs/A"}, **{"$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}}}),
            "$.$defs.A.items.$ref",
            "it leads to itself",
        ),
        (
            with_property(TEXT, **{"$defs": {"A": {"type": "string", "pattern": "x"}}}),
            "$.$defs.A.pattern",
            "not supported",
        ),
        (with_property({"type": "string", "maxLength": "9"}), "$.properties.x.maxLength", "not of type"),
        (with_property({"enum": ["a", 1]}), "$.properties.x.type", "it has string, integer"),
        (with_property({"type": "integer", "enum": [1, True]}), "$.properties.x.enum", "true is no integer"),
        (with_property({"enum": ["a  b"]}), "$.properties.x.enum", "to lose"),
        (with_property({"enum": [["a"]]}), "$.properties.x", ""),
        (with_property({"type": "string", "enum": []}), "$.properties.x.enum", "lists no value"),
        (
            with_property({"type": "string", "minLength": 3, "maxLength": 2}),
            "$.properties.x.minLength",
            "no value fits",
        ),
        (with_property({"type": "integer", "minimum": 3, "maximum": 2}), "$.properties.x.minimum", "no value fits"),
        (
            with_property({"type": "array", "items": TEXT, "minItems": 3, "maxItems": 2}),
            "$.properties.x.minItems",
            "no value fits",
        ),
        (with_property(True), "$.properties.x", "a schema is an object"),
        (with_property(TEXT, required=["caption", "y"]), "$.required", "no property"),
        (with_property(TEXT, required=[]), "$.properties.caption", "list it under required"),
        (with_property(TEXT, allOf=[]), "$.allOf", "not supported"),
        ({"type": "object", "properties": {"text": TEXT}}, "$.properties", "--schema_caption"),
        (
            {
                "type": "object",
                "properties": {"description": TEXT, "Tags": TEXT, "tags": TEXT},
                "required": ["description"],
            },
            "",
            "differ in capitals",
        ),
        (
            {"type": "object", "properties": {f"p{n}": TEXT for n in range(MAX_COLUMNS + 1)}},
            "$.properties.p100",
            "columns",
        ),
    ],
)
def test_a_schema_that_is_refused_names_the_place(schema: dict[str, Any], at: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    with pytest.raises(UsageError) as error:
        AnswerSchema.read(str(file))
    assert str(error.value).startswith(f"--schema {file}"), error.value
    assert at in str(error.value) and why in str(error.value), error.value


def test_a_schema_that_branches_without_end_is_refused_at_once() -> None:
    defs: dict[str, Any] = {f"D{n}": {"type": "array", "items": {"$ref": f"#/$defs/D{n + 1}"}} for n in range(20)}
    defs["D20"] = TEXT
    with pytest.raises(UsageError, match="nested deeper than 8"):
        AnswerSchema(with_property({"$ref": "#/$defs/D0"}, **{"$defs": defs}))
    wide: dict[str, Any] = {
        f"D{n}": {"type": "object", "properties": {f"a{m}": {"$ref": f"#/$defs/D{n + 1}"} for m in range(50)}}
        for n in range(6)
    }
    wide["D6"] = TEXT
    began = time.monotonic()
    with pytest.raises(UsageError, match="more than 1,000 schemas"):
        AnswerSchema(with_property({"type": "array", "items": {"$ref": "#/$defs/D0"}}, **{"$defs": wide}))
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "not a JSON schema"),
        (b"[]", "a schema is an object"),
        (b'{"type": "object", "type": "object"}', "name twice: type"),
        (b"[" * 1000, "nested deeper"),
        (b'{"title": "' + b"x" * MAX_SCHEMA_BYTES + b'"}', "the bound is"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_schema(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(UsageError, match=why):
        AnswerSchema.read(str(tmp_path / "s.json"))


def test_which_property_is_the_caption() -> None:
    two = {
        "type": "object",
        "properties": {"caption": TEXT, "description": TEXT},
        "required": ["caption", "description"],
    }
    assert AnswerSchema(two).caption == "caption" and AnswerSchema(two).columns[0].name == "vlm_description"
    with pytest.raises(UsageError, match="give this property another name"):
        AnswerSchema(two, "description")
    one = {"type": "object", "properties": {"alt": TEXT, "n": {"type": "integer"}}, "required": ["alt", "n"]}
    assert AnswerSchema(one, "alt").caption == "alt"
    with pytest.raises(UsageError, match="the schema's texts are alt"):
        AnswerSchema(one, "n")
    or_null = {"type": ["string", "null"]}
    for node in (or_null, {"enum": ["a cat", None]}, {"$ref": "#/$defs/T"}, {"anyOf": [TEXT, {"type": "null"}]}):
        null = {"type": "object", "properties": {"caption": node}, "required": ["caption"], "$defs": {"T": or_null}}
        with pytest.raises(UsageError, match="without null"):
            AnswerSchema(null)


def said(**more: Any) -> str:
    return json.dumps({**LEAST, **more})


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("A person reads.", "reply_not_json", ""),
        ("```json\n" + said() + "\n```", "reply_not_json", ""),
        (said() + " I hope this helps!", "reply_not_json", ""),
        ("[]", "schema_mismatch", "not of type 'object'"),
        ('{"caption": "A bench."}', "schema_mismatch", "'people' is a required property"),
        (said(people="1"), "schema_mismatch", "$.people: '1' is not of type 'integer'"),
        (said(people=True), "schema_mismatch", "True is not of type 'integer'"),
        (said(people=100), "schema_mismatch", "100 is greater than the maximum"),
        (said(light="dusk"), "schema_mismatch", "not one of"),
        (said(more=1), "schema_mismatch", "'more' was unexpected"),
        (said(tags=list("abcdef")), "schema_mismatch", "too long"),
        (said(things=[{"name": "a", "b": 1}]), "schema_mismatch", "$.things[0]"),
        (said(place={"floor": 1e300}), "schema_mismatch", "vlm_place.floor: no integer of 64 bits"),
        ('{"caption": "A bench.", "people": 0, "people": 1}', "reply_not_json", "name twice: people"),
        ('{"caption": "A bench.", "people": NaN}', "reply_not_json", "NaN is no JSON"),
        ('{"caption": "A bench.", "people": -Infinity}', "reply_not_json", "-Infinity is no JSON"),
        ('{"caption": "A bench.", "people": 0, "sharpness": 1e999}', "reply_not_json", "no double holds"),
        ('{"caption": "A bench.", "people": 1' + "0" * 5000 + "}", "reply_not_json", "no integer of 64 bits"),
        ('{"caption": "A bench.", "people": 9223372036854775808}', "reply_not_json", "no integer of 64 bits"),
        ('{"caption": ' + "[" * 100_000 + "]" * 100_000 + "}", "reply_too_long", "the bound is"),
        ('{"caption": ' + "[" * 5000 + "]" * 5000 + "}", "reply_not_json", "nested deeper"),
        (said(caption="x" * MAX_ANSWER_BYTES), "reply_too_long", "the bound is"),
        ("x" * (1 << 20), "reply_too_long", ""),
        (said(caption=""), "reply_empty", ""),
        (said(caption=" …! \u0007"), "reply_empty", ""),
        (said(caption="red " * 40), "reply_repetition", ""),
        ("", "reply_empty", ""),
        ("<think>It shows", "reply_only_reasoning", ""),
    ],
)  # fmt: skip
def test_a_reply_that_is_no_answer(text: str, reason: str, detail: str) -> None:
    schema = AnswerSchema(SCENE)
    began = time.monotonic()
    verdict = schema.judge(Reply(text))
    assert (verdict.text, verdict.json, verdict.reason) == (None, None, reason), verdict
    assert detail in verdict.detail and len(verdict.detail) < 600
    assert time.monotonic() - began < 1


def test_texts_are_cleaned_before_they_are_judged() -> None:
    text = '{"caption": "A\\u0000 per\\u202eson\\nreads\\ud800.", "people": 1, "place": {"kind": "\\ud83d\\ude00 \\udc00"}}'  # noqa: E501
    verdict = judged(text)
    assert verdict.text == "A person reads\ufffd."
    assert verdict.json == {"caption": verdict.text, "people": 1, "place": {"kind": "😀 \ufffd"}}
    least = {"type": "object", "properties": {"caption": {"type": "string", "minLength": 5}}, "required": ["caption"]}
    assert judged({"caption": "a    b"}, least).reason == "schema_mismatch", "of what is left"


@pytest.mark.parametrize(
    "text", ["I'm sorry, but I can't help.", "Sure! Here is the caption:", "{x} <|im_end|>", "None"]
)
def test_an_answer_is_not_judged_as_a_text(text: str) -> None:
    """A sign in the picture may say so, and the server has decoded by the schema."""
    assert judged({**LEAST, "caption": text}).text == text


def test_reasoning_before_an_answer_is_cut_off_and_within_it_is_a_text() -> None:
    assert judged("<think>It shows {}</think>\n" + said()).text == "A bench."
    assert judged({**LEAST, "caption": "A sign: <think>"}).text == "A sign: <think>"


@pytest.mark.parametrize(
    ("reply", "reason", "cut"),
    [
        (Reply(said()[:-5], "length"), "reply_cut_short", True),
        (Reply("", "length"), "reply_cut_short", True),
        (Reply(said(), "length"), "", False),  # it ends where the bound is
        (Reply(said(), refused=True), "reply_refusal", False),
        (Reply(said(), "content_filter"), "reply_filtered", False),
        (Reply(said(), ""), "reply_unfinished", False),
        (Reply("", reasoned=True), "reply_only_reasoning", False),
    ],
)
def test_what_the_server_says_of_its_reply(reply: Reply, reason: str, cut: bool) -> None:
    verdict = AnswerSchema(SCENE).judge(reply)
    assert (verdict.reason, verdict.cut) == (reason, cut)
