"""The groups of people that prompts portray, and their assignment to samples: balanced, and the same in every run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import xxhash

from curation.errors import UsageError
from curation.jsonio import clean_text

# The ethnicities and genders of the published pipeline (github.com/lluisgomez/SynthFairCLIP), in its terms
ETHNICITIES = ("black", "white", "asian", "latino", "middle east", "indian")
GENDERS = ("male", "female")
ATTRIBUTES = MappingProxyType({"gender": GENDERS, "ethnicity": ETHNICITIES})

MAX_FILE_BYTES = 64 << 10
MAX_GROUPS = 10_000
MAX_CHARACTERS = 100

Groups = tuple[str, ...]


def read_groups(choice: str) -> Groups:
    """Read the groups that ``--groups`` names: ``default``, ``none`` (no groups) or a YAML file.

    The file contains a list of groups, each a text, or a mapping of attributes to lists of values.  In a mapping, every
    combination is a group, with its values in the mapping's order: ``{ethnicity: [black, …], gender: [male, female]}``
    gives "black male" first.  Raises UsageError for anything else.
    """
    if choice == "none":
        return ()
    if choice == "default":
        return combinations([ETHNICITIES, GENDERS])
    if not Path(choice).is_file():
        raise UsageError(f"--groups {choice}: there is no such file; give default, none or a YAML file")
    from curation.storage.yaml_files import read_yaml

    table = read_yaml("--groups", Path(choice), MAX_FILE_BYTES)
    lists = list(table.values()) if isinstance(table, dict) else [table]
    if not lists or not all(isinstance(values, list) and values for values in lists):
        raise UsageError(f"--groups {choice}: write a list of groups, or attributes with lists of values")
    return combinations([[_checked(value, choice) for value in values] for values in lists])


def combinations(lists: Sequence[Sequence[str]]) -> Groups:
    """All combinations of one value from each list; the last varies fastest.

    Raises UsageError for too many groups, or the same group twice."""
    count = 1
    for values in lists:
        count *= len(values)
    if count > MAX_GROUPS:
        raise UsageError(f"--groups: {count:,} groups, at most {MAX_GROUPS:,} make sense")
    groups = tuple(" ".join(values) for values in itertools.product(*lists))
    if len(set(groups)) < len(groups):
        raise UsageError("--groups: the same group twice")
    return groups


def assign_groups(keys: Iterable[str], shard_id: str, groups: Groups, seed: int) -> dict[str, str | None]:
    """Map each key to a group.  The numbers of samples of any two groups in a shard differ by at most one.

    The keys are assigned in an order hashed from seed and key, beginning with a group hashed from seed and shard, so
    that many small shards together are balanced too.
    """
    dealt = sorted(keys, key=lambda key: (hash_of(seed, key), key))
    if not groups:
        return dict.fromkeys(dealt)
    first = hash_of(seed, "shard", shard_id)
    return {key: groups[(first + number) % len(groups)] for number, key in enumerate(dealt)}


@lru_cache(maxsize=1 << 14)
def attributes_of(group: str) -> tuple[tuple[str, str], ...]:
    """Returns the (attribute, value) pairs of a group such as "middle east male".

    Words that belong to no known attribute become one value of the attribute "group".
    """
    rest, found = f" {group.lower()} ", []
    for attribute, values in ATTRIBUTES.items():
        for value in sorted(values, key=len, reverse=True):
            if f" {value} " in rest:
                found.append((attribute, value))
                rest = rest.replace(f" {value} ", " ", 1)
                break
    if words := rest.strip():
        found.append(("group", words))
    return tuple(found)


def hash_of(seed: int, *parts: object) -> int:
    """A 64-bit hash that is the same everywhere; ("ab", "c") and ("a", "bc") differ."""
    text = "\0".join(str(part) for part in (seed, *parts))
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _checked(value: object, choice: str) -> str:
    if not isinstance(value, str) or not value or len(value) > MAX_CHARACTERS or '"' in value:
        raise UsageError(f"--groups {choice}: {str(value)[:50]!r} is not a text of 1 to {MAX_CHARACTERS} characters")
    if clean_text(value) != value:
        raise UsageError(f"--groups {choice}: {value!r} has control characters or spaces at its ends")
    return value
