"""``curation scripts FOLDER`` copies the numbered scripts and the job scripts to a folder of the user's.

There they can be edited and submitted with ``sbatch``, although the package is installed and there is no clone.  The
copies run with the Python that has the package: its path is written into ``installed.sh`` beside them, which
``slurm_tasks.sh`` reads.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import curation
from curation import PROJECT, __version__
from curation.errors import EXIT_OK, UsageError
from curation.options import POSITIONAL, exit_code, parse_arguments
from curation.storage.files import storage_errors, write_whole

_PATTERNS = (
    "[0-9][0-9]_*.py",
    "[0-9][0-9]_*.sh",
    "run_pipeline.sh",
    "serve_endpoints.sh",
    "slurm_tasks.sh",
    "examples/ollama/Modelfile",
)
_FOR_PYTHON = "installed.sh"
_HEAD = "# Written by `curation scripts`: the package that these scripts belong to, and the Python that has it.\n"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Copy the numbered scripts and the job scripts to a folder; they run with the Python that has the package."""

    folder: Annotated[Path, POSITIONAL]
    """Folder for the copies; it is created if it does not exist."""
    overwrite: bool = False
    """Replace files of the folder that differ, such as those of another version, or those that you have edited."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "scripts")
    folder = options.folder.expanduser().absolute()
    if folder.resolve() == PROJECT:
        raise UsageError(
            f"{folder}: this folder already contains the original scripts; give another folder for the copies"
        )
    sources = {file.relative_to(PROJECT): file for pattern in _PATTERNS for file in sorted(PROJECT.glob(pattern))}
    differing = [str(name) for name, file in sources.items() if _differs(folder / name, file.read_bytes())]
    if differing and not options.overwrite:
        they = (
            "differs from the package's: --overwrite replaces it"
            if len(differing) == 1
            else ("differ from the package's: --overwrite replaces them")
        )
        raise UsageError(f"{folder}: {', '.join(differing)} {they}")
    with storage_errors(folder):
        for name, file in sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / name)  # it stays executable
        (folder / "logs").mkdir(exist_ok=True)  # sbatch writes its logs there
        write_whole(folder / _FOR_PYTHON, "".join(_lines(folder)).encode())
    print(f"{len(sources)} files are in {folder}; they run with {sys.executable}")
    print(f"To submit a stage: cd {shlex.quote(str(folder))} && SRC_DIR=... ROOT=... sbatch 01_filter_noface.sh")
    return EXIT_OK


def _differs(target: Path, content: bytes) -> bool:
    try:
        return target.read_bytes() != content
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror}") from None


def _lines(folder: Path) -> Iterator[str]:
    """What slurm_tasks.sh has to know, as assignments of bash."""
    package = Path(curation.__path__[0])
    yield f"{_HEAD}PACKAGE={shlex.quote(str(package))}\nSCRIPTS_VERSION={shlex.quote(__version__)}\n"
    yield f"PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}\n"
    if not _is_found_without_help(package, folder):  # as after pip install --target
        yield f"export PYTHONPATH={shlex.quote(str(package.parent))}${{PYTHONPATH:+:$PYTHONPATH}}\n"


def _is_found_without_help(package: Path, folder: Path) -> bool:
    """Whether Python finds this very package where no variable names its place."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import curation; print(curation.__path__[0])"]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return found.stdout.rstrip("\n") == str(package)
