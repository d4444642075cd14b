"""Answers as JSON: what a schema may say, whether a reply is such an answer, and the columns that are made of it.

Model servers decode by the schema, so a reply is judged by it and not as a text.  Of JSON Schema those keywords are
allowed that the servers know and from which every answer has the same columns: a file with any other is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeGuard

import xxhash

from curation.errors import InfrastructureError, SampleError, UsageError, install
from curation.jsonio import clean_text, dump_json, parse_strict_json
from curation.replies import CUT, Answer, Reply, has_word, repeats_endlessly, unfinished, without_reasoning

MAX_SCHEMA_BYTES: Final = 32 << 10  # it is a part of each request
MAX_SCHEMA_DEPTH: Final = 8  # objects and arrays within one another
MAX_SCHEMA_NODES: Final = 1000  # also those that $ref repeats
MAX_COLUMNS: Final = 100
MAX_ANSWER_BYTES: Final = 64 << 10
MAX_REPLY_CHARACTERS: Final = 1 << 19  # with the reasoning before the answer
COLUMN_PREFIX: Final = "vlm_"  # as ContraStyles names the column with the new caption
CAPTION_PROPERTIES: Final = ("caption", "description")

_MAX_DETAIL: Final = 200
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_DEFINITIONS: Final = "#/$defs/"
_DEFINITION: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_ANNOTATIONS: Final = frozenset({"title", "description", "examples", "default", "$comment", "deprecated"})
_AT_THE_TOP: Final = frozenset({"$schema", "$defs"})
_NUMBERS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const"})
_KEYWORDS: Final[Mapping[str, frozenset[str]]] = {
    "string": frozenset({"minLength", "maxLength", "enum", "const"}),
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "boolean": frozenset({"enum", "const"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_SCALARS: Final = ("string", "integer", "number", "boolean")
_KIND_OF: Final[Mapping[type, str]] = {str: "string", bool: "boolean", int: "integer", float: "number"}


@dataclass(frozen=True, slots=True)
class Column:
    """One column that is made of every answer.

    Attributes:
        path: The properties that lead to it, from the outermost on.
        kind: ``string``, ``integer``, ``number`` or ``boolean``; ``json`` for an array of objects or arrays, as text.
        many: It is an array of that kind.
    """

    path: tuple[str, ...]
    kind: str
    many: bool = False

    @property
    def name(self) -> str:
        return COLUMN_PREFIX + ".".join(self.path)

    def overflows(self, answer: Mapping[str, Any]) -> bool:
        """Whether an integer, which may be written as 1e300, does not fit in the column."""
        value = self._value(answer) if self.kind == "integer" else None
        values = value if self.many and value is not None else [value]
        return any(isinstance(item, float) and not abs(item) < 1 << 63 for item in values)

    def _value(self, answer: Mapping[str, Any] | None) -> Any:
        value: Any = answer
        for name in self.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def cell(self, answer: Mapping[str, Any] | None) -> Any:
        """Its value in an answer; None where the answer has none."""
        value = self._value(answer)
        if value is None:
            return None
        if self.kind == "json":
            return dump_json(value).decode("utf-8", "replace")
        if self.many:
            return [self._scalar(item) for item in value]
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if value is None:
            return None
        return float(value) if self.kind == "number" else int(value) if self.kind == "integer" else value


class AnswerSchema:
    """A JSON schema by which servers answer.

    Attributes:
        sent: The schema as servers get it: nothing is allowed in an object that it does not name.
        digest: Of it.
        caption: The property that is the caption.
        columns: Those of every answer without the caption, which has a column already.
    """

    def __init__(self, source: Mapping[str, Any], caption: str | None = None) -> None:
        """
        Args:
            source: The schema.
            caption: The property with the caption; None: ``caption``, else ``description``.

        Raises:
            UsageError: The schema says what is not allowed; the message names the place.
            InfrastructureError: The package jsonschema is missing.
        """
        validator = _validator_class()
        walk = _Walk(source)
        walk.definitions()
        walk.top()
        try:
            validator.check_schema(source)
        except Exception as error:
            if type(error).__name__ != "SchemaError":
                raise
            at, said = getattr(error, "json_path", "$"), getattr(error, "message", str(error))
            raise UsageError(f"--schema, {at}: {clean_text(said)[:_MAX_DETAIL]}") from None
        self.caption = _caption_property(source, walk.columns, caption, validator)
        self.columns = tuple(column for column in walk.columns if column.path != (self.caption,))
        names = [column.name.lower() for column in self.columns]
        if f"{COLUMN_PREFIX}caption" in names:
            raise UsageError(
                f"--schema, $.properties.caption: the caption is {self.caption}, and its column is "
                f"{COLUMN_PREFIX}caption: give this property another name"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"--schema: two properties differ in capitals only ({', '.join(twice[:3])}): rename one")
        self.sent = _closed({name: value for name, value in source.items() if name != "$schema"})
        self.digest = xxhash.xxh3_128_hexdigest(dump_json(self.sent))
        self._validator = validator(self.sent)

    @classmethod
    def read(cls, path: str, caption: str | None = None) -> AnswerSchema:
        """The schema in a file.  Raises UsageError, which names the file and the place in it."""
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_SCHEMA_BYTES + 1)
            source = parse_strict_json(data.removeprefix(b"\xef\xbb\xbf"), MAX_SCHEMA_BYTES, 4 * MAX_SCHEMA_DEPTH)
        except OSError as error:
            raise UsageError(f"--schema {path}: cannot be read ({error.strerror})") from None
        except SampleError as error:
            raise UsageError(f"--schema {path}: not a JSON schema ({error})") from None
        if not isinstance(source, dict):
            raise UsageError(f"--schema {path}: it holds a {type(source).__name__}, and a schema is an object")
        try:
            return cls(source, caption)
        except UsageError as error:
            named = re.sub(r"--schema\b(?!_)", lambda _: f"--schema {Path(path)}", str(error), count=1)
            raise UsageError(named) from None

    @property
    def record(self) -> dict[str, str]:
        """What the recorded options say of it."""
        return {"schema": self.digest, "schema_caption": self.caption}

    @property
    def request(self) -> str:
        """What the question to the model ends with: the server forces the form, and this tells the meaning."""
        return "Answer with one JSON object of this schema and nothing else: " + dump_json(self.sent).decode()

    def cells(self, answer: Mapping[str, Any] | None) -> dict[str, Any]:
        """The columns of an answer with their values."""
        return {column.name: column.cell(answer) for column in self.columns}

    def judge(self, reply: Reply) -> Answer:
        """Tell whether a reply is an answer.

        Returns:
            The caption with the object; or a reason: ``reply_not_json``, ``schema_mismatch``, ``reply_empty`` for a
            caption without a word, ``reply_repetition`` for one that repeats itself endlessly, ``reply_cut_short`` for
            an answer without an end, or what the server says of its reply.
        """
        if reply.refused:
            return Answer(None, "reply_refusal")
        if len(reply.text) > MAX_REPLY_CHARACTERS:
            return Answer(None, "reply_too_long")
        if reason := unfinished(reply):
            return Answer(None, reason)
        cut = reply.ended == CUT
        text, finished = reply.text.strip(), True
        if not text.startswith("{"):
            text, finished = without_reasoning(text)
        if not finished or (reply.reasoned and not text.strip()):
            return Answer(None, "reply_only_reasoning", cut)
        if not text.strip():
            return Answer(None, "reply_cut_short" if cut else "reply_empty", cut)
        try:
            data = text.strip().encode("utf-8", "surrogatepass")
            answer = cleaned(parse_strict_json(data, MAX_ANSWER_BYTES, 2 * MAX_SCHEMA_DEPTH))
        except SampleError as error:
            if error.reason == "json_too_large":
                return Answer(None, "reply_too_long", detail=str(error.detail))
            return Answer(None, "reply_cut_short" if cut else "reply_not_json", cut, detail=str(error.detail))
        if wrong := next(self._validator.iter_errors(answer), None):
            told = f"{wrong.json_path[:_MAX_DETAIL]}: {clean_text(wrong.message[:_MAX_DETAIL])}"
            return Answer(None, "schema_mismatch", detail=told)
        if large := next((column.name for column in self.columns if column.overflows(answer)), ""):
            return Answer(None, "schema_mismatch", detail=f"{large}: no integer of 64 bits")
        caption = answer[self.caption]
        if not has_word(caption):
            return Answer(None, "reply_empty")
        if repeats_endlessly(caption):
            return Answer(None, "reply_repetition")
        return Answer(caption, json=answer)


def cleaned(value: Any) -> Any:
    """A value of JSON whose texts are one line each and have no control characters."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {name: cleaned(item) for name, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def _validator_class() -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise InfrastructureError(f"--schema needs jsonschema ({error}): {install('jsonschema')}") from None
    return Draft202012Validator


def _caption_property(source: Mapping[str, Any], columns: Sequence[Column], wanted: str | None, validator: Any) -> str:
    """The property that is the caption: a text that every answer has."""
    texts = [c.path[0] for c in columns if len(c.path) == 1 and c.kind == "string" and not c.many]
    names = CAPTION_PROPERTIES if wanted is None else (wanted,)
    found = next((name for name in names if name in texts), None)
    if found is None:
        if wanted is None:
            raise UsageError(
                f"--schema, $.properties: no text is named {' or '.join(CAPTION_PROPERTIES)}: say with "
                "--schema_caption which property is the caption"
            )
        raise UsageError(f"--schema_caption {wanted}: the schema's texts are {', '.join(texts[:8]) or 'none'}")
    alone = {**source["properties"][found], "$defs": source.get("$defs", {})}
    if found not in source.get("required", ()) or validator(alone).is_valid(None):
        raise UsageError(f"--schema, $.properties.{found}: it is the caption: list it under required, and without null")
    return found


class _Walk:
    """A way through a schema, which refuses what is not allowed and collects the columns."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        self._source = source
        self._named: Mapping[str, Any] = {}
        self._nodes = 0
        self.columns: list[Column] = []

    def definitions(self) -> None:
        named = self._source.get("$defs", {})
        if not isinstance(named, dict):
            _refuse("$.$defs", "it is no object of schemas")
        self._named = named
        for name, node in named.items():
            if not _DEFINITION.fullmatch(name):  # others are written otherwise in a reference
                _refuse("$.$defs", f"{clean_text(name)[:80]!r} is no name of letters, digits, _, - and .")
            self._node(node, f"$.$defs.{name}", None, (name,))

    def top(self) -> None:
        node = {name: value for name, value in self._source.items() if name not in _AT_THE_TOP}
        if node.get("type") != "object":
            _refuse("$", 'an answer is an object: its type is "object"')
        self._node(node, "$", (), ())

    def _node(self, node: Any, at: str, path: tuple[str, ...] | None, inside: tuple[str, ...]) -> str:
        """Look at one schema.

        Args:
            node: The schema.
            at: Its place, for messages.
            path: Of its column; None where it has none of its own.
            inside: What leads to it: names of ``$defs``, and "" for each object or array.

        Returns:
            Its kind.
        """
        self._nodes += 1
        if self._nodes > MAX_SCHEMA_NODES:
            _refuse(at, f"more than {MAX_SCHEMA_NODES:,} schemas, with those that $ref repeats")
        if inside.count("") > MAX_SCHEMA_DEPTH:
            _refuse(at, f"nested deeper than {MAX_SCHEMA_DEPTH}")
        if not isinstance(node, dict):
            _refuse(at, f"a schema is an object, not {dump_json(node).decode()[:40]}")
        for way in ("$ref", "anyOf"):
            if way in node:
                _only(node, {way}, at)
                return (
                    self._reference(node, at, path, inside) if way == "$ref" else self._or_null(node, at, path, inside)
                )
        kind = _kind(node, at)
        _only(node, {"type", *_KEYWORDS[kind]}, at)
        _check_values(node, kind, at)
        _check_bounds(node, at)
        if kind == "object":
            self._object(node, at, path, (*inside, ""))
        elif kind == "array":
            if "items" not in node:
                _refuse(at, "an array needs items")
            of = self._node(node["items"], f"{at}.items", None, (*inside, ""))
            self._column(path, of if of in _SCALARS else "json", at, many=of in _SCALARS)
        else:
            self._column(path, kind, at)
        return kind

    def _object(self, node: dict[str, Any], at: str, path: tuple[str, ...] | None, inside: tuple[str, ...]) -> None:
        properties, required = node.get("properties"), node.get("required", [])
        if not isinstance(properties, dict) or not properties:
            _refuse(at, "an object needs properties")
        if node.get("additionalProperties", False) is not False:
            _refuse(f"{at}.additionalProperties", "only false is allowed, because others would have no column")
        for name, inner in properties.items():
            if not _NAME.fullmatch(name):
                _refuse(
                    f"{at}.properties", f"{clean_text(name)[:80]!r} is no name of letters, digits and _, at most 64"
                )
            self._node(inner, f"{at}.properties.{name}", None if path is None else (*path, name), inside)
        if not isinstance(required, list) or not all(name in properties for name in map(str, required)):
            _refuse(f"{at}.required", "it lists a name that is no property")

    def _reference(self, node: dict[str, Any], at: str, path: tuple[str, ...] | None, inside: tuple[str, ...]) -> str:
        before, found, name = str(node["$ref"]).partition(_DEFINITIONS)
        if before or not found or name not in self._named:
            _refuse(f"{at}.$ref", "only #/$defs/<name> of the same file is allowed")
        if name in inside:
            _refuse(f"{at}.$ref", "it leads to itself")
        return self._node(self._named[name], at, path, (*inside, name))

    def _or_null(self, node: dict[str, Any], at: str, path: tuple[str, ...] | None, inside: tuple[str, ...]) -> str:
        ways = node["anyOf"] if isinstance(node["anyOf"], list) else []
        others = [(number, way) for number, way in enumerate(ways) if way != {"type": "null"}]
        if len(ways) != 2 or len(others) != 1:
            _refuse(f"{at}.anyOf", 'only one schema or {"type": "null"} is allowed, because a column has one type')
        number, way = others[0]
        return self._node(way, f"{at}.anyOf[{number}]", path, inside)

    def _column(self, path: tuple[str, ...] | None, kind: str, at: str, *, many: bool = False) -> None:
        if path is None:
            return
        self.columns.append(Column(path, kind, many))
        if len(self.columns) > MAX_COLUMNS:
            _refuse(at, f"more than {MAX_COLUMNS} columns")


def _kind(node: Mapping[str, Any], at: str) -> str:
    """The one type of a schema beside null."""
    kinds = node.get("type", _kinds_of_values(node))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        _refuse(f"{at}.type", "it is no name of a type")
    others = [kind for kind in kinds if kind != "null"]
    if len(others) != 1 or others[0] not in _KEYWORDS:
        said = ", ".join(kinds)[:80] or "none"
        _refuse(f"{at}.type", f"one of {', '.join(_KEYWORDS)} is needed, alone or with null; it has {said}")
    return str(others[0])


def _kinds_of_values(node: Mapping[str, Any]) -> list[str]:
    values = node["enum"] if isinstance(node.get("enum"), list) else [node["const"]] if "const" in node else []
    return list(dict.fromkeys(_KIND_OF.get(type(value), "array") for value in values if value is not None))


def _check_values(node: Mapping[str, Any], kind: str, at: str) -> None:
    """That the values of enum and const are scalars of the type, as an answer can hold them."""
    values = [*_listed(node.get("enum")), *([node["const"]] if "const" in node else [])]
    for value in values:
        of = _KIND_OF.get(type(value))
        if value is not None and of != kind and not (kind == "number" and of == "integer"):
            _refuse(f"{at}.enum" if "enum" in node else f"{at}.const", f"{dump_json(value).decode()[:80]} is no {kind}")
        if isinstance(value, str) and value != clean_text(value):
            _refuse(
                f"{at}.enum" if "enum" in node else f"{at}.const", "a text has blanks or control characters to lose"
            )


def _check_bounds(node: Mapping[str, Any], at: str) -> None:
    """That some value fits: servers do not say so, and every answer would be rejected."""
    if node.get("enum") == []:
        _refuse(f"{at}.enum", "it lists no value")
    for least, most in (("minLength", "maxLength"), ("minItems", "maxItems"), ("minimum", "maximum")):
        low, high = node.get(least), node.get(most)
        if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
            _refuse(f"{at}.{least}", f"no value fits: it is above {most}")


def _listed(value: Any) -> list[Any]:
    return value if _is_list(value) else []


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _only(node: Mapping[str, Any], allowed: set[str], at: str) -> None:
    for name in node:
        if name not in allowed and name not in _ANNOTATIONS:
            _refuse(f"{at}.{clean_text(name)[:80]}", f"not supported here; supported are {', '.join(sorted(allowed))}")


def _refuse(at: str, why: str) -> NoReturn:
    raise UsageError(f"--schema, {at[:400]}: {why}")


def _closed(node: Any, *, names: bool = False) -> Any:
    """A schema whose objects allow nothing that they do not name.  names: the members of ``node`` are names."""
    if not isinstance(node, dict):
        return [_closed(item) for item in node] if isinstance(node, list) else node
    made = {
        name: value
        if not names and name in (*_ANNOTATIONS, "enum", "const", "required")
        else _closed(value, names=_holds_names(name, names))
        for name, value in node.items()
    }
    if not names and "properties" in node:
        made["additionalProperties"] = False
    return made


def _holds_names(name: str, names: bool) -> bool:
    return not names and name in ("properties", "$defs")
