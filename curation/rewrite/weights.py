"""The weights that stage 02 needs on a machine without internet: the language model, which Ollama downloads."""

from __future__ import annotations

import shlex
from pathlib import Path

from curation import PROJECT
from curation.models.needs import NothingToFetch, WeightsNeed

_MODELFILES = {"tulu3:fairclip": Path("examples", "ollama", "Modelfile")}  # for models that are made from another one


def prompt_model(name: str) -> WeightsNeed:
    """The commands with which Ollama downloads the model that writes the prompts.

    Args:
        name: The server's name for the model.
    """
    commands = [f"ollama pull {name}"]
    if (modelfile := _MODELFILES.get(name)) is not None:
        file = PROJECT / modelfile
        lines = file.read_text("utf-8").splitlines()
        base = next(line.split()[1] for line in lines if line.startswith("FROM "))
        commands = [
            f"ollama pull {base}",
            f"ollama create {name} -f {modelfile if modelfile.exists() else shlex.quote(str(file))}",
        ]
    return NothingToFetch(
        "\n".join(
            [
                "This command does not fetch the model that writes the prompts.  It needs no token.",
                "Where Ollama serves it, run these with `ollama serve` and the internet, OLLAMA_MODELS on a shared "
                "folder:",
                *(f"    {command}" for command in commands),
            ]
        )
    )
