"""What a server is asked once it has refused the usual request: without a field, or with another name for it.

Servers of one API differ in what they take: OpenAI's newer models know ``max_completion_tokens`` only, some refuse a
seed or a temperature, and the chat templates of some models have no system role.  What they say tells which it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from curation.errors import SampleError
from curation.replies import WHOLE, Reply
from curation.serving.connection import EndpointError, Refused
from curation.serving.wire import Manner, Request

# What a server may say of a field that turns reasoning off, where it does not say the field's name.
_FIELD_WORDS = {
    "think": ("think",),
    "reasoning_effort": ("reasoning", "think"),
    "chat_template_kwargs": ("chat_template", "chat template"),
}
# The field of a schema, in OpenAI's API and in that of an old Ollama, which wants a text there.
_SCHEMA_FIELDS = {
    "response_format": re.compile(r"response_format|json_schema"),
    "format": re.compile(r"\.format of type"),
}
_UNKNOWN = re.compile(
    r"support|unknown|unrecogni|unexpected|extra|permitted|allowed|only the default|deprecated|not implemented|"
    r"not available|no such|additional propert|invalid (?:field|param|argument|key|option|request argument)"
)
_RANGE = re.compile(r"between|range|greater than|less than|at most|at least|[<>≤≥]|too (?:large|long|high|many)")
_NO_SYSTEM = re.compile(
    r"system\W{1,3}(?:role|message|prompt|instruction)|role\W{1,8}system|roles must alternate|"
    r"developer instruction|(?:only|just)\W.{0,20}user.{0,20}assistant|"
    r"system\W{1,3}is not|\Wuser\W{1,3}or\W{1,3}assistant\W"
)
_STATUSES = (400, 422, 500, 501)  # llama.cpp and older vLLM answer 500 where a chat template fails


def adapted(manner: Manner, request: Request, error: SampleError | EndpointError, *, known: bool) -> Manner | None:
    """How to ask a server that has refused a request.

    Args:
        manner: How it was asked.
        request: What it was asked.
        error: What it said.
        known: It has answered requests of this manner: then only what it names is changed.

    Returns:
        Another manner; None where what it said names nothing that could be left out or said otherwise.
    """
    said = (error.detail if isinstance(error, SampleError) else str(error)).lower()
    status = error.status if isinstance(error, Refused) else int(said[:3]) if re.match(r"\d{3}:", said) else 0
    if status not in _STATUSES:
        return None
    if "max_completion_tokens" in said and manner.tokens_field == "max_tokens":
        return _changed(replace(manner, tokens_field="max_completion_tokens"), "max_completion_tokens for max_tokens")
    usual = [*(["stop"] if request.stop else []), *request.extra, "seed", "temperature"]
    if request.schema is not None and not request.schema_needed:
        for name, words in _SCHEMA_FIELDS.items():
            if name not in manner.omits and words.search(said):
                return _without(manner, [name])
    named = [name for name in manner.fields if any(word in said for word in _FIELD_WORDS.get(name, (name,)))]
    if _UNKNOWN.search(said) and not _RANGE.search(said):
        named += [name for name in usual if name not in manner.omits and re.search(rf"(?<!\w){name}(?!\w)", said)]
    if named:
        return _without(manner, named)
    if not request.prompt and not manner.folds_system and manner.system(request) and _NO_SYSTEM.search(said):
        return _changed(replace(manner, folds_system=True), "the system prompt within the user's message")
    if manner.fields and isinstance(error, SampleError) and status in (400, 422) and not known:
        return _without(manner, manner.fields)
    return None


def unquieted(manner: Manner, reply: Reply, *, known: bool) -> Manner | None:
    """How to ask a server whose reply is all reasoning, or None.

    vLLM's parsers of some models take the whole reply for reasoning where the chat template has turned reasoning off.
    known: Replies of this manner have had a text.
    """
    if known or not manner.fields or not reply.reasoned or reply.text.strip() or reply.ended != WHOLE:
        return None
    return _without(manner, manner.fields)


def _without(manner: Manner, names: Iterable[str]) -> Manner:
    gone = frozenset(names)
    fields = {name: value for name, value in manner.fields.items() if name not in gone}
    omits = manner.omits | (gone - manner.fields.keys())
    return _changed(replace(manner, fields=fields, omits=omits), *(f"no {name}" for name in sorted(gone)))


def _changed(manner: Manner, *changes: str) -> Manner:
    return replace(manner, changes=(*manner.changes, *changes))
