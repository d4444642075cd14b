"""Whether a prompt says in words which group it portrays, and whether it names another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

# Words that state a value of an attribute, as regular expressions between word boundaries.  Those of the published
# pipeline's groups; a value that is not here is looked for by its own words.
_PERSON = (
    r"(?: (?!hair|haired|and|suit|dress|shirt)\w+)?[ -](?:man|men|woman|women|boys?|girls?|males?|females?|person"
    r"|people|couple|family|child|children|kids?|lady|ladies|gentlem[ae]n|baby|teenagers?|adults?|model|actor|actress)"
)  # black and white are colours too
WORDS: Mapping[str, Mapping[str, str]] = {
    "gender": {
        "male": r"males?|man|men|boys?|gentlem[ae]n|guys?|father|dad|son|husband|grandfather|king|prince|he|his|him",
        "female": r"females?|wom[ae]n|girls?|lady|ladies|mother|mom|daughter|wife|grandmother|queen|princess|she|hers?",
    },
    "ethnicity": {
        "black": rf"black{_PERSON}|african|african[- ]american|afro\w*",
        "white": rf"white{_PERSON}|caucasian|european",
        "asian": r"asian|east[- ]asian|chinese|japanese|korean|vietnamese|thai|filipin[oa]",
        "latino": r"latin[oax]|latin[- ]american|hispanic|mexican|brazilian|colombian",
        "middle east": r"middle[- ]east(?:ern)?|arab\w*|persian|iranian|turkish",
        "indian": r"indian|south[- ]asian|desi",
    },
}


@lru_cache(maxsize=4096)
def attributes_of(group: str) -> tuple[tuple[str, str], ...]:
    """The (attribute, value) pairs of a group such as "middle east male"; words that belong to no known attribute are
    one value of the attribute "group"."""
    rest, found = f" {group.lower()} ", []
    for attribute, values in WORDS.items():
        for value in sorted(values, key=len, reverse=True):
            if f" {value} " in rest:
                found.append((attribute, value))
                rest = rest.replace(f" {value} ", " ", 1)
                break
    if words := rest.strip():
        found.append(("group", words))
    return tuple(found)


def states(prompt: str, attribute: str, value: str) -> bool:
    """Whether the prompt has a word for the value."""
    return _pattern(attribute, value).search(prompt) is not None


def states_another(prompt: str, attribute: str, value: str) -> bool:
    """Whether it has a word for another value of the attribute: of those that are known."""
    return any(other != value and states(prompt, attribute, other) for other in WORDS.get(attribute, {}))


@lru_cache(maxsize=4096)
def _pattern(attribute: str, value: str) -> re.Pattern[str]:
    words = WORDS.get(attribute, {}).get(value) or re.escape(value)
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
