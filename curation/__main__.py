"""``python -m curation <command>``: what one does with the folders of a dataset beside running its stages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from curation.errors import EXIT_OK, EXIT_USAGE

# When it is needed → the command → the module below ``curation`` whose ``main(argv)`` it is, imported only when the
# command is called, and what the command does.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "before a run": {
        "plan": (
            "commands.plan.command",
            "forecast hours, bytes, files and tokens, and show the sbatch lines",
        ),
        "models": ("commands.models", "fetch the weights that a stage's options name, for nodes without internet"),
    },
    "during a run": {
        "register": ("serving.registry", "keep a model server in the folder of servers while it lives"),
        "status": ("commands.status.command", "how far each stage is: done, failed, running, pending, stale"),
        "retry": ("commands.retry", "make failed shards of a stage pending again"),
    },
    "look at the result": {
        "report": ("commands.report.command", "write one page about it all: funnel, shards, speed, gallery, groups"),
        "audit": ("commands.audit.command", "what became of each group's samples, and which group fared differently"),
    },
    "check the result": {
        "verify": ("commands.verify.command", "prove that hybrid shards are their source with the edits in place"),
        "fsck": (
            "commands.fsck.command",
            "find what is wrong with tars, and save the whole samples of damaged ones",
        ),
    },
    "use the result": {
        "select": ("commands.tables.select", "list the uids of the samples whose scores fulfil a condition"),
        "neardup": ("commands.tables.neardup", "find groups of near duplicates by features, and keep one of each"),
        "publish": ("commands.publish", "upload a stage's finished outputs to a dataset repository of the hub"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Args:
        argv: The command's name and its arguments; ``sys.argv`` where it is None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return EXIT_OK
    name = arguments[0]
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return EXIT_USAGE
    module, _ = COMMANDS[name]
    code: int = import_module(f"curation.{module}").main(arguments[1:])
    return code


def usage() -> str:
    """Returns the text of ``python -m curation --help``."""
    width = max(map(len, COMMANDS))
    lines = ["usage: python -m curation COMMAND ..."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {what}" for name, (_, what) in commands.items())]
    return "\n".join([*lines, "", "Each command has its own --help."])


if __name__ == "__main__":
    sys.exit(main())
