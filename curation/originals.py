"""What is known of the samples that are to be edited: their prompts, how those came about, the original metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.dictionaries import KEY_SUFFIX, clean_text, parse_json_object, read_dictionary
from curation.edited import loose_path, original_metadata, unsafe_key
from curation.errors import SampleError, ShardError


class Originals:
    """The original metadata of a shard's samples: ``edits/<shard>.json``, or else loose ``edits/<shard>/<key>.json``.

    stage: the one that edits; a loose file may already hold its edit, which is then undone.
    Raises ShardError when neither is there.
    """

    def __init__(self, edits: Path, shard_id: str, stage: str) -> None:
        self._dictionary, self._folder, self._stage = edits / f"{shard_id}.json", edits / shard_id, stage
        self._known: Mapping[str, Any] | None = None
        if self._dictionary.exists():
            self._known = read_dictionary(self._dictionary)
        elif not self._folder.is_dir():
            raise ShardError(f"no metadata of the samples: neither {self._dictionary} nor {self._folder}/ is there")

    def find(self, key: str) -> Mapping[str, Any]:
        """The metadata of a key that ``unsafe_key`` finds nothing wrong with.  SampleError where there is none."""
        found = self._loose(key) if self._known is None else self._known.get(key + KEY_SUFFIX)
        if found is None:
            raise SampleError("no_metadata", f"{self._dictionary.name} has no entry")
        if not isinstance(found, dict):
            raise SampleError("bad_metadata", f"a {type(found).__name__} in {self._dictionary.name}")
        return found

    def _loose(self, key: str) -> Mapping[str, Any]:
        try:
            data = loose_path(self._folder, key + KEY_SUFFIX).read_bytes()
            return original_metadata(parse_json_object(data), self._stage)
        except OSError as error:
            raise SampleError("no_metadata", error.strerror or "") from error
        except SampleError as error:
            raise SampleError("bad_metadata", str(error)) from None


def checked_prompt(key: str, prompt: object) -> str:
    """The prompt as one line of text.  SampleError for what is none, and for a key that cannot name a file."""
    if problem := unsafe_key(key):
        raise SampleError("unsafe_key", problem)
    if not isinstance(prompt, str):
        raise SampleError("prompt_not_text", f"it is a {type(prompt).__name__}")
    if not (text := clean_text(prompt)):
        raise SampleError("empty_prompt")
    return text


def with_suffix(prompt: str, suffix: str) -> str:
    """The prompt as the model gets it: ', sharp' is put right behind it, a word after a space."""
    return f"{prompt}{'' if not suffix or suffix[0] in ' ,.;:' else ' '}{suffix}"


def read_provenance(path: Path) -> dict[str, Mapping[str, Any]]:
    """key → the line that the stage before recorded about its prompt; empty where the prompts were made elsewhere."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
    found: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json_object(line)
        except SampleError as error:
            raise ShardError(f"{path}, line {number}: {error}") from None
        found[str(record.get("key", ""))] = record
    return found
