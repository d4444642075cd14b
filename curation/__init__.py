"""Curation of web-scale image-text datasets, shard by shard.  See docs/design.md.

Every program of the project imports this module before anything else.  So this is the place that refuses a Python which
could import nothing else, with one line in place of a SyntaxError or a ModuleNotFoundError.  This module runs under old
Pythons too: the tests compile it, and the numbered scripts, as Python 3.6 would.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

__version__ = "0.7.0"

# How the commands are called in messages: as the user called the program that says it.
PROGRAM = "curation" if Path(sys.argv[0]).name == "curation" else "python -m curation"

_PACKAGE = Path(__file__).resolve().parent
# The folder of the numbered scripts and of the job scripts: the clone, or the copies that setup.py puts into the wheel.
PROJECT = _PACKAGE / "project" if (_PACKAGE / "project").is_dir() else _PACKAGE.parent

OLDEST_PYTHON = (3, 11)
# What every program needs: the module → the package that pip installs for it.
CORE = {
    "filelock": "filelock",
    "numpy": "numpy",
    "orjson": "orjson",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "requests": "requests",
    "rich": "rich",
    "simplejpeg": "simplejpeg",
    "xxhash": "xxhash",
}


def _refuse_this_python() -> None:
    """End the program with exit code 2 if this Python is too old, or lacks packages that every program needs."""
    missing = [package for module, package in CORE.items() if find_spec(module) is None]
    venv, installer = PROJECT / ".venv", PROJECT / "install.sh"
    if sys.version_info < OLDEST_PYTHON:
        here, oldest = ".".join(map(str, sys.version_info[:2])), ".".join(map(str, OLDEST_PYTHON))
        trouble, remedies = f"is Python {here}, and this needs Python {oldest} or newer", []
    elif missing:
        trouble, remedies = f"lacks {', '.join(missing)}", [f"{sys.executable} -m pip install {' '.join(missing)}"]
    else:
        return
    if venv.is_dir() and Path(sys.prefix) != venv:
        remedies.insert(0, f"source {quote(str(venv))}/bin/activate")
    elif installer.is_file():
        remedies.insert(0, f"{quote(str(installer))} makes an environment that has all")
    sys.stderr.write(f"error: {sys.executable} {trouble}: {', or '.join(remedies) or 'use a newer one'}\n")
    sys.exit(2)


_refuse_this_python()
