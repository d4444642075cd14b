"""The numbered scripts of the stages, found by name and loaded by their path.

This is the only place that loads a script: a script is a program, and no module imports one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from curation import PROGRAM, PROJECT
from curation.errors import InfrastructureError, UsageError
from curation.options import RunOptions, parse_options
from curation.run import Stage

# The commands that run a stage → the script that each of them is.
COMMANDS = {
    "download": "00_download",
    "faces": "01_filter_noface",
    "rewrite": "02_captions_processor",
    "generate": "03_generate_images_multigpu",
    "reshard": "04_reshard",
    "caption": "05_recaption",
    "extract": "06_metadata",
}


def commands_of_scripts() -> dict[str, str]:
    """The stem of each numbered script → the command that runs it."""
    return {script: command for command, script in COMMANDS.items()}


def run_as_command(command: str, argv: Sequence[str]) -> int:
    """Run a stage's script in this process, as ``curation faces`` does.

    Args:
        command: One of ``COMMANDS``.
        argv: The words after the command.

    Returns:
        The script's exit code.
    """
    module = load_script(find_script(command))
    sys.argv[:] = [f"{PROGRAM} {command}", *argv]  # the name that the script's usage shows
    code: int = module.main(list(argv))
    return code


def find_script(stage: str) -> Path:
    """The script of a stage.

    Args:
        stage: Its number (``03``), its name (``03_generate_images``), its command (``generate``) or its file's name.

    Raises:
        UsageError: There is no such stage; the message lists those that are there.
    """
    scripts = sorted(PROJECT.glob("[0-9][0-9]_*.py"))
    name = stage.removesuffix(".py")
    for script in scripts:
        names = (script.stem, script.name[:2], script.name[1:2], script.stem.removesuffix("_multigpu"))
        if name in names or COMMANDS.get(name) == script.stem:
            return script
    if not scripts:
        raise InfrastructureError(f"{PROJECT}: the numbered scripts are missing; install the package again")
    raise UsageError(f"there is no stage {stage!r}; there are {', '.join(script.stem for script in scripts)}")


def load_script(script: Path) -> ModuleType:
    """The script as a module, loaded once in a process.  Nothing runs when a script is imported."""
    name = f"stage_{script.name[:2]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, script)
    if spec is None or spec.loader is None:
        raise InfrastructureError(f"{script}: cannot be imported")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def stage_class(module: ModuleType) -> type[Stage[Any]]:
    """The first class that the script itself defines and that is a stage."""
    return next(
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Stage) and kind.__module__ == module.__name__
    )


def partial_options(module: ModuleType, arguments: Sequence[str], prog: str) -> RunOptions:
    """The script's options from a command line that may leave out what the stage requires, such as its folders.

    What is left out has its own name as its value.
    """
    kind: type[RunOptions] = module.Options
    return parse_options(kind, arguments, prog=prog, partial=True)
