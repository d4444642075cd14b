"""How Ollama gets a model: the commands to run where it serves, and whether it has the model on this machine.

``tulu3:fairclip`` is made from another model by a Modelfile, which a wheel carries too.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from curation import PROJECT

MODELFILES = {"tulu3:fairclip": PROJECT / "examples" / "ollama" / "Modelfile"}
_DEFAULT_PORT = 11434
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_FOLDERS = ("~/.ollama/models", "/usr/share/ollama/.ollama/models")  # the latter of the systemd service


def base_of(modelfile: Path) -> str:
    """The model that a Modelfile begins with.

    Raises:
        ValueError: It has no line FROM.
    """
    found = re.search(r"^FROM\s+(\S+)", modelfile.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{modelfile} has no line FROM")
    return found[1]


def commands(model: str, url: str = "") -> list[str]:
    """The shell commands that give a server the model.

    Args:
        model: The server's name for it.
        url: The server; "" for the one that ``ollama`` asks unless it is told otherwise.
    """
    modelfile = MODELFILES.get(model)
    if modelfile is None:
        words = [["ollama", "pull", model]]
    else:
        words = [["ollama", "pull", base_of(modelfile)], ["ollama", "create", model, "-f", _shown(modelfile)]]
    host = _host_of(url)
    return [f"{host}{shlex.join(command)}" for command in words]


def _shown(path: Path) -> str:
    """The path as a shell in the current folder takes it, short where that is possible."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _host_of(url: str) -> str:
    """``OLLAMA_HOST=… `` for a server that is not Ollama's usual one; without a user and a password in the URL."""
    parts = urlsplit(url)
    if not parts.hostname or (parts.hostname in _THIS_MACHINE and parts.port == _DEFAULT_PORT):
        return ""
    place = parts.netloc.rpartition("@")[2]
    return f"OLLAMA_HOST={shlex.quote(f'{parts.scheme}://{place}')} "


def has(model: str) -> bool:
    """Whether Ollama's folder on this machine has the model: nobody is asked, and nothing is loaded."""
    name, _, tag = model.partition(":")
    if re.search(r"(^|/)\.\.?(/|$)", name):
        return False
    own = os.environ.get("OLLAMA_MODELS")
    place = Path("manifests", "registry.ollama.ai", *(() if "/" in name else ("library",)), name, tag or "latest")
    return any((Path(folder).expanduser() / place).is_file() for folder in ([own] if own else _FOLDERS))
