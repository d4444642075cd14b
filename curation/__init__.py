"""Curation of web-scale image-text datasets, shard by shard.  See docs/design.md."""

import sys
from pathlib import Path

__version__ = "0.3.0"

# How the commands are called in messages: as the user called the program that says it.
PROGRAM = "curation" if Path(sys.argv[0]).name == "curation" else "python -m curation"

_PACKAGE = Path(__file__).resolve().parent
# The folder of the numbered scripts and of the job scripts: the clone, or the copies that setup.py puts into the wheel.
PROJECT = _PACKAGE / "project" if (_PACKAGE / "project").is_dir() else _PACKAGE.parent
