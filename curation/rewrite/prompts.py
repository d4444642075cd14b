"""Builds the requests to the language model, and decides whose system prompt is used."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from curation.errors import UsageError
from curation.jsonio import clean_text
from curation.rewrite.groups import hash_of
from curation.serving.wire import CONTEXT_TOKENS, Request, Served, estimated_tokens

MAX_CAPTION_CHARACTERS = 2000  # about 500 tokens of English
MAX_TOKENS = 256
SMALL_MODEL_TOKENS = 64
QUESTION_TOKENS = 100  # of a usual caption
OWN_SYSTEM = "model"  # --system_prompt model: the model's own is used
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


def chat_request(
    caption: str,
    group: str | None,
    seed: int,
    key: str,
    attempt: int,
    temperature: float,
    system: str = "",
    max_tokens: int = MAX_TOKENS,
) -> Request:
    """The question in the form of the published pipeline: ``sentence: "…" group:"…"``.

    The caption must have at most ``MAX_CAPTION_CHARACTERS``; it cannot close its quotation marks.
    system: the user's own system prompt, which is sent to every server; ``model``: none is sent.
    """
    user = f'sentence: "{quotable(caption)}"' + (f' group:"{quotable(group)}"' if group else "")
    return Request(
        user=user,
        system="" if system == OWN_SYSTEM else system,
        default_system="" if system == OWN_SYSTEM else SYSTEM,
        temperature=_temperature(temperature, attempt),
        seed=_seed(seed, key, attempt),
        max_tokens=max_tokens,
        context_tokens=CONTEXT_TOKENS,
    )


def completion_request(
    caption: str,
    group: str | None,
    seed: int,
    key: str,
    attempt: int,
    temperature: float,
    max_tokens: int = SMALL_MODEL_TOKENS,
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
        max_tokens=max_tokens,
        context_tokens=CONTEXT_TOKENS,
        stop=("\n",),
        extra=_SMALL_MODEL,
    )


def read_system_prompt(path: str | None) -> str:
    """The text of ``--system_prompt``; empty without one, and ``model`` as it is.

    Raises UsageError unless it is text of at most 64 kB.
    """
    if path is None or path == OWN_SYSTEM:
        return path or ""
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


# "You are a helpful assistant", "You are Qwen, created by Alibaba Cloud.  You are …": who the model is, no instruction.
_VENDOR = re.compile(
    r"\W*(?:you are|you're|i am|i'm|this is)\b[^.!?\n]{0,120}"
    r"\b(?:assistant|chatbot|bot|ai|model|created|trained|developed)\b[^.!?\n]{0,120}[.!?]?\s*",
    re.IGNORECASE,
)
_TASK = re.compile(r"\b(?:sentence|caption|prompt|rewrit|rephras|edit|describ|portray|group)", re.IGNORECASE)


def is_instructed(served: Served, *, default_name: bool) -> bool:
    """Whether a model has the instruction for this task of its own, so that the project's is not sent to it.

    It has where its system prompt, its template or its example messages speak of the sentence and the group, as
    examples/ollama/Modelfile does.  A model of the default name was made for the task, whatever the words: there any
    system prompt counts that says more than who the model is, and a server that tells nothing is believed.
    """
    spoken = f"{served.system}\n{served.texts}".lower()
    if re.search(r"\bsentences?\b", spoken) and re.search(r"\bgroups?\b", spoken):
        return True
    if not default_name:
        return False
    own = served.system.strip()
    return not served.told or bool(own and (_TASK.search(own) or _VENDOR.sub("", own).strip()))


def needed_tokens(system: str, max_tokens: int) -> int:
    """About how many tokens a usual question takes with its system prompt and its reply.

    system: the user's own; ``model``: the model's, which its server has room for; "": the project's.
    """
    own = 0 if system == OWN_SYSTEM else estimated_tokens(system or SYSTEM)
    return own + QUESTION_TOKENS + max_tokens


_DOUBLE_QUOTES = re.compile('["“”„‟〝〞＂]')


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
