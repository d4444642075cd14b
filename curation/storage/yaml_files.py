"""Reads the YAML files that users give to options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from curation.errors import UsageError
from curation.storage.files import read_given

MAX_VALUES = 10_000_000  # with those that an alias stands for


def read_yaml(option: str, path: Path, max_bytes: int, *, texts: bool = False) -> Any:
    """Read a YAML file with limits for its size, its depth and what its aliases stand for.

    Args:
        option: The option that names the file, for the message; "" if it is not named by an option.
        path: The file.
        max_bytes: The largest size of the file.
        texts: Leave each value as the text that stands in the file, except for null.  Otherwise YAML reads ``no`` as
            False and ``00000010`` as 8.

    Returns:
        Its value: dictionaries, lists, texts, numbers, dates.  A key that is there twice is an error.

    Raises:
        UsageError: The file cannot be read, is too large, or is not YAML.
    """
    where = f"{option} {path}".strip()
    return parse_yaml(where, read_given(where, path, max_bytes), texts=texts)


def parse_yaml(where: str, data: bytes, *, texts: bool = False) -> Any:
    """What ``read_yaml`` makes of a file's content.  where: what the message calls it."""
    loader: _Loader | None = None
    try:
        loader = (_TextLoader if texts else _Loader)(data)
        node = loader.get_single_node()
        _count(node, {})
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UsageError(f"{where}: not YAML that can be read: it is nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date such as 2026-99-99
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a node has, where each alias counts as what it stands for.

    Raises:
        yaml.YAMLError: More than ``MAX_VALUES``, or an alias stands for something that holds it.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # until it is counted: an alias within it would have no end
        pairs = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in pairs)
    if known[id(node)] > MAX_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {MAX_VALUES:,} values")
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """As safe as that, and a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """Knows null and merge keys (``<<``).  Every other plain value is a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
