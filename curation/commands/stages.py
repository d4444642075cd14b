"""The numbered scripts of the stages, found by name and loaded by their path.

This is the only place that loads a script: a script is a program, and no module imports one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from curation.errors import InfrastructureError, UsageError
from curation.options import RunOptions, parse_options
from curation.run import Stage

ROOT = Path(__file__).resolve().parents[2]


def find_script(stage: str) -> Path:
    """The script of a stage.

    Args:
        stage: Its number (``03``), its name (``03_generate_images``) or its file's name.

    Raises:
        UsageError: There is no such stage; the message lists those that are there.
    """
    scripts = sorted(ROOT.glob("[0-9][0-9]_*.py"))
    name = stage.removesuffix(".py")
    for script in scripts:
        if name in (script.stem, script.name[:2], script.stem.removesuffix("_multigpu")):
            return script
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
    required = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    stand_ins = [argument for f in required for argument in (f"--{f.name}", f.name)]
    return parse_options(kind, [*stand_ins, *arguments], prog=prog)
