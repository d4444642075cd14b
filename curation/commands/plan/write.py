"""Writes the file of a pipeline with which ``curation run`` runs stages 01 to 04 as planned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from curation import PROGRAM
from curation.commands.stages import find_script, load_script
from curation.errors import UsageError
from curation.options.flags import flags_of
from curation.storage.files import storage_errors, write_whole

_SERVERS = ("ENDPOINTS_DIR", "ENDPOINTS", "PORTS")  # the first that is set names the model servers of stage 02


def write_pipeline(
    path: Path, sources: Sequence[str], root: Path, shards: str | None, environ: Mapping[str, str] = os.environ
) -> None:
    """Write the file.

    Args:
        path: The file; one that is there must have the same content.
        sources: The source shards.
        root: The folder of the dataset.
        shards: ``--shards`` for every stage.
        environ: ``FLAGS_01`` to ``FLAGS_04`` hold further flags of the stages; ``ENDPOINTS_DIR``, ``ENDPOINTS`` or
            ``PORTS`` the model servers of stage 02.  They mean what they mean to run_pipeline.sh.

    Raises:
        UsageError: Another file is there, or a variable holds what is no flag of the stage.
        InfrastructureError: It cannot be written.
    """
    places = [_escaped(os.path.abspath(source) if os.path.exists(source) else source) for source in sources]
    source: str | list[str] = "${SOURCE}" if len(places) == 1 else places
    stages: dict[str, dict[str, Any]] = {
        "01_filter_noface": {"input": source, "output": "${ROOT}/captions", "edits": "${ROOT}/edits"},
        "02_captions_processor": {"input": "${ROOT}/captions", "output": "${ROOT}/prompts"},
        "03_generate_images": {"input": "${ROOT}/prompts", "output": "${ROOT}/edits"},
        "04_reshard": {
            "input": source,
            "edits": "${ROOT}/edits",
            "prompts": "${ROOT}/prompts",
            "output": "${ROOT}/shards",
        },
    }
    if (server := next((name for name in _SERVERS if environ.get(name)), None)) is not None:
        stages["02_captions_processor"][server.lower()] = _escaped(environ[server])
    for title, options in stages.items():
        variable = f"FLAGS_{title[:2]}"
        options.update(_options_of(variable, title, environ.get(variable, "").split()))
    variables = {"ROOT": _escaped(str(root.absolute()))} | ({"SOURCE": places[0]} if len(places) == 1 else {})
    content: dict[str, Any] = {"vars": variables}
    content |= {"all": {"shards": _escaped(shards)}} if shards is not None else {}
    text = yaml.safe_dump(content | {"stages": stages}, sort_keys=False, allow_unicode=True, width=10_000)
    _write(path, f"# Written by `{PROGRAM} plan`.  Run it: {PROGRAM} run {path.name}\n{text}")


def _write(path: Path, text: str) -> None:
    with storage_errors(path):
        if path.exists():
            if path.is_file() and path.read_bytes() == text.encode():
                return
            raise UsageError(f"--write {path}: is there already with other content; remove it, or give another name")
        write_whole(path, text.encode())


def _options_of(variable: str, stage: str, words: Sequence[str]) -> dict[str, Any]:
    """Flags of a stage as options of the file."""
    flags = {name: flag for flag in flags_of(load_script(find_script(stage)).Options).values() for name in flag.names}
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        name = f"--{word.lstrip('-').replace('-', '_')}" if word.startswith("--") else word
        positive = name if name in flags else name.replace("--no_", "--", 1)
        if positive not in flags:
            raise UsageError(f"{variable}: stage {stage} has no flag {word}")
        flag = flags[positive]
        if flag.is_switch:
            found[flag.name] = (value.lower() != "false" if equals else True) is (positive == name)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--") and (flag.many or not values):
            values.append(rest.pop(0))
        if not values:
            raise UsageError(f"{variable}: {word} has no value")
        found[flag.name] = [_escaped(one) for one in values] if len(values) > 1 else _escaped(values[0])
    return found


def _escaped(text: str) -> str:
    """The text, in which nothing is taken for a variable."""
    return text.replace("${", "$${")
