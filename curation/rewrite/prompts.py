"""Builds the requests to the language model, and checks which of its replies can be text-to-image prompts."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import NamedTuple

from curation.errors import UsageError
from curation.jsonio import clean_text
from curation.rewrite.groups import hash_of
from curation.serving.wire import CONTEXT_TOKENS, Reply, Request

MAX_CAPTION_CHARACTERS = 2000  # about 500 tokens of English
MAX_PROMPT_CHARACTERS = 1000  # text-to-image models read 77 to 512 tokens
MIN_PROMPT_CHARACTERS = 8
MAX_TOKENS = 256
MAX_SYSTEM_BYTES = 64 << 10
WARMER = 0.2  # each retry after a refused reply raises the temperature by this, up to:
HOTTEST = 1.5

# The system prompt.  Ollama models contain it through their Modelfile (examples/ollama/Modelfile has the same text).
SYSTEM = """\
You edit image captions. Each message holds a sentence that describes a picture, and may name a group of people, like \
this: sentence: "a man reading in a park" group:"asian female"

Rewrite the sentence so that the person or people in the picture belong to that group, and so that it can be given to \
a text-to-image model:
- Change as little as possible: keep the scene, the objects, the style and the length.
- If the sentence already names a gender or an ethnicity, put the given one in its place, and let pronouns agree.
- If it names a person, you may drop the name or choose one that fits the group.
- If it mentions nobody, add one person of the group where it is natural.
- Leave out file names, prices, web addresses, photo credits and hashtags.
- If no group is given, only turn the sentence into a clear description of the picture.
Answer with the rewritten English sentence alone, on one line: no quotation marks, no remarks, no explanation.
"""


class Verdict(NamedTuple):
    """The prompt, or None and the reason why the reply is not usable."""

    prompt: str | None
    reason: str = ""


def chat_request(
    caption: str, group: str | None, seed: int, key: str, attempt: int, temperature: float, system: str = ""
) -> Request:
    """The question in the form of the published pipeline: ``sentence: "…" group:"…"``.

    The caption must have at most ``MAX_CAPTION_CHARACTERS``; it cannot close its quotation marks.
    system: the user's own system prompt, which is sent to every server.
    """
    user = f'sentence: "{quotable(caption)}"' + (f' group:"{quotable(group)}"' if group else "")
    return Request(
        user=user,
        system=system,
        default_system=SYSTEM,
        temperature=_temperature(temperature, attempt),
        seed=_seed(seed, key, attempt),
        max_tokens=MAX_TOKENS,
        context_tokens=CONTEXT_TOKENS,
    )


def completion_request(
    caption: str, group: str | None, seed: int, key: str, attempt: int, temperature: float
) -> Request:
    """The question for a small model without chat training: eight examples, and the beginning of the answer.

    Such a model would ignore the group, so the beginning of the answer names it: see ``opening``.
    """
    shots = "".join(f"Caption: {shot}\n{_person(who)}Image: {opening(who)}{image}\n\n" for shot, who, image in _SHOTS)
    if group is None:
        shots = "".join(f"Caption: {shot}\nImage: {opening(who)}{image}\n\n" for shot, who, image in _SHOTS)
    asked = f"Caption: {quotable(caption)}\n{_person(group)}Image:"
    return Request(
        prompt=f"{shots}{asked} {opening(group)}".rstrip(),
        temperature=_temperature(temperature, attempt),
        seed=_seed(seed, key, attempt),
        max_tokens=64,
        context_tokens=CONTEXT_TOKENS,
        stop=("\n",),
        extra=_SMALL_MODEL,
    )


def read_system_prompt(path: str | None) -> str:
    """The text of ``--system_prompt``; empty without one.  Raises UsageError unless it is text of at most 64 kB."""
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SYSTEM_BYTES + 1)
        text = data.decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--system_prompt {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not text or len(data) > MAX_SYSTEM_BYTES:
        raise UsageError(f"--system_prompt {path}: holds {'too much' if text else 'nothing'}")
    return text


def opening(group: str | None) -> str:
    """The beginning of a completion: "A black woman " for "black female"; nothing without a group."""
    if not group:
        return ""
    words = _in_plain_words(group)
    return f"{'An' if words[0] in 'aeiou' else 'A'} {words} "


def quotable(text: str) -> str:
    """One line without double quotation marks, HTML entities and control characters, which is safe inside ``"…"``."""
    return _DOUBLE_QUOTES.sub("'", clean_text(html.unescape(text)))


def judge(reply: Reply, begun: str = "") -> Verdict:
    """Check whether a reply can be a prompt: one line of permitted length that contains only the sentence.

    begun: the beginning of the reply, if the request contained it.
    """
    if not reply.complete:
        return Verdict(None, "reply_cut_short")
    lines = [line for line in _LINES.split(reply.text) if line.strip()]
    if not lines:
        return Verdict(None, "reply_empty")
    if len(lines) > 1:
        return Verdict(None, "reply_many_lines")
    text = _unquoted(clean_text(begun.rstrip() + lines[0]))
    if len(text) > MAX_PROMPT_CHARACTERS:
        return Verdict(None, "reply_too_long")
    plain = text.replace("’", "'")
    for reason, gives_away in _UNFIT:
        if gives_away(plain):
            return Verdict(None, reason)
    if len(text) < MIN_PROMPT_CHARACTERS or not _WORD(text):
        return Verdict(None, "reply_too_short")
    return Verdict(text)


_DOUBLE_QUOTES = re.compile('["“”„‟〝〞＂]')
_LINES = re.compile(r"[\r\n\v\f\x85\u2028\u2029]+")
_WORD = re.compile(r"[^\W\d_]{2}").search
_QUOTED = {'"': '"', "“": "”", "„": "“", "'": "'", "‘": "’", "«": "»", "`": "`", "*": "*"}


# They are tried in this order.  A reason is counted, so it names the fault and not the words that revealed it.
_UNFIT = tuple(
    (reason, re.compile(pattern, re.IGNORECASE).search)
    for reason, pattern in (
        ("reply_echo", r"^\W*(sentence|group)\W?\s*:|\b(sentence|group)\W?\s*:\s*[\"“']"),
        (
            "reply_refusal",
            r"^\W*((I'm|I am) (\w+ )?sorry\b[^a-z]*(but|I\b|,|\.|$)|sorry, (but )?(I|as)\b|I apologi[sz]e\b"
            r"|(I'm|I am) (not able|unable|not comfortable)\b|I (can't|cannot|can not|won't|will not|must decline)\b)"
            r"|\bas an? (AI|artificial intelligence|(large )?language model)\b",
        ),
        (
            "reply_preamble",
            r"^\W*((sure|certainly|of course|absolutely|okay|ok|yes)\s*[,!:.]"
            r"|here('s| is| are)\b.{0,80}?(:|\b(sentence|caption|version|prompt|description)\b)"
            r"|(the )?(modified|rewritten|revised|updated|new|edited) (sentence|caption|text|version|prompt)\b"
            r"|(answer|output|result|response|prompt|caption|image|rewritten|modified)\s*:)",
        ),
        ("reply_remark", r"\b(note|explanation|remark)\s*:|\bI (have )?(changed|replaced|modified) the\b"),
        ("reply_markup", r"<\|.*?\|>|</?(think|s|bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]|```"),
    )
)


def _unquoted(text: str) -> str:
    """The text without quotation marks around the whole of it."""
    while len(text) > 1 and _QUOTED.get(text[0]) == text[-1] and text[-1] not in text[1:-1].strip("*"):
        text = text[1:-1].strip()
    return text


def _temperature(temperature: float, attempt: int) -> float:
    return round(max(temperature, min(HOTTEST, temperature + WARMER * attempt)), 3)


def _seed(seed: int, key: str, attempt: int) -> int:
    return hash_of(seed, key, attempt) & 0x7FFFFFFF  # servers accept 31 bits


def _person(group: str | None) -> str:
    return f"Person: {_in_plain_words(group)}\n" if group else ""


def _in_plain_words(group: str) -> str:
    return " ".join(_PLAIN.get(word, word) for word in quotable(group).replace("middle east", "middle-eastern").split())


_PLAIN: Mapping[str, str] = {"male": "man", "female": "woman", "middle-eastern": "middle eastern"}

# These settings prevent a model of 270 million parameters from repeating itself.
_SMALL_MODEL: Mapping[str, float] = {"repeat_penalty": 1.05, "dry_multiplier": 0.8}

# Caption, group, and the continuation of the image's description after the opening.
_SHOTS = (
    ("Man fishing on a wooden pier at dawn", "asian female", "fishing on a wooden pier at dawn, soft pink light."),
    (
        "Nurse Practitioner - City Hospital Careers",
        "black male",
        "in a nurse's uniform smiles in the corridor of a city hospital.",
    ),
    (
        "Set of 4 Modern Dining Chairs, Velvet, Gold Legs",
        "indian female",
        "sits on a modern velvet dining chair with gold legs in a light room.",
    ),
    (
        "Portrait of John Smith, CEO of Acme Inc.",
        "latino female",
        "in a business suit, portrait of the CEO of a company.",
    ),
    (
        "Football in the park | Stock Photo 123456",
        "middle east male",
        "plays football with his friends in a sunny park.",
    ),
    ("blonde girl with red dress on the beach at sunset", "white female", "in a red dress on the beach at sunset."),
    (
        "NEW YORK MARATHON 2014 - finish line",
        "black female",
        "runs across the finish line of the New York marathon.",
    ),
    (
        "Old farmer and tractor, 1950s © archive",
        "white male",
        "stands beside his tractor, a farmer in a black and white photograph from the 1950s.",
    ),
)
